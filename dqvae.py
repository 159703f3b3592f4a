"""DQ-VAE: few codes for smooth regions, many for detailed ones.

    DQVAE           "Towards Accurate Image Coding: Improved Autoregressive Image Generation with
                    Dynamic Vector Quantization" (Huang et al., CVPR 2023), sec. 3.2, for two or
                    three granularities
    FeatureRouter   predicts the error that each granularity would leave in a region; where it falls
                    most, the region is refined
    DQVAE.entropy   the router without learning: the entropy of a region's pixels

A region is a cell of the coarsest grid. With factors [16, 8], coarse regions have 1 code and fine
ones 2 x 2. Thresholds on a region's score give the shares. Interface as in vqgan.py; images are
float tensors (B, 3, H, W) in [-1, 1].

    model = DQVAE(image_size=256, factors=[16, 8], ratios=[0.5])
    codes = model.encode(images)    # {"indices": int64 (B, 32, 32), "grain": int64 (B, 16, 16)}
    images = model.decode(codes)

`grain` is the granularity map, 0 = coarsest. `indices` are on the finest grid; a coarser code is
repeated over its cells. With ratios=[[0.1, 0.9]], one model serves any rate:
model.encode(images, ratios=[0.4]).
Differences from the release: how the feature router learns (`explore`) and ema_weighted, both
undone by release_training=True; entropy thresholds use the router's own bins. Copy with vqgan.py.
"""

import math
import warnings
from functools import partial
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from vqgan import (
    Codes, Decoder, DownPath, Neck, Output, Tokenizer, UpPath, VectorQuantizer, check_size,
    conv3x3, group_norm, pair, sides, sum_over_processes, world_size)

COLOURS = [[0.1, 0.3, 1.0], [1.0, 0.85, 0.1], [1.0, 0.1, 0.1]]  # of granularities, in pictures
PERCENTILES = 99  # thresholds of a model for any rate


