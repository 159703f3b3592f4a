"""Each number that evaluate.py gives equals one that was computed in another way, however the work is shared out."""

import argparse
import functools
import json
import math
import sys
import zipfile
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, TINY_MODELS, TRANSFORMERS, disk_is_full, forked, run_stage2, save_stage1, write_tiny2
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch_fidelity import feature_extractor_inceptionv3 as fidelity

import evaluate
import sample
from dataset import DataError, make_dataset, to_uint8
from gpt import GPT
from harness import features as inception
from harness.config import UserError
from harness.models import load_run


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """A folder for TORCH_HOME with Inception's weights drawn at random, under the name of the real ones."""
    home = tmp_path_factory.mktemp("torch")
    (home / "hub/checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = fidelity.FeatureExtractorInceptionV3("", ["2048"])
    for parameter in network.parameters():
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter)
    torch.save(network.state_dict(), home / "hub/checkpoints" / fidelity.URL_INCEPTION_V3.rpartition("/")[2])
    return home


@pytest.fixture
def networks(random_inception, monkeypatch):
    """Both networks, with random weights."""
    import lpips

    def random_lpips(_):
        torch.manual_seed(0)
        return lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval().requires_grad_(False)

    monkeypatch.setenv("TORCH_HOME", str(random_inception))
    monkeypatch.setattr(fidelity.FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75)  # the least that the network takes: fast
    monkeypatch.setattr(evaluate, "load_lpips", random_lpips)
    monkeypatch.setattr(inception, "SPATIAL", 7 * 3 * 3)  # of such images
    monkeypatch.setattr(inception, "frechet_distance", frechet_by_hand)  # fast; evaluate.py's own runs in the tests' other processes


@pytest.fixture
def measured(capsys):
    """Runs evaluate.py in this process; what is in the run's metrics.json."""
    def run(folder, *args):
        AcceleratorState._reset_state(True)
        evaluate.main(["--run", str(folder), "--num_workers", "0", *map(str, args)])
        found = (folder / "metrics.json").read_text()
        assert json.loads((folder / "evaluations.jsonl").read_text().splitlines()[-1]) == json.loads(found)
        return json.loads(found)

    return run


def in_two_processes(tmp_path, home, *words):
    """evaluate.py with images as small as in `networks`."""
    (tmp_path / "driver.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import evaluate, torch_fidelity.feature_extractor_inceptionv3 as fidelity\nfrom harness import features as inception, launch\n"
        "fidelity.FeatureExtractorInceptionV3.INPUT_IMAGE_SIZE, inception.SPATIAL = 75, 7 * 3 * 3\nlaunch.run_main(evaluate.main)\n")
    forked(tmp_path, tmp_path / "driver.py", *words, processes=2, TORCH_HOME=str(home))


def frechet_by_hand(a, b):
    """tr (S T)^(1/2) is the sum of the singular values of A^T B, where S = A A^T and T = B B^T; of few images, A and B are narrow."""
    def root(sigma):
        some = np.random.default_rng(0).standard_normal((len(sigma), 15))  # more than the rank
        values, vectors = np.linalg.eigh(some.T @ sigma @ some)
        here = values > 1e-9 * values.max()
        return sigma @ some @ vectors[:, here] / np.sqrt(values[here])

    assert {x.dtype for x in (*a.values(), *b.values())} == {np.dtype(np.float64)}  # or torch-fidelity's would refuse
    common = np.linalg.svd(root(a["sigma"]).T @ root(b["sigma"]), compute_uv=False).sum()
    return float(((a["mu"] - b["mu"])**2).sum() + np.trace(a["sigma"]) + np.trace(b["sigma"]) - 2 * common)


def numbers(metrics):
    return {k: v for k, v in metrics.items() if isinstance(v, (int, float)) and k != "images_per_second"}


def assert_same(a, b):
    """But for rounding, which may change a pixel by a grey level: seen in FID of a few images."""
    assert numbers(a).keys() == numbers(b).keys()
    for key, value in numbers(a).items():
        tolerance = 1e-2 if key.endswith("fid") else 1e-4
        assert value == pytest.approx(b[key], abs=1e-4, rel=tolerance), key


# ---------------------------------------------------------------------------------------------------------------------
# The numbers


