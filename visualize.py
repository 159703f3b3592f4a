"""Draws what the models do: PNG files for papers and for debugging, and a page for exploring the codes.

    python visualize.py recon --run A [--run B ...] [-n 6]           originals, reconstructions, error maps
    python visualize.py codes --run R [-n 8] [--images 1000]         where a stage-1 model spends its codes
    python visualize.py codebook --run R [--history]                 usage, norms and gradients of the codes; over training
    python visualize.py sequence --run R2 [--seed 0] [--class C]     how a stage-2 model generates images, code by code or step by step;
                                                                     also a GIF
    python visualize.py rate --run A [--run B ...]                   quality against bits per pixel: a point for each run, a curve for those
                                                                     that were trained for a range of rates
    python visualize.py ladder --run R [-n 4]                        images at five rates of such a run, with bits and PSNR
    python visualize.py interactive --run R [-n 16]                  one HTML file, no server: point at a cell, see its code

The file is RUN/figures/COMMAND.png (or .html), in the first run, unless --out is given. Images come from the validation split of the
first run's data; --split train and data.root=... select others. PSNR, SSIM and errors are of 8-bit images. Heat maps over training need a
run with train.codebook_stats_every=N. Stage-1 models compute in float32, `sequence` in the run's precision, as sample.py.

In `sequence`, cells that have no code yet are grey. The decoder gets a placeholder there, the code nearest to the codebook's mean, which
can affect neighbouring cells. An MQ-VAE's images have no grey: its de-mask fills the other cells, as always.
"""

import argparse
import base64
import html
import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import openmp  # noqa: F401, before torch
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from config import UserError
from dataset import ImageDataset, to_uint8
from evaluate import compare
from experiment import own_folder, set_rate
from figures import DEVICE, NAMES, batches, distinct, load, pixels, pyplot, row, save, tiles
from gpt import sides
from hub import run_folder
from launch import run_main
from log import printable
from losses import load_lpips
from mask_transformer import MaskTransformer
from quantizers import gradient_norms
from sample import GRAINS, chosen_labels, generators, load_models, sampling_arguments

LEGENDS = {2: "blue: coarse\nred: fine", 3: "blue: coarse\nyellow: medium\nred: fine"}  # of dqvae.COLOURS
GREY = 0.0  # for cells without a code, in images in [-1, 1]


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(draw, several=False, data=True, images=False, n=None, suffix=".png"):
        sub = commands.add_parser(draw.__name__, help=draw.__doc__.splitlines()[0])
        sub.set_defaults(draw=draw, suffix=suffix)
        sub.add_argument("--run", required=True, type=run_folder, **({"action": "append"} if several else {"nargs": 1}),
                         help="a run folder" + ("; several times for a comparison" if several else ""))
        sub.add_argument("--which", choices=("latest", "best"), default="latest", help="which of the run's weights")
        sub.add_argument("--out", help=f"a file (default: RUN/figures/{draw.__name__}{suffix})")
        if suffix == ".png":
            sub.add_argument("--dpi", type=int, default=150, help="pixels per inch (default 150)")
        if n:
            sub.add_argument("-n", type=int, default=n, help=f"how many images (default {n})")
        if images:
            sub.add_argument("--images", type=int, default=1000, help="at most this many images for the statistics (default 1000)")
        if data:
            sub.add_argument("--split", choices=("train", "val"), default="val")
            sub.add_argument("overrides", nargs="*", metavar="data.key=value", help="draw other images than the run's")
        return sub

    command(recon, several=True, n=6)
    command(codes, images=True, n=8)
    command(codebook, images=True).add_argument("--history", action="store_true", help="fail if there is no record over training")
    sub = command(sequence, data=False, n=4)
    sub.add_argument("--seed", type=int, default=0, help="image i is image i of sample.py with this seed")
    sub.add_argument("--classes", "--class", dest="classes", help="class numbers or names, separated by commas (default: all, in turn)")
    command(rate, several=True, images=True)
    command(ladder, n=4)
    command(interactive, n=16, suffix=".html")

    args, rest = parser.parse_known_args(argv)  # overrides may stand before and after the options
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") or "=" not in word for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.overrides = getattr(args, "overrides", []) + rest
    if min(getattr(args, key, 1) for key in ("n", "images", "dpi")) < 1 or not 0 <= getattr(args, "seed", 0) < 2**32:
        raise UserError("-n, --images and --dpi must be at least 1, and --seed between 0 and 2^32 - 1")
    out = args.out or own_folder(Path(args.run[0]), "figures", "figures/*") / "figures" / (args.command + args.suffix)
    args.out = Path(out).expanduser()
    if args.out.suffix != args.suffix:
        raise UserError(f"--out must end in {args.suffix}; it is {args.out}")
    args.draw(args)


