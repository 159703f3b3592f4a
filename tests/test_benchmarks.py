"""benchmarks/gpu.py at toy size on the CPU."""

import argparse
import json
import os
import sys
import time

from conftest import ROOT, command

sys.path.append(str(ROOT / "benchmarks"))
import gpu


def test_every_part_runs_at_toy_size(tmp_path):
    command(sys.executable, "benchmarks/gpu.py", "--minutes", "8", "--out", tmp_path, env={"OMP_NUM_THREADS": "1"})
    rows = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["part"] for row in rows} == set(gpu.PARTS)
    assert all(row.get("result", "agrees") in ("agrees", "trains", "ran", "2 passed") for row in rows), rows
    for part in ("stage1", "stage2", "sampling", "data"):
        assert all(float(row["images/s"]) > 0 for row in rows if row["part"] == part)
    text = (tmp_path / "gpu.md").read_text()
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
    assert [(row["what"], row["result"]) for row in rows] == [
        ("fails", "ValueError: out of memory"), ("works", 1), ("the rest", "ended with exit code 3"), ("works", 2),
        ("the rest", "no time left")]
