"""What the train scripts share: config files, run folders, checkpoints, logging.

    load_config, build      YAML in sections and key.sub=value overrides, checked against the signatures of what they build
    TrainSettings           the section `train`, common to both stages; learning_rate_at is its schedule
    Run                     a run folder: checkpoints, resume, metrics, pictures, the reasons to stop
    load_run                a model from a run folder, for the other scripts and for users

A run folder holds config.yaml (complete: it is enough to repeat the run), metrics.jsonl, tensorboard/, samples/*.png and
checkpoints/: step_XXXXXXXX folders, and best.safetensors, the weights of the best validation so far.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import hashlib
import inspect
import io
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
import types
import typing
import warnings
from dataclasses import dataclass, is_dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress

import psutil
import torch
import torch.nn as nn
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import (DistributedType, ProjectConfiguration, broadcast_object_list, get_cpu_distributed_information, load,
                              set_seed)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from dataset import DataError, ImageDataset, end_workers, make_dataset
from dq_transformer import DQTransformer
from dqvae import DQVAE
from gpt import GPT, NotFinite
from mqvae import MQVAE
from stackformer import Stackformer
from vqgan import VQGAN, VQVAE

STAGE1 = {"vqgan": VQGAN, "vqvae": VQVAE, "mqvae": MQVAE, "dqvae": DQVAE}
STAGE2 = {"gpt": GPT, "stackformer": Stackformer, "dq_transformer": DQTransformer}
MODELS = STAGE1 | STAGE2


class UserError(Exception):
    """Something that the user can put right, in one sentence."""


@dataclass
class TrainSettings:
    """The section `train`. Names follow accelerate's and diffusers' scripts.

    output_dir                  the run folder (default: runs/NAME for configs/.../NAME.yaml)
    train_batch_size            images per process and forward pass; a step takes train_batch_size x processes x
                                gradient_accumulation_steps of them, the "global batch"
    max_train_steps, num_train_epochs   how long (one of them)
    max_minutes                 save and end after so long, for clusters with time limits; --resume auto continues
    learning_rate, base_lr      one of them; base_lr is per image: it is multiplied by the global batch
    lr_scheduler                after the warm-up (lr_warmup_steps + lr_warmup_epochs): constant, or cosine to 0
    max_grad_norm               gradients are clipped to this norm, for each optimizer
    max_bad_steps               a step whose loss or gradient is not finite is skipped; more than so many in a row stop the run
    mixed_precision             null: as `accelerate launch` says
    use_ema, ema_decay          keep moving averages of the weights; they are validated, and what load_run gives
    compile                     torch.compile the parts of the model
    logging_steps, validation_steps, checkpointing_steps   every so many steps
    num_validation_images       spread evenly over the validation split; null: all
    checkpoints_total_limit     how many of the last checkpoints are kept; null: all
    log_with                    any tracker that accelerate knows, or null
    """

    output_dir: str | None = None
    seed: int = 0
    train_batch_size: int = 12
    gradient_accumulation_steps: int = 1
    max_train_steps: int | None = None
    num_train_epochs: float | None = None
    max_minutes: float | None = None
    learning_rate: float | None = None
    base_lr: float | None = None
    lr_scheduler: Literal["constant", "cosine"] = "constant"
    lr_warmup_steps: int = 0
    lr_warmup_epochs: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    max_grad_norm: float | None = None
    max_bad_steps: int = 10
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    use_ema: bool = False
    ema_decay: float = 0.9999
    compile: bool = False
    dataloader_num_workers: int = 4
    logging_steps: int = 50
    validation_steps: int = 1000
    num_validation_images: int | None = 1000
    checkpointing_steps: int = 5000
    checkpoints_total_limit: int | None = 2
    log_with: str | None = "tensorboard"


# ---------------------------------------------------------------------------------------------------------------------
# Config


def argument_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, such as configs/quickstart/vqgan.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace those of the file")
    return parser


def training_arguments(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(description)
    parser.add_argument("--resume", metavar="auto|CHECKPOINT", help="auto: go on from the newest checkpoint of the run folder, "
                        "or start if there is none; or the path of a checkpoint folder")
    return parser.parse_intermixed_args(argv)  # overrides may stand before and after the options


def load_config(path: str, overrides: list[str], sections: dict[str, Any],
                inherit: Callable[[dict], None] | None = None) -> dict[str, dict]:
    """The config of a YAML file with overrides, complete with defaults and checked.

    sections: name to the function or class that takes the section's keys as arguments, whose signature says their types
    and defaults (what has none may be left out: the script knows it); or to a dict of such, among which the key `name` chooses.
    inherit: may add to what the user gave, in place, before it is checked. UserError, in one sentence, otherwise.
    """
    given = read_yaml(path)
    override(given, overrides)
    given["train"] = mapping(given.get("train"), "train")
    if given["train"].get("output_dir") is None:
        given["train"]["output_dir"] = f"runs/{Path(path).stem}"
    if inherit is not None:
        inherit(given)
    return check_config(given, sections, path)


def override(given: dict, overrides: list[str]) -> None:
    """Sets key.sub=value in what was given, in place."""
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
            section[last] = parse_yaml(value)
        except ValueError:
            raise UserError(f"the value of {text!r} is not valid YAML") from None


def check_config(given: dict, sections: dict[str, Any], path: str | Path) -> dict[str, dict]:
    """What load_config gives, for what was read from `path`."""
    targets = {}
    for name, target in sections.items():
        if isinstance(target, dict):
            choice = given.get(name, {}).get("name") if isinstance(given.get(name, {}), dict) else None
            if choice not in list(target):
                raise UserError(f"{name}.name must be one of {', '.join(target)}; it is {choice!r}")
            target = target[choice]
        targets[name] = target
    keys = [key for name, target in targets.items() for key in _keys(target, name)]
    for name in given:
        if name not in sections:
            raise UserError(f"unknown section {name!r} in {path}; the nearest valid one is {_nearest(str(name), list(sections))!r}")
    config = {}
    for name, target in targets.items():
        section = dict(mapping(given.get(name), name))
        choice = {"name": section.pop("name")} if isinstance(sections[name], dict) else {}
        config[name] = choice | _fill(target, section, name, keys)
    if "image_size" in config.get("model", {}) and "image_size" not in given["model"]:
        config["model"]["image_size"] = config["data"]["image_size"]
    return config


def build(target: Callable, settings: dict, **more: Any) -> Any:
    """target(**settings, **more), where a setting that is itself a section is built first."""
    arguments = {}
    for key, (kind, _) in _signature(target).items():
        if key in settings:
            nested = _module_of(kind)
            arguments[key] = build(nested, settings[key]) if nested and settings[key] else settings[key]
    try:
        return target(**arguments, **more)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error
    except (ArithmeticError, IndexError, RuntimeError) as error:  # values that nobody thought of
        raise UserError(f"{target.__name__} cannot be made with these settings ({error})") from error


def read_yaml(path: str | Path) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            return mapping(parse_yaml(file.read(MAX_YAML + 1)), str(path))
    except OSError as error:
        raise UserError(f"cannot read the config {path} ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path} is not {'text' if isinstance(error, UnicodeDecodeError) else error}") from None


MAX_YAML, MAX_DEPTH = 10**6, 20  # characters, and sections in sections


def parse_yaml(text: str) -> Any:
    """yaml.safe_load, of texts that may not be ours; ValueError, to be read after "is not". No aliases: ten lines of them can
    make a billion values."""
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
            return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        # Not only YAMLErrors: for the 99th of a month, for !!bool 3.
        problem = "valid YAML" + (f" at line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else "")
    raise ValueError(problem)


def mapping(value: Any, where: str) -> dict:
    """The value, a section of a config; an empty one is {}."""
    if not isinstance(value or {}, dict):
        raise UserError(f"{where} must be a section of key: value lines; it is {value!r}")
    return value or {}


def _signature(target: Callable) -> dict[str, tuple[Any, Any]]:
    """{argument: (type, default)}, of those that a config may set."""
    hints = typing.get_type_hints(target if is_dataclass(target) or not inspect.isclass(target) else target.__init__)
    parameters = inspect.signature(target).parameters
    return {key: (hints[key], p.default) for key, p in parameters.items() if key not in ("split", "uint8")}


def _module_of(kind: Any) -> type | None:
    """The module class in an annotation such as `VectorQuantizer | None`: the setting is a section of its own."""
    classes = [k for k in (kind, *typing.get_args(kind)) if inspect.isclass(k) and issubclass(k, nn.Module)]
    return classes[0] if classes else None


def _keys(target: Callable, where: str) -> list[str]:
    keys = []
    for key, (kind, _) in _signature(target).items():
        nested = _module_of(kind)
        keys += _keys(nested, f"{where}.{key}") if nested else [f"{where}.{key}"]
    return keys


def _nearest(word: str, valid: list[str]) -> str:
    return difflib.get_close_matches(word, valid, n=1, cutoff=0)[0]


def _fill(target: Callable, given: dict, where: str, keys: list[str]) -> dict:
    signature, filled = _signature(target), {}
    for key in given:
        if key not in signature:
            raise UserError(f"unknown key {where}.{key}; the nearest valid one is {_nearest(f'{where}.{key}', keys)}")
    for key, (kind, default) in signature.items():
        nested = _module_of(kind)
        if nested and given.get(key) is None:
            filled[key] = None  # the model has a default of its own
        elif nested:
            filled[key] = _fill(nested, mapping(given.get(key), f"{where}.{key}"), f"{where}.{key}", keys)
        elif key in given:
            filled[key] = _checked(given[key], kind, f"{where}.{key}")
        elif default is not inspect.Parameter.empty:
            filled[key] = list(default) if isinstance(default, tuple) else default
    return filled


def _checked(value: Any, kind: Any, where: str) -> Any:
    """The value as the type `kind`, or a UserError."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        if len(kinds) == 1:
            return _checked(value, kinds[0], where)
    if origin is Literal:
        if value is False and "no" in args:  # which YAML reads as false
            return "no"
        if value in args and not isinstance(value, bool):
            return value
        raise UserError(f"{where} must be one of {', '.join(map(str, args))}; it is {value!r}")
    if origin is list:
        if isinstance(value, list):
            return [_checked(v, args[0], f"{where}[{i}]") for i, v in enumerate(value)]
    elif kind is float and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4, without a dot, as a string
        except (TypeError, ValueError, OverflowError):
            pass
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    name = getattr(kind, "__name__", str(kind)) if origin is None else str(kind)
    raise UserError(f"{where} must be {name}; it is {value!r}")


