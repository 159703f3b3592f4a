"""Images inside larger files, where they lie: .tar shards, read by an index, and Hugging Face datasets.

    tar_shards, tables   what `root` holds for training, and for validation if its names tell
    Shards, Table        one of the two: read(row) -> an image file's bytes, or its path; name(row) for messages; keys, what the held-out
                         rows are chosen by; found, the class of each row: a number or a word; classes, if words have an order

A wrong root is a FileNotFoundError, a folder that may not be read a PermissionError, anything else
that is wrong a ValueError, of one sentence. Neither class keeps a file's position, so workers may
share them.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import tarfile
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from images import files_below, image_extensions

SPLIT = re.compile(r"(?<![a-z])(train|val)(ing|id|idation)?(?![a-z])", re.IGNORECASE)  # the first in a path tells
# WebDataset's key, up to the first dot of the file's name, and the rest. What is hidden has none, nor is a
# leading / or ./ in it.
MEMBER = re.compile(r"(?!(?:.*/)?\.[^./])(?:\.?/)*((?:.*/)?[^./]+)\.([^/]*)")


def by_split(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names for training and for validation. Where none says "train", all that do not say "val" are for training."""
    said = [found[1].lower() if (found := SPLIT.search(name)) else None for name in names]
    train = "train" if "train" in said else None
    return [n for n, s in zip(names, said) if s == train], [n for n, s in zip(names, said) if s == "val"]


@dataclass
class Shards:
    """Images in .tar files."""

    base: Path
    files: list[str]  # relative to base
    keys: list[str]  # the names of the images in them
    places: np.ndarray  # (N, 3): file, offset, size
    found: Sequence[int] | Sequence[str]  # the numbers in .cls, else the first-level folders, else "image"
    classes = None

    def read(self, row: int) -> bytes:
        file, offset, size = self.places[row].tolist()
        with open(self.base / self.files[file], "rb") as shard:
            shard.seek(offset)
            return shard.read(size)

    def name(self, row: int) -> str:
        return f"{self.files[self.places[row, 0]]}/{self.keys[row]}"


def tar_shards(root: Path) -> tuple[Shards, Shards]:
    """The shards in a folder, at any depth, or those that a pattern names ({000..123}, {train,val})."""
    if root.is_dir():
        base, files = root, sorted(files_below({".tar"}, root)[0][0])
    else:
        base = Path(os.path.dirname(str(root).partition("{")[0]))
        files = [os.path.relpath(path, base) for path in expand(str(root))]
        by_place = {}  # a shard that two names lead to is read once
        for name in files:
            if not (base / name).is_file():
                raise FileNotFoundError(f"there is no shard {base / name}")
            by_place.setdefault(os.path.realpath(base / name), name)
        files = [*by_place.values()]
    if not files:
        raise FileNotFoundError(f"there is no .tar in {root}")
    parts = by_split(files)
    files = parts[0] + parts[1]
    indices = index_all([base / name for name in files])
    keys, offsets, sizes, numbers = ([value for index in indices for value in index[column]] for column in range(4))
    file = np.repeat(range(len(files)), [len(index[0]) for index in indices])
    if None not in numbers:
        found = numbers
    elif any(number is not None for number in numbers):
        bare = numbers.index(None)
        raise ValueError(f"{base / files[file[bare]]} has no .cls for {keys[bare]}, although other images have one; add it, or remove all")
    elif all("/" in key for key in keys):
        found = [key.partition("/")[0] for key in keys]
    else:
        found = ["image"] * len(keys)
    places, n = np.array([file, offsets, sizes], np.int64).T, sum(len(index[0]) for index in indices[:len(parts[0])])
    return tuple(Shards(base, files, keys[part], places[part], found[part]) for part in (slice(n), slice(n, None)))


