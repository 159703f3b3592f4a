"""Each number that evaluate.py gives equals one that was computed in another way, however the work is shared out."""

import json
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, TINY_MODELS, TRANSFORMERS, forked, save_stage1, write_tiny2
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch_fidelity import feature_extractor_inceptionv3 as inception

import evaluate
import sample
from dataset import make_dataset, to_uint8
from config import UserError
from experiment import load_run


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """A folder for TORCH_HOME with Inception's weights drawn at random, under the name of the real ones."""
    home = tmp_path_factory.mktemp("torch")
    (home / "hub/checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = inception.FeatureExtractorInceptionV3("", ["2048"])
    for parameter in network.parameters():
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter)
    torch.save(network.state_dict(), home / "hub/checkpoints" / inception.URL_INCEPTION_V3.rpartition("/")[2])
    return home


@pytest.fixture
def networks(random_inception, monkeypatch):
    """Both networks, with random weights."""
    import lpips

    def random_lpips(_):
        torch.manual_seed(0)
        return lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval().requires_grad_(False)

    monkeypatch.setenv("TORCH_HOME", str(random_inception))
    monkeypatch.setattr(inception.FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75)  # the least that the network takes: fast
    monkeypatch.setattr(evaluate, "load_lpips", random_lpips)
    monkeypatch.setattr(evaluate, "frechet_distance", frechet_by_hand)  # fast; evaluate.py's own runs in the tests' other processes


@pytest.fixture
def measured(capsys):
    """Runs evaluate.py in this process; what is in the run's metrics.json."""
    def run(folder, *args):
        AcceleratorState._reset_state(True)
        evaluate.main(["--run", str(folder), "--num_workers", "0", *map(str, args)])
        return json.loads((folder / "metrics.json").read_text())

    return run


def in_two_processes(tmp_path, home, *words):
    """evaluate.py with images as small as in `networks`."""
    (tmp_path / "driver.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import evaluate, launch, torch_fidelity.feature_extractor_inceptionv3 as inception\n"
        "inception.FeatureExtractorInceptionV3.INPUT_IMAGE_SIZE = 75\nlaunch.run_main(evaluate.main)\n")
    forked(tmp_path, tmp_path / "driver.py", *words, processes=2, TORCH_HOME=str(home))


def frechet_by_hand(a, b):
    """tr (A^T A B^T B)^(1/2) is the sum of the singular values of A B^T."""
    a, b = a.double(), b.double()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    a, b = (x.sub(x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b))
    return (mean + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()).item()


def numbers(metrics):
    return {k: v for k, v in metrics.items() if isinstance(v, (int, float)) and k != "images_per_second"}


def assert_same(a, b):
    assert numbers(a).keys() == numbers(b).keys()
    for key, value in numbers(a).items():
        assert value == pytest.approx(b[key], abs=1e-4, rel=1e-4), key


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
    found = evaluate.frechet_distance(gaussian(mean_a, a, 50), gaussian(mean_b, b, 80))
    assert found == pytest.approx(expected.item(), abs=1e-4)
    same = gaussian(mean_a, a, 50)
    assert evaluate.frechet_distance(same, same) == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="at least two images"):
        evaluate.frechet_distance(same[:1], same)


