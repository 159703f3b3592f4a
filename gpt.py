"""GPT over the codes of a VQGAN or VQ-VAE, and what the other transformers share with it.

    GPT                     next-code prediction in raster order           "Taming Transformers" (Esser et al., CVPR 2021), sec. 3.2
    CodeTransformer         base class of all: class labels, classifier-free guidance
    Blocks, Cache, Graph    pre-norm transformer blocks (minGPT's), their key-value cache, and a decoding step as a CUDA graph
    CodeHead, FactoredHead  hidden states to codes; for large codebooks by their digits, as FactoredEmbedding embeds them
    Guidance, NotFinite     classifier-free guidance; the error for NaN or infinite logits
    filter_logits, draw     temperature, top-k, top-p; sampling
    check_known, kept_first, covered    which codes stay when a part of an image is drawn anew
    parameter_groups        for AdamW: weight decay on linear weights only

    model = GPT(codebook_size=1024, grid=16, num_classes=1000)
    loss = model({"indices": indices}, labels)["loss"]            # indices: int64 (B, 16, 16), labels: int64 (B,)
    codes = model.sample(8, labels=labels, top_k=100, cfg_scale=3.0)    # {"indices": (8, 16, 16)}, for vqgan.decode(codes)

Unconditional with num_classes=0. Unlike the release's, start tokens have their own table and no logits, and labels may be dropped.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Count = Annotated[int, (0, 2**31)]  # the ranges that a config file may use; constructors do not check them
Probability = Annotated[float, (0, 0.999)]


class CodeTransformer(nn.Module):
    """Base of GPT, Stackformer, DQTransformer and MaskTransformer.

    A sequence opens with a start token, one per class. In training, labels become the null class with probability `label_dropout`, for
    classifier-free guidance (Ho & Salimans, 2022) and sampling without labels. An unconditional model has the null class only.
    """

    def __init__(self, num_classes: Count, label_dropout: Probability):
        super().__init__()
        self.num_classes, self.label_dropout = num_classes, label_dropout
        self.num_starts = num_classes + (num_classes == 0 or label_dropout > 0)

    def start_tokens(self, n: int, labels: Tensor | None, device: torch.device) -> Tensor:
        """Start tokens (n,) of labels (n,) or of the null class, with label dropout in training."""
        if labels is None and self.num_starts == self.num_classes:
            raise ValueError("this model needs labels: it was made with label_dropout=0, so it has no null class")
        if labels is None:
            return torch.full((n,), self.num_classes, device=device)
        if self.num_classes == 0:
            raise ValueError("labels were given, but this model is unconditional (num_classes=0)")
        if labels.shape != (n,):
            raise ValueError(f"labels must be one for each of the {n} images, ({n},); they are {tuple(labels.shape)}")
        valid, sentence = ((labels >= 0) & (labels < self.num_classes)).all(), f"labels must be classes from 0 to {self.num_classes - 1}"
        if labels.is_cuda:
            torch._assert_async(valid, sentence)  # asserts on the device, without synchronisation
        elif not valid:
            raise ValueError(f"{sentence}; they are {sorted(set(labels.tolist()))}")
        labels = labels.to(device)
        if self.training and self.label_dropout > 0:
            labels = torch.where(torch.rand(n, device=device) < self.label_dropout, self.num_classes, labels)
        return labels

    def start_tables(self) -> dict[str, list[int]]:
        """The tables that hold start tokens, and how many other rows come before each copy of them."""
        return {"start_emb.weight": [0]}

    def start_sampling(self, n: int, labels: Tensor | list[int] | None, cfg_scale: float) -> tuple[Tensor, Guidance]:
        """Start tokens (n,), or with guidance (2n,), the second half being the null class's."""
        if self.training:
            raise ValueError("the model is in training mode; call eval() before sample()")
        device = next(self.parameters()).device
        starts = self.start_tokens(n, None if labels is None else torch.as_tensor(labels, dtype=torch.int64).cpu(), device)
        if cfg_scale == 1.0:
            return starts, Guidance(1.0, 1)
        if labels is None:
            raise ValueError(f"cfg_scale={cfg_scale} needs labels to guide towards")
        return torch.cat([starts, self.start_tokens(n, None, device)]), Guidance(cfg_scale, 2)

    def survey(self, batches: Iterable[dict[str, Tensor]]) -> Tensor:
        """Reads all training codes before training. Returns each row's number of tokens (rows,)."""
        return torch.cat([self.lengths(codes) for codes in batches])

    def init_weights(self) -> None:
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
    codebook_factors               for large codebooks, numbers whose product is K, such as [512, 512]: codes are embedded and predicted
                                   as that many digits, each given those before (Open-MAGVIT2, arXiv 2409.04410). Likelihoods stay exact
    """

    def __init__(self, codebook_size: int, grid: int | list[int], num_classes: Count = 0, n_layer: int = 12, n_head: int = 12,
                 n_embd: int = 768, dropout: Probability = 0.0, label_dropout: Probability = 0.1,
                 codebook_factors: list[int] | None = None):
        super().__init__(num_classes, label_dropout)
        self.codebook_size, self.grid = codebook_size, sides(grid)
        self.length = math.prod(self.grid)
        self.start_emb = nn.Embedding(self.num_starts, n_embd)
        self.code_emb, head = code_ends(codebook_size, n_embd, codebook_factors)
        self.index_emb = nn.Parameter(torch.zeros(self.length, n_embd))
        self.drop = nn.Dropout(dropout)
        self.blocks = Blocks(n_layer, n_head, n_embd, dropout)
        self.norm = nn.LayerNorm(n_embd)
        self.head = head
        self.init_weights()

    def forward(self, codes: dict[str, Tensor], labels: Tensor | None = None) -> dict[str, Tensor]:
        """Codes {"indices": (B, h, w)} and labels (B,) to {"loss", "code"}, both the mean cross-entropy in nats."""
        loss = self.head.nats(self._hidden(codes, labels), self._flat(codes)).mean()
        return {"loss": loss, "code": loss.detach()}

    def logits(self, codes: dict[str, Tensor], labels: Tensor | None = None) -> dict[str, Tensor]:
        """Next-code logits under teacher forcing, {"indices": (B, T, K)}, T = h * w."""
        return {"indices": self.head(self._hidden(codes, labels))}

    def _hidden(self, codes: dict[str, Tensor], labels: Tensor | None) -> Tensor:
        indices = self._flat(codes)                                                          # (B, T)
        starts = self.start_tokens(len(indices), labels, indices.device)
        x = torch.cat([self.start_emb(starts).unsqueeze(1), self.code_emb(indices[:, :-1])], dim=1)
        return self.norm(self.blocks(self.drop(x + self.index_emb)))                         # (B, T, C)

    @torch.no_grad()
    def bits(self, codes: dict[str, Tensor], labels: Tensor | None = None) -> Tensor:
        """Negative log-likelihood of each image's codes, in bits (B,)."""
        return self.head.nats(self._hidden(codes, labels), self._flat(codes)).sum(1) / math.log(2)

    @torch.no_grad()
    def sample(self, n: int, labels: Tensor | None = None, temperature: float = 1.0, top_k: int | None = None,
               top_p: float | None = None, cfg_scale: float = 1.0,
               generator: torch.Generator | list[torch.Generator] | None = None,
               codes: dict[str, Tensor] | None = None, known: Tensor | None = None) -> dict[str, Tensor]:
        """Codes of n new images, {"indices": (n, h, w)}.

        labels         (n,) classes; None: the null class
        temperature    0: always the most likely code (of digits, with codebook_factors; so are top_k and top_p)
        top_k, top_p   only the k most likely codes, or the fewest with this total probability
        cfg_scale      guidance: null + scale * (conditional - null)
        generator      one, or one per row; a row depends on its own random numbers only
        codes, known   keep the cells `known`, bool (n, h, w), of `codes`, the first in raster order, and draw the rest
        """
        check_sampling(temperature, top_k, top_p)
        starts, guide = self.start_sampling(n, labels, cfg_scale)
        first = kept_first(n, self.grid, codes, known).to(starts.device)
        given = None if codes is None else self._flat(codes).to(starts.device)
        numbers = uniforms(n, self.length * self.head.digits, generator, starts.device).view(n, self.length, -1)
        cache = Cache(self.blocks, len(starts), self.length)
        indices = torch.empty(n, self.length, dtype=torch.int64, device=starts.device)
        x = self.start_emb(starts)                                                           # (n or 2n, C)
        for t in range(self.length):
            x = cache.step(x + self.index_emb[t], t)
            code = self.head.draw(self.norm(x), guide, (temperature, top_k, top_p), numbers[:, t])
            indices[:, t] = code if given is None else torch.where(t < first, given[:, t], code)
            x = self.code_emb(indices[:, t].repeat(guide.copies))
        guide.check()
        return {"indices": indices.view(n, *self.grid)}

    def lengths(self, codes: dict[str, Tensor]) -> Tensor:
        """Number of input tokens (B,) of each image."""
        return torch.full_like(codes["indices"][:, 0, 0], self.length)

    def _flat(self, codes: dict[str, Tensor]) -> Tensor:
        if codes["indices"].shape[1:] != self.grid:
            raise ValueError(f"indices must be (B, {self.grid[0]}, {self.grid[1]}); they are {tuple(codes['indices'].shape)}")
        return codes["indices"].flatten(1)