def learning_rate_at(step: int, train: dict, global_batch: int, max_steps: int, steps_per_epoch: float) -> float:
    """The learning rate of step number `step` (from 0): linear warm-up, then constant or cosine to 0."""
    peak = train["learning_rate"] if train["learning_rate"] is not None else train["base_lr"] * global_batch
    warmup = train["lr_warmup_steps"] + train["lr_warmup_epochs"] * steps_per_epoch
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if train["lr_scheduler"] == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, max_steps - warmup)))


def compile_parts(model: nn.Module) -> None:
    """torch.compile, part by part: the quantizer stays as it is, and so does the last layer, at whose weight the adaptive
    GAN weight asks for gradients; neither has parts of its own."""
    for child in model.children():
        for part in child if isinstance(child, nn.ModuleList) else [child]:
            if any(True for _ in part.children()):
                part.compile()


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Moves the averaged weights towards the model's; in the first steps faster, by 9 / (10 + step)."""
    both = ([p.to_local() if isinstance(p, DTensor) else p for p in m.parameters()] for m in (ema, model))
    torch._foreach_lerp_(*both, 1 - min(decay, (1 + step) / (10 + step)))
    for averaged, current in zip(ema.buffers(), model.buffers()):
        averaged.copy_(current)


# ---------------------------------------------------------------------------------------------------------------------
# Run


