"""Which images are for training, which for validation, and of which class.

    split_folders   the folders for the splits
    by_split        names of files, divided by what they say
    by_folder       the classes that first-level folders are
    divide          the images of a split, with numbers for their classes

What is wrong is a ValueError of one sentence.
"""

import os
import re
import zlib

import numpy as np

# The first of these words in a path tells the split.
SPLIT = re.compile(r"(?<![a-z])(train|val)(ing|id|idation)?(?![a-z])", re.IGNORECASE)


def split_folders(root):
    """The folders for "val" and "train" in `root`, by their names (Valid, TRAINING)."""
    splits = {}
    for path in sorted(root.iterdir()):
        match = SPLIT.fullmatch(path.name)
        if match and path.is_dir():
            first = splits.setdefault(match[1].lower(), path)
            if not path.samefile(first):
                raise ValueError(f"{first} and {path} are for the same split; rename one of them")
    return dict(sorted(splits.items(), reverse=True))  # validation first


def by_split(names):
    """The names for training and for validation. Where none says "train", all that do not say
    "val" are for training."""
    parts = {"train": [], "val": [], None: []}
    for name in names:
        match = SPLIT.search(name)
        parts[match and match[1].lower()].append(name)
    return parts["train"] or parts[None], parts["val"]


def by_folder(keys):
    """The first-level folder of each image, if all are in one; otherwise "image"."""
    if all("/" in key for key in keys):
        return [key.partition("/")[0] for key in keys]
    return ["image"] * len(keys)


def divide(training, validation, train, val_fraction):
    """The images of a split: whether of `training` or `validation` (see data/shards.py), their
    rows there, their labels (-1: of a class that no training image has), and the classes, None
    where no training image has that number.

    Where validation is empty or None, a share of the training images is held out.
    """
    part = validation if validation and not train else training
    rows = range(len(part.labels))
    labels = training.labels
    if not validation:
        held_out = _held_out(training.keys, val_fraction)
        rows = np.flatnonzero(held_out != train).tolist()
        labels = [labels[row] for row in np.flatnonzero(~held_out)]
    used = set(labels)
    if used <= {"image"}:
        return part, rows, [0] * len(rows), ["image"]
    order = training.order or sorted(used)
    if isinstance(order[0], int):  # numbers keep their places
        if order[-1] >= 10**6:
            raise ValueError("classes must be numbered from 0 to below 1,000,000; they are from "
                             f"{order[0]} to {order[-1]}")
        order = range(order[-1] + 1)
    numbers = {label: i for i, label in enumerate(order) if label in used}
    labels = [part.labels[row] for row in rows]
    for row, label in zip(rows, labels):
        if validation and label not in numbers and label != "image":
            raise ValueError(f"{part.name(row)} is of class {label!r}, which the training split "
                             "does not have")
    classes = [str(label) if label in used else None for label in order]
    return part, rows, [numbers.get(label, -1) for label in labels], classes


def _held_out(keys, val_fraction):
    """Which images are for validation, by a hash: one's place does not change when others come or
    go. At least one is."""
    places = np.array([zlib.crc32(os.fsencode(key)) for key in keys]) / 2**32
    return places < max(val_fraction, places.min(initial=1) + 2**-32)
