"""Stage 1: trains an autoencoder with discrete codes (VQGAN, VQ-VAE, MQ-VAE, DQ-VAE).

    accelerate launch train_stage1.py --config configs/quickstart/vqgan.yaml [--resume auto] [key.sub=value ...]

The loop knows no model by name: a model hands over images, losses, scalars to log and maps to draw.
"""

import copy
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import openmp  # noqa: F401, before torch
import numpy as np
import torch
from tqdm import tqdm

from checkpoint import write_file
from config import TrainSettings, UserError, build, load_config, parse_arguments
from dataset import ImageDataset, eval_loader, make_dataset, train_loader
from experiment import STAGE1, Run, compile_parts, make_model, set_image_size, update_ema
from finetune import freeze, init_from
from launch import run_main
from losses import PatchGAN, Stage1Loss
from quantizers import QUANTIZERS, gradient_norms
from vqgan import sides


@dataclass
class Stage1Settings(TrainSettings):
    channels_last: bool = False  # the memory layout that GPUs' convolutions like; needs compile, or each GroupNorm undoes it
    calibration_images: int = 2000  # how many training images the thresholds of an entropy router are computed from
    calibration_file: str | None = None  # thresholds.json of another run, to use instead
    codebook_stats_every: int | None = None  # record usage, norms and gradients of the codes every so many steps, for visualize.py


SECTIONS = {"model": STAGE1, "model.quantizer": QUANTIZERS, "model.image_size": "data.image_size",
            "data": make_dataset, "loss": Stage1Loss, "discriminator": PatchGAN,
            "train": Stage1Settings}


