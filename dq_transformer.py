"""DQ-Transformer: generates the codes of a DQ-VAE and their positions, from coarse to fine.

    DQTransformer   "Towards Accurate Image Coding: Improved Autoregressive Image Generation with
                    Dynamic Vector Quantization" (Huang et al., CVPR 2023), sec. 3.3, for any number
                    of granularities
    Tokens          codes as sequences; `order` and `unorder` convert between the two
    State           the sequences that `sample` has not finished yet

A sequence holds the codes of the coarsest granularity, then of the next. Each granularity opens
with a start token (one per class), goes through its cells in raster order, and closes with an end
token.
The Position-Transformer reads the tokens so far and predicts the next position, a cell or the end.
The Content-Transformer reads its hidden states and that position, and predicts the code.
Shapes: G granularities, R regions (cells of the coarsest grid), N finest cells, M slots (all tokens
that can occur, see `_tabulate`), K codes in the codebook.

    model = DQTransformer(codebook_size=1024, grids=[16, 32], num_classes=1000)
    loss = model(codes, labels)["loss"]     # {"indices": (B, 32, 32), "grain": (B, 16, 16)}
    codes = model.sample(8, labels=labels)  # for DQVAE.decode

Differences from the release: losses and softmaxes cover real tokens only; padding comes last, where
causal attention does not see it; the last coarse cell can be sampled; the finest positions are
filled in, since the others imply them; rope and qk_norm, if not false. Copy with gpt.py.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpt import (
    Blocks, Cache, CodeHead, Codes, CodeTransformer, Count, Generators, Probability, Schedule,
    cell_tables, check_grids, check_known, check_sampling, code_ends, covered, divided, draw,
    filter_logits, read_codes, register_tables, sides, uniforms)

START = 0  # kinds of tokens
CODE = 1
END = 2


class Tokens(NamedTuple):
    """Codes as sequences of T tokens, shorter rows padded at the end."""

    slot: Tensor  # (B, T) int64, see DQTransformer._tabulate; padding: the last slot
    content: Tensor  # (B, T) int64: the code; K at ends and padding, K + 1 at starts
    counts: Tensor  # (B, G): codes of each granularity; a row has counts.sum() + 2 G tokens
    longest: list[int]  # the largest count of each granularity


class DQTransformer(CodeTransformer):
    """Position-Transformer, then Content-Transformer.

    codebook_size, grids               K, and the side of each granularity's grid or its
                                       [height, width], coarsest first
    num_classes, label_dropout         see CodeTransformer
    position_layers, content_layers    depth of each transformer
    n_head, n_embd, dropout, codebook_factors, qk_norm    as in GPT
    order                              of a granularity's cells: raster order, or region by region
    rope                               rotary embeddings: in the Position-Transformer of the last
                                       token, by its cell; in the Content-Transformer of the next,
                                       whose code it predicts; none of starts and ends
    """

    reads = ("indices", "grain")

    def __init__(self, codebook_size: int, grids: list[int | list[int]], num_classes: Count = 0,
                 position_layers: int = 6, content_layers: int = 18, n_head: int = 8,
                 n_embd: int = 1024, dropout: Probability = 0.1, label_dropout: Probability = 0.1,
                 order: Literal["row-first", "region-first"] = "row-first",
                 codebook_factors: list[int] | None = None, rope: bool = True,
                 qk_norm: bool = True):
        super().__init__(num_classes, label_dropout, codebook_size, dropout)
        self.grids = [sides(grid) for grid in grids]
        self.grains = len(grids)
        self.cells = [h * w for h, w in self.grids]
        self.length = self.cells[-1] + 2 * self.grains - 1  # the last token is only predicted
        check_grids(self.grids, least=2)
        # Rows of content_emb: codes, end, starts. Of position_emb, for each granularity: cells,
        # end, starts. Columns of position_head: cells, then the end of each granularity. Cell i of
        # every granularity has the same column, but a row of position_emb for each.
        special = 1 + self.num_starts
        self.content_emb, content_head = code_ends(codebook_size, n_embd, codebook_factors, special)
        self.position_emb = nn.Embedding(sum(self.cells) + self.grains * special, n_embd)
        self.grain_emb = nn.Embedding(self.grains, n_embd)
        self.index_emb = nn.Parameter(torch.zeros(self.length, n_embd))
        self.position_blocks = Blocks(position_layers, n_head, n_embd, dropout, qk_norm)
        self.position_norm = nn.LayerNorm(n_embd)
        self.position_head = CodeHead(n_embd, self.cells[-1] + self.grains, bias=False)
        self.content_blocks = Blocks(content_layers, n_head, n_embd, dropout, qk_norm)
        self.init_rope(rope, self.grids, n_embd // n_head)
        self.content_norm = nn.LayerNorm(n_embd)
        self.content_head = content_head
        self.init_weights()
        self._tabulate(order)
        self.mean_counts = None  # (G,), see survey

    @classmethod
    def settings_for(cls, stage1, size):
        grids = [divided(size, factor) for factor in stage1.factors]
        return super().settings_for(stage1, size) | {"grids": grids}

    def _tabulate(self, order):
        """Registers what is known of each slot, and of each column of position_head.

        For grids [1, 2], so one region (R = 1) of four finest cells (N = 4):

            slot           0      1     2    | 3      4     5     6     7     8
            slot_kind      START  CODE  END  | START  CODE  CODE  CODE  CODE  END
            slot_grain     0      0     0    | 1      1     1     1     1     1
            slot_cell             0     1    |        0     1     2     3     4  end: cells_g
            slot_corner           0          |        0     1     2     3        first finest cell
            slot_region    R      0     R    | R      0     0     0     0     R  R: none
            slot_opens     whether the cell is the first of its region
            slot_special   K + 1        K    | K + 1                          K  content
            slot_place     row of position_emb; the first one, of start tokens
            slot_turn      row of rope
            slot_area      finest cells that a code covers

            column            0    1    2    3    4    5        of position_head
            column_slot[0]    1   -1   -1   -1    2   -1        -1: of another granularity
            column_slot[1]    4    5    6    7   -1    8
            cover[g]          the slot that covers each finest cell, (N,)
        """
        tables = [self._tables_of(g, order) for g in range(self.grains)]
        register_tables(self, tables, stacked=("column_slot", "cover"))

    def _tables_of(self, g, order):
        """The tables of granularity g."""
        regions, *_, finest = self.cells
        cells = self.cells[g]
        coarser = sum(self.cells[:g])
        first_slot = coarser + 2 * g
        first_place = coarser + g * (1 + self.num_starts)
        region, corner, cover = cell_tables(self.grids, g).values()
        opens = corner == cell_tables(self.grids, 0)["corner"][region]
        cell = torch.arange(cells)
        walk = cell if order == "row-first" else region.argsort(stable=True)
        slot = first_slot + 1 + walk.argsort()          # of each cell

        def of_slots(start, codes, end):
            return torch.cat([torch.tensor([start]), codes, torch.tensor([end])])

        column_slot = F.pad(slot, (0, finest - cells + self.grains), value=-1)
        column_slot[finest + g] = first_slot + 1 + cells
        return {
            "slot_kind": of_slots(START, torch.full_like(cell, CODE), END),
            "slot_grain": of_slots(g, torch.full_like(cell, g), g),
            "slot_cell": of_slots(0, walk, cells),
            "slot_corner": of_slots(0, corner[walk], 0),
            "slot_region": of_slots(regions, region[walk], regions),
            "slot_opens": of_slots(False, opens[walk], False),
            "slot_special": of_slots(self.codebook_size + 1, 0 * cell, self.codebook_size),
            "slot_place": first_place + of_slots(cells + 1, walk, cells),
            "slot_turn": of_slots(0, 1 + coarser + walk, 0),
            "slot_area": of_slots(0, torch.full_like(cell, finest // cells), 0),
            "column_slot": column_slot,
            "cover": slot[cover],
        }

    def start_tables(self):
        *_, (name, content) = self.content_emb.named_parameters()
        return {f"content_emb.{name}": [len(content) - self.num_starts],
                "position_emb.weight": [n + 1 for n in self.cells]}

    # Codes to sequences and back

    def order(self, codes):
        """Codes {"indices": (B, h, w), "grain": (B, h', w')} as `Tokens`."""
        indices, grain = read_codes(codes, indices=self.grids[-1], grain=self.grids[0])
        is_code = self.slot_kind == CODE                                # (M,)
        chosen = F.pad(grain, (0, 1))[:, self.slot_region] == self.slot_grain
        present = ~is_code | chosen                                     # (B, M)
        content = torch.where(is_code, indices[:, self.slot_corner], self.slot_special)
        counts = self._counts(grain)                                    # (B, G)
        total = present.sum(1, keepdim=True)                            # (B, 1)
        *longest, T = torch.cat([counts, total], 1).amax(0).tolist()  # the only wait for the GPU
        slot = (~present).byte().argsort(dim=1, stable=True)[:, :T]     # (B, T)
        padding = torch.arange(T, device=slot.device) >= total
        slot = slot.masked_fill(padding, len(is_code) - 1)
        return Tokens(slot, content.gather(1, slot), counts, longest)

    def unorder(self, tokens):
        """The inverse of `order`."""
        slot = tokens.slot
        none = slot.new_zeros(len(slot), len(self.slot_kind))           # (B, M)
        grain = none.scatter(1, self.slot_region[slot], self.slot_grain[slot])
        return self._codes(grain[:, :self.cells[0]], none.scatter(1, slot, tokens.content))

    def _codes(self, grain, contents):
        """Granularities of regions (B, R) and contents of slots (B, M) to codes."""
        region = self.slot_region[self.column_slot[-1, :self.cells[-1]]]        # (N,)
        cover = self.cover.gather(0, grain[:, region])                          # (B, N)
        indices = contents.gather(1, cover)                                     # (B, N)
        return {"indices": indices.unflatten(1, self.grids[-1]),
                "grain": grain.unflatten(1, self.grids[0])}

    def lengths(self, codes):
        return self._counts(codes["grain"].flatten(1)).sum(1) + 2 * self.grains - 1

    def _counts(self, grain):
        """Codes of each granularity (B, G), given the granularity of each region (B, R)."""
        regions = F.one_hot(grain, self.grains).sum(1)                  # (B, G)
        return regions * regions.new_tensor(self.cells) // self.cells[0]

    # Training

    @torch.no_grad()
    def survey(self, batches):
        """As CodeTransformer.survey. Also keeps the mean count of each granularity, which
        normalises the training loss.

        In batches of similar length, dividing by the batch's own counts would overweight short
        images. Call it in every process; the counts are not saved with the weights.
        """
        counts = torch.cat([self._counts(codes["grain"].flatten(1)) for codes in batches])
        self.mean_counts = counts.double().mean(0).float().to(self.index_emb.device)
        return counts.sum(1) + 2 * self.grains - 1

    def forward(self, codes, labels=None):
        """Codes and labels (B,) to {"loss", "content", "position"}, in nats: mean cross-entropy of
        codes, that of positions and ends (per granularity, then averaged), and their sum. The
        finest positions count, although `bits` and sampling do without them. After `survey`, the
        training loss divides by mean counts, not the batch's."""
        content, position, counts = self._nats(codes, labels)
        content = sum(nats.sum() for nats in content)                   # ()
        position = torch.stack([nats.sum() for nats in position])       # (G,)
        rows = len(counts)
        number = counts.float().sum(0)                                  # (G,)
        surveyed = self.training and self.mean_counts is not None
        if self.training and not surveyed:
            number = mean_over_processes(number)

        def means(number):
            return {"content": content / number.sum(),
                    "position": (position / (number + rows)).mean()}  # a row has an end

        parts = means(number)
        loss = sum((means(rows * self.mean_counts) if surveyed else parts).values())
        return {"loss": loss} | {name: mean.detach() for name, mean in parts.items()}

    def logits(self, codes: Codes, labels: Tensor | None = None) -> dict[str, list[Tensor]]:
        """Next-token logits under teacher forcing, a list entry per granularity, padded to its
        longest row L_g: content[g] (B, L_g, K); position[g] (B, L_g + 1, cells_g + 1), whose last
        column and step are the end; length[g] (B,), the number of codes."""
        tokens = self.order(codes)
        hidden, position, *_ = zip(*self._outputs(tokens, labels))
        return {"content": [self.content_head(x) for x in hidden], "position": list(position),
                "length": list(tokens.counts.unbind(1))}

    @torch.no_grad()
    def bits(self, codes, labels=None):
        """Negative log-likelihood of each image in bits (B,), without the finest positions, which
        the others imply."""
        content, position, _ = self._nats(codes, labels)
        return sum(nats.sum(1) for nats in content + position[:-1]) / math.log(2)

    def _nats(self, codes, labels):
        """Cross-entropies of codes [(B, L_g)] and of positions and ends [(B, L_g + 1)], 0 at
        padding; and counts (B, G)."""
        tokens = self.order(codes)
        content = []
        position = []
        for hidden, logits, code, cell in self._outputs(tokens, labels):
            content.append(self.content_head.nats(hidden, code))
            position.append(F.cross_entropy(logits.mT.float(), cell, reduction="none"))
        return content, position, tokens.counts

    def _outputs(self, tokens, labels):
        """Of each granularity: inputs of content_head (B, L_g, C) and logits of positions
        (B, L_g + 1, cells_g + 1); and their targets, codes (B, L_g) and cells or the end
        (B, L_g + 1), -100 at padding."""
        h, z = self._hidden(tokens, labels)                             # (B, T - 1, C) each
        first = F.pad((tokens.counts + 2).cumsum(1), (1, 0))            # (B, G + 1)
        outputs = []
        for g, length in enumerate(tokens.longest):
            number = torch.arange(length + 1, device=h.device)
            padding = number > tokens.counts[:, g:g + 1]                # (B, L_g + 1)
            step = (first[:, g:g + 1] + number).clamp(max=h.shape[1] - 1)
            code = tokens.content.gather(1, step[:, :-1] + 1).masked_fill(padding[:, 1:], -100)
            cell = self.slot_cell[tokens.slot.gather(1, step + 1)].masked_fill(padding, -100)

            step = step.unsqueeze(-1).expand(-1, -1, h.shape[-1])       # (B, L_g + 1, C)
            of_cells = self.position_head.weight[:self.cells[g]]
            end = self.cells[-1] + g
            head = torch.cat([of_cells, self.position_head.weight[end:end + 1]])
            logits = F.linear(self.position_norm(h.gather(1, step)), head)
            hidden = self.content_norm(z.gather(1, step[:, :-1]))
            outputs.append((hidden, logits, code, cell))
        return outputs

    def _hidden(self, tokens, labels):
        """Hidden states of both transformers, (B, T - 1, C) each. Step t predicts token t + 1."""
        starts = self.start_tokens(len(tokens.slot), labels, tokens.slot.device)
        content, place, grain = self.rows(tokens.slot, tokens.content, starts.unsqueeze(1))
        place = self.position_emb(place)                                # (B, T, C)
        x = self.content_emb(content[:, :-1]) + place[:, :-1] + self.grain_emb(grain[:, :-1])
        x = x + self.index_emb[:x.shape[1]]
        turn = self.slot_turn[tokens.slot]                              # (B, T)
        h = self.position_blocks(self.drop(x), rope=self.turns(turn[:, :-1]))
        z = self.content_blocks(h + place[:, 1:], rope=self.turns(turn[:, 1:]))
        return h, z

    def rows(self, slot, content, starts):
        """The rows of tokens in content_emb, position_emb and grain_emb; `starts`: which start."""
        start = (self.slot_kind[slot] == START) * starts
        return content + start, self.slot_place[slot] + start, self.slot_grain[slot]

    # Sampling

    def check_known(self, codes, known):
        starts = known.new_zeros(len(known), dtype=torch.int64)
        State(self, len(known), starts).keep_known(codes, known)

    @torch.no_grad()
    def sample(self, n: int, labels: Tensor | None = None, temperature: float = 1.0,
               top_k: int | None = None, top_p: float | None = None, cfg_scale: float = 1.0,
               generator: Generators = None, temperature_pos: float | None = None,
               top_k_pos: int | None = None, top_p_pos: float | None = None,
               fine_positions: Literal["filled", "sampled"] = "filled",
               codes: Codes | None = None, known: Tensor | None = None,
               cfg_schedule: Schedule = "constant") -> Codes:
        """Codes of n new images, {"indices": (n, h, w), "grain": (n, h', w')}.

        As GPT.sample; *_pos apply to positions (temperature_pos default: temperature). Positions
        keep the training data's order and cover the image exactly. fine_positions="sampled" also
        samples the order of the finest cells, as the release does.
        codes, known: keep the codes whose finest cells are all `known`, bool (n, h, w), the first
        of the sequence, and draw the rest.
        cfg_schedule: as in GPT.sample, over the area of the image that has codes.
        """
        temperature_pos = temperature if temperature_pos is None else temperature_pos
        filters = check_sampling(temperature, top_k, top_p)
        position_filters = check_sampling(temperature_pos, top_k_pos, top_p_pos)
        if fine_positions not in ("filled", "sampled"):
            raise ValueError(f"fine_positions must be filled or sampled; it is {fine_positions!r}")
        starts, guide = self.start_sampling(n, labels, cfg_scale, cfg_schedule)
        shape = self.length, 1 + self.content_head.digits
        numbers = uniforms(n, shape, generator, starts.device)
        position_cache = Cache(self.position_blocks, len(starts), self.length)
        content_cache = Cache(self.content_blocks, len(starts), self.length)
        state = State(self, n, starts)
        if codes is not None or known is not None:
            state.keep_known(codes, known)
        for t in range(self.length):
            content, place, grain = state.rows_of_last()                # (n or 2n,) each
            x = self.content_emb(content) + self.position_emb(place) + self.grain_emb(grain)
            guide.at(state.area / self.cells[-1])
            h = position_cache.step(x + self.index_emb[t], t, state.turns_of_last())
            logits = guide(self.position_head(self.position_norm(h)))   # (n, N + G)
            possible = state.possible(fine_positions == "sampled")
            logits = filter_logits(logits.masked_fill(~possible, -math.inf), *position_filters)
            state.move(draw(logits, numbers[state.rows, t, 0]))

            _, place, _ = state.rows_of_last()
            guide.at(state.area / self.cells[-1])
            z = content_cache.step(h + self.position_emb(place), t, state.turns_of_last())
            z = self.content_norm(z)
            state.store(self.content_head.draw(z, guide, filters, numbers[state.rows, t, 1:]))

            if (t + 1) % content_cache.window == 0:  # finished rows leave; it waits for the GPU
                active = state.unfinished()
                if len(active) == 0:
                    break
                if len(active) <= 0.75 * len(state.rows):
                    cached = state.keep_rows(active)
                    position_cache.keep(cached)
                    content_cache.keep(cached)
        guide.check()
        return self._codes(state.grain[:, :-1], state.contents)


