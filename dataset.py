"""The one dataset module: datasets, transforms and loaders.

    make_dataset    a torch Dataset of (image, label): float (3, H, W) in [-1, 1], int
    train_loader    batches over several workers and processes; uint8 until they are on the device
    eval_loader     the same, in order, each image once
    read_image      an image file as 8-bit RGB
    Source          where the images of a dataset are; data/sources.py has those of all names

Training order and augmentation follow from (seed, epoch, index) alone, not from the number of
workers or from what ran before. That is what makes a resumed run equal to an uninterrupted one.
"""

from __future__ import annotations

import atexit
import copy
import math
import multiprocessing
import random
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.images import DataError, decode, read_image  # noqa: F401, for others

Size = int | list[int]  # the side of square images, or [height, width]
Device = torch.device | str
Batches = Iterator[tuple[Tensor, Tensor]]  # images float (B, 3, H, W) in [-1, 1], labels int64 (B,)

# Training decodes JPEGs at 1/2, 1/4 or 1/8 if so many pixels are left for each of the smallest
# crop's (docs/data.md).
ENOUGH = 2
SIGUSR1 = getattr(signal, "SIGUSR1", signal.SIGTERM)  # Windows has none
MAX_UNREADABLE = 0.01  # of the training images, before training stops


def make_dataset(
        name: Literal["imagenet", "ffhq", "celeba", "cifar10", "folder", "webdataset",
                      "huggingface", "shapes"] = "folder",
        root: str | None = None, split: Literal["train", "val"] = "train", image_size: Size = 256,
        random_crop: bool = True, random_flip: bool = True,
        min_scale: Annotated[float, (1e-6, 1)] = 1.0,
        val_fraction: Annotated[float, (0, 0.999)] = 0.05,
        seed: Annotated[int, (0, 2**63 - 1)] = 0, train_size: int = 50_000, val_size: int = 1_000,
        max_objects: Annotated[int, (1, 3)] = 3, image_column: str | None = None,
        label_column: str | None = None, uint8: bool = False) -> ImageDataset:
    """The images and labels of one split. DataError, in one sentence, if `root` does not hold what
    data/sources.py says.

    image_size               side of the square images, or [height, width]
    random_crop, random_flip augmentation of the training split. Without random_crop, and for
                             validation, the centre is cropped
    min_scale                training crops cover a random share of the largest crop's area between
                             this and 1
    val_fraction             (folder, webdataset, huggingface; if nothing there is for validation)
                             the share that is held out
    seed                     of the augmentation, and of the shapes
    train_size, val_size     how many shapes there are
    max_objects              in an image of shapes, 1 to 3
    image_column             (huggingface) null: "image", or else the only column of images
    label_column             (huggingface) null: "label", if there is one
    uint8                    images as uint8 in [0, 255] instead of float in [-1, 1]
    """
    train = split == "train"
    if not isinstance(image_size, int) and (name == "shapes" or len(image_size) != 2):
        valid = "a number for shapes" if name == "shapes" else "a number or [height, width]"
        raise DataError(f"data.image_size must be {valid}; it is {image_size}")
    if name == "shapes":
        from data.shapes import Shapes

        source = Shapes(train, image_size, seed, train_size if train else val_size, max_objects)
    else:
        settings = {"folder": [val_fraction], "webdataset": [val_fraction],
                    "huggingface": [val_fraction, image_column, label_column]}
        from data.sources import find_source

        source = find_source(name, root, split, *settings.get(name, []))
    return ImageDataset(source, image_size, train, random_crop, random_flip, min_scale, seed, uint8)


