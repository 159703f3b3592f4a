"""DQ-Transformer: generates the codes of a DQ-VAE from coarse to fine, and where they go.

    DQTransformer   "Towards Accurate Image Coding: Improved Autoregressive Image Generation with Dynamic Vector Quantization"
                    (Huang et al., CVPR 2023), sec. 3.3, for any number of granularities

All coarse codes come first, then the finer ones. Each granularity is opened by a start token (one per class), goes through the
cells of its own grid row by row, and is closed by an end token. A Position-Transformer reads the tokens so far and predicts the
next position, a cell or the end; a Content-Transformer reads its hidden states and that position, and predicts the code there.

    model = DQTransformer(codebook_size=1024, grids=[16, 32], num_classes=1000)
    loss = model(codes, labels)["loss"]     # codes = {"indices": (B, 32, 32), "grain": (B, 16, 16)}, from DQVAE.encode
    codes = model.sample(8, labels=labels)  # for DQVAE.decode

Where it departs from the release: losses and softmaxes run over real tokens only; an image's padding comes after its tokens, where
nothing sees it; the last coarse cell can be sampled; the finest positions are not sampled but filled in, because they follow from
the others. Needs torch and gpt.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpt import Blocks, Cache, CodeTransformer, check_sampling, draw, filter_logits, uniforms


class Tokens(NamedTuple):
    """Codes as sequences, each row padded at its end; T is the longest row's number of tokens.

    A slot is a place that a token can have: [start, every cell in order, end] of the coarsest granularity, then of the next.
    """

    slot: Tensor  # (B, T) int64
    content: Tensor  # (B, T) int64: the code, or K for end tokens and padding, K + 1 for start tokens
    counts: Tensor  # (B, G): codes of each granularity; a row has counts.sum() + 2 G tokens
    longest: list[int]  # the largest count of each granularity


class DQTransformer(CodeTransformer):
    """Position-Transformer below, Content-Transformer above.

    codebook_size, grids               K, and the side of each granularity's grid of cells, coarsest first
    num_classes, label_dropout         see CodeTransformer
    position_layers, content_layers    depth of each transformer
    n_head, n_embd, dropout            as in GPT
    order                              of the cells of a granularity: row-first, or region-first, which goes through all cells of
                                       a region (a cell of the coarsest grid) before the next region
    """

    def __init__(self, codebook_size: int, grids: list[int], num_classes: int = 0, position_layers: int = 6, content_layers: int = 18,
                 n_head: int = 8, n_embd: int = 1024, dropout: float = 0.1, label_dropout: float = 0.1,
                 order: Literal["row-first", "region-first"] = "row-first"):
        super().__init__(num_classes, label_dropout)
        if len(grids) < 2 or any(fine % coarse or fine <= coarse for coarse, fine in zip(grids, grids[1:])):
            raise ValueError(f"grids must be two or more sides, each a multiple of the one before; they are {list(grids)}")
        if order not in ("row-first", "region-first"):
            raise ValueError(f"order must be row-first or region-first; it is {order!r}")
        self.codebook_size, self.grids, self.grains = codebook_size, list(grids), len(grids)
        self.cells = [side**2 for side in grids]
        self.length = self.cells[-1] + 2 * self.grains - 1  # of the longest row, without its last token, which is never read
        self._tabulate(order)
        self.content_emb = nn.Embedding(codebook_size + 1 + self.num_starts, n_embd)  # codes, end, starts
        self.position_emb = nn.Embedding(sum(self.cells) + self.grains * (1 + self.num_starts), n_embd)  # each: cells, end, starts
        self.grain_emb = nn.Embedding(self.grains, n_embd)
        self.index_emb = nn.Parameter(torch.zeros(self.length, n_embd))
        self.drop = nn.Dropout(dropout)
        self.position_blocks = Blocks(position_layers, n_head, n_embd, dropout)
        self.position_norm = nn.LayerNorm(n_embd)
        self.position_head = nn.Linear(n_embd, self.cells[-1] + self.grains, bias=False)  # cells of any grid, end of each granularity
        self.content_blocks = Blocks(content_layers, n_head, n_embd, dropout)
        self.content_norm = nn.LayerNorm(n_embd)
        self.content_head = nn.Linear(n_embd, codebook_size, bias=False)
        self.init_weights()
        self.mean_counts: Tensor | None = None  # (G,), see survey

    def _tabulate(self, order: str) -> None:
        """Constants: of each slot (M,), and of each granularity's cells (G, F) with F = the number of cells of the finest."""
        regions, finest, G = self.grids[0], self.grids[-1], self.grains
        slots = {k: [] for k in ("grain", "kind", "cell", "region", "place")}  # kind: 0 start, 1 code, 2 end
        tables = {"rank": torch.full((G, self.cells[-1]), -1), "region": torch.zeros(G, self.cells[-1], dtype=torch.int64),
                  "opens": torch.zeros(G, self.cells[-1], dtype=torch.bool)}
        offset = 0
        self.offsets = []  # of each granularity's rows in position_emb
        for g, side in enumerate(self.grids):
            cell = torch.arange(side**2)
            y, x, times = cell // side, cell % side, side // regions
            region = (y // times) * regions + x // times
            inner = (y % times) * times + x % times
            walk = (region * times**2 + inner).argsort() if order == "region-first" else cell
            tables["rank"][g, walk] = torch.arange(side**2)
            tables["region"][g, :side**2] = region
            tables["opens"][g, :side**2] = inner == 0  # the first cell of its region, in either order
            for name, values, ends in (("grain", torch.full_like(walk, g), (g, g)), ("kind", torch.ones_like(walk), (0, 2)),
                                       ("cell", walk, (0, 0)), ("region", region[walk], (0, 0)),
                                       ("place", offset + walk, (offset + side**2 + 1, offset + side**2))):
                slots[name].append(torch.cat([torch.tensor(ends[:1]), values, torch.tensor(ends[1:])]))
            self.offsets.append(offset)
            offset += side**2 + 1 + self.num_starts
        for name, values in slots.items():
            self.register_buffer(f"slot_{name}", torch.cat(values), persistent=False)
        for name, values in tables.items():
            self.register_buffer(f"cell_{name}", values, persistent=False)
        # The cell of each granularity's grid that a cell of the finest grid lies in.
        y, x = torch.arange(finest).view(-1, 1), torch.arange(finest)
        covers = torch.stack([(y * side // finest * side + x * side // finest).flatten() for side in self.grids])
        self.register_buffer("covers", covers, persistent=False)                             # (G, F)
        first = torch.stack([torch.full((self.cells[-1],), self.cells[-1]).scatter_reduce(0, c, torch.arange(self.cells[-1]), "amin")
                             for c in covers])
        self.register_buffer("first_cell", first, persistent=False)                          # (G, F): on the finest grid

    # Codes to sequences and back

    def order(self, codes: dict[str, Tensor]) -> Tokens:
        """Codes {"indices": (B, h, w), "grain": (B, h', w')} as sequences."""
        indices, grain = codes["indices"], codes["grain"]
        if indices.shape[1:] != (self.grids[-1],) * 2 or grain.shape[1:] != (self.grids[0],) * 2:
            raise ValueError(f"indices must be (B, {self.grids[-1]}, {self.grids[-1]}) and grain (B, {self.grids[0]}, {self.grids[0]}); "
                             f"they are {tuple(indices.shape)} and {tuple(grain.shape)}")
        indices, grain = indices.flatten(1), grain.flatten(1)                                # (B, F), (B, R)
        present = (self.slot_kind != 1) | (grain[:, self.slot_region] == self.slot_grain)    # (B, M)
        content = indices[:, self.first_cell[self.slot_grain, self.slot_cell]]               # (B, M)
        content = torch.where(self.slot_kind == 1, content, self.codebook_size + (self.slot_kind == 0).long())
        counts = self._counts(grain)
        length, *longest = torch.cat([counts.sum(1, keepdim=True), counts], dim=1).amax(0).tolist()  # all that a GPU is asked for
        length += 2 * self.grains
        target = torch.where(present, present.cumsum(1) - 1, length)                         # absent ones go to a column that is cut
        slot = torch.arange(len(self.slot_kind), device=indices.device).expand_as(target)
        slot = torch.full((len(indices), length + 1), len(self.slot_kind) - 1, device=indices.device).scatter(1, target, slot)
        content = torch.full_like(slot, self.codebook_size).scatter(1, target, content)
        return Tokens(slot[:, :-1], content[:, :-1], counts, longest)

    def lengths(self, codes: dict[str, Tensor]) -> Tensor:
        """Tokens (B,) that the model reads for the codes of each image."""
        return self._counts(codes["grain"].flatten(1)).sum(1) + 2 * self.grains - 1

    def _counts(self, grain: Tensor) -> Tensor:
        """Codes of each granularity (B, G), of regions' granularities (B, R)."""
        return torch.stack([(grain == g).sum(1) * (cells // self.cells[0]) for g, cells in enumerate(self.cells)], dim=1)

    def unorder(self, tokens: Tokens) -> dict[str, Tensor]:
        """The codes that `order` made these tokens from."""
        slot, content = tokens.slot, tokens.content
        code = self.slot_kind[slot] == 1                                                     # (B, T)
        g, B = self.slot_grain[slot], len(slot)
        region = torch.where(code, self.slot_region[slot], self.cells[0])                    # other tokens to a column that is cut
        grain = g.new_zeros(B, self.cells[0] + 1).scatter(1, region, g)[:, :-1]
        cell = torch.where(code, g * self.cells[-1] + self.slot_cell[slot], self.grains * self.cells[-1])
        contents = g.new_zeros(B, self.grains * self.cells[-1] + 1).scatter(1, cell, content)[:, :-1]
        return self._codes(grain, contents.view(B, self.grains, -1))

    def _codes(self, grain: Tensor, contents: Tensor) -> dict[str, Tensor]:
        """Grain (B, R) and the codes of each granularity's cells (B, G, F) to codes."""
        g = grain[:, self.covers[0]]                                                         # (B, F)
        cell = self.covers.t().expand(len(grain), -1, -1).gather(2, g.unsqueeze(-1)).squeeze(-1)
        indices = contents.flatten(1).gather(1, g * self.cells[-1] + cell)
        return {"indices": indices.unflatten(1, (self.grids[-1],) * 2), "grain": grain.unflatten(1, (self.grids[0],) * 2)}

    # Training

    @torch.no_grad()
    def survey(self, batches: Iterable[dict[str, Tensor]]) -> Tensor:
        """As CodeTransformer.survey; and keeps the mean number of codes of each granularity, for the loss. Where images of similar
        length share a batch, dividing by the batch's own number of tokens would give a code of a short image more weight. To be called
        in every process; not saved with the weights."""
        counts = torch.cat([self._counts(codes["grain"].flatten(1)) for codes in batches])   # (rows, G)
        self.mean_counts = counts.double().mean(0).float().to(self.index_emb.device)
        return counts.sum(1) + 2 * self.grains - 1

    def forward(self, codes: dict[str, Tensor], labels: Tensor | None = None) -> dict[str, Tensor]:
        """Codes and labels (B,) to {"loss", "content", "position"}, mean cross-entropies in nats: of all codes, and of each
        granularity's positions and end, averaged over the granularities. The loss is their sum; in training after `survey`, with
        sums divided by the number of tokens that a batch of this size has on average.
        """
        content, position, counts = self._nats(codes, labels)
        content, position = sum(nats.sum() for nats in content), torch.stack([nats.sum() for nats in position])  # (), (G,)
        number = counts.float().sum(0)                                                       # (G,)
        if self.training and self.mean_counts is None and dist.is_available() and dist.is_initialized():
            dist.all_reduce(number, dist.ReduceOp.AVG if number.is_cuda else dist.ReduceOp.SUM)  # the mean of the processes' losses
            number = number if number.is_cuda else number / dist.get_world_size()            # is then the mean over all their tokens

        def means(number: Tensor) -> tuple[Tensor, Tensor]:
            return content / number.sum(), (position / (number + len(counts))).mean()  # each row has an end

        found = means(number)
        loss = sum(means(len(counts) * self.mean_counts) if self.training and self.mean_counts is not None else found)
        return {"loss": loss, "content": found[0].detach(), "position": found[1].detach()}

    def logits(self, codes: dict[str, Tensor], labels: Tensor | None = None) -> dict[str, list[Tensor]]:
        """Next-token logits under teacher forcing, lists with an entry per granularity, coarsest first: `content[g]`
        (B, L_g, K); `position[g]` (B, L_g + 1, cells_g + 1), whose last column and last step are the end; rows are padded to
        the longest, L_g, and have `length[g]` (B,) codes."""
        return self._logits(self.order(codes), labels)

    def _logits(self, tokens: Tokens, labels: Tensor | None) -> dict[str, list[Tensor]]:
        h, z = self._hidden(tokens, labels)
        content, position, first = [], [], 0
        for g, cells in enumerate(self.cells):
            length = tokens.counts[:, g]
            steps = first + torch.arange(tokens.longest[g] + 1, device=h.device)             # (B or 1, L_g + 1): steps that predict
            steps = steps.expand(len(h), -1).clamp(max=h.shape[1] - 1).unsqueeze(-1).expand(-1, -1, h.shape[-1])
            head = torch.cat([self.position_head.weight[:cells], self.position_head.weight[self.cells[-1] + g].unsqueeze(0)])
            position.append(F.linear(self.position_norm(h.gather(1, steps)), head))
            content.append(self.content_head(self.content_norm(z.gather(1, steps[:, :-1]))))
            first = first + (length + 2).unsqueeze(1)                                        # (B, 1)
        return {"content": content, "position": position, "length": list(tokens.counts.unbind(1))}

    @torch.no_grad()
    def bits(self, codes: dict[str, Tensor], labels: Tensor | None = None) -> Tensor:
        """What the codes and positions of each image cost under this model, in bits (B,). The finest positions are free: they
        are what the others leave."""
        content, position, _ = self._nats(codes, labels)
        return sum(nats.sum(1) for nats in content + position[:-1]) / math.log(2)

    def _nats(self, codes: dict[str, Tensor], labels: Tensor | None) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Cross-entropy of each code [(B, L_g)] and of each position and end [(B, L_g + 1)], 0 for padding; and the codes of
        each granularity (B, G)."""
        tokens = self.order(codes)
        logits = self._logits(tokens, labels)
        content, position, first = [], [], 1
        for g, (c, p, length) in enumerate(zip(*logits.values())):
            steps = torch.arange(p.shape[1], device=p.device)
            where = (first + steps).expand(len(p), -1).clamp(max=tokens.slot.shape[1] - 1)
            slot = tokens.slot.gather(1, where)
            target = torch.where(self.slot_kind[slot] == 1, self.slot_cell[slot], self.cells[g])
            target = target.masked_fill(steps > length.unsqueeze(1), -100)                   # which cross_entropy ignores
            position.append(F.cross_entropy(p.transpose(1, 2).float(), target, reduction="none"))
            target = tokens.content.gather(1, where)[:, :-1].masked_fill(steps[:-1] >= length.unsqueeze(1), -100)
            content.append(F.cross_entropy(c.transpose(1, 2).float(), target, reduction="none"))
            first = first + (length + 2).unsqueeze(1)
        return content, position, tokens.counts

    def _hidden(self, tokens: Tokens, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Hidden states of the two transformers, (B, T - 1, C) each: at step t, what they say of token t + 1."""
        starts = self._starts(len(tokens.slot), labels, tokens.slot.device).unsqueeze(1)     # (B, 1)
        opening = self.slot_kind[tokens.slot] == 0
        places = self.position_emb(self.slot_place[tokens.slot] + opening * starts)          # (B, T, C)
        contents = self.content_emb((tokens.content + opening * starts)[:, :-1])             # (B, T - 1, C)
        grains = self.grain_emb(self.slot_grain[tokens.slot[:, :-1]])
        x = contents + places[:, :-1] + grains + self.index_emb[:contents.shape[1]]
        h = self.position_blocks(self.drop(x))
        return h, self.content_blocks(h + places[:, 1:])

    # Sampling

    @torch.no_grad()
    def sample(self, n: int, labels: Tensor | None = None, temperature: float = 1.0, top_k: int | None = None,
               top_p: float | None = None, cfg_scale: float = 1.0,
               generator: torch.Generator | list[torch.Generator] | None = None, temperature_pos: float | None = None,
               top_k_pos: int | None = None, top_p_pos: float | None = None,
               fine_positions: Literal["filled", "sampled"] = "filled") -> dict[str, Tensor]:
        """n new images' codes, {"indices": (n, h, w), "grain": (n, h', w')}.

        As GPT.sample; temperature_pos (None: as temperature), top_k_pos and top_p_pos are for the positions. Positions come in
        the order of the training data, and the granularities cover the image exactly. The finest ones then follow from the
        others; fine_positions="sampled" draws their order nevertheless, as the release's script does.
        """
        temperature_pos = temperature if temperature_pos is None else temperature_pos
        check_sampling(temperature, top_k, top_p)
        check_sampling(temperature_pos, top_k_pos, top_p_pos)
        if fine_positions not in ("filled", "sampled"):
            raise ValueError(f"fine_positions must be filled or sampled; it is {fine_positions!r}")
        starts, guide = self._sampling_starts(n, labels, cfg_scale)
        numbers = uniforms(n, 2 * self.length, generator, starts.device)
        caches = [Cache(blocks, len(starts), self.length) for blocks in (self.position_blocks, self.content_blocks)]
        F_, G, K, copies = self.cells[-1], self.grains, self.codebook_size, guide.copies
        cells, offsets, side = (torch.tensor(v, device=starts.device) for v in (self.cells, self.offsets, range(F_)))

        # What is known of each row: granularity, kind of the last token (0 start, 1 code, 2 end), rank of its last cell, cells
        # that it still owes because their region was begun, granularity of each region, codes of each granularity's cells.
        g, kind, last = torch.zeros(3, n, dtype=torch.int64, device=starts.device)
        last = last - 1
        owed = torch.zeros(n, F_, dtype=torch.bool, device=starts.device)
        grain = torch.full((n, self.cells[0]), G - 1, device=starts.device)                  # until a coarser code covers it
        contents = torch.zeros(n, G * F_, dtype=torch.int64, device=starts.device)
        rows, finished = torch.arange(n, device=starts.device), torch.zeros(n, dtype=torch.bool, device=starts.device)
        done_grain, done_contents = grain.clone(), contents.clone()
        content, place = K + 1 + starts, cells[0] + 1 + starts                               # of the last token, (n or 2n,)
        for t in range(self.length):
            x = self.content_emb(content) + self.position_emb(place) + self.grain_emb(g.repeat(copies)) + self.index_emb[t]
            h = self.position_blocks.step(x, *caches[0].at(t))

            # The next position: an owed cell; or before the first of them a cell that opens a region; or the end
            rank, region = self.cell_rank[g], self.cell_region[g]                            # (n, F)
            due = torch.where(owed, rank, F_).amin(1, keepdim=True)
            free = self.cell_opens[g] & (grain.gather(1, region) == G - 1) & (rank > last.unsqueeze(1)) & (g < G - 1).unsqueeze(1)
            possible = free & (rank < due) | owed & (rank == due)
            if fine_positions == "sampled":
                possible = torch.where((g == G - 1).unsqueeze(1), owed, possible)
            end = F.one_hot(g, G).bool() & ~owed.any(1, keepdim=True)                        # (n, G)
            logits = guide(self.position_head(self.position_norm(h)))
            logits = logits.masked_fill(~torch.cat([possible, end], dim=1), -math.inf)
            column = draw(filter_logits(logits, temperature_pos, top_k_pos, top_p_pos), numbers[rows, 2 * t])  # (n,)

            # After an end token comes the next granularity's start; otherwise a code, or the end
            opening = kind == 2
            kind = torch.where(opening, 0, torch.where(column >= F_, 2, 1))
            coded = (kind == 1) & ~finished
            cell = torch.where(coded, column, 0)
            mine = region.gather(1, cell.unsqueeze(1))                                       # (n, 1): the region of the cell
            begun = (region == mine) & (rank >= 0) & (grain.gather(1, mine) == G - 1) & (g < G - 1).unsqueeze(1)
            owed = (owed | begun & coded.unsqueeze(1)) & ~(coded.unsqueeze(1) & (side == cell.unsqueeze(1)))
            grain = torch.where(coded.unsqueeze(1), grain.scatter(1, mine, g.unsqueeze(1)), grain)
            last = torch.where(coded, rank.gather(1, cell.unsqueeze(1)).squeeze(1), torch.where(opening, -1, last))
            g = g + (opening & ~finished)
            everything = (self.cell_rank[g] >= 0) & (grain.gather(1, self.cell_region[g]) == G - 1)  # what the finest has to cover
            owed = torch.where((opening & (g == G - 1)).unsqueeze(1), everything, owed)
            position = offsets[g] + torch.where(kind == 1, cell, cells[g] + (kind == 0))     # (n,)
            place = position.repeat(copies) + (kind == 0).repeat(copies) * starts

            # Its content
            z = self.content_blocks.step(h + self.position_emb(place), *caches[1].at(t))
            logits = guide(self.content_head(self.content_norm(z)))
            code = draw(filter_logits(logits, temperature, top_k, top_p), numbers[rows, 2 * t + 1])
            where = (g * F_ + cell).unsqueeze(1)
            contents = torch.where(coded.unsqueeze(1), contents.scatter(1, where, code.unsqueeze(1)), contents)
            content = torch.where(kind == 1, code, K + (kind == 0).long()).repeat(copies) + (kind == 0).repeat(copies) * starts

            # Rows that have ended leave the batch, now and then
            finished = finished | (kind == 2) & (g == G - 1)
            if t % 16 == 15 or t == self.length - 1:
                done_grain[rows], done_contents[rows] = grain, contents
                active = (~finished).nonzero().squeeze(1)
                if len(active) == 0:
                    break
                if len(active) <= 0.75 * len(rows):
                    g, kind, last, owed, grain, contents, rows, finished = (
                        v[active] for v in (g, kind, last, owed, grain, contents, rows, finished))
                    active = torch.cat([active + i * len(starts) // copies for i in range(copies)])
                    starts, content, place = (v[active] for v in (starts, content, place))
                    for cache in caches:
                        cache.keep(active)
        guide.check()
        return self._codes(done_grain, done_contents.view(n, G, F_))