def mean_over_processes(number):
    """So that the mean of the processes' losses is the mean over all tokens."""
    if not (dist.is_available() and dist.is_initialized()):
        return number
    dist.all_reduce(number)
    return number / dist.get_world_size()


class State:
    """Sequences while they are sampled. Those at the last slot are finished; `rows` of the n are
    still in the batch.

    slot        of the last token, (rows,)
    grain       (n, R + 1): each region's granularity, -1: undecided; the last: region "none"
    contents    (n, M): of all slots, so far
    owed        (rows, N + G): columns of position_head that must come before the end
    area        (rows, 1): finest cells that the codes so far cover
    prompt      slots and contents that stay, (n, T) each, the first `prompt_length` (n,)
    """

    def __init__(self, model, n, starts):
        self.model = model
        self.starts = starts                                            # (n,), guided (2n,)
        self.copies = len(starts) // n
        self.rows = torch.arange(n, device=starts.device)
        self.slot = torch.zeros_like(self.rows)
        self.grain = self.slot.new_full((n, model.cells[0] + 1), -1)
        self.grain[:, -1] = 0
        self.contents = model.slot_special.repeat(n, 1)
        self.owed = torch.zeros_like(model.column_slot[self.slot], dtype=torch.bool)
        self.area = torch.zeros_like(self.slot).unsqueeze(1)
        self.moves = 0
        self.prompt = self.contents, self.contents
        self.prompt_length = torch.ones_like(self.slot)  # the start token

    def keep_known(self, codes, known):
        """Keeps the codes whose finest cells are all `known`, bool (n, h, w), and the end of a
        granularity whose codes all stay (so that it gets no others; one without codes may)."""
        model = self.model
        device = self.rows.device
        check_known(len(self.rows), model.grids[-1], codes, known)
        tokens = model.order({key: value.to(device) for key, value in codes.items()})
        kind = model.slot_kind[tokens.slot]                             # (n, T), padding: END
        number = torch.arange(kind.shape[1], device=device)
        whole = covered(known.to(device), model.cover, len(model.slot_kind)).gather(1, tokens.slot)
        stays = (kind == CODE) & whole                                  # (n, T)
        length = torch.where(stays, number + 1, 1).amax(1)              # up to the last that stays
        if ((kind == CODE) & ~stays & (number < length.unsqueeze(1))).any():
            raise ValueError("this model draws coarse codes first, then finer ones, each in raster "
                             "order, so only the first of these can stay, such as all coarse codes;"
                             " a MaskTransformer keeps any region")
        following = kind.gather(1, length.unsqueeze(1)).squeeze(1)      # a code is never the last
        self.prompt = tokens.slot, tokens.content
        self.prompt_length = length + ((following == END) & (length > 1))

    def _or_prompt(self, drawn, prompt):
        """What was drawn (rows,) for the next token, or what the prompt (n, T) says."""
        said = prompt[self.rows, min(self.moves, prompt.shape[1] - 1)]
        return torch.where(self.moves < self.prompt_length[self.rows], said, drawn)

    def rows_of_last(self):
        """`DQTransformer.rows` of the last tokens, (copies * rows,) each."""
        content = self.contents[self.rows, self.slot].repeat(self.copies)
        return self.model.rows(self.slot.repeat(self.copies), content, self.starts)

    def turns_of_last(self):
        """`CodeTransformer.turns` of the last tokens, (2, copies * rows, head_dim)."""
        return self.model.turns(self.model.slot_turn[self.slot].repeat(self.copies))

    def possible(self, any_fine_order):
        """Columns of position_head that may come next, (rows, N + G): the first owed cell or else
        the end, and cells before it that open an undecided region.

        Columns that a granularity does not have hold -1 and so read the last slot, whose region R
        counts as decided: they never open a region and are never owed.
        """
        model = self.model
        g = model.slot_grain[self.slot]                                 # (rows,)
        slots = model.column_slot[g]                                    # (rows, N + G)
        end = slots.amax(1, keepdim=True)                               # (rows, 1)
        due = torch.where(self.owed, slots, end).amin(1, keepdim=True)  # (rows, 1)
        undecided = self.grain[self.rows].gather(1, model.slot_region[slots]) < 0
        may_open = model.slot_opens[slots] & undecided
        may_open &= (slots > self.slot.unsqueeze(1)) & (slots < due)
        is_due = slots == due
        if any_fine_order:
            is_due |= self.owed & (g == model.grains - 1).unsqueeze(1)
        return may_open | is_due

    def move(self, column):
        """Moves to the drawn column (rows,) of position_head; from an end to the next
        granularity's start, whatever was drawn.

        A region's first code decides its granularity; the finest's start takes all undecided
        regions. The region's other cells are then owed: they must get codes before the end.
        """
        model = self.model
        self.moves += 1
        drawn = model.column_slot[model.slot_grain[self.slot], column]
        drawn = self._or_prompt(drawn, self.prompt[0])
        ended = model.slot_kind[self.slot] == END
        following = (self.slot + 1).clamp(max=len(model.slot_kind) - 1)
        self.slot = torch.where(ended, following, drawn)
        self.area = self.area + model.slot_area[self.slot].unsqueeze(1)

        g = model.slot_grain[self.slot]                                 # (rows,)
        grain = self.grain[self.rows]                                   # (rows, R + 1)
        starts = model.slot_kind[self.slot] == START
        takes_all = (starts & (g == model.grains - 1)).unsqueeze(1)     # (rows, 1)
        entered = F.one_hot(model.slot_region[self.slot], grain.shape[1]).bool()
        decided = (grain < 0) & (entered | takes_all)                   # (rows, R + 1)
        self.grain[self.rows] = torch.where(decided, g.unsqueeze(1), grain)
        slots = model.column_slot[g]                                    # (rows, N + G)
        owed = self.owed | decided.gather(1, model.slot_region[slots])
        self.owed = owed & (slots != self.slot.unsqueeze(1))

    def store(self, code):
        """Stores the code (rows,) of the last token, unless that is a start or an end."""
        code = self._or_prompt(code, self.prompt[1])
        is_code = self.model.slot_kind[self.slot] == CODE
        special = self.model.slot_special[self.slot]
        self.contents[self.rows, self.slot] = torch.where(is_code, code, special)

    def unfinished(self):
        return (self.slot < len(self.model.slot_kind) - 1).nonzero().squeeze(1)

    def keep_rows(self, active):
        """Keeps these rows of the batch only. Returns their rows in the caches, including the null
        class's."""
        cached = torch.cat([active + i * len(self.rows) for i in range(self.copies)])
        self.starts = self.starts[cached]
        self.rows = self.rows[active]
        self.slot = self.slot[active]
        self.owed = self.owed[active]
        self.area = self.area[active]
        return cached
