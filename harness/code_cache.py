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

import hashlib
import json
import math
import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from harness.config import UserError
from data.sources import Files
from dataset import ImageDataset, epochs, load_batches, spread
from harness.hub import run_folder
from harness.models import own_folder
from harness.use import asked_rate

SYNC_ROWS = 1024  # so many codes at most are lost where a process is killed


def encode_dataset(run, stage1, precision, dataset, limit=None, views=1):
    """The CodeCache of the dataset's images, or of `limit` of them; encoded now, in the precision
    of `stage1`, as far as they are not yet on the disk."""
    settings = run.config["codes"]
    accelerator = run.accelerator
    indices = spread(len(dataset), limit)
    split = "train" if dataset.train else "val"
    folder = Path(settings["cache_dir"] or "").expanduser()
    if not settings["cache_dir"]:
        stage1_run = Path(run_folder(settings["stage1"] or run.folder)).expanduser()
        folder = own_folder(stage1_run, "codes", "codes/*", "codes/*/*") / "codes"
    with torch.no_grad():
        example = stage1.encode(dataset[indices[0]][0].unsqueeze(0).to(accelerator.device))
    K = stage1.quantizer.codebook_size
    key = cache_key(stage1, dataset, run.config["data"], indices, views, asked_rate(settings),
                    precision)
    cache = CodeCache(folder, f"{split}_{key}", dataset, indices, views, example, K)
    if run.is_main:
        others = [p.name for p in folder.glob(f"{split}_*")]
        if others and cache.folder.name not in others:
            accelerator.print(f"{folder} holds codes of other weights, images or data settings "
                              f"({', '.join(others)}); encoding anew, beside them")
        cache.create()
    accelerator.wait_for_everyone()
    missing = broadcast_object_list([cache.missing()])[0]
    if missing:
        bar = tqdm(total=len(missing), desc=f"encoding ({split})", unit="img",
                   disable=not run.is_main, dynamic_ncols=True)
        own = missing[accelerator.process_index::run.world]
        with torch.no_grad(), bar:
            for done in cache.encode(own, stage1.encode, settings["batch_size"],
                                     run.train["dataloader_num_workers"], accelerator.device):
                bar.update(done * run.world)
                run.exit_at_signal("while encoding; the codes so far are kept, and the same "
                                   "command continues")
        accelerator.wait_for_everyone()
    if cache.array("indices").max() >= K:
        raise UserError(f"{cache.folder} holds codes that the stage-1 model does not have; "
                        "remove the folder and start again")
    if run.is_main:  # a record for users: each run takes the labels of its dataset
        labels = [dataset.label(image) for image in cache.array("image")]
        np.array(labels, np.int32).tofile(cache.folder / "labels.bin")
    return cache


def cache_key(stage1, dataset, data, indices, views, rate, precision):
    """A name for all that the codes depend on: weights, names of the images (not what is in the
    files), data settings, the precision, and the rate if one was chosen. A folder of image files or
    shards may move."""
    key = hashlib.sha256()
    for name, tensor in stage1.state_dict().items():
        if not name.endswith(("ema_count", "ema_sum", "queue")):  # statistics of training
            key.update(name.encode() + tensor.cpu().numpy().tobytes())
    source = dataset.source
    names = [source.name(i) for i in indices]
    is_folder = isinstance(source, Files)
    if is_folder:
        names = [os.path.relpath(name, Path(data["root"]).expanduser()) for name in names]
    key.update(os.fsencode("\n".join(names)))
    is_shards = data["name"] == "webdataset"
    if is_shards:  # many have shards and keys of the same names
        key.update(source.box.places[source.rows].tobytes())
    # No label is in the cache, and the images are named above, however many there are.
    left_out = ["label_column", "train_size", "val_size", "val_fraction"]
    if is_folder or is_shards:
        left_out.append("root")
    data = {k: v for k, v in data.items() if k not in left_out}
    key.update(json.dumps([data, views, rate, precision]).encode())
    return key.hexdigest()[:16]