def test_psnr_and_ssim_are_those_of_scikit_image():
    rng = np.random.default_rng(0)
    images = torch.stack([make_dataset("shapes", image_size=48, uint8=True)[i][0] for i in range(4)])
    noisy = (images + torch.from_numpy(rng.normal(0, [[[[3]]], [[[10]]], [[[30]]], [[[90]]]], images.shape))).clamp(0, 255).to(torch.uint8)
    found = evaluate.compare(images, noisy, None)
    for i, (a, b) in enumerate(zip(images.permute(0, 2, 3, 1).numpy(), noisy.permute(0, 2, 3, 1).numpy())):
        assert found["psnr"][i].item() == pytest.approx(peak_signal_noise_ratio(a, b), abs=1e-4)
        ssim = structural_similarity(a, b, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        assert found["ssim"][i].item() == pytest.approx(ssim, abs=1e-4)
    same = evaluate.compare(images, images)
    assert same["ssim"].tolist() == pytest.approx([1, 1, 1, 1]) and same["psnr"].tolist() == [100] * 4  # and no infinite mean


def test_usage_and_perplexity():
    uses = torch.tensor([4, 0, 3, 1, 0, 1])
    every = [k for k, n in enumerate(uses.tolist()) for _ in range(n)]
    for draws in (1, 3, 5, 8, 9, 100):
        draw = [len(set(c)) / 6 for c in combinations(every, min(draws, 9))]
        assert evaluate.usage(uses, draws) == pytest.approx(sum(draw) / len(draw), abs=1e-9)
    p = np.array([4, 3, 1, 1]) / 9
    assert evaluate.perplexity(uses) == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    assert evaluate.usage(torch.tensor([10**9, 10**9, 1]), 65536) == pytest.approx(2 / 3, abs=1e-4)  # no overflow


def test_frechet_distance_is_that_of_gaussians():
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q

    def gaussian(mean, deviations, n):
        x = torch.randn(n, 6, dtype=torch.float64)
        x = x - x.mean(0)
        x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T  # exactly the identity as covariance
        return (x * deviations) @ rotation.T.double() + mean

    mean_a, mean_b, a, b = torch.randn(6).double(), torch.randn(6).double(), torch.rand(6).double() + 0.5, torch.rand(6).double() + 0.5
    expected = (mean_a - mean_b).square().sum() + (a - b).square().sum()  # the covariances have the same axes
    one, other = inception.statistics(gaussian(mean_a, a, 50)), inception.statistics(gaussian(mean_b, b, 80))
    assert inception.frechet_distance(one, other) == pytest.approx(expected.item(), abs=1e-4)
    assert frechet_by_hand(one, other) == pytest.approx(expected.item(), abs=1e-6)
    assert inception.frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="at least two images"):
        inception.statistics(torch.zeros(1, 6))


def test_quality_of_samples():
    torch.manual_seed(0)
    quality = functools.partial(inception.precision_and_recall, network="inception")
    features, logits = torch.randn(40, 8), torch.randn(40, 10)
    own = quality(features, features) | inception.inception_score(logits)
    assert own["precision"] == own["recall"] == 1 and own["samples"] == 40
    flipped = quality(features.flip(0), features) | inception.inception_score(logits.flip(0))
    assert_same(own, flipped)  # the order of the samples says nothing
    far = quality(features[:20] + 100, features)
    assert far["precision"] == far["recall"] == 0
    # By hand: a point is covered if it lies in the ball around another that reaches that one's third neighbour
    some = features[:20] + 0.5
    balls = {name: torch.cdist(x, x).sort(1).values[:, 3] for name, x in (("some", some), ("all", features))}
    mixed = quality(some, features)
    assert mixed["precision"] == pytest.approx((torch.cdist(some, features) <= balls["all"]).any(1).float().mean().item())
    assert mixed["recall"] == pytest.approx((torch.cdist(features, some) <= balls["some"]).any(1).float().mean().item())
    assert inception.inception_score(100 * torch.eye(40))["is"] == pytest.approx(4)  # four in each of ten splits
    assert inception.inception_score(torch.zeros(40, 10))["is"] == pytest.approx(1)


