"""Maps the tensor names and settings of the reference releases to ours. Needs only the models.

    from_reference(kind, state_dict, config)    the model of a release, in eval mode
    KINDS                                       kind to a function of the release's config: the
                                                section `model` of ours, and the rules
    Rule                                        what one of the release's tensors becomes

The rules are tables of THEIR_NAME OUR_NAME, in which # is a number and * any text. A tensor that no
rule renames is an error that names it, unless DROP has its name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
import torch.nn as nn
from torch import Tensor

from dq_transformer import DQTransformer
from dqvae import DQVAE
from gpt import GPT
from mqvae import MQVAE
from stackformer import Stackformer
from vqgan import VQGAN, VQVAE, VectorQuantizer

MODELS = {"vqgan": VQGAN, "vqvae": VQVAE, "mqvae": MQVAE, "dqvae": DQVAE, "gpt": GPT,
          "stackformer": Stackformer, "dq_transformer": DQTransformer}

# Tensors that reconstruction does not need.
DROP = (
    "loss.*",  # discriminator and LPIPS
    "*.num_batches_tracked",  # BatchNorm's counter
    "*.temb_proj.*",  # time embedding in MQ-VAE's de-mask blocks, never used
    "quantize.codebook_used",  # LlamaGen's record of the codes in use
    "*.attn.mask",  # the causal mask, a constant
)

# Our tensors that a release may lack.
OPTIONAL = ("thresholds", "*num_batches_tracked", "quantizer.ema_*", "quantizer.queue")


@dataclass
class Rule:
    """Each tensor with a name like `theirs` becomes the one called `ours`: all of it, or one of
    several parts that are concatenated. Several rules may match one tensor."""

    theirs: str
    ours: str
    part: int = 0
    parts: int = 1
    change: Callable[[Tensor], Tensor] = torch.atleast_1d

    def applied(self, name: str) -> Rule | None:
        """The rule for the tensor of this name alone; None if it is not about it."""
        pattern = re.escape(self.theirs).replace(r"\#", r"(\d+)").replace(r"\*", "(.*)")
        match = re.fullmatch(pattern, name)
        if match is None:
            return None
        groups = iter(match.groups())
        return replace(self, theirs=name, ours=re.sub("[#*]", lambda _: next(groups), self.ours))


Conversion = tuple[dict, list[Rule]]  # the section `model` of our config, and the rules


def from_reference(kind: str, state_dict: dict[str, Tensor], config: dict) -> nn.Module:
    """The model of a release, in eval mode. ValueError names every key that is unknown, missing or
    misshapen.

    kind          one of KINDS
    state_dict    this model's weights, with the release's names
    config        the release's settings of this model, as convert.read_config takes them from its
                  YAML file
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; it is {kind!r}")
    settings, rules = KINDS[kind](config)
    if "quantizer" in settings:
        settings["quantizer"] = VectorQuantizer(**settings["quantizer"])
    model = MODELS[settings.pop("name")](**settings)
    _load(model, state_dict, rules)
    router = config.get("router", {})
    if "threshold" in router:
        model.set_thresholds([router["threshold"]], router["patch_size"])
    return model.eval()


def pick(config: dict, *names: str, **renamed: str) -> dict:
    """Some settings of a release: those with our names, and OURS="THEIRS"."""
    return {key: config[theirs] for key, theirs in (dict(zip(names, names)) | renamed).items()}


def _rules(*tables: str) -> list[Rule]:
    """The rules of lines THEIRS OURS, or THEIRS OURS PART PARTS."""
    rules = []
    for line in "\n".join(tables).splitlines():
        if line.strip():
            theirs, ours, *part = line.split()
            rules.append(Rule(theirs, ours, *map(int, part)))
    return rules


# Stage 1

ENCODER = ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "z_channels")


def _vqgan_taming(config) -> Conversion:
    net = config["ddconfig"]
    settings = {
        "name": "vqgan", **pick(net, *ENCODER, image_size="resolution"),
        "quantizer": {"legacy": True, **pick(config, codebook_size="n_embed", dim="embed_dim")},
    }
    return settings, _rules(
        _down("encoder.down"), _neck("", "encoder.neck"), _decoder(len(net["ch_mult"])),
        QUANT_CONVS, CODEBOOK)


