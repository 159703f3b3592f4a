"""Models for any rate, and images that are not square, through all scripts."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import TINY_MODELS, TRANSFORMERS, write_tiny, write_tiny2
from PIL import Image

import evaluate
import sample
import visualize
from dataset import DataError
from harness.config import UserError
from harness.models import load_run, set_image_size
from harness.sampling import load_models
from harness.use import set_rate

RANGES = {"mqvae": "model.topk_ratio=[0.1,0.9]", "dqvae": "model.ratios=[[0.1,0.9]]", "dqvae_entropy": "model.ratios=[[0.1,0.9]]",
          "dqvae_triple": "model.ratios=[[0.1,0.4],[0.1,0.5]]"}


@pytest.fixture
def photos(tmp_path):
    """Overrides for a folder of 24 images of 30 x 40 pixels, smooth at the left."""
    for i in range(24):
        (tmp_path / f"photos/{'ab'[i % 2]}").mkdir(parents=True, exist_ok=True)
        pixels = np.linspace(0, 200, 40 * 30 * 3).reshape(30, 40, 3) + i
        pixels[:, i:] += np.random.default_rng(i).uniform(-50, 50, (30, 40 - i, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / f"photos/{'ab'[i % 2]}/{i:02d}.png")
    return ["data.name=folder", f"data.root={tmp_path}/photos", "data.val_fraction=0.3"]


@pytest.fixture
def any_rate(train, tmp_path):
    """Trains a tiny run of this model for a range; its folder."""
    def make(name, *overrides):
        train(RANGES[name], "loss.disc_weight=0", f"train.output_dir={tmp_path}/{name}", *overrides,
              config=write_tiny(tmp_path, model=TINY_MODELS[name]))
        return tmp_path / name

    return make


@pytest.mark.parametrize("name", RANGES)
def test_a_run_of_any_rate_resumes_exactly(any_rate, train, tmp_path, name):
    whole = any_rate(name).rename(tmp_path / "whole")
    any_rate(name, "train.max_minutes=0")
    parts = tmp_path / name
    train(RANGES[name], "loss.disc_weight=0", f"train.output_dir={parts}", resume="auto", config=tmp_path / "tiny.yaml")
    one, other = (load_run(folder)[0].state_dict() for folder in (whole, parts))
    assert all(torch.equal(one[k], other[k]) for k in one)
    rates = [[json.loads(line).get("codes") for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (whole, parts)]
    rates = [[rate for rate in each if rate is not None] for each in rates]
    assert len(set(rates[0])) > 3 and rates[0] == rates[1]


def test_every_micro_batch_of_a_step_has_its_rate(any_rate, tmp_path, monkeypatch):
    import mqvae

    seen, number = [], mqvae.MQVAE._number
    monkeypatch.setattr(mqvae.MQVAE, "_number", lambda self, *args: seen.append(number(self, *args)) or seen[-1])
    any_rate("mqvae", "train.gradient_accumulation_steps=3", "train.max_train_steps=3", "train.validation_steps=9")
    seen = [n for n in seen if n != 32]  # of validation
    assert len(seen) >= 6 and all(seen[i] == seen[i + 1] == seen[i + 2] for i in range(0, len(seen), 3))


@pytest.mark.parametrize("name, own", [
    ("mqvae", {0.25: 16, 0.5: 32}), ("dqvae_entropy", {0.25: 28, 0.5: 40}), ("dqvae_triple", None)])
def test_a_result_for_each_rate(any_rate, capsys, name, own):
    run = any_rate(name)
    words = ["--run", str(run), "--without", "lpips", "inception", "--num_workers", "0"]
    evaluate.main([*words, "--rates", "0.25,0.5"])
    found = json.loads((run / "metrics.json").read_text())["rates"]
    printed = capsys.readouterr().out
    assert f"{name} at 0.25" in printed and f"{name} at 0.5" in printed and "psnr" in found["0.25"]
    if own:
        assert [found[str(rate)]["codes"] for rate in own] == pytest.approx(list(own.values()), abs=0 if name == "mqvae" else 6)
    evaluate.main(words)
    middle = json.loads((run / "metrics.json").read_text())
    assert own is None or middle["psnr"] == found["0.5"]["psnr"]
    if name == "dqvae_entropy":
        for rates, sentence in (("0.5,x", "must be numbers with commas"),
                                ("0", "this rate cannot be chosen: ratios"),
                                ("1.5", "this rate cannot be chosen: ratios")):
            with pytest.raises(UserError, match=sentence):
                evaluate.main([*words, "--rates", rates])


def test_pictures_of_rates(any_rate, train, tmp_path, capsys):
    run, fixed = any_rate("mqvae"), tmp_path / "fixed"
    train("loss.disc_weight=0", f"train.output_dir={fixed}", config=tmp_path / "tiny.yaml")
    visualize.main(["rate", "--run", str(run), "--run", str(fixed), "--images", "3", "--dpi", "50"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "bits per pixel" in line]
    assert [line.split(":")[0] for line in lines] == [f"mqvae (MQ-VAE) at {r}" for r in (0.1, 0.3, 0.5, 0.7, 0.9)] + ["fixed (MQ-VAE)"]
    bits = [float(line.split(": ")[1].split()[0]) for line in lines]
    assert bits[:5] == sorted(bits[:5]) and bits[0] < bits[5] < bits[4]
    visualize.main(["ladder", "--run", str(run), "-n", "2", "--dpi", "50", "--rates", "0.2,0.6"])
    beside = Image.open(run / "figures/ladder.png")  # maps beside the reconstructions, not above
    assert beside.width > beside.height
    for name in ("mqvae", "dqvae_triple"):
        run = any_rate(name, "train.max_train_steps=1") if name != "mqvae" else run
        visualize.main(["ladder", "--run", str(run), "-n", "2", "--dpi", "50"])
        assert len(Image.open(run / "figures/ladder.png").convert("RGB").getcolors(2**24)) > 50
    with pytest.raises(UserError, match="was trained for one rate; ladder needs a range"):
        visualize.main(["ladder", "--run", str(fixed)])


@pytest.mark.parametrize("name", ["vqgan", *RANGES])
def test_stage1_on_rectangles(train, tmp_path, photos, name, capsys):
    words = [*photos, *([RANGES[name]] if name in RANGES else []), "data.image_size=[16,24]", "train.max_train_steps=3"]
    train(*words, config=write_tiny(tmp_path, model=TINY_MODELS[name]))
    run = tmp_path / "run"
    model, config = load_run(run)
    assert config["model"]["image_size"] == [16, 24]
    for size in ("[16,24]", "[32,16]", "24"):  # what it was trained for, and what not
        evaluate.main(["--run", str(run), "--without", "lpips", "inception", "--num_workers", "0", f"data.image_size={size}"])
    visualize.main(["codes", "--run", str(run), "-n", "2", "--images", "4", "--dpi", "50"])
    visualize.main(["interactive", "--run", str(run), "-n", "2"])
    assert '"size":[16,24],"grid":[8,12]' in (run / "figures/interactive.html").read_text()
    visualize.main(["recon", "--run", str(run), "-n", "2", "--dpi", "50", "data.image_size=[32,48]"])


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_stage2_reads_a_rate_and_a_rectangle(any_rate, train2, tmp_path, photos, name, capfd):
    """A stage-1 model of square images and any rate; its codes of rectangles at a chosen rate; and new images of that kind."""
    stage1 = TRANSFORMERS[name][1]
    config = write_tiny2(tmp_path, name)
    words = [*photos, "data.image_size=[16,24]", "train.max_train_steps=2"]
    if stage1 != "vqgan":
        words += [f"codes.stage1={any_rate(stage1, 'train.max_train_steps=2')}"]
        words += ["codes.ratio=0.3" if name != "dq_transformer_triple" else "codes.ratios=[0.3,0.2]"]
    train2(config, *words)
    run = tmp_path / "run2"
    model, first, about, _ = load_models(run)
    cells = int(0.3 * 8 * 12) if stage1 == "mqvae" else 8 * 12
    codes = model.sample(3, torch.tensor([0, 1, 0]))
    assert codes["indices"][0].numel() == cells and first.decode(codes).shape == (3, 3, 16, 24)
    model = about["model"]
    assert stage1 != "mqvae" or model["num_codes"] == cells and [8, 12] in (model.get("grid"), *model.get("grids", []))
    sample.main(["--run", str(run), "-n", "3"])
    assert Image.open(run / "samples/seed_0/000002.png").size == (24, 16)
    evaluate.main(["--run", str(run), "--without", "inception", "--num_workers", "0", "-n", "2"])
    bits = json.loads((run / "metrics.json").read_text())["bits"]
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert bits == pytest.approx(logged[-1]["val_bits"], rel=1e-4)  # the same rate
    visualize.main(["sequence", "--run", str(run), "-n", "1", "--dpi", "50"])
    with pytest.raises(UserError, match=r"draws images of \[16, 24\] pixels, not 16"):
        evaluate.main(["--run", str(run), "data.image_size=16", "--without", "inception"])
    if stage1 == "vqgan":
        with pytest.raises(UserError, match="a VQGAN has one rate only"):
            train2(config, *words, "codes.ratio=0.5", f"train.output_dir={tmp_path}/none")
        return
    for bad, sentence in ((["codes.ratio=0", "codes.ratios=null"], "this rate cannot be chosen"),
                          (["codes.ratio=0.3", "codes.ratios=[0.3]"], "give codes.ratio or codes.ratios, not both")):
        with pytest.raises(UserError, match=sentence):
            train2(config, *words, *bad, f"train.output_dir={tmp_path}/none")
    # Another rate has a cache of its own, and this one's is found again
    capfd.readouterr()
    train2(config, *words, f"train.output_dir={tmp_path}/again")
    assert "encoding" not in capfd.readouterr().err
    other = "codes.ratio=0.6" if name != "dq_transformer_triple" else "codes.ratios=[0.2,0.5]"
    train2(config, *words, other, f"train.output_dir={tmp_path}/other")
    assert "encoding" in capfd.readouterr().err and len(list((tmp_path / stage1 / "codes").glob("val_*"))) == 2


def test_the_chosen_rate_and_size_hold_wherever_none_is_given(any_rate):
    model = load_run(any_rate("mqvae"))[0].requires_grad_(False)
    set_image_size(model, [32, 16])
    set_rate(model, 0.2)
    codes = model.encode(torch.zeros(1, 3, 32, 16))
    n = int(0.2 * 128)
    assert codes["indices"].shape == (1, n) and model.decode(codes).shape == (1, 3, 32, 16)
    assert model.bits(codes).item() == pytest.approx(n * 5 + math.log2(math.comb(128, n)), rel=1e-5)
    set_image_size(model, [4, 4])
    with pytest.raises(UserError, match="keep at least one of 4 cells"):  # of these images, not of those that it was trained with
        set_rate(model, 0.2)
    set_image_size(model, [32, 16])
    with pytest.raises(UserError, match="several ratios are for a DQ-VAE"):
        set_rate(model, [0.2])
    with pytest.raises(UserError, match="this rate cannot be chosen: ratio must be between 0 and 1"):
        set_rate(model, 1.2)
    with pytest.raises(UserError, match=r"must be divisible by 2, the model's downsampling factor; it is \[32, 15\]"):
        set_image_size(model, [32, 15])


def test_one_number_is_a_place_in_every_range(any_rate, recwarn):
    model = load_run(any_rate("dqvae_triple"))[0]
    for rate, want in ((0.2, [0.1, 0.1]), (0.55, [0.25, 0.3]), (0.9, [0.4, 0.5])):
        set_rate(model, rate)
        assert model.ratios == pytest.approx(want)
    assert not [w for w in recwarn if "outside" in str(w.message)]


@pytest.mark.parametrize("data, size, error, sentence", [
    ("shapes", "[16,24]", DataError, "data.image_size must be a number for shapes"),
    ("folder", "[16]", DataError, r"data.image_size must be a number or \[height, width\]; it is \[16\]"),
    ("folder", "[16,25]", UserError, "must be divisible by 2"),
    ("folder", "[16,0]", UserError, "must be between 1"),
    ("folder", "[[16,16],16]", UserError, "must be int"),
])
def test_bad_sizes_are_one_sentence(train, photos, data, size, error, sentence):
    with pytest.raises(error, match=sentence) as raised:
        train(*(photos if data == "folder" else []), f"data.image_size={size}")
    assert "\n" not in str(raised.value)


def test_crops_of_rectangles(tmp_path):
    """The largest crop of the wanted shape, not stretched."""
    from dataset import make_dataset

    y, x = np.mgrid[:30, :40]
    Image.fromarray(np.stack([x * 4, y * 4, x * 0], -1).astype(np.uint8)).save(tmp_path / "a.png")
    for i in range(19):
        Image.new("RGB", (9, 9)).save(tmp_path / f"b{i}.png")
    data = make_dataset("folder", str(tmp_path), "train", image_size=[10, 20], random_crop=False, random_flip=False, uint8=True)
    image = data[0][0].float()
    assert image.shape == (3, 10, 20)
    torch.testing.assert_close(image[0], (torch.arange(20.0) * 8 + 2).expand(10, 20), atol=2, rtol=0)  # the whole width
    torch.testing.assert_close(image[1], (20 + torch.arange(10.0) * 8 + 2).view(10, 1).expand(10, 20), atol=2, rtol=0)  # rows 5 to 25
    data = make_dataset("folder", str(tmp_path), "train", image_size=[10, 20], min_scale=0.25, uint8=True, random_flip=False)
    for epoch in range(20):
        image = data[epoch, 0][0].float()
        right, down = (image[0, 0, -2] - image[0, 0, 1]).item() / 17, (image[1, -2, 0] - image[1, 1, 0]).item() / 7
        assert right == pytest.approx(down, abs=0.5) and 3.5 < right < 8.5
