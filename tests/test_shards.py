"""Images inside .tar shards and Hugging Face datasets equal the same images in a folder; and JPEGs that are decoded at reduced scale."""

import gzip
import io
import os
import pickle
import shutil
import sys
import tarfile

import numpy as np
import pytest
import torch
from conftest import metrics, weights
from PIL import Image, ImageDraw

import dataset
from data import shards
from dataset import DataError, ImageDataset, eval_loader, make_dataset, train_loader
from harness.code_cache import cache_key
from harness.guard import Guard
from vqgan import VQVAE, VectorQuantizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/minvq"


def picture(number, size=(20, 16), kind="png", **options):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8)).save(file, kind, **options)
    return file.getvalue()


def write(path, members):
    """A shard of these members, {name: bytes}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def numbered(*names):
    """Images, and .cls with the numbers after the names: "a 3"."""
    pairs = [name.split() for name in names]
    return {f"{name}.png": picture(i) for i, (name, _) in enumerate(pairs)} | {f"{name}.cls": c.encode() for name, c in pairs}


def same(a, b):
    """Datasets of the same images, in the same order, with the same augmentation."""
    assert len(a) == len(b) and a.classes == b.classes
    for i in range(len(a)):
        (image, label), (other, other_label) = a[2, i], b[2, i]
        assert torch.equal(image, other) and label == other_label


# The same as in a folder


@pytest.mark.parametrize("parts, shard, pattern", [
    ({".": 30}, "{part}/{k}.tar", "{0..1}.tar"),  # a share is held out by the names of the images
    ({"train": 3, "val": 1}, "{part}/{k}.tar", "{train,val}/{0..1}.tar"),
    ({"train": 3, "val": 1}, "data/x-{part}-{k}.tar", "data/x-{train,val}-{0..1}.tar"),
])
def test_shards_equal_a_folder(tmp_path, parts, shard, pattern):
    for part, count in parts.items():
        for k, folder in enumerate("ab"):
            members = {f"{folder}/{i:02}.png": picture(i) for i in range(count)}
            write(tmp_path / "shards" / shard.format(part=part, k=k), {f"./{name}": data for name, data in members.items()})
            for name, data in members.items():
                path = tmp_path / "folder" / part / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
    for split in ("train", "val"):
        a, b, c = (make_dataset(name, str(tmp_path / root), split, 12, min_scale=0.5, val_fraction=0.3)
                   for name, root in (("folder", "folder"), ("webdataset", "shards"), ("webdataset", f"shards/{pattern}")))
        assert a.classes == ["a", "b"] and len(a) > 1
        same(a, b)
        same(a, c)


def test_any_number_of_workers_reads_the_same(tmp_path):
    write(tmp_path / "0.tar", {f"{i}.png": picture(i) for i in range(12)})
    write(tmp_path / "1.tar", {f"{i}.png": picture(i) for i in range(12, 24)})
    batches = [train_loader(make_dataset("webdataset", str(tmp_path), image_size=8), 4, num_workers=n) for n in (0, 2)]
    for _ in range(8):
        assert torch.equal(next(batches[0])[0], next(batches[1])[0])


@pytest.mark.parametrize("train, val, neither", [
    (["imagenet1k-train-0000.tar"], ["imagenet1k-validation-00.tar"], []),
    (["train/val-photos.tar"], ["Val/train.tar"], []),
    (["interval-0.tar", "0.tar"], ["x_val2017.tar"], []),
    (["x/train-00000-of-00001.parquet"], [], []),
    (["train.tar"], [], ["test.tar"]),
])
def test_split_of_names(train, val, neither):
    assert shards.by_split(train + val + neither) == (train, val)


def test_patterns(tmp_path):
    assert shards.expand("a-{008..011}.{x,yz}") == [f"a-{i}.{e}" for i in ("008", "009", "010", "011") for e in ("x", "yz")]
    write(tmp_path / "a-00.tar", {"x.png": picture(0), "y.png": picture(1)})
    data = make_dataset("webdataset", str(tmp_path / "a-{00..00}.tar"))
    assert data.source.name(0) == "a-00.tar/x.png"
    with pytest.raises(DataError, match="there is no shard .*a-01.tar; data.root must be") as error:
        make_dataset("webdataset", str(tmp_path / "a-{00..09}.tar"))
    assert "\n" not in str(error.value)


def test_classes_are_the_numbers_in_cls(tmp_path):
    write(tmp_path / "train-0.tar", numbered("a 3", "b 0") | {"b.json": b"{}", "b.mask.png": b"", "._c.png": b""})
    write(tmp_path / "train-1.tar", numbered("x/a 1\n"))
    write(tmp_path / "val-0.tar", numbered("a 3"))
    with pytest.warns(UserWarning, match="train-0.tar: 1 images, such as b.mask.png, are passed over"):
        train, val = (make_dataset("webdataset", str(tmp_path), split, 8) for split in ("train", "val"))
    assert train.classes == val.classes == ["0", "1", "3"]  # no training image is of 2
    assert [train[i][1] for i in range(3)] == [2, 0, 1] and val[0][1] == 2
    assert [train.source.name(i) for i in range(3)] == ["train-0.tar/a.png", "train-0.tar/b.png", "train-1.tar/x/a.png"]
    write(tmp_path / "val-1.tar", numbered("q 2"))
    with pytest.raises(DataError, match="val-1.tar/q.png is of class 2, which the training split does not have"):
        make_dataset("webdataset", str(tmp_path), "val", 8)


def test_links_in_a_shard(tmp_path):
    shard = write(tmp_path / "train.tar", numbered("d/a 1", "d/b 0"))
    with tarfile.open(shard, "a") as tar:
        for name, kind, target in (("d/c.png", tarfile.LNKTYPE, "d/a.png"),
                                   ("d/c.cls", tarfile.LNKTYPE, "d/a.cls"),
                                   ("d/lost.png", tarfile.LNKTYPE, "a.png"),
                                   ("d/soft.png", tarfile.SYMTYPE, "a.png"),
                                   ("folder.png", tarfile.DIRTYPE, "")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    sentence = "2 images, such as d/lost.png, are passed over: .* of links only hard ones"
    with pytest.warns(UserWarning, match=sentence):
        keys, offsets, sizes, numbers = shards.index_of(shard)
    assert keys == ["d/a.png", "d/b.png", "d/c.png"] and numbers == [1, 0, 1]
    assert offsets[2] == offsets[0] != offsets[1] and sizes[2] == sizes[0]


def test_links_to_shards(tmp_path):
    for part in ("train", "val"):
        write(tmp_path / f"root/{part}/0.tar", {f"{i}.png": picture(i) for i in range(2)})
    links = {"up": "..", "train/up": "..", "train/more": "../val", "val/1.tar": "../train/0.tar",
             "all": "/"}
    for link, target in links.items():
        (tmp_path / "root" / link).symlink_to(target)
    for split in ("train", "val"):
        data = make_dataset("webdataset", str(tmp_path / "root"), split)
        assert [data.source.name(i) for i in range(len(data))] == [f"{split}/0.tar/0.png",
                                                                   f"{split}/0.tar/1.png"]
    write(tmp_path / "again/train/0.tar", {f"{i}.png": picture(i) for i in range(2)})
    (tmp_path / "again/val").symlink_to("train")
    for root in ("again", "again/{train,val}/0.tar"):  # one of two images is held out
        root = str(tmp_path / root)
        data = [make_dataset("webdataset", root, split) for split in ("train", "val")]
        assert [len(part) for part in data] == [1, 1]
        assert data[0].source.name(0) != data[1].source.name(0)


@pytest.mark.parametrize("prefix, classes", [("", ["a", "b"]), ("./", ["a", "b"]), ("/", ["a", "b"]), ("/data/", ["data"])])
def test_classes_are_first_folders(tmp_path, prefix, classes):
    names = ("a/1.png", "a/2.png", "b/1.png", ".ipynb_checkpoints/1.png", "a/.hidden/2.png", "b/._1.png", "b/v1.0/x.png")
    write(tmp_path / "train-0.tar", {prefix + name: picture(0) for name in names})
    write(tmp_path / "val-0.tar", {prefix + "a/3.png": picture(1)})
    data = make_dataset("webdataset", str(tmp_path), image_size=8)
    assert data.classes == classes and len(data) == 4


# The index


def test_the_index_is_made_once(tmp_path, cache, monkeypatch):
    shard = write(tmp_path / "a.tar", {f"{i}.png": picture(i) for i in range(6)})
    first = make_dataset("webdataset", str(tmp_path), image_size=8, val_fraction=0)
    opened, open_ = [], tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *args, **more: opened.append(args[0]) or open_(*args, **more))
    same(first, make_dataset("webdataset", str(tmp_path), image_size=8, val_fraction=0))
    make_dataset("webdataset", str(tmp_path), "val")
    assert opened == [] and len(list(cache.iterdir())) == 1
    index, = cache.iterdir()
    for damage in (b"", index.read_bytes()[:-20], bytes(100)):
        index.write_bytes(damage)
        same(first, make_dataset("webdataset", str(tmp_path), image_size=8, val_fraction=0))
        assert opened.pop() == shard and list(cache.iterdir()) == [index]
    write(shard, {f"{i}.png": picture(i) for i in range(9)})
    assert len(make_dataset("webdataset", str(tmp_path), image_size=8, val_fraction=0)) == 8 and opened


def test_an_index_that_cannot_be_kept_is_a_warning(tmp_path, monkeypatch):
    write(tmp_path / "a.tar", {f"{i}.png": picture(i) for i in range(3)})
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    with pytest.warns(UserWarning, match="cannot be kept in /dev/null/minvq .*; set XDG_CACHE_HOME"):
        assert make_dataset("webdataset", str(tmp_path), image_size=8)[0][0].shape == (3, 8, 8)


def test_processes_that_start_together_do_not_disturb_each_other(tmp_path, cache, monkeypatch, recwarn):
    shard, replace, paths, others = write(tmp_path / "a.tar", {"a.png": b"", "b.png": b""}), os.replace, [], []

    def meanwhile(path, final):
        paths.append(path)
        if len(paths) == 1:
            others.append(shards.index_all([shard]))  # what another process does now
        replace(path, final)

    monkeypatch.setattr(os, "replace", meanwhile)
    assert [shards.index_all([shard])] == others and others[0][0][0] == ["a.png", "b.png"]
    assert len(set(paths)) == 2 and not recwarn.list
    left, = cache.iterdir()
    assert left.suffix == ".json" and left not in paths


# What is wrong is one sentence


@pytest.mark.parametrize("damage, told", [
    (lambda data, ends: data[:ends[1]], "a.tar is cut short or damaged after 2 images"),  # exactly between two members
    (lambda data, ends: data[:ends[1] + 100], "a.tar is cut short or damaged after 2 images"),  # in a header
    (lambda data, ends: data[:ends[2] - 600], "a.tar is cut short, damaged"),  # in a member
    (lambda data, ends: data[:ends[2]], "a.tar is cut short or damaged after 3 images"),  # nothing missing but the end
    (lambda data, ends: data[:ends[1]] + b"x" * 512 + data[ends[1] + 512:], "after 2 images"),
    (lambda data, ends: b"hello" * 1000, "no uncompressed .tar"),
    (lambda data, ends: data + data, "a.tar goes on after its end, as joined archives do"),
    (lambda data, ends: b"", "no uncompressed .tar"),
    (lambda data, ends: gzip.compress(data), "no uncompressed .tar"),
])
def test_damaged_shards(tmp_path, damage, told):
    shard = write(tmp_path / "a.tar", {f"{i}.png": picture(i) for i in range(3)})
    with tarfile.open(shard) as tar:
        ends = [m.offset_data + -(-m.size // 512) * 512 for m in tar]
    shard.write_bytes(damage(shard.read_bytes(), ends))
    with pytest.raises(DataError) as error:
        make_dataset("webdataset", str(tmp_path))
    assert told in str(error.value) and "make or download it again" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("members, told", [
    (numbered("a 1") | {"b.cls": b"1"}, "a.tar has b.cls but no image of that name; add the image"),
    (numbered("a 1", "b one"), "b.cls in .*a.tar must hold a whole number, the class; it holds 'one'"),
    (numbered("a 1", "b -1"), "it holds '-1'; -1 means no label, as in test splits: leave them out, or remove all .cls"),
    (numbered("a 1", "b 1000000", "c 1", "d 1000000"), "from 0 to below 1,000,000; they are from 1 to 1000000"),
    (numbered("a 1") | {"b.png": picture(1)}, "a.tar has no .cls for b.png, although other images have one"),
    ({"a.txt": b""}, "no images for training; data.root must be"),
])
def test_wrong_members(tmp_path, members, told):
    write(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=told) as error:
        make_dataset("webdataset", str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, members, told", [
    ("empty", None, "there is no .tar in .*empty"),
    ("val", numbered("a 0"), "all is for validation, such as val-0.tar/a"),
    ("dots", {"a.1.png": b"", "a.2.png": b""}, "2 images, such as a.1.png, are passed over.*names of one dot"),
])
def test_why_there_are_no_images(tmp_path, name, members, told):
    (tmp_path / name).mkdir()
    if members:
        write(tmp_path / name / f"{name}-0.tar", members)
    with pytest.raises(DataError, match=told):
        make_dataset("webdataset", str(tmp_path / name))


def test_an_unreadable_image_is_named(tmp_path):
    write(tmp_path / "train.tar", {"a.png": picture(0)})
    write(tmp_path / "val.tar", {"x/b.png": picture(1)[:50]})
    with pytest.raises(DataError, match=r"cannot read val.tar/x/b.png \("):
        make_dataset("webdataset", str(tmp_path), "val", 8)[0]


# Runs and code caches


def test_a_run_on_shards_that_dies_and_resumes_equals_a_whole_one(train, tmp_path, monkeypatch):
    for j in range(3):
        write(tmp_path / f"shards/train-{j}.tar", {f"{i}.png": picture(i) for i in range(7 * j, 7 * j + 7)})
    write(tmp_path / "shards/val-0.tar", {f"{i}.png": picture(i) for i in range(4)})
    words = ["data.name=webdataset", f"data.root={tmp_path}/shards/{{train-{{0..2}},val-0}}.tar", "data.min_scale=0.5",
             "train.max_train_steps=9", "train.use_ema=true"]
    train(*words, f"train.output_dir={tmp_path}/whole")
    end = Guard.end

    def die(self, step):
        if step == 8:  # two steps after a checkpoint, in the second epoch
            raise KeyboardInterrupt
        end(self, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Guard, "end", die)
        train(*words, f"train.output_dir={tmp_path}/parts", "train.dataloader_num_workers=2")
    train(*words, f"train.output_dir={tmp_path}/parts", resume="auto")
    whole, parts = weights(tmp_path / "whole", 9), weights(tmp_path / "parts", 9)
    assert len(whole) > 20 and [k for k in whole if not torch.equal(whole[k], parts[k])] == []
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def test_the_name_of_a_code_cache(tmp_path):
    """Another one for other images, also under the same names; not for other labels, nor for shards
    that moved."""
    model, data = VQVAE(ch=4, quantizer=VectorQuantizer(8, 4)), make_dataset("shapes", image_size=16)
    settings = {"name": "shapes", "root": None, "image_size": 16}
    settings |= {"image_column": None, "label_column": None}
    first = cache_key(model, data, settings, [0], 1, None, "no")
    assert cache_key(model, data, settings | {"label_column": "x"}, [0], 1, None, "no") == first
    assert cache_key(model, data, settings | {"image_column": "x"}, [0], 1, None, "no") != first
    write(tmp_path / "a/0.tar", numbered("a 0", "b 0", "c 0"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    write(tmp_path / "c/1.tar", numbered("a 0", "b 0", "c 0"))
    write(tmp_path / "d/0.tar", {f"{key}.png": picture(5 + i) + b"x" for i, key in enumerate("abc")})
    keys = [cache_key(model, make_dataset("webdataset", root), {"name": "webdataset", "root": root},
                      [0, 1], 1, None, "no")
            for root in (f"{tmp_path}/a", f"{tmp_path}/b", f"{tmp_path}/b/{{0..0}}.tar", f"{tmp_path}/c", f"{tmp_path}/d")]
    assert keys[0] == keys[1] == keys[2] != keys[3]
    assert keys[4] not in keys[:4]  # other images under the same names


# Hugging Face


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    found = pytest.importorskip("datasets")
    monkeypatch.setattr(found.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    found.disable_progress_bars()
    return found


def rows(datasets, files, labels):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    return datasets.Dataset.from_dict({"image": [{"bytes": f, "path": None} for f in files], "label": labels}, features)


def test_huggingface_equals_a_folder(datasets, tmp_path):
    files = [picture(i) for i in range(6)] + [picture(6, kind="tiff"), picture(7, kind="jpeg", exif=turned(6))]
    for part, chosen in (("train", range(8)), ("val", range(2, 4))):
        for i in chosen:
            path = tmp_path / "folder" / part / "ab"[i // 4] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[i])
    (tmp_path / "folder/val/b").mkdir()
    train, val = rows(datasets, files, [0] * 4 + [1] * 4), rows(datasets, files[2:4], [0, 0])
    datasets.DatasetDict(train=train, validation=val).save_to_disk(str(tmp_path / "disk"))
    (tmp_path / "parquet/data").mkdir(parents=True)
    for name, part in (("train-00000-of-00002", train.select(range(5))), ("train-00001-of-00002", train.select(range(5, 8))),
                       ("validation-00000-of-00001", val)):
        part.to_parquet(str(tmp_path / f"parquet/data/{name}.parquet"))
    for split in ("train", "val"):
        folder, disk, parquet = (make_dataset(name, str(tmp_path / root), split, 12, min_scale=0.5)
                                 for name, root in (("folder", "folder"), ("huggingface", "disk"), ("huggingface", "parquet")))
        same(folder, disk)
        same(folder, parquet)
        same(folder, pickle.loads(pickle.dumps(parquet)))  # for workers that are not forked
    batches = [train_loader(make_dataset("huggingface", str(tmp_path / "disk"), image_size=8), 4, num_workers=n) for n in (0, 2)]
    assert all(torch.equal(next(batches[0])[0], next(batches[1])[0]) for _ in range(4))


def test_huggingface_columns_and_splits(datasets, tmp_path, monkeypatch):
    images = {"photo": [{"bytes": picture(i), "path": None} for i in range(40)]}
    columns = {"word": ["x", "y"] * 20, "number": [0, 2] * 20, "hole": [None, 1] * 20, "below": [-1, 3] * 20}
    table = datasets.Dataset.from_dict(images | columns).cast_column("photo", datasets.Image()).with_format("numpy")
    table.save_to_disk(str(tmp_path / "disk"))
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_: pytest.fail("decoded by another library"))

    def make(split="train", **columns):
        return make_dataset("huggingface", str(tmp_path / "disk"), split, 8, val_fraction=0.3, **columns)

    train, val = make(), make("val")
    names = [data.source.name(i) for data in (train, val) for i in range(len(data))]
    assert len(set(names)) == 40 and 5 < len(val) < 20 and train.classes == ["image"]
    assert make(label_column="word").classes == ["x", "y"] and make(label_column="number").classes == ["0", "2"]
    data = make("val", label_column="number")
    assert [data[i][1] for i in range(len(data))] == [int(data.source.name(i).split()[1]) % 2 for i in range(len(data))]
    for columns, told in (({"image_column": "pixels"}, "no column 'pixels' in the train split; data.image_column must be one of photo, w"),
                          ({"label_column": "class"}, "no column 'class' in the train split; data.label_column must be one of photo, w"),
                          ({"image_column": "number"}, "the column 'number' holds no images"),
                          ({"label_column": "hole"}, "the column 'hole' must hold a number or a word for each image"),
                          ({"label_column": "below"}, "must be numbered from 0, .* from -1 to 3; -1 means no label; set data.label_column"),
                          ({"label_column": "photo"}, "the column 'photo' must hold a number")):
        with pytest.raises(DataError, match=told) as error:
            make(**columns)
        assert "\n" not in str(error.value)


def test_links_to_tables(datasets, tmp_path):
    table = rows(datasets, [picture(i) for i in range(4)], [0, 1, 0, 1])
    (tmp_path / "snapshot/data").mkdir(parents=True)
    table.to_parquet(str(tmp_path / "blob"))  # as the Hub's cache has it
    links = {"data/train-0.parquet": "../../blob", "data/up": "..", "validation": "data",
             "data/val-0.parquet": "../../blob"}
    for link, target in links.items():
        (tmp_path / "snapshot" / link).symlink_to(target)
    root = str(tmp_path / "snapshot")
    data = [make_dataset("huggingface", root, split, 8) for split in ("train", "val")]
    names = [part.source.name(i) for part in data for i in range(len(part))]
    assert len(names) == len(set(names)) == 4


def test_huggingface_labels_are_names(datasets, tmp_path):
    """In the order of the training split, and only those that it uses; -1 is no label."""
    def table(names, labels):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        images = [{"bytes": picture(i), "path": None} for i in range(len(labels))]
        return datasets.Dataset.from_dict({"image": images, "label": labels}, features)

    def labels(split):
        data = make_dataset("huggingface", str(tmp_path / "disk"), split, 8)
        assert data.classes == ["dog", "cat"]
        return [data[i][1] for i in range(len(data))]

    train = table(["eel", "dog", "cat"], [2, 1, 2, 1])
    datasets.DatasetDict(train=train, validation=table(["cat", "dog"], [0, 1, 1])).save_to_disk(str(tmp_path / "disk"))
    assert labels("train") == [1, 0, 1, 0] and labels("val") == [1, 0, 0]
    shutil.rmtree(tmp_path / "disk")
    datasets.DatasetDict(train=train, validation=table(["cat", "dog"], [-1, -1, -1])).save_to_disk(str(tmp_path / "disk"))
    with pytest.warns(UserWarning, match="'label' are from -1 to -1; -1 means no label; the images of the val split have no labels"):
        assert labels("val") == [-1] * 3
    shutil.rmtree(tmp_path / "disk")
    datasets.DatasetDict(train=train, validation=table(["cat", "eel"], [0, 1])).save_to_disk(str(tmp_path / "disk"))
    with pytest.raises(DataError, match="row 1 of the val split is of class 'eel', which the training split does not have"):
        labels("val")


def test_huggingface_without_the_library_and_broken_files(datasets, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/train.parquet").write_bytes(b"hello")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/state.json").write_text("{}")
    (tmp_path / "b/dataset_info.json").write_text("{}")
    datasets.Dataset.from_dict({"image": []}).save_to_disk(str(tmp_path / "c"))
    for folder in "abc":
        with pytest.raises(DataError, match=rf"{folder} cannot be read \(.*\); make or download it again"):
            make_dataset("huggingface", str(tmp_path / folder))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"is missing \(pip install datasets\)$"):
        make_dataset("huggingface", str(tmp_path / "a"))


# Reduced decoding


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def photo(size, **options):
    """Smooth shapes and some grain."""
    image = Image.effect_noise(size, 20).convert("RGB")
    draw = ImageDraw.Draw(image)
    for i in range(40):
        x, y, r = i * 97 % size[0], i * 61 % size[1], 20 + i * 13 % 60
        draw.ellipse((x - r, y - r, x + r, y + r), (i * 40 % 256, i * 90 % 256, i * 25 % 256))
    file = io.BytesIO()
    image.save(file, "jpeg", quality=95, subsampling=0, **options)
    return file.getvalue()


class One:
    """A source that is not in dataset.py."""

    labels, classes = [0], ["x"]

    def __init__(self, image):
        self.image = image

    def load(self, index):
        return self.image

    def name(self, index):
        return "one"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reduced_images_are_at_the_same_place(orientation):
    """Sides that no scale divides, whichever way they are turned."""
    file = photo((605, 491), exif=turned(orientation))
    data = ImageDataset(One(file), 48, train=True)
    reduced = data[3, 0][0]
    assert max(dataset.decode(file, data.least)[0].size) == 152  # a quarter
    data.least = 0
    assert 10 * torch.log10(4 / (reduced - data[3, 0][0]).square().mean()) > 42


@pytest.mark.parametrize("size, options, scale", [
    (25, {}, 8), (26, {}, 4), (100, {}, 2), (101, {}, 1), ([10, 50], {}, 4), (25, {"min_scale": 0.25}, 4),
    (25, {"min_scale": 0.25, "random_crop": False}, 8),
])
def test_training_alone_decodes_at_reduced_scale(tmp_path, monkeypatch, size, options, scale):
    for split in ("train", "val"):
        write(tmp_path / f"tar/{split}.tar", {"a.jpg": photo((560, 400))})
        (tmp_path / "folder" / split).mkdir(parents=True)
        (tmp_path / "folder" / split / "a.jpg").write_bytes(photo((560, 400)))
    decoded, decode = [], dataset.decode

    def watched(file, least):
        image, place = decode(file, least)
        decoded.append(image.size)
        return image, place

    monkeypatch.setattr(dataset, "decode", watched)
    for name, root in (("folder", "folder"), ("webdataset", "tar")):
        for split in ("train", "val"):
            data = make_dataset(name, str(tmp_path / root), split, size, **options)
            next(iter(eval_loader(data, 1, num_workers=0)))
            data[0]
    assert decoded == [(560, 400), (560 // scale, 400 // scale), (560, 400), (560, 400)] * 2


def test_sources_may_return_images():
    assert (ImageDataset(One(Image.new("RGB", (300, 300), (255, 0, 0))), 16, train=True)[0][0][0] == 1).all()
