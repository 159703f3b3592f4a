"""Stage 1: trains an autoencoder with discrete codes (VQGAN, VQ-VAE, MQ-VAE, DQ-VAE).

    accelerate launch train_stage1.py --config configs/quickstart/vqgan.yaml
        [--resume auto] [key.sub=value ...]

The loop knows no model by name: a model hands over images, losses, scalars to log and maps to draw.
"""

import copy
import json
from functools import partial
from pathlib import Path

from harness.checkpoint import write_file
from harness.codebook import recorder
from harness.config import UserError, build, load_config, parse_arguments
from harness.finetune import freeze, init_from
from harness.launch import run_main
from harness.models import make_model, set_image_size
from harness.run import Run, compile_parts, update_ema
from harness.settings import STAGE1_SECTIONS

import torch
from tqdm import tqdm

from dataset import eval_loader, make_dataset, to_uint8, train_loader
from losses import PatchGAN, Stage1Loss
from vqgan import sides


def main(argv=None):
    # Config, data and run folder
    args = parse_arguments(__doc__, argv)
    config = load_config(args.config, args.overrides, STAGE1_SECTIONS)
    train = config["train"]
    train_set = build(make_dataset, config["data"], split="train")
    val_set = build(make_dataset, config["data"], split="val")
    run = Run(config, train_set, args.resume)
    accelerator = run.accelerator
    device = accelerator.device
    accumulate = train["gradient_accumulation_steps"]

    # Models
    model = make_model(config)
    with accelerator.local_main_process_first():  # which may download a network
        criterion = build(Stage1Loss, config["loss"])
    discriminator = None
    if criterion.disc_weight > 0:
        discriminator = build(PatchGAN, config["discriminator"])
    check_image_size(config["data"]["image_size"], model, discriminator, criterion.perceptual)
    init_from(run, model=model, discriminator=discriminator)
    freeze(model, train["freeze"])
    check_gan(run, criterion, model)
    fidelity = None
    if train["validation_features"]:
        from harness.features import Reconstructions

        with accelerator.local_main_process_first():
            fidelity = build(Reconstructions, {}, features=train["validation_features"],
                             device=device, count=min(train["num_validation_images"], len(val_set)))
    memory_format = torch.channels_last if train["channels_last"] else torch.contiguous_format
    model = model.to(device, memory_format=memory_format)
    criterion = criterion.to(device, memory_format=memory_format)
    ema = copy.deepcopy(model).requires_grad_(False) if train["use_ema"] else None
    raw_model = model
    raw_discriminator = discriminator
    raw_model.quantizer.accumulation_steps = accumulate
    if train["compile"]:
        compile_parts(model)

    # Optimizers
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = run.make_optimizer(model, [{"params": parameters}])
    model, optimizer = accelerator.prepare(model, optimizer)
    optimizers = {"model": optimizer}
    if discriminator is not None:
        discriminator = discriminator.to(device, memory_format=memory_format)
        d_optimizer = run.make_optimizer(discriminator, [{"params": discriminator.parameters()}])
        discriminator, d_optimizer = accelerator.prepare(discriminator, d_optimizer)
        optimizers["discriminator"] = d_optimizer

    # Resume
    start = run.resume(optimizers, [criterion.lecam],
                       model=model, discriminator=discriminator, ema=ema)
    if start == 0:
        calibrate(run, raw_model, train_set)
    record_codebook = recorder(run, raw_model.quantizer, start)
    batches = train_loader(
        train_set, train["train_batch_size"], train["seed"], train["dataloader_num_workers"],
        start * accumulate, accelerator.process_index, run.world, device)

    # Loop
    validate = partial(report, run, ema or raw_model, val_set, fidelity)
    bar = run.start(start)
    step = start
    stop = None
    while step < run.max_steps and stop is None:
        run.set_learning_rate(step, *optimizers.values())
        raw_model.schedule(step, run.max_steps, train["seed"])
        run.guard.begin()
        for _ in range(accumulate):
            images = next(batches)[0].to(memory_format=memory_format)
            # Between two optimizer steps, accelerate makes step and zero_grad do nothing
            with accelerator.accumulate(*filter(None, (model, discriminator))):
                # Generator. The EMA codebook moves in its forward pass
                out = model(images)
                with accelerator.autocast():
                    loss, parts = criterion.generator(
                        images, out, raw_model.last_layer, raw_discriminator, step,
                        run.guard.scale)
                run.guard.backward(loss)
                if accelerator.sync_gradients:
                    parts["grad_norm"] = run.guard.clip("model", optimizer)
                optimizer.step()
                optimizer.zero_grad()

                # Discriminator, on the same reconstruction; it is free of the generator's gradients
                if criterion.discriminator_learns(step):
                    d_loss, d_parts = criterion.discriminator(
                        images, out.images, discriminator)
                    run.guard.follow_scale("discriminator")
                    run.guard.backward(d_loss)
                    if accelerator.sync_gradients:
                        d_parts["d_grad_norm"] = run.guard.clip("discriminator", d_optimizer)
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
        bar.update()
        stop = run.stop_reason(step)
        last = step == run.max_steps or stop is not None
        if step % train["logging_steps"] == 0 or last:
            bar.set_postfix(run.write_log(step))
        with run.untimed():
            if step % train["validation_steps"] == 0 and step < run.max_steps:
                validate(step)
            if step % train["checkpointing_steps"] == 0 or last:
                run.save(step)
    bar.close()
    run.finish(step, stop, validate)


