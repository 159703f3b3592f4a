"""Models by name, and models from run folders and into them.

    STAGE1, STAGE2, QUANTIZERS    by name; their files are loaded when they are asked for
    make_model              the model of a config, untrained
    load_run, save_run      a model from a run folder, and the other way round
    run_config, class_names    what else a run folder knows
    own_folder              a run folder that is safe to write to

A run folder holds config.yaml (complete: it is enough to repeat the run), metrics.jsonl,
tensorboard/, samples/*.png and checkpoints/.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Literal

import torch.nn as nn
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file

from harness.checkpoint import newest_whole, whole_state, write_file, write_weights
from harness.config import UserError, build, choose, load_class, mapping, read_yaml
from harness.hub import run_folder

STAGE1 = {
    "vqgan": "vqgan.VQGAN",
    "vqvae": "vqgan.VQVAE",
    "mqvae": "mqvae.MQVAE",
    "dqvae": "dqvae.DQVAE",
}
STAGE2 = {
    "gpt": "gpt.GPT",
    "stackformer": "stackformer.Stackformer",
    "dq_transformer": "dq_transformer.DQTransformer",
    "mask_transformer": "mask_transformer.MaskTransformer",
}
MODELS = STAGE1 | STAGE2
QUANTIZERS = {  # model.quantizer.name
    "vq": "vqgan.VectorQuantizer",
    "fsq": "quantizers.FSQ",
    "lfq": "quantizers.LFQ",
    "bsq": "quantizers.BSQ",
    "simvq": "quantizers.SimVQ",
    "ibq": "quantizers.IBQ",
    "residual": "quantizers.ResidualVQ",
}


def model_class(name):
    return load_class(MODELS[name])


def load_run(folder: str | Path,
             which: Literal["latest", "best"] = "latest") -> tuple[nn.Module, dict]:
    """The model of a run folder, in eval mode on the CPU, and its config.

    which: the newest whole checkpoint, or the one of the best validation (whose PSNR may well be
    from before the GAN loss began). Averaged weights, if the run kept them. UserError if there is
    no such run.
    """
    folder = Path(run_folder(folder))
    config = run_config(folder)
    path = folder / "checkpoints/best.safetensors"
    if which == "latest":
        checkpoint = newest_whole(folder / "checkpoints", print)
        if checkpoint is None:
            raise UserError(f"{folder} has no whole checkpoint yet")
        path = averaged_if_any(checkpoint)
    if not path.is_file():
        raise UserError(f"{folder} has no {path.name} yet")
    model = make_model(config)
    try:
        model.load_state_dict(load_file(path))
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); copy or download it again") from error
    except RuntimeError as error:
        raise UserError(f"{path} does not hold the weights of the model in "
                        f"{folder}/config.yaml") from error
    return model.eval(), config


def averaged_if_any(checkpoint):
    """The file with the averaged weights, or else with the model's."""
    averaged = checkpoint / "ema.safetensors"
    return averaged if averaged.is_file() else checkpoint / "model.safetensors"


def run_config(folder):
    """The config of a run folder."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml")
    config = read_yaml(path)
    if mapping(config.get("model"), "model").get("name") not in MODELS:
        raise UserError(f"{path} names no model of {', '.join(MODELS)}")
    return config


def class_names(folder):
    """The names of a run's classes; None if it has none, or is a converted one, which has
    numbers."""
    path = Path(folder) / "classes.json"
    return json.loads(path.read_text()) if path.is_file() else None


def set_image_size(model, size):
    """Tells a stage-1 model the size of its images; UserError if it cannot take them."""
    try:
        model.set_image_size(size)
    except ValueError as error:
        raise UserError(f"data.{error}") from error


def make_model(config):
    """The model of a config, untrained."""
    settings = dict(config["model"])
    if quantizer := dict(settings.get("quantizer") or {}):
        quantizer_class = choose(QUANTIZERS, {"name": "vq"} | quantizer, "model.quantizer")
        quantizer.pop("name", None)
        settings["quantizer"] = build(quantizer_class, quantizer)
    return build(model_class(settings.pop("name")), settings)


def save_run(folder: Path, config: dict, modules: dict[str, nn.Module], more=None):
    """Makes a run folder of weights alone, {"model": ...}, which load_run reads; `more`: other
    files, as named tensors."""
    shutil.rmtree(folder, ignore_errors=True)
    weights = {name: whole_state(module) for name, module in modules.items()}
    write_weights(folder / "checkpoints/step_00000000", weights | (more or {}))
    # Last: with it, the folder is a run.
    write_file(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))


def own_folder(run: Path, *parts: str) -> Path:
    """The run folder, before its `parts` (glob patterns) are written to. UserError if one is a link
    that leads out of the folder: a run folder from someone else must not redirect our writes. (The
    run folder may itself be a link.)"""
    for part in parts:
        for path in run.glob(part):
            target = os.path.realpath(path)
            if path.is_symlink() and not Path(target).is_relative_to(os.path.realpath(run)):
                raise UserError(f"{path} is a link to {target}, outside of the run folder, and "
                                "would be written to; remove it (instead, the whole run folder "
                                "may be a link, and train.output_dir, codes.cache_dir and --out "
                                "can name other places)")
    return run
