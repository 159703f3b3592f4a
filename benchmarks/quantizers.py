"""What each quantizer costs: time and memory of a training step of a small VQGAN, relative to `vq`.

    python benchmarks/quantizers.py [--bits 10 14 18] [--image_size 32] [--batch 16] [--steps 10]

Every case runs in a process of its own. Memory is the most that the process held (on a GPU: that torch allocated), less that of importing
torch and making the model. GFLOP counts the matrix products of the quantizer alone, forward and backward.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.run import peak_memory
from quantizers import BSQ, FSQ, IBQ, LFQ, ResidualVQ, SimVQ
from vqgan import VQGAN, VectorQuantizer

LEVELS = {10: [8, 5, 5, 5], 14: [8, 8, 8, 6, 5], 16: [8, 8, 8, 5, 5, 5], 18: [8, 8, 8, 8, 8, 8]}
CASES = {
    "vq": lambda bits: VectorQuantizer(2**bits, 64), "vq, EMA": lambda bits: VectorQuantizer(2**bits, 64, ema_decay=0.98),
    "vq, rotation": lambda bits: VectorQuantizer(2**bits, 64, rotation=True), "fsq": lambda bits: FSQ(LEVELS[bits]),
    "lfq": lambda bits: LFQ(bits), "bsq": lambda bits: BSQ(bits), "simvq": lambda bits: SimVQ(2**bits, 64),
    "ibq (dim 32)": lambda bits: IBQ(2**bits, 32), "residual, 2 deep": lambda bits: ResidualVQ(2 ** (bits // 2), 64, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", choices=list(LEVELS), default=[10, 14])
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args)
        return
    print("| quantizer | bits | ms per step | of vq's | MiB | GFLOP |\n| --- | --- | --- | --- | --- | --- |")
    for bits in args.bits:
        first = None
        for name in CASES:
            words = ["--one", name, "--bits", bits, "--image_size", args.image_size, "--batch", args.batch, "--steps", args.steps]
            done = subprocess.run([sys.executable, __file__, *map(str, words)], capture_output=True, text=True)
            if done.returncode:
                print(f"| {name} | {bits} | {done.stderr.strip().splitlines()[-1] if done.stderr else 'out of memory'} | | | |", flush=True)
                continue
            ms, memory, flops = map(float, done.stdout.split())
            first = first or ms
            print(f"| {name} | {bits} | {ms:.0f} | {ms / first:.2f} | {memory:.0f} | {flops:.2f} |", flush=True)


def one(args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    quantizer = CASES[args.one](args.bits[0])
    model = VQGAN(args.image_size, 32, [1, 1, 2], 1, [], 64, quantizer).to(device)
    images = torch.rand(args.batch, 3, args.image_size, args.image_size, device=device) * 2 - 1
    with torch.no_grad():
        z = model.latents(images)
    before, times = peak_memory(), []
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    for _ in range(args.steps + 2):
        start = time.perf_counter()
        out = model(images)
        ((out.images - images).square().mean() + sum(out.losses.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    memory = peak_memory() - before
    with FlopCounterMode(display=False) as counter:
        z_q, _, losses, _ = quantizer(z.requires_grad_())
        (z_q.sum() + sum(losses.values())).backward()
    print(1e3 * statistics.median(times[2:]), 1024 * memory, counter.get_total_flops() / 1e9)


if __name__ == "__main__":
    main()
