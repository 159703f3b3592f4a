import io
import os
import pickle
import struct
import warnings
import zlib
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from data import sources
from data.images import read_image
from data.shapes import draw_shapes
from dataset import (
    DataError,
    TrainBatches,
    eval_loader,
    make_dataset,
    to_float,
    to_uint8,
    train_loader,
)


def save(path, size=(20, 16), colour=None, **options):
    """A photo-like file; `colour` for a plain one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    pixels = np.full((size[1], size[0], 3), colour, np.uint8) if colour else rng.integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def test_float_and_uint8():
    x = torch.arange(256, dtype=torch.uint8)
    assert to_float(x).min() == -1 and to_float(x).max() == 1
    assert torch.equal(to_uint8(to_float(x)), x)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


# Layouts


def test_imagenet(tmp_path):
    for split in ("train", "val"):
        for synset in ("n02", "n01"):
            save(tmp_path / split / synset / "a.JPEG")
    (tmp_path / "synset_human.txt").write_text("n01 tench, Tinca tinca\nn02 goldfish\n")
    data = make_dataset("imagenet", str(tmp_path), image_size=8)
    assert data.classes == ["tench, Tinca tinca", "goldfish"]
    assert [label for _, label in (data[i] for i in range(2))] == [0, 1]
    image, _ = data[0]
    assert image.shape == (3, 8, 8) and image.dtype == torch.float32 and image.min() >= -1 and image.max() <= 1
    assert len(make_dataset("imagenet", str(tmp_path), "val")) == 2


def test_imagenet_folders_named_by_index(tmp_path):
    for split in ("train", "val"):
        save(tmp_path / split / "0" / "a.JPEG")
    (tmp_path / "imagenet_idx_to_synset.yml").write_text("0: n01\n1: n02\n")
    assert make_dataset("imagenet", str(tmp_path)).classes == ["n01"]
    (tmp_path / "synset_human.txt").write_text("n01 tench\n")
    assert make_dataset("imagenet", str(tmp_path)).classes == ["tench"]


def test_imagenet_has_two_cranes(tmp_path):
    for synset in ("n01", "n02", "n03"):
        for split in ("train", "val"):
            save(tmp_path / split / synset / "a.JPEG")
    (tmp_path / "synset_human.txt").write_text("n01 crane\nn02 goldfish\nn03 crane\n")
    assert make_dataset("imagenet", str(tmp_path)).classes == ["crane (n01)", "goldfish", "crane (n03)"]


def test_ffhq(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        save(tmp_path / "ffhq" / "00000" / f"0000{i}.png")
    root = str(tmp_path / "ffhq")
    assert len(make_dataset("ffhq", root)) == 4
    with pytest.raises(DataError, match="no images for the val split"):
        make_dataset("ffhq", root, "val")
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets/ffhqtrain.txt").write_text("00002.png\n00000.png\n00001.png\n")
    with pytest.raises(DataError, match="no ffhqvalidation.txt beside it"):
        make_dataset("ffhq", root, "val")
    (tmp_path / "assets/ffhqvalidation.txt").write_text("00003.png\n00009.png\n")
    assert [make_dataset("ffhq", root).source.name(i)[-9:] for i in range(3)] == ["00002.png", "00000.png", "00001.png"]
    with pytest.raises(DataError, match="lists 00009.png"):
        make_dataset("ffhq", root, "val")


def test_celeba(tmp_path):
    pixels = np.zeros((218, 178, 3), np.uint8)
    pixels[57:185, 25:153] = 255  # the crop: 128 x 128 around x 89, y 121
    (tmp_path / "img_align_celeba").mkdir()
    for i in range(3):
        Image.fromarray(pixels).save(tmp_path / "img_align_celeba" / f"{i}.png")
    with pytest.raises(DataError, match="list_eval_partition.txt"):
        make_dataset("celeba", str(tmp_path))
    (tmp_path / "list_eval_partition.txt").write_text("0.png 0\n1.png 1\n2.png 2\n")
    data = make_dataset("celeba", str(tmp_path), image_size=64)
    assert len(data) == 1 and (data[0][0] == 1).all()
    assert make_dataset("celeba", str(tmp_path), "val").source.name(0).endswith("1.png")
    (tmp_path / "list_eval_partition.txt").unlink()
    rows = "image_id,partition\n0.png,0\n1.png,1\n2.png,2\n"  # as Kaggle has it, and the images
    (tmp_path / "list_eval_partition.csv").write_text(rows)
    (tmp_path / "img_align_celeba").rename(tmp_path / "inner")
    (tmp_path / "img_align_celeba").mkdir()
    (tmp_path / "inner").rename(tmp_path / "img_align_celeba/img_align_celeba")
    data = make_dataset("celeba", str(tmp_path), image_size=64)
    assert len(data) == 1 and (data[0][0] == 1).all()
    assert make_dataset("celeba", str(tmp_path), "val").source.name(0).endswith("1.png")
    (tmp_path / "list_eval_partition.csv").write_text(rows + '"9.png","0"\n')
    with pytest.raises(DataError, match="list_eval_partition.csv lists 9.png .* not there"):
        make_dataset("celeba", str(tmp_path))


def test_cifar10(tmp_path):
    with pytest.raises(DataError, match="CIFAR-10"):
        make_dataset("cifar10", str(tmp_path))
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": np.full((2, 3072), 255, np.uint8), "labels": [3, 1]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    with pytest.MonkeyPatch.context() as patch:  # these files are not the published ones
        patch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
        data = make_dataset("cifar10", str(tmp_path), image_size=32)
    assert len(data) == 10 and data[0][1] == 3 and (data[0][0] == 1).all() and data.classes == list("abcdefghij")


def test_folder_with_splits_and_classes(tmp_path):
    for path in ("train/cat/1.png", "train/dog/x/2.png", "val/dog/3.png"):
        save(tmp_path / path)
    train, val = (make_dataset("folder", str(tmp_path), split, 8) for split in ("train", "val"))
    assert train.classes == ["cat", "dog"] and [train[i][1] for i in range(2)] == [0, 1]
    assert val.classes == ["cat", "dog"] and val[0][1] == 1  # the training split's classes
    save(tmp_path / "val/bird/4.png")
    with pytest.raises(DataError, match="'bird', which the training split does not have"):
        make_dataset("folder", str(tmp_path), "val", 8)


@pytest.mark.parametrize("name", ["imagenet", "folder"])
def test_folders_without_images_are_no_classes(tmp_path, name):
    for path in ("train/bee/1.png", "train/cat/2.png", "val/cat/3.png", "train/.ipynb_checkpoints/4.png"):
        save(tmp_path / path)
    for folder in ("train/ant", "train/__MACOSX", "val/.hidden", "val/dog"):
        (tmp_path / folder).mkdir()
    for split, labels in (("train", [0, 1]), ("val", [1])):
        data = make_dataset(name, str(tmp_path), split, 8)
        assert data.classes == ["bee", "cat"] and [data.label(i) for i in range(len(data))] == labels


def test_flat_validation_images_have_no_class(tmp_path):
    for path in ("train/bee/1.png", "train/cat/2.png", "val/3.png"):
        save(tmp_path / path)
    data = make_dataset("folder", str(tmp_path), "val", 8)
    assert data.classes == ["bee", "cat"] and data[0][1] == -1
    sentence = ("val/3.png is of no class that training images have, so sort it into one or "
                "add images of its class; .* bee, cat$")
    with pytest.raises(DataError, match=sentence):
        data.set_classes(["bee", "cat"])
    with pytest.raises(DataError, match="the images in .*val are not sorted into class folders"):
        make_dataset("imagenet", str(tmp_path), "val", 8)
    (tmp_path / "train/4.png").write_bytes((tmp_path / "val/3.png").read_bytes())  # now training has no classes either
    (tmp_path / "val/3.png").rename(save(tmp_path / "val/dog/3.png"))
    data = make_dataset("folder", str(tmp_path), "val", 8)
    assert data.classes == ["image"] and data[0][1] == 0


def test_classes_that_are_held_out_whole_are_no_classes(tmp_path):
    for i in range(40):
        save(tmp_path / f"{i}/x.png", size=(2, 2))
    train, val = (make_dataset("folder", str(tmp_path), split, 8, val_fraction=0.3) for split in ("train", "val"))
    assert len(train.classes) == len(train) < 40 and val.classes == train.classes
    assert {val.label(i) for i in range(len(val))} == {-1}  # as stage 1 may have it
    with pytest.raises(DataError, match="is of no class that training images have"):
        val.set_classes(train.classes)


def test_labels_are_those_of_a_run_by_name(tmp_path):
    for path in ("train/bee/1.png", "train/cat/2.png", "val/cat/3.png"):
        save(tmp_path / path)
    train, val = (make_dataset("folder", str(tmp_path), split, 8) for split in ("train", "val"))
    for data, labels in ((train, [1, 2]), (val, [2])):
        data.set_classes(["ant", "bee", "cat"])
        assert [data[i][1] for i in range(len(data))] == labels and data.classes == ["ant", "bee", "cat"]
        assert torch.cat([labels for _, labels in eval_loader(data, 1, num_workers=0)]).tolist() == labels
    val.set_classes(["cat", "dog"])  # no image of this split is a bee
    assert val[0][1] == 0
    with pytest.raises(DataError, match="1.png is of class 'bee', which the run does not know; the 2 classes are, .*, cat, dog$"):
        train.set_classes(["cat", "dog"])
    save(tmp_path / "flat/1.png")
    with pytest.raises(DataError, match="the run is class-conditional, and this data has no classes"):
        make_dataset("folder", str(tmp_path / "flat"), "val", 8).set_classes(["cat", "dog"])


def test_folder_holds_out_a_stable_share(tmp_path):
    for i in range(200):
        save(tmp_path / f"{i}.png", size=(2, 2))
    names = {}
    for split in ("train", "val"):
        data = make_dataset("folder", str(tmp_path), split, val_fraction=0.2)
        names[split] = {data.source.name(i) for i in range(len(data))}
    assert len(names["train"] | names["val"]) == 200 and not names["train"] & names["val"]
    assert 20 <= len(names["val"]) <= 60
    for i in range(0, 200, 2):  # what is left stays where it was
        (tmp_path / f"{i}.png").unlink()
    val = make_dataset("folder", str(tmp_path), "val", val_fraction=0.2)
    assert {val.source.name(i) for i in range(len(val))} <= names["val"]
    assert make_dataset("folder", str(tmp_path))[0][1] == 0
    for path in sorted(tmp_path.iterdir())[2:]:  # two images: one for each
        path.unlink()
    assert [len(make_dataset("folder", str(tmp_path), s, val_fraction=0.01)) for s in ("train", "val")] == [1, 1]


@pytest.mark.parametrize("root", [None, "nowhere", "."])
@pytest.mark.parametrize("name", ["imagenet", "ffhq", "celeba", "cifar10", "folder", "webdataset", "huggingface"])
def test_wrong_roots_are_one_sentence(name, root, tmp_path):
    with pytest.raises(DataError) as error:
        make_dataset(name, root and str(tmp_path / root))
    assert "data.root" in str(error.value) and "\n" not in str(error.value)
    assert root is None or sources.SOURCES[name][1] in str(error.value)


# Finding files


def names(data):
    return [data.source.name(i) for i in range(len(data))]


def listed(root, *splits):
    """The relative names of the images in these splits (both)."""
    return [os.path.relpath(name, root) for split in splits or ("train", "val")
            for name in names(make_dataset("folder", str(root), split))]


def test_the_order_of_images(tmp_path):
    """By name: a folder's files, those of its sub-folders, the next folder."""
    for name in ("dog/x/3.png", "dog-big/5.png", "dog/1.png", "dog/x/a/4.png", "dog/z.png", "b.png",
                 "dog-big/y/6.png"):
        save(tmp_path / name)
    paths, = sources.list_images(tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in paths] == [
        "b.png", "dog/1.png", "dog/z.png", "dog/x/3.png", "dog/x/a/4.png", "dog-big/5.png",
        "dog-big/y/6.png"]


