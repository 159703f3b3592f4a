"""Makes a run folder of a checkpoint of a reference release.

    python convert.py KIND CHECKPOINT --config REFERENCE.yaml --out runs/NAME

Kinds: vqgan_taming and gpt_taming (CompVis/taming-transformers), vqgan_llamagen
(FoundationVision/LlamaGen), vqvae_simplecnn (visual-tokenizer-pytorch), mqvae and stackformer,
dqvae and dq_transformer (the papers' official releases).
"""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path
from typing import Any

from harness.config import UserError, check_config, override, read_yaml
from harness.launch import run_main
from harness.models import STAGE1, load_run, model_class, save_run
from harness.reference import FIRST_STAGE, KINDS, from_reference, pick
from harness.settings import STAGE1_SECTIONS
from harness.settings2 import STAGE2_SECTIONS

import torch
import torch.nn as nn
from safetensors.torch import load_file
from torch import Tensor


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument(
        "checkpoint", help="a .ckpt, .pt, .pth or .safetensors file of the release")
    parser.add_argument(
        "--config", required=True, help="the release's YAML file for this model")
    parser.add_argument("--out", required=True, help="the run folder to make")
    parser.add_argument(
        "--stage1", help="(stage 2) the converted run of the first stage, if the checkpoint does "
                         "not hold it")
    parser.add_argument(
        "--data", nargs="*", default=[], metavar="KEY=VALUE",
        help="settings of the section data, such as root=PATH")
    parser.add_argument(
        "--thresholds", help="(dqvae, entropy router) the release's JSON file of thresholds")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights")
    parser.add_argument(
        "--discriminator", action="store_true",
        help="keep the discriminator, as discriminator.safetensors")
    parser.add_argument(
        "--trust", action="store_true", help="allow the checkpoint to run code when it is loaded")
    args = parser.parse_args(argv)
    out = Path(args.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; choose another --out")
    release = without_params(read_yaml(args.config))
    state = read_checkpoint(args.checkpoint, args.ema, args.trust)
    own = _part(state, "transformer.") or state
    model, section = _convert(args.kind, own, release, args.thresholds)
    size = section.get("image_size", 64)
    if args.kind in FIRST_STAGE:
        first_stage = _part(state, "first_stage_model.")
        stage1, stage1_config = _first_stage(args, release, first_stage, section)
        size = stage1_config["data"]["image_size"]
    config = _run_config(section, size, args)
    others = {}
    if args.discriminator:
        discriminator = _part(state, "loss.discriminator.main.")
        if not discriminator:
            raise UserError(f"{args.checkpoint} holds no discriminator")
        others["discriminator"] = {k: v.contiguous() for k, v in discriminator.items()}

    # All checks are done: write
    save_run(out, config, {"model": model}, others)
    if args.kind in FIRST_STAGE:
        save_run(out / "stage1", stage1_config, {"model": stage1})
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{out}: {section['name']}, {parameters / 1e6:.1f} M parameters")


def _first_stage(args, release, state: dict[str, Tensor], section) -> tuple[nn.Module, dict]:
    """The stage-1 model and config, from --stage1 or from its weights in the checkpoint. Its codes
    must be those of the transformer's `section`."""
    if args.stage1:
        model, config = load_run(args.stage1)
    elif state:
        release = {"model": release.get("model", {}).get("first_stage_config", {})}
        model, first = _convert(FIRST_STAGE[args.kind], state, release, args.thresholds)
        config = _run_config(first, first["image_size"], args)
    else:
        raise UserError(f"{args.checkpoint} does not hold the weights of the first stage; convert "
                        "them first and give the run as --stage1")
    try:
        transformer = model_class(section["name"])
        settings = transformer.settings_for(model, config["data"]["image_size"])
    except ValueError as error:
        raise UserError(f"the first stage does not fit: {error}") from error
    if any(section[key] != value for key, value in settings.items()):
        raise UserError("the first stage's codes are not those that this "
                        f"{section['name']} generates")
    return model, config


def _convert(kind, state: dict[str, Tensor], release, thresholds) -> tuple[nn.Module, dict]:
    """The model, and the section `model` of its config."""
    try:
        config = read_config(kind, release, thresholds)
        return from_reference(kind, state, config), KINDS[kind](config)[0]
    except ValueError as error:
        raise UserError(str(error)) from error
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(
            f"this is not the config of a {kind}: {error} is missing or wrong") from error


def _run_config(section, size: int, args) -> dict:
    """The complete config of a run with this model. The data can be named later."""
    sections = STAGE1_SECTIONS if section["name"] in STAGE1 else STAGE2_SECTIONS
    output_dir = str(Path(args.out).expanduser())
    config = {
        "model": dict(section), "data": {"name": "folder", "image_size": size},
        "train": {"output_dir": output_dir, "learning_rate": 1e-4, "max_train_steps": 1},
    }
    override(config, [f"data.{setting}" for setting in args.data], sections)
    return check_config(config, sections, "--data")


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def read_checkpoint(path: str | Path, ema: bool = False, trust: bool = False) -> dict[str, Tensor]:
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
        refused = "weights_only" in words or "Unsupported" in words
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise UserError(f"{path} holds more than tensors, so loading it can run code; "
                            "if you trust its source, add --trust") from error
        raise UserError(
            f"{path} is not a whole checkpoint ({words.splitlines()[0]})") from error
    if not isinstance(checkpoint, dict):
        raise UserError(
            f"{path} holds a {type(checkpoint).__name__} instead of named tensors")
    if ema and isinstance(checkpoint.get("ema"), dict):
        return checkpoint["ema"]
    for key in ("state_dict", "model"):
        if isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
    tensors = {k: v for k, v in checkpoint.items() if isinstance(v, Tensor)}
    averaged = _part(tensors, "model_ema.")  # of Lightning's LitEma, which drops the dots
    state = {k: v for k, v in tensors.items() if not k.startswith("model_ema.")}
    if ema:
        if not averaged:
            raise UserError(f"{path} holds no averaged weights")
        state = {k: averaged.get(k.replace(".", ""), v) for k, v in state.items()}
    if not state:
        raise UserError(f"{path} holds no named tensors")
    return state


def without_params(release: Any) -> Any:
    """A release's config with one level less: {target: CLASS, params: {...}} becomes
    {target: CLASS, ...}."""
    if not isinstance(release, dict):
        return release
    level = {key: without_params(value) for key, value in release.items()}
    return level | (level.pop("params", None) or {})


def read_config(kind: str, release: dict, thresholds: str | Path | None = None) -> dict:
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


def _read_vqgan_taming(params) -> dict:
    return pick(params, "ddconfig", "n_embed", "embed_dim")


def _read_mqvae(params) -> dict:
    return pick(params, encoder="encoder_config", masker="masker_config",
                demasker="demasker_config", quantizer="vqconfig")


def _read_dqvae(params, thresholds) -> dict:
    encoder = params["encoderconfig"]
    router = encoder["router_config"]
    grains = "triple" if "Triple" in router["target"] else "dual"
    config = {
        "encoder": encoder, "decoder": params["decoderconfig"],
        **pick(params["vqconfig"], "codebook_size", "codebook_dim", beta="commitment_beta"),
    }
    if "Entropy" not in router["target"]:
        budget = params["lossconfig"]["budget_loss_config"]
        return config | {"kind": f"{grains}_feature", "budget": budget, "router": router}
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
    patch_size = 2 ** (len(encoder["ch_mult"]) - 1)
    return config | {
        "kind": f"{grains}_entropy", "budget": {"target_ratio": ratio, "gamma": 10.0},
        "router": {"threshold": threshold, "patch_size": patch_size},
    }


def _read_gpt_taming(params) -> dict:
    first = params["first_stage_config"]
    net = first["ddconfig"]
    condition = params.get("cond_stage_config")
    classes = 0
    if not params.get("unconditional") and condition != "__is_unconditional__":
        key = params.get("cond_stage_key")
        if key not in ("class_label", "class"):
            raise UserError(f"this transformer is conditioned on {key!r}; "
                            "only unconditional and class-conditional ones are supported")
        classes = condition.get("n_classes", 1000) if isinstance(condition, dict) else 1000
    return params["transformer_config"] | {
        "codebook_size": first["n_embed"], "n_classes": classes,
        "sos_token": params.get("sos_token", 0),
        "grid": net["resolution"] // 2 ** (len(net["ch_mult"]) - 1),
    }


def _read_stackformer(params) -> dict:
    first = params["first_stage_config"]
    grid = params["height_and_weight"]  # their spelling
    return params["transformer_config"] | {
        "grid": grid, **pick(first["vqconfig"], "codebook_size"),
        "n_classes": params.get("n_classes", 0),
        "codes_per_image": int(first["masker_config"]["topk_ratio"] * grid**2),
        "position_sos": params.get("sos_pos_token", grid**2),
    }


def _read_dq_transformer(params) -> dict:
    order = params["permuter_config"]
    by_class = params.get("class_cond_stage_config")
    if by_class:
        classes = by_class["n_classes"]
        starts = pick(by_class, content="threshold_content", coarse="threshold_coarse_position",
                      fine="threshold_fine_position")
    else:
        classes = 0
        starts = pick(params["uncond_stage_config"], content="coarse_sos",
                      coarse="coarse_pos_sos", fine="fine_pos_sos")
    special = {
        "content_eos": order["content_eos_code"],
        "content_sos_or_first_class": starts["content"],
    }
    for grain in ("coarse", "fine"):
        special[f"{grain}_position_eos"] = order[f"{grain}_position_eos_code"]
        special[f"{grain}_position_sos_or_first_class"] = starts[grain]
    return params["transformer_config"] | {
        **pick(order, "coarse_hw", "fine_hw", "fine_position_order",
               codebook_size="content_pad_code"),
        "n_classes": classes, "special": special,
    }


READERS = {"vqgan_taming": _read_vqgan_taming, "mqvae": _read_mqvae,
           "gpt_taming": _read_gpt_taming, "stackformer": _read_stackformer,
           "dq_transformer": _read_dq_transformer}

if __name__ == "__main__":
    run_main(main)
