"""Sharded weights (FSDP 2), in stage 2: each process holds a part of the model, of its average and
of the optimizer's state.

    prepare     shards them, if accelerate was asked to
    whole       an ordinary model with all the weights, for what reads them outside of forward
"""

import copy

import torch

from harness.checkpoint import whole_state
from harness.config import UserError
from harness.models import make_model


def prepare(run, model, optimizer, ema):
    """accelerator.prepare(model, optimizer); and `ema` is sharded like the model."""
    if run.sharded:
        _check(run.accelerator)
        plugin = run.accelerator.state.fsdp_plugin
        # Is for weights from a file; these are the same in every process.
        plugin.cpu_ram_efficient_loading = False
        # accelerate would round sums of gradients too, and the loss.
        if run.accelerator.mixed_precision == "bf16":
            from torch.distributed.fsdp import MixedPrecisionPolicy  # takes a second

            plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    model, optimizer = run.accelerator.prepare(model, optimizer)
    if run.sharded and ema is not None:
        ema.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return model, optimizer


def _check(accelerator):
    plugin = accelerator.state.fsdp_plugin
    refusals = {
        "version 1, which is not supported; add --fsdp_version 2": plugin.fsdp_version != 2,
        "with weights on the CPU, which is not supported; leave --fsdp_offload_params out":
            type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy",
        "with train.mixed_precision=fp16, which is not supported; use bf16":
            accelerator.mixed_precision == "fp16",
    }
    for why, refused in refusals.items():
        if refused:
            raise UserError(f"accelerate was asked for FSDP, {why}")


def whole(run, module):
    """The module; if it is sharded, a copy with all its weights."""
    if not run.sharded:
        return module
    with torch.random.fork_rng(devices=[]):  # building it must not advance the random numbers
        model = make_model(run.config)
    model.load_state_dict(whole_state(module, everywhere=True))
    return model.to(run.accelerator.device)
