"""Measures runs: reconstructions of stage 1, samples of stage 2. Several runs give one table.

    python evaluate.py --run runs/vqgan [--run runs/mqvae ...] [--split val] [--images N] [--markdown] [data.root=PATH ...]
    python evaluate.py --run runs/mqvae_any --rates 0.1,0.5,0.9
    python evaluate.py --run runs/dq_transformer -n 5000 [--samples FOLDER | FILE.npz] [--reference FILE.npz] [sample.top_k=100 ...]
    accelerate launch --num_processes 8 evaluate.py --run ...

stage 1     psnr (dB), ssim, lpips (VGG)    of each image in 8 bits, by torchmetrics and lpips
            rfid, rsfid                     FID and sFID between images and reconstructions
            usage, perplexity               share of the codes that occur in the set, and exp(entropy) of their frequencies
            usage_65536                     expected usage among 65,536 of the set's codes, comparable between sets of different sizes
            codes, bits, bits_per_pixel     per image
            kept_ratio, ratio_1, ratio_2    share of cells with a code; of regions with granularity 1 and 2
            detail                          how often a cell with a code (a finer region) has more contrast than one without (a coarser
                                            one) in the same image; chance: 0.5. Contrast: standard deviation of the pixels
            shared                          share of an image's kept cells (regions that are not coarsest) that another image keeps
                                            too, mean over pairs. 1: a fixed pattern; chance: the share that is kept
stage 2     fid, is, precision, recall      of the samples against the split, by torch-fidelity; precision and recall with 3 nearest
                                            neighbours in Inception's features (Kynkaanniemi et al., NeurIPS 2019), as in the ADM suite
            sfid                            FID with features that know places: in place of the 2,048 of pool_3 the first 7 channels of
                                            mixed_6/conv, 17 x 17 x 7 (Nash et al., ICML 2021), as in the ADM suite
            bits                            negative log-likelihood of a validation image's codes; of a MaskTransformer an upper bound
            images_per_second               of sampling, on all processes together

--reference FILE.npz takes the place of the split: FID is against its `mu`, `sigma`, sFID against its `mu_s`, `sigma_s`, precision and
recall against its images `arr_0`. Statistics that it lacks are those of its images; without images, precision and recall stay against the
split. --save_statistics FILE.npz writes the split's statistics under these names.

_std is the spread over images (of `is`: over ten splits). FID depends on the number of images; compare equal numbers only. But for
rounding, results do not depend on the batch size or the number of processes. Images are not
augmented, in --split train either. All is kept in each run's metrics.json, with the `images` of
`images_in_split` of `split` of `dataset` that were measured (in stage 2 for `bits`), and with the
`real_images` of precision and recall from `real_images_from`, a split or the reference.
"""

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path

import openmp  # noqa: F401, before torch
import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from checkpoint import write_file
from config import UserError, check_config, override
from dataset import ImageDataset, eval_loader, list_images, read_image, to_float, to_uint8
from experiment import STAGE2, load_run, run_config, run_dataset, set_rate
from gpt import sides
from hub import run_folder
from inception import (
    FEATURES, LOGITS, check_images, distances, inception_features, load_inception, load_reference, read_npz, sample_quality,
    save_statistics, statistics,
)
from launch import run_main
from losses import load_lpips
from sample import SampleSettings, chosen_labels, draw, load_models, sampling_arguments

