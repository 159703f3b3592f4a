"""The record of a codebook over training, which visualize.py draws.

    recorder        writes it, every train.codebook_stats_every steps
    read_history    reads it
"""

import io
from pathlib import Path

import numpy as np

from harness.checkpoint import write_file
from harness.config import UserError

RECORDS = {  # and what each is called in a figure
    "uses": "times used, of the last codes",
    "norms": "norm of the code",
    "gradient_norms": "norm of the gradient",
}


def recorder(run, quantizer, start):
    """A function that writes codebook/step_XXXXXXXX.npz after a step whose turn it is: `uses` int64
    (K,) of the last codes (see VectorQuantizer.uses), `norms` and `gradient_norms` float32 (K,), of
    the first process's last batch."""
    every = run.train["codebook_stats_every"]
    folder = run.folder / "codebook"
    last = {}  # of the last forward pass
    if every is not None and not quantizer.has_codebook:
        raise UserError("train.codebook_stats_every needs a codebook of learned vectors, which "
                        f"{type(quantizer).__name__} does not have")
    if every is None or not run.is_main:
        return lambda step: None
    from quantizers import gradient_norms  # which few runs need

    folder.mkdir(exist_ok=True)
    for path in folder.glob("step_*.npz"):
        if path.stem > f"step_{start:08d}":  # of steps that are done again
            path.unlink()

    def before(_, inputs):
        last["codebook"] = quantizer.codebook.detach().clone()  # which the step will change

    def after(_, inputs, outputs):
        vectors, *loss_weight = inputs[:2]
        last["args"] = vectors.detach(), outputs[1], *loss_weight

    def record(step):
        if step % every == 0:
            norms = quantizer.codebook.detach().float().norm(dim=1)
            gradients = gradient_norms(quantizer, *last["args"], codebook=last["codebook"])
            file = io.BytesIO()
            np.savez(file, uses=quantizer.uses().cpu(), norms=norms.cpu(),
                     gradient_norms=gradients.cpu())
            with run.log.spare(f"the codebook's record of step {step}"):
                write_file(folder / f"step_{step:08d}.npz", file.getvalue())

    quantizer.register_forward_pre_hook(before)
    quantizer.register_forward_hook(after)
    return record


def read_history(run):
    """The record of a codebook over training: `steps` (T,), and `uses`, `norms`, `gradient_norms`
    (T, K), in order of step; None if there is none."""
    paths = sorted(Path(run, "codebook").glob("step_*.npz"))
    if not paths:
        return None
    records = []
    for path in paths:
        try:
            with np.load(path) as file:
                records.append({key: np.nan_to_num(np.float64(file[key])) for key in RECORDS})
        except Exception:  # numpy raises almost anything on a broken file
            raise UserError(f"{path} is not a whole record of a codebook; remove it") from None
    history = {key: np.stack([record[key] for record in records]) for key in RECORDS}
    history["steps"] = np.array([int(path.stem.removeprefix("step_")) for path in paths])
    return history
