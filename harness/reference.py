"""Maps the tensor names and settings of the reference releases to ours.

    from_reference(kind, state_dict, config)    the model of a release, in eval mode
    KINDS                                       kind to a function of the release's config: the
                                                section `model` of ours, and the rules
    pick                                        settings of a release, by a table
    Rule                                        what one of the release's tensors becomes

Tables have lines THEIR_NAME OUR_NAME, of tensors or of settings. In names of tensors # is a number
and * any text. A tensor that no rule renames is an error that names it, unless DROP has its name.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch

from harness.models import make_model

# Tensors that reconstruction does not need.
DROP = (
    "loss.*",  # discriminator and LPIPS
    "*.num_batches_tracked",  # BatchNorm's counter
    "*.temb_proj.*",  # time embedding in MQ-VAE's de-mask blocks, never used
    "model_ema.*",  # averaged weights, of which convert.read_checkpoint takes care
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
    change: Callable = torch.atleast_1d

    def applied(self, name):
        """The rule for the tensor of this name alone; None if it is not about it."""
        pattern = re.escape(self.theirs).replace(r"\#", r"(\d+)").replace(r"\*", "(.*)")
        match = re.fullmatch(pattern, name)
        if match is None:
            return None
        groups = iter(match.groups())
        return replace(self, theirs=name, ours=re.sub("[#*]", lambda _: next(groups), self.ours))


def from_reference(kind, state_dict, config):
    """The model of a release, in eval mode. ValueError names every key that is unknown, missing or
    misshapen.

    kind          one of KINDS
    state_dict    this model's weights, with the release's names
    config        the release's settings of this model, as convert.read_config takes them from its
                  YAML file
    """
    settings, rules = KINDS[kind](config)
    model = make_model({"model": settings})
    _load(model, state_dict, rules)
    router = config.get("router", {})
    if "threshold" in router:
        model.set_thresholds([router["threshold"]], router["patch_size"])
    return model.eval()


def pick(config, *tables):
    """The settings in tables of THEIRS OURS; a dot leads into a section."""
    settings = {}
    for theirs, ours in _lines(tables):
        value = config
        for key in theirs.split("."):
            value = value[key]
        section = settings
        *parents, name = ours.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[name] = value
    return settings


def _rules(*tables):
    """The rules of lines THEIRS OURS, or THEIRS OURS PART PARTS."""
    return [Rule(theirs, ours, *map(int, part)) for theirs, ours, *part in _lines(tables)]


def _lines(tables):
    return [line.split() for line in "\n".join(tables).splitlines() if line.strip()]


# Stage 1

def _encoder(net):
    return f"""
        {net}.ch                ch
        {net}.ch_mult           ch_mult
        {net}.num_res_blocks    num_res_blocks
        {net}.attn_resolutions  attn_resolutions
        {net}.z_channels        z_channels
        {net}.resolution        image_size
        """


def _vqgan_taming(config):
    settings = {"name": "vqgan"} | pick(config, _encoder("ddconfig"), """
        n_embed    quantizer.codebook_size
        embed_dim  quantizer.dim
        """)
    settings["quantizer"]["legacy"] = True
    return settings, _rules(
        _down("encoder.down"), _neck("", "encoder.neck"),
        _decoder(len(config["ddconfig"]["ch_mult"])), QUANT_CONVS, CODEBOOK)


def _vqgan_llamagen(config):
    last = 256 // 2 ** (len(config["ch_mult"]) - 1)  # only the last level has attention
    settings = {"name": "vqgan", "image_size": 256, "attn_resolutions": [last]} | pick(config, """
        ch                  ch
        ch_mult             ch_mult
        num_res_blocks      num_res_blocks
        z_channels          z_channels
        codebook_size       quantizer.codebook_size
        codebook_embed_dim  quantizer.dim
        beta                quantizer.beta
        l2_norm             quantizer.l2_norm
        """)
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


def _vqvae_simplecnn(config):
    settings = {"name": "vqvae"} | pick(config, """
        hidden_dim    ch
        n_resblocks   num_res_blocks
        codebook_num  quantizer.codebook_size
        codebook_dim  quantizer.dim
        l2_norm       quantizer.l2_norm
        """)
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


def _mqvae(config):
    settings = {"name": "mqvae", "release_training": True} | pick(config, _encoder("encoder"), """
        masker.topk_ratio               topk_ratio
        demasker.n_layer                demask_layers
        quantizer.codebook_size         quantizer.codebook_size
        quantizer.codebook_dim          quantizer.dim
        quantizer.commitment_beta       quantizer.beta
        quantizer.decay                 quantizer.ema_decay
        quantizer.restart_unused_codes  quantizer.restart
        """)
    rules = _rules(
        _down("encoder.down"), _neck("", "encoder.neck"),
        _up("decoder", len(config["encoder"]["ch_mult"])), """
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


