"""What the scripts share that draw images from a stage-2 run.

    load_models             both models of a run
    sampling_arguments      the settings that a model accepts
    chosen_labels           the classes that are asked for
    sample_codes, draw      codes and images, each with random numbers of its own
    model_parser            the options of all scripts that sample
    to_path, parse_with_overrides    what is special about command lines
"""

import argparse
import inspect
import re
import sys
from pathlib import Path

import torch

from dataset import to_uint8
from gpt import check_sampling
from harness.config import UserError, build
from harness.models import STAGE2, class_names, load_run, set_image_size
from harness.use import asked_rate, in_precision, set_rate

GRAINS = {1: [""], 2: ["coarse", "fine"], 3: ["coarse", "medium", "fine"]}  # granularities' names


def load_models(folder, which="latest", device=torch.device("cpu"), precision=None):
    """(stage-2 model, stage-1 model, config, names of the classes) of a stage-2 run, in eval mode
    on this device. Each model computes in this precision, or else in the one that it was trained
    in."""
    model, config = load_run(folder, which)
    if config["model"]["name"] not in STAGE2:
        raise UserError(f"{folder} holds a stage-1 model ({config['model']['name']}); give the run "
                        "folder of a stage-2 one")
    stage1, stage1_config = load_run(Path(folder) / "stage1")
    set_image_size(stage1, config["data"]["image_size"])
    if (rate := asked_rate(config["codes"])) is not None:
        set_rate(stage1, rate)
    model = in_precision(model, config, device, precision)
    stage1 = in_precision(stage1, stage1_config, device, precision)
    names = class_names(folder) or [str(i) for i in range(model.num_classes)]
    return model, stage1, config, names


def sampling_arguments(model, settings, labels=None):
    """The sampling settings that this model accepts. UserError, before anything is drawn, for
    settings that make no sense; of a model (not only its class) also for guidance that it cannot
    have."""
    is_class = isinstance(model, type)
    accepted = inspect.signature(model.sample).parameters
    names = [name for name in settings if name in accepted]
    for name, value in settings.items():
        if value is not None and name not in (*names, "columns", "rows"):
            model_class = model if is_class else type(model)
            raise UserError(f"sample.{name} is not for a {model_class.__name__}, which has "
                            f"{', '.join(names)}")
    for end in ("", "_pos"):
        build(check_sampling, {}, temperature=settings[f"temperature{end}"] or 0.0,
              top_k=settings[f"top_k{end}"], top_p=settings[f"top_p{end}"])
    scale = settings["cfg_scale"]
    if not is_class and scale != 1 and (labels is None or not model.has_null):
        raise UserError(f"--cfg {scale:g} needs a class-conditional model that was trained with "
                        "label_dropout")
    return {name: settings[name] for name in names if settings[name] is not None}


def chosen_labels(asked, classes, n):
    """Labels (n,) that go through the classes asked for, by name, number or part of a name. None
    for an unconditional model, which has no classes."""
    chosen = range(len(classes))
    if not classes:
        if asked:
            raise UserError("--classes was given, but this model is unconditional")
        return None
    if asked:
        words = [asked] if asked in classes else asked.split(",")
        chosen = [label for word in words for label in labels_of(word.strip().lower(), classes)]
    return torch.tensor(chosen)[torch.arange(n) % len(chosen)]


def labels_of(word, classes):
    matches = [i for i, name in enumerate(classes) if name.lower() == word]
    if not matches and word.removeprefix("-").isdecimal():
        matches = [int(word)]
    elif not matches and word:
        matches = [i for i, name in enumerate(classes) if word in name.lower()]
    if not matches or not 0 <= matches[-1] < len(classes):
        listed = ", ".join(classes[:20] + ["..."] * (len(classes) > 20))
        raise UserError(f"there is no class {word!r}; the classes are 0 to {len(classes) - 1}: "
                        f"{listed}")
    return matches


@torch.no_grad()
def draw(model, stage1, numbers, labels, seed, settings):
    """Images with these numbers, uint8 (n, H, W, 3); labels are those of all images."""
    if labels is not None:
        labels = labels[numbers]
    codes = sample_codes(model, numbers, labels, seed, settings)
    # On the CPU one by one: in batches they would round differently.
    at_once = 1 if stage1.last_layer.device.type == "cpu" else len(numbers)
    parts = zip(*(value.split(at_once) for value in codes.values()))
    images = torch.cat([stage1.decode(dict(zip(codes, part))) for part in parts])
    return to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()


def sample_codes(model, numbers, labels, seed, settings):
    """Codes of the images with these numbers and labels; each has random numbers of its own."""
    # A CPU generator uses 32 bits of its seed. All numbers of one seed give different ones, those
    # of two seeds are far apart.
    first = seed * 2_654_435_761
    generators = [torch.Generator().manual_seed((first + number) % 2**32) for number in numbers]
    try:
        return model.sample(len(numbers), labels, generator=generators, **settings)
    except ValueError as error:
        raise UserError(str(error)) from error


def model_parser(description):
    """A parser with the options of all scripts that sample."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--which", choices=("latest", "best"), default="latest",
                        help="which of the run's weights")
    parser.add_argument("--mixed_precision", choices=("no", "bf16", "fp16"),
                        help="no: float32 (default: as the run was trained)")
    return parser


def to_path(text):
    return Path(text).expanduser()


def parse_with_overrides(parser, argv):
    """The arguments of a command line, and as `overrides` its words key.sub=value, which may stand
    anywhere."""
    words = sys.argv[1:] if argv is None else argv
    overrides = [word for word in words if re.match(r"\w+\.[\w.]+=", word)]
    args = parser.parse_args([word for word in words if word not in overrides])
    args.overrides = overrides
    return args
