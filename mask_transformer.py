"""MaskTransformer: generates the codes of any stage-1 model in parallel, and edits images.

    MaskTransformer     "MaskGIT: Masked Generative Image Transformer" (Chang et al., CVPR 2022),
                        for VQGAN, MQ-VAE and DQ-VAE
    Places, Packed      codes as layout and contents, and back
    Unmask              the schedule of sampling

First the layout, then the contents. The layout says which cells of an MQ-VAE have a code, or the
granularity of each region of a DQ-VAE (a VQGAN has none); the contents are the codes. Each has a
bidirectional transformer that was trained to predict masked tokens from the others. At first all
tokens are masks; in each of a few steps, sampling keeps those that the model is most confident of.
Shapes: R regions (cells of the coarsest grid), N finest cells, P places where a code can be (the
cells of all grids), L codes of the longest row, K codes in the codebook, C channels.

    model = MaskTransformer(codebook_size=1024, grids=[16, 32])             # for a DQ-VAE
    model = MaskTransformer(codebook_size=1024, grids=[32], num_codes=256)  # for an MQ-VAE
    model = MaskTransformer(codebook_size=1024, grids=[16])                 # for a VQGAN
    loss = model(codes, labels)["loss"]
    codes = model.eval().sample(8, labels, steps=12)
    codes = model.sample(8, labels, codes=codes, known=known)   # known: bool (8, h, w), what stays

Differences from the release: the layout; rotary position embeddings beside learned ones; gpt.py's
pre-norm blocks and an untied head; classifier-free guidance; no label smoothing. Copy with gpt.py.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpt import (
    HUGE, Blocks, CodeHead, Codes, CodeTransformer, Count, Generators, Probability, Schedule,
    cell_tables, check_grids, check_known, check_sampling, covered, cross_entropy, divided, draw,
    filter_logits, read_codes, register_tables, sides, uniforms)


class MaskTransformer(CodeTransformer):
    """Layout transformer, then content transformer.

    codebook_size, grids            K, and the side of each granularity's grid or its
                                    [height, width], coarsest first
    num_codes                       of an MQ-VAE: the number of cells with a code
    num_classes, label_dropout      see CodeTransformer
    layout_layers, content_layers   depth of each transformer
    n_head, n_embd, dropout, qk_norm    as in GPT
    """

    reads = ()  # any

    def __init__(self, codebook_size: int, grids: list[int | list[int]],
                 num_codes: int | None = None, num_classes: Count = 0, layout_layers: int = 6,
                 content_layers: int = 18, n_head: int = 8, n_embd: int = 1024,
                 dropout: Probability = 0.1, label_dropout: Probability = 0.1,
                 qk_norm: bool = False):
        super().__init__(num_classes, label_dropout, codebook_size, dropout)
        self.num_codes = num_codes
        self.places = Places(grids, num_codes)
        self.kinds = self.places.kinds
        self.regions = self.places.regions
        self.has_layout = self.kinds > 1
        self.mean_length = None  # of the contents, see survey
        self.start_emb = nn.Embedding(self.num_starts, n_embd)
        if self.has_layout:
            self.kind_emb = nn.Embedding(self.kinds + 1, n_embd)  # the last is the mask
            self.region_emb = nn.Embedding(self.regions, n_embd)
            self.layout_blocks = Blocks(layout_layers, n_head, n_embd, dropout, qk_norm, False)
            self.layout_norm = nn.LayerNorm(n_embd)
            self.layout_head = CodeHead(n_embd, self.kinds, bias=False)
        self.code_emb = nn.Embedding(codebook_size + 1, n_embd)  # the last is the mask
        self.place_emb = nn.Embedding(self.places.count, n_embd)
        self.content_blocks = Blocks(content_layers, n_head, n_embd, dropout, qk_norm, False)
        self.content_norm = nn.LayerNorm(n_embd)
        self.content_head = CodeHead(n_embd, codebook_size, bias=False)
        self.init_rope(True, self.places.grids, n_embd // n_head)
        self.init_weights()

    @classmethod
    def settings_for(cls, stage1, size):
        grids = [divided(size, factor) for factor in stage1.factors]
        num_codes = stage1.num_codes if "positions" in stage1.code_names else None
        return super().settings_for(stage1, size) | {"grids": grids, "num_codes": num_codes}

    def lengths(self, codes):
        """Number of input tokens (B,) of each image's contents."""
        layout, _ = self.places.read(codes)
        return self.places.present(layout).sum(1) + 1

    @torch.no_grad()
    def survey(self, batches):
        """As CodeTransformer.survey. Also keeps the mean number of codes, which normalises the
        training loss (see DQTransformer.survey)."""
        lengths = super().survey(batches)
        self.mean_length = lengths.double().mean().item() - 1
        return lengths

    # Networks

    def _layout_logits(self, layout, starts):
        """Kinds (B, R), masked ones being `kinds`, and start tokens (B,) to logits
        (B, R, kinds)."""
        x = self.kind_emb(layout) + self.region_emb.weight              # (B, R, C)
        rope = self.turns(slice(self.regions + 1))                      # (2, 1 + R, D)
        x = self._after_start(starts, x, self.layout_blocks, rope)
        return self.layout_head(self.layout_norm(x))

    def _content_hidden(self, content, packed, starts):
        """Contents (B, L), masked ones being K, to the input of content_head (B, L, C)."""
        x = self.code_emb(content) + self.place_emb(packed.place)       # (B, L, C)
        mask = None
        if len(self.places.grids) > 1:  # rows differ in length
            mask = F.pad(packed.valid, (1, 0), value=True)[:, None, None]       # keys
        rope = self.turns(F.pad(packed.place + 1, (1, 0)))              # (2, B, 1 + L, D)
        return self.content_norm(self._after_start(starts, x, self.content_blocks, rope, mask))

    def _after_start(self, starts, x, blocks, rope, mask=None):
        """Start tokens (B,) and embeddings (B, T, C) through the blocks, to those of the latter."""
        x = torch.cat([self.start_emb(starts).unsqueeze(1), x], dim=1)  # (B, 1 + T, C)
        return blocks(self.drop(x), mask, rope)[:, 1:]

    def _read(self, codes, labels):
        """Kinds (B, R), contents (B, L) at the `packed` places, and start tokens (B,)."""
        layout, content = self.places.read(codes)
        packed = self.places.pack(layout)
        starts = self.start_tokens(len(layout), labels, layout.device)
        return layout, content.gather(1, packed.place), packed, starts

    # Training

    def forward(self, codes, labels=None):
        """Codes and labels (B,) to {"loss", "layout", "content"} in nats: mean cross-entropies of
        masked regions and codes, and their sum. A random share of both is masked, by the cosine
        schedule. After `survey`, the training loss divides by expected numbers, not the batch's. In
        eval mode an image's masks are always the same."""
        layout, content, packed, starts = self._read(codes, labels)
        B = len(layout)
        if self.training:
            numbers = torch.rand(B, 2 + self.regions + self.places.count, device=layout.device)
            spread = torch.arange(B, device=layout.device).unsqueeze(1) / B
            numbers[:, :2] = (numbers[:1, :2] + spread) % 1  # evenly over the batch
        else:
            numbers = self._fixed_numbers(codes, 1)[0]                  # (B, 2 + R + P)
        of_regions, of_contents = torch.cos(numbers[:, :2] * math.pi / 2).unbind(1)
        masked = self._masks(packed, numbers[:, 2:], (of_regions * self.regions).ceil(),
                             (of_contents * packed.counts).ceil())
        nats = self._nats(layout, content, packed, masked, starts)
        means = {name: x.sum() / masked[name].sum() for name, x in nats.items()}
        loss = sum(means.values())
        if self.training:
            mean_length = self.mean_length or packed.counts.float().mean()
            lengths = {"layout": self.regions, "content": mean_length}
            # How many are masked: the mean of ceil(cos(u pi / 2) * length) is about this.
            loss = sum(x.sum() / (B * (2 / math.pi * lengths[name] + 0.5))
                       for name, x in nats.items())
        return {"loss": loss} | {name: mean.detach() for name, mean in means.items()}

    def _nats(self, layout, content, packed, masked, starts):
        """Cross-entropies of masked regions (B, R), if there is a layout, and of masked contents
        (B, L); 0 elsewhere."""
        tokens = {"layout": layout, "content": content}
        logits = self._logits(layout, content, packed, masked, starts)
        return {name: cross_entropy(x, tokens[name].masked_fill(~masked[name], -100))
                for name, x in logits.items()}

    def _logits(self, layout, content, packed, masked, starts):
        """{"layout": (B, R, kinds), if there is one, "content": (B, L, K)}."""
        content = content.masked_fill(masked["content"], self.codebook_size)
        logits = {"content": self.content_head(self._content_hidden(content, packed, starts))}
        if self.has_layout:
            layout = layout.masked_fill(masked["layout"], self.kinds)
            logits["layout"] = self._layout_logits(layout, starts)
        return logits

    def _masks(self, packed, numbers, regions, contents):
        """Masks of so many (B,) regions and contents, (B, R) and (B, L), chosen by random numbers
        (B, R + P)."""
        of_regions, of_places = numbers.split([self.regions, self.places.count], dim=1)
        of_contents = of_places.gather(1, packed.place).masked_fill(~packed.valid, 2.0)
        return {"layout": lowest(of_regions, regions), "content": lowest(of_contents, contents)}

    def _fixed_numbers(self, codes, rows):
        """Random numbers (rows, B, 2 + R + P) that follow from an image's codes alone: fixed ones,
        shifted by a hash of these, modulo 1."""
        indices = codes["indices"].flatten(1)
        factors = torch.arange(1, indices.shape[1] + 1, device=indices.device) * 2654435761 % 2**31
        shift = (indices * factors).sum(1) % 2**20 / 2**20              # (B,)
        count = 2 + self.regions + self.places.count
        numbers = torch.rand(rows, 1, count, generator=torch.Generator().manual_seed(0))
        return (numbers.to(indices.device) + shift.view(1, -1, 1)) % 1

    def logits(self, codes: Codes, labels: Tensor | None = None,
               masked: Tensor | None = None) -> dict[str, Tensor]:
        """Logits where cells `masked` (B, h, w) of the finest grid (default: all) are hidden:
        {"layout": (B, R, kinds), if there is one, "content": (B, L, K)}, contents in order of
        granularity and cell, padded."""
        layout, content, packed, starts = self._read(codes, labels)
        if masked is None:
            masked = layout.new_ones(len(layout), *self.places.grids[-1], dtype=torch.bool)
        places, regions = self.places.kept(layout, ~masked)
        masked = {"layout": ~regions, "content": ~places.gather(1, packed.place)}
        return self._logits(layout, content, packed, masked, starts)

    @torch.no_grad()
    def bits(self, codes, labels=None, strata=4):
        """An upper bound on the negative log-likelihood of each image's layout and contents, in
        bits (B,).

        The bound of absorbing diffusion with a linear schedule, in its order-agnostic form
        ("Autoregressive Diffusion Models", Hoogeboom et al., ICLR 2022): k of n tokens are masked,
        k uniform from 1 to n, and n / k times their cross-entropy counts. It is the mean over all
        orders of generation, one token at a time. This is an unbiased estimate of it, at one k in
        each of `strata` equal parts, with masks that follow from the image's codes.
        """
        layout, content, packed, starts = self._read(codes, labels)
        n = {"layout": torch.full_like(packed.counts, self.regions), "content": packed.counts}
        total = 0.0
        for s, numbers in enumerate(self._fixed_numbers(codes, strata)):
            k = {name: ((s + numbers[:, i]) / strata * n[name]).long() + 1
                 for i, name in enumerate(n)}                           # (B,) each
            masked = self._masks(packed, numbers[:, 2:], k["layout"], k["content"])
            nats = self._nats(layout, content, packed, masked, starts)
            total += sum(x.sum(1) * n[name] / k[name] for name, x in nats.items())
        return total / (strata * math.log(2))

    # Sampling

    def check_known(self, codes, known):
        check_known(len(known), self.places.grids[-1], codes, known)

    @torch.no_grad()
    def sample(self, n: int, labels: Tensor | None = None, steps: int = 12, layout_steps: int = 8,
               temperature: float = 1.0, choice_temperature: float = 4.5, top_k: int | None = None,
               top_p: float | None = None, cfg_scale: float = 1.0,
               cfg_schedule: Schedule = "constant",
               generator: Generators = None, temperature_pos: float | None = None,
               codes: Codes | None = None, known: Tensor | None = None,
               trace: list | None = None,
               order: Literal["confidence", "halton"] = "confidence") -> Codes:
        """Codes of n new images, in the form of the stage-1 model.

        steps, layout_steps    of the contents and of the layout. After step s of S,
                               cos(pi / 2 s / S) of the tokens are masked
        order                  a step keeps the tokens that the model is most confident of; or
                               those whose cells the Halton sequence reaches first, which are spread
                               evenly over the image (Besnier et al., ICLR 2025, arXiv 2503.17076)
        choice_temperature     of the Gumbel noise on the confidences, falling to 0 linearly
        temperature, top_k, top_p, generator    as in GPT.sample; temperature_pos is the layout's
                               (default: temperature)
        cfg_scale, cfg_schedule    as in GPT.sample, over the steps
        codes, known           keep the cells `known`, bool (n, h, w) on the finest grid, of
                               `codes`, and draw the rest. A code stays if all of its cells are
                               known. An MQ-VAE's images keep their number of codes
        trace                  a list, to which the step that decided each finest cell is appended,
                               (n, h, w), from 1; 0: kept, -1: no code
        """
        temperature_pos = temperature if temperature_pos is None else temperature_pos
        check_sampling(temperature, top_k, top_p)
        check_sampling(temperature_pos, None, None)
        if min(steps, layout_steps) < 1 or not 0 <= choice_temperature < math.inf:
            raise ValueError("steps and layout_steps must be at least 1 and choice_temperature at "
                             f"least 0; they are {steps}, {layout_steps} and {choice_temperature}")
        if order not in ("confidence", "halton"):
            raise ValueError(f"order must be confidence or halton; it is {order!r}")
        check_known(n, self.places.grids[-1], codes, known)
        starts, guide = self.start_sampling(n, labels, cfg_scale, cfg_schedule)
        device = starts.device
        P = self.places.count
        layout = starts.new_zeros(n, self.regions)
        content = starts.new_zeros(n, P)
        if codes is None:
            known = torch.zeros(n, *self.places.grids[-1], dtype=torch.bool)
        else:
            layout, content = self.places.read({k: v.to(device) for k, v in codes.items()})
        kept, kept_regions = self.places.kept(layout, known.to(device))
        if not self.has_layout:
            layout_steps = 0
        for_layout = 2 * layout_steps * self.regions
        numbers = uniforms(n, (for_layout + 2 * steps * P,), generator, device)
        layout_numbers = numbers[:, :for_layout].view(n, layout_steps, 2, self.regions)
        content_numbers = numbers[:, for_layout:].view(n, steps, 2, P)

        halton = order == "halton"
        unmask = Unmask(layout_steps, choice_temperature, ~kept_regions,
                        self.places.rank[:self.regions].expand(n, -1) if halton else None)
        for step in range(layout_steps):
            kind_number, choice_number = layout_numbers[:, step].unbind(1)      # (n, R) each
            masked = layout.masked_fill(unmask.open, self.kinds).repeat(guide.copies, 1)
            guide.at((step + 1) / layout_steps)
            logits = guide(self._layout_logits(masked, starts))         # (n, R, kinds)
            drawn = self._draw_layout(logits, layout, unmask.open, temperature_pos, kind_number)
            layout = torch.where(unmask.open, drawn, layout)
            unmask.step(logits[unmask.open], layout, choice_number)

        packed = self.places.pack(layout)
        content = content.gather(1, packed.place)                       # (n, L)
        decided_at = torch.zeros_like(content)
        copies = Packed(*(value.repeat(guide.copies, 1) for value in packed))
        open_ = packed.valid & ~kept.gather(1, packed.place)
        unmask = Unmask(steps, choice_temperature, open_,
                        self.places.rank[packed.place] if halton else None)
        for step in range(steps):
            code_number, choice_number = content_numbers[:, step].unbind(1)     # (n, P) each
            open_ = unmask.open                                         # (n, L)
            masked = content.masked_fill(open_, self.codebook_size).repeat(guide.copies, 1)
            hidden = self._content_hidden(masked, copies, starts)
            hidden = hidden[open_.repeat(guide.copies, 1)]              # (open ones, C)
            guide.at((step + 1) / steps)
            logits = guide(self.content_head(hidden))                   # (open ones, K)
            filtered = filter_logits(logits, temperature, top_k, top_p)
            drawn = draw(filtered, code_number.gather(1, packed.place)[open_])
            content = content.masked_scatter(open_, drawn)
            decided_at += open_
            unmask.step(logits, content, choice_number.gather(1, packed.place))
        guide.check()
        if trace is not None:
            trace.append(self.places.on_finest(layout, packed.place, decided_at))
        return self.places.codes(layout, packed.place, content)

    def _draw_layout(self, logits, layout, open_, temperature, numbers):
        """Kinds (n, R) by logits (n, R, kinds). Of an MQ-VAE, as many with a code as are still to
        be placed: the likeliest after Gumbel noise on both kinds, whose difference is logistic."""
        if not self.num_codes:
            filtered = filter_logits(logits.flatten(0, 1), temperature)
            return draw(filtered, numbers.flatten()).view_as(layout)
        wanted = self.num_codes - (layout * ~open_).sum(1)              # (n,)
        score = logits[..., 1].float() - logits[..., 0].float()
        score = score + min(temperature, HUGE) * torch.logit(numbers, 1e-7)
        return lowest((-score).masked_fill(~open_, math.inf), wanted).long()


