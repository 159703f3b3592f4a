"""The one dataset module: every dataset, transform and loader of minVQ.

    make_dataset(name, root, split, ...)    a torch Dataset of (image, label): float (3, S, S) in [-1, 1], int
    train_loader, eval_loader               batches over several workers and processes; uint8 until they are on the device
    CodeCache, code_loader                  the codes of images for stage 2, encoded once, in memory-mapped files; their batches

    name        what `root` must hold
    imagenet    train/ and val/ with one folder per class; synset_human.txt and imagenet_idx_to_synset.yml if at hand
    ffhq        images at any depth; ffhqtrain.txt and ffhqvalidation.txt (in root, root/assets or ./assets) if at hand,
                otherwise the first 60,000 in order of name are for training and the rest for validation
    celeba      img_align_celeba/ and list_eval_partition.txt, as they are published
    cifar10     cifar-10-batches-py/, as torchvision downloads it
    folder      images at any depth. Folders train/ and val/ are the splits if they are there, otherwise `val_fraction` of
                the files is held out, chosen by a hash of the name. Labels are the first-level folders, if there are any
    shapes      nothing: made on the fly from (seed, index)

Training order and augmentation follow from (seed, epoch, index) alone: not from the number of workers, nor from what ran
before. That is what makes a resumed run equal to an uninterrupted one.
"""

from __future__ import annotations

import atexit
import colorsys
import fcntl
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
import warnings
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"}
BACKGROUND = (255, 255, 255)  # behind transparent images
MAX_UNREADABLE = 0.01  # of the training images, before training stops


class DataError(Exception):
    """Something about the user's data, in one sentence."""

    def __init__(self, message: str):
        # A loader's worker process hands its exceptions over as a traceback in text: the sentence is its last line.
        super().__init__(message.strip().splitlines()[-1].removeprefix("dataset.DataError: "))


# ---------------------------------------------------------------------------------------------------------------------
# Public: datasets and loaders


def make_dataset(name: Literal["imagenet", "ffhq", "celeba", "cifar10", "folder", "shapes"] = "folder",
                 root: str | None = None, split: Literal["train", "val"] = "train", image_size: int = 256,
                 random_crop: bool = True, random_flip: bool = True, min_scale: float = 1.0, val_fraction: float = 0.05,
                 seed: int = 0, train_size: int = 50_000, val_size: int = 1_000, max_objects: int = 3,
                 uint8: bool = False) -> ImageDataset:
    """The images and labels of one split.

    image_size               side S of the square images
    random_crop, random_flip augmentation, for the training split only. Without random_crop, and for validation, the crop
                             is in the centre. Horizontal flip with probability 1/2.
    min_scale                training crops cover a random share of the largest square's area between this and 1
    val_fraction             (folder, without val/) the share of files that is held out
    seed                     of the augmentation, and of the `shapes`
    train_size, val_size     how many `shapes` there are
    max_objects              in an image of `shapes`, 1 to 3
    uint8                    images as uint8 in [0, 255] instead of float in [-1, 1]

    DataError, in one sentence, if the data is not there or not laid out as the top of this file says.
    """
    train = split == "train"
    if not 1 <= max_objects <= 3:
        raise DataError(f"data.max_objects must be between 1 and 3; it is {max_objects}")
    if min(image_size, train_size, val_size) < 1 or not 0 < min_scale <= 1 or not 0 <= val_fraction < 1:
        raise DataError("data.image_size, train_size and val_size must be at least 1, min_scale in (0, 1], val_fraction in [0, 1); "
                        f"they are {image_size}, {train_size}, {val_size}, {min_scale}, {val_fraction}")
    if name == "shapes":
        source = shapes(train, image_size, seed, train_size if train else val_size, max_objects)
    else:
        if root is None:
            raise DataError(f"dataset {name!r} needs data.root, the folder that holds the images")
        root = os.path.expanduser(root)
        if not Path(root).is_dir():
            raise DataError(f"there is no folder {root}; data.root must be {LAYOUTS[name]}")
        source = {"imagenet": imagenet, "ffhq": ffhq, "celeba": celeba, "cifar10": cifar10,
                  "folder": partial(folder, val_fraction=val_fraction)}[name](Path(root), train)
        if len(source.labels) == 0:
            raise DataError(f"no images for the {split} split in {root}; data.root must be {LAYOUTS[name]}")
    return ImageDataset(source, image_size, train, random_crop, random_flip, min_scale, seed, uint8)