def main(argv: list[str] | None = None) -> None:
    # Config and run folder
    args = parse_arguments(__doc__, argv)
    config = load_config(args.config, args.overrides, SECTIONS)
    train = config["train"]
    run = Run(config, args.resume)
    accelerator, device, accumulate = run.accelerator, run.accelerator.device, train["gradient_accumulation_steps"]

    # Data
    train_set, val_set = (build(make_dataset, config["data"], split=split) for split in ("train", "val"))
    run.plan(train_set)
    if min(train["num_validation_images"] or len(val_set), len(val_set)) < run.world:
        raise UserError(f"there are fewer validation images than processes ({run.world}); hold out more, or start fewer")

    # Models
    model = make_model(config)
    criterion = run.local_main_first(lambda: build(Stage1Loss, config["loss"])).to(device)  # may download LPIPS
    discriminator = build(PatchGAN, config["discriminator"]) if criterion.disc_weight > 0 else None
    check_image_size(config["data"]["image_size"], model, discriminator)
    if discriminator is not None and criterion.gan_start >= run.max_steps:
        accelerator.print("the generator does not hear the discriminator in this run: "
                          f"loss.gan_start={criterion.gan_start} is not below "
                          f"its {run.max_steps} steps")
    init_from(run, model=model, discriminator=discriminator)
    freeze(model, train["freeze"])
    if discriminator is not None and criterion.adaptive_weight and not model.last_layer.requires_grad:
        raise UserError("train.freeze takes the last layer's gradient, which the GAN weight needs; set loss.adaptive_weight=false")
    memory_format = torch.channels_last if train["channels_last"] else torch.contiguous_format
    model, criterion = model.to(device, memory_format=memory_format), criterion.to(memory_format=memory_format)
    ema = copy.deepcopy(model).requires_grad_(False) if train["use_ema"] else None
    raw_model, raw_discriminator = model, discriminator
    raw_model.quantizer.accumulation_steps = accumulate
    if train["compile"]:
        compile_parts(model)

    # Optimizers
    def adamw(module):
        return torch.optim.AdamW(
            [p for p in module.parameters() if p.requires_grad], lr=0.0, betas=(train["adam_beta1"], train["adam_beta2"]),
            eps=train["adam_epsilon"], weight_decay=train["adam_weight_decay"], fused=device.type == "cuda")

    model, optimizer = accelerator.prepare(model, adamw(model))
    optimizers = {"model": optimizer}
    if discriminator is not None:
        discriminator = discriminator.to(device, memory_format=memory_format)
        discriminator, d_optimizer = accelerator.prepare(discriminator, adamw(discriminator))
        optimizers["discriminator"] = d_optimizer

    # Resume
    run.track(optimizers, {"lecam": criterion.lecam},
              model=model, discriminator=discriminator, ema=ema)
    start = run.resume()
    if start == 0:
        calibrate(run, raw_model, train_set)
    record_codebook = codebook_recorder(run, raw_model.quantizer, start)
    batches = train_loader(train_set, train["train_batch_size"], train["seed"], train["dataloader_num_workers"],
                           start=start * accumulate, rank=accelerator.process_index, world=run.world, device=device)

    # Loop
    validate = partial(report, run, ema or raw_model, val_set)
    run.start(start)
    step = start
    stop = None
    while step < run.max_steps and stop is None:
        run.set_learning_rate(step, *optimizers.values())
        raw_model.schedule(step, run.max_steps, train["seed"])
        run.guard.begin()
        for _ in range(accumulate):
            images = next(batches)[0].to(memory_format=memory_format)
            with accelerator.accumulate(*filter(None, (model, discriminator))):
                # Generator
                out = model(images)
                with accelerator.autocast():
                    loss, parts = criterion.generator(images, out, raw_model.last_layer, raw_discriminator, step, run.guard.scale)
                run.guard.backward(loss)
                if accelerator.sync_gradients:
                    parts["grad_norm"] = run.guard.clip(model, optimizer)
                optimizer.step()
                optimizer.zero_grad()

                # Discriminator, on the same reconstruction
                if criterion.discriminator_learns(step):
                    d_loss, d_parts = criterion.discriminator(images, out.images, discriminator)
                    run.guard.follow_scale(discriminator)
                    run.guard.backward(d_loss)
                    if accelerator.sync_gradients:
                        d_parts["d_grad_norm"] = run.guard.clip(discriminator, d_optimizer)
                    d_optimizer.step()
                    d_optimizer.zero_grad()
                    parts |= d_parts
            scalars = {k: v for k, v in out.info.items() if v.ndim == 0}
            if not raw_model.quantizer.training:  # frozen: it counts no codes
                del scalars["usage"]
            run.log.add(parts | scalars)

        step += 1
        record_codebook(step)
        run.guard.end(step)  # undoes what a bad step did
        if ema is not None:
            update_ema(ema, raw_model, train["ema_decay"], step)
        run.bar.update()
        stop = run.stop_reason(step)
        last = step == run.max_steps or stop is not None
        if step % train["logging_steps"] == 0 or last:
            run.write_log(step)
        with run.untimed():
            if step % train["validation_steps"] == 0 and step < run.max_steps:
                validate(step)
            if step % train["checkpointing_steps"] == 0 or last:
                run.save(step)
    run.finish(step, stop, validate)


def check_image_size(size: int | list[int], model: torch.nn.Module, discriminator: torch.nn.Module | None) -> None:
    """Finds sizes that do not fit before the first step, or the discriminator's first."""
    set_image_size(model, size)
    if discriminator is not None:
        try:
            copy.deepcopy(discriminator).to("meta")(torch.zeros(2, 3, *sides(size), device="meta"))  # shapes only
        except (RuntimeError, ValueError):
            raise UserError(f"images of {size} pixels are too small for discriminator.num_layers; choose fewer") from None


def calibrate(run: Run, model: torch.nn.Module, dataset) -> None:
    """Computes the thresholds of an entropy router from training images, or reads them; kept in the model and as thresholds.json."""
    path, accelerator = run.train["calibration_file"], run.accelerator

    def batches():
        loader = eval_loader(dataset, run.train["train_batch_size"], run.train["calibration_images"],
                             run.train["dataloader_num_workers"], device=accelerator.device)
        total = -(-min(run.train["calibration_images"], len(dataset)) // run.train["train_batch_size"])
        yield from (images for images, _ in tqdm(loader, "thresholds", total, disable=not run.is_main))

    try:
        if path is None:
            found = model.calibrate(batches())
        else:
            found = json.loads(Path(path).expanduser().read_text())
            model.set_thresholds(found["thresholds"], found["patch_size"])
            for key, asked in (("ratios", model.ratios), ("image_size", model.image_size)):
                any_rate = key == "ratios" and model.rate_range  # percentiles are for any ratios
                if found[key] != asked and not any_rate:
                    raise ValueError(f"they are for {key} {found[key]}, but the config asks for {asked}")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"no thresholds from train.calibration_file={path}: {error}" if path else str(error)) from error
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)
    if found and run.is_main:
        write_file(run.folder / "thresholds.json", json.dumps(found, indent=1) + "\n")


