"""The one dataset module: datasets, transforms and loaders.

    make_dataset    a torch Dataset of (image, label): float (3, H, W) in [-1, 1], int
    train_loader    batches over several workers and processes; uint8 until they are on the device
    eval_loader     the same, in order, each image once
    SOURCES         the datasets by name, and what `root` must hold; to add one, see CONTRIBUTING.md

Training order and augmentation follow from (seed, epoch, index) alone, not from the number of
workers or from what ran before. That is what makes a resumed run equal to an uninterrupted one.
"""

from __future__ import annotations

import atexit
import copy
import math
import multiprocessing
import random
import re
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.images import decode, files_below, image_extensions, read_image

Size = int | list[int]  # the side of square images, or [height, width]
Device = torch.device | str
Batches = Iterator[tuple[Tensor, Tensor]]  # images float (B, 3, H, W) in [-1, 1], labels int64 (B,)

# Training decodes JPEGs at 1/2, 1/4 or 1/8 if so many pixels are left for each of the smallest
# crop's (docs/data.md).
ENOUGH = 2
SIGUSR1 = getattr(signal, "SIGUSR1", signal.SIGTERM)  # Windows has none
MAX_UNREADABLE = 0.01  # of the training images, before training stops
SIDECARS = (".txt", ".json", ".csv", ".xml", ".yml", ".yaml", ".md")  # often lie beside images


class DataError(Exception):
    """Something about the user's data, in one sentence."""

    def __init__(self, message: str):
        # A loader's worker process hands its exceptions over as a traceback in text, which ends
        # with the sentence.
        super().__init__(message.strip().rpartition("dataset.DataError: ")[2])


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
    SOURCES says.

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
        from data.shapes import Shapes  # which no other dataset needs

        source = Shapes(train, image_size, seed, train_size if train else val_size, max_objects)
    else:
        settings = {"folder": [val_fraction], "webdataset": [val_fraction],
                    "huggingface": [val_fraction, image_column, label_column]}
        source = _source(name, root, split, *settings.get(name, []))
    return ImageDataset(source, image_size, train, random_crop, random_flip, min_scale, seed, uint8)


def _source(name, root, split, *settings):
    """The images of a split. DataError if `root` does not hold any."""
    make, layout = SOURCES[name]
    try:
        if not root:
            raise DataError(f"dataset {name!r} needs data.root, the folder that holds the images")
        root = Path(root).expanduser()
        if not root.is_dir() and name != "webdataset":
            raise DataError(f"there is no folder {root}")
        source = make(root, split == "train", *settings)
        if len(source.labels) == 0:
            raise DataError(f"no images for the {split} split in {root}")
        return source
    except (DataError, FileNotFoundError) as error:
        raise DataError(f"{error}; data.root must be {layout}") from error
    except PermissionError as error:
        raise DataError(f"{error}; make all of data.root readable") from error
    except ValueError as error:
        raise DataError(str(error)) from error


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
        self._number(self.source.classes)
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
    """The images of one split: `Files`, `Arrays`, `Packed`, or any class with

    labels       a number for each image; -1: none
    classes      the names of the labels, all different
    load(index)  an RGB image of any size; the path of an image file, or what is in it; or a uint8
                 tensor (3, H, W) of the right size, which is neither cropped nor flipped
    name(index)  for messages, and for the code cache: unique, and the same in every run
    """


@dataclass
class Files:
    """The images at some paths; `crop` (left, top, right, bottom) in pixels is cut out first."""

    paths: list[str]
    labels: list[int]
    classes: list[str]
    crop: tuple[int, int, int, int] | None = None

    def load(self, index):
        return read_image(self.paths[index]).crop(self.crop) if self.crop else self.paths[index]

    def name(self, index):
        return self.paths[index]


@dataclass
class Arrays:
    """Images (H, W, 3) uint8 in memory."""

    arrays: np.ndarray
    labels: list[int]
    classes: list[str]

    def load(self, index):
        return Image.fromarray(self.arrays[index])

    def name(self, index):
        return str(index)


@dataclass
class Packed:
    """Some rows of what lies in shards or in a table."""

    box: Any  # Shards or Table
    rows: list[int]
    labels: list[int]
    classes: list[str]

    def load(self, index):
        return self.box.read(self.rows[index])

    def name(self, index):
        return self.box.name(self.rows[index])


def list_images(*folders):
    """The images in each folder, but for those that one before it has (see `files_below`). Files
    that are no images are told of."""
    listed, others = files_below(image_extensions(), *folders)
    others = [name for name in others if not name.lower().endswith(SIDECARS)]
    if others:
        warnings.warn(f"{len(others)} files in {folders[-1]} are no images that Pillow reads, and "
                      f"are passed over, such as {min(others)}", stacklevel=2)
    return [[folder / name for name in names] for folder, names in zip(folders, listed)]


def imagenet(root, train):
    from data.splits import split_folders

    splits = split_folders(root)
    for split in ("train", "val"):
        if split not in splits:
            raise DataError(f"{root / split} has no class folders")
    source = folder(root, train, 0)
    split = "train" if train else "val"
    if -1 in source.labels or train and source.labels and source.classes == ["image"]:
        raise DataError(f"the images in {splits[split]} are not sorted into class folders")
    # Folders may be named by synset (n01440764) or by class index (0), which the .yml translates.
    synsets = _pairs(root / "imagenet_idx_to_synset.yml", r"(\d+): *(n\d+)")
    words = _pairs(root / "synset_human.txt", r"(?m)^(\S+)[ \t]+(.+)")
    synsets = [synsets.get(name, name) for name in source.classes]
    names = [words.get(synset, synset) for synset in synsets]
    source.classes = [name if names.count(name) == 1 else f"{name} ({synset})"  # two are "crane"
                      for name, synset in zip(names, synsets)]
    return source


