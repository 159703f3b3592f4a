"""Makes a run folder of a checkpoint of a reference release.

    python convert.py KIND CHECKPOINT --config REFERENCE.yaml --out runs/NAME

Kinds: vqgan_taming and gpt_taming (CompVis/taming-transformers), vqgan_llamagen (FoundationVision/LlamaGen), vqvae_simplecnn
(visual-tokenizer-pytorch), mqvae and stackformer, dqvae and dq_transformer (the papers' official releases).
"""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path

import openmp  # noqa: F401, before torch
import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import train_stage1
import train_stage2
from config import UserError, check_config, override, read_yaml
from experiment import load_run, save_run
from launch import run_main
from reference import FIRST_STAGE, KINDS, from_reference


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("checkpoint", help="a .ckpt, .pt, .pth or .safetensors file of the release")
    parser.add_argument("--config", required=True, help="the release's YAML file for this model")
    parser.add_argument("--out", required=True, help="the run folder to make")
    parser.add_argument("--stage1", help="(stage 2) the converted run of the first stage, if the checkpoint does not hold it")
    parser.add_argument("--data", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the section data, such as root=PATH")
    parser.add_argument("--thresholds", help="(dqvae, entropy router) the release's JSON file of thresholds")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights")
    parser.add_argument("--discriminator", action="store_true", help="keep the discriminator, as discriminator.safetensors")
    parser.add_argument("--trust", action="store_true", help="allow the checkpoint to run code when it is loaded")
    args = parser.parse_args(argv)
    out = Path(args.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; choose another --out")
    given, state = read_yaml(args.config), read_checkpoint(args.checkpoint, args.ema, args.trust)
    if args.kind in FIRST_STAGE:
        model, section = _convert(args.kind, _of_stage(state, "transformer.") or state, given, args.thresholds)
        stage1, stage1_config = _first_stage(args, given, _of_stage(state, "first_stage_model."), section)
        size, sections = stage1_config["data"]["image_size"], train_stage2.SECTIONS
    else:
        model, section = _convert(args.kind, state, given, args.thresholds)
        size, sections = section.get("image_size", 64), train_stage1.SECTIONS
    config = _run_config(section, size, args, sections)
    discriminator = {k: v.contiguous() for k, v in _of_stage(state, "loss.discriminator.main.").items()}
    if args.discriminator and not discriminator:
        raise UserError(f"{args.checkpoint} holds no discriminator")

    # All checks are done: write
    save_run(out, config, {"model": model}, {"discriminator": discriminator} if args.discriminator else {})
    if args.kind in FIRST_STAGE:
        save_run(out / "stage1", stage1_config, {"model": stage1})
    print(f"{out}: {section['name']}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


def _first_stage(args: argparse.Namespace, given: dict, state: dict[str, Tensor], section: dict) -> tuple[nn.Module, dict]:
    """The stage-1 model and config, from --stage1 or from its weights in the checkpoint. Its codes must be those of `section`."""
    if args.stage1:
        model, config = load_run(args.stage1)
    elif state:
        given = {"model": (given.get("model") or {}).get("params", {}).get("first_stage_config", {})}
        model, first = _convert(FIRST_STAGE[args.kind], state, given, args.thresholds)
        config = _run_config(first, first["image_size"], args, train_stage1.SECTIONS)
    else:
        raise UserError(f"{args.checkpoint} does not hold the weights of the first stage; convert them first and give the run as --stage1")
    try:
        kind = train_stage2.STAGE2[section["name"]]
        wanted = kind.settings_for(model, config["data"]["image_size"])
    except ValueError as error:
        raise UserError(f"the first stage does not fit: {error}") from error
    if any(section[key] != value for key, value in wanted.items()):
        raise UserError("the first stage's codes are not those that this "
                        f"{section['name']} generates")
    return model, config


def _convert(kind: str, state: dict[str, Tensor], given: dict, thresholds: str | Path | None) -> tuple[nn.Module, dict]:
    """The model, and the section `model` of its config."""
    try:
        config = read_config(kind, given, thresholds)
        return from_reference(kind, state, config), KINDS[kind](config)[0]
    except ValueError as error:
        raise UserError(str(error)) from error
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"this is not the config of a {kind}: {error} is missing or wrong") from error


def _run_config(section: dict, size: int, args: argparse.Namespace, sections: dict) -> dict:
    """The complete config of a run with this model. The data can be named later."""
    given = {"model": dict(section), "data": {"name": "folder", "image_size": size},
             "train": {"output_dir": str(Path(args.out).expanduser()), "learning_rate": 1e-4, "max_train_steps": 1}}
    override(given, [f"data.{setting}" for setting in args.data], sections)
    return check_config(given, sections, "--data")


def _of_stage(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def read_checkpoint(path: str | Path, ema: bool = False, trust: bool = False) -> dict[str, Tensor]:
    """The named tensors of a .safetensors file, a Lightning checkpoint (`state_dict`) or a LlamaGen checkpoint (`model`).

    ema      take the averaged weights
    trust    load a file that holds more than tensors, which can run code; by default it is refused
    """
    path = Path(path).expanduser()
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=not trust)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError,
            ImportError) as error:
        if isinstance(error, pickle.UnpicklingError) and ("weights_only" in str(error) or "Unsupported" in str(error)):
            raise UserError(f"{path} holds more than tensors, so loading it can run code; if you trust its source, add --trust") from error
        raise UserError(f"{path} is not a whole checkpoint ({(str(error) or type(error).__name__).splitlines()[0]})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__} instead of named tensors")
    if ema and isinstance(found.get("ema"), dict):
        return found["ema"]
    for key in ("state_dict", "model"):
        if isinstance(found.get(key), dict):
            found = found[key]
    state = {k: v for k, v in found.items() if isinstance(v, Tensor)}
    averaged = {k: state.pop(k) for k in list(state) if k.startswith("model_ema.")}  # of Lightning's LitEma, which drops the dots
    if ema and not averaged:
        raise UserError(f"{path} holds no averaged weights")
    if ema:
        state |= {k: averaged[name] for k in state if (name := f"model_ema.{k.replace('.', '')}") in averaged}
    if not state:
        raise UserError(f"{path} holds no named tensors")
    return state


def read_config(kind: str, given: dict, thresholds: str | Path | None = None) -> dict:
    """The config that from_reference takes, from the release's YAML file. A config that from_reference takes already is returned as is."""
    if kind == "vqvae_simplecnn" and "quantizer" in given:
        return given["encoder"]["params"] | given["quantizer"]["params"]
    if "model" not in given:
        return given
    params = given["model"]["params"]
    if "Gumbel" in given["model"].get("target", ""):
        raise UserError("this config is of a Gumbel-quantized model, which is not supported")
    if kind == "dqvae":
        return _read_dqvae(params, thresholds)
    return {"vqgan_taming": _read_vqgan_taming, "mqvae": _read_mqvae, "gpt_taming": _read_gpt_taming, "stackformer": _read_stackformer,
            "dq_transformer": _read_dq_transformer}[kind](params)


def _read_vqgan_taming(params: dict) -> dict:
    return {key: params[key] for key in ("ddconfig", "n_embed", "embed_dim")}


def _read_mqvae(params: dict) -> dict:
    return {"encoder": params["encoder_config"]["params"], "masker": params["masker_config"]["params"],
            "demasker": params["demasker_config"]["params"], "quantizer": params["vqconfig"]["params"]}


def _read_dqvae(params: dict, thresholds: str | Path | None) -> dict:
    encoder, quantizer = params["encoderconfig"]["params"], params["vqconfig"]["params"]
    router = encoder["router_config"]
    grains, entropy = "triple" if "Triple" in router["target"] else "dual", "Entropy" in router["target"]
    config = {"kind": f"{grains}_{'entropy' if entropy else 'feature'}", "encoder": encoder, "decoder": params["decoderconfig"]["params"],
              "codebook_size": quantizer["codebook_size"], "codebook_dim": quantizer["codebook_dim"], "beta": quantizer["commitment_beta"]}
    if not entropy:
        return config | {"budget": params["lossconfig"]["params"]["budget_loss_config"]["params"], "router": router["params"]}
    ratio = router["params"]["fine_grain_ratito"]  # their spelling
    path = Path(thresholds or router["params"]["json_path"]).expanduser()
    try:
        threshold = json.loads(path.read_text())[str(int(100 - 100 * ratio))]
    except (OSError, ValueError, KeyError):
        raise UserError(f"the entropy router needs the release's JSON file of thresholds, and {path} is not one; name it by "
                        "--thresholds") from None
    print(f"{path}: the release computes thresholds with other bins than its router uses, so more regions become fine than asked for "
          "(60 % instead of 50 % on 250 photographs of ImageNet)")
    return config | {"budget": {"target_ratio": ratio, "gamma": 10.0},
                     "router": {"threshold": threshold, "patch_size": 2 ** (len(encoder["ch_mult"]) - 1)}}


def _read_gpt_taming(params: dict) -> dict:
    first, conditioning, key = params["first_stage_config"]["params"], params.get("cond_stage_config"), params.get("cond_stage_key")
    classes = 0
    if not params.get("unconditional") and conditioning != "__is_unconditional__":
        if key not in ("class_label", "class"):
            raise UserError(f"this transformer is conditioned on {key!r}; only unconditional and class-conditional ones are supported")
        classes = (conditioning.get("params") or {}).get("n_classes", 1000) if isinstance(conditioning, dict) else 1000
    return params["transformer_config"]["params"] | {
        "codebook_size": first["n_embed"], "n_classes": classes, "sos_token": params.get("sos_token", 0),
        "grid": first["ddconfig"]["resolution"] // 2 ** (len(first["ddconfig"]["ch_mult"]) - 1)}


def _read_stackformer(params: dict) -> dict:
    net, first = params["transformer_config"]["params"], params["first_stage_config"]["params"]
    grid = params["height_and_weight"]  # their spelling
    return net | {"grid": grid, "codebook_size": first["vqconfig"]["params"]["codebook_size"], "n_classes": params.get("n_classes", 0),
                  "codes_per_image": int(first["masker_config"]["params"]["topk_ratio"] * grid**2),
                  "position_sos": params.get("sos_pos_token", grid**2)}


def _read_dq_transformer(params: dict) -> dict:
    net, order = params["transformer_config"]["params"], params["permuter_config"]["params"]
    by_class = (params.get("class_cond_stage_config") or {}).get("params")
    if by_class:
        classes = by_class["n_classes"]
        first = {"content": by_class["threshold_content"], "coarse": by_class["threshold_coarse_position"],
                 "fine": by_class["threshold_fine_position"]}
    else:
        starts = params["uncond_stage_config"]["params"]
        classes, first = 0, {"content": starts["coarse_sos"], "coarse": starts["coarse_pos_sos"], "fine": starts["fine_pos_sos"]}
    special = {"content_eos": order["content_eos_code"], "content_sos_or_first_class": first["content"]}
    for name in ("coarse", "fine"):
        special |= {f"{name}_position_eos": order[f"{name}_position_eos_code"], f"{name}_position_sos_or_first_class": first[name]}
    return net | {"coarse_hw": order["coarse_hw"], "fine_hw": order["fine_hw"], "codebook_size": order["content_pad_code"],
                  "n_classes": classes, "fine_position_order": order["fine_position_order"], "special": special}


if __name__ == "__main__":
    run_main(main)