class Run:
    """A run folder and all that is written to it; the same object on every process.

    Made before the models, so that a folder that cannot be used stops the run at once. `track` names what a checkpoint
    holds beside the optimizers and the random state, `resume` loads the newest one.

    fsdp: the script can train sharded weights, which `prepare` makes; each process then holds a part of the model, of its average
    and of the optimizer's state. Checkpoints are the same with and without: whole tensors.
    """

    def __init__(self, config: dict[str, dict], resume: str | None = None, fsdp: bool = False):
        train = self.train = config["train"]
        if (train["learning_rate"] is None) == (train["base_lr"] is None):
            raise UserError("give one of train.learning_rate and train.base_lr")
        if (train["max_train_steps"] is None) == (train["num_train_epochs"] is None):
            raise UserError("give one of train.max_train_steps and train.num_train_epochs")
        for key in ("train_batch_size", "gradient_accumulation_steps", "logging_steps", "validation_steps", "checkpointing_steps",
                    "max_train_steps", "num_train_epochs", "num_validation_images", "checkpoints_total_limit"):
            if train[key] is not None and not 0 < train[key] < 2**63:
                raise UserError(f"train.{key} must be more than 0 and less than 2^63; it is {train[key]}")
        for key, (low, high) in {"seed": (0, 2**32 - 1), "dataloader_num_workers": (0, 1024), "adam_beta1": (0, 1 - 1e-9),
                                 "adam_beta2": (0, 1 - 1e-9), "ema_decay": (0, 1), "adam_weight_decay": (0, math.inf),
                                 "lr_warmup_steps": (0, math.inf), "lr_warmup_epochs": (0, math.inf), "max_minutes": (0, math.inf),
                                 "max_grad_norm": (1e-12, math.inf), "learning_rate": (0, math.inf), "base_lr": (0, math.inf),
                                 "adam_epsilon": (0, math.inf), "max_bad_steps": (0, 2**63 - 1)}.items():
            if train[key] is not None and not low <= train[key] <= high:
                raise UserError(f"train.{key} must be between {low:g} and {high:g}; it is {train[key]}")
        self.config, self.wanted = config, resume
        self.folder = Path(train["output_dir"]).expanduser()
        self._check_folder()
        # What FSDP gathers at a time, if `accelerate launch` was not told: a transformer block.
        os.environ.setdefault("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
        os.environ.setdefault("FSDP_TRANSFORMER_CLS_TO_WRAP", "Block")
        try:
            self.accelerator = Accelerator(
                gradient_accumulation_steps=train["gradient_accumulation_steps"], mixed_precision=train["mixed_precision"],
                log_with=train["log_with"],
                project_config=ProjectConfiguration(project_dir=str(self.folder), logging_dir=str(self.folder / "tensorboard")),
                # Buffers are kept equal by the models themselves, and must not change between two forwards of one step.
                # One process may have to wait long for another's share of an encoding.
                kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False),
                                 InitProcessGroupKwargs(timeout=timedelta(hours=2))])
        except (ValueError, ImportError) as error:  # fp16 without a GPU, an unknown tracker
            raise UserError(str(error)) from error
        self.sharded = self.accelerator.distributed_type == DistributedType.FSDP
        self._check_strategy(fsdp)
        train["mixed_precision"] = self.accelerator.mixed_precision  # as it was resolved
        set_seed(train["seed"])
        self.is_main = self.accelerator.is_main_process
        self.modules: dict[str, nn.Module] = {}
        self.optimizer: torch.optim.Optimizer | None = None  # if it is sharded
        self.best = -math.inf
        self.started = time.monotonic()
        self._signal: str | None = None
        self._handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        # On the device, so that no step waits for them: is this step of a module bad, how many were since the last log and in a
        # row, and the step at which that were too many.
        self.bad: dict[str, Tensor] = {}
        self.bad_steps, self.bad_row, self.too_many = torch.zeros(3, dtype=torch.long, device=self.accelerator.device)

    def _check_folder(self) -> None:
        """Refuses to start where there are checkpoints, to continue those of other networks, to follow links, and to write over what is not
        of a run."""
        own_folder(self.folder, "checkpoints", "checkpoints/.step_*", "samples", "tensorboard", "tensorboard/*", "codebook", "stage1")
        try:
            run_config(self.folder)
        except UserError:  # config.yaml is the first file of a run
            for name in ("config.yaml", "metrics.jsonl", "stage1", "classes.json", "thresholds.json", "codebook"):
                if (self.folder / name).exists():
                    raise UserError(f"{self.folder} is not a run folder, but holds {name}, which a run would write over; choose another "
                                    "train.output_dir") from None
        if self.wanted is None and self._checkpoints():
            raise UserError(f"{self.folder} already holds checkpoints; continue it with --resume auto, or choose another "
                            "train.output_dir")
        source = self.folder if self.wanted == "auto" else Path(self.wanted or "").parent.parent
        if self.wanted is None or not (source / "config.yaml").is_file():
            return
        before, now = (_networks(c) for c in (read_yaml(source / "config.yaml"), self.config))
        for key in sorted(before.keys() | now.keys()):
            if before.get(key, now.get(key) if key.startswith("model.") else None) != now.get(key):  # older runs lack newer settings
                raise UserError(f"{source} holds a run with {key}={before.get(key)}, but the config asks for {now.get(key)}; "
                                f"use its own config ({source}/config.yaml) or another train.output_dir")

    def _check_strategy(self, fsdp: bool) -> None:
        """Refuses what accelerate was asked for, if this code is not made for it; fsdp: it is made for shards."""
        kind, plugin = self.accelerator.distributed_type, getattr(self.accelerator.state, "fsdp_plugin", None)
        if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise UserError(f"accelerate was asked for {kind.value}, which is not supported; use --multi_gpu, or in stage 2 --use_fsdp "
                            "--fsdp_version 2")
        if self.sharded and not fsdp:
            raise UserError("accelerate was asked for FSDP, but stage 1 needs the whole model in every process; use --multi_gpu")
        if self.sharded and plugin.fsdp_version != 2:
            raise UserError("accelerate was asked for version 1 of FSDP, which is not supported; add --fsdp_version 2")
        if self.sharded and isinstance(plugin.cpu_offload, CPUOffloadPolicy):
            raise UserError("FSDP with weights on the CPU is not supported; leave --fsdp_offload_params out")
        if self.sharded and self.accelerator.mixed_precision == "fp16":
            raise UserError("FSDP with train.mixed_precision=fp16 is not supported; use bf16")

    # FSDP

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer,
                ema: nn.Module | None) -> tuple[nn.Module, torch.optim.Optimizer]:
        """accelerator.prepare; and `ema` is sharded like the model."""
        if self.sharded:
            plugin = self.accelerator.state.fsdp_plugin
            plugin.cpu_ram_efficient_loading = False  # is for weights from a file; these are the same in every process
            if self.accelerator.mixed_precision == "bf16":  # accelerate would round sums of gradients too, and the loss
                plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        model, optimizer = self.accelerator.prepare(model, optimizer)
        if self.sharded:
            self.optimizer = optimizer
            self.accelerator.free_memory()  # forgets both, of which it would save the shards; _save_weights saves them whole
            if ema is not None:
                ema.load_state_dict({k: v.detach().clone() for k, v in model.state_dict().items()}, assign=True)
        return model, optimizer

    def whole(self, module: nn.Module) -> nn.Module:
        """The module; if it is sharded, an ordinary one with all its weights, for what reads weights outside of forward."""
        if not self.sharded:
            return module
        with torch.random.fork_rng(devices=[]):  # its first weights, which are not kept, must not take random numbers
            copy = make_model(self.config)
        copy.load_state_dict(_state(module))
        return copy.to(self.accelerator.device)

    # Checkpoints

    def track(self, stateful: dict[str, nn.Module], **modules: nn.Module) -> None:
        """Names the modules whose weights a checkpoint holds, as NAME.safetensors. `stateful` ones have small buffers
        only, and are kept with the optimizers."""
        self.modules = {name: self.accelerator.unwrap_model(m) for name, m in modules.items() if m is not None}
        # What a forward pass changes: codebook and statistics. LeCam's averages follow the discriminator's steps.
        self.moving = {name: [v for m in (module, *(stateful.values() if name == "discriminator" else ()))
                              for v in m.state_dict(keep_vars=True).values() if not v.requires_grad]
                       for name, module in self.modules.items() if name != "ema"}
        if not self.is_main:  # the weights are made: from here on, each process has random numbers of its own
            torch.manual_seed(self.train["seed"] + self.accelerator.process_index)
        self.accelerator.register_for_checkpointing(*stateful.values())
        self.accelerator.register_save_state_pre_hook(self._save_weights)
        self.accelerator.register_load_state_pre_hook(self._load_weights)

    def _save_weights(self, models: list, weights: list, folder: str) -> None:
        weights.clear()  # accelerate would name them by number, and by how many processes there were
        modules = self.modules if self.is_main or self.sharded else {}
        files = {f"{name}.safetensors": _state(module, self.is_main) for name, module in modules.items()}
        if self.optimizer is not None:  # as accelerate saves one that is not sharded
            state = self.optimizer.state_dict()
            state["state"] = {i: {k: _whole(v, self.is_main) for k, v in values.items()} for i, values in state["state"].items()}
        if self.is_main:  # writing may fail, so all that the processes do together is done
            for name, tensors in files.items():
                save_file(tensors, f"{folder}/{name}")
            if self.optimizer is not None:
                torch.save(state, f"{folder}/optimizer.bin")

    def _load_weights(self, models: list, folder: str) -> None:
        models.clear()
        for name, module in self.modules.items():
            now = module.state_dict()
            module.load_state_dict({k: _shard(v, now.get(k)) for k, v in load_file(f"{folder}/{name}.safetensors").items()})
        if self.optimizer is not None:
            state = torch.load(f"{folder}/optimizer.bin", map_location="cpu", weights_only=True)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            state["state"] = {i: {k: v if k == "step" else _shard(v, parameters[i]) for k, v in values.items()}
                              for i, values in state["state"].items()}
            self.optimizer.load_state_dict(state)

    def save(self, step: int) -> None:
        """Writes checkpoints/step_XXXXXXXX under a temporary name, renames it when it is whole, removes the oldest."""
        self.average_batchnorm()
        self._check_agreement(step)
        final = self.folder / "checkpoints" / f"step_{step:08d}"
        temporary = final.with_name(f".{final.name}")

        def finish() -> None:
            _write_manifest(temporary, step, bad_row=int(self.bad_row))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            _sync(final.parent)

        if self.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._write_together(step, temporary, lambda: self.accelerator.save_state(str(temporary)))
        self._write_together(step, temporary, finish if self.is_main else lambda: None)
        if self.is_main:
            limit = self.train["checkpoints_total_limit"]
            for old in self._checkpoints()[limit:] if limit else []:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _write_together(self, step: int, temporary: Path, write: Callable[[], None]) -> None:
        """write(), on all processes; if one of them cannot, nothing of it stays and all of them end."""
        failure = None
        try:
            write()
        except (OSError, RuntimeError, SafetensorError) as error:  # which torch and safetensors raise when a disk is full
            failure = str(error).partition("\n")[0]
        failures = [f for f in gather(failure) if f]
        if failures:
            if self.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            optimizers = self.accelerator._optimizers + ([self.optimizer] if self.optimizer is not None else [])
            states = [state.values() for optimizer in optimizers for state in optimizer.state.values()]
            tensors = [v for part in (*(m.state_dict().values() for m in self.modules.values()), *states) for v in part]
            raise UserError(f"the checkpoint of step {step} could not be written ({failures[0]}): "
                            f"{_space(self.folder, sum(v.nbytes for v in tensors if isinstance(v, Tensor)))}; the one before is whole, "
                            "and --resume auto continues from it when there is room")

    def _check_agreement(self, step: int) -> None:
        """Processes that no longer hold the same weights, codebook and averages must not replace a good checkpoint."""
        if self.accelerator.num_processes > 1 and not self.sharded:
            sums = {f"{name}.{key}": _checksum(v) for name, module in self.modules.items() for key, v in module.state_dict().items()
                    if not key.endswith("quantizer.queue")}  # which is of each process's own codes
            sums = dict(zip(sums, torch.stack(list(sums.values())).tolist()))
            every = gather(sums)
            different = [key for key in sums if any(other[key] != every[0][key] for other in every)]
            if different:
                raise UserError(f"the processes no longer hold the same model: {different[0]} (and {len(different) - 1} more) became "
                                f"different between step {self.agreed} and step {step}, which was not saved; look for a faulty machine, "
                                "and continue from the checkpoint before with --resume auto")
        self.agreed = step

    def _checkpoints(self) -> list[Path]:
        """Newest first."""
        return sorted((self.folder / "checkpoints").glob("step_*"), reverse=True)

    def resume(self) -> int:
        """Loads what `resume` asks for; the number of steps done, 0 for a new run. Then opens the log."""
        step, found = 0, [None, None]  # the checkpoint, and what is wrong
        if self.is_main and self.wanted == "auto":
            found[0] = _newest_whole(self._checkpoints(), self.accelerator.print)
            if found[0] is None and self._checkpoints():
                found[1] = f"no checkpoint in {self.folder}/checkpoints is whole; start again in another train.output_dir"
        elif self.is_main and self.wanted:
            found[0] = Path(self.wanted)
            if damage := _damage(found[0]):
                found[1] = f"the checkpoint {self.wanted} cannot be used: {damage}"
        if found[0] and not found[1] and not (found[0] / "optimizer.bin").is_file():
            found[1] = f"{found[0]} holds weights alone, which cannot be trained on; choose another train.output_dir"
        path, wrong = broadcast_object_list(found)
        if wrong:
            raise UserError(wrong)
        if path is not None:
            try:
                for file in path.glob("*.pkl"):  # accelerate would run the code in some, and pass over damage in others
                    load(file)
                self.accelerator.load_state(str(path))
            except pickle.UnpicklingError as error:
                raise UserError(f"{path} holds more than tensors and numbers, and was not loaded, because that could run code from "
                                "it; use a checkpoint that you trust") from error
            self.accelerator.step = 0  # accumulation begins anew: checkpoints lie between steps
            manifest = json.loads((path / "checkpoint.json").read_text())
            step, self.bad_row = manifest["step"], self.bad_row + manifest.get("bad_row", 0)
            self.accelerator.print(f"continuing {self.folder} from step {step}")
        self.agreed = step
        if self.is_main:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            (self.folder / "samples").mkdir(exist_ok=True)
            for unfinished in (self.folder / "checkpoints").glob(".step_*"):  # when the run was killed
                shutil.rmtree(unfinished, ignore_errors=True)
            for later in self._checkpoints():  # damaged, or of a future that this run does not continue
                if later.name > f"step_{step:08d}":
                    abandoned = later.with_name(f"abandoned_{later.name}")
                    shutil.rmtree(abandoned, ignore_errors=True)
                    os.replace(later, abandoned)
                    self.accelerator.print(f"{later} is now {abandoned.name}; remove it when you like")
            write_file(self.folder / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))
            log = self.folder / "metrics.jsonl"
            lines = log.read_text().splitlines() if log.is_file() and step else []
            write_file(log, "".join(line + "\n" for line in lines if _step(line) <= step))
            if step and (self.folder / "checkpoints/best.safetensors").is_file():
                try:
                    with safe_open(self.folder / "checkpoints/best.safetensors", "pt") as best:
                        if int(best.metadata()["step"]) <= step:
                            self.best = float(best.metadata()["score"])
                except (SafetensorError, KeyError, TypeError, ValueError):
                    self.accelerator.print(f"{self.folder}/checkpoints/best.safetensors is damaged; the next validation replaces it")
        flat = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in _flat(self.config).items()}
        self.accelerator.init_trackers("minVQ", flat, {"tensorboard": {"purge_step": step + 1}})
        return step

    def save_best(self, step: int, score: float, module: nn.Module) -> None:
        """Keeps the weights of the highest score so far."""
        if self.is_main and score > self.best:
            self.best = score
            with self.spare("the best weights"):
                write_file(self.folder / "checkpoints/best.safetensors", save(_state(module), {"step": str(step), "score": repr(score)}))

    # Training

    def begin_step(self) -> None:
        self.bad = {}
        self.scale = self.accelerator.scaler.get_scale() if self.accelerator.scaler else 1.0
        self.kept = {name: [v.detach().clone() for v in moving] for name, moving in self.moving.items()}

    def backward(self, loss: Tensor) -> None:
        """A loss that is not finite makes the gradients so, on all processes."""
        self.accelerator.backward(loss * torch.where(loss.detach().isfinite(), 1.0, math.nan))

    def follow_scale(self, module: nn.Module) -> None:
        """Before the last backward of a module whose gradients accumulate: another optimizer's step may have changed fp16's scale."""
        scale = self.accelerator.scaler.get_scale() if self.accelerator.scaler else 1.0
        if scale != self.scale:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(scale / self.scale)

    def clip(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        """Clips the gradients of this optimizer's module; their norm from before. If it is not finite, which all processes see
        alike, the optimizer's step will do nothing. (accelerate's own clipping would undo the fp16 loss scale of every
        optimizer's gradients, those that still accumulate among them.)"""
        self.accelerator.unscale_gradients(optimizer)
        norm = nn.utils.clip_grad_norm_(module.parameters(), self.train["max_grad_norm"] or math.inf)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        bad = ~norm.isfinite()
        self.bad[next(name for name, m in self.modules.items() if m is self.accelerator.unwrap_model(module))] = bad
        if self.accelerator.scaler is None:  # which skips by itself
            if optimizer.param_groups[0]["fused"]:
                optimizer.optimizer.found_inf = bad.float()  # read on the device: the CPU need not wait for it
            elif bad:
                optimizer.zero_grad()
        return norm

    @torch.no_grad()
    def end_step(self, step: int) -> None:
        """Undoes what a skipped step did to codebook and statistics, and counts it. (Averaged weights have moved on towards the
        weights, which have not moved.) An overflow of fp16 is undone, but not counted: its scaler expects some."""
        for name, bad in self.bad.items():
            for now, before in zip(self.moving[name], self.kept[name]):
                now.copy_(torch.where(bad, before, now))
        if self.accelerator.scaler is None or self.accelerator.scaler.get_scale() <= 1:  # where the scale cannot be the reason
            bad = torch.stack(list(self.bad.values())).any()
            self.bad_steps, self.bad_row = self.bad_steps + bad, (self.bad_row + 1) * bad
            self.too_many = torch.where((self.too_many == 0) & (self.bad_row > self.train["max_bad_steps"]), step, self.too_many)
        if self.accelerator.scaler is not None and self.accelerator.scaler.get_scale() < 1:
            self.accelerator.scaler.update(1.0)  # or bad losses would shrink it to nothing, and gradients with it

    def stop_if_bad(self, dataset: ImageDataset, batches: Callable[[int], Iterable[list[tuple[int, int]]]]) -> None:
        """After `means`: ends the run if too many steps in a row were skipped, and leaves their images in bad_steps.json.
        batches(start): the (epoch, index) of all processes' images from batch number `start`."""
        if not self.too_many:
            return
        last, accumulate, path = int(self.too_many), self.train["gradient_accumulation_steps"], self.folder / "bad_steps.json"
        steps = range(last - self.train["max_bad_steps"], last + 1)
        if self.is_main:
            images = iter(batches((steps[0] - 1) * accumulate))
            found = [{"step": step, "images": [[epoch, index, dataset.source.name(index)] for _ in range(accumulate)
                                               for epoch, index in next(images)]} for step in steps]
            write_file(path, json.dumps(found, indent=1) + "\n")
        raise UserError(f"loss or gradient were not finite in the {len(steps)} steps up to {last}, more in a row than train.max_bad_steps; "
                        f"they were skipped, and their images are listed in {path}: lower train.learning_rate or set "
                        "train.max_grad_norm, and continue from the last checkpoint with --resume auto")

    def average_batchnorm(self) -> None:
        """While it trains, each process has BatchNorm statistics of its own; what is validated and kept is their mean."""
        for module in self.modules.values() if self.accelerator.num_processes > 1 else ():
            for part in module.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.running_mean.copy_(self.accelerator.reduce(part.running_mean, "mean"))
                    part.running_var.copy_(self.accelerator.reduce(part.running_var, "mean"))

    def local_main_first(self, make: Callable[[], Any]) -> Any:
        """make(), on one process per machine before the others: for what downloads something."""
        made = failure = None
        with self.accelerator.local_main_process_first():
            try:
                made = make()
            except UserError as error:  # must not keep the others waiting
                failure = error
        if failure:
            raise failure
        return made

    # Metrics and pictures

    def add(self, values: dict[str, Tensor]) -> None:
        """Adds scalars to the means that `log` writes; they stay on the device."""
        for key, value in values.items():
            value = value.detach().float()
            finite = value.isfinite()  # what is not says nothing of the other steps
            self.sums[key] = self.sums.get(key, 0) + torch.where(finite, value, 0.0)
            self.counts[key] = self.counts.get(key, 0) + finite

    def means(self) -> dict[str, float]:
        """The means of what was added since the last call, over steps and processes; and how many bad steps there were."""
        means = {k: self.sums[k] / self.counts[k] for k in self.sums} | {"bad_steps": self.bad_steps.float()}
        values = dict(zip(means, self.accelerator.reduce(torch.stack(list(means.values())), "mean").tolist()))
        self.bad_steps = torch.zeros_like(self.bad_steps)
        self.sums.clear()
        self.counts.clear()
        return values

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes scalars to the tracker and to metrics.jsonl."""
        values = {k: v for k, v in values.items() if math.isfinite(v)}  # gradient norms are not, where fp16 overflowed
        with self.spare("the tracker's log"):
            self.accelerator.log(values, step=step)
        if self.is_main:
            with self.spare("metrics.jsonl"), open(self.folder / "metrics.jsonl", "ab", buffering=0) as file:
                line, end = (json.dumps({"step": step, **values}) + "\n").encode(), file.tell()
                if file.write(line) < len(line):  # no part of a line stays
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def picture(self, step: int, name: str, columns: list[tuple[Tensor, ...]]) -> Path:
        """Writes samples/NAME_step.png: for each column images (3, H, W) or maps (1, h, w) in [-1, 1], the first at the top.
        Small images are enlarged by a whole factor, to about 128 pixels."""
        path = self.folder / "samples" / f"{name}_{step:08d}.png"
        if self.is_main:
            size = [s * max(1, 128 // s) for s in columns[0][0].shape[-2:]]
            cells = [nn.functional.interpolate(cell[None].detach().float().cpu(), size).expand(-1, 3, -1, -1)
                     for row in zip(*columns) for cell in row]
            grid = make_grid(torch.cat(cells).clamp(-1, 1) / 2 + 0.5, nrow=len(columns))
            file = io.BytesIO()
            save_image(grid, file, "png")
            with self.spare(f"the picture of step {step}"):
                write_file(path, file.getvalue())
            with self.spare("the tracker's log"):
                for tracker in (t for t in self.accelerator.trackers if hasattr(t, "log_images")):
                    nhwc = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images({name: grid.permute(1, 2, 0)[None].numpy()}, step=step, **nhwc)
        return path

    @contextmanager
    def spare(self, what: str) -> Iterator[None]:
        """What a run can do without must not end it: a checkpoint that cannot be written will."""
        try:
            yield
        except OSError as error:
            warnings.warn(f"{what} could not be written ({error.strerror or error}); training goes on: make room in {self.folder}",
                          stacklevel=3)

    def progress(self, start: int, total: int) -> tqdm:
        return tqdm(total=total, initial=start, unit="step", disable=not self.is_main, dynamic_ncols=True)

    # Stopping

    def _on_signal(self, number: int, _: Any) -> None:
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C
        self._signal = signal.Signals(number).name

    def stop_reason(self, step: int) -> str | None:
        """Why to save and end now: a signal, or max_minutes. The same on all processes, which agree every 10 steps."""
        reason, limit = self._signal, self.train["max_minutes"]
        if limit is not None and time.monotonic() - self.started > 60 * limit:
            reason = reason or f"train.max_minutes={limit:g}"
        if self.accelerator.num_processes > 1:
            if step % 10:
                return None
            reason = max((r or "" for r in gather(reason)), key=len) or None
        return reason

    def exit_at_signal(self, what: str) -> None:
        """Ends the script if a signal has asked for it, where there is no step to finish."""
        if self._signal:
            raise UserError(f"stopped by {self._signal} {what}")

    def close(self) -> None:
        """Ends the run."""
        self.accelerator.wait_for_everyone()
        for tracker in self.accelerator.trackers:  # accelerator.end_training() would take apart the process group: see run_main
            tracker.finish()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def peak_memory() -> float:
    """GiB: of the GPU, or of this process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def load_run(folder: str | Path, which: Literal["latest", "best"] = "latest") -> tuple[nn.Module, dict]:
    """The model of a run folder, in eval mode on the CPU, and its config.

    which: the newest whole checkpoint, or the one of the best validation (whose PSNR may well be from before the GAN
    loss began). Averaged weights, if the run kept them. UserError if there is no such run.
    """
    folder, config = Path(folder), run_config(folder)
    path = folder / "checkpoints/best.safetensors"
    if which == "latest":
        checkpoint = _newest_whole(sorted((folder / "checkpoints").glob("step_*"), reverse=True), print)
        if checkpoint is None:
            raise UserError(f"{folder} has no whole checkpoint yet")
        path = next(p for n in ("ema", "model") if (p := checkpoint / f"{n}.safetensors").is_file())
    if not path.is_file():
        raise UserError(f"{folder} has no {path.name} yet")
    model = make_model(config)
    try:
        model.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise UserError(f"{path} does not hold the weights of the model in {folder}/config.yaml") from error
    return model.eval(), config


def run_config(folder: str | Path) -> dict:
    """The config of a run folder."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml")
    config = read_yaml(path)
    if mapping(config.get("model"), "model").get("name") not in MODELS:
        raise UserError(f"{path} names no model of {', '.join(MODELS)}")
    return config


def own_folder(run: Path, *parts: str) -> Path:
    """A run folder, before its `parts` (glob patterns) are written to. UserError if one is a link that leads out of the folder: who
    hands on a run folder must not choose which files of its new owner are written over. (The run folder may itself be a link.)"""
    for path in (path for part in parts for path in run.glob(part)):
        target = os.path.realpath(path)
        if path.is_symlink() and not Path(target).is_relative_to(os.path.realpath(run)):
            raise UserError(f"{path} is a link to {target}, outside of the run folder, and would be written to; remove it (instead, the "
                            "whole run folder may be a link, and train.output_dir, codes.cache_dir and --out can name other places)")
    return run


def run_dataset(config: dict, overrides: list[str], split: str, model: nn.Module) -> ImageDataset:
    """The images of a split of the data that a run was trained on, or of other data by overrides (data.root=...)."""
    given = {"data": dict(config["data"])}
    override(given, overrides)
    dataset = build(make_dataset, check_config(given, {"data": make_dataset}, "the command line")["data"], split=split)
    size = dataset.image_size
    if getattr(model, "image_size", size) != size or size % model.factor:
        raise UserError(f"this model cannot take images of data.image_size={size} pixels; it was trained with "
                        f"{config['data']['image_size']}")
    return dataset


def make_model(config: dict) -> nn.Module:
    """The model of a config, untrained."""
    settings = dict(config["model"])
    return build(MODELS[settings.pop("name")], settings)


def save_run(folder: Path, config: dict, modules: dict[str, nn.Module], more: dict[str, dict[str, Tensor]] | None = None) -> None:
    """Makes a run folder of weights alone, {"model": ...}, which load_run reads; `more`: other files, as named tensors."""
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint = folder / "checkpoints/step_00000000"
    checkpoint.mkdir(parents=True)
    for name, tensors in ({k: _state(m) for k, m in modules.items()} | (more or {})).items():
        save_file(tensors, checkpoint / f"{name}.safetensors")
    _write_manifest(checkpoint, 0)
    write_file(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))  # last: with it, the folder is a run


def run_main(main: Callable[[], None]) -> None:
    """Runs a script; what the user can put right ends it with one sentence instead of a traceback. Ends this process, if it is one
    of several."""
    _start_cpu_processes()
    threading.excepthook = _thread_ended
    status = 0
    try:
        with redirect_stdout(_Unfailing(sys.stdout)), redirect_stderr(_Unfailing(sys.stderr)):
            main()
    except (Exception, KeyboardInterrupt) as error:
        end_workers()  # now: torch would give each of them five seconds
        sentence, status = _sentence(error), 1
        if not torch.distributed.is_initialized():
            if sentence is None:
                raise
            sys.exit(sentence)
        print(sentence or traceback.format_exc(), file=_Unfailing(sys.stderr))
    if torch.distributed.is_initialized():
        # Taking apart a process group can wait for a thread that waits for Python's lock, which is held meanwhile.
        # Everything is written: leave without taking anything apart.
        end_workers()
        _Unfailing(sys.stdout).flush()
        _Unfailing(sys.stderr).flush()
        os._exit(status)


class _Unfailing:
    """A stream that may be a file on a full disk, which must not end a training."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()


def _sentence(error: BaseException) -> str | None:
    """What to tell the user instead of a traceback, which is for the errors that nobody thought of."""
    if isinstance(error, (UserError, DataError, NotFinite)):
        return f"error: {error}"
    if isinstance(error, SafetensorError):
        return f"error: {error}; what was saved before is whole"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return (f"error: {error.strerror} ({error.filename or 'while writing'}); what was saved before is whole (training continues from "
                "it by --resume auto)")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or re.search("(can't allocate|not enough) memory", str(error)):
        why = str(error).partition("\n")[0] or "of the CPU"
        return (f"error: out of memory ({why}); halve the batch size (in training double train.gradient_accumulation_steps), or choose a "
                "smaller model or image_size; what was saved before is whole")
    if isinstance(error, RuntimeError) and re.search("closed by peer|reset by peer|Broken pipe|remote process exited", str(error)):
        return "error: another process has ended; what it said is above, or on its machine (training continues by --resume auto)"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else None


def _thread_ended(failure: threading.ExceptHookArgs) -> None:
    """Tensorboard writes in a thread of its own, which a full disk ends."""
    if isinstance(failure.exc_value, OSError):
        why = failure.exc_value.strerror or failure.exc_value
        print(f"the tracker's log could not be written ({why}); training goes on", file=sys.stderr)
    else:
        threading.__excepthook__(failure)


def _start_cpu_processes() -> None:
    """`accelerate launch --cpu --num_processes N` starts one process and leaves the others to MPI. If there is no MPI, this
    process becomes torch's launcher of N."""
    launched_for_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in os.environ
    if not launched_for_cpu or "RANK" in os.environ or get_cpu_distributed_information().world_size > 1:
        return
    launcher = argparse.ArgumentParser(add_help=False)
    launcher.add_argument("--num_processes", "--num-processes", type=int)
    number = launcher.parse_known_args(psutil.Process().parent().cmdline())[0].num_processes
    if number is None:
        sys.exit("error: accelerate was asked for several processes on the CPU but started one; say --num_processes on the command line")
    del os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}", "--", *sys.argv])


