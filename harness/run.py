"""A run: its folder, how it trains, what it writes, and when it stops.

    Run                 a run folder and the training in it
    learning_rate_at, compile_parts, update_ema     what both training scripts need
"""

import math
import os
import signal
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn as nn
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import (
    DistributedType, DynamoBackend, ProjectConfiguration, gather_object, set_seed,
)
from tqdm import tqdm

from dataset import SIGUSR1
from harness.checkpoint import Checkpoints, list_checkpoints, wanted_checkpoint, write_file
from harness.config import UserError, flatten, read_yaml
from harness.guard import Guard
from harness.log import Log
from harness.models import own_folder, run_config

# One process may wait long for another's codes, FID or images.
PATIENCE = InitProcessGroupKwargs(timeout=timedelta(hours=2))


class Run:
    """A run folder and the training in it; the same object on every process.

    Made before the models, so that a folder that cannot be used stops the script at once. `resume`
    comes when all that a checkpoint holds is made, `start` before the loop and `finish` after it.

    dataset  the training images
    fsdp     the script can train sharded weights (see fsdp.py)
    """

    def __init__(self, config, dataset, resume, fsdp=False):
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
        self.modules = {}
        self.guard = Guard(self.accelerator, train)
        self.checkpoints = Checkpoints(
            self.accelerator, self.folder / "checkpoints", train["checkpoints_total_limit"])

        # Records and signals
        self.log = Log(self.accelerator, self.folder)
        self.logged_step = 0
        self.clock = time.monotonic()
        minutes = train["max_minutes"]
        self.deadline = math.inf if minutes is None else self.clock + 60 * minutes
        self._signal = None
        for number in (signal.SIGINT, signal.SIGTERM, SIGUSR1):
            signal.signal(number, self._on_signal)

    def make_optimizer(self, module, groups):
        """train.optimizer for these groups of the module's parameters."""
        train = self.train
        settings = {"lr": 0.0, "betas": (train["adam_beta1"], train["adam_beta2"]),
                    "eps": train["adam_epsilon"], "weight_decay": train["adam_weight_decay"]}
        if train["optimizer"] == "adamw":
            on_gpu = self.accelerator.device.type == "cuda"
            return torch.optim.AdamW(groups, fused=on_gpu, **settings)
        from muon import Muon, split

        optimizer = Muon(split(module, groups), **settings)
        matrices, others = optimizer.counts()
        self.accelerator.print(f"{type(module).__name__}: Muon for {matrices} matrices, AdamW for "
                               f"{others} other tensors")
        return optimizer

    # Checkpoints

    def resume(self, optimizers, stateful, **modules):
        """Loads the checkpoint that was asked for, and opens the log. Returns the number of steps
        done, 0 for a new run.

        modules     whose weights a checkpoint holds, as NAME.safetensors: `model`, and maybe `ema`
                    and `discriminator`
        optimizers  by their modules' names
        stateful    modules that have small buffers only
        """
        self.modules |= {name: self.accelerator.unwrap_model(module)
                         for name, module in modules.items() if module is not None}
        self.guard.watch(self.modules, stateful)
        # The weights are made: from here on, each process has random numbers of its own.
        if not self.is_main:
            torch.manual_seed(self.train["seed"] + self.accelerator.process_index)
        manifest = self.checkpoints.open(self.modules, optimizers, stateful, self.wanted)
        step = manifest["step"]
        self.guard.row += manifest["bad_row"]
        if step:
            self.accelerator.print(f"continuing {self.folder} from step {step}")
        if self.is_main:
            write_file(self.folder / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))
        self.log.open(step, flatten(self.config))
        return step

    def save_best(self, step, score, module):
        """Keeps the weights if their score is the highest so far."""
        with self.log.spare("the best weights"):
            self.checkpoints.save_best(step, score, module)

    def save(self, step):
        self.average_batchnorm()
        self.checkpoints.save(step, int(self.guard.row))

    # Training

    def start(self, step):
        """Says what is trained from this step on; starts the clock and the progress bar."""
        parameters = sum(p.numel() for p in self.modules["model"].parameters())
        say = self.accelerator.print
        say(f"{self.folder}: {parameters / 1e6:.1f} M parameters, {len(self.dataset)} images, "
            f"{self.world} process(es), global batch {self.global_batch}, {self.max_steps} steps "
            f"({self.max_steps / self.steps_per_epoch:,.1f} epochs)")
        if step >= self.max_steps:
            say(f"{self.folder} has had its {self.max_steps} steps")
        self.logged_step = step
        self.clock = time.monotonic()
        return tqdm(total=self.max_steps, initial=step, unit="step", disable=not self.is_main,
                    dynamic_ncols=True)

    def learning_rate(self, step):
        return learning_rate_at(step, self.train, self.global_batch, self.max_steps,
                                self.steps_per_epoch)

    def set_learning_rate(self, step, *optimizers):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate(step)

    def write_log(self, step):
        """Writes the means since the last time, and returns what the progress bar shows of them.
        UserError if too many steps in a row were bad."""
        speed = (step - self.logged_step) * self.global_batch / (time.monotonic() - self.clock)
        self.logged_step = step
        self.clock = time.monotonic()
        values = self.log.means(bad_steps=self.guard.pop_count())
        values |= perplexities(values)
        if "tokens" in values:
            values["tokens_per_second"] = speed * values["tokens"]
        run = {"lr": self.learning_rate(step - 1), "images_per_second": speed,
               "peak_memory_gib": peak_memory(), "epoch": step / self.steps_per_epoch}
        self.log.write(step, run | values)
        self.guard.stop_if_too_many()
        shares = {k: f"{values[k]:.0%}" for k in ("usage", "padding") if k in values}
        return {"loss": f"{values['loss']:.3f}", "img/s": f"{speed:.0f}"} | shares

    @contextmanager
    def untimed(self):
        """What happens in here does not count as training in images per second."""
        started = time.monotonic()
        yield
        self.clock += time.monotonic() - started

    def finish(self, step, stop, validate):
        """Says why the run ends, or how good it is after its last step; closes its records."""
        if stop is None:
            self.accelerator.print(validate(step))
        else:
            self.accelerator.print(f"stopped by {stop} at step {step} of {self.max_steps}, saved; "
                                   "--resume auto continues")
        self.accelerator.wait_for_everyone()
        self.log.close()

    def mean_over_images(self, sums, count):
        """The means over the images of all processes, from the sums over `count` of each."""
        every = gather_object([(count, {key: float(value) for key, value in sums.items()})])
        images = sum(count for count, _ in every)
        keys = max((own for _, own in every), key=len)  # a process may have had no image
        return {key: sum(own.get(key, 0.0) for _, own in every) / images for key in keys}

    def average_batchnorm(self):
        """While it trains, each process has BatchNorm statistics of its own; what is validated and
        kept is their mean."""
        for module in self.modules.values():
            for part in module.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.running_mean.copy_(self.accelerator.reduce(part.running_mean, "mean"))
                    part.running_var.copy_(self.accelerator.reduce(part.running_var, "mean"))

    # Stopping

    def _on_signal(self, number, _):
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C
        self._signal = signal.Signals(number).name

    def stop_reason(self, step):
        """Why to save and end now: a signal, or max_minutes. The same on all processes, which
        agree every 10 steps."""
        reason = self._signal
        if time.monotonic() > self.deadline:
            reason = reason or f"train.max_minutes={self.train['max_minutes']:g}"
        if self.world > 1 and step % 10:
            return None
        return next(filter(None, gather_object([reason])), None)

    def exit_at_signal(self, what):
        """Ends the script if a signal has asked for it, where there is no step to finish."""
        if self._signal:
            raise UserError(f"stopped by {self._signal} {what}")