@dataclass
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

    folder: Path
    key: str
    dataset: ImageDataset
    indices: list[int]
    views: int
    example: dict[str, Tensor]
    codebook_size: int

    def __post_init__(self):
        self.folder /= self.key
        dtype = "uint16" if self.codebook_size <= 2**16 else "int32"
        # One array per tensor of codes, the image that they are of (an unreadable one is replaced),
        # and whether a row is done.
        self.arrays = {name: (dtype, codes.shape[1:]) for name, codes in self.example.items()}
        self.arrays |= {"image": ("int32", ()), "done": ("uint8", ())}

    def create(self):
        """Makes the files, unless they are there. Another run may make the same: neither writes
        codes before it has seen all files whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, (dtype, shape) in self.arrays.items():  # "done" last
            size = len(self) * np.dtype(dtype).itemsize * math.prod(shape)
            path = self._path(name)
            if not path.is_file() or path.stat().st_size != size:
                make_file(path, size)

    def encode(self, rows, encode, batch_size, num_workers=4, device="cpu"):
        """Encodes these rows by `encode` (images (B, 3, H, W) to codes); yields the number of rows
        after each batch. What is written is on the disk before it counts as done."""
        batches = [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
        # Of each row: its view and its image.
        n = len(self.indices)
        keys = [[(row // n, self.indices[row % n]) for row in batch] for batch in batches]
        loader = load_batches(self.dataset, keys, num_workers, device)
        unsynced = []
        with ExitStack() as stack:
            files = {}
            for name in self.arrays:
                file = stack.enter_context(open(self._path(name), "r+b", buffering=0))
                files[name] = file.fileno()
            done = files.pop("done")

            def sync():
                for file in files.values():
                    os.fsync(file)
                for row in unsynced:
                    os.pwrite(done, b"\1", row)
                unsynced.clear()

            stack.callback(sync)
            for (images, _), batch, batch_keys in zip(loader, batches, keys):
                shown = [self.dataset.shown(index) for _, index in batch_keys]
                arrays = {**encode(images), "image": torch.tensor(shown)}
                for name, tensor in arrays.items():
                    array = tensor.cpu().numpy().astype(self.arrays[name][0])
                    for row, value in zip(batch, array):
                        os.pwrite(files[name], value.tobytes(), row * value.nbytes)
                unsynced += batch
                if len(unsynced) >= SYNC_ROWS:
                    sync()
                yield len(batch)

    def missing(self):
        """The rows that are not done."""
        return np.flatnonzero(self.array("done") == 0).tolist()

    def array(self, name):
        """One of the files, as an array over all rows."""
        dtype, shape = self.arrays[name]
        return np.memmap(self._path(name), dtype, "r", shape=(len(self), *shape))

    def _path(self, name):
        return self.folder / f"{name}.bin"

    def __len__(self):
        return len(self.indices) * self.views

    def __getitem__(self, rows):
        codes = {name: torch.from_numpy(self.array(name)[rows].astype(np.int64))
                 for name in self.arrays if name != "done"}
        images = codes.pop("image").tolist()
        return codes, torch.tensor([self.dataset.label(i) for i in images])


def code_loader(cache, lengths, batch_size, seed=0, start=0, rank=0, world=1, device="cpu"):
    """Endless shuffled batches (codes, labels) on `device`, of images of similar length; see
    CodeBatches."""
    on_gpu = torch.device(device).type == "cuda"
    for rows in CodeBatches(lengths, cache.views, batch_size, seed, start, rank, world):
        codes, labels = cache[rows]
        codes = {name: (code.pin_memory() if on_gpu else code).to(device, non_blocking=True)
                 for name, code in codes.items()}
        yield codes, labels.to(device, non_blocking=True)


@dataclass
class CodeBatches:
    """Endless lists of rows of a CodeCache. An epoch is a permutation of all images, each in the
    view whose turn it is; what does not fill a batch is dropped. Among POOL batches at a time,
    images of similar length come together.

    lengths (views * n,): of each row. The batch of all processes together does not depend on their
    number.
    """

    lengths: Tensor
    views: int
    batch_size: int
    seed: int = 0
    start: int = 0
    rank: int = 0
    world: int = 1

    POOL = 64

    def __iter__(self):
        n = len(self.lengths) // self.views
        size = self.batch_size * self.world
        for epoch, images, first, generator in epochs(n, size, self.seed, self.start):
            rows = images + n * (epoch % self.views)
            batches = []
            for pool in rows.split(self.POOL):                              # (POOL, size)
                pool = pool.flatten()
                pool = pool[self.lengths[pool].argsort(stable=True)].view(-1, size)
                batches.append(pool[torch.randperm(len(pool), generator=generator)])
            for batch in torch.cat(batches)[first:, self.rank::self.world]:
                yield batch.tolist()


def make_file(path, size):
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