def _newest_whole(checkpoints: list[Path], say: Callable[[str], None]) -> Path | None:
    for path in checkpoints:
        damage = _damage(path)
        if damage is None:
            return path
        say(f"the checkpoint {path} is damaged ({damage}); trying the one before")
    return None


def _write_manifest(checkpoint: Path, step: int, **more: int) -> None:
    files = {p.name: [p.stat().st_size, _sha256(p)] for p in sorted(checkpoint.iterdir())}
    (checkpoint / "checkpoint.json").write_text(json.dumps({"step": step, **more, "files": files}, indent=1))
    for path in (*checkpoint.iterdir(), checkpoint):  # on the disk before it takes the place of another
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, if anything."""
    try:
        manifest = json.loads((path / "checkpoint.json").read_text())
        files = [(str(name), int(size), str(digest)) for name, (size, digest) in manifest["files"].items()]
        f"{manifest['step']:08d} {manifest.get('bad_row', 0):d}"  # raises unless they are whole numbers
        if not 0 <= manifest["step"] < 2**62 > manifest.get("bad_row", 0) >= 0 or any(Path(name).name != name for name, _, _ in files):
            raise ValueError("no step, or a path")
        if not any(name in ("model.safetensors", "ema.safetensors") for name, _, _ in files):
            raise ValueError("no weights")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "checkpoint.json is missing or unreadable"
    for name, size, digest in files:
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if _sha256(file) != digest:
            return f"{name} has changed"
    return None


def _checksum(tensor: Tensor) -> Tensor:
    """The sum of the tensor's bits as integers: cheap, and different for almost any other tensor."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(integers[tensor.element_size()]).sum(dtype=torch.int64)


