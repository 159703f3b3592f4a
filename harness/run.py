"""A run: its folder, how it trains, what it writes, and when it stops.

    Run                 a run folder and the training in it
    learning_rate_at, compile_parts, update_ema     what both training scripts need
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import (
    DistributedType, DynamoBackend, ProjectConfiguration, gather_object, set_seed,
)
from tqdm import tqdm

from dataset import SIGUSR1, ImageDataset
from harness.checkpoint import (
    Checkpoints, list_checkpoints, wanted_checkpoint, whole_state, write_file,
)
from harness.config import UserError, flatten
from harness.guard import Guard
from harness.log import Log
from harness.models import make_model, own_folder, run_config

# One process may wait long for another's codes, FID or images.
PATIENCE = InitProcessGroupKwargs(timeout=timedelta(hours=2))


class Run:
    """A run folder and the training in it; the same object on every process.

    Made before the models, so that a folder that cannot be used stops the script at once. `resume`
    comes when all that a checkpoint holds is made, `start` before the loop and `finish` after it.

    dataset  the training images
    fsdp     the script can train sharded weights, which `prepare` makes. Each process then holds a
             part of the model, of its average and of the optimizer's state
    """

    def __init__(self, config: dict[str, dict], dataset: ImageDataset, resume: str | None = None,
                 fsdp: bool = False):
        train = config["train"]
        if (train["learning_rate"] is None) == (train["base_lr"] is None):
            raise UserError("give one of train.learning_rate and train.base_lr")
        if train["max_train_steps"] is None and train["num_train_epochs"] is None:
            raise UserError("give train.max_train_steps or train.num_train_epochs, or both: "
                            "the one that ends first counts")
        self.config = config
        self.train = train
        self.dataset = dataset
        self.folder = Path(train["output_dir"]).expanduser()
        self.wanted = wanted_checkpoint(resume, self.folder)
        check_folder(self.folder, config, self.wanted)

        # Processes
        self.accelerator = make_accelerator(train, self.folder, fsdp)
        self.sharded = self.accelerator.distributed_type == DistributedType.FSDP
        self.is_main = self.accelerator.is_main_process
        self.world = self.accelerator.num_processes
        train["mixed_precision"] = self.accelerator.mixed_precision  # as it was resolved
        set_seed(train["seed"])

        # How many steps, on how many images each
        together = train["train_batch_size"] * self.world
        if len(dataset) < together:
            raise UserError(f"{len(dataset)} training images are fewer than one batch of "
                            f"{train['train_batch_size']} x {self.world} processes; "
                            "choose a smaller train.train_batch_size")
        self.global_batch = together * train["gradient_accumulation_steps"]
        self.steps_per_epoch = len(dataset) / self.global_batch
        epochs = train["num_train_epochs"]
        of_epochs = max(1, round(epochs * self.steps_per_epoch)) if epochs else math.inf
        self.max_steps = min(train["max_train_steps"] or math.inf, of_epochs)

        # What a checkpoint holds: see `resume`
        self.modules: dict[str, nn.Module] = {}
        self.guard = Guard(self.accelerator, train)
        self.checkpoints = Checkpoints(
            self.accelerator, self.folder / "checkpoints", train["checkpoints_total_limit"])

        # Records and signals
        self.log = Log(self.accelerator, self.folder)
        self.bar = tqdm(total=self.max_steps, unit="step", disable=True)
        self.logged_step = 0
        self.started = self.clock = time.monotonic()
        self._signal: str | None = None
        self._handlers = {s: signal.signal(s, self._on_signal)
                          for s in {signal.SIGINT, signal.SIGTERM, SIGUSR1}}

    # FSDP

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer,
                ema: nn.Module | None) -> tuple[nn.Module, torch.optim.Optimizer]:
        """accelerator.prepare; and `ema` is sharded like the model."""
        if self.sharded:
            plugin = self.accelerator.state.fsdp_plugin
            # Is for weights from a file; these are the same in every process.
            plugin.cpu_ram_efficient_loading = False
            # accelerate would round sums of gradients too, and the loss.
            if self.accelerator.mixed_precision == "bf16":
                from torch.distributed.fsdp import MixedPrecisionPolicy  # takes a second

                plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        model, optimizer = self.accelerator.prepare(model, optimizer)
        if self.sharded and ema is not None:
            shards = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            ema.load_state_dict(shards, assign=True)
        return model, optimizer

    def whole(self, module: nn.Module) -> nn.Module:
        """The module; if it is sharded, an ordinary copy with all its weights, for what reads
        weights outside of forward."""
        if not self.sharded:
            return module
        with torch.random.fork_rng(devices=[]):  # building it must not advance the random numbers
            copy = make_model(self.config)
        copy.load_state_dict(whole_state(module, everywhere=True))
        return copy.to(self.accelerator.device)

    # Checkpoints

    def resume(self, optimizers: dict[str, torch.optim.Optimizer],
               stateful: dict[str, nn.Module], **modules: nn.Module | None) -> int:
        """Loads the checkpoint that was asked for, and opens the log. Returns the number of steps
        done, 0 for a new run.

        modules     whose weights a checkpoint holds, as NAME.safetensors: `model`, and maybe `ema`
                    and `discriminator`
        optimizers  by their modules' names
        stateful    modules that have small buffers only
        """
        self.modules |= {name: self.accelerator.unwrap_model(module)
                         for name, module in modules.items() if module is not None}
        self.guard.watch(self.modules, stateful.values())
        # The weights are made: from here on, each process has random numbers of its own.
        if not self.is_main:
            torch.manual_seed(self.train["seed"] + self.accelerator.process_index)
        manifest = self.checkpoints.open(self.modules, optimizers, stateful.values(), self.wanted)
        step = manifest["step"]
        self.guard.row += manifest["bad_row"]
        if step:
            self.accelerator.print(f"continuing {self.folder} from step {step}")
        if self.is_main:
            write_file(self.folder / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))
        self.log.open(step, flatten(self.config))
        return step

    def save_best(self, step: int, score: float, module: nn.Module) -> None:
        """Keeps the weights if their score is the highest so far."""
        with self.log.spare("the best weights"):
            self.checkpoints.save_best(step, score, module)

    def save(self, step: int) -> None:
        self.average_batchnorm()
        self.checkpoints.save(step, int(self.guard.row))

    # Training

    def start(self, step: int) -> None:
        """Says what is trained from this step on; starts the progress bar and the clock."""
        parameters = sum(p.numel() for p in self.modules["model"].parameters())
        say = self.accelerator.print
        say(f"{self.folder}: {parameters / 1e6:.1f} M parameters, {len(self.dataset)} images, "
            f"{self.world} process(es), global batch {self.global_batch}, {self.max_steps} steps "
            f"({self.max_steps / self.steps_per_epoch:,.1f} epochs)")
        if step >= self.max_steps:
            say(f"{self.folder} has had its {self.max_steps} steps")
        self.bar = tqdm(total=self.max_steps, initial=step, unit="step", disable=not self.is_main,
                        dynamic_ncols=True)
        self.logged_step = step
        self.clock = time.monotonic()

    def set_learning_rate(self, step: int, *optimizers: torch.optim.Optimizer) -> None:
        self.lr = learning_rate_at(step, self.train, self.global_batch, self.max_steps,
                                   self.steps_per_epoch)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr

    def write_log(self, step: int) -> None:
        """Writes the means since the last time. UserError if too many steps in a row were bad."""
        speed = (step - self.logged_step) * self.global_batch / (time.monotonic() - self.clock)
        self.logged_step = step
        self.clock = time.monotonic()
        values = self.log.means(bad_steps=self.guard.pop_count())
        values |= perplexities(values)
        if "tokens" in values:
            values["tokens_per_second"] = speed * values["tokens"]
        run = {"lr": self.lr, "images_per_second": speed, "peak_memory_gib": peak_memory(),
               "epoch": step / self.steps_per_epoch}
        self.log.write(step, run | values)
        shares = {k: f"{values[k]:.0%}" for k in ("usage", "padding") if k in values}
        self.bar.set_postfix({"loss": f"{values['loss']:.3f}", "img/s": f"{speed:.0f}"} | shares)
        self.guard.stop_if_too_many()

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """What happens in here does not count as training in images per second."""
        started = time.monotonic()
        yield
        self.clock += time.monotonic() - started

    def finish(self, step: int, stop: str | None, validate: Callable[[int], str]) -> None:
        """Says why the run ends, or how good it is after its last step; closes its records."""
        self.bar.close()
        if stop is None:
            self.accelerator.print(validate(step))
        else:
            self.accelerator.print(f"stopped by {stop} at step {step} of {self.max_steps}, saved; "
                                   "--resume auto continues")
        self.accelerator.wait_for_everyone()
        self.log.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def average_batchnorm(self) -> None:
        """While it trains, each process has BatchNorm statistics of its own; what is validated and
        kept is their mean."""
        if self.world == 1:
            return
        for module in self.modules.values():
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

    # Stopping

    def _on_signal(self, number: int, _: Any):
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C
        self._signal = signal.Signals(number).name

    def stop_reason(self, step: int) -> str | None:
        """Why to save and end now: a signal, or max_minutes. The same on all processes, which
        agree every 10 steps."""
        reason = self._signal
        limit = self.train["max_minutes"]
        if limit is not None and time.monotonic() - self.started > 60 * limit:
            reason = reason or f"train.max_minutes={limit:g}"
        if self.world > 1:
            if step % 10:
                return None
            reason = max((r or "" for r in gather_object([reason])), key=len) or None
        return reason

    def exit_at_signal(self, what: str) -> None:
        """Ends the script if a signal has asked for it, where there is no step to finish."""
        if self._signal:
            raise UserError(f"stopped by {self._signal} {what}")


def make_accelerator(train: dict, folder: Path, fsdp: bool) -> Accelerator:
    """The accelerator, as `accelerate launch` and the config ask for it; UserError for what this
    code is not made for."""
    # What FSDP gathers at a time, if `accelerate launch` was not told: a transformer block.
    os.environ.setdefault("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    os.environ.setdefault("FSDP_TRANSFORMER_CLS_TO_WRAP", "Block")
    instead = "which is not supported; use --multi_gpu, or in stage 2 --use_fsdp --fsdp_version 2"
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() == "true":
        raise UserError(f"accelerate was asked for a parallelism config, {instead}")
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=train["gradient_accumulation_steps"],
            mixed_precision=train["mixed_precision"],
            log_with=train["log_with"],
            project_config=ProjectConfiguration(
                project_dir=str(folder), logging_dir=str(folder / "tensorboard")),
            # Buffers are kept equal by the models themselves, and must not change between two
            # forwards of one step.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False), PATIENCE])
    except (ValueError, ImportError) as error:  # fp16 without a GPU, an unknown tracker
        raise UserError(f"accelerate cannot start as it was asked to ({error})") from error
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(f"accelerate was asked for {kind.value}, {instead}")
    precision = accelerator.mixed_precision
    ours = train["gradient_accumulation_steps"]
    theirs = accelerator.gradient_accumulation_steps
    refusals = {
        "torch.compile; leave that to the config: --dynamo_backend no, and train.compile=true":
            accelerator.state.dynamo_plugin.backend != DynamoBackend.NO,
        f"gradient_accumulation_steps={theirs} (ACCELERATE_GRADIENT_ACCUMULATION_STEPS), but the "
        f"config says train.gradient_accumulation_steps={ours}; leave accelerate's out":
            theirs != ours,
        f"mixed_precision={precision}, which is not supported; use bf16":
            precision not in ("no", "fp16", "bf16"),
    }
    if kind == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        refusals |= {
            "FSDP, but stage 1 needs the whole model in every process; use --multi_gpu": not fsdp,
            "FSDP, version 1, which is not supported; add --fsdp_version 2":
                plugin.fsdp_version != 2,
            "FSDP, with weights on the CPU, which is not supported; "
            "leave --fsdp_offload_params out":
                type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy",
            "FSDP, with train.mixed_precision=fp16, which is not supported; use bf16":
                precision == "fp16",
        }
    for why, refused in refusals.items():
        if refused:
            raise UserError(f"accelerate was asked for {why}")
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", precision):
        accelerator.print(f"train.mixed_precision={precision} is used, not accelerate's {launched}")
    return accelerator


def check_folder(folder: Path, config: dict, resume: str | None) -> None:
    """UserError if the folder holds checkpoints that are not resumed, another network's, links
    that lead out of it, or files that are not a run's."""
    own_folder(folder, "checkpoints", "checkpoints/.step_*", "samples", "tensorboard",
               "tensorboard/*", "codebook", "stage1")
    try:
        run_config(folder)
    except UserError:  # config.yaml is the first file of a run
        for name in ("config.yaml", "metrics.jsonl", "stage1", "classes.json", "thresholds.json",
                     "codebook"):
            if (folder / name).exists():
                raise UserError(f"{folder} is not a run folder, but holds {name}, which a run "
                                "would write over; choose another train.output_dir") from None
    own = list_checkpoints(folder / "checkpoints")
    if resume is None and own:
        raise UserError(f"{folder} already holds checkpoints; continue it with --resume auto, "
                        "or choose another train.output_dir")
    source = folder if resume == "auto" else Path(resume or "").parent.parent
    if resume and own and source.resolve() != folder.resolve():
        raise UserError(f"{folder} already holds checkpoints of another run than {source}; "
                        "choose another train.output_dir")
    if resume is None or not (source / "config.yaml").is_file():
        return
    before = _networks(run_config(source))
    now = _networks(config)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise UserError(f"{source} holds a run with {key}={before.get(key)}, but the config "
                            f"asks for {now.get(key)}; use its own config ({source}/config.yaml) "
                            "or another train.output_dir")


