"""Reads YAML files and overrides into checked settings, and builds models and datasets from them.

    load_config         a script's config: its YAML file, key.sub=value overrides, defaults
    check_config        the same for settings that were read already
    build               calls a class or function with its section of the config

Any mistake is a UserError of one sentence. A section is described by the signature of what takes
its keys: their types, defaults and ranges. An int is from 1 to 2^31 and a float finite and not
negative, unless the annotation says otherwise: Annotated[int, (low, high)], both included. A value
without quotes means what its setting's type makes of its text: 010 is ten, and a folder may be
called 2023 or on.
"""

import argparse
import copy
import difflib
import importlib
import inspect
from contextlib import suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

import torch.nn as nn
import yaml


class UserError(Exception):
    """Something that the user can mend, in one sentence."""


def parse_arguments(description, argv=None):
    """The command line of a training script."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", required=True, help="a YAML file, such as configs/quickstart/vqgan.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value",
        help="settings that replace those of the file")
    parser.add_argument(
        "--resume", metavar="auto|CHECKPOINT",
        help="auto: go on from the newest checkpoint of the run folder, or start if there is none; "
             "or a checkpoint folder, by its path or name")
    return parser.parse_intermixed_args(argv)  # overrides may stand before and after the options


def load_config(path, overrides, sections, inherit=None):
    """The config of a YAML file with overrides, complete with defaults and checked.

    sections    "model": the function or class that takes the section's keys as arguments (an
                argument without a default may be left out: the script knows it); or
                {name: "file.Class"}, from which the section's key `name` chooses
                "model.quantizer": the same {name: class} for a setting that is a section of its
                own; without `name`, it is of the class in the setting's annotation
                "model.image_size": the full name of another setting, whose value is the default
    inherit     may add to what the user gave, in place, before it is checked
    """
    config = read_yaml(path, TextLoader)
    override(config, overrides, sections)
    train = config["train"] = mapping(config.get("train"), "train")
    if train.get("output_dir") is None:
        train["output_dir"] = f"runs/{Path(path).stem}"
    if inherit:
        inherit(config)
    return check_config(config, sections, path)


def override(config, overrides, sections):
    """Sets key.sub=value in a config, in place. A text setting of a section in `sections` (as in
    load_config) takes its value literally."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{text!r} is not of the form key.sub=value")
        *parents, last = key.split(".")
        section = config
        for parent in parents:
            section[parent] = mapping(section.get(parent), f"{key} cannot be set: {parent}")
            section = section[parent]
        target = sections.get(".".join(parents))
        is_text = callable(target) and signature(target).get(last, [None])[0] in (str, str | None)
        if is_text:
            section[last] = literal(value)
        else:
            section[last] = parse_yaml(value, TextLoader, f"the value of {text!r}")


def literal(text):
    """Text from the command line as it was typed. Quotes around all of it go; nothing, and null,
    are None."""
    if text in ("", "null"):
        return None
    if text[0] in "'\"" and text[0] == text[-1]:
        with suppress(UserError):
            return str(parse_yaml(text))
    return text


def check_config(config, sections, path):
    """What load_config returns, for a config that was read from `path`."""
    names = [name for name in sections if "." not in name]
    for name in config:
        if name not in names:
            raise UserError(f"unknown section {name!r} in {path}; "
                            f"the nearest valid one is {_nearest(str(name), names)!r}")
    targets = {name: choose(sections[name], config.get(name), name) for name in names}
    valid = [key for name, target in targets.items() for key in setting_names(target, name)]
    checked = {name: _fill(target, config.get(name), name, sections, valid)
               for name, target in targets.items()}
    for setting, source in sections.items():
        if isinstance(source, str):
            section, key = setting.split(".")
            if key in checked[section] and key not in config[section]:
                # YAML would write an alias for the second use of a list.
                checked[section][key] = copy.copy(flatten(checked)[source])
    return checked


def choose(target, section, where, default=None):
    """What takes the keys of the section `where`: the target; or, of a {name: "file.Class"},
    the class that the section's key `name` chooses."""
    if not isinstance(target, dict):
        return target
    section = mapping(section, where)
    if default and "name" not in section:
        return default
    name = section.get("name")
    if name not in list(target):  # it may be a list
        raise UserError(f"{where}.name must be one of {', '.join(target)}; it is {name!r}")
    return load_class(target[name])


def load_class(path):
    """The class "file.Name", whose file is loaded now."""
    file, _, name = path.partition(".")
    return getattr(importlib.import_module(file), name)


def build(target, settings, **more):
    """target(**settings, **more); a setting that is itself a section is built first."""
    arguments = dict(settings)
    for key, (annotation, _) in signature(target).items():
        nested = _module_class(annotation)
        if nested and isinstance(settings.get(key), dict):
            arguments[key] = build(nested, settings[key])
    try:
        return target(**arguments, **more)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error
    except (ArithmeticError, IndexError, RuntimeError, TypeError) as error:
        # Settings that are valid one by one.
        raise UserError(
            f"{target.__name__} cannot be made with these settings ({error})") from error


def signature(target):
    """{argument: (type, default)} of the arguments that a config may set."""
    parameters = inspect.signature(target, eval_str=True).parameters
    return {key: (parameter.annotation, parameter.default)
            for key, parameter in parameters.items()
            if key not in ("split", "uint8")}  # which the scripts set


