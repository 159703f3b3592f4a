"""Where MQ-VAE and DQ-VAE spend their codes: on detail, and at the same places in all images?

    python benchmarks/detail.py runs/mqvae runs/dqvae ... [--images 2000] [data.root=PATH ...]

codes on detail   how often a cell with a code (a finer region) has more contrast than one without
                  (a coarser one) in the same image, mean over images; chance: 50 %. Contrast:
                  standard deviation of the pixels
places shared     share of an image's kept cells (regions that are not coarsest) that another image
                  keeps too, mean over pairs. 100 %: a fixed pattern; chance: the share that is kept
"""

import argparse
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import eval_loader
from evaluate import run_images
from harness.config import UserError
from harness.launch import run_main
from harness.models import load_run
from harness.use import in_precision


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="RUN",
                        help="stage-1 run folders, and data.key=value for other data")
    parser.add_argument("--split", choices=("train", "val"), default="val")
    parser.add_argument("--images", type=int,
                        help="at most so many, spread over the split (default: all)")
    args = parser.parse_intermixed_args(argv)
    args.overrides = [word for word in args.words if word.startswith("data.") and "=" in word]
    print("| run | images | codes on detail | places shared |\n| --- | --- | --- | --- |")
    for folder in args.words:
        if folder not in args.overrides:
            images, on_detail, shared = measure(folder, args)
            print(f"| {Path(folder).name} | {images} | {on_detail:.1%} | {shared:.1%} |",
                  flush=True)


@torch.no_grad()
def measure(folder: str, args: argparse.Namespace) -> tuple[int, float, float]:
    """The number of images, codes on detail, places shared."""
    model, config = load_run(folder)
    if config["model"]["name"] not in ("mqvae", "dqvae"):
        raise UserError(f"{folder} holds a {type(model).__name__}, which chooses no places; give "
                        "MQ-VAE and DQ-VAE runs")
    dataset, _ = run_images(args, config, args.split, model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = in_precision(model, config, device)
    workers = min(4, os.cpu_count() or 1)
    on_detail = []
    kept = []
    for images, _ in eval_loader(dataset, 32, args.images, workers, device=device):
        levels = levels_of(model, model.encode(images))
        contrasts = contrast(images, images.shape[-1] // levels.shape[-1])
        on_detail.append(codes_on_detail(levels.flatten(1), contrasts))
        kept.append(levels.flatten(1) > 0)
    kept = torch.cat(kept)
    return len(kept), torch.cat(on_detail).nanmean().item(), places_shared(kept)


def levels_of(model: torch.nn.Module, codes: dict[str, Tensor]) -> Tensor:
    """What the model spends on each cell (0 or 1) or region (its granularity), (B, h, w)."""
    if "grain" in codes:
        return codes["grain"].float()
    positions = codes["positions"]
    cells = torch.zeros(len(positions), math.prod(model.grid), device=positions.device)
    return cells.scatter(1, positions, 1.0).unflatten(1, model.grid)


def contrast(images: Tensor, size: int) -> Tensor:
    """The standard deviation of the pixels of each square of `size` x `size`, mean over the
    colours: (B, 3, H, W) to (B, squares)."""
    images = images.double()
    mean = F.avg_pool2d(images, size)
    variance = F.avg_pool2d(images.square(), size) - mean.square()
    return variance.clamp(min=0).sqrt().mean(1).flatten(1)


def codes_on_detail(levels: Tensor, contrasts: Tensor) -> Tensor:
    """Of the pairs of an image's places whose levels (B, n) differ, the share (B,) in which the
    higher one has more contrast (B, n); NaN if there are no such pairs."""
    shares = []
    for level, value in zip(levels, contrasts):
        higher = level.unsqueeze(1) > level                             # (n, n)
        wins = (value.unsqueeze(1) - value).sign()[higher]
        shares.append(0.5 + 0.5 * wins.mean())
    return torch.stack(shares)


def places_shared(kept: Tensor) -> float:
    """Of images that keep some places, bool (N, n): each of the p images that keep a place shares
    it with p - 1 others."""
    places = kept.double().sum(0)
    pairs = (places * (places - 1)).sum()
    return (pairs / (places.sum() * (len(kept) - 1))).item()


if __name__ == "__main__":
    run_main(main)
