"""Loads the weights of the reference releases into the models of this repo.

    python convert.py KIND CHECKPOINT --config REFERENCE.yaml --out runs/NAME      a run folder like any other
    from_reference(kind, state_dict, config)                                       a model in eval mode

Kinds: vqgan_taming and gpt_taming (CompVis/taming-transformers), vqgan_llamagen (FoundationVision/LlamaGen), vqvae_simplecnn
(visual-tokenizer-pytorch), mqvae and stackformer, dqvae and dq_transformer (the papers' official releases). Every key of a
release is renamed by a rule below, or dropped by one that says why; any other is an error that names it.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import train_stage1
import train_stage2
from config import UserError, check_config, parse_yaml, read_yaml
from experiment import MODELS, load_run, save_run
from launch import run_main
from vqgan import VectorQuantizer

# (the whole name in the release, ours) and perhaps (..., what becomes of the tensor). Ours may end in #i of n, if n tensors of
# the release are one here; and several rules may take their part of the same tensor.
Rule = tuple

# Training leaves these in a checkpoint, or they do nothing; reconstruction needs none of them.
DROP = [
    r"loss\..*",  # discriminator and LPIPS
    r".*\.num_batches_tracked",  # BatchNorm's counter
    r".*\.temb_proj\..*",  # time embedding of MQ-VAE's de-mask blocks, which is never given a time
    r"quantize\.codebook_used",  # LlamaGen's record of the codes in use
    r".*\.attn\.mask",  # the causal mask, a constant
]


def from_reference(kind: str, state_dict: dict[str, Tensor], config: dict) -> nn.Module:
    """The model of a release, in eval mode. ValueError names every key that is unknown, missing or of another shape.

    kind          one of KINDS
    state_dict    as the release names it, of this model alone
    config        what the release's own config says of this model; `read_config` gets it from the YAML file
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; it is {kind!r}")
    settings, rules = KINDS[kind](config)
    model = _make(settings)
    _load(model, state_dict, rules)
    if "threshold" in config.get("router", {}):
        model.set_thresholds([config["router"]["threshold"]], config["router"]["patch_size"])
    return model.eval()


def _make(settings: dict) -> nn.Module:
    """The model of a config's section `model`."""
    settings = dict(settings)
    kind = MODELS[settings.pop("name")]
    if "quantizer" in settings:
        settings["quantizer"] = VectorQuantizer(**settings["quantizer"])
    return kind(**settings)


# ---------------------------------------------------------------------------------------------------------------------
# Kinds: from the release's config to our settings, and the rules that rename its weights


def _vqgan_taming(config: dict) -> tuple[dict, list[Rule]]:
    net = config["ddconfig"]
    settings = {"name": "vqgan", "image_size": net["resolution"], **_net(net),
                "quantizer": {"codebook_size": config["n_embed"], "dim": config["embed_dim"], "legacy": True}}
    return settings, [*_down("encoder.down"), *_neck("", "encoder.neck"), *_decoder("decoder", len(net["ch_mult"])),
                      *_QUANT_CONVS, (r"quantize\.embedding\.weight", "quantizer.codebook")]


def _net(net: dict) -> dict:
    """The encoder's settings, which have the same names here."""
    return {key: net[key] for key in ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "z_channels")}