def test_spatial_features(random_inception, monkeypatch):
    """Of the layer itself, in TensorFlow's order (h, w, channel), beside the network's own features; 2,023 of them."""
    monkeypatch.setenv("TORCH_HOME", str(random_inception))
    network = inception.load_inception()
    images = torch.randint(256, (2, 3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found, logits = inception.inception_features(network, images)
    pool, expected = network(images)
    torch.testing.assert_close([found[:, :2048], logits], [pool, expected])
    assert found.shape == (2, 2048 + inception.SPATIAL)
    x = fidelity.interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False) / 128 - 1
    layers = dict(network.named_children())
    for name in list(layers)[:list(layers).index("Mixed_6d")]:
        x = layers[name](x)
    layer = network.Mixed_6d.branch1x1
    x = layer.bn(layer.conv(x)).relu()
    assert (x[:, :7] > 0).float().mean() > 0.1
    for c, h, w in ((0, 0, 0), (3, 5, 11), (6, 16, 2), (2, 9, 16)):
        assert torch.allclose(found[:, 2048 + (17 * h + w) * 7 + c], x[:, c, h, w], atol=1e-4), (c, h, w)


@pytest.mark.parametrize("name", list(TINY_MODELS))
def test_stage1_against_computing_it_by_hand(tmp_path, measured, name):
    run = save_stage1(tmp_path, name, val_size=11)
    found = measured(run, "--without", "lpips", "inception")
    model, config = load_run(run)
    images = torch.stack([image for image, _ in make_dataset(**config["data"], split="val")])
    with torch.no_grad():
        codes = model.encode(images)
        pairs = zip(*[to_uint8(x).permute(0, 2, 3, 1).numpy() for x in (images, model.decode(codes))])
    assert found["psnr"] == pytest.approx(np.mean([peak_signal_noise_ratio(a, b) for a, b in pairs]), abs=1e-4)
    assert found["bits"] == pytest.approx(model.bits(codes).mean().item())
    assert found["bits_per_pixel"] == pytest.approx(found["bits"] / 16**2)
    used = []  # the codes that are paid for
    for i in range(11):
        if "grain" not in codes:
            used.append(codes["indices"][i].flatten().tolist())
            continue
        region = model.factors[0] // model.factors[-1]
        used.append([])
        for y, x in np.ndindex(*codes["grain"].shape[1:]):
            step = region >> codes["grain"][i, y, x].item()
            used[-1] += codes["indices"][i, y * region:(y + 1) * region:step, x * region:(x + 1) * region:step].flatten().tolist()
    assert found["codes"] == pytest.approx(np.mean([len(u) for u in used])) and found["images"] == found["images_in_split"] == 11
    assert found["codes_std"] == pytest.approx(np.std([len(u) for u in used]))
    counts = np.bincount(sum(used, []), minlength=32)
    p = counts[counts > 0] / counts.sum()
    assert found["usage"] == pytest.approx((counts > 0).mean())
    assert found["usage_65536"] == pytest.approx(found["usage"])
    assert found["perplexity"] == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    if name == "mqvae":
        assert found["kept_ratio"] == 0.25
    for g in range(1, getattr(model, "grains", 1)):
        shares = (codes["grain"] == g).float().mean((1, 2))
        assert found[f"ratio_{g}"] == pytest.approx(shares.mean().item()) and found["codes_std"] > 0
        assert found[f"ratio_{g}_std"] == pytest.approx(shares.std(correction=0).item())


# ---------------------------------------------------------------------------------------------------------------------
# From a run to the table


def test_stage1_whoever_does_what(tmp_path, measured, networks, random_inception, capsys):
    """Batches, processes and bf16; several runs in one table."""
    run = save_stage1(tmp_path, "dqvae_entropy", val_size=5)
    whole = measured(run, "--batch_size", 5, "--save_statistics", tmp_path / "one.npz")
    assert whole["rfid"] > 0 and whole["rsfid"] > 0 and whole["lpips"] > 0 and whole["missing"] == {}
    assert_same(whole, measured(run, "--batch_size", 3))
    words = ["--run", run, "--batch_size", "2", "--num_workers", "1", "--without", "lpips", "--save_statistics", tmp_path / "two.npz"]
    in_two_processes(tmp_path, random_inception, *words)
    two = json.loads((run / "metrics.json").read_text())
    assert "left out" in two["missing"]["lpips"]
    assert_same({k: v for k, v in whole.items() if not k.startswith("lpips")}, two)
    for name, array in np.load(tmp_path / "one.npz").items():
        assert np.allclose(array, np.load(tmp_path / "two.npz")[name], atol=1e-4), name
    assert measured(run, "--mixed_precision", "bf16", "--without", "lpips", "inception")["psnr"] == pytest.approx(whole["psnr"], abs=0.5)

    AcceleratorState._reset_state(True)
    capsys.readouterr()
    other = save_stage1(tmp_path, "vqgan", val_size=5)
    evaluate.main(["--run", str(run), "--run", str(other), "--without", "lpips", "--num_workers", "0"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "stage1_dqvae_entropy", "stage1_vqgan"] and lines[1].split() == ["model", "dqvae", "vqgan"]
    shown = {line[:21].strip(): line[21:].split("  ") for line in lines}
    assert shown["PSNR (dB)"][0] == f"{whole['psnr']:.2f}" and shown["rFID"][0] == f"{whole['rfid']:.2f}"
    assert shown["granularity 1"][0].startswith(f"{whole['ratio_1']:.1%} ±") and shown["granularity 1"][-1].strip() == "-"
    assert "without LPIPS: left out by --without lpips" in lines
    evaluate.main(["--run", str(run), "--run", str(other), "--without", "lpips", "inception", "--markdown", "--num_workers", "0"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| run | model | data | images | PSNR (dB) |")
    assert lines[3].startswith("| stage1_vqgan | vqgan | shapes val | 5 of 5 |")
    (tmp_path / "photos/val").mkdir(parents=True)
    (tmp_path / "photos/train").mkdir()
    for i in range(4):
        Image.new("RGB", (20, 20), (60 * i, 0, 0)).save(tmp_path / f"photos/{('train', 'val')[i % 2]}/{i}.png")
    photos = ["data.name=folder", f"data.root={tmp_path}/photos", "--images", "1", "--without", "lpips", "inception"]
    found = measured(run, *photos, "--markdown", "--split", "train")
    assert (found["dataset"], found["split"], found["images"], found["images_in_split"]) == ("photos", "train", 1, 2)
    assert "| dqvae | photos train | 1 of 2 |" in capsys.readouterr().out


@pytest.mark.parametrize("name", list(TRANSFORMERS))
def test_stage2_of_every_model(tmp_path, measured, train2, networks, random_inception, name):
    train2(write_tiny2(tmp_path, name), "train.max_train_steps=1", "data.val_size=4")
    run = tmp_path / "run2"
    if name != "gpt":
        found = measured(run, "-n", 3, "--without", "inception", "--images", 5)
        assert found["bits"] > 0 and found["images_per_second"] > 0
        assert set(found["missing"]) == {"fid", "sfid", "is", "precision", "recall"}
        return
    drawn = measured(run, "--seed", 3)
    assert drawn["samples"] == drawn["images"] == drawn["images_in_split"] == 4 and drawn["real_images_from"] == drawn["split"] == "val"
    assert drawn["fid"] > 0 and drawn["sfid"] > 0 and drawn["missing"] == {}
    assert drawn["is"] > 1 - 1e-6  # of 4 samples in 10 splits, exp(0) but for rounding
    model, config = load_run(run)
    stage1, _ = load_run(run / "stage1")
    pairs = [make_dataset(**config["data"], split="val")[i] for i in range(4)]
    with torch.no_grad():
        bits = model.bits(stage1.encode(torch.stack([p[0] for p in pairs])), torch.tensor([p[1] for p in pairs]))
    assert drawn["bits"] == pytest.approx(bits.mean().item(), abs=1e-3)
    # The same images from files; shared out otherwise; in another order
    assert drawn["labels"] == "as in val"
    labels = evaluate.spread_labels(make_dataset(**config["data"], split="val"), 4).tolist()
    assert sorted(labels) == sorted(p[1] for p in pairs)
    folder = ["--run", str(run), "-n", "4", "--seed", "3", "--classes", ",".join(map(str, labels)), "--out"]
    sample.main([*folder, str(tmp_path / "files")])
    sample.main([*folder, str(tmp_path / "files.npz")])
    from_files = measured(run, "--samples", tmp_path / "files", "--batch_size", 3)
    assert_same(drawn, from_files)
    assert "labels" not in from_files
    np.savez(tmp_path / "flipped.npz", np.load(tmp_path / "files.npz")["arr_0"][::-1])
    assert_same(drawn, measured(run, "--samples", tmp_path / "flipped.npz"))
    np.savez(tmp_path / "val.npz", arr_0=torch.stack([to_uint8(image) for image, _ in pairs]).permute(0, 2, 3, 1))
    words = ["--run", run, "--seed", "3", "--batch_size", "2", "--num_workers", "0", "--reference", tmp_path / "val.npz"]
    in_two_processes(tmp_path, random_inception, *words)
    assert_same(drawn, json.loads((run / "metrics.json").read_text()))
    greedy = measured(run, "-n", 5, "sample.temperature=0")
    assert greedy["samples"] == 5 and greedy["images"] == greedy["real_images"] == 4 and greedy["fid"] != drawn["fid"]
    with pytest.raises(UserError, match="need 4 samples and 4 images; there are 3 and 4"):
        measured(run, "-n", 3)


def test_features_of_efficientnet(tmp_path, measured, train2, capsys):
    """The real network. Stage 1, in several batches and after more training; stage 2, with classes of ImageNet."""
    run = save_stage1(tmp_path, "vqgan", val_size=6)
    seen = measured(run, "--features", "efficientnet_lite2", "--without", "lpips")
    assert seen["rfd"] > 0 and 0 <= seen["agreement"] <= 1 and set(seen["missing"]) == {"lpips"}
    assert seen["features"] == "efficientnet_lite2"
    assert "rFD (Lite2)" in capsys.readouterr().out
    assert_same(seen, measured(run, "--features", "efficientnet_lite2", "--without", "lpips", "--batch_size", 4))
    network = evaluate.load_efficientnet_lite(2)
    images = torch.stack([image for image, _ in make_dataset(**load_run(run)[1]["data"] | {"val_size": 6}, split="val")])
    model, _ = load_run(run)
    with torch.no_grad():
        both = [to_uint8(images), to_uint8(model.decode(model.encode(images)))]
        (real, one), (other, two) = (inception.lite2_features(network, each) for each in both)
    assert seen["agreement"] == (one.argmax(1) == two.argmax(1)).double().mean()
    distance = inception.frechet_distance(inception.statistics(real), inception.statistics(other))
    assert seen["rfd"] == pytest.approx(distance, rel=1e-2, abs=1e-2)

    for name in ("n02123045", "n02085620"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(tmp_path / "photos" / name / f"{name}_{i}.png")
    config = write_tiny2(tmp_path, "gpt")
    train2(config, "train.max_train_steps=1", "data.name=folder", f"data.root={tmp_path}/photos", "data.val_fraction=0.4")
    drawn = measured(tmp_path / "run2", "--features", "efficientnet_lite2", "-n", 6)
    assert drawn["fd"] > 0 and 0 <= drawn["precision"] <= 1 and 0 <= drawn["accuracy"] <= 1 and drawn["missing"] == {}
    assert "fid" not in drawn and "is" not in drawn and drawn["features"] == "efficientnet_lite2"
    data = make_dataset("folder", f"{tmp_path}/photos", "val", image_size=16, val_fraction=0.4)
    tabby_or_chihuahua = torch.tensor([281, 151])
    logits = torch.cat([inception.lite2_features(network, to_uint8(image)[None])[1] for image, _ in data])
    is_own = logits.argmax(1) == tabby_or_chihuahua[[1 - label for _, label in data]]
    assert data.classes == ["n02085620", "n02123045"] and drawn["accuracy_of_images"] == is_own.double().mean()
    with pytest.raises(UserError, match="there are 3 and .* .--without efficientnet_lite2 leaves them out"):
        measured(tmp_path / "run2", "--features", "efficientnet_lite2", "-n", 3)


def test_a_run_whose_classes_are_not_imagenets_says_so(tmp_path, measured, train2, capsys):
    train2(write_tiny2(tmp_path, "gpt"), "train.max_train_steps=1", "data.name=shapes")
    drawn = measured(tmp_path / "run2", "--features", "efficientnet_lite2", "-n", 4)
    assert "accuracy" not in drawn and "without class asked for: the classes are not named by WordNet numbers" in capsys.readouterr().out


def test_classes_of_imagenet(tmp_path):
    named = SimpleNamespace(classes=["n01440764", "n15075141", "n02123045"], source=None)
    assert inception.imagenet_numbers(named).tolist() == [0, 999, 281]  # tench, toilet tissue, tabby
    named.classes[1] = "cats"
    assert inception.imagenet_numbers(named) is None
    for split in ("train", "val"):
        (tmp_path / split / "n01440764").mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / split / "n01440764/a.png")
    (tmp_path / "synset_human.txt").write_text("n01440764 tench, Tinca tinca\n")
    in_words = make_dataset("imagenet", str(tmp_path), "val", image_size=16)
    assert in_words.classes == ["tench, Tinca tinca"] and inception.imagenet_numbers(in_words).tolist() == [0]


def test_labels_as_in_the_split():
    data = make_dataset("shapes", split="val", image_size=16, val_size=30)
    every = [data.label(i) for i in range(30)]
    for count in (30, 60, 7):
        labels = evaluate.spread_labels(data, count)
        assert len(labels) == count
        for label in set(every):
            assert abs((labels == label).sum() - count * every.count(label) / 30) < 1


def test_a_run_knows_classes_by_name(tmp_path, measured, train2, monkeypatch):
    def images(root, classes):
        for name in classes:
            (tmp_path / root / name).mkdir(parents=True)
            for i in range(12):
                Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(tmp_path / root / name / f"{name}{i}.png")

    images("all", ["ant", "bee", "cat"])
    images("some", ["bee", "cat"])
    images("one", ["cat"])
    images("other", ["bee", "dog"])
    train2(write_tiny2(tmp_path, "gpt", data=f"name: folder\n  root: {tmp_path}/all\n  val_fraction: 0.5"), "train.max_train_steps=1")
    run, given, bits = tmp_path / "run2", set(), GPT.bits

    def spy(self, codes, labels=None):
        given.update(labels.tolist())
        return bits(self, codes, labels)

    monkeypatch.setattr(GPT, "bits", spy)
    for root, labels in (("all", {0, 1, 2}), ("some", {1, 2}), ("one", {2})):
        given.clear()
        measured(run, "--without", "inception", "-n", 3, f"data.root={tmp_path}/{root}")
        assert given == labels
    with pytest.raises(DataError, match="is of class 'dog', which the run does not know; the 3 classes are, .* ant, bee, cat$"):
        measured(run, "--without", "inception", f"data.root={tmp_path}/other")
    (run / "classes.json").unlink()  # a converted run: by place
    measured(run, "--without", "inception", "-n", 3)
    with pytest.raises(UserError, match="knows 3 classes, and this data has 2"):
        measured(run, "--without", "inception", f"data.root={tmp_path}/some")


def test_reference(tmp_path, measured, networks, train2, monkeypatch, capsys):
    """Every kind of file gives what the split itself gives, and no more is computed than is needed."""
    train2(write_tiny2(tmp_path, "gpt"), "train.max_train_steps=1", "data.val_size=5")
    run, stage1, seen = tmp_path / "run2", tmp_path / "stage1_vqgan", []
    features = inception.inception_features

    def counted(network, images):
        seen.append(len(images))
        return features(network, images)

    def told(folder, *args):
        """What is measured, and how many images Inception has seen."""
        seen.clear()
        return measured(folder, "data.val_size=5", "--without", "lpips", *args), sum(seen)

    def npz(name, **arrays):
        np.savez(tmp_path / name, **arrays)
        return "--reference", tmp_path / name

    monkeypatch.setattr(evaluate, "inception_features", counted)
    images = torch.stack([to_uint8(image) for image, _ in make_dataset(**load_run(run)[1]["data"] | {"val_size": 5}, split="val")])
    network = inception.load_inception()
    monkeypatch.setattr(evaluate, "load_inception", lambda: network)  # once
    rows, images = features(network, images)[0].double().numpy(), images.permute(0, 2, 3, 1).numpy()
    plain, count = told(stage1, "--save_statistics", tmp_path / "saved.npz")
    saved = dict(np.load(tmp_path / "saved.npz"))
    assert f"statistics of 5 images: {tmp_path}/saved.npz" in capsys.readouterr().out
    assert count == 10 and "reference" not in plain and set(saved) == {"mu", "sigma", "mu_s", "sigma_s"}
    for name, part in (("", rows[:, :2048]), ("_s", rows[:, 2048:])):
        assert saved[f"mu{name}"].dtype == saved[f"sigma{name}"].dtype == np.float64
        assert np.allclose(saved[f"mu{name}"], part.mean(0), atol=1e-4) and np.allclose(saved[f"sigma{name}"], np.cov(part.T), atol=1e-4)
    others = np.random.default_rng(0).integers(256, size=(6, 16, 16, 3), dtype=np.uint8)
    pool, spatial = ({k: saved[k] for k in keys} for keys in (("mu", "sigma"), ("mu_s", "sigma_s")))
    for arrays, needed in ((saved, 5), ({"arr_0": images}, 10), (pool | {"arr_0": images}, 10), (saved | {"arr_0": others}, 5)):
        found, count = told(stage1, *npz("reference.npz", **arrays))
        assert count == needed and found["reference"] == "reference.npz" and set(found["missing"]) == {"lpips"}
        assert_same(plain, found)
    assert "reference of FID     reference.npz" in capsys.readouterr().out
    far, _ = told(stage1, *npz("others.npz", **spatial, arr_0=others))
    assert far["rfid"] > 2 * plain["rfid"] and far["rsfid"] == pytest.approx(plain["rsfid"], rel=1e-4)
    found, count = told(stage1, *npz("pool.npz", mu=saved["mu"].astype(np.float32), sigma=saved["sigma"]))
    assert count == 5 and found["rfid"] == pytest.approx(plain["rfid"], rel=1e-4) and "rsfid" not in found
    assert f"without rsFID: {tmp_path}/pool.npz has neither `mu_s` and `sigma_s` nor images" in capsys.readouterr().out

    plain, count = told(run, "-n", 4)
    assert count == 9 and plain["real_images"] == 5
    for arrays in (saved, {"arr_0": images}, saved | {"arr_0": images}):
        found, count = told(run, "-n", 4, *npz("reference.npz", **arrays))
        assert count == 9 and found["real_images_from"] == ("reference.npz" if "arr_0" in arrays else "val")
        assert_same(plain, found)
    found, count = told(run, "-n", 4, *npz("reference.npz", **saved, arr_0=others))
    assert count == 10 and found["real_images"] == 6 and [found[k] for k in ("fid", "sfid")] == pytest.approx([plain["fid"], plain["sfid"]])
    assert "6 from reference.npz" in capsys.readouterr().out
    found, _ = told(run, "-n", 4, *npz("pool.npz", **pool))
    assert set(found["missing"]) == {"sfid"} and [found["fid"], found["recall"]] == pytest.approx([plain["fid"], plain["recall"]])
    itself, _ = told(run, *npz("itself.npz", arr_0=others), "--samples", tmp_path / "itself.npz")
    assert [itself["fid"], itself["sfid"]] == pytest.approx([0, 0], abs=1e-5 * min(plain["fid"], plain["sfid"]))
    assert itself["precision"] == itself["recall"] == 1
    # Of several runs, on one data set
    two = ["--run", stage1, "--without", "lpips", "--save_statistics", tmp_path / "two.npz"]
    with pytest.raises(UserError, match="of one data set, and these runs have several"):
        measured(run, *two)
    measured(run, "data.val_size=5", *two)
    assert np.allclose(np.load(tmp_path / "two.npz")["mu"], saved["mu"])


def test_what_can_fail_is_computed_before_anything_is_sampled(tmp_path, measured, networks, train2, monkeypatch):
    train2(write_tiny2(tmp_path, "gpt"), "train.max_train_steps=1", "data.val_size=4")
    monkeypatch.setattr(evaluate, "draw", lambda *_: pytest.fail("sampled in vain"))
    monkeypatch.setattr(evaluate, "compare", lambda *_: pytest.fail("measured in vain"))
    for count, sentence in ((1, "at least two images"), (3, "need 4 samples and 4 images; there are 4 and 3")):
        np.savez(tmp_path / "few.npz", arr_0=np.zeros((count, 16, 16, 3), np.uint8))
        for run in (tmp_path / "run2", tmp_path / "stage1_vqgan")[:2 if count == 1 else 1]:
            with pytest.raises(UserError, match=sentence):
                measured(run, "--reference", tmp_path / "few.npz")


def test_the_training_split_is_not_augmented(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(256, size=(20, 30, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "b.png")
    model, config = load_run(save_stage1(tmp_path, "vqgan"))
    args = argparse.Namespace(overrides=["data.name=folder", f"data.root={tmp_path}", "data.image_size=20"])
    dataset, data = evaluate.run_images(args, config, "train", model)
    expected = np.asarray(Image.open(tmp_path / "a.png").crop((5, 0, 25, 20)))
    assert data["name"] == "folder" and (to_uint8(dataset[(1, 0)][0]).permute(1, 2, 0).numpy() == expected).all()


@pytest.fixture(scope="module")
def questioned(tmp_path_factory):
    """For the words of a command: a stage-2 run and its stage 1, and a folder of files of all kinds."""
    folder = tmp_path_factory.mktemp("questioned")
    run_stage2(write_tiny2(folder, "gpt"), "train.max_train_steps=1", "data.val_size=12")
    files = folder / "files"
    files.mkdir()
    (files / "empty").mkdir()
    (files / "flat").mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16)).save(files / f"flat/{i}.png")
    np.savez(files / "nan.npz", mu=np.full(2048, np.nan), sigma=np.zeros((2048, 2048)))
    (files / "small").mkdir()
    Image.new("RGB", (8, 16)).save(files / "small/a.png")
    np.savez(files / "float.npz", np.zeros((2, 16, 16, 3)))
    np.savez(files / "large.npz", np.zeros((2, 32, 32, 3), np.uint8))
    (files / "text.npz").write_text("no")
    (files / "nothing.npz").write_bytes(b"")
    np.savez(files / "none.npz", np.zeros((0, 16, 16, 3), np.uint8))
    np.savez(files / "b.npz", b=np.zeros(2))
    np.savez(files / "mu.npz", mu=np.zeros(2048), sigma=np.zeros(2048))
    np.save(files / "array.npy", np.zeros(3))
    np.savez(files / "words.npz", mu=np.full(2048, "words"), sigma=np.zeros((2048, 2048)))
    with zipfile.ZipFile(files / "member.npz", "w") as file:
        file.writestr("mu", "no array")
    (files / "broken").mkdir()
    (files / "broken/000000.png").write_bytes(b"")
    return {"run": folder / "run2", "stage1": folder / "stage1_vqgan", "files": files}


@pytest.mark.parametrize("words, error, sentence", [
    ("--run {files}", UserError, "not a run folder"),
    ("--run {stage1} data.root={files}/empty data.name=folder", DataError,
     "no images for the val split"),
    ("--run {stage1} data.root={files}/nowhere data.name=folder", DataError, "there is no folder"),
    ("--run {stage1} data.image_size=15", UserError, "data.image_size must be divisible by 2"),
    ("--run {stage1} data.imagesize=16", UserError,
     "the nearest valid one is 'data.image_size'|nearest valid one is data.image_size"),
    ("--run {stage1} sample.top_k=3", UserError, "unknown section 'sample'"),
    ("--run {stage1} --samples {files}/small", UserError, "stage-2 run"),
    ("--run {stage1} --images 0", UserError, "must be at least 1"),
    ("--run {run} --samples {files}/small", UserError,
     "a.png has 8 x 16 pixels, but the data that it is compared with 16 x 16"),
    ("--run {run} --samples {files}/large.npz", UserError,
     r"`arr_0` of .*large.npz is uint8 \(2, 32, 32, 3\)"),
    ("--run {run} --samples {files}/float.npz", UserError, "is float64"),
    ("--run {run} --samples {files}/text.npz", UserError, "is not an .npz of images"),
    ("--run {run} --samples {files}/nothing.npz", UserError, "is not an .npz of images"),
    ("--run {run} --samples {files}/none.npz", UserError,
     "is uint8 .0, 16, 16, 3.; it must be images"),
    ("--run {run} --samples {files}/b.npz", UserError, "`arr_0` of .*b.npz is not there"),
    ("--run {stage1} --reference {files}/text.npz", UserError,
     "is not an .npz of images .* or statistics"),
    ("--run {stage1} --reference {files}/array.npy", UserError,
     "is not an .npz of images .* or statistics"),
    ("--run {stage1} --reference {files}/nowhere.npz", UserError, "there is no file .*nowhere.npz"),
    ("--run {stage1} --reference {files}/b.npz", UserError,
     "holds neither statistics .* nor images"),
    ("--run {stage1} --reference {files}/mu.npz", UserError,
     r"are float64 \(2048,\), float64 \(2048,\) instead"),
    ("--run {stage1} --reference {files}/words.npz", UserError,
     r"are <U5 \(2048,\), float64 \(2048, 2048\) in"),
    ("--run {stage1} --reference {files}/member.npz", UserError,
     "is not an .npz of images .* or statistics"),
    ("--run {stage1} --reference {files}/large.npz", UserError,
     r"`arr_0` of .*large.npz is uint8 \(2, 32, 32, 3\)"),
    ("--run {run} --reference {files}/large.npz", UserError, r"uint8 \(N, 16, 16, 3\)"),
    ("--run {stage1} --reference {files}/b.npz --without inception", UserError,
     "leave out --without inception"),
    ("--run {stage1} --reference {files}/b.npz --features efficientnet_lite2", UserError,
     "leave out --features efficientnet_lite2"),
    ("--run {stage1} --save_statistics {files}/nowhere/a.npz", UserError,
     "in a folder that exists"),
    ("--run {stage1} --save_statistics {files}/a.pt", UserError, "must be FILE.npz"),
    ("--run {run} --samples {files}/broken", UserError,
     "cannot read .*000000.png .*remove it from the samples"),
    ("--run {run} --samples {files}/empty", UserError, "there are no images in"),
    ("--run {run} --samples {files}/nowhere", UserError, "there is no .*nowhere"),
    ("--run {run} --samples {files}/nowhere --without inception", UserError,
     "there is no .*nowhere"),
    ("--run {run} --without inception data.name=folder data.root={files}/flat", DataError,
     "and this data has no classes"),
    ("--run {stage1} --reference {files}/nan.npz", UserError, "of finite floats"),
    ("--run {run} sample.top_k=0", UserError, "top_k must be between 1"),
])
def test_questions_that_make_no_sense(questioned, random_inception, monkeypatch, words, error, sentence):
    """Told before an image is looked at."""
    monkeypatch.setenv("TORCH_HOME", str(random_inception))
    monkeypatch.setattr(evaluate, "inception_features", lambda *_: pytest.fail("too late"))
    words = words.format(**questioned).split()
    with pytest.raises(error, match=sentence):
        evaluate.main(["--without", "lpips", "--num_workers", "0", *words])
    assert not list(questioned["files"].rglob("*a.npz*"))


def test_metrics_whose_weights_are_missing(questioned, tmp_path, monkeypatch, capsys):
    """The others are there, and these say why they are not."""
    stage1 = questioned["stage1"]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    monkeypatch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    evaluate.main(["--run", str(stage1), "--without", "lpips", "--num_workers", "0"])
    out = capsys.readouterr().out
    assert "PSNR" in out
    assert "without rFID, rsFID: Inception's weights could not be downloaded (no network); put the file weights-inception" in out
    assert f"into {tmp_path}/nothing/hub/checkpoints, or do without by --without inception" in out
    assert "put the file" in json.loads((stage1 / "metrics.json").read_text())["missing"]["rfid"]
    with pytest.raises(UserError, match="could not be downloaded"):
        evaluate.main(["--run", str(stage1), "--without", "lpips", "--num_workers", "0", "--save_statistics", str(tmp_path / "a.npz")])
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(FileNotFoundError, match="the package torch-fidelity is missing"):
        inception.load_inception()


def test_results_that_cannot_be_kept_are_printed(train, tmp_path, monkeypatch, capsys):
    train()
    monkeypatch.setattr(evaluate, "write_file", disk_is_full)
    evaluate.main(["--run", str(tmp_path / "run"), "--images", "2", "--without", "lpips", "inception"])
    told = capsys.readouterr().out
    assert "metrics.json could not be written (No space left on device)" in told and "PSNR" in told


def test_the_distance_while_a_model_learns(tmp_path, measured, tiny):
    """In two processes, it is what evaluate.py says afterwards."""
    forked(tmp_path, "train_stage1.py", "--config", tiny, "data.val_size=6", "train.validation_features=efficientnet_lite2",
           "train.max_train_steps=2", "train.validation_steps=1", processes=2)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    first, last = [line["val_rfd"] for line in lines if "val_rfd" in line]
    after = measured(tmp_path / "run", "--features", "efficientnet_lite2", "--without", "lpips")
    assert first != last == pytest.approx(after["rfd"], rel=1e-2)