@pytest.mark.parametrize("links", [
    {"b/up": ".."}, {"b/up": "..", "z/up": "..", "z/here": "."},  # loops
    {"b/out": "../..", "top": "/"},  # folders around the root
    {"a": "b"}, {"b/more": "../z"}, {"a": "z", "c": "z"},  # folders that are there
    {"a.png": "b/0.png", "b/2.png": "../z/0.png"},  # files that are there
])
def test_links_to_what_is_there_add_nothing(tmp_path, links):
    for name in ("root/b/0.png", "root/b/1.png", "root/z/0.png", "elsewhere/0.png"):
        save(tmp_path / name)
    for link, target in links.items():
        (tmp_path / "root" / link).symlink_to(target)
    assert sorted(listed(tmp_path / "root")) == ["b/0.png", "b/1.png", "z/0.png"]


def test_links_lead_to_other_places_once(tmp_path):
    for name in ("root/b/0.png", "store/x/1.png", "store/2.png", "store/blob"):
        save(tmp_path / name, format="PNG")
    save(tmp_path / "store/3.png")
    links = {"c": "store/x", "d": "store", "b/e.png": "store/2.png", "f.png": "store/blob"}
    for link, target in links.items():
        (tmp_path / "root" / link).symlink_to(tmp_path / target)
    with pytest.warns(UserWarning, match="1 files in .*, such as d/blob"):  # but f.png, by its name
        images = listed(tmp_path / "root")
    assert sorted(images) == ["b/0.png", "b/e.png", "c/1.png", "d/3.png", "f.png"]


