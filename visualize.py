"""Draws what the models do: PNG files for papers and for debugging, and a page for exploring codes.

    python visualize.py recon --run A [--run B ...] [-n 6]
        originals, reconstructions, error maps
    python visualize.py codes --run R [-n 8] [--images 1000]
        where a stage-1 model spends its codes
    python visualize.py codebook --run R [--history]
        usage, norms and gradients of the codes; over training
    python visualize.py sequence --run R2 [--seed 0] [--class C]
        how a stage-2 model generates images, code by code or step by step; also a GIF
    python visualize.py rate --run A [--run B ...]
        quality against bits per pixel: a point for each run, several for those that were trained
        for a range of rates
    python visualize.py ladder --run R [-n 4] [--rates 0.2,0.6]
        images at five rates of such a run, or at these, with codes, bits and PSNR
    python visualize.py curves --run A [--run B ...]
        what training logged: losses, GAN, usage, validation
    python visualize.py interactive --run R [-n 16]
        one HTML file, no server: point at a cell, see its code

The file is RUN/figures/COMMAND.png (or .html), in the first run, unless --out is given. Images
come from the validation split of the first run's data; --split train and data.root=... select
others. PSNR, SSIM and errors are of 8-bit images. Heat maps over training need a run with
train.codebook_stats_every=N. Stage-1 models compute in float32, `sequence` in the run's precision,
as sample.py.

In `sequence`, cells that have no code yet are grey. The decoder gets a placeholder there, the code
nearest to the codebook's mean, which can affect neighbouring cells. An MQ-VAE's images have no
grey: its de-mask fills the other cells, as always.
"""

import argparse
import base64
import io
import json
import math
from itertools import cycle
from pathlib import Path

from harness.codebook import RECORDS, read_history
from harness.config import UserError
from harness.figures import (
    DEVICE, NAMES, batches, distinct, load, new_figure, pick_images, pixels, psnr, row, save, tiles,
)
from harness.hub import run_folder
from harness.launch import run_main
from harness.log import printable
from harness.metrics import compare
from harness.models import STAGE1, own_folder, run_config
from harness.sampling import (
    GRAINS, chosen_labels, load_models, parse_with_overrides, sample_codes, sampling_arguments,
    to_path,
)
from harness.use import set_rate, to_rates

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from dataset import to_uint8
from losses import load_lpips
from mask_transformer import MaskTransformer
from quantizers import gradient_norms
from vqgan import sides

LEGENDS = {  # of dqvae.COLOURS
    2: "blue: coarse\nred: fine",
    3: "blue: coarse\nyellow: medium\nred: fine",
}
MAPS = {  # what a model's map shows, by the last of its code_names
    "indices": "codes",
    "positions": "kept cells",
    "grain": "granularities",
}
METRICS = {
    "psnr": "PSNR (dB), higher is better",
    "ssim": "SSIM, higher is better",
    "lpips": "LPIPS (VGG), lower is better",
}
STAGE1_CURVES = {  # of metrics.jsonl; the second of two is drawn dashed
    "L1": ["l1"],
    "L2": ["l2"],
    "perceptual distance": ["perceptual"],
    "weight of the GAN's gradient": ["gan_weight"],
    "discriminator: real, fake (dashed)": ["d_real", "d_fake"],
    "share of the codes in use": ["usage"],
    "gradient's norm": ["grad_norm"],
    "validation: PSNR (dB)": ["val_psnr"],
    "validation: rFD (Lite2)": ["val_rfd"],
    "validation: rFID": ["val_rfid"],
}
STAGE2_CURVES = {
    "loss": ["loss"],
    "gradient's norm": ["grad_norm"],
    "validation: bits per image": ["val_bits"],
}
GREY = 0.0  # for cells without a code, in images in [-1, 1]


