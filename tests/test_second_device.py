"""All scripts as on a GPU: see second_device.py for what a tensor on the wrong device does."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import TINY_MODELS, write_tiny, write_tiny2
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image
from second_device import DEVICE, WrongDevice, second_device
from test_convert import TAMING, taming_state, write
from test_quantizers import ALL as QUANTIZERS
from torch import nn

import convert
import evaluate
import sample
import visualize
from dataset import make_dataset
from gpt import Cache
from harness import features, figures
from harness.models import load_run
from quantizers import gradient_norms

QUICK = ["--num_workers", "0", "--batch_size", "4"]
RANGES = {"mqvae": "model.topk_ratio=[0.1,0.9]", "dqvae": "model.ratios=[[0.1,0.9]]"}
RESUMED = ("gpt", "mask_dqvae")
KEEPS = {"gpt": "0,0,1,0.5", "stackformer": "0,0,1,0.5", "dq_transformer": "coarse", "mask_vqgan": "0,0,0.5,0.5",
         "mask_mqvae": "0,0,0.5,1"}


class SmallInception(nn.Module):
    """With outputs as Inception's, but fewer, and the layer that sFID looks at."""

    def __init__(self):
        super().__init__()
        self.Mixed_6d = nn.Module()
        self.Mixed_6d.branch1x1 = nn.Conv2d(3, 8, 1)
        self.pool = nn.Linear(3, 32)
        self.logits = nn.Linear(3, 10)
        self.requires_grad_(False)

    def forward(self, images):
        images = images.float() / 255
        self.Mixed_6d.branch1x1(nn.functional.adaptive_avg_pool2d(images, 3))
        colours = images.mean((2, 3))
        return self.pool(colours), self.logits(colours)


class SmallLPIPS(nn.Module):
    def __init__(self, *_):
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3)

    def forward(self, a, b):
        return (self.features(a) - self.features(b)).square().mean((1, 2, 3), keepdim=True)


@pytest.fixture
def device(monkeypatch):
    """Everything in a test happens on the second device, where the scripts would use a GPU."""
    monkeypatch.setattr(Accelerator, "device", DEVICE)
    monkeypatch.setattr(figures, "DEVICE", "cuda")
    monkeypatch.setattr(visualize, "DEVICE", "cuda")
    monkeypatch.setattr(Cache, "graphs", False)
    monkeypatch.setattr(evaluate, "load_inception", SmallInception)
    monkeypatch.setattr(evaluate, "load_lpips", SmallLPIPS)
    monkeypatch.setattr("losses.load_lpips", SmallLPIPS)
    # Fast: fewer features, a simple distance, and figures without a layout
    monkeypatch.setattr(features, "frechet_distance", lambda a, b: float(np.abs(a["mu"] - b["mu"]).sum()))
    monkeypatch.setattr(features, "SPATIAL", 7 * 3 * 3)
    monkeypatch.setattr(features, "FEATURES", 32)
    monkeypatch.setitem(evaluate.PARTS, "inception", {"fid": slice(32), "sfid": slice(32, None)})
    monkeypatch.setattr(ConstrainedLayoutEngine, "execute", lambda *_: None)
    with second_device():
        yield DEVICE
    AcceleratorState._reset_state(True)


def measured(run, *words):
    evaluate.main(["--run", str(run), *QUICK, *map(str, words)])
    return json.loads((run / "metrics.json").read_text())


def drawn(command, run):
    page, few = command == "interactive", {"codebook": "--images", "rate": "--images"}.get(command, "-n")
    visualize.main([command, "--run", str(run), few, "1", *([] if page else ["--dpi", "20"])])
    assert (run / f"figures/{command}.{'html' if page else 'png'}").stat().st_size > 1000


