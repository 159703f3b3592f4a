"""The datasets by name: where their images and labels are.

    SOURCES                 a function for each name, and what `root` must hold; to add one, see
                            CONTRIBUTING.md
    find_source             the images of a split
    Files, Arrays, Packed   what such functions return (see `Source` in dataset.py)
    list_images             the images in folders
"""

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from data.images import DataError, files_below, image_extensions, read_image

SIDECARS = (".txt", ".json", ".csv", ".xml", ".yml", ".yaml", ".md")  # often lie beside images


def find_source(name, root, split, *settings):
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


@dataclass
class Files:
    """The images at some paths; `crop` (left, top, right, bottom) in pixels is cut out first.
    `synsets`: the WordNet numbers of classes that have other names."""

    paths: list
    labels: list
    classes: list
    crop: tuple | None = None
    synsets: dict = field(default_factory=dict)

    def load(self, index):
        return read_image(self.paths[index]).crop(self.crop) if self.crop else self.paths[index]

    def name(self, index):
        return self.paths[index]


@dataclass
class Arrays:
    """Images (H, W, 3) uint8 in memory."""

    arrays: np.ndarray
    labels: list
    classes: list

    def load(self, index):
        return Image.fromarray(self.arrays[index])

    def name(self, index):
        return f"image {index}"


@dataclass
class Packed:
    """Some rows of what lies in shards or in a table."""

    box: Any  # Shards or Table
    rows: list
    labels: list
    classes: list

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
    source.synsets = dict(zip(source.classes, synsets))
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
