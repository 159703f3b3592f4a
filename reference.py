"""Maps the tensor names and settings of the reference releases to ours. Needs only the models.

    from_reference(kind, state_dict, config)    the model of a release, in eval mode

For each key of a release there is a rule that renames it, or a pattern in DROP. Any other key is an error that names it.
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

MODELS = {"vqgan": VQGAN, "vqvae": VQVAE, "mqvae": MQVAE, "dqvae": DQVAE, "gpt": GPT, "stackformer": Stackformer,
          "dq_transformer": DQTransformer}

# (pattern of the release's name, our name) or (pattern, our name, change of the tensor). Our name may end in "#i of n": n tensors of the
# release form one here. Several rules may match one tensor; each takes its part.
Rule = tuple

# Keys that reconstruction does not need.
DROP = [
    r"loss\..*",  # discriminator and LPIPS
    r".*\.num_batches_tracked",  # BatchNorm's counter
    r".*\.temb_proj\..*",  # time embedding in MQ-VAE's de-mask blocks, never used
    r"quantize\.codebook_used",  # LlamaGen's record of the codes in use
    r".*\.attn\.mask",  # the causal mask, a constant
]


def from_reference(kind: str, state_dict: dict[str, Tensor], config: dict) -> nn.Module:
    """The model of a release, in eval mode. ValueError names every key that is unknown, missing or misshapen.

    kind          one of KINDS
    state_dict    this model's weights, with the release's names
    config        the release's settings of this model, as convert.read_config takes them from its YAML file
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; it is {kind!r}")
    settings, rules = KINDS[kind](config)
    if "quantizer" in settings:
        settings["quantizer"] = VectorQuantizer(**settings["quantizer"])
    model = MODELS[settings.pop("name")](**settings)
    _load(model, state_dict, rules)
    if "threshold" in config.get("router", {}):
        model.set_thresholds([config["router"]["threshold"]], config["router"]["patch_size"])
    return model.eval()


def _vqgan_taming(config: dict) -> tuple[dict, list[Rule]]:
    net = config["ddconfig"]
    settings = {"name": "vqgan", "image_size": net["resolution"], **_net(net),
                "quantizer": {"codebook_size": config["n_embed"], "dim": config["embed_dim"], "legacy": True}}
    return settings, [*_down("encoder.down"), *_neck("", "encoder.neck"), *_decoder("decoder", len(net["ch_mult"])),
                      *_QUANT_CONVS, (r"quantize\.embedding\.weight", "quantizer.codebook")]


def _net(net: dict) -> dict:
    """The encoder's settings, with the same names in the releases and here."""
    return {key: net[key] for key in ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "z_channels")}


def _vqgan_llamagen(config: dict) -> tuple[dict, list[Rule]]:
    last = 256 // 2 ** (len(config["ch_mult"]) - 1)  # only the last level has attention
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


# Encoder and decoder of Taming Transformers, on which the MQ-VAE and DQ-VAE releases build.


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
    """The releases number the decoder's levels from the finest, we from the coarsest."""
    return [(r"decoder\.up\.(\d+)\.block\.(.*)", lambda m: f"{ours}.levels.{levels - 1 - int(m[1])}.blocks.{m[2]}"),
            (r"decoder\.up\.(\d+)\.attn\.(.*)", lambda m: f"{ours}.levels.{levels - 1 - int(m[1])}.attns.{m[2]}"),
            (r"decoder\.up\.(\d+)\.upsample\.conv\.(.*)", lambda m: f"{ours}.ups.{levels - 1 - int(m[1])}.1.{m[2]}"),
            (r"decoder\.norm_out\.(.*)", rf"{ours}.norm_out.\1"),
            (r"decoder\.conv_out\.(.*)", r"to_image.\1")]