QUEUE = 65536


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", required=True, type=run_folder, help="a run folder; several times for a comparison")
    parser.add_argument("--rates", help="(stage 1, trained for a range) several rates, such as 0.1,0.5,0.9: a result for each")
    parser.add_argument("--split", choices=("train", "val"), default="val", help="the images to compare with (default val)")
    parser.add_argument("--images", type=int, help="at most so many of them, spread over the split (default: all)")
    parser.add_argument("-n", type=int, help="(stage 2) samples to draw (default: as many as images)")
    parser.add_argument("--samples", help="(stage 2) measure these instead: a folder of images, or an .npz of uint8 images")
    parser.add_argument("--reference", help="an .npz of statistics or images (ADM suite) for FID, in place of the split")
    parser.add_argument("--save_statistics", metavar="FILE.npz", help="write the split's statistics there, for --reference")
    parser.add_argument("--seed", type=int, default=0, help="(stage 2) of the samples")
    parser.add_argument("--which", choices=("latest", "best"), default="latest", help="which of the run's weights")
    parser.add_argument("--without", nargs="+", choices=("lpips", "inception"), default=[], help="leave out what needs these networks")
    parser.add_argument("--batch_size", type=int, default=32, help="images at a time, per process")
    parser.add_argument("--num_workers", type=int, default=min(4, os.cpu_count() or 1), help="processes that read images, per process")
    parser.add_argument("--bf16", action="store_true", help="run the model in bfloat16")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown, a row for each run")
    parser.add_argument("overrides", nargs="*", metavar="data.key=value", help="other data; in stage 2 also sample.key=value")
    overrides = [word for word in argv or sys.argv[1:] if re.match(r"\w+\.[\w.]+=", word)]  # also after --without, which takes words
    args = parser.parse_intermixed_args([word for word in argv or sys.argv[1:] if word not in overrides])
    args.overrides += overrides
    if any(x is not None and x < 1 for x in (args.batch_size, args.images, args.n)) or args.num_workers < 0 or not 0 <= args.seed < 2**32:
        raise UserError("--batch_size, --images and -n must be at least 1, --num_workers at least 0, and --seed between 0 and 2^32 - 1")
    names = {folder: run_config(folder)["model"]["name"] for folder in args.run}
    stage2 = {folder: name in STAGE2 for folder, name in names.items()}
    if args.rates and any(stage2.values()):
        raise UserError("--rates are for stage-1 runs; a stage-2 run has one, codes.ratio")
    try:
        rates = [float(rate) for rate in args.rates.split(",")] if args.rates else [None]
    except ValueError:
        raise UserError(f"--rates must be numbers with commas between them; they are {args.rates!r}") from None
    if args.samples and not Path(args.samples).expanduser().exists():
        raise UserError(f"there is no {args.samples}")
    if args.samples and not all(stage2.values()):
        raise UserError("--samples are compared with the data of a stage-2 run; give --run one")
    if (args.reference or args.save_statistics) and "inception" in args.without:
        raise UserError("--reference and --save_statistics need Inception; leave out --without inception")
    saved = args.save_statistics and Path(args.save_statistics).expanduser()
    if saved and (saved.suffix != ".npz" or not saved.parent.is_dir()):
        raise UserError(f"--save_statistics must be FILE.npz in a folder that exists; it is {saved}")
    reference = load_reference(args.reference) if args.reference else {}
    meant = set()
    for folder in args.run if args.rates or reference or saved else ():  # before anything is measured in vain
        model, config = load_models(folder, args.which)[1:3] if stage2[folder] else load_run(folder, args.which)
        dataset, data = run_images(args, config, args.split, model)
        if "images" in reference:
            check_images(reference["images"], args.reference, *sides(dataset.image_size))
        for rate in rates if args.rates else ():
            set_rate(model, rate)
        meant.add(data_key(data))
    if saved and len(meant) > 1:
        raise UserError("--save_statistics are of one data set, and these runs have several; give --run one of them")
    state = Accelerator(mixed_precision="bf16" if args.bf16 else None,
                        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))])  # the others wait for the first one's FID
    networks, why = load_networks(state, args.without, with_lpips=not all(stage2.values()))
    known, results, rows = {}, {}, {}
    if saved:
        if "inception" not in networks:
            raise UserError(why["inception"])
        found = real_side(args, state, dataset, data, networks, known, {})
        if state.is_main_process:
            save_statistics(saved, found)
            print(f"statistics of {len(found['features'])} images: {saved}")
    for folder in args.run:
        found = {}
        for rate in rates:
            metrics = (evaluate_stage2(args, state, folder, networks, known, reference) if stage2[folder]
                       else evaluate_stage1(args, state, folder, networks, known, reference, rate))
            if not state.is_main_process:
                continue
            if reference and "inception" in networks:
                metrics["reference"] = Path(args.reference).name
            wanted = ("fid", "sfid", "is", "precision", "recall") if stage2[folder] else ("lpips", "rfid", "rsfid")
            why_sfid = f"{args.reference} has neither `mu_s` and `sigma_s` nor images"  # where both networks are there
            metrics["missing"] = {k: why.get("lpips" if k == "lpips" else "inception", why_sfid) for k in wanted if k not in metrics}
            found[rate], row = metrics, folder if rate is None else f"{Path(folder)} at {rate:g}"
            results[row], rows[row] = metrics, names[folder]
        if state.is_main_process:
            about = {"run": folder, "model": names[folder], "which": args.which, "split": args.split, "data": args.overrides}
            about |= {"rates": found} if args.rates else found[None]
            try:
                write_file(Path(folder) / "metrics.json", json.dumps(about, indent=1) + "\n")
            except OSError as error:  # somebody else's run, a full disk: what follows is the result all the same
                print(f"{folder}/metrics.json could not be written ({error.strerror})")
    if state.is_main_process:
        print(table(results, rows, args.markdown))
        for sentence in dict.fromkeys(s for r in results.values() for s in r["missing"].values()):
            lost = dict.fromkeys(LABELS[k][0] for r in results.values() for k, s in r["missing"].items() if s == sentence)
            print(f"without {', '.join(lost)}: {sentence}")
    state.wait_for_everyone()