def _vqgan_llamagen(config) -> Conversion:
    last = 256 // 2 ** (len(config["ch_mult"]) - 1)  # only the last level has attention
    settings = {
        "name": "vqgan", "image_size": 256,
        **pick(config | {"attn_resolutions": [last]}, *ENCODER),
        "quantizer": pick(config, "codebook_size", "beta", "l2_norm", dim="codebook_embed_dim"),
    }
    return settings, _rules("""
        encoder.conv_in.*                        encoder.down.conv_in.*
        encoder.conv_blocks.#.res.*              encoder.down.levels.#.blocks.*
        encoder.conv_blocks.#.attn.*             encoder.down.levels.#.attns.*
        encoder.conv_blocks.#.downsample.conv.*  encoder.down.downs.#.1.*
        encoder.mid.0.*                          encoder.neck.mid.block1.*
        encoder.mid.1.*                          encoder.neck.mid.attn.*
        encoder.mid.2.*                          encoder.neck.mid.block2.*
        encoder.norm_out.*                       encoder.neck.norm_out.*
        encoder.conv_out.*                       encoder.neck.conv_out.*
        decoder.conv_in.*                        decoder.conv_in.*
        decoder.mid.0.*                          decoder.mid.block1.*
        decoder.mid.1.*                          decoder.mid.attn.*
        decoder.mid.2.*                          decoder.mid.block2.*
        decoder.conv_blocks.#.res.*              decoder.up.levels.#.blocks.*
        decoder.conv_blocks.#.attn.*             decoder.up.levels.#.attns.*
        decoder.conv_blocks.#.upsample.conv.*    decoder.up.ups.#.1.*
        decoder.norm_out.*                       decoder.up.norm_out.*
        decoder.conv_out.*                       to_image.*
        """, QUANT_CONVS, CODEBOOK)


def _vqvae_simplecnn(config) -> Conversion:
    settings = {
        "name": "vqvae", **pick(config, ch="hidden_dim", num_res_blocks="n_resblocks"),
        "quantizer": pick(config, "l2_norm", codebook_size="codebook_num", dim="codebook_dim"),
    }
    blocks = config["n_resblocks"]
    tables = [f"""
        quantizer.codebook.weight  quantizer.codebook
        enc2code.*                 pre_quant.*
        code2dec.*                 post_quant.*
        encoder.downblocks.#.*     encoder.#.*
        decoder.upblocks.1.*       decoder.{blocks + 1}.*
        decoder.upblocks.3.*       decoder.{blocks + 3}.*
        decoder.upblocks.5.*       to_image.*
        """]
    for i in range(blocks):
        tables.append(f"""
        encoder.resblocks.{i}.blocks.1.*  encoder.{5 + i}.conv1.*
        encoder.resblocks.{i}.blocks.3.*  encoder.{5 + i}.conv2.*
        decoder.resblocks.{i}.blocks.1.*  decoder.{i}.conv1.*
        decoder.resblocks.{i}.blocks.3.*  decoder.{i}.conv2.*
        """)
    return settings, _rules(*tables)


def _mqvae(config) -> Conversion:
    net = config["encoder"]
    quantizer = pick(
        config["quantizer"], "codebook_size", dim="codebook_dim", beta="commitment_beta",
        ema_decay="decay", restart="restart_unused_codes")
    settings = {
        "name": "mqvae", **pick(net, *ENCODER, image_size="resolution"),
        **pick(config["masker"], "topk_ratio"),
        **pick(config["demasker"], demask_layers="n_layer"),
        "quantizer": quantizer, "release_training": True,
    }
    rules = _rules(
        _down("encoder.down"), _neck("", "encoder.neck"), _up("decoder", len(net["ch_mult"])), """
        masker.score_pred_net.1.*                 score_net.conv1.*
        masker.score_pred_net.3.*                 score_net.conv2.*
        masker.score_pred_net.4.*                 score_net.norm.*
        masker.pre_projection.weight              pre_quant.weight
        demasker.post_projection.*                demask.post_quant.*
        demasker.conv_in.*                        demask.conv_in.*
        demasker.transformer.blocks.#.resblock.*  demask.blocks.#.*
        demasker.transformer.blocks.#.attn.*      demask.attns.#.*
        demasker.transformer.last_resblock.*      demask.last_block.*
        """)
    token = Rule("demasker.mask_token", "demask.token", change=torch.flatten)
    return settings, [*rules, token, *EMA_CODEBOOK]


