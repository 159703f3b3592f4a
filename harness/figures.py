"""What the figures of visualize.py share.

    load, batches, pick_images      the runs that are drawn, and images for them
    psnr                            of reconstructions
    new_figure                      of matplotlib, in our style
    tiles, row, pixels, save        a grid of pictures with labels, as PNG
"""

from itertools import count, zip_longest
from pathlib import Path

import torch
from tqdm import tqdm

from harness.config import UserError
from dataset import eval_loader, to_uint8
from harness.metrics import compare
from harness.models import STAGE1, load_run
from harness.use import run_dataset
from vqgan import sides

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = {
    "vqgan": "VQGAN",
    "vqvae": "VQ-VAE",
    "mqvae": "MQ-VAE",
    "dqvae": "DQ-VAE",
    "gpt": "GPT",
    "stackformer": "Stackformer",
    "dq_transformer": "DQ-Transformer",
    "mask_transformer": "MaskTransformer",
}


# Runs and images


def load(args):
    """(model, name of the run and of its model) of each stage-1 run, and the images of the first
    run, which all models must be able to take."""
    runs = []
    data = []
    for folder, name in zip(args.run, distinct(args.run)):
        model, config = load_run(folder, args.which)
        kind = config["model"]["name"]
        if kind not in STAGE1:
            raise UserError(f"{folder} holds a stage-2 model ({kind}); use `visualize.py sequence`"
                            f", or a stage-1 run such as {folder}/stage1")
        runs.append((model.to(DEVICE), f"{name} ({NAMES[kind]})"))
        data.append(config["data"])
    is_chosen = any(word.startswith("data.image_size=") for word in args.overrides)
    if len({sides(each["image_size"]) for each in data}) > 1 and not is_chosen:
        listed = [f"{folder} has {each['image_size']}" for folder, each in zip(args.run, data)]
        raise UserError("runs of different image sizes cannot be compared without "
                        f"data.image_size=...: {', '.join(listed)}")
    for model, _ in runs:
        dataset = run_dataset({"data": data[0]}, args.overrides, args.split, model)
    return runs, dataset


def distinct(folders):
    """A name for each run: as few of the last parts of its path as tell the runs apart."""
    paths = [Path(folder).resolve() for folder in folders]
    for length in count(1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


def batches(dataset, limit, what):
    """At most `limit` images, spread over the dataset, in batches (16, 3, H, W)."""
    loader = eval_loader(dataset, 16, limit, num_workers=0, device=DEVICE)
    for images, _ in tqdm(loader, what):
        yield images


def pick_images(dataset, number):
    """At most so many images (n, 3, H, W), spread over the dataset."""
    return torch.cat([*batches(dataset, number, "images")])


def psnr(images, reconstructions):
    """PSNR (B,) in dB of images (B, 3, H, W) in [-1, 1], as 8-bit images."""
    return compare(to_uint8(images), to_uint8(reconstructions))["psnr"]


# Pictures


def new_figure(rows, columns, width, height):
    """A figure in our style, and its axes (rows, columns). matplotlib is imported when it is used,
    since it takes a while."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {
        "font.size": 8,
        "axes.titlesize": 8,
        "axes.titlepad": 3,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.titlesize": 9,
        "figure.constrained_layout.use": True,
    }
    figure = Figure((width, height))
    return figure, figure.subplots(rows, columns, squeeze=False)


def tiles(rows, columns, images=None, height=1.25):
    """A figure, and its axes (rows, columns) for square pictures, or of the shape of the images."""
    if images is not None:
        height += 1.2 * images.shape[-2] / images.shape[-1] - 1.2
    return new_figure(rows, columns, 1.2 * columns + 2.0, height * rows + 0.5)


def row(axes, images, label, titles=(), bar="", extend="neither", cmap=None, vmax=1.0):
    """A row of images (n, H, W, 3), or of maps (n, h, w) with values from 0 to vmax.

    label    at the left of the row
    titles   above the pictures
    bar      the label of a colour bar at the right; "": no bar
    """
    for ax, image, title in zip_longest(axes, images, titles, fillvalue=""):
        ax.set(xticks=[], yticks=[], frame_on=False, title=title)
        shown = ax.imshow(image, interpolation="nearest", cmap=cmap, vmin=0, vmax=vmax)
    axes[0].set_ylabel(label, rotation=0, ha="right", va="center")
    if bar:
        place = axes[-1].inset_axes([1.06, 0, 0.07, 1])
        axes[-1].figure.colorbar(shown, cax=place, label=bar, extend=extend)


def pixels(images):
    """Images (..., 3, H, W) in [-1, 1] to uint8 (..., H, W, 3)."""
    return to_uint8(images).movedim(-3, -1).cpu().numpy()


def save(figure, args, title):
    figure.suptitle(title)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=args.dpi)
    print(args.out)
