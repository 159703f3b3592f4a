"""VQ-VAE and VQGAN: convolutional autoencoders whose latent vectors become the nearest of K codes.

    VQGAN               residual blocks, attention  "Taming Transformers" (Esser et al., CVPR 2021),
                                                    sec. 3.1
    VQVAE               a small convolutional net   "Neural Discrete Representation Learning" (van
                                                    den Oord et al., NeurIPS 2017)
    VectorQuantizer     the nearest code, straight-through gradient; others are in quantizers.py
    Tokenizer           what all stage-1 models have: base of VQModel, MQVAE and DQVAE
    Encoder, Decoder    and their parts: DownPath, Neck, UpPath, Level, Mid, ResBlock, Attention

Images are float tensors (B, 3, H, W) in [-1, 1].

    model = VQGAN(image_size=256, quantizer=VectorQuantizer(codebook_size=1024, dim=256))
    out = model(images)                 # out.images, out.codes, out.losses, out.info
    codes = model.encode(images)        # {"indices": int64 (B, h, w)}
    images = model.decode(codes)

LlamaGen's tokenizers (Sun et al., 2024) are VQGAN(attn_resolutions=[16], quantizer=
VectorQuantizer(16384, 8, l2_norm=True)). Differences from the Taming Transformers release: beta
weights the commitment loss (undo with legacy=True), and q, k, v are one convolution.
Needs torch only; the GAN loss is in losses.py.
"""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Codes = dict[str, Tensor]  # int64 tensors: all that is needed to decode images


class Output(NamedTuple):
    """What a stage-1 model returns."""

    images: Tensor  # (B, 3, H, W): the reconstruction
    codes: Codes
    losses: dict[str, Tensor]  # scalars to add to the reconstruction loss
    info: dict[str, Tensor]  # scalars to log; maps (B, 1 or 3, h, w) in [-1, 1] to draw


class Tokenizer(nn.Module):
    """Base of the stage-1 models: images to codes and back.

    factors        image side / grid side of each granularity, coarsest first; `factor`: the first
    quantizer      turns vectors (..., D) into codes
    """

    code_names = ("indices",)
    rate_range: tuple[float, float] | None = None  # of a model that was trained for any rate

    def __init__(self, factors: list[int], quantizer: Quantizer):
        super().__init__()
        self.factors = factors
        self.factor = factors[0]
        self.quantizer = quantizer

    def schedule(self, step: int, max_steps: int, seed: int = 0) -> None:
        """Sets what changes over training; to be called before each step, numbered from 0."""

    def calibrate(self, batches) -> dict:
        """Computes what encoding must know of training images, and returns it for a file."""
        return {}

    def set_thresholds(self, thresholds: list[float], patch_size: int) -> None:
        """Sets what `calibrate` would compute; ValueError if it computes nothing."""
        raise ValueError("thresholds are for a DQ-VAE with an entropy router")

    def set_image_size(self, size: int | list[int]) -> None:
        """Announces the images' size, a side or [height, width]; ValueError if it does not fit."""
        if any(side % self.factor for side in sides(size)):
            raise ValueError(f"image_size must be divisible by {self.factor}, the model's "
                             f"downsampling factor; it is {size}")

    def set_rate(self, rate: float | list[float]) -> None:
        """Chooses the rate of a model that was trained for any; ValueError if it has one only."""
        raise ValueError(f"a {type(self).__name__} has one rate only; MQ-VAE and DQ-VAE can be "
                         "trained for a range")

    def maps(self, codes: Codes, images: Tensor) -> dict[str, Tensor]:
        """Pictures (B, 1 or 3, h, w) in [-1, 1] of where the codes go: none for a plain grid."""
        return {}

    def spent(self, codes: Codes) -> Tensor:
        """Which of codes["indices"] are paid for, bool of their shape."""
        return torch.ones_like(codes["indices"], dtype=torch.bool)

    def counts(self, codes: Codes) -> dict[str, Tensor]:
        """What an evaluation counts, per image (B,): codes, bits, shares of what is chosen."""
        return {"codes": self.spent(codes).flatten(1).sum(1), "bits": self.bits(codes)}

    @property
    def last_layer(self) -> Tensor:
        """Where the adaptive GAN weight compares gradients."""
        return self.to_image.weight


