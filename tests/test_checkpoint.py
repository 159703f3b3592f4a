"""Checkpoints are written whole or not at all, verified, and nothing in them runs. benchmarks/faults.py kills for longer."""

import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import broken_script, disk_is_full, forked, metrics, weights, write_tiny2
from safetensors import SafetensorError

from harness import checkpoint
from harness.checkpoint import wanted_checkpoint, write_weights
from harness.config import UserError
from harness.models import load_run, save_run


# Kills


def test_killed_runs_lose_nothing(tmp_path):
    """SIGKILL amid checkpoints, caches and renames, of both stages, and code that looks at the result; see there."""
    assert "losses: 0" in forked(tmp_path, "benchmarks/faults.py", "kills", "--minutes", "0", "--seed", "1")


def test_what_a_kill_left_unfinished_is_removed(train, tmp_path):
    left = tmp_path / "run/checkpoints/.step_00000005"
    left.mkdir(parents=True)
    train()
    assert not left.exists()


# Full disks


def full_for_torch(*args, **kwargs):
    raise RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0: file write failed")


def full_for_safetensors(*args, **kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("what, error", [("harness.checkpoint.save_file", full_for_safetensors), ("torch.save", full_for_torch),
                                         ("harness.checkpoint.write_manifest", disk_is_full)])
def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(train, tmp_path, monkeypatch, what, error):
    one = ["train.checkpoints_total_limit=1"]
    train(*one, "train.max_train_steps=3", f"train.output_dir={tmp_path}/run")
    before = weights(tmp_path / "run", 3)
    with monkeypatch.context() as patch:
        patch.setattr(what, error)
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10_000))
        with pytest.raises(UserError) as told:
            train(*one, resume="auto")
    size = sum(p.stat().st_size for p in (tmp_path / "run/checkpoints/step_00000003").iterdir()) / 1e6
    found = re.search(r"needs about (\S+) MB, .* has 0.0 MB free, so (\S+) MB are missing", str(told.value))
    needs, missing = map(float, found.groups())
    assert "the checkpoint of step 6 could not be written" in str(told.value) and "--resume auto" in str(told.value)
    assert 0.8 * size < needs <= size and missing == needs
    assert sorted(os.listdir(tmp_path / "run/checkpoints")) == ["best.safetensors", "step_00000003"]
    assert all(torch.equal(before[k], v) for k, v in weights(tmp_path / "run", 3).items())
    train(*one, resume="auto")
    assert "step_00000006" in os.listdir(tmp_path / "run/checkpoints")


def test_the_oldest_checkpoint_goes_after_the_newest_is_on_the_disk(train, tmp_path, monkeypatch):
    done = []
    for module, name in ((os, "fsync"), (os, "replace"), (shutil, "rmtree")):
        def noted(*args, original=getattr(module, name), name=name, **kwargs):
            path = Path(os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else args[-1])
            done.extend([(name, path.name)] if name == "replace" or path.exists() else [])
            return original(*args, **kwargs)
        monkeypatch.setattr(module, name, noted)
    train("train.checkpoints_total_limit=1")
    kept = done.index(("replace", "step_00000006"))
    assert {"model.safetensors", "optimizer.bin", "checkpoint.json", ".step_00000006"} <= {n for what, n in done[:kept] if what == "fsync"}
    assert ("rmtree", "step_00000003") in done[kept:] and ("rmtree", "step_00000003") not in done[:kept]


def test_a_full_disk_of_one_process_ends_both(tmp_path):
    output = forked(tmp_path, *broken_script(tmp_path, """
save, calls = checkpoint.save_file, []
def full(*args):
    calls.append(0)
    if len(calls) > 2:  # model and discriminator of the second checkpoint
        raise OSError(28, "No space left on device")
    save(*args)
checkpoint.save_file = full
"""), processes=2, status=1)
    assert output.count("error: the checkpoint of step 6 could not be written ([Errno 28] No space left on device): it needs about") == 2
    assert sorted(os.listdir(tmp_path / "run/checkpoints")) == ["best.safetensors", "step_00000003"]
    assert not checkpoint.damage(tmp_path / "run/checkpoints/step_00000003")


# Damage


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage, told", [
    (lambda c: (c / "model.safetensors").write_bytes((c / "model.safetensors").read_bytes()[:-100]), "bytes instead of"),
    (lambda c: (c / "optimizer.bin").unlink(), "optimizer.bin is missing"),
    (lambda c: (c / "checkpoint.json").write_text("{"), "checkpoint.json is missing or unreadable"),
    (lambda c: flip(c / "discriminator.safetensors"), "discriminator.safetensors has changed"),
])
def test_damaged_checkpoint_falls_back_to_the_one_before(train, tmp_path, capsys, damage, told):
    train()
    checkpoints = tmp_path / "run/checkpoints"
    want = weights(tmp_path / "run", 6)
    damage(checkpoints / "step_00000006")
    load_run(tmp_path / "run")
    assert told in capsys.readouterr().out
    train(resume="auto")
    output = capsys.readouterr().out
    assert f"{checkpoints}/step_00000006 is damaged" in output and told in output and "from step 3" in output
    assert all(torch.equal(v, want[k]) for k, v in weights(tmp_path / "run", 6).items())  # written again, whole
    for folder in checkpoints.glob("step_*"):
        damage(folder)
    with pytest.raises(UserError, match="no checkpoint in .* is whole"):
        train(resume="auto")