def codebook_recorder(run: Run, quantizer: torch.nn.Module, start: int) -> Callable[[int], None]:
    """A function that writes codebook/step_XXXXXXXX.npz after a step whose turn it is: `uses` int64 (K,) of the last codes (see
    VectorQuantizer.uses), `norms` and `gradient_norms` float32 (K,), of the first process's last batch."""
    every, folder, last = run.train["codebook_stats_every"], run.folder / "codebook", {}
    if every is not None and not quantizer.has_codebook:
        raise UserError(f"train.codebook_stats_every needs a codebook of learned vectors, which {type(quantizer).__name__} does not have")
    if every is None or not run.is_main:
        return lambda step: None
    folder.mkdir(exist_ok=True)
    for path in folder.glob("step_*.npz"):
        if path.stem > f"step_{start:08d}":  # of steps that are done again
            path.unlink()

    def before(_, given: tuple) -> None:
        last["codebook"] = quantizer.codebook.detach().clone()  # which the step is about to change

    def after(_, given: tuple, returned: tuple) -> None:
        last["args"] = given[0].detach(), returned[1], *given[1:2]  # vectors, their codes, and their weight in the loss

    def record(step: int) -> None:
        if step % every == 0:
            arrays = {"uses": quantizer.uses(), "norms": quantizer.codebook.detach().float().norm(dim=1),
                      "gradient_norms": gradient_norms(quantizer, *last["args"], codebook=last["codebook"])}
            file = io.BytesIO()
            np.savez(file, **{k: v.cpu().numpy() for k, v in arrays.items()})
            with run.log.spare(f"the codebook's record of step {step}"):
                write_file(folder / f"step_{step:08d}.npz", file.getvalue())

    quantizer.register_forward_pre_hook(before)
    quantizer.register_forward_hook(after)
    return record


@torch.no_grad()
def report(run: Run, model: torch.nn.Module, dataset: ImageDataset, step: int) -> str:
    """Logs the mean PSNR over the validation images, keeps the best weights so far, and draws some of the images, their maps and
    reconstructions. Returns a sentence about it."""
    accelerator, was_training = run.accelerator, model.training
    run.average_batchnorm()
    model.eval()
    sums, seen, rows = {}, 0, []
    count = min(run.train["num_validation_images"] or len(dataset), len(dataset)) // accelerator.num_processes
    shown = {i * count // 16 for i in range(16)}  # spread over the split, which may be in order of class
    for images, _ in eval_loader(dataset, run.train["train_batch_size"], run.train["num_validation_images"],
                                 run.train["dataloader_num_workers"], accelerator.process_index,
                                 accelerator.num_processes, accelerator.device):
        with accelerator.autocast():
            out = model(images)
        error = (out.images.float().clamp(-1, 1) - images).square().mean((1, 2, 3))          # the range is 2
        psnr = 10 * torch.log10(4 / error.clamp(min=1e-10))
        scalars = {k: v for k, v in out.info.items() if v.ndim == 0 and k not in ("usage", "perplexity")}
        for key, value in {"psnr": psnr.mean(), "images": torch.ones_like(psnr[0]), **scalars}.items():
            sums[key] = sums.get(key, 0) + value.float() * len(images)
        maps = [v for v in out.info.values() if v.ndim == 4]
        rows += [row for i, row in enumerate(zip(images, *maps, out.images), seen) if i in shown]
        seen += len(images)
    model.train(was_training)
    totals = dict(zip(sums, accelerator.reduce(torch.stack(list(sums.values())), "sum").tolist()))
    means = {f"val_{k}": v / totals["images"] for k, v in totals.items() if k != "images"}
    psnr = means["val_psnr"]
    run.log.write(step, means)
    run.save_best(step, psnr, model)
    grid = run.log.picture(step, "reconstructions", rows)
    return f"PSNR {psnr:.2f} dB on validation images. Originals above reconstructions: {grid}"


if __name__ == "__main__":
    run_main(main)
