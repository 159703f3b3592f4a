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
from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Codes = dict[str, Tensor]  # int64 tensors: all that is needed to decode images
Decay = Annotated[float, (0, 1 - 1e-9)]  # the range that a config file may use
Temperature = Annotated[float, (1e-9, 1e9)]


class Output(NamedTuple):
    """What a stage-1 model returns."""

    images: Tensor  # (B, 3, H, W): the reconstruction
    codes: Codes
    losses: dict[str, Tensor]  # scalars to add to the reconstruction loss
    info: dict[str, Tensor]  # scalars to log; maps (B, 1 or 3, h, w) in [-1, 1] to draw
    router_loss: Callable[[Tensor], Tensor] | None = None  # of each pixel's loss (B, H, W); DQ-VAE


class Tokenizer(nn.Module):
    """Base of the stage-1 models: images to codes and back.

    factors        image side / grid side of each granularity, coarsest first; `factor`: the first
    quantizer      turns vectors (..., D) into codes
    ranges         (low, high) of each share of cells or regions, which differ in a model that is
                   trained for any rate; `rate_range` is their sum then, else None
    """

    code_names = ("indices",)
    progress = 1.0  # of training, 0 to 1

    def __init__(self, factors: list[int], quantizer: Quantizer, ranges=((1.0, 1.0),)):
        super().__init__()
        self.factors = factors
        self.factor = factors[0]
        self.quantizer = quantizer
        if quantizer.depth and len(self.code_names) > 1:
            raise ValueError("DQ-VAE and MQ-VAE cannot read several codes per cell; give a "
                             "ResidualVQ to a VQGAN")
        self.ranges = ranges
        self.ratios = [(low + high) / 2 for low, high in ranges]  # if nothing else is asked for
        self.training_ratios = self.ratios
        low, high = map(sum, zip(*ranges))
        self.rate_range = (low, high) if low < high else None

    def schedule(self, step: int, max_steps: int, seed: int = 0):
        """Sets what changes over training; to be called before each step, numbered from 0. The
        step's shares are drawn from (seed, step), the same on all processes."""
        self.progress = step / max_steps
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        drawn = torch.rand(len(self.ranges), generator=generator).tolist()
        self.training_ratios = [low + (high - low) * x
                                for (low, high), x in zip(self.ranges, drawn)]

    def calibrate(self, batches) -> dict:
        """Computes what encoding must know of training images, and returns it for a file."""
        return {}

    def set_thresholds(self, thresholds: list[float], patch_size: int):
        """Sets what `calibrate` would compute; ValueError if it computes nothing."""
        raise ValueError("thresholds are for a DQ-VAE with an entropy router")

    def set_image_size(self, size: int | list[int]):
        """Announces the images' size, a side or [height, width]; ValueError if it does not fit."""
        if any(side % self.factor for side in sides(size)):
            raise ValueError(f"image_size must be divisible by {self.factor}, the model's "
                             f"downsampling factor; it is {size}")

    def set_rate(self, rate: float | list[float]):
        """Chooses the rate of a model that was trained for any; ValueError if it has one only."""
        raise ValueError(f"a {type(self).__name__} has one rate only; MQ-VAE and DQ-VAE can be "
                         "trained for a range")

    def decode(self, codes: Codes) -> Tensor:
        """Codes to images (B, 3, H, W)."""
        return self._decode(self.quantizer.lookup(codes["indices"]))

    def maps(self, codes: Codes, images: Tensor) -> dict[str, Tensor]:
        """Pictures (B, 1 or 3, h, w) in [-1, 1] of where the codes go: none for a plain grid."""
        return {}

    def spent(self, codes: Codes) -> Tensor:
        """Which of codes["indices"] are paid for, bool of their shape."""
        return torch.ones_like(codes["indices"], dtype=torch.bool)

    def bits(self, codes: Codes) -> Tensor:
        """Bits per image (B,): log2 K per code."""
        return self.spent(codes).flatten(1).sum(1) * math.log2(self.quantizer.codebook_size)

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

    def __init__(self, encoder, decoder, to_image, z_channels, factor, quantizer):
        super().__init__([factor], quantizer)
        self.encoder = encoder
        self.pre_quant = nn.Conv2d(z_channels, quantizer.dim, 1)
        self.post_quant = nn.Conv2d(quantizer.dim, z_channels, 1)
        self.decoder = decoder
        self.to_image = to_image

    def forward(self, images: Tensor) -> Output:
        """Images (B, 3, H, W) to an `Output` with the quantizer's losses."""
        z_q, indices, losses, info = self.quantizer(self.latents(images))
        return Output(self._decode(z_q), {"indices": indices}, losses, info)

    def encode(self, images: Tensor) -> Codes:
        """Images (B, 3, H, W) to {"indices": int64 (B, H / factor, W / factor)}."""
        return {"indices": self.quantizer.nearest(self.latents(images))}

    def latents(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to vectors (B, h, w, D). ValueError unless factor divides H and W."""
        check_size(images, self.factor)
        z = self.encoder(images)                                        # (B, z_channels, h, w)
        return self.pre_quant(z).permute(0, 2, 3, 1)                    # (B, h, w, D)

    def _decode(self, z_q):
        z = self.post_quant(z_q.permute(0, 3, 1, 2).contiguous())       # (B, z_channels, h, w)
        return self.to_image(self.decoder(z))                           # (B, 3, H, W)


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
            encoder, Decoder(up, z_channels), conv3x3(up.channels[-1], 3), z_channels,
            factor=2 ** (len(ch_mult) - 1), quantizer=quantizer or VectorQuantizer())


class VQVAE(VQModel):
    """The small VQ-VAE ("SimpleCNN") of visual-tokenizer-pytorch, for a study of collapse; f = 4.

    ch                 channels; half as many at half resolution
    num_res_blocks     in the encoder and in the decoder
    """

    def __init__(self, ch: Annotated[int, (2, 2**31)] = 256,
                 num_res_blocks: Annotated[int, (0, 2**31)] = 2,
                 quantizer: VectorQuantizer | None = None):
        leaky = nn.LeakyReLU()
        encoder = nn.Sequential(
            nn.Conv2d(3, ch // 2, 4, 2, 1), leaky,
            nn.Conv2d(ch // 2, ch, 4, 2, 1), leaky,
            conv3x3(ch, ch),
            *[SimpleResBlock(ch) for _ in range(num_res_blocks)])
        decoder = nn.Sequential(
            *[SimpleResBlock(ch) for _ in range(num_res_blocks)], leaky,
            conv3x3(ch, ch), leaky,
            nn.ConvTranspose2d(ch, ch // 2, 4, 2, 1), leaky)
        super().__init__(
            encoder, decoder, nn.ConvTranspose2d(ch // 2, 3, 4, 2, 1), z_channels=ch, factor=4,
            quantizer=quantizer or VectorQuantizer())

    def _decode(self, z_q):
        return super()._decode(z_q).tanh()


class Quantizer(nn.Module):
    """Base of the quantizers: K = `codebook_size`, D = `dim`; counts the codes chosen last.

    A quantizer defines, all in float32:

    quantize(z, weight)    vectors (..., D), normalized, and their weights in the losses, (..., 1)
                           or 1, to (z_q, indices, losses)
    choose(z)              the same vectors to indices (...)
    lookup(indices)        indices (...) to codes (..., D)
    """

    depth = 0  # codes per vector, if `indices` have a last axis for them
    codebooks = 1
    has_codebook = False  # `codebook` (K, D) is learned
    l2_norm = False  # compares unit vectors
    accumulation_steps = 1  # see VectorQuantizer

    def __init__(self, codebook_size: int, dim: int, queue_size: int):
        super().__init__()
        self.codebook_size = codebook_size
        self.dim = dim
        self.register_buffer("queue", torch.full((queue_size,), -1, dtype=torch.int32))  # -1: none

    def forward(self, z: Tensor, loss_weight: Tensor | None = None,
                ema_weight: Tensor | None = None):
        """Vectors (..., D) to (z_q (..., D) float32, indices int64 (...), losses, info).

        loss_weight    (...): of each vector in codebook and commitment loss (still plain means)
        ema_weight     (...): of each vector in the moving averages; 0: never a restarted code
        """
        with torch.autocast(z.device.type, enabled=False):
            z = self.normalize(z.float())
            weight = 1.0 if loss_weight is None else loss_weight.unsqueeze(-1)
            z_q, indices, losses = self.quantize(z, weight)
            if self.training:
                self.record(indices)
                self.learn(z.detach(), indices, ema_weight)
        info = {"usage": self.usage(), "perplexity": self.perplexity(indices)}
        return z_q, indices, losses, info

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Vectors (..., D) to the indices of the nearest codes, int64 (...)."""
        with torch.autocast(z.device.type, enabled=False):
            return self.choose(self.normalize(z.float()))

    def normalize(self, x: Tensor) -> Tensor:
        """Vectors (..., D) as they are compared."""
        return F.normalize(x, dim=-1) if self.l2_norm else x

    def learn(self, z, indices, ema_weight):
        """What training changes other than by gradients."""

    @torch.no_grad()
    def record(self, indices: Tensor):
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
        indices = indices.flatten()
        counts = torch.zeros(self.codebook_size, device=indices.device)
        ones = torch.ones_like(indices, dtype=counts.dtype)
        p = counts.index_add_(0, indices, ones) / len(indices)
        return torch.exp(-(p * (p + 1e-10).log()).sum())


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
    SQUARES = 1  # 0: chooses by the largest dot product, not by the smallest distance
    has_codebook = True

    def __init__(self, codebook_size: int = 1024, dim: int = 256, beta: float = 0.25,
                 legacy: bool = False, l2_norm: bool = False,
                 ema_decay: Decay | None = None, ema_eps: float = 1e-5, restart: bool = True,
                 entropy_weight: float = 0.0, entropy_temperature: Temperature = 0.01,
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
        self._gathered = []  # see learn
        if ema_decay is not None:
            # From 0, most codes restart as vectors of the first batches. Without restarts, unused
            # codes would be divided by almost 0.
            count = torch.zeros(codebook_size) if restart else torch.ones(codebook_size)
            self.register_buffer("ema_count", count)
            self.register_buffer("ema_sum", self.codebook.detach().clone())

    def make_codebook(self):
        codebook = torch.empty(self.codebook_size, self.dim)
        codebook.uniform_(-1 / self.codebook_size, 1 / self.codebook_size)
        self.codebook = nn.Parameter(self.normalize(codebook), self.ema_decay is None)

    def quantize(self, z, weight):
        indices = self.choose(z)
        z_q = self.lookup(indices)
        losses = {
            "codebook": ((z_q - z.detach()).square() * weight).mean(),
            "commitment": ((z_q.detach() - z).square() * weight).mean()}
        losses["codebook" if self.legacy else "commitment"] *= self.beta
        if self.entropy_weight > 0 and self.training:
            vectors = z.flatten(0, -2)                                  # (N, D)
            codes = self.normalize(self.codebook.clone())  # EMA changes it before backward
            distance = (vectors.square().sum(1, keepdim=True) + codes.square().sum(1)
                        - 2 * vectors @ codes.t())                      # (N, K)
            entropy = entropies(-distance / self.entropy_temperature)
            losses["entropy"] = self.entropy_weight * entropy
        moved = rotate(z, z_q.detach()) if self.rotation else z
        z_q = z_q.detach() + (moved - moved.detach())  # the value of z_q, the gradient of z
        return z_q, indices, losses

    @torch.no_grad()
    def choose(self, z):
        codes = self.normalize(self.codebook.float())
        # ||z - e||^2 = ||z||^2 + ||e||^2 - 2 z.e, and ||z||^2 is the same for all codes.
        squares = codes.square().sum(1)
        rows = max(1, self.CHUNK // self.codebook_size)
        nearest = [torch.addmm(squares, part, codes.t(), beta=self.SQUARES, alpha=-2).argmin(1)
                   for part in z.flatten(0, -2).split(rows)]
        return torch.cat(nearest).view(z.shape[:-1])

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (...) to codes (..., D), float32."""
        return self.normalize(F.embedding(indices, self.codebook.float()))

    def learn(self, z, indices, ema_weight):
        """EMA: collects vectors; updates the codebook every `accumulation_steps` calls."""
        if self.ema_decay is None:
            return
        weight = torch.ones_like(indices) if ema_weight is None else ema_weight
        self._gathered.append((z.flatten(0, -2), indices.flatten(), weight.to(z).reshape(-1, 1)))
        if len(self._gathered) >= self.accumulation_steps:
            self._ema_update(*map(torch.cat, zip(*self._gathered)))
            self._gathered = []

    @torch.no_grad()
    def _ema_update(self, z, indices, weight):
        """One EMA step from vectors (N, D), indices (N,) and weights (N, 1)."""
        totals = z.new_zeros(self.codebook_size, self.dim + 1)  # sums of vectors, and their weight
        totals.index_add_(0, indices, torch.cat([z * weight, weight], dim=1))
        sum_over_processes(totals)
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
        olds = self.ema_sum, self.ema_count, self.codebook
        for old, new in zip(olds, (ema_sum, ema_count, codebook)):
            old.copy_(torch.where(finite, new, old))

    def _random_vectors(self, z, weight):
        """(K, D): distinct random rows of all processes' z (N, D), the same on every process. Rows
        of zero weight (N, 1) come last."""
        rank = dist.get_rank() if world_size() > 1 else 0
        draws = torch.rand(world_size() * len(z), device=z.device)
        draws *= rank == 0  # the first process's are everybody's
        draws[rank * len(z):(rank + 1) * len(z)] += weight[:, 0] > 0
        order = sum_over_processes(draws).argsort(descending=True)
        tiles = math.ceil(self.codebook_size / len(order))  # with few vectors: repeat, with noise
        chosen = order.repeat(tiles)[:self.codebook_size]
        mine = (chosen // len(z) == rank).unsqueeze(1)
        vectors = torch.where(mine, z[chosen % len(z)], 0.0)
        if tiles > 1 and rank == 0:
            vectors += torch.rand_like(vectors) * 0.01 / math.sqrt(self.dim)
        return sum_over_processes(vectors)


def rotate(z, e):
    """z (..., D), turned and scaled to e by a map that its gradient sees as a constant
    (Fifty et al., 2025, sec. 4.2)."""
    a = F.normalize(z.detach(), dim=-1)
    b = F.normalize(e, dim=-1)
    half = F.normalize(a + b, dim=-1)
    reflected = z - 2 * (z * half).sum(-1, keepdim=True) * half
    turned = reflected + 2 * (z * a).sum(-1, keepdim=True) * b
    scale = e.norm(dim=-1, keepdim=True) / z.detach().norm(dim=-1, keepdim=True).clamp(min=1e-6)
    return turned * scale


def entropies(logits):
    """Mean entropy of p = softmax(logits), (N, K), minus the entropy of the mean p."""
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    return -(p * log_p).sum(1).mean() - entropy_of_mean(p)


def entropy_of_mean(p):
    """Entropy of the mean of all processes' p (N, K). Its gradient is this process's, such that
    the average over processes is exact."""
    mean = p.mean(0)
    everywhere = sum_over_processes(mean.detach().clone()) / world_size()
    mean = everywhere + (mean - mean.detach())
    return -(mean * mean.clamp(min=1e-5).log()).sum()


def world_size():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(x):
    """x, which becomes its sum over all processes."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


class Encoder(nn.Module):
    """Images (B, 3, H, W) to (B, z_channels, h, w)."""

    def __init__(self, down, z_channels):
        super().__init__()
        self.down = down
        self.neck = Neck(down.channels[-1], z_channels)

    def forward(self, images):
        return self.neck(self.down(images)[-1])


class Decoder(nn.Sequential):
    """(B, z_channels, h, w) to the input (B, C, H, W) of the last layer."""

    def __init__(self, up, z_channels):
        channels = up.channels[0]
        super().__init__(OrderedDict(
            conv_in=conv3x3(z_channels, channels),
            mid=Mid(channels),
            up=up))


class DownPath(nn.Module):
    """The downsampling half of the encoder: features of every level, finest first. Its settings are
    VQGAN's."""

    def __init__(self, image_size, ch, ch_mult, num_res_blocks, attn_resolutions):
        super().__init__()
        self.channels = [ch * m for m in ch_mult]
        self.conv_in = conv3x3(3, ch)
        self.levels = nn.ModuleList()
        self.downs = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([ch, *self.channels], self.channels)):
            if i > 0:
                conv = nn.Conv2d(c_in, c_in, 3, stride=2)
                self.downs.append(nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv))
            attention = min(sides(image_size)) // 2**i in attn_resolutions
            self.levels.append(Level(c_in, c_out, num_res_blocks, attention))

    def forward(self, images):
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

    def __init__(self, image_size, ch, ch_mult, num_res_blocks, attn_resolutions):
        super().__init__()
        self.channels = [ch * m for m in ch_mult[::-1]]  # coarsest first
        self.levels = nn.ModuleList()
        self.ups = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([self.channels[0], *self.channels], self.channels)):
            if i > 0:
                self.ups.append(nn.Sequential(nn.Upsample(scale_factor=2.0), conv3x3(c_in, c_in)))
            size = min(sides(image_size)) // 2 ** (len(ch_mult) - 1 - i)
            self.levels.append(Level(c_in, c_out, num_res_blocks, size in attn_resolutions))
        self.norm_out = group_norm(self.channels[-1])

    def forward(self, x):
        x = self.levels[0](x)
        for up, level in zip(self.ups, self.levels[1:]):
            x = level(up(x))
        return F.silu(self.norm_out(x))


