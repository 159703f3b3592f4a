"""Makes a run folder of a checkpoint of a reference release.

    python convert.py KIND CHECKPOINT --config REFERENCE.yaml --out runs/NAME

Kinds: vqgan_taming and gpt_taming (CompVis/taming-transformers), vqgan_llamagen
(FoundationVision/LlamaGen), vqvae_simplecnn (visual-tokenizer-pytorch), mqvae and stackformer,
dqvae and dq_transformer (the papers' official releases).
"""

import argparse
import json
import pickle
import re
from pathlib import Path

from harness.config import UserError, check_config, override, read_yaml
from harness.launch import run_main
from harness.models import STAGE1, load_run, model_class, save_run
from harness.reference import FIRST_STAGE, KINDS, from_reference, pick
from harness.sampling import to_path
from harness.settings import STAGE1_SECTIONS
from harness.settings_stage2 import STAGE2_SECTIONS

import torch
from safetensors.torch import load_file
from torch import Tensor


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("kind", choices=KINDS)
    option("checkpoint", help="a .ckpt, .pt, .pth or .safetensors file of the release")
    option("--config", required=True, help="the release's YAML file for this model")
    option("--out", required=True, type=to_path, help="the run folder to make")
    option("--stage1", help="(stage 2) the converted run of the first stage, if the checkpoint "
                            "does not hold it")
    option("--data", nargs="*", default=[], metavar="KEY=VALUE",
           help="settings of the section data, such as root=PATH")
    option("--thresholds", help="(dqvae, entropy router) the release's JSON file of thresholds")
    option("--ema", action="store_true", help="take the averaged weights")
    option("--discriminator", action="store_true",
           help="keep the discriminator, as discriminator.safetensors")
    option("--trust", action="store_true",
           help="allow the checkpoint to run code when it is loaded")
    args = parser.parse_args(argv)
    out = args.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; choose another --out")
    release = read_yaml(args.config)
    state = read_checkpoint(args.checkpoint, args.ema, args.trust)
    own = _part(state, "transformer.") or state
    model, section = _convert(args.kind, own, release, args.thresholds)
    size = section.get("image_size", 64)
    if args.kind in FIRST_STAGE:
        stage1, stage1_config = _first_stage(args, release, state, section)
        size = stage1_config["data"]["image_size"]
    config = _run_config(section, size, args)
    discriminator = _part(state, "loss.discriminator.main.")
    if args.discriminator and not discriminator:
        raise UserError(f"{args.checkpoint} holds no discriminator")

    # All checks are done: write
    others = {"discriminator": discriminator} if args.discriminator else None
    save_run(out, config, {"model": model}, others)
    if args.kind in FIRST_STAGE:
        save_run(out / "stage1", stage1_config, {"model": stage1})
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{out}: {section['name']}, {millions:.1f} M parameters")


def _first_stage(args, release, state, section):
    """The stage-1 model and config, from --stage1 or from its weights in the checkpoint. Its codes
    must be those of the transformer's `section`."""
    state = _part(state, "first_stage_model.")
    if args.stage1:
        model, config = load_run(args.stage1)
    elif state:
        release = without_params(release).get("model", {}).get("first_stage_config", {})
        model, first = _convert(FIRST_STAGE[args.kind], state, {"model": release}, args.thresholds)
        config = _run_config(first, first["image_size"], args)
    else:
        raise UserError(f"{args.checkpoint} does not hold the weights of the first stage; convert "
                        "them first and give the run as --stage1")
    try:
        settings = model_class(section["name"]).settings_for(model, config["data"]["image_size"])
    except ValueError as error:
        raise UserError(f"the first stage does not fit: {error}") from error
    if not settings.items() <= section.items():
        raise UserError("the first stage's codes are not those that this "
                        f"{section['name']} generates")
    return model, config


def _convert(kind, state, release, thresholds):
    """The model, and the section `model` of its config."""
    try:
        config = read_config(kind, release, thresholds)
        return from_reference(kind, state, config), KINDS[kind](config)[0]
    except ValueError as error:
        raise UserError(str(error)) from error
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(
            f"this is not the config of a {kind}: {error} is missing or wrong") from error


def _run_config(section, size, args):
    """The complete config of a run with this model. The data can be named later."""
    sections = STAGE1_SECTIONS if section["name"] in STAGE1 else STAGE2_SECTIONS
    train = {"output_dir": str(args.out), "learning_rate": 1e-4, "max_train_steps": 1}
    config = {"model": section, "data": {"name": "folder", "image_size": size}, "train": train}
    override(config, [f"data.{setting}" for setting in args.data], sections)
    return check_config(config, sections, "--data")


def _part(state, prefix):
    return {name.removeprefix(prefix): tensor.contiguous() for name, tensor in state.items()
            if name.startswith(prefix)}


def read_checkpoint(path, ema=False, trust=False):
    """The named tensors of a .safetensors file, a Lightning checkpoint (`state_dict`) or a LlamaGen
    checkpoint (`model`).

    ema      take the averaged weights
    trust    load a file that holds more than tensors, which can run code; by default it is refused
    """
    path = Path(path).expanduser()
    try:
        if path.suffix == ".safetensors":
            checkpoint = load_file(path)
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=not trust)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except Exception as error:  # what is not a checkpoint can raise almost anything
        words = str(error) or type(error).__name__
        refused = re.search("weights_only|Unsupported", words)
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise UserError(f"{path} holds more than tensors, so loading it can run code; "
                            "if you trust its source, add --trust") from error
        raise UserError(
            f"{path} is not a whole checkpoint ({words.splitlines()[0]})") from error
    if not isinstance(checkpoint, dict):
        checkpoint = {}
    if ema and checkpoint.get("ema"):
        return checkpoint["ema"]
    for key in ("state_dict", "model"):
        if isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
    state = {k: v for k, v in checkpoint.items() if isinstance(v, Tensor)}
    if not state:
        raise UserError(f"{path} holds no named tensors")
    if not ema:
        return state
    averaged = _part(state, "model_ema.")  # of Lightning's LitEma, which drops the dots
    if not averaged:
        raise UserError(f"{path} holds no averaged weights")
    return {k: averaged.get(k.replace(".", ""), v) for k, v in state.items()}


