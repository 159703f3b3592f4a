"""Starting from other weights, with a fresh optimizer.

    init_from       train.init_from: the weights of another run, as far as they fit
    freeze          train.freeze: parts that do not learn

    # the decoder alone
    train_stage1.py --config ... train.init_from=runs/vqgan
        train.freeze=[encoder,pre_quant,quantizer]
"""

from pathlib import Path

import torch.nn as nn
from safetensors.torch import load_file

from harness.checkpoint import list_checkpoints, newest_whole
from harness.config import UserError
from harness.hub import run_folder
from harness.log import new_ones
from harness.models import STAGE2, averaged_if_any, run_config
from harness.run import Run

def init_from(run: Run, **modules: nn.Module | None):
    """Loads what fits of train.init_from, a run folder or one of its checkpoints, into `model` and
    the others that it has; names what does not. Averaged weights, if there are any. Nothing, if the
    run goes on from a checkpoint of its own."""
    source = run.train["init_from"]
    resumed = run.wanted == "auto" and list_checkpoints(run.folder / "checkpoints")
    if source is None or resumed or run.wanted not in (None, "auto"):
        return
    path = Path(run_folder(source)).expanduser()
    if (path / "config.yaml").is_file():
        folder = path
        checkpoint = newest_whole(path / "checkpoints", run.accelerator.print)
    else:
        folder = path.parent.parent
        checkpoint = path
    if checkpoint is None or not (checkpoint / "model.safetensors").is_file():
        raise UserError("train.init_from must be a run folder or one of its checkpoints; "
                        f"{source} has no model.safetensors")
    theirs = run_config(folder)["model"]["name"]
    ours = run.config["model"]["name"]
    if theirs != ours:
        raise UserError(f"train.init_from={source} holds a {theirs}, but the config asks for a "
                        f"{ours}")
    for name, module in modules.items():
        file = checkpoint / f"{name}.safetensors"
        if name == "model":
            file = averaged_if_any(checkpoint)
        if module is None or not file.is_file():
            continue
        state = load_file(file)
        own = {key: tensor for key, tensor in module.state_dict().items()
               if not key.endswith("queue")}  # usage is counted anew
        classes = ""
        if name == "model" and ours in STAGE2:
            from harness.classes import match_classes  # which stage 1 does not need

            classes = match_classes(run, folder, module, state)
        fits = {key: tensor for key, tensor in state.items()
                if key in own and own[key].shape == tensor.shape}
        module.load_state_dict(fits, strict=False)
        rest = [key for key in own if key not in fits]
        run.accelerator.print(f"{name}: {len(fits)} of {len(own)} tensors from {file}"
                              f"{new_ones(rest)}{classes}")


def freeze(model: nn.Module, names: list[str] | None):
    """Keeps parts of the model, by their attributes' names, as they are: no gradients, and always
    in eval mode, so that an EMA codebook and BatchNorm's statistics stay too."""
    parts = dict(model.named_modules())
    for name in names or ():
        if name not in parts or not name:
            children = ", ".join(child for child, _ in model.named_children())
            raise UserError(f"train.freeze: there is no part {name!r}; the parts are {children}")
        part = parts[name].requires_grad_(False).eval()
        for module in part.modules():
            module.train = lambda mode=True, module=module: module  # stays in eval mode
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("train.freeze leaves nothing to learn")