LAYOUTS = {
    "imagenet": "a folder with train/ and val/, each with one folder of images per class (train/n01440764/x.JPEG)",
    "ffhq": "a folder of the FFHQ images (00000.png, ...), with ffhqtrain.txt and ffhqvalidation.txt if you have them",
    "celeba": "a folder with img_align_celeba/ (000001.jpg, ...) and list_eval_partition.txt",
    "cifar10": "a folder with cifar-10-batches-py/ (python -c \"import torchvision; "
               "torchvision.datasets.CIFAR10('ROOT', download=True)\" makes it)",
    "folder": "a folder of images (" + " ".join(sorted(EXTENSIONS)) + "), in sub-folders or not",
}


class ImageDataset(Dataset):
    """(image, label) at [index], or at [(epoch, index)] with that epoch's augmentation.

    image: float (3, S, S) in [-1, 1], or uint8. `classes` are the names of the labels. An unreadable training image is
    warned about once and replaced by the next readable one, until more than 1 % are unreadable; elsewhere it is an error.
    """

    def __init__(self, source: Source, image_size: int, train: bool = False, random_crop: bool = True,
                 random_flip: bool = True, min_scale: float = 1.0, seed: int = 0, uint8: bool = False):
        self.source, self.image_size, self.train, self.seed, self.uint8 = source, image_size, train, seed, uint8
        self.random_crop, self.random_flip, self.min_scale = random_crop, random_flip, min_scale
        self.classes = source.classes
        self.unreadable = torch.zeros(len(source.labels), dtype=torch.uint8).share_memory_()  # seen by all workers

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        for i in range(len(self)):
            this = (index + i) % len(self)
            if not self.unreadable[this]:
                try:
                    image = self._image(epoch, this)
                    return (image if self.uint8 else to_float(image)), self.source.labels[this]
                except Exception as error:  # PIL raises almost anything on a broken file
                    self._report(this, error)
        raise DataError("no image could be read")

    def _image(self, epoch: int, index: int) -> Tensor:
        image = self.source.load(index)
        if isinstance(image, Tensor):  # made at the right size
            return image
        # One call crops and resizes, which equals resizing the shorter side and then cropping.
        (w, h), side = image.size, min(image.size)
        x, y, flip = (w - side) / 2, (h - side) / 2, False
        if self.train:
            rng = random.Random(f"{self.seed} {epoch} {index}")
            flip = self.random_flip and rng.random() < 0.5
            if self.random_crop:
                side *= math.sqrt(rng.uniform(self.min_scale, 1))
                x, y = rng.uniform(0, w - side), rng.uniform(0, h - side)
        size = (self.image_size, self.image_size)
        image = image.resize(size, Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return image.flip(2) if flip else image.contiguous()

    def _report(self, index: int, error: Exception) -> None:
        sentence = f"cannot read {self.source.name(index)} ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
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
    """Endless shuffled batches (images float (B, 3, S, S) in [-1, 1], labels int64 (B,)) on `device`.

    batch_size is per process; process `rank` of `world` gets its share of every batch. The first batch is number `start`.
    """
    if len(dataset) < batch_size * world:
        raise DataError(f"{len(dataset)} training images are fewer than one batch of {batch_size} x {world} processes; "
                        "choose a smaller train.train_batch_size")
    dataset.uint8 = True
    loader = DataLoader(dataset, batch_sampler=TrainBatches(len(dataset), batch_size, seed, start, rank, world),
                        **_workers(num_workers, device))
    return _on_device(loader, device)


def eval_loader(dataset: ImageDataset, batch_size: int, limit: int | None = None, num_workers: int = 4, rank: int = 0,
                world: int = 1, device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of the dataset, in order, each image once: batches like train_loader's, the last one smaller.

    limit: at most so many images in all, evenly spread over the dataset.
    """
    dataset.uint8 = True
    count = min(limit or len(dataset), len(dataset))
    indices = [i * len(dataset) // count for i in range(count)][rank::world]
    loader = DataLoader(dataset, batch_sampler=[indices[i:i + batch_size] for i in range(0, len(indices), batch_size)],
                        **_workers(num_workers, device))
    return _on_device(loader, device)


class CodeCache:
    """The codes of a split's images, encoded once by a stage-1 model and kept in memory-mapped files.

    `encode` fills it, in several processes at once; what is `missing` after an interruption is done next. Then rows can be read:
    cache[rows] -> (codes, labels), int64. Row view * len(indices) + i is image indices[i] with the augmentation of epoch `view`.

    folder         a folder inside it is named after `key`, in which everything must be that the codes depend on
    indices        which images of the dataset
    views          how many crops and flips of each
    example        the codes of some image (1, ...), for their names and shapes
    codebook_size  K; what is above 65,536 takes four bytes per code instead of two
    """

    def __init__(self, folder: Path, key: str, dataset: ImageDataset, indices: list[int], views: int, example: dict[str, Tensor],
                 codebook_size: int):
        self.folder, self.dataset, self.indices, self.views = folder / key, dataset, indices, views
        self.rows = len(indices) * views
        kind = "uint16" if codebook_size <= 2**16 else "int32"
        # One array per tensor of codes, the labels, and whether a row is done.
        self.shapes = {k: (kind, tuple(v.shape[1:])) for k, v in example.items()} | {"labels": ("int32", ()), "done": ("uint8", ())}

    def create(self) -> None:
        """Makes the files, unless they are there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as lock:
            with suppress(OSError):  # some file systems have no locks
                fcntl.flock(lock, fcntl.LOCK_EX)  # another run may want the same codes
            for name, (kind, shape) in self.shapes.items():
                size = self.rows * np.dtype(kind).itemsize * math.prod(shape)
                path = self.folder / f"{name}.bin"
                if not path.is_file() or path.stat().st_size != size:
                    (self.folder / "done.bin").unlink(missing_ok=True)  # the last to be made: nothing is done yet
                    make_file(path, size)

    def encode(self, rows: list[int], encode: Callable[[Tensor], dict[str, Tensor]], batch_size: int, num_workers: int = 4,
               device: torch.device | str = "cpu") -> Iterator[int]:
        """Encodes these rows by `encode` (images (B, 3, S, S) to codes); yields the number of rows after each batch. What is
        written is on the disk before it counts as done."""
        batches = [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
        n, synced = len(self.indices), time.monotonic()
        keys = [[(row // n, self.indices[row % n]) for row in batch] for batch in batches]
        self.dataset.uint8 = True
        loader = DataLoader(self.dataset, batch_sampler=keys, **_workers(num_workers, device))
        files = {name: open(self.folder / f"{name}.bin", "r+b", buffering=0) for name in self.shapes}  # noqa: SIM115
        finished: list[int] = []

        def sync() -> None:
            for name, file in files.items():
                if name != "done":
                    os.fsync(file.fileno())
            for row in finished:
                os.pwrite(files["done"].fileno(), b"\1", row)
            finished.clear()

        try:
            for i, (images, labels) in enumerate(_on_device(loader, device)):
                arrays = {**encode(images), "labels": labels}
                for name, tensor in arrays.items():
                    kind, shape = self.shapes[name]
                    array = tensor.cpu().numpy()
                    if array.min() < 0 or array.max() > np.iinfo(kind).max:
                        raise DataError(f"{name} from {array.min()} to {array.max()} do not fit the cache's {kind}")
                    for row, value in zip(batches[i], array.astype(kind)):
                        os.pwrite(files[name].fileno(), value.tobytes(), row * value.nbytes)
                finished += batches[i]
                if time.monotonic() - synced > 10:
                    sync()
                    synced = time.monotonic()
                yield len(batches[i])
        finally:
            sync()
            for file in files.values():
                file.close()

    def missing(self) -> list[int]:
        """The rows that are not done."""
        return np.flatnonzero(self._map("done") == 0).tolist()

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, rows: list[int] | slice) -> tuple[dict[str, Tensor], Tensor]:
        arrays = {name: torch.from_numpy(self._map(name)[rows].astype(np.int64)) for name in self.shapes if name != "done"}
        labels = arrays.pop("labels")
        return arrays, labels

    def _map(self, name: str) -> np.ndarray:
        kind, shape = self.shapes[name]
        return np.memmap(self.folder / f"{name}.bin", kind, "r", shape=(self.rows, *shape))


def make_file(path: Path, size: int) -> None:
    """A file of zeros that has all its space, so that a full disk shows now, and not when a memory map is written."""
    allocate = getattr(os, "posix_fallocate", None) or (lambda descriptor, _, size: os.truncate(descriptor, size))  # macOS has none
    with open(path, "wb") as file:
        try:
            allocate(file.fileno(), 0, size)
        except OSError as error:
            path.unlink()
            free = shutil.disk_usage(path.parent).free / 1e6
            raise OSError(error.errno, error.strerror, f"{path}, which needs {size / 1e6:.1f} MB where {free:.1f} MB are free") from error


def code_loader(cache: CodeCache, lengths: Tensor, batch_size: int, seed: int = 0, start: int = 0, rank: int = 0, world: int = 1,
                device: torch.device | str = "cpu") -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Endless shuffled batches (codes, labels) on `device`, of images of similar length; see CodeBatches."""
    cuda = torch.device(device).type == "cuda"
    for rows in CodeBatches(lengths, cache.views, batch_size, seed, start, rank, world):
        codes, labels = cache[rows]
        codes = {k: (v.pin_memory() if cuda else v).to(device, non_blocking=True) for k, v in codes.items()}
        yield codes, labels.to(device, non_blocking=True)


class CodeBatches(Sampler):
    """Endless lists of rows of a CodeCache. An epoch is a permutation of all images, each in the view whose turn it is; what
    does not fill a batch is dropped. Among POOL batches at a time, images of similar length come together.

    lengths (views * n,): of each row. The batch of all processes together does not depend on their number.
    """

    POOL = 64

    def __init__(self, lengths: Tensor, views: int, batch_size: int, seed: int = 0, start: int = 0, rank: int = 0, world: int = 1):
        self.lengths, self.views, self.seed, self.start, self.rank, self.world = lengths, views, seed, start, rank, world
        self.n, self.batch = len(lengths) // views, batch_size * world

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.n // self.batch
        epoch, first = divmod(self.start, per_epoch)
        while True:
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
            rows = torch.randperm(self.n, generator=generator)[:per_epoch * self.batch] + self.n * (epoch % self.views)
            batches = []
            for pool in rows.split(self.POOL * self.batch):
                pool = pool[self.lengths[pool].argsort(stable=True)].view(-1, self.batch)
                batches.append(pool[torch.randperm(len(pool), generator=generator)])
            for batch in torch.cat(batches)[first:]:
                yield batch[self.rank::self.world].tolist()
            epoch, first = epoch + 1, 0


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


def _workers(num_workers: int, device: torch.device | str) -> dict:
    return dict(num_workers=num_workers, pin_memory=torch.device(device).type == "cuda",
                prefetch_factor=4 if num_workers else None, worker_init_fn=_leave_signals_to_the_trainer,
                generator=torch.Generator())  # or making a loader would draw from the models' random numbers


def _leave_signals_to_the_trainer(_: int) -> None:
    """Schedulers and Ctrl-C signal every process, but the training process must save before its workers end. A second
    SIGTERM, which it sends a worker that will not end, counts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


@atexit.register
def end_workers() -> None:
    """After an error Python sends its workers one SIGTERM and waits for them, which would be for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises when a worker is killed
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _on_device(loader: DataLoader, device: torch.device | str) -> Iterator[tuple[Tensor, Tensor]]:
    for images, labels in loader:
        yield to_float(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True)


# ---------------------------------------------------------------------------------------------------------------------
# Where images come from


@dataclass
class Source:
    """`load(index)` is an RGB PIL image of any size (or a uint8 tensor of the right one); `name(index)` is for messages."""

    load: Callable[[int], Image.Image | Tensor]
    name: Callable[[int], str]
    labels: list[int]
    classes: list[str]


@dataclass
class Files:
    """The images at some paths; `crop` (left, top, right, bottom) in pixels is cut out first."""

    paths: list[str]
    crop: tuple[int, int, int, int] | None = None

    def load(self, index: int) -> Image.Image:
        image = read_image(self.paths[index])
        return image.crop(self.crop) if self.crop else image

    def name(self, index: int) -> str:
        return self.paths[index]


def read_image(path: str | Path) -> Image.Image:
    """The image as 8-bit RGB, upright (EXIF), over white where it is transparent; 16-bit images keep their high bytes."""
    with Image.open(path) as image:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
        return image.convert("RGB")


def list_images(root: Path) -> list[Path]:
    """All image files below `root`, in order of their relative names; hidden files and folders are passed over."""
    found = []
    for where, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found += [Path(where, f) for f in sorted(files) if not f.startswith(".") and Path(f).suffix.lower() in EXTENSIONS]
    return found


def labelled(paths: list[Path], base: Path, classes: list[str] | None = None) -> tuple[list[int], list[str]]:
    """Labels from the first-level folders below `base`, if every image is in one; otherwise all 0."""
    parts = [p.relative_to(base).parts for p in paths]
    if not all(len(p) > 1 for p in parts):
        return [0] * len(paths), ["image"]
    classes = classes or sorted({p[0] for p in parts})
    index = {c: i for i, c in enumerate(classes)}
    for path, p in zip(paths, parts):
        if p[0] not in index:
            raise DataError(f"{path} is of class {p[0]!r}, which the training split does not have")
    return [index[p[0]] for p in parts], classes


def imagenet(root: Path, train: bool) -> Source:
    base = root / ("train" if train else "val")
    classes = sorted(d.name for d in (root / "train").iterdir() if d.is_dir()) if (root / "train").is_dir() else None
    if not base.is_dir() or not classes:
        raise DataError(f"{base if not base.is_dir() else root / 'train'} has no class folders; data.root must be {LAYOUTS['imagenet']}")
    paths = list_images(base)
    if paths and all(p.parent == base for p in paths):
        raise DataError(f"the images in {base} are not sorted into class folders; data.root must be {LAYOUTS['imagenet']}")
    labels, classes = labelled(paths, base, classes)
    # Folders may be named by synset (n01440764) or by class index (0), which the .yml file translates.
    synsets, words = {}, {}
    if (root / "imagenet_idx_to_synset.yml").is_file():
        synsets = dict(re.findall(r"(\d+): *(n\d+)", (root / "imagenet_idx_to_synset.yml").read_text()))
    if (root / "synset_human.txt").is_file():
        words = dict(line.split(maxsplit=1) for line in (root / "synset_human.txt").read_text().splitlines() if " " in line)
    names = [words.get(synsets.get(c, c), synsets.get(c, c)) for c in classes]
    files = Files([str(p) for p in paths])
    return Source(files.load, files.name, labels, names)


def ffhq(root: Path, train: bool) -> Source:
    name, other = ("ffhqtrain.txt", "ffhqvalidation.txt") if train else ("ffhqvalidation.txt", "ffhqtrain.txt")
    lists = {f: p for f in (name, other) for d in (Path("assets"), root, root / "assets") if (p := d / f).is_file()}
    paths = list_images(root)
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
    files = Files([str(p) for p in paths])
    return Source(files.load, files.name, [0] * len(paths), ["face"])


def celeba(root: Path, train: bool) -> Source:
    partition, images = root / "list_eval_partition.txt", root / "img_align_celeba"
    for path in (partition, images):
        if not path.exists():
            raise DataError(f"there is no {path}; data.root must be {LAYOUTS['celeba']}")
    rows = [line.split() for line in partition.read_text().splitlines() if line.strip()]
    names = [name for name, split in rows if split == ("0" if train else "1")]
    files = Files([str(images / name) for name in names], crop=(89 - 64, 121 - 64, 89 + 64, 121 + 64))
    return Source(files.load, files.name, [0] * len(names), ["face"])


def cifar10(root: Path, train: bool) -> Source:
    try:
        data = torchvision.datasets.CIFAR10(str(root), train=train)
    except RuntimeError as error:
        raise DataError(f"{root} does not hold CIFAR-10 whole; data.root must be {LAYOUTS['cifar10']}") from error
    return Source(_Arrays(data.data).load, str, data.targets, data.classes)


@dataclass
class _Arrays:
    arrays: np.ndarray

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.arrays[index])


def folder(root: Path, train: bool, val_fraction: float) -> Source:
    base = root / "train" if (root / "train").is_dir() else root
    paths = list_images(base)
    if not (root / "train").is_dir():
        paths = [p for p in paths if (root / "val") not in p.parents]
    labels, classes = labelled(paths, base)
    if (root / "val").is_dir():
        if not train:
            paths = list_images(root / "val")
            labels, classes = labelled(paths, root / "val", classes if classes != ["image"] else None)
    elif paths:
        # A file's place does not change when others come or go.
        place = [zlib.crc32(p.relative_to(base).as_posix().encode()) / 2**32 for p in paths]
        limit = max(val_fraction, min(place) + 2**-32)  # at least one image for validation
        keep = [i for i, x in enumerate(place) if (x >= limit) == train]
        paths, labels = [paths[i] for i in keep], [labels[i] for i in keep]
    files = Files([str(p) for p in paths])
    return Source(files.load, files.name, labels, classes)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes: a dataset that needs nothing

FORMS = ["disc", "square", "triangle", "cross", "ring"]
TEXTURES = ["striped", "checked"]
SHAPES_CLASSES = [f"{texture} {form}" for form in FORMS for texture in TEXTURES]


def shapes(train: bool, image_size: int, seed: int, size: int, max_objects: int = 3) -> Source:
    first = 0 if train else 2**31  # validation images are not among the training images, however many there are
    return Source(partial(_load_shape, seed, first, image_size, max_objects), partial(_name_shape, first),
                  _ShapeLabels(seed, first, size), SHAPES_CLASSES)


def _load_shape(seed: int, first: int, image_size: int, max_objects: int, index: int) -> Tensor:
    return draw_shapes(seed, first + index, image_size, max_objects)[0]


def _name_shape(first: int, index: int) -> str:
    return f"shapes image {first + index}"


@dataclass
class _ShapeLabels:
    seed: int
    first: int
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if index >= self.size:
            raise IndexError(index)  # or going through them would not end
        return random.Random(f"shapes {self.seed} {self.first + index}").randrange(len(SHAPES_CLASSES))


def draw_shapes(seed: int, index: int, size: int, max_objects: int = 3) -> tuple[Tensor, int, Tensor]:
    """Image number `index`: (uint8 (3, size, size), label, detail bool (size, size)).

    One to `max_objects` objects of one form, one of six colours and one texture (period 7 to 11 pixels) over a smooth
    gradient. `detail` is where the objects are: 15 % to 60 % of the image.
    """
    rng = random.Random(f"shapes {seed} {index}")
    label = rng.randrange(len(SHAPES_CLASSES))
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