def without_params(release):
    """A release's config with one level less: {target: CLASS, params: {...}} becomes
    {target: CLASS, ...}."""
    if not isinstance(release, dict):
        return release
    level = {key: without_params(value) for key, value in release.items()}
    return level | (level.get("params") or {})


def read_config(kind, release, thresholds=None):
    """The config that from_reference takes, from the release's YAML file. A config that
    from_reference takes already is returned as is."""
    release = without_params(release)
    if kind == "vqvae_simplecnn" and "quantizer" in release:
        return release["encoder"] | release["quantizer"]
    if "model" not in release:
        return release
    params = release["model"]
    if "Gumbel" in params.get("target", ""):
        raise UserError("this config is of a Gumbel-quantized model, which is not supported")
    if kind == "dqvae":
        return _read_dqvae(params, thresholds)
    return READERS[kind](params)


def _read_mqvae(params):
    return pick(params, """
        encoder_config   encoder
        masker_config    masker
        demasker_config  demasker
        vqconfig         quantizer
        """)


def _read_dqvae(params, thresholds):
    encoder = params["encoderconfig"]
    router = encoder["router_config"]
    grains = "triple" if "Triple" in router["target"] else "dual"
    config = pick(params, """
        encoderconfig             encoder
        decoderconfig             decoder
        vqconfig.codebook_size    codebook_size
        vqconfig.codebook_dim     codebook_dim
        vqconfig.commitment_beta  beta
        """)
    if "Entropy" not in router["target"]:
        config["budget"] = params["lossconfig"]["budget_loss_config"]
        return config | {"kind": f"{grains}_feature"}
    ratio = router["fine_grain_ratito"]  # their spelling
    path = Path(thresholds or router["json_path"]).expanduser()
    try:
        threshold = json.loads(path.read_text())[str(int(100 - 100 * ratio))]
    except (OSError, ValueError, KeyError):
        raise UserError("the entropy router needs the release's JSON file of thresholds, and "
                        f"{path} is not one; name it by --thresholds") from None
    print(f"{path}: the release computes thresholds with other bins than its router uses, so more "
          "regions become fine than asked for (60 % instead of 50 % on 250 photographs of "
          "ImageNet)")
    config["budget"] = {"target_ratio": ratio, "gamma": 10.0}
    patch_size = 2 ** (len(encoder["ch_mult"]) - 1)
    config["router"] = {"threshold": threshold, "patch_size": patch_size}
    return config | {"kind": f"{grains}_entropy"}


def _read_gpt_taming(params):
    first = params["first_stage_config"]
    net = first["ddconfig"]
    condition = params.get("cond_stage_config")
    classes = 0
    if not params.get("unconditional") and condition != "__is_unconditional__":
        key = params.get("cond_stage_key")
        if key not in ("class_label", "class"):
            raise UserError(f"this transformer is conditioned on {key!r}; "
                            "only unconditional and class-conditional ones are supported")
        classes = condition.get("n_classes", 1000)
    return params["transformer_config"] | {
        "codebook_size": first["n_embed"], "n_classes": classes,
        "sos_token": params.get("sos_token", 0),
        "grid": net["resolution"] // 2 ** (len(net["ch_mult"]) - 1),
    }


def _read_stackformer(params):
    first = params["first_stage_config"]
    grid = params["height_and_weight"]  # their spelling
    return params["transformer_config"] | {
        "grid": grid, "codebook_size": first["vqconfig"]["codebook_size"],
        "n_classes": params.get("n_classes", 0),
        "codes_per_image": int(first["masker_config"]["topk_ratio"] * grid**2),
        "position_sos": params.get("sos_pos_token", grid**2),
    }


def _read_dq_transformer(params):
    starts = """
    class_cond_stage_config.n_classes                  n_classes
    class_cond_stage_config.threshold_content          special.content_sos_or_first_class
    class_cond_stage_config.threshold_coarse_position  special.coarse_position_sos_or_first_class
    class_cond_stage_config.threshold_fine_position    special.fine_position_sos_or_first_class
    """
    if not params.get("class_cond_stage_config"):
        starts = """
    uncond_stage_config.coarse_sos      special.content_sos_or_first_class
    uncond_stage_config.coarse_pos_sos  special.coarse_position_sos_or_first_class
    uncond_stage_config.fine_pos_sos    special.fine_position_sos_or_first_class
    """
    return {"n_classes": 0} | params["transformer_config"] | pick(params, starts, """
    permuter_config.coarse_hw                 coarse_hw
    permuter_config.fine_hw                   fine_hw
    permuter_config.fine_position_order       fine_position_order
    permuter_config.content_pad_code          codebook_size
    permuter_config.content_eos_code          special.content_eos
    permuter_config.coarse_position_eos_code  special.coarse_position_eos
    permuter_config.fine_position_eos_code    special.fine_position_eos
    """)


READERS = {"vqgan_taming": dict, "mqvae": _read_mqvae, "gpt_taming": _read_gpt_taming,
           "stackformer": _read_stackformer, "dq_transformer": _read_dq_transformer}

if __name__ == "__main__":
    run_main(main)
