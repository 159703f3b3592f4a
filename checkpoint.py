"""Checkpoints: written whole or not at all, verified before they are loaded, the same with and without shards.

    Checkpoints     of a run: save, load, best weights
    wanted_checkpoint, newest_whole     the one that --resume means; the newest one that is not damaged
    write_weights   a checkpoint folder of weights alone
    write_file      a file, whole or not at all; make_file: one that has all its space
    whole_state     all weights of a module, also of one that FSDP has sharded

A checkpoint is a folder step_XXXXXXXX: NAME.safetensors for each module, what accelerate saves (optimizers, random numbers), and
checkpoint.json with the size and SHA-256 of each file. best.safetensors beside them holds the weights of the best validation.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, load
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from config import UserError


class Checkpoints:
    """The checkpoints of a run in `folder`; the same object on every process.

    modules     name to module: each is NAME.safetensors
    stateful    modules of small buffers only, which are kept with the optimizers
    optimizer   if it is sharded; accelerate saves the others
    limit       how many of the last ones are kept; None: all
    """

    def __init__(self, accelerator: Accelerator, folder: Path, limit: int | None, modules: dict[str, nn.Module],
                 stateful: list[nn.Module], optimizer: torch.optim.Optimizer | None):
        self.accelerator, self.folder, self.limit, self.modules, self.optimizer = accelerator, folder, limit, modules, optimizer
        self.is_main, self.sharded = accelerator.is_main_process, optimizer is not None
        self.best, self.agreed = -math.inf, 0  # the best score; the last step at which all processes held the same weights
        self.best_step = 0  # of the best score, known to the first process
        accelerator.register_for_checkpointing(*stateful)
        accelerator.register_save_state_pre_hook(self._save_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)

    def _save_weights(self, models: list, weights: list, folder: str) -> None:
        weights.clear()  # accelerate would name them by number, and by how many processes there were
        modules = self.modules if self.is_main or self.sharded else {}
        files = {f"{name}.safetensors": whole_state(module, self.is_main) for name, module in modules.items()}
        if self.sharded:  # in accelerate's format
            state = self.optimizer.state_dict()
            state["state"] = {i: {k: _whole(v, self.is_main) for k, v in values.items()} for i, values in state["state"].items()}
        if self.is_main:  # after all that the processes do together, because writing may fail
            for name, tensors in files.items():
                save_file(tensors, f"{folder}/{name}")
            if self.sharded:
                torch.save(state, f"{folder}/optimizer.bin")

    def _load_weights(self, models: list, folder: str) -> None:
        models.clear()
        for name, module in self.modules.items():
            now = module.state_dict()
            module.load_state_dict({k: _shard(v, now.get(k)) for k, v in load_file(f"{folder}/{name}.safetensors").items()})
        if self.sharded:
            state = torch.load(f"{folder}/optimizer.bin", map_location="cpu", weights_only=True)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            state["state"] = {i: {k: v if k == "step" else _shard(v, parameters[i]) for k, v in values.items()}
                              for i, values in state["state"].items()}
            self.optimizer.load_state_dict(state)

    def save(self, step: int, bad_row: int) -> None:
        """Writes step_XXXXXXXX under a temporary name, renames it when it is whole, then removes the
        oldest. bad_row: how many of the last steps were bad, kept with it."""
        self._check_agreement(step)
        final = self.folder / f"step_{step:08d}"
        temporary = final.with_name(f".{final.name}")

        def finish() -> None:
            write_manifest(temporary, step, bad_row)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            _sync(final.parent)

        if self.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._write_together(step, temporary, lambda: self.accelerator.save_state(str(temporary)))
        self._write_together(step, temporary, finish if self.is_main else lambda: None)
        if self.is_main:
            for old in list_checkpoints(self.folder)[self.limit:] if self.limit else []:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _write_together(self, step: int, temporary: Path, write: Callable[[], None]) -> None:
        """write() on all processes. If one of them cannot, nothing of it stays and all of them end."""
        failure = None
        try:
            write()
        except (OSError, RuntimeError, SafetensorError) as error:  # which torch and safetensors raise when a disk is full
            failure = str(error).partition("\n")[0]
        failures = [f for f in gather_object([failure]) if f]
        if failures:
            if self.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            optimizers = self.accelerator._optimizers + ([self.optimizer] if self.sharded else [])
            states = [part.state_dict() for part in (*self.modules.values(), *optimizers)]
            needed = sum(leaf.nbytes for leaf in tree_leaves(states) if isinstance(leaf, Tensor))
            free = shutil.disk_usage(self.folder).free
            missing = f", so {(needed - free) / 1e6:.1f} MB are missing" if needed > free else ""
            raise UserError(f"the checkpoint of step {step} could not be written ({failures[0]}): it needs about {needed / 1e6:.1f} MB, "
                            f"and {self.folder} has {free / 1e6:.1f} MB free{missing}; the one before is whole, and --resume auto "
                            "continues from it when there is room")

    def _check_agreement(self, step: int) -> None:
        """Processes that no longer hold the same weights, codebook and averages must not replace a good checkpoint."""
        if self.accelerator.num_processes > 1 and not self.sharded:
            sums = {f"{name}.{key}": _checksum(v) for name, module in self.modules.items() for key, v in module.state_dict().items()
                    if not key.endswith(".queue")}  # which is of each process's own codes
            every = gather_object([dict(zip(sums, torch.stack(list(sums.values())).tolist()))])
            different = [key for key in sums if any(other[key] != every[0][key] for other in every)]
            if different:
                raise UserError(f"the processes no longer hold the same model: {different[0]} (and {len(different) - 1} more) became "
                                f"different between step {self.agreed} and step {step}, which was not saved; look for a faulty machine, "
                                "and continue from the checkpoint before with --resume auto")
        self.agreed = step

    def load(self, wanted: str | None) -> dict:
        """Loads `wanted` (a path, "auto" for the newest whole one, None for none) and returns what is in its checkpoint.json, or
        that of a new run. Later checkpoints are renamed to abandoned_*."""
        found = [None, None]  # the checkpoint, and what is wrong
        if self.is_main and wanted == "auto":
            found[0] = newest_whole(self.folder, self.accelerator.print)
            if found[0] is None and list_checkpoints(self.folder):
                found[1] = f"no checkpoint in {self.folder} is whole; start again in another train.output_dir"
        elif self.is_main and wanted:
            found[0] = Path(wanted)
            if what := damage(found[0]):
                found[1] = f"the checkpoint {wanted} cannot be used: {what}"
        if found[0] and not found[1] and not (found[0] / "optimizer.bin").is_file():
            found[1] = f"{found[0]} holds weights alone, which cannot be trained on; choose another train.output_dir"
        path, wrong = broadcast_object_list(found)
        if wrong:
            raise UserError(wrong)
        manifest = {"step": 0, "bad_row": 0} if path is None else self._load(path)
        self.agreed = manifest["step"]
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._tidy(self.agreed)
            self._find_best(self.agreed)
        return manifest

    def _load(self, path: Path) -> dict:
        try:
            for file in path.glob("*.pkl"):  # accelerate would run the code in some, and pass over damage in others
                load(file)
            self.accelerator.load_state(str(path))
        except pickle.UnpicklingError as error:
            raise UserError(f"{path} holds more than tensors and numbers, and was not loaded, because that could run code from "
                            "it; use a checkpoint that you trust") from error
        self.accelerator.step = 0  # accumulation begins anew: checkpoints lie between steps
        return json.loads((path / "checkpoint.json").read_text())

    def _tidy(self, step: int) -> None:
        for unfinished in self.folder.glob(".step_*"):  # when the run was killed
            shutil.rmtree(unfinished, ignore_errors=True)
        for later in list_checkpoints(self.folder):  # damaged, or later than what was resumed
            if later.name > f"step_{step:08d}":
                abandoned = later.with_name(f"abandoned_{later.name}")
                shutil.rmtree(abandoned, ignore_errors=True)
                os.replace(later, abandoned)
                self.accelerator.print(f"{later} is now {abandoned.name}; remove it when you like")

    def _find_best(self, step: int) -> None:
        path = self.folder / "best.safetensors"
        if step and path.is_file():
            try:
                with safe_open(path, "pt") as best:
                    if int(best.metadata()["step"]) <= step:
                        self.best = float(best.metadata()["score"])
                        self.best_step = int(best.metadata()["step"])
            except (SafetensorError, KeyError, TypeError, ValueError):
                self.accelerator.print(f"{path} is damaged; the next validation replaces it")

    def save_best(self, step: int, score: float, module: nn.Module) -> None:
        """Keeps the weights if their score is the highest so far."""
        if self.is_main and score > self.best:
            write_file(self.folder / "best.safetensors", save(whole_state(module), {"step": str(step), "score": repr(score)}))
            self.best, self.best_step = score, step


def wanted_checkpoint(resume: str | None, run: Path) -> str | None:
    """What --resume means for this run folder: None, "auto", or the path of a checkpoint. `latest` and the run's own folders are "auto";
    a checkpoint's name alone is one of this run."""
    if resume is None:
        return None
    own = run / "checkpoints"
    path = Path(resume).expanduser().absolute()
    if resume in ("auto", "latest") or path.resolve() in (run.resolve(), own.resolve()):
        return "auto"
    for place in (path, own / resume):
        if (place / "checkpoint.json").is_file():
            return str(place)
    raise UserError(f"--resume takes auto or a checkpoint, such as {own}/step_00001000; in {resume}, checkpoint.json is missing")