@torch.no_grad()
def evaluate_stage1(args: argparse.Namespace, state: Accelerator, folder: str, networks: dict, known: dict, reference: dict,
                    rate: float | None = None) -> dict:
    """The metrics of a stage-1 run, at its own rate or another; on the first process."""
    model, config = load_run(folder, args.which)
    dataset, data = run_images(args, config, args.split, model)
    if min(sides(dataset.image_size)) < 11:
        raise UserError(f"SSIM needs images of 11 pixels or more; these have {dataset.image_size}")
    if rate is not None:
        set_rate(model, rate)
    model = model.to(state.device)
    books = len(getattr(model.quantizer, "layers", [0]))  # a residual quantizer may have a codebook for each depth
    uses = torch.zeros(books * model.quantizer.codebook_size, dtype=torch.int64, device=state.device)
    each, features, places = [], [], []
    for images, _ in batches(args, state, dataset, folder):
        with state.autocast():
            codes = model.encode(images)
            reconstructions = to_uint8(model.decode(codes))
        values = compare(to_uint8(images), reconstructions, networks.get("lpips")) | code_counts(model, codes)
        if (levels := detail_levels(model, codes)) is not None:
            contrasts = contrast(images, images.shape[-1] // levels.shape[-1])
            values["detail"] = torch.stack([on_detail(x, c) for x, c in zip(levels.flatten(1), contrasts)])
            places.append((levels > 0).flatten(1).sum(0, keepdim=True).double().cpu())
        each.append(torch.stack([v.double() for v in values.values()], 1).cpu())
        offsets = model.quantizer.codebook_size * torch.arange(books, device=state.device) if books > 1 else 0
        uses += torch.bincount((codes["indices"] + offsets)[spent(model, codes)], minlength=len(uses))
        if "inception" in networks:
            features.append(inception_features(networks["inception"], reconstructions)[0])
    uses = state.reduce(uses, "sum").cpu()
    real = real_side(args, state, dataset, data, networks, known, reference) if "inception" in networks else None
    each, features, places = collect(state, each), collect(state, features), collect(state, places)
    if not state.is_main_process:
        return {}
    metrics = measured_images(data, args.split, len(each), dataset)
    for name, column in zip(values, each.T):
        if name == "detail":
            column = column[~column.isnan()]  # an image whose regions are all equal has none
        if not len(column):
            continue
        metrics |= {name: column.mean().item(), f"{name}_std": column.std(correction=0).item()}
    if features is not None:
        metrics |= {f"r{name}": value for name, value in distances(features, real).items()}
    if places is not None and len(each) > 1 and places.sum() > 0:  # each of the p images that keep a place shares it with p - 1 others
        places = places.sum(0)
        metrics["shared"] = ((places * (places - 1)).sum() / (places.sum() * (len(each) - 1))).item()
    found = [(usage(u, u.sum().item()), usage(u, QUEUE), perplexity(u)) for u in uses.chunk(books)]
    metrics |= dict(zip(("usage", f"usage_{QUEUE}", "perplexity"), (sum(values) / books for values in zip(*found))))
    return metrics | {"bits_per_pixel": metrics["bits"] / math.prod(sides(dataset.image_size))}


def compare(a: Tensor, b: Tensor, lpips: torch.nn.Module | None = None) -> dict[str, Tensor]:
    """How much two batches of uint8 images (B, 3, H, W) differ, each (B,). Equal images have a PSNR of 100 dB."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure  # takes seconds, as others below

    x, y = a.float(), b.float()
    psnr = peak_signal_noise_ratio(y, x, data_range=255.0, dim=(1, 2, 3), reduction="none").clamp(max=100)  # no error at all: infinite
    _, ssim = structural_similarity_index_measure(y, x, data_range=255.0, reduction="none", return_full_image=True)
    ssim = ssim[..., 5:-5, 5:-5].mean((1, 2, 3))  # where the window of 11 pixels lies inside the image, as Wang et al. (2004) have it
    return {"psnr": psnr, "ssim": ssim} | ({"lpips": lpips(to_float(a), to_float(b)).flatten()} if lpips else {})


def spent(model: torch.nn.Module, codes: dict[str, Tensor]) -> Tensor:
    """Which of codes["indices"] are paid for, bool of its shape: of a DQ-VAE's coarse code, the first cell that it is repeated over."""
    if "grain" in codes:
        return model.first_cells(model.to_finest(codes["grain"])).bool()
    return torch.ones_like(codes["indices"], dtype=torch.bool)


def code_counts(model: torch.nn.Module, codes: dict[str, Tensor]) -> dict[str, Tensor]:
    """How many codes and bits, and the shares of cells or regions that the model decides about, each (B,)."""
    counts = {"codes": spent(model, codes).flatten(1).sum(1), "bits": model.bits(codes)}
    if "positions" in codes:
        counts["kept_ratio"] = counts["codes"] / math.prod(model.grid)
    if "grain" in codes:
        counts |= {f"ratio_{g}": (codes["grain"] == g).float().mean((1, 2)) for g in range(1, model.grains)}
    return counts


def detail_levels(model: torch.nn.Module, codes: dict[str, Tensor]) -> Tensor | None:
    """What a model that chooses spends on each cell (0 or 1) or region (its granularity), (B, h, w)."""
    if "positions" in codes:
        kept = torch.zeros(len(codes["positions"]), math.prod(model.grid), device=codes["positions"].device)
        return kept.scatter(1, codes["positions"], 1.0).unflatten(1, model.grid)
    return codes["grain"].float() if "grain" in codes else None


def contrast(images: Tensor, size: int) -> Tensor:
    """The standard deviation of the pixels of each square of `size` x `size`, mean over the colours: (B, 3, H, W) to (B, squares)."""
    images = images.double()
    mean = torch.nn.functional.avg_pool2d(images, size)
    return (torch.nn.functional.avg_pool2d(images.square(), size) - mean.square()).clamp(min=0).sqrt().mean(1).flatten(1)


def on_detail(levels: Tensor, contrast: Tensor) -> Tensor:
    """Of the pairs of an image's places whose levels (n,) differ, the share in which the higher one has more contrast (n,); NaN if there
    are no such pairs."""
    higher = levels.unsqueeze(1) > levels                                                    # (n, n)
    return 0.5 + 0.5 * (contrast.unsqueeze(1) - contrast).sign()[higher].mean()


def usage(uses: Tensor, draws: int) -> float:
    """The share of codes that occur, of `draws` codes drawn without replacement from those that were used uses (K,) times: what
    is expected of it."""
    total = uses.sum()
    if draws >= total:
        return (uses > 0).double().mean().item()
    others = (total - uses).double()
    log_unseen = (torch.lgamma(others + 1) - torch.lgamma((others - draws).clamp(min=0) + 1)
                  - math.lgamma(total + 1) + math.lgamma(total - draws + 1))
    return (1 - torch.where(others >= draws, log_unseen.exp(), 0.0)).mean().item()


def perplexity(uses: Tensor) -> float:
    """exp(entropy) of the frequencies."""
    p = uses.double() / uses.sum()
    return torch.special.entr(p).sum().exp().item()


@torch.no_grad()
def evaluate_stage2(args: argparse.Namespace, state: Accelerator, folder: str, networks: dict, known: dict, reference: dict) -> dict:
    """The metrics of a stage-2 run; on the first process."""
    model, stage1, config, classes = load_models(folder, args.which)
    dataset, data = run_images(args, config, args.split, stage1)
    if sides(dataset.image_size) != sides(config["data"]["image_size"]):
        raise UserError(f"the model of {folder} draws images of {config['data']['image_size']} pixels, not {dataset.image_size}")
    validation = dataset if args.split == "val" else run_images(args, config, "val", stage1)[0]
    if model.num_classes and len(dataset.classes) > model.num_classes:
        raise UserError(f"the model of {folder} knows {model.num_classes} classes, and this data has {len(dataset.classes)}")
    if model.num_classes and len(validation.classes) == 1:
        raise UserError(f"the model of {folder} is class-conditional, and this data has no classes")
    model, stage1 = model.to(state.device), stage1.to(state.device)

    bits = []
    for images, labels in batches(args, state, validation, f"{folder}: bits"):
        with state.autocast():
            bits.append(model.bits(stage1.encode(images), labels if model.num_classes else None).double().cpu())
    bits = collect(state, bits)

    features, seconds, count = [], 0.0, args.n or min(args.images or len(dataset), len(dataset))
    if "inception" not in networks:
        count = 0 if args.samples else min(count, args.batch_size * state.num_processes)  # for the speed alone
    if args.samples:
        source = given_samples(args, state, *sides(dataset.image_size)) if count else ()
    else:
        source = draw_samples(args, state, model, stage1, config, classes, count)
    for images, took in source:
        seconds += took
        if "inception" in networks:
            features.append(torch.cat(inception_features(networks["inception"], images.to(state.device)), 1))
    real = real_side(args, state, dataset, data, networks, known, reference, neighbours=True) if "inception" in networks else None
    features, seconds = collect(state, features), max(gather_object([seconds]))
    if not state.is_main_process:
        return {}
    metrics = measured_images(data, "val", len(bits), validation) | {"bits": bits.mean().item(), "bits_std": bits.std(correction=0).item()}
    if not args.samples:
        metrics |= {"images_per_second": count / seconds}
    if real is None:
        return metrics
    features, logits = features.tensor_split([-LOGITS], 1)
    metrics |= sample_quality(features[:, :FEATURES], logits, real["features"]) | distances(features, real)
    return metrics | {"real_images": len(real["features"]), "real_images_from": real["from"]}


def draw_samples(args: argparse.Namespace, state: Accelerator, model: torch.nn.Module, stage1: torch.nn.Module, config: dict,
                 classes: list[str], count: int) -> Iterator[tuple[Tensor, float]]:
    """This process's share of new images, uint8 (B, 3, H, W), and the seconds that each batch took; classes in turn."""
    given = {"sample": dict(config["sample"])}
    override(given, [o for o in args.overrides if o.startswith("sample.")])
    labels = chosen_labels(None, classes, count) if model.num_classes else None
    settings = sampling_arguments(model, check_config(given, {"sample": SampleSettings}, "the command line")["sample"], labels)
    mine = list(range(count))[state.process_index::state.num_processes]
    for i in progress(state, range(0, len(mine), args.batch_size), "sampling"):
        started = time.monotonic()
        images = draw(model, stage1, mine[i:i + args.batch_size], labels, args.seed, settings, state.autocast)
        yield torch.from_numpy(images).permute(0, 3, 1, 2), time.monotonic() - started


def given_samples(args: argparse.Namespace, state: Accelerator, height: int, width: int) -> Iterator[tuple[Tensor, float]]:
    """This process's share of the images in --samples, as draw_samples gives them."""
    path = Path(args.samples).expanduser()
    if path.suffix == ".npz":
        images = read_npz(path, "arr_0").get("arr_0")
        check_images(images, path, height, width)
    else:
        images = [p for p in list_images(path) if p.name != "grid.png"]  # which sample.py writes beside them
        if not images:
            raise UserError(f"there are no images in {path}")
    for batch in shares(args, state, images[:args.n], "samples", height, width):
        yield batch, 0.0


def shares(args: argparse.Namespace, state: Accelerator, images: np.ndarray | list[Path], what: str, height: int,
           width: int) -> Iterator[Tensor]:
    """This process's share of images, uint8 (N, H, W, 3) or files, in batches uint8 (B, 3, H, W)."""
    mine = range(state.process_index, len(images), state.num_processes)
    for i in progress(state, range(0, len(mine), args.batch_size), what):
        batch = [images[j] if isinstance(images, np.ndarray) else pixels_of(images[j]) for j in mine[i:i + args.batch_size]]
        for j, image in zip(mine[i:], batch):
            if image.shape != (height, width, 3):
                raise UserError(f"{images[j]} has {image.shape[1]} x {image.shape[0]} pixels, but the data that it is compared with "
                                f"{width} x {height}")
        yield torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)


