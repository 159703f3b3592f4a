"""GPT over the codes of a VQGAN or VQ-VAE, and what the other transformers share with it.

    GPT                     next-code prediction in raster order
                            "Taming Transformers" (Esser et al., CVPR 2021), sec. 3.2
    CodeTransformer         base class of all: class labels, classifier-free guidance
    Blocks, Cache, Graph    pre-norm transformer blocks (minGPT's), their key-value cache, and a
                            decoding step as a CUDA graph
    rotary_table, rotated   two-dimensional rotary position embeddings
    CodeHead, FactoredHead  hidden states to codes; for large codebooks by their digits, as
                            FactoredEmbedding embeds them
    Guidance, NotFinite     classifier-free guidance; the error for NaN or infinite logits
    filter_logits, draw     temperature, top-k, top-p; sampling
    check_known, kept_first, covered    which codes stay when a part of an image is drawn anew
    cell_tables, register_tables        how grids of several granularities lie on each other
    parameter_groups        for AdamW: weight decay on linear weights only

    model = GPT(codebook_size=1024, grid=16, num_classes=1000)
    loss = model({"indices": indices}, labels)["loss"]      # int64 (B, 16, 16) and (B,)
    codes = model.sample(8, labels=labels, top_k=100, cfg_scale=3.0)    # for vqgan.decode(codes)

Unconditional with num_classes=0. Unlike the release's, start tokens have their own table and no
logits, labels may be dropped, and queries and keys are normalised and turned by the place of their
cell (rope=False, qk_norm=False: as the release). Needs torch only.
"""

import math
import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Annotated, Literal, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Codes = dict[str, Tensor]  # as the stage-1 models' encode gives them
Generators = torch.Generator | list[torch.Generator] | None
Count = Annotated[int, (0, 2**31)]  # ranges that a config file may use; constructors do not check
Probability = Annotated[float, (0, 0.999)]
Schedule = Literal["constant", "linear", "power-cosine"]