def check_image_size(size, model, discriminator, perceptual):
    """Finds sizes that do not fit before the first step, or the discriminator's first."""
    set_image_size(model, size)
    images = torch.zeros(2, 3, *sides(size), device="meta")  # shapes alone
    if discriminator is not None:
        try:
            copy.deepcopy(discriminator).to("meta")(images)
        except (RuntimeError, ValueError):
            raise UserError(f"images of {size} pixels are too small for discriminator.num_layers; "
                            "choose fewer") from None
    if perceptual is not None:
        try:
            copy.deepcopy(perceptual).to("meta")(images, images)
        except (RuntimeError, ValueError):
            raise UserError(f"images of {size} pixels are too small for loss.perceptual") from None


def check_gan(run, criterion, model):
    if criterion.disc_weight == 0:
        return
    if criterion.gan_start >= run.max_steps:
        run.accelerator.print("the generator does not hear the discriminator in this run: "
                              f"loss.gan_start={criterion.gan_start} is not below its "
                              f"{run.max_steps} steps")
    if criterion.adaptive_weight and not model.last_layer.requires_grad:
        raise UserError("train.freeze takes the last layer's gradient, which the GAN weight needs; "
                        "set loss.adaptive_weight=false")


def calibrate(run, model, dataset):
    """Computes the thresholds of an entropy router from training images, or reads them; kept in the
    model and as thresholds.json."""
    train = run.train
    path = train["calibration_file"]

    def batches():
        loader = eval_loader(dataset, train["train_batch_size"], train["calibration_images"],
                             train["dataloader_num_workers"], device=run.accelerator.device)
        for images, _ in tqdm(loader, "thresholds", disable=not run.is_main):
            yield images

    try:
        thresholds = model.calibrate(batches()) if path is None else read_thresholds(path, model)
    except (OSError, KeyError, TypeError, ValueError) as error:
        source = f"no thresholds from train.calibration_file={path}: " if path else ""
        raise UserError(f"{source}{error}") from error
    if run.world > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)
    if thresholds and run.is_main:
        write_file(run.folder / "thresholds.json", json.dumps(thresholds, indent=1) + "\n")


def read_thresholds(path, model):
    thresholds = json.loads(Path(path).expanduser().read_text())
    model.set_thresholds(thresholds["thresholds"], thresholds["patch_size"])
    asked = {"image_size": model.image_size}
    if not model.rate_range:  # percentiles are for any ratios
        asked["ratios"] = model.ratios
    for key, value in asked.items():
        if thresholds[key] != value:
            raise ValueError(f"they are for {key} {thresholds[key]}, but the config asks for "
                             f"{value}")
    return thresholds


@torch.no_grad()
def report(run, model, dataset, fidelity, step):
    """Logs the mean PSNR over the validation images and the Frechet distance, keeps the best
    weights so far, and draws some of the images, their maps and reconstructions. Returns a sentence
    about it."""
    accelerator = run.accelerator
    limit = run.train["num_validation_images"]
    run.average_batchnorm()
    model.eval()
    sums = {}
    pictures = []
    seen = 0
    share = min(limit or len(dataset), len(dataset)) // run.world
    drawn = {i * share // 16 for i in range(16)}  # spread over the split, maybe in order of class
    for images, _ in eval_loader(dataset, run.train["train_batch_size"], limit,
                                 run.train["dataloader_num_workers"], accelerator.process_index,
                                 run.world, accelerator.device):
        with accelerator.autocast():
            out = model(images)
        error = (out.images.float().clamp(-1, 1) - images).square().mean((1, 2, 3))
        psnr = 10 * torch.log10(4 / error.clamp(min=1e-10))  # the range is 2
        values = {k: v for k, v in out.info.items() if v.ndim == 0}
        values["psnr"] = psnr.mean()
        for key, value in values.items():
            sums[key] = sums.get(key, 0) + value.float() * len(images)
        if fidelity:
            fidelity.add(to_uint8(images), to_uint8(out.images))
        maps = [v for v in out.info.values() if v.ndim == 4]
        for i, cells in enumerate(zip(images, *maps, out.images), seen):
            if i in drawn:
                pictures.append(cells)
        seen += len(images)
    model.train()
    means = {f"val_{key}": mean for key, mean in run.mean_over_images(sums, seen).items()
             if key not in ("usage", "perplexity")}  # which are of the training codes, or a batch's
    if fidelity:
        means[f"val_{fidelity.name}"] = fidelity.distance()
    run.log.write(step, means)
    run.save_best(step, means["val_psnr"], model)
    grid = run.log.picture(step, "reconstructions", pictures)
    return (f"PSNR {means['val_psnr']:.2f} dB on validation images. Originals above "
            f"reconstructions: {grid}")


if __name__ == "__main__":
    run_main(main)