def recon(args: argparse.Namespace) -> None:
    """originals, reconstructions and errors of one or several stage-1 runs"""
    runs, dataset = load(args)
    images = torch.cat([*batches(dataset, args.n, "images")])
    outs = [model(images) for model, _, _ in runs]
    errors = [error_map(images, out.images) for out in outs]
    top = max(e.flatten().kthvalue(math.ceil(0.995 * e.numel())).values.item() for e in errors)  # outliers must not darken the maps
    figure, axes = tiles(1 + 2 * len(runs), len(images), images)
    row(axes[0], pixels(images), "original")
    for (model, name, kind), out, error, (upper, lower) in zip(runs, outs, errors, axes[1:].reshape(len(runs), 2, -1)):
        psnr = compare(to_uint8(images), to_uint8(out.images))["psnr"]
        bits = model.bits(out.codes).mean().item() / images[0, 0].numel()
        row(upper, pixels(out.images), f"{name}\n{kind}\n{bits:.3g} bits/pixel\n{psnr.mean():.2f} dB", titles=[f"{p:.1f} dB" for p in psnr])
        row(lower, error.cpu(), "absolute error", bar=dict(label="mean of RGB,\nof 255", extend="max"), cmap="magma", vmin=0, vmax=top)
    save(figure, args, f"Reconstructions of {len(images)} images with their PSNR (at the left: means over these images), and errors")