class CodeTransformer(nn.Module):
    """Base of GPT, Stackformer, DQTransformer and MaskTransformer.

    A sequence opens with a start token, one per class. In training, labels become the null class
    with probability `label_dropout`, for classifier-free guidance (Ho & Salimans, 2022) and
    sampling without labels. An unconditional model has the null class only.
    """

    reads = ("indices",)  # the names of the codes of the stage-1 models that it is for

    def __init__(self, num_classes, label_dropout, codebook_size=0, dropout=0.0):
        super().__init__()
        self.codebook_size = codebook_size
        self.drop = nn.Dropout(dropout)
        self.num_classes = num_classes
        self.label_dropout = label_dropout
        self.has_null = num_classes == 0 or label_dropout > 0
        self.num_starts = num_classes + self.has_null

    def init_rope(self, rope, grids, head_dim):
        """Makes the table of rotary embeddings, if the model has them; see rotary_table."""
        table = rotary_table(grids, head_dim) if rope else None
        self.register_buffer("rope", table, persistent=False)

    def turns(self, rows):
        """The rotary embeddings (2, ..., head_dim) of tokens, by their rows of the table."""
        return None if self.rope is None else self.rope[:, rows]

    @classmethod
    def settings_for(cls, stage1: nn.Module, size: int | list[int]) -> dict:
        """The settings that follow from a stage-1 model and its images' size, a side or
        [height, width]. ValueError if this transformer does not read the model's codes."""
        if cls.reads not in (stage1.code_names, ()):
            raise ValueError(f"a {cls.__name__} reads the codes {', '.join(cls.reads)}; a "
                             f"{type(stage1).__name__} has {', '.join(stage1.code_names)}")
        if stage1.quantizer.depth:
            raise ValueError(f"a {cls.__name__} reads one code per cell; this stage-1 model has "
                             f"{stage1.quantizer.depth}")
        return {"codebook_size": stage1.quantizer.codebook_size}

    def start_tokens(self, n, labels, device):
        """Start tokens (n,) of labels (n,) or of the null class, with label dropout in training."""
        if labels is None:
            if not self.has_null:
                raise ValueError("this model needs labels: it was made with label_dropout=0, so it "
                                 "has no null class")
            return torch.full((n,), self.num_classes, device=device)
        if self.num_classes == 0:
            raise ValueError("labels were given, but this model is unconditional (num_classes=0)")
        if labels.shape != (n,):
            raise ValueError(f"labels must be one for each of the {n} images, ({n},); they are "
                             f"{tuple(labels.shape)}")
        valid = ((labels >= 0) & (labels < self.num_classes)).all()
        sentence = f"labels must be classes from 0 to {self.num_classes - 1}"
        if labels.is_cuda:
            torch._assert_async(valid, sentence)  # on the device, without waiting for it
        elif not valid:
            raise ValueError(f"{sentence}; they are {sorted(set(labels.tolist()))}")
        labels = labels.to(device)
        if self.training and self.label_dropout > 0:
            dropped = torch.rand(n, device=device) < self.label_dropout
            labels = torch.where(dropped, self.num_classes, labels)
        return labels

    def start_tables(self):
        """The tables that hold start tokens, and how many other rows come before each copy, as
        {name: [rows, ...]}."""
        return {"start_emb.weight": [0]}

    def start_sampling(self, n, labels, cfg_scale, cfg_schedule="constant"):
        """Start tokens (n,), or with guidance (2n,), the second half being the null class's."""
        if self.training:
            raise ValueError("the model is in training mode; call eval() before sample()")
        device = next(self.parameters()).device
        if labels is not None:
            labels = torch.as_tensor(labels, dtype=torch.int64).cpu()
        starts = self.start_tokens(n, labels, device)
        if cfg_scale != 1.0:
            if labels is None:
                raise ValueError(f"cfg_scale={cfg_scale} needs labels to guide towards")
            starts = torch.cat([starts, self.start_tokens(n, None, device)])
        return starts, Guidance(cfg_scale, len(starts) // n, cfg_schedule)

    def check_known(self, codes, known):
        """ValueError if `sample` cannot keep these cells of these codes."""
        kept_first(len(known), self.grid, codes, known)

    def survey(self, batches: Iterable[Codes]) -> Tensor:
        """Reads all training codes before training. Returns each row's number of tokens (rows,)."""
        return torch.cat([self.lengths(codes) for codes in batches])

    def lengths(self, codes: Codes) -> Tensor:
        """Number of input tokens (B,) of each image."""
        return torch.full_like(codes["indices"].flatten(1)[:, 0], self.length)

    def forward(self, codes: Codes, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Codes and labels (B,) to the mean cross-entropies of `_nats`, and "loss", their sum."""
        means = {name: nats.mean() for name, nats in self._nats(codes, labels).items()}
        return {"loss": sum(means.values())} | {name: x.detach() for name, x in means.items()}

    @torch.no_grad()
    def bits(self, codes: Codes, labels: Tensor | None = None) -> Tensor:
        """Negative log-likelihood of each image's codes, in bits (B,)."""
        return sum(nats.sum(1) for nats in self._nats(codes, labels).values()) / math.log(2)

    def init_weights(self):
        """As minGPT: N(0, 0.02) for linear layers and embeddings, zero biases."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


class GPT(CodeTransformer):
    """Predicts the codes of an image in raster order.

    codebook_size, grid            K, and the side of the grid of codes, or its [height, width]
    num_classes, label_dropout     see CodeTransformer
    n_layer, n_head, n_embd        depth, heads, width
    dropout                        on embeddings, attention weights and residual branches
    rope                           rotary position embeddings beside the learned ones: a code's by
                                   its own cell (not the next one, which it predicts), none for the
                                   start token
    qk_norm                        queries and keys of one length (see Block)
    codebook_factors               for large codebooks, numbers whose product is K, such as
                                   [512, 512]: codes are embedded and predicted as that many
                                   digits, each given those before (Open-MAGVIT2, arXiv
                                   2409.04410). Likelihoods stay exact
    """

    def __init__(self, codebook_size: int, grid: int | list[int], num_classes: Count = 0,
                 n_layer: int = 12, n_head: int = 12, n_embd: int = 768,
                 dropout: Probability = 0.0, label_dropout: Probability = 0.1,
                 codebook_factors: list[int] | None = None, rope: bool = True,
                 qk_norm: bool = True):
        super().__init__(num_classes, label_dropout, codebook_size, dropout)
        self.grid = sides(grid)
        self.length = math.prod(self.grid)
        self.start_emb = nn.Embedding(self.num_starts, n_embd)
        self.code_emb, head = code_ends(codebook_size, n_embd, codebook_factors)
        self.index_emb = nn.Parameter(torch.zeros(self.length, n_embd))
        self.blocks = Blocks(n_layer, n_head, n_embd, dropout, qk_norm)
        self.init_rope(rope, [self.grid], n_embd // n_head)
        self.norm = nn.LayerNorm(n_embd)
        self.head = head
        self.init_weights()

    @classmethod
    def settings_for(cls, stage1, size):
        return super().settings_for(stage1, size) | {"grid": divided(size, stage1.factor)}

    def logits(self, codes: Codes, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Next-code logits under teacher forcing, {"indices": (B, T, K)}, T = h * w."""
        return {"indices": self.head(self._hidden(codes, labels))}

    def _nats(self, codes, labels):
        """Cross-entropies in nats, (B, T)."""
        return {"code": self.head.nats(self._hidden(codes, labels), self._flat(codes))}

    def _hidden(self, codes, labels):
        indices = self._flat(codes)                                     # (B, T)
        starts = self.start_tokens(len(indices), labels, indices.device)
        x = self.code_emb(indices[:, :-1])                              # (B, T - 1, C)
        x = torch.cat([self.start_emb(starts).unsqueeze(1), x], dim=1)  # (B, T, C)
        x = self.blocks(self.drop(x + self.index_emb), rope=self.turns(slice(self.length)))
        return self.norm(x)                                             # (B, T, C)

    @torch.no_grad()
    def sample(self, n: int, labels: Tensor | None = None, temperature: float = 1.0,
               top_k: int | None = None, top_p: float | None = None, cfg_scale: float = 1.0,
               generator: Generators = None, codes: Codes | None = None,
               known: Tensor | None = None, cfg_schedule: Schedule = "constant") -> Codes:
        """Codes of n new images, {"indices": (n, h, w)}.

        labels         (n,) classes; None: the null class
        temperature    0: always the most likely code (of digits, with codebook_factors; so are
                       top_k and top_p)
        top_k, top_p   only the k most likely codes, or the fewest with this total probability
        cfg_scale      guidance: null + scale * (conditional - null)
        cfg_schedule   how the scale grows to this over the codes of an image, see Guidance
        generator      one, or one per row; a row depends on its own random numbers only
        codes, known   keep the cells `known`, bool (n, h, w), of `codes`, the first in raster
                       order, and draw the rest
        """
        filters = check_sampling(temperature, top_k, top_p)
        starts, guide = self.start_sampling(n, labels, cfg_scale, cfg_schedule)
        device = starts.device
        kept = kept_first(n, self.grid, codes, known).to(device)        # (n,)
        numbers = uniforms(n, (self.length, self.head.digits), generator, device)
        indices = starts.new_zeros(n, self.length)
        if codes is not None:
            indices = self._flat(codes).to(device).clone()
        cache = Cache(self.blocks, len(starts), self.length)
        x = self.start_emb(starts)                                      # (n or 2n, C)
        for t in range(self.length):
            guide.at((t + 1) / self.length)
            rope = self.turns(slice(t, t + 1))
            x = self.norm(cache.step(x + self.index_emb[t], t, rope))
            code = self.head.draw(x, guide, filters, numbers[:, t])
            indices[:, t] = torch.where(t < kept, indices[:, t], code)
            x = self.code_emb(indices[:, t].repeat(guide.copies))
        guide.check()
        return {"indices": indices.view(n, *self.grid)}

    def _flat(self, codes):
        return read_codes(codes, indices=self.grid)[0]


def sides(grid: int | list[int]) -> tuple[int, int]:
    """(height, width) of a grid: a side or [height, width]."""
    return (grid, grid) if isinstance(grid, int) else tuple(grid)


def divided(size, factor):
    """The grid of images of this size, in the same form."""
    return size // factor if isinstance(size, int) else [side // factor for side in size]


def check_grids(grids, least):
    """ValueError unless there are so many, each a multiple of the one before."""
    for (y, x), (h, w) in zip(grids, grids[1:]):
        if h % y or h <= y or h * x != w * y:
            least = math.inf
    if len(grids) < least:
        raise ValueError("grids must be sides, each a multiple of the one before, and two or more "
                         f"for a DQ-Transformer; they are {grids}")


class Blocks(nn.Module):
    """A stack of transformer blocks, causal or bidirectional, (B, T, C) to (B, T, C)."""

    def __init__(self, n_layer, n_head, n_embd, dropout, qk_norm, causal=True):
        super().__init__()
        if n_embd % n_head:
            raise ValueError("n_embd must be a multiple of n_head; they are "
                             f"{n_embd} and {n_head}")
        self.n_head = n_head
        self.head_dim = n_embd // n_head
        self.layers = nn.ModuleList(
            Block(n_head, n_embd, dropout, qk_norm, causal) for _ in range(n_layer))

    def forward(self, x, mask=None, rope=None):
        """`rope`: of CodeTransformer.turns, (2, B, T, head_dim) or for all rows (2, T, head_dim).
        `mask`, for bidirectional blocks: the keys that are attended to, bool, broadcast to
        (B, heads, T, T)."""
        if rope is not None:
            rope = rope.unsqueeze(-3)                                   # (2, B or none, 1, T, D)
        for layer in self.layers:
            x = layer(x, mask=mask, rope=rope)
        return x

    def step(self, x, kv, t, mask, rope=None):
        """One decoding step, (B, C) to (B, C), as `Cache.step` calls it. Shapes change every
        `Cache.window` steps: it can be compiled."""
        x = x.unsqueeze(1)
        if rope is not None:
            rope = rope[:, :, None, None]                               # (2, B or 1, 1, 1, D)
        for layer, layer_kv in zip(self.layers, kv):
            x = layer(x, layer_kv, t, mask, rope)
        return x.squeeze(1)


class Block(nn.Module):
    """Self-attention and a GELU MLP, pre-norm, with residual connections.

    qk_norm    queries and keys have root mean square 1.2, without parameters: attention logits are
               1.44 sqrt(head_dim) times a cosine
    """

    def __init__(self, n_head, n_embd, dropout, qk_norm, causal=True):
        super().__init__()
        self.n_head = n_head
        self.qk_norm = qk_norm
        self.causal = causal
        self.norm1 = nn.LayerNorm(n_embd)
        self.norm2 = nn.LayerNorm(n_embd)
        self.qkv = nn.Linear(n_embd, 3 * n_embd)
        self.qkv.parts = 3  # matrices, for muon.py
        self.out = nn.Linear(n_embd, n_embd)
        self.mlp = nn.Sequential(
            nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd))
        self.drop = nn.Dropout(dropout)

    def forward(self, x, kv=None, t=None, mask=None, rope=None):
        """(B, T, C) to (B, T, C). With a cache kv (2, B, heads, window, head_dim), T is 1 and
        t (1,) is the token's number. The cache has turned keys."""
        B, T, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        qk = qkv[:2]                                                    # (2, B, heads, T, D)
        v = qkv[2]
        scale = None
        if rope is not None:
            qk = rotated(qk, *rope)
        if self.qk_norm:
            qk = F.normalize(qk, dim=-1)
            scale = 1.2**2 * math.sqrt(qk.shape[-1])
        q, k = qk.to(v.dtype)                                           # (B, heads, T, D) each
        if kv is not None:
            k = kv[0].index_copy_(2, t, k)
            v = kv[1].index_copy_(2, t, v)
        a = F.scaled_dot_product_attention(
            q, k, v, mask, self.drop.p if self.training else 0.0,
            is_causal=self.causal and kv is None, scale=scale)          # (B, heads, T, D)
        x = x + self.drop(self.out(a.transpose(1, 2).reshape(B, T, C)))
        return x + self.drop(self.mlp(self.norm2(x)))


def rotary_table(grids, head_dim):
    """cos and sin of rotary position embeddings (RoFormer, arXiv 2104.09864) in two dimensions,
    (2, 1 + cells, head_dim): first of tokens that have no cell, which are not turned, then of the
    cells of all grids, by their centres in finest cells. Half of the pairs turn with y, half with
    x; the second numbers of the pairs come behind the first, for which sin is negative."""
    if head_dim % 4:
        raise ValueError(f"n_embd / n_head must be a multiple of 4; it is {head_dim}")
    centres = []
    for grid in grids:
        centre = torch.stack(rows_and_columns(grid), 1) + 0.5           # (cells, 2)
        centres.append(centre * (grids[-1][0] / grid[0]))
    frequencies = 100 ** -torch.linspace(0, 1, head_dim // 4 + 1)[:-1]
    angles = torch.cat(centres).unsqueeze(2) * frequencies              # (all cells, 2, D / 4)
    angles = F.pad(angles.flatten(1), (0, 0, 1, 0))                     # (1 + all cells, D / 2)
    sin = torch.cat([-angles.sin(), angles.sin()], dim=1)
    return torch.stack([angles.cos().repeat(1, 2), sin])


def rotated(x, cos, sin):
    """Queries or keys (..., T, head_dim), turned as rotary_table says."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class CodeHead(nn.Linear):
    """Hidden states (..., C) to logits of codes (..., K)."""

    digits = 1  # random numbers that a code takes
    parts = 0  # matrices, for muon.py: none

    def nats(self, x, codes):
        """Cross-entropy of each code (...), 0 for code -100."""
        return cross_entropy(self(x), codes)

    def draw(self, x, guide, filters, numbers):
        """Samples codes (n,) from hidden states (n or 2n, C), with filter_logits' settings and
        random numbers (n, digits)."""
        return draw(filter_logits(guide(self(x)), *filters), numbers[:, 0])


def cross_entropy(logits, tokens):
    """Of each token (...), given logits (..., V), in nats; 0 for token -100."""
    logits = logits.flatten(0, -2).float()
    return F.cross_entropy(logits, tokens.flatten(), reduction="none").view(tokens.shape)


class FactoredHead(nn.Module):
    """A CodeHead that predicts a code's digits, the first and then each given those before."""

    def __init__(self, factors, n_embd):
        super().__init__()
        self.factors = factors
        self.digits = len(factors)
        self.heads = nn.ModuleList(CodeHead(n_embd, f, bias=False) for f in factors)
        self.embs = nn.ModuleList(nn.Embedding(f, n_embd) for f in factors[:-1])
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(n_embd), nn.Linear(n_embd, n_embd), nn.GELU(),
                          nn.Linear(n_embd, n_embd))
            for _ in factors[:-1])

    def forward(self, x):
        """Log-probabilities of all codes (..., K): only for few codes."""
        every = torch.arange(math.prod(self.factors), device=x.device)
        every = every.expand(*x.shape[:-1], -1)                         # (..., K)
        return -self.nats(x.unsqueeze(-2).expand(*every.shape, -1), every)

    def nats(self, x, codes):
        """Cross-entropy of each code (...), 0 for code -100."""
        total = 0.0
        digits = digits_of(codes.clamp(min=0), self.factors)
        for i, (head, digit) in enumerate(zip(self.heads, digits)):
            total += head.nats(x, digit)
            x = self._after(i, x, digit)
        return total.masked_fill(codes < 0, 0.0)

    def draw(self, x, guide, filters, numbers):
        """As CodeHead.draw."""
        code = 0
        for i, (head, factor) in enumerate(zip(self.heads, self.factors)):
            digit = head.draw(x, guide, filters, numbers[:, i:])
            code = code * factor + digit
            x = self._after(i, x, digit.repeat(guide.copies))
        return code

    def _after(self, i, x, digit):
        """The hidden state that predicts digit i + 1; after the last one, as it is."""
        if i == len(self.mlps):
            return x
        return x + self.mlps[i](x + self.embs[i](digit))


