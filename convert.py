"""Loads the weights of the reference releases into the models of this repo.

    from_reference(kind, state_dict, config)     a model in eval mode

Kinds: vqgan_taming (CompVis/taming-transformers), vqgan_llamagen (FoundationVision/LlamaGen), vqvae_simplecnn
(visual-tokenizer-pytorch). Every key of the release is renamed by a rule below, or dropped by one that says why; any
other is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

from vqgan import VQGAN, VQVAE, VectorQuantizer

Rule = tuple[str, str | Callable[[re.Match], str]]  # the whole name in the release, and ours

BLOCK: list[Rule] = [(r"(.*)\.nin_shortcut\.(.*)", r"\1.skip.\2"), (r"(.*)\.proj_out\.(.*)", r"\1.out.\2")]

# Training leaves these in a checkpoint; nothing needs them to reconstruct.
DROP = [
    r"loss\..*",  # discriminator and LPIPS
    r".*\.num_batches_tracked",  # BatchNorm's counter
]


def from_reference(kind: str, state_dict: dict[str, Tensor], config: dict) -> nn.Module:
    """The model of a release, in eval mode. ValueError names every key that is unknown, missing or of another shape."""
    kinds = {"vqgan_taming": _vqgan_taming, "vqgan_llamagen": _vqgan_llamagen, "vqvae_simplecnn": _vqvae_simplecnn}
    if kind not in kinds:
        raise ValueError(f"kind must be one of {', '.join(kinds)}; it is {kind!r}")
    model, rules = kinds[kind](config)
    _load(model, state_dict, rules)
    return model.eval()


def _vqgan_taming(config: dict) -> tuple[nn.Module, list[Rule]]:
    net = config["ddconfig"]
    model = VQGAN(net["resolution"], net["ch"], net["ch_mult"], net["num_res_blocks"], net["attn_resolutions"],
                  net["z_channels"], VectorQuantizer(config["n_embed"], config["embed_dim"], legacy=True))
    last = len(net["ch_mult"]) - 1  # the release counts the decoder's levels from the finest, we from the coarsest

    def up(rest: str) -> Callable[[re.Match], str]:
        return lambda m: m.expand(rf"decoder.up.levels.{last - int(m[1])}.{rest}")

    return model, [
        *_COMMON,
        (r"encoder\.down\.(\d+)\.block\.(.*)", r"encoder.down.levels.\1.blocks.\2"),
        (r"encoder\.down\.(\d+)\.attn\.(.*)", r"encoder.down.levels.\1.attns.\2"),
        (r"encoder\.down\.(\d+)\.downsample\.conv\.(.*)", r"encoder.down.downs.\1.1.\2"),
        (r"encoder\.mid\.block_(\d)\.(.*)", r"encoder.neck.mid.block\1.\2"),
        (r"encoder\.mid\.attn_1\.(.*)", r"encoder.neck.mid.attn.\1"),
        (r"decoder\.mid\.block_(\d)\.(.*)", r"decoder.mid.block\1.\2"),
        (r"decoder\.mid\.attn_1\.(.*)", r"decoder.mid.attn.\1"),
        (r"decoder\.up\.(\d+)\.block\.(.*)", up(r"blocks.\2")),
        (r"decoder\.up\.(\d+)\.attn\.(.*)", up(r"attns.\2")),
        (r"decoder\.up\.(\d+)\.upsample\.conv\.(.*)", lambda m: f"decoder.up.ups.{last - int(m[1])}.1.{m[2]}"),
        *BLOCK,
    ]


def _vqgan_llamagen(config: dict) -> tuple[nn.Module, list[Rule]]:
    levels = len(config["ch_mult"])
    model = VQGAN(256, config["ch"], config["ch_mult"], config["num_res_blocks"], [256 // 2 ** (levels - 1)], config["z_channels"],
                  VectorQuantizer(config["codebook_size"], config["codebook_embed_dim"], beta=config["beta"], l2_norm=config["l2_norm"]))
    mid = {"0": "block1", "1": "attn", "2": "block2"}
    return model, [
        *_COMMON,
        (r"encoder\.conv_blocks\.(\d+)\.res\.(.*)", r"encoder.down.levels.\1.blocks.\2"),
        (r"encoder\.conv_blocks\.(\d+)\.attn\.(.*)", r"encoder.down.levels.\1.attns.\2"),
        (r"encoder\.conv_blocks\.(\d+)\.downsample\.conv\.(.*)", r"encoder.down.downs.\1.1.\2"),
        (r"encoder\.mid\.([012])\.(.*)", lambda m: f"encoder.neck.mid.{mid[m[1]]}.{m[2]}"),
        (r"decoder\.mid\.([012])\.(.*)", lambda m: f"decoder.mid.{mid[m[1]]}.{m[2]}"),
        (r"decoder\.conv_blocks\.(\d+)\.res\.(.*)", r"decoder.up.levels.\1.blocks.\2"),
        (r"decoder\.conv_blocks\.(\d+)\.attn\.(.*)", r"decoder.up.levels.\1.attns.\2"),
        (r"decoder\.conv_blocks\.(\d+)\.upsample\.conv\.(.*)", r"decoder.up.ups.\1.1.\2"),
        *BLOCK,
    ]


_COMMON: list[Rule] = [
    (r"quantize\.embedding\.weight", "quantizer.codebook"),
    (r"quant_conv\.(.*)", r"pre_quant.\1"),
    (r"post_quant_conv\.(.*)", r"post_quant.\1"),
    (r"encoder\.conv_in\.(.*)", r"encoder.down.conv_in.\1"),
    (r"encoder\.(norm_out|conv_out)\.(.*)", r"encoder.neck.\1.\2"),
    (r"decoder\.norm_out\.(.*)", r"decoder.up.norm_out.\1"),
    (r"decoder\.conv_out\.(.*)", r"to_image.\1"),
]


def _vqvae_simplecnn(config: dict) -> tuple[nn.Module, list[Rule]]:
    model = VQVAE(config["hidden_dim"], config["n_resblocks"],
                  VectorQuantizer(config["codebook_num"], config["codebook_dim"], l2_norm=config["l2_norm"]))
    blocks = config["n_resblocks"]

    def residual(half: str, first: int) -> Callable[[re.Match], str]:
        return lambda m: f"{half}.{first + int(m[1])}.{ {'1': 'conv1', '3': 'conv2'}[m[2]]}.{m[3]}"

    return model, [
        (r"quantizer\.codebook\.weight", "quantizer.codebook"),
        (r"enc2code\.(.*)", r"pre_quant.\1"),
        (r"code2dec\.(.*)", r"post_quant.\1"),
        (r"encoder\.downblocks\.(.*)", r"encoder.\1"),
        (r"encoder\.resblocks\.(\d+)\.blocks\.([13])\.(.*)", residual("encoder", 5)),
        (r"decoder\.resblocks\.(\d+)\.blocks\.([13])\.(.*)", residual("decoder", 0)),
        (r"decoder\.upblocks\.5\.(.*)", r"to_image.\1"),
        (r"decoder\.upblocks\.(\d+)\.(.*)", lambda m: f"decoder.{blocks + int(m[1])}.{m[2]}"),
    ]


def _rename(name: str, rules: list[Rule]) -> str | None:
    """Each rule that fits is applied, in order; None if none does and the name is not ours already."""
    for pattern, ours in rules:
        name = re.sub(rf"^{pattern}$", ours, name)
    return name


def _load(model: nn.Module, state_dict: dict[str, Tensor], rules: list[Rule]) -> None:
    state, wanted = {}, dict(model.state_dict())
    for key in [k for k in wanted if k.startswith("quantizer.") and k != "quantizer.codebook"]:
        state[key] = wanted[key]  # training statistics, which start anew
    problems, split = [], {}
    for name, value in state_dict.items():
        if any(re.fullmatch(pattern, name) for pattern in DROP):
            continue
        ours = _rename(name, rules)
        if part := re.fullmatch(r"(.*)\.([qkv])\.(weight|bias)", ours):
            split.setdefault(f"{part[1]}.qkv.{part[3]}", {})[part[2]] = (name, value)  # we have one conv for the three
        elif ours not in wanted:
            problems.append(f"unknown {name}")
        elif value.shape != wanted[ours].shape:
            problems.append(f"{name} is {tuple(value.shape)} instead of {tuple(wanted[ours].shape)}")
        else:
            state[ours] = value
    for ours, parts in split.items():
        values = [parts[k][1] for k in "qkv" if k in parts]
        if ours not in wanted:
            problems += [f"unknown {name}" for name, _ in parts.values()]
        elif len(values) < 3 or sum(v.shape[0] for v in values) != wanted[ours].shape[0] or values[0].shape[1:] != wanted[ours].shape[1:]:
            problems.append(f"{', '.join(n for n, _ in parts.values())} do not make {ours} {tuple(wanted[ours].shape)}")
            state[ours] = wanted[ours]
        else:
            state[ours] = torch.cat(values)
    problems += [f"missing what becomes {k}" for k in wanted if k not in state]
    if problems:
        raise ValueError(f"these weights do not fit the config: {'; '.join(problems[:5])}"
                         + (f"; and {len(problems) - 5} more" if len(problems) > 5 else ""))
    model.load_state_dict(state)