def sides(grid: int | list[int]) -> tuple[int, int]:
    """(height, width) of a grid: a side or [height, width]."""
    return tuple(grid) if isinstance(grid, (list, tuple)) else (grid, grid)


class Blocks(nn.Module):
    """A stack of transformer blocks, causal or bidirectional, (B, T, C) to (B, T, C)."""

    def __init__(self, n_layer: int, n_head: int, n_embd: int, dropout: float, causal: bool = True):
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"n_embd must be a multiple of n_head; they are {n_embd} and {n_head}")
        self.n_head, self.head_dim = n_head, n_embd // n_head
        self.layers = nn.ModuleList(Block(n_head, n_embd, dropout, causal) for _ in range(n_layer))

    def forward(self, x: Tensor, mask: Tensor | None = None, rope: Tensor | None = None) -> Tensor:
        """For bidirectional blocks: `mask`, the keys that are attended to, bool, broadcast to (B, heads, T, T); and `rope`, the angles of
        rotary position embeddings (B or 1, T, head_dim / 2)."""
        rope = None if rope is None else torch.stack([rope.cos(), rope.sin()]).unsqueeze(2)  # (2, B or 1, 1, T, head_dim / 2)
        for layer in self.layers:
            x = layer(x, mask=mask, rope=rope)
        return x

    def step(self, x: Tensor, kv: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        """One decoding step, (B, C) to (B, C), as `Cache.step` calls it. Shapes change every `Cache.window` steps: it can be compiled."""
        x = x.unsqueeze(1)
        for layer, layer_kv in zip(self.layers, kv):
            x = layer(x, layer_kv, t, mask)
        return x.squeeze(1)


class Block(nn.Module):
    """Self-attention and a GELU MLP, pre-norm, with residual connections."""

    def __init__(self, n_head: int, n_embd: int, dropout: float, causal: bool = True):
        super().__init__()
        self.n_head, self.dropout, self.causal = n_head, dropout, causal
        self.norm1, self.norm2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.qkv = Linear(n_embd, 3 * n_embd)
        self.out = Linear(n_embd, n_embd)
        self.mlp = nn.Sequential(Linear(n_embd, 4 * n_embd), nn.GELU(), Linear(4 * n_embd, n_embd))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, kv: Tensor | None = None, t: Tensor | None = None, mask: Tensor | None = None,
                rope: Tensor | None = None) -> Tensor:
        """(B, T, C) to (B, T, C). With a cache kv (2, B, heads, window, head_dim), T is 1 and t (1,) is the token's number."""
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, T, head_dim)
        if rope is not None:
            q, k = rotated(q, *rope), rotated(k, *rope)
        if kv is not None:
            k, v = kv.index_copy_(3, t, torch.stack([k, v]))
        a = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0, is_causal=self.causal and kv is None)
        x = x + self.drop(self.out(a.transpose(1, 2).reshape(B, T, C)))
        return x + self.drop(self.mlp(self.norm2(x)))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys (B, heads, T, head_dim), each pair of halves turned by its angle (RoFormer, arXiv 2104.09864)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


