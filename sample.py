"""Draws new images from a stage-2 run.

    python sample.py --run runs/dq_transformer -n 64 [--classes 3,7 | --classes disc,ring] [--cfg 3] [--seed 0] [--out FOLDER | FILE]
    accelerate launch --num_processes 8 sample.py --run runs/dq_transformer -n 50000 --out samples.npz

--out says what is written: a folder of single PNGs and grid.png (default: RUN/samples/seed_SEED); FILE.png, one grid; or FILE.npz with
uint8 (N, H, W, 3) as `arr_0` and the labels as `arr_1`, which the ADM evaluation suite reads. Sampling settings that are not given are
those of the run's config, section `sample`. Image number i of a seed is drawn with the same random numbers in whatever batch and on
whatever process: on the CPU it is the same image.
"""

import argparse
import inspect
import json
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torchvision.utils import make_grid
from tqdm import tqdm

from checkpoint import make_file
from config import UserError, build
from dataset import EXTENSIONS, to_uint8
from experiment import STAGE2, asked_rate, load_run, own_folder, set_image_size, set_rate
from gpt import Blocks, check_sampling, sides
from launch import run_main

SETTINGS = {"temperature": float, "top_k": int, "top_p": float, "temperature_pos": float, "top_k_pos": int, "top_p_pos": float}


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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="the run folder of a stage-2 model")
    parser.add_argument("-n", type=int, default=64, help="how many images in all (default 64)")
    parser.add_argument("--classes", help="class numbers or names, with commas; the images go through them in turn (default: all)")
    parser.add_argument("--cfg", type=float, help="scale of the guidance towards the classes; 1: none")
    for name, kind in SETTINGS.items():
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time, per process")
    parser.add_argument("--which", choices=("latest", "best"), default="latest", help="which of the run's weights")
    parser.add_argument("--out", help="a folder, FILE.png or FILE.npz")
    parser.add_argument("--bf16", action="store_true", help="in bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile the decoding step")
    args = parser.parse_args(argv)
    if min(args.n, args.batch_size) < 1 or not 0 <= args.seed < 2**32:
        raise UserError("-n and --batch_size must be at least 1, and --seed between 0 and 2^32 - 1")
    state = Accelerator(mixed_precision="bf16" if args.bf16 else None)
    model, stage1, config, classes = load_models(args.run, args.which)
    model, stage1 = model.to(state.device), stage1.to(state.device)
    labels = chosen_labels(args.classes, classes, args.n) if model.num_classes else None
    if args.classes and labels is None:
        raise UserError(f"--classes was given, but the model of {args.run} is unconditional")
    given = {k: v for k in SETTINGS if (v := getattr(args, k)) is not None} | ({} if args.cfg is None else {"cfg_scale": args.cfg})
    settings = sampling_arguments(model, config["sample"] | given, labels)
    if args.compile:
        for blocks in (m for m in model.modules() if isinstance(m, Blocks)):
            blocks.step = torch.compile(blocks.step)
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
                pixels[numbers] = draw(model, stage1, numbers, labels, args.seed, settings, state.autocast)
                for number in numbers if single else ():
                    Image.fromarray(pixels[number]).save(out / f"{number:06d}.png")
                bar.update(len(numbers))
        pixels.flush()
        state.wait_for_everyone()
        if state.is_main_process:
            write_together(out, single, pixels, labels)
            if single:
                about = {"run": args.run, "seed": args.seed, "settings": settings, "labels": None if labels is None else labels.tolist()}
                (out / "samples.json").write_text(json.dumps(about) + "\n")
            print(f"{args.n} images: {out / 'grid.png' if single else out}")
    finally:
        if state.is_main_process:
            together.unlink(missing_ok=True)
    state.wait_for_everyone()


def sampling_arguments(model: torch.nn.Module | type, settings: dict, labels: torch.Tensor | None = None) -> dict:
    """What of the section `sample` this model's `sample` takes. UserError, before anything is drawn, for settings that make no sense; of
    a model (not only its class) also for guidance that it cannot have."""
    kind = model if isinstance(model, type) else type(model)
    known = inspect.signature(kind.sample).parameters
    for key, value in settings.items():
        if key.endswith("_pos") and value is not None and key not in known:
            raise UserError(f"sample.{key} is for models that generate positions, which {kind.__name__} does not")
    for end in ("", "_pos"):
        build(check_sampling, {"temperature": settings[f"temperature{end}"] or 0.0} | {k: settings[k + end] for k in ("top_k", "top_p")})
    if kind is not model and settings["cfg_scale"] != 1 and (labels is None or model.num_starts == model.num_classes):
        raise UserError(f"--cfg {settings['cfg_scale']:g} needs a class-conditional model that was trained with label_dropout")
    return {k: v for k, v in settings.items() if k in known}


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


def write_together(out: Path, single: bool, pixels: np.ndarray, labels: torch.Tensor | None) -> None:
    """A grid as PNG, or all images and labels as .npz."""
    if out.suffix == ".npz":
        np.savez(out, **{"arr_0": pixels} | ({"arr_1": labels.numpy()} if labels is not None else {}))
        return
    shown = torch.from_numpy(np.array(pixels[:400] if single else pixels)).permute(0, 3, 1, 2)
    columns = len(set(labels.tolist())) if labels is not None else 99
    columns = columns if columns <= 20 else math.ceil(math.sqrt(len(shown)))  # a class in each, if they are few
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
         autocast: Callable = nullcontext) -> np.ndarray:
    """Images with these numbers, uint8 (n, H, W, 3); labels are those of all images."""
    with autocast():
        try:
            labels = None if labels is None else labels[numbers]
            codes = model.sample(len(numbers), labels, generator=generators(seed, numbers), **settings)
        except ValueError as error:
            raise UserError(str(error)) from error
        images = stage1.decode(codes)
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