def test_quality_of_samples():
    torch.manual_seed(0)
    features, logits = torch.randn(40, 8), torch.randn(40, 10)
    own = evaluate.sample_quality(features, logits, features)
    assert own["fid"] == pytest.approx(0, abs=1e-6) and own["precision"] == own["recall"] == 1
    assert_same(own, evaluate.sample_quality(features.flip(0), logits.flip(0), features))  # the order of the samples says nothing
    far = evaluate.sample_quality(features[:20] + 100, logits[:20], features)
    assert far["precision"] == far["recall"] == 0 and far["fid"] == pytest.approx(frechet_by_hand(features[:20] + 100, features), rel=1e-6)
    # By hand: a point is covered if it lies in the ball around another that reaches that one's third neighbour
    some = features[:20] + 0.5
    balls = {name: torch.cdist(x, x).sort(1).values[:, 3] for name, x in (("some", some), ("all", features))}
    mixed = evaluate.sample_quality(some, logits[:20], features)
    assert mixed["precision"] == pytest.approx((torch.cdist(some, features) <= balls["all"]).any(1).float().mean().item())
    assert mixed["recall"] == pytest.approx((torch.cdist(features, some) <= balls["some"]).any(1).float().mean().item())
    assert evaluate.sample_quality(features, 100 * torch.eye(40), features)["is"] == pytest.approx(4)  # four in each of ten splits
    assert evaluate.sample_quality(features, torch.zeros(40, 10), features)["is"] == pytest.approx(1)


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
    assert found["codes"] == pytest.approx(np.mean([len(u) for u in used])) and found["images"] == 11
    assert found["codes_std"] == pytest.approx(np.std([len(u) for u in used]))
    counts = np.bincount(sum(used, []), minlength=32)
    p = counts[counts > 0] / counts.sum()
    assert found["usage"] == pytest.approx((counts > 0).mean()) and found["usage_65536"] == found["usage"]
    assert found["perplexity"] == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    if name == "mqvae":
        assert found["kept_ratio"] == 0.25
    assert ("detail" in found) == ("shared" in found) == ("positions" in codes or "grain" in codes)
    if "shared" in found:
        levels = (codes["grain"] if "grain" in codes else torch.zeros(11, 64).scatter(1, codes["positions"], 1)).flatten(1).numpy()
        sizes = int((256 / levels.shape[1]) ** 0.5)
        squares = images.double().unfold(2, sizes, sizes).unfold(3, sizes, sizes).flatten(4)
        contrast = squares.std(4, correction=0).mean(1).flatten(1).numpy()
        won = [[float(c[a] > c[b]) + 0.5 * float(c[a] == c[b]) for a in range(len(c)) for b in range(len(c)) if v[a] > v[b]]
               for c, v in zip(contrast, levels)]
        assert found["detail"] == pytest.approx(np.mean([np.mean(w) for w in won if w]), abs=1e-4)
        kept = [set(np.flatnonzero(v)) for v in levels]
        common = sum(len(a & b) for a in kept for b in kept) - sum(map(len, kept))
        assert found["shared"] == pytest.approx(common / 10 / sum(map(len, kept)))
    for g in range(1, getattr(model, "grains", 1)):
        shares = (codes["grain"] == g).float().mean((1, 2))
        assert found[f"ratio_{g}"] == pytest.approx(shares.mean().item()) and found["codes_std"] > 0
        assert found[f"ratio_{g}_std"] == pytest.approx(shares.std(correction=0).item())


# ---------------------------------------------------------------------------------------------------------------------
# From a run to the table


def test_stage1_whoever_does_what(tmp_path, measured, networks, random_inception, capsys):
    """Batches, processes and bf16; several runs in one table."""
    run = save_stage1(tmp_path, "dqvae_entropy", val_size=5)
    whole = measured(run, "--batch_size", 5)
    assert whole["rfid"] > 0 and whole["lpips"] > 0 and whole["missing"] == {}
    assert_same(whole, measured(run, "--batch_size", 3))
    words = ["--run", run, "--batch_size", "2", "--num_workers", "1", "--without", "lpips"]
    in_two_processes(tmp_path, random_inception, *words)
    two = json.loads((run / "metrics.json").read_text())
    assert "left out" in two["missing"]["lpips"]
    assert_same({k: v for k, v in whole.items() if not k.startswith("lpips")}, two)
    assert measured(run, "--bf16", "--without", "lpips", "inception")["psnr"] == pytest.approx(whole["psnr"], abs=0.5)

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
    assert lines[0].startswith("| run | model | images | PSNR (dB) |") and lines[3].startswith("| stage1_vqgan | vqgan | 5 |")


@pytest.mark.parametrize("name", list(TRANSFORMERS))
def test_stage2_of_every_model(tmp_path, measured, train2, networks, random_inception, name):
    train2(write_tiny2(tmp_path, name), "train.max_train_steps=1", "data.val_size=4")
    run = tmp_path / "run2"
    if name != "gpt":
        found = measured(run, "-n", 3, "--without", "inception", "--images", 5)
        assert found["bits"] > 0 and found["images_per_second"] > 0 and set(found["missing"]) == {"fid", "is", "precision", "recall"}
        return
    drawn = measured(run, "--seed", 3)
    assert drawn["samples"] == drawn["images"] == 4 and drawn["fid"] > 0 and drawn["is"] >= 1 and drawn["missing"] == {}
    model, config = load_run(run)
    stage1, _ = load_run(run / "stage1")
    pairs = [make_dataset(**config["data"], split="val")[i] for i in range(4)]
    with torch.no_grad():
        bits = model.bits(stage1.encode(torch.stack([p[0] for p in pairs])), torch.tensor([p[1] for p in pairs]))
    assert drawn["bits"] == pytest.approx(bits.mean().item(), abs=1e-3)
    # The same images from files; shared out otherwise; in another order
    folder = ["--run", str(run), "-n", "4", "--seed", "3", "--out"]
    sample.main([*folder, str(tmp_path / "files")])
    sample.main([*folder, str(tmp_path / "files.npz")])
    assert_same(drawn, measured(run, "--samples", tmp_path / "files", "--batch_size", 3))
    np.savez(tmp_path / "flipped.npz", np.load(tmp_path / "files.npz")["arr_0"][::-1])
    assert_same(drawn, measured(run, "--samples", tmp_path / "flipped.npz"))
    words = ["--run", run, "--seed", "3", "--batch_size", "2", "--num_workers", "0"]
    in_two_processes(tmp_path, random_inception, *words)
    assert_same(drawn, json.loads((run / "metrics.json").read_text()))
    greedy = measured(run, "-n", 5, "sample.temperature=0")
    assert greedy["samples"] == 5 and greedy["images"] == greedy["real_images"] == 4 and greedy["fid"] != drawn["fid"]
    with pytest.raises(UserError, match="need 4 samples and 4 images; there are 3 and 4"):
        measured(run, "-n", 3)


