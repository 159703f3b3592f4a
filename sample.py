"""Draws new images from a stage-2 run.

    python sample.py --run runs/dq_transformer -n 64 [--classes 3,7 | --classes disc,ring] [--cfg 3]
                     [--seed 0] [--out FOLDER | FILE]
    accelerate launch --num_processes 8 sample.py --run runs/dq_transformer -n 50000 \
        --out samples.npz
    python sample.py --run runs/mask_transformer --image PHOTO --keep 0,0,1,0.5 -n 8
                                                                        # draws the lower half anew

With --image, the codes that lie wholly in what is kept stay, and the others are drawn n times; the
grid begins with the photo and the mask. --keep takes rectangles left,top,right,bottom in shares of
width and height of the image (its centre, as the model sees it), separated by spaces, or
granularities of a DQ-VAE (coarse, or coarse,medium); --mask a picture of the photo's size, white
where it is drawn anew. A mask_transformer keeps any region, the others what comes first in their
order.

--out says what is written: a folder of single PNGs and grid.png (default: RUN/samples/seed_SEED);
FILE.png, one grid; or FILE.npz with uint8 (N, H, W, 3) as `arr_0` and the labels as `arr_1`, which
the ADM evaluation suite reads. Sampling settings that are not given are those of the run's config,
section `sample`.

Image number i of a seed is drawn with the same random numbers in whatever batch and on whatever
process. On the CPU, in float32 and with equally many threads, it is the same image, unless a draw
falls on the edge between two codes, which rounding then decides: about one of 100 images of 256
codes of 1,024.
"""

import json
import math
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from harness.code_cache import make_file
from harness.config import UserError, build
from harness.hub import run_folder
from harness.launch import run_main
from harness.models import own_folder
from harness.run import PATIENCE
from harness.sampling import (
    GRAINS, chosen_labels, draw, load_models, model_parser, sampling_arguments, to_path,
)
from harness.settings_stage2 import SampleSettings
from harness.use import overridden

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import tqdm
from PIL import Image
from torch.utils.data import BatchSampler

from data.images import image_extensions
from data.sources import Files
from dataset import ImageDataset, read_image, to_uint8
from gpt import Blocks, Cache, sides

SETTINGS = [name for name in vars(SampleSettings()) if name not in ("columns", "rows")]  # options


class Edit(NamedTuple):
    """A photo, and which parts of it are drawn anew."""

    codes: dict  # (1, ...)
    known: torch.Tensor  # (1, h, w) bool: the cells of the finest grid whose codes stay
    shown: torch.Tensor  # (2, 3, H, W): the photo, and what stays of it

    def repeated(self, n):
        """The arguments of model.sample for n images."""
        rows = [0] * n
        codes = {name: value[rows] for name, value in self.codes.items()}
        return {"codes": codes, "known": self.known[rows]}


def main(argv=None):
    args = parse_arguments(argv)
    Cache.graphs = not args.no_graphs
    state = Accelerator(kwargs_handlers=[PATIENCE])
    model, stage1, config, classes = load_models(args.run, args.which, state.device,
                                                 args.mixed_precision)
    size = sides(config["data"]["image_size"])
    edited = edit(args, stage1, config)
    labels = wanted_labels(args, model, classes, edited)
    settings = wanted_settings(args, model, config, labels, edited)
    if edited:
        build(model.check_known, {}, codes=edited.codes, known=edited.known)
    for module in model.modules() if args.compile else ():
        if isinstance(module, Blocks):
            module.step = torch.compile(module.step)
            module.compile()  # what a mask_transformer calls
    out = make_output(args, state)
    with shared_pixels(out, (args.n, *size, 3), state) as pixels:
        mine = range(state.process_index, args.n, state.num_processes)
        for numbers in tqdm(BatchSampler(mine, args.batch_size, drop_last=False)):
            kept = edited.repeated(len(numbers)) if edited else {}
            pixels[numbers] = draw(model, stage1, numbers, labels, args.seed, settings | kept)
            for number in numbers if out.is_dir() else ():
                Image.fromarray(pixels[number]).save(out / f"{number:06d}.png")
        pixels.flush()
        state.wait_for_everyone()
        if state.is_main_process:
            file = save_together(out, pixels, labels, edited)
            if out.is_dir():
                save_settings(out, args, settings, labels)
            print(f"{args.n} images: {file}")