@torch.no_grad()
def main(argv=None):
    parser = make_parser()
    args = parse_with_overrides(parser, argv)
    if args.overrides and args.draw in (sequence, curves):
        parser.error(f"unrecognized arguments: {' '.join(args.overrides)}")
    if min(args.n, args.images, args.dpi) < 1:
        raise UserError("-n, --images and --dpi must be at least 1")
    suffix = ".html" if args.draw is interactive else ".png"
    name = f"figures/{args.command}{suffix}"
    args.out = args.out or own_folder(Path(args.run[0]), "figures", "figures/*") / name
    if args.out.suffix != suffix:
        raise UserError(f"--out must end in {suffix}; it is {args.out}")
    args.draw(args)


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(n=1, images=1, dpi=1)  # where a command has none
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    numbers = {recon: 6, codes: 8, sequence: 4, ladder: 4, interactive: 16}
    for draw in (recon, codes, codebook, sequence, rate, ladder, curves, interactive):
        sub = commands.add_parser(draw.__name__, help=draw.__doc__)
        sub.set_defaults(draw=draw)
        option = sub.add_argument
        option("--run", required=True, type=run_folder, nargs=1,
               action="extend" if draw in (recon, rate, curves) else "store",
               help="a run folder; of recon, rate and curves several times, for a comparison")
        option("--out", type=to_path, help="a file (default: in RUN/figures)")
        if draw is not curves:
            option("--which", choices=("latest", "best"), default="latest",
                   help="which of the run's weights")
        if draw is not interactive:
            option("--dpi", type=int, default=150, help="pixels per inch (default 150)")
        if draw in numbers:
            option("-n", type=int, default=numbers[draw],
                   help="how many images (default %(default)s)")
        if draw in (codes, codebook, rate):
            option("--images", type=int, default=1000,
                   help="at most this many images for the statistics (default 1000)")
        if draw is ladder:
            option("--rates", type=to_rates, help="which rates (default: five of the run's range)")
        if draw is codebook:
            option("--history", action="store_true",
                   help="fail if there is no record over training")
        if draw is sequence:
            option("--seed", type=int, default=0,
                   help="image i is image i of sample.py with this seed")
            option("--classes", "--class",
                   help="class numbers or names, separated by commas (default: all, in turn)")
        elif draw is not curves:
            option("--split", choices=("train", "val"), default="val")
    return parser


# Reconstructions


def recon(args):
    """originals, reconstructions and errors of one or several stage-1 runs"""
    runs, dataset = load(args)
    images = pick_images(dataset, args.n)
    outs = [model(images) for model, _ in runs]
    errors = np.stack([error_map(images, out.images).cpu() for out in outs])
    # The highest 0.5 % are outliers, which must not darken the maps.
    top = np.quantile(errors, 0.995, method="inverted_cdf")
    figure, axes = tiles(1 + 2 * len(runs), len(images), images)
    row(axes[0], pixels(images), "original")
    drawn = zip(runs, outs, errors, axes[1::2], axes[2::2])
    for (model, name), out, error, upper, lower in drawn:
        decibels = psnr(images, out.images)
        bits = model.bits(out.codes).mean() / images[0, 0].numel()
        label = f"{name}\n{bits:.3g} bits/pixel\n{decibels.mean():.2f} dB"
        row(upper, pixels(out.images), label, [f"{value:.1f} dB" for value in decibels])
        row(lower, error, "absolute error", bar="mean of RGB,\nof 255", extend="max", cmap="magma",
            vmax=top)
    save(figure, args, f"Reconstructions of {len(images)} images with their PSNR (at the left: "
                       "means over these images), and errors")


def error_map(images, reconstructions):
    """Absolute error (B, H, W), mean over the channels, in levels of 255, of images (B, 3, H, W)
    in [-1, 1]."""
    error = to_uint8(images).float() - to_uint8(reconstructions).float()
    return error.abs().mean(1)


