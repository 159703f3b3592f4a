"""Draws docs/how-it-works-*.svg, which docs/how-it-works.md shows. Run by hand.

    python train_stage1.py --config configs/quickstart/mqvae.yaml \\
        data.image_size=32 data.max_objects=1
    python train_stage2.py --config configs/quickstart/stackformer.yaml train.max_train_steps=2000
    make demo
    python train_stage2.py --config configs/quickstart/mask_transformer.yaml \\
        train.max_train_steps=4000
    python docs/draw_how_it_works.py runs/stackformer runs/demo_dq_transformer \\
        runs/mask_transformer [--image 37]

The stage-1 models are those that the runs carry. Every drawing follows the same validation image:
all pictures, numbers and probabilities are what these models compute. Each function that a drawing
names is also in a `data-code` attribute, as file.py::name, which a test reads.

    Drawing             an SVG: title, rows of steps, and what is drawn in a step
    draw_mqvae, ...     one for each model
    colours_of, heat    vectors and numbers to colours
"""

from __future__ import annotations

import argparse
import base64
import io
import math
import sys
from html import escape
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.shapes import CLASSES, draw_shapes
from harness.models import load_run
from mask_transformer import Unmask
from mqvae import DeMask, at, highest

FOLDER = Path(__file__).resolve().parent
LEFT = 24  # of the first step
PITCH = 233  # from step to step
SIDE = 184  # of a picture
STEP_HEIGHT = 346
GAP = 12  # between rows

# Each class: its properties in light, and in dark.
STYLE = {
    "bg": ("fill:#ffffff;stroke:#d1d9e0", "fill:#0d1117;stroke:#3d444d"),
    "ink": ("fill:#1f2328", "fill:#f0f6fc"),
    "muted": ("fill:#59636e", "fill:#9198a1"),
    "code": ("fill:#0550ae", "fill:#79c0ff"),
    "band": ("fill:#f3f5f8", "fill:#161b22"),
    "arrow": ("stroke:#818b98;fill:none", "stroke:#818b98;fill:none"),
    "head": ("fill:#818b98", "fill:#818b98"),
    "cell": ("fill:#eaeef2;stroke:#c3ccd5", "fill:#21262d;stroke:#444c56"),
    "hidden": ("fill:#d8dee4;stroke:#b6c0ca", "fill:#30363d;stroke:#505964"),
    "coarse": ("fill:#d6e5ff;stroke:#5b8def", "fill:#1b3765;stroke:#5b8def"),
    "fine": ("fill:#ffddd6;stroke:#e0705f", "fill:#5d2a24;stroke:#e0705f"),
    "kept": ("fill:#ffe7c2;stroke:#d98a1f", "fill:#573a0d;stroke:#d98a1f"),
    "frame": ("stroke:#d98a1f;fill:none", "stroke:#f0a94a;fill:none"),
    "bar": ("fill:#9db4d3", "fill:#3f5878"),
    "hit": ("fill:#d98a1f", "fill:#f0a94a"),
    "block": ("fill:#e4dcf7;stroke:#9a84d6", "fill:#372d57;stroke:#9a84d6"),
}
VIRIDIS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]])