def expand(pattern: str) -> list[str]:
    """What a shell makes of {000..123} and {a,b}."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    between = ([str(i).zfill(len(numbers[1])) for i in range(int(numbers[1]), int(numbers[2]) + 1)] if numbers else braces[1].split(","))
    return [path for word in between for path in expand(pattern[:braces.start()] + word + pattern[braces.end():])]


def index_all(shards: list[Path]) -> list[list]:
    """The index of each shard, from $XDG_CACHE_HOME/minvq (~/.cache/minvq), since shards often lie where nothing can be written. It is made
    and kept there if it is missing or damaged, or if the shard's size or time has changed."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "minvq"
    states = [(shard.absolute(), shard.stat()) for shard in shards]
    extensions = sorted(image_extensions())  # another Pillow reads other formats
    names = [f"3 {path} {state.st_size} {state.st_mtime_ns} {extensions}" for path, state in states]
    paths = [cache / (hashlib.sha256(os.fsencode(name)).hexdigest()[:32] + ".json")
             for name in names]
    found = [_load(path) for path in paths]
    missing = [i for i, index in enumerate(found) if index is None]
    random.Random().shuffle(missing)  # processes that start together begin at different shards, and share the work
    for i in tqdm(missing, "index of the shards", unit="shard", delay=2, disable=os.environ.get("RANK", "0") != "0", dynamic_ncols=True):
        found[i] = _load(paths[i])
        if found[i] is None:
            found[i] = index_of(shards[i])
            mine = paths[i].with_suffix(f".{uuid.uuid4().hex}")  # another process may write the same
            try:
                cache.mkdir(parents=True, exist_ok=True)
                mine.write_text(json.dumps(found[i]))
                os.replace(mine, paths[i])
            except OSError as error:
                warnings.warn(f"the index of the shards cannot be kept in {cache} ({error.strerror}) and is made again at every start; set "
                              "XDG_CACHE_HOME to a folder that can be written", stacklevel=2)
    return found


def _load(path: Path) -> list | None:
    with suppress(OSError, ValueError):  # missing, or damaged
        return json.loads(path.read_bytes())
    return None


def index_of(shard: Path) -> list[list]:
    """The names of a shard's images, their offsets and sizes, and the numbers in their .cls (or None), from the headers in the shard."""
    images, numbers, passed_over = {}, {}, []
    extensions = image_extensions()
    try:
        with tarfile.open(shard, "r:", errors="replace") as tar:
            members = tar.getmembers()
            files = {member.name: member for member in reversed(members) if member.isfile()}
            for member in members:
                match = None if member.isdir() else MEMBER.fullmatch(member.name)
                key, kind = match.groups() if match else (None, "")
                file = files.get(member.linkname if member.islnk() else member.name)
                is_image = f".{kind.lower()}" in extensions
                if file and is_image and key not in images:
                    images[key] = [f"{key}.{kind}", file.offset_data, file.size]
                elif is_image or os.path.splitext(kind)[1].lower() in extensions:
                    passed_over.append(member.name)
                elif file and kind == "cls":
                    numbers[key] = tar.extractfile(file).read(20).strip()
            tar.fileobj.seek(tar.offset)
            end = tar.fileobj.read(2**20)  # zeros, of which tarfile is content with less
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(f"{shard} is cut short, damaged or no uncompressed .tar ({error}); make or download it again") from error
    if end[:512] != bytes(512):
        raise ValueError(f"{shard} is cut short or damaged after {len(images)} images; make or download it again")
    if end.strip(b"\0"):
        raise ValueError(f"{shard} goes on after its end, as joined archives do; make or download it again, a file for each")
    for key, text in numbers.items():
        if key not in images:
            raise ValueError(f"{shard} has {key}.cls but no image of that name; add the image, or remove the .cls")
        if not text.isdigit():
            raise ValueError(f"{key}.cls in {shard} must hold a whole number, the class; it holds {text.decode(errors='replace')!r}"
                             + ("; -1 means no label, as in test splits: leave them out, or remove all .cls"
                                if text == b"-1" else ""))
    if passed_over:
        told = (f"{shard}: {len(passed_over)} images, such as {passed_over[0]}, are passed over: "
                "a key ends at a name's first dot, its first image is read, and of links only hard "
                "ones to files in the shard")
        if not images:
            raise ValueError(f"{told}; make the shard with names of one dot")
        warnings.warn(told, stacklevel=2)
    return [*map(list, zip(*images.values()) if images else [()] * 3), [int(numbers[key]) if key in numbers else None for key in images]]