@pytest.mark.parametrize("links", [
    {"val": "train"}, {"val/a/x": "../../train/b"}, {"train/a/x": "../../val"}, {"val": "/store"},
    {"train/a/x.png": "../../val/a/1.png"}, {"train/a/x": "/store", "val/a/x": "/store"},
    {"train/a/x.png": "/store/a/9.png", "val/a/x.png": "/store/a/9.png"},
])
@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_no_image_is_in_both_splits(tmp_path, name, links):
    save(tmp_path / "store/a/9.png")
    for path in ("train/a/0.png", "train/b/0.png", "val/a/1.png"):
        if path.partition("/")[0] not in links:
            save(tmp_path / "root" / path)
    for link, target in links.items():
        target = f"{tmp_path}{target}" if target[0] == "/" else target
        (tmp_path / "root" / link).symlink_to(target)
    places = []
    for split in ("train", "val"):
        try:
            images = names(make_dataset(name, str(tmp_path / "root"), split))
        except DataError as error:
            assert "no images for the" in str(error)
            images = []
        places.append({os.path.realpath(image) for image in images})
    assert places[1] and not places[0] & places[1]


def test_a_link_to_val_among_the_images(tmp_path):
    for path in ("a/0.png", "val/a/1.png"):
        save(tmp_path / path)
    (tmp_path / "a/link").symlink_to("../val")
    assert listed(tmp_path, "train") == ["a/0.png"] and listed(tmp_path, "val") == ["val/a/1.png"]