class Packed(NamedTuple):
    """The places that have a code, in order, shorter rows padded at the end."""

    place: Tensor  # (B, L) int64; padding: places without a code
    valid: Tensor  # (B, L) bool

    @property
    def counts(self):
        """Codes of each row (B,)."""
        return self.valid.sum(1)


class Places(nn.Module):
    """Codes as layout and contents, and back.

    The layout is the kind of each region: its granularity, or whether it has a code (MQ-VAE).
    Places are the cells of all grids. For grids [1, 2], so one region of four finest cells:

        place     0 | 1  2  3  4
        region    0 | 0  0  0  0
        kind      0 | 1  1  1  1    that a region must have for a code to be here
        corner    0 | 0  1  2  3    the first finest cell
        cover     [[0, 0, 0, 0], [1, 2, 3, 4]]    the place that covers each finest cell, (G, N)
        rank      see halton_rank
    """

    def __init__(self, grids, num_codes):
        super().__init__()
        self.num_codes = num_codes
        self.grids = [sides(grid) for grid in grids]
        check_grids(self.grids, least=1)
        self.regions = math.prod(self.grids[0])
        self.cells = math.prod(self.grids[-1])
        if num_codes is not None and (len(grids) > 1 or not 1 <= num_codes <= self.regions):
            raise ValueError("num_codes must be at most the cells of one grid; it is "
                             f"{num_codes}, and grids are {list(grids)}")
        self.kinds = len(grids) if num_codes is None else 2
        self.count = 0
        tables = []
        for g, grid in enumerate(self.grids):
            table = cell_tables(self.grids, g)
            table["rank"] = halton_rank(grid)
            table["kind"] = torch.full_like(table["region"], g if num_codes is None else 1)
            table["cover"] += self.count
            tables.append(table)
            self.count += math.prod(grid)
        register_tables(self, tables, stacked=("cover",))

    def read(self, codes):
        """Codes to the kinds of regions (B, R), and the codes at all places (B, P), arbitrary where
        there are none."""
        if self.num_codes:
            shape = (self.num_codes,)
            indices, positions = read_codes(codes, indices=shape, positions=shape)
            empty = indices.new_zeros(len(indices), self.cells)
            return empty.scatter(1, positions, 1), empty.scatter(1, positions, indices)
        if self.kinds > 1:
            indices, grain = read_codes(codes, indices=self.grids[-1], grain=self.grids[0])
            return grain, indices[:, self.corner]
        (indices,) = read_codes(codes, indices=self.grids[-1])
        return torch.zeros_like(indices), indices[:, self.corner]

    def present(self, layout):
        """Which places have a code (B, P)."""
        return layout[:, self.region] == self.kind

    def pack(self, layout):
        present = self.present(layout)                                  # (B, P)
        longest = self.num_codes or self.cells
        if len(self.grids) > 1:
            longest = int(present.sum(1).max())  # the only wait for the GPU
        place = (~present).byte().argsort(dim=1, stable=True)[:, :longest]
        return Packed(place, present.gather(1, place))

    def codes(self, layout, place, content):
        """Kinds of regions (B, R), and contents (B, L) at their places, to codes."""
        if self.num_codes:
            return {"indices": content, "positions": place}
        indices = self.on_finest(layout, place, content)
        if self.kinds == 1:
            return {"indices": indices}
        return {"indices": indices, "grain": layout.unflatten(1, self.grids[0])}

    def on_finest(self, layout, place, values):
        """Values (B, L) of the codes at their places, on the finest grid (B, h, w); -1: no code."""
        everywhere = values.new_full((len(values), self.count), -1).scatter(1, place, values)
        kind = layout[:, self.region[-self.cells:]]                     # (B, N)
        cover = self.cover.gather(0, kind.clamp(max=len(self.grids) - 1))
        return everywhere.gather(1, cover).unflatten(1, self.grids[-1])

    def kept(self, layout, known):
        """Which places keep their code (B, P): those with nothing but `known` cells, bool
        (B, h, w). And which regions keep their kind (B, R): those that are known, or have such a
        place."""
        whole = covered(known, self.cover, self.count)                  # (B, P)
        places = whole & self.present(layout)
        stays = places if self.num_codes is None else whole
        regions = torch.zeros_like(layout).scatter_reduce(
            1, self.region.expand_as(stays), stays.long(), "amax")
        return places, regions.bool()