class DQVAE(Tokenizer):
    """Encoder with one output per granularity, router, quantizer, decoder.

    image_size         of the training images, a side or [height, width]. Any size divisible by the
                       coarsest factor works; the decoder's learned positions are interpolated
    factors            image side / grid side of each granularity, coarsest first: [16, 8] or
                       [32, 16, 8]
    ratios             share of regions of each granularity but the coarsest: [0.3, 0.3] = 30 %
                       medium, 30 % fine; or ranges, [[0.1, 0.4], [0.1, 0.4]], from which `schedule`
                       draws each training step's shares, and users choose
    budget_weight      gamma of the budget loss, by which the release's training keeps the ratios
    ema_weighted       a code repeated over 4 (16) cells counts once in EMA, as in the losses;
                       False: 4 (16) times (release)
    release_training   train with the release's gradients and ema_weighted=False; also an attribute
    ch, ch_mult, num_res_blocks, attn_resolutions, z_channels    of the encoder, as in VQGAN
    decoder_ch_mult, decoder_attn_resolutions       of the decoder, which starts at the finest grid

    Call `schedule` before each training step: with the feature router, more regions are routed at
    random at first. Without it, the model trains as at the end, with the middle of each range.
    """

    code_names = ("indices", "grain")

    def __init__(self, image_size: int | list[int] = 256, factors: list[int] = (16, 8),
                 ratios: list[float | list[float]] = (0.5,),
                 router: Literal["feature", "entropy"] = "feature", budget_weight: float = 10.0,
                 ema_weighted: bool = True, ch: int = 128, ch_mult: list[int] = (1, 1, 2, 2, 4),
                 num_res_blocks: int = 2, attn_resolutions: list[int] = (16, 32),
                 z_channels: int = 256, decoder_ch_mult: list[int] = (1, 1, 2, 2),
                 decoder_attn_resolutions: list[int] = (32,),
                 quantizer: VectorQuantizer | None = None, release_training: bool = False):
        quantizer = quantizer or VectorQuantizer(ema_decay=0.98)
        super().__init__(list(factors), quantizer, check_ratios(ratios, len(factors)))
        self.grains = len(factors)
        check_factors(self.factors, len(ch_mult), len(decoder_ch_mult))
        self.any_rate = self.rate_range is not None
        self.image_size = image_size
        self.budget_weight = budget_weight
        self.ema_weighted = ema_weighted
        self.release_training = release_training
        self._calibrated = False
        self.set_image_size(image_size)
        if self.any_rate and release_training and router == "feature":
            raise ValueError("ranges as ratios need thresholds, which the feature router has only "
                             "without release_training")

        self.down = DownPath(image_size, ch, ch_mult, num_res_blocks, attn_resolutions)
        channels = self.down.channels[:-self.grains - 1:-1]             # coarsest first
        self.necks = nn.ModuleList(Neck(c, z_channels) for c in channels)
        self.router = FeatureRouter(z_channels, self.grains) if router == "feature" else None
        # Thresholds on the entropy, or on the gain that the feature router predicts, and the share
        # of regions above each; NaN: not known yet.
        self.shares = self._shares(None)
        if self.any_rate:
            self.shares = [1 - p / (PERCENTILES + 1) for p in range(1, PERCENTILES + 1)]
        self.register_buffer("thresholds", torch.full((len(self.shares),), math.nan))
        self.pre_quant = nn.Conv2d(z_channels, quantizer.dim, 1)
        self.post_quant = nn.Conv2d(quantizer.dim, z_channels, 1)
        height, width = (side // factors[-1] for side in sides(image_size))
        self.position = PositionEmbedding(z_channels, height, width)
        up = UpPath(image_size, ch, decoder_ch_mult, num_res_blocks + 1, decoder_attn_resolutions)
        self.decoder = Decoder(up, z_channels)
        self.to_image = conv3x3(up.channels[-1], 3)

    def forward(self, images: Tensor, ratios: list[float] | None = None) -> Output:
        """Images (B, 3, H, W) to an `Output` with the quantizer's losses and, for the feature
        router, `router` (or `budget`, in the release's training). ratios: as in `encode`."""
        if self.training and ratios is None:
            ratios = self.training_ratios
        features = self.features(images)
        grain, gate, errors = self.route(images, features, ratios)      # (B, h', w')
        z = self.vectors(features, grain, gate)                         # (B, h, w, D)
        cells = self.to_finest(grain)                                   # (B, h, w)
        loss_weight = torch.pow(4.0, cells - (self.grains - 1))  # 1/4 for a code over 4 cells
        once = self.ema_weighted and not self.release_training
        ema_weight = self.first_cells(cells) if once else None
        z_q, indices, losses, info = self.quantizer(z, loss_weight, ema_weight)
        codes = {"indices": self.same_within_code(indices, cells), "grain": grain}
        if not self.training:
            z_q = self.quantizer.lookup(codes["indices"])
        recon = self._decode(z_q)                                       # (B, 3, H, W)
        if gate is not None:
            losses["budget"] = budget(gate, self.ratios, self.budget_weight)
        router_loss = None
        if errors is not None:
            router_loss = partial(self.router_loss, errors, grain)
            losses["router"] = router_loss((recon.detach().float() - images).square().mean(1))
        for name, numbers in self.counts(codes).items():
            info[name] = numbers.float().mean()
        if not self.training:
            info |= self.maps(codes, images)
        return Output(recon, codes, losses, info, router_loss)

    def encode(self, images: Tensor, ratios: list[float] | None = None) -> Codes:
        """Images (B, 3, H, W) to {"indices": int64 (B, h, w), "grain": int64 (B, h', w')}, on the
        finest and coarsest grid. ratios: shares of regions of each granularity but the coarsest,
        if not those of the model or the middle of its ranges."""
        features = self.features(images)
        grain = self.route(images, features, ratios)[0]                 # (B, h', w')
        indices = self.quantizer.nearest(self.vectors(features, grain))
        return {"indices": self.same_within_code(indices, self.to_finest(grain)), "grain": grain}

    def _decode(self, z_q):
        z = self.post_quant(z_q.permute(0, 3, 1, 2).contiguous())       # (B, z_channels, h, w)
        return self.to_image(self.decoder(self.position(z)))            # (B, 3, H, W)

    def features(self, images):
        """Images to the features (B, z, H / f, W / f) of each granularity, coarsest first."""
        check_size(images, self.factor)
        levels = self.down(images)[:-self.grains - 1:-1]
        return [neck(x) for neck, x in zip(self.necks, levels)]

    def vectors(self, features, grain, gate=None):
        """Each finest cell's vector (B, h, w, D), of its region's granularity. A gate
        (B, G, h', w'), whose value there is 1, gets a gradient."""
        size = features[-1].shape[-2:]
        cells = self.to_finest(grain).unsqueeze(1)                      # (B, 1, h, w)
        z = F.interpolate(features[0], size)                            # (B, z, h, w)
        for g in range(1, self.grains):
            z = torch.where(cells == g, F.interpolate(features[g], size), z)
        if gate is not None:
            z = z * F.interpolate(gate.gather(1, grain.unsqueeze(1)), size)
        return self.pre_quant(z).permute(0, 2, 3, 1)

    # Routing

    def route(self, images, features, ratios):
        """The grain (B, h', w'), and what the feature router learns by: the release's gate, or the
        predicted errors, (B, G, h', w')."""
        shares = self._shares(ratios)
        if self.router is None:
            return self.refine(self.entropy(images), shares), None, None
        if self.release_training:
            gate = self.release_gate(features)
            return gate.argmax(1), gate, None
        # contiguous: torch's GroupNorm crashes on CPUs if a channels-last input needs no gradient.
        features = [x.detach().contiguous() for x in features]
        errors = F.softplus(self.router(features))
        gain = (errors[:, 0] - errors[:, -1]).detach()                  # (B, h', w')
        grain = self.explore(gain, shares) if self.router.training else self.refine(gain, shares)
        return grain, None, errors

    def refine(self, score, shares):
        """The granularity of each region: how many thresholds its score (B, h', w') exceeds. Those
        for any rate are percentiles, between which the shares' are interpolated."""
        if self.router is None and not self._calibrated and self.thresholds.isnan().any():
            raise ValueError("the entropy router has no thresholds yet; call calibrate or "
                             "set_thresholds first")
        self._calibrated = True  # checked once, because it waits for the GPU
        thresholds = self.thresholds
        if self.any_rate:
            places = [min(max(round(PERCENTILES - 100 * share, 6), 0), 98) for share in shares]
            thresholds = torch.stack([thresholds[int(p)].lerp(thresholds[math.ceil(p)], p % 1)
                                      for p in places])
        return (score.unsqueeze(-1) > thresholds.nan_to_num(0.0)).sum(-1)

    @torch.no_grad()
    def explore(self, gain, shares):
        """Training, ours, unless the router is frozen in eval mode: refines the regions where the
        predicted error falls most from the coarsest to the finest granularity, by thresholds of the
        batch. Evaluation uses their moving average, of all processes. Some regions are routed at
        random (40 % at first, 5 % from half-way), so that errors of all granularities are seen."""
        grain = (gain.unsqueeze(-1) > quantiles(gain, shares)).sum(-1)  # (B, h', w')
        thresholds = sum_over_processes(quantiles(gain, self.shares)) / world_size()
        moved = self.thresholds.lerp(thresholds, 0.05)
        self.thresholds.copy_(torch.where(self.thresholds.isfinite(), moved, thresholds))
        number = torch.rand_like(gain)
        anything = sum((number < share).long() for share in shares)
        explored = torch.rand_like(gain) < max(0.05, 0.4 * (1 - self.progress / 0.5))
        return torch.where(explored, anything, grain)

    def release_gate(self, features):
        """Training, the release's: granularities are sampled, as a gate (B, G, h', w') that the
        features are multiplied by and that the budget loss counts. In evaluation, the likeliest."""
        logits = self.router(features)
        if self.training:
            return F.gumbel_softmax(logits, tau=1, hard=True, dim=1)
        return F.one_hot(logits.argmax(1), self.grains).permute(0, 3, 1, 2).float()

    def router_loss(self, errors, grain, error):
        """Regression of each region's error, relative to the batch's mean, at the granularity that
        it had. error (B, H, W) is squared, or the loss that is trained. (Routers that learned by
        straight-through gradients came to refine much the same places in all images.)"""
        error = F.avg_pool2d(error, self.factor)                        # (B, h', w')
        predicted = errors.gather(1, grain.unsqueeze(1)).squeeze(1)     # (B, h', w')
        return 0.1 * (predicted - error / error.mean().clamp(min=1e-12)).square().mean()

    @torch.no_grad()
    def entropy(self, images: Tensor) -> Tensor:
        """The entropy router's score: the entropy of the grey values of images (B, 3, H, W) in each
        region, in nats (B, h', w'), float32: 32 bins, linspace(-1, 1), with a Gaussian kernel of
        sigma 0.01."""
        check_size(images, self.factor)
        with torch.autocast(images.device.type, enabled=False):
            r, g, b = images.float().split(1, dim=1)
            grey = 0.2989 * r + 0.5870 * g + 0.1140 * b                 # (B, 1, H, W)
            p = []
            for center in torch.linspace(-1, 1, 32).tolist():  # one bin at a time saves memory
                kernel = torch.exp(-0.5 * ((grey - center) / 0.01).square())
                p.append(F.avg_pool2d(kernel, self.factor))
            p = torch.cat(p, dim=1)                                     # (B, 32, h', w')
            p = p / p.sum(1, keepdim=True)
            return torch.special.entr(p).sum(1)  # entr(0) = 0, even if subnormals are flushed

    @torch.no_grad()
    def calibrate(self, batches) -> dict:
        """Sets the entropy router's thresholds so that `ratios` hold on batches of images
        (B, 3, H, W); for any rate, all percentiles. Returns them with their settings, for a file;
        {} for the feature router."""
        if self.router is not None:
            return {}
        entropy = [self.entropy(images).flatten().cpu() for images in batches]
        if not entropy:
            raise ValueError("calibration of the thresholds needs at least one image")
        entropy = torch.cat(entropy).sort().values
        places = [int((1 - share) * len(entropy)) for share in self.shares]
        thresholds = entropy[places].tolist()
        self.set_thresholds(thresholds, self.factor)
        return {"patch_size": self.factor, "image_size": self.image_size, "ratios": self.ratios,
                "thresholds": thresholds, "regions": len(entropy)}

    def set_thresholds(self, thresholds: list[float], patch_size: int):
        """Sets ascending thresholds (G - 1), or for any rate the percentiles 1 to 99, of regions of
        `patch_size` pixels."""
        if self.router is not None:
            raise ValueError("thresholds are for the entropy router; this model routes by features")
        if patch_size != self.factor:
            raise ValueError(f"these thresholds are for regions of {patch_size} x {patch_size} "
                             f"pixels; this model's have {self.factor} x {self.factor}")
        ascending = sorted(thresholds) == list(thresholds) and all(map(math.isfinite, thresholds))
        if len(thresholds) != len(self.thresholds) or not ascending:
            who = "ranges of ratios" if self.any_rate else f"{self.grains} granularities"
            raise ValueError(f"{who} need {len(self.thresholds)} ascending thresholds; they are "
                             f"{len(thresholds)}: {thresholds}")
        self.thresholds.copy_(torch.tensor(thresholds))

    # Rates

    def set_rate(self, rate: float | list[float]):
        """Chooses the shares. One number, their sum, stands for the same place in each range."""
        if not isinstance(rate, list):
            ranges = self.ranges if self.any_rate else [(0.0, r) for r in self.ratios]
            low, high = map(sum, zip(*ranges))
            place = (rate - low) / (high - low)
            rate = [round(low + place * (high - low), 9) for low, high in ranges]
        self._shares(rate)
        self.ratios = rate

    def _shares(self, ratios):
        """The shares of regions that are wanted above each threshold (G - 1)."""
        if ratios is None:
            ratios = self.ratios
        elif not valid_ratios([(r, r) for r in ratios], self.grains):
            raise ValueError(f"ratios must be a list of {self.grains - 1}, above 0 and together "
                             f"less than 1; they are {ratios}")
        elif not self.any_rate and list(ratios) != self.ratios:
            raise ValueError(f"this model was trained for ratios {self.ratios}, not {ratios}; "
                             "ranges as ratios, such as [[0.1, 0.9]], make one for any rate")
        elif any(not low - 1e-9 <= r <= high + 1e-9 for r, (low, high) in zip(ratios, self.ranges)):
            warnings.warn(f"ratios {ratios} are outside of what this model was trained for, "
                          f"{self.ranges}", stacklevel=4)
        return [sum(ratios[g:]) for g in range(self.grains - 1)]

    # Codes

    def maps(self, codes, images):
        """{"grain_map": (B, 3, H, W)}: the images, coarse regions in blue, fine ones in red."""
        colours = torch.tensor(COLOURS[:1] + COLOURS[1 - self.grains:], device=images.device)
        tint = colours[codes["grain"]].permute(0, 3, 1, 2) * 2 - 1      # (B, 3, h', w')
        tint = F.interpolate(tint, images.shape[-2:])
        return {"grain_map": 0.55 * images.mean(1, keepdim=True) + 0.45 * tint}

    def bits(self, codes: Codes) -> Tensor:
        """Bits per image (B,): log2 K per code, log2 G per region for its granularity."""
        return super().bits(codes) + codes["grain"][0].numel() * math.log2(self.grains)

    def spent(self, codes):
        return self.first_cells(self.to_finest(codes["grain"]))

    def counts(self, codes):
        shares = {f"ratio_{g}": (codes["grain"] == g).float().mean((1, 2))
                  for g in range(1, self.grains)}
        return super().counts(codes) | shares

    def to_finest(self, values, g=0):
        """What each cell of granularity g has, to each finest cell, (B, h, w); by default, of each
        region."""
        times = self.factors[g] // self.factors[-1]
        return values.repeat_interleave(times, 1).repeat_interleave(times, 2)

    def first_cells(self, cells):
        """Whether a cell is the first one of its code, (B, h, w); cells: their granularities."""
        times = torch.pow(2, self.grains - 1 - cells)
        y = torch.arange(cells.shape[1], device=cells.device).view(-1, 1)
        x = torch.arange(cells.shape[2], device=cells.device)
        return (y % times == 0) & (x % times == 0)

    def same_within_code(self, indices, cells):
        """Copies each code's first cell to its others, whose equal vectors kernels may round
        differently."""
        for g in range(self.grains - 1):
            times = self.factors[g] // self.factors[-1]
            first = self.to_finest(indices[:, ::times, ::times], g)
            indices = torch.where(cells == g, first, indices)
        return indices


class FeatureRouter(nn.Module):
    """Features (B, C, h_g, w_g) of each granularity, coarsest first, to (B, G, h', w'), float32."""

    def __init__(self, channels, grains):
        super().__init__()
        self.norms = nn.ModuleList(group_norm(channels) for _ in range(grains))
        self.fc1 = nn.Linear(grains * channels, grains * channels)
        self.fc2 = nn.Linear(grains * channels, grains)

    def forward(self, features):
        side = features[0].shape[-1]
        pooled = [F.avg_pool2d(norm(x), x.shape[-1] // side)
                  for norm, x in zip(self.norms, features)]             # (B, C, h', w') each
        x = torch.cat(pooled, dim=1).permute(0, 2, 3, 1)                # (B, h', w', G C)
        return self.fc2(F.silu(self.fc1(x))).permute(0, 3, 1, 2).float()


def check_factors(factors, levels, decoder_levels):
    coarsest = 2 ** (levels - 1)
    finest = 2 ** (decoder_levels - 1)
    halved = [coarsest // 2**g for g in range(len(factors))]
    if len(factors) not in (2, 3) or factors != halved or factors[-1] != finest:
        raise ValueError(f"factors must be two or three, {coarsest} (from ch_mult) halved down to "
                         f"{finest} (from decoder_ch_mult); they are {factors}")


def check_ratios(ratios, grains):
    """The ratios as ranges (low, high)."""
    ranges = [pair(ratio) for ratio in ratios]
    if not valid_ratios(ranges, grains):
        raise ValueError(f"ratios must be {grains - 1} for {grains} factors, above 0 and together "
                         "less than 1, or ranges of such, the lower first; they are "
                         f"{list(ratios)}")
    return ranges


def valid_ratios(ranges, grains):
    """All ratios within the ranges are valid."""
    if len(ranges) != grains - 1 or any(len(ends) != 2 for ends in ranges):
        return False
    return all(0 < low <= high for low, high in ranges) and sum(high for _, high in ranges) < 1


def quantiles(values, shares):
    """The values above which these shares are. (torch.quantile takes at most 2^24 values.)"""
    values = values.flatten().sort().values
    places = torch.tensor([1 - share for share in shares]).to(values) * (len(values) - 1)
    low = places.floor().long()
    return values[low].lerp(values[places.ceil().long()], places - low)


def budget(gate, ratios, weight):
    """The release's loss of a gate (B, G, h', w'). Its code counts, such as sum(g0 + 4 g1), reduce
    to each granularity's mean gate. As there, the weight of three granularities is the finest's."""
    shares = gate.mean((0, 2, 3))
    errors = [(shares[g] - ratio).square() for g, ratio in enumerate(ratios, 1)]
    if len(ratios) == 1:
        return 2 * weight * errors[0]  # the release adds the same term twice
    return errors[0] + weight * errors[1]


class PositionEmbedding(nn.Module):
    """Adds Fourier features of (x, y) and learned vectors per row and column to (B, C, h, w); on
    grids of another size than (height, width), the learned ones are interpolated."""

    def __init__(self, channels, height, width):
        super().__init__()
        self.fourier = nn.Conv2d(2, channels, 1)
        nn.init.uniform_(self.fourier.weight, -math.sqrt(9 / 2), math.sqrt(9 / 2))
        self.rows = nn.Parameter(nn.init.trunc_normal_(torch.empty(height, channels)))
        self.columns = nn.Parameter(nn.init.trunc_normal_(torch.empty(width, channels)))

    def forward(self, z):
        h, w = z.shape[-2:]
        x, y = (torch.linspace(-1, 1, side, device=z.device) for side in (w, h))
        xy = torch.stack(torch.meshgrid(x, y, indexing="xy")).unsqueeze(0)      # (1, 2, h, w)
        learned = stretched(self.rows, h).unsqueeze(2) + stretched(self.columns, w).unsqueeze(1)
        return z + torch.sin(self.fourier(xy)) + learned


def stretched(vectors, n):
    """Vectors (m, C) as (C, n)."""
    vectors = vectors.t()
    if vectors.shape[1] == n:
        return vectors
    return F.interpolate(vectors.unsqueeze(0), n, mode="linear", align_corners=True)[0]