def _dqvae(config) -> Conversion:
    net = config["encoder"]
    decoder = config["decoder"]
    grains = ["coarse", "fine"]
    ratios = ["target_ratio"]
    if config["kind"].startswith("triple"):
        grains = ["coarse", "median", "fine"]
        ratios = ["target_median_ratio", "target_fine_ratio"]
    finest = len(net["ch_mult"]) - len(grains)
    settings = {
        "name": "dqvae", **pick(net, *ENCODER, image_size="resolution"),
        "factors": [2 ** (finest + g) for g in reversed(range(len(grains)))],
        "ratios": [config["budget"][ratio] for ratio in ratios],
        "router": "entropy" if config["kind"].endswith("entropy") else "feature",
        **pick(config["budget"], budget_weight="gamma"),
        "ema_weighted": False, "release_training": True,
        **pick(decoder, decoder_ch_mult="ch_mult", decoder_attn_resolutions="attn_resolutions"),
        "quantizer": {"ema_decay": 0.99,
                      **pick(config, "codebook_size", "beta", dim="codebook_dim")},
    }
    tables = [_down("down"), _decoder(len(decoder["ch_mult"])), QUANT_CONVS, """
        encoder.router.gate.0.*                          router.fc1.*
        encoder.router.gate.2.*                          router.fc2.*
        decoder.position_bias_fourier.lff.ffm.conv.*     position.fourier.*
        decoder.position_bias_learned.row_embed.weight   position.rows
        decoder.position_bias_learned.col_embed.weight   position.columns
        """]
    for g, grain in enumerate(grains):
        norm = f"encoder.router.feature_norm_{grain}.*  router.norms.{g}.*"
        tables += [_neck(f"_{grain}", f"necks.{g}"), norm]
    return settings, _rules(*tables) + EMA_CODEBOOK


# Encoder and decoder of Taming Transformers, on which the MQ-VAE and DQ-VAE releases build.


def _down(ours):
    return f"""
        encoder.conv_in.*                 {ours}.conv_in.*
        encoder.down.#.block.*            {ours}.levels.#.blocks.*
        encoder.down.#.attn.*             {ours}.levels.#.attns.*
        encoder.down.#.downsample.conv.*  {ours}.downs.#.1.*
        """


def _neck(suffix, ours):
    return f"""
        encoder.mid{suffix}.block_#.*  {ours}.mid.block#.*
        encoder.mid{suffix}.attn_1.*   {ours}.mid.attn.*
        encoder.norm_out{suffix}.*     {ours}.norm_out.*
        encoder.conv_out{suffix}.*     {ours}.conv_out.*
        """


def _decoder(levels):
    return _up("decoder.up", levels) + """
        decoder.conv_in.*      decoder.conv_in.*
        decoder.mid.block_#.*  decoder.mid.block#.*
        decoder.mid.attn_1.*   decoder.mid.attn.*
        """


def _up(ours, levels):
    """The releases number the decoder's levels from the finest, we from the coarsest."""
    table = f"""
        decoder.norm_out.*  {ours}.norm_out.*
        decoder.conv_out.*  to_image.*
        """
    for level in range(levels):
        theirs = f"decoder.up.{levels - 1 - level}"
        table += f"""
        {theirs}.block.*          {ours}.levels.{level}.blocks.*
        {theirs}.attn.*           {ours}.levels.{level}.attns.*
        {theirs}.upsample.conv.*  {ours}.ups.{level}.1.*
        """
    return table


QUANT_CONVS = """
        quant_conv.*       pre_quant.*
        post_quant_conv.*  post_quant.*
        """
CODEBOOK = """
        quantize.embedding.weight  quantizer.codebook
        """
EMA_CODEBOOK = [
    Rule("quantize.codebook.weight", "quantizer.codebook",
         change=lambda codes: codes[:-1]),  # the last row is unused
    Rule("quantize.codebook.cluster_size_ema", "quantizer.ema_count"),
    Rule("quantize.codebook.embed_ema", "quantizer.ema_sum"),
]

# Stage 2. The releases have one table for codes, classes and special tokens; here each has its own.

PLAIN = {"label_dropout": 0.0, "rope": False, "qk_norm": False}  # as no release has these