def rate(args):
    """PSNR, SSIM and LPIPS against bits per pixel, a point or a curve for each stage-1 run"""
    runs, dataset = load(args)
    path = Path(torch.hub.get_dir(), "checkpoints/vgg16-397923af.pth")
    lpips = load_lpips().to(DEVICE) if path.is_file() else None
    if not lpips:
        print(f"without LPIPS, which needs VGG-16's weights: {path} (download.pytorch.org/models)")
    number = 3 if lpips else 2  # of metrics
    figure, axes = new_figure(1, number, 2.8 * number, 2.9)
    for (model, name), marker in zip(runs, cycle("osD^vP*X")):
        points = []
        for share in each_rate(model):
            point = mean_quality(model, batches(dataset, args.images, name), lpips)
            points.append(point)
            where = "" if share is None else f" at {share:.2g}"
            listed = [f"{key} {value:.4g}" for key, value in zip(METRICS, point[1:])]
            print(f"{name}{where}: {point[0]:.3g} bits per pixel, {', '.join(listed)}")
        bits, *columns = zip(*points)
        for ax, values in zip(axes[0], columns):
            ax.plot(bits, values, f"{marker}-", label=name)
    for ax, label in zip(axes[0], METRICS.values()):
        ax.set(xlabel="bits per pixel", ylabel=label)
        ax.grid(alpha=0.3)
    figure.legend(handles=axes[0, 0].get_lines(), loc="outside lower center", ncols=number,
                  frameon=False)
    save(figure, args, f"Rate and distortion, means over {min(args.images, len(dataset))} images "
                       f"({args.split})")


def mean_quality(model, batches, lpips):
    """Bits per pixel and the metrics of the reconstructions, means over the images."""
    values = []
    for images in batches:
        codes = model.encode(images)
        bits = model.bits(codes) / images[0, 0].numel()
        metrics = compare(to_uint8(images), to_uint8(model.decode(codes)), lpips)
        values.append(torch.stack([bits, *metrics.values()]))           # (1 + metrics, B)
    return torch.cat(values, 1).double().mean(1).tolist()


def each_rate(model, rates=None):
    """Sets a model to these rates, or to five of its range, one after the other; None: its only
    rate."""
    if model.rate_range is None:
        yield None
    else:
        for share in rates or np.linspace(*model.rate_range, 5).round(6).tolist():
            set_rate(model, share)
            yield share


def ladder(args):
    """images at several rates of a stage-1 run that was trained for a range, under their maps"""
    [(model, name)], dataset = load(args)
    if model.rate_range is None:
        raise UserError(f"{args.run[0]} was trained for one rate; ladder needs a range, such as "
                        "model.topk_ratio=[0.1,0.9] of an MQ-VAE, model.ratios=[[0.1,0.9]] of a "
                        "DQ-VAE")
    images = pick_images(dataset, args.n)
    number = len(args.rates or range(5))
    is_wide = number <= 2  # maps at the left of the reconstructions, not above
    rows = len(images) if is_wide else 2 * len(images)
    columns = 1 + 2 * number if is_wide else 1 + number
    figure, axes = tiles(rows, columns, images, height=1.8 if is_wide else 1.45)
    if is_wide:
        maps, decoded, originals = axes[:, 1::2], axes[:, 2::2], axes[:, 0]
    else:
        maps, decoded, originals = axes[::2, 1:], axes[1::2, 1:], axes[1::2, 0]
        for ax in axes[::2, 0]:
            ax.axis("off")
    row(originals, pixels(images), "", ["original"] * len(images))
    for upper, lower, share in zip(maps.T, decoded.T, each_rate(model, args.rates)):
        out = model(images)
        quality = zip(model.counts(out.codes)["codes"], model.bits(out.codes),
                      psnr(images, out.images))
        row(upper, pixels(map_of(model, out.codes, images)), "", [f"{share:.0%}"])
        row(lower, pixels(out.images), "",
            [f"{codes:.0f} codes, {bits:.0f} bits\n{decibels:.1f} dB"
             for codes, bits, decibels in quality])
    what = "regions refined" if "grain" in model.code_names else "cells kept"
    save(figure, args, f"{name} at {number} rates: share of {what}")


