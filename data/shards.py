"""Images inside larger files, where they lie: .tar shards and Hugging Face datasets.

    tar_shards, tables   what `root` holds for training, and for validation if its names tell
    Shards, Table        the images of one of the two:
                         read(row)   an image file's bytes, or its path
                         name(row)   for messages
                         keys        the rows that are held out follow from these
                         labels      the class of each row: a number, or a word. "image" for all
                                     that have none (see by_folder)
                         order       of the words, if they have one
                         Nothing (false) where there are no images.
    index_all            where the images in shards are, kept in a cache

A wrong root is a FileNotFoundError, a folder that may not be read a PermissionError, anything else
that is wrong a ValueError, of one sentence. Neither class keeps a file's position, so workers may
share them.
"""

import hashlib
import json
import os
import random
import re
import tarfile
import uuid
import warnings
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.images import files_below, image_extensions
from data.splits import by_folder, by_split

# WebDataset's key, up to the first dot of the file's name, and the rest. What is hidden has none,
# nor is a leading / or ./ in it.
MEMBER = re.compile(r"(?!(?:.*/)?\.[^./])(?:\.?/)*((?:.*/)?[^./]+)\.([^/]*)")


@dataclass
class Shards:
    """Images in .tar files."""

    base: Path
    files: list  # relative to base
    keys: list  # the names of the images in them
    places: np.ndarray  # (N, 3): file, offset, size
    labels: list  # the numbers in .cls, or else folders
    order = None

    def read(self, row):
        file, offset, size = self.places[row].tolist()
        with open(self.base / self.files[file], "rb") as shard:
            shard.seek(offset)
            return shard.read(size)

    def name(self, row):
        return f"{self.files[self.places[row, 0]]}/{self.keys[row]}"


def tar_shards(root):
    """The shards in a folder, at any depth, or those that a pattern names ({000..123},
    {train,val}): those for training, those for validation."""
    if root.is_dir():
        base = root
        files = sorted(files_below({".tar"}, root)[0][0])
    else:
        base = Path(os.path.dirname(str(root).partition("{")[0]))
        by_place = {}  # a shard that two names lead to is read once
        for path in expand(str(root)):
            if not os.path.isfile(path):
                raise FileNotFoundError(f"there is no shard {path}")
            by_place.setdefault(os.path.realpath(path), os.path.relpath(path, base))
        files = by_place.values()
    if not files:
        raise FileNotFoundError(f"there is no .tar in {root}")
    training, validation = by_split(files)
    files = training + validation
    indices = index_all([base / file for file in files])
    keys, offsets, sizes, labels = ([*chain(*column)] for column in zip(*indices))
    counts = [len(index[0]) for index in indices]
    places = np.array([np.repeat(range(len(files)), counts), offsets, sizes], np.int64).T
    if set(labels) <= {None}:
        labels = by_folder(keys)
    elif None in labels:
        row = labels.index(None)
        raise ValueError(f"{base / files[places[row, 0]]} has no .cls for {keys[row]}, although "
                         "other images have one; add it, or remove all")
    end = sum(counts[:len(training)])
    return [labels[rows] and Shards(base, files, keys[rows], places[rows], labels[rows])
            for rows in (slice(end), slice(end, None))]


def expand(pattern):
    """What a shell makes of {000..123} and {a,b}."""
    match = re.fullmatch(r"(.*?)\{(?:(\d+)\.\.(\d+)|([^{}]*))\}(.*)", pattern)
    if match is None:
        return [pattern]
    before, first, last, words, after = match.groups()
    if first:
        words = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    else:
        words = words.split(",")
    return [path for word in words for path in expand(before + word + after)]