def make_accelerator(train, folder, fsdp):
    """The accelerator, as `accelerate launch` and the config ask for it; UserError for what this
    code is not made for."""
    # What FSDP gathers at a time, if `accelerate launch` was not told: a transformer block.
    os.environ.setdefault("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    os.environ.setdefault("FSDP_TRANSFORMER_CLS_TO_WRAP", "Block")
    instead = "which is not supported; use --multi_gpu, or in stage 2 --use_fsdp --fsdp_version 2"
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() == "true":
        raise UserError(f"accelerate was asked for a parallelism config, {instead}")
    ours = train["gradient_accumulation_steps"]
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=ours,
            mixed_precision=train["mixed_precision"],
            log_with=train["log_with"],
            project_config=ProjectConfiguration(str(folder), str(folder / "tensorboard")),
            # Buffers are kept equal by the models themselves, and must not change between two
            # forwards of one step.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False), PATIENCE])
    except (ValueError, ImportError) as error:  # fp16 without a GPU, an unknown tracker
        raise UserError(f"accelerate cannot start as it was asked to ({error})") from error
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(f"accelerate was asked for {kind.value}, {instead}")
    precision = accelerator.mixed_precision
    theirs = accelerator.gradient_accumulation_steps
    refusals = {
        "torch.compile; leave that to the config: --dynamo_backend no, and train.compile=true":
            accelerator.state.dynamo_plugin.backend != DynamoBackend.NO,
        f"gradient_accumulation_steps={theirs} (ACCELERATE_GRADIENT_ACCUMULATION_STEPS), but the "
        f"config says train.gradient_accumulation_steps={ours}; leave accelerate's out":
            theirs != ours,
        f"mixed_precision={precision}, which is not supported; use bf16":
            precision not in ("no", "fp16", "bf16"),
        "FSDP, but stage 1 needs the whole model in every process; use --multi_gpu":
            kind == DistributedType.FSDP and not fsdp,
    }
    for why, refused in refusals.items():
        if refused:
            raise UserError(f"accelerate was asked for {why}")
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", precision):
        accelerator.print(f"train.mixed_precision={precision} is used, not accelerate's {launched}")
    return accelerator


def check_folder(folder, config, resume):
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
    source = folder if resume == "auto" else Path(resume or "").parent.parent
    is_own = resume and source.resolve() == folder.resolve()
    if list_checkpoints(folder / "checkpoints") and not is_own:
        others = f" of another run than {source}" if resume else ""
        raise UserError(f"{folder} already holds checkpoints{others}; continue it with "
                        "--resume auto, or choose another train.output_dir")
    if resume is None or not (source / "config.yaml").is_file():
        return
    before = _networks(read_yaml(source / "config.yaml"))
    now = _networks(config)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise UserError(f"{source} holds a run with {key}={before.get(key)}, but the config "
                            f"asks for {now.get(key)}; use its own config ({source}/config.yaml) "
                            "or another train.output_dir")


def _networks(config):
    """The settings that decide which weights a run has, and which of them have an optimizer's
    state."""
    flat = flatten(config)
    has_gan = flat.get("loss.disc_weight", 0) > 0
    sections = ("model.", "discriminator.") if has_gan else ("model.",)
    return {key: value for key, value in flat.items()
            if key.startswith(sections)
            or key in ("train.use_ema", "train.freeze", "train.optimizer")}


def learning_rate_at(step, train, global_batch, max_steps, steps_per_epoch):
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


def compile_parts(model):
    """torch.compile, part by part: the quantizer stays as it is, and so does the last layer, which
    has no parts and at whose weight the adaptive GAN weight asks for gradients."""
    for name, child in model.named_children():
        if name != "quantizer":
            for part in child if isinstance(child, nn.ModuleList) else [child]:
                if list(part.children()):
                    part.compile()


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """Moves the averaged weights towards the model's; in the first steps faster, by
    9 / (10 + step). Buffers, such as statistics and a router's thresholds, are copied."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), weight)
    for averaged, current in zip(ema.buffers(), model.buffers()):
        averaged.copy_(current)


def perplexities(values):
    """exp of the cross-entropies (nats) among the values."""
    return {f"perplexity_{name}": math.exp(min(value, 50)) for name, value in values.items()
            if name in ("code", "content", "position", "layout")}


def peak_memory():
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