class Drawing:
    """Steps in rows of four, each a picture between a heading and what belongs to it.

    file    whose functions are named without their file
    """

    def __init__(self, name: str, title: str, file: str, subtitle: str, rows: int):
        self.name = name
        self.file = file
        self.height = 82 + rows * STEP_HEIGHT + (rows - 1) * GAP
        self.number = 0
        self.parts = [f"<title>{escape(title)}: {escape(subtitle)}</title>"]
        self.box(0.5, 0.5, 959, self.height - 1, "bg", 10)
        self.text(LEFT, 38, title, size=21, weight=700)
        self.text(936, 38, file, "code mono", 15, "end")
        self.text(LEFT, 60, subtitle, "muted", 13)

    def save(self) -> None:
        light = "".join(f".{name}{{{values[0]}}}" for name, values in STYLE.items())
        dark = "".join(f".{name}{{{values[1]}}}" for name, values in STYLE.items())
        style = ("text{font-family:-apple-system,BlinkMacSystemFont,'Segoe UI','Noto Sans',"
                 "Helvetica,Arial,sans-serif}.mono{font-family:ui-monospace,SFMono-Regular,Menlo,"
                 "Consolas,'DejaVu Sans Mono',monospace}image{image-rendering:pixelated}" + light
                 + f"@media (prefers-color-scheme:dark){{{dark}}}")
        head = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 '
                f'{self.height}" width="960" height="{self.height}" role="img">')
        lines = [head, f"<style>{style}</style>", *self.parts, "</svg>"]
        (FOLDER / f"how-it-works-{self.name}.svg").write_text("\n".join(lines) + "\n")

    # Marks

    def text(self, x: float, y: float, words: str, kind: str = "ink", size: float = 12,
             anchor: str = "start", weight: int = 400, more: str = "") -> None:
        bold = f' font-weight="{weight}"' if weight != 400 else ""
        where = f' text-anchor="{anchor}"' if anchor != "start" else ""
        self.parts.append(f'<text x="{x:g}" y="{y:g}" class="{kind}" font-size="{size:g}"{bold}'
                          f'{where}{more}>{escape(words)}</text>')

    def box(self, x: float, y: float, width: float, height: float, kind: str,
            radius: float = 0, more: str = "") -> None:
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
                          f'rx="{radius:g}" class="{kind}"{more}/>')

    def tile(self, x: float, y: float, width: float, height: float, kind: str, words: str = "",
             size: float = 10.5) -> None:
        self.box(x, y, width, height, kind)
        if words:
            self.text(x + width / 2, y + height / 2 + 0.36 * size, words, "ink", size, "middle")

    def picture(self, x: float, y: float, side: float, pixels: np.ndarray) -> None:
        """Pixels uint8 (h, w, 3)."""
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", optimize=True)
        data = base64.b64encode(file.getvalue()).decode()
        self.parts.append(f'<image x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}" '
                          f'href="data:image/png;base64,{data}"/>')

    def lines(self, x: float, y: float, side: float, cells: int, strength: float = 0.35) -> None:
        """Lines between cells on a picture."""
        steps = [side * i / cells for i in range(1, cells)]
        path = "".join(f"M{x + s:g} {y}v{side:g}M{x:g} {y + s:g}h{side:g}" for s in steps)
        self.parts.append(f'<path d="{path}" stroke="#fff" stroke-opacity="{strength}"/>')

    def numbers(self, x: float, y: float, side: float, pixels: np.ndarray, words: list[str],
                size: float = 10) -> None:
        """Coloured cells (h, w, 3) with words on them."""
        cell = side / len(pixels)
        for i, word in enumerate(words):
            row, column = divmod(i, len(pixels))
            self.shaded(x + column * cell, y + row * cell, cell, pixels[row, column], word, size)

    def shaded(self, x: float, y: float, side: float, colour: np.ndarray, word: str = "",
               size: float = 10) -> None:
        """A square of this colour, a word on it, dark on bright ones."""
        red, green, blue = colour.tolist()
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}" '
                          f'fill="rgb({red},{green},{blue})"/>')
        if word:
            on_it = "#111" if colour @ [0.3, 0.59, 0.11] > 130 else "#fff"
            self.parts.append(
                f'<text x="{x + side / 2:g}" y="{y + side / 2 + 0.36 * size:g}" '
                f'font-size="{size:g}" text-anchor="middle" fill="{on_it}">{word}</text>')

    def arrow(self, x: float, y: float, length: float) -> None:
        end = x + length
        self.parts.append(
            f'<path d="M{x:g} {y:g}H{end - 5:g}" class="arrow" stroke-width="1.6"/>'
            f'<path d="M{end:g} {y:g}l-8 -4.5v9z" class="head"/>')

    # Steps

    def row(self, number: int, name: str, words: str, first: int = 0, last: int = 3) -> None:
        """A band above the columns from first to last, which says what call they are."""
        x = LEFT + first * PITCH
        y = self._top(number)
        width = 928 - (3 - last) * PITCH - first * PITCH - (6 if last < 3 else 0)
        self.box(x - 8, y, width, 24, "band", 5)
        self.code(x, y + 16.5, name)
        self.text(x + 7.4 * len(name.split("::")[1]) + 10, y + 16.5, words, "muted", 12.5)

    def step(self, row: int, column: int, heading: str, shape: str, caption: list[str],
             codes: list[str], width: int = 1, arrow: bool = True) -> tuple[float, float]:
        """Writes all but the picture, whose corner it returns. width: in columns."""
        self.number += 1
        x = LEFT + column * PITCH
        y = self._top(row) + 58
        self.parts.append(f'<circle cx="{x + 9}" cy="{y - 15}" r="9" class="bar"/>')
        self.text(x + 9, y - 11, str(self.number), "ink", 11.5, "middle", 700)
        self.text(x + 24, y - 10.5, heading, size=13.5, weight=600)
        below = y + SIDE + 18
        if shape:
            self.text(x, below, shape, "ink mono", 11.5, weight=600)
            below += 17
        for line in caption:
            self.text(x, below, line, "muted", 12)
            below += 15.5
        for name in codes:
            self.code(x, below + 2, name)
            below += 16
        last = column + width - 1
        if arrow and last < 3:
            self.arrow(LEFT + last * PITCH + SIDE + 9, y + SIDE / 2, PITCH - SIDE - 18)
        return x, y

    def code(self, x: float, y: float, name: str) -> None:
        """Names a function, file.py::name; its file only if it is another than the drawing's."""
        file, function = name.split("::")
        words = function if file == self.file else f"{file} {function}"
        self.text(x, y, words, "code mono", 11.5, more=f' data-code="{name}"')

    def _top(self, row: int) -> float:
        return 78 + row * (STEP_HEIGHT + GAP)

    # What several drawings show

    def codes_at_positions(self, corner: tuple[float, float], codes: dict, grid: int) -> None:
        """Codes of an MQ-VAE."""
        code_at = dict(zip(codes["positions"][0].tolist(), codes["indices"][0].tolist()))
        for i in range(grid * grid):
            x, y, size = cell_of(corner, i, grid)
            self.tile(x, y, size, size, "kept" if i in code_at else "cell", str(code_at.get(i, "")),
                      10)

    def codes_with_grain(self, corner: tuple[float, float], codes: dict) -> None:
        """Codes of a DQ-VAE: large cells are coarse codes, small ones fine codes."""
        grain = codes["grain"][0]
        indices = codes["indices"][0]
        region = SIDE / len(grain)
        times = len(indices) // len(grain)
        for y, x in np.ndindex(*grain.shape):
            fine = int(grain[y, x])
            parts = times if fine else 1
            size = region / parts
            for i, j in np.ndindex(parts, parts):
                code = int(indices[y * times + i, x * times + j])
                self.tile(corner[0] + x * region + j * size, corner[1] + y * region + i * size,
                          size, size, "fine" if fine else "coarse", str(code),
                          10 if fine else 12.5)

    def bars(self, corner: tuple[float, float], p: Tensor, truth: int, number: int = 7) -> None:
        """The likeliest codes, the image's own marked."""
        shown = p.topk(number).indices.tolist()
        if truth not in shown:
            shown[-1] = truth
        line = SIDE / number
        widest = max(float(p[shown].max()), 1e-6)
        for i, code in enumerate(shown):
            y = corner[1] + i * line
            hit = code == truth
            self.text(corner[0] + 30, y + line / 2 + 4, str(code), "ink", 12, "end",
                      700 if hit else 400)
            length = max(98 * float(p[code]) / widest, 1.5)
            self.box(corner[0] + 38, y + 4, length, line - 8, "hit" if hit else "bar", 2)
            self.text(corner[0] + 44 + length, y + line / 2 + 4, f"{100 * p[code]:.0f} %", "muted",
                      11.5)

    def chances(self, corner: tuple[float, float], p: Tensor, grid: int, possible: Tensor,
                truth: int) -> None:
        """Probabilities of cells, those that are impossible in grey, the image's own framed."""
        colours = heat(p).reshape(-1, 3)
        for i in range(grid * grid):
            x, y, size = cell_of(corner, i, grid)
            if possible[i]:
                word = f"{100 * p[i]:.0f}" if p[i] >= 0.095 else ""
                self.shaded(x, y, size, colours[i], word, 11)
            else:
                self.box(x, y, size, size, "hidden")
        x, y, size = cell_of(corner, truth, grid)
        self.box(x, y, size, size, "frame", more=' stroke-width="3"')

    def outlined(self, x: float, y: float, word: str, size: float) -> None:
        """A word in the middle of a cell of a photo."""
        self.parts.append(
            f'<text x="{x:g}" y="{y + 0.36 * size:g}" font-size="{size:g}" font-weight="700" '
            'fill="#fff" stroke="#000" stroke-width="2.4" paint-order="stroke" '
            f'text-anchor="middle">{word}</text>')

    def four(self, corner: tuple[float, float], pictures: list[np.ndarray]) -> None:
        half = (SIDE - 6) / 2
        for i, pixels in enumerate(pictures):
            self.picture(corner[0] + i % 2 * (half + 6), corner[1] + i // 2 * (half + 6), half,
                         pixels)


