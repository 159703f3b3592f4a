"""How fast training is: the loader alone, and whole steps, with what share of the GPU's arithmetic (MFU).

    python benchmarks/training.py --config configs/stage1/vqgan_imagenet_f16.yaml [key.sub=value ...]
    python benchmarks/training.py --config configs/stage1/vqgan_imagenet_f16.yaml --data     # with the config's own images

    python benchmarks/training.py --config configs/stage2/gpt_ffhq.yaml codes.stage1=runs/vqgan_ffhq_f16

For a stage-2 config: steps on codes from the cache against steps that encode their images first, and the share of padding with and
without batches of similar length. The stage-1 run can be of one step; nothing is written to it.

For stage 1, without --data the steps run on random images that lie on the device, so that nothing but the step is measured
(thresholds of an entropy router come from such images too); with it the
loader is measured alone and then feeds the steps. Every step has generator and discriminator, whatever the config's
`disc_start`; in bf16 on a GPU unless the config names a precision. MFU counts the multiplications and additions of forward
and backward passes (torch's FlopCounterMode) against --peak_tflops.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils.flop_counter import FlopCounterMode

import train_stage2
from dataset import make_dataset, train_loader
from gpt import parameter_groups, sides
from harness.code_cache import CodeBatches, CodeCache, code_loader
from harness.config import build, load_config, read_yaml
from harness.launch import run_main
from harness.models import make_model
from harness.run import compile_parts, peak_memory
from harness.settings import STAGE1_SECTIONS
from harness.settings_stage2 import STAGE2_SECTIONS
from losses import PatchGAN, Stage1Loss

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--data", action="store_true", help="measure the config's own data as well")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them")
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="of the GPU (default: H100 / H200, bf16)")
    args = parser.parse_intermixed_args()
    if "codes" in read_yaml(args.config):
        stage2(args)
    else:
        stage1(args)


def stage1(args) -> None:
    config = load_config(args.config, args.overrides, STAGE1_SECTIONS)
    train, device = config["train"], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, batches = train["train_batch_size"], None
    if args.data:
        dataset = build(make_dataset, config["data"], split="train")
        batches = train_loader(dataset, batch, num_workers=train["dataloader_num_workers"], device=device)
        seconds = timed(lambda: next(batches), args.warmup, args.steps)
        print(f"loader alone: {batch / seconds:.1f} images/s with {train['dataloader_num_workers']} workers")
    found = measure(stage1_step(config, device, batches), batch, args.warmup, args.steps, count=not train["compile"])
    print(line(found, precision(config, device), args.peak_tflops))


def stage1_step(config: dict, device: torch.device, batches: Iterator[tuple[torch.Tensor, None]] | None = None) -> Callable[[], None]:
    """A training step of a stage-1 config, with generator and discriminator, on these batches or on random images of the device."""
    train, size = config["train"], sides(config["data"]["image_size"])
    dtype = DTYPES.get(precision(config, device))
    if batches is None:
        fixed = torch.rand(train["train_batch_size"], 3, *size, device=device) * 2 - 1
        batches = iter(lambda: (fixed, None), 0)
    memory_format = torch.channels_last if train["channels_last"] else torch.contiguous_format
    model = make_model(config).to(device, memory_format=memory_format)
    if hasattr(model, "calibrate"):
        model.calibrate([torch.rand(8, 3, *size, device=device) * 2 - 1])
    criterion = build(Stage1Loss, config["loss"]).to(device, memory_format=memory_format)
    discriminator = build(PatchGAN, config["discriminator"]).to(device, memory_format=memory_format)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-6, fused=device.type == "cuda")
                  for m in (model, discriminator)]
    if train["compile"]:
        compile_parts(model)

    def run() -> None:
        images = next(batches)[0].to(memory_format=memory_format)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            out = model(images)
            loss, _ = criterion.generator(images, out, model.last_layer, discriminator if criterion.disc_weight > 0 else None,
                                          criterion.gan_start)
        loss.backward()
        if criterion.disc_weight > 0:
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                d_loss, _ = criterion.discriminator(images, out.images, discriminator)
            d_loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return run


def stage2(args) -> None:
    config = load_config(args.config, args.overrides, STAGE2_SECTIONS, lambda given: train_stage2.inherit_data(given, None))
    train, device = config["train"], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset = build(make_dataset, config["data"], split="train")
    autoencoder, *_ = train_stage2.load_stage1(config, None)
    train_stage2.complete(config, autoencoder, dataset.classes)
    autoencoder = autoencoder.to(device).requires_grad_(False)
    batch, count = train["train_batch_size"], min(len(dataset), max(1000, 64 * train["train_batch_size"]))
    model, step = stage2_step(config, device)

    with tempfile.TemporaryDirectory() as folder:
        example = autoencoder.encode(dataset[0][0].unsqueeze(0).to(device))
        cache = CodeCache(Path(folder), "codes", dataset, list(range(count)), 1, example, autoencoder.quantizer.codebook_size)
        cache.create()
        start = time.perf_counter()
        for _ in cache.encode(cache.missing(), autoencoder.encode, config["codes"]["batch_size"], train["dataloader_num_workers"], device):
            pass
        print(f"encoding: {count / (time.perf_counter() - start):.1f} images/s, once per image and view")
        lengths = model.lengths(cache[:][0])
        tokens = lengths.float().mean().item()
        shuffled, similar = padding(lengths, batch)
        print(f"padding: {shuffled:.2%} in random batches of {batch}, {similar:.2%} in batches of similar length "
              f"({tokens:.0f} tokens per image, from {lengths.min()} to {lengths.max()})")
        batches = code_loader(cache, lengths, batch, device=device)
        images = train_loader(dataset, batch, 0, train["dataloader_num_workers"], device=device)

        def encode_and_step() -> None:
            x, labels = next(images)
            step(autoencoder.encode(x), labels)

        fly = timed(encode_and_step, args.warmup, args.steps)
        found = measure(lambda: step(*next(batches)), batch, args.warmup, args.steps, count=not train["compile"])
        print(f"from the cache: {line(found, precision(config, device), args.peak_tflops)}, {batch * tokens / found['seconds']:.0f} "
              f"tokens/s; encoding on the fly: {batch / fly:.1f} images/s, {fly / found['seconds']:.2f} x as long")


def stage2_step(config: dict, device: torch.device) -> tuple[torch.nn.Module, Callable[[dict, torch.Tensor], None]]:
    """The model of a stage-2 config, and a training step of it on codes and labels."""
    train, dtype = config["train"], DTYPES.get(precision(config, device))
    model = make_model(config).to(device)
    if train["compile"]:
        compile_parts(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), 1e-6, fused=device.type == "cuda")

    def step(codes: dict[str, torch.Tensor], labels: torch.Tensor | None) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = model(codes, labels if train["class_conditional"] else None)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def padding(lengths: torch.Tensor, batch: int) -> tuple[float, float]:
    """Share of padding in random batches, and in batches of similar length."""
    count = len(lengths)
    shuffled = lengths[torch.randperm(count)[:count // batch * batch]].view(-1, batch).float()
    similar = torch.stack([lengths[rows].float() for rows, _ in zip(CodeBatches(lengths, 1, batch), range(count // batch))])
    return tuple(1 - (x.sum() / (x.amax(1) * batch).sum()).item() for x in (shuffled, similar))


def precision(config: dict, device: torch.device) -> str:
    return config["train"]["mixed_precision"] or ("bf16" if device.type == "cuda" else "no")


def measure(step: Callable[[], None], batch: int, warmup: int, steps: int, flops: int | None = None,
            count: bool = True) -> dict[str, float]:
    """Seconds per step, images/s, peak memory (GiB); and floating-point operations per step: `flops`, or counted, unless compiled code
    would hide them."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(step, warmup, steps)
    found = {"seconds": seconds, "images_per_second": batch / seconds, "gib": peak_memory()}
    if flops is None and count:
        with FlopCounterMode(display=False) as counter:
            step()
        flops = counter.get_total_flops()
    return found | ({"gflop_per_image": flops / batch / 1e9, "tflops": flops / seconds / 1e12, "flops": flops} if flops else {})


def line(found: dict[str, float], kind: str, peak_tflops: float) -> str:
    text = f"{kind}: {found['images_per_second']:.1f} images/s, {1e3 * found['seconds']:.1f} ms/step, peak memory {found['gib']:.2f} GiB"
    if "tflops" in found:
        text += f", {found['gflop_per_image']:.2f} GFLOP/image, {found['tflops']:.2f} TFLOP/s"
        text += f", MFU {found['tflops'] / peak_tflops:.1%}" if torch.cuda.is_available() else ""
    return text


def timed(run: Callable[[], None], warmup: int, steps: int) -> float:
    """Seconds per call."""
    for _ in range(warmup):
        run()
    synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        run()
    synchronize()
    return (time.perf_counter() - start) / steps


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    run_main(main)
