"""Checkpoints: written whole or not at all, verified before they are loaded, the same with and
without shards.

    Checkpoints         of a run: save, load, best weights
    wanted_checkpoint   the one that --resume means
    newest_whole        the newest one that is not damaged
    write_weights       a checkpoint folder of weights alone
    write_file          a file, whole or not at all
    whole_state         all weights of a module, also of one that FSDP has sharded

A checkpoint is a folder step_XXXXXXXX: NAME.safetensors for each module, optimizer.bin with all
optimizers' states, what accelerate saves (random numbers, fp16's scale), and checkpoint.json with
the size and SHA-256 of each file. best.safetensors beside them holds the weights of the best
validation.
"""

import hashlib
import json
import math
import os
import pickle
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import DistributedType, broadcast_object_list, gather_object, load
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file

from harness.config import UserError


class Checkpoints:
    """The checkpoints of a run in `folder`; the same object on every process.

    limit       how many of the last ones are kept; None: all
    """

    def __init__(self, accelerator, folder, limit):
        self.accelerator = accelerator
        self.is_main = accelerator.is_main_process
        self.folder = folder
        self.limit = limit
        self.modules = {}
        self.optimizers = {}
        self.best = -math.inf  # the best score
        self.best_step = 0  # of the best score, known to the first process
        self.agreed = 0  # the last step at which all processes held the same weights

    def save(self, step, bad_row):
        """Writes step_XXXXXXXX under a temporary name, renames it when it is whole, then removes
        the oldest. With it, the number of bad steps in a row."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        self._check_agreement(step)
        final = self.folder / f"step_{step:08d}"
        temporary = final.with_name(f".{final.name}")
        if self.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with self._together(step, temporary):
            weights = {name: whole_state(module) for name, module in self.modules.items()}
            moments = {
                name: get_optimizer_state_dict(self.modules[name], optimizer, options=_whole())
                for name, optimizer in self.optimizers.items() if optimizer.state}
            # All that the processes do together is done: from here on, one of them may fail.
            self.accelerator.save_state(str(temporary))
            if self.is_main:
                for name, tensors in weights.items():
                    save_file(tensors, temporary / f"{name}.safetensors")
                torch.save(moments, temporary / "optimizer.bin")
        with self._together(step, temporary):
            if self.is_main:
                write_manifest(temporary, step, bad_row)
                shutil.rmtree(final, ignore_errors=True)
                os.replace(temporary, final)
                _sync(final.parent)
        if self.is_main and self.limit:
            for old in list_checkpoints(self.folder)[self.limit:]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _together(self, step, temporary):
        """What all processes write in here. If one cannot, nothing of it stays, and all end."""
        failure = None
        try:
            yield
        # What python, torch and safetensors raise when a disk is full.
        except (OSError, RuntimeError, SafetensorError) as error:
            failure = str(error).partition("\n")[0]
        failures = [f for f in gather_object([failure]) if f]
        if failures:
            if self.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            tensors = [v for m in self.modules.values() for v in m.state_dict().values()]
            for optimizer in self.optimizers.values():
                tensors += [v for state in optimizer.state.values() for v in state.values()]
            needed = sum(v.nbytes for v in tensors)
            free = shutil.disk_usage(self.folder).free
            missing = ""
            if needed > free:
                missing = f", so {(needed - free) / 1e6:.1f} MB are missing"
            raise UserError(f"the checkpoint of step {step} could not be written ({failures[0]}): "
                            f"it needs about {needed / 1e6:.1f} MB, and {self.folder} has "
                            f"{free / 1e6:.1f} MB free{missing}; the one before is whole, and "
                            "--resume auto continues from it when there is room")

    def _check_agreement(self, step):
        """Processes that no longer hold the same weights, codebook and averages must not replace
        a good checkpoint."""
        if self.accelerator.distributed_type != DistributedType.FSDP:
            sums = {f"{name}.{key}": _checksum(tensor) for name, module in self.modules.items()
                    for key, tensor in module.state_dict().items()
                    if not key.endswith(".queue")}  # which is of each process's own codes
            every = gather_object([sums])
            different = [key for key in sums if len({own[key] for own in every}) > 1]
            if different:
                raise UserError(f"the processes no longer hold the same model: {different[0]} "
                                f"(and {len(different) - 1} more) became different between step "
                                f"{self.agreed} and step {step}, which was not saved; look for a "
                                "faulty machine, and continue from the checkpoint before with "
                                "--resume auto")
        self.agreed = step

    def open(self, modules, optimizers, stateful, wanted):
        """Loads `wanted` (a path, "auto" for the newest whole one, None for none) and returns what
        is in its checkpoint.json, or that of a new run. Later checkpoints are renamed to
        abandoned_*.

        modules     name to module: each is NAME.safetensors
        optimizers  name to optimizer, of the modules that have one: together, optimizer.bin
        stateful    modules of small buffers only; accelerate saves them, and the random numbers
        """
        self.modules = modules
        self.optimizers = {name: wrapper.optimizer for name, wrapper in optimizers.items()}
        self.accelerator.register_for_checkpointing(*stateful)
        # Or accelerate would save these too, each process its own part.
        self.accelerator._models.clear()
        self.accelerator._optimizers.clear()
        path = wrong = None
        if self.is_main and wanted == "auto":
            path = newest_whole(self.folder, self.accelerator.print)
            if path is None and list_checkpoints(self.folder):
                wrong = (f"no checkpoint in {self.folder} is whole; "
                         "start again in another train.output_dir")
        elif self.is_main and wanted:
            path = Path(wanted)
            if what := damage(path):
                wrong = f"the checkpoint {wanted} cannot be used: {what}"
        if path and not wrong and not (path / "optimizer.bin").is_file():
            wrong = (f"{path} holds weights alone, which cannot be trained on; "
                     "choose another train.output_dir")
        path, wrong = broadcast_object_list([path, wrong])
        if wrong:
            raise UserError(wrong)
        manifest = {"step": 0, "bad_row": 0} if path is None else self._load(path)
        self.agreed = manifest["step"]
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._tidy(self.agreed)
            self._find_best(self.agreed)
        return manifest

    def _load(self, path):
        from torch.distributed.checkpoint.state_dict import (
            set_model_state_dict, set_optimizer_state_dict,
        )

        try:
            # accelerate would run the code in some of these, and pass over damage in others.
            for file in path.glob("*.pkl"):
                load(file)
            moments = load(path / "optimizer.bin", map_location="cpu")
        except pickle.UnpicklingError as error:
            raise UserError(f"{path} holds more than tensors and numbers, and was not loaded, "
                            "because that could run code from it; use a checkpoint that you trust"
                            ) from error
        # The optimizers first: torch makes their state by a step, which may touch the weights.
        for name, state in moments.items():
            module = self.modules[name]
            set_optimizer_state_dict(module, self.optimizers[name], state, options=_whole())
        for name, module in self.modules.items():
            set_model_state_dict(module, load_file(path / f"{name}.safetensors"), options=_whole())
        self.accelerator.load_state(str(path))
        self.accelerator.step = 0  # accumulation begins anew: checkpoints lie between steps
        return json.loads((path / "checkpoint.json").read_text())

    def _tidy(self, step):
        for unfinished in self.folder.glob(".step_*"):  # when the run was killed
            shutil.rmtree(unfinished, ignore_errors=True)
        for later in list_checkpoints(self.folder):  # damaged, or later than what was resumed
            if later.name > f"step_{step:08d}":
                abandoned = later.with_name(f"abandoned_{later.name}")
                shutil.rmtree(abandoned, ignore_errors=True)
                os.replace(later, abandoned)
                self.accelerator.print(f"{later} is now {abandoned.name}; remove it when you like")

    def _find_best(self, step):
        path = self.folder / "best.safetensors"
        if step and path.is_file():
            try:
                with safe_open(path, "pt") as file:
                    best = file.metadata()
                if int(best["step"]) <= step:
                    self.best = float(best["score"])
                    self.best_step = int(best["step"])
            except (SafetensorError, KeyError, TypeError, ValueError):
                self.accelerator.print(f"{path} is damaged; the next validation replaces it")

    def save_best(self, step, score, module):
        """Keeps the weights if their score is the highest so far."""
        if self.is_main and score > self.best:
            data = save(whole_state(module), {"step": str(step), "score": repr(score)})
            write_file(self.folder / "best.safetensors", data)
            self.best = score
            self.best_step = step


def wanted_checkpoint(resume, run):
    """What --resume means for this run folder: None, "auto", or the path of a checkpoint. `latest`
    and the run's own folders are "auto"; a checkpoint's name alone is one of this run."""
    if resume is None:
        return None
    own = run / "checkpoints"
    path = Path(resume).expanduser().absolute()
    if resume in ("auto", "latest") or path.resolve() in (run.resolve(), own.resolve()):
        return "auto"
    for place in (path, own / resume):
        if (place / "checkpoint.json").is_file():
            return str(place)
    raise UserError(f"--resume takes auto or a checkpoint, such as {own}/step_00001000; "
                    f"in {resume}, checkpoint.json is missing")


def list_checkpoints(folder):
    """Newest first."""
    return sorted(folder.glob("step_*"), reverse=True)


def newest_whole(folder, say):
    for path in list_checkpoints(folder):
        what = damage(path)
        if what is None:
            return path
        say(f"the checkpoint {path} is damaged ({what}); trying the one before")
    return None


def damage(path):
    """What is wrong with a checkpoint, if anything."""
    try:
        manifest = json.loads((path / "checkpoint.json").read_text())
        files = [(name, size, digest) for name, (size, digest) in manifest["files"].items()]
        names = {name for name, _, _ in files}
        has_numbers = 0 <= manifest["step"] < 2**62 and 0 <= manifest["bad_row"] < 2**62
        has_weights = names & {"model.safetensors", "ema.safetensors"}
        if not has_numbers or not has_weights or any(Path(name).name != name for name in names):
            raise ValueError
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


def write_weights(checkpoint, files):
    """Makes a checkpoint of step 0 that holds weights alone: name to tensors."""
    checkpoint.mkdir(parents=True)
    for name, tensors in files.items():
        save_file(tensors, checkpoint / f"{name}.safetensors")
    write_manifest(checkpoint, 0)


def write_manifest(checkpoint, step, bad_row=0):
    files = {p.name: [p.stat().st_size, _sha256(p)] for p in sorted(checkpoint.iterdir())}
    manifest = {"step": step, "bad_row": bad_row, "files": files}
    (checkpoint / "checkpoint.json").write_text(json.dumps(manifest, indent=1))
    for path in (*checkpoint.iterdir(), checkpoint):  # on the disk before the folder is renamed
        _sync(path)


def write_file(path, data):
    """Writes a file whole or not at all: what was there before stays until the new one is
    complete."""
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


def _sync(path):
    if os.name == "nt":  # Windows has this for open files alone
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def whole_state(module, everywhere=False):
    """The weights on the CPU, for the first process alone; everywhere: on their device, for all.
    If the module is sharded, all processes must call this."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    state = get_model_state_dict(module, options=_whole(cpu_offload=not everywhere))
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _whole(cpu_offload=True):
    """Says that a state's tensors are whole, also if a module's are sharded."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions  # takes a second

    return StateDictOptions(full_state_dict=True, cpu_offload=cpu_offload)


def _checksum(tensor):
    """The sum of the tensor's bits as integers: cheap, and different for almost any other
    tensor."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()]).sum(dtype=torch.int64).item()