class FactoredEmbedding(nn.Module):
    """Codes (...) to the sum of their digits' embeddings (..., C); `special` tokens beyond the
    codes have their own."""

    def __init__(self, factors, special, n_embd):
        super().__init__()
        self.factors = factors
        self.codes = math.prod(factors)
        self.tables = nn.ModuleList(nn.Embedding(f, n_embd) for f in factors)
        self.special = nn.Embedding(special, n_embd) if special else None

    def forward(self, tokens):
        digits = digits_of(tokens.clamp(max=self.codes - 1), self.factors)
        x = sum(table(digit) for table, digit in zip(self.tables, digits))
        if self.special is not None:
            special = self.special((tokens - self.codes).clamp(min=0))
            x = torch.where((tokens >= self.codes).unsqueeze(-1), special, x)
        return x


def digits_of(codes, factors):
    return [codes // math.prod(factors[i + 1:]) % f for i, f in enumerate(factors)]


def code_ends(codebook_size, n_embd, factors, special=0):
    """The embedding of codes and `special` tokens, and the head that predicts codes."""
    if factors is None:
        embedding = nn.Embedding(codebook_size + special, n_embd)
        return embedding, CodeHead(n_embd, codebook_size, bias=False)
    if math.prod(factors) != codebook_size or min(factors) < 2:
        raise ValueError("codebook_factors must be numbers whose product is codebook_size, "
                         f"{codebook_size}; they are {factors}")
    return FactoredEmbedding(factors, special, n_embd), FactoredHead(factors, n_embd)


class Cache:
    """Keys and values of `rows` sequences of at most `length` tokens, allocated once, and the
    decoding steps that read them."""

    graphs = True  # on a GPU, replay each step from a CUDA graph

    def __init__(self, blocks, rows, length):
        weight = blocks.layers[0].qkv.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        self.kv = torch.zeros(len(blocks.layers), 2, rows, blocks.n_head, length, blocks.head_dim,
                              dtype=dtype, device=weight.device)
        self.blocks = blocks
        self.numbers = torch.arange(length, device=weight.device)
        # Attention covers multiples of this, the future masked: few shapes, little waste.
        self.window = 64 if weight.is_cuda else 16
        self.captured = {} if weight.is_cuda else None

    def step(self, x, t, rope=None):
        """Token t through the blocks, (rows, C) to (rows, C); rope (2, rows or 1, head_dim). The
        next step may overwrite the result."""
        inputs = [x, self.numbers[t:t + 1]]
        if rope is not None:
            inputs.append(rope)
        window = min(len(self.numbers), (t // self.window + 1) * self.window)

        def step(x, now, *rope):
            # Not a bool mask, which attention would convert in every layer
            future = (self.numbers[:window] > now).unsqueeze(0)
            mask = self.kv.new_zeros(future.shape).masked_fill(future, -math.inf)
            return self.blocks.step(x, self.kv[..., :window, :], now, mask, *rope)

        if self.captured is not None and Cache.graphs:
            # Earlier graphs are kept: one that is freed takes workspaces of the others with it.
            key = window, len(x), self.kv.data_ptr()
            try:
                if key not in self.captured:
                    self.captured[key] = Graph(step, *inputs)
                return self.captured[key](*inputs)
            except RuntimeError as error:  # something in the step cannot be captured
                warnings.warn("sampling without CUDA graphs from here on, which is slower: "
                              f"{error}", stacklevel=2)
                Cache.graphs = False
        return step(*inputs)

    def keep(self, rows):
        """Keeps these rows (R,) only."""
        self.kv = self.kv.index_select(2, rows)


class Graph:
    """A function of tensors of these shapes, captured in a CUDA graph: one launch for all its
    kernels. Calls return the same tensor."""

    streams = {}  # of each device one for all: libraries keep workspaces
    first = {}  # of each device the one that stays, so that all others can use its memory

    def __init__(self, function, *inputs):
        self.inputs = [v.clone() for v in inputs]
        self.graph = torch.cuda.CUDAGraph()
        device = inputs[0].device
        with torch.cuda.device(device), ExitStack() as at_the_end:
            if device not in Graph.streams:
                Graph.streams[device] = torch.cuda.Stream()
                Graph.first[device] = Graph(torch.neg, torch.zeros(1, device=device))
            pool = Graph.first[device].graph.pool() if device in Graph.first else None
            main = torch.cuda.current_stream()
            side = Graph.streams[device]
            side.wait_stream(main)
            at_the_end.callback(main.wait_stream, side)  # the last, also after an error
            at_the_end.enter_context(torch.cuda.stream(side))
            function(*self.inputs)  # workspaces are allocated, autocast copies the weights
            self.graph.capture_begin(pool, capture_error_mode="thread_local")
            at_the_end.callback(self.graph.capture_end)
            self.output = function(*self.inputs)

    def __call__(self, *inputs):
        torch._foreach_copy_(self.inputs, list(inputs))
        self.graph.replay()
        return self.output


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """For AdamW: decays the weights of linear layers, not biases, norms and embeddings."""
    linear = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in parameters if p in linear], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p not in linear], "weight_decay": 0.0}]