def pixels_of(path: Path) -> np.ndarray:
    try:
        return np.asarray(read_image(path))
    except Exception as error:  # PIL raises almost anything on a broken file
        raise UserError(f"cannot read {path} ({type(error).__name__}); remove it from the samples") from error


def load_networks(state: Accelerator, without: list[str], with_lpips: bool) -> tuple[dict[str, torch.nn.Module], dict[str, str]]:
    """The networks that metrics are computed with, and why those that are not there are not there."""
    networks, why = {}, {}
    for name, load in {"lpips": lambda: load_lpips("--without lpips"), "inception": load_inception}.items():
        if name in without or (name == "lpips" and not with_lpips):
            why[name] = f"left out by --without {name}"
            continue
        with state.local_main_process_first():  # may download
            try:
                networks[name] = load().to(state.device)
            except FileNotFoundError as error:
                why[name] = str(error)
        if missing := [s for s in gather_object([why.get(name)]) if s]:  # here or on another machine
            networks.pop(name, None)
            why[name] = missing[0]
    return networks, why


def run_images(args: argparse.Namespace, config: dict, split: str, model: torch.nn.Module) -> tuple[ImageDataset, dict]:
    """A split of a run's data, or of other data by overrides, without augmentation; and the settings of that data."""
    overrides = [o for o in args.overrides if config["model"]["name"] not in STAGE2 or not o.startswith("sample.")]
    overrides += ["data.random_crop=false", "data.random_flip=false"]
    given = {"data": dict(config["data"])}
    override(given, overrides)
    return run_dataset(config, overrides, split, model), given["data"]