@dataclass(eq=False, repr=False)
class ImageDataset(Dataset):
    """(image, label) at [index], or at [(epoch, index)] with that epoch's augmentation.

    image: float (3, H, W) in [-1, 1], or uint8. `classes` are the names of the labels: those that
    training images have, or after `set_classes` a run's. Without a class, the label is -1. An
    unreadable training image is warned about once and replaced by the next readable one, until more
    than 1 % are unreadable; elsewhere it is an error.
    """

    source: Source
    image_size: Size
    train: bool = False
    random_crop: bool = True
    random_flip: bool = True
    min_scale: float = 1.0
    seed: int = 0
    uint8: bool = False

    def __post_init__(self):
        self._number([name for name in self.source.classes if name])
        self.sides = np.broadcast_to(self.image_size, 2).tolist()  # height, width
        self.least = 0  # pixels a side, to which JPEGs may be reduced; 0: whole
        if self.train:
            smallest = math.sqrt(self.min_scale) if self.random_crop else 1  # crop's side
            self.least = math.ceil(ENOUGH * max(self.sides) / smallest)
        self.unreadable = torch.zeros(len(self), dtype=torch.uint8).share_memory_()  # by workers

    def __len__(self):
        return len(self.source.labels)

    def label(self, index):
        return self.class_of[self.source.labels[index]]

    def shown(self, index):
        """The image at this index, or if it is known to be unreadable, the next one that is not."""
        if self.unreadable[index]:
            index += int(np.roll(self.unreadable, -index).argmin())
        return index % len(self)

    def set_classes(self, names: list[str]):
        """From now on labels are those of a run with these classes. DataError if an image has
        none."""
        if self.classes == ["image"] and "image" not in names:
            raise DataError("the run is class-conditional, and this data has no classes")
        self._number(names)
        for i, label in enumerate(self.source.labels):
            if self.class_of[label] < 0:
                reason = ("no class that training images have, so sort it into one or add images "
                          "of its class")
                if label >= 0:
                    reason = f"class {self.source.classes[label]!r}, which the run does not know"
                raise DataError(f"{self.source.name(i)} is of {reason}; the {len(names)} classes "
                                f"are, or begin with, {', '.join(names[:20])}")

    def _number(self, names):
        self.classes = names
        number = {name: i for i, name in enumerate(names)}
        # By the source's label; the last one is for its label -1.
        self.class_of = [number.get(name, -1) for name in self.source.classes] + [-1]

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        index = range(len(self))[index]  # IndexError where there is no such image
        while True:
            index = self.shown(index)
            try:
                image = self._image(epoch, index)
                return image if self.uint8 else to_float(image), self.label(index)
            except Exception as error:  # PIL raises almost anything on a broken file
                self._report(index, error)

    def _image(self, epoch, index):
        image = self.source.load(index)
        if isinstance(image, Tensor):  # made at the right size
            return image
        if isinstance(image, Image.Image):
            place = (0, 0, *image.size)
        else:
            image, place = decode(image, self.least)
        left, top, w, h = place

        flip = False
        scale = 1.0
        x = y = 0.5  # the centre
        if self.train:
            rng = random.Random(f"{self.seed} {epoch} {index}")
            flip = self.random_flip and rng.random() < 0.5
            if self.random_crop:
                scale = math.sqrt(rng.uniform(self.min_scale, 1))
                x, y = rng.random(), rng.random()
        # One call crops and resizes, which equals resizing to the larger scale and then cropping.
        height, width = self.sides
        crop_w = scale * min(w, h * width / height)
        crop_h = scale * min(h, w * height / width)
        x *= w - crop_w
        y *= h - crop_h
        box = (left + x, top + y, left + min(x + crop_w, w), top + min(y + crop_h, h))
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return image.flip(2) if flip else image.contiguous()

    def _report(self, index, error):
        reason = str(error).partition(" <_io")[0].partition("\n")[0]
        sentence = f"cannot read {self.source.name(index)} ({type(error).__name__}: {reason})"
        if not self.train:
            raise DataError(f"{sentence}; every image of an evaluation must be readable, so "
                            "replace or remove it") from error
        self.unreadable[index] = 1
        count = int(self.unreadable.sum())
        if count > MAX_UNREADABLE * len(self):
            raise DataError(f"{sentence}, and {count - 1} more of {len(self)} images; above "
                            f"{MAX_UNREADABLE:.0%} training stops, so replace or remove them"
                            ) from error
        warnings.warn(f"{sentence}; the next image takes its place", stacklevel=2)