def parse_arguments(argv):
    parser = model_parser(__doc__)
    option = parser.add_argument
    option("--run", required=True, type=run_folder,
           help="the run folder of a stage-2 model, or hf:user/name")
    option("-n", type=int, default=64, help="how many images in all (default 64)")
    option("--classes", help="class names or numbers, with commas; the images go through them in "
                             "turn (default: all)")
    option("--cfg", dest="cfg_scale", help="scale of the guidance towards the classes; 1: none")
    for name in SETTINGS:
        option(f"--{name}")
    option("--image", help="draw parts of this image anew")
    option("--keep", help='the parts that stay: "0,0,1,0.5 0,0.5,0.2,1", or coarse')
    option("--mask", help="or a picture that is white where the image is drawn anew")
    option("--batch_size", type=int, default=64, help="images at a time, per process")
    option("--out", type=to_path, help="a folder, FILE.png or FILE.npz")
    option("--compile", action="store_true",
           help="torch.compile the decoding step (for GPUs; slower on CPUs)")
    option("--no_graphs", action="store_true",
           help="do not replay decoding steps from CUDA graphs")
    args = parser.parse_args(argv)
    if min(args.n, args.batch_size) < 1:
        raise UserError("-n and --batch_size must be at least 1")
    return args


# What to draw


def wanted_labels(args, model, classes, edited):
    """Labels (n,). None for an unconditional model, and for a photo without --classes, whose class
    is not known."""
    if args.classes or not edited:
        return chosen_labels(args.classes, classes, args.n)
    if model.num_classes and (args.cfg_scale is not None or not model.has_null):
        option = "a model without a null class" if args.cfg_scale is None else "--cfg"
        raise UserError(f"with --image, {option} needs --classes")
    return None


def wanted_settings(args, model, config, labels, edited):
    """The arguments of model.sample, by the run's config and the command line."""
    if edited and labels is None:
        config["sample"]["cfg_scale"] = 1.0
    asked = [f"sample.{name}={value}" for name, value in vars(args).items()
             if name in SETTINGS and value is not None]
    settings = overridden(config, asked, sample=SampleSettings)["sample"]
    return sampling_arguments(model, settings, labels)


# Parts of a photo


@torch.no_grad()
def edit(args, stage1, config):
    """What --image, --keep and --mask ask for, or None."""
    if args.image is None:
        if args.keep is not None or args.mask is not None:
            raise UserError("--keep and --mask say what of --image stays; give it")
        return None
    if (args.keep is None) == (args.mask is None):
        raise UserError("with --image, give one of --keep and --mask")
    size = sides(config["data"]["image_size"])
    image = load_image(args.image, size).to(stage1.last_layer.device)   # (1, 3, H, W)
    codes = stage1.encode(image)
    if args.mask is not None:
        keep = outside_mask(args.image, args.mask, size)                # (1, H, W)
    elif "grain" in codes and args.keep.split(",")[0] in GRAINS[3]:
        keep = resized(codes["grain"], size) < coarse_levels(args.keep, stage1.grains)
    else:
        keep = inside_rectangles(args.keep, size)
    known = whole_codes(stage1, codes, keep.to(image.device))           # (1, h, w)
    if known.all():
        raise UserError("nothing is left to draw: all of the image stays")
    if not known.any():
        raise UserError("nothing stays: no code lies wholly in what is kept")
    stays = image.where(resized(known, size) > 0, 0.0)
    return Edit(codes, known, torch.cat([image, stays]).cpu())


