"""MQ-VAE: codes for the important cells only.

    MQVAE       "Not All Image Regions Matter: Masked Vector Quantization for Autoregressive Image Generation"
                (Huang et al., CVPR 2023), sec. 3.2: adaptive mask and adaptive de-mask
    ScoreNet    importance score of each cell of the encoder's grid, 0 to 1
    DeMask      fills the masked cells from the kept ones

The N cells of highest score are kept and quantized. Interface as in vqgan.py; images are float tensors (B, 3, H, W) in [-1, 1].

    model = MQVAE(image_size=256, topk_ratio=0.25)
    codes = model.encode(images)        # {"indices": int64 (B, N), "positions": int64 (B, N), ascending}
    images = model.decode(codes)

With topk_ratio=[0.1, 0.9], one model serves any rate: model.encode(images, ratio=0.4).
Difference from the release: how scores are trained (`_train_ours`; release_training=True: `_train_as_released`). Copy with vqgan.py.
"""

from __future__ import annotations

import math
import warnings
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from vqgan import Attention, DownPath, Encoder, Output, ResBlock, UpPath, VectorQuantizer, check_size, sides


class MQVAE(nn.Module):
    """Encoder, mask, quantizer, de-mask, decoder; f = 2 ** (len(ch_mult) - 1).

    image_size         of the training images, a side or [height, width]. Any size divisible by f works; since codes do not tell it,
                       `decode` and `bits` then need the grid (h, w), or it is set as the attribute `grid`
    ch, ch_mult, num_res_blocks, attn_resolutions, z_channels    as in VQGAN
    topk_ratio         share of cells to keep, N = int(topk_ratio * h * w); or a range [low, high], from which every training step takes its
                       share, and from which users choose
    demask_layers      number of pairs of residual block and masked attention
    release_training   train with the release's gradients; also an attribute

    Before each training step, set the attribute `progress` to the share of steps done: `_train_ours` starts with more than N cells and
    with noise. The default 1 trains as at the end. A range is drawn from by the attribute `seed`, which counts up with each training
    forward and so is the same in all processes; set it by the step's number to resume exactly.
    """

    def __init__(self, image_size: int | list[int] = 256, ch: int = 128, ch_mult: list[int] = (1, 1, 2, 2), num_res_blocks: int = 2,
                 attn_resolutions: list[int] = (32,), z_channels: int = 256, topk_ratio: float | list[float] = 0.25,
                 demask_layers: Annotated[int, (0, 2**31)] = 8, quantizer: VectorQuantizer | None = None, release_training: bool = False):
        super().__init__()
        size = dict(image_size=image_size, ch=ch, ch_mult=ch_mult, attn_resolutions=attn_resolutions)
        quantizer, up = quantizer or VectorQuantizer(ema_decay=0.98), UpPath(num_res_blocks=num_res_blocks + 1, **size)
        self.factor = 2 ** (len(ch_mult) - 1)
        self.image_size, self.grid = image_size, tuple(side // self.factor for side in sides(image_size))
        self.ratio_range = tuple(topk_ratio) if isinstance(topk_ratio, (list, tuple)) else (topk_ratio, topk_ratio)
        self.topk_ratio = sum(self.ratio_range) / 2  # what is kept if nothing else is asked for
        self.release_training, self.progress, self.seed = release_training, 1.0, 0
        self.encoder = Encoder(DownPath(num_res_blocks=num_res_blocks, **size), z_channels)
        self.score_net = ScoreNet(z_channels)
        self.pre_quant = nn.Linear(z_channels, quantizer.dim, bias=False)
        self.quantizer = quantizer
        self.demask = DeMask(quantizer.dim, up.channels[0], demask_layers)
        self.decoder = up
        self.to_image = nn.Conv2d(ch * ch_mult[0], 3, 3, padding=1)
        (low, high), cells = self.ratio_range if len(self.ratio_range) == 2 else (1, 0), math.prod(self.grid)
        if any(side % self.factor for side in sides(image_size)):
            raise ValueError(f"image_size must be divisible by {self.factor}; it is {image_size}")
        if not (low <= high < 1 and int(low * cells) >= 1):
            raise ValueError(f"topk_ratio must be between 0 and 1, or two such numbers, the lower first, and keep at least one of "
                             f"{cells} cells; it is {topk_ratio}")
        if getattr(quantizer, "l2_norm", False) and release_training:
            raise ValueError("release_training cannot learn scores with an l2-normalised quantizer: a feature's score is its length")
        if hasattr(quantizer, "depth"):
            raise ValueError("MQ-VAE cannot read several codes per cell; give a ResidualVQ to a VQGAN")

    def forward(self, images: Tensor, ratio: float | None = None) -> Output:
        """Images (B, 3, H, W) to an `Output` with losses `codebook` and `commitment`. ratio: as in `encode`."""
        vectors, scores, positions, slope = self._mask(images, ratio)
        z_q, indices, losses, info = self.quantizer(self._kept(vectors, positions))
        recon = self._decode(z_q, positions, scores.shape[1:], slope)
        codes, n = {"indices": indices, "positions": positions}, positions.shape[1]
        kept = scores.flatten(1).gather(1, positions)
        info |= {"kept_ratio": scores.new_full((), n / scores[0].numel()), "codes": scores.new_full((), n),
                 "bits": self.bits(codes, scores.shape[1:]).mean(), "score_mean": scores.mean(), "score_std": scores.std(),
                 "score_kept": kept.mean()}
        if not self.training:
            low, high = scores.amin((1, 2), keepdim=True), scores.amax((1, 2), keepdim=True)
            info |= {"score_map": (2 * (scores - low) / (high - low + 1e-6) - 1).unsqueeze(1), **self.maps(codes, images)}
        return Output(recon, codes, losses, info)

    def encode(self, images: Tensor, ratio: float | None = None) -> dict[str, Tensor]:
        """Images (B, 3, H, W) to {"indices": int64 (B, N), "positions": int64 (B, N)}; positions are raster order, ascending.
        ratio: share of cells to keep, if not topk_ratio or the middle of its range."""
        vectors, _, positions, _ = self._mask(images, ratio)
        return {"indices": self.quantizer.nearest(self._kept(vectors, positions)), "positions": positions}

    def decode(self, codes: dict[str, Tensor], grid: tuple[int, int] | None = None) -> Tensor:
        """Codes on a grid (h, w), by default the attribute `grid`, to images (B, 3, h * factor, w * factor)."""
        return self._decode(self.quantizer.lookup(codes["indices"]), codes["positions"], grid or self.grid)

    def maps(self, codes: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        """{"kept_map": (B, 3, H, W)}: the images, dark at masked cells."""
        h, w = (side // self.factor for side in images.shape[-2:])
        mask = images.new_zeros(len(images), h * w).scatter(1, codes["positions"], 1.0).view(-1, 1, h, w)
        mask = F.interpolate(mask, images.shape[-2:])
        return {"kept_map": images * mask + (0.25 * images - 0.75) * (1 - mask)}

    def bits(self, codes: dict[str, Tensor], grid: tuple[int, int] | None = None) -> Tensor:
        """Bits per image (B,): log2 K per code, and log2 C(h * w, N) for the positions. grid (h, w): as in `decode`."""
        indices, cells = codes["indices"], math.prod(grid or self.grid)
        n = indices.shape[1]
        choose = (math.lgamma(cells + 1) - math.lgamma(n + 1) - math.lgamma(cells - n + 1)) / math.log(2)
        bits = n * math.log2(self.quantizer.codebook_size) + choose
        return torch.full((len(indices),), bits, device=indices.device)

    @property
    def last_layer(self) -> Tensor:
        """Where the adaptive GAN weight compares gradients."""
        return self.to_image.weight

    def _mask(self, images: Tensor, ratio: float | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Images to vectors (B, hw, D) and scores (B, h, w) of all cells, kept positions (B, N), and `slope` (below)."""
        check_size(images, self.factor)
        z = self.encoder(images)                                                             # (B, C, h, w)
        scores = self.score_net(z)                                                           # (B, h, w)
        z, flat = z.flatten(2).transpose(1, 2), scores.flatten(1)                            # (B, hw, C), (B, hw)
        vectors = self.pre_quant(F.layer_norm(z, z.shape[-1:]) * flat.unsqueeze(-1))         # (B, hw, D)
        n, order, slope = self._number(ratio, flat.shape[1]), flat.detach(), None
        if self.training:
            n, order, slope = (self._train_as_released if self.release_training else self._train_ours)(n, flat, vectors)
        return vectors, scores, order.topk(n, dim=1).indices.sort(dim=1).values, slope

    def _number(self, ratio: float | None, cells: int) -> int:
        """How many cells to keep."""
        low, high = self.ratio_range
        if ratio is None:
            ratio = self.topk_ratio
            if self.training:
                ratio = low + (high - low) * torch.rand((), generator=torch.Generator().manual_seed(self.seed)).item()
                self.seed += 1
        elif not low - 1e-9 <= ratio <= high + 1e-9:
            warnings.warn(f"ratio {ratio} is outside of what this model was trained for, {low} to {high}", stacklevel=4)
        if not (0 < ratio < 1 and int(ratio * cells)):
            raise ValueError(f"ratio must be between 0 and 1 and keep at least one of {cells} cells; it is {ratio}")
        return int(ratio * cells)

    # Training: N, scores (B, hw) and vectors (B, hw, D) to the number of cells to keep, the values (B, hw) that rank them, and `slope`
    # (B, hw, D), added to DeMask's input: zero in the forward pass, with a gradient for the scores.

    def _train_as_released(self, n: int, scores: Tensor, vectors: Tensor) -> tuple[int, Tensor, None]:
        """Keeps the N highest scores. Only kept features give their scores a gradient."""
        return n, scores.detach(), None

    def _train_ours(self, n: int, scores: Tensor, vectors: Tensor) -> tuple[int, Tensor, Tensor]:
        """Keeps all cells at first, N from 50 % of training on. Ranks by logit plus Gumbel noise, which fades out at 80 %.

        `slope` is a straight-through term: its gradient with respect to a score is the first-order effect of giving that cell its vector
        (before quantization) instead of the token, relative to the image's mean.
        """
        n += round((scores.shape[1] - n) * max(0.0, 1 - self.progress / 0.5))
        order, noise = scores.detach(), 1 - self.progress / 0.8
        if noise > 0:
            order = order.logit() - noise * torch.empty_like(order).exponential_().log()
        relative = scores - scores.mean(1, keepdim=True)
        return n, order, (relative - relative.detach()).unsqueeze(-1) * (vectors - self.demask.token).detach()

    @staticmethod
    def _kept(vectors: Tensor, positions: Tensor) -> Tensor:
        return vectors.gather(1, positions.unsqueeze(-1).expand(-1, -1, vectors.shape[-1]))  # (B, N, D)

    def _decode(self, z_q: Tensor, positions: Tensor, grid: tuple[int, int], slope: Tensor | None = None) -> Tensor:
        return self.to_image(self.decoder(self.demask(z_q, positions, grid, slope)))


class ScoreNet(nn.Module):
    """Features (B, C, h, w) to scores (B, h, w) in [0, 1], float32."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, 1, 1)
        self.norm = nn.BatchNorm2d(1)

    def forward(self, z: Tensor) -> Tensor:
        h = F.relu(self.conv1(F.layer_norm(z, z.shape[1:])))
        with torch.autocast(z.device.type, enabled=False):  # half precision would make many scores equal
            return self.norm(self.conv2(h.float())).squeeze(1).sigmoid()


class DeMask(nn.Module):
    """Kept codes (B, N, D) at positions (B, N) to features of the whole grid (B, channels, h, w).

    Masked cells hold a learned token. Attention weights are multiplied by the key's mask: 1 if kept, else 0.02, 0.02^(1/2), 0.02^(1/4), ...
    from block to block: information flows from kept cells first, later between all.
    """

    def __init__(self, dim: int, channels: int, layers: int, mask_init: float = 0.02):
        super().__init__()
        self.mask_init = mask_init
        self.token = nn.Parameter(torch.empty(dim).uniform_(-1 / dim, 1 / dim))
        self.post_quant = nn.Conv2d(dim, channels, 1)
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.blocks = nn.ModuleList(ResBlock(channels, channels) for _ in range(layers))
        self.attns = nn.ModuleList(Attention(channels) for _ in range(layers))
        self.last_block = ResBlock(channels, channels)

    def forward(self, z_q: Tensor, positions: Tensor, grid: tuple[int, int], slope: Tensor | None = None) -> Tensor:
        (B, _, D), cells = z_q.shape, math.prod(grid)
        x = self.token.to(z_q).expand(B, cells, D).scatter(1, positions.unsqueeze(-1).expand(-1, -1, D), z_q)
        x = x if slope is None else x + slope.to(x)
        mask = z_q.new_full((B, cells), self.mask_init).scatter(1, positions, 1.0)           # (B, hw)
        x = x.transpose(1, 2).contiguous().view(B, D, *grid)  # norms are slow on other memory layouts
        x = self.conv_in(self.post_quant(x))                                                 # (B, C, h, w)
        for block, attn in zip(self.blocks, self.attns):
            x = attn(block(x), key_weight=mask)
            mask = mask.sqrt()
        return self.last_block(x)