def cell_of(corner: tuple[float, float], number: int, grid: int, side: float = SIDE
            ) -> tuple[float, float, float]:
    """(x, y, side) of a cell of a picture, in raster order."""
    size = side / grid
    return corner[0] + number % grid * size, corner[1] + number // grid * size, size


# Colours


def pixels_of(images: Tensor) -> np.ndarray:
    """The first of images (B, 3, H, W) in [-1, 1], uint8 (H, W, 3)."""
    return ((images[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def colours_of(vectors: Tensor, like: Tensor | None = None) -> np.ndarray:
    """Vectors (h, w, D) as colours: the three principal components of these, or of others."""
    like = (vectors if like is None else like).flatten(0, -2)
    mean = like.mean(0)
    _, _, axes = torch.linalg.svd(like - mean, full_matrices=False)
    spread = ((like - mean) @ axes[:3].T).std(0)
    shares = 0.5 + 0.22 * (vectors - mean) @ axes[:3].T / spread
    return (shares.clamp(0, 1) * 255).byte().numpy()


def heat(values: Tensor) -> np.ndarray:
    """Numbers (...) as colours, dark for the lowest and bright for the highest."""
    values = values.detach().numpy()
    share = (values - values.min()) / max(values.max() - values.min(), 1e-9) * (len(VIRIDIS) - 1)
    channels = [np.interp(share, range(len(VIRIDIS)), VIRIDIS[:, c]) for c in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def shape_of(values: Tensor) -> str:
    """Its shape without the batch."""
    return "(" + ", ".join(map(str, values.shape[1:])) + ("," if values.ndim == 2 else "") + ")"


def psnr(a: Tensor, b: Tensor) -> str:
    return f"{10 * math.log10(4 / float((a.clamp(-1, 1) - b).square().mean())):.1f} dB PSNR"


# Models


def draw_mqvae(mqvae, image: Tensor) -> None:
    drawing = Drawing(
        "mqvae", "MQ-VAE", "mqvae.py",
        "Only the cells that matter keep a code; the decoder fills in the others. Shapes are "
        "without the batch.", 2)
    z = mqvae.encoder(image)                                            # (1, C, h, w)
    vectors, scores = mqvae.features(image)                             # (1, hw, D), (1, h, w)
    grid = scores.shape[1]
    codes = mqvae.encode(image)
    positions = codes["positions"][0].tolist()
    assert torch.equal(codes["positions"], highest(scores, len(positions)))

    drawing.row(0, "mqvae.py::MQVAE.encode", "an image to its codes and their positions")
    corner = drawing.step(0, 0, "The image", f"image {shape_of(image)}",
                          [f"{grid} x {grid} cells of", f"{mqvae.factor} x {mqvae.factor} pixels"],
                          [])
    drawing.picture(*corner, SIDE, pixels_of(image))
    drawing.lines(*corner, SIDE, grid)

    corner = drawing.step(0, 1, "A vector per cell", f"z {shape_of(z)}",
                          ["drawn: three principal", "components, as colours"],
                          ["vqgan.py::Encoder.forward"])
    drawing.picture(*corner, SIDE, colours_of(z[0].permute(1, 2, 0)))

    low, high = float(scores.min()), float(scores.max())
    corner = drawing.step(0, 2, "How important?", f"scores {shape_of(scores)}",
                          [f"here {low:.2f} to {high:.2f}; each vector",
                           "is multiplied by its score"],
                          ["mqvae.py::ScoreNet.forward", "mqvae.py::MQVAE.features"])
    words = [f"{s:.2f}".removeprefix("0") for s in scores.flatten()]
    drawing.numbers(*corner, SIDE, heat(scores[0]), words)

    corner = drawing.step(0, 3, f"The {len(positions)} highest stay",
                          f"positions {shape_of(codes['positions'])}",
                          ["numbered in raster order,", "the order of the codes"],
                          ["mqvae.py::highest", "mqvae.py::MQVAE.maps"])
    drawing.picture(*corner, SIDE, pixels_of(mqvae.maps(codes, image)["kept_map"]))
    for i, position in enumerate(positions):
        x, y, cell = cell_of(corner, position, grid)
        drawing.box(x, y, cell, cell, "frame", more=' stroke-width="1.8"')
        drawing.outlined(x + cell / 2, y + cell / 2, str(i), 11)

    drawing.row(1, "mqvae.py::MQVAE.encode", "goes on", 0, 0)
    drawing.row(1, "mqvae.py::MQVAE.decode", "the codes back to an image", 1)
    size = mqvae.quantizer.codebook_size
    corner = drawing.step(1, 0, "The nearest codes", f"indices {shape_of(codes['indices'])}",
                          [f"of {size}; together with the", "positions, all that is stored"],
                          ["mqvae.py::at", "vqgan.py::Quantizer.nearest"])
    drawing.codes_at_positions(corner, codes, grid)
    z_q = mqvae.quantizer.lookup(codes["indices"])                      # (1, N, D)
    assert torch.equal(mqvae.quantizer.nearest(at(vectors, codes["positions"])), codes["indices"])

    everywhere = mqvae.demask.token.expand(1, grid * grid, -1).clone()
    everywhere[0, positions] = z_q[0]
    corner = drawing.step(1, 1, "Back onto the grid", f"x ({z_q.shape[-1]}, {grid}, {grid})",
                          ["codes in their places, one", "learned token (t) elsewhere"],
                          ["mqvae.py::DeMask.forward"])
    colours = colours_of(everywhere.view(grid, grid, -1), z_q)
    drawing.picture(*corner, SIDE, colours)
    for i in set(range(grid * grid)) - set(positions):
        x, y, cell = cell_of(corner, i, grid)
        drawing.tile(x, y, cell, cell, "hidden", "t", 10)

    layers = len(mqvae.demask.attns)
    corner = drawing.step(1, 2, f"Attention, {layers} times", f"mask ({grid * grid},)",
                          ["weight of keys: 1 if kept", "(white), else as written"],
                          ["vqgan.py::Attention.forward"])
    weight = DeMask.MASK
    half = (SIDE - 22) / 2 - 8
    for layer in range(min(layers, 4)):
        x = corner[0] + layer % 2 * (half + 14)
        y = corner[1] + layer // 2 * (half + 24)
        mask = np.full(grid * grid, weight)
        mask[positions] = 1
        shades = (40 + 200 * mask).round().astype(np.uint8).reshape(grid, grid, 1).repeat(3, 2)
        drawing.picture(x, y, half, shades)
        drawing.text(x, y + half + 13, f"block {layer + 1}: {weight:.2f}", "muted", 11)
        weight = math.sqrt(weight)

    recon = mqvae.decode(codes)
    corner = drawing.step(1, 3, "The reconstruction", f"image {shape_of(recon)}",
                          [f"{psnr(recon, image)} from",
                           f"{len(positions)} of {grid * grid} cells"],
                          ["vqgan.py::UpPath.forward"])
    drawing.picture(*corner, SIDE, pixels_of(recon))
    drawing.save()


def draw_dqvae(dqvae, image: Tensor) -> None:
    drawing = Drawing(
        "dqvae", "DQ-VAE", "dqvae.py",
        "A smooth region gets one code, a detailed one four. Shapes are without the batch.", 2)
    features = dqvae.features(image)                                    # (1, z, h, w), coarse first
    grain, _, errors = dqvae.route(image, features, None)
    gain = (errors[:, 0] - errors[:, -1])                               # (1, h', w')
    vectors = dqvae.vectors(features, grain)                            # (1, h, w, D)
    codes = dqvae.encode(image)
    regions = grain.shape[1]
    grid = vectors.shape[1]

    drawing.row(0, "dqvae.py::DQVAE.encode", "an image to its codes and their granularity")
    corner = drawing.step(0, 0, "The image", f"image {shape_of(image)}",
                          [f"{regions} x {regions} regions of",
                           f"{dqvae.factor} x {dqvae.factor} pixels"], [])
    drawing.picture(*corner, SIDE, pixels_of(image))
    drawing.lines(*corner, SIDE, regions, 0.5)

    corner = drawing.step(0, 1, "Features, twice",
                          f"{shape_of(features[0])} {shape_of(features[1])}",
                          ["of one encoder: coarse and fine", "(principal components)"],
                          ["dqvae.py::DQVAE.features", "vqgan.py::DownPath.forward"])
    part = 118
    like = torch.cat([x[0].flatten(1).T for x in features])
    fine = colours_of(features[1][0].permute(1, 2, 0), like)
    coarse = colours_of(features[0][0].permute(1, 2, 0), like)
    drawing.picture(*corner, part, coarse)
    x = corner[0] + SIDE - part
    y = corner[1] + SIDE - part
    drawing.box(x - 4, y - 4, part + 8, part + 8, "bg")
    drawing.picture(x, y, part, fine)

    corner = drawing.step(0, 2, "Gain of four codes", f"errors {shape_of(errors)}",
                          ["drawn: predicted error with one", "code, less that with four"],
                          ["dqvae.py::FeatureRouter.forward", "dqvae.py::DQVAE.route"])
    words = [f"{g:.2f}" for g in gain.flatten()]
    drawing.numbers(*corner, SIDE, heat(gain[0]), words, 12)

    threshold = float(dqvae.thresholds[0])
    corner = drawing.step(0, 3, "The granularity map", f"grain {shape_of(grain)}",
                          ["1 (four codes) where the gain",
                           f"exceeds the threshold, {threshold:.2f}"],
                          ["dqvae.py::DQVAE.refine", "dqvae.py::DQVAE.maps"])
    drawing.picture(*corner, SIDE, pixels_of(dqvae.maps(codes, image)["grain_map"]))
    drawing.lines(*corner, SIDE, regions, 0.6)
    for i, g in enumerate(grain.flatten().tolist()):
        x, y, region = cell_of(corner, i, regions)
        drawing.outlined(x + region / 2, y + region / 2, str(g), 14)

    drawing.row(1, "dqvae.py::DQVAE.encode", "goes on", 0, 1)
    drawing.row(1, "dqvae.py::DQVAE._decode", "the codes back to an image", 2)
    corner = drawing.step(1, 0, "One grid of vectors", f"z {shape_of(vectors)}",
                          ["of each region's granularity;", "a coarse one fills 2 x 2 cells"],
                          ["dqvae.py::DQVAE.vectors", "dqvae.py::DQVAE.to_finest"])
    drawing.picture(*corner, SIDE, colours_of(vectors[0]))
    drawing.lines(*corner, SIDE, regions, 0.6)

    counts = [int((grain == g).sum()) for g in range(2)]
    total = counts[0] + 4 * counts[1]
    corner = drawing.step(1, 1, "The nearest codes", f"indices {shape_of(codes['indices'])}",
                          [f"{counts[0]} coarse + {4 * counts[1]} fine = {total} codes, of",
                           f"one codebook of {dqvae.quantizer.codebook_size}"],
                          ["vqgan.py::Quantizer.nearest", "dqvae.py::DQVAE.same_within_code"])
    drawing.codes_with_grain(corner, codes)

    z = dqvae.post_quant(dqvae.quantizer.lookup(codes["indices"]).permute(0, 3, 1, 2).contiguous())
    placed = dqvae.position(z)
    corner = drawing.step(1, 2, "Codes and positions", f"z {shape_of(placed)}",
                          ["equal codes of a coarse region", "now differ by their place"],
                          ["vqgan.py::VectorQuantizer.lookup",
                           "dqvae.py::PositionEmbedding.forward"])
    drawing.picture(*corner, SIDE, colours_of(placed[0].permute(1, 2, 0)))

    recon = dqvae.decode(codes)
    corner = drawing.step(1, 3, "The reconstruction", f"image {shape_of(recon)}",
                          [f"{psnr(recon, image)} from", f"{total} codes of {grid * grid}"],
                          ["vqgan.py::Decoder"])
    drawing.picture(*corner, SIDE, pixels_of(recon))
    drawing.save()


def draw_stackformer(model, mqvae, image: Tensor, label: int) -> None:
    drawing = Drawing(
        "stackformer", "Stackformer", "stackformer.py",
        "What is where: a code, then its position, then the next code. Shapes are without the "
        "batch.", 2)
    labels = torch.tensor([label])
    codes = mqvae.encode(image)
    indices = codes["indices"][0]
    positions = codes["positions"][0]
    grid = model.grid[0]
    n = len(indices)

    drawing.row(0, "stackformer.py::Stackformer._nats",
                "training: all steps at once, each sees what is to its left")
    corner = drawing.step(0, 0, "The codes of MQ-VAE",
                          f"indices, positions {shape_of(indices[None])}",
                          ["the image's kept cells,", "read in raster order"],
                          ["mqvae.py::MQVAE.encode"])
    drawing.codes_at_positions(corner, codes, grid)

    corner = drawing.step(
        0, 1, "A sequence of pairs", f"x, h, p ({n}, {model.index_emb.shape[1]})",
        [f"{n} steps. Step t reads a start token (one per class) and the pairs before t. The "
         "Code-Transformer's", "output h predicts code t; the Position-Transformer reads h + the "
         "embedding of code t and predicts position t."],
        ["stackformer.py::Stackformer._hidden", "stackformer.py::Stackformer.logits"], 3)
    shown = 7  # whose step is drawn below
    x0 = corner[0] + 62
    width = (2 * PITCH + SIDE + 26 - 62) / n
    rows = {"reads": 0, "code": 76, "position": 145}
    for word, y in rows.items():
        height = 36 if word == "reads" else 26
        drawing.text(corner[0], corner[1] + y + height / 2 + 4, word, "muted", 12)
    for y, words in ((45, "Code-Transformer"), (113, "Position-Transformer")):
        drawing.box(x0, corner[1] + y, n * width - 3, 21, "block", 5)
        drawing.text(x0 + 12, corner[1] + y + 15, words, "ink", 12, weight=600)
    for t in range(n):
        x = x0 + t * width
        if t == 0:
            drawing.box(x, corner[1], width - 3, 36, "cell", 3)
            for line, word in enumerate(("start", f"class {label}")):
                drawing.text(x + (width - 3) / 2, corner[1] + 15 + 14 * line, word, "ink",
                             9.5, "middle")
        else:
            drawing.box(x, corner[1], width - 3, 36, "kept", 3)
            middle = x + (width - 3) / 2
            drawing.text(middle, corner[1] + 15, str(int(indices[t - 1])), "ink", 11.5, "middle",
                         600)
            drawing.text(middle, corner[1] + 30, f"at {int(positions[t - 1])}", "ink", 10.5,
                         "middle")
        drawing.tile(x, corner[1] + rows["code"], width - 3, 26, "kept", str(int(indices[t])), 11.5)
        drawing.tile(x, corner[1] + rows["position"], width - 3, 26, "cell", f"at {positions[t]}",
                     11)
    drawing.box(x0 + shown * width - 3.5, corner[1] - 5, width + 4, 182, "frame", 4,
                ' stroke-width="2"')

    drawing.row(1, "stackformer.py::Stackformer.sample",
                f"drawing: step {shown} of this image (framed above), then a new image")
    logits = model.logits(codes, labels)
    code = int(indices[shown])
    p = logits["indices"][0, shown].softmax(-1)
    corner = drawing.step(1, 0, "Code-Transformer", f"logits ({model.codebook_size},)",
                          ["the likeliest codes; orange:", "the one that the image has"],
                          ["gpt.py::CodeHead.draw", "gpt.py::filter_logits"])
    drawing.bars(corner, p, code)

    last = int(positions[shown - 1])
    cells = torch.arange(grid * grid)
    possible = (cells > last) & (cells <= grid * grid - n + shown)
    p = logits["positions"][0, shown].masked_fill(~possible, -math.inf).softmax(-1)
    corner = drawing.step(1, 1, "Position-Transformer", f"logits ({grid * grid},)",
                          ["in %; grey: before the last one,", "or no room for those to come"],
                          ["stackformer.py::Stackformer.sample", "gpt.py::draw"])
    drawing.chances(corner, p, grid, possible, int(positions[shown]))

    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    new = model.sample(4, torch.tensor([label] * 4), top_p=0.95, cfg_scale=2.0,
                       generator=generators)
    corner = drawing.step(1, 2, "A new image's codes", f"indices, positions ({n},)",
                          [f"{n} pairs, drawn one by one", f"for the class {CLASSES[label]}"],
                          ["gpt.py::Cache.step"])
    first = {key: value[:1] for key, value in new.items()}
    drawing.codes_at_positions(corner, first, grid)

    images = mqvae.decode(new)
    corner = drawing.step(1, 3, "New images", f"images {shape_of(images)}",
                          ["the first is that of step 5"], ["mqvae.py::MQVAE.decode"])
    drawing.four(corner, [pixels_of(x.unsqueeze(0)) for x in images])
    drawing.save()


def draw_dq_transformer(model, dqvae, image: Tensor, label: int) -> None:
    drawing = Drawing(
        "dq-transformer", "DQ-Transformer", "dq_transformer.py",
        "From coarse to fine: where is the next code, then which one is it. Shapes are without the "
        "batch.", 2)
    labels = torch.tensor([label])
    codes = dqvae.encode(image)
    tokens = model.order(codes)
    slots = tokens.slot[0]
    contents = tokens.content[0].tolist()
    regions = model.grids[0][0]
    counts = tokens.counts[0].tolist()

    drawing.row(0, "dq_transformer.py::DQTransformer.order", "codes as a sequence; unorder is its "
                "inverse")
    corner = drawing.step(0, 0, "The codes of DQ-VAE", f"indices {shape_of(codes['indices'])}",
                          [f"grain {shape_of(codes['grain'])}: {counts[0]} coarse",
                           f"codes (blue), {counts[1]} fine (red)"],
                          ["dqvae.py::DQVAE.encode"])
    drawing.codes_with_grain(corner, codes)

    corner = drawing.step(
        0, 1, "Coarse codes, then fine ones", f"tokens ({len(slots)},)",
        ["Each granularity: a start token (one per class), its codes in raster order, an end "
         "token. A token's code is above,", "its cell below, of the coarse or the fine grid. "
         "Input: content (shared), position, granularity and index embeddings."],
        ["dq_transformer.py::DQTransformer._tabulate", "dq_transformer.py::DQTransformer._hidden"],
        3)
    shown = 3  # the coarse code whose step is drawn below
    per_line = 18
    width = (2 * PITCH + SIDE + 26) / per_line
    line, column, seen = 0, 0, -1
    lines_of_fine = math.ceil((counts[1] + 2) / per_line)
    height = min(40, (SIDE - 8) / (1 + lines_of_fine) - 8)
    for slot, content in zip(slots.tolist(), contents):
        kind = int(model.slot_kind[slot])
        g = int(model.slot_grain[slot])
        if (kind == 0 and g == 1) or column == per_line:
            line, column = line + 1, 0
        x = corner[0] + column * width
        y = corner[1] + line * (height + 8) + (10 if g else 0)
        middle = x + (width - 3) / 2
        if kind == 1:
            drawing.box(x, y, width - 3, height, "fine" if g else "coarse", 3)
            drawing.text(middle, y + height / 2 - 2, str(content), "ink", 11.5, "middle", 600)
            drawing.text(middle, y + height - 6, f"at {int(model.slot_cell[slot])}", "ink", 10,
                         "middle")
            if g == 0:
                seen += 1
            if g == 0 and seen == shown:
                drawing.box(x - 2, y - 3.5, width + 1, height + 7, "frame", 4,
                            ' stroke-width="2.4"')
        else:
            drawing.box(x, y, width - 3, height, "cell", 3)
            words = ("start", f"class {label}") if kind == 0 else ("end",)
            for i, word in enumerate(words):
                drawing.text(middle, y + height / 2 + 4 - 7 * (len(words) - 1) + 13 * i, word,
                             "ink", 9.5, "middle")
        column += 1

    drawing.row(1, "dq_transformer.py::DQTransformer.sample",
                f"drawing: code number {shown + 1} of this image (framed above), then a new image")
    logits = model.logits(codes, labels)
    coarse_cells = (codes["grain"][0].flatten() == 0).nonzero().flatten()
    cell = int(coarse_cells[shown])
    last = int(coarse_cells[shown - 1])
    possible = torch.arange(regions * regions) > last
    every = torch.cat([possible, torch.tensor([True])])                 # the last: the end
    p = logits["position"][0][0, shown].masked_fill(~every, -math.inf).softmax(-1)
    corner = drawing.step(1, 0, "Position-Transformer", f"logits ({regions * regions} + 1,)",
                          ["in %; grey: before the last one.",
                           f"End of the coarse codes: {100 * p[-1]:.0f} %"],
                          ["dq_transformer.py::DQTransformer.sample",
                           "dq_transformer.py::State.possible"])
    drawing.chances(corner, p[:-1], regions, possible, cell)

    code = int(codes["indices"][0, 2 * (cell // regions), 2 * (cell % regions)])
    p = logits["content"][0][0, shown].softmax(-1)
    corner = drawing.step(1, 1, "Content-Transformer", f"logits ({model.codebook_size},)",
                          ["reads that output + the position;", "orange: the image's own code"],
                          ["gpt.py::CodeHead.draw", "dq_transformer.py::State.store"])
    drawing.bars(corner, p, code)

    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    new = model.sample(4, torch.tensor([label] * 4), top_p=0.95, cfg_scale=2.0,
                       generator=generators)
    first = {key: value[:1] for key, value in new.items()}
    total = int(model.lengths(first)) - 3
    corner = drawing.step(1, 2, "A new image's codes", f"indices {shape_of(new['indices'])}",
                          [f"{total} codes; regions without a", "coarse code get four fine ones"],
                          ["gpt.py::Cache.step", "dq_transformer.py::DQTransformer._codes"])
    drawing.codes_with_grain(corner, first)

    images = dqvae.decode(new)
    corner = drawing.step(1, 3, "New images", f"images {shape_of(images)}",
                          [f"of the class {CLASSES[label]};",
                           "the first is that of step 5"], ["dqvae.py::DQVAE._decode"])
    drawing.four(corner, [pixels_of(x.unsqueeze(0)) for x in images])
    drawing.save()


def draw_mask_transformer(model, dqvae, image: Tensor, label: int) -> None:
    drawing = Drawing(
        "mask-transformer", "MaskTransformer", "mask_transformer.py",
        "All codes at once, in a few steps; first where they are (layout), then what they are. "
        "Here for a DQ-VAE.", 2)
    labels = torch.tensor([label])
    starts = model.start_tokens(1, labels, image.device)
    codes = dqvae.encode(image)
    layout, content = model.places.read(codes)                          # (1, R), (1, P)
    packed = model.places.pack(layout)
    content = content.gather(1, packed.place)                           # (1, L)
    regions = model.places.grids[0][0]
    grid = model.places.grids[-1][0]
    count = int(packed.counts)
    names = "coarse", "fine"

    drawing.row(0, "mask_transformer.py::MaskTransformer.forward",
                "training: predict what is masked from what is not")
    corner = drawing.step(0, 0, "Layout and contents",
                          f"layout {shape_of(layout)} content {shape_of(content)}",
                          ["a granularity for each region", "(blue or red), a code for each cell"],
                          ["mask_transformer.py::Places.read", "mask_transformer.py::Places.pack"])
    drawing.codes_with_grain(corner, codes)

    numbers = model._fixed_numbers(codes, 1)[0]
    half = torch.tensor([0.5])
    masked = model._masks(packed, numbers[:, 2:], (half * model.regions).ceil(),
                          (half * packed.counts).ceil())
    kinds = layout.masked_fill(masked["layout"], model.kinds)
    p_fine = model._layout_logits(kinds, starts).softmax(-1)[0, :, 1]
    right = ((p_fine > 0.5) == layout[0].bool())[masked["layout"][0]]
    corner = drawing.step(0, 1, "Layout transformer", f"logits ({model.regions}, {model.kinds})",
                          ["grey: masked, with the predicted",
                           f"share of fine; {int(right.sum())} of {len(right)} right"],
                          ["mask_transformer.py::MaskTransformer._masks",
                           "mask_transformer.py::MaskTransformer._layout_logits"])
    for i in range(model.regions):
        hidden = bool(masked["layout"][0, i])
        kind = "hidden" if hidden else names[int(layout[0, i])]
        word = f"{100 * p_fine[i]:.0f} %" if hidden else kind
        x, y, region = cell_of(corner, i, regions)
        drawing.tile(x, y, region, region, kind, word, 11.5)

    def veil(corner: tuple[float, float], side: float, pixels: np.ndarray, open_: Tensor) -> None:
        """A picture whose masked cells (h, w) are grey."""
        drawing.picture(*corner, side, pixels)
        size = side / grid
        for y, x in open_.nonzero().tolist():
            drawing.box(corner[0] + x * size, corner[1] + y * size, size, size, "hidden")

    open_ = model.places.on_finest(layout, packed.place, masked["content"].long())[0] == 1
    number = int(masked["content"].sum())
    corner = drawing.step(0, 2, "Contents, half masked", f"content ({count},)",
                          [f"{number} of {count} codes masked, drawn",
                           "as what the others decode to"],
                          ["mask_transformer.py::MaskTransformer._masks"])
    veil(corner, SIDE, pixels_of(dqvae.decode(codes)), open_)

    hidden = content.masked_fill(masked["content"], model.codebook_size)
    logits = model.content_head(model._content_hidden(hidden, packed, starts))
    sure = logits.softmax(-1).amax(-1)[0]                               # (L,)
    corner = drawing.step(0, 3, "Content transformer", f"logits ({count}, {model.codebook_size})",
                          ["drawn: the chance of the likeliest", "code in %, where one is masked"],
                          ["mask_transformer.py::MaskTransformer._content_hidden"])
    colours = heat(sure.unsqueeze(0))[0]
    for i, place in enumerate(packed.place[0].tolist()):
        fine = int(model.places.kind[place])
        side = SIDE / model.places.grids[fine][0]
        x, y, _ = cell_of(corner, int(model.places.corner[place]), grid)
        if masked["content"][0, i]:
            drawing.shaded(x, y, side, colours[i], f"{100 * sure[i]:.0f}", 12.5 if not fine else 10)
        else:
            drawing.tile(x, y, side, side, "cell")

    drawing.row(1, "mask_transformer.py::MaskTransformer.sample",
                "editing: the left half stays, the rest is drawn anew (or all, for a new image)")
    known = torch.zeros(1, grid, grid, dtype=torch.bool)
    known[:, :, :grid // 2] = True
    states = []
    plain_step = Unmask.step

    def recorded_step(self, logits: Tensor, tokens: Tensor, numbers: Tensor) -> None:
        plain_step(self, logits, tokens, numbers)
        states.append((tokens.clone(), self.open.clone()))

    with mock.patch.object(Unmask, "step", recorded_step):
        generator = [torch.Generator().manual_seed(5)]
        new = model.sample(1, labels, cfg_scale=2.0, codes=codes, known=known, generator=generator)
    new_layout, _ = model.places.read(new)
    new_packed = model.places.pack(new_layout)
    layouts = [s for s in states if s[0].shape[1] == model.regions][:8]
    contents = states[len(layouts):]
    corner = drawing.step(1, 0, "What stays", f"known {shape_of(known)}",
                          ["any region; a code stays if", "all of its cells are known"],
                          ["mask_transformer.py::Places.kept", "gpt.py::covered"])
    veil(corner, SIDE, pixels_of(dqvae.decode(codes)), ~known[0])

    side = (SIDE - 14) / 2 - 12

    def thumbnail(i: int, word: str) -> tuple[float, float]:
        x = corner[0] + i % 2 * (side + 24)
        y = corner[1] + i // 2 * (side + 22)
        drawing.text(x, y + side + 13, word, "muted", 11)
        return x, y

    corner = drawing.step(1, 1, f"The layout, in {len(layouts)} steps",
                          f"layout {shape_of(layout)}",
                          ["each step keeps those that", "the model is surest of"],
                          ["mask_transformer.py::Unmask.step",
                           "mask_transformer.py::MaskTransformer._draw_layout"])
    for i, step in enumerate((1, 3, 5, len(layouts))):
        tokens, still = layouts[step - 1]
        place = thumbnail(i, f"after step {step}")
        for j in range(model.regions):
            kind = "hidden" if still[0, j] else names[int(tokens[0, j])]
            x, y, size = cell_of(place, j, regions, side)
            drawing.tile(x, y, size, size, kind)

    final = pixels_of(dqvae.decode(new))
    corner = drawing.step(1, 2, f"The contents, in {len(contents)} steps",
                          f"content ({int(new_packed.counts)},)",
                          ["cos(pi/2 s/S) of the codes are", "still masked after step s of S"],
                          ["mask_transformer.py::Unmask.step", "gpt.py::draw"])
    for i, step in enumerate((1, 4, 8, len(contents))):
        still = contents[step - 1][1]
        on_grid = model.places.on_finest(new_layout, new_packed.place, still.long())[0] == 1
        veil(thumbnail(i, f"after step {step}"), side, final, on_grid)

    corner = drawing.step(1, 3, "The edited image", f"image {shape_of(image)}",
                          ["the codes of the left half are", "as before; they are decoded anew"],
                          ["mask_transformer.py::Places.codes", "dqvae.py::DQVAE._decode"])
    drawing.picture(*corner, SIDE, final)
    drawing.save()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("stackformer", "dq_transformer", "mask_transformer"):
        parser.add_argument(name, help="run folder")
    parser.add_argument("--image", type=int, default=37, help="number of the validation image")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pixels, label, _ = draw_shapes(0, 2**31 + args.image, 32, 1)
    image = pixels.unsqueeze(0).float() / 127.5 - 1                     # (1, 3, 32, 32)
    mqvae, _ = load_run(Path(args.stackformer) / "stage1")
    dqvae, _ = load_run(Path(args.dq_transformer) / "stage1")
    draw_mqvae(mqvae, image)
    draw_dqvae(dqvae, image)
    draw_stackformer(load_run(args.stackformer)[0], mqvae, image, label)
    draw_dq_transformer(load_run(args.dq_transformer)[0], dqvae, image, label)
    draw_mask_transformer(load_run(args.mask_transformer)[0], dqvae, image, label)


if __name__ == "__main__":
    main()