def test_questions_that_make_no_sense(tmp_path, train2, random_inception, monkeypatch, capsys):
    train2(write_tiny2(tmp_path, "gpt"), "train.max_train_steps=1", "data.val_size=12")
    run, stage1 = tmp_path / "run2", tmp_path / "stage1_vqgan"
    monkeypatch.setenv("TORCH_HOME", str(random_inception))
    (tmp_path / "empty").mkdir()
    (tmp_path / "small").mkdir()
    Image.new("RGB", (8, 16)).save(tmp_path / "small/a.png")
    np.savez(tmp_path / "float.npz", np.zeros((2, 16, 16, 3)))
    np.savez(tmp_path / "large.npz", np.zeros((2, 32, 32, 3), np.uint8))
    (tmp_path / "text.npz").write_text("no")
    (tmp_path / "nothing.npz").write_bytes(b"")
    np.savez(tmp_path / "none.npz", np.zeros((0, 16, 16, 3), np.uint8))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/000000.png").write_bytes(b"")
    for words, sentence in (
            (["--run", tmp_path], "not a run folder"),
            (["--run", stage1, f"data.root={tmp_path}/empty", "data.name=folder"], "no images for the val split"),
            (["--run", stage1, f"data.root={tmp_path}/nowhere", "data.name=folder"], "there is no folder"),
            (["--run", stage1, "data.image_size=15"], "data.image_size must be divisible by 2"),
            (["--run", stage1, "data.imagesize=16"], "the nearest valid one is 'data.image_size'|nearest valid one is data.image_size"),
            (["--run", stage1, "sample.top_k=3"], "unknown section 'sample'"),
            (["--run", stage1, "--samples", tmp_path / "small"], "stage-2 run"),
            (["--run", stage1, "--images", "0"], "must be at least 1"),
            (["--run", run, "--samples", tmp_path / "small"], "a.png has 8 x 16 pixels, but the data that it is compared with 16 x 16"),
            (["--run", run, "--samples", tmp_path / "large.npz"], "image 0 of .*large.npz has 32 x 32 pixels"),
            (["--run", run, "--samples", tmp_path / "float.npz"], "holds float64"),
            (["--run", run, "--samples", tmp_path / "text.npz"], "is not an .npz of images"),
            (["--run", run, "--samples", tmp_path / "nothing.npz"], "is not an .npz of images"),
            (["--run", run, "--samples", tmp_path / "none.npz"], "holds uint8 .0, 16, 16, 3. instead of images"),
            (["--run", run, "--samples", tmp_path / "broken"], "cannot read .*000000.png .*remove it from the samples"),
            (["--run", run, "--samples", tmp_path / "empty"], "there are no images in"),
            (["--run", run, "--samples", tmp_path / "nowhere"], "there are no images in"),
            (["--run", run, "sample.top_k=0"], "top_k must be between 1")):
        with pytest.raises((UserError, Exception), match=sentence) as raised:
            evaluate.main([str(w) for w in [*words, "--without", "lpips", "--num_workers", "0"]])
        assert type(raised.value).__name__ in ("UserError", "DataError")
    # Without weights: the other metrics are there, and the missing ones say why
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    capsys.readouterr()
    evaluate.main(["--run", str(stage1), "--without", "lpips", "--num_workers", "0"])
    out = capsys.readouterr().out
    assert "PSNR" in out and "without rFID: Inception's weights could not be downloaded (no network); put the file weights-inception" in out
    assert f"into {tmp_path}/nothing/hub/checkpoints, or do without by --without inception" in out
    assert "put the file" in json.loads((stage1 / "metrics.json").read_text())["missing"]["rfid"]