@dataclass
class Table:
    """Rows of a Hugging Face dataset."""

    images: Any  # a datasets.Dataset of the column of images alone, not decoded
    part: str
    found: Sequence[int] | Sequence[str]  # the column of labels, else "image"
    classes: list[str] | None  # of a ClassLabel

    @property
    def keys(self) -> Iterator[str]:
        return map(str, range(len(self.found)))

    def read(self, row: int) -> bytes | str:
        image, = self.images[row].values()
        if image is None:
            raise ValueError("the row is empty")
        return image["path"] if image["bytes"] is None else image["bytes"]

    def name(self, row: int) -> str:
        return f"row {row} of the {self.part} split"


def tables(root: Path, image_column: str | None, label_column: str | None) -> list[Table | None]:
    """The rows of a dataset saved on disk, or of the parquet files in a folder, at any depth, which `datasets` copies to its cache once."""
    try:
        import datasets  # optional, and takes seconds
    except ImportError:
        raise ValueError("the library that reads Hugging Face datasets is missing (pip install datasets)") from None
    files = sorted(files_below({".parquet"}, root)[0][0])
    try:
        saved = {} if files else datasets.load_from_disk(str(root))
        saved = saved if isinstance(saved, dict) else {"train": saved}
        loaded = [None if not part else datasets.Dataset.from_parquet([str(root / name) for name in part]) if files
                  else datasets.concatenate_datasets([saved[name] for name in part]) for part in by_split(files or [*saved])]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{root} holds no dataset") from error
    except (OSError, ValueError, LookupError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{root} cannot be read ({str(error).partition(chr(10))[0]}); make or download it again") from error
    return [data and _table(data.with_format(None), part, image_column, label_column, datasets)  # None, or without rows
            for data, part in zip(loaded, ("train", "val"))]


def _table(data: Any, part: str, image_column: str | None, label_column: str | None, datasets: Any) -> Table:
    columns = data.features
    pictures = [name for name, feature in columns.items() if isinstance(feature, datasets.Image)]
    image_column = image_column or ("image" if "image" in columns or len(pictures) != 1 else pictures[0])
    asked, label_column = label_column, label_column or ("label" if "label" in columns else None)
    for setting, column in (("image_column", image_column), ("label_column", label_column)):
        if column is not None and column not in columns:
            raise ValueError(f"there is no column {column!r} in the {part} split; data.{setting} must be one of {', '.join(columns)}")
    try:
        images = data.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError):
        raise ValueError(f"the column {image_column!r} holds no images; set data.image_column to one of {', '.join(columns)}") from None
    if label_column is None:
        return Table(images, part, ["image"] * len(data), None)
    usable = re.match("u?int|(large_)?string", getattr(columns[label_column], "dtype", ""))
    found = data.select_columns([label_column])[:][label_column] if usable else [None]
    wrong = None
    if None in found:
        wrong = f"the column {label_column!r} must hold a number or a word for each image"
    elif isinstance(found[0], int) and min(found) < 0:
        wrong = (f"classes must be numbered from 0, those in {label_column!r} are from {min(found)} to {max(found)}; "
                 "-1 means no label")
    if wrong and asked is not None:
        raise ValueError(f"{wrong}; set data.label_column to another one")
    if wrong:
        warnings.warn(f"{wrong}; the images of the {part} split have no labels", stacklevel=2)
        return Table(images, part, ["image"] * len(data), None)
    names = getattr(columns[label_column], "names", None)
    return Table(images, part, [names[i] for i in found] if names else found, names)