@pytest.mark.parametrize("train, val", [("training", "validation"), ("Train", "Val"),
                                        ("TRAINING", "valid"), ("train", "Validation")])
@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_splits_by_other_names(tmp_path, name, train, val):
    for path in (f"{train}/a/0.png", f"{train}/train_station/1.png", f"{val}/train_station/2.png"):
        save(tmp_path / path)
    a, b = (make_dataset(name, str(tmp_path), split) for split in ("train", "val"))
    assert a.classes == b.classes == ["a", "train_station"]
    assert (a.source.labels, b.source.labels) == ([0, 1], [1])
    (tmp_path / "validating").mkdir()
    (tmp_path / "val.txt").write_text("")
    assert len(make_dataset(name, str(tmp_path), "val")) == 1
    (tmp_path / "valid").mkdir(exist_ok=True)
    (tmp_path / "VAL").mkdir(exist_ok=True)
    with pytest.raises(DataError, match="are for the same split; rename one of them"):
        make_dataset(name, str(tmp_path))


def test_classes_are_no_splits(tmp_path):
    for name in ("train_station", "valley", "trainers", "validated"):
        for i in range(4):
            save(tmp_path / name / f"{i}.png")
    assert len(listed(tmp_path)) == 16
    classes = make_dataset("folder", str(tmp_path)).classes
    assert classes == ["train_station", "trainers", "validated", "valley"]


