"""The codes of images on disk, for stage 2: encoded once by the stage-1 model, read in batches of
similar length.

    encode_dataset      the CodeCache of a run's split; what is missing is encoded now, by all
                        processes together
    CodeCache           memory-mapped files of codes: cache[rows] -> (codes, labels of the dataset)
    code_loader         endless batches (codes, labels) in the order of CodeBatches
    make_file           a file that has all its space

From an image to the transformer: ImageDataset (dataset.py) -> stage1.encode -> CodeCache ->
CodeBatches -> code_loader -> the loop of train_stage2.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from harness.config import UserError
from dataset import DataError, Files, ImageDataset, on_device, to_float, worker_settings
from harness.hub import run_folder
from harness.models import asked_rate, own_folder
from harness.run import Run


def encode_dataset(run: Run, stage1: torch.nn.Module, precision: str, dataset: ImageDataset,
                   limit: int | None = None, views: int = 1) -> CodeCache:
    """The codes of the dataset's images, or of `limit` of them; encoded now, in the precision of
    `stage1`, as far as they are not yet on the disk."""
    settings = run.config["codes"]
    accelerator = run.accelerator
    count = min(limit or len(dataset), len(dataset))
    indices = [i * len(dataset) // count for i in range(count)]
    split = "train" if dataset.train else "val"
    if settings["cache_dir"]:
        folder = Path(settings["cache_dir"]).expanduser()
    else:
        stage1_run = Path(run_folder(settings["stage1"] or run.folder)).expanduser()
        folder = own_folder(stage1_run, "codes", "codes/*", "codes/*/*") / "codes"
    with torch.no_grad():
        example = stage1.encode(image(dataset, indices[0]).unsqueeze(0).to(accelerator.device))
    K = stage1.quantizer.codebook_size
    key = cache_key(stage1, dataset, run.config["data"], indices, views, asked_rate(settings),
                    precision)
    cache = CodeCache(folder, f"{split}_{key}", dataset, indices, views, example, K)
    if run.is_main:
        others = [p.name for p in folder.glob(f"{split}_*") if p.name != cache.folder.name]
        if others and not cache.folder.is_dir():
            accelerator.print(f"{folder} holds codes of other weights, images or data settings "
                              f"({', '.join(others)}); encoding anew, beside them")
        cache.create()
    accelerator.wait_for_everyone()
    missing = broadcast_object_list([cache.missing() if run.is_main else None])[0]
    if missing:
        bar = tqdm(total=len(missing), desc=f"encoding ({split})", unit="img",
                   disable=not run.is_main, dynamic_ncols=True)
        own = missing[accelerator.process_index::accelerator.num_processes]
        with torch.no_grad(), bar:
            for done in cache.encode(own, stage1.encode, settings["batch_size"],
                                     run.train["dataloader_num_workers"], accelerator.device):
                bar.update(done * accelerator.num_processes)
                run.exit_at_signal("while encoding; the codes so far are kept, and the same "
                                   "command continues")
        accelerator.wait_for_everyone()
        if cache.missing():
            raise UserError(f"{cache.folder} is still not complete, although all was encoded; "
                            "remove the folder and start again")
    labels = b""
    for i in range(0, len(cache), 4096):
        codes, some = cache[i:i + 4096]
        labels += some.int().numpy().tobytes()
        if codes["indices"].max() >= K:
            raise UserError(f"{cache.folder} holds codes that the stage-1 model does not have; "
                            "remove the folder and start again")
    if run.is_main:  # a record for users: each run takes the labels of its dataset
        (cache.folder / "labels.bin").write_bytes(labels)
    return cache


def cache_key(stage1: torch.nn.Module, dataset: ImageDataset, data: dict, indices: list[int],
              views: int, rate: float | list[float] | None, precision: str) -> str:
    """A name for all that the codes depend on: weights, names of the images (not what is in the
    files), data settings, the precision, and the rate if one was chosen. A folder of image files or
    shards may move."""
    weights = hashlib.sha256()
    for name, tensor in stage1.state_dict().items():
        is_statistic = name.split(".")[-1] in ("ema_count", "ema_sum", "queue")
        if not (name.startswith("quantizer.") and is_statistic):
            weights.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    names = [dataset.source.name(i) for i in indices]
    if data["root"] and isinstance(dataset.source, Files):
        names = [os.path.relpath(name, Path(data["root"]).expanduser()) for name in names]
    images = os.fsencode("\n".join(names))
    if data["name"] == "webdataset":  # many have shards and keys of the same names
        images += dataset.source.box.places[dataset.source.rows].tobytes()
    images = hashlib.sha256(images).hexdigest()
    may_move = isinstance(dataset.source, Files) or data["name"] == "webdataset"
    # No label is in the cache.
    left_out = {"label_column", "root"} if may_move else {"label_column"}
    data = {k: v for k, v in data.items() if k not in left_out}
    about = [weights.hexdigest(), images, data, views, rate, precision]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def image(dataset: ImageDataset, index: int) -> Tensor:
    """(3, H, W) in [-1, 1]."""
    pixels = dataset[index][0]
    return to_float(pixels) if pixels.dtype == torch.uint8 else pixels


class CodeCache:
    """The codes of a split's images, encoded once by a stage-1 model and kept in memory-mapped
    files.

    `encode` fills it, in several processes at once; what is `missing` after an interruption is done
    next. Then rows can be read: cache[rows] -> (codes, labels), int64. Row view * len(indices) + i
    is image indices[i] with the augmentation of epoch `view`. Labels are the dataset's.

    folder, key    the files are in folder/key; the key must identify all that the codes depend on
    indices        which images of the dataset
    views          how many crops and flips of each
    example        the codes of some image (1, ...), for their names and shapes
    codebook_size  K; what is above 65,536 takes four bytes per code instead of two
    """

    def __init__(self, folder: Path, key: str, dataset: ImageDataset, indices: list[int],
                 views: int, example: dict[str, Tensor], codebook_size: int):
        self.folder = folder / key
        self.dataset = dataset
        self.indices = indices
        self.views = views
        self.rows = len(indices) * views
        dtype = "uint16" if codebook_size <= 2**16 else "int32"
        # One array per tensor of codes, the image that they are of (an unreadable one is replaced),
        # and whether a row is done.
        self.shapes = {name: (dtype, tuple(codes.shape[1:])) for name, codes in example.items()}
        self.shapes |= {"image": ("int32", ()), "done": ("uint8", ())}

    def create(self) -> None:
        """Makes the files, unless they are there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as lock:
            # Windows and some file systems have no such locks.
            with suppress(ImportError, OSError):
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX)  # another run may want the same codes
            for name, (dtype, shape) in self.shapes.items():
                size = self.rows * np.dtype(dtype).itemsize * math.prod(shape)
                path = self.folder / f"{name}.bin"
                if not path.is_file() or path.stat().st_size != size:
                    # Created last: without it no row is done.
                    (self.folder / "done.bin").unlink(missing_ok=True)
                    make_file(path, size)

    def encode(self, rows: list[int], encode: Callable[[Tensor], dict[str, Tensor]],
               batch_size: int, num_workers: int = 4,
               device: torch.device | str = "cpu") -> Iterator[int]:
        """Encodes these rows by `encode` (images (B, 3, H, W) to codes); yields the number of rows
        after each batch. What is written is on the disk before it counts as done."""
        n = len(self.indices)
        synced = time.monotonic()
        batches = [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
        keys = [(row // n, self.indices[row % n]) for row in rows]
        self.dataset.uint8 = True
        loader = DataLoader(self.dataset, batch_size, sampler=keys,
                            **worker_settings(num_workers, device))
        files = {name: open(self.folder / f"{name}.bin", "r+b", buffering=0)  # noqa: SIM115
                 for name in self.shapes}
        finished: list[int] = []

        def sync():
            for name, file in files.items():
                if name != "done":
                    os.fsync(file.fileno())
            for row in finished:
                os.pwrite(files["done"].fileno(), b"\1", row)
            finished.clear()

        try:
            for (images, _), batch in zip(on_device(loader, device), batches):
                shown = [self.dataset.shown(self.indices[row % n]) for row in batch]
                arrays = {**encode(images), "image": torch.tensor(shown)}
                for name, tensor in arrays.items():
                    dtype, _ = self.shapes[name]
                    array = tensor.cpu().numpy()
                    if array.min() < 0 or array.max() > np.iinfo(dtype).max:
                        raise DataError(f"{name} from {array.min()} to {array.max()} do not fit "
                                        f"the cache's {dtype}")
                    for row, value in zip(batch, array.astype(dtype)):
                        os.pwrite(files[name].fileno(), value.tobytes(), row * value.nbytes)
                finished += batch
                if time.monotonic() - synced > 10:
                    sync()
                    synced = time.monotonic()
                yield len(batch)
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
        codes = {name: torch.from_numpy(self._map(name)[rows].astype(np.int64))
                 for name in self.shapes if name != "done"}
        images = codes.pop("image").tolist()
        return codes, torch.tensor([self.dataset.label(i) for i in images])

    def _map(self, name: str) -> np.ndarray:
        dtype, shape = self.shapes[name]
        return np.memmap(self.folder / f"{name}.bin", dtype, "r", shape=(self.rows, *shape))


def code_loader(cache: CodeCache, lengths: Tensor, batch_size: int, seed: int = 0, start: int = 0,
                rank: int = 0, world: int = 1, device: torch.device | str = "cpu",
                ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Endless shuffled batches (codes, labels) on `device`, of images of similar length; see
    CodeBatches."""
    cuda = torch.device(device).type == "cuda"
    for rows in CodeBatches(lengths, cache.views, batch_size, seed, start, rank, world):
        codes, labels = cache[rows]
        codes = {name: (code.pin_memory() if cuda else code).to(device, non_blocking=True)
                 for name, code in codes.items()}
        yield codes, labels.to(device, non_blocking=True)


class CodeBatches(Sampler):
    """Endless lists of rows of a CodeCache. An epoch is a permutation of all images, each in the
    view whose turn it is; what does not fill a batch is dropped. Among POOL batches at a time,
    images of similar length come together.

    lengths (views * n,): of each row. The batch of all processes together does not depend on their
    number.
    """

    POOL = 64

    def __init__(self, lengths: Tensor, views: int, batch_size: int, seed: int = 0, start: int = 0,
                 rank: int = 0, world: int = 1):
        self.lengths = lengths
        self.views = views
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world = world
        self.n = len(lengths) // views
        self.batch = batch_size * world

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.n // self.batch
        epoch, first = divmod(self.start, per_epoch)
        while True:
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
            images = torch.randperm(self.n, generator=generator)[:per_epoch * self.batch]
            rows = images + self.n * (epoch % self.views)
            batches = []
            for pool in rows.split(self.POOL * self.batch):
                pool = pool[self.lengths[pool].argsort(stable=True)].view(-1, self.batch)
                batches.append(pool[torch.randperm(len(pool), generator=generator)])
            for batch in torch.cat(batches)[first:]:
                yield batch[self.rank::self.world].tolist()
            epoch += 1
            first = 0


def make_file(path: Path, size: int):
    """A file of zeros that has all its space, so that a full disk shows now, and not when a memory
    map is written."""
    # macOS has no posix_fallocate.
    allocate = getattr(os, "posix_fallocate", lambda file, _, size: os.truncate(file, size))
    with open(path, "wb") as file:
        try:
            allocate(file.fileno(), 0, size)
        except OSError as error:
            path.unlink()
            free = shutil.disk_usage(path.parent).free / 1e6
            where = f"{path}, which needs {size / 1e6:.1f} MB where {free:.1f} MB are free"
            raise OSError(error.errno, error.strerror, where) from error
