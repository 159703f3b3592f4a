"""Reads YAML files and overrides into checked settings, and builds models and datasets from them.

    load_config         the config of a script: the file, key.sub=value overrides, defaults; or one sentence (UserError)
    check_config        the same for settings that were read already
    build               calls a class or function with its section of the config
    TrainSettings       the section `train`, common to both stages

A section is described by the signature of what takes its keys: their types, defaults and ranges. An int is from 1 to 2^31 and a float
finite and not negative, unless the annotation says otherwise: Annotated[int, (low, high)], both included. A value without quotes means
what its setting's type makes of its text: 010 is ten, and a folder may be called 2023 or on.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import inspect
import types
import typing
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch.nn as nn
import yaml

from quantizers import QUANTIZERS
from vqgan import VectorQuantizer


class UserError(Exception):
    """Something that the user can mend, in one sentence."""


Count = Annotated[int, (0, 2**62)]
Share = Annotated[float, (0, 1 - 1e-9)]


@dataclass
class TrainSettings:
    """The section `train`. Names follow accelerate's and diffusers' scripts."""

    output_dir: str | None = None  # the run folder; default: runs/NAME for configs/.../NAME.yaml
    seed: Annotated[int, (0, 2**32 - 1)] = 0
    train_batch_size: int = 12  # images per process and forward pass
    gradient_accumulation_steps: int = 1  # batch size x processes x this is the "global batch"
    init_from: str | None = None  # start from the weights of this run or checkpoint, as far as they fit
    freeze: list[str] | None = None  # parts of the model that do not learn, such as [encoder, pre_quant, quantizer]
    max_train_steps: int | None = None  # give this
    num_train_epochs: Annotated[float, (1e-9, 1e9)] | None = None  # or this; or both: the first to end
    max_minutes: float | None = None  # save and stop, for clusters with time limits; --resume auto continues
    learning_rate: float | None = None
    base_lr: float | None = None  # or this: per image, multiplied by the global batch
    lr_scheduler: Literal["constant", "cosine", "linear"] = "constant"  # after the warm-up
    min_lr: float = 0.0  # where cosine and linear end
    lr_warmup_steps: Count = 0  # added to lr_warmup_epochs
    lr_warmup_epochs: float = 0.0
    adam_beta1: Share = 0.9
    adam_beta2: Share = 0.95
    adam_weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    max_grad_norm: Annotated[float, (1e-12, 1e300)] | None = None  # gradient clipping, per optimizer
    max_bad_steps: Count = 10  # steps with a non-finite loss or gradient are skipped; more than this in a row stop the run
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None  # null: what `accelerate launch` says
    use_ema: bool = False  # average the weights, for validation and load_run
    ema_decay: Annotated[float, (0, 1)] = 0.9999
    compile: bool = False  # torch.compile the parts of the model
    dataloader_num_workers: Annotated[int, (0, 1024)] = 4
    logging_steps: int = 50
    validation_steps: int = 1000
    num_validation_images: int | None = 1000  # spread evenly over the validation split; null: all
    checkpointing_steps: int = 5000
    checkpoints_total_limit: int | None = 2  # how many of the last checkpoints to keep; null: all
    log_with: str | None = "tensorboard"  # any tracker that accelerate knows, or null


def parse_arguments(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of a training script."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, such as configs/quickstart/vqgan.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace those of the file")
    parser.add_argument("--resume", metavar="auto|CHECKPOINT", help="auto: go on from the newest checkpoint of the run folder, "
                        "or start if there is none; or a checkpoint folder, by its path or name")
    return parser.parse_intermixed_args(argv)  # overrides may stand before and after the options


def load_config(path: str, overrides: list[str], sections: dict[str, Any],
                inherit: Callable[[dict], None] | None = None) -> dict[str, dict]:
    """The config of a YAML file with overrides, complete with defaults and checked.

    sections    name to the function or class that takes the section's keys as arguments (an argument without a default may be left
                out: the script knows it); or to a dict of such, from which the section's key `name` chooses
    inherit     may add to what the user gave, in place, before it is checked
    """
    given = read_yaml(path, TextLoader)
    override(given, overrides, sections)
    given["train"] = mapping(given.get("train"), "train")
    if given["train"].get("output_dir") is None:
        given["train"]["output_dir"] = f"runs/{Path(path).stem}"
    if inherit is not None:
        inherit(given)
    return check_config(given, sections, path)


def override(given: dict, overrides: list[str], sections: dict[str, Any]) -> None:
    """Sets key.sub=value in what was given, in place. `sections` as in load_config; of these, a text setting takes its value literally."""
    texts = {
        f"{name}.{key}" for name, target in sections.items() if not isinstance(target, dict)
        for key, (kind, _) in signature(target).items() if kind in (str, str | None)}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{text!r} is not of the form key.sub=value")
        *parents, last = key.split(".")
        section = given
        for parent in parents:
            if section.get(parent) is None:
                section[parent] = {}
            section = section[parent]
            if not isinstance(section, dict):
                raise UserError(f"{key} cannot be set: {parent} is not a section")
        try:
            section[last] = literal(value) if key in texts else parse_yaml(value, TextLoader)
        except ValueError as error:
            raise UserError(f"the value of {text!r} is not {error}") from None


def literal(text: str) -> str | None:
    """Text from the command line as it was typed. Quotes around all of it go; nothing, and null, are None."""
    if text in ("", "null"):
        return None
    if text[0] in "'\"" and text[0] == text[-1]:
        with suppress(ValueError):
            return str(parse_yaml(text))
    return text


def check_config(given: dict, sections: dict[str, Any], path: str | Path) -> dict[str, dict]:
    """What load_config returns, for what was read from `path`."""
    for name in given:
        if name not in sections:
            raise UserError(f"unknown section {name!r} in {path}; the nearest valid one is {_nearest(str(name), list(sections))!r}")
    targets, config = {}, {}
    for name, target in sections.items():
        if isinstance(target, dict):
            choice = mapping(given.get(name), name).get("name")
            if choice not in list(target):
                raise UserError(f"{name}.name must be one of {', '.join(target)}; it is {choice!r}")
            target = target[choice]
        targets[name] = target
    valid = [key for name, target in targets.items() for key in setting_names(target, name)]
    for name, target in targets.items():
        section = dict(mapping(given.get(name), name))
        choice = {"name": str(section.pop("name"))} if isinstance(sections[name], dict) else {}
        config[name] = choice | _fill(target, section, name, valid)
    if "image_size" in config.get("model", {}) and "image_size" not in given["model"]:
        config["model"]["image_size"] = copy.copy(config["data"]["image_size"])  # of one list, YAML would write an alias
    return config


def build(target: Callable, settings: dict, **more: Any) -> Any:
    """target(**settings, **more); a setting that is itself a section is built first."""
    arguments = {}
    for key, (kind, _) in signature(target).items():
        if key in settings:
            value = settings[key]
            nested = _module_of(kind, value)
            arguments[key] = build(nested, {k: v for k, v in value.items() if k != "name"}) if nested and value else value
    try:
        return target(**arguments, **more)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error
    except (ArithmeticError, IndexError, RuntimeError) as error:  # settings that are valid one by one
        raise UserError(f"{target.__name__} cannot be made with these settings ({error})") from error


def signature(target: Callable) -> dict[str, tuple[Any, Any]]:
    """{argument: (type, default)} of the arguments that a config may set."""
    hints = typing.get_type_hints(target if is_dataclass(target) or not inspect.isclass(target) else target.__init__, include_extras=True)
    parameters = inspect.signature(target).parameters
    return {key: (hints[key], p.default) for key, p in parameters.items() if key not in ("split", "uint8")}  # which the scripts set


def setting_names(target: Callable, section: str) -> list[str]:
    """The full names of all settings of a section: "model.quantizer.dim", ..."""
    names = []
    for key, (kind, _) in signature(target).items():
        nested = _module_of(kind)
        names += setting_names(nested, f"{section}.{key}") if nested else [f"{section}.{key}"]
    return names


def _module_of(kind: Any, given: Any = None, where: str = "") -> type | None:
    """The module class in an annotation such as `VectorQuantizer | None`: the setting is a section of its own, in which `name` chooses
    another quantizer."""
    found = next((k for k in (kind, *typing.get_args(kind)) if inspect.isclass(k) and issubclass(k, nn.Module)), None)
    if found is not VectorQuantizer or not isinstance(given, dict) or "name" not in given:
        return found
    if str(given["name"]) not in QUANTIZERS:
        raise UserError(f"{where}.name must be one of {', '.join(QUANTIZERS)}; it is {given['name']!r}")
    return QUANTIZERS[given["name"]]


def _nearest(word: str, valid: list[str]) -> str:
    return difflib.get_close_matches(word, valid, n=1, cutoff=0)[0]


def _fill(target: Callable, given: dict, where: str, valid: list[str]) -> dict:
    """The section `where`, checked and complete."""
    expected, filled = signature(target), {}
    for key in given:
        if key not in expected:
            if target in QUANTIZERS.values() and any(key in signature(other) for other in QUANTIZERS.values()):
                raise UserError(f"{where}.{key} is not a setting of {target.__name__}, which has {', '.join(expected)}")
            own = [f"{where}.{k}" for k in expected] if target in QUANTIZERS.values() else valid
            raise UserError(f"unknown key {where}.{key}; the nearest valid one is {_nearest(f'{where}.{key}', own)}")
    for key, (kind, default) in expected.items():
        nested = _module_of(kind, given.get(key), f"{where}.{key}")
        if nested and given.get(key) is None:
            filled[key] = None  # the model has a default of its own
        elif nested:
            section = dict(mapping(given[key], f"{where}.{key}"))
            name = {"name": str(section.pop("name"))} if nested in QUANTIZERS.values() and "name" in section else {}
            filled[key] = name | _fill(nested, section, f"{where}.{key}", valid)
        elif key in given:
            filled[key] = _checked(given[key], kind, f"{where}.{key}")
        elif default is not inspect.Parameter.empty:
            filled[key] = list(default) if isinstance(default, tuple) else default
    return filled


DEFAULT_RANGE = {int: (1, 2**31), float: (0, 1e300)}
FROM_TEXT = {int: int, float: float, str: str, bool: lambda text: yaml.SafeLoader.bool_values[text.lower()]}


def _checked(value: Any, kind: Any, where: str, limits: tuple | None = None) -> Any:
    """The value as the type `kind`, or a UserError."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _checked(value, args[0], where, args[1])
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        return _checked(value, next((k for k in kinds if (typing.get_origin(k) is list) == isinstance(value, list)), kinds[0]), where)
    if origin is Literal:
        if value in args:
            return args[args.index(value)]
        raise UserError(f"{where} must be one of {', '.join(map(str, args))}; it is {value!r}")
    if origin is list and isinstance(value, list):
        return [_checked(v, args[0], f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, Plain) or kind is float and type(value) in (int, str):
        with suppress(ValueError, KeyError, OverflowError):
            value = FROM_TEXT[kind](value)
    if type(value) is not kind:
        name = kind.__name__ if origin is None else str(kind)
        raise UserError(f"{where} must be {name}; it is {value!r}")
    low, high = limits or DEFAULT_RANGE.get(kind, (None, None))
    if low is not None and not low <= value <= high:
        raise UserError(f"{where} must be between {low:.10g} and {high:.10g}; it is {value}")
    return value


MAX_YAML, MAX_DEPTH = 10**6, 20  # characters, and sections in sections


class Plain(str):
    """A scalar without quotes, of which only its setting's type says what it means."""


class Loader(yaml.SafeLoader):
    """yaml.SafeLoader that refuses a key that stands twice in a mapping, of which the first would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in names:
                raise yaml.MarkedYAMLError(problem=f"{name} stands there a second time", problem_mark=key.start_mark)
            names.add(name)
        return super().construct_mapping(node, deep)


class TextLoader(Loader):
    """Loader of a user's config, in which scalars without quotes, but null, are Plain."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith(":null")]
        for first, resolvers in Loader.yaml_implicit_resolvers.items()}

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        text = super().construct_scalar(node)
        return text if node.style else Plain(text)