@pytest.fixture
def reference(tmp_path):
    images = np.random.default_rng(0).integers(256, size=(5, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=images)
    return tmp_path / "reference.npz"


# ---------------------------------------------------------------------------------------------------------------------


def test_what_a_gpu_refuses():
    with second_device():
        ours, theirs, order = torch.ones(3), torch.ones(3, device="cuda"), torch.arange(3)
        for refused in (lambda: ours + theirs, lambda: ours.add_(theirs[0]), lambda: torch.stack([ours[0], theirs[0]]),
                        lambda: ours[order.cuda()], lambda: theirs.__setitem__(order, ours), theirs.pin_memory,
                        lambda: torch.rand(3, device="cuda", generator=torch.Generator()), lambda: nn.Linear(3, 1).to("cuda")(ours)):
            with pytest.raises(WrongDevice):
                refused()
        for refused in (theirs.numpy, lambda: np.asarray(theirs)):
            with pytest.raises(TypeError, match="numpy"):
                refused()
        theirs[:2] = ours[:2] + 1
        theirs[order[:1]] = 7.0
        assert (theirs * ours.sum()).tolist() == [21, 6, 3]
        assert theirs[order].device == DEVICE and ours[order.cuda()[0]].device.type == "cpu"
        assert theirs.cpu().numpy().tolist() == theirs.to("cpu").tolist() == [7, 2, 1] and theirs.is_cuda and not ours.is_cuda


@pytest.mark.parametrize("name", ["vqgan", "vqvae", "mqvae", "dqvae", "dqvae_entropy"])
def test_stage1(device, tmp_path, train, reference, name):
    config, run = write_tiny(tmp_path, model=TINY_MODELS[name]), tmp_path / "run"
    rates = [RANGES[name]] if name in RANGES else []
    words = [*rates, "loss.disc_start=0", "loss.perceptual_weight=0.1", "loss.lecam_weight=0.1", "train.use_ema=true",
             "train.validation_steps=2", "train.codebook_stats_every=2", "train.calibration_images=8"]
    train(*words, "train.max_train_steps=1", config=config)
    before = load_run(run)[0].last_layer
    train(*words, "train.max_train_steps=2", config=config, resume="auto")
    assert not load_run(run)[0].last_layer.equal(before)  # it is the weights on the device that learn
    found = measured(run, "--reference", reference, *(["--rates", "0.2,0.8"] if rates else []))
    assert all(metrics["rfid"] > 0 for metrics in (found["rates"].values() if rates else [found]))
    for command in ("codes", *(["ladder"] if rates else [])):
        drawn(command, run)
    if name in ("vqgan", "dqvae"):
        measured(run, "--save_statistics", tmp_path / "statistics.npz")
        for command in ("codebook", "recon", "rate", "interactive"):
            drawn(command, run)


@pytest.mark.parametrize("name", ["gpt", "stackformer", "dq_transformer", "mask_vqgan", "mask_mqvae", "mask_dqvae"])
def test_stage2(device, tmp_path, train2, reference, name):
    config, run = write_tiny2(tmp_path, name), tmp_path / "run2"
    words = ["data.train_size=8", "data.val_size=4", "sample.rows=1", "sample.columns=1"]
    train2(config, *words, "train.max_train_steps=1", "codes.cache=false", f"train.output_dir={tmp_path}/uncached")
    words += ["train.use_ema=true", "train.gradient_accumulation_steps=2"]
    train2(config, *words, "train.max_train_steps=1")
    if name in RESUMED:
        train2(config, *words, "train.max_train_steps=2", resume="auto")
    found = measured(run, "-n", "4", "--reference", reference)
    assert found["bits"] > 0 and found["real_images_from"] == "reference.npz"
    pixels = make_dataset("shapes", image_size=16, uint8=True)[1][0].permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (8, 0, 16, 16))
    mask.save(tmp_path / "mask.png")
    keep = ["--keep", KEEPS[name]] if name in KEEPS else ["--mask", str(tmp_path / "mask.png")]
    sample.main(["--run", str(run), "-n", "1", "--no_graphs", "--image", str(tmp_path / "photo.png"), *keep])
    assert (run / "samples/seed_0/grid.png").is_file()
    drawn("sequence", run)
    if name in RESUMED:
        sample.main(["--run", str(run), "-n", "2", "--cfg", "2", "--no_graphs", "--out", str(tmp_path / "samples.npz")])
        assert measured(run, "--samples", tmp_path / "reference.npz")["real_images_from"] == "val"


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizer(device, name):
    quantizer = QUANTIZERS[name]().to(device)
    z = torch.randn(2, 4, 4, quantizer.dim, device=device, requires_grad=True)
    z_q, indices, losses, _ = quantizer(z)
    (z_q.sum() + sum(losses.values())).backward()
    assert z.grad.device == quantizer.lookup(quantizer.nearest(z)).device == device
    if hasattr(quantizer, "codebook"):
        assert gradient_norms(quantizer, z.detach(), indices).device == device


def test_a_converted_run(device, tmp_path):
    checkpoint, run = write(tmp_path / "last.ckpt", taming_state(), TAMING), tmp_path / "vqgan"
    convert.main(["vqgan_taming", str(checkpoint), "--config", str(checkpoint.with_suffix(".yaml")), "--out", str(run),
                  "--data", "name=shapes", "train_size=20", "val_size=4"])
    assert measured(run)["rfid"] > 0