def load_image(path, size):
    """(1, 3, H, W) in [-1, 1], cropped as for validation."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"there is no image {path}")
    return ImageDataset(Files([str(path)], [0], [""]), list(size))[0][0].unsqueeze(0)


def resized(cells, size):
    """Values of cells (1, h, w), repeated or left out for another grid, float (1, H, W)."""
    return F.interpolate(cells.unsqueeze(1).float(), size).squeeze(1)


def outside_mask(image, mask, size):
    """The pixels (1, H, W) of a cropped image where a mask of the whole has no white at all."""
    load_image(mask, size)  # or one sentence
    # Of a transparent layer, white strokes are drawn anew; if there is none, black strokes stay.
    for background in ("black", "white"):
        layer = read_image(mask, background)
        white = np.array(layer.convert("L")) > 127
        if white.any():
            break
    width, height = read_image(image).size
    if layer.size != (width, height):
        raise UserError(f"{mask} is {layer.width} x {layer.height} pixels, but {image} is {width} "
                        f"x {height}")
    top = max(0, round((height - width * size[0] / size[1]) / 2))  # cropped as the image
    left = max(0, round((width - height * size[1] / size[0]) / 2))
    white = white[top:height - top, left:width - left]
    return F.adaptive_max_pool2d(torch.from_numpy(white).unsqueeze(0).float(), size) == 0


def coarse_levels(keep, grains):
    """How many granularities stay."""
    names = keep.split(",")
    if names != GRAINS[grains][:-1][:len(names)]:
        raise UserError("--keep takes granularities from the coarsest on, but not the finest: "
                        f"coarse, or with three coarse,medium; it is {keep}")
    return len(names)


def inside_rectangles(text, size):
    """The pixels (1, H, W) in rectangles such as "0,0,1,0.5 0,0.5,0.2,1"."""
    height, width = size
    inside = torch.zeros(1, height, width, dtype=torch.bool)
    for word in text.split():
        try:
            left, top, right, bottom = map(float, word.split(","))
            is_inside = 0 <= left < right <= 1 and 0 <= top < bottom <= 1
        except ValueError:
            is_inside = False
        if not is_inside:
            raise UserError("--keep takes rectangles left,top,right,bottom, such as 0,0,1,0.5, in "
                            "shares of the image, from 0 to 1, left below right and top below "
                            f"bottom; it is {text!r}")
        rows = slice(round(top * height), round(bottom * height))
        inside[:, rows, round(left * width):round(right * width)] = True
    return inside


def whole_codes(stage1, codes, keep):
    """The cells (1, h, w) of the finest grid whose codes lie wholly in the pixels `keep`."""
    grid = [side // stage1.factors[-1] for side in keep.shape[1:]]
    grain = resized(codes.get("grain", keep.new_zeros(1, 1, 1)), grid)  # (1, h, w)
    known = grain < 0
    for g, side in enumerate(stage1.factors):  # of a code of each granularity, in pixels
        lost = resized(F.max_pool2d((~keep).float(), side), grid)
        known |= (lost == 0) & (grain == g)
    return known


# Files


def make_output(args, state):
    """Where the images go: FILE.png, FILE.npz or a folder. The folder is made, and images of an
    earlier call are removed."""
    name = f"samples/seed_{args.seed}"
    out = args.out or own_folder(Path(args.run), "samples", name, f"{name}/*") / name
    if out.suffix in (".png", ".npz"):
        out.parent.mkdir(parents=True, exist_ok=True)
        return out
    if out.suffix.lower() in image_extensions() | {".npy", ".zip"}:
        raise UserError(f"--out must be a folder, a .png or a .npz; it is {out}")
    out.mkdir(parents=True, exist_ok=True)
    if state.is_main_process:
        earlier = [path for path in out.glob("*.png") if path.stem.isdigit()]
        if earlier and not (out / "samples.json").is_file():
            raise UserError(f"{out} already holds images; choose another --out")
        for path in earlier:
            path.unlink()
    return out


@contextmanager
def shared_pixels(out, shape, state):
    """An array uint8 of this shape, into which every process draws its share: a file beside the
    images, for as long as it is needed."""
    folder = out if out.is_dir() else out.parent
    file = folder / f".{out.stem}.uint8"
    if state.is_main_process:
        make_file(file, math.prod(shape))
    state.wait_for_everyone()
    try:
        yield np.memmap(file, np.uint8, "r+", shape=shape)
    finally:
        if state.is_main_process:
            file.unlink(missing_ok=True)
    state.wait_for_everyone()


def save_settings(out, args, settings, labels):
    names = "run", "seed", "image", "keep", "mask"
    about = {name: getattr(args, name) for name in names}
    about |= {"settings": settings, "labels": labels if labels is None else labels.tolist()}
    (out / "samples.json").write_text(json.dumps(about) + "\n")


def save_together(out, pixels, labels, edited):
    """All images and labels as .npz, or a grid as PNG, which begins with an edited photo and its
    mask. Returns the file."""
    if out.suffix == ".npz":
        np.savez(out, arr_0=pixels, **({} if labels is None else {"arr_1": labels}))
        return out
    from torchvision.utils import make_grid  # takes seconds

    if out.is_dir():
        out = out / "grid.png"
        pixels = pixels[:400]
    images = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2)     # (N, 3, H, W)
    columns = math.ceil(math.sqrt(len(images)))
    if edited:
        images = torch.cat([to_uint8(edited.shown), images])
        columns = 10
    elif labels is not None and len(labels.unique()) <= 20:
        columns = len(labels.unique())  # a class in each
    grid = make_grid(images, columns)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(out)
    return out


if __name__ == "__main__":
    run_main(main)
