"""Stage 2: trains a transformer (GPT, Stackformer, DQ-Transformer) to generate the codes of a stage-1 run, and so images.

    accelerate launch train_stage2.py --config configs/quickstart/gpt.yaml codes.stage1=runs/vqgan [--resume auto] [key.sub=value ...]

The data settings are those of the stage-1 run, unless the config has others. The run folder gets a copy of the stage-1 weights, in
stage1/, so that it is all that sampling needs. The loop knows no model by name.
"""

import copy
import hashlib
import inspect
import json
import math
import os
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from dataset import CodeBatches, CodeCache, Files, ImageDataset, TrainBatches, code_loader, make_dataset, to_float, train_loader
from dqvae import DQVAE
from experiment import (STAGE2, Run, TrainSettings, UserError, build, compile_parts, gather, learning_rate_at, load_config, load_run,
                        make_model, mapping, own_folder, peak_memory, read_yaml, run_main, save_run, training_arguments, update_ema,
                        write_file)
from gpt import NotFinite, check_sampling, parameter_groups
from mqvae import MQVAE
from vqgan import VQGAN, VQVAE


@dataclass
class CodeSettings:
    """The section `codes`.

    stage1          the run folder of the stage-1 model
    which           latest or best: which of its weights
    cache           encode the training images once and keep the codes; false: encode every batch anew
    cache_views     how many crops and flips of each image are kept; epoch after epoch takes the next
    cache_dir       where (default: the folder `codes` in the stage-1 run, so that several runs share them)
    batch_size      images encoded at a time, per process
    """

    stage1: str | None = None
    which: Literal["latest", "best"] = "latest"
    cache: bool = True
    cache_views: int = 2
    cache_dir: str | None = None
    batch_size: int = 64


@dataclass
class SampleSettings:
    """The section `sample`: of the pictures made while training, and the defaults of sample.py.

    columns, rows                           of samples in a picture; a class-conditional model has a class per column
    temperature, top_k, top_p, cfg_scale    as in GPT.sample
    temperature_pos, top_k_pos, top_p_pos   of the positions, for models that have them (temperature: null = as temperature)
    """

    columns: int = 8
    rows: int = 4
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    cfg_scale: float = 1.0
    temperature_pos: float | None = None
    top_k_pos: int | None = None
    top_p_pos: float | None = None


@dataclass
class Stage2Settings(TrainSettings):
    """The section `train`: all of TrainSettings, and

    class_conditional       the model learns the labels of the images
    """

    class_conditional: bool = False


SECTIONS = {"model": STAGE2, "codes": CodeSettings, "data": make_dataset, "sample": SampleSettings, "train": Stage2Settings}