TINY, HUGE = 1e-30, 1e30  # settings of sampling beyond these would be 0 and infinite in float32


class NotFinite(ValueError):
    """Logits are NaN or infinite."""


class Guidance:
    """Classifier-free guidance: null + scale * (conditional - null). Also records whether logits
    were finite; `check` waits for the GPU, so it is called once, after sampling.

    copies      rows of each image: 1, or 2 with guidance, all conditional ones first
    schedule    how the scale grows from 1 with the share s of the image that is drawn: linear (MAR,
                arXiv 2406.11838), or power-cosine, by (1 - cos(pi s^3)) / 2 (MDT, arXiv 2303.14389,
                with the power 4; RAR, arXiv 2411.00776, 1.2 to 2.75)
    """

    def __init__(self, scale, copies, schedule="constant"):
        if schedule not in get_args(Schedule):
            raise ValueError(f"cfg_schedule must be one of {', '.join(get_args(Schedule))}; it is "
                             f"{schedule!r}")
        self.scale = scale
        self.full_scale = scale
        self.copies = copies
        self.schedule = schedule
        self.finite = True

    def at(self, share):
        """Sets the scale for the step that completes this share of the image, a number or one for
        each row (n, 1)."""
        if self.schedule == "power-cosine":
            share = (1 - torch.cos(math.pi * torch.as_tensor(share) ** 3)) / 2
        if self.schedule != "constant":
            self.scale = 1 + share * (self.full_scale - 1)

    def __call__(self, logits):
        """(copies * n, V) to (n, V)."""
        if self.copies == 2:
            conditional, null = logits.chunk(2)
            logits = null + self.scale * (conditional - null)
        self.finite = logits.isfinite().all() & self.finite
        return logits

    def check(self):
        if not self.finite:
            raise NotFinite("the model's logits are not finite, so nothing can be sampled: either "
                            "its weights are not (use an earlier checkpoint), or half precision "
                            "overflowed (use float32), or cfg_scale is far too large")


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> tuple:
    """The settings of filter_logits; ValueError if they make no sense."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"the temperature must be at least 0; it is {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, or None for no limit; it is {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError("top_p must be above 0 and at most 1, or None for no limit; it is "
                         f"{top_p}")
    return temperature, top_k, top_p


def filter_logits(logits, temperature=1.0, top_k=None, top_p=None):
    """Logits (B, V) below the highest, divided by the temperature, float32; -inf for excluded
    tokens. Temperature 0 leaves only the most likely."""
    logits = logits.float()
    if temperature == 0:
        top_k = 1
    logits = logits - logits.amax(-1, keepdim=True)  # a low temperature must not make it infinite
    logits = logits / min(max(temperature, TINY), HUGE)
    if top_k is not None and top_k < logits.shape[-1]:
        values, tokens = logits.topk(top_k)
        logits = torch.full_like(logits, -math.inf).scatter(-1, tokens, values)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        reached = p.cumsum(-1) - p >= max(top_p, TINY)  # by the tokens before
        ordered = ordered.masked_fill(reached, -math.inf)
        logits = torch.empty_like(logits).scatter(-1, order, ordered)
    return logits


def draw(logits, numbers):
    """Samples one token (B,) per row of logits (B, V), given random numbers (B,) in [0, 1)."""
    below = logits.softmax(-1).cumsum(-1)
    target = below[:, -1:] * numbers.unsqueeze(-1) * (1 - 2**-20)  # below the total, once rounded
    passed = (below > target) & (logits > -math.inf)  # rounding must not select an excluded token
    return passed.int().argmax(-1)  # the first


def read_codes(codes, **shapes):
    """The codes of these names, (B, T) each. ValueError unless their shapes are these, after B."""
    for name, shape in shapes.items():
        if name not in codes or codes[name].shape[1:] != shape:
            have = {key: tuple(value.shape) for key, value in codes.items()}
            raise ValueError(f"{name} must be (B, {', '.join(map(str, shape))}); the codes are "
                             f"{have}")
    return [codes[name].flatten(1) for name in shapes]


def check_known(n, grid, codes, known):
    """ValueError unless codes of n images and `known`, which of their cells stay, bool (n, h, w),
    come together."""
    if (codes is None) != (known is None):
        raise ValueError("give both codes and known, or neither")
    if codes is None:
        return
    rows = {len(value) for value in codes.values()}
    if known.shape != (n, *grid) or known.dtype != torch.bool or rows != {n}:
        raise ValueError(f"codes must be those of {n} images, and known bool, ({n}, {grid[0]}, "
                         f"{grid[1]}); they are those of {rows} and {known.dtype}, "
                         f"{tuple(known.shape)}")


def kept_first(n, grid, codes, known):
    """How many cells of each image stay (n,). ValueError unless they are the first in raster
    order."""
    check_known(n, grid, codes, known)
    if known is None:
        return torch.zeros(n, dtype=torch.int64)
    if (known.flatten(1).int().diff(dim=1) > 0).any():
        raise ValueError("this model draws cells in raster order, so only the first ones can stay: "
                         "whole rows from the top, and the first cells of the next; a "
                         "MaskTransformer keeps any region")
    return known.sum((1, 2))


def cell_tables(grids, g):
    """How the cells of grids[g] lie in the coarsest and the finest grid, grids[0] and grids[-1].

    region    the coarsest cell that has it
    corner    its first finest cell
    cover     which cell covers each finest cell, (N,)
    """
    width = grids[g][1]
    size = width // grids[0][1]                         # side of a region, in cells
    scale = grids[-1][1] // width                       # side of a cell, in finest cells
    y, x = rows_and_columns(grids[g])
    fine_y, fine_x = rows_and_columns(grids[-1])
    return {
        "region": y // size * grids[0][1] + x // size,
        "corner": y * scale * grids[-1][1] + x * scale,
        "cover": fine_y // scale * width + fine_x // scale,
    }


def rows_and_columns(grid):
    """(y, x) of the cells of a grid, (cells,) each."""
    return torch.cartesian_prod(*map(torch.arange, grid)).unbind(1)


def register_tables(module, tables, stacked):
    """Registers each granularity's tables as buffers, concatenated or `stacked`."""
    for name in tables[0]:
        join = torch.stack if name in stacked else torch.cat
        module.register_buffer(name, join([table[name] for table in tables]), persistent=False)


def covered(known, cover, places):
    """Which places (B, places) have nothing but `known` cells (B, h, w), given the places that
    cover each cell (G, h * w)."""
    B = len(known)
    every = torch.ones(B, places, dtype=torch.uint8, device=known.device)
    cells = known.flatten(1).byte().repeat(1, len(cover))               # (B, G h w)
    return every.scatter_reduce(1, cover.flatten().expand(B, -1), cells, "amin").bool()


def uniforms(n, shape, generator, device):
    """Random numbers (n, *shape) in [0, 1), row by row from the row's generator or the only one, so
    that they do not depend on n."""
    generators = generator if isinstance(generator, list) else [generator] * n
    if len(generators) != n:
        raise ValueError(f"there must be one generator for each of the {n} rows, or one alone; "
                         f"there are {len(generators)}")
    rows = [torch.rand(shape, generator=g, device=g.device if g else "cpu") for g in generators]
    return torch.stack([row.to(device) for row in rows])
