"""The codes of images on disk: encoded once, again when something changes, and read in batches of similar length."""

import os
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import class_folders, save_stage1, share_of_others, write_tiny2
from PIL import Image

from dataset import make_dataset, to_uint8
from harness.code_cache import CodeBatches, CodeCache
from harness.config import UserError
from harness.models import load_run, save_run


def cache_of(tmp_path, views=2, name="dqvae"):
    stage1, config = load_run(save_stage1(tmp_path, name))
    data = make_dataset("shapes", image_size=16, train_size=20)
    with torch.no_grad():
        example = stage1.encode(data[0][0].unsqueeze(0))
    cache = CodeCache(tmp_path / "codes", "key", data, list(range(20)), views, example, 32)
    return cache, torch.no_grad()(stage1.encode), data


def test_an_interrupted_encoding_continues(tmp_path):
    cache, encode, data = cache_of(tmp_path)
    cache.create()
    part = cache.encode(cache.missing(), encode, 8, 0)
    assert next(part) == 8 and next(part) == 8
    part.close()  # as an exception would
    cache.create()  # the next start finds the files
    assert cache.missing() == list(range(16, 40))
    assert list(cache.encode(cache.missing(), encode, 8, 0)) == [8, 8, 8]
    assert cache.missing() == []
    codes, labels = cache[[0, 7, 27]]
    data.uint8 = False
    want = encode(torch.stack([data[0][0], data[7][0], data[(1, 7)][0]]))
    assert share_of_others(codes, want) < 0.02  # encoded in other batches
    assert labels.tolist() == [data[i][1] for i in (0, 7, 7)]


def test_a_killed_encoding_does_not_count_what_is_not_written(tmp_path, monkeypatch):
    cache, encode, _ = cache_of(tmp_path)
    cache.create()

    def fail(_):
        raise OSError("the disk is gone")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="gone"):
        list(cache.encode(cache.missing(), encode, 8, 0))
    assert len(cache.missing()) == 40


def test_a_cache_on_a_full_disk(tmp_path, monkeypatch):
    cache, _, _ = cache_of(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError) as error:
        cache.create()
    assert "No space left on device" in str(error.value) and "which needs" in error.value.filename


def test_a_signal_while_encoding(train2, tmp_path, monkeypatch):
    config = write_tiny2(tmp_path, "gpt")
    encode, count = CodeCache.encode, []

    def interrupted(self, *args):
        for n in encode(self, *args):
            count.append(n)
            if len(count) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield n

    monkeypatch.setattr(CodeCache, "encode", interrupted)
    with pytest.raises(UserError, match="stopped by SIGTERM while encoding; the codes so far are kept"):
        train2(config)
    assert len(count) == 3
    train2(config, "train.max_train_steps=1")
    assert sum(count) == 4 + 2 * 40  # every row of validation and training once: what was encoded before the signal was kept


# When codes are encoded again


def test_codes_are_encoded_once_and_again_when_something_changes(train2, tmp_path, capfd):
    config, folder = write_tiny2(tmp_path, "gpt", train="train_batch_size: 4\n  max_train_steps: 1\n  learning_rate: 0.1\n  log_with: null"
                                 "\n  dataloader_num_workers: 0"), tmp_path / "stage1_vqgan/codes"

    def start(*settings):
        before = set(folder.glob("*"))
        shutil.rmtree(tmp_path / "run2", ignore_errors=True)
        capfd.readouterr()
        train2(config, *settings)
        said = capfd.readouterr()
        assert ("encoding" in said.err) == (set(folder.glob("*")) != before)
        return sorted(p.name.split("_")[0] for p in set(folder.glob("*")) - before), said.out

    assert start()[0] == ["train", "val"]
    assert start()[0] == []
    assert start("codes.cache_views=3")[0] == ["train"]
    new, said = start("data.train_size=30")
    assert new == ["train"] and "other weights, images or data settings" in said
    model, about = load_run(tmp_path / "stage1_vqgan")
    model.encoder.neck.conv_out.bias.data += 1.0
    save_run(tmp_path / "other", about, {"model": model})
    assert start(f"codes.stage1={tmp_path}/other", f"codes.cache_dir={folder}")[0] == ["train", "val"]


def test_a_moved_image_folder_keeps_its_codes(train2, tmp_path):
    for label in "ab":
        (tmp_path / f"images/{label}").mkdir(parents=True)
        for i in range(12):
            noise = np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / f"images/{label}/{i}.png")
    config = write_tiny2(tmp_path, "gpt", data="name: folder\n  val_fraction: 0.3")
    train2(config, f"data.root={tmp_path}/images", "train.max_train_steps=1")
    (tmp_path / "images").rename(tmp_path / "moved")
    train2(config, f"data.root={tmp_path}/moved", "train.max_train_steps=1", f"train.output_dir={tmp_path}/again")
    assert len(list((tmp_path / "stage1_vqgan/codes").glob("*"))) == 2