def _vqgan_llamagen(config: dict) -> tuple[dict, list[Rule]]:
    last = 256 // 2 ** (len(config["ch_mult"]) - 1)  # there is attention at the last level only
    settings = {"name": "vqgan", "image_size": 256, **_net(config | {"attn_resolutions": [last]}),
                "quantizer": {"codebook_size": config["codebook_size"], "dim": config["codebook_embed_dim"], "beta": config["beta"],
                              "l2_norm": config["l2_norm"]}}
    mid = {"0": "block1", "1": "attn", "2": "block2"}
    return settings, [
        (r"encoder\.conv_in\.(.*)", r"encoder.down.conv_in.\1"),
        (r"encoder\.conv_blocks\.(\d+)\.res\.(.*)", r"encoder.down.levels.\1.blocks.\2"),
        (r"encoder\.conv_blocks\.(\d+)\.attn\.(.*)", r"encoder.down.levels.\1.attns.\2"),
        (r"encoder\.conv_blocks\.(\d+)\.downsample\.conv\.(.*)", r"encoder.down.downs.\1.1.\2"),
        (r"encoder\.mid\.([012])\.(.*)", lambda m: f"encoder.neck.mid.{mid[m[1]]}.{m[2]}"),
        (r"encoder\.(norm_out|conv_out)\.(.*)", r"encoder.neck.\1.\2"),
        (r"decoder\.conv_in\.(.*)", r"decoder.conv_in.\1"),
        (r"decoder\.mid\.([012])\.(.*)", lambda m: f"decoder.mid.{mid[m[1]]}.{m[2]}"),
        (r"decoder\.conv_blocks\.(\d+)\.res\.(.*)", r"decoder.up.levels.\1.blocks.\2"),
        (r"decoder\.conv_blocks\.(\d+)\.attn\.(.*)", r"decoder.up.levels.\1.attns.\2"),
        (r"decoder\.conv_blocks\.(\d+)\.upsample\.conv\.(.*)", r"decoder.up.ups.\1.1.\2"),
        (r"decoder\.norm_out\.(.*)", r"decoder.up.norm_out.\1"),
        (r"decoder\.conv_out\.(.*)", r"to_image.\1"),
        *_QUANT_CONVS, (r"quantize\.embedding\.weight", "quantizer.codebook"),
    ]


def _vqvae_simplecnn(config: dict) -> tuple[dict, list[Rule]]:
    settings = {"name": "vqvae", "ch": config["hidden_dim"], "num_res_blocks": config["n_resblocks"],
                "quantizer": {"codebook_size": config["codebook_num"], "dim": config["codebook_dim"], "l2_norm": config["l2_norm"]}}
    blocks, conv = config["n_resblocks"], {"1": "conv1", "3": "conv2"}
    return settings, [
        (r"quantizer\.codebook\.weight", "quantizer.codebook"),
        (r"enc2code\.(.*)", r"pre_quant.\1"),
        (r"code2dec\.(.*)", r"post_quant.\1"),
        (r"encoder\.downblocks\.(\d+)\.(.*)", r"encoder.\1.\2"),
        (r"encoder\.resblocks\.(\d+)\.blocks\.([13])\.(.*)", lambda m: f"encoder.{5 + int(m[1])}.{conv[m[2]]}.{m[3]}"),
        (r"decoder\.resblocks\.(\d+)\.blocks\.([13])\.(.*)", lambda m: f"decoder.{m[1]}.{conv[m[2]]}.{m[3]}"),
        (r"decoder\.upblocks\.([13])\.(.*)", lambda m: f"decoder.{blocks + int(m[1])}.{m[2]}"),
        (r"decoder\.upblocks\.5\.(.*)", r"to_image.\1"),
    ]


def _mqvae(config: dict) -> tuple[dict, list[Rule]]:
    net, quantizer = config["encoder"], config["quantizer"]
    settings = {"name": "mqvae", "image_size": net["resolution"], **_net(net), "topk_ratio": config["masker"]["topk_ratio"],
                "release_training": True, "demask_layers": config["demasker"]["n_layer"],
                "quantizer": {"codebook_size": quantizer["codebook_size"], "dim": quantizer["codebook_dim"],
                              "beta": quantizer["commitment_beta"], "ema_decay": quantizer["decay"],
                              "restart": quantizer["restart_unused_codes"]}}
    return settings, [
        *_down("encoder.down"), *_neck("", "encoder.neck"), *_up("decoder", len(net["ch_mult"])), *_EMA_CODEBOOK,
        (r"masker\.score_pred_net\.1\.(.*)", r"score_net.conv1.\1"),
        (r"masker\.score_pred_net\.3\.(.*)", r"score_net.conv2.\1"),
        (r"masker\.score_pred_net\.4\.(.*)", r"score_net.norm.\1"),
        (r"masker\.pre_projection\.weight", "pre_quant.weight"),
        (r"demasker\.mask_token", "demask.token", lambda x: x.flatten()),
        (r"demasker\.post_projection\.(.*)", r"demask.post_quant.\1"),
        (r"demasker\.conv_in\.(.*)", r"demask.conv_in.\1"),
        (r"demasker\.transformer\.blocks\.(\d+)\.resblock\.(.*)", r"demask.blocks.\1.\2"),
        (r"demasker\.transformer\.blocks\.(\d+)\.attn\.(.*)", r"demask.attns.\1.\2"),
        (r"demasker\.transformer\.last_resblock\.(.*)", r"demask.last_block.\1"),
    ]