class VQModel(Tokenizer):
    """Encoder, 1x1 conv, quantizer, 1x1 conv, decoder: base of VQGAN and VQVAE.

    `to_image` is apart from the decoder because the adaptive GAN weight needs its gradients.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, to_image: nn.Module,
                 squash: nn.Module, z_channels: int, factor: int, quantizer: Quantizer):
        super().__init__([factor], quantizer)
        self.encoder = encoder
        self.pre_quant = nn.Conv2d(z_channels, quantizer.dim, 1)
        self.post_quant = nn.Conv2d(quantizer.dim, z_channels, 1)
        self.decoder = decoder
        self.to_image = to_image
        self.squash = squash

    def forward(self, images: Tensor) -> Output:
        """Images (B, 3, H, W) to an `Output` with the quantizer's losses."""
        z_q, indices, losses, info = self.quantizer(self.latents(images))
        return Output(self._decode(z_q), {"indices": indices}, losses, info)

    def encode(self, images: Tensor) -> Codes:
        """Images (B, 3, H, W) to {"indices": int64 (B, H / factor, W / factor)}."""
        return {"indices": self.quantizer.nearest(self.latents(images))}

    def decode(self, codes: Codes) -> Tensor:
        """{"indices": int64 (B, h, w)} to images (B, 3, h * factor, w * factor)."""
        return self._decode(self.quantizer.lookup(codes["indices"]))

    def latents(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to vectors (B, h, w, D). ValueError unless factor divides H and W."""
        check_size(images, self.factor)
        z = self.encoder(images)                                        # (B, z_channels, h, w)
        return self.pre_quant(z).permute(0, 2, 3, 1)                    # (B, h, w, D)

    def _decode(self, z_q: Tensor) -> Tensor:
        z = self.post_quant(z_q.permute(0, 3, 1, 2).contiguous())       # (B, z_channels, h, w)
        return self.squash(self.to_image(self.decoder(z)))              # (B, 3, H, W)

    def bits(self, codes: Codes) -> Tensor:
        """Bits per image (B,): log2 K per code."""
        indices = codes["indices"].flatten(1)
        bits = indices.shape[1] * math.log2(self.quantizer.codebook_size)
        return torch.full((len(indices),), bits, device=indices.device)


class VQGAN(VQModel):
    """The autoencoder of Taming Transformers and LlamaGen; f = 2 ** (len(ch_mult) - 1).

    image_size         of the training images, a side or [height, width]; others work if f divides
                       them. Levels whose shorter side is in attn_resolutions get attention
    ch, ch_mult        level i has ch * ch_mult[i] channels, a multiple of 32 (GroupNorm)
    num_res_blocks     per level; one more in the decoder
    z_channels         of the encoder's output, before the 1x1 conv to the code dimension
    """

    def __init__(self, image_size: int | list[int] = 256, ch: int = 128,
                 ch_mult: list[int] = (1, 1, 2, 2, 4), num_res_blocks: int = 2,
                 attn_resolutions: list[int] = (16,), z_channels: int = 256,
                 quantizer: VectorQuantizer | None = None):
        down = DownPath(image_size, ch, ch_mult, num_res_blocks, attn_resolutions)
        encoder = Encoder(down, z_channels)
        up = UpPath(image_size, ch, ch_mult, num_res_blocks + 1, attn_resolutions)
        super().__init__(
            encoder, Decoder(up, z_channels), to_image=nn.Conv2d(up.channels[-1], 3, 3, padding=1),
            squash=nn.Identity(), z_channels=z_channels, factor=2 ** (len(ch_mult) - 1),
            quantizer=quantizer or VectorQuantizer())


class VQVAE(VQModel):
    """The small VQ-VAE ("SimpleCNN") of visual-tokenizer-pytorch, for a study of collapse; f = 4.

    ch                 channels; half as many at half resolution
    num_res_blocks     in the encoder and in the decoder
    """

    def __init__(self, ch: Annotated[int, (2, 2**31)] = 256,
                 num_res_blocks: Annotated[int, (0, 2**31)] = 2,
                 quantizer: VectorQuantizer | None = None):
        leaky = nn.LeakyReLU(0.01)
        encoder = nn.Sequential(
            nn.Conv2d(3, ch // 2, 4, 2, 1), leaky,
            nn.Conv2d(ch // 2, ch, 4, 2, 1), leaky,
            nn.Conv2d(ch, ch, 3, 1, 1),
            *[SimpleResBlock(ch) for _ in range(num_res_blocks)])
        decoder = nn.Sequential(
            *[SimpleResBlock(ch) for _ in range(num_res_blocks)], leaky,
            nn.Conv2d(ch, ch, 3, 1, 1), leaky,
            nn.ConvTranspose2d(ch, ch // 2, 4, 2, 1), leaky)
        super().__init__(
            encoder, decoder, to_image=nn.ConvTranspose2d(ch // 2, 3, 4, 2, 1), squash=nn.Tanh(),
            z_channels=ch, factor=4, quantizer=quantizer or VectorQuantizer())


class Quantizer(nn.Module):
    """Base of the quantizers: K = `codebook_size`, D = `dim`; counts the codes chosen last."""

    depth = 0  # codes per vector, if `indices` have a last axis for them
    codebooks = 1
    has_codebook = False  # `codebook` (K, D) is learned
    l2_norm = False  # compares unit vectors

    def __init__(self, codebook_size: int, dim: int, queue_size: int):
        super().__init__()
        self.codebook_size = codebook_size
        self.dim = dim
        self.accumulation_steps = 1
        self.register_buffer("queue", torch.full((queue_size,), -1, dtype=torch.int32))  # -1: none

    @torch.no_grad()
    def record(self, indices: Tensor) -> None:
        """Puts the indices of a training step into the queue."""
        recent = indices.flatten()[-len(self.queue):].to(self.queue.dtype)
        self.queue.copy_(torch.cat([self.queue[len(recent):], recent]))

    def uses(self) -> Tensor:
        """How often each code is in this process's queue of recent training codes, int64 (K,)."""
        return torch.bincount(self.queue[self.queue >= 0], minlength=self.codebook_size)

    @torch.no_grad()
    def usage(self) -> Tensor:
        """Codebook usage: distinct codes in this process's queue, over K."""
        seen = torch.zeros(self.codebook_size + 1, device=self.queue.device)
        return seen.index_fill_(0, self.queue.long() + 1, 1.0)[1:].mean()

    @torch.no_grad()
    def perplexity(self, indices: Tensor) -> Tensor:
        """exp(entropy) of the indices' distribution: 1 (a single code) to K (uniform)."""
        ones = torch.ones(indices.numel(), device=indices.device)
        counts = torch.zeros(self.codebook_size, device=indices.device)
        p = counts.index_add_(0, indices.flatten(), ones) / indices.numel()
        return torch.exp(-(p * (p + 1e-10).log()).sum())

    def info(self, indices: Tensor) -> dict[str, Tensor]:
        return {"usage": self.usage(), "perplexity": self.perplexity(indices)}


class VectorQuantizer(Quantizer):
    """Replaces each vector by the nearest of K codes.

    codebook_size, dim K codes of this dimension, initially uniform in +-1/K
    beta               commitment loss beta * ||z - sg(e)||^2, beside the codebook loss
                       ||sg(z) - e||^2
    legacy             beta weights the codebook loss instead (Taming Transformers release)
    l2_norm            compare unit vectors (ViT-VQGAN, LlamaGen)
    ema_decay          None: the codebook is trained by gradient. Else codes are moving averages of
                       their vectors (VQ-VAE, appendix A.1), with Laplace smoothing by ema_eps
    restart            EMA only: a code whose average count is below 1 becomes a random current
                       vector
    entropy_weight     confident choices, even usage (MaskGIT, LlamaGen): mean entropy of
                       p = softmax(-distance / entropy_temperature) minus the entropy of the mean p.
                       Needs N x K floats
    queue_size         number of recent codes that `usage` counts
    rotation           a vector gets the gradient of its code, turned and scaled back to it
                       (rotation trick, Fifty et al., ICLR 2025)

    Computes in float32 even under autocast. EMA sums and restarts use the vectors of all
    processes, so that codebooks stay equal. With gradient accumulation, set `accumulation_steps`
    to the (constant) number of forward passes per step: the last one then updates the codebook
    from all their vectors, as one large batch would.
    """

    CHUNK = 2**25  # distances in memory at a time (128 MB)
    has_codebook = True

    def __init__(self, codebook_size: int = 1024, dim: int = 256, beta: float = 0.25,
                 legacy: bool = False, l2_norm: bool = False,
                 ema_decay: Annotated[float, (0, 1 - 1e-9)] | None = None, ema_eps: float = 1e-5,
                 restart: bool = True, entropy_weight: float = 0.0,
                 entropy_temperature: Annotated[float, (1e-9, 1e9)] = 0.01,
                 queue_size: int = 65536, rotation: bool = False):
        super().__init__(codebook_size, dim, queue_size)
        self.beta = beta
        self.legacy = legacy
        self.l2_norm = l2_norm
        self.rotation = rotation
        self.ema_decay = ema_decay
        self.ema_eps = ema_eps
        self.restart = restart
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.make_codebook()
        self._gathered: list[tuple[Tensor, Tensor, Tensor]] = []  # see _gather
        if ema_decay is not None:
            # From 0, most codes restart as vectors of the first batches. Without restarts, unused
            # codes would be divided by almost 0.
            count = torch.zeros(codebook_size) if restart else torch.ones(codebook_size)
            self.register_buffer("ema_count", count)
            self.register_buffer("ema_sum", self.codebook.detach().clone())

    def make_codebook(self) -> None:
        codebook = torch.empty(self.codebook_size, self.dim)
        codebook.uniform_(-1 / self.codebook_size, 1 / self.codebook_size)
        self.codebook = nn.Parameter(self.normalize(codebook), self.ema_decay is None)

    def forward(self, z: Tensor, loss_weight: Tensor | None = None,
                ema_weight: Tensor | None = None):
        """Vectors (..., D) to (z_q (..., D) float32, indices int64 (...), losses, info).

        loss_weight    (...): of each vector in codebook and commitment loss (still plain means)
        ema_weight     (...): of each vector in the moving averages; 0: never a restarted code
        """
        with torch.autocast(z.device.type, enabled=False):
            z = self.normalize(z.float())
            indices = self.nearest(z)
            z_q = self.lookup(indices)
            losses = self._losses(z, z_q, loss_weight)
            if self.training:
                self.record(indices)
                if self.ema_decay is not None:
                    weight = torch.ones_like(z[..., 0]) if ema_weight is None else ema_weight
                    self._gather(z.detach(), indices, weight)
            moved = rotate(z, z_q.detach()) if self.rotation else z
            z_q = z_q.detach() + (moved - moved.detach())  # the value of z_q, the gradient of z
        return z_q, indices, losses, self.info(indices)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Vectors (..., D) to the indices of the nearest codes, int64 (...)."""
        with torch.autocast(z.device.type, enabled=False):
            codes = self.normalize(self.codebook.float())
            vectors = self.normalize(z.float()).flatten(0, -2)
            # ||z - e||^2 = ||z||^2 + ||e||^2 - 2 z.e, and ||z||^2 is the same for all codes.
            squares = codes.square().sum(1)
            rows = max(1, self.CHUNK // self.codebook_size)
            nearest = [torch.addmm(squares, part, codes.t(), alpha=-2).argmin(1)
                       for part in vectors.split(rows)]
        return torch.cat(nearest).view(z.shape[:-1])

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (...) to codes (..., D), float32."""
        return self.normalize(F.embedding(indices, self.codebook.float()))

    def normalize(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.l2_norm else x

    def _losses(self, z: Tensor, z_q: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
        weight = 1.0 if weight is None else weight.unsqueeze(-1)
        codebook = ((z_q - z.detach()).square() * weight).mean()
        commitment = ((z_q.detach() - z).square() * weight).mean()
        if self.legacy:
            losses = {"codebook": self.beta * codebook, "commitment": commitment}
        else:
            losses = {"codebook": codebook, "commitment": self.beta * commitment}
        if self.entropy_weight > 0 and self.training:
            vectors = z.flatten(0, -2)                                  # (N, D)
            codes = self.normalize(self.codebook.clone())  # EMA changes it before backward
            distance = (vectors.square().sum(1, keepdim=True) + codes.square().sum(1)
                        - 2 * vectors @ codes.t())                      # (N, K)
            entropy = entropies(-distance / self.entropy_temperature)
            losses["entropy"] = self.entropy_weight * entropy
        return losses

    def _gather(self, z: Tensor, indices: Tensor, weight: Tensor) -> None:
        """Collects vectors; updates the codebook every `accumulation_steps` calls."""
        vectors = z.flatten(0, -2)                                      # (N, D)
        weight = weight.to(z).reshape(-1, 1)                            # (N, 1)
        self._gathered.append((vectors, indices.flatten(), weight))
        if len(self._gathered) >= self.accumulation_steps:
            self._ema_update(*map(torch.cat, zip(*self._gathered)))
            self._gathered = []

    @torch.no_grad()
    def _ema_update(self, z: Tensor, indices: Tensor, weight: Tensor) -> None:
        """One EMA step from vectors (N, D), indices (N,) and weights (N, 1)."""
        totals = z.new_zeros(self.codebook_size, self.dim + 1)  # sums of vectors, and their weight
        totals.index_add_(0, indices, torch.cat([z * weight, weight], dim=1))
        if world_size() > 1:
            dist.all_reduce(totals)
        ema_sum = self.ema_decay * self.ema_sum + (1 - self.ema_decay) * totals[:, :-1]
        ema_count = self.ema_decay * self.ema_count + (1 - self.ema_decay) * totals[:, -1]
        if self.restart:
            dead = ema_count < 1
            ema_sum = torch.where(dead.unsqueeze(1), self._random_vectors(z, weight), ema_sum)
            ema_count = ema_count.masked_fill(dead, 1.0)
        total = ema_count.sum()
        share = (ema_count + self.ema_eps) / (total + self.codebook_size * self.ema_eps)
        codebook = ema_sum / (total * share).unsqueeze(1)
        finite = totals.isfinite().all()  # fp16 overflows must not reach the codebook
        self.ema_sum.copy_(torch.where(finite, ema_sum, self.ema_sum))
        self.ema_count.copy_(torch.where(finite, ema_count, self.ema_count))
        self.codebook.copy_(torch.where(finite, codebook, self.codebook))

    def _random_vectors(self, z: Tensor, weight: Tensor) -> Tensor:
        """(K, D): distinct random rows of all processes' z (N, D), the same on every process. Rows
        of zero weight (N, 1) come last."""
        rank = dist.get_rank() if world_size() > 1 else 0
        total = len(z) * world_size()
        draw = torch.rand(total, device=z.device)
        counts = torch.zeros_like(draw)
        counts[rank * len(z):(rank + 1) * len(z)] = (weight > 0).squeeze(1).to(draw)
        if world_size() > 1:
            dist.broadcast(draw, 0)
            dist.all_reduce(counts)
        tiles = math.ceil(self.codebook_size / total)  # with few vectors: repeat, with noise
        order = (draw + counts).argsort(descending=True)
        chosen = order.repeat(tiles)[:self.codebook_size]
        mine = (chosen // len(z) == rank).unsqueeze(1)
        vectors = torch.where(mine, z[chosen % len(z)], 0.0)
        if tiles > 1 and rank == 0:
            vectors += torch.rand_like(vectors) * 0.01 / math.sqrt(self.dim)
        if world_size() > 1:
            dist.all_reduce(vectors)
        return vectors


def rotate(z: Tensor, e: Tensor) -> Tensor:
    """z (..., D), turned and scaled to e by a map that its gradient sees as a constant
    (Fifty et al., 2025, sec. 4.2)."""
    a = F.normalize(z.detach(), dim=-1)
    b = F.normalize(e, dim=-1)
    half = F.normalize(a + b, dim=-1)
    reflected = z - 2 * (z * half).sum(-1, keepdim=True) * half
    turned = reflected + 2 * (z * a).sum(-1, keepdim=True) * b
    scale = e.norm(dim=-1, keepdim=True) / z.detach().norm(dim=-1, keepdim=True).clamp(min=1e-6)
    return turned * scale


def entropies(logits: Tensor) -> Tensor:
    """Mean entropy of p = softmax(logits), (N, K), minus the entropy of the mean p."""
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    return -(p * log_p).sum(1).mean() - entropy_of_mean(p)


def entropy_of_mean(p: Tensor) -> Tensor:
    """Entropy of the mean of all processes' p (N, K). Its gradient is this process's, such that
    the average over processes is exact."""
    mean = p.mean(0)
    if world_size() > 1:
        everywhere = mean.detach().clone()
        dist.all_reduce(everywhere)
        mean = everywhere / world_size() + (mean - mean.detach())
    return -(mean * mean.clamp(min=1e-5).log()).sum()


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Encoder(nn.Module):
    """Images (B, 3, H, W) to (B, z_channels, h, w)."""

    def __init__(self, down: DownPath, z_channels: int):
        super().__init__()
        self.down = down
        self.neck = Neck(down.channels[-1], z_channels)

    def forward(self, images: Tensor) -> Tensor:
        return self.neck(self.down(images)[-1])


class Decoder(nn.Module):
    """(B, z_channels, h, w) to the input (B, C, H, W) of the last layer."""

    def __init__(self, up: UpPath, z_channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(z_channels, up.channels[0], 3, padding=1)
        self.mid = Mid(up.channels[0])
        self.up = up

    def forward(self, z: Tensor) -> Tensor:
        return self.up(self.mid(self.conv_in(z)))


class DownPath(nn.Module):
    """The downsampling half of the encoder: features of every level, finest first."""

    def __init__(self, image_size: int | list[int], ch: int, ch_mult: list[int],
                 num_res_blocks: int, attn_resolutions: list[int]):
        super().__init__()
        self.channels = [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.levels = nn.ModuleList()
        self.downs = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([ch, *self.channels], self.channels)):
            if i > 0:
                conv = nn.Conv2d(c_in, c_in, 3, stride=2)
                self.downs.append(nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv))
            attention = min(sides(image_size)) // 2**i in attn_resolutions
            self.levels.append(Level(c_in, c_out, num_res_blocks, attention))

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to a list of (B, channels[i], H / 2**i, W / 2**i)."""
        x = self.levels[0](self.conv_in(images))
        features = [x]
        for down, level in zip(self.downs, self.levels[1:]):
            x = level(down(x))
            features.append(x)
        return features


class UpPath(nn.Module):
    """The upsampling half of the decoder: (B, channels[0], h, w) to normalised features
    (B, channels[-1], H, W)."""

    def __init__(self, image_size: int | list[int], ch: int, ch_mult: list[int],
                 num_res_blocks: int, attn_resolutions: list[int]):
        super().__init__()
        self.channels = [ch * m for m in ch_mult[::-1]]  # coarsest first
        self.levels = nn.ModuleList()
        self.ups = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([self.channels[0], *self.channels], self.channels)):
            if i > 0:
                conv = nn.Conv2d(c_in, c_in, 3, padding=1)
                self.ups.append(nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest"), conv))
            size = min(sides(image_size)) // 2 ** (len(ch_mult) - 1 - i)
            self.levels.append(Level(c_in, c_out, num_res_blocks, size in attn_resolutions))
        self.norm_out = group_norm(self.channels[-1])

    def forward(self, x: Tensor) -> Tensor:
        x = self.levels[0](x)
        for up, level in zip(self.ups, self.levels[1:]):
            x = level(up(x))
        return F.silu(self.norm_out(x))


class Level(nn.Module):
    """Residual blocks at one resolution, optionally each with attention."""

    def __init__(self, c_in: int, c_out: int, num_res_blocks: int, attention: bool):
        super().__init__()
        self.blocks = nn.ModuleList()
        self.attns = nn.ModuleList()
        for i in range(num_res_blocks):
            self.blocks.append(ResBlock(c_in if i == 0 else c_out, c_out))
        for _ in range(num_res_blocks):
            self.attns.append(Attention(c_out) if attention else nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        for block, attn in zip(self.blocks, self.attns):
            x = attn(block(x))
        return x


class Mid(nn.Module):
    """The lowest resolution: residual block, attention, residual block."""

    def __init__(self, channels: int):
        super().__init__()
        self.block1 = ResBlock(channels, channels)
        self.attn = Attention(channels)
        self.block2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block2(self.attn(self.block1(x)))


class Neck(nn.Module):
    """The end of the encoder, (B, channels, h, w) to (B, z_channels, h, w)."""

    def __init__(self, channels: int, z_channels: int):
        super().__init__()
        self.mid = Mid(channels)
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class ResBlock(nn.Module):
    """Norm, SiLU, 3x3 conv, twice; a 1x1 conv on the skip if the channels change."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class Attention(nn.Module):
    """Single-head self-attention over the cells of a feature map, with a residual connection."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.qkv.parts = 3  # matrices, for muon.py
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, key_weight: Tensor | None = None) -> Tensor:
        """(B, C, h, w) to (B, C, h, w). key_weight (B, h * w) multiplies the attention weights of
        each key after the softmax."""
        B, C, h, w = x.shape
        qkv = self.qkv(self.norm(x)).view(B, 3, C, h * w)
        qkv = qkv.transpose(2, 3).contiguous()  # fused attention kernels want the channels last
        q, k, v = qkv.unsqueeze(2).unbind(1)                            # (B, 1, hw, C) each
        if key_weight is not None:
            v = v * key_weight.view(B, 1, h * w, 1).to(v)  # sum_j (p_ij m_j) v_j
        a = F.scaled_dot_product_attention(q, k, v)                     # (B, 1, hw, C)
        return x + self.out(a.squeeze(1).transpose(1, 2).reshape(B, C, h, w))


class SimpleResBlock(nn.Module):
    """ReLU, 3x3 conv, ReLU, 1x1 conv, no biases. The skip carries relu(x), as in the release."""

    def __init__(self, ch: int):
        super().__init__()
        self.conv1 = nn.Conv2d(ch, ch, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(ch, ch, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return x + self.conv2(F.relu(self.conv1(x)))


def group_norm(channels: int) -> nn.GroupNorm:
    if channels % 32:
        raise ValueError("channels must be a multiple of 32, because GroupNorm has 32 groups; "
                         f"there are {channels}")
    return nn.GroupNorm(32, channels, eps=1e-6)


def sides(size: int | list[int]) -> tuple[int, int]:
    """(height, width) of a size: a side or [height, width]."""
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


def check_size(images: Tensor, factor: int) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or any(n % factor for n in images.shape[2:]):
        raise ValueError(f"images must be (B, 3, H, W) with H and W divisible by {factor}; they "
                         f"are {tuple(images.shape)}")