def curves(args):
    """losses, GAN, usage and validation over training, of one or several runs of a stage"""
    in_stage1 = {run_config(folder)["model"]["name"] in STAGE1 for folder in args.run}
    if len(in_stage1) == 2:
        raise UserError("runs of stage 1 and of stage 2 have no curves in common; draw them apart")
    logs = [read_log(Path(folder)) for folder in args.run]
    panels = {title: keys for title, keys in
              (STAGE1_CURVES if in_stage1 == {True} else STAGE2_CURVES).items()
              if any(key in line for log in logs for line in log for key in keys)}
    columns = math.ceil(len(panels) / 2)
    figure, axes = new_figure(2, columns, 2.4 * columns, 3.8)
    names = distinct(args.run)
    for ax, (title, keys) in zip(axes.flat, panels.items()):
        marker = "." if "validation" in title else ""
        for number, log in enumerate(logs):
            for key, style in zip(keys, ("-", "--")):
                points = [(line["step"], line[key]) for line in log if key in line]
                ax.plot(*np.reshape(points, (-1, 2)).T, style, marker=marker, lw=1,
                        color=f"C{number}")
        ax.set(title=title, xlabel="step", xlim=(0, max(log[-1]["step"] for log in logs)))
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(panels):]:
        ax.axis("off")
    if len(logs) > 1:
        lines = axes[0, 0].get_lines()
        figure.legend(lines[::len(lines) // len(logs)], names, loc="outside lower center",
                      ncols=len(logs), frameon=False)
    save(figure, args, f"Training of {', '.join(names)}")


def read_log(folder):
    """The lines of a run's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    lines = text.rpartition("\n")[0].splitlines()  # but for one that is being written
    if not lines:
        raise UserError(f"{folder} has logged nothing yet")
    return [json.loads(line) for line in lines]


# Codes


def codes(args):
    """where a stage-1 run spends its codes: kept cells, granularities, or the codes themselves"""
    [(model, name)], dataset = load(args)
    if "grain" in model.code_names:
        draw_grains(args, model, dataset, name)
        return
    images = pick_images(dataset, args.n)
    out = model(images)
    number = out.codes["indices"][0].numel()
    is_masked = "positions" in model.code_names
    figure, axes = tiles(3 + is_masked, len(images), images)
    if is_masked:
        label = f"kept cells\n{number} of {math.prod(model.grid)}"
        title = f"What {name} keeps"
        scores = out.info["score_map"].squeeze(1).cpu() / 2 + 0.5
        row(axes[1], scores, "score", bar="0: image's lowest,\n1: its highest")
    else:
        label = "codes\nsimilar colours:\nsimilar vectors"
        title = f"The codes of {name}, {number} per image"
    row(axes[0], pixels(images), "original")
    row(axes[-2], pixels(map_of(model, out.codes, images)), label)
    row(axes[-1], pixels(out.images), "reconstruction")
    save(figure, args, title)


def draw_grains(args, model, dataset, name):
    """The granularities that a DQ-VAE chooses, and a histogram of its code lengths."""
    lengths = torch.cat([model.counts(model.encode(images))["codes"].cpu()
                         for images in batches(dataset, args.images, "codes")])
    picked = examples(lengths, args.n)
    # As `batches` spread them
    images = torch.stack([dataset[i * len(dataset) // len(lengths)][0] for i in picked]).to(DEVICE)
    out = model(images)
    entropy = model.entropy(images).cpu()
    figure, axes = tiles(5, len(images), images)
    row(axes[0], pixels(images), "original", [f"{length} codes" for length in lengths[picked]])
    row(axes[1], pixels(out.info["grain_map"]), f"granularity\n{LEGENDS[model.grains]}")
    row(axes[2], entropy, "entropy of\nthe grey values", bar="nats", vmax=entropy.max())
    row(axes[3], pixels(out.images), "reconstruction")

    for ax in axes[4]:
        ax.remove()
    ax = figure.add_subplot(ax.get_gridspec()[4, :])
    low, high = map(int, lengths.aminmax())
    width = 3 * math.ceil((high - low + 1) / 180)  # lengths differ by multiples of 3
    ax.hist(lengths, np.arange(low - 1.5, high + width, width), color="0.6", edgecolor="white")
    for length in lengths[picked]:
        ax.axvline(length, color="C3", linestyle=":")
    fewest, most = [out.codes[key][0].numel() for key in ("grain", "indices")]
    ax.set(xlabel=f"codes per image (possible: {fewest} to {most}; dotted: the examples above)",
           ylabel="images",
           title=f"Code length of {len(lengths)} images ({args.split}): "
                 f"{lengths.float().mean():.1f} codes on average")
    save(figure, args,
         f"Where {name} spends its codes: examples from the fewest codes to the most")


def examples(counts, n):
    """At most n images, evenly spread from the fewest codes to the most; counts (N,)."""
    ranks = torch.linspace(0, len(counts) - 1, min(n, len(counts))).round().long()
    return counts.argsort(stable=True)[ranks].tolist()


def map_of(model, codes, images):
    """Pictures (B, 3, h, w) of where the codes go, or else of the codes, in colours."""
    maps = list(model.maps(codes, images).values())
    return maps[0] if maps else code_colours(model, codes["indices"])


def code_colours(model, indices):
    """Colours (..., 3, h, w) in [-1, 1] of codes (..., h, w): ranks along the first three
    principal components of the codebook (of a residual quantizer, of the sums that occur)."""
    quantizer = model.quantizer
    cells = torch.arange(quantizer.codebook_size, device=indices.device)
    if quantizer.depth:
        cells = indices.flatten(0, -2)                                  # (B h w, depth)
        indices = torch.arange(len(cells)).view(indices.shape[:-1])
    vectors = quantizer.lookup(cells)
    vectors = vectors - vectors.mean(0)
    axes = torch.linalg.svd(vectors, full_matrices=False).Vh[:3]
    ranks = (vectors @ axes.T).argsort(0).argsort(0)                    # (K, up to 3)
    colours = ranks / len(ranks) * 1.8 - 0.9
    return F.pad(colours, (0, 3 - ranks.shape[1]))[indices].movedim(-1, -3)


# The codebook


def codebook(args):
    """the codebook of a stage-1 run: usage, norms and gradient norms of the codes, also over
    training"""
    [(model, name)], dataset = load(args)
    quantizer = model.quantizer
    if not quantizer.has_codebook:
        raise UserError(f"the {type(quantizer).__name__} of {args.run[0]} has no single codebook "
                        "of learned vectors to draw; `visualize.py codes` and evaluate.py show "
                        "which codes it uses")
    history = read_history(args.run[0])
    if not history:
        missing = (f"{args.run[0]} has no record of its codebook over training; train with "
                   "train.codebook_stats_every=100 to have one")
        if args.history:
            raise UserError(missing)
        print(missing)
    K = quantizer.codebook_size
    uses = torch.zeros(K, dtype=torch.int64)
    for images in batches(dataset, args.images, "usage"):
        codes = model.encode(images)
        spent = codes["indices"][model.spent(codes)]
        uses += torch.bincount(spent, minlength=K).cpu()

    rows = 2 if history else 1
    figure, axes = new_figure(rows, 3, 9.5, 2.7 * rows + 0.2)
    draw_usage(axes[0, 0], uses)
    axes[0, 0].set_ylabel(f"times used in {min(args.images, len(dataset))} images")
    draw_norms(axes[0, 1], quantizer.codebook.float().norm(dim=1).cpu().numpy())
    draw_gradients(axes[0, 2], code_gradients(model, dataset).numpy())
    if history:
        draw_history(axes[1], history)
    save(figure, args, f"The codebook of {name}: {K} codes of dimension {quantizer.dim}")


def draw_usage(ax, uses):
    """How often each code was used (K,), falling."""
    K = len(uses)
    ranked = uses[uses > 0].sort(descending=True).values
    ax.stairs(ranked, fill=True, alpha=0.6)
    ax.set(yscale="log", xlim=(0, K), ylim=(0.7, None), xlabel="codes, by usage",
           title=f"Usage: {K - len(ranked)} of {K} codes are never used")


def draw_norms(ax, norms):
    """A histogram of the codes' norms (K,)."""
    limits = norms.min() * 0.99, norms.max() * 1.01  # unit vectors differ by rounding alone
    ax.hist(norms, 50, limits, alpha=0.6, log=True)
    ax.set(ylim=(0.7, None), xlabel="norm of the code", ylabel="codes", title="Norms of the codes")


def draw_gradients(ax, gradients):
    """A pixel for each code's gradient norm (K,), white after the last code."""
    K = len(gradients)
    side = math.ceil(math.sqrt(K))
    square = np.pad(gradients, (0, side**2 - K), constant_values=np.nan).reshape(side, side)
    low, high = log_range(gradients)
    shown = ax.imshow(np.maximum(square, low / 2), norm="log", vmin=low / 1.1, vmax=high)
    shown.set_cmap(shown.cmap.with_extremes(under="0.8"))
    ax.figure.colorbar(shown, ax=ax, label="norm of the gradient")
    ax.axis("off")
    ax.set_title("Gradients of the codebook loss, one pixel per code\n"
                 f"(grey: no gradient, {(gradients == 0).sum()} codes)")


def draw_history(axes, history):
    """A heat map of each record over the steps."""
    steps = history["steps"]
    every = np.diff(steps, prepend=0).min()
    for ax, (key, label) in zip(axes, RECORDS.items()):
        is_log = key != "norms"
        edges, shares = heat_map(history[key], is_log)
        shown = ax.pcolormesh([steps[0] - every, *steps], edges, shares, norm="log",
                              vmin=1 / history[key].shape[1], vmax=1)
        if is_log:
            low, high = map(int, edges[[1, -1]])
            decades = range(low, high + 1, math.ceil((high - low) / 5))
            ax.set_yticks([edges[:2].mean(), *decades],
                          ["0", *[f"$10^{{{decade}}}$" for decade in decades]])
            ax.axhline(low, color="black", linewidth=0.5)
        ax.set(xlabel="step", ylabel=label)
    axes[0].figure.colorbar(shown, ax=axes, label="share of the codes")


def code_gradients(model, dataset):
    """The norm (K,) of the codebook loss's gradient at each code, for the mean loss over 64
    images, whose vectors are all in memory at once."""
    calls = []

    def record(_, inputs, outputs):  # vectors, indices and, if there are any, weights
        calls.append((inputs[0], outputs[1], *inputs[1:2]))

    with model.quantizer.register_forward_hook(record):
        for images in batches(dataset, 64, "gradients"):
            model(images)
    return gradient_norms(model.quantizer, *map(torch.cat, zip(*calls))).cpu()


def heat_map(values, is_log):
    """Values (T, K) to bin edges (B + 1,), and the share of each row in each bin (B, T). is_log:
    edges are log10, the first bin is for 0."""
    edges = np.histogram_bin_edges(values, 40)
    if is_log:
        low, high = np.log10(log_range(values))
        low, high = math.floor(low), math.ceil(high)
        edges = np.array([low - (high - low) / 8, *np.linspace(low, high, 40)])
        values = np.log10(values + 1e-99).clip(edges[0])
    shares = [np.histogram(row, edges)[0] / len(row) for row in values]
    return edges, np.array(shares).T


def log_range(values):
    """Limits of a logarithmic axis of these values (zeros have no place on it). Never empty."""
    positive = values[values > 0]
    return (positive.min(), positive.max() * 1.01) if positive.size else (0.1, 10)


# The page


def interactive(args):
    """one HTML file with images, reconstructions and the code of every cell"""
    [(model, name)], dataset = load(args)
    size = sides(dataset.image_size)
    data = {
        "title": f"{name}, {model.quantizer.codebook_size} codes",
        "size": size,
        "grid": [side // model.factors[-1] for side in size],
        "grains": GRAINS[len(model.factors)],
        "titles": ["original", "reconstruction", MAPS[model.code_names[-1]]],
        "images": [page_record(model, image)
                   for image in pick_images(dataset, args.n).split(1)],
    }
    data = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    page = Path(__file__).with_name("harness") / "codes.html"
    page = page.read_text().replace("{{DATA}}", data)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page)
    print(args.out)


def page_record(model, image):
    """What the page shows of an image (1, 3, H, W)."""
    codes = model.encode(image)
    decoded = model.decode(codes)
    panes = image, decoded, map_of(model, codes, image)
    counts = model.counts(codes)
    return {
        "panes": [data_url(pane[0]) for pane in panes],
        "codes": {key: value[0].tolist() for key, value in codes.items()},
        "count": counts["codes"].item(),
        "bits": counts["bits"].item(),
        "psnr": psnr(image, decoded).item(),
    }


def data_url(image):
    file = io.BytesIO()
    Image.fromarray(pixels(image)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


# How images are generated


def sequence(args):
    """how images grow as a stage-2 run generates their codes, as a strip of frames and a GIF"""
    import matplotlib

    model, stage1, config, classes = load_models(args.run[0], args.which, torch.device(DEVICE))
    labels = chosen_labels(args.classes, classes, args.n)
    settings = sampling_arguments(model, config["sample"], labels)
    trace = []
    in_steps = isinstance(model, MaskTransformer)
    if in_steps:
        settings["trace"] = trace
    drawn = sample_codes(model, range(args.n), labels, args.seed, settings)
    if in_steps:
        ranks = (trace[0] - 1).clamp(-1)
        counts = trace[0].max().expand(args.n, 1)  # the number of steps
        stages = min(12, counts[0].item())  # pictures in the strip
        between = 1  # frames of the GIF for each
        what = "steps"
    else:
        ranks, counts = code_ranks(model, drawn)
        stages = round(8 / counts.shape[1])  # of each granularity
        between = 4
        what = "codes"
    grains = GRAINS[counts.shape[1]]
    done = [codes_done(counts, i / stages / between)
            for i in range(1, between * stages * len(grains) + 1)]
    frames = np.stack([draw_frame(stage1, drawn, ranks, counts, numbers)
                       for numbers in tqdm(done, "frames")])            # (F, 2, n, H, W, 3)

    titles = [f"{grain} {i / stages:.0%}" for grain in grains for i in range(1, stages + 1)]
    figure, axes = tiles(2 * args.n, len(titles), height=1.32)
    shown = slice(between - 1, None, between)  # of the frames
    for i, (upper, lower) in enumerate(zip(axes[::2], axes[1::2])):
        name = f"image {i}" if labels is None else printable(classes[labels[i]])
        row(upper, frames[shown, 0, i], name, titles if i == 0 else ())
        row(lower, frames[shown, 1, i], "")
        for ax, number in zip(lower, done[shown]):
            ax.set_xlabel(f"{what}: {number[i]}")
    figure.colorbar(matplotlib.cm.ScalarMappable(), ax=axes, pad=0.01, aspect=40, ticks=[],
                    label="order of generation, upwards")
    name = f"{NAMES[config['model']['name']]} ({distinct(args.run)[0]})"
    rest = "filled by the de-mask" if "positions" in drawn else "grey"
    save(figure, args, f"How {name} generates; cells without a code are {rest}")
    save_gif(args.out.with_suffix(".gif"), frames)


def save_gif(path, frames):
    """Frames (F, 2, n, H, W, 3), images above their maps, of which the last one stays."""
    frames = np.pad(frames, [*[(0, 0)] * 3, (4, 4), (4, 4), (0, 0)], constant_values=255)
    pages = [np.vstack([*map(np.hstack, frame)]) for frame in frames]
    first, *others = map(Image.fromarray, pages)
    durations = [120] * len(others) + [2500]
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0)
    print(path)


def code_ranks(model, codes):
    """The rank of each finest cell's code in the order of generation (n, h, w), -1 for no code;
    codes of each granularity (n, G)."""
    if "grain" in codes:
        tokens = model.order(codes)
        number = (model.slot_kind[tokens.slot] == 1).cumsum(1) - 1
        return model.unorder(tokens._replace(content=number))["indices"], tokens.counts
    ranks = torch.ones_like(codes["indices"].flatten(1)).cumsum(1) - 1
    counts = ranks[:, -1:] + 1
    if "positions" in codes:
        no_code = ranks.new_full((len(ranks), math.prod(model.grid)), -1)
        ranks = no_code.scatter(1, codes["positions"], ranks)
    return ranks.view(-1, *model.grid), counts


def codes_done(counts, time):
    """Codes (n,) generated at a time: all of the first granularity at 1, all of the second at 2;
    counts (n, G)."""
    shares = (time - torch.arange(counts.shape[1], device=counts.device)).clamp(0, 1)
    return (counts * shares - 1e-4).ceil().long().sum(1)  # 1e-4: the product is rounded


def draw_frame(stage1, codes, ranks, counts, done):
    """Pictures (2, n, H, W, 3): the images of the first `done` (n,) codes, and their cells."""
    images = partial_images(stage1, codes, ranks, done)
    images = pixels(F.interpolate(images, scale_factor=max(1, 128 // images.shape[-1])))
    cells = zip(ranks.cpu(), done.tolist(), counts.sum(1).tolist())
    return np.stack([images, [cell_map(*image, images.shape[1]) for image in cells]])


def partial_images(stage1, codes, ranks, done):
    """Images (n, 3, H, W) of the first `done` (n,) codes of each image. An MQ-VAE's images all
    have the same `done`."""
    if "positions" in codes:
        there = ranks.flatten(1).gather(1, codes["positions"]) < done.view(-1, 1)
        codes = {key: value[there].view(len(value), -1) for key, value in codes.items()}
        return stage1.decode(codes)
    there = ranks < done.view(-1, 1, 1)
    quantizer = stage1.quantizer
    vectors = quantizer.lookup(torch.arange(quantizer.codebook_size, device=ranks.device))
    placeholder = quantizer.nearest(vectors.mean(0, keepdim=True))
    indices = codes["indices"].where(there, placeholder)
    images = stage1.decode(codes | {"indices": indices})
    return images.where(F.interpolate(there.unsqueeze(1).float(), images.shape[-2:]) > 0, GREY)


def cell_map(ranks, done, total, height):
    """A picture of the cells (h, w) that have a code, coloured by rank and outlined; uint8
    (height, width, 3)."""
    import matplotlib

    scale = height // len(ranks)
    ranks = np.kron(np.where(ranks < done, ranks, -1), np.ones((scale, scale), int))
    colours = matplotlib.colormaps["viridis"](ranks / max(1, total - 1))[..., :3]
    colours[ranks < 0] = 0.85
    colours[:, 1:][np.diff(ranks, axis=1) != 0] = 1
    colours[1:][np.diff(ranks, axis=0) != 0] = 1
    return (colours * 255).astype(np.uint8)


if __name__ == "__main__":
    run_main(main)