def _space(folder: Path, needed: int) -> str:
    free = shutil.disk_usage(folder).free
    missing = f", so {(needed - free) / 1e6:.1f} MB are missing" if needed > free else ""
    return f"it needs about {needed / 1e6:.1f} MB, and {folder} has {free / 1e6:.1f} MB free{missing}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _state(module: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    return {k: _whole(v, keep) for k, v in module.state_dict().items()}


def _whole(tensor: Tensor, keep: bool = True) -> Tensor | None:
    """All of a tensor, on the CPU, for the processes that keep it. Of a sharded one all processes must ask for it."""
    tensor = tensor.detach()
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.cpu().contiguous() if keep else None


def _shard(tensor: Tensor, like: Tensor | None) -> Tensor:
    """The whole tensor, or this process's part of it if `like` is sharded."""
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor


def _step(line: str) -> float:
    """Of a line of metrics.jsonl; infinite if the line was cut short."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def write_file(path: Path, data: str | bytes) -> None:
    """Writes a file whole or not at all: what was there before stays until the new one is complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "xb") as file:  # never through a link
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _flat(config: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _networks(config: dict) -> dict[str, Any]:
    """The settings that decide which weights a run has."""
    flat = _flat(config)
    gan = flat.get("loss.disc_weight", 0) > 0
    return {k: v for k, v in flat.items() if k.startswith("model.") or (gan and k.startswith("discriminator.")) or k == "train.use_ema"}


def gather(value: Any) -> list[Any]:
    """This value from every process, on every process."""
    if not torch.distributed.is_initialized():
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