def error_map(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Absolute error (B, H, W), mean over the channels, in levels of 255, of images (B, 3, H, W) in [-1, 1]."""
    return (to_uint8(images).float() - to_uint8(reconstructions).float()).abs().mean(1)


def rate(args: argparse.Namespace) -> None:
    """PSNR, SSIM and LPIPS against bits per pixel, a point or a curve for each stage-1 run"""
    runs, dataset = load(args)
    path = Path(torch.hub.get_dir()) / "checkpoints/vgg16-397923af.pth"
    lpips = load_lpips().to(DEVICE) if path.is_file() else None
    if lpips is None:
        print(f"without LPIPS, which needs VGG-16's weights: {path} (download.pytorch.org/models)")
    curves = {}  # of each run, points (bits per pixel, metric, ...)
    for model, name, kind in runs:
        curves[name] = []
        for step in steps(model):
            each = []
            for images in batches(dataset, args.images, name):
                found = model.encode(images)
                values = compare(to_uint8(images), to_uint8(model.decode(found)), lpips)
                each.append(torch.stack([model.bits(found) / images[0, 0].numel(), *values.values()]).double().cpu())  # (metrics, B)
            curves[name].append(torch.cat(each, dim=1).mean(1).tolist())
            print(f"{name} ({kind}){'' if step is None else f' at {step:.2g}'}: {curves[name][-1][0]:.3g} bits per pixel, "
                  + ", ".join(f"{key} {value:.4g}" for key, value in zip(values, curves[name][-1][1:])))
    figure, axes = pyplot().subplots(1, len(values), figsize=(2.8 * len(values), 2.9), squeeze=False)
    labels = {"psnr": "PSNR (dB), higher is better", "ssim": "SSIM, higher is better", "lpips": "LPIPS (VGG), lower is better"}
    for i, (ax, key) in enumerate(zip(axes[0], values)):
        for j, (name, points) in enumerate(curves.items()):
            bits, *metrics = zip(*points)
            ax.plot(bits, metrics[i], "osD^vP*X"[j % 8], color=f"C{j % 10}", markersize=5 if len(points) > 1 else 7, linewidth=1,
                    label=name if i == 0 else None)
        ax.set(xmargin=0.12, ymargin=0.12, xlabel="bits per pixel", ylabel=labels[key])
        ax.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(len(curves), 2 * len(values)), frameon=False)
    save(figure, args, f"Rate and distortion, means over {min(args.images, len(dataset))} images ({args.split})")


def steps(model: torch.nn.Module):
    """Sets a model to five rates of the range that it was trained for, one after the other, or to None, its only rate."""
    rates = np.linspace(*model.rate_range, 5).tolist() if model.rate_range else [None]
    for rate in rates:
        if rate is not None:
            set_rate(model, round(rate, 6))
        yield rate


def ladder(args: argparse.Namespace) -> None:
    """images at five rates of a stage-1 run that was trained for a range, under their maps"""
    [(model, name, kind)], dataset = load(args)
    if model.rate_range is None:
        raise UserError(f"{args.run[0]} was trained for one rate; ladder needs a range, such as model.topk_ratio=[0.1,0.9] for an MQ-VAE")
    images = torch.cat([*batches(dataset, args.n, "images")])
    figure, axes = tiles(2 * len(images), 6, images, height=1.32)
    axes = axes.reshape(len(images), 2, 6)
    for pair, image in zip(axes, images):
        row(pair[1, :1], pixels(image.unsqueeze(0)), "original")
        pair[0, 0].axis("off")
    for column, step in enumerate(steps(model), 1):
        outs = [model(image) for image in images.split(1)]  # one by one: bits are means over a batch
        for i, (pair, image, out) in enumerate(zip(axes, images.split(1), outs)):
            psnr = compare(to_uint8(image), to_uint8(out.images))["psnr"].item()
            (shown,) = [v for k, v in out.info.items() if k in ("kept_map", "grain_map")]
            row(pair[0, column:column + 1], pixels(shown), "", titles=["" if i else f"{step:.0%}"])
            row(pair[1, column:column + 1], pixels(out.images), "", titles=[f"{out.info['bits']:.0f} bits, {psnr:.1f} dB"])
    what = "regions refined" if "grain" in model.code_names else "cells kept"
    save(figure, args, f"{name} ({kind}) at five rates: share of {what} (maps above, reconstructions below)")


def codes(args: argparse.Namespace) -> None:
    """where a stage-1 run spends its codes: kept cells, granularities, or the codes themselves"""
    [(model, name, kind)], dataset = load(args)
    if "grain" in model.code_names:
        return save(draw_grains(args, model, dataset, f"{name} ({kind})"), args)
    images = torch.cat([*batches(dataset, args.n, "images")])
    out = model(images)
    number, scored = out.codes["indices"][0].numel(), "score_map" in out.info
    figure, axes = tiles(4 if scored else 3, len(images), images)
    row(axes[0], pixels(images), "original")
    if scored:
        row(axes[1], out.info["score_map"][:, 0].cpu() / 2 + 0.5, "score", bar=dict(label="0: image's lowest,\n1: its highest"),
            cmap="viridis", vmin=0, vmax=1)
        row(axes[2], pixels(out.info["kept_map"]), f"kept cells\n{number} of {math.prod(model.grid)}")
    else:
        row(axes[1], pixels(code_colours(model, out.codes["indices"])), "codes\nsimilar colours:\nsimilar vectors")
    row(axes[-1], pixels(out.images), "reconstruction")
    return save(figure, args, f"What {name} ({kind}) keeps" if scored else f"The codes of {name} ({kind}), {number} per image")


def draw_grains(args: argparse.Namespace, model: torch.nn.Module, dataset: ImageDataset, name: str) -> Any:
    """The granularities that a DQ-VAE chooses, and a histogram of its code lengths."""
    counts = torch.cat([model.counts(model.encode(images))["codes"].cpu() for images in batches(dataset, args.images, "codes")])
    picked = examples(counts, args.n)
    images = torch.stack([dataset[i * len(dataset) // len(counts)][0] for i in picked]).to(DEVICE)  # spread, as `batches` had them
    out, entropy = model(images), model.entropy(images).cpu()
    figure = pyplot().figure(figsize=(1.2 * len(images) + 2.2, 7.4))
    above, below = figure.subfigures(2, 1, height_ratios=[5.4, 2])
    axes = above.subplots(4, len(images), squeeze=False)
    row(axes[0], pixels(images), "original", titles=[f"{counts[i]} codes" for i in picked])
    row(axes[1], pixels(out.info["grain_map"]), f"granularity\n{LEGENDS[model.grains]}")
    row(axes[2], entropy, "entropy of\nthe grey values", bar=dict(label="nats"), cmap="viridis", vmin=0, vmax=entropy.max().item())
    row(axes[3], pixels(out.images), "reconstruction")
    above.suptitle(f"Where {name} spends its codes: examples from the fewest codes to the most")

    ax, low, high = below.subplots(), counts.min().item(), counts.max().item()
    width = 3 * math.ceil((high - low + 1) / 180)  # counts differ by multiples of 3
    ax.hist(counts, bins=np.arange(low - 1.5, high + width, width), color="0.6", edgecolor="white")
    ax.xaxis.get_major_locator().set_params(integer=True)
    for i in picked:
        ax.axvline(counts[i], color="C3", linewidth=0.8, linestyle=":")
    fewest, most = out.codes["grain"][0].numel(), out.codes["indices"][0].numel()
    ax.set(xlabel=f"codes per image (possible: {fewest} to {most}; dotted: the examples above)", ylabel="images",
           title=f"Code length of {len(counts)} images ({args.split}): {counts.float().mean():.1f} codes on average")
    return figure


def examples(counts: Tensor, n: int) -> list[int]:
    """At most n images, evenly spread from the fewest codes to the most; counts (N,)."""
    return counts.argsort(stable=True)[torch.linspace(0, len(counts) - 1, min(n, len(counts))).round().long()].tolist()


def code_colours(model: torch.nn.Module, indices: Tensor) -> Tensor:
    """Colours (..., 3, h, w) in [-1, 1] of codes (..., h, w): ranks along the codebook's first three principal components."""
    every = torch.arange(model.quantizer.codebook_size, device=indices.device)
    if model.quantizer.depth:  # the sums that occur, instead of all codes
        every = indices.flatten(0, -2)
        indices = torch.arange(len(every), device=every.device).view(indices.shape[:-1])
    vectors = model.quantizer.lookup(every)
    vectors = vectors - vectors.mean(0)
    ranks = (vectors @ torch.linalg.svd(vectors, full_matrices=False).Vh[:3].T).argsort(0).argsort(0)   # (K, up to 3)
    colours = F.pad(ranks / max(1, len(ranks) - 1) * 1.8 - 0.9, (0, 3 - ranks.shape[1]))
    return colours[indices].movedim(-1, -3)


def codebook(args: argparse.Namespace) -> None:
    """the codebook of a stage-1 run: usage, norms and gradient norms of the codes, also over training"""
    [(model, name, kind)], dataset = load(args)
    if not model.quantizer.has_codebook:
        raise UserError(f"the {type(model.quantizer).__name__} of {args.run[0]} has no single codebook of learned vectors to draw; "
                        "`visualize.py codes` and evaluate.py show which codes it uses")
    history = read_history(Path(args.run[0]))
    if history is None:
        missing = f"{args.run[0]} has no record of its codebook over training; train with train.codebook_stats_every=100 to have one"
        if args.history:
            raise UserError(missing)
        print(missing)
    quantizer, uses = model.quantizer, 0
    for images in batches(dataset, args.images, "usage"):
        found = model.encode(images)
        uses = uses + torch.bincount(found["indices"][model.spent(found)], minlength=quantizer.codebook_size).cpu()

    figure, axes = pyplot().subplots(2 if history else 1, 3, figsize=(9.5, 5.6 if history else 2.9), squeeze=False)
    (ax, norm_ax, gradient_ax), K, used = axes[0], len(uses), int((uses > 0).sum())
    ranked = uses.sort(descending=True).values.tolist()
    ax.fill_between(range(used + 1), [*ranked[:used], ranked[used - 1]], step="post", color="C0", alpha=0.6)
    ax.set_yscale("log")
    ax.set(xlim=(0, K), ylim=(0.7, None), xlabel="codes, by usage", ylabel=f"times used in {min(args.images, len(dataset))} images",
           title=f"Usage: {K - used} of {K} codes are never used")
    if used < K:
        ax.axvspan(used, K, color="0.9", zorder=0)
    norms = quantizer.codebook.float().norm(dim=1).cpu().numpy()
    margin = 0.01 * norms.max()  # unit vectors differ by rounding alone
    norm_ax.hist(norms, bins=50, range=(norms.min() - margin, norms.max() + margin), color="C0", alpha=0.6, log=True)
    norm_ax.set(ylim=(0.7, None), xlabel="norm of the code", ylabel="codes", title="Norms of the codes")
    draw_gradients(gradient_ax, code_gradients(model, dataset))
    if history:
        draw_history(axes[1], history)
    save(figure, args, f"The codebook of {name} ({kind}): {K} codes of dimension {quantizer.dim}")


def draw_gradients(ax: Any, gradients: Tensor) -> None:
    """A pixel for each code's gradient norm (K,)."""
    K, positive = len(gradients), gradients[gradients > 0]
    side, (low, high) = math.ceil(math.sqrt(K)), log_range(positive.min().item(), positive.max().item())
    square = F.pad(gradients, (0, side**2 - K), value=math.nan).view(side, side)
    ax.imshow(np.where(square.isnan(), 1.0, 0.8), cmap="gray", vmin=0, vmax=1)  # white after the last code, grey for no gradient
    shown = ax.imshow(square.where(square > 0, math.nan), cmap="viridis", interpolation="nearest", norm="log", vmin=low, vmax=high)
    ax.figure.colorbar(shown, ax=ax, label="norm of the gradient")
    ax.spines[:].set_visible(False)
    ax.set(xticks=[], yticks=[], xlabel=f"one pixel per code, row by row\n(grey: no gradient, {K - len(positive)} codes)",
           title="Gradients of the codebook loss")


def draw_history(axes: np.ndarray, history: dict[str, np.ndarray]) -> None:
    """A heat map of each record over the steps."""
    steps = history["steps"]
    half = np.diff(steps) / 2 if len(steps) > 1 else np.array([0.5])
    times = [steps[0] - half[0], *steps[:-1] + half[:len(steps) - 1], steps[-1] + half[-1]]  # (T + 1,)
    for ax, (key, log, title) in zip(axes, [("uses", True, "times used, of the last codes"), ("norms", False, "norm of the code"),
                                            ("gradient_norms", True, "norm of the gradient")]):
        edges, shares = heat_map(history[key], log)
        shown = ax.pcolormesh(times, edges, np.ma.masked_equal(shares, 0), cmap="viridis", norm="log", vmin=1 / history[key].shape[1],
                              vmax=1, rasterized=True)
        if log:
            decades = np.arange(edges[1], edges[-1] + 1e-6, max(1, math.ceil((edges[-1] - edges[1]) / 5)))
            ax.set_yticks([edges[:2].mean(), *decades], ["0", *(f"$10^{{{d:.0f}}}$" for d in decades)])
            ax.axhline(edges[1], color="black", linewidth=0.5)
        ax.set(xlabel="step", ylabel=title, title=f"{title.split(',')[0].capitalize()} over training")
    axes[0].figure.colorbar(shown, ax=axes, label="share of the codes", pad=0.01)


def code_gradients(model: torch.nn.Module, dataset: ImageDataset) -> Tensor:
    """The norm (K,) of the codebook loss's gradient at each code, for the mean loss over 64 images."""
    caught = []
    hook = model.quantizer.register_forward_hook(lambda _, given, returned: caught.append((given[0], returned[1], *given[1:2])))
    for images in batches(dataset, 64, "gradients"):  # all their vectors are in memory at once
        model(images)
    hook.remove()
    return gradient_norms(model.quantizer, *(torch.cat(tensors) for tensors in zip(*caught))).cpu()


def read_history(run: Path) -> dict[str, np.ndarray] | None:
    """The record of a codebook over training: `steps` (T,), and `uses`, `norms`, `gradient_norms` (T, K), in order of step."""
    history = {"steps": [], "uses": [], "norms": [], "gradient_norms": []}
    for path in sorted((run / "codebook").glob("step_*.npz")):
        history["steps"].append(int(path.stem.removeprefix("step_")))
        try:
            with np.load(path) as record:
                for key in ("uses", "norms", "gradient_norms"):
                    history[key].append(np.nan_to_num(record[key].astype(np.float64)))
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
            raise UserError(f"{path} is not a whole record of a codebook; remove it") from None
    return {key: np.array(rows) for key, rows in history.items()} if history["steps"] else None


def heat_map(values: np.ndarray, log: bool, bins: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Values (T, K) to bin edges (B + 1,), and the share of each row in each bin (B, T). `log`: edges are log10, the first bin is for 0."""
    if log:
        positive = values[values > 0]
        low, high = np.log10(log_range(positive.min(initial=np.inf), positive.max(initial=0)))
        low, high = math.floor(low + 1e-9), math.ceil(high - 1e-9)
        edges = np.array([low - (high - low) / 8, *np.linspace(low, high, bins)])
        values = np.log10(np.maximum(values, 1e-99))
    else:
        low, high = values.min(), values.max()
        edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    return edges, np.stack([np.histogram(row.clip(edges[0], edges[-1]), edges)[0] / len(row) for row in values], axis=1)


def log_range(low: float, high: float) -> tuple[float, float]:
    """Limits of a logarithmic axis. Never empty, even for one value or none."""
    return (low, high) if 0 < low < high else (high / 10, high * 10) if high > 0 else (0.1, 10)


def interactive(args: argparse.Namespace) -> None:
    """one HTML file with images, reconstructions and the code of every cell"""
    [(model, name, kind)], dataset = load(args)
    records = []
    for image in torch.cat([*batches(dataset, args.n, "images")]).split(1):
        codes = model.encode(image)
        decoded, maps = model.decode(codes), list(model.maps(codes, image).values())
        panes, counts = (image, decoded, maps[0] if maps else code_colours(model, codes["indices"])), model.counts(codes)
        shown = {key: value[0].tolist() for key, value in codes.items()}
        if model.quantizer.depth:
            shown = {"indices": [["+".join(map(str, cell)) for cell in line] for line in shown["indices"]]}
        records.append({"panes": [data_url(pane[0]) for pane in panes], "codes": shown,
                        "count": int(counts["codes"]), "bits": round(counts["bits"].item(), 1),
                        "psnr": round(compare(to_uint8(image), to_uint8(decoded))["psnr"].item(), 2)})
    what = "granularities" if "grain" in codes else "kept cells" if "positions" in codes else "codes"
    data = {"size": sides(dataset.image_size), "grid": model.grid if "positions" in codes else codes["indices"].shape[1:3],
            "grains": GRAINS[len(model.factors)], "titles": ["original", "reconstruction", what], "images": records}
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    page = page.replace("{{TITLE}}", html.escape(f"{name}: {kind}")).replace("{{K}}", str(model.quantizer.codebook_size))
    page = page.replace("{{DATA}}", json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page, encoding="utf-8")
    print(args.out)


def data_url(image: Tensor) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels(image)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def sequence(args: argparse.Namespace) -> None:
    """how images grow as a stage-2 run generates their codes, as a strip of frames and a GIF"""
    model, stage1, config, classes = load_models(args.run[0], args.which, torch.device(DEVICE))
    if args.classes and not model.num_classes:
        raise UserError(f"--class was given, but the model of {args.run[0]} is unconditional")
    labels = chosen_labels(args.classes, classes, args.n) if model.num_classes else None
    settings = sampling_arguments(model, config["sample"], labels)
    trace = {"trace": []} if isinstance(model, MaskTransformer) else {}
    drawn = model.sample(args.n, labels, generator=generators(args.seed, range(args.n)), **settings, **trace)
    ranks, counts = code_ranks(model, drawn, **trace)
    G, total = counts.shape[1], counts.sum(1).tolist()
    stages, between = (min(12, total[0]), 1) if trace else (round(8 / G), 4)  # frames of each granularity in the strip; of the GIF in each
    frames, done = [], []
    for i in tqdm(range(1, between * stages * G + 1), "frames"):
        done.append(codes_done(counts, i / stages / between))
        images = partial_images(stage1, drawn, ranks, done[-1])
        images = pixels(F.interpolate(images, scale_factor=max(1, 128 // images.shape[-1])))
        frames.append(np.stack([images, [cell_map(r, d, t, images.shape[1]) for r, d, t in zip(ranks, done[-1], total)]]))

    shares = [f"{(i + 1) / stages:.0%}" for i in range(stages)]
    what = "steps" if trace else "codes"
    titles = [f"{share} of the {what}" for share in shares] if G == 1 else [f"{g}: {share}" for g in GRAINS[G] for share in shares]
    figure, axes = tiles(2 * args.n, len(titles), height=1.32)
    for i, (upper, lower) in enumerate(axes.reshape(args.n, 2, -1)):
        images, maps = zip(*(frame[:, i] for frame in frames[between - 1::between]))
        row(upper, images, f"image {i}" if labels is None else printable(classes[labels[i]]), titles if i == 0 else None)
        row(lower, maps, "")
        for ax, number in zip(lower, done[between - 1::between]):
            ax.set_xlabel(f"step {number[i]}" if trace else f"{number[i]} codes")
    figure.colorbar(pyplot().cm.ScalarMappable(cmap="viridis"), ax=axes, pad=0.01, shrink=0.6, aspect=30,
                    label="order of generation").set_ticks([0, 1], labels=["first", "last"])
    name = f"{NAMES[config['model']['name']]} ({distinct(args.run)[0]})"
    grey = "grey: no code yet" if "positions" not in drawn else "cells without a code are filled by the de-mask"
    save(figure, args, f"How {name} generates, and which cells have their codes; {grey}")
    pages = [np.pad(frame, ((0, 0), (0, 0), (4, 4), (4, 4), (0, 0)), constant_values=255).swapaxes(1, 2) for frame in frames]
    pages = [Image.fromarray(page.reshape(2 * page.shape[1], -1, 3)) for page in pages]             # images above, maps below
    gif = args.out.with_suffix(".gif")
    pages[0].save(gif, save_all=True, append_images=pages[1:], duration=[120] * (len(pages) - 1) + [2500], loop=0)
    print(gif)


def code_ranks(model: torch.nn.Module, codes: dict[str, Tensor], trace: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The rank of each finest cell's code in the order of generation (n, h, w), -1 for no code; codes of each granularity (n, G). Of a
    MaskTransformer, given its trace: the step of each cell, from 0, and the number of steps (n, 1)."""
    if trace:
        return torch.where(trace[0] > 0, trace[0] - 1, -1), trace[0].max().expand(len(trace[0]), 1)
    if "grain" in codes:
        tokens = model.order(codes)
        number = (model.slot_kind[tokens.slot] == 1).cumsum(1) - 1
        return model.unorder(tokens._replace(content=number))["indices"], tokens.counts
    n, length = codes["indices"].flatten(1).shape
    ranks = torch.arange(length, device=codes["indices"].device).expand(n, -1)
    if "positions" in codes:
        ranks = torch.full_like(ranks[:, :1], -1).repeat(1, math.prod(model.grid)).scatter(1, codes["positions"], ranks)
    return ranks.reshape(n, *model.grid), torch.full_like(ranks[:, :1], length)


def codes_done(counts: Tensor, u: float) -> Tensor:
    """Codes (n,) generated at time u: all of the first granularity at 1, all of the second at 2; counts (n, G)."""
    g = min(int(u), counts.shape[1] - 1)
    return counts[:, :g].sum(1) + (counts[:, g] * (u - g)).ceil().long()


def partial_images(stage1: torch.nn.Module, codes: dict[str, Tensor], ranks: Tensor, done: Tensor) -> Tensor:
    """Images (n, 3, H, W) of the first `done` (n,) codes of each image. An MQ-VAE's images all have the same `done`."""
    if "positions" in codes:
        there = ranks.flatten(1).gather(1, codes["positions"]) < done.view(-1, 1)            # as many in each image
        return stage1.decode({key: value[there].view(len(value), -1) for key, value in codes.items()})
    there = ranks < done.view(-1, 1, 1)
    quantizer = stage1.quantizer
    middle = quantizer.codebook.mean(0) if quantizer.has_codebook else torch.zeros(quantizer.dim, device=ranks.device)
    placeholder = quantizer.nearest(middle.unsqueeze(0))
    images = stage1.decode(codes | {"indices": torch.where(there, codes["indices"], placeholder)})
    return torch.where(F.interpolate(there.unsqueeze(1).float(), images.shape[-2:]) > 0, images, GREY)


def cell_map(ranks: Tensor, done: int, total: int, height: int) -> np.ndarray:
    """A picture of the cells (h, w) that have a code, coloured by rank and outlined; uint8 (height, width, 3)."""
    ranks = torch.where(ranks < done, ranks, -1).cpu().numpy().repeat(height // len(ranks), 0).repeat(height // len(ranks), 1)
    colours = np.where(ranks[..., None] >= 0, pyplot().get_cmap("viridis")(ranks / max(1, total - 1))[..., :3], 0.85)
    colours[:, 1:][np.diff(ranks, axis=1) != 0] = 1
    colours[1:][np.diff(ranks, axis=0) != 0] = 1
    return (colours * 255).astype(np.uint8)


if __name__ == "__main__":
    run_main(main)
