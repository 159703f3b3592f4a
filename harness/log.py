"""What a run writes while it trains: metrics.jsonl, the tracker's log, pictures. A full disk costs
a line or a picture, not the run.

    Log         add scalars at every step, write their means; picture
    printable   a file's name as any text that can be written
    new_ones    the first of these names, for a sentence
"""

import errno
import io
import json
import math
import os
import warnings
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from harness.checkpoint import write_file


class Log:
    """The records in a run's folder; the same object on every process, of which the first one
    writes."""

    def __init__(self, accelerator, folder):
        self.accelerator = accelerator
        self.folder = folder
        self.sums = {}
        self.counts = {}

    def open(self, step, settings):
        """Goes on after `step`: later lines of metrics.jsonl are removed."""
        if self.accelerator.is_main_process:
            (self.folder / "samples").mkdir(exist_ok=True)
            path = self.folder / "metrics.jsonl"
            lines = path.read_text().splitlines() if path.is_file() and step else []
            write_file(path, "".join(line + "\n" for line in lines if _step(line) <= step))
        settings = {key: value if isinstance(value, (int, float)) else printable(str(value))
                    for key, value in settings.items()}
        self.accelerator.init_trackers("minVQ", settings, {"tensorboard": {"purge_step": step + 1}})

    def close(self):
        # accelerator.end_training() would take apart the process group: see launch.py.
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def add(self, values):
        """Adds scalars to the means. They stay on the device; values that are not finite do not
        count."""
        for key, value in values.items():
            value = value.detach().float()
            finite = value.isfinite()
            self.sums[key] = self.sums.get(key, 0) + torch.where(finite, value, 0.0)
            self.counts[key] = self.counts.get(key, 0) + finite

    def means(self, **more):
        """The means over steps and processes since the last call; of `more`, over processes."""
        means = {k: self.sums[k] / self.counts[k] for k in self.sums} | more
        self.sums = {}
        self.counts = {}
        values = self.accelerator.reduce(torch.stack(list(means.values())), "mean")
        return dict(zip(means, values.tolist()))

    def write(self, step, values):
        """Writes scalars to the tracker and to metrics.jsonl."""
        # Gradient norms are not finite where fp16 overflowed.
        values = {k: v for k, v in values.items() if math.isfinite(v)}
        with self.spare("the tracker's log"):
            self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            path = self.folder / "metrics.jsonl"
            with self.spare("metrics.jsonl"), open(path, "ab", buffering=0) as file:
                line = (json.dumps({"step": step, **values}) + "\n").encode()
                end = file.tell()
                if file.write(line) < len(line):  # no part of a line stays
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def picture(self, step, name, columns):
        """Writes samples/NAME_step.png: for each column images (3, H, W) or maps (1, h, w) in
        [-1, 1], the first at the top. Small images are enlarged by a whole factor, to about 128
        pixels."""
        path = self.folder / "samples" / f"{name}_{step:08d}.png"
        if self.accelerator.is_main_process:
            size = [s * max(1, 128 // s) for s in columns[0][0].shape[-2:]]
            cells = [F.interpolate(cell[None].detach().float().cpu(), size).expand(-1, 3, -1, -1)
                     for row in zip(*columns) for cell in row]
            from torchvision.utils import make_grid, save_image  # takes seconds

            grid = make_grid(torch.cat(cells).clamp(-1, 1) / 2 + 0.5, nrow=len(columns))
            file = io.BytesIO()
            save_image(grid, file, "png")
            with self.spare(f"the picture of step {step}"):
                write_file(path, file.getvalue())
            pictures = {name: grid.permute(1, 2, 0)[None].numpy()}
            with self.spare("the tracker's log"):
                for tracker in self.accelerator.trackers:
                    if hasattr(tracker, "log_images"):
                        nhwc = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                        tracker.log_images(pictures, step=step, **nhwc)
        return path

    @contextmanager
    def spare(self, what):
        """Failing to write a log or a picture is a warning; failing to write a checkpoint is an
        error."""
        try:
            yield
        except OSError as error:
            warnings.warn(f"{what} could not be written ({error.strerror or error}); training goes "
                          f"on: make room in {self.folder}", stacklevel=3)


def printable(text):
    """The text with escapes for the bytes of a file's name that are not UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def new_ones(names):
    """Names what is new, in words for the end of a sentence."""
    if not names:
        return ""
    others = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"; new are {', '.join(names[:8])}{others}"


def _step(line):
    """Of a line of metrics.jsonl; infinite if the line was cut short."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf
