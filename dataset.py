"""The one dataset module: datasets, transforms and loaders.

    make_dataset                a torch Dataset of (image, label): float (3, H, W) in [-1, 1], int
    train_loader, eval_loader   batches over several workers and processes; uint8 until they are on the device
    SOURCES                     the datasets by name, and what `root` must hold; to add one, see CONTRIBUTING.md

Training order and augmentation follow from (seed, epoch, index) alone, not from the number of workers or from what ran before. That is
what makes a resumed run equal to an uninterrupted one.
"""

from __future__ import annotations

import atexit
import copy
import math
import multiprocessing
import os
import random
import re
import signal
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from images import decode, files_below, image_extensions, read_image
from shapes import Shapes
from shards import SPLIT, Shards, Table, tables, tar_shards

ENOUGH = 2  # training decodes JPEGs at 1/2, 1/4 or 1/8 if so many pixels are left for each of the smallest crop's (docs/data.md)
SIGUSR1 = getattr(signal, "SIGUSR1", signal.SIGTERM)  # Windows has none
MAX_UNREADABLE = 0.01  # of the training images, before training stops
SIDECARS = (".txt", ".json", ".csv", ".xml", ".yml", ".yaml", ".md")  # often lie beside images


class DataError(Exception):
    """Something about the user's data, in one sentence."""

    def __init__(self, message: str):
        # A loader's worker process hands its exceptions over as a traceback in text: the sentence is its last line.
        super().__init__(message.strip().splitlines()[-1].removeprefix("dataset.DataError: "))


def make_dataset(name: Literal["imagenet", "ffhq", "celeba", "cifar10", "folder", "webdataset", "huggingface", "shapes"] = "folder",
                 root: str | None = None, split: Literal["train", "val"] = "train", image_size: int | list[int] = 256,
                 random_crop: bool = True, random_flip: bool = True, min_scale: Annotated[float, (1e-6, 1)] = 1.0,
                 val_fraction: Annotated[float, (0, 0.999)] = 0.05, seed: Annotated[int, (0, 2**63 - 1)] = 0, train_size: int = 50_000,
                 val_size: int = 1_000, max_objects: Annotated[int, (1, 3)] = 3, image_column: str | None = None,
                 label_column: str | None = None, uint8: bool = False) -> ImageDataset:
    """The images and labels of one split. DataError, in one sentence, if `root` does not hold what SOURCES says.

    image_size               side of the square images, or [height, width]
    random_crop, random_flip augmentation of the training split. Without random_crop, and for validation, the centre is cropped
    min_scale                training crops cover a random share of the largest crop's area between this and 1
    val_fraction             (folder, webdataset, huggingface; if nothing there is for validation) the share that is held out
    seed                     of the augmentation, and of the shapes
    train_size, val_size     how many shapes there are
    max_objects              in an image of shapes, 1 to 3
    image_column             (huggingface) null: "image", or else the only column of images
    label_column             (huggingface) null: "label", if there is one
    uint8                    images as uint8 in [0, 255] instead of float in [-1, 1]
    """
    train = split == "train"
    if not isinstance(image_size, int) and (len(image_size) != 2 or name == "shapes"):
        kind = "a number for shapes" if name == "shapes" else "a number or [height, width]"
        raise DataError(f"data.image_size must be {kind}; it is {image_size}")
    if name == "shapes":
        source = Shapes(train, image_size, seed, train_size if train else val_size, max_objects)
    else:
        make, layout = SOURCES[name]
        try:
            if not root:
                raise DataError(f"dataset {name!r} needs data.root, the folder that holds the images")
            root = Path(root).expanduser()
            if not root.is_dir() and name != "webdataset":
                raise DataError(f"there is no folder {root}")
            more = {"folder": (val_fraction,), "webdataset": (val_fraction,), "huggingface": (val_fraction, image_column, label_column)}
            source = make(root, train, *more.get(name, ()))
            if len(source.labels) == 0:
                raise DataError(f"no images for the {split} split in {root}")
        except (DataError, FileNotFoundError) as error:
            raise DataError(f"{error}; data.root must be {layout}") from error
        except PermissionError as error:
            raise DataError(f"{error}; make all of data.root readable") from error
        except ValueError as error:
            raise DataError(str(error)) from error
    return ImageDataset(source, image_size, train, random_crop, random_flip, min_scale, seed, uint8)