def to_float(images: Tensor) -> Tensor:
    """uint8 in [0, 255] to float in [-1, 1]."""
    return images.float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Float in [-1, 1] (clamped) to uint8 in [0, 255]."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def train_loader(dataset: ImageDataset, batch_size: int, seed: int = 0, num_workers: int = 4,
                 start: int = 0, rank: int = 0, world: int = 1, device: Device = "cpu") -> Batches:
    """Endless shuffled batches on `device`.

    batch_size is per process; process `rank` of `world` gets its share of every batch. The first
    batch is number `start`.
    """
    batches = TrainBatches(len(dataset), batch_size, seed, start, rank, world)
    return load_batches(dataset, batches, num_workers, device)


def eval_loader(dataset: ImageDataset, batch_size: int, limit: int | None = None,
                num_workers: int = 4, rank: int = 0, world: int = 1,
                device: Device = "cpu") -> Batches:
    """This process's share of the dataset, in order, each image once: batches like train_loader's,
    the last one smaller.

    limit: at most so many images in all, evenly spread over the dataset.
    """
    dataset = copy.copy(dataset)
    dataset.least = 0  # whole JPEGs, also of the training split
    indices = spread(len(dataset), limit)[rank::world]
    batches = [indices[i:i + batch_size] for i in range(0, len(indices), batch_size)]
    return load_batches(dataset, batches, num_workers, device)


def spread(total, limit):
    """Indices of at most `limit` (or all) of so many images, evenly spread."""
    count = min(limit or total, total)
    return [i * total // count for i in range(count)]


@dataclass
class TrainBatches:
    """Endless lists of (epoch, index). Every epoch is a permutation of all images; what does not
    fill a batch is dropped."""

    n: int
    batch_size: int
    seed: int = 0
    start: int = 0
    rank: int = 0
    world: int = 1

    def __iter__(self):
        size = self.batch_size
        for epoch, images, first, _ in epochs(self.n, size * self.world, self.seed, self.start):
            for batch in images[first:, size * self.rank:size * (self.rank + 1)]:
                yield [(epoch, index) for index in batch.tolist()]


def epochs(n, batch, seed, start):
    """From batch number `start` on, of each epoch: its number, all its batches (N, batch) of n
    images, the first of them that is due, and the generator that ordered them."""
    epoch, first = divmod(start, n // batch)
    while True:
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        images = torch.randperm(n, generator=generator)[:n // batch * batch]
        yield epoch, images.view(-1, batch), first, generator
        epoch += 1
        first = 0


def _leave_signals_to_the_trainer(_):
    """Schedulers and Ctrl-C signal every process, but the training process must save before its
    workers end."""
    for number in (signal.SIGINT, signal.SIGTERM, SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers():
    """At exit Python sends its workers a SIGTERM, which they ignore, and would wait for ever."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises when a worker is killed
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def load_batches(dataset, batches, num_workers, device) -> Batches:
    """The images of these lists of keys, on `device`."""
    dataset = copy.copy(dataset)
    dataset.uint8 = True
    loader = DataLoader(
        dataset, batch_sampler=batches, num_workers=num_workers,
        pin_memory=torch.device(device).type == "cuda", prefetch_factor=4 if num_workers else None,
        worker_init_fn=_leave_signals_to_the_trainer,
        generator=torch.Generator())  # or it would draw from the models' random numbers
    for images, labels in loader:
        yield to_float(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True)


class Source(Protocol):
    """The images of one split: `Files`, `Arrays` and `Packed` of data/sources.py, or any class with

    labels       a number for each image; -1: none
    classes      the names of the labels, all different; None: of no training image
    load(index)  an RGB image of any size; the path of an image file, or what is in it; or a uint8
                 tensor (3, H, W) of the right size, which is neither cropped nor flipped
    name(index)  for messages, and for the code cache: unique, and the same in every run
    """