def _dqvae(config: dict) -> tuple[dict, list[Rule]]:
    net, decoder, budget = config["encoder"], config["decoder"], config["budget"]
    names = ["coarse", "median", "fine"] if config["kind"].startswith("triple") else ["coarse", "fine"]
    levels = len(net["ch_mult"])
    settings = {"name": "dqvae", "image_size": net["resolution"], **_net(net),
                "factors": [2 ** (levels - 1 - g) for g in range(len(names))],
                "ratios": [budget["target_median_ratio"], budget["target_fine_ratio"]] if len(names) == 3 else [budget["target_ratio"]],
                "router": "entropy" if config["kind"].endswith("entropy") else "feature", "budget_weight": budget["gamma"],
                "ema_weighted": False, "release_training": True,
                "decoder_ch_mult": decoder["ch_mult"], "decoder_attn_resolutions": decoder["attn_resolutions"],
                "quantizer": {"codebook_size": config["codebook_size"], "dim": config["codebook_dim"], "beta": config["beta"],
                              "ema_decay": 0.99}}
    rules = [*_down("down"), *_decoder("decoder", len(decoder["ch_mult"])), *_QUANT_CONVS, *_EMA_CODEBOOK,
             (r"encoder\.router\.gate\.0\.(.*)", r"router.fc1.\1"),
             (r"encoder\.router\.gate\.2\.(.*)", r"router.fc2.\1"),
             (r"decoder\.position_bias_fourier\.lff\.ffm\.conv\.(.*)", r"position.fourier.\1"),
             (r"decoder\.position_bias_learned\.row_embed\.weight", "position.rows"),
             (r"decoder\.position_bias_learned\.col_embed\.weight", "position.columns")]
    for g, name in enumerate(names):
        rules += [*_neck(f"_{name}", f"necks.{g}"), (rf"encoder\.router\.feature_norm_{name}\.(.*)", rf"router.norms.{g}.\1")]
    return settings, rules


# The encoder and the decoder of Taming Transformers, which the MQ-VAE and DQ-VAE releases build on.


def _down(ours: str) -> list[Rule]:
    return [(r"encoder\.conv_in\.(.*)", rf"{ours}.conv_in.\1"),
            (r"encoder\.down\.(\d+)\.block\.(.*)", rf"{ours}.levels.\1.blocks.\2"),
            (r"encoder\.down\.(\d+)\.attn\.(.*)", rf"{ours}.levels.\1.attns.\2"),
            (r"encoder\.down\.(\d+)\.downsample\.conv\.(.*)", rf"{ours}.downs.\1.1.\2")]


def _neck(suffix: str, ours: str) -> list[Rule]:
    return [(rf"encoder\.mid{suffix}\.block_(\d)\.(.*)", rf"{ours}.mid.block\1.\2"),
            (rf"encoder\.mid{suffix}\.attn_1\.(.*)", rf"{ours}.mid.attn.\1"),
            (rf"encoder\.(norm_out|conv_out){suffix}\.(.*)", rf"{ours}.\1.\2")]


def _decoder(ours: str, levels: int) -> list[Rule]:
    return [(r"decoder\.conv_in\.(.*)", rf"{ours}.conv_in.\1"),
            (r"decoder\.mid\.block_(\d)\.(.*)", rf"{ours}.mid.block\1.\2"),
            (r"decoder\.mid\.attn_1\.(.*)", rf"{ours}.mid.attn.\1"),
            *_up(f"{ours}.up", levels)]


