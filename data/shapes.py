"""Shapes: the embedded dataset, drawn on the fly from (seed, index). It needs no files.

    Shapes          the images of a split, for dataset.py
    draw_shapes     one image, its label, and where the detail is

Distances are in sides of the image, shapes of arrays in pixels.
"""

import colorsys
import itertools
import math
import random
from dataclasses import dataclass

import numpy as np
import torch

FORMS = ["disc", "square", "triangle", "cross", "ring"]
TEXTURES = ["striped", "checked"]
CLASSES = [f"{texture} {form}" for form in FORMS for texture in TEXTURES]
RADII = {1: (0.25, 0.34), 2: (0.17, 0.21), 3: (0.14, 0.17)}  # by the number of objects


@dataclass
class Shapes:
    """The images of a split, a Source for dataset.py. Validation images are never among the
    training images."""

    train: bool
    image_size: int
    seed: int
    size: int  # how many images
    max_objects: int
    classes = CLASSES

    def __post_init__(self):
        first = 0 if self.train else 2**31
        self.numbers = range(first, first + self.size)
        self.labels = _Labels(self.seed, self.numbers)

    def load(self, index):
        number = self.numbers[index]
        return draw_shapes(self.seed, number, self.image_size, self.max_objects)[0]

    def name(self, index):
        return f"shapes image {self.numbers[index]}"


@dataclass
class _Labels:
    """A list of labels that is not held in memory."""

    seed: int
    numbers: range  # of the images

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        return _start(self.seed, self.numbers[index])[1]


def _start(seed, index):
    """An image's random numbers, and its label, which is the first of them."""
    rng = random.Random(f"shapes {seed} {index}")
    return rng, rng.randrange(len(CLASSES))


def draw_shapes(seed, index, size, max_objects=3):
    """Image number `index`: (uint8 (3, size, size), label, detail bool (size, size)).

    One to `max_objects` objects of one form, one of six colours and one texture (period 7 to 11
    pixels) over a smooth gradient. `detail` is where the objects are: 15 % to 60 % of the image.
    """
    rng, label = _start(seed, index)
    texture, form = CLASSES[label].split()
    y, x = (np.mgrid[:size, :size].astype(np.float32) + 0.5) / size     # (size, size) each
    while True:
        covered = np.zeros((size, size), np.float32)        # the share of each pixel, 0 to 1
        for center_x, center_y, radius in _place(rng, max_objects):
            turned = _turn(x - center_x, y - center_y, rng.uniform(-0.3, 0.3))
            edge = 0.5 - _distance(form, *turned, radius) * size
            covered = np.maximum(covered, np.clip(edge, 0, 1))
        if 0.15 <= (covered > 0.5).mean() <= 0.60:
            break

    hue = rng.random()
    across, _ = _turn(x - 0.5, y - 0.5, rng.uniform(0, 2 * math.pi))
    dark = _colour(hue, 0.3, rng.uniform(0.4, 0.6))
    light = _colour(hue + rng.uniform(-0.2, 0.2), 0.2, 0.9)
    background = _mix(0.5 + 0.7 * across, dark, light)      # (3, size, size)

    turned = _turn(x, y, rng.uniform(0, math.pi))
    frequency = 2 * math.pi * size / rng.uniform(7, 11)
    wave, crossing = np.sin(frequency * np.array(turned))
    if texture == "checked":
        wave = wave * crossing * 1.5
    hue = rng.randrange(6) / 6
    paint = _mix(0.5 + 0.5 * np.tanh(3 * wave), _colour(hue, 0.9, 0.15), _colour(hue, 0.7, 1.0))

    image = _mix(covered, background, paint)
    pixels = (image * 255).round().astype(np.uint8)
    return torch.from_numpy(pixels), label, torch.from_numpy(covered > 0.5)


def _place(rng, max_objects):
    """Centres and radii (x, y, radius) of one to three objects that do not touch."""
    count = rng.randint(1, max_objects)
    while True:
        placed = []
        for _ in range(count):
            radius = rng.uniform(*RADII[count])
            margin = 1.2 * radius
            x = rng.uniform(margin, 1 - margin)
            y = rng.uniform(margin, 1 - margin)
            placed.append((x, y, radius))
        if all(math.dist(a[:2], b[:2]) > 1.25 * (a[2] + b[2])
               for a, b in itertools.combinations(placed, 2)):
            return placed


def _turn(x, y, angle):
    """Coordinates along axes that are turned by this angle."""
    cos, sin = math.cos(angle), math.sin(angle)
    return x * cos + y * sin, y * cos - x * sin


def _distance(form, x, y, radius):
    """The distance to the outline, negative inside. All forms have the area of a disc of this
    radius."""
    if form == "disc":
        return np.hypot(x, y) - radius
    if form == "ring":
        return abs(np.hypot(x, y) - 0.845 * radius) - 0.296 * radius
    x = abs(x)
    if form == "triangle":
        return np.maximum(y, 0.866 * x - 0.5 * y) - 0.778 * radius
    y = abs(y)
    if form == "square":
        return np.maximum(x, y) - 0.886 * radius
    return np.maximum(np.maximum(x, y) - 1.189 * radius, np.minimum(x, y) - 0.396 * radius)  # cross


def _colour(hue, saturation, value):
    return np.float32(colorsys.hsv_to_rgb(hue % 1, saturation, value)).reshape(3, 1, 1)


def _mix(share, a, b):
    """From a (share 0) to b (share 1)."""
    return a + (b - a) * np.clip(share, 0, 1)
