"""Shapes: the embedded dataset, drawn on the fly from (seed, index). It needs no files.

    Shapes          the images of a split, for dataset.py
    draw_shapes     one image, its label, and where the detail is
"""

from __future__ import annotations

import colorsys
import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FORMS = ["disc", "square", "triangle", "cross", "ring"]
TEXTURES = ["striped", "checked"]
CLASSES = [f"{texture} {form}" for form in FORMS for texture in TEXTURES]


class Shapes:
    """The images of a split, a Source for dataset.py. Validation images are never among the training images."""

    classes = CLASSES

    def __init__(self, train: bool, image_size: int, seed: int, size: int, max_objects: int = 3):
        self.first, self.image_size, self.seed, self.max_objects = 0 if train else 2**31, image_size, seed, max_objects
        self.labels = _Labels(seed, self.first, size)

    def load(self, index: int) -> Tensor:
        return draw_shapes(self.seed, self.first + index, self.image_size, self.max_objects)[0]

    def name(self, index: int) -> str:
        return f"shapes image {self.first + index}"


@dataclass
class _Labels:
    """A list of labels that is not held in memory."""

    seed: int
    first: int
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if index >= self.size:
            raise IndexError(index)  # or going through them would not end
        return random.Random(f"shapes {self.seed} {self.first + index}").randrange(len(CLASSES))


def draw_shapes(seed: int, index: int, size: int, max_objects: int = 3) -> tuple[Tensor, int, Tensor]:
    """Image number `index`: (uint8 (3, size, size), label, detail bool (size, size)).

    One to `max_objects` objects of one form, one of six colours and one texture (period 7 to 11 pixels) over a smooth
    gradient. `detail` is where the objects are: 15 % to 60 % of the image.
    """
    rng = random.Random(f"shapes {seed} {index}")
    label = rng.randrange(len(CLASSES))
    form, texture = FORMS[label // len(TEXTURES)], TEXTURES[label % len(TEXTURES)]
    y, x = (np.mgrid[:size, :size].astype(np.float32) + 0.5) / size
    while True:
        objects = _place(rng, max_objects)
        inside = np.zeros((size, size), np.float32)  # how much of each pixel is covered, 0 to 1
        for cx, cy, r in objects:
            distance = _distance(form, x - cx, y - cy, r, angle=rng.uniform(-0.3, 0.3))
            inside = np.maximum(inside, np.clip(0.5 - distance * size, 0, 1))
        if 0.15 <= (inside > 0.5).mean() <= 0.60:
            break
    hue, angle = rng.random(), rng.uniform(0, 2 * math.pi)
    slope = 0.5 + 0.7 * ((x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle))
    background = _mix(slope, _colour(hue, 0.3, rng.uniform(0.4, 0.6)), _colour(hue + rng.uniform(-0.2, 0.2), 0.2, 0.9))
    angle, period = rng.uniform(0, math.pi), rng.uniform(7, 11)
    waves = [np.sin(2 * math.pi * size / period * (x * math.cos(a) + y * math.sin(a))) for a in (angle, angle + math.pi / 2)]
    wave = waves[0] if texture == "striped" else waves[0] * waves[1] * 1.5
    hue = rng.randrange(6) / 6
    paint = _mix(0.5 + 0.5 * np.tanh(3 * wave), _colour(hue, 0.9, 0.15), _colour(hue, 0.7, 1.0))
    image = background + inside * (paint - background)
    return torch.from_numpy((image * 255).round().clip(0, 255).astype(np.uint8)), label, torch.from_numpy(inside > 0.5)


def _place(rng: random.Random, max_objects: int) -> list[tuple[float, float, float]]:
    """Centres and radii, in image sides, of one to three objects that do not touch."""
    count = rng.randint(1, max_objects)
    low, high = {1: (0.25, 0.34), 2: (0.17, 0.21), 3: (0.14, 0.17)}[count]
    while True:
        placed = []
        for _ in range(count):
            r = rng.uniform(low, high)
            placed.append((rng.uniform(1.2 * r, 1 - 1.2 * r), rng.uniform(1.2 * r, 1 - 1.2 * r), r))
        if all(math.dist(a[:2], b[:2]) > 1.25 * (a[2] + b[2]) for i, a in enumerate(placed) for b in placed[:i]):
            return placed


def _distance(form: str, x: np.ndarray, y: np.ndarray, r: float, angle: float) -> np.ndarray:
    """Distance to the outline, negative inside; every form has the area of a disc of radius r."""
    x, y = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    if form == "disc":
        return np.hypot(x, y) - r
    if form == "square":
        return np.maximum(abs(x), abs(y)) - 0.886 * r
    if form == "triangle":
        return np.maximum(y, 0.866 * abs(x) - 0.5 * y) - 0.778 * r
    if form == "cross":
        long, short = 1.189 * r, 0.396 * r
        return np.minimum(np.maximum(abs(x) - long, abs(y) - short), np.maximum(abs(x) - short, abs(y) - long))
    return abs(np.hypot(x, y) - 0.845 * r) - 0.296 * r  # ring


def _colour(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.float32(colorsys.hsv_to_rgb(hue % 1, saturation, value)).reshape(3, 1, 1)


def _mix(t: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a + (b - a) * np.clip(t, 0, 1)