def _up(ours: str, levels: int) -> list[Rule]:
    """The releases count the decoder's levels from the finest, we from the coarsest."""
    return [(r"decoder\.up\.(\d+)\.block\.(.*)", lambda m: f"{ours}.levels.{levels - 1 - int(m[1])}.blocks.{m[2]}"),
            (r"decoder\.up\.(\d+)\.attn\.(.*)", lambda m: f"{ours}.levels.{levels - 1 - int(m[1])}.attns.{m[2]}"),
            (r"decoder\.up\.(\d+)\.upsample\.conv\.(.*)", lambda m: f"{ours}.ups.{levels - 1 - int(m[1])}.1.{m[2]}"),
            (r"decoder\.norm_out\.(.*)", rf"{ours}.norm_out.\1"),
            (r"decoder\.conv_out\.(.*)", r"to_image.\1")]


_QUANT_CONVS: list[Rule] = [(r"quant_conv\.(.*)", r"pre_quant.\1"), (r"post_quant_conv\.(.*)", r"post_quant.\1")]
_EMA_CODEBOOK: list[Rule] = [(r"quantize\.codebook\.weight", "quantizer.codebook", lambda x: x[:-1]),  # the last row is never used
                             (r"quantize\.codebook\.cluster_size_ema", "quantizer.ema_count"),
                             (r"quantize\.codebook\.embed_ema", "quantizer.ema_sum")]


# Transformers. The releases keep codes, classes and special tokens in one vocabulary; here they have tables of their own.


def _gpt_taming(config: dict) -> tuple[dict, list[Rule]]:
    """Without classes the sequence opens with a token that is one more than the codes, or is code `sos_token`; with classes, a
    class shares its row of the table with the code of the same number."""
    K, classes, length = config["codebook_size"], config.get("n_classes", 0), config["grid"] ** 2
    vocabulary = config.get("vocab_size", K + 1)
    starts = range(classes) if classes else [config.get("sos_token", K)] if vocabulary == K else [K]
    settings = {"name": "gpt", "codebook_size": K, "grid": config["grid"], "num_classes": classes, "n_layer": config["n_layer"],
                "n_head": config["n_head"], "n_embd": config["n_embd"], "dropout": config.get("resid_pdrop", 0.0), "label_dropout": 0.0}
    return settings, [
        *_blocks("blocks", "blocks"),
        (r"pos_emb", "index_emb", _index_rows(config["block_size"], length)),
        (r"tok_emb\.weight", "code_emb.weight", _rows(vocabulary, range(K))),
        (r"tok_emb\.weight", "start_emb.weight", _rows(vocabulary, starts)),
        (r"ln_f\.(.*)", r"norm.\1"),
        (r"head\.weight", "head.weight", _rows(vocabulary, range(K))),
    ]


def _stackformer(config: dict) -> tuple[dict, list[Rule]]:
    K, classes, cells, length = config["codebook_size"], config["n_classes"], config["grid"] ** 2, config["codes_per_image"]
    settings = {"name": "stackformer", "codebook_size": K, "grid": config["grid"], "num_codes": length, "num_classes": classes,
                "code_layers": config["value_layer"], "position_layers": config["position_layer"], "n_head": config["n_head"],
                "n_embd": config["n_embd"], "dropout": config["resid_pdrop"], "label_dropout": 0.0}
    vocabulary = K + (classes or 1)  # classes come before the codes, the start token after them
    starts = range(classes) if classes else [K]
    return settings, [
        *_blocks("value_transformer", "code_blocks"), *_blocks("position_transformer", "position_blocks"),
        (r"pos_emb", "index_emb", _index_rows(config["block_size"], length)),
        (r"value_emb\.weight", "code_emb.weight", _rows(vocabulary, range(classes, classes + K))),
        (r"value_emb\.weight", "start_emb.weight", _rows(vocabulary, starts)),
        (r"value_pos_emb\.weight", "position_emb.weight", _rows(cells + 1, [*range(cells), config["position_sos"]])),
        (r"value_head\.0\.(.*)", r"code_norm.\1"),
        (r"value_head\.1\.weight", "code_head.weight", _rows(vocabulary, range(classes, classes + K))),
        (r"position_head\.0\.(.*)", r"position_norm.\1"),
        (r"position_head\.1\.weight", "position_head.weight", _rows(cells + 1, range(cells))),
    ]


