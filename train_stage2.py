"""Stage 2: trains a transformer (GPT, Stackformer, DQ-Transformer, MaskTransformer) to generate the codes of a stage-1 run, and so images.

    accelerate launch train_stage2.py --config configs/quickstart/gpt.yaml codes.stage1=runs/vqgan [--resume auto] [key.sub=value ...]

The data settings are those of the stage-1 run, unless the config has others. The run folder gets a copy of the stage-1 weights, in
stage1/, so that it is all that sampling needs. The loop knows no model by name.
"""

import copy
import json
import math
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import openmp  # noqa: F401, before torch
import torch
from accelerate.utils import gather_object

from checkpoint import wanted_checkpoint, write_file
from code_cache import CodeCache, code_loader, encode_dataset, image
from config import TrainSettings, UserError, build, load_config, mapping, read_yaml, parse_arguments
from dataset import make_dataset, train_loader
from dqvae import DQVAE
from experiment import (
    STAGE2, Run, asked_rate, class_names, compile_parts, load_run, make_model, perplexities, save_run, set_image_size, set_rate,
)
from finetune import freeze, init_from
from gpt import NotFinite, parameter_groups
from hub import run_folder
from launch import run_main
from mqvae import MQVAE
from sample import SampleSettings, in_precision, precision_of, sampling_arguments
from vqgan import VQGAN, VQVAE


@dataclass
class CodeSettings:
    """The section `codes`."""

    stage1: str | None = None  # the run folder of the stage-1 model
    which: Literal["latest", "best"] = "latest"  # of its weights
    ratio: float | None = None  # of a stage-1 model for any rate: the share of cells to keep or regions to refine; null: the middle
    ratios: list[float] | None = None  # or of regions for each granularity but the coarsest
    cache: bool = True  # encode the training images once and keep the codes; false: encode every batch anew
    cache_views: int = 2  # crops and flips of each image; epochs take them in turn
    cache_dir: str | None = None  # default: the folder `codes` in the stage-1 run, which several runs can share
    batch_size: int = 64  # images encoded at a time, per process


@dataclass
class Stage2Settings(TrainSettings):
    class_conditional: bool = False  # learn the labels of the images


SECTIONS = {"model": STAGE2, "codes": CodeSettings, "data": make_dataset, "sample": SampleSettings, "train": Stage2Settings}

# Which stage-1 models a transformer reads the codes of, and what it must know of them.
READS = {
    "gpt": ((VQGAN, VQVAE), lambda m, size: {"grid": grid(size, m.factor)}),
    "stackformer": ((MQVAE,), lambda m, size: {"grid": grid(size, m.factor), "num_codes": int(m.topk_ratio * math.prod(m.grid))}),
    "dq_transformer": ((DQVAE,), lambda m, size: {"grids": [grid(size, f) for f in m.factors]}),
    "mask_transformer": ((VQGAN, VQVAE, MQVAE, DQVAE), lambda m, size: {
        "grids": [grid(size, f) for f in getattr(m, "factors", [m.factor])],
        "num_codes": int(m.topk_ratio * math.prod(m.grid)) if isinstance(m, MQVAE) else None}),
}


def grid(size: int | list[int], factor: int) -> int | list[int]:
    return size // factor if isinstance(size, int) else [side // factor for side in size]