def test_each_rate_and_precision_has_a_code_cache_of_its_own():
    from dataset import make_dataset
    from harness.code_cache import cache_key
    from vqgan import VQVAE, VectorQuantizer

    model, data = VQVAE(ch=4, quantizer=VectorQuantizer(8, 4)), make_dataset("shapes", image_size=16)
    settings = {"name": "shapes", "root": None, "image_size": 16}
    choices = [(None, "no"), (None, "bf16"), (0.5, "no"), (0.25, "no"), ([0.3, 0.2], "no")]
    keys = [cache_key(model, data, settings, [0, 5], 2, *choice) for choice in choices]
    assert len(set(keys)) == len(choices)
    assert keys == [cache_key(model, data, settings, [0, 5], 2, *choice) for choice in choices]


def test_corrected_labels_reach_cached_codes(tmp_path):
    """Without another encoding."""
    class_folders(tmp_path / "images", ["a", "b"], 4)
    for k in (0, 1):
        data = make_dataset("folder", str(tmp_path / "images"), image_size=16, val_fraction=0)
        data.set_classes(["b", "a"] if k else ["a", "b"])
        cache = CodeCache(tmp_path / "codes", "key", data, [0, 5, 6], 2, {"indices": torch.zeros(1, 8, 8, dtype=torch.int64)}, 32)
        cache.create()
        list(cache.encode(cache.missing(), lambda images: {"indices": torch.ones(len(images), 8, 8, dtype=torch.int64)}, 4, 0))
        want = [1 - x if k else x for x in [0, 1, 1] * 2]
        assert cache[:][1].tolist() == want and cache[[5, 0]][1].tolist() == [want[5], want[0]]
        assert (cache[:][0]["indices"] == 1).all() and cache.missing() == []


def test_labels_of_images_that_take_the_place_of_unreadable_ones(tmp_path):
    class_folders(tmp_path / "images/train", ["a", "b"], 100)
    (tmp_path / "images/val").mkdir()
    (tmp_path / "images/train/a/a99.png").write_bytes(b"no image")  # the last of its class
    data = make_dataset("folder", str(tmp_path / "images"), image_size=16)
    cache = CodeCache(tmp_path / "codes", "key", data, [98, 99, 100], 1, {"indices": torch.zeros(1, 3, 16, 16, dtype=torch.int64)}, 256)
    cache.create()
    with pytest.warns(UserWarning, match="a99.png .*the next image takes its place"):
        list(cache.encode(cache.missing(), lambda images: {"indices": to_uint8(images).long()}, 2, 0))
    again = make_dataset("folder", str(tmp_path / "images"), image_size=16)
    for dataset in (data, again):  # in another run, too
        example = {"indices": torch.zeros(1, 3, 16, 16, dtype=torch.int64)}
        cache = CodeCache(tmp_path / "codes", "key", dataset, [98, 99, 100], 1, example, 256)
        codes, labels = cache[:]
        assert labels.tolist() == [0, 1, 1] and not torch.equal(codes["indices"][0], codes["indices"][1])


def test_codes_that_are_none_are_refused(train2, tmp_path):
    config = write_tiny2(tmp_path, "gpt")
    train2(config, "train.max_train_steps=1")
    for path in tmp_path.glob("stage1_vqgan/codes/train_*/indices.bin"):
        with open(path, "r+b") as file:
            file.seek(100)
            file.write(b"\xff\xff")
    with pytest.raises(UserError, match="holds codes that the stage-1 model does not have; remove the folder"):
        train2(config, f"train.output_dir={tmp_path}/other")


# Batches of similar length


def test_length_batches():
    n, batch = 1000, 8
    lengths = torch.randint(100, 600, (2 * n,), generator=torch.Generator().manual_seed(0))

    def epoch(start=0, rank=0, world=1, size=batch, number=n // batch):
        batches = iter(CodeBatches(lengths, 2, size, seed=1, start=start, rank=rank, world=world))
        return [next(batches) for _ in range(number)]

    first, second = epoch(), epoch(start=n // batch)
    for rows, view in ((first, 0), (second, 1)):  # each image once, in the view whose turn it is
        assert sorted(r for b in rows for r in b) == list(range(view * n, (view + 1) * n))
    assert epoch(start=5, number=20) == first[5:25]
    halves = [epoch(rank=r, world=2, size=batch // 2) for r in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*halves)] == [sorted(b) for b in first]

    def padding(batches):
        x = [lengths[b] for b in batches]
        return 1 - sum(v.sum() for v in x) / sum(v.max() * len(v) for v in x)

    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(0)).view(-1, batch)
    assert padding(first) < 0.05 < 0.3 < padding(shuffled)
    order = torch.tensor([float(lengths[b].float().mean()) for b in first])
    assert (order.diff() < 0).float().mean() > 0.3  # long and short batches come in random order
