"""Other quantizers, in the place of vqgan.py's VectorQuantizer: VQGAN(quantizer=FSQ([8, 5, 5])).

    FSQ         rounds each channel to a few levels     Mentzer et al., ICLR 2024 (arXiv 2309.15505)
    LFQ         the sign of each channel                Yu et al., MAGVIT-v2, ICLR 2024 (2310.05737)
    BSQ         ... of unit vectors                     Zhao et al., ICLR 2025 (2406.07548)
    SimVQ       a frozen codebook under a linear map    Zhu et al., 2024 (2411.02038)
    IBQ         gradients for all codes, by softmax     Shi et al., 2024 (2412.02692)
    ResidualVQ  several codes per vector, each of what  Lee et al., "RQ-VAE", CVPR 2022 (2203.01941)
                the ones before left

z are vectors (..., D). `forward(z)` returns (codes (..., D) with gradients for z, indices (...),
losses, info), `nearest(z)` indices, `lookup(indices)` codes. FSQ, LFQ and BSQ have no codebook to
learn: the code follows from the index. Needs torch and vqgan.py.
"""

import math
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from vqgan import Decay, Quantizer, Temperature, VectorQuantizer, entropies, entropy_of_mean

Bits = Annotated[int, (1, 24)]
GroupBits = Annotated[int, (1, 12)]


