"""How fast stage 1 trains: the loader alone, and whole steps, with what share of the GPU's arithmetic (MFU).

    python benchmarks/training.py --config configs/stage1/vqgan_imagenet_f16.yaml [key.sub=value ...]
    python benchmarks/training.py --config configs/stage1/vqgan_imagenet_f16.yaml --data     # with the config's own images

Without --data the steps run on random images that lie on the device, so that nothing but the step is measured
(thresholds of an entropy router come from such images too); with it the
loader is measured alone and then feeds the steps. Every step has generator and discriminator, whatever the config's
`disc_start`; in bf16 on a GPU unless the config names a precision. MFU counts the multiplications and additions of forward
and backward passes (torch's FlopCounterMode) against --peak_tflops.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils.flop_counter import FlopCounterMode

from dataset import make_dataset, train_loader
from experiment import STAGE1, argument_parser, build, compile_parts, load_config, peak_memory, run_main
from losses import PatchGAN, Stage1Loss
from train_stage1 import SECTIONS


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--data", action="store_true", help="measure the config's own data as well")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them")
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="of the GPU (default: H100 / H200, bf16)")
    args = parser.parse_intermixed_args()
    config = load_config(args.config, ["loss.disc_start=0", "loss.gan_start=0", *args.overrides], SECTIONS)
    train, settings = config["train"], dict(config["model"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, size = train["train_batch_size"], config["data"]["image_size"]
    precision = train["mixed_precision"] or ("bf16" if device.type == "cuda" else "no")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)

    if args.data:
        dataset = build(make_dataset, config["data"], split="train")
        batches = train_loader(dataset, batch, num_workers=train["dataloader_num_workers"], device=device)
        seconds = timed(lambda: next(batches), args.warmup, args.steps)
        print(f"loader alone: {batch / seconds:.1f} images/s with {train['dataloader_num_workers']} workers")
    else:
        fixed = torch.rand(batch, 3, size, size, device=device) * 2 - 1
        batches = iter(lambda: (fixed, None), 0)

    memory_format = torch.channels_last if train["channels_last"] else torch.contiguous_format
    model = build(STAGE1[settings.pop("name")], settings).to(device, memory_format=memory_format)
    if hasattr(model, "calibrate"):
        model.calibrate([torch.rand(8, 3, size, size, device=device) * 2 - 1])
    criterion = build(Stage1Loss, config["loss"]).to(device, memory_format=memory_format)
    discriminator = build(PatchGAN, config["discriminator"]).to(device, memory_format=memory_format)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-6, fused=device.type == "cuda")
                  for m in (model, discriminator)]
    if train["compile"]:
        compile_parts(model)

    def step() -> None:
        images = next(batches)[0].to(memory_format=memory_format)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            out = model(images)
            loss, _ = criterion.generator(images, out, model.last_layer, discriminator if criterion.disc_weight > 0 else None, 0)
        loss.backward()
        if criterion.disc_weight > 0:
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                d_loss, _ = criterion.discriminator(images, out.images, discriminator)
            d_loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    seconds = timed(step, args.warmup, args.steps)
    line = f"{precision}: {batch / seconds:.1f} images/s, {1e3 * seconds:.1f} ms/step of {batch}, peak memory {peak_memory():.2f} GiB"
    if not train["compile"]:
        with FlopCounterMode(display=False) as counter:
            step()
        flops = counter.get_total_flops()
        line += f", {flops / batch / 1e9:.2f} GFLOP/image, {flops / seconds / 1e12:.2f} TFLOP/s"
        if device.type == "cuda":
            line += f", MFU {flops / seconds / 1e12 / args.peak_tflops:.1%}"
    print(line)


def timed(run, warmup: int, steps: int) -> float:
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