def _dq_transformer(config: dict) -> tuple[dict, list[Rule]]:
    """Codes or cells come first in each table, then padding, end and start tokens, or one start token for each class."""
    K, classes, special = config["codebook_size"], config["n_classes"], config["special"]
    names, grids = ["coarse", "fine"], [config["coarse_hw"], config["fine_hw"]]
    cells, starts = [side**2 for side in grids], classes or 1
    settings = {"name": "dq_transformer", "codebook_size": K, "grids": grids, "num_classes": classes,
                "position_layers": config["position_layer"], "content_layers": config["content_layer"], "n_head": config["n_head"],
                "n_embd": config["n_embd"], "dropout": config["resid_pdrop"], "label_dropout": 0.0, "order": config["fine_position_order"]}
    first = special["content_sos_or_first_class"]
    ends = [special[f"{name}_position_eos"] for name in names]
    rules = [
        *_blocks("content_transformer", "content_blocks"), *_blocks("position_transformer", "position_blocks"),
        (r"pos_emb", "index_emb", _index_rows(config["block_size"], cells[-1] + 2 * len(names) - 1)),
        (r"seg_emb\.weight", "grain_emb.weight"),
        (r"content_emb\.weight", "content_emb.weight",
         _rows(first + starts, [*range(K), special["content_eos"], *range(first, first + starts)])),
        (r"content_head\.0\.(.*)", r"content_norm.\1"),
        (r"content_head\.1\.weight", "content_head.weight", _rows(first + starts, range(K))),
        (r"position_head\.0\.(.*)", r"position_norm.\1"),
        (r"position_head\.1\.weight", "position_head.weight",
         _rows(special["fine_position_sos_or_first_class"] + starts, [*range(cells[-1]), *ends])),
    ]
    for g, name in enumerate(names):
        first = special[f"{name}_position_sos_or_first_class"]
        rules.append((rf"content_{name}_pos_emb\.weight", f"position_emb.weight#{g} of {len(names)}",
                      _rows(first + starts, [*range(cells[g]), ends[g], *range(first, first + starts)])))
    return settings, rules


KINDS = {"vqgan_taming": _vqgan_taming, "vqgan_llamagen": _vqgan_llamagen, "vqvae_simplecnn": _vqvae_simplecnn, "mqvae": _mqvae,
         "dqvae": _dqvae, "gpt_taming": _gpt_taming, "stackformer": _stackformer, "dq_transformer": _dq_transformer}
FIRST_STAGE = {"gpt_taming": "vqgan_taming", "stackformer": "mqvae", "dq_transformer": "dqvae"}


def _blocks(theirs: str, ours: str) -> list[Rule]:
    part = {"query": 0, "key": 1, "value": 2}
    return [(rf"{theirs}\.(\d+)\.ln([12])\.(.*)", rf"{ours}.layers.\1.norm\2.\3"),
            (rf"{theirs}\.(\d+)\.attn\.(query|key|value)\.(.*)", lambda m: f"{ours}.layers.{m[1]}.qkv.{m[3]}#{part[m[2]]} of 3"),
            (rf"{theirs}\.(\d+)\.attn\.proj\.(.*)", rf"{ours}.layers.\1.out.\2"),
            (rf"{theirs}\.(\d+)\.mlp\.([02])\.(.*)", rf"{ours}.layers.\1.mlp.\2.\3")]


def _rows(total: int, rows: list[int] | range) -> Callable[[Tensor], Tensor]:
    """Takes these rows of a table that must have `total` of them."""
    return lambda x: x[list(rows)] if len(x) == total else x


def _index_rows(block_size: int, length: int) -> Callable[[Tensor], Tensor]:
    """The first rows of (1, block_size, C): the releases have some to spare."""
    return lambda x: x[0, :length] if x.shape[:2] == (1, block_size) else x