def test_all_that_pillow_reads_is_an_image(tmp_path):
    kinds = {"jfif": "JPEG", "JPE": "JPEG", "pgm": "PPM", "pnm": "PPM", "tga": "TGA", "PNG": "PNG",
             "mpo": "MPO", "dds": "DDS", "pcx": "PCX", "ico": "ICO", "avif": "AVIF",
             "jp2": "JPEG2000", "webp": "WEBP", "qoi": "QOI"}
    Image.init()
    kinds = {extension: kind for extension, kind in kinds.items() if kind in Image.SAVE}
    for ext, kind in kinds.items():
        save(tmp_path / f"x.{ext}", size=(16, 16), format=kind)
    for name in ("x.txt", "x.json", "list.CSV", ".hidden.png", ".folder/y.png", "__MACOSX/y.png"):
        save(tmp_path / name, format="PNG")  # which often lie there, and are not told of
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(listed(tmp_path)) == len(kinds)
    for name in ("a/b.heic", "noextension", "x.pdf", "x.npy", "x.h5"):
        save(tmp_path / name, format="PNG")
    sentence = "5 files in .* no images that Pillow reads, and are passed over, such as a/b.heic"
    with pytest.warns(UserWarning, match=sentence) as told:
        assert len(listed(tmp_path, "train")) > 1
    assert len(told) == 1


@pytest.mark.parametrize("name", ["imagenet", "ffhq", "folder", "webdataset", "huggingface"])
def test_a_folder_that_may_not_be_read_is_one_sentence(tmp_path, monkeypatch, name):
    for path in ("train/locked/0.png", "train/b/0.png", "val/b/0.png"):
        save(tmp_path / path)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    if name == "huggingface":
        pytest.importorskip("datasets")
    sentence = "Permission denied: '.*train/locked'; make all of data.root readable"
    with pytest.raises(DataError, match=sentence) as error:
        make_dataset(name, str(tmp_path))
    assert "\n" not in str(error.value)


# Reading


def test_every_kind_of_image_is_read_right(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "grey.png")), grey[..., None].repeat(3, 2))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "deep.png")), grey[..., None].repeat(3, 2))
    Image.fromarray(np.zeros((4, 4, 4), np.uint8), "CMYK").save(tmp_path / "cmyk.jpg")
    assert np.asarray(read_image(tmp_path / "cmyk.jpg")).min() > 250  # no ink: white
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(read_image(tmp_path / "clear.png")).min() == 255
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 255])
    palette.save(tmp_path / "palette.gif", transparency=0)
    assert np.asarray(read_image(tmp_path / "palette.gif")).min() == 255
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to see it upright
    save(tmp_path / "turned.jpg", size=(30, 10), exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (10, 30)


def exif_block(*entries):
    """EXIF of these (tag, type, count, four bytes)."""
    fields = b"".join(struct.pack(">HHI4s", *entry) for entry in sorted(entries))
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + fields + bytes(4)


UPRIGHT_BY_6 = (0x0112, 3, 1, struct.pack(">HH", 6, 0))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 10))
def test_images_are_turned_upright(tmp_path, kind, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    options = {"lossless": True} if kind == "WEBP" else {}
    save(tmp_path / "x", size=(30, 10), format=kind, exif=exif, **options)
    with Image.open(tmp_path / "x") as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    assert np.array_equal(np.asarray(read_image(tmp_path / "x")), np.asarray(upright))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("block, size", [
    (b"Exif\0\0", (30, 10)), (b"Exif\0\0junkjunkjunk", (30, 10)),
    (exif_block(UPRIGHT_BY_6)[:17], (30, 10)), (exif_block(UPRIGHT_BY_6)[:22], (30, 10)),
    (exif_block((0x0112, 2, 4, b"abc\0")), (30, 10)),
    (exif_block(UPRIGHT_BY_6, (0xA005, 2, 4, b"abc\0")), (10, 30)),  # can be read, but not written
])
def test_broken_exif_is_no_broken_image(tmp_path, kind, block, size):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow has no {kind}")
    try:
        save(tmp_path / "x", size=(30, 10), colour=99, format=kind, exif=block)
    except Exception:
        pytest.skip(f"Pillow does not write this block into {kind}")
    image = read_image(tmp_path / "x")
    assert image.size == size and abs(np.asarray(image).astype(int) - 99).max() <= 3


def png(depth, colour, row, *chunks, after=()):
    """A PNG of 8 x 8 pixels with equal rows, and chunks before and after its pixels."""
    def chunk(name, data):
        check = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)
    head = struct.pack(">IIBBBBB", 8, 8, depth, colour, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * 8)
    chunks = [(b"IHDR", head), *chunks, (b"IDAT", pixels), *after, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks)


LONG = zlib.compress(bytes(3_000_000))


