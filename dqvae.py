"""DQ-VAE: few codes for smooth regions, many for detailed ones.

    DQVAE           "Towards Accurate Image Coding: Improved Autoregressive Image Generation with Dynamic Vector
                    Quantization" (Huang et al., CVPR 2023), sec. 3.2, for two or three granularities
    FeatureRouter   predicts the error that each granularity would leave in a region; where it falls most, the region is refined
    grey_entropy    the alternative without learning: entropy of a region's pixels. Thresholds on either give the ratios

A region is a cell of the coarsest grid. With factors [16, 8], coarse regions have 1 code and fine ones 2 x 2. Interface as in vqgan.py;
images are float tensors (B, 3, H, W) in [-1, 1].

    model = DQVAE(image_size=256, factors=[16, 8], ratios=[0.5])
    codes = model.encode(images)        # {"indices": int64 (B, 32, 32), "grain": int64 (B, 16, 16), 0 = coarsest}
    images = model.decode(codes)

With ratios=[[0.1, 0.9]], one model serves any rate: model.encode(images, ratios=[0.4]).
`grain` is the granularity map. `indices` are on the finest grid; a coarser code is repeated over its cells.
Differences from the release: the feature router's training (`_train_ours`) and ema_weighted, both undone by release_training=True; entropy
thresholds are calibrated with the router's own bins. Copy with vqgan.py.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from vqgan import Decoder, DownPath, Neck, Output, UpPath, VectorQuantizer, check_size, group_norm, sides, world_size

COLOURS = [[0.1, 0.3, 1.0], [1.0, 0.85, 0.1], [1.0, 0.1, 0.1]]  # of granularities in pictures, coarsest first


class DQVAE(nn.Module):
    """Encoder with one output per granularity, router, quantizer, decoder.

    image_size         of the training images, a side or [height, width]. Any size divisible by the coarsest factor works; the decoder's
                       learned positions are interpolated
    factors            image side / grid side of each granularity, coarsest first: [16, 8] or [32, 16, 8]
    ratios             target share of regions of each granularity but the coarsest: [0.3, 0.3] = 30 % medium, 30 % fine; or ranges,
                       [[0.1, 0.4], [0.1, 0.4]], from which every training step draws its shares, and from which users choose
    budget_weight      gamma of the budget loss, which keeps the feature router to the ratios in the release's training
    ema_weighted       a code repeated over 4 (16) cells counts once in EMA, as in the losses; False: 4 (16) times (release)
    release_training   train with the release's gradients and ema_weighted=False; also an attribute
    ch, ch_mult, num_res_blocks, attn_resolutions, z_channels    of the encoder, as in VQGAN
    decoder_ch_mult, decoder_attn_resolutions                    of the decoder, which starts at the finest grid

    With the feature router, set `model.progress` to the finished share of the training steps, as train_stage1.py does: regions are
    routed at random more often at first. Left at 1, it trains as at the end. Ranges are drawn from by the attribute `seed`, which
    counts up with each training forward and so is the same in all processes; set it by the step's number to resume exactly.
    """

    def __init__(self, image_size: int | list[int] = 256, factors: list[int] = (16, 8), ratios: list[float | list[float]] = (0.5,),
                 router: Literal["feature", "entropy"] = "feature", budget_weight: float = 10.0, ema_weighted: bool = True,
                 ch: int = 128, ch_mult: list[int] = (1, 1, 2, 2, 4), num_res_blocks: int = 2,
                 attn_resolutions: list[int] = (16, 32), z_channels: int = 256, decoder_ch_mult: list[int] = (1, 1, 2, 2),
                 decoder_attn_resolutions: list[int] = (32,), quantizer: VectorQuantizer | None = None, release_training: bool = False):
        super().__init__()
        grains, coarsest, finest = len(factors), 2 ** (len(ch_mult) - 1), 2 ** (len(decoder_ch_mult) - 1)
        self.ranges = [tuple(r) if isinstance(r, (list, tuple)) else (r, r) for r in ratios]
        self.ratios = [sum(r) / len(r) for r in self.ranges]  # if nothing else is asked for
        self.image_size, self.factors, self.budget_weight, self.seed = image_size, list(factors), budget_weight, 0
        self.grains, self.factor, self.ema_weighted, self.release_training = grains, coarsest, ema_weighted, release_training
        self.progress, self._calibrated = 1.0, False
        quantizer = quantizer or VectorQuantizer(ema_decay=0.98)
        self.down = DownPath(image_size, ch, ch_mult, num_res_blocks, attn_resolutions)
        self.necks = nn.ModuleList(Neck(c, z_channels) for c in self.down.channels[-1:-grains - 1:-1])  # coarsest first
        self.router = FeatureRouter(z_channels, grains) if router == "feature" else None
        # On entropy, or on the feature router's predicted gain: (G - 1,) for fixed ratios, the percentiles 1 to 99 for ranges.
        any_rate = any(r[0] < r[-1] for r in self.ranges)
        self.register_buffer("thresholds", torch.full((99 if any_rate else grains - 1,), math.nan))
        self.register_load_state_dict_pre_hook(_without_thresholds)
        self.pre_quant = nn.Conv2d(z_channels, quantizer.dim, 1)
        self.quantizer = quantizer
        self.post_quant = nn.Conv2d(quantizer.dim, z_channels, 1)
        self.position = PositionEmbedding(z_channels, *(side // factors[-1] for side in sides(image_size)))
        self.decoder = Decoder(UpPath(image_size, ch, decoder_ch_mult, num_res_blocks + 1, decoder_attn_resolutions), z_channels)
        self.to_image = nn.Conv2d(ch * decoder_ch_mult[0], 3, 3, padding=1)
        if grains not in (2, 3) or list(factors) != [coarsest // 2**g for g in range(grains)] or factors[-1] != finest:
            raise ValueError(f"factors must be two or three, {coarsest} (from ch_mult) halved down to {finest} (from decoder_ch_mult); "
                             f"they are {list(factors)}")
        if hasattr(quantizer, "depth"):
            raise ValueError("DQ-VAE cannot read several codes per cell; give a ResidualVQ to a VQGAN")
        lows, highs = [r[0] for r in self.ranges], [r[-1] for r in self.ranges]
        if any(len(r) != 2 or r[0] > r[1] for r in self.ranges) or not valid_ratios(lows, highs, grains):
            raise ValueError(f"ratios must be {grains - 1} for {grains} factors, above 0 and together less than 1, or ranges of such, the "
                             f"lower first; they are {list(ratios)}")
        if any_rate and release_training and self.router is not None:
            raise ValueError("ranges as ratios need thresholds, which the feature router has only without release_training")
        if any(side % coarsest for side in sides(image_size)):
            raise ValueError(f"image_size must be divisible by the coarsest factor, {coarsest}; it is {image_size}")

    def forward(self, images: Tensor, ratios: list[float] | None = None) -> Output:
        """Images (B, 3, H, W) to an `Output` with losses codebook, commitment and, for the feature router, router (or
        budget, in the release's training). ratios: as in `encode`."""
        z, grain, routing = self._route(images, ratios)
        cells = self.to_finest(grain)                                                       # (B, h, w)
        weight = torch.pow(4.0, cells - (self.grains - 1))  # 1/4 for a code repeated over 4 cells
        once = self.first_cells(cells) if self.ema_weighted and not self.release_training else None
        z_q, indices, losses, info = self.quantizer(z, weight, once)
        codes = {"indices": self._same_within_code(indices, cells), "grain": grain}
        recon = self._decode(z_q if self.training else self.quantizer.lookup(codes["indices"]))
        if self.router is not None and self.release_training:
            losses["budget"] = budget(routing, self.ratios, self.budget_weight)
        elif self.router is not None:
            losses["router"] = self._router_loss(routing, grain, recon, images)
        for g in range(1, self.grains):
            info[f"ratio_{g}"] = (grain == g).float().mean()
        info |= {"codes": self._count(grain).float().mean(), "bits": self.bits(codes).mean()}
        if not self.training:
            info |= self.maps(codes, images)
        return Output(recon, codes, losses, info)

    def encode(self, images: Tensor, ratios: list[float] | None = None) -> dict[str, Tensor]:
        """Images (B, 3, H, W) to {"indices": int64 (B, h, w), "grain": int64 (B, h', w')}, on the finest and coarsest grid.
        ratios: shares of regions of each granularity but the coarsest, if not those of the model or the middle of its ranges."""
        z, grain, _ = self._route(images, ratios)
        return {"indices": self._same_within_code(self.quantizer.nearest(z), self.to_finest(grain)), "grain": grain}

    def decode(self, codes: dict[str, Tensor]) -> Tensor:
        """Codes to images (B, 3, H, W)."""
        return self._decode(self.quantizer.lookup(codes["indices"]))

    def maps(self, codes: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        """{"grain_map": (B, 3, H, W)}: the images, coarse regions in blue, fine ones in red."""
        colours = torch.tensor(COLOURS[:1] + COLOURS[-(self.grains - 1):], device=images.device)
        tint = F.interpolate(colours[codes["grain"]].permute(0, 3, 1, 2) * 2 - 1, images.shape[-2:])
        return {"grain_map": 0.55 * images.mean(1, keepdim=True) + 0.45 * tint}

    def bits(self, codes: dict[str, Tensor]) -> Tensor:
        """Bits per image (B,): log2 K per code, and log2 G per region for its granularity."""
        grain = codes["grain"]
        return self._count(grain) * math.log2(self.quantizer.codebook_size) + grain[0].numel() * math.log2(self.grains)

    @property
    def last_layer(self) -> Tensor:
        """Where the adaptive GAN weight compares gradients."""
        return self.to_image.weight

    def entropy(self, images: Tensor) -> Tensor:
        """The entropy that decides: `grey_entropy` of images (B, 3, H, W) in each region, (B, h', w')."""
        check_size(images, self.factor)
        return grey_entropy(images, self.factor)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> dict:
        """Sets the entropy router's thresholds so that `ratios` hold on batches of images (B, 3, H, W): all percentiles for ranges. Returns
        them with their settings, for a file; {} for the feature router."""
        if self.router is not None:
            return {}
        entropy = [self.entropy(images).flatten().cpu() for images in batches]
        if not entropy:
            raise ValueError("calibration of the thresholds needs at least one image")
        entropy = torch.cat(entropy).sort().values
        shares = [(99 - i) / 100 for i in range(99)] if len(self.thresholds) == 99 else self._shares(None)
        thresholds = [entropy[min(int((1 - s) * len(entropy)), len(entropy) - 1)].item() for s in shares]
        self.set_thresholds(thresholds, self.factor)
        return {"patch_size": self.factor, "image_size": self.image_size, "ratios": self.ratios, "thresholds": thresholds,
                "regions": len(entropy)}

    def set_thresholds(self, thresholds: list[float], patch_size: int) -> None:
        """Sets ascending thresholds (G - 1), or for ranges of ratios the percentiles 1 to 99, of regions of `patch_size` pixels."""
        if self.router is not None:
            raise ValueError("thresholds are for the entropy router; this model routes by features")
        if patch_size != self.factor:
            raise ValueError(f"these thresholds are for regions of {patch_size} x {patch_size} pixels; this model's have "
                             f"{self.factor} x {self.factor}")
        need, found = len(self.thresholds), len(thresholds)
        if found != need or sorted(thresholds) != list(thresholds) or not all(map(math.isfinite, thresholds)):
            raise ValueError(f"{'ranges of ratios' if need == 99 else f'{self.grains} granularities'} need {need} ascending thresholds; "
                             f"they are {found}: {thresholds}")
        self.thresholds.copy_(torch.tensor(thresholds))

    def _route(self, images: Tensor, ratios: list[float] | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images to vectors (B, h, w, D), the grain (B, h', w'), and of the feature router the predicted errors (B, G, h', w'), or the gate
        in the release's training."""
        check_size(images, self.factor)
        shares = self._shares(ratios)
        features = self.down(images)[-1:-self.grains - 1:-1]
        features = [neck(x) for neck, x in zip(self.necks, features)]                        # (B, z, S/f, S/f), coarsest first
        if self.router is None:
            grain, routing = self._grain_of_entropy(images, shares), None
        else:
            grain, routing = (self._train_as_released if self.release_training else self._train_ours)(features, shares)
        features = [F.interpolate(x, features[-1].shape[-2:]) for x in features]             # each (B, z, h, w)
        cells, z = self.to_finest(grain).unsqueeze(1), features[0]                           # (B, 1, h, w)
        for g in range(1, self.grains):
            z = torch.where(cells == g, features[g], z)
        if self.release_training and routing is not None:  # the gate of the chosen granularity: 1, which gives the router its gradient
            z = z * F.interpolate(routing.gather(1, grain.unsqueeze(1)), z.shape[-2:])
        return self.pre_quant(z).permute(0, 2, 3, 1), grain, routing

    # The feature router, trained as in the release or as ours: features of each granularity, and the shares of regions wanted above each
    # threshold, to the grain (B, h', w') and the gate or the predicted errors (B, G, h', w').

    def _train_as_released(self, features: list[Tensor], _: list[float]) -> tuple[Tensor, Tensor]:
        """Samples granularities. The gate multiplies the feature, and the budget counts it."""
        logits = self.router(features)
        gate = F.gumbel_softmax(logits, tau=1, hard=True, dim=1) if self.training else one_hot(logits.argmax(1), self.grains)
        return gate.argmax(1), gate

    def _train_ours(self, features: list[Tensor], shares: list[float]) -> tuple[Tensor, Tensor]:
        """Refines the regions where the predicted error falls most from the coarsest to the finest granularity. Thresholds on this gain
        give the ratios: in training those of the batch, in evaluation their moving average. Some regions are routed at random (40 % at
        first, 5 % from half-way), to see errors of all granularities."""
        # contiguous: torch's GroupNorm crashes on CPUs if a channels-last input needs no gradient.
        errors = F.softplus(self.router([x.detach().contiguous() for x in features]))        # (B, G, h', w')
        with torch.no_grad():
            gain = errors[:, 0] - errors[:, -1]                                              # (B, h', w')
            if not self.training:
                grain = (gain.unsqueeze(-1) > thresholds_at(self.thresholds, shares)).sum(-1)
                return torch.where(self.thresholds.isnan().any(), errors.argmax(1), grain), errors  # in runs from before: logits
            wanted = kept = torch.stack([gain.flatten().quantile(1 - share) for share in shares])
            if len(self.thresholds) == 99:
                kept = gain.flatten().quantile(torch.arange(1, 100, device=gain.device) / 100)
            grain, noise = (gain.unsqueeze(-1) > wanted).sum(-1), torch.rand_like(gain)
            anything = sum((noise < share).long() for share in shares)
            if world_size() > 1:
                dist.all_reduce(kept)
                kept /= world_size()
            self.thresholds.copy_(torch.where(self.thresholds.isfinite(), self.thresholds.lerp(kept, 0.05), kept))
            explored = torch.rand_like(gain) < max(0.05, 0.4 * (1 - self.progress / 0.5))
            return torch.where(explored, anything, grain), errors

    def _router_loss(self, errors: Tensor, grain: Tensor, recon: Tensor, images: Tensor) -> Tensor:
        """Regression of each region's squared error, relative to the batch's mean, at the granularity that it had. (Routers that
        learned by straight-through gradients came to refine much the same places in all images.)"""
        error = F.avg_pool2d((recon.detach().float() - images).square().mean(1), self.factor)  # (B, h', w')
        predicted = errors.gather(1, grain.unsqueeze(1)).squeeze(1)
        return 0.1 * (predicted - error / error.mean().clamp(min=1e-12)).square().mean()

    def _shares(self, ratios: list[float] | None) -> list[float]:
        """Of the regions, how many are wanted above each threshold (G - 1)."""
        if ratios is None:
            ratios = self.ratios
            if self.training:
                drawn = torch.rand(len(ratios), generator=torch.Generator().manual_seed(self.seed)).tolist()
                ratios = [low + (high - low) * x for (low, high), x in zip(self.ranges, drawn)]
                self.seed += 1
        elif not valid_ratios(ratios, ratios, self.grains):
            raise ValueError(f"ratios must be a list of {self.grains - 1}, above 0 and together less than 1; they are {ratios}")
        elif len(self.thresholds) < 99 and list(ratios) != self.ratios:
            raise ValueError(f"this model was trained for ratios {self.ratios}, not {ratios}; ranges as ratios, such as [[0.1, 0.9]], make "
                             "one for any rate")
        elif any(not low - 1e-9 <= r <= high + 1e-9 for r, (low, high) in zip(ratios, self.ranges)):
            warnings.warn(f"ratios {ratios} are outside of what this model was trained for, {self.ranges}", stacklevel=4)
        return [sum(ratios[g:]) for g in range(self.grains - 1)]

    def _grain_of_entropy(self, images: Tensor, shares: list[float]) -> Tensor:
        if not self._calibrated and self.thresholds.isnan().any():
            raise ValueError("the entropy router has no thresholds yet; call calibrate or set_thresholds first")
        self._calibrated = True  # checked once, because it waits for the GPU
        return (self.entropy(images).unsqueeze(-1) > thresholds_at(self.thresholds, shares)).sum(-1)

    def _decode(self, z_q: Tensor) -> Tensor:
        z = self.post_quant(z_q.permute(0, 3, 1, 2).contiguous())                            # (B, z_channels, h, w)
        return self.to_image(self.decoder(self.position(z)))                                 # (B, 3, H, W)

    def to_finest(self, grain: Tensor) -> Tensor:
        """Granularity of each region (B, h', w') to that of each finest cell (B, h, w)."""
        times = self.factors[0] // self.factors[-1]
        return grain.repeat_interleave(times, 1).repeat_interleave(times, 2)

    def first_cells(self, cells: Tensor) -> Tensor:
        """1 at the first cell of each code, else 0, (B, h, w)."""
        times = torch.pow(2, self.grains - 1 - cells)
        y, x = (torch.arange(n, device=cells.device) for n in cells.shape[1:])
        return ((y.view(-1, 1) % times == 0) & (x % times == 0)).float()

    def _same_within_code(self, indices: Tensor, cells: Tensor) -> Tensor:
        """Copies each code's first cell to its others, whose equal vectors kernels may round differently."""
        for g in range(self.grains - 1):
            times = self.factors[g] // self.factors[-1]
            first = indices[:, ::times, ::times].repeat_interleave(times, 1).repeat_interleave(times, 2)
            indices = torch.where(cells == g, first, indices)
        return indices

    def _count(self, grain: Tensor) -> Tensor:
        """Codes per image (B,)."""
        return torch.pow(4, grain).sum((1, 2))


class FeatureRouter(nn.Module):
    """Features (B, C, h_g, w_g) of each granularity, coarsest first, to logits (B, G, h', w'), float32."""

    def __init__(self, channels: int, grains: int):
        super().__init__()
        self.norms = nn.ModuleList(group_norm(channels) for _ in range(grains))
        self.fc1 = nn.Linear(grains * channels, grains * channels)
        self.fc2 = nn.Linear(grains * channels, grains)

    def forward(self, features: list[Tensor]) -> Tensor:
        side = features[0].shape[-1]
        x = torch.cat([F.avg_pool2d(norm(x), x.shape[-1] // side) for norm, x in zip(self.norms, features)], dim=1)
        return self.fc2(F.silu(self.fc1(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2).float()


def _without_thresholds(model: DQVAE, state: dict[str, Tensor], prefix: str, *_) -> None:
    """Feature routers from before there were thresholds choose the largest logit."""
    state.setdefault(f"{prefix}thresholds", model.thresholds.new_full((model.grains - 1,), math.nan))


def one_hot(grain: Tensor, grains: int) -> Tensor:
    """(B, h', w') to (B, G, h', w') float32."""
    return F.one_hot(grain, grains).permute(0, 3, 1, 2).float()


def valid_ratios(lows: list[float], highs: list[float], grains: int) -> bool:
    """Whether these can be ratios, and whatever is between them."""
    return len(lows) == grains - 1 and min(lows) > 0 and sum(highs) < 1


def thresholds_at(thresholds: Tensor, shares: list[float]) -> Tensor:
    """Of percentiles 1 to 99, those (G - 1,) above which these shares are, interpolated; thresholds (G - 1,) are returned as they are."""
    if len(thresholds) < 99:
        return thresholds
    places = [min(max(round(99 - 100 * share, 6), 0), 98) for share in shares]  # between which percentiles
    return torch.stack([thresholds[int(p)].lerp(thresholds[math.ceil(p)], p % 1) for p in places])


@torch.no_grad()
def grey_entropy(images: Tensor, size: int) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] to the entropy of the grey values in each square of `size` pixels, in nats (B, h', w'), float32:
    32 bins, linspace(-1, 1), with a Gaussian kernel of sigma 0.01."""
    with torch.autocast(images.device.type, enabled=False):
        r, g, b = images.float().split(1, dim=1)
        grey = 0.2989 * r + 0.5870 * g + 0.1140 * b                                          # (B, 1, H, W)
        # One bin at a time saves memory.
        p = torch.cat([F.avg_pool2d(torch.exp(-0.5 * ((grey - bin_) / 0.01).square()), size)
                       for bin_ in torch.linspace(-1, 1, 32).tolist()], dim=1)               # (B, 32, h', w')
        return torch.special.entr(p / p.sum(1, keepdim=True)).sum(1)  # entr(0) = 0, even if subnormals are flushed


def budget(gate: Tensor, ratios: list[float], weight: float) -> Tensor:
    """The release's loss of a gate (B, G, h', w'). Its code counts, such as sum(g0 + 4 g1), reduce to each granularity's mean gate."""
    shares = gate.mean((0, 2, 3))
    error = [(shares[g] - ratio).square() for g, ratio in enumerate(ratios, 1)]
    if len(ratios) == 1:
        return 2 * weight * error[0]  # the release adds the same term twice
    return error[0] + weight * error[1]


class PositionEmbedding(nn.Module):
    """Adds Fourier features of (x, y) and learned vectors per row and column to (B, C, h, w); on grids of another size than
    (height, width), the learned ones are interpolated."""

    def __init__(self, channels: int, height: int, width: int):
        super().__init__()
        self.fourier = nn.Conv2d(2, channels, 1)
        nn.init.uniform_(self.fourier.weight, -math.sqrt(9 / 2), math.sqrt(9 / 2))
        self.rows, self.columns = (nn.Parameter(nn.init.trunc_normal_(torch.empty(n, channels))) for n in (height, width))

    def forward(self, z: Tensor) -> Tensor:
        h, w = z.shape[-2:]
        y, x = (torch.linspace(-1, 1, n, device=z.device) for n in (h, w))
        xy = torch.stack(torch.meshgrid(x, y, indexing="xy")).unsqueeze(0)                   # (1, 2, h, w)
        rows, columns = (e.t() if len(e) == n else F.interpolate(e.t().unsqueeze(0), n, mode="linear", align_corners=True)[0]
                         for e, n in ((self.rows, h), (self.columns, w)))                    # (C, h), (C, w)
        return z + torch.sin(self.fourier(xy)) + (rows.unsqueeze(2) + columns.unsqueeze(1))