class ImageDataset(Dataset):
    """(image, label) at [index], or at [(epoch, index)] with that epoch's augmentation.

    image: float (3, H, W) in [-1, 1], or uint8. `classes` are the names of the labels: those that training images have, or
    after `set_classes` a run's. Without a class, the label is -1. An unreadable training image is
    warned about once and replaced by the next readable one, until more than 1 % are unreadable; elsewhere it is an error.
    """

    def __init__(self, source: Source, image_size: int | list[int], train: bool = False, random_crop: bool = True,
                 random_flip: bool = True, min_scale: float = 1.0, seed: int = 0, uint8: bool = False):
        self.source, self.image_size, self.train, self.seed, self.uint8 = source, image_size, train, seed, uint8
        self.random_crop, self.random_flip, self.min_scale = random_crop, random_flip, min_scale
        self._number([name for name in source.classes if name is not None])
        smallest = math.sqrt(min_scale) if random_crop else 1  # the side of a training crop, as a share of the largest crop's
        side = image_size if isinstance(image_size, int) else max(image_size)
        self.least = math.ceil(ENOUGH * side / smallest) if train else 0
        self.unreadable = torch.zeros(len(source.labels), dtype=torch.uint8).share_memory_()  # seen by all workers

    def __len__(self) -> int:
        return len(self.source.labels)

    def label(self, index: int) -> int:
        return self.class_of[self.source.labels[index]]

    def shown(self, index: int) -> int:
        """The image that is shown at this index: if it is known to be unreadable, another one."""
        while self.unreadable[index]:
            index = (index + 1) % len(self)
        return index

    def set_classes(self, names: list[str]) -> None:
        """From now on labels are those of a run with these classes. DataError if an image has none."""
        if self.classes == ["image"] and "image" not in names:
            raise DataError("the run is class-conditional, and this data has no classes")
        self._number(names)
        for i in range(len(self)):
            if self.label(i) < 0:
                number = self.source.labels[i]
                what = ("no class that training images have, so sort it into one or add images of "
                        "its class")
                if number >= 0:
                    what = f"class {self.source.classes[number]!r}, which the run does not know"
                raise DataError(f"{self.source.name(i)} is of {what}; the {len(names)} classes are, "
                                f"or begin with, {', '.join(names[:20])}")

    def _number(self, names: list[str]) -> None:
        number = {name: i for i, name in enumerate(names)}
        self.classes = names
        # By the source's label; the last one is for its label -1.
        self.class_of = [number.get(name, -1) for name in self.source.classes] + [-1]

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        for i in range(len(self)):
            this = (index + i) % len(self)
            if not self.unreadable[this]:
                try:
                    image = self._image(epoch, this)
                    return (image if self.uint8 else to_float(image)), self.label(this)
                except Exception as error:  # PIL raises almost anything on a broken file
                    self._report(this, error)
        raise DataError("no image could be read")

    def _image(self, epoch: int, index: int) -> Tensor:
        image = self.source.load(index)
        if isinstance(image, Tensor):  # made at the right size
            return image
        image, (left, top, w, h) = decode(image, self.least) if isinstance(image, (str, bytes)) else (image, (0, 0, *image.size))
        # One call crops and resizes, which equals resizing to the larger scale and then cropping.
        height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        box_w, box_h = min(w, h * width / height), min(h, w * height / width)
        x, y, flip = (w - box_w) / 2, (h - box_h) / 2, False
        if self.train:
            rng = random.Random(f"{self.seed} {epoch} {index}")
            flip = self.random_flip and rng.random() < 0.5
            if self.random_crop:
                scale = math.sqrt(rng.uniform(self.min_scale, 1))
                box_w, box_h = box_w * scale, box_h * scale
                x, y = rng.uniform(0, w - box_w), rng.uniform(0, h - box_h)
        box = (left + x, top + y, left + min(x + box_w, w), top + min(y + box_h, h))
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return image.flip(2) if flip else image.contiguous()

    def _report(self, index: int, error: Exception) -> None:
        why = str(error).partition(" <_io")[0].partition("\n")[0]
        sentence = f"cannot read {self.source.name(index)} ({type(error).__name__}: {why})"
        if not self.train:
            raise DataError(f"{sentence}; every image of an evaluation must be readable, so replace or remove it") from error
        self.unreadable[index] = 1
        count = int(self.unreadable.sum())
        if count > MAX_UNREADABLE * len(self):
            raise DataError(f"{sentence}, and {count - 1} more of {len(self)} images; above "
                            f"{MAX_UNREADABLE:.0%} training stops, so replace or remove them") from error
        warnings.warn(f"{sentence}; the next image takes its place", stacklevel=2)