def _networks(config: dict) -> dict[str, Any]:
    """The settings that decide which weights a run has, and which of them have an optimizer's
    state."""
    flat = flatten(config)
    has_gan = flat.get("loss.disc_weight", 0) > 0
    sections = ("model.", "discriminator.") if has_gan else ("model.",)
    return {key: value for key, value in flat.items()
            if key.startswith(sections) or key in ("train.use_ema", "train.freeze")}


def learning_rate_at(step: int, train: dict, global_batch: int, max_steps: int,
                     steps_per_epoch: float) -> float:
    """The learning rate of step number `step` (from 0): linear warm-up, then constant, or cosine or
    linear to min_lr."""
    peak = train["learning_rate"]
    if peak is None:
        peak = train["base_lr"] * global_batch
    warmup = train["lr_warmup_steps"] + train["lr_warmup_epochs"] * steps_per_epoch
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, max_steps - warmup)
    shares = {
        "constant": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "linear": 1 - done,
    }
    share = shares[train["lr_scheduler"]]
    return train["min_lr"] + share * (peak - train["min_lr"])


def compile_parts(model: nn.Module) -> None:
    """torch.compile, part by part: the quantizer stays as it is, and so does the last layer, which
    has no parts and at whose weight the adaptive GAN weight asks for gradients."""
    for child in model.children():
        if child is getattr(model, "quantizer", None):
            continue
        for part in child if isinstance(child, nn.ModuleList) else [child]:
            if any(True for _ in part.children()):
                part.compile()


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Moves the averaged weights towards the model's; in the first steps faster, by
    9 / (10 + step). Buffers, such as statistics and a router's thresholds, are copied."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), weight)
    for averaged, current in zip(ema.buffers(), model.buffers()):
        averaged.copy_(current)


def perplexities(values: dict[str, float]) -> dict[str, float]:
    """exp of the cross-entropies (nats) among the values."""
    return {f"perplexity_{name}": math.exp(min(value, 50)) for name, value in values.items()
            if name in ("code", "content", "position", "layout")}


def peak_memory() -> float:
    """GiB: of the GPU, or of this process where there is none. NaN, which is not logged, where this
    cannot be told."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    per_gib = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / per_gib