def read_yaml(path: str | Path, loader: type[Loader] = Loader) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            return mapping(parse_yaml(file.read(MAX_YAML + 1), loader), str(path))
    except OSError as error:
        raise UserError(f"cannot read the config {path} ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path} is not {'text' if isinstance(error, UnicodeDecodeError) else error}") from None


def parse_yaml(text: str, loader: type[Loader] = Loader) -> Any:
    """yaml.load without aliases, ten lines of which can make a billion values. ValueError, to be read after "is not"."""
    if len(text) > MAX_YAML:
        raise ValueError(f"a config: it has more than {MAX_YAML} characters")
    depth, problem = 0, None
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH or isinstance(event, yaml.AliasEvent):
                problem = f"a config: it has aliases, or more than {MAX_DEPTH} sections in each other"
                break
        else:
            return yaml.load(text, loader)
    except (yaml.YAMLError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        # PyYAML raises these too, for dates that do not exist or !!bool 3.
        problem = "valid YAML"
        if getattr(error, "problem_mark", None):
            problem += f" at line {error.problem_mark.line + 1} ({error.problem[:200]})"
    raise ValueError(problem)


def mapping(value: Any, where: str) -> dict:
    """The value, a section of a config; an empty one is {}."""
    if not isinstance(value or {}, dict):
        raise UserError(f"{where} must be a section of key: value lines; it is {value!r}")
    return value or {}


def flatten(config: dict, prefix: str = "") -> dict[str, Any]:
    """{"section.key": value}."""
    flat = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