def data_key(data: dict) -> str:
    """Equal for equal images (min_scale is of an augmentation that is off)."""
    return json.dumps({name: value for name, value in data.items() if name != "min_scale"}, sort_keys=True)


def measured_images(data: dict, split: str, count: int, dataset: ImageDataset) -> dict:
    """Which images a row is about; a user's own are called by the last part of their path."""
    own = data["name"] in ("folder", "webdataset", "huggingface")
    name = Path(data["root"]).expanduser().resolve().name if own else data["name"]
    return {"dataset": name, "split": split, "images": count, "images_in_split": len(dataset)}


def real_side(args: argparse.Namespace, state: Accelerator, dataset: ImageDataset, data: dict, networks: dict, known: dict,
              reference: dict, neighbours: bool = False) -> dict:
    """What Inception's features are compared with, on the first process: statistics "pool" and "spatial" of the reference, or without one
    of the dataset's images; for neighbours also "features" (M, FEATURES) and where they are "from". Computed once for several runs."""
    stored = {name: reference[name] for name in ("pool", "spatial") if name in reference}
    if reference and not neighbours and ("images" not in reference or len(stored) == 2):
        return stored
    if "images" in reference:
        key, source = Path(args.reference).name, shares(args, state, reference["images"], "reference", *sides(dataset.image_size))
    else:
        key, source = data_key(data), (to_uint8(images) for images, _ in batches(args, state, dataset, "originals"))
    if key not in known:
        rows, known[key] = collect(state, [inception_features(networks["inception"], images)[0] for images in source]), {}
        if rows is not None:
            known[key] = {"pool": statistics(rows[:, :FEATURES]), "spatial": statistics(rows[:, FEATURES:]),
                          "features": rows[:, :FEATURES].clone(), "from": key if "images" in reference else args.split}
    found = known[key]
    if reference and "images" not in reference:  # the split's images are neighbours, and not the reference
        found = {name: found[name] for name in ("features", "from") if name in found}
    return found | stored


def batches(args: argparse.Namespace, state: Accelerator, dataset: ImageDataset, what: str) -> Iterable[tuple[Tensor, Tensor]]:
    """This process's share of the images, each once."""
    count = min(args.images or len(dataset), len(dataset))
    if count < state.num_processes:
        raise UserError(f"{count} images are too few for {state.num_processes} processes")
    loader = eval_loader(dataset, args.batch_size, args.images, args.num_workers, state.process_index, state.num_processes, state.device)
    return progress(state, loader, what, -(-len(range(state.process_index, count, state.num_processes)) // args.batch_size))


def progress(state: Accelerator, source: Iterable, what: str, total: int | None = None) -> Iterable:
    return tqdm(source, what, total, disable=not state.is_main_process, dynamic_ncols=True)


def collect(state: Accelerator, batches: list[Tensor]) -> Tensor | None:
    """The rows of all processes on the first one, in the order of the images; None if there are none, and on the others."""
    rows = torch.cat(batches) if batches else None
    shares = [rows]
    if state.num_processes > 1:
        shares = [None] * state.num_processes if state.is_main_process else None
        torch.distributed.gather_object(rows, shares)
    if not state.is_main_process or shares[0] is None:
        return None
    shares = [share for share in shares if share is not None]  # fewer images than processes
    together = shares[0].new_empty(sum(map(len, shares)), *shares[0].shape[1:])
    for rank, share in enumerate(shares):
        together[rank::len(shares)] = share
    return together


LABELS = {  # and the format; those with "+" come with their spread
    "dataset": ("data", "s"), "images": ("images", "s"), "reference": ("reference of FID", "s"), "psnr": ("PSNR (dB)", ".2f"),
    "ssim": ("SSIM", ".4f"), "lpips": ("LPIPS", ".4f"), "rfid": ("rFID", ".2f"), "rsfid": ("rsFID", ".2f"),
    "usage": ("codes in use", ".1%"), f"usage_{QUEUE}": (f"... of {QUEUE:,} codes", ".1%"), "perplexity": ("perplexity", ".1f"),
    "codes": ("codes per image", "+.1f"), "bits": ("bits per image", "+.1f"), "bits_per_pixel": ("bits per pixel", ".4f"),
    "kept_ratio": ("kept cells", ".1%"), "ratio_1": ("granularity 1", "+.1%"), "ratio_2": ("granularity 2", "+.1%"),
    "detail": ("codes on detail", ".1%"), "shared": ("places shared", ".1%"),
    "samples": ("samples", "d"), "real_images": ("real images", "s"),
    "fid": ("FID", ".2f"), "sfid": ("sFID", ".2f"), "is": ("Inception Score", "+.2f"), "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"), "images_per_second": ("sampled images/s", ".2f"),
}


def table(results: dict[str, dict], names: dict[str, str], markdown: bool = False) -> str:
    """The results {run: metrics}: a column for each run, or in Markdown a row."""
    def cell(metrics: dict, key: str) -> str:
        form = LABELS[key][1]
        if key not in metrics:
            return "-"
        spread = f" ± {metrics[f'{key}_std']:{form[1:]}}" if form.startswith("+") and metrics[f"{key}_std"] else ""
        return f"{metrics[key]:{form.removeprefix('+')}}{spread}"

    for run, r in results.items():
        more = {"real_images": f"{r['real_images']} from {r['real_images_from']}"} if "real_images" in r else {}
        more |= {"dataset": f"{r['dataset']} {r['split']}", "images": f"{r['images']} of {r['images_in_split']}"}
        results = results | {run: r | more}
    keys = [k for k in LABELS if any(k in r for r in results.values())]
    rows = [["run", "model", *(LABELS[k][0] for k in keys)]]
    rows += [[Path(run).name, names[run], *(cell(r, k) for k in keys)] for run, r in results.items()]
    if markdown:
        return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])
    widths = [max(map(len, row)) for row in rows]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(line, widths)).rstrip() for line in zip(*rows))


if __name__ == "__main__":
    run_main(main)