_QUANT_CONVS: list[Rule] = [(r"quant_conv\.(.*)", r"pre_quant.\1"), (r"post_quant_conv\.(.*)", r"post_quant.\1")]
_EMA_CODEBOOK: list[Rule] = [(r"quantize\.codebook\.weight", "quantizer.codebook", lambda x: x[:-1]),  # the last row is unused
                             (r"quantize\.codebook\.cluster_size_ema", "quantizer.ema_count"),
                             (r"quantize\.codebook\.embed_ema", "quantizer.ema_sum")]


# Transformers. The releases have one table for codes, classes and special tokens; here each has its own.


def _gpt_taming(config: dict) -> tuple[dict, list[Rule]]:
    """Without classes, the start token is token K, or code `sos_token` if there are only K tokens. With classes, class i shares the row of
    code i."""
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
    vocabulary = K + (classes or 1)  # classes first, then codes; or codes, then the start token
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
    """Each table holds codes or cells, then padding, end and start tokens (one start token per class, if there are classes)."""
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
    """Picks these rows of a table with `total` rows. A table of any other size stays as it is, and _load refuses it."""
    return lambda x: x[list(rows)] if len(x) == total else x


def _index_rows(block_size: int, length: int) -> Callable[[Tensor], Tensor]:
    """The first rows of (1, block_size, C), which may have more than are used."""
    return lambda x: x[0, :length] if x.shape[:2] == (1, block_size) else x


def _load(model: nn.Module, state_dict: dict[str, Tensor], rules: list[Rule]) -> None:
    wanted, parts, problems = model.state_dict(), {}, []
    for name, value in state_dict.items():
        if any(re.fullmatch(pattern, name) for pattern in DROP):
            continue
        found = [part for part in _rename(name, value, rules) if part[0] in wanted]
        if not found:
            problems.append(f"unknown {name}")
        for ours, i, n, tensor in found:
            parts.setdefault(ours, [None] * n)[i] = name, tensor
    # A release may lack these
    state = {k: v for k, v in wanted.items() if k == "thresholds" or re.fullmatch(r".*num_batches_tracked|quantizer\.(ema_.*|queue)", k)}
    for ours, pieces in parts.items():
        there = [piece for piece in pieces if piece]
        tensors = [torch.atleast_1d(tensor) for _, tensor in there]
        state[ours] = torch.cat(tensors) if len({t.shape[1:] for t in tensors}) == 1 else None
        if len(there) < len(pieces):
            problems.append(f"missing a part of what becomes {ours}, of which there is only {', '.join(name for name, _ in there)}")
        elif state[ours] is None or state[ours].shape != wanted[ours].shape:
            shapes = " and ".join(f"{name} {tuple(state_dict[name].shape)}" for name, _ in there)
            problems.append(f"{shapes} cannot become {ours} {tuple(wanted[ours].shape)}")
    problems += [f"missing what becomes {k}" for k in wanted if k not in state]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"these weights do not fit the config: {'; '.join(problems[:5])}{more}")
    model.load_state_dict(state)
    quantizer = getattr(model, "quantizer", None)
    if getattr(quantizer, "ema_decay", None) is not None and not {"quantizer.ema_sum", "quantizer.ema_count"} <= parts.keys():
        quantizer.ema_sum.copy_(quantizer.codebook)
        quantizer.ema_count.fill_(1.0)


def _rename(name: str, value: Tensor, rules: list[Rule]) -> Iterator[tuple[str, int, int, Tensor]]:
    """(our name, i, n, tensor) for each rule that matches: the tensor is part i of n."""
    for pattern, ours, *change in rules:
        if match := re.fullmatch(pattern, name):
            ours = ours(match) if callable(ours) else match.expand(ours)
            ours = ours.replace(".nin_shortcut.", ".skip.").replace(".proj_out.", ".out.")
            if qkv := re.fullmatch(r"(.*)\.([qkv])\.(weight|bias)", ours):  # one convolution here, three in the releases
                ours = f"{qkv[1]}.qkv.{qkv[3]}#{'qkv'.index(qkv[2])} of 3"
            ours, _, part = ours.partition("#")
            i, n = map(int, part.split(" of ")) if part else (0, 1)
            yield ours, i, n, change[0](value) if change else value