def setting_names(target, section):
    """The full names of all settings of a section: "model.quantizer.dim", ..."""
    names = []
    for key, (annotation, _) in signature(target).items():
        name, nested = f"{section}.{key}", _module_class(annotation)
        names += setting_names(nested, name) if nested else [name]
    return names


def _module_class(annotation):
    """The module class in an annotation such as `VectorQuantizer | None`: the setting is a section
    of its own."""
    for part in (annotation, *get_args(annotation)):
        if inspect.isclass(part) and issubclass(part, nn.Module):
            return part
    return None


def _nearest(word, valid):
    return difflib.get_close_matches(word, valid, n=1, cutoff=0)[0]


def _fill(target, section, where, sections, valid):
    """The section `where`, checked and complete. `valid` are names to suggest for a wrong one."""
    expected = signature(target)
    settings = mapping(section, where)
    filled = {}
    choices = sections.get(where, {})
    if isinstance(choices, dict) and "name" in settings:
        filled["name"] = str(settings["name"])
    for key in settings:
        if key not in (*filled, *expected):
            name = f"{where}.{key}"
            others = choices.values() if "." in where else []
            if any(key in signature(load_class(path)) for path in others):
                raise UserError(f"{name} is not a setting of {target.__name__}, "
                                f"which has {', '.join(expected)}")
            raise UserError(
                f"unknown key {name}; the nearest valid one is {_nearest(name, valid)}")
    for key, (annotation, default) in expected.items():
        name = f"{where}.{key}"
        value = settings.get(key)
        nested = _module_class(annotation)
        if nested and value is not None:
            nested = choose(sections.get(name, nested), value, name, nested)
            filled[key] = _fill(nested, value, name, sections, setting_names(nested, name))
        elif key in settings:
            filled[key] = _checked(value, annotation, name)
        elif default is not inspect.Parameter.empty:
            filled[key] = list(default) if isinstance(default, tuple) else default
    return filled


DEFAULT_RANGE = {int: (1, 2**31), float: (0, 1e300)}
FROM_TEXT = {int: int, float: float, str: str,
             bool: lambda text: yaml.SafeLoader.bool_values[text.lower()]}


def _checked(value, annotation, where, limits=None):
    """The value as the type in the annotation, or a UserError."""
    origin = get_origin(annotation)
    args = get_args(annotation)
    if origin is Annotated:
        return _checked(value, args[0], where, args[1])
    if origin in (Union, UnionType):
        if value is None and NoneType in args:
            return None
        options = [arg for arg in args if arg is not NoneType]
        is_list = isinstance(value, list)
        # The fitting one first
        options.sort(key=lambda option: (get_origin(option) is list) != is_list)
        return _checked(value, options[0], where)
    if origin is Literal:
        if value in args:
            return args[args.index(value)]
        raise UserError(f"{where} must be one of {', '.join(args)}; it is {value!r}")
    if origin is list and isinstance(value, list):
        return [_checked(item, args[0], f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Plain) or annotation is float and type(value) in (int, str):
        with suppress(ValueError, KeyError, OverflowError):
            value = FROM_TEXT[annotation](value)
    if type(value) is not annotation:
        raise UserError(f"{where} must be {inspect.formatannotation(annotation)}; it is {value!r}")
    low, high = limits or DEFAULT_RANGE.get(annotation, (value, value))
    if not low <= value <= high:
        raise UserError(f"{where} must be between {low:.10g} and {high:.10g}; it is {value}")
    return value


MAX_YAML = 10**6  # characters
MAX_DEPTH = 20  # sections in sections


class Plain(str):
    """A scalar without quotes, of which only its setting's type says what it means."""


class Loader(yaml.SafeLoader):
    """yaml.SafeLoader that refuses a key that stands twice in a mapping, of which the first would
    be lost; aliases, ten lines of which can make a billion values; and what is nested too deep."""

    def compose_node(self, parent, index):
        nested = len(self.states) - 1  # in so many sections and lists
        if self.check_event(yaml.AliasEvent) or nested > MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"configs have no aliases, and no more than {MAX_DEPTH} levels",
                problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        names = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in names:
                raise yaml.MarkedYAMLError(
                    problem=f"{name} stands there a second time", problem_mark=key.start_mark)
            names.add(name)
        return super().construct_mapping(node, deep)


class TextLoader(Loader):
    """Loader of a user's config, in which scalars without quotes, but null, are Plain."""

    yaml_implicit_resolvers = {}

    def construct_scalar(self, node):
        text = super().construct_scalar(node)
        if node.style:
            return text
        return None if text in ("", "~", "null", "Null", "NULL") else Plain(text)


def read_yaml(path, loader=Loader):
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_YAML + 1)
    except OSError as error:
        raise UserError(f"cannot read the config {path} ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text") from None
    return mapping(parse_yaml(text, loader, path), path)


def parse_yaml(text, loader=Loader, where="the text"):
    if len(text) > MAX_YAML:
        raise UserError(f"{where} is not a config: it has more than {MAX_YAML} characters")
    try:
        return yaml.load(text, loader)
    except Exception as error:  # PyYAML raises many kinds, such as KeyError for !!bool 3
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1} ({error.problem[:200]})" if mark else ""
        raise UserError(f"{where} is not valid YAML{place}") from None


def mapping(value, where):
    """The value, a section of a config; an empty one is {}."""
    if not isinstance(value or {}, dict):
        raise UserError(f"{where} must be a section of key: value lines; it is {value!r}")
    return value or {}


def flatten(config, prefix=""):
    """{"section.key": value}."""
    flat = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
