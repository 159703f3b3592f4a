"""Starting from other weights, with a fresh optimizer.

    init_from       train.init_from: the weights of another run, as far as they fit; classes by
                    their names
    freeze          train.freeze: parts that do not learn

    # the decoder alone
    train_stage1.py --config ... train.init_from=runs/vqgan
        train.freeze=[encoder,pre_quant,quantizer]
"""

from __future__ import annotations

from pathlib import Path

import torch.nn as nn
from safetensors.torch import load_file

from harness.checkpoint import list_checkpoints, newest_whole
from harness.config import UserError
from harness.hub import run_folder
from harness.models import STAGE2, averaged_if_any, class_names, run_config
from harness.run import Run

SHOWN = 8  # how many names a sentence lists


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
            classes = match_classes(run, folder, module, state)
        fits = {key: tensor for key, tensor in state.items()
                if key in own and own[key].shape == tensor.shape}
        module.load_state_dict(fits, strict=False)
        rest = [key for key in own if key not in fits]
        run.accelerator.print(f"{name}: {len(fits)} of {len(own)} tensors from {file}"
                              f"{new_ones(rest)}{classes}")


def match_classes(run: Run, folder: Path, model: nn.Module, state: dict) -> str:
    """Makes the tables with start tokens in `state`, of the run in `folder`, fit the model: a start
    token is that of the class of the same name, or the model's own if there is none. Returns words
    about it."""
    from gpt import CodeTransformer  # which stage 1 does not need

    settings = run_config(folder)["model"]
    source = CodeTransformer(settings["num_classes"], settings["label_dropout"])
    ours = run.dataset.classes[:model.num_classes]
    ours = ours + ["the null class"] * (model.num_starts - model.num_classes)
    theirs = class_names(folder) or [str(i) for i in range(source.num_classes)]
    theirs += ["the null class"] * (source.num_starts - source.num_classes)
    to = [i for i, name in enumerate(ours) if name in theirs]
    of = [theirs.index(ours[i]) for i in to]
    for key, before in model.start_tables().items():
        table = model.state_dict()[key].cpu().clone()
        other = state.pop(key, table[:0])
        if other.shape != (sum(before) + len(before) * source.num_starts, table.shape[1]):
            continue  # of another codebook, grid or width
        first = 0
        other_first = 0
        for rows in before:
            table[first:first + rows] = other[other_first:other_first + rows]
            table[[first + rows + i for i in to]] = other[[other_first + rows + i for i in of]]
            first += rows + model.num_starts
            other_first += rows + source.num_starts
        state[key] = table
    new = [name for name in ours if name not in theirs]
    return f"; {len(to)} of {len(ours)} start tokens{new_ones(new)}"


def new_ones(names):
    if not names:
        return ""
    others = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"; new are {', '.join(names[:SHOWN])}{others}"


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
