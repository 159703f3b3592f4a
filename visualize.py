"""Pictures of what the models do, for a paper or for finding out what is wrong: PNG files, and a page to explore the codes with.

    python visualize.py recon --run A [--run B ...] [-n 6]           images, reconstructions, where the errors are
    python visualize.py codes --run R [-n 8] [--images 1000]         where a stage-1 model spends its codes
    python visualize.py codebook --run R [--history]                 how often codes are used, their norms and gradients; over training
    python visualize.py sequence --run R2 [--seed 0] [--class C]     how images grow as a stage-2 model generates their codes; also a GIF
    python visualize.py rate --run A [--run B ...]                   quality against bits per pixel, a point for each run
    python visualize.py interactive --run R [-n 16]                  one HTML file that needs no server: point at a cell, see its code

--out is RUN/figures/COMMAND.png (or .html) unless given, of the first run if there are several. The images are from the validation split
of what the (first) run was trained on; other ones by --split train and by data.root=... and its like. PSNR, SSIM and errors are of 8-bit
images, as files would be. The heat maps over training need a run with train.codebook_stats_every=N.

In `sequence`, a VQGAN's or DQ-VAE's picture is grey at cells that have no code yet, and so are regions of a DQ-VAE that wait for their
fine codes. The decoder was given a code for these cells all the same, the one nearest to the mean of all codes, which their neighbours may
feel. An MQ-VAE is decoded from its codes so far alone: its de-mask fills the other cells, as it does when all codes are there.
"""

import argparse
import base64
import html
import io
import json
import math
import zipfile
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dataset import ImageDataset, eval_loader, to_uint8
from evaluate import compare, spent
from experiment import STAGE1, UserError, load_run, own_folder, run_config, run_dataset, run_main
from losses import load_lpips
from sample import check, chosen_labels, generators, load_models
from train_stage2 import sampling_arguments

matplotlib.use("Agg")
matplotlib.rcParams |= {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "figure.titlesize": 9, "figure.facecolor": "white",
                        "axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = {"vqgan": "VQGAN", "vqvae": "VQ-VAE", "mqvae": "MQ-VAE", "dqvae": "DQ-VAE",
         "gpt": "GPT", "stackformer": "Stackformer", "dq_transformer": "DQ-Transformer"}
GRAINS = {1: [""], 2: ["coarse", "fine"], 3: ["coarse", "medium", "fine"]}
COLOUR_NAMES = {2: ["blue", "red"], 3: ["blue", "yellow", "red"]}  # of dqvae.COLOURS, in the maps of granularity
GREY = 0.0  # of what has no code, in images in [-1, 1]
GRADIENT_IMAGES = 64  # their vectors are held in memory all at once


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(draw, several=False, data=True, images=False, n=None, suffix=".png"):
        sub = commands.add_parser(draw.__name__, help=draw.__doc__.splitlines()[0])
        sub.set_defaults(draw=draw, suffix=suffix)
        sub.add_argument("--run", required=True, action="append" if several else "store",
                         help="a run folder" + ("; several times for a comparison" if several else ""))
        sub.add_argument("--which", choices=("latest", "best"), default="latest", help="which of the run's weights")
        sub.add_argument("--out", help=f"a file (default: RUN/figures/{draw.__name__}{suffix})")
        if suffix == ".png":
            sub.add_argument("--dpi", type=int, default=150, help="pixels per inch (default 150)")
        if n:
            sub.add_argument("-n", type=int, default=n, help=f"how many images (default {n})")
        if images:
            sub.add_argument("--images", type=int, default=1000, help="how many for the statistics, at most (default 1000)")
        if data:
            sub.add_argument("--split", choices=("train", "val"), default="val")
            sub.add_argument("overrides", nargs="*", metavar="data.key=value", help="other images than those the run was trained on")
        return sub

    command(recon, several=True, n=6)
    command(codes, images=True, n=8)
    command(codebook, images=True).add_argument("--history", action="store_true", help="not without the record over training")
    sub = command(sequence, data=False, n=4)
    sub.add_argument("--seed", type=int, default=0, help="image i of a seed is that of sample.py")
    sub.add_argument("--class", dest="classes", help="class numbers or names, with commas (default: all, in turn)")
    command(rate, several=True, images=True)
    command(interactive, n=16, suffix=".html")

    args, rest = parser.parse_known_args(argv)  # overrides may stand before and after the options
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") or "=" not in word for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    if min(getattr(args, key, 1) for key in ("n", "images", "dpi")) < 1 or not 0 <= getattr(args, "seed", 0) < 2**32:
        raise UserError("-n, --images and --dpi must be at least 1, and --seed between 0 and 2^32 - 1")
    first = args.run[0] if isinstance(args.run, list) else args.run
    if not args.out:
        args.out = own_folder(Path(first), "figures", "figures/*") / "figures" / (args.command + args.suffix)
    args.out = Path(args.out).expanduser()
    if args.out.suffix != args.suffix:
        raise UserError(f"--out must end in {args.suffix}; it is {args.out}")
    args.draw(args)


# ---------------------------------------------------------------------------------------------------------------------
# Reconstructions


@torch.no_grad()
def recon(args: argparse.Namespace) -> None:
    """originals, reconstructions and errors of one or several stage-1 runs"""
    loaded, dataset = load_several(args)
    images = take(dataset, spread(args.n, len(dataset)))
    outs = [model(images) for model, _ in loaded]
    errors = [error_map(images, out.images) for out in outs]
    top = max(e.flatten().quantile(0.995).item() for e in errors)  # a few pixels must not darken all others
    figure, axes = tiles(1 + 2 * len(loaded), len(images))
    row(axes[0], images, "original")
    for i, ((model, config), out, error, name) in enumerate(zip(loaded, outs, errors, distinct(args.run))):
        psnr = compare(to_uint8(images), to_uint8(out.images))["psnr"]
        bits = model.bits(out.codes).mean().item() / images[0, 0].numel()
        row(axes[1 + 2 * i], out.images, f"{name}\n{NAMES[config['model']['name']]}\n{bits:.3g} bits/pixel\n{psnr.mean():.2f} dB",
            titles=[f"{p:.1f} dB" for p in psnr])
        row(axes[2 + 2 * i], error, "absolute error", bar=dict(label="mean of RGB,\nof 255", extend="max"), cmap="magma", vmin=0, vmax=top)
    figure.suptitle(f"Reconstructions of {len(images)} images with their PSNR (at the left: means over these images), and errors")
    save(figure, args)


def error_map(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean over the channels of the absolute error (B, H, W), in levels of 255, of images (B, 3, H, W) in [-1, 1]."""
    return (to_uint8(images).float() - to_uint8(reconstructions).float()).abs().mean(1)


@torch.no_grad()
def rate(args: argparse.Namespace) -> None:
    """PSNR, SSIM and LPIPS against bits per pixel, a point for each stage-1 run"""
    loaded, dataset = load_several(args)
    path = Path(torch.hub.get_dir()) / "checkpoints/vgg16-397923af.pth"
    lpips = load_lpips().to(DEVICE) if path.is_file() else None
    if lpips is None:
        print(f"without LPIPS, which needs VGG-16's weights: {path} (download.pytorch.org/models)")
    points = {}
    for (model, config), name in zip(loaded, distinct(args.run)):
        each = []
        for images in batches(dataset, args.images, name):
            found = model.encode(images)
            values = compare(to_uint8(images), to_uint8(model.decode(found)), lpips)
            each.append(torch.stack([model.bits(found) / images[0, 0].numel(), *values.values()]).double().cpu())
        points[name] = torch.cat(each, dim=1).mean(1).tolist()
        print(f"{name} ({NAMES[config['model']['name']]}): {points[name][0]:.3g} bits per pixel, "
              + ", ".join(f"{key} {value:.4g}" for key, value in zip(values, points[name][1:])))
    figure, axes = plt.subplots(1, len(values), figsize=(2.8 * len(values), 2.9), squeeze=False)
    labels = {"psnr": "PSNR (dB), higher is better", "ssim": "SSIM, higher is better", "lpips": "LPIPS (VGG), lower is better"}
    for i, (ax, key) in enumerate(zip(axes[0], values)):
        for j, (name, point) in enumerate(points.items()):
            ax.plot(point[0], point[1 + i], "osD^vP*X"[j % 8], color=f"C{j % 10}", markersize=7, label=name if i == 0 else None)
        ax.margins(0.12)
        ax.set(xlabel="bits per pixel", ylabel=labels[key])
        ax.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(len(points), 2 * len(values)), frameon=False)
    figure.suptitle(f"Rate and distortion, means over {min(args.images, len(dataset))} images ({args.split})")
    save(figure, args)


# ---------------------------------------------------------------------------------------------------------------------
# Codes


@torch.no_grad()
def codes(args: argparse.Namespace) -> None:
    """where a stage-1 run spends its codes: kept cells, granularities, or the codes themselves"""
    model, config, dataset = load_one(args)
    name = f"{distinct([args.run])[0]} ({NAMES[config['model']['name']]})"
    if not hasattr(model, "grains"):
        images = take(dataset, spread(args.n, len(dataset)))
        out = model(images)
        figure, axes = tiles(4 if "score_map" in out.info else 3, len(images))
        row(axes[0], images, "original")
        if "score_map" in out.info:
            row(axes[1], out.info["score_map"][:, 0] / 2 + 0.5, "score", bar=dict(label="0: image's lowest,\n1: its highest"),
                cmap="viridis", vmin=0, vmax=1)
            row(axes[2], out.info["kept_map"], f"kept cells\n{out.codes['indices'].shape[1]} of {model.grid**2}")
            figure.suptitle(f"What {name} keeps")
        else:
            row(axes[1], code_colours(model, out.codes["indices"]), "codes\nsimilar colours:\nsimilar vectors")
            figure.suptitle(f"The codes of {name}, {out.codes['indices'][0].numel()} per image")
        row(axes[-1], out.images, "reconstruction")
        save(figure, args)
        return

    counts = torch.cat([count_codes(model, model.encode(images)).cpu() for images in batches(dataset, args.images, "codes")])
    picked = examples(counts, args.n)
    images = take(dataset, [spread(args.images, len(dataset))[i] for i in picked])
    out, entropy, words = model(images), model.entropy(images), GRAINS[model.grains]
    figure = plt.figure(figsize=(1.2 * len(images) + 2.2, 4 * 1.25 + 2.4))
    above, below = figure.subfigures(2, 1, height_ratios=[4 * 1.25 + 0.4, 2])
    axes = above.subplots(4, len(images), squeeze=False)
    row(axes[0], images, "original", titles=[f"{counts[i]} codes" for i in picked])
    row(axes[1], out.info["grain_map"],
        "granularity\n" + "\n".join(f"{colour}: {word}" for colour, word in zip(COLOUR_NAMES[model.grains], words)))
    row(axes[2], entropy, "entropy of\nthe grey values", bar=dict(label="nats"), cmap="viridis", vmin=0, vmax=entropy.max().item())
    row(axes[3], out.images, "reconstruction")
    above.suptitle(f"Where {name} spends its codes: examples from the fewest codes to the most")
    ax = below.subplots()
    low, high = counts.min().item(), counts.max().item()
    width = 3 * math.ceil((high - low + 1) / 180)  # a region that is finer has 3 codes more, or a multiple
    ax.hist(counts, bins=np.arange(low - 1.5, high + width, width), color="0.6", edgecolor="white")
    ax.xaxis.get_major_locator().set_params(integer=True)
    for i in picked:
        ax.axvline(counts[i], color="C3", linewidth=0.8, linestyle=":")
    regions, finest = out.codes["grain"][0].numel(), out.codes["indices"][0].numel()
    ax.set(xlabel=f"codes per image (possible: {regions} to {finest}; dotted: the examples above)", ylabel="images",
           title=f"Code length of {len(counts)} images ({args.split}): {counts.float().mean():.1f} codes on average")
    save(figure, args)


def examples(counts: Tensor, n: int) -> list[int]:
    """Images (at most n) from the fewest codes to the most, evenly spread over the sorted counts (N,)."""
    n = min(n, len(counts))
    return counts.argsort(stable=True)[torch.linspace(0, len(counts) - 1, n).round().long()].tolist()


def count_codes(model: torch.nn.Module, codes: dict[str, Tensor]) -> Tensor:
    """Codes per image (B,)."""
    return spent(model, codes).flatten(1).sum(1)


def code_colours(model: torch.nn.Module, indices: Tensor) -> Tensor:
    """Colours (..., 3, h, w) in [-1, 1] of codes (..., h, w): the ranks of the code's first three principal components."""
    vectors = model.quantizer.lookup(torch.arange(model.quantizer.codebook_size, device=indices.device))
    vectors = vectors - vectors.mean(0)
    ranks = (vectors @ torch.linalg.svd(vectors, full_matrices=False).Vh[:3].T).argsort(0).argsort(0)   # (K, up to 3)
    colours = F.pad(ranks / max(1, len(ranks) - 1) * 1.8 - 0.9, (0, 3 - ranks.shape[1]))
    return colours[indices].movedim(-1, -3)


# ---------------------------------------------------------------------------------------------------------------------
# Codebook


@torch.no_grad()
def codebook(args: argparse.Namespace) -> None:
    """a stage-1 run's codes: usage, norms, norms of their gradients; and these over training"""
    model, config, dataset = load_one(args)
    history = read_history(Path(args.run))
    missing = f"{args.run} has no record of its codebook over training; train with train.codebook_stats_every=100 to have one"
    if history is None and args.history:
        raise UserError(missing)
    K, uses = model.quantizer.codebook_size, 0
    for images in batches(dataset, args.images, "usage"):
        found = model.encode(images)
        uses = uses + torch.bincount(found["indices"][spent(model, found)], minlength=K).cpu()
    norms, gradients = model.quantizer.codebook.float().norm(dim=1).cpu().numpy(), gradient_norms(model, dataset)

    figure, axes = plt.subplots(2 if history else 1, 3, figsize=(9.5, 5.6 if history else 2.9), squeeze=False)
    ranked, used = uses.sort(descending=True).values, int((uses > 0).sum())
    ax = axes[0, 0]
    ax.fill_between(range(used + 1), ranked[[*range(used), used - 1]], step="post", color="C0", alpha=0.6)
    ax.set_yscale("log")
    ax.set(xlim=(0, K), ylim=(0.7, None), xlabel="codes, by usage", ylabel=f"times used in {min(args.images, len(dataset))} images",
           title=f"Usage: {K - used} of {K} codes are never used")
    if used < K:
        ax.axvspan(used, K, color="0.9", zorder=0)
    margin = 0.01 * norms.max()  # unit vectors differ by rounding alone
    axes[0, 1].hist(norms, bins=50, range=(norms.min() - margin, norms.max() + margin), color="C0", alpha=0.6, log=True)
    axes[0, 1].set(ylim=(0.7, None), xlabel="norm of the code", ylabel="codes", title="Norms of the codes")
    side, ax, some = math.ceil(math.sqrt(K)), axes[0, 2], gradients[gradients > 0]
    square = torch.full((side**2,), math.nan).index_copy(0, torch.arange(K), gradients).view(side, side)
    ax.imshow(np.where(square.isnan(), 1.0, 0.8), cmap="gray", vmin=0, vmax=1)  # beyond the last code; below all scales
    shown = ax.imshow(square.where(square > 0, math.nan), cmap="viridis", interpolation="nearest",
                      norm=LogNorm(*log_range(some.min().item(), some.max().item())))
    figure.colorbar(shown, ax=ax, label="norm of the gradient")
    ax.spines[:].set_visible(False)
    ax.set(xticks=[], yticks=[], xlabel=f"one pixel per code, row by row\n(grey: no gradient, {K - len(some)} codes)",
           title="Gradients of the codebook loss")
    if history is None:
        print(missing)
    else:
        steps = history["steps"]
        for ax, (key, log, title) in zip(axes[1], [("uses", True, "times used, of the last codes"), ("norms", False, "norm of the code"),
                                                   ("gradient_norms", True, "norm of the gradient")]):
            edges, shares = heat_map(history[key], log)
            middle = (steps[1:] + steps[:-1]) / 2 if len(steps) > 1 else np.array([])
            times = np.concatenate([[steps[0] - (middle[0] - steps[0] if len(middle) else 0.5)], middle,
                                    [steps[-1] + (steps[-1] - middle[-1] if len(middle) else 0.5)]])
            shown = ax.pcolormesh(times, edges, np.ma.masked_equal(shares, 0), cmap="viridis", norm=LogNorm(1 / K, 1), rasterized=True)
            if log:
                decades = np.arange(edges[1], edges[-1] + 1e-6, max(1, math.ceil((edges[-1] - edges[1]) / 5)))
                ax.set_yticks([edges[:2].mean(), *decades], ["0", *(f"$10^{{{d:.0f}}}$" for d in decades)])
                ax.axhline(edges[1], color="black", linewidth=0.5)
            ax.set(xlabel="step", ylabel=title, title=f"{title.split(',')[0].capitalize()} over training")
        figure.colorbar(shown, ax=axes[1], label="share of the codes", pad=0.01)
    figure.suptitle(f"The codebook of {distinct([args.run])[0]} ({NAMES[config['model']['name']]}): {K} codes of dimension "
                    f"{model.quantizer.dim}")
    save(figure, args)


@torch.no_grad()
def gradient_norms(model: torch.nn.Module, dataset: ImageDataset) -> Tensor:
    """Of the mean codebook loss over GRADIENT_IMAGES images, at each code, (K,)."""
    caught = []
    hook = model.quantizer.register_forward_hook(lambda _, given, returned: caught.append((given[0], returned[1], *given[1:2])))
    for images in batches(dataset, GRADIENT_IMAGES, "gradients"):
        model(images)
    hook.remove()
    return model.quantizer.gradient_norms(*(torch.cat(tensors) for tensors in zip(*caught))).cpu()


def read_history(run: Path) -> dict[str, np.ndarray] | None:
    """The record of a codebook over training: `steps` (T,), and `uses`, `norms`, `gradient_norms` (T, K), in order of step."""
    files = sorted((run / "codebook").glob("step_*.npz"))
    history = {"steps": np.array([int(path.stem.removeprefix("step_")) for path in files])}
    for key in ("uses", "norms", "gradient_norms"):
        rows = []
        for path in files:
            try:
                with np.load(path) as record:
                    rows.append(np.nan_to_num(record[key].astype(np.float64)))
            except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
                raise UserError(f"{path} is not a whole record of a codebook; remove it") from None
        history[key] = np.array(rows)
    return history if files else None


def heat_map(values: np.ndarray, log: bool, bins: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Values (T, K) to the edges of bins (B + 1,) and the share of each row's values in them (B, T). Where `log`, edges are
    log10, between whole powers, and the first bin is for zeros."""
    if log:
        positive = values[values > 0]
        low, high = np.log10(log_range(positive.min(initial=np.inf), positive.max(initial=0)))
        low, high = math.floor(low + 1e-9), math.ceil(high - 1e-9)
        zero = low - (high - low) / 8
        edges = np.array([zero, *np.linspace(low, high, bins)])
        values = np.log10(np.where(values > 0, values, 10 ** ((zero + low) / 2)))
    else:
        low, high = values.min(), values.max()
        edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    return edges, np.stack([np.histogram(row.clip(edges[0], edges[-1]), edges)[0] / len(row) for row in values], axis=1)


def log_range(low: float, high: float) -> tuple[float, float]:
    """Limits of a logarithmic axis, a proper range also if there is one value or none."""
    return (low, high) if 0 < low < high else (high / 10, high * 10) if high > 0 else (0.1, 10)


# ---------------------------------------------------------------------------------------------------------------------
# Sequence


@torch.no_grad()
def sequence(args: argparse.Namespace) -> None:
    """how images grow as a stage-2 run generates their codes, as a strip of frames and as GIF"""
    name = run_config(args.run)["model"]["name"]
    if name in STAGE1:
        raise UserError(f"{args.run} holds a stage-1 model ({name}), which generates nothing; give the run folder of a stage-2 one, or see "
                        "this one's codes by `visualize.py codes`")
    model, stage1, config, classes = load_models(args.run, args.which)
    model, stage1 = model.to(DEVICE), stage1.to(DEVICE)
    if args.classes and not model.num_classes:
        raise UserError(f"--class was given, but the model of {args.run} is unconditional")
    labels = chosen_labels(args.classes, classes, args.n) if model.num_classes else None
    settings = sampling_arguments(type(model), dict(config["sample"]))
    check(model, settings, labels)
    settings.pop("fine_positions", None)  # filled, in the order in which `order` finds them again
    drawn = model.sample(args.n, labels, generator=generators(args.seed, range(args.n)), **settings)
    ranks, counts = code_ranks(model, drawn)
    G, total = counts.shape[1], counts.sum(1)

    # So many stages of each granularity in the strip, and in the GIF four times as many
    stages, frames = round(8 / G), []
    for i in tqdm(range(1, 4 * stages * G + 1), "frames"):
        done = codes_done(counts, i / stages / 4)
        images = partial_images(stage1, drawn, ranks, done)
        scale = max(1, 128 // images.shape[-1])
        images = to_uint8(F.interpolate(images, scale_factor=scale)).permute(0, 2, 3, 1).cpu().numpy()
        maps = [cell_map(r, d, t, images.shape[1]) for r, d, t in zip(ranks.cpu(), done.tolist(), total.tolist())]
        frames.append((images, maps, done.tolist()))

    strip = frames[3::4]
    figure, axes = tiles(2 * args.n, len(strip), height=1.32)
    for column, (images, maps, done) in enumerate(strip):
        share = (column % stages + 1) / stages
        word = f"{share:.0%} of the codes" if G == 1 else f"{GRAINS[G][column // stages]}: {share:.0%}"
        for i in range(args.n):
            tile(axes[2 * i, column], images[i], word if i == 0 else "")
            tile(axes[2 * i + 1, column], maps[i]).axes.set_xlabel(f"{done[i]} codes")
    for i in range(args.n):
        axes[2 * i, 0].set_ylabel(classes[labels[i]] if labels is not None else f"image {i}", rotation=0, ha="right", va="center")
    bar = figure.colorbar(matplotlib.cm.ScalarMappable(cmap="viridis"), ax=axes, pad=0.01, shrink=0.6, aspect=30, ticks=[0, 1],
                          label="order of generation")
    bar.ax.set_yticklabels(["first", "last"])
    grey = "grey: no code yet" if "positions" not in drawn else "cells without a code are filled by the de-mask"
    figure.suptitle(f"How {NAMES[name]} ({distinct([args.run])[0]}) generates, and which cells have their codes; {grey}")
    save(figure, args)
    pages = [Image.fromarray(np.concatenate([np.concatenate(np.pad(pair, ((0, 0), (4, 4), (4, 4), (0, 0)), constant_values=255))
                                             for pair in zip(images, maps)], axis=1)) for images, maps, _ in frames]
    gif = args.out.with_suffix(".gif")
    pages[0].save(gif, save_all=True, append_images=pages[1:], duration=[120] * (len(pages) - 1) + [2500], loop=0)
    print(gif)


def code_ranks(model: torch.nn.Module, codes: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Which of its image's codes, in the order that the model generates them in, each cell of the finest grid gets, (n, h, w), -1 for
    none; and how many codes of each granularity there are (n, G)."""
    if "grain" in codes:
        tokens = model.order(codes)
        number = (model.slot_kind[tokens.slot] == 1).cumsum(1) - 1
        return model.unorder(tokens._replace(content=number))["indices"], tokens.counts
    n, length = codes["indices"].flatten(1).shape
    ranks = torch.arange(length, device=codes["indices"].device).expand(n, -1)
    if "positions" in codes:
        ranks = torch.full_like(ranks[:, :1], -1).repeat(1, model.grid**2).scatter(1, codes["positions"], ranks)
    return ranks.reshape(n, model.grid, model.grid), torch.full_like(ranks[:, :1], length)


def codes_done(counts: Tensor, u: float) -> Tensor:
    """Codes (n,) at time u: at 1 all of the first granularity are there, at 2 those of the second; counts (n, G)."""
    g = min(int(u), counts.shape[1] - 1)
    return counts[:, :g].sum(1) + (counts[:, g] * (u - g)).ceil().long()


def partial_images(stage1: torch.nn.Module, codes: dict[str, Tensor], ranks: Tensor, done: Tensor) -> Tensor:
    """Images (n, 3, H, W) of the first `done` (n,) codes of each image; of MQ-VAE, the same number for all."""
    if "positions" in codes:
        return stage1.decode({key: value[:, :int(done[0])] for key, value in codes.items()})
    there = ranks < done.view(-1, 1, 1)
    placeholder = stage1.quantizer.nearest(stage1.quantizer.codebook.mean(0, keepdim=True))
    images = stage1.decode(codes | {"indices": torch.where(there, codes["indices"], placeholder)})
    return torch.where(F.interpolate(there.unsqueeze(1).float(), images.shape[-2:]) > 0, images, GREY)


def cell_map(ranks: Tensor, done: int, total: int, side: int) -> np.ndarray:
    """The cells (h, w) with a code, coloured by its rank and outlined; uint8 (side, side, 3)."""
    ranks = ranks.repeat_interleave(side // len(ranks), 0).repeat_interleave(side // len(ranks), 1).numpy()
    there = (ranks >= 0) & (ranks < done)
    colours = np.where(there[..., None], matplotlib.colormaps["viridis"](ranks / max(1, total - 1))[..., :3], 0.85)
    edge = np.zeros_like(there)
    edge[:, 1:] |= (ranks[:, 1:] != ranks[:, :-1]) & (there[:, 1:] | there[:, :-1])
    edge[1:] |= (ranks[1:] != ranks[:-1]) & (there[1:] | there[:-1])
    return (np.where(edge[..., None], 1.0, colours) * 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# A page to explore


@torch.no_grad()
def interactive(args: argparse.Namespace) -> None:
    """one HTML file with images, reconstructions and the code of every cell"""
    model, config, dataset = load_one(args)
    images = take(dataset, spread(args.n, len(dataset)))
    records = []
    for image in images.split(1):
        found = model.encode(image)
        decoded = model.decode(found)
        maps = model.maps(found, image)
        shown = next(iter(maps.values())) if maps else code_colours(model, found["indices"])
        records.append({
            "panes": [data_url(x[0]) for x in (image, decoded, shown)], "codes": {k: v[0].tolist() for k, v in found.items()},
            "count": int(count_codes(model, found)), "bits": round(model.bits(found).item(), 1),
            "psnr": round(compare(to_uint8(image), to_uint8(decoded))["psnr"].item(), 2)})
    name, kind = distinct([args.run])[0], NAMES[config["model"]["name"]]
    grid = getattr(model, "grid", None) or len(records[0]["codes"]["indices"])
    about = {"size": dataset.image_size, "grid": grid, "grains": GRAINS[getattr(model, "grains", 1)],
             "titles": ["original", "reconstruction", {"grain": "granularities", "positions": "kept cells"}.get(list(found)[-1], "codes")],
             "images": records}
    text = {"TITLE": html.escape(f"{name}: {kind}"), "K": str(model.quantizer.codebook_size),
            "DATA": json.dumps(about, separators=(",", ":")).replace("<", "\\u003c")}
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    for key, value in text.items():
        page = page.replace(f"{{{{{key}}}}}", value)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page, encoding="utf-8")
    print(args.out)


def data_url(image: Tensor) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels(image)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


# ---------------------------------------------------------------------------------------------------------------------
# What the commands share


def load_stage1(folder: str, which: str) -> tuple[torch.nn.Module, dict]:
    name = run_config(folder)["model"]["name"]
    if name not in STAGE1:
        raise UserError(f"{folder} holds a stage-2 model ({name}); give a stage-1 run, such as {folder}/stage1, or see how this one "
                        "generates by `visualize.py sequence`")
    model, config = load_run(folder, which)
    return model.to(DEVICE), config


def load_one(args: argparse.Namespace) -> tuple[torch.nn.Module, dict, ImageDataset]:
    model, config = load_stage1(args.run, args.which)
    return model, config, run_dataset(config, args.overrides, args.split, model)


def load_several(args: argparse.Namespace) -> tuple[list[tuple[torch.nn.Module, dict]], ImageDataset]:
    """[(model, config)] of the runs, and the data of the first."""
    loaded = [load_stage1(folder, args.which) for folder in args.run]
    sizes = [config["data"]["image_size"] for _, config in loaded]
    if len(set(sizes)) > 1:
        raise UserError("runs of different image sizes cannot be compared: "
                        + ", ".join(f"{folder} has {size}" for folder, size in zip(args.run, sizes)))
    return loaded, [run_dataset(loaded[0][1], args.overrides, args.split, model) for model, _ in loaded][0]


def distinct(folders: list[str]) -> list[str]:
    """A name for each run: the last part of its path, or as many parts as tell them all apart."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-n:]) for p in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def spread(n: int, total: int) -> list[int]:
    """At most n indices, as eval_loader spreads them."""
    n = min(n, total)
    return [i * total // n for i in range(n)]


def take(dataset: ImageDataset, indices: list[int]) -> Tensor:
    dataset.uint8 = False
    return torch.stack([dataset[i][0] for i in indices]).to(DEVICE)


def batches(dataset: ImageDataset, limit: int, what: str):
    """Images (16, 3, S, S), in all at most `limit`, spread over the dataset."""
    loader = eval_loader(dataset, 16, limit, num_workers=0, device=DEVICE)
    yield from (images for images, _ in tqdm(loader, what, math.ceil(min(limit, len(dataset)) / 16)))


def tiles(rows: int, columns: int, height: float = 1.25) -> tuple[plt.Figure, np.ndarray]:
    return plt.subplots(rows, columns, figsize=(1.2 * columns + 2.0, height * rows + 0.5), squeeze=False)


def row(axes: np.ndarray, images: Tensor, label: str, titles: list[str] | None = None, bar: dict | None = None, **options) -> None:
    """A row of images (n, 3, H, W) or maps (n, h, w), with its name at the left and perhaps a colour bar at the right."""
    for i, (ax, image) in enumerate(zip(axes, images)):
        shown = tile(ax, pixels(image) if image.ndim == 3 else image.cpu().numpy(), titles[i] if titles else "", **options)
    axes[0].set_ylabel(label, rotation=0, ha="right", va="center")
    if bar:
        axes[-1].figure.colorbar(shown, cax=axes[-1].inset_axes([1.06, 0, 0.07, 1]), **bar)


def tile(ax: plt.Axes, image: np.ndarray, title: str = "", **options):
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, pad=3)
    ax.spines[:].set_visible(False)
    return ax.imshow(image, interpolation="nearest", **options)


def pixels(image: Tensor) -> np.ndarray:
    """An image (3, H, W) in [-1, 1] as uint8 (H, W, 3)."""
    return to_uint8(image).permute(1, 2, 0).cpu().numpy()


def save(figure: plt.Figure, args: argparse.Namespace) -> None:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=args.dpi)
    plt.close(figure)
    print(args.out)


if __name__ == "__main__":
    run_main(main)
