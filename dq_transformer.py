"""DQ-Transformer: generates the codes of a DQ-VAE and their positions, from coarse to fine.

    DQTransformer   "Towards Accurate Image Coding: Improved Autoregressive Image Generation with Dynamic Vector Quantization"
                    (Huang et al., CVPR 2023), sec. 3.3, for any number of granularities
    Tokens          codes as sequences; `order` and `unorder` convert between the two
    State           the sequences that `sample` has not finished yet

A sequence holds the codes of the coarsest granularity, then of the next. Each granularity opens with a start token (one per class), goes
through its cells in raster order, and closes with an end token. The Position-Transformer reads the tokens so far and predicts the next
position, a cell or the end. The Content-Transformer reads its hidden states and that position, and predicts the code.
Shapes: G granularities, R regions (cells of the coarsest grid), N finest cells, M slots (see Tokens).

    model = DQTransformer(codebook_size=1024, grids=[16, 32], num_classes=1000)
    loss = model(codes, labels)["loss"]     # codes = {"indices": (B, 32, 32), "grain": (B, 16, 16)}, from DQVAE.encode
    codes = model.sample(8, labels=labels)  # for DQVAE.decode

Differences from the release: losses and softmaxes cover real tokens only; padding comes last, where causal attention does not see it;
the last coarse cell can be sampled; the finest positions are filled in, since the others imply them. Copy with gpt.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpt import (
    Blocks, Cache, CodeTransformer, Count, Probability, check_known, check_sampling, code_ends, covered, draw, filter_logits, sides,
    uniforms)

START, CODE, END = 0, 1, 2  # kinds of tokens


class Tokens(NamedTuple):
    """Codes as sequences of T tokens, shorter rows padded at the end.

    Slots number all tokens that can occur: [start, every cell in order, end] of the coarsest granularity, then of the next.
    """

    slot: Tensor  # (B, T) int64
    content: Tensor  # (B, T) int64: the code; K for end tokens and padding, K + 1 for start tokens
    counts: Tensor  # (B, G): codes of each granularity; a row has counts.sum() + 2 G tokens
    longest: list[int]  # the largest count of each granularity


class DQTransformer(CodeTransformer):
    """Position-Transformer, then Content-Transformer.

    codebook_size, grids               K, and the side of each granularity's grid or its [height, width], coarsest first
    num_classes, label_dropout         see CodeTransformer
    position_layers, content_layers    depth of each transformer
    n_head, n_embd, dropout, codebook_factors    as in GPT
    order                              of a granularity's cells: raster order, or region by region
    """

    def __init__(self, codebook_size: int, grids: list[int | list[int]], num_classes: Count = 0, position_layers: int = 6,
                 content_layers: int = 18, n_head: int = 8, n_embd: int = 1024, dropout: Probability = 0.1,
                 label_dropout: Probability = 0.1,
                 order: Literal["row-first", "region-first"] = "row-first", codebook_factors: list[int] | None = None):
        super().__init__(num_classes, label_dropout)
        self.codebook_size, self.grids, self.grains = codebook_size, [sides(grid) for grid in grids], len(grids)
        if len(grids) < 2 or any(h % y or h <= y or h * x != w * y for (y, x), (h, w) in zip(self.grids, self.grids[1:])):
            raise ValueError(f"grids must be two or more sides, each a multiple of the one before; they are {list(grids)}")
        self.cells = [h * w for h, w in self.grids]
        self.length = self.cells[-1] + 2 * self.grains - 1  # inputs of the longest row: its last token is only predicted
        self.content_emb, content_head = code_ends(codebook_size, n_embd, codebook_factors, 1 + self.num_starts)  # codes, end, starts
        self.position_emb = nn.Embedding(sum(self.cells) + self.grains * (1 + self.num_starts), n_embd)  # each: cells, end, starts
        self.grain_emb = nn.Embedding(self.grains, n_embd)
        self.index_emb = nn.Parameter(torch.zeros(self.length, n_embd))
        self.drop = nn.Dropout(dropout)
        self.position_blocks = Blocks(position_layers, n_head, n_embd, dropout)
        self.position_norm = nn.LayerNorm(n_embd)
        self.position_head = nn.Linear(n_embd, self.cells[-1] + self.grains, bias=False)  # cells of any grid, end of each granularity
        self.content_blocks = Blocks(content_layers, n_head, n_embd, dropout)
        self.content_norm = nn.LayerNorm(n_embd)
        self.content_head = content_head
        self.init_weights()
        self._tabulate(order)
        self.mean_counts: Tensor | None = None  # (G,), see survey

    def _tabulate(self, order: str) -> None:
        """Non-persistent buffers: `slot_*` (M,), `column_*` (G, N + G) of position_head's columns, and `cover` (G, N), the slot that covers
        each finest cell."""
        (_, across), (_, width), R, N = self.grids[0], self.grids[-1], self.cells[0], self.cells[-1]  # in regions, and in finest cells
        G, K = self.grains, self.codebook_size
        tables, first, offset = [], 0, 0  # a granularity's first slot, and its first row in position_emb

        def between(start: int, values: Tensor, end: int) -> Tensor:
            return torch.cat([torch.tensor([start]), values, torch.tensor([end])])

        for g, ((_, w), n) in enumerate(zip(self.grids, self.cells)):
            size, scale = w // across, width // w  # side of a region in cells, and of a cell in finest cells
            cell, fine, padding = torch.arange(n), torch.arange(N), (0, N - n + G)
            y, x = cell // w, cell % w
            region, inside = y // size * across + x // size, y % size * size + x % size
            corner = y * scale * width + x * scale  # the cell's first finest cell
            walk = {"row-first": cell, "region-first": (region * size**2 + inside).argsort()}[order]
            slot = first + 1 + walk.argsort()
            columns = F.pad(slot, padding, value=-1)
            columns[N + g] = first + 1 + n
            tables.append({
                "slot_grain": between(g, torch.full_like(cell, g), g),
                "slot_kind": between(START, torch.full_like(cell, CODE), END),
                "slot_cell": between(0, walk, 0),
                "slot_region": between(R, region[walk], R),  # region R: none
                "slot_corner": between(0, corner[walk], 0),
                "slot_column": between(0, walk, N + g),
                "slot_special": between(K + 1, torch.zeros_like(cell), K),  # content of start and end tokens
                "slot_place": between(offset + n + 1, offset + walk, offset + n),  # row in position_emb
                "column_slot": columns,  # -1: of another granularity
                "column_region": F.pad(region, padding, value=R),
                "column_opens": F.pad(inside == 0, padding),  # the first cell of its region, in either order
                "cover": slot[fine // width // scale * w + fine % width // scale]})
            first, offset = first + n + 2, offset + n + 1 + self.num_starts
        for name in tables[0]:
            values = [table[name] for table in tables]
            self.register_buffer(name, torch.cat(values) if name.startswith("slot") else torch.stack(values), persistent=False)

    def start_tables(self) -> dict[str, list[int]]:
        *_, (name, content) = self.content_emb.named_parameters()
        return {f"content_emb.{name}": [len(content) - self.num_starts],
                "position_emb.weight": [n + 1 for n in self.cells]}

    # Codes to sequences and back

    def order(self, codes: dict[str, Tensor]) -> Tokens:
        """Codes {"indices": (B, h, w), "grain": (B, h', w')} as sequences."""
        indices, grain = codes["indices"], codes["grain"]
        if indices.shape[1:] != self.grids[-1] or grain.shape[1:] != self.grids[0]:
            raise ValueError(f"indices must be (B, *{self.grids[-1]}) and grain (B, *{self.grids[0]}); they are {tuple(indices.shape)} and "
                             f"{tuple(grain.shape)}")
        indices, grain = indices.flatten(1), grain.flatten(1)                                # (B, N), (B, R)
        present = (self.slot_kind != CODE) | (F.pad(grain, (0, 1))[:, self.slot_region] == self.slot_grain)  # (B, M)
        content = torch.where(self.slot_kind == CODE, indices[:, self.slot_corner], self.slot_special)
        counts = self._counts(grain)
        length, *longest = torch.cat([counts.sum(1, keepdim=True), counts], dim=1).amax(0).tolist()  # the only wait for the GPU
        length += 2 * self.grains
        target = torch.where(present, present.cumsum(1) - 1, length)                         # absent slots: a last column, cut below
        slot = torch.arange(len(self.slot_kind), device=indices.device).expand_as(target)
        slot = torch.full((len(indices), length + 1), len(self.slot_kind) - 1, device=indices.device).scatter(1, target, slot)
        content = torch.full_like(slot, self.codebook_size).scatter(1, target, content)
        return Tokens(slot[:, :-1], content[:, :-1], counts, longest)

    def lengths(self, codes: dict[str, Tensor]) -> Tensor:
        """Number of input tokens (B,) of each image."""
        return self._counts(codes["grain"].flatten(1)).sum(1) + 2 * self.grains - 1

    def _counts(self, grain: Tensor) -> Tensor:
        """Codes of each granularity (B, G), given the granularity of each region (B, R)."""
        return torch.stack([(grain == g).sum(1) * (cells // self.cells[0]) for g, cells in enumerate(self.cells)], dim=1)

    def unorder(self, tokens: Tokens) -> dict[str, Tensor]:
        """The inverse of `order`."""
        slot, B = tokens.slot, len(tokens.slot)
        grain = slot.new_zeros(B, self.cells[0] + 1).scatter(1, self.slot_region[slot], self.slot_grain[slot])
        return self._codes(grain[:, :-1], slot.new_zeros(B, len(self.slot_kind)).scatter(1, slot, tokens.content))

    def _codes(self, grain: Tensor, contents: Tensor) -> dict[str, Tensor]:
        """Granularities of regions (B, R) and contents of slots (B, M) to codes."""
        fine = torch.arange(self.cells[-1], device=grain.device)
        slot = self.cover[grain[:, self.column_region[-1, :len(fine)]], fine]                # (B, N)
        indices = contents.gather(1, slot)
        return {"indices": indices.unflatten(1, self.grids[-1]), "grain": grain.unflatten(1, self.grids[0])}

    # Training

    @torch.no_grad()
    def survey(self, batches: Iterable[dict[str, Tensor]]) -> Tensor:
        """As CodeTransformer.survey. Also keeps the mean count of each granularity, which normalises the training loss.

        In batches of similar length, dividing by the batch's own counts would overweight short images. Call it in every process; the
        counts are not saved with the weights.
        """
        counts = torch.cat([self._counts(codes["grain"].flatten(1)) for codes in batches])   # (rows, G)
        self.mean_counts = counts.double().mean(0).float().to(self.index_emb.device)
        return counts.sum(1) + 2 * self.grains - 1

    def forward(self, codes: dict[str, Tensor], labels: Tensor | None = None) -> dict[str, Tensor]:
        """Codes and labels (B,) to {"loss", "content", "position"}, in nats: mean cross-entropy of codes, that of positions and ends (per
        granularity, then averaged), and their sum. After `survey`, the training loss divides by mean counts, not the batch's."""
        content, position, counts = self._nats(codes, labels)
        content, position = sum(nats.sum() for nats in content), torch.stack([nats.sum() for nats in position])  # (), (G,)
        number, surveyed = counts.float().sum(0), self.training and self.mean_counts is not None  # (G,)
        if self.training and not surveyed and dist.is_available() and dist.is_initialized():
            # Average counts over processes: the mean of their losses is then the mean over all tokens.
            dist.all_reduce(number, dist.ReduceOp.AVG if number.is_cuda else dist.ReduceOp.SUM)
            number = number if number.is_cuda else number / dist.get_world_size()

        def means(number: Tensor) -> tuple[Tensor, Tensor]:
            return content / number.sum(), (position / (number + len(counts))).mean()  # each row has an end

        own = means(number)
        loss = sum(means(len(counts) * self.mean_counts) if surveyed else own)
        return {"loss": loss, "content": own[0].detach(), "position": own[1].detach()}

    def logits(self, codes: dict[str, Tensor], labels: Tensor | None = None) -> dict[str, list[Tensor]]:
        """Next-token logits under teacher forcing, a list entry per granularity, padded to its longest row L_g: content[g] (B, L_g, K);
        position[g] (B, L_g + 1, cells_g + 1), whose last column and step are the end; length[g] (B,), the number of codes."""
        tokens = self.order(codes)
        content, position = self._outputs(tokens, labels)
        return {"content": [self.content_head(x) for x in content], "position": position, "length": list(tokens.counts.unbind(1))}

    def _outputs(self, tokens: Tokens, labels: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """The input of content_head and the logits of positions, as `logits` orders them."""
        h, z = self._hidden(tokens, labels)
        content, position = [], []
        for g, (steps, cells) in enumerate(zip(self._steps(tokens), self.cells)):
            steps = steps.unsqueeze(-1).expand(-1, -1, h.shape[-1])                          # (B, L_g + 1, C)
            head = torch.cat([self.position_head.weight[:cells], self.position_head.weight[self.cells[-1] + g].unsqueeze(0)])
            position.append(F.linear(self.position_norm(h.gather(1, steps)), head))
            content.append(self.content_norm(z.gather(1, steps[:, :-1])))
        return content, position

    def _steps(self, tokens: Tokens) -> list[Tensor]:
        """For each granularity, the steps (B, L_g + 1) that predict its codes and end; arbitrary at padding."""
        first = F.pad((tokens.counts + 2).cumsum(1), (1, 0))                                 # (B, G + 1)
        steps = [first[:, g:g + 1] + torch.arange(length + 1, device=first.device) for g, length in enumerate(tokens.longest)]
        return [s.clamp(max=tokens.slot.shape[1] - 2) for s in steps]

    @torch.no_grad()
    def bits(self, codes: dict[str, Tensor], labels: Tensor | None = None) -> Tensor:
        """Negative log-likelihood of each image in bits (B,), without the finest positions, which the others imply."""
        content, position, _ = self._nats(codes, labels)
        return sum(nats.sum(1) for nats in content + position[:-1]) / math.log(2)

    def _nats(self, codes: dict[str, Tensor], labels: Tensor | None) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Cross-entropies of codes [(B, L_g)] and of positions and ends [(B, L_g + 1)], 0 at padding; and counts (B, G)."""
        tokens = self.order(codes)
        hidden, logits = self._outputs(tokens, labels)
        content, position = [], []
        for g, steps in enumerate(self._steps(tokens)):
            padding = torch.arange(steps.shape[1], device=steps.device) > tokens.counts[:, g:g + 1]
            slot, code = tokens.slot.gather(1, steps + 1), tokens.content.gather(1, steps[:, :-1] + 1)
            cell = torch.where(self.slot_kind[slot] == CODE, self.slot_cell[slot], self.cells[g])
            content.append(self.content_head.nats(hidden[g], code.masked_fill(padding[:, 1:], -100)))
            position.append(F.cross_entropy(logits[g].transpose(1, 2).float(), cell.masked_fill(padding, -100), reduction="none"))
        return content, position, tokens.counts

    def _hidden(self, tokens: Tokens, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Hidden states of both transformers, (B, T - 1, C) each. Step t predicts token t + 1."""
        starts = self.start_tokens(len(tokens.slot), labels, tokens.slot.device).unsqueeze(1)  # (B, 1)
        content, place, grain = self.embedding_indices(tokens.slot, tokens.content, starts)  # (B, T) each
        places = self.position_emb(place)                                                    # (B, T, C)
        x = self.content_emb(content[:, :-1]) + places[:, :-1] + self.grain_emb(grain[:, :-1]) + self.index_emb[:place.shape[1] - 1]
        h = self.position_blocks(self.drop(x))
        return h, self.content_blocks(h + places[:, 1:])

    def embedding_indices(self, slot: Tensor, content: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Indices of tokens into content_emb, position_emb and grain_emb; `starts` selects the start token."""
        start = (self.slot_kind[slot] == START) * starts
        return content + start, self.slot_place[slot] + start, self.slot_grain[slot]

    # Sampling

    @torch.no_grad()
    def sample(self, n: int, labels: Tensor | None = None, temperature: float = 1.0, top_k: int | None = None,
               top_p: float | None = None, cfg_scale: float = 1.0,
               generator: torch.Generator | list[torch.Generator] | None = None, temperature_pos: float | None = None,
               top_k_pos: int | None = None, top_p_pos: float | None = None,
               fine_positions: Literal["filled", "sampled"] = "filled",
               codes: dict[str, Tensor] | None = None, known: Tensor | None = None) -> dict[str, Tensor]:
        """Codes of n new images, {"indices": (n, h, w), "grain": (n, h', w')}.

        As GPT.sample; *_pos apply to positions (temperature_pos default: temperature). Positions keep the training data's order and cover
        the image exactly. fine_positions="sampled" also samples the order of the finest cells, as the release does.
        codes, known: keep the codes whose finest cells are all `known`, bool (n, h, w), the first of the sequence, and draw the rest.
        """
        temperature_pos = temperature if temperature_pos is None else temperature_pos
        check_sampling(temperature, top_k, top_p)
        check_sampling(temperature_pos, top_k_pos, top_p_pos)
        if fine_positions not in ("filled", "sampled"):
            raise ValueError(f"fine_positions must be filled or sampled; it is {fine_positions!r}")
        starts, guide = self.start_sampling(n, labels, cfg_scale)
        numbers = uniforms(n, (1 + self.content_head.digits) * self.length, generator, starts.device).view(n, self.length, -1)
        position_cache, content_cache = (Cache(b, len(starts), self.length) for b in (self.position_blocks, self.content_blocks))
        state = State(self, n, starts)
        if codes is not None or known is not None:
            state.give(codes, known)
        for t in range(self.length):
            content, place, grain = state.embedding_indices()                                # (n or 2n,) each
            x = self.content_emb(content) + self.position_emb(place) + self.grain_emb(grain) + self.index_emb[t]
            h = position_cache.step(x, t)
            logits = guide(self.position_head(self.position_norm(h)))                        # (n, N + G)
            logits = logits.masked_fill(~state.possible(fine_positions == "sampled"), -math.inf)
            state.move(draw(filter_logits(logits, temperature_pos, top_k_pos, top_p_pos), numbers[state.rows, t, 0]))

            _, place, _ = state.embedding_indices()
            z = content_cache.step(h + self.position_emb(place), t)
            state.store(self.content_head.draw(self.content_norm(z), guide, (temperature, top_k, top_p), numbers[state.rows, t, 1:]))

            if (t + 1) % content_cache.window == 0:  # now and then (it waits for the GPU), finished rows leave the batch
                active = state.unfinished()
                if len(active) == 0:
                    break
                if len(active) <= 0.75 * len(state.rows):
                    active = state.keep(active)
                    position_cache.keep(active)
                    content_cache.keep(active)
        guide.check()
        return self._codes(state.grain[:, :-1], state.contents)


class State:
    """Sequences while they are sampled. Those at the last slot are finished; `rows` of the n are still in the batch."""

    def __init__(self, model: DQTransformer, n: int, starts: Tensor):
        new = torch.zeros(n, dtype=torch.int64, device=starts.device)
        self.model, self.starts, self.copies = model, starts, len(starts) // n               # starts: (n,), or (2n,) with guidance
        self.grain = new.new_full((n, model.cells[0] + 1), -1)                               # (n, R + 1); -1: undecided
        self.grain[:, -1] = 0  # "none" never is
        self.contents = new.new_zeros(n, len(model.slot_kind))                               # (n, M): the codes so far
        self.rows = torch.arange(n, device=starts.device)                                    # (rows,)
        self.slot, self.content = new, new + model.codebook_size + 1                         # (rows,): the last token
        self.owed = torch.zeros_like(model.column_opens[new])                                # (rows, N + G), see move
        self.steps, self.given, self.kept = 0, None, new + 1  # tokens so far but the first; those that are given, see give

    def give(self, codes: dict[str, Tensor] | None, known: Tensor | None) -> None:
        """Keeps the codes whose finest cells are all `known`, bool (n, h, w), and the end of a granularity whose codes all stay (so that it
        gets no others; a granularity without codes may)."""
        check_known(len(self.rows), self.model.grids[-1], codes, known)
        model, known = self.model, known.to(self.rows.device)
        tokens = model.order({key: value.to(known.device) for key, value in codes.items()})
        length, kind = tokens.slot.shape[1], model.slot_kind[tokens.slot]                    # kind: (n, T), END at padding
        number = torch.arange(length, device=known.device)
        stays = (kind == CODE) & covered(known, model.cover, len(model.slot_kind)).gather(1, tokens.slot)  # (n, T)
        self.kept = torch.where(stays, number + 1, 1).amax(1)                                # up to the last code that stays
        if ((kind == CODE) & ~stays & (number < self.kept.unsqueeze(1))).any():
            raise ValueError("this model draws coarse codes first, then finer ones, each in raster order, so only the first of these can "
                             "stay, such as all coarse codes; a MaskTransformer keeps any region")
        follows = kind.gather(1, self.kept.clamp(max=length - 1).unsqueeze(1)).squeeze(1)
        self.given, self.kept = tokens, self.kept + ((follows == END) & (self.kept > 1))

    def _or_given(self, drawn: Tensor, given: Callable[[Tokens], Tensor]) -> Tensor:
        """What was drawn (rows,) for the next token, or what was given."""
        if self.given is None:
            return drawn
        there = given(self.given)[self.rows, min(self.steps, self.given.slot.shape[1] - 1)]
        return torch.where(self.steps < self.kept[self.rows], there, drawn)

    def embedding_indices(self) -> tuple[Tensor, Tensor, Tensor]:
        """`DQTransformer.embedding_indices` of the last tokens, (copies * rows,) each."""
        return self.model.embedding_indices(self.slot.repeat(self.copies), self.content.repeat(self.copies), self.starts)

    def possible(self, any_fine_order: bool) -> Tensor:
        """Columns of position_head that may come next, (rows, N + G): the first owed cell or else the end, and cells before it that open an
        undecided region."""
        model, g = self.model, self.model.slot_grain[self.slot]
        slots = model.column_slot[g]                                                         # (rows, N + G)
        end = slots.amax(1, keepdim=True)                                                    # (rows, 1)
        due = torch.where(self.owed, slots, end).amin(1, keepdim=True)                       # (rows, 1)
        opens = model.column_opens[g] & (self.grain[self.rows].gather(1, model.column_region[g]) < 0)
        possible = opens & (slots > self.slot.unsqueeze(1)) & (slots < due) | (slots == due)
        if any_fine_order:
            possible = possible | self.owed & (g == model.grains - 1).unsqueeze(1)
        return possible

    def move(self, column: Tensor) -> None:
        """Moves to the drawn column (rows,) of position_head, or from an end to the next granularity's start.

        A region's first code decides its granularity; the finest's start takes all undecided regions. The region's other cells are then
        owed: they must get codes before the end.
        """
        model, ended = self.model, self.model.slot_kind[self.slot] == END
        self.steps += 1
        column = self._or_given(column, lambda tokens: model.slot_column[tokens.slot])
        following = (self.slot + 1).clamp(max=len(model.slot_kind) - 1)
        self.slot = torch.where(ended, following, model.column_slot[model.slot_grain[self.slot], column])
        self.content = model.slot_special[self.slot]
        g, grain = model.slot_grain[self.slot], self.grain[self.rows]                        # (rows,), (rows, R + 1)
        finest = (model.slot_kind[self.slot] == START) & (g == model.grains - 1)             # (rows,)
        begun = (grain < 0) & (F.one_hot(model.slot_region[self.slot], grain.shape[1]).bool() | finest.unsqueeze(1))
        self.grain[self.rows] = torch.where(begun, g.unsqueeze(1), grain)
        owed = self.owed | begun.gather(1, model.column_region[g])
        self.owed = owed & (model.column_slot[g] != self.slot.unsqueeze(1))

    def store(self, code: Tensor) -> None:
        """Stores the code (rows,) of the last token, unless that is a start or an end."""
        code = self._or_given(code, lambda tokens: tokens.content)
        self.content = torch.where(self.model.slot_kind[self.slot] == CODE, code, self.content)
        self.contents[self.rows, self.slot] = code  # never read at starts and ends

    def unfinished(self) -> Tensor:
        return (self.slot < len(self.model.slot_kind) - 1).nonzero().squeeze(1)

    def keep(self, active: Tensor) -> Tensor:
        """Keeps these rows of the batch only. Returns their rows in the caches, including the null class's."""
        cached = torch.cat([active + i * len(self.rows) for i in range(self.copies)])
        self.starts, self.rows, self.owed = self.starts[cached], self.rows[active], self.owed[active]
        self.slot, self.content = self.slot[active], self.content[active]
        return cached