class Level(nn.Module):
    """Residual blocks at one resolution, optionally each with attention."""

    def __init__(self, c_in, c_out, num_res_blocks, attention):
        super().__init__()
        channels = [c_in, *[c_out] * (num_res_blocks - 1)]
        self.blocks = nn.ModuleList(ResBlock(c, c_out) for c in channels)
        self.attns = nn.ModuleList(
            Attention(c_out) if attention else nn.Identity() for _ in channels)

    def forward(self, x):
        for block, attn in zip(self.blocks, self.attns):
            x = attn(block(x))
        return x


class Mid(nn.Sequential):
    """The lowest resolution: residual block, attention, residual block."""

    def __init__(self, channels):
        super().__init__(OrderedDict(
            block1=ResBlock(channels, channels),
            attn=Attention(channels),
            block2=ResBlock(channels, channels)))


class Neck(nn.Sequential):
    """The end of the encoder, (B, channels, h, w) to (B, z_channels, h, w)."""

    def __init__(self, channels, z_channels):
        super().__init__(OrderedDict(
            mid=Mid(channels),
            norm_out=group_norm(channels),
            silu=nn.SiLU(),
            conv_out=conv3x3(channels, z_channels)))


class ResBlock(nn.Module):
    """Norm, SiLU, 3x3 conv, twice; a 1x1 conv on the skip if the channels change."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = conv3x3(c_in, c_out)
        self.norm2 = group_norm(c_out)
        self.conv2 = conv3x3(c_out, c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class Attention(nn.Module):
    """Single-head self-attention over the cells of a feature map, with a residual connection."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.qkv.parts = 3  # matrices, for muon.py
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x, key_weight=None):
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

    def __init__(self, ch):
        super().__init__()
        self.conv1 = nn.Conv2d(ch, ch, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(ch, ch, 1, bias=False)

    def forward(self, x):
        x = F.relu(x)
        return x + self.conv2(F.relu(self.conv1(x)))


def conv3x3(c_in, c_out):
    return nn.Conv2d(c_in, c_out, 3, padding=1)


def group_norm(channels):
    if channels % 32:
        raise ValueError("channels must be a multiple of 32, because GroupNorm has 32 groups; "
                         f"there are {channels}")
    return nn.GroupNorm(32, channels, eps=1e-6)


def pair(value):
    """A pair as a tuple; a number twice."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value, value)


sides = pair  # (height, width) of a size: a side or [height, width]


def check_size(images, factor):
    if images.ndim != 4 or images.shape[1] != 3 or any(n % factor for n in images.shape[2:]):
        raise ValueError(f"images must be (B, 3, H, W) with H and W divisible by {factor}; they "
                         f"are {tuple(images.shape)}")
