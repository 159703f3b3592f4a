"""How fast the transformers sample: with the cache of keys and values, against running over the whole prefix at every step.

    python benchmarks/sampling.py [--batch 8] [--layers 12] [--width 256] [--peak_gbs 4800]

GPT draws 256 codes, Stackformer 640 (code, position) pairs, half of the layers for each; random weights, the same sampling code both
times: for the second, a transformer's step is replaced by a forward pass over all tokens so far, as the reference releases do it. That
is timed at --points evenly spaced lengths and multiplied out; the cached sampling is timed whole. The codes of a short sample are
compared first. Then the MaskTransformer draws 256 codes of one grid, and those of a DQ-VAE with 16 x 16 regions, in 12 steps (and 8 of the
layout). On a GPU, `bandwidth` is the share of --peak_gbs (default: H200) that reading weights and cache once per step takes.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from gpt import GPT, Blocks, Cache
from mask_transformer import MaskTransformer
from stackformer import Stackformer


class WholePrefix:
    """Stands in for Blocks.step: keeps the tokens and runs over all of them again."""

    def __init__(self, blocks: Blocks):
        self.blocks, self.seen, self.turns = blocks, [], []

    def __call__(self, x: torch.Tensor, kv: torch.Tensor, t: torch.Tensor, mask: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        self.turns.append(rope)
        return self.blocks(torch.stack(self.seen, dim=1), rope=torch.stack(self.turns, dim=2))[:, -1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--points", type=int, default=16)
    parser.add_argument("--peak_gbs", type=float, default=4800.0)
    parser.add_argument("--compile", action="store_true", help="compile the cached step")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads, half = max(1, args.width // 64), args.layers // 2
    kinds = {
        "GPT": lambda side: GPT(1024, side, n_layer=args.layers, n_head=heads, n_embd=args.width),
        "Stackformer": lambda side: Stackformer(1024, 2 * side, side**2 * 5 // 2, 0, half, args.layers - half, heads, args.width),
    }
    for name, make in kinds.items():
        # The same codes, either way? In a short sample: in a long one, a rounding error may tip a choice.
        short, samples = make(4).to(device, dtype).eval(), []
        for whole in (False, True):
            for blocks in stacks(short) if whole else ():
                blocks.step = WholePrefix(blocks)
            Cache.graphs = not whole  # a WholePrefix grows
            samples.append(short.sample(args.batch, generator=torch.Generator().manual_seed(0))["indices"])
        Cache.graphs = True
        same = (samples[0] == samples[1]).float().mean().item()

        model = make(16).to(device, dtype).eval()
        if args.compile:
            for blocks in stacks(model):
                blocks.step = torch.compile(blocks.step)
        model.sample(args.batch)
        (seconds, steps), whole = cached(model, args.batch), whole_prefix(model, args.batch, model.length, args.points)
        line = (f"{name}, {model.length} codes, batch {args.batch}, {args.layers} layers of {args.width}: cached {seconds:.2f} s "
                f"({args.batch / seconds:.2f} images/s), whole prefix {whole:.1f} s, {whole / seconds:.1f} x; codes of short samples agree "
                f"{same:.1%}")
        if device.type == "cuda":
            line += f"; bandwidth {bandwidth(model, args.batch, steps, seconds) / args.peak_gbs:.1%}"
        print(line)
    for name, grids, layers in (("256 codes", [16], (1, args.layers)), ("DQ-VAE's codes", [16, 32], (half, args.layers - half))):
        model = MaskTransformer(1024, grids, None, 0, *layers, heads, args.width).to(device, dtype).eval()
        if args.compile:
            for blocks in stacks(model):
                blocks.compile()
        model.sample(args.batch)
        start = clock()
        codes = model.sample(args.batch)
        seconds = clock() - start
        print(f"MaskTransformer, {name} (mean {model.lengths(codes).float().mean() - 1:.0f}), batch {args.batch}: {seconds:.2f} s "
              f"({args.batch / seconds:.2f} images/s)")


def cached(model: torch.nn.Module, batch: int) -> tuple[float, int]:
    """Seconds to draw so many images, and the steps that it takes: those of the longest sequence."""
    start = clock()
    codes = model.sample(batch)
    return clock() - start, int(model.lengths(codes).max())


@torch.no_grad()
def whole_prefix(model: torch.nn.Module, batch: int, steps: int, points: int) -> float:
    """Seconds to draw so many images, if each of the steps runs over all tokens so far: measured at some lengths, and multiplied out."""
    weight, seconds = next(model.parameters()), []
    tokens = torch.randn(batch, steps, weight.shape[-1], device=weight.device, dtype=weight.dtype)
    for i in range(points):
        prefix = tokens[:, :max(1, round((i + 0.5) * steps / points))]
        for blocks in stacks(model):
            blocks(prefix)  # warm
        start = clock()
        for blocks in stacks(model):
            blocks(prefix)
        seconds.append(clock() - start)
    return sum(seconds) / points * steps


def bandwidth(model: torch.nn.Module, batch: int, steps: int, seconds: float) -> float:
    """GB/s, if each step reads the weights and the cache of keys and values (half full, on average) once."""
    weight = next(model.parameters())
    layers, width = sum(len(blocks.layers) for blocks in stacks(model)), weight.shape[-1]
    read = sum(p.numel() for p in model.parameters()) + batch * steps * width * layers
    return read * weight.element_size() * steps / seconds / 1e9


def stacks(model: torch.nn.Module) -> list[Blocks]:
    return [m for m in model.modules() if isinstance(m, Blocks)]


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
