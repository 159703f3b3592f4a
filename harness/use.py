"""Trained models in use, by all scripts but train_stage1.py.

    in_precision    a model that computes in the precision that it was trained in, or in another
    run_dataset     the images that a run was trained on, or others
    to_rates        the option --rates
    set_rate        the rate of a stage-1 model that knows several
"""

import torch

from dataset import make_dataset
from harness.config import UserError, build, check_config, mapping, override
from harness.models import STAGE1, set_image_size


def in_precision(model, config, device, asked=None):
    """The model on the device, for use, not for training: it encodes, decodes and samples in the
    precision that was asked for, or else in the one that its run was trained in."""
    precision = asked or precision_of(config)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    autocast = torch.autocast(device.type, dtype, precision != "no")
    if config["model"]["name"] in STAGE1:
        model.encode = autocast(model.encode)
        model.decode = autocast(model.decode)
    else:
        model.bits = autocast(model.bits)
        model.sample = autocast(model.sample)
    return model.to(device)


def precision_of(config):
    """The precision that a run was trained in; a converted one has none, which is float32, "no"."""
    return mapping(config.get("train"), "train").get("mixed_precision") or "no"


def run_dataset(config, overrides, split, model):
    """The images of a split of the data that a run was trained on, or of other data by overrides
    (data.root=...)."""
    settings = overridden(config, overrides, data=make_dataset)
    dataset = build(make_dataset, settings["data"], split=split)
    set_image_size(model, dataset.image_size)
    return dataset


def overridden(config, overrides, **sections):
    """These sections of a run's config with key.sub=value overrides, checked. See load_config."""
    settings = {name: dict(config[name]) for name in sections}
    override(settings, overrides, sections)
    return check_config(settings, sections, "the command line")


def to_rates(text):
    """A list of numbers from an option."""
    try:
        return [float(rate) for rate in text.split(",")]
    except ValueError:
        raise UserError("--rates must be numbers with commas between them; they are "
                        f"{text!r}") from None


def set_rate(model, rate):
    """Chooses the rate of a stage-1 model wherever none is given; UserError if it cannot be."""
    try:
        model.set_rate(rate)
    except ValueError as error:
        raise UserError(f"this rate cannot be chosen: {error}") from error


def asked_rate(codes):
    """The rate that the section `codes` of a stage-2 run chooses, if any."""
    ratio = codes.get("ratio")
    ratios = codes.get("ratios")
    if ratio is not None and ratios is not None:
        raise UserError("give codes.ratio or codes.ratios, not both")
    return ratio if ratios is None else ratios
