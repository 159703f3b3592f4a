"""MaskTransformer: generates the codes of any stage-1 model in parallel, and fills in parts of images.

    MaskTransformer     "MaskGIT: Masked Generative Image Transformer" (Chang et al., CVPR 2022), for VQGAN, MQ-VAE and DQ-VAE
    Places, Packed      codes as layout and contents, and back
    Unmask              the schedule of sampling

First the layout, then the contents. The layout says which cells of an MQ-VAE have a code, or the granularity of each region of a DQ-VAE (a
VQGAN has none); the contents are the codes. Each has a bidirectional transformer that was trained to predict masked tokens from the others.
Sampling starts from masks alone, and in each of a few steps keeps the tokens that the model is most confident of.
Shapes: R regions (cells of the coarsest grid), N finest cells, P places where a code can be (the cells of all grids), L codes of the
longest row, C channels.

    model = MaskTransformer(codebook_size=1024, grids=[16, 32], num_classes=1000)           # for a DQ-VAE
    model = MaskTransformer(codebook_size=1024, grids=[32], num_codes=256)                  # for an MQ-VAE
    model = MaskTransformer(codebook_size=1024, grids=[16])                                 # for a VQGAN
    loss = model(codes, labels)["loss"]
    codes = model.eval().sample(8, labels, steps=12)
    codes = model.sample(8, labels, codes=codes, known=known)                               # known: bool (8, h, w), cells that stay

Differences from the release: the layout; rotary position embeddings beside learned ones; gpt.py's pre-norm blocks and an untied head;
classifier-free guidance; no label smoothing. Copy with gpt.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpt import (
    HUGE, Blocks, CodeHead, CodeTransformer, Count, Guidance, Probability, check_known, check_sampling, covered, draw, filter_logits,
    sides, uniforms)


class MaskTransformer(CodeTransformer):
    """Layout transformer, then content transformer.

    codebook_size, grids            K, and the side of each granularity's grid or its [height, width], coarsest first
    num_codes                       of an MQ-VAE: the number of cells with a code
    num_classes, label_dropout      see CodeTransformer
    layout_layers, content_layers   depth of each transformer
    n_head, n_embd, dropout         as in GPT
    """

    def __init__(self, codebook_size: int, grids: list[int | list[int]], num_codes: int | None = None, num_classes: Count = 0,
                 layout_layers: int = 6, content_layers: int = 18, n_head: int = 8, n_embd: int = 1024, dropout: Probability = 0.1,
                 label_dropout: Probability = 0.1):
        super().__init__(num_classes, label_dropout)
        self.codebook_size, self.num_codes = codebook_size, num_codes
        self.places = Places(grids, num_codes)
        self.kinds, self.regions = self.places.kinds, self.places.regions
        self.mean_length: float | None = None  # of the contents, see survey
        self.start_emb = nn.Embedding(self.num_starts, n_embd)
        self.drop = nn.Dropout(dropout)
        if self.kinds > 1:
            self.kind_emb = nn.Embedding(self.kinds + 1, n_embd)  # the last is the mask
            self.region_emb = nn.Embedding(self.regions, n_embd)
            self.layout_blocks = Blocks(layout_layers, n_head, n_embd, dropout, causal=False)
            self.layout_norm = nn.LayerNorm(n_embd)
            self.layout_head = CodeHead(n_embd, self.kinds, bias=False)
        self.code_emb = nn.Embedding(codebook_size + 1, n_embd)  # the last is the mask
        self.place_emb = nn.Embedding(self.places.count, n_embd)
        self.content_blocks = Blocks(content_layers, n_head, n_embd, dropout, causal=False)
        self.content_norm = nn.LayerNorm(n_embd)
        self.content_head = CodeHead(n_embd, codebook_size, bias=False)
        self.register_buffer("rope", self.places.angles(n_embd // n_head), persistent=False)
        self.init_weights()

    def lengths(self, codes: dict[str, Tensor]) -> Tensor:
        """Number of input tokens (B,) of each image's contents."""
        return (self.places.read(codes)[0][:, self.places.region] == self.places.kind).sum(1) + 1

    @torch.no_grad()
    def survey(self, batches: Iterable[dict[str, Tensor]]) -> Tensor:
        """As CodeTransformer.survey. Also keeps the mean number of codes, which normalises the training loss (see DQTransformer.survey)."""
        lengths = super().survey(batches)
        self.mean_length = lengths.double().mean().item() - 1
        return lengths

    # Networks

    def _layout_logits(self, layout: Tensor, starts: Tensor) -> Tensor:
        """Kinds (B, R), masked ones being `kinds`, and start tokens (B,) to logits (B, R, kinds)."""
        x = torch.cat([self.start_emb(starts).unsqueeze(1), self.kind_emb(layout) + self.region_emb.weight], dim=1)
        x = self.layout_blocks(self.drop(x), rope=self.rope[:self.regions + 1].unsqueeze(0))
        return self.layout_head(self.layout_norm(x[:, 1:]))

    def _content_hidden(self, content: Tensor, packed: Packed, starts: Tensor) -> Tensor:
        """Contents (B, L), masked ones being K, to the input of content_head (B, L, C)."""
        x = torch.cat([self.start_emb(starts).unsqueeze(1), self.code_emb(content) + self.place_emb(packed.place)], dim=1)
        mask = F.pad(packed.valid, (1, 0), value=True)[:, None, None] if len(self.places.grids) > 1 else None  # keys: the class and codes
        return self.content_norm(self.content_blocks(self.drop(x), mask, self.rope[F.pad(packed.place + 1, (1, 0))])[:, 1:])

    def _nats(self, layout: Tensor, content: Tensor, packed: Packed, masked: tuple[Tensor, Tensor], starts: Tensor) -> list[Tensor]:
        """Cross-entropies of masked regions (B, R), if there is a layout, and of masked contents (B, L); 0 elsewhere."""
        regions, contents = masked
        x = self._content_hidden(content.masked_fill(contents, self.codebook_size), packed, starts)
        found = [self.content_head.nats(x, content.masked_fill(~contents, -100))]
        if self.kinds > 1:
            logits = self._layout_logits(layout.masked_fill(regions, self.kinds), starts)
            found.insert(0, F.cross_entropy(logits.mT.float(), layout.masked_fill(~regions, -100), reduction="none"))
        return found

    def _mask(self, packed: Packed, numbers: Tensor, counts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Masks of `counts` (B,) regions (B, R) and contents (B, L), chosen by random numbers (B, R + P)."""
        contents = numbers[:, self.regions:].gather(1, packed.place).masked_fill(~packed.valid, 2.0)
        return lowest(numbers[:, :self.regions], counts[0]), lowest(contents, counts[1])

    def _fixed_numbers(self, codes: dict[str, Tensor], rows: int) -> Tensor:
        """Random numbers (rows, B, 2 + R + P) that follow from an image's codes alone: fixed ones, shifted by a hash of these, modulo 1."""
        indices = codes["indices"].flatten(1)
        hashed = (indices * (torch.arange(1, indices.shape[1] + 1, device=indices.device) * 2654435761 % 2**31)).sum(1) % 2**20 / 2**20
        numbers = torch.rand(rows, 1, 2 + self.regions + self.places.count, generator=torch.Generator().manual_seed(0))
        return (numbers.to(indices.device) + hashed.view(1, -1, 1)) % 1

    def forward(self, codes: dict[str, Tensor], labels: Tensor | None = None) -> dict[str, Tensor]:
        """Codes and labels (B,) to {"loss", "layout", "content"} in nats: mean cross-entropies of masked regions and codes, and their sum.
        A random share of both is masked, by the cosine schedule. After `survey`, the training loss divides by expected numbers,
        not the batch's. In eval mode an image's masks are always the same."""
        layout, content = self.places.read(codes)
        packed, B = self.places.pack(layout), len(layout)
        starts = self.start_tokens(B, labels, layout.device)
        if self.training:
            numbers = torch.rand(B, 2 + self.regions + self.places.count, device=layout.device)
            shares = (numbers[:1, :2] + torch.arange(B, device=layout.device).unsqueeze(1) / B) % 1  # (B, 2), evenly spread over the batch
        else:
            numbers = self._fixed_numbers(codes, 1)[0]
            shares = numbers[:, :2]
        regions, contents = torch.cos(shares * math.pi / 2).unbind(1)
        masked = self._mask(packed, numbers[:, 2:], ((regions * self.regions).ceil(), (contents * packed.counts).ceil()))
        nats = self._nats(layout, content.gather(1, packed.place), packed, masked, starts)
        lengths = self.regions, self.mean_length or packed.counts.float().mean()
        names, masked, lengths = ("layout", "content")[-len(nats):], masked[-len(nats):], lengths[-len(nats):]
        own = {name: (x.sum() / m.sum()).detach() for name, x, m in zip(names, nats, masked)}
        expected = sum(x.sum() / (B * (2 / math.pi * length + 0.5)) for x, length in zip(nats, lengths))  # the mean of ceil(cos(..) length)
        return {"loss": expected if self.training else sum(own.values())} | own

    def logits(self, codes: dict[str, Tensor], labels: Tensor | None = None, masked: Tensor | None = None) -> dict[str, Tensor]:
        """Logits where cells `masked` (B, h, w) of the finest grid (default: all) are hidden: {"layout": (B, R, kinds), if there is one,
        "content": (B, L, K)}, contents in order of granularity and cell, padded."""
        layout, content = self.places.read(codes)
        masked = torch.ones(len(layout), *self.places.grids[-1], dtype=torch.bool, device=layout.device) if masked is None else masked
        places, regions = self.places.kept(layout, ~masked)
        packed, starts = self.places.pack(layout), self.start_tokens(len(layout), labels, layout.device)
        content = content.masked_fill(~places, self.codebook_size).gather(1, packed.place)
        found = {"content": self.content_head(self._content_hidden(content, packed, starts))}
        return found | ({"layout": self._layout_logits(layout.masked_fill(~regions, self.kinds), starts)} if self.kinds > 1 else {})

    @torch.no_grad()
    def bits(self, codes: dict[str, Tensor], labels: Tensor | None = None, strata: int = 16) -> Tensor:
        """An upper bound on the negative log-likelihood of each image's layout and contents, in bits (B,).

        The bound of absorbing diffusion with a linear schedule, in its order-agnostic form ("Autoregressive Diffusion Models", Hoogeboom
        et al., ICLR 2022): k of n tokens are masked, k uniform from 1 to n, and n / k times their cross-entropy counts. It is the
        mean over all orders of generation, one token at a time. This is an unbiased estimate of it, at one k in each of `strata` equal
        parts, with masks that follow from the image's codes."""
        layout, content = self.places.read(codes)
        packed, starts = self.places.pack(layout), self.start_tokens(len(layout), labels, layout.device)
        content, counts, total = content.gather(1, packed.place), (torch.full_like(packed.counts, self.regions), packed.counts), 0.0
        for s, numbers in enumerate(self._fixed_numbers(codes, strata)):
            k = [((s + u) / strata * n).long() + 1 for u, n in zip(numbers[:, :2].unbind(1), counts)]  # (B,) each
            nats = self._nats(layout, content, packed, self._mask(packed, numbers[:, 2:], k), starts)
            total = total + sum(x.sum(1) * n / m for x, n, m in zip(nats[::-1], counts[::-1], k[::-1]))
        return total / (strata * math.log(2))

    # Sampling

    @torch.no_grad()
    def sample(self, n: int, labels: Tensor | None = None, steps: int = 12, layout_steps: int = 8, temperature: float = 1.0,
               choice_temperature: float = 4.5, top_k: int | None = None, top_p: float | None = None, cfg_scale: float = 1.0,
               cfg_schedule: Literal["constant", "linear"] = "constant",
               generator: torch.Generator | list[torch.Generator] | None = None, temperature_pos: float | None = None,
               codes: dict[str, Tensor] | None = None, known: Tensor | None = None, trace: list | None = None) -> dict[str, Tensor]:
        """Codes of n new images, in the form of the stage-1 model.

        steps, layout_steps    of the contents and of the layout. After step s of S, cos(pi / 2 s / S) of the tokens are masked
        choice_temperature     of the Gumbel noise on the confidences, falling to 0 linearly
        temperature, top_k, top_p, generator    as in GPT.sample; temperature_pos is the layout's (default: temperature)
        cfg_scale              guidance as in GPT.sample; with cfg_schedule="linear" it grows to this over the steps
        codes, known           keep the cells `known`, bool (n, h, w) on the finest grid, of `codes`, and draw the rest. A code stays if all
                               of its cells are known. An MQ-VAE's images keep their number of codes
        trace                  a list, to which the step that decided each finest cell is appended, (n, h, w), from 1; 0: kept, -1: no code
        """
        check_sampling(temperature, top_k, top_p)
        temperature_pos = temperature if temperature_pos is None else temperature_pos
        check_sampling(temperature_pos, None, None)
        if min(steps, layout_steps) < 1 or not 0 <= choice_temperature < math.inf:
            raise ValueError("steps and layout_steps must be at least 1 and choice_temperature at least 0; they are "
                             f"{steps}, {layout_steps} and {choice_temperature}")
        check_known(n, self.places.grids[-1], codes, known)
        starts, guide = self.start_sampling(n, labels, cfg_scale)
        layout, content = torch.zeros(2, n, self.places.count, dtype=torch.int64, device=starts.device)
        layout, kept, regions = layout[:, :self.regions], content.bool(), layout[:, :self.regions].bool()
        if codes is not None:
            layout, content = self.places.read({key: value.to(starts.device) for key, value in codes.items()})
            kept, regions = self.places.kept(layout, known.to(starts.device))
        layout_steps = layout_steps if self.kinds > 1 else 0
        numbers = uniforms(n, 2 * (layout_steps * self.regions + steps * self.places.count), generator, starts.device)
        for_layout, for_content = numbers.split([2 * layout_steps * self.regions, 2 * steps * self.places.count], dim=1)

        unmask = Unmask(layout_steps, choice_temperature, guide, cfg_scale, cfg_schedule, ~regions)
        for pick, choose in for_layout.view(n, layout_steps, 2, self.regions).permute(1, 2, 0, 3):  # (n, R) each
            logits = unmask.guide(self._layout_logits(layout.masked_fill(unmask.open, self.kinds).repeat(guide.copies, 1), starts))
            layout = torch.where(unmask.open, self._draw_layout(logits, layout, unmask.open, temperature_pos, pick), layout)
            unmask.step(logits[unmask.open], layout, choose)

        packed = self.places.pack(layout)
        places = Packed(*(x.repeat(guide.copies, *[1] * (x.dim() - 1)) for x in packed))
        content, when = content.gather(1, packed.place), torch.zeros_like(packed.place)
        unmask = Unmask(steps, choice_temperature, guide, cfg_scale, cfg_schedule, packed.valid & ~kept.gather(1, packed.place))
        for pick, choose in for_content.view(n, steps, 2, -1).permute(1, 2, 0, 3):           # (n, P) each
            hidden = self._content_hidden(content.masked_fill(unmask.open, self.codebook_size).repeat(guide.copies, 1), places, starts)
            logits = unmask.guide(self.content_head(hidden[unmask.open.repeat(guide.copies, 1)]))  # (open ones, K)
            drawn = draw(filter_logits(logits, temperature, top_k, top_p), pick.gather(1, packed.place)[unmask.open])
            content, when = content.masked_scatter(unmask.open, drawn), when + unmask.open
            unmask.step(logits, content, choose.gather(1, packed.place))
        guide.check()
        if trace is not None:
            trace.append(torch.full_like(kept, -1, dtype=torch.int64).scatter(1, packed.place, when).unflatten(1, self.places.grids[0])
                         if self.num_codes else self.places.codes(layout, packed.place, when)["indices"])
        return self.places.codes(layout, packed.place, content)

    def _draw_layout(self, logits: Tensor, layout: Tensor, open_: Tensor, temperature: float, numbers: Tensor) -> Tensor:
        """Kinds (n, R) by logits (n, R, kinds). Of an MQ-VAE, as many with a code as are still to be placed: the likeliest after Gumbel
        noise on both kinds, whose difference is logistic."""
        if not self.num_codes:
            return draw(filter_logits(logits.flatten(0, 1), temperature), numbers.flatten()).view_as(layout)
        wanted = self.num_codes - (layout * ~open_).sum(1)
        score = logits[..., 1].float() - logits[..., 0].float() + min(temperature, HUGE) * torch.logit(numbers, 1e-7)
        return lowest((-score).masked_fill(~open_, math.inf), wanted).long()


class Packed(NamedTuple):
    """The places that have a code, in order, shorter rows padded at the end."""

    place: Tensor  # (B, L) int64; padding: places without a code
    valid: Tensor  # (B, L) bool
    counts: Tensor  # (B,)


class Places(nn.Module):
    """Codes as layout and contents, and back. The layout is the kind of each region: its granularity, or whether it has a code (MQ-VAE)."""

    def __init__(self, grids: list[int | list[int]], num_codes: int | None):
        super().__init__()
        self.num_codes, self.grids = num_codes, [sides(grid) for grid in grids]
        if any(h % y or h <= y or h * x != w * y for (y, x), (h, w) in zip(self.grids, self.grids[1:])):
            raise ValueError(f"grids must be sides, each a multiple of the one before; they are {list(grids)}")
        if num_codes is not None and (len(grids) > 1 or not 1 <= num_codes <= math.prod(self.grids[0])):
            raise ValueError(f"num_codes must be at most the cells of one grid; it is {num_codes}, and grids are {list(grids)}")
        self.kinds = len(grids) if num_codes is None else 2
        self.regions, self.cells = math.prod(self.grids[0]), math.prod(self.grids[-1])
        (height, width), (_, across), tables, first = self.grids[-1], self.grids[0], [], 0
        y, x = torch.arange(height).unsqueeze(1), torch.arange(width)
        for g, (h, w) in enumerate(self.grids):
            cell, size, share = torch.arange(h * w), width // w, w // across  # side in finest cells, and of a region in cells
            tables.append({"region": cell // w // share * across + cell % w // share,
                           "kind": torch.full_like(cell, g if num_codes is None else 1),  # which has a code here
                           "corner": cell // w * size * width + cell % w * size,  # the first finest cell
                           "cover": first + (y // size * w + x // size).flatten()})
            first += h * w
        self.count = first
        for name in tables[0]:  # (P,) each; `cover` (G, N): the place that covers each finest cell in each granularity
            join = torch.stack if name == "cover" else torch.cat
            self.register_buffer(name, join([table[name] for table in tables]), persistent=False)

    def angles(self, head_dim: int) -> Tensor:
        """Of two-dimensional rotary embeddings (1 + P, head_dim / 2): of the class token, 0, and of all places, by their centres."""
        if head_dim % 4:
            raise ValueError(f"n_embd / n_head must be a multiple of 4; it is {head_dim}")
        centres = [torch.stack([torch.arange(h * w) // w, torch.arange(h * w) % w], 1).add(0.5) * (self.grids[-1][0] / h)
                   for h, w in self.grids]                                                   # (cells, 2) each, in finest cells
        frequencies = 100 ** -torch.linspace(0, 1, head_dim // 4 + 1)[:-1]
        return F.pad((torch.cat(centres).unsqueeze(2) * frequencies).flatten(1), (0, 0, 1, 0))

    def read(self, codes: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Codes to the kinds of regions (B, R), and the codes at all places (B, P), arbitrary where there are none."""
        want = {"indices": self.grids[-1] if self.num_codes is None else (self.num_codes,)}
        want |= {"positions": (self.num_codes,)} if self.num_codes else {"grain": self.grids[0]} if self.kinds > 1 else {}
        for key, shape in want.items():
            if key not in codes or codes[key].shape[1:] != shape:
                given = {k: tuple(v.shape) for k, v in codes.items()}
                raise ValueError(f"{key} must be (B, {', '.join(map(str, shape))}); the codes are {given}")
        indices = codes["indices"].flatten(1)
        if self.num_codes:
            empty = indices.new_zeros(len(indices), self.cells)
            return empty.scatter(1, codes["positions"], 1), empty.scatter(1, codes["positions"], indices)
        return codes["grain"].flatten(1) if self.kinds > 1 else torch.zeros_like(indices), indices[:, self.corner]

    def pack(self, layout: Tensor) -> Packed:
        present = layout[:, self.region] == self.kind                                        # (B, P)
        counts = present.sum(1)
        longest = int(counts.max()) if len(self.grids) > 1 else self.num_codes or self.cells  # the only wait for the GPU
        place = (~present).byte().argsort(dim=1, stable=True)[:, :longest]
        return Packed(place, torch.arange(longest, device=layout.device) < counts.unsqueeze(1), counts)

    def codes(self, layout: Tensor, place: Tensor, content: Tensor) -> dict[str, Tensor]:
        """Kinds of regions (B, R), and contents (B, L) at their places, to codes."""
        if self.num_codes:
            return {"indices": content, "positions": place}
        fine = torch.arange(self.cells, device=layout.device)
        covering = self.cover[layout[:, self.region[-self.cells:]], fine] if self.kinds > 1 else fine.expand(len(layout), -1)
        everywhere = content.new_zeros(len(layout), self.count).scatter(1, place, content)
        grain = {"grain": layout.unflatten(1, self.grids[0])} if self.kinds > 1 else {}
        return {"indices": everywhere.gather(1, covering).unflatten(1, self.grids[-1])} | grain

    def kept(self, layout: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Which places keep their code (B, P): those with nothing but `known` cells, bool (B, h, w). And which regions keep their kind
        (B, R): those that are known, or have such a place."""
        whole = covered(known, self.cover, self.count)                                       # (B, P)
        places = whole & (layout[:, self.region] == self.kind)
        stays = places if self.num_codes is None else whole
        return places, torch.zeros_like(layout).scatter_reduce(1, self.region.expand_as(stays), stays.long(), "amax").bool()


class Unmask:
    """Which tokens are still masked while they are sampled: `open` (n, T). Each step keeps those that the model is most confident of."""

    def __init__(self, steps: int, temperature: float, guide: Guidance, scale: float, schedule: str, open_: Tensor):
        self.steps, self.temperature, self.scale, self.schedule, self.open = steps, temperature, scale, schedule, open_
        self.guidance, self.done, self.total = guide, 0, open_.sum(1)                        # (n,)

    def guide(self, logits: Tensor) -> Tensor:
        """Guided logits (m, ...) of this step, from those of all copies, (m or 2m, ...)."""
        share = (self.done + 1) / self.steps if self.schedule == "linear" else 1.0
        self.guidance.scale = 1 + share * (self.scale - 1)
        return self.guidance(logits)

    def step(self, logits: Tensor, tokens: Tensor, numbers: Tensor) -> None:
        """Given logits (m, V) of the m open tokens, all tokens with what was drawn (n, T), and random numbers (n, T)."""
        self.done += 1
        share = self.done / self.steps
        sure = logits.float().log_softmax(-1).gather(-1, tokens[self.open].unsqueeze(-1)).squeeze(-1)
        noise = -min(self.temperature, HUGE) * (1 - share) * (-numbers.clamp(min=1e-20).log()).log()    # Gumbel
        confidence = noise.masked_scatter(self.open, sure + noise[self.open])
        left = (self.total * math.cos(math.pi / 2 * share)).long().clamp(min=self.steps - self.done)  # each later step keeps one or more
        self.open = lowest(confidence.masked_fill(~self.open, math.inf), left.minimum(self.open.sum(1) - 1))


def lowest(values: Tensor, count: Tensor) -> Tensor:
    """The `count` (B,) lowest of each row of values (B, T), as bool."""
    return values.argsort(dim=1).argsort(dim=1) < count.unsqueeze(1)