def _load(model: nn.Module, state_dict: dict[str, Tensor], rules: list[Rule]) -> None:
    wanted = model.state_dict()
    state = {k: v for k, v in wanted.items() if k == "thresholds" or re.fullmatch(r".*num_batches_tracked|quantizer\.(ema_.*|queue)", k)}
    parts: dict[str, dict[int, tuple[str, Tensor]]] = {}  # of tensors that are one here: {ours: {i: (name, tensor)}}
    counts: dict[str, int] = {}
    problems = []
    for name, value in state_dict.items():
        if any(re.fullmatch(pattern, name) for pattern in DROP):
            continue
        found = list(_rename(name, value, rules))
        if not any(ours.partition("#")[0] in wanted for ours, _ in found):
            problems.append(f"unknown {name}")
            continue
        for ours, tensor in found:
            ours, _, part = ours.partition("#")
            i, n = map(int, part.split(" of ")) if part else (0, 1)
            parts.setdefault(ours, {})[i] = name, tensor
            counts[ours] = n
    for ours, pieces in parts.items():
        state[ours] = wanted[ours]
        if len(pieces) < counts[ours]:
            there = ", ".join(name for name, _ in pieces.values())
            problems.append(f"missing a part of what becomes {ours}, of which there is only {there}")
            continue
        tensors = [pieces[i][1] for i in range(counts[ours])]
        joined = torch.cat(tensors) if all(t.shape[1:] == tensors[0].shape[1:] for t in tensors) else None
        uneven = "qkv" in ours and len({t.shape for t in tensors}) > 1
        if joined is None or joined.shape != wanted[ours].shape or uneven:
            shapes = " and ".join(f"{name} {tuple(state_dict[name].shape)}" for name, _ in pieces.values())
            problems.append(f"{shapes} cannot become {ours} {tuple(wanted[ours].shape)}")
        else:
            state[ours] = joined
    problems += [f"missing what becomes {k}" for k in wanted if k not in state]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"these weights do not fit the config: {'; '.join(problems[:5])}{more}")
    model.load_state_dict(state)
    quantizer = getattr(model, "quantizer", None)
    if getattr(quantizer, "ema_decay", None) is not None and not {"quantizer.ema_sum", "quantizer.ema_count"} <= parts.keys():
        quantizer.ema_sum.copy_(quantizer.codebook)
        quantizer.ema_count.fill_(1.0)


def _rename(name: str, value: Tensor, rules: list[Rule]) -> Iterator[tuple[str, Tensor]]:
    """Our names for a tensor of the release, and the tensors as we hold them."""
    for pattern, ours, *change in rules:
        if match := re.fullmatch(pattern, name):
            ours = ours(match) if callable(ours) else match.expand(ours)
            ours = ours.replace(".nin_shortcut.", ".skip.").replace(".proj_out.", ".out.")
            if qkv := re.fullmatch(r"(.*)\.([qkv])\.(weight|bias)", ours):  # one convolution here, three in the releases
                ours = f"{qkv[1]}.qkv.{qkv[3]}#{'qkv'.index(qkv[2])} of 3"
            yield ours, change[0](value) if change else value


# ---------------------------------------------------------------------------------------------------------------------
# What the releases ship: checkpoints and YAML files