def _pairs(path, pattern):
    return dict(re.findall(pattern, path.read_text())) if path.is_file() else {}


def ffhq(root, train):
    """The lists may be in root, root/assets or ./assets. Without them the first 60,000 images in
    order of name are for training."""
    paths, = list_images(root)
    lists = {path.name: path for place in (Path("assets"), root, root / "assets")
             for path in place.glob("ffhq*n.txt")}
    if not lists:
        return _faces(paths[:60_000] if train else paths[60_000:])
    name = "ffhqtrain.txt" if train else "ffhqvalidation.txt"
    if name not in lists:
        raise DataError(f"there is {min(lists.values())} but no {name} beside it; add it, or "
                        "remove both to split at 60,000")
    listed = [Path(entry).name for entry in lists[name].read_text().split()]
    return _faces(_listed(paths, listed, lists[name]))


def celeba(root, train):
    partition = root / "list_eval_partition.txt"
    if not partition.exists():  # from Kaggle, where there also is a folder in the folder
        partition = partition.with_suffix(".csv")
    number = 0 if train else 1
    listed = re.findall(rf'(?m)^"?([^\s,"]+)[ ,"]+{number}"?\s*$', partition.read_text())
    paths, = list_images(root / "img_align_celeba")
    # 128 x 128 around x 89, y 121
    return _faces(_listed(paths, listed, partition), (25, 57, 153, 185))


def _listed(paths, names, where):
    """Those of the paths that have these names."""
    by_name = {path.name: path for path in paths}
    missing = [name for name in names if name not in by_name]
    if missing:
        raise DataError(f"{where} lists {missing[0]} (and {len(missing) - 1} more images), which "
                        "are not there")
    return [by_name[name] for name in names]


def _faces(paths, crop=None):
    return Files([*map(str, paths)], [0] * len(paths), ["face"], crop)


def cifar10(root, train):
    try:
        import torchvision  # takes seconds

        data = torchvision.datasets.CIFAR10(str(root), train=train)
    except RuntimeError as error:
        raise DataError(f"{root} does not hold CIFAR-10 whole") from error
    return Arrays(data.data, data.targets, data.classes)


def folder(root, train, val_fraction):
    """Folders train/ and val/ are the splits if they are there; an image that both lead to is in
    val/ alone. Otherwise val_fraction of the files is held out, chosen by a hash of the name.
    Labels are the first-level folders, if every image is in one."""
    from data.splits import by_folder, divide, split_folders

    splits = split_folders(root)
    splits.setdefault("train", root)
    parts = dict.fromkeys(["train", "val"])
    for (split, base), paths in zip(splits.items(), list_images(*splits.values())):
        keys = [path.relative_to(base).as_posix() for path in paths]
        names = [*map(str, paths)]
        parts[split] = SimpleNamespace(keys=keys, labels=by_folder(keys), order=None,
                                       name=names.__getitem__)
    part, rows, labels, classes = divide(*parts.values(), train, val_fraction)
    return Files([*map(part.name, rows)], labels, classes)


def webdataset(root, train, val_fraction):
    from data.shards import tar_shards

    return packed(*tar_shards(root), train, val_fraction)


def huggingface(root, train, val_fraction, image_column, label_column):
    from data.shards import tables

    return packed(*tables(root, image_column, label_column), train, val_fraction)


def packed(training, validation, train, val_fraction):
    """A split of what is for training, and of what is for validation, if anything is."""
    from data.splits import divide

    if not training:
        reason = ""
        if validation:
            reason = f": by its names all is for validation, such as {validation.name(0)}"
        raise DataError(f"there are no images for training{reason}")
    return Packed(*divide(training, validation, train, val_fraction))


SOURCES = {  # a function of (root: Path, train: bool) to a Source, and what root must be
    "imagenet": (imagenet, "a folder with train/ and val/, each with one folder of images per "
                           "class (train/n01440764/x.JPEG)"),
    "ffhq": (ffhq, "a folder of the FFHQ images (00000.png, ...), with ffhqtrain.txt and "
                   "ffhqvalidation.txt if you have them"),
    "celeba": (celeba, "a folder with img_align_celeba/ (000001.jpg, ...) and "
                       "list_eval_partition.txt or .csv"),
    "cifar10": (cifar10, "a folder with cifar-10-batches-py/ (python -c \"import torchvision; "
                         "torchvision.datasets.CIFAR10('ROOT', download=True)\" makes it)"),
    "folder": (folder, "a folder of images, of any kind that Pillow reads, in sub-folders or not"),
    "webdataset": (webdataset, "a folder of .tar shards, or a pattern of them "
                               "(PATH/train-{000..123}.tar), with images (x.jpg) and, if you have "
                               "classes, x.cls or a folder for each"),
    "huggingface": (huggingface, "a folder that save_to_disk of the library datasets has written, "
                                 "or one of .parquet files"),
}