def test_a_damaged_best_is_told_and_replaced(train, tmp_path, capsys):
    train("train.max_train_steps=3")
    best = tmp_path / "run/checkpoints/best.safetensors"
    best.write_bytes(best.read_bytes()[:100])
    train(resume="auto")
    assert "best.safetensors is damaged" in capsys.readouterr().out
    assert load_run(tmp_path / "run", "best")[0].state_dict().keys()


@pytest.mark.parametrize("manifest", [
    "[]", '{"step": "../../x", "files": {}}', '{"step": 3, "files": []}', '{"step": 3, "files": {"a": 1}}', "[" * 100_000,
    '{"step": null, "files": {}}', '{"step": 3, "bad_row": [], "files": {}}',
    '{"step": 3, "files": {"../run/config.yaml": [1, "x"]}}', '{"step": 3, "files": {"/etc/passwd": [1, "x"]}}',
    '{"step": -3, "files": {"model.safetensors": [1, "x"]}}', '{"step": 3, "files": {}}',
    '{"step": 3, "bad_row": 1000000000000000000000000000000, "files": {"model.safetensors": [1, "x"]}}',
])
def test_a_strange_manifest_is_damage(tmp_path, manifest):
    (tmp_path / "checkpoint.json").write_text(manifest)
    assert checkpoint.damage(tmp_path) == "checkpoint.json is missing or unreadable"


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


@pytest.mark.parametrize("name", ["custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin"])
def test_code_in_a_checkpoint_does_not_run(train, tmp_path, monkeypatch, name):
    """Even if its checksum is right."""
    monkeypatch.setenv("BOMB", str(tmp_path / "went off"))
    train("train.max_train_steps=3")
    folder = tmp_path / "run/checkpoints/step_00000003"
    torch.save({"ema": Bomb(), "state": Bomb()}, folder / name)
    (folder / "checkpoint.json").unlink()
    checkpoint.write_manifest(folder, 3)
    with pytest.raises(UserError, match="more than tensors and numbers, and was not loaded"):
        train(resume="auto")
    assert not (tmp_path / "went off").exists()


# Which checkpoint a run goes on from


@pytest.fixture
def third(tmp_path):
    """A run folder with the checkpoint of step 3."""
    write_weights(tmp_path / "run/checkpoints/step_00000003", {"model": {"w": torch.zeros(1)}})
    return tmp_path / "run"


@pytest.mark.parametrize("word, meant", [
    (None, None),
    *((word, "auto") for word in ("auto", "latest", "RUN", "RUN/", "RUN/checkpoints")),
    *((word, "RUN/checkpoints/step_00000003") for word in (
        "step_00000003", "RUN/checkpoints/step_00000003", "RUN/checkpoints/step_00000003/")),
])
def test_what_can_be_resumed(third, word, meant):
    word = word and word.replace("RUN", str(third))
    assert wanted_checkpoint(word, third) == (meant and meant.replace("RUN", str(third)))


@pytest.mark.parametrize("word", [
    "last", "true", "3", "RUN/..", "step_00000009", "RUN/checkpoints/step_00000009", "RUN/../step_00000003", ""])
def test_what_cannot_be_resumed(third, word):
    sentence = "--resume takes auto or a checkpoint, such as .*; in .*, checkpoint.json is missing"
    with pytest.raises(UserError, match=sentence):
        wanted_checkpoint(word.replace("RUN/..", str(third.parent)).replace("RUN", str(third)), third)


def test_latest_is_auto_and_a_name_is_of_this_run(train, tmp_path):
    train("train.max_train_steps=4", "train.checkpointing_steps=2", resume="latest")
    train("train.max_train_steps=6", resume="step_00000002")
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_going_back_keeps_the_checkpoint_gone_back_to_and_what_follows(train, tmp_path):
    train("train.checkpointing_steps=1", "train.checkpoints_total_limit=4")
    checkpoints, want = tmp_path / "run/checkpoints", weights(tmp_path / "run", 6)
    train("train.max_train_steps=4", "train.checkpointing_steps=1", "train.checkpoints_total_limit=2",
          resume=f"{checkpoints}/step_00000003")
    names = sorted(p.name for p in checkpoints.iterdir() if p.is_dir())
    assert names == [*(f"abandoned_step_0000000{i}" for i in (4, 5, 6)), "step_00000003", "step_00000004"]
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4]
    train(resume="auto")
    assert all(torch.equal(v, want[k]) for k, v in weights(tmp_path / "run", 6).items())


def test_weights_alone_cannot_be_resumed(train2, tmp_path):
    config = write_tiny2(tmp_path, "gpt")
    train2(config, "train.max_train_steps=3")
    model, about = load_run(tmp_path / "run2")
    save_run(tmp_path / "alone", about, {"model": model})
    shutil.copytree(tmp_path / "run2/stage1", tmp_path / "alone/stage1")
    with pytest.raises(UserError, match="holds weights alone"):
        train2(config, f"train.output_dir={tmp_path}/alone", resume="auto")