@pytest.mark.parametrize("name, data", [
    (b"zTXt", b"key\0\0" + LONG), (b"iTXt", b"key\0\1\0\0\0" + LONG), (b"iCCP", b"key\0\0" + LONG),
    (b"iCCP", b"key\0\0junk"), (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<tiff:Orientation=\"x\""),
    (b"tEXt", b"Raw profile type exif\0\nexif\n  10\nzzzz"),
], ids=["zTXt", "iTXt", "iCCP", "junk", "XMP", "EXIF"])
def test_long_texts_and_broken_profiles(tmp_path, name, data):
    before = png(8, 0, bytes([90] * 8), (name, data))
    after = png(8, 0, bytes([90] * 8), after=[(name, data)])
    for file in (before, after):
        (tmp_path / "x.png").write_bytes(file)
        assert np.asarray(read_image(tmp_path / "x.png")).tolist() == [[[90] * 3] * 8] * 8


def plain(value, kind, dtype):
    """A file of 8 x 8 pixels of this number."""
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), value, dtype)).save(file, kind)
    return file.getvalue()


def tiff(bits, pixels, samples=1, extra=(), sample_format=1):
    """An uncompressed TIFF of 8 x 8 pixels."""
    bits_field = bits if samples == 1 else bits | bits << 16
    tags = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, samples, bits_field), (259, 3, 1, 1),
            (262, 3, 1, 1), (273, 4, 1, 0), (277, 3, 1, samples), (278, 3, 1, 8),
            (279, 4, 1, len(pixels)), *extra, (339, 3, 1, sample_format)]
    tags[5] = (273, 4, 1, 8 + 2 + 12 * len(tags) + 4)
    fields = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + fields + bytes(4) + pixels


@pytest.mark.parametrize("file, grey", [
    # 16 bits, whatever holds them: the high ones
    (plain(40000, "PNG", "u2"), 156), (plain(40000, "TIFF", "u2"), 156),
    (plain(40000, "TIFF", ">u2"), 156),
    (b"P5 8 8 65535 " + struct.pack(">H", 40000) * 64, 156),
    (b"P5 8 8 4095 " + struct.pack(">H", 2048) * 64, 128), (b"P2 8 8 1023 " + b"512 " * 64, 128),
    (plain(90, "PNG", "u2"), 0),  # as dark as it says
    (tiff(12, bytes([0x80, 0x08, 0x00]) * 32), 128),  # 12 bits
    # floats from 0 to 1
    (plain(.8, "TIFF", "f4"), 204), (plain(.8, "PPM", "f4"), 204), (plain(1, "TIFF", "f4"), 255),
    (plain(0, "TIFF", "f4"), 0),
    # no agreed white
    (plain(200, "TIFF", "f4"), None), (plain(-.1, "TIFF", "f4"), None),
    (plain(np.nan, "TIFF", "f4"), None), (plain(200, "TIFF", "i4"), None),
    (plain(40000, "TIFF", "i4"), None),
    (tiff(16, struct.pack("<h", 300) * 64, sample_format=2), None),
    # transparent, and another grey that is not
    (png(16, 0, struct.pack(">8H", *[700] * 8), (b"tRNS", struct.pack(">H", 700))), 255),
    (png(16, 0, struct.pack(">8H", *[40000] * 8), (b"tRNS", struct.pack(">H", 40001))), 156),
    (tiff(8, bytes([50, 128]) * 64, samples=2, extra=[(338, 3, 1, 1)]), 177),  # premultiplied
    (tiff(8, bytes([100, 0]) * 64, samples=2, extra=[(338, 3, 1, 2)]), 255),
])
def test_how_bright_grey_images_are(tmp_path, file, grey):
    (tmp_path / "x").write_bytes(file)
    if grey is None:
        with pytest.raises(ValueError, match="not of 8 or 16 bits or floats from 0 to 1; conv"):
            read_image(tmp_path / "x")
    else:
        assert np.abs(np.asarray(read_image(tmp_path / "x")).astype(int) - grey).max() <= 1


def test_a_number_without_a_white_is_named(tmp_path):
    save(tmp_path / "train/a.png")
    (tmp_path / "val").mkdir()
    (tmp_path / "val/b.tif").write_bytes(plain(200, "TIFF", "i4"))
    with pytest.raises(DataError, match="b.tif .*not of 8 or 16 bits") as error:
        make_dataset("folder", str(tmp_path), "val")[0]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_white_is_white_in_every_mode(tmp_path, mode):
    image = Image.new("RGB", (8, 8), (255, 255, 255))
    image = image.convert("RGBA" if mode in ("LA", "PA", "RGBA") else "RGB").convert(mode)
    image.save(tmp_path / "x.tif")
    assert np.asarray(read_image(tmp_path / "x.tif")).min() >= 250


