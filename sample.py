"""Draws new images from a stage-2 run.

    python sample.py --run runs/dq_transformer -n 64 [--classes 3,7 | --classes disc,ring] [--cfg 3] [--seed 0] [--out FOLDER | FILE]
    accelerate launch --num_processes 8 sample.py --run runs/dq_transformer -n 50000 --out samples.npz
    python sample.py --run runs/mask_transformer --image PHOTO --keep 0,0,1,0.5 -n 8            # draws the lower half anew

With --image, the codes that lie wholly in what is kept stay, and the others are drawn n times; the grid begins with the photo and the
mask. --keep takes rectangles left,top,right,bottom in shares of width and height of the image (its centre, as the model sees it),
separated by spaces, or granularities of a DQ-VAE (coarse, or coarse,medium); --mask a picture of the photo's size, white where it is drawn
anew. A mask_transformer keeps any region, the others what comes first in their order.

--out says what is written: a folder of single PNGs and grid.png (default: RUN/samples/seed_SEED); FILE.png, one grid; or FILE.npz with
uint8 (N, H, W, 3) as `arr_0` and the labels as `arr_1`, which the ADM evaluation suite reads. Sampling settings that are not given are
those of the run's config, section `sample`.

Image number i of a seed is drawn with the same random numbers in whatever batch and on whatever
process. On the CPU, in float32 and with equally many threads, it is the same image, unless a draw
falls on the edge between two codes, which rounding then decides: about one of 100 images of 256
codes of 1,024.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import openmp  # noqa: F401, before torch
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from checkpoint import make_file
from config import UserError, build, check_config
from dataset import EXTENSIONS, Files, ImageDataset, read_image, to_uint8
from experiment import STAGE2, asked_rate, load_run, own_folder, set_image_size, set_rate
from gpt import Blocks, Cache, check_sampling, sides
from hub import run_folder
from launch import run_main

SETTINGS = {"temperature": float, "top_k": int, "top_p": float, "temperature_pos": float, "top_k_pos": int, "top_p_pos": float,
            "steps": int, "layout_steps": int, "choice_temperature": float}
GRAINS = {1: [""], 2: ["coarse", "fine"], 3: ["coarse", "medium", "fine"]}  # names of granularities


@dataclass
class SampleSettings:
    """The section `sample`: of the pictures made while training, and the defaults of this script. See GPT.sample."""

    columns: int = 8  # of samples in a picture; a class-conditional model has a class per column
    rows: int = 4
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    cfg_scale: float = 1.0
    temperature_pos: float | None = None  # of the positions, for models that have them; null: as temperature
    top_k_pos: int | None = None
    top_p_pos: float | None = None
    steps: int | None = None  # of a mask_transformer, as those below; see MaskTransformer.sample, null: its default
    layout_steps: int | None = None
    choice_temperature: float | None = None
    cfg_schedule: Literal["constant", "linear"] | None = None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=run_folder, help="the run folder of a stage-2 model, or hf:user/name")
    parser.add_argument("-n", type=int, default=64, help="how many images in all (default 64)")
    parser.add_argument("--classes", help="class numbers or names, with commas; the images go through them in turn (default: all)")
    parser.add_argument("--cfg", type=float, help="scale of the guidance towards the classes; 1: none")
    for name, kind in SETTINGS.items():
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--cfg_schedule", choices=("constant", "linear"), help="of the guidance over a mask_transformer's steps")
    parser.add_argument("--image", help="draw parts of this image anew")
    parser.add_argument("--keep", help='the parts that stay: "0,0,1,0.5 0,0.5,0.2,1", or coarse')
    parser.add_argument("--mask", help="or a picture that is white where the image is drawn anew")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time, per process")
    parser.add_argument("--which", choices=("latest", "best"), default="latest", help="which of the run's weights")
    parser.add_argument("--out", help="a folder, FILE.png or FILE.npz")
    parser.add_argument("--bf16", action="store_true", help="in bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile the decoding step (for GPUs; slower on CPUs)")
    parser.add_argument("--no_graphs", action="store_true", help="do not replay decoding steps from CUDA graphs")
    args = parser.parse_args(argv)
    if min(args.n, args.batch_size) < 1 or not 0 <= args.seed < 2**32:
        raise UserError("-n and --batch_size must be at least 1, and --seed between 0 and 2^32 - 1")
    Cache.graphs = not args.no_graphs
    state = Accelerator(mixed_precision="bf16" if args.bf16 else None)
    model, stage1, config, classes = load_models(args.run, args.which)
    given = {k: v for k in (*SETTINGS, "cfg_schedule") if (v := getattr(args, k)) is not None}
    given |= {} if args.cfg is None else {"cfg_scale": args.cfg}
    model, stage1 = model.to(state.device), stage1.to(state.device)
    edited = edit(args, stage1, config)
    labels = chosen_labels(args.classes, classes, args.n) if model.num_classes else None
    if edited and not args.classes:  # the class of the photo is not known
        if model.num_classes and (args.cfg is not None or model.num_starts == model.num_classes):
            raise UserError(f"with --image, {'--cfg' if args.cfg is not None else 'a model without a null class'} needs --classes")
        labels, config["sample"]["cfg_scale"] = None, 1.0
    if args.classes and labels is None:
        raise UserError(f"--classes was given, but the model of {args.run} is unconditional")
    settings = check_config({"sample": config["sample"] | given}, {"sample": SampleSettings}, "the command line")["sample"]
    settings = sampling_arguments(model, settings, labels)
    if edited:
        draw(model, stage1, [0], labels, args.seed, settings, state.autocast, edited)  # can this stay? before other images are removed
    if args.compile:
        for blocks in (m for m in model.modules() if isinstance(m, Blocks)):
            blocks.step = torch.compile(blocks.step)
            blocks.compile()  # what a mask_transformer calls
    out, single = output(args, state)

    # Every process draws its share into one file, from which the first writes what shows them together
    shape, together = (args.n, *sides(config["data"]["image_size"]), 3), (out if single else out.parent) / f".{out.stem}.uint8"
    if state.is_main_process:
        make_file(together, math.prod(shape))
    state.wait_for_everyone()
    try:
        pixels = np.memmap(together, np.uint8, "r+", shape=shape)
        mine = list(range(args.n))[state.process_index::state.num_processes]
        with tqdm(total=len(mine), unit="img", disable=not state.is_main_process, dynamic_ncols=True) as bar:
            for i in range(0, len(mine), args.batch_size):
                numbers = mine[i:i + args.batch_size]
                pixels[numbers] = draw(model, stage1, numbers, labels, args.seed, settings, state.autocast, edited)
                for number in numbers if single else ():
                    Image.fromarray(pixels[number]).save(out / f"{number:06d}.png")
                bar.update(len(numbers))
        pixels.flush()
        state.wait_for_everyone()
        if state.is_main_process:
            write_together(out, single, pixels, labels, edited)
            if single:
                about = {"run": args.run, "seed": args.seed, "settings": settings, "labels": None if labels is None else labels.tolist()}
                about |= {"image": args.image, "keep": args.keep, "mask": args.mask} if edited else {}
                (out / "samples.json").write_text(json.dumps(about) + "\n")
            print(f"{args.n} images: {out / 'grid.png' if single else out}")
    finally:
        if state.is_main_process:
            together.unlink(missing_ok=True)
    state.wait_for_everyone()


class Edit(NamedTuple):
    """A photo, and which parts of it are drawn anew."""

    codes: dict[str, torch.Tensor]  # (1, ...)
    known: torch.Tensor  # (1, h, w) bool: the cells of the finest grid whose codes stay
    shown: torch.Tensor  # (2, 3, H, W): the photo, and what stays of it


@torch.no_grad()
def edit(args: argparse.Namespace, stage1: torch.nn.Module, config: dict) -> Edit | None:
    """What --image, --keep and --mask ask for, or None."""
    if args.image is None:
        if args.keep is not None or args.mask is not None:
            raise UserError("--keep and --mask say what of --image stays; give it")
        return None
    if (args.keep is None) == (args.mask is None):
        raise UserError("with --image, give one of --keep and --mask")
    size, device = sides(config["data"]["image_size"]), stage1.last_layer.device
    image = load_image(args.image, size).to(device)                                         # (1, 3, H, W)
    codes = stage1.encode(image)
    grid = stage1.grid if "positions" in codes else tuple(codes["indices"].shape[1:3])
    if args.mask is not None:
        load_image(args.mask, size)  # or one sentence
        white, (width, height) = read_image(args.mask).convert("L").point(lambda v: 255 * (v > 127)), read_image(args.image).size
        if white.size != (width, height):
            raise UserError(f"{args.mask} is {white.width} x {white.height} pixels, but {args.image} is {width} x {height}")
        crop = min(width, height * size[1] / size[0]), min(height, width * size[0] / size[1])  # as that of the image
        left, top = round((width - crop[0]) / 2), round((height - crop[1]) / 2)
        white = torch.from_numpy(np.array(white))[top:top + round(crop[1]), left:left + round(crop[0])] > 0
        keep = F.adaptive_max_pool2d(white[None].float().to(device), size) == 0              # (1, H, W): pixels without any white
    elif "grain" in codes and (chosen := args.keep.split(","))[0] in GRAINS[3]:
        if chosen != GRAINS[stage1.grains][:-1][:len(chosen)]:
            raise UserError("--keep takes granularities from the coarsest on, but not the finest: coarse, or with three coarse,medium; "
                            f"it is {args.keep}")
        keep = F.interpolate(codes["grain"].unsqueeze(1).float(), size).squeeze(1) < len(chosen)
    else:
        keep = torch.zeros(1, *size, dtype=torch.bool, device=device)
        for left, top, right, bottom in rectangles(args.keep):
            keep[:, round(top * size[0]):round(bottom * size[0]), round(left * size[1]):round(right * size[1])] = True
    known = torch.zeros(1, *grid, dtype=torch.bool, device=device)
    for g, side in enumerate(getattr(stage1, "factors", [size[0] // grid[0]])):  # of a code of each granularity, in pixels
        whole = F.interpolate(F.max_pool2d((~keep).float(), side).unsqueeze(1), grid).squeeze(1) == 0
        known |= whole & (F.interpolate(codes["grain"].unsqueeze(1).float(), grid).squeeze(1) == g if "grain" in codes else True)
    if known.all() or not known.any():
        raise UserError("nothing is left to draw: all of the image stays" if known.all() else
                        "nothing stays: no code lies wholly in what is kept")
    stays = F.interpolate(known.unsqueeze(1).float(), size) > 0
    return Edit(codes, known, torch.cat([image, image.where(stays, 0.0)]).cpu())


def rectangles(text: str) -> list[list[float]]:
    """"0,0,1,0.5 0,0.5,0.2,1" as numbers."""
    found = []
    for word in text.split():
        try:
            left, top, right, bottom = map(float, word.split(","))
        except ValueError:
            raise UserError(f"--keep takes rectangles left,top,right,bottom, such as 0,0,1,0.5; it is {text!r}") from None
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise UserError(f"--keep takes shares of the image, from 0 to 1, left below right and top below bottom; it is {word}")
        found.append([left, top, right, bottom])
    return found


def load_image(path: str, size: tuple[int, int]) -> torch.Tensor:
    """(1, 3, H, W) in [-1, 1], cropped as for validation."""
    return ImageDataset(Files([str(existing(path))], [0], [""]), list(size))[0][0].unsqueeze(0)


def existing(path: str) -> Path:
    if not Path(path).expanduser().is_file():
        raise UserError(f"there is no image {path}")
    return Path(path).expanduser()


def sampling_arguments(model: torch.nn.Module | type, settings: dict, labels: torch.Tensor | None = None) -> dict:
    """What of the section `sample` this model's `sample` takes. UserError, before anything is drawn, for settings that make no sense; of
    a model (not only its class) also for guidance that it cannot have."""
    kind = model if isinstance(model, type) else type(model)
    known = inspect.signature(kind.sample).parameters
    for key, value in settings.items():
        if value is not None and key not in known and key not in ("columns", "rows"):
            raise UserError(f"sample.{key} is not for a {kind.__name__}, which has {', '.join(k for k in settings if k in known)}")
    for end in ("", "_pos"):
        build(check_sampling, {"temperature": settings[f"temperature{end}"] or 0.0} | {k: settings[k + end] for k in ("top_k", "top_p")})
    if kind is not model and settings["cfg_scale"] != 1 and (labels is None or model.num_starts == model.num_classes):
        raise UserError(f"--cfg {settings['cfg_scale']:g} needs a class-conditional model that was trained with label_dropout")
    return {k: v for k, v in settings.items() if k in known and v is not None}


def output(args: argparse.Namespace, state: Accelerator) -> tuple[Path, bool]:
    """Where the images go, and whether each is a file of its own. The folder is made, and images of an earlier call are removed."""
    seed = f"samples/seed_{args.seed}"
    out = Path(args.out).expanduser() if args.out else own_folder(Path(args.run), "samples", seed, f"{seed}/*") / seed
    single = out.suffix not in (".png", ".npz")
    if single and out.suffix.lower() in EXTENSIONS | {".npy", ".zip"}:
        raise UserError(f"--out must be a folder, a .png or a .npz; it is {out}")
    (out if single else out.parent).mkdir(parents=True, exist_ok=True)
    if single and state.is_main_process:
        earlier = [p for p in out.glob("*.png") if p.stem.isdigit()]
        if earlier and not (out / "samples.json").is_file():
            raise UserError(f"{out} already holds images; choose another --out")
        for path in earlier:  # of an earlier call of this script
            path.unlink()
    return out, single


def write_together(out: Path, single: bool, pixels: np.ndarray, labels: torch.Tensor | None, edited: Edit | None) -> None:
    """A grid as PNG, which begins with an edited photo and its mask, or all images and labels as .npz."""
    if out.suffix == ".npz":
        np.savez(out, **{"arr_0": pixels} | ({"arr_1": labels.numpy()} if labels is not None else {}))
        return
    from torchvision.utils import make_grid  # takes seconds

    shown = torch.from_numpy(np.array(pixels[:400] if single else pixels)).permute(0, 3, 1, 2)
    shown = shown if edited is None else torch.cat([to_uint8(edited.shown), shown])
    columns = len(set(labels.tolist())) if labels is not None else 99
    columns = columns if columns <= 20 else math.ceil(math.sqrt(len(shown)))  # a class in each, if they are few
    columns = columns if edited is None else min(10, len(shown))
    Image.fromarray(make_grid(shown, nrow=columns).permute(1, 2, 0).numpy()).save(out / "grid.png" if single else out)


def load_models(folder: str | Path, which: str = "latest") -> tuple[torch.nn.Module, torch.nn.Module, dict, list[str]]:
    """(stage-2 model, stage-1 model, config, names of the classes) of a stage-2 run, in eval mode on the CPU."""
    model, config = load_run(folder, which)
    if config["model"]["name"] not in STAGE2:
        raise UserError(f"{folder} holds a stage-1 model ({config['model']['name']}); give the run folder of a stage-2 one")
    stage1, _ = load_run(Path(folder) / "stage1")
    set_image_size(stage1, config["data"]["image_size"])
    if (rate := asked_rate(config["codes"])) is not None:
        set_rate(stage1, rate)
    try:
        classes = json.loads((Path(folder) / "classes.json").read_text())
    except (OSError, ValueError):
        classes = [str(i) for i in range(model.num_classes)]
    return model, stage1, config, classes


@torch.no_grad()
def draw(model: torch.nn.Module, stage1: torch.nn.Module, numbers: list[int], labels: torch.Tensor | None, seed: int, settings: dict,
         autocast: Callable = nullcontext, edited: Edit | None = None) -> np.ndarray:
    """Images with these numbers, uint8 (n, H, W, 3); labels are those of all images."""
    with autocast():
        try:
            labels = None if labels is None else labels[numbers]
            if edited:
                settings = settings | {"codes": {k: v.expand(len(numbers), *v.shape[1:]) for k, v in edited.codes.items()},
                                       "known": edited.known.expand(len(numbers), -1, -1)}
            codes = model.sample(len(numbers), labels, generator=generators(seed, numbers), **settings)
        except ValueError as error:
            raise UserError(str(error)) from error
        # On the CPU one by one: in batches they would round differently
        at_once = 1 if stage1.last_layer.device.type == "cpu" else len(numbers)
        parts = zip(*(value.split(at_once) for value in codes.values()))
        images = torch.cat([stage1.decode(dict(zip(codes, part))) for part in parts])
    return to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()


def generators(seed: int, numbers: Iterable[int]) -> list[torch.Generator]:
    """The random numbers of each of a seed's images."""
    # A CPU generator uses 32 bits of its seed. All numbers of one seed give different ones, those of two seeds are far apart.
    return [torch.Generator().manual_seed((seed * 2_654_435_761 + number) % 2**32) for number in numbers]


def chosen_labels(asked: str | None, classes: list[str], n: int) -> torch.Tensor:
    """Labels (n,) that go through the classes asked for, by number or name, in turn."""
    chosen = list(range(len(classes)))
    if asked:
        chosen = []
        for word in (w.strip().lower() for w in asked.split(",")):
            exact = [i for i, c in enumerate(classes) if word == c.lower()]
            partial = [i for i, c in enumerate(classes) if word and word in c.lower()]
            matches = [int(word)] if word.isdigit() else exact or partial
            if not matches or max(matches) >= len(classes):
                raise UserError(f"there is no class {word!r}; the classes are 0 to {len(classes) - 1}: {', '.join(classes[:20])}"
                                + (", ..." if len(classes) > 20 else ""))
            chosen += matches
    return torch.tensor([chosen[i % len(chosen)] for i in range(n)])


if __name__ == "__main__":
    run_main(main)