def read_checkpoint(path: str | Path, ema: bool = False, trust: bool = False) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, a Lightning checkpoint (`state_dict`) or one of LlamaGen (`model`), by name.

    ema      the averaged weights that it holds beside the others
    trust    runs the code in a file that holds more than tensors; without, such a file is refused
    """
    path = Path(path).expanduser()
    try:
        if path.suffix == ".safetensors" and not ema:
            return load_file(path)
        if path.suffix == ".safetensors":
            raise UserError(f"{path} holds no averaged weights apart; leave out --ema")
        found = torch.load(path, map_location="cpu", weights_only=not trust)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error) and "Unsupported" not in str(error):
            raise UserError(f"{path} is not a whole checkpoint ({_first_line(error)})") from error
        raise UserError(f"{path} holds more than tensors, and loading that would run code from the file; if you trust where it comes "
                        "from, say --trust") from error
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise UserError(f"{path} is not a whole checkpoint ({_first_line(error)})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__} instead of named tensors")
    if ema and isinstance(found.get("ema"), dict):
        return found["ema"]
    for key in ("state_dict", "model"):
        if isinstance(found.get(key), dict):
            found = found[key]
    state = {k: v for k, v in found.items() if isinstance(v, Tensor)}
    averaged = {k: v for k, v in state.items() if k.startswith("model_ema.")}  # Lightning's LitEma, whose names have no dots
    state = {k: v for k, v in state.items() if k not in averaged}
    if ema and not averaged:
        raise UserError(f"{path} holds no averaged weights")
    if ema:
        state |= {k: averaged[name] for k in state if (name := f"model_ema.{k.replace('.', '')}") in averaged}
    if not state:
        raise UserError(f"{path} holds no named tensors")
    return state


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def read_config(kind: str, given: dict, thresholds: str | Path | None = None) -> dict:
    """What from_reference wants to know, from the release's YAML file (or from what from_reference itself takes)."""
    try:
        if kind == "vqvae_simplecnn" and "quantizer" in given:
            return given["encoder"]["params"] | given["quantizer"]["params"]
        if "model" not in given:
            return given
        return {"vqgan_taming": _read_vqgan_taming, "mqvae": _read_mqvae, "dqvae": _read_dqvae, "gpt_taming": _read_gpt_taming,
                "stackformer": _read_stackformer, "dq_transformer": _read_dq_transformer}[kind](
                    given["model"]["params"], given["model"], thresholds)
    except (KeyError, TypeError, IndexError, StopIteration) as error:
        raise UserError(f"this is not the config of a {kind}: it has no {error}") from error


def _read_vqgan_taming(params: dict, model: dict, _: Any) -> dict:
    if "Gumbel" in model.get("target", ""):
        raise UserError("this config is of a Gumbel-quantized model, which has no counterpart here")
    return {key: params[key] for key in ("ddconfig", "n_embed", "embed_dim")}


def _read_mqvae(params: dict, model: dict, _: Any) -> dict:
    return {"encoder": params["encoder_config"]["params"], "masker": params["masker_config"]["params"],
            "demasker": params["demasker_config"]["params"], "quantizer": params["vqconfig"]["params"]}


def _read_dqvae(params: dict, model: dict, thresholds: str | Path | None) -> dict:
    encoder, quantizer = params["encoderconfig"]["params"], params["vqconfig"]["params"]
    router = encoder["router_config"]
    triple, entropy = "Triple" in router["target"], "Entropy" in router["target"]
    config = {"kind": ("triple" if triple else "dual") + ("_entropy" if entropy else "_feature"), "encoder": encoder,
              "decoder": params["decoderconfig"]["params"], "codebook_size": quantizer["codebook_size"],
              "codebook_dim": quantizer["codebook_dim"], "beta": quantizer["commitment_beta"]}
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


