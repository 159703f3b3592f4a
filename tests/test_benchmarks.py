"""benchmarks/gpu.py at toy size on the CPU, and the figures of benchmarks/detail.py and costs.py."""

import argparse
import json
import math
import os
import sys
import time
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, command, save_stage1
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(ROOT / "benchmarks"))
import costs
import detail
import gpu
from training import stage1_step

from dataset import make_dataset
from harness import guard
from harness.config import UserError, load_config
from harness.models import load_run
from harness.settings import STAGE1_SECTIONS


def test_every_part_runs_at_toy_size(tmp_path):
    command(sys.executable, "benchmarks/gpu.py", "--minutes", "8", "--out", tmp_path, env={"OMP_NUM_THREADS": "1"})
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {row["part"] for row in rows} == set(gpu.PARTS)
    assert all(row.get("result", "agrees") in ("agrees", "trains", "ran", "2 passed") for row in rows), rows
    for part in ("stage1", "stage2", "sampling", "data"):
        assert all(float(row["images/s"]) > 0 for row in rows if row["part"] == part)
    text = (tmp_path / "gpu.md").read_text()
    assert "**Toy sizes on the CPU" in text and "MFU" not in text
    assert all(f"## {part}" in text for part in gpu.PARTS) and text.count("\n| ") == len(rows) + 2 * len(gpu.PARTS)


def test_a_part_reports_errors_and_what_it_has_no_time_for(monkeypatch):
    def fails():
        raise ValueError("out of memory")

    def part(device, args):
        yield "fails", fails
        yield "works", lambda: {"result": 1}
        yield "crashes", lambda: os._exit(3)

    def slow(device, args):
        yield "works", lambda: {"result": 2}
        yield "hangs", lambda: time.sleep(60)

    monkeypatch.setattr(gpu, "PARTS", {"part": part, "slow": slow})
    rows = [*gpu.in_process("part", argparse.Namespace(), 30.0), *gpu.in_process("slow", argparse.Namespace(), 3.0)]
    assert [row for row in rows if "device" in row] == [{"device": "cpu"}] * 2
    assert [(row["what"], row["result"]) for row in rows if "what" in row] == [
        ("fails", "ValueError: out of memory"), ("works", 1), ("the rest", "ended with exit code 3"), ("works", 2),
        ("the rest", "no time left")]


def test_what_differs_is_told(tmp_path):
    same = torch.tensor([1.0, -2.0, 0.5])
    assert gpu.verdict("no", 1.0, {"loss": (same, same + 1e-3)})["result"] == "agrees"
    for precision, equal, other in (("no", 1.0, same + 3e-3), ("no", 0.9, same), ("bf16", 0.9, same + 0.2), ("no", 1.0, same * torch.nan)):
        assert gpu.verdict(precision, equal, {"loss": (same, other)})["result"] == "DIFFERS"
    runs = {"a": [3.0, 2.0, 1.0], "b": [9.0, 2.0, 1.0005], "c": [3.0, 2.0, 1.01], "d": [3.0, 2.0, math.nan], "e": [1.0]}
    for name, losses in runs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps({"loss": loss}) + "\n" for loss in losses))
    told = [gpu.difference(tmp_path / "a", tmp_path / other)["result"] for other in "abcde"]
    assert told == ["agrees", "agrees", "DIFFERS", "DIFFERS", "DIFFERS"]


def test_waiting_is_told(monkeypatch):
    """From the third step on, and not torch's word about what the mode can do."""
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(guard.Guard, "begin", lambda self: None)
    monkeypatch.setattr(guard.Guard, "end", lambda self, step: None)

    def train(text):
        for step in range(4):
            guard.Guard.begin(None)
            if modes[-1] == "warn":
                warnings.warn(text, stacklevel=1)
            guard.Guard.end(None, step)

    for text, told in (("called a synchronizing CUDA operation", "waits at test_benchmarks.py:"),
                       ("does not yet detect all synchronizing operations", "does not wait")):
        modes.clear()
        found = gpu.without_waiting(lambda text=text: train(text), torch.device("cuda"))
        assert modes == ["default"] * 4 + ["warn", "default"] * 2 + ["default"]
        assert found["watched steps"] == 2 and found["result"].startswith(told)


@pytest.mark.parametrize("name", ["mqvae", "dqvae_triple"])
def test_where_codes_go_against_counting_by_hand(tmp_path, capsys, name):
    run = save_stage1(tmp_path, name, val_size=11)
    detail.main([str(run), "data.seed=3"])
    row = capsys.readouterr().out.splitlines()[-1].strip("| %").split(" | ")
    model, config = load_run(run)
    data = make_dataset(**config["data"] | {"seed": 3}, split="val")
    images = torch.stack([image for image, _ in data])
    with torch.no_grad():
        codes = model.encode(images)
    if name == "mqvae":
        levels = torch.zeros(11, 64).scatter(1, codes["positions"], 1).numpy()
    else:
        levels = codes["grain"].flatten(1).numpy()
    side = int((256 / levels.shape[1]) ** 0.5)
    squares = images.double().unfold(2, side, side).unfold(3, side, side).flatten(4)
    contrasts = squares.std(4, correction=0).mean(1).flatten(1).numpy()
    shares = []
    for contrast, level in zip(contrasts, levels):
        pairs = np.argwhere(level[:, None] > level)
        wins = [(contrast[a] > contrast[b]) + 0.5 * (contrast[a] == contrast[b]) for a, b in pairs]
        shares += [np.mean(wins)] if wins else []
    kept = [set(np.flatnonzero(level)) for level in levels]
    count = sum(map(len, kept))
    common = sum(len(a & b) for a in kept for b in kept) - count
    assert row[:2] == [run.name, "11"]
    assert float(row[2].strip("%")) == pytest.approx(100 * np.mean(shares), abs=0.11)
    assert float(row[3]) == pytest.approx(100 * common / 10 / count, abs=0.11)