def list_checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob("step_*"), reverse=True)


def newest_whole(folder: Path, say: Callable[[str], Any]) -> Path | None:
    for path in list_checkpoints(folder):
        what = damage(path)
        if what is None:
            return path
        say(f"the checkpoint {path} is damaged ({what}); trying the one before")
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, if anything."""
    try:
        manifest = json.loads((path / "checkpoint.json").read_text())
        files = [(str(name), int(size), str(digest)) for name, (size, digest) in manifest["files"].items()]
        names = {name for name, _, _ in files}
        for number in (manifest["step"], manifest["bad_row"]):
            if not isinstance(number, int) or not 0 <= number < 2**62:
                raise ValueError("no number of steps")
        if any(Path(name).name != name for name in names):
            raise ValueError("a path")
        if not names & {"model.safetensors", "ema.safetensors"}:
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


def write_weights(checkpoint: Path, files: dict[str, dict[str, Tensor]]) -> None:
    """Makes a checkpoint of step 0 that holds weights alone: name to tensors."""
    checkpoint.mkdir(parents=True)
    for name, tensors in files.items():
        save_file(tensors, checkpoint / f"{name}.safetensors")
    write_manifest(checkpoint, 0)


def write_manifest(checkpoint: Path, step: int, bad_row: int = 0) -> None:
    files = {p.name: [p.stat().st_size, _sha256(p)] for p in sorted(checkpoint.iterdir())}
    manifest = {"step": step, "bad_row": bad_row, "files": files}
    (checkpoint / "checkpoint.json").write_text(json.dumps(manifest, indent=1))
    for path in (*checkpoint.iterdir(), checkpoint):  # on the disk before the folder is renamed
        _sync(path)


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


def make_file(path: Path, size: int) -> None:
    """A file of zeros that has all its space, so that a full disk shows now, and not when a memory map is written."""
    allocate = getattr(os, "posix_fallocate", None) or (lambda descriptor, _, size: os.truncate(descriptor, size))  # macOS has none
    with open(path, "wb") as file:
        try:
            allocate(file.fileno(), 0, size)
        except OSError as error:
            path.unlink()
            free = shutil.disk_usage(path.parent).free / 1e6
            raise OSError(error.errno, error.strerror, f"{path}, which needs {size / 1e6:.1f} MB where {free:.1f} MB are free") from error


def _sync(path: Path) -> None:
    if os.name == "nt":  # Windows has this for open files alone
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def whole_state(module: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """The weights on the CPU, for the processes that keep them. If the module is sharded, all processes must call this."""
    return {k: _whole(v, keep) for k, v in module.state_dict().items()}


def _whole(tensor: Tensor, keep: bool) -> Tensor | None:
    tensor = tensor.detach()
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # a DTensor
    return tensor.cpu().contiguous() if keep else None


def _shard(tensor: Tensor, like: Tensor | None) -> Tensor:
    """The whole tensor, or this process's part of it if `like` is sharded."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # takes a second

    return distribute_tensor(tensor, like.device_mesh, like.placements)


def _checksum(tensor: Tensor) -> Tensor:
    """The sum of the tensor's bits as integers: cheap, and different for almost any other tensor."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(integers[tensor.element_size()]).sum(dtype=torch.int64)