@pytest.mark.parametrize("size", [(1, 1), (3000, 10), (64, 64), (65, 90)])
def test_any_shape_becomes_a_square(size, tmp_path):
    save(tmp_path / "train" / "x.png", size=size)
    (tmp_path / "val").mkdir()
    for random_crop in (True, False):
        data = make_dataset("folder", str(tmp_path), "train", 32, random_crop=random_crop, min_scale=0.75)
        assert data[(3, 0)][0].shape == (3, 32, 32)


def test_centre_crop_equals_resize_then_crop(tmp_path):
    path = save(tmp_path / "val" / "x.png", size=(96, 64))
    save(tmp_path / "train" / "x.png")
    ours = make_dataset("folder", str(tmp_path), "val", 32, uint8=True)[0][0]
    resized = Image.open(path).resize((48, 32), Image.Resampling.BICUBIC).crop((8, 0, 40, 32))
    assert (ours.permute(1, 2, 0).numpy().astype(int) - np.asarray(resized)).__abs__().max() <= 1


def test_augmentation_follows_from_seed_epoch_and_index(tmp_path):
    for i in range(3):
        save(tmp_path / "train" / f"{i}.png", size=(40, 20))
    a, b, c = (make_dataset("folder", str(tmp_path), "train", 16, seed=s) for s in (0, 0, 1))
    assert torch.equal(a[(2, 1)][0], b[(2, 1)][0])
    assert not torch.equal(a[(2, 1)][0], a[(3, 1)][0]) and not torch.equal(a[(2, 1)][0], c[(2, 1)][0])
    flips = [make_dataset("folder", str(tmp_path), "train", 20, random_crop=False, seed=s)[0][0] for s in range(20)]
    assert len({f.numpy().tobytes() for f in flips}) == 2  # as it is, and mirrored


# Unreadable images


def broken_tree(tmp_path, good, bad):
    for i in range(good):
        save(tmp_path / "train" / f"{i:03}.png", size=(8, 8))
    for i in range(bad):
        (tmp_path / "train" / f"050x{i}.png").write_bytes(b"not an image")
    (tmp_path / "val").mkdir()
    return make_dataset("folder", str(tmp_path), image_size=8)


def test_unreadable_images_are_replaced_and_told_once(tmp_path):
    data = broken_tree(tmp_path, good=199, bad=1)
    bad = next(i for i in range(200) if "x0" in data.source.name(i))
    with pytest.warns(UserWarning, match="050x0.png") as told:
        first, second = data[bad], data[bad]
    assert len(told) == 1 and torch.equal(first[0], second[0])
    assert data[(0, bad)][1] == 0


def test_workers_share_what_is_unreadable(tmp_path):
    data = broken_tree(tmp_path, good=149, bad=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = train_loader(data, 50, num_workers=1)
        [next(loader) for _ in range(4)]
    assert data.unreadable.sum() == 1  # found in the worker, seen here


def test_above_one_percent_training_stops(tmp_path):
    data = broken_tree(tmp_path, good=150, bad=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError) as error:
            [data[i] for i in range(len(data))]
        assert "1 more of 152" in str(error.value) and "\n" not in str(error.value)
        with pytest.raises(DataError) as error:  # through a worker process as well
            loader = train_loader(make_dataset("folder", str(tmp_path), image_size=8), 19, num_workers=1)
            [next(loader) for _ in range(16)]
        assert str(error.value).startswith("cannot read ") and "\n" not in str(error.value)


def test_evaluation_stops_at_an_unreadable_image(tmp_path):
    save(tmp_path / "train" / "a.png")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "b.png").write_bytes(b"")
    with pytest.raises(DataError, match="b.png"):
        make_dataset("folder", str(tmp_path), "val")[0]


# Loaders