def test_detail_is_of_models_that_choose(tmp_path):
    with pytest.raises(UserError, match="chooses no places"):
        detail.main([str(save_stage1(tmp_path, "vqgan"))])


def test_arithmetic_against_counting_by_hand():
    """Products of gradients of inputs only where an input has one."""
    conv, linear = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Linear(4, 5)
    images = torch.rand(2, 3, 8, 8)
    heads = torch.rand(1, 2, 6, 8, requires_grad=True)
    of_conv = 2 * (2 * 8 * 8) * 3 * 4 * 9
    of_linear = 2 * (2 * 8 * 8) * 4 * 5
    of_product = 2 * 2 * 6 * 6 * 8
    assert costs.count(lambda: conv(images).sum().backward()) == 2 * of_conv
    assert costs.count(lambda: linear(conv(images).permute(0, 2, 3, 1)).sum().backward()) == 2 * of_conv + 3 * of_linear
    for causal in (False, True):
        attend = partial(F.scaled_dot_product_attention, heads, heads, heads, is_causal=causal)
        assert costs.count(lambda attend=attend: attend().sum().backward()) == 6 * of_product


def test_what_is_not_done_is_counted():
    words = [*costs.ONE_IMAGE, "model.ch=32", "data.image_size=32", "loss.perceptual_weight=0", "loss.disc_weight=0.5"]
    config = load_config(str(ROOT / "configs/quickstart/vqvae.yaml"), words, STAGE1_SECTIONS)
    step = stage1_step(config, costs.CPU)
    with FlopCounterMode(display=False) as counter:
        step()
    assert costs.count(step) == counter.get_total_flops() > 0


def test_parameters_and_arithmetic_of_configs(capsys, monkeypatch):
    """Against sums by hand; GPT's by the formula for transformers, whose layers have 12 C^2 weights."""
    monkeypatch.setattr(costs.losses, "load_lpips", None)  # main replaces it
    paths = [ROOT / f"configs/quickstart/{name}.yaml" for name in ("vqvae", "gpt")]
    ch, half, D, K = 64, 32, 16, 1024
    convs = 3 * half * 16 + half * ch * 16 + ch * ch * 9 + half + 2 * ch
    transposed = ch * ch * 9 + ch * half * 16 + half * 3 * 16 + ch + half + 3
    parameters, of_discriminator, *_ = costs.stage1(paths[0])
    assert parameters == convs + transposed + 4 * ch * ch * 10 + ch * D + D + D * ch + ch + K * D
    assert of_discriminator == 0

    C, T = 128, 256
    weights = 4 * 12 * C**2 + C * K  # layers, head
    parameters, _, flops, _ = costs.stage2(paths[1])
    assert parameters == weights + 4 * 13 * C + 2 * C + C * (K + T + 11)  # biases and norms; embeddings
    assert flops == 3 * (2 * weights * T + 4 * 4 * T * T * C)

    costs.main([*map(str, paths), "--tflops", "1", "--share", "0.5"])
    header, line, *rows = ([cell.strip() for cell in row.split("|")[1:-1]] for row in capsys.readouterr().out.splitlines())
    assert len(header) == len(line) and rows[0][:3] == ["`quickstart/vqvae.yaml`", "0.32 M", ""]
    assert [costs.rounded(x) for x in (0.123, 9.96, 1234.4)] == ["0.12", "10.0", "1,234"]
    hours = 16_000 * flops / 0.5e12 / 3600
    assert rows[1] == ["`quickstart/gpt.yaml`", "1.1 M", "", costs.rounded(flops / 1e9), "0.016 M", costs.rounded(hours)]


def test_images_of_a_training():
    train = {"train_batch_size": 4, "gradient_accumulation_steps": 2, "max_train_steps": None, "num_train_epochs": 2}
    config = {"train": train, "data": {"name": "ffhq"}}
    assert costs.training_images(config) == 120_000
    assert costs.training_images(config | {"train": train | {"max_train_steps": 100}}) == 800
    config["data"]["name"] = "folder"
    with pytest.raises(UserError, match="max_train_steps"):
        costs.training_images(config)
    assert costs.training_images(config | {"train": train | {"max_train_steps": 100}}) == 800


def test_codes_of_an_average_image(tmp_path):
    model, config = load_run(save_stage1(tmp_path, "dqvae_triple"))
    grain = costs.codes_of_one_image(model, config["data"]["image_size"])["grain"]
    assert [(grain == g).sum().item() for g in (1, 2)] == [round(0.3 * grain.numel())] * 2
