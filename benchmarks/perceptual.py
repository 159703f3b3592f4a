"""What each perceptual distance of losses.py costs in a training step: forward and backward.

    python benchmarks/perceptual.py [--image_size 64 256] [--batch 16]

GFLOP per image: convolutions and matrix products, an addition and a multiplication counting as two.
Needs no weights, but the package of EfficientNet-Lite0.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import get_args

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
from gpu import RandomLPIPS
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

import losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_size", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    losses.load_lpips = RandomLPIPS
    losses.load_classifier = models.get_model  # random weights, too
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("| `loss.perceptual` | parameters | images | GFLOP per image | ms per batch |\n"
          "| --- | --- | --- | --- | --- |")
    for name in get_args(losses.PERCEPTUAL):
        distance = losses.load_perceptual(name).to(device)
        parameters = sum(p.numel() for p in distance.parameters()) / 1e6
        for size in args.image_size:
            images = torch.rand(args.batch, 3, size, size, device=device) * 2 - 1
            with FlopCounterMode(display=False) as counter:
                step(distance, images)
            flops = counter.get_total_flops() / args.batch / 1e9
            seconds = min(step(distance, images) for _ in range(3))
            print(f"| `{name}` | {parameters:.1f} M | {size} x {size} | {flops:.2f} "
                  f"| {1000 * seconds:.0f} |", flush=True)


def step(distance, images):
    """Seconds of a forward and backward pass."""
    reconstructions = (0.9 * images).requires_grad_()
    started = time.monotonic()
    distance(reconstructions, images).mean().backward()
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.monotonic() - started


if __name__ == "__main__":
    main()
