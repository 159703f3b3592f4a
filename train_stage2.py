"""Stage 2: trains a transformer (GPT, Stackformer, DQ-Transformer, MaskTransformer) to generate the
codes of a stage-1 run, and so images.

    accelerate launch train_stage2.py --config configs/quickstart/gpt.yaml codes.stage1=runs/vqgan
        [--resume auto] [key.sub=value ...]

The data settings are those of the stage-1 run, unless the config has others. The run folder gets a
copy of the stage-1 weights, in stage1/, so that it is all that sampling needs. The loop knows no
model by name.
"""

import copy
import json
import warnings
from functools import partial
from pathlib import Path

from harness import fsdp
from harness.checkpoint import wanted_checkpoint, write_file
from harness.code_cache import code_loader, encode_dataset
from harness.config import UserError, build, load_config, mapping, parse_arguments, read_yaml
from harness.finetune import freeze, init_from
from harness.hub import run_folder
from harness.launch import run_main
from harness.models import class_names, load_run, make_model, model_class, save_run, set_image_size
from harness.run import Run, compile_parts, perplexities, update_ema
from harness.sampling import sampling_arguments
from harness.settings_stage2 import STAGE2_SECTIONS
from harness.use import asked_rate, in_precision, precision_of, set_rate

import torch
from accelerate.utils import gather_object

from dataset import make_dataset, train_loader
from gpt import NotFinite, parameter_groups


def main(argv=None):
    # Config, stage-1 model and run folder
    args = parse_arguments(__doc__, argv)
    config = load_config(args.config, args.overrides, STAGE2_SECTIONS,
                         lambda settings: inherit_data(settings, args.resume))
    train = config["train"]
    source, is_copy = stage1_folder(config, args.resume)
    stage1, stage1_config = load_run(source, "latest" if is_copy else config["codes"]["which"])
    set_image_size(stage1, config["data"]["image_size"])
    if (rate := asked_rate(config["codes"])) is not None:
        set_rate(stage1, rate)
    train_set = build(make_dataset, config["data"], split="train")
    val_set = build(make_dataset, config["data"], split="val")
    if train["class_conditional"]:
        classes = class_names(source.parent) if is_copy else None
        train_set.set_classes(classes or train_set.classes)
        val_set.set_classes(train_set.classes)
    complete(config, stage1, train_set.classes)
    run = Run(config, train_set, args.resume, fsdp=True)
    accelerator = run.accelerator
    device = accelerator.device
    accumulate = train["gradient_accumulation_steps"]

    # Model and optimizer
    model = make_model(config).to(device)
    init_from(run, model=model)
    freeze(model, train["freeze"])
    ema = copy.deepcopy(model).requires_grad_(False) if train["use_ema"] else None
    raw_model = model
    if train["compile"]:
        compile_parts(model)
    optimizer = run.adamw(parameter_groups(model, train["adam_weight_decay"]))
    model, optimizer = fsdp.prepare(run, model, optimizer, ema)

    # Codes
    precision = precision_of(stage1_config)
    stage1 = in_precision(stage1, stage1_config, device).requires_grad_(False)
    val_codes = encode_dataset(run, stage1, precision, val_set, train["num_validation_images"])
    train_codes = None
    if config["codes"]["cache"]:
        views = config["codes"]["cache_views"]
        train_codes = encode_dataset(run, stage1, precision, train_set, views=views)

    # Resume
    start = run.resume({"model": optimizer}, [], model=model, ema=ema)
    if run.is_main:
        if source.resolve() != (run.folder / "stage1").resolve():
            save_run(run.folder / "stage1", stage1_config, {"model": stage1})
        if train["class_conditional"]:
            write_file(run.folder / "classes.json", json.dumps(train_set.classes) + "\n")
    place = accelerator.process_index, run.world, device
    size = train["train_batch_size"]
    if train_codes is not None:
        lengths = raw_model.survey(on_device(train_codes, device)).cpu()
        batches = code_loader(train_codes, lengths, size, train["seed"], start * accumulate, *place)
    else:
        loader = train_loader(train_set, size, train["seed"], train["dataloader_num_workers"],
                              start * accumulate, *place)
        batches = ((stage1.encode(images), labels) for images, labels in loader)

    # Loop
    validate = partial(report, run, ema or raw_model, stage1, val_codes)
    bar = run.start(start)
    step = start
    stop = None
    while step < run.max_steps and stop is None:
        run.set_learning_rate(step, optimizer)
        run.guard.begin()
        for _ in range(accumulate):
            codes, labels = next(batches)
            with accelerator.accumulate(model):
                out = model(codes, labels if train["class_conditional"] else None)
                run.guard.backward(out["loss"])
                if accelerator.sync_gradients:
                    out["grad_norm"] = run.guard.clip("model", optimizer)
                optimizer.step()
                optimizer.zero_grad()
            tokens = raw_model.lengths(codes).float()
            padding = 1 - tokens.mean() / tokens.max()
            run.log.add(out | {"tokens": tokens.mean(), "padding": padding})

        step += 1
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


