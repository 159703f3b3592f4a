"""DQ-VAE: few codes for smooth regions, many for detailed ones.

    DQVAE           "Towards Accurate Image Coding: Improved Autoregressive Image Generation with Dynamic Vector
                    Quantization" (Huang et al., CVPR 2023), sec. 3.2, for two or three granularities
    FeatureRouter   chooses each region's granularity from the encoder's features; learned, kept to the ratios by a loss
    DQVAE.entropy   ... or from the entropy of its pixels, by thresholds that are computed once from the training images

A region is a cell of the coarsest grid; with factors [16, 8] a coarse region has 1 code and a fine one 2 x 2. Interface as in
vqgan.py; images are float tensors (B, 3, S, S) in [-1, 1].

    model = DQVAE(image_size=256, factors=[16, 8], ratios=[0.5])
    codes = model.encode(images)        # {"indices": int64 (B, 32, 32), "grain": int64 (B, 16, 16), 0 = coarsest}
    images = model.decode(codes)

`indices` lie on the finest grid; a coarser code is repeated over its cells. Needs torch and vqgan.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from vqgan import Decoder, DownPath, Neck, Output, UpPath, VectorQuantizer, check_size

COLOURS = [[0.1, 0.3, 1.0], [1.0, 0.85, 0.1], [1.0, 0.1, 0.1]]  # of the granularities, coarsest first, for drawing


class DQVAE(nn.Module):
    """Encoder with one output per granularity, router, quantizer, decoder.

    image_size         side S of the images; any other is refused, because the decoder has learned positions
    factors            image side over grid side of each granularity, coarsest first: [16, 8] or [32, 16, 8]
    ratios             wanted share of the regions for each granularity but the coarsest: [0.5] = half of them fine,
                       [0.3, 0.3] = 30 % medium, 30 % fine
    router             "feature" or "entropy"
    budget_weight      gamma of the budget loss that keeps the feature router to the ratios
    ema_weighted       a code that is repeated over 4 (16) cells counts once in the codebook's moving averages, as in the
                       losses; False: 4 (16) times, as in the release
    release_training   train with the release's gradients (see `_train_as_released` and `_train_ours`), and ema_weighted=False; an
                       attribute as well
    ch, ch_mult, num_res_blocks, attn_resolutions, z_channels    of the encoder, as in VQGAN
    decoder_ch_mult, decoder_attn_resolutions                    of the decoder, which starts from the finest grid
    """

    def __init__(self, image_size: int = 256, factors: list[int] = (16, 8), ratios: list[float] = (0.5,),
                 router: Literal["feature", "entropy"] = "feature", budget_weight: float = 10.0, ema_weighted: bool = True,
                 ch: int = 128, ch_mult: list[int] = (1, 1, 2, 2, 4), num_res_blocks: int = 2,
                 attn_resolutions: list[int] = (16, 32), z_channels: int = 256, decoder_ch_mult: list[int] = (1, 1, 2, 2),
                 decoder_attn_resolutions: list[int] = (32,), quantizer: VectorQuantizer | None = None, release_training: bool = False):
        super().__init__()
        grains = self.grains = len(factors)
        if router not in ("feature", "entropy"):
            raise ValueError(f"router must be feature or entropy; it is {router!r}")
        quantizer = quantizer or VectorQuantizer(ema_decay=0.98)
        if grains not in (2, 3) or len(ratios) != grains - 1:
            raise ValueError(f"two factors need one ratio and three need two; there are {grains} factors and {len(ratios)} ratios")
        if list(factors) != [2 ** (len(ch_mult) - 1 - g) for g in range(grains)]:
            raise ValueError(f"factors must be {2 ** (len(ch_mult) - 1)} and its halves, because ch_mult has {len(ch_mult)} levels; "
                             f"they are {list(factors)}")
        if not all(0 < r < 1 for r in ratios) or sum(ratios) >= 1:
            raise ValueError(f"ratios are shares of the regions, each between 0 and 1 and together less than 1; they are {list(ratios)}")
        if image_size % factors[0]:
            raise ValueError(f"image_size must be divisible by the coarsest factor, {factors[0]}; it is {image_size}")
        if 2 ** (len(decoder_ch_mult) - 1) != factors[-1]:
            raise ValueError(f"decoder_ch_mult must have {int(math.log2(factors[-1])) + 1} levels to go from factor {factors[-1]} to 1; "
                             f"it has {len(decoder_ch_mult)}")
        self.image_size, self.factors, self.ratios, self.budget_weight = image_size, list(factors), list(ratios), budget_weight
        self.ema_weighted, self.release_training = ema_weighted, release_training
        self.factor = factors[0]
        self._calibrated = False
        self.down = DownPath(image_size, ch, ch_mult, num_res_blocks, attn_resolutions)
        self.necks = nn.ModuleList(Neck(c, z_channels) for c in self.down.channels[-1:-grains - 1:-1])  # coarsest first
        self.router = FeatureRouter(z_channels, grains) if router == "feature" else None
        if router == "entropy":
            self.register_buffer("thresholds", torch.full((grains - 1,), math.nan))
        self.pre_quant = nn.Conv2d(z_channels, quantizer.dim, 1)
        self.quantizer = quantizer
        self.post_quant = nn.Conv2d(quantizer.dim, z_channels, 1)
        self.position = PositionEmbedding(z_channels, image_size // factors[-1])
        self.decoder = Decoder(UpPath(image_size, ch, decoder_ch_mult, num_res_blocks + 1, decoder_attn_resolutions), z_channels)
        self.to_image = nn.Conv2d(ch * decoder_ch_mult[0], 3, 3, padding=1)

    def forward(self, images: Tensor) -> Output:
        """Images (B, 3, S, S) to an `Output`; its losses are `codebook`, `commitment` and, with a feature router, `budget`."""
        z, gate, grain = self._route(images)
        cells = self.to_finest(grain)                                                       # (B, h, w)
        weight = torch.pow(4.0, cells - (self.grains - 1))  # a code repeated over 4 cells counts once
        once = self.first_cells(cells) if self.ema_weighted and not self.release_training else None
        z_q, indices, losses, info = self.quantizer(z, weight, once)
        codes = {"indices": self._same_within_code(indices, cells), "grain": grain}
        recon = self._decode(z_q if self.training else self.quantizer.lookup(codes["indices"]))
        if self.router is not None:
            losses["budget"] = self._budget(gate)
        for g in range(1, self.grains):
            info[f"ratio_{g}"] = (grain == g).float().mean()
        info |= {"codes": self._count(grain).float().mean(), "bits": self.bits(codes).mean()}
        if not self.training:
            info |= self.maps(codes, images)
        return Output(recon, codes, losses, info)

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, S, S) to codes {"indices": int64 (B, h, w), "grain": int64 (B, h', w')}, on the finest and on the
        coarsest grid."""
        z, _, grain = self._route(images)
        return {"indices": self._same_within_code(self.quantizer.nearest(z), self.to_finest(grain)), "grain": grain}

    def decode(self, codes: dict[str, Tensor]) -> Tensor:
        """Codes to images (B, 3, S, S)."""
        return self._decode(self.quantizer.lookup(codes["indices"]))

    def maps(self, codes: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        """What the codes look like over their images (B, 3, S, S): {"grain_map": (B, 3, S, S)}, coarse in blue, fine in red."""
        colours = torch.tensor(COLOURS[:1] + COLOURS[-(self.grains - 1):], device=images.device)
        tint = F.interpolate(colours[codes["grain"]].permute(0, 3, 1, 2) * 2 - 1, images.shape[-2:])
        return {"grain_map": 0.55 * images.mean(1, keepdim=True) + 0.45 * tint}

    def bits(self, codes: dict[str, Tensor]) -> Tensor:
        """What the codes of each image cost, in bits (B,): log2 K per code, and log2 G for the granularity of each region."""
        grain = codes["grain"]
        return self._count(grain) * math.log2(self.quantizer.codebook_size) + grain[0].numel() * math.log2(self.grains)

    @property
    def last_layer(self) -> Tensor:
        """The weight at which the adaptive GAN weight compares gradients."""
        return self.to_image.weight

    @torch.no_grad()
    def entropy(self, images: Tensor) -> Tensor:
        """Entropy in nats (B, h', w') of the grey values in each region of images (B, 3, H, W), float32.

        Grey values in [-1, 1] are counted in 32 bins, linspace(-1, 1), with a Gaussian of sigma 0.01 around each pixel.
        """
        check_size(images, self.factor)
        with torch.autocast(images.device.type, enabled=False):
            r, g, b = images.float().split(1, dim=1)
            grey = 0.2989 * r + 0.5870 * g + 0.1140 * b                                      # (B, 1, H, W)
            # A bin at a time, so that no (pixels x bins) tensor is held.
            p = torch.cat([F.avg_pool2d(torch.exp(-0.5 * ((grey - bin_) / 0.01).square()), self.factor)
                           for bin_ in torch.linspace(-1, 1, 32).tolist()], dim=1)           # (B, 32, h', w')
            return torch.special.entr(p / p.sum(1, keepdim=True)).sum(1)  # entr(0) = 0, also where subnormals are flushed

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> dict:
        """Sets the entropy router's thresholds so that `ratios` come out on these images (each (B, 3, S, S)); what was set,
        to be kept. Nothing happens with a feature router: {}."""
        if self.router is not None:
            return {}
        entropy = [self.entropy(images).flatten().cpu() for images in batches]
        if not entropy:
            raise ValueError("thresholds need at least one image to be computed from")
        entropy = torch.cat(entropy).sort().values
        shares = [sum(self.ratios[g:]) for g in range(self.grains - 1)]  # of regions above each threshold
        thresholds = [entropy[min(int((1 - s) * len(entropy)), len(entropy) - 1)].item() for s in shares]
        self.set_thresholds(thresholds, self.factor)
        return {"patch_size": self.factor, "image_size": self.image_size, "ratios": self.ratios, "thresholds": thresholds,
                "regions": len(entropy)}

    def set_thresholds(self, thresholds: list[float], patch_size: int) -> None:
        """Uses thresholds (ascending, one less than granularities) that were computed for regions of `patch_size` pixels."""
        if self.router is not None:
            raise ValueError("thresholds are for the entropy router; this model routes by features")
        if patch_size != self.factor:
            raise ValueError(f"these thresholds are for regions of {patch_size} x {patch_size} pixels; this model's have "
                             f"{self.factor} x {self.factor}")
        if len(thresholds) != self.grains - 1 or sorted(thresholds) != list(thresholds) or not all(map(math.isfinite, thresholds)):
            raise ValueError(f"{self.grains} granularities need {self.grains - 1} ascending thresholds; they are {thresholds}")
        self.thresholds.copy_(torch.tensor(thresholds))

    def _route(self, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Images to the vectors to quantize (B, h, w, D), the feature router's gate (B, G, h', w') for the budget loss, and the grain
        (B, h', w')."""
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"images must be (B, 3, {self.image_size}, {self.image_size}); they are {tuple(images.shape)}")
        features = self.down(images)[-1:-self.grains - 1:-1]
        features = [neck(x) for neck, x in zip(self.necks, features)]                        # (B, z, S/f, S/f), coarsest first
        logits = None if self.router is None else self.router(features)                      # (B, G, h', w')
        features = [F.interpolate(x, features[-1].shape[-2:]) for x in features]             # each (B, z, h, w)
        if logits is not None and self.training:
            z, gate, grain = (self._train_as_released if self.release_training else self._train_ours)(logits, features)
        else:
            grain = self._grain_of_entropy(images) if logits is None else logits.argmax(1)   # (B, h', w')
            gate = None if logits is None else one_hot(grain, self.grains)
            z = self._select(features, grain)
        return self.pre_quant(z).permute(0, 2, 3, 1), gate, grain

    # Training of the feature router: from its logits (B, G, h', w') and the features of each granularity (B, z, h, w) to the features to
    # quantize (B, z, h, w), the gate (B, G, h', w') that the budget loss counts, and the grain (B, h', w').

    def _train_as_released(self, logits: Tensor, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Granularities are drawn; the drawn one's feature is multiplied by its gate. The budget is of what was drawn."""
        gate = F.gumbel_softmax(logits, tau=1, hard=True, dim=1)
        grain = gate.argmax(1)
        chosen = gate.gather(1, grain.unsqueeze(1))                                          # (B, 1, h', w'): 1
        return self._select(features, grain) * F.interpolate(chosen, features[0].shape[-2:]), gate, grain

    def _train_ours(self, logits: Tensor, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Granularities are drawn. The gradient compares them: it is that of the sum over g of gate_g * feature_g. The budget is of the
        decisions that evaluation makes; a budget on what is drawn left evaluation at 49 % fine where 60 % was asked."""
        gate, soft = F.gumbel_softmax(logits, tau=1, hard=True, dim=1), logits.softmax(1)
        grain = gate.argmax(1)
        slope = F.interpolate(gate - gate.detach(), features[0].shape[-2:])                  # (B, G, h, w): 0, straight-through
        z = self._select(features, grain) + sum(slope[:, g:g + 1] * feature for g, feature in enumerate(features))
        return z, one_hot(logits.argmax(1), self.grains) + soft - soft.detach(), grain

    def _grain_of_entropy(self, images: Tensor) -> Tensor:
        if not self._calibrated and self.thresholds.isnan().any():
            raise ValueError("the entropy router has no thresholds yet; call calibrate or set_thresholds first")
        self._calibrated = True  # asked once, because the answer waits for the GPU
        return (self.entropy(images).unsqueeze(-1) > self.thresholds).sum(-1)

    def _select(self, features: list[Tensor], grain: Tensor) -> Tensor:
        """In each cell the feature of its granularity, (B, z, h, w)."""
        cells, z = self.to_finest(grain).unsqueeze(1), features[0]                           # (B, 1, h, w)
        for g in range(1, self.grains):
            z = torch.where(cells == g, features[g], z)
        return z

    def _budget(self, gate: Tensor) -> Tensor:
        """The release's loss, in which sum(g0 + 4 g1) and so on come down to the mean gate of each granularity."""
        shares = gate.mean((0, 2, 3))
        error = [(shares[g] - ratio).square() for g, ratio in enumerate(self.ratios, 1)]
        if self.grains == 2:
            return 2 * self.budget_weight * error[0]  # the release adds the same term twice
        return error[0] + self.budget_weight * error[1]

    def _decode(self, z_q: Tensor) -> Tensor:
        z = self.post_quant(z_q.permute(0, 3, 1, 2).contiguous())                            # (B, z_channels, h, w)
        return self.to_image(self.decoder(self.position(z)))                                 # (B, 3, S, S)

    def to_finest(self, grain: Tensor) -> Tensor:
        """The granularity of each cell, (B, h, w), from that of each region (B, h', w')."""
        times = self.factors[0] // self.factors[-1]
        return grain.repeat_interleave(times, 1).repeat_interleave(times, 2)

    def first_cells(self, cells: Tensor) -> Tensor:
        """1 for the first of the cells that a code is repeated over, 0 for the others, (B, h, w)."""
        times = torch.pow(2, self.grains - 1 - cells)
        line = torch.arange(cells.shape[1], device=cells.device)
        return ((line.view(-1, 1) % times == 0) & (line % times == 0)).float()

    def _same_within_code(self, indices: Tensor, cells: Tensor) -> Tensor:
        """A coarse code's cells have equal vectors, but kernels may round them differently: its first cell decides."""
        for g in range(self.grains - 1):
            times = self.factors[g] // self.factors[-1]
            first = indices[:, ::times, ::times].repeat_interleave(times, 1).repeat_interleave(times, 2)
            indices = torch.where(cells == g, first, indices)
        return indices

    def _count(self, grain: Tensor) -> Tensor:
        """Codes per image (B,)."""
        return torch.pow(4, grain).sum((1, 2))


class FeatureRouter(nn.Module):
    """Features of each granularity (B, C, h_g, w_g), coarsest first, to logits (B, G, h', w'), float32."""

    def __init__(self, channels: int, grains: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(32, channels, eps=1e-6) for _ in range(grains))
        self.fc1 = nn.Linear(grains * channels, grains * channels)
        self.fc2 = nn.Linear(grains * channels, grains)

    def forward(self, features: list[Tensor]) -> Tensor:
        side = features[0].shape[-1]
        x = torch.cat([F.avg_pool2d(norm(x), x.shape[-1] // side) for norm, x in zip(self.norms, features)], dim=1)
        return self.fc2(F.silu(self.fc1(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2).float()


def one_hot(grain: Tensor, grains: int) -> Tensor:
    """(B, h', w') to (B, G, h', w') float32."""
    return F.one_hot(grain, grains).permute(0, 3, 1, 2).float()


class PositionEmbedding(nn.Module):
    """Adds to (B, C, S, S) a Fourier feature of (x, y) and a learned vector per row and per column."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.fourier = nn.Conv2d(2, channels, 1)
        nn.init.uniform_(self.fourier.weight, -math.sqrt(9 / 2), math.sqrt(9 / 2))
        self.rows, self.columns = (nn.Parameter(nn.init.trunc_normal_(torch.empty(size, channels))) for _ in range(2))
        line = torch.linspace(-1, 1, size)
        self.register_buffer("xy", torch.stack(torch.meshgrid(line, line, indexing="xy")).unsqueeze(0), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        learned = self.rows.t().unsqueeze(2) + self.columns.t().unsqueeze(1)                 # (C, S, S)
        return z + torch.sin(self.fourier(self.xy)) + learned
