"""benchmarks/gpu.py at toy size on the CPU, and the figures of benchmarks/detail.py."""

import argparse
import json
import math
import os
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from conftest import ROOT, command, save_stage1

sys.path.append(str(ROOT / "benchmarks"))
import detail
import gpu

from dataset import make_dataset
from harness import guard
from harness.config import UserError
from harness.models import load_run


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