def on_device(cache, device):
    """All codes of a cache, in parts."""
    for i in range(0, len(cache), 4096):
        codes, _ = cache[i:i + 4096]
        yield {name: value.to(device) for name, value in codes.items()}


def inherit_data(settings, resume):
    """Puts the data settings of the stage-1 run under those of the user."""
    folder, _ = stage1_folder(settings, resume)
    inherited = mapping(read_yaml(folder / "config.yaml").get("data"), "data")
    settings["data"] = inherited | mapping(settings.get("data"), "data")


def stage1_folder(config, resume):
    """Where the stage-1 model is, and whether that is the resumed run's own copy."""
    run = Path(str(config["train"]["output_dir"])).expanduser()
    resume = wanted_checkpoint(resume, run)
    resumed_run = run if resume == "auto" else Path(resume or "").parent.parent
    if resume and (resumed_run / "stage1/config.yaml").is_file():
        return resumed_run / "stage1", True
    asked = mapping(config.get("codes"), "codes").get("stage1")
    folder = Path(run_folder(str(asked))).expanduser()
    if not asked or not (folder / "config.yaml").is_file():
        why = ", which has no config.yaml" if asked else ""
        raise UserError("codes.stage1 must be the run folder of a trained stage-1 model; it is "
                        f"{asked!r}{why}")
    if folder.resolve().is_relative_to((run / "stage1").resolve()):
        raise UserError(f"codes.stage1={folder} is where this run would put its copy of the "
                        "stage-1 model; choose another train.output_dir")
    return folder, False


def complete(config, stage1, classes):
    """Checks what depends on several sections, and adds the model's settings that follow from codes
    and classes."""
    name = config["model"]["name"]
    size = config["data"]["image_size"]
    conditional = config["train"]["class_conditional"]
    if conditional and len(classes) < 2:
        raise UserError("train.class_conditional=true needs images with labels, but this data has "
                        "none; docs/data.md says how each kind of data names them")
    try:
        settings = model_class(name).settings_for(stage1, size)
    except ValueError as error:
        raise UserError(f"codes.stage1 does not fit: {error}") from error
    settings["num_classes"] = len(classes) if conditional else 0
    if settings.get("num_codes") == 0:
        raise UserError(f"{stage1.topk_ratio} of the cells of images of data.image_size={size} "
                        "pixels is less than one")
    for key, value in settings.items():
        if config["model"].get(key) not in (value, 0, None):
            raise UserError(f"model.{key} follows from the stage-1 run and the data; it is "
                            f"{value}, not {config['model'][key]}")
    config["model"] |= settings
    has_null = config["model"]["label_dropout"] > 0
    if config["sample"]["cfg_scale"] != 1 and not (conditional and has_null):
        raise UserError("sample.cfg_scale other than 1 needs train.class_conditional=true and "
                        "model.label_dropout above 0")
    sampling_arguments(model_class(name), config["sample"])


