"""Skips and undoes training steps whose loss or gradient is not finite, on all processes alike.

    Guard       one for each run: begin, backward, clip and end around a step; stop_if_too_many at a
                log line

Weights, optimizers, codebook and statistics are then as before the step; averaged weights move on
towards the unchanged weights. Flags stay on the device until a log line, so no step waits for the
GPU (except under fp16, whose scaler does).
"""

import math

import torch
import torch.nn as nn

from harness.config import UserError


def moving_tensors(module):
    """Tensors that change without a gradient: in parts that are in training mode."""
    state = module.state_dict(keep_vars=True)
    return [tensor for name, tensor in state.items()
            if not tensor.requires_grad and module.get_submodule(name.rpartition(".")[0]).training]


class Guard:
    """Skips, undoes and counts bad steps.

    train       the config's section `train`
    """

    def __init__(self, accelerator, train):
        self.accelerator = accelerator
        self.modules = {}  # by name
        self.moving = {}  # their tensors that a forward pass changes
        self.kept = {}  # the values of these before the step
        self.bad = {}  # whether the step was bad, of each module
        self.scale_before = 1.0
        self.max_row = train["max_bad_steps"]
        self.max_norm = train["max_grad_norm"] or math.inf
        # Bad steps since the last log line and in a row, and the step at which they were too many.
        self.count, self.row, self.too_many = torch.zeros(
            3, dtype=torch.long, device=accelerator.device)

    def watch(self, modules, stateful):
        """Guards these modules from now on.

        modules     name to module; each may have an optimizer of its own; a bad step of one does
                    not undo the others'
        stateful    modules of buffers that follow the discriminator's steps (LeCam's averages)
        """
        self.modules = modules
        # Codebook and statistics, but not those of frozen parts.
        self.moving = {name: moving_tensors(module)
                       for name, module in modules.items() if name != "ema"}
        if "discriminator" in modules:
            for module in stateful:
                self.moving["discriminator"] += moving_tensors(module)

    @property
    def scale(self):
        """fp16's loss scale."""
        return self.accelerator.scaler.get_scale() if self.accelerator.scaler else 1.0

    def begin(self):
        self.bad = {}
        self.scale_before = self.scale
        self.kept = {name: [tensor.detach().clone() for tensor in moving]
                     for name, moving in self.moving.items()}

    def backward(self, loss):
        """A loss that is not finite becomes NaN, so that all processes see NaN gradients."""
        self.accelerator.backward(loss * torch.where(loss.detach().isfinite(), 1.0, math.nan))

    def follow_scale(self, name):
        """Before the last backward of a module whose gradients accumulate: another optimizer's step
        may have changed fp16's scale."""
        if self.scale != self.scale_before:
            for parameter in self.modules[name].parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.scale / self.scale_before)

    def clip(self, name, optimizer):
        """Clips the gradients of the module of this name, and returns the norm before clipping. If
        the norm is not finite, which all processes see alike, the optimizer's step does nothing.
        (accelerate's own clipping would undo the fp16 loss scale of all optimizers' gradients,
        including those that still accumulate.)"""
        self.accelerator.unscale_gradients(optimizer)
        norm = nn.utils.clip_grad_norm_(self.modules[name].parameters(), self.max_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # a DTensor
        bad = ~norm.isfinite()
        self.bad[name] = bad
        if self.accelerator.scaler is None:  # fp16's scaler skips by itself
            if optimizer.param_groups[0]["fused"]:
                # Read on the device: the CPU need not wait for it.
                optimizer.optimizer.found_inf = bad.float()
            elif bad:
                optimizer.zero_grad()
        return norm

    @torch.no_grad()
    def end(self, step):
        """Undoes what a skipped step did to codebook and statistics, and counts it. An overflow
        under fp16's scale is undone but not counted: its scaler expects some."""
        for name, bad in self.bad.items():
            for now, before in zip(self.moving[name], self.kept[name]):
                now.copy_(torch.where(bad, before, now))
        if self.accelerator.scaler is None or self.scale <= 1:  # the scale cannot be the reason
            bad = torch.stack(list(self.bad.values())).any()
            self.count = self.count + bad
            self.row = (self.row + 1) * bad
            is_first = (self.too_many == 0) & (self.row > self.max_row)
            self.too_many = torch.where(is_first, step, self.too_many)
        if self.scale < 1:
            # Or bad losses would shrink it, and gradients with it, to nothing.
            self.accelerator.scaler.update(1.0)

    def pop_count(self):
        """Bad steps since the last call, float ()."""
        count = self.count.float()
        self.count = torch.zeros_like(self.count)
        return count

    def stop_if_too_many(self):
        """Ends the run if too many steps in a row were bad."""
        if self.too_many:
            last = int(self.too_many)
            raise UserError("the loss or a gradient was not finite in steps "
                            f"{last - self.max_row} to {last}, more in a row than "
                            "train.max_bad_steps; they were skipped: lower train.learning_rate or "
                            "set train.max_grad_norm, and continue from the last checkpoint with "
                            "--resume auto")
