"""What the figures of visualize.py share.

    load, batches               the runs that are drawn, and images for them
    pyplot                      of matplotlib, in our style
    tiles, row, pixels, save    a grid of pictures with labels, as PNG
"""

import argparse
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import UserError
from dataset import ImageDataset, eval_loader, to_uint8
from experiment import STAGE1, load_run, run_config, run_dataset
from gpt import sides

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = {"vqgan": "VQGAN", "vqvae": "VQ-VAE", "mqvae": "MQ-VAE", "dqvae": "DQ-VAE",
         "gpt": "GPT", "stackformer": "Stackformer", "dq_transformer": "DQ-Transformer",
         "mask_transformer": "MaskTransformer"}


def pyplot() -> ModuleType:
    """matplotlib.pyplot in our style, imported when something is drawn, since it takes a while."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "figure.titlesize": 9, "figure.facecolor": "white",
                            "axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True}
    return pyplot


def load(args: argparse.Namespace) -> tuple[list[tuple[torch.nn.Module, str, str]], ImageDataset]:
    """(model, name, kind) of each stage-1 run, and the images of the first."""
    configs = [run_config(folder) for folder in args.run]
    kinds = [config["model"]["name"] for config in configs]
    for run, kind in zip(args.run, kinds):
        if kind not in STAGE1:
            raise UserError(f"{run} holds a stage-2 model ({kind}); use `visualize.py sequence`, or a stage-1 run such as {run}/stage1")
    sizes = {run: config["data"]["image_size"] for run, config in zip(args.run, configs)}
    if len(set(map(sides, sizes.values()))) > 1 and not any(o.startswith("data.image_size=") for o in args.overrides):
        raise UserError(f"runs of different image sizes cannot be compared without data.image_size=...: "
                        f"{', '.join(f'{k} has {v}' for k, v in sizes.items())}")
    models = [load_run(run, args.which)[0].to(DEVICE) for run in args.run]
    dataset, *_ = [run_dataset(configs[0], args.overrides, args.split, model) for model in models]  # all must take them
    return list(zip(models, distinct(args.run), [NAMES[kind] for kind in kinds])), dataset


def distinct(folders: list[str]) -> list[str]:
    """A name for each run: the last part of its path, or as many parts as it takes to tell them apart."""
    parts = [Path(folder).resolve().parts for folder in folders]
    names = (["/".join(p[-n:]) for p in parts] for n in range(1, max(map(len, parts)) + 1))
    return next(each for each in names if len(set(each)) == len(set(parts)))


def batches(dataset: ImageDataset, limit: int, what: str):
    """At most `limit` images, spread over the dataset, in batches (16, 3, H, W)."""
    loader = eval_loader(dataset, 16, limit, num_workers=0, device=DEVICE)
    yield from (images for images, _ in tqdm(loader, what, math.ceil(min(limit, len(dataset)) / 16)))


def tiles(rows: int, columns: int, images: Tensor | None = None, height: float = 1.25) -> tuple[Any, np.ndarray]:
    """Axes (rows, columns) for square pictures, or of the shape of these images."""
    height = height if images is None else height - 1.2 + 1.2 * images.shape[-2] / images.shape[-1]
    return pyplot().subplots(rows, columns, figsize=(1.2 * columns + 2.0, height * rows + 0.5), squeeze=False)


def row(axes: np.ndarray, images: np.ndarray, label: str, titles: list[str] | None = None, bar: dict | None = None, **options) -> None:
    """A row of images (n, H, W, 3) or maps (n, h, w), with a label at the left and, if asked for, a colour bar at the right."""
    for i, (ax, image) in enumerate(zip(axes, images)):
        ax.set(xticks=[], yticks=[])
        ax.set_title(titles[i] if titles else "", pad=3)
        ax.spines[:].set_visible(False)
        shown = ax.imshow(image, interpolation="nearest", **options)
    axes[0].set_ylabel(label, rotation=0, ha="right", va="center")
    if bar:
        axes[-1].figure.colorbar(shown, cax=axes[-1].inset_axes([1.06, 0, 0.07, 1]), **bar)


def pixels(images: Tensor) -> np.ndarray:
    """Images (..., 3, H, W) in [-1, 1] to uint8 (..., H, W, 3)."""
    return to_uint8(images).movedim(-3, -1).cpu().numpy()


def save(figure: Any, args: argparse.Namespace, title: str | None = None) -> None:
    if title:
        figure.suptitle(title)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=args.dpi)
    pyplot().close(figure)
    print(args.out)
