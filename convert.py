"""Loads the weights of the reference releases into the models of this repo.

    from_reference(kind, state_dict, config)     a model in eval mode

Kinds: vqgan_taming and gpt_taming (CompVis/taming-transformers), vqgan_llamagen (FoundationVision/LlamaGen), vqvae_simplecnn
(visual-tokenizer-pytorch), mqvae and stackformer, dqvae and dq_transformer (the papers' official releases). Every key of a
release is renamed by a rule below, or dropped by one that says why; any other is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import torch
import torch.nn as nn
from torch import Tensor

from dq_transformer import DQTransformer
from dqvae import DQVAE
from gpt import GPT
from mqvae import MQVAE
from stackformer import Stackformer
from vqgan import VQGAN, VQVAE, VectorQuantizer

# (the whole name in the release, ours) and perhaps (..., what becomes of the tensor). Ours may end in #i of n, if n tensors of
# the release are one here; and several rules may take their part of the same tensor.
Rule = tuple

# Training leaves these in a checkpoint, or they do nothing; reconstruction needs none of them.
DROP = [
    r"loss\..*",  # discriminator and LPIPS
    r".*\.num_batches_tracked",  # BatchNorm's counter
    r".*\.temb_proj\..*",  # time embedding of MQ-VAE's de-mask blocks, which is never given a time
    r"quantize\.codebook\.(cluster_size_ema|embed_ema)",  # moving averages, which start anew
    r"quantize\.codebook_used",  # LlamaGen's record of the codes in use
    r".*\.attn\.mask",  # the causal mask, a constant
]


def from_reference(kind: str, state_dict: dict[str, Tensor], config: dict) -> nn.Module:
    """The model of a release, in eval mode. ValueError names every key that is unknown, missing or of another shape."""
    kinds = {"vqgan_taming": _vqgan_taming, "vqgan_llamagen": _vqgan_llamagen, "vqvae_simplecnn": _vqvae_simplecnn,
             "mqvae": _mqvae, "dqvae": _dqvae, "gpt_taming": _gpt_taming, "stackformer": _stackformer, "dq_transformer": _dq_transformer}
    if kind not in kinds:
        raise ValueError(f"kind must be one of {', '.join(kinds)}; it is {kind!r}")
    model, rules = kinds[kind](config)
    _load(model, state_dict, rules)
    return model.eval()


def _vqgan_taming(config: dict) -> tuple[nn.Module, list[Rule]]:
    net = config["ddconfig"]
    model = VQGAN(net["resolution"], net["ch"], net["ch_mult"], net["num_res_blocks"], net["attn_resolutions"],
                  net["z_channels"], VectorQuantizer(config["n_embed"], config["embed_dim"], legacy=True))
    return model, [*_down("encoder.down"), *_neck("", "encoder.neck"), *_decoder("decoder", len(net["ch_mult"])),
                   *_QUANT_CONVS, (r"quantize\.embedding\.weight", "quantizer.codebook")]


def _vqgan_llamagen(config: dict) -> tuple[nn.Module, list[Rule]]:
    last = 256 // 2 ** (len(config["ch_mult"]) - 1)
    model = VQGAN(256, config["ch"], config["ch_mult"], config["num_res_blocks"], [last], config["z_channels"],
                  VectorQuantizer(config["codebook_size"], config["codebook_embed_dim"], beta=config["beta"], l2_norm=config["l2_norm"]))
    mid = {"0": "block1", "1": "attn", "2": "block2"}
    return model, [
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


def _vqvae_simplecnn(config: dict) -> tuple[nn.Module, list[Rule]]:
    model = VQVAE(config["hidden_dim"], config["n_resblocks"],
                  VectorQuantizer(config["codebook_num"], config["codebook_dim"], l2_norm=config["l2_norm"]))
    blocks, conv = config["n_resblocks"], {"1": "conv1", "3": "conv2"}
    return model, [
        (r"quantizer\.codebook\.weight", "quantizer.codebook"),
        (r"enc2code\.(.*)", r"pre_quant.\1"),
        (r"code2dec\.(.*)", r"post_quant.\1"),
        (r"encoder\.downblocks\.(\d+)\.(.*)", r"encoder.\1.\2"),
        (r"encoder\.resblocks\.(\d+)\.blocks\.([13])\.(.*)", lambda m: f"encoder.{5 + int(m[1])}.{conv[m[2]]}.{m[3]}"),
        (r"decoder\.resblocks\.(\d+)\.blocks\.([13])\.(.*)", lambda m: f"decoder.{m[1]}.{conv[m[2]]}.{m[3]}"),
        (r"decoder\.upblocks\.([13])\.(.*)", lambda m: f"decoder.{blocks + int(m[1])}.{m[2]}"),
        (r"decoder\.upblocks\.5\.(.*)", r"to_image.\1"),
    ]


def _mqvae(config: dict) -> tuple[nn.Module, list[Rule]]:
    net, quantizer = config["encoder"], config["quantizer"]
    model = MQVAE(net["resolution"], net["ch"], net["ch_mult"], net["num_res_blocks"], net["attn_resolutions"], net["z_channels"],
                  config["masker"]["topk_ratio"], config["demasker"]["n_layer"],
                  VectorQuantizer(quantizer["codebook_size"], quantizer["codebook_dim"], quantizer["commitment_beta"],
                                  ema_decay=quantizer["decay"], restart=quantizer["restart_unused_codes"]))
    return model, [
        *_down("encoder.down"), *_neck("", "encoder.neck"), *_up("decoder", len(net["ch_mult"])),
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
        _PADDED_CODEBOOK,
    ]


def _dqvae(config: dict) -> tuple[nn.Module, list[Rule]]:
    net, decoder, budget, router = config["encoder"], config["decoder"], config["budget"], config["router"]
    names = ["coarse", "median", "fine"] if config["kind"].startswith("triple") else ["coarse", "fine"]
    entropy = config["kind"].endswith("entropy")
    levels = len(net["ch_mult"])
    ratios = [budget["target_median_ratio"], budget["target_fine_ratio"]] if len(names) == 3 else [budget["target_ratio"]]
    model = DQVAE(
        net["resolution"], [2 ** (levels - 1 - g) for g in range(len(names))], ratios, "entropy" if entropy else "feature",
        budget["gamma"], False, net["ch"], net["ch_mult"], net["num_res_blocks"], net["attn_resolutions"], net["z_channels"],
        decoder["ch_mult"], decoder["attn_resolutions"],
        VectorQuantizer(config["codebook_size"], config["codebook_dim"], config["beta"], ema_decay=0.99))
    if entropy:
        model.set_thresholds([router["threshold"]], router["patch_size"])
    rules = [*_down("down"), *_decoder("decoder", len(decoder["ch_mult"])), *_QUANT_CONVS, _PADDED_CODEBOOK,
             (r"encoder\.router\.gate\.0\.(.*)", r"router.fc1.\1"),
             (r"encoder\.router\.gate\.2\.(.*)", r"router.fc2.\1"),
             (r"decoder\.position_bias_fourier\.lff\.ffm\.conv\.(.*)", r"position.fourier.\1"),
             (r"decoder\.position_bias_learned\.row_embed\.weight", "position.rows"),
             (r"decoder\.position_bias_learned\.col_embed\.weight", "position.columns")]
    for g, name in enumerate(names):
        rules += [*_neck(f"_{name}", f"necks.{g}"), (rf"encoder\.router\.feature_norm_{name}\.(.*)", rf"router.norms.{g}.\1")]
    return model, rules


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
_PADDED_CODEBOOK: Rule = (r"quantize\.codebook\.weight", "quantizer.codebook", lambda x: x[:-1])  # the last row is never used


# Transformers. The releases keep codes, classes and special tokens in one vocabulary; here they have tables of their own.


def _gpt_taming(config: dict) -> tuple[nn.Module, list[Rule]]:
    K = config["codebook_size"]
    model = GPT(K, config["grid"], 0, config["n_layer"], config["n_head"], config["n_embd"], label_dropout=0.0)
    return model, [
        *_blocks("blocks", "blocks"),
        (r"pos_emb", "index_emb", _index_rows(config["block_size"], model.length)),
        (r"tok_emb\.weight", "code_emb.weight", _rows(K + 1, range(K))),
        (r"tok_emb\.weight", "start_emb.weight", _rows(K + 1, [K])),
        (r"ln_f\.(.*)", r"norm.\1"),
        (r"head\.weight", "head.weight", _rows(K + 1, range(K))),
    ]


def _stackformer(config: dict) -> tuple[nn.Module, list[Rule]]:
    K, classes, cells = config["codebook_size"], config["n_classes"], config["grid"] ** 2
    model = Stackformer(K, config["grid"], config["codes_per_image"], classes, config["value_layer"], config["position_layer"],
                        config["n_head"], config["n_embd"], config["resid_pdrop"], label_dropout=0.0)
    vocabulary = K + (classes or 1)  # classes come before the codes, the start token after them
    starts = range(classes) if classes else [K]
    return model, [
        *_blocks("value_transformer", "code_blocks"), *_blocks("position_transformer", "position_blocks"),
        (r"pos_emb", "index_emb", _index_rows(config["block_size"], model.length)),
        (r"value_emb\.weight", "code_emb.weight", _rows(vocabulary, range(classes, classes + K))),
        (r"value_emb\.weight", "start_emb.weight", _rows(vocabulary, starts)),
        (r"value_pos_emb\.weight", "position_emb.weight", _rows(cells + 1, [*range(cells), config["position_sos"]])),
        (r"value_head\.0\.(.*)", r"code_norm.\1"),
        (r"value_head\.1\.weight", "code_head.weight", _rows(vocabulary, range(classes, classes + K))),
        (r"position_head\.0\.(.*)", r"position_norm.\1"),
        (r"position_head\.1\.weight", "position_head.weight", _rows(cells + 1, range(cells))),
    ]


def _dq_transformer(config: dict) -> tuple[nn.Module, list[Rule]]:
    K, classes, special = config["codebook_size"], config["n_classes"], config["special"]
    names, grids = ["coarse", "fine"], [config["coarse_hw"], config["fine_hw"]]
    cells, starts = [side**2 for side in grids], classes or 1
    model = DQTransformer(K, grids, classes, config["position_layer"], config["content_layer"], config["n_head"], config["n_embd"],
                          config["resid_pdrop"], label_dropout=0.0, order=config["fine_position_order"])
    first = special["content_sos_or_first_class"]
    ends = [special[f"{name}_position_eos"] for name in names]
    rules = [
        *_blocks("content_transformer", "content_blocks"), *_blocks("position_transformer", "position_blocks"),
        (r"pos_emb", "index_emb", _index_rows(config["block_size"], model.length)),
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
    return model, rules


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
    if getattr(quantizer, "ema_decay", None) is not None:
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