class Unmask:
    """Which tokens are still masked while they are sampled: `open` (n, T). Each step keeps those
    that the model is most confident of, or those of the lowest `rank` (n, T)."""

    def __init__(self, steps, temperature, open_, rank):
        self.rank = rank
        self.steps = steps
        self.temperature = temperature
        self.open = open_
        self.done = 0
        self.total = open_.sum(1)                                       # (n,)

    def step(self, logits, tokens, numbers):
        """Given logits (m, V) of the m open tokens, all tokens with what was drawn (n, T), and
        random numbers (n, T)."""
        self.done += 1
        share = self.done / self.steps
        if self.rank is None:
            drawn = tokens[self.open].unsqueeze(-1)                     # (m, 1)
            sure = logits.float().log_softmax(-1).gather(-1, drawn).squeeze(-1)
            gumbel = -(-numbers.clamp(min=1e-20).log()).log()           # (n, T)
            noise = min(self.temperature, HUGE) * (1 - share) * gumbel
            confidence = noise.masked_scatter(self.open, sure + noise[self.open])
        else:
            confidence = -self.rank.float()
        left = (self.total * math.cos(math.pi / 2 * share)).long()
        left = left.clamp(min=self.steps - self.done).minimum(self.open.sum(1) - 1)  # one a step
        self.open = lowest(confidence.masked_fill(~self.open, math.inf), left)


def halton_rank(grid):
    """The number of the first point of the Halton sequence in bases 2 and 3 that lies in each cell,
    (cells,)."""
    height, width = grid
    count = 24 * height * width  # some point then lies in every cell
    point = torch.arange(count)

    def coordinate(base):
        rest = point
        share = torch.zeros(count, dtype=torch.float64)
        scale = 1.0
        for _ in range(count.bit_length()):  # digits
            scale /= base
            share += rest % base * scale
            rest = rest // base
        return share

    cell = (coordinate(2) * height).long() * width + (coordinate(3) * width).long()
    return torch.full((height * width,), count).scatter_reduce(0, cell, point, "amin")


def lowest(values, count):
    """The `count` (B,) lowest of each row of values (B, T), as bool."""
    return values.argsort(dim=1).argsort(dim=1) < count.unsqueeze(1)