def test_epochs_are_permutations_shared_out_without_overlap():
    n, batch, world = 23, 3, 2
    epochs = []
    parts = [iter(TrainBatches(n, batch, seed=5, rank=r, world=world)) for r in range(world)]
    single = iter(TrainBatches(n, batch * world, seed=5))
    for _ in range(2 * (n // (batch * world))):
        shares = [next(p) for p in parts]
        assert sum(shares, []) == next(single)  # two processes take what one would take at once
        epochs.append(sum(shares, []))
    first = [i for b in epochs[:3] for e, i in b if e == 0]
    assert len(set(first)) == len(first) == 18 and all(e == 1 for b in epochs[3:] for e, _ in b)


def test_resumed_order_is_the_same():
    whole = iter(TrainBatches(23, 4, seed=1))
    order = [next(whole) for _ in range(20)]
    rest = iter(TrainBatches(23, 4, seed=1, start=13))
    assert [next(rest) for _ in range(7)] == order[13:]


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders(workers):
    data, val = (make_dataset("shapes", split=s, image_size=16, train_size=20, val_size=7) for s in ("train", "val"))
    images, labels = next(train_loader(data, 4, num_workers=workers))
    assert images.shape == (4, 3, 16, 16) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert images.min() >= -1 and images.max() <= 1
    shares = [torch.cat([x for x, _ in eval_loader(val, 2, num_workers=workers, rank=r, world=3)]) for r in range(3)]
    assert [len(s) for s in shares] == [3, 2, 2]  # each image once
    assert sum(len(x) for x, _ in eval_loader(val, 2, limit=5, num_workers=0)) == 5


# Shapes


def test_shapes_are_deterministic_and_labelled():
    a, b = make_dataset("shapes", image_size=32, seed=1), make_dataset("shapes", image_size=32, seed=1)
    assert all(torch.equal(a[i][0], b[i][0]) and a[i][1] == b[i][1] for i in range(20))
    assert a.source.labels[3] == a[3][1] == draw_shapes(1, 3, 32)[1]
    assert not torch.equal(a[0][0], make_dataset("shapes", image_size=32, seed=2)[0][0])
    assert not torch.equal(a[0][0], make_dataset("shapes", split="val", image_size=32, seed=1)[0][0])
    assert len(a.classes) == 10 and {a[i][1] for i in range(200)} == set(range(10))


@pytest.mark.parametrize("size", [32, 64, 128])
def test_shapes_have_15_to_60_percent_detail_where_they_say(size):
    for i in range(100):
        image, _, detail = draw_shapes(0, i, size)
        assert 0.15 <= detail.float().mean() <= 0.60
        gray = image.float().mean(0)
        change = (gray[1:, 1:] - gray[:-1, 1:]).abs() + (gray[1:, 1:] - gray[1:, :-1]).abs()
        inside = detail[1:, 1:] & detail[:-1, :-1]
        outside = ~(detail[1:, 1:] | detail[:-1, :-1])
        assert change[inside].mean() > 3 * change[outside].mean()  # textured against smooth


def test_every_source_can_be_named_in_a_config():
    names = get_args(get_type_hints(make_dataset)["name"])
    assert set(names) == {*sources.SOURCES, "shapes"}


# Bad and strange images in a dataset


def bomb():
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "png")
    return file.getvalue()


def noise_png():
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "png")
    return file.getvalue()


PNG = noise_png()
BAD = {
    "empty": lambda: b"", "no image": lambda: b"hello",
    "cut": lambda: noise_png()[:1000], "bomb": bomb, "header alone": lambda: noise_png()[:33],
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_images_are_told_in_training_and_end_an_evaluation(tmp_path, kind):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for i in range(100):
            (tmp_path / split / f"{i:02}.png").write_bytes(BAD[kind]() if i == 50 else PNG)
    data, val = (make_dataset("folder", str(tmp_path), split, 8) for split in ("train", "val"))
    with pytest.warns(UserWarning) as told:
        assert torch.equal(data[50][0], data[50][0]) and data[50][0].shape == (3, 8, 8)
    assert len([w for w in told if "train/50.png" in str(w.message)]) == 1
    with pytest.raises(DataError, match="val/50.png") as error:
        val[50]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [(20_000, 10), (10, 20_000), (1, 1)])
def test_long_and_small_images_are_read(tmp_path, size):
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    Image.new("RGB", size, (255, 0, 0)).save(tmp_path / "train/x.png")
    image = make_dataset("folder", str(tmp_path), "train", 8, min_scale=0.5)[0][0]
    assert image.shape == (3, 8, 8) and (image[0] == 1).all() and (image[1:] == -1).all()