# Which stage-1 models a transformer reads the codes of, and what it must know of them.
READS = {
    "gpt": ((VQGAN, VQVAE), lambda m, size: {"grid": size // m.factor}),
    "stackformer": ((MQVAE,), lambda m, size: {"grid": m.grid, "num_codes": int(m.topk_ratio * m.grid**2)}),
    "dq_transformer": ((DQVAE,), lambda m, size: {"grids": [size // f for f in m.factors]}),
}


def main(argv: list[str] | None = None) -> None:
    # Config, stage-1 model and run folder
    args = training_arguments(__doc__, argv)
    config = load_config(args.config, args.overrides, SECTIONS, lambda given: inherit_data(given, args.resume))
    train = config["train"]
    stage1, stage1_config, source = load_stage1(config, args.resume)
    train_set, val_set = (build(make_dataset, config["data"], split=split) for split in ("train", "val"))
    complete(config, stage1, train_set.classes)
    run = Run(config, args.resume, fsdp=True)
    accelerator, device = run.accelerator, run.accelerator.device

    rank, world, accumulate = accelerator.process_index, accelerator.num_processes, train["gradient_accumulation_steps"]
    batch_size, conditional = train["train_batch_size"], train["class_conditional"]
    global_batch = batch_size * world * accumulate
    steps_per_epoch = len(train_set) / global_batch
    max_steps = train["max_train_steps"] or round(train["num_train_epochs"] * steps_per_epoch)
    if len(train_set) < batch_size * world:
        raise UserError(f"{len(train_set)} training images are fewer than one batch of {batch_size} x {world} processes; choose a smaller "
                        "train.train_batch_size")

    # Model and optimizer
    model = make_model(config).to(device)
    ema = copy.deepcopy(model).requires_grad_(False) if train["use_ema"] else None
    raw_model = model
    if train["compile"]:
        compile_parts(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, train["adam_weight_decay"]), lr=0.0,
                                  betas=(train["adam_beta1"], train["adam_beta2"]), eps=train["adam_epsilon"],
                                  fused=device.type == "cuda")
    model, optimizer = run.prepare(model, optimizer, ema)

    # Codes
    stage1 = stage1.to(device).requires_grad_(False)
    val_codes = encoded(run, stage1, val_set, train["num_validation_images"])
    train_codes = encoded(run, stage1, train_set, views=config["codes"]["cache_views"]) if config["codes"]["cache"] else None

    # Resume
    run.track(model=model, ema=ema, stateful={})
    step = run.resume()
    if run.is_main:
        if source.resolve() != (run.folder / "stage1").resolve():
            save_run(run.folder / "stage1", stage1_config, {"model": stage1})
        write_file(run.folder / "classes.json", json.dumps(train_set.classes) + "\n")
    if train_codes is not None:
        lengths = raw_model.survey(train_codes[i:i + 4096][0] for i in range(0, len(train_codes), 4096))
        batches = code_loader(train_codes, lengths, batch_size, train["seed"], step * accumulate, rank, world, device)

        def order(start):
            for rows in CodeBatches(lengths, train_codes.views, batch_size * world, train["seed"], start):
                yield [divmod(row, len(train_set)) for row in rows]
    else:
        loader = train_loader(train_set, batch_size, train["seed"], train["dataloader_num_workers"], step * accumulate, rank, world, device)
        batches = ((stage1.encode(images), labels) for images, labels in loader)
        order = partial(TrainBatches, len(train_set), batch_size * world, train["seed"])
    accelerator.print(f"{run.folder}: {sum(p.numel() for p in raw_model.parameters()) / 1e6:.1f} M parameters, "
                      f"{len(train_set)} images, {world} process(es), global batch {global_batch}, {max_steps} steps")

    # Loop
    progress, logged_at, logged_step, stop = run.progress(step, max_steps), time.monotonic(), step, None
    if step >= max_steps:
        accelerator.print(f"{run.folder} has had its {max_steps} steps")
    while step < max_steps and stop is None:
        lr = learning_rate_at(step, train, global_batch, max_steps, steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        run.begin_step()

        for _ in range(accumulate):
            codes, labels = next(batches)
            with accelerator.accumulate(model):
                out = model(codes, labels if conditional else None)
                run.backward(out["loss"])
                if accelerator.sync_gradients:
                    out["grad_norm"] = run.clip(model, optimizer)
                optimizer.step()
                optimizer.zero_grad()
            tokens = raw_model.lengths(codes).float()
            run.add(out | {"tokens": tokens.mean(), "padding": 1 - tokens.mean() / tokens.max()})

        step += 1
        run.end_step(step)
        if ema is not None:
            update_ema(ema, raw_model, train["ema_decay"], step)
        progress.update()
        stop = run.stop_reason(step)
        last = step == max_steps or stop is not None

        if step % train["logging_steps"] == 0 or last:
            values = run.means()
            images_per_second = (step - logged_step) * global_batch / (time.monotonic() - logged_at)
            values |= perplexities(values) | {"tokens_per_second": images_per_second * values["tokens"]}
            run.write(step, {"lr": lr, "images_per_second": images_per_second, "peak_memory_gib": peak_memory(),
                             "epoch": step / steps_per_epoch} | values)
            progress.set_postfix({"loss": f"{values['loss']:.3f}", "padding": f"{values['padding']:.0%}",
                                  "img/s": f"{images_per_second:.0f}"})
            logged_at, logged_step = time.monotonic(), step
            run.stop_if_bad(train_set, order)

        if step % train["validation_steps"] == 0 and step < max_steps:
            paused = time.monotonic()
            report(run, run.whole(ema or raw_model), stage1, val_codes, step)
            logged_at += time.monotonic() - paused
        if step % train["checkpointing_steps"] == 0 or last:
            run.save(step)

    progress.close()
    if stop is not None:
        accelerator.print(f"stopped by {stop} at step {step} of {max_steps}, saved; --resume auto continues")
    else:
        bits, grid = report(run, run.whole(ema or raw_model), stage1, val_codes, step)
        accelerator.print(f"{bits:.1f} bits per validation image. From the top: originals, reconstructions, samples: {grid}")
    run.close()


# ---------------------------------------------------------------------------------------------------------------------
# The stage-1 model and its codes


def inherit_data(given: dict, resume: str | None) -> None:
    """Puts the data settings of the stage-1 run under those that the user gave."""
    theirs = read_yaml(stage1_folder(given, resume)[0] / "config.yaml")
    given["data"] = mapping(theirs.get("data"), "data") | mapping(given.get("data"), "data")


def stage1_folder(config: dict, resume: str | None) -> tuple[Path, bool]:
    """Where the stage-1 model is, and whether that is the copy that a run which continues has of its own."""
    own = Path(str(config["train"]["output_dir"])).expanduser() / "stage1"
    copy_ = own if resume == "auto" else Path(resume or "").parent.parent / "stage1"
    if resume and (copy_ / "config.yaml").is_file():
        return copy_, True
    folder = mapping(config.get("codes"), "codes").get("stage1")
    if not folder or not (Path(str(folder)).expanduser() / "config.yaml").is_file():
        raise UserError(f"codes.stage1 must be the run folder of a trained stage-1 model; it is {folder!r}"
                        + (", which has no config.yaml" if folder else ""))
    theirs = Path(str(folder)).expanduser().resolve()
    if own.resolve() in (theirs, *theirs.parents):
        raise UserError(f"codes.stage1={folder} is where this run would put its copy of the stage-1 model; choose another train.output_dir")
    return Path(str(folder)).expanduser(), False


def load_stage1(config: dict, resume: str | None) -> tuple[torch.nn.Module, dict, Path]:
    """The stage-1 model, in eval mode, its config, and the folder that they are from."""
    folder, is_copy = stage1_folder(config, resume)
    model, stage1_config = load_run(folder, "latest" if is_copy else config["codes"]["which"])
    kinds = READS[config["model"]["name"]][0]
    if not isinstance(model, kinds):
        raise UserError(f"{folder} holds a {stage1_config['model']['name']}, but {config['model']['name']} reads the codes of "
                        f"{' or '.join(k.__name__.lower() for k in kinds)}")
    return model, stage1_config, folder


def complete(config: dict, stage1: torch.nn.Module, classes: list[str]) -> None:
    """Checks what is not seen by sections alone, and adds the model's settings that follow from the codes and the classes."""
    name, size, conditional, sample = (config["model"]["name"], config["data"]["image_size"], config["train"]["class_conditional"],
                                       config["sample"])
    if conditional and len(classes) < 2:
        raise UserError("train.class_conditional=true needs images with labels, but this data has none; sort them into a folder per class")
    if size % stage1.factor or getattr(stage1, "image_size", size) != size:
        raise UserError(f"the stage-1 model was not made for images of data.image_size={size} pixels")
    found = READS[name][1](stage1, size) | {"codebook_size": stage1.quantizer.codebook_size, "num_classes": len(classes) * conditional}
    for key, value in found.items():
        if config["model"].get(key, 0) not in (value, 0):
            raise UserError(f"model.{key} follows from the stage-1 run and the data; it is {value}, not {config['model'][key]}")
    config["model"] |= found
    if min(config["codes"]["cache_views"], config["codes"]["batch_size"], sample["columns"], sample["rows"]) < 1:
        raise UserError("codes.cache_views, codes.batch_size, sample.columns and sample.rows must be at least 1")
    if sample["cfg_scale"] != 1 and not (conditional and config["model"]["label_dropout"] > 0):
        raise UserError("sample.cfg_scale other than 1 needs train.class_conditional=true and model.label_dropout above 0")
    build(check_sampling, {"temperature": sample["temperature"], "top_k": sample["top_k"], "top_p": sample["top_p"]})
    build(check_sampling, {"temperature": sample["temperature_pos"] or 0.0, "top_k": sample["top_k_pos"], "top_p": sample["top_p_pos"]})
    sampling_arguments(STAGE2[name], sample)


def encoded(run: Run, stage1: torch.nn.Module, dataset: ImageDataset, limit: int | None = None, views: int = 1) -> CodeCache:
    """The codes of the dataset's images, or of `limit` of them; encoded now, as far as they are not yet on the disk."""
    settings, accelerator = run.config["codes"], run.accelerator
    count = min(limit or len(dataset), len(dataset))
    indices = [i * len(dataset) // count for i in range(count)]
    weights = hashlib.sha256()
    for name, tensor in stage1.state_dict().items():
        if not name.startswith(("quantizer.ema_", "quantizer.queue")):
            weights.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    # A folder may move; the names in it must be the same.
    data, root = {k: v for k, v in run.config["data"].items() if k != "root"}, run.config["data"]["root"]
    names = [dataset.source.name(i) for i in indices]
    if root and isinstance(getattr(dataset.source.load, "__self__", None), Files):
        names = [os.path.relpath(name, Path(root).expanduser()) for name in names]
    names = hashlib.sha256("\n".join(names).encode())
    key = hashlib.sha256(json.dumps([weights.hexdigest(), names.hexdigest(), data, views]).encode()).hexdigest()[:16]
    split = "train" if dataset.train else "val"
    if settings["cache_dir"]:
        folder = Path(settings["cache_dir"]).expanduser()
    else:
        folder = own_folder(Path(settings["stage1"] or run.folder).expanduser(), "codes", "codes/*", "codes/*/*") / "codes"
    with torch.no_grad():
        example = stage1.encode(image(dataset, indices[0]).unsqueeze(0).to(accelerator.device))
    cache = CodeCache(folder, f"{split}_{key}", dataset, indices, views, example, stage1.quantizer.codebook_size)
    if run.is_main:
        others = [p.name for p in folder.glob(f"{split}_*") if p.name != cache.folder.name]
        if others and not cache.folder.is_dir():
            accelerator.print(f"{folder} holds codes of other weights, images or data settings ({', '.join(others)}); encoding anew, "
                              "beside them")
        cache.create()
    accelerator.wait_for_everyone()
    missing = broadcast_object_list([cache.missing() if run.is_main else None])[0]
    if missing:
        bar = tqdm(total=len(missing), desc=f"encoding ({split})", unit="img", disable=not run.is_main, dynamic_ncols=True)
        with torch.no_grad(), bar:
            for done in cache.encode(missing[accelerator.process_index::accelerator.num_processes], stage1.encode,
                                     settings["batch_size"], run.train["dataloader_num_workers"], accelerator.device):
                bar.update(done * accelerator.num_processes)
                run.exit_at_signal("while encoding; the codes so far are kept, and the same command continues")
        accelerator.wait_for_everyone()
        if cache.missing():
            raise UserError(f"{cache.folder} is still not complete, although all was encoded; remove the folder and start again")
    for i in range(0, len(cache), 4096):
        if cache[i:i + 4096][0]["indices"].max() >= stage1.quantizer.codebook_size:
            raise UserError(f"{cache.folder} holds codes that the stage-1 model does not have; remove the folder and start again")
    return cache


def image(dataset: ImageDataset, index: int) -> torch.Tensor:
    """(3, S, S) in [-1, 1]."""
    pixels = dataset[index][0]
    return to_float(pixels) if pixels.dtype == torch.uint8 else pixels


# ---------------------------------------------------------------------------------------------------------------------
# Validation and samples


def perplexities(values: dict[str, float]) -> dict[str, float]:
    return {f"perplexity_{k}": math.exp(min(v, 50)) for k, v in values.items() if k in ("code", "content", "position")}


def sampling_arguments(kind: type, settings: dict) -> dict:
    """What of the section `sample` this model's `sample` takes."""
    known = inspect.signature(kind.sample).parameters
    for key, value in settings.items():
        if key.endswith("_pos") and value is not None and key not in known:
            raise UserError(f"sample.{key} is for models that generate positions, which {kind.__name__} does not")
    return {k: v for k, v in settings.items() if k in known}


@torch.no_grad()
def report(run: Run, model: torch.nn.Module, stage1: torch.nn.Module, val_codes: CodeCache, step: int) -> tuple[float, Path]:
    """Mean bits per validation image, logged with the losses; and the path of a picture: originals, their maps and
    reconstructions, and below them samples (of the same classes) under their maps. The best weights so far are kept."""
    accelerator, train, settings, was_training = run.accelerator, run.train, run.config["sample"], model.training
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    model.eval()

    sums, rows = {}, list(range(len(val_codes)))[rank::world]
    for i in range(0, len(rows), train["train_batch_size"]):
        codes, labels = val_codes[rows[i:i + train["train_batch_size"]]]
        codes, labels = {k: v.to(device) for k, v in codes.items()}, labels.to(device) if train["class_conditional"] else None
        with accelerator.autocast():
            values = {**model(codes, labels), "bits": model.bits(codes, labels).mean(), "images": torch.ones((), device=device)}
        for key, value in values.items():
            sums[key] = sums.get(key, 0) + value.item() * len(codes["indices"])
    every = gather(sums)  # a process may have had no image
    totals = {k: sum(s.get(k, 0.0) for s in every) for k in max(every, key=len)}
    means = {k: v / totals["images"] for k, v in totals.items() if k != "images"}
    run.write(step, {f"val_{k}": v for k, v in (means | perplexities(means)).items()})
    run.save_best(step, -means["bits"], model)

    # A column is a class, or just a column; sample number i has its own random numbers, whoever draws it.
    classes, all_labels = val_codes.dataset.classes, val_codes.dataset.source.labels
    columns = min(settings["columns"], len(classes)) if train["class_conditional"] else settings["columns"]
    wanted = [c * len(classes) // columns for c in range(columns)] if train["class_conditional"] else None
    mine = list(range(columns * settings["rows"]))[rank::world]
    drawn = {}
    if mine:
        generators = [torch.Generator().manual_seed(train["seed"] + i) for i in mine]
        labels = torch.tensor([wanted[i % columns] for i in mine]) if wanted else None
        try:
            with accelerator.autocast():
                codes = model.sample(len(mine), labels, generator=generators, **sampling_arguments(type(model), settings))
            pictures = stage1.decode(codes)
            cells = [*stage1.maps(codes, pictures).values(), pictures]
            drawn = {i: [cell[j].float().cpu() for cell in cells] for j, i in enumerate(mine)}
        except NotFinite as error:
            warnings.warn(f"the picture of step {step} is without samples: {error}", stacklevel=2)
    drawn = {i: cells for part in gather(drawn) for i, cells in part.items()}
    model.train(was_training)

    number = range(len(val_codes.dataset))
    chosen = ([next((i for i in number if all_labels[i] == label), 0) for label in wanted] if wanted
              else [c * len(number) // columns for c in range(columns)])
    originals = torch.stack([image(val_codes.dataset, i) for i in chosen]).to(device)
    codes = stage1.encode(originals)
    shown = zip(*[originals, *stage1.maps(codes, originals).values(), stage1.decode(codes)])
    sampled = settings["rows"] if len(drawn) == columns * settings["rows"] else 0
    picture = [[*cells, *(cell for r in range(sampled) for cell in drawn[r * columns + c])] for c, cells in enumerate(shown)]
    return means["bits"], run.picture(step, "samples", picture)


if __name__ == "__main__":
    run_main(main)