def to_float(images: Tensor) -> Tensor:
    """uint8 in [0, 255] to float in [-1, 1]."""
    return images.float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Float in [-1, 1] (clamped) to uint8 in [0, 255]."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def train_loader(dataset: ImageDataset, batch_size: int, seed: int = 0, num_workers: int = 4, start: int = 0, rank: int = 0,
                 world: int = 1, device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
    """Endless shuffled batches (images float (B, 3, H, W) in [-1, 1], labels int64 (B,)) on `device`.

    batch_size is per process; process `rank` of `world` gets its share of every batch. The first batch is number `start`.
    """
    dataset.uint8 = True
    loader = DataLoader(dataset, batch_sampler=TrainBatches(len(dataset), batch_size, seed, start, rank, world),
                        **worker_settings(num_workers, device))
    return on_device(loader, device)


def eval_loader(dataset: ImageDataset, batch_size: int, limit: int | None = None, num_workers: int = 4, rank: int = 0,
                world: int = 1, device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of the dataset, in order, each image once: batches like train_loader's, the last one smaller.

    limit: at most so many images in all, evenly spread over the dataset.
    """
    dataset = copy.copy(dataset)
    dataset.uint8, dataset.least = True, 0  # whole JPEGs, also of the training split
    count = min(limit or len(dataset), len(dataset))
    indices = [i * len(dataset) // count for i in range(count)][rank::world]
    loader = DataLoader(dataset, batch_sampler=[indices[i:i + batch_size] for i in range(0, len(indices), batch_size)],
                        **worker_settings(num_workers, device))
    return on_device(loader, device)


class TrainBatches(Sampler):
    """Endless lists of (epoch, index). Every epoch is a permutation of all images; what does not fill a batch is dropped."""

    def __init__(self, n: int, batch_size: int, seed: int = 0, start: int = 0, rank: int = 0, world: int = 1):
        self.n, self.batch_size, self.seed, self.start, self.rank, self.world = n, batch_size, seed, start, rank, world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = self.n // (self.batch_size * self.world)
        epoch, first_batch = divmod(self.start, per_epoch)
        while True:
            order = torch.randperm(self.n, generator=torch.Generator().manual_seed(1_000_003 * self.seed + epoch))
            for i in range(first_batch, per_epoch):
                first = (i * self.world + self.rank) * self.batch_size
                yield [(epoch, j) for j in order[first:first + self.batch_size].tolist()]
            epoch, first_batch = epoch + 1, 0


def worker_settings(num_workers: int, device: torch.device | str) -> dict:
    return dict(num_workers=num_workers, pin_memory=torch.device(device).type == "cuda",
                prefetch_factor=4 if num_workers else None, worker_init_fn=_leave_signals_to_the_trainer,
                generator=torch.Generator())  # or making a loader would draw from the models' random numbers


def _leave_signals_to_the_trainer(_: int) -> None:
    """Schedulers and Ctrl-C signal every process, but the training process must save before its workers end. A second SIGTERM, from the
    training process, ends the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


@atexit.register
def end_workers() -> None:
    """At exit Python sends its workers one SIGTERM, which they ignore, and would wait for ever."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises when a worker is killed
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def on_device(loader: DataLoader, device: torch.device | str) -> Iterator[tuple[Tensor, Tensor]]:
    for images, labels in loader:
        yield to_float(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True)


class Source(Protocol):
    """The images of one split: `Files`, `Arrays`, `Packed`, or any class with these."""

    labels: Sequence[int]  # -1: none
    classes: Sequence[str | None]  # the names of the labels, all different; None: of no training image

    def load(self, index: int) -> Image.Image | Tensor | str | bytes:
        """An RGB image of any size; the path of an image file, or what is in it; or a uint8 tensor (3, H, W) of the right size, which is
        neither cropped nor flipped."""

    def name(self, index: int) -> str:
        """For messages, and for the code cache: unique, and the same in every run."""


@dataclass
class Files:
    """The images at some paths; `crop` (left, top, right, bottom) in pixels is cut out first."""

    paths: list[str]
    labels: list[int]
    classes: list[str]
    crop: tuple[int, int, int, int] | None = None

    def load(self, index: int) -> Image.Image | str:
        return read_image(self.paths[index]).crop(self.crop) if self.crop else self.paths[index]

    def name(self, index: int) -> str:
        return self.paths[index]


@dataclass
class Arrays:
    """Images (H, W, 3) uint8 in memory."""

    arrays: np.ndarray
    labels: list[int]
    classes: list[str]

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.arrays[index])

    def name(self, index: int) -> str:
        return str(index)


@dataclass
class Packed:
    """Some rows of what lies in shards or in a table."""

    box: Shards | Table
    rows: Sequence[int]
    labels: list[int]
    classes: list[str]

    def load(self, index: int) -> bytes | str:
        return self.box.read(self.rows[index])

    def name(self, index: int) -> str:
        return self.box.name(self.rows[index])


def list_images(*folders: Path) -> list[list[Path]]:
    """The images in each folder, but for those that one before it has (see `files_below`). Files
    that are no images are told of."""
    listed, others = files_below(image_extensions(), *folders)
    others = [name for name in others if not name.lower().endswith(SIDECARS)]
    if others:
        warnings.warn(f"{len(others)} files in {folders[-1]} are no images that Pillow reads, and "
                      f"are passed over, such as {min(others)}", stacklevel=2)
    return [[folder / name for name in names] for folder, names in zip(folders, listed)]


def split_folders(root: Path) -> dict[str, Path]:
    """The folders for "val" and "train" in `root`, by their names (Valid, TRAINING)."""
    splits = {}
    for path in sorted(root.iterdir()):
        match = SPLIT.fullmatch(path.name)
        if match and path.is_dir():
            first = splits.setdefault(match[1].lower(), path)
            if not path.samefile(first):
                raise DataError(f"{first} and {path} are for the same split; rename one of them")
    return dict(sorted(splits.items(), reverse=True))  # validation first


def top_folders(paths: list[Path], base: Path) -> list[str]:
    """The first-level folder below `base` of each image, if all are in one; otherwise "image"."""
    parts = [p.relative_to(base).parts for p in paths]
    return [p[0] for p in parts] if all(len(p) > 1 for p in parts) else ["image"] * len(paths)


def labelled(training: Sequence[int] | Sequence[str], split: Sequence[int] | Sequence[str],
             name: Callable[[int], str | Path] | None = None,
             order: Sequence[str] | None = None) -> tuple[list[int], list[str | None]]:
    """Labels of a split's images, and the names of the labels.

    training    the class of each training image: a number, a word, or for all "image"
    split       the same of the split's images; they get -1 if no training image is of their class
    name        of the split's image i; None: a class of its own is no error (of held-out images)
    order       of words; default: sorted
    """
    used = set(training)
    if used <= {"image"}:
        return [0] * len(split), ["image"]
    if isinstance(training[0], str):
        classes = [word for word in order or sorted(used) if word in used]
        number = {word: i for i, word in enumerate(classes)}
    elif max(used) < 10**6:
        classes = [str(i) if i in used else None for i in range(max(used) + 1)]
        number = {i: i for i in used}
    else:
        raise DataError(f"classes must be numbered from 0 to below 1,000,000; they are from {min(used)} to "
                        f"{max(used)}")
    for i, c in enumerate(split if name else ()):
        if c not in number and c != "image":
            raise DataError(f"{name(i)} is of class {c!r}, which the training split does not have")
    return [number.get(c, -1) for c in split], classes


def held_out(names: Iterable[str], val_fraction: float, train: bool) -> tuple[list[int], list[int]]:
    """The indices for training, and those for this split, by a hash of the names: one's place does
    not change when others come or go."""
    place = [zlib.crc32(os.fsencode(name)) / 2**32 for name in names]
    limit = max(val_fraction, min(place, default=0) + 2**-32)  # at least one image for validation
    training = [i for i, x in enumerate(place) if x >= limit]
    return training, training if train else [i for i, x in enumerate(place) if x < limit]


def imagenet(root: Path, train: bool) -> Source:
    splits = split_folders(root)
    for split in ("train", "val"):
        if split not in splits:
            raise DataError(f"{root / split} has no class folders")
    source = folder(root, train, 0)
    unsorted = source.classes == ["image"] if train else -1 in source.labels
    if unsorted and source.labels:
        base = splits["train" if train else "val"]
        raise DataError(f"the images in {base} are not sorted into class folders")
    # Folders may be named by synset (n01440764) or by class index (0), which the .yml file translates.
    synsets, words = {}, {}
    if (root / "imagenet_idx_to_synset.yml").is_file():
        synsets = dict(re.findall(r"(\d+): *(n\d+)", (root / "imagenet_idx_to_synset.yml").read_text()))
    if (root / "synset_human.txt").is_file():
        words = dict(line.split(maxsplit=1) for line in (root / "synset_human.txt").read_text().splitlines() if " " in line)
    names = [synsets.get(c, c) for c in source.classes]
    said = [words.get(name, name) for name in names]
    source.classes = [word if said.count(word) == 1 else f"{word} ({name})"  # two are "crane"
                      for word, name in zip(said, names)]
    return source


def ffhq(root: Path, train: bool) -> Source:
    """The lists may be in root, root/assets or ./assets. Without them the first 60,000 images in order of name are for training."""
    name, other = ("ffhqtrain.txt", "ffhqvalidation.txt") if train else ("ffhqvalidation.txt", "ffhqtrain.txt")
    lists = {f: p for f in (name, other) for d in (Path("assets"), root, root / "assets") if (p := d / f).is_file()}
    paths, = list_images(root)
    if name in lists:
        here = {p.name: p for p in paths}
        wanted = lists[name].read_text().split()
        missing = [w for w in wanted if Path(w).name not in here]
        if missing:
            raise DataError(f"{lists[name]} lists {missing[0]} (and {len(missing) - 1} more images), which {root} does not hold")
        paths = [here[Path(w).name] for w in wanted]
    elif other in lists:
        raise DataError(f"there is {lists[other]} but no {name} beside it; add it, or remove both to split at 60,000")
    else:
        paths = paths[:60_000] if train else paths[60_000:]
    return Files([str(p) for p in paths], [0] * len(paths), ["face"])


def celeba(root: Path, train: bool) -> Source:
    partition, images = root / "list_eval_partition.txt", root / "img_align_celeba"
    if not partition.exists():  # from Kaggle, where there also is a folder in the folder
        partition = partition.with_suffix(".csv")
    if (images / images.name).is_dir():
        images /= images.name
    for path in (partition, images):
        if not path.exists():
            raise DataError(f"there is no {path}")
    rows = [re.findall(r'[^\s,"]+', line) for line in partition.read_text().splitlines()]
    names = [row[0] for row in rows if row[1:] == ["0" if train else "1"]]
    return Files([str(images / name) for name in names], [0] * len(names), ["face"], crop=(89 - 64, 121 - 64, 89 + 64, 121 + 64))


def cifar10(root: Path, train: bool) -> Source:
    try:
        import torchvision  # takes seconds

        data = torchvision.datasets.CIFAR10(str(root), train=train)
    except RuntimeError as error:
        raise DataError(f"{root} does not hold CIFAR-10 whole") from error
    return Arrays(data.data, data.targets, data.classes)


def folder(root: Path, train: bool, val_fraction: float) -> Source:
    """Folders train/ and val/ are the splits if they are there; an image that both lead to is in
    val/ alone. Otherwise val_fraction of the files is held out, chosen by a hash of the name.
    Labels are the first-level folders, if every image is in one."""
    splits = split_folders(root)
    base = splits.setdefault("train", root)
    images = dict(zip(splits, list_images(*splits.values())))
    paths = images["train"]
    words = training = top_folders(paths, base)
    name = None
    if "val" not in splits:
        names = (p.relative_to(base).as_posix() for p in paths)
        kept, rows = held_out(names, val_fraction, train)
        training = [words[i] for i in kept]
        words = [words[i] for i in rows]
        paths = [paths[i] for i in rows]
    elif not train:
        paths = images["val"]
        words = top_folders(paths, splits["val"])
        name = paths.__getitem__
    return Files([str(p) for p in paths], *labelled(training, words, name))


def webdataset(root: Path, train: bool, val_fraction: float) -> Source:
    return packed(*tar_shards(root), train, val_fraction)


def huggingface(root: Path, train: bool, val_fraction: float, image_column: str | None, label_column: str | None) -> Source:
    return packed(*tables(root, image_column, label_column), train, val_fraction)


def packed(ours: Shards | Table | None, theirs: Shards | Table | None, train: bool, val_fraction: float) -> Source:
    """A split of what is for training, and of what is for validation, if anything is."""
    if not ours or not ours.found:
        only = f": by its names all is for validation, such as {theirs.name(0)}" if theirs and theirs.found else ""
        raise DataError(f"there are no images for training{only}")
    box, training, name = ours, ours.found, None
    if theirs and theirs.found:
        box = ours if train else theirs
        rows, name = range(len(box.found)), box.name
    else:
        kept, rows = held_out(ours.keys, val_fraction, train)
        training = [ours.found[row] for row in kept]
    split = [box.found[row] for row in rows]
    return Packed(box, rows, *labelled(training, split, name, ours.classes))


SOURCES = {  # a function of (root, train), and what root must be
    "imagenet": (imagenet, "a folder with train/ and val/, each with one folder of images per class (train/n01440764/x.JPEG)"),
    "ffhq": (ffhq, "a folder of the FFHQ images (00000.png, ...), with ffhqtrain.txt and ffhqvalidation.txt if you have them"),
    "celeba": (celeba, "a folder with img_align_celeba/ (000001.jpg, ...) and "
                       "list_eval_partition.txt or .csv"),
    "cifar10": (cifar10, "a folder with cifar-10-batches-py/ (python -c \"import torchvision; "
                         "torchvision.datasets.CIFAR10('ROOT', download=True)\" makes it)"),
    "folder": (folder, "a folder of images, of any kind that Pillow reads, in sub-folders or not"),
    "webdataset": (webdataset, "a folder of .tar shards, or a pattern of them (PATH/train-{000..123}.tar), with images (x.jpg) and, if you "
                               "have classes, x.cls or a folder for each"),
    "huggingface": (huggingface, "a folder that save_to_disk of the library datasets has written, or one of .parquet files"),
}