def _gpt_taming(config) -> Conversion:
    """Without classes, the start token is token K, or code `sos_token` if there are only K tokens.
    With classes, class i shares the row of code i."""
    K = config["codebook_size"]
    classes = config.get("n_classes", 0)
    vocabulary = config.get("vocab_size", K + 1)
    settings = {
        "name": "gpt", "num_classes": classes, "dropout": config.get("resid_pdrop", 0.0), **PLAIN,
        **pick(config, "codebook_size", "grid", "n_layer", "n_head", "n_embd"),
    }
    starts = [K]
    if classes:
        starts = range(classes)
    elif vocabulary == K:
        starts = [config.get("sos_token", K)]
    return settings, [
        *_rules(_blocks("blocks", "blocks"), """
        ln_f.*  norm.*
        """),
        _first_rows(config, config["grid"] ** 2),
        _rows("tok_emb.weight", "code_emb.weight", vocabulary, range(K)),
        _rows("tok_emb.weight", "start_emb.weight", vocabulary, starts),
        _rows("head.weight", "head.weight", vocabulary, range(K)),
    ]


def _stackformer(config) -> Conversion:
    """The vocabulary is classes, then codes; or codes, then the start token."""
    K = config["codebook_size"]
    classes = config["n_classes"]
    cells = config["grid"] ** 2
    settings = {
        "name": "stackformer", **PLAIN,
        **pick(config, "codebook_size", "grid", "n_head", "n_embd", num_codes="codes_per_image",
               num_classes="n_classes", code_layers="value_layer",
               position_layers="position_layer", dropout="resid_pdrop"),
    }
    vocabulary = K + (classes or 1)
    codes = range(classes, classes + K)
    starts = range(classes) if classes else [K]
    return settings, [
        *_rules(_blocks("value_transformer", "code_blocks"),
                _blocks("position_transformer", "position_blocks"), """
        value_head.0.*     code_norm.*
        position_head.0.*  position_norm.*
        """),
        _first_rows(config, config["codes_per_image"]),
        _rows("value_emb.weight", "code_emb.weight", vocabulary, codes),
        _rows("value_emb.weight", "start_emb.weight", vocabulary, starts),
        _rows("value_head.1.weight", "code_head.weight", vocabulary, codes),
        _rows("value_pos_emb.weight", "position_emb.weight", cells + 1,
              [*range(cells), config["position_sos"]]),
        _rows("position_head.1.weight", "position_head.weight", cells + 1, range(cells)),
    ]


def _dq_transformer(config) -> Conversion:
    """Each table holds codes or cells, then padding, end and start tokens (one start token per
    class, if there are classes)."""
    K = config["codebook_size"]
    special = config["special"]
    grids = [config["coarse_hw"], config["fine_hw"]]
    settings = {
        "name": "dq_transformer", "grids": grids, **PLAIN,
        **pick(config, "codebook_size", "n_head", "n_embd", num_classes="n_classes",
               position_layers="position_layer", content_layers="content_layer",
               dropout="resid_pdrop", order="fine_position_order"),
    }
    tokens = {}  # of each table: how many, its end token, its start tokens
    for name in ("content", "coarse_position", "fine_position"):
        first = special[f"{name}_sos_or_first_class"]
        starts = range(first, first + (config["n_classes"] or 1))
        tokens[name] = starts.stop, special[f"{name}_eos"], starts
    contents, content_end, content_starts = tokens["content"]
    finest = range(grids[-1] ** 2)
    ends = [tokens["coarse_position"][1], tokens["fine_position"][1]]
    rules = [
        *_rules(_blocks("content_transformer", "content_blocks"),
                _blocks("position_transformer", "position_blocks"), """
        seg_emb.weight     grain_emb.weight
        content_head.0.*   content_norm.*
        position_head.0.*  position_norm.*
        """),
        _first_rows(config, len(finest) + 3),
        _rows("content_emb.weight", "content_emb.weight", contents,
              [*range(K), content_end, *content_starts]),
        _rows("content_head.1.weight", "content_head.weight", contents, range(K)),
        _rows("position_head.1.weight", "position_head.weight", tokens["fine_position"][0],
              [*finest, *ends]),
    ]
    for part, grain in enumerate(("coarse", "fine")):
        total, end, starts = tokens[f"{grain}_position"]
        rule = _rows(f"content_{grain}_pos_emb.weight", "position_emb.weight", total,
                     [*range(grids[part] ** 2), end, *starts])
        rules.append(replace(rule, part=part, parts=2))
    return settings, rules


