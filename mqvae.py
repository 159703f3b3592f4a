"""MQ-VAE: codes for the important cells only.

    MQVAE       "Not All Image Regions Matter: Masked Vector Quantization for Autoregressive Image
                Generation" (Huang et al., CVPR 2023), sec. 3.2: adaptive mask, adaptive de-mask
    ScoreNet    the adaptive mask: the importance of each cell of the encoder's grid, 0 to 1
    DeMask      the adaptive de-mask: fills the masked cells from the kept ones

The N cells of highest score are kept and quantized. Interface as in vqgan.py; images are float
tensors (B, 3, H, W) in [-1, 1].

    model = MQVAE(image_size=256, topk_ratio=0.25)
    codes = model.encode(images)    # {"indices": int64 (B, N), "positions": int64 (B, N)}
    images = model.decode(codes)

With topk_ratio=[0.1, 0.9], one model serves any rate: model.encode(images, ratio=0.4).
Difference from the release: how scores learn (`explore`); release_training=True undoes it.
Copy with vqgan.py.
"""

import math
import warnings
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from vqgan import (
    Attention, Codes, DownPath, Encoder, Output, ResBlock, Tokenizer, UpPath, VectorQuantizer,
    check_size, conv3x3, pair, sides)


class MQVAE(Tokenizer):
    """Encoder, mask, quantizer, de-mask, decoder; f = 2 ** (len(ch_mult) - 1).

    image_size         of the training images, a side or [height, width]. Any size divisible by f
                       works; codes do not tell it, so call `set_image_size`, or give `decode` and
                       `bits` the grid (h, w)
    ch, ch_mult, num_res_blocks, attn_resolutions, z_channels    as in VQGAN
    topk_ratio         share of cells to keep, N = int(topk_ratio * h * w); or a range [low, high],
                       from which `schedule` draws each training step's share, and users choose
    demask_layers      number of pairs of residual block and masked attention
    release_training   train with the release's gradients; also an attribute

    Call `schedule` before each training step: at first, more than N cells are kept, and some at
    random. Without it, the model trains as at the end, with the middle of a range.
    """

    code_names = ("indices", "positions")

    def __init__(self, image_size: int | list[int] = 256, ch: int = 128,
                 ch_mult: list[int] = (1, 1, 2, 2), num_res_blocks: int = 2,
                 attn_resolutions: list[int] = (32,), z_channels: int = 256,
                 topk_ratio: float | list[float] = 0.25,
                 demask_layers: Annotated[int, (0, 2**31)] = 8,
                 quantizer: VectorQuantizer | None = None, release_training: bool = False):
        quantizer = quantizer or VectorQuantizer(ema_decay=0.98)
        ends = pair(topk_ratio)
        low, high = ends[0], ends[-1]
        super().__init__([2 ** (len(ch_mult) - 1)], quantizer, [(low, high)])
        up = UpPath(image_size, ch, ch_mult, num_res_blocks + 1, attn_resolutions)
        down = DownPath(image_size, ch, ch_mult, num_res_blocks, attn_resolutions)
        self.encoder = Encoder(down, z_channels)
        self.score_net = ScoreNet(z_channels)
        self.pre_quant = nn.Linear(z_channels, quantizer.dim, bias=False)
        self.demask = DeMask(quantizer.dim, up.channels[0], demask_layers)
        self.decoder = up
        self.to_image = conv3x3(up.channels[-1], 3)
        self.set_image_size(image_size)
        self.topk_ratio = self.ratios[0]
        self.release_training = release_training
        cells = math.prod(self.grid)
        if len(ends) != 2 or not low <= high < 1 or int(low * cells) < 1:
            raise ValueError("topk_ratio must be between 0 and 1, or two such numbers, the lower "
                             f"first, and keep at least one of {cells} cells; it is {topk_ratio}")
        if quantizer.l2_norm and release_training:
            raise ValueError("release_training cannot learn scores with an l2-normalised quantizer:"
                             " a feature's score is its length")

    def forward(self, images: Tensor, ratio: float | None = None) -> Output:
        """Images (B, 3, H, W) to an `Output` with the quantizer's losses. ratio: as in `encode`."""
        vectors, scores = self.features(images)                         # (B, hw, D), (B, h, w)
        grid = tuple(scores.shape[1:])
        if self.training and ratio is None:
            ratio = self.training_ratios[0]
        n = self._number(ratio, grid)
        if self.score_net.training and not self.release_training:
            positions, slope = self.explore(vectors, scores, n)
        else:
            positions, slope = highest(scores, n), None
        z_q, indices, losses, info = self.quantizer(at(vectors, positions))
        recon = self._decode(z_q, positions, grid, slope)               # (B, 3, H, W)
        codes = {"indices": indices, "positions": positions}
        for name, numbers in self.counts(codes, grid).items():
            info[name] = numbers.float().mean()
        info["score_mean"] = scores.mean()
        info["score_std"] = scores.std()
        info["score_kept"] = scores.flatten(1).gather(1, positions).mean()
        if not self.training:
            low = scores.amin((1, 2), keepdim=True)
            share = (scores - low) / (scores.amax((1, 2), keepdim=True) - low + 1e-6)
            info["score_map"] = 2 * share.unsqueeze(1) - 1
            info |= self.maps(codes, images)
        return Output(recon, codes, losses, info)

    def encode(self, images: Tensor, ratio: float | None = None) -> Codes:
        """Images (B, 3, H, W) to {"indices": int64 (B, N), "positions": int64 (B, N)}, the cells in
        raster order, ascending. ratio: share of cells to keep, if not topk_ratio or its middle."""
        vectors, scores = self.features(images)                         # (B, hw, D), (B, h, w)
        positions = highest(scores, self._number(ratio, scores.shape[1:]))
        return {"indices": self.quantizer.nearest(at(vectors, positions)), "positions": positions}

    def decode(self, codes: Codes, grid: tuple[int, int] | None = None) -> Tensor:
        """Codes on a grid (h, w), by default the announced size's, to images (B, 3, H, W)."""
        z_q = self.quantizer.lookup(codes["indices"])                   # (B, N, D)
        return self._decode(z_q, codes["positions"], grid or self.grid)

    def features(self, images):
        """Images to the vectors (B, hw, D) and scores (B, h, w) of all cells. The score multiplies
        the vector, which is how the score net gets a gradient."""
        check_size(images, self.factor)
        z = self.encoder(images)                                        # (B, C, h, w)
        scores = self.score_net(z)                                      # (B, h, w)
        z = z.flatten(2).transpose(1, 2)                                # (B, hw, C)
        z = F.layer_norm(z, z.shape[-1:]) * scores.flatten(1).unsqueeze(-1)
        return self.pre_quant(z), scores                                # (B, hw, D), (B, h, w)

    def explore(self, vectors, scores, n):
        """Training, ours, unless the score net is frozen in eval mode: positions (B, N') to keep,
        and `slope` (B, hw, D), which is added to DeMask's input.

        All cells are kept at first, n from 50 % of training on. They are ranked by logit plus
        Gumbel noise, which fades out at 80 %. `slope` is zero, with a gradient for the scores: the
        first-order effect of giving a cell its vector (before quantization) instead of the token,
        (score - the image's mean score) * (vector - token).
        """
        scores = scores.flatten(1)                                      # (B, hw)
        n += round((scores.shape[1] - n) * max(0.0, 1 - self.progress / 0.5))
        ranks = scores.detach()
        noise = 1 - self.progress / 0.8
        if noise > 0:
            ranks = ranks.logit() - noise * torch.empty_like(ranks).exponential_().log()
        relative = scores - scores.mean(1, keepdim=True)
        effect = (vectors - self.demask.token).detach()                 # (B, hw, D)
        return highest(ranks, n), (relative - relative.detach()).unsqueeze(-1) * effect

    def set_image_size(self, size: int | list[int]):
        super().set_image_size(size)
        self.grid = tuple(side // self.factor for side in sides(size))

    def set_rate(self, rate: float | list[float]):
        """Chooses the share of cells to keep."""
        if isinstance(rate, list):
            raise ValueError("several ratios are for a DQ-VAE; an MQ-VAE has one")
        self._number(rate, self.grid)
        self.topk_ratio = rate

    @property
    def num_codes(self) -> int:
        """N on the announced size's grid."""
        return int(self.topk_ratio * math.prod(self.grid))

    def maps(self, codes, images):
        """{"kept_map": (B, 3, H, W)}: the images, dark at masked cells."""
        h, w = (side // self.factor for side in images.shape[-2:])
        mask = images.new_zeros(len(images), h * w).scatter(1, codes["positions"], 1.0)
        mask = F.interpolate(mask.view(-1, 1, h, w), images.shape[-2:])
        return {"kept_map": images * mask + (0.25 * images - 0.75) * (1 - mask)}

    def bits(self, codes: Codes, grid: tuple[int, int] | None = None) -> Tensor:
        """Bits per image (B,): log2 K per code, log2 C(h * w, N) for the positions."""
        cells = math.prod(grid or self.grid)
        n = codes["indices"].shape[1]
        choose = math.lgamma(cells + 1) - math.lgamma(n + 1) - math.lgamma(cells - n + 1)
        return super().bits(codes) + choose / math.log(2)

    def counts(self, codes, grid=None):
        n = self.spent(codes).sum(1)
        kept_ratio = n / math.prod(grid or self.grid)
        return {"codes": n, "bits": self.bits(codes, grid), "kept_ratio": kept_ratio}

    def _number(self, ratio, grid):
        """How many cells of a grid to keep."""
        ratio = self.topk_ratio if ratio is None else ratio
        cells = math.prod(grid)
        low, high = self.ranges[0]
        if not low - 1e-9 <= ratio <= high + 1e-9:
            warnings.warn(f"ratio {ratio} is outside of what this model was trained for, {low} to "
                          f"{high}", stacklevel=3)
        if not 0 < ratio < 1 or int(ratio * cells) < 1:
            raise ValueError(f"ratio must be between 0 and 1 and keep at least one of {cells} cells"
                             f"; it is {ratio}")
        return int(ratio * cells)

    def _decode(self, z_q, positions, grid, slope=None):
        features = self.demask(z_q, positions, grid, slope)             # (B, C, h, w)
        return self.to_image(self.decoder(features))                    # (B, 3, H, W)


def highest(scores, n):
    """Positions (B, n) of the highest scores (B, ...), in ascending order of position."""
    return scores.detach().flatten(1).topk(n, dim=1).indices.sort(dim=1).values


def at(vectors, positions):
    """Of vectors (B, hw, D), those at positions (B, N)."""
    return vectors.gather(1, positions.unsqueeze(-1).expand(-1, -1, vectors.shape[-1]))


class ScoreNet(nn.Module):
    """Features (B, C, h, w) to scores (B, h, w) in [0, 1], float32."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = conv3x3(channels, channels)
        self.conv2 = nn.Conv2d(channels, 1, 1)
        self.norm = nn.BatchNorm2d(1)

    def forward(self, z):
        h = F.relu(self.conv1(F.layer_norm(z, z.shape[1:])))
        with torch.autocast(z.device.type, enabled=False):  # half precision would make many equal
            return self.norm(self.conv2(h.float())).squeeze(1).sigmoid()


class DeMask(nn.Module):
    """Kept codes (B, N, D) at positions (B, N) to features of the whole grid (B, channels, h, w).

    Masked cells hold a learned token. Direction-constrained self-attention: after the softmax,
    each weight is multiplied by its key's mask, 1 if kept, else 0.02, 0.02^(1/2), 0.02^(1/4), ...
    from block to block, and not normalized again. So information flows from kept cells first,
    later between all.
    """

    MASK = 0.02  # the release's

    def __init__(self, dim, channels, layers):
        super().__init__()
        self.token = nn.Parameter(torch.empty(dim).uniform_(-1 / dim, 1 / dim))
        self.post_quant = nn.Conv2d(dim, channels, 1)
        self.conv_in = conv3x3(channels, channels)
        self.blocks = nn.ModuleList(ResBlock(channels, channels) for _ in range(layers))
        self.attns = nn.ModuleList(Attention(channels) for _ in range(layers))
        self.last_block = ResBlock(channels, channels)

    def forward(self, z_q, positions, grid, slope=None):
        B, _, D = z_q.shape
        cells = math.prod(grid)
        x = self.token.to(z_q).expand(B, cells, D)                      # (B, hw, D)
        x = x.scatter(1, positions.unsqueeze(-1).expand(-1, -1, D), z_q)
        if slope is not None:
            x = x + slope.to(x)
        mask = z_q.new_full((B, cells), self.MASK).scatter(1, positions, 1.0)
        x = x.transpose(1, 2).contiguous().view(B, D, *grid)  # norms are slow on other layouts
        x = self.conv_in(self.post_quant(x))                            # (B, C, h, w)
        for block, attn in zip(self.blocks, self.attns):
            x = attn(block(x), key_weight=mask)
            mask = mask.sqrt()
        return self.last_block(x)