def index_all(shards):
    """The index of each shard, from $XDG_CACHE_HOME/minvq (~/.cache/minvq), since shards often lie
    where nothing can be written. It is made and kept there if it is missing or damaged, or if the
    shard's size or time has changed."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "minvq"
    # Processes that start together begin at different shards, and share the work.
    shuffled = random.Random().sample(shards, len(shards))
    bar = tqdm(shuffled, "index of the shards", delay=2, dynamic_ncols=True,
               disable=os.environ.get("RANK", "0") != "0")
    indices = {shard: _index(shard, cache) for shard in bar}
    return [indices[shard] for shard in shards]


def _index(shard, cache):
    state = shard.stat()
    extensions = sorted(image_extensions())  # another Pillow reads other formats
    name = f"3 {shard.absolute()} {state.st_size} {state.st_mtime_ns} {extensions}"
    path = cache / f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError):  # missing, or damaged
        return json.loads(path.read_bytes())
    index = index_of(shard)
    unfinished = path.with_suffix(f".{uuid.uuid4().hex}")  # another process may write the same
    try:
        cache.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(index))
        os.replace(unfinished, path)
    except OSError as error:
        warnings.warn(f"the index of the shards cannot be kept in {cache} ({error.strerror}) and "
                      "is made again at every start; set XDG_CACHE_HOME to a folder that can be "
                      "written", stacklevel=2)
    return index


def index_of(shard):
    """The names of a shard's images, their offsets and sizes, and the numbers in their .cls (or
    None), from the headers in the shard."""
    images = {}  # (name, offset, size) by key
    classes = {}  # what is in .cls, by key
    passed_over = []
    extensions = image_extensions()
    try:
        with tarfile.open(shard, "r:", errors="replace") as tar:
            members = tar.getmembers()
            files = {member.name: member for member in reversed(members) if member.isfile()}
            for member in members:
                match = MEMBER.fullmatch(member.name)
                if member.isdir() or not match:
                    continue
                key, extension = match.groups()
                file = files.get(member.linkname if member.islnk() else member.name)
                is_image = os.path.splitext(member.name)[1].lower() in extensions
                if is_image and file and key not in images and "." not in extension:
                    images[key] = f"{key}.{extension}", file.offset_data, file.size
                elif is_image:
                    passed_over.append(member.name)
                elif file and extension == "cls":
                    classes[key] = tar.extractfile(file).read(20).strip()
            tar.fileobj.seek(tar.offset)
            end = tar.fileobj.read(2**20)  # zeros, of which tarfile is content with less
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(f"{shard} is cut short, damaged or no uncompressed .tar ({error}); make "
                         "or download it again") from error
    if end[:512] != bytes(512):
        raise ValueError(f"{shard} is cut short or damaged after {len(images)} images; make or "
                         "download it again")
    if any(end):
        raise ValueError(f"{shard} goes on after its end, as joined archives do; make or download "
                         "it again, a file for each")
    for key, text in classes.items():
        if key not in images:
            raise ValueError(f"{shard} has {key}.cls but no image of that name; add the image, or "
                             "remove the .cls")
        if not text.isdigit():
            raise ValueError(f"{key}.cls in {shard} must hold a whole number, the class; it holds "
                             f"{text.decode(errors='replace')!r}; -1 means no label, as in test "
                             "splits: leave them out, or remove all .cls")
        classes[key] = int(text)
    if passed_over:
        sentence = (f"{shard}: {len(passed_over)} images, such as {passed_over[0]}, are passed "
                    "over: a key ends at a name's first dot, its first image is read, and of links "
                    "only hard ones to files in the shard")
        if not images:
            raise ValueError(f"{sentence}; make the shard with names of one dot")
        warnings.warn(sentence, stacklevel=2)
    rows = [[*image, classes.get(key)] for key, image in images.items()]
    return [[row[column] for row in rows] for column in range(4)]


@dataclass
class Table:
    """Rows of a Hugging Face dataset."""

    images: Any  # a datasets.Dataset of the column of images alone, not decoded
    split: str
    labels: list  # the column of labels
    order: list | None = None  # of a ClassLabel

    @property
    def keys(self):
        return map(str, range(len(self.labels)))

    def read(self, row):
        image, = self.images[row].values()
        if image is None:
            raise ValueError("the row is empty")
        return image["path"] if image["bytes"] is None else image["bytes"]

    def name(self, row):
        return f"row {row} of the {self.split} split"


def tables(root, image_column, label_column):
    """The rows of a dataset saved on disk, or of the parquet files in a folder, at any depth, which
    `datasets` copies to its cache once: those for training, those for validation."""
    try:
        import datasets  # optional, and takes seconds
    except ImportError:
        raise ValueError("the library that reads Hugging Face datasets is missing (pip install "
                         "datasets)") from None
    files = sorted(files_below({".parquet"}, root)[0][0])
    try:
        if files:
            load = datasets.Dataset.from_parquet
            saved = {file: str(root / file) for file in files}
        else:
            load = datasets.concatenate_datasets
            saved = datasets.load_from_disk(str(root))
            if not isinstance(saved, dict):
                saved = {"train": saved}
        parts = [names and load([saved[name] for name in names]) for names in by_split(saved)]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{root} holds no dataset") from error
    except (OSError, ValueError, LookupError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{root} cannot be read ({reason}); make or download it again") from error
    return [part and _table(part, split, image_column, label_column)
            for part, split in zip(parts, ("train", "val"))]


def _table(data, split, image_column, label_column):
    import datasets

    features = data.features
    pictures = [name for name in features if isinstance(features[name], datasets.Image)]
    if "image" in features or len(pictures) != 1:
        pictures = ["image"]
    image_column = image_column or pictures[0]
    column = label_column or ("label" if "label" in features else None)
    for setting, name in (("image_column", image_column), ("label_column", column)):
        if name is not None and name not in features:
            raise ValueError(f"there is no column {name!r} in the {split} split; data.{setting} "
                             f"must be one of {', '.join(features)}")
    data = data.with_format(None)
    try:
        images = data.select_columns(image_column)
        images = images.cast_column(image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError):
        raise ValueError(f"the column {image_column!r} holds no images; set data.image_column to "
                         f"one of {', '.join(features)}") from None
    table = Table(images, split, ["image"] * len(data))
    if column is None:
        return table
    labels = [None]
    if re.match("u?int|(large_)?string", getattr(features[column], "dtype", "")):
        labels = data[column][:]
    wrong = None
    if None in labels:
        wrong = f"the column {column!r} must hold a number or a word for each image"
    elif isinstance(labels[0], int) and min(labels) < 0:
        wrong = (f"classes must be numbered from 0, those in {column!r} are from {min(labels)} to "
                 f"{max(labels)}; -1 means no label")
    if wrong:
        if label_column:
            raise ValueError(f"{wrong}; set data.label_column to another one")
        warnings.warn(f"{wrong}; the images of the {split} split have no labels", stacklevel=2)
        return table
    table.order = getattr(features[column], "names", None)
    table.labels = [table.order[label] for label in labels] if table.order else labels
    return table