def _read_gpt_taming(params: dict, model: dict, _: Any) -> dict:
    net, first = params["transformer_config"]["params"], params["first_stage_config"]["params"]
    conditioning = params.get("cond_stage_config")
    target = conditioning.get("target", "") if isinstance(conditioning, dict) else ""
    unconditional = params.get("unconditional") or conditioning == "__is_unconditional__"
    classes = 0
    if not unconditional:
        if params.get("cond_stage_key") not in ("class_label", "class"):
            raise UserError(f"this transformer is conditioned on {params.get('cond_stage_key')!r} ({target}); only unconditional and "
                            "class-conditional ones have a counterpart here")
        classes = (conditioning.get("params") or {}).get("n_classes", 1000) if isinstance(conditioning, dict) else 1000
    return net | {"codebook_size": first["n_embed"], "n_classes": classes, "sos_token": params.get("sos_token", 0),
                  "grid": first["ddconfig"]["resolution"] // 2 ** (len(first["ddconfig"]["ch_mult"]) - 1)}


def _read_stackformer(params: dict, model: dict, _: Any) -> dict:
    net, first = params["transformer_config"]["params"], params["first_stage_config"]["params"]
    grid = params["height_and_weight"]  # their spelling
    return net | {"grid": grid, "codebook_size": first["vqconfig"]["params"]["codebook_size"], "n_classes": params.get("n_classes", 0),
                  "codes_per_image": int(first["masker_config"]["params"]["topk_ratio"] * grid**2),
                  "position_sos": params.get("sos_pos_token", grid**2)}


def _read_dq_transformer(params: dict, model: dict, _: Any) -> dict:
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


def _of_stage(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("checkpoint", help="a .ckpt, .pt, .pth or .safetensors file of the release")
    parser.add_argument("--config", required=True, help="the release's YAML file of this model")
    parser.add_argument("--out", required=True, help="the run folder to make")
    parser.add_argument("--stage1", help="(stage 2) the converted run of the first stage, if the checkpoint does not hold it")
    parser.add_argument("--data", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the section data, such as root=PATH")
    parser.add_argument("--thresholds", help="(dqvae, entropy router) the release's JSON file of thresholds")
    parser.add_argument("--ema", action="store_true", help="the averaged weights in the checkpoint")
    parser.add_argument("--discriminator", action="store_true", help="keep the discriminator, as discriminator.safetensors")
    parser.add_argument("--trust", action="store_true", help="let the checkpoint run code while it is loaded")
    args = parser.parse_args(argv)
    out = Path(args.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; choose another --out")
    given = read_yaml(args.config)
    state = read_checkpoint(args.checkpoint, args.ema, args.trust)
    second = args.kind in FIRST_STAGE
    if second:
        first_state, state = _of_stage(state, "first_stage_model."), _of_stage(state, "transformer.") or state
    model, section = _convert(args.kind, state, given, args.thresholds)
    size = section.get("image_size", 64)

    stage1 = stage1_config = None
    if second:
        if args.stage1:
            stage1, stage1_config = load_run(args.stage1)
        elif first_state:
            first = {"model": (given.get("model") or {}).get("params", {}).get("first_stage_config", {})}
            stage1, first_section = _convert(FIRST_STAGE[args.kind], first_state, first, args.thresholds)
            stage1_config = _run_config(first_section, first_section["image_size"], args.data, out, train_stage1.SECTIONS)
        else:
            raise UserError(f"{args.checkpoint} does not hold the weights of the first stage; convert those first, and name the run by "
                            "--stage1")
        size = stage1_config["data"]["image_size"]
        wanted = train_stage2.READS[section["name"]]
        if not isinstance(stage1, wanted[0]) or any(section[k] != v for k, v in wanted[1](stage1, size).items()) or (
                section["codebook_size"] != stage1.quantizer.codebook_size):
            raise UserError(f"the first stage's codes are not those that this {section['name']} generates")
    config = _run_config(section, size, args.data, out, train_stage2.SECTIONS if second else train_stage1.SECTIONS)
    discriminator = {k: v.contiguous() for k, v in _of_stage(state, "loss.discriminator.main.").items()}
    if args.discriminator and not discriminator:
        raise UserError(f"{args.checkpoint} holds no discriminator")

    # Everything is as it should be: only now something is written
    save_run(out, config, {"model": model}, {"discriminator": discriminator} if args.discriminator else {})
    if second:
        save_run(out / "stage1", stage1_config, {"model": stage1})
        (out / "classes.json").write_text(json.dumps([str(i) for i in range(section["num_classes"])]) + "\n")
    print(f"{out}: {section['name']}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


def _convert(kind: str, state: dict[str, Tensor], given: dict, thresholds: str | Path | None) -> tuple[nn.Module, dict]:
    """The model and the config's section of it."""
    config = read_config(kind, given, thresholds)
    try:
        return from_reference(kind, state, config), KINDS[kind](config)[0]
    except ValueError as error:
        raise UserError(str(error)) from error
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"this is not the config of a {kind}: {error} is missing or wrong") from error


def _run_config(section: dict, size: int, data: list[str], out: Path, sections: dict) -> dict:
    """The whole config of a run folder with this model, whose image data can be named later."""
    given = {"model": dict(section), "data": {"name": "folder", "image_size": size},
             "train": {"output_dir": str(out), "learning_rate": 1e-4, "max_train_steps": 1}}
    for setting in data:
        key, _, value = setting.partition("=")
        try:
            given["data"][key] = parse_yaml(value)
        except ValueError:
            raise UserError(f"the value of {setting!r} is not valid YAML") from None
    return check_config(given, sections, "--data")


if __name__ == "__main__":
    run_main(main)