@torch.no_grad()
def report(run, model, stage1, val_codes, step):
    """Logs the validation losses and mean bits per image, keeps the best weights so far, and draws
    originals, their maps and reconstructions, and below them samples (of the same classes) under
    their maps. Returns a sentence about it."""
    model = fsdp.whole(run, model).eval()
    means = mean_losses(run, model, val_codes)
    run.log.write(step, {f"val_{k}": v for k, v in (means | perplexities(means)).items()})
    run.save_best(step, -means["bits"], model)

    # A column is a class, or just a column
    data = val_codes.dataset
    columns = run.config["sample"]["columns"]
    labels = None
    shown = [c * len(data) // columns for c in range(columns)]
    if run.train["class_conditional"]:
        columns = min(columns, len(data.classes))
        labels = [c * len(data.classes) // columns for c in range(columns)]
        shown = [first_of_class(data, label) for label in labels]
    samples = draw_columns(run, model, stage1, columns, labels, step)
    model.train()
    originals = torch.stack([data[i][0] for i in shown]).to(run.accelerator.device)
    codes = stage1.encode(originals)
    rows = [originals, *stage1.maps(codes, originals).values(), stage1.decode(codes)]
    picture = []
    for c, cells in enumerate(zip(*rows)):
        below = [cell for number in range(c, len(samples), columns) for cell in samples[number]]
        picture.append([*cells, *below])
    grid = run.log.picture(step, "samples", picture)
    sentence = (f"{means['bits']:.1f} bits per validation image. "
                f"From the top: originals, reconstructions, samples: {grid}")
    best = run.checkpoints.best_step
    if 0 < best < step:
        sentence += (f"\nThe best weights are those of step {best} ({-run.checkpoints.best:.1f} "
                     "bits): sample.py --which best")
    return sentence


def first_of_class(data, label):
    return next((i for i in range(len(data)) if data.label(i) == label), 0)


def mean_losses(run, model, val_codes):
    """Mean losses and bits over the validation images, each process taking its share."""
    size = run.train["train_batch_size"]
    device = run.accelerator.device
    rows = list(range(run.accelerator.process_index, len(val_codes), run.world))
    sums = {}
    for i in range(0, len(rows), size):
        codes, labels = val_codes[rows[i:i + size]]
        codes = {name: value.to(device) for name, value in codes.items()}
        labels = labels.to(device) if run.train["class_conditional"] else None
        with run.accelerator.autocast():
            values = {**model(codes, labels), "bits": model.bits(codes, labels).mean()}
        for key, value in values.items():
            sums[key] = sums.get(key, 0) + value.item() * len(codes["indices"])
    return run.mean_over_images(sums, len(rows))


def draw_columns(run, model, stage1, columns, labels, step):
    """Samples by number, row by row, each [map, ..., image]. Number i has its own random numbers,
    whichever process draws it. None if the logits are not finite."""
    settings = sampling_arguments(type(model), run.config["sample"])
    total = columns * run.config["sample"]["rows"]
    mine = list(range(run.accelerator.process_index, total, run.world))
    samples = {}
    if mine:
        generators = [torch.Generator().manual_seed(run.train["seed"] + i) for i in mine]
        mine_labels = torch.tensor([labels[i % columns] for i in mine]) if labels else None
        try:
            with run.accelerator.autocast():
                codes = model.sample(len(mine), mine_labels, generator=generators, **settings)
            images = stage1.decode(codes)
            rows = [*stage1.maps(codes, images).values(), images]
            samples = dict(zip(mine, zip(*(row.float().cpu() for row in rows))))
        except NotFinite as error:
            warnings.warn(f"the picture of step {step} is without samples: {error}", stacklevel=3)
    samples = {i: cells for part in gather_object([samples]) for i, cells in part.items()}
    return samples if len(samples) == total else {}


if __name__ == "__main__":
    run_main(main)