def main(argv: list[str] | None = None) -> None:
    # Config, stage-1 model and run folder
    args = parse_arguments(__doc__, argv)
    config = load_config(args.config, args.overrides, SECTIONS, lambda given: inherit_data(given, args.resume))
    train = config["train"]
    stage1, stage1_config, source = load_stage1(config, args.resume)
    train_set, val_set = (build(make_dataset, config["data"], split=split) for split in ("train", "val"))
    if train["class_conditional"]:
        folder, resumed = stage1_folder(config, args.resume)
        classes = class_names(folder.parent) if resumed else None
        train_set.set_classes(classes or train_set.classes)
        val_set.set_classes(train_set.classes)
    complete(config, stage1, train_set.classes)
    run = Run(config, args.resume, fsdp=True)
    run.plan(train_set)
    accelerator, device, accumulate = run.accelerator, run.accelerator.device, train["gradient_accumulation_steps"]

    # Model and optimizer
    model = make_model(config).to(device)
    init_from(run, model=model)
    freeze(model, train["freeze"])
    ema = copy.deepcopy(model).requires_grad_(False) if train["use_ema"] else None
    raw_model = model
    if train["compile"]:
        compile_parts(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, train["adam_weight_decay"]), lr=0.0,
                                  betas=(train["adam_beta1"], train["adam_beta2"]), eps=train["adam_epsilon"],
                                  fused=device.type == "cuda")
    model, optimizer = run.prepare(model, optimizer, ema)

    # Codes
    stage1, precision = in_precision(stage1, stage1_config, device).requires_grad_(False), precision_of(stage1_config)
    val_codes = encode_dataset(run, stage1, precision, val_set, train["num_validation_images"])
    train_codes = None
    if config["codes"]["cache"]:
        train_codes = encode_dataset(run, stage1, precision, train_set, views=config["codes"]["cache_views"])

    # Resume
    run.track(model=model, ema=ema, stateful={})
    start = run.resume()
    if run.is_main:
        if source.resolve() != (run.folder / "stage1").resolve():
            save_run(run.folder / "stage1", stage1_config, {"model": stage1})
        if train["class_conditional"]:
            write_file(run.folder / "classes.json", json.dumps(train_set.classes) + "\n")
    size, seed, rank = train["train_batch_size"], train["seed"], accelerator.process_index
    if train_codes is not None:
        parts = (train_codes[i:i + 4096][0] for i in range(0, len(train_codes), 4096))
        lengths = raw_model.survey({k: v.to(device) for k, v in codes.items()} for codes in parts).cpu()
        batches = code_loader(train_codes, lengths, size, seed, start * accumulate, rank, run.world, device)
    else:
        loader = train_loader(train_set, size, seed, train["dataloader_num_workers"], start * accumulate, rank, run.world, device)
        batches = ((stage1.encode(images), labels) for images, labels in loader)

    # Loop
    validate_and_draw = partial(report, run, ema or raw_model, stage1, val_codes)
    for _ in run.steps(start, [optimizer], validate_and_draw):
        for _ in range(accumulate):
            codes, labels = next(batches)
            with accelerator.accumulate(model):
                out = model(codes, labels if train["class_conditional"] else None)
                run.guard.backward(out["loss"])
                if accelerator.sync_gradients:
                    out["grad_norm"] = run.guard.clip(model, optimizer)
                optimizer.step()
                optimizer.zero_grad()
            tokens = raw_model.lengths(codes).float()
            run.log.add(out | {"tokens": tokens.mean(), "padding": 1 - tokens.mean() / tokens.max()})
    run.close()


def inherit_data(given: dict, resume: str | None) -> None:
    """Puts the data settings of the stage-1 run under those that the user gave."""
    theirs = read_yaml(stage1_folder(given, resume)[0] / "config.yaml")
    given["data"] = mapping(theirs.get("data"), "data") | mapping(given.get("data"), "data")


def stage1_folder(config: dict, resume: str | None) -> tuple[Path, bool]:
    """Where the stage-1 model is, and whether that is the resumed run's own copy."""
    run = Path(str(config["train"]["output_dir"])).expanduser()
    resume, own = wanted_checkpoint(resume, run), run / "stage1"
    copy_ = own if resume == "auto" else Path(resume or "").parent.parent / "stage1"
    if resume and (copy_ / "config.yaml").is_file():
        return copy_, True
    asked = mapping(config.get("codes"), "codes").get("stage1")
    folder = Path(run_folder(str(asked))).expanduser()
    if not asked or not (folder / "config.yaml").is_file():
        raise UserError(f"codes.stage1 must be the run folder of a trained stage-1 model; it is {asked!r}"
                        + (", which has no config.yaml" if asked else ""))
    if own.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise UserError(f"codes.stage1={folder} is where this run would put its copy of the stage-1 model; choose another train.output_dir")
    return folder, False


def load_stage1(config: dict, resume: str | None) -> tuple[torch.nn.Module, dict, Path]:
    """The stage-1 model, in eval mode, its config, and the folder that they are from."""
    folder, is_copy = stage1_folder(config, resume)
    model, stage1_config = load_run(folder, "latest" if is_copy else config["codes"]["which"])
    kinds = READS[config["model"]["name"]][0]
    if not isinstance(model, kinds):
        raise UserError(f"{folder} holds a {stage1_config['model']['name']}, but {config['model']['name']} reads the codes of "
                        f"{' or '.join(k.__name__.lower() for k in kinds)}")
    if hasattr(model.quantizer, "depth"):
        raise UserError(f"{folder} holds a model with {model.quantizer.depth} codes per cell (residual), which no transformer here reads")
    set_image_size(model, config["data"]["image_size"])
    if (rate := asked_rate(config["codes"])) is not None:
        set_rate(model, rate)
    return model, stage1_config, folder


def complete(config: dict, stage1: torch.nn.Module, classes: list[str]) -> None:
    """Checks what depends on several sections, and adds the model's settings that follow from codes and classes."""
    name, size, conditional, sample = (config["model"]["name"], config["data"]["image_size"], config["train"]["class_conditional"],
                                       config["sample"])
    if conditional and len(classes) < 2:
        raise UserError("train.class_conditional=true needs images with labels, but this data has none; docs/data.md says how "
                        "each kind of data names them")
    found = READS[name][1](stage1, size) | {"codebook_size": stage1.quantizer.codebook_size, "num_classes": len(classes) * conditional}
    if found.get("num_codes") == 0:
        raise UserError(f"{stage1.topk_ratio} of the cells of images of data.image_size={size} pixels is less than one")
    for key, value in found.items():
        if config["model"].get(key) not in (value, 0, None):
            raise UserError(f"model.{key} follows from the stage-1 run and the data; it is {value}, not {config['model'][key]}")
    config["model"] |= found
    if sample["cfg_scale"] != 1 and not (conditional and config["model"]["label_dropout"] > 0):
        raise UserError("sample.cfg_scale other than 1 needs train.class_conditional=true and model.label_dropout above 0")
    sampling_arguments(STAGE2[name], sample)