def _dqvae(config):
    grains = ["coarse", "fine"]
    ratios = ["target_ratio"]
    if config["kind"].startswith("triple"):
        grains = ["coarse", "median", "fine"]
        ratios = ["target_median_ratio", "target_fine_ratio"]
    finest = len(config["encoder"]["ch_mult"]) - len(grains)
    settings = {
        "name": "dqvae", "ema_weighted": False, "release_training": True,
        "factors": [2 ** (finest + g) for g in reversed(range(len(grains)))],
        "ratios": [config["budget"][ratio] for ratio in ratios],
        "router": "entropy" if config["kind"].endswith("entropy") else "feature",
        **pick(config, _encoder("encoder"), """
        budget.gamma              budget_weight
        decoder.ch_mult           decoder_ch_mult
        decoder.attn_resolutions  decoder_attn_resolutions
        codebook_size             quantizer.codebook_size
        codebook_dim              quantizer.dim
        beta                      quantizer.beta
        """),
    }
    settings["quantizer"]["ema_decay"] = 0.99
    tables = [_down("down"), _decoder(len(config["decoder"]["ch_mult"])), QUANT_CONVS, """
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

SIZES = """
        codebook_size  codebook_size
        n_head         n_head
        n_embd         n_embd
        """
PLAIN = {"label_dropout": 0.0, "rope": False, "qk_norm": False}  # as no release has these


def _gpt_taming(config):
    """Without classes, the start token is token K, or code `sos_token` if there are only K tokens.
    With classes, class i shares the row of code i."""
    K = config["codebook_size"]
    classes = config.get("n_classes", 0)
    vocabulary = config.get("vocab_size", K + 1)
    settings = {
        "name": "gpt", "num_classes": classes, "dropout": config.get("resid_pdrop", 0.0), **PLAIN,
        **pick(config, SIZES, """
        grid     grid
        n_layer  n_layer
        """),
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


def _stackformer(config):
    """The vocabulary is classes, then codes; or codes, then the start token."""
    K = config["codebook_size"]
    classes = config["n_classes"]
    cells = config["grid"] ** 2
    settings = {"name": "stackformer", **PLAIN} | pick(config, SIZES, """
        grid             grid
        codes_per_image  num_codes
        n_classes        num_classes
        value_layer      code_layers
        position_layer   position_layers
        resid_pdrop      dropout
        """)
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


def _dq_transformer(config):
    """Each table holds codes or cells, then padding, end and start tokens (one start token per
    class, if there are classes)."""
    K = config["codebook_size"]
    special = config["special"]
    grids = [config["coarse_hw"], config["fine_hw"]]
    coarse, fine = (side**2 for side in grids)
    settings = {"name": "dq_transformer", "grids": grids, **PLAIN}
    settings |= pick(config, SIZES, """
        n_classes            num_classes
        position_layer       position_layers
        content_layer        content_layers
        resid_pdrop          dropout
        fine_position_order  order
        """)

    def tokens(table, count):
        """How many rows a table has, and those of its first tokens, its end and its starts."""
        first = special[f"{table}_sos_or_first_class"]
        starts = range(first, first + (config["n_classes"] or 1))
        return starts.stop, [*range(count), special[f"{table}_eos"], *starts]

    contents, content_rows = tokens("content", K)
    fine_positions, fine_rows = tokens("fine_position", fine)
    ends = [special["coarse_position_eos"], special["fine_position_eos"]]
    return settings, [
        *_rules(_blocks("content_transformer", "content_blocks"),
                _blocks("position_transformer", "position_blocks"), """
        seg_emb.weight     grain_emb.weight
        content_head.0.*   content_norm.*
        position_head.0.*  position_norm.*
        """),
        _first_rows(config, fine + 3),
        _rows("content_emb.weight", "content_emb.weight", contents, content_rows),
        _rows("content_head.1.weight", "content_head.weight", contents, range(K)),
        _rows("position_head.1.weight", "position_head.weight", fine_positions,
              [*range(fine), *ends]),
        _rows("content_coarse_pos_emb.weight", "position_emb.weight",
              *tokens("coarse_position", coarse), 0, 2),
        _rows("content_fine_pos_emb.weight", "position_emb.weight", fine_positions, fine_rows,
              1, 2),
    ]


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


def _rows(theirs, ours, total, rows, *part):
    """Picks these rows of a table with `total` rows. A table of any other size stays as it is, and
    _load refuses it."""
    return Rule(theirs, ours, *part, change=lambda x: x[list(rows)] if len(x) == total else x)


def _first_rows(config, length):
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


def _load(model, state_dict, rules):
    own = model.state_dict()
    state = {}
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
        elif {(rows, *tensor.shape[1:]) for tensor in tensors} != {shape}:
            shapes = " and ".join(f"{name} {tuple(state_dict[name].shape)}" for name in names)
            problems.append(f"{shapes} cannot become {ours} {shape}")
        else:
            state[ours] = torch.cat(tensors)
    problems += [f"missing what becomes {name}" for name in own
                 if name not in applied and not _is_like(name, OPTIONAL)]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"these weights do not fit the config: {'; '.join(problems[:5])}{more}")
    model.load_state_dict(own | state)
    if "quantizer.ema_sum" in own.keys() - applied.keys():
        model.quantizer.ema_sum.copy_(model.quantizer.codebook)
        model.quantizer.ema_count.fill_(1.0)


def _applied(rules, name):
    """The rules that are about this tensor, applied to its name."""
    for rule in rules:
        if applied := rule.applied(name):
            for inner in PARTS_OF_BLOCKS:
                if part := inner.applied(applied.ours):
                    applied = replace(part, theirs=name)
            yield applied


def _is_like(name, patterns):
    return any(fnmatchcase(name, pattern) for pattern in patterns)