class Linear(nn.Linear):
    """nn.Linear. For one decoding step on the CPU, `W @ x.T` is twice as fast as `x @ W.T`."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or torch.is_grad_enabled() or x.numel() > 64 * self.in_features:
            return super().forward(x)
        y = (self.weight @ x.reshape(-1, self.in_features).t()).t().contiguous()
        return (y if self.bias is None else y + self.bias.to(y)).view(*x.shape[:-1], self.out_features)


class CodeHead(Linear):
    """Hidden states (..., C) to logits of codes (..., K)."""

    digits = 1  # random numbers that a code takes

    def nats(self, x: Tensor, codes: Tensor) -> Tensor:
        """Cross-entropy of each code (...), 0 for code -100."""
        return F.cross_entropy(self(x).flatten(0, -2).float(), codes.flatten(), reduction="none").view(codes.shape)

    def draw(self, x: Tensor, guide: Guidance, filters: tuple, numbers: Tensor) -> Tensor:
        """Samples codes (n,) from hidden states (n or 2n, C), with filter_logits' settings and random numbers (n, digits)."""
        return draw(filter_logits(guide(self(x)), *filters), numbers[:, 0])


class FactoredHead(nn.Module):
    """A CodeHead that predicts a code's digits, the first and then each given those before."""

    def __init__(self, factors: list[int], n_embd: int):
        super().__init__()
        self.factors, self.digits = factors, len(factors)
        self.heads = nn.ModuleList(CodeHead(n_embd, f, bias=False) for f in factors)
        self.embs = nn.ModuleList(nn.Embedding(f, n_embd) for f in factors[:-1])
        self.mlps = nn.ModuleList(nn.Sequential(nn.LayerNorm(n_embd), Linear(n_embd, n_embd), nn.GELU(), Linear(n_embd, n_embd))
                                  for _ in factors[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities of all codes (..., K): only for few codes."""
        total = x.new_zeros(*x.shape[:-1], 1)                                                # (..., codes so far)
        x = x.unsqueeze(-2)
        for i, head in enumerate(self.heads):
            total = (total.unsqueeze(-1) + head(x).log_softmax(-1)).flatten(-2)
            if i < self.digits - 1:
                every = torch.arange(self.factors[i], device=x.device).expand(*x.shape[:-1], -1)
                x = self._given(i, x.unsqueeze(-2), every).flatten(-3, -2)
        return total

    def nats(self, x: Tensor, codes: Tensor) -> Tensor:
        total = 0.0
        for i, (head, digit) in enumerate(zip(self.heads, digits_of(codes.clamp(min=0), self.factors))):
            total = total + head.nats(x, digit)
            x = self._given(i, x, digit) if i < self.digits - 1 else x
        return total.masked_fill(codes < 0, 0.0)

    def draw(self, x: Tensor, guide: Guidance, filters: tuple, numbers: Tensor) -> Tensor:
        code = 0
        for i, (head, f) in enumerate(zip(self.heads, self.factors)):
            digit = head.draw(x, guide, filters, numbers[:, i:])
            code = code * f + digit
            x = self._given(i, x, digit.repeat(guide.copies)) if i < self.digits - 1 else x
        return code

    def _given(self, i: int, x: Tensor, digit: Tensor) -> Tensor:
        return x + self.mlps[i](x + self.embs[i](digit))


class FactoredEmbedding(nn.Module):
    """Codes (...) to the sum of their digits' embeddings (..., C); `special` tokens beyond the codes have their own."""

    def __init__(self, factors: list[int], special: int, n_embd: int):
        super().__init__()
        self.factors, self.codes = factors, math.prod(factors)
        self.tables = nn.ModuleList(nn.Embedding(f, n_embd) for f in factors)
        self.special = nn.Embedding(special, n_embd) if special else None

    def forward(self, tokens: Tensor) -> Tensor:
        x = sum(table(digit) for table, digit in zip(self.tables, digits_of(tokens.clamp(max=self.codes - 1), self.factors)))
        if self.special is not None:
            x = torch.where((tokens >= self.codes).unsqueeze(-1), self.special((tokens - self.codes).clamp(min=0)), x)
        return x


def digits_of(codes: Tensor, factors: list[int]) -> list[Tensor]:
    return [codes // math.prod(factors[i + 1:]) % f for i, f in enumerate(factors)]


def code_ends(codebook_size: int, n_embd: int, factors: list[int] | None, special: int = 0) -> tuple[nn.Module, nn.Module]:
    """The embedding of codes and `special` tokens, and the head that predicts codes."""
    if factors is None:
        return nn.Embedding(codebook_size + special, n_embd), CodeHead(n_embd, codebook_size, bias=False)
    if math.prod(factors) != codebook_size or min(factors) < 2:
        raise ValueError(f"codebook_factors must be numbers whose product is codebook_size, {codebook_size}; they are {list(factors)}")
    return FactoredEmbedding(list(factors), special, n_embd), FactoredHead(list(factors), n_embd)


class Cache:
    """Keys and values of `rows` sequences of at most `length` tokens, allocated once, and the decoding steps that read them."""

    graphs = True  # on a GPU, replay each step from a CUDA graph

    def __init__(self, blocks: Blocks, rows: int, length: int):
        weight = blocks.layers[0].qkv.weight
        half = torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if half else weight.dtype
        self.kv = torch.zeros(len(blocks.layers), 2, rows, blocks.n_head, length, blocks.head_dim, dtype=dtype, device=weight.device)
        self.blocks, self.steps = blocks, torch.arange(length, device=weight.device)
        self.window = 64 if weight.is_cuda else 16  # attention covers multiples of this, the future masked: few shapes, little waste
        self.captured: dict[tuple, Graph] | None = {} if weight.is_cuda else None

    def step(self, x: Tensor, t: int) -> Tensor:
        """Token t through the blocks, (rows, C) to (rows, C). The next step may overwrite the result."""
        now, window = self.steps[t:t + 1], min(len(self.steps), (t // self.window + 1) * self.window)

        def step(x: Tensor, now: Tensor) -> Tensor:
            return self.blocks.step(x, self.kv[..., :window, :], now, (self.steps[:window] <= now).unsqueeze(0))

        if self.captured is None or not Cache.graphs:
            return step(x, now)
        key = window, len(x), self.kv.data_ptr()  # earlier ones are kept: a graph that is freed takes workspaces of the others with it
        if key not in self.captured:
            try:
                self.captured[key] = Graph(step, x, now)
            except RuntimeError as error:  # something in the step cannot be captured
                warnings.warn(f"sampling without CUDA graphs from here on, which is slower: {error}", stacklevel=2)
                Cache.graphs = False
                return step(x, now)
        return self.captured[key](x, now)

    def keep(self, rows: Tensor) -> None:
        """Keeps these rows (R,) only."""
        self.kv = self.kv.index_select(2, rows)


class Graph:
    """A function of tensors of these shapes, captured in a CUDA graph: one launch for all its kernels. Calls return the same tensor."""

    streams: dict[torch.device, torch.cuda.Stream] = {}  # one for all captures, since libraries keep a workspace for each
    first: dict[torch.device, Graph] = {}  # which stays, so that all others can use its memory

    def __init__(self, function: Callable[..., Tensor], *inputs: Tensor):
        self.inputs, self.graph, device = [v.clone() for v in inputs], torch.cuda.CUDAGraph(), inputs[0].device
        with torch.cuda.device(device), ExitStack() as at_the_end:
            if device not in Graph.streams:
                Graph.streams[device] = torch.cuda.Stream()
                Graph.first[device] = Graph(torch.neg, torch.zeros(1, device=device))
            pool = Graph.first[device].graph.pool() if device in Graph.first else None
            main, side = torch.cuda.current_stream(), Graph.streams[device]
            side.wait_stream(main)
            at_the_end.callback(main.wait_stream, side)  # the last, also after an error
            at_the_end.enter_context(torch.cuda.stream(side))
            function(*self.inputs)  # libraries allocate their workspaces, and autocast its copies of the weights
            self.graph.capture_begin(pool, capture_error_mode="thread_local")
            at_the_end.callback(self.graph.capture_end)
            self.output = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        torch._foreach_copy_(self.inputs, list(inputs))
        self.graph.replay()
        return self.output


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """For AdamW: decays the weights of linear layers, not biases, norms and embeddings."""
    decay = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in parameters if id(p) in decay], "weight_decay": weight_decay},
            {"params": [p for p in parameters if id(p) not in decay], "weight_decay": 0.0}]


TINY, HUGE = 1e-30, 1e30  # settings of sampling beyond these would be 0 and infinite in float32


class NotFinite(ValueError):
    """Logits are NaN or infinite."""


class Guidance:
    """Classifier-free guidance: null + scale * (conditional - null). Also records whether logits were finite; `check` waits for the GPU, so
    it is called once, after sampling."""

    def __init__(self, scale: float, copies: int):
        self.scale, self.copies, self.finite = scale, copies, True  # copies of a row: 2 are conditional and null

    def __call__(self, logits: Tensor) -> Tensor:
        """(copies * n, V) to (n, V)."""
        if self.copies == 2:
            conditional, null = logits.chunk(2)
            logits = null + self.scale * (conditional - null)
        self.finite = logits.isfinite().all() & self.finite
        return logits

    def check(self) -> None:
        if not self.finite:
            raise NotFinite("the model's logits are not finite, so nothing can be sampled: either its weights are not (use an earlier "
                            "checkpoint), or half precision overflowed (use float32), or cfg_scale is far too large")


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"the temperature must be at least 0; it is {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, or None for no limit; it is {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, or None for no limit; it is {top_p}")


def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits (B, V) below the highest, divided by the temperature, float32; -inf for excluded tokens. Temperature 0 leaves only the most
    likely."""
    logits = logits.float()
    if temperature == 0:
        top_k, temperature = 1, 1.0
    logits = logits - logits.amax(-1, keepdim=True)  # or a low temperature would make the highest infinite
    logits = logits / min(max(temperature, TINY), HUGE)
    if top_k is not None and top_k < logits.shape[-1]:
        kept = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -math.inf).scatter(-1, kept.indices, kept.values)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(-1)
        ordered = ordered.masked_fill(p.cumsum(-1) - p >= max(top_p, TINY), -math.inf)  # the tokens before it already reach top_p
        logits = torch.empty_like(logits).scatter(-1, order, ordered)
    return logits


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    """Samples one token (B,) per row of logits (B, V), given random numbers (B,) in [0, 1)."""
    below = logits.softmax(-1).cumsum(-1)
    target = below[:, -1:] * numbers.unsqueeze(-1) * (1 - 2**-20)  # stays below the total despite rounding
    passed = (below > target) & (logits > -math.inf)  # rounding in cumsum must not select an excluded token
    return passed.int().argmax(-1)  # the first


def check_known(n: int, grid: tuple[int, int], codes: dict[str, Tensor] | None, known: Tensor | None) -> None:
    """ValueError unless codes of n images and `known`, which of their cells stay, bool (n, h, w), come together."""
    if (codes is None) != (known is None):
        raise ValueError("give both codes and known, or neither")
    if codes is not None and (known.shape != (n, *grid) or known.dtype != torch.bool or any(len(v) != n for v in codes.values())):
        raise ValueError(f"codes must be those of {n} images, and known bool, ({n}, {grid[0]}, {grid[1]}); they are "
                         f"{ {k: tuple(v.shape) for k, v in codes.items()} } and {known.dtype}, {tuple(known.shape)}")


def kept_first(n: int, grid: tuple[int, int], codes: dict[str, Tensor] | None, known: Tensor | None) -> Tensor:
    """How many cells of each image stay (n,). ValueError unless they are the first in raster order."""
    check_known(n, grid, codes, known)
    count = torch.zeros(n, dtype=torch.int64) if known is None else known.sum((1, 2))
    if known is not None and not torch.equal(known.flatten(1), torch.arange(math.prod(grid), device=known.device) < count.unsqueeze(1)):
        raise ValueError("this model draws cells in raster order, so only the first ones can stay: whole rows from the top, and the first "
                         "cells of the next; a MaskTransformer keeps any region")
    return count


def covered(known: Tensor, cover: Tensor, places: int) -> Tensor:
    """Which places (B, places) have nothing but `known` cells (B, h, w), given the places that cover each cell (G, h * w)."""
    B = len(known)
    every = torch.ones(B, places, dtype=torch.uint8, device=known.device)
    return every.scatter_reduce(1, cover.flatten().expand(B, -1), known.flatten(1).byte().repeat(1, len(cover)), "amin").bool()


def uniforms(n: int, count: int, generator: torch.Generator | list[torch.Generator] | None, device: torch.device) -> Tensor:
    """Random numbers (n, count) in [0, 1), row by row from the row's generator or the only one, so that they do not depend on n."""
    generators = generator if isinstance(generator, list) else [generator] * n
    if len(generators) != n:
        raise ValueError(f"there must be one generator for each of the {n} rows, or one alone; there are {len(generators)}")
    return torch.stack([torch.rand(count, generator=g, device=g.device if g else "cpu").to(device) for g in generators])