def _blocks(theirs, ours):
    return f"""
        {theirs}.#.ln1.*         {ours}.layers.#.norm1.*
        {theirs}.#.ln2.*         {ours}.layers.#.norm2.*
        {theirs}.#.attn.query.*  {ours}.layers.#.qkv.*  0 3
        {theirs}.#.attn.key.*    {ours}.layers.#.qkv.*  1 3
        {theirs}.#.attn.value.*  {ours}.layers.#.qkv.*  2 3
        {theirs}.#.attn.proj.*   {ours}.layers.#.out.*
        {theirs}.#.mlp.#.*       {ours}.layers.#.mlp.#.*
        """


def _rows(theirs, ours, total: int, rows: Iterable[int]) -> Rule:
    """Picks these rows of a table with `total` rows. A table of any other size stays as it is, and
    _load refuses it."""
    return Rule(theirs, ours, change=lambda x: x[list(rows)] if len(x) == total else x)


def _first_rows(config, length) -> Rule:
    """Of position embeddings (1, block_size, C), which may have more rows than are used."""
    expected = (1, config["block_size"])
    return Rule("pos_emb", "index_emb",
                change=lambda x: x[0, :length] if x.shape[:2] == expected else x)


KINDS = {"vqgan_taming": _vqgan_taming, "vqgan_llamagen": _vqgan_llamagen,
         "vqvae_simplecnn": _vqvae_simplecnn, "mqvae": _mqvae, "dqvae": _dqvae,
         "gpt_taming": _gpt_taming, "stackformer": _stackformer,
         "dq_transformer": _dq_transformer}
FIRST_STAGE = {"gpt_taming": "vqgan_taming", "stackformer": "mqvae", "dq_transformer": "dqvae"}


# Loading

# Names in residual blocks and in attention by convolutions: one for q, k and v here, three in the
# releases.
PARTS_OF_BLOCKS = _rules("""
        *.nin_shortcut.*  *.skip.*
        *.proj_out.*      *.out.*
        *.q.*             *.qkv.*  0 3
        *.k.*             *.qkv.*  1 3
        *.v.*             *.qkv.*  2 3
        """)


def _load(model: nn.Module, state_dict: dict[str, Tensor], rules: list[Rule]):
    own = model.state_dict()
    state = {name: tensor for name, tensor in own.items() if _is_like(name, OPTIONAL)}
    applied = defaultdict(list)  # {our name: rules}
    problems = []
    for name in state_dict:
        if _is_like(name, DROP):
            continue
        fitting = [rule for rule in _applied(rules, name) if rule.ours in own]
        if not fitting:
            problems.append(f"unknown {name}")
        for rule in fitting:
            applied[rule.ours].append(rule)
    for ours, parts in applied.items():
        parts.sort(key=lambda rule: rule.part)
        names = [rule.theirs for rule in parts]
        tensors = [rule.change(state_dict[rule.theirs]) for rule in parts]
        rows = sum(map(len, tensors))
        shape = tuple(own[ours].shape)
        if len(parts) < parts[0].parts:
            problems.append(f"missing a part of what becomes {ours}, of which there is only "
                            f"{', '.join(names)}")
        elif any((rows, *tensor.shape[1:]) != shape for tensor in tensors):
            shapes = " and ".join(f"{name} {tuple(state_dict[name].shape)}" for name in names)
            problems.append(f"{shapes} cannot become {ours} {shape}")
        else:
            state[ours] = torch.cat(tensors)
    present = state.keys() | applied.keys()
    problems += [f"missing what becomes {name}" for name in own if name not in present]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"these weights do not fit the config: {'; '.join(problems[:5])}{more}")
    model.load_state_dict(state)
    averages = {"quantizer.ema_sum", "quantizer.ema_count"}
    if averages <= own.keys() and not averages <= applied.keys():
        model.quantizer.ema_sum.copy_(model.quantizer.codebook)
        model.quantizer.ema_count.fill_(1.0)


def _applied(rules: list[Rule], name: str) -> Iterator[Rule]:
    """The rules that are about this tensor, applied to its name."""
    for rule in rules:
        if applied := rule.applied(name):
            for inner in PARTS_OF_BLOCKS:
                if part := inner.applied(applied.ours):
                    applied = replace(part, theirs=name)
            yield applied


def _is_like(name, patterns) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