@torch.no_grad()
def report(run: Run, model: torch.nn.Module, stage1: torch.nn.Module, val_codes: CodeCache, step: int) -> str:
    """Logs the validation losses and mean bits per image, keeps the best weights so far, and draws originals, their maps and
    reconstructions, and below them samples (of the same classes) under their maps. Returns a sentence about it."""
    model, was_training = run.whole(model), model.training
    model.eval()
    means = validate(run, model, val_codes)
    run.log.write(step, {f"val_{k}": v for k, v in (means | perplexities(means)).items()})
    run.save_best(step, -means["bits"], model)

    # A column is a class, or just a column
    settings, data, conditional = run.config["sample"], val_codes.dataset, run.train["class_conditional"]
    columns = min(settings["columns"], len(data.classes)) if conditional else settings["columns"]
    wanted = [c * len(data.classes) // columns for c in range(columns)] if conditional else None
    drawn = draw_columns(run, model, stage1, columns, wanted, step)
    model.train(was_training)
    chosen = ([next((i for i in range(len(data)) if data.label(i) == label), 0) for label in wanted] if wanted
              else [c * len(data) // columns for c in range(columns)])
    originals = torch.stack([image(data, i) for i in chosen]).to(run.accelerator.device)
    codes = stage1.encode(originals)
    shown = zip(*[originals, *stage1.maps(codes, originals).values(), stage1.decode(codes)])
    picture = [[*cells, *(cell for number in range(c, len(drawn), columns) for cell in drawn[number])] for c, cells in enumerate(shown)]
    grid = run.log.picture(step, "samples", picture)
    sentence = (f"{means['bits']:.1f} bits per validation image. "
                f"From the top: originals, reconstructions, samples: {grid}")
    best_step, bits = run.checkpoints.best_step, -run.checkpoints.best
    if 0 < best_step < step:
        sentence += (f"\nThe best weights are those of step {best_step} ({bits:.1f} bits): "
                     "sample.py --which best")
    return sentence


def validate(run: Run, model: torch.nn.Module, val_codes: CodeCache) -> dict[str, float]:
    """Mean losses and bits over the validation images, each process taking its share."""
    sums, size, device = {}, run.train["train_batch_size"], run.accelerator.device
    rows = range(run.accelerator.process_index, len(val_codes), run.world)
    for i in range(0, len(rows), size):
        codes, labels = val_codes[list(rows[i:i + size])]
        codes, labels = {k: v.to(device) for k, v in codes.items()}, labels.to(device) if run.train["class_conditional"] else None
        with run.accelerator.autocast():
            values = {**model(codes, labels), "bits": model.bits(codes, labels).mean(), "images": torch.ones((), device=device)}
        for key, value in values.items():
            sums[key] = sums.get(key, 0) + value.item() * len(codes["indices"])
    every = gather_object([sums])  # a process may have had no image
    totals = {k: sum(s.get(k, 0.0) for s in every) for k in max(every, key=len)}
    return {k: v / totals["images"] for k, v in totals.items() if k != "images"}


def draw_columns(run: Run, model: torch.nn.Module, stage1: torch.nn.Module, columns: int, wanted: list[int] | None,
                 step: int) -> dict[int, list[torch.Tensor]]:
    """Samples by number, row by row, each [map, ..., image]. Number i has its own random numbers, whichever process draws it. None if
    the logits are not finite."""
    settings, total = run.config["sample"], columns * run.config["sample"]["rows"]
    mine, drawn = list(range(total))[run.accelerator.process_index::run.world], {}
    if mine:
        generators = [torch.Generator().manual_seed(run.train["seed"] + i) for i in mine]
        labels = torch.tensor([wanted[i % columns] for i in mine]) if wanted else None
        try:
            with run.accelerator.autocast():
                codes = model.sample(len(mine), labels, generator=generators, **sampling_arguments(type(model), settings))
            pictures = stage1.decode(codes)
            cells = [*stage1.maps(codes, pictures).values(), pictures]
            drawn = {i: [cell[j].float().cpu() for cell in cells] for j, i in enumerate(mine)}
        except NotFinite as error:
            warnings.warn(f"the picture of step {step} is without samples: {error}", stacklevel=3)
    drawn = {i: cells for part in gather_object([drawn]) for i, cells in part.items()}
    return drawn if len(drawn) == total else {}


if __name__ == "__main__":
    run_main(main)