class FSQ(Quantizer):
    """Bounds each channel by tanh and rounds it to one of its levels, as the code in the paper's
    appendix. No losses; K is the product of the levels, D their number. The paper recommends
    [8, 6, 5] for 2^8 codes, [8, 5, 5, 5] for 2^10, [7, 5, 5, 5, 5] for 2^12, [8, 8, 8, 6, 5] for
    2^14 and [8, 8, 8, 5, 5, 5] for 2^16."""

    def __init__(self, levels: list[Annotated[int, (2, 2**24)]] = (8, 5, 5, 5),
                 queue_size: int = 65536):
        super().__init__(math.prod(levels), len(levels), queue_size)
        if not levels or min(levels) < 2 or self.codebook_size > 2**24:
            raise ValueError("levels must be at least 2 and make at most 2^24 codes; they are "
                             f"{list(levels)}")
        levels = torch.tensor(levels)
        basis = levels.cumprod(0) // levels
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("basis", basis, persistent=False)

    def normalize(self, x: Tensor) -> Tensor:
        """Bounds each channel, to between its lowest and its highest level."""
        half = (self.levels - 1) * (1 - 1e-3) / 2
        offset = (self.levels % 2 == 0) * 0.5  # an even number of levels has none at 0
        return (x + torch.tan(offset / half)).tanh() * half - offset

    def quantize(self, z, weight):
        indices = self.choose(z)
        z = z / (self.levels // 2)
        return self.lookup(indices) + (z - z.detach()), indices, {}

    def choose(self, z):
        digits = z.round().nan_to_num(0).long() + self.levels // 2  # the loss of a NaN stays NaN
        return (digits * self.basis).sum(-1)

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (...) to codes (..., D)."""
        half = self.levels // 2
        return (indices.unsqueeze(-1) // self.basis % self.levels - half).float() / half


class LFQ(Quantizer):
    """Codes of +1 and -1, the signs of D = `bits` channels; K = 2^bits.

    entropy_weight     confident choices, even usage: mean entropy of p minus entropy of the mean p
                       (of all processes), where p is a softmax of -distance^2 /
                       entropy_temperature. The first is exact; the second is summed over groups of
                       channels
    group_bits         channels in a group: memory is N x 2^group_bits instead of N x K (as in
                       BSQ's release)
    beta               commitment loss
    """

    def __init__(self, bits: Bits = 10, entropy_weight: float = 0.1,
                 entropy_temperature: Temperature = 0.01, beta: float = 0.25,
                 group_bits: GroupBits = 9, queue_size: int = 65536):
        if not 1 <= bits <= 24:
            raise ValueError(f"bits must be between 1 and 24; they are {bits}")
        super().__init__(2**bits, bits, queue_size)
        self.beta = beta
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.group_bits = group_bits
        self.scale = bits**-0.5 if self.l2_norm else 1.0
        self.register_buffer("basis", 2 ** torch.arange(bits - 1, -1, -1), persistent=False)

    def quantize(self, z, weight):
        indices = self.choose(z)
        z_q = self.lookup(indices)
        losses = {"commitment": self.beta * ((z_q - z).square() * weight).mean()}
        if self.entropy_weight > 0 and self.training:
            losses["entropy"] = self.entropy_weight * self._entropy(z.flatten(0, -2))
        return z_q + (z - z.detach()), indices, losses

    def choose(self, z):
        return ((z > 0) * self.basis).sum(-1)

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (...) to codes (..., D)."""
        return signs_of(indices, self.basis).float() * self.scale

    def _entropy(self, z):
        logits = z * (4 * self.scale / self.entropy_temperature)        # of + against -, (N, D)
        each = F.binary_cross_entropy_with_logits(logits, logits.sigmoid(), reduction="none")
        of_mean = 0.0
        for group in logits.split(self.group_bits, dim=1):
            b = group.shape[1]
            codes = torch.arange(2**b, device=z.device)
            signs = signs_of(codes, self.basis[-b:]).to(group)     # (2^b, b)
            of_mean = of_mean + entropy_of_mean((group @ signs.t() / 2).softmax(1))
        return each.sum(1).mean() - of_mean


def signs_of(indices, basis):
    """The signs (..., b) of the channels with these places (b,) in the indices (...)."""
    return indices.unsqueeze(-1) // basis % 2 * 2 - 1


class BSQ(LFQ):
    """LFQ of unit vectors: codes are +-1 / sqrt(bits). No commitment loss by default, since the
    distance is bounded."""

    l2_norm = True

    def __init__(self, bits: Bits = 10, entropy_weight: float = 0.1,
                 entropy_temperature: Temperature = 0.01, beta: float = 0.0,
                 group_bits: GroupBits = 9, queue_size: int = 65536):
        super().__init__(bits, entropy_weight, entropy_temperature, beta, group_bits, queue_size)


class SimVQ(VectorQuantizer):
    """The codes are W times frozen Gaussian vectors, so every update of W moves all of them. W has
    nn.Linear's initial values; losses and straight-through gradient (or `rotation`) are
    VectorQuantizer's. (The release gives W a bias, and beta to the other loss.)"""

    def __init__(self, codebook_size: int = 1024, dim: int = 256, beta: float = 0.25,
                 queue_size: int = 65536, rotation: bool = False):
        super().__init__(codebook_size, dim, beta, queue_size=queue_size, rotation=rotation)

    def make_codebook(self):
        frozen = torch.randn(self.codebook_size, self.dim) * self.dim**-0.5
        self.frozen = nn.Parameter(frozen, requires_grad=False)
        self.projection = nn.Linear(self.dim, self.dim, bias=False)

    @property
    def codebook(self) -> Tensor:
        return self._projected(self.frozen)

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (...) to codes (..., D)."""
        return self._projected(F.embedding(indices, self.frozen))

    def _projected(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return self.projection(x)


class IBQ(VectorQuantizer):
    """Chooses the code of largest dot product. Its gradient is that of the softmax over all codes,
    so all of them learn.

    Losses as in the paper: (z_q - z)^2 with gradients for both, codebook, and beta times
    commitment; entropies as in VectorQuantizer, of dot products. (The release gives beta to the
    codebook loss.) Needs N x K floats several times.

    Published trouble: usage falls to 0 % with dim=256 and rises to 100 % with dim=32
    (TencentARC/SEED-Voken, issue 59), perhaps because dot products grow with the dimension until
    the softmax is one code's. Keep dim at 32 or below, and the entropies: without them 5 % of the
    codes stayed in use at dim=32 in a short training. Codes start as N(0, 1), as in the release.
    """

    SQUARES = 0

    def __init__(self, codebook_size: int = 1024, dim: int = 32, beta: float = 0.25,
                 entropy_weight: float = 0.05, entropy_temperature: Temperature = 0.01,
                 queue_size: int = 65536):
        super().__init__(codebook_size, dim, beta, entropy_weight=entropy_weight,
                         entropy_temperature=entropy_temperature, queue_size=queue_size)

    def make_codebook(self):
        self.codebook = nn.Parameter(torch.randn(self.codebook_size, self.dim))

    def quantize(self, z, weight):
        logits, indices, hard, z_q = self.soft(z, self.codebook.float())
        both = (z_q - z).square() + (hard - z.detach()).square()
        commitment = (hard.detach() - z).square()
        losses = {"codebook": (both * weight).mean(),
                  "commitment": self.beta * (commitment * weight).mean()}
        if self.entropy_weight > 0 and self.training:
            entropy = entropies(logits.flatten(0, -2) / self.entropy_temperature)
            losses["entropy"] = self.entropy_weight * entropy
        return z_q, indices, losses

    def soft(self, z, codes):
        """Vectors (..., D) and codes (K, D) to logits (..., K), indices, chosen codes, and these
        with the softmax's gradient."""
        logits = z @ codes.t()
        indices = logits.argmax(-1)
        hard = F.embedding(indices, codes)
        p = logits.softmax(-1)
        z_q = hard + (p - p.detach()) @ codes.detach()  # one-hot + p - sg(p), times the codes
        return logits, indices, hard, z_q


class ResidualVQ(nn.Module):
    """`depth` codes per vector: each quantizes what the ones before left. Indices (..., depth),
    codes are sums.

    shared             one codebook for all depths (as RQ-VAE's), instead of one for each
    others             as in VectorQuantizer. Losses are sums over the depths; usage and perplexity
                       are means
    """

    has_codebook = False
    accumulation_steps = 1

    def __init__(self, codebook_size: int = 1024, dim: int = 256,
                 depth: Annotated[int, (1, 64)] = 4, shared: bool = False, beta: float = 0.25,
                 ema_decay: Decay | None = None, ema_eps: float = 1e-5,
                 restart: bool = True, queue_size: int = 65536):
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be at least 1; it is {depth}")
        self.codebook_size = codebook_size
        self.dim = dim
        self.depth = depth
        self.codebooks = 1 if shared else depth
        self.layers = nn.ModuleList(
            VectorQuantizer(codebook_size, dim, beta, ema_decay=ema_decay, ema_eps=ema_eps,
                            restart=restart, queue_size=queue_size)
            for _ in range(self.codebooks))

    def forward(self, z: Tensor, loss_weight=None, ema_weight=None):
        """As VectorQuantizer.forward, with indices (..., depth)."""
        z = z.float()
        rest = z
        outs = []
        for layer in self._all():  # a shared codebook learns from all depths at once
            layer.accumulation_steps = self.accumulation_steps * self.depth // self.codebooks
            outs.append(layer(rest, loss_weight, ema_weight))
            rest = rest - outs[-1][0].detach()
        codes, indices, losses, infos = zip(*outs)
        z_q = sum(code.detach() for code in codes)
        losses = {key: sum(each[key] for each in losses) for key in losses[0]}
        info = {key: torch.stack([each[key] for each in infos]).mean() for key in infos[0]}
        return z_q + (z - z.detach()), torch.stack(indices, -1), losses, info

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Vectors (..., D) to indices (..., depth)."""
        rest = z.float()
        indices = []
        for layer in self._all():
            indices.append(layer.nearest(rest))
            rest = rest - layer.lookup(indices[-1])
        return torch.stack(indices, -1)

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (..., depth) to codes (..., D)."""
        return sum(layer.lookup(part) for layer, part in zip(self._all(), indices.unbind(-1)))

    def _all(self):
        return [self.layers[i % self.codebooks] for i in range(self.depth)]


def gradient_norms(quantizer: VectorQuantizer, z: Tensor, indices: Tensor,
                   loss_weight: Tensor | None = None, codebook: Tensor | None = None) -> Tensor:
    """Norm (K,) of the codebook loss's gradient at each code (with EMA: what it would be), for
    vectors (..., D) and their indices (...) into `codebook` (default: the current one). Codes that
    no vector chose get 0, which is how they die (not with IBQ)."""
    with torch.enable_grad(), torch.autocast(z.device.type, enabled=False):
        codes = (quantizer.codebook if codebook is None else codebook).detach().float()
        codes.requires_grad_()
        z = quantizer.normalize(z.detach().float())
        if isinstance(quantizer, IBQ):
            _, _, *chosen = quantizer.soft(z, codes)
        else:
            chosen = [quantizer.normalize(F.embedding(indices, codes))]
        weight = quantizer.beta if quantizer.legacy else 1.0
        if loss_weight is not None:
            weight = weight * loss_weight.unsqueeze(-1)
        loss = sum(((code - z).square() * weight).mean() for code in chosen)
        return torch.autograd.grad(loss, codes)[0].norm(dim=1)
