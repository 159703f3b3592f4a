"""Nothing is lost: what the README promises about faults, broken on purpose. benchmarks/faults.py does it for longer."""

import errno
import functools
import io
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import ROOT, TINY_MODELS, forked, metrics, start_two, weights, write_tiny, write_tiny2
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import SafetensorError

import evaluate
import sample
import train_stage1
import train_stage2
import visualize
from dataset import DataError, make_dataset
from harness import checkpoint, launch, log
from harness.config import (
    TextLoader,
    UserError,
    check_config,
    load_config,
    parse_yaml,
    read_yaml,
    setting_names,
)
from harness.guard import Guard
from harness.models import STAGE1, STAGE2, load_run, model_class
from harness.run import Run
from harness.settings import STAGE1_SECTIONS
from harness.settings_stage2 import STAGE2_SECTIONS
from losses import PatchGAN


def test_one_process_in_place_of_several_is_one_sentence(monkeypatch):
    """As `accelerate launch --cpu --num_processes 2` starts it, where there is no MPI."""
    begun = []
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    launch.run_main(lambda: begun.append("one process"))
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(SystemExit, match="^error: .* without MPI it starts one; use torchrun"):
        launch.run_main(lambda: begun.append("one of several"))
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    launch.run_main(lambda: begun.append("one of MPI's"))
    assert begun == ["one process", "one of MPI's"]


def test_an_error_that_nobody_thought_of_ends_the_loaders_workers(tmp_path):
    """Python asks them by the one SIGTERM that they leave to the trainer, and waits."""
    words = broken_script(tmp_path, "def backward(self, loss):\n    raise RuntimeError('boom')\nGuard.backward = backward")
    output = forked(tmp_path, *words, "train.dataloader_num_workers=2", status=1)
    assert "Traceback" in output and "RuntimeError: boom" in output


def raise_(error):
    raise error


@pytest.mark.parametrize("main", [lambda: torch.empty(2**60), lambda: [0] * 2**60,
                                  lambda: raise_(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee ..."))])
def test_too_little_memory_is_one_sentence(main):
    with pytest.raises(SystemExit, match="error: out of memory .*; halve the batch size.*saved before is whole") as stop:
        launch.run_main(main)
    assert "\n" not in stop.value.code


def test_the_size_of_images_is_checked_without_memory():
    model, discriminator = SimpleNamespace(set_image_size=lambda size: None), PatchGAN()
    train_stage1.check_image_size(2**20, model, discriminator)
    with pytest.raises(UserError, match="too small for discriminator.num_layers"):
        train_stage1.check_image_size(8, model, discriminator)


# ---------------------------------------------------------------------------------------------------------------------
# Losses and gradients that are not finite


def poison(monkeypatch, loop, kind, steps):
    """Spoils these steps (from 0) of a train loop: its batches, its loss or gradient alone, or those of one of two optimizers."""
    count, calls, backward = [0], [0], Guard.backward

    def spoiled(self, loss):
        calls[0] += 1
        if count[0] in steps and kind == ("generator", "discriminator")[(calls[0] - 1) % 2]:
            loss = loss * torch.nan
        if count[0] in steps and kind == "loss":
            loss = loss + torch.tensor(torch.inf)  # a constant: without it the gradient is finite
        if count[0] in steps and kind == "gradient":
            loss.register_hook(lambda g: g * torch.nan)
        backward(self, loss)

    def end_step(self, step, original=Guard.end):
        count[0] += 1
        original(self, step)

    def loader(*args, original=loop.train_loader, **kwargs):
        for images, labels in original(*args, **kwargs):
            yield (images * torch.nan if count[0] in steps and kind == "batch" else images), labels

    monkeypatch.setattr(Guard, "backward", spoiled)
    monkeypatch.setattr(Guard, "end", end_step)
    if loop is train_stage1:
        monkeypatch.setattr(loop, "train_loader", loader)


def fuse(monkeypatch):
    """The optimizer of GPUs, which decides on the device."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, original=torch.optim.AdamW, **kw: original(*args, **kw | {"fused": True}))


@pytest.mark.parametrize("kind, fused", [("batch", False), ("batch", True), ("loss", False), ("gradient", True)])
def test_a_bad_step_of_stage_1_changes_nothing(train, tmp_path, monkeypatch, kind, fused):
    """Weights, optimizers, codebook, BatchNorm, of model and discriminator; it is counted, and the means are of the others."""
    poison(monkeypatch, train_stage1, kind, {3})
    if fused:
        fuse(monkeypatch)
    config = write_tiny(tmp_path, model=TINY_MODELS["mqvae"], discriminator="ch: 8\n  num_layers: 1")
    train("train.checkpointing_steps=1", "train.checkpoints_total_limit=9", "train.logging_steps=2", "loss.lecam_weight=0.1",
          "train.use_ema=true", config=config)
    before, after = weights(tmp_path / "run", 3), weights(tmp_path / "run", 4)
    assert [k for k in before if not torch.equal(before[k], after[k]) and not k.startswith("ema.")] == []
    last = weights(tmp_path / "run", 6)
    changed = [k for k in after if not torch.equal(after[k], last[k])]
    assert {re.match(r"optimizer\.\.\w+|\w+", k)[0] for k in changed} == {
        "model", "ema", "discriminator", "optimizer..model", "optimizer..discriminator",
        "custom_checkpoint_0"}
    assert all(v.isfinite().all() for v in last.values())
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert [line["bad_steps"] for line in lines] == [0, 1, 0] and all("grad_norm" in line for line in lines)


@pytest.mark.parametrize("kind, still", [
    ("generator", ("model.", "optimizer..model.")),
    ("discriminator", ("discriminator.", "optimizer..discriminator.", "custom_checkpoint_0.")),
])
def test_a_bad_step_of_one_optimizer_leaves_the_other_its_own(train, tmp_path, monkeypatch, kind, still):
    poison(monkeypatch, train_stage1, kind, {3})
    config = write_tiny(tmp_path, model=TINY_MODELS["mqvae"], discriminator="ch: 8\n  num_layers: 1")
    train("train.checkpointing_steps=1", "train.checkpoints_total_limit=9", "loss.lecam_weight=0.1", "loss.disc_start=0", config=config)
    before, after = weights(tmp_path / "run", 3), weights(tmp_path / "run", 4)
    changed = [k for k in before if not torch.equal(before[k], after[k])]
    assert not [k for k in changed if k.startswith(still)]
    assert {"model.quantizer.codebook", "discriminator.0.weight"} & set(changed)
    assert [line["bad_steps"] for line in metrics(tmp_path / "run") if "loss" in line] == [0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("kind, fused", [("loss", False), ("gradient", True)])
def test_a_bad_step_of_stage_2_changes_nothing(train2, tmp_path, monkeypatch, kind, fused):
    poison(monkeypatch, train_stage2, kind, {3})
    if fused:
        fuse(monkeypatch)
    train2(write_tiny2(tmp_path, "dq_transformer"), "train.checkpointing_steps=1", "train.checkpoints_total_limit=9")
    before, after, last = (weights(tmp_path / "run2", i) for i in (3, 4, 6))
    assert all(torch.equal(before[k], after[k]) for k in before) and not all(torch.equal(after[k], last[k]) for k in after)
    assert [line["bad_steps"] for line in metrics(tmp_path / "run2") if "loss" in line] == [0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("stage", [1, 2])
def test_too_many_bad_steps_in_a_row_stop_the_run(train, train2, tmp_path, monkeypatch, stage):
    """With a sentence that names them, and the checkpoint from before; as many as allowed do not."""
    loop = train_stage1 if stage == 1 else train_stage2
    poison(monkeypatch, loop, "gradient", {1, 2, 4, 5, 6, 7, 8, 9})
    words = ["train.max_bad_steps=2", "train.gradient_accumulation_steps=2",
             "train.max_train_steps=10", "train.logging_steps=10", "train.checkpointing_steps=4",
             "train.validation_steps=100"]
    with pytest.raises(UserError, match="not finite in steps 5 to 7, more in a row .*--resume auto"):
        train(*words) if stage == 1 else train2(write_tiny2(tmp_path, "gpt"), *words)
    run = tmp_path / ("run" if stage == 1 else "run2")
    checkpoints = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    assert checkpoints == ["step_00000004", "step_00000008"]


def test_bad_steps_in_a_row_are_counted_across_a_resume(train, tmp_path, monkeypatch):
    """A job that is restarted more often than max_bad_steps must not skip for ever."""
    words = ["train.max_bad_steps=2", "train.checkpointing_steps=1", "train.max_train_steps=9", "loss.disc_weight=0"]
    poison(monkeypatch, train_stage1, "loss", {2, 3})
    train(*words, "train.max_train_steps=4")
    assert json.loads((tmp_path / "run/checkpoints/step_00000004/checkpoint.json").read_text())["bad_row"] == 2
    monkeypatch.undo()
    poison(monkeypatch, train_stage1, "loss", {0})
    with pytest.raises(UserError, match="in steps 3 to 5"):
        train(*words, resume="auto")
    monkeypatch.undo()
    train(*words, resume="auto")


SCALER = torch.amp.GradScaler


@pytest.fixture
def fp16(monkeypatch):
    """fp16 on the CPU: autocast and torch's own scaler, which accelerate makes for GPUs alone; fp16(2.0**30) begins with that scale."""
    def make(scale):
        class Half(Accelerator):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.state._mixed_precision, self.native_amp = "fp16", True
                self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

        monkeypatch.setattr("harness.run.Accelerator", Half)
    return make


@pytest.mark.parametrize("stage", [1, 2])
def test_what_overflows_under_fp16_is_skipped_but_does_not_count(train, train2, tmp_path, fp16, stage):
    """Nothing changes until the scale has come down, codebook and statistics included; then training begins."""
    fp16(2.0**30)
    words = ["train.max_train_steps=16", "train.checkpointing_steps=1", "train.checkpoints_total_limit=99", "train.validation_steps=99",
             "train.max_bad_steps=0"]
    if stage == 1:
        config, run = write_tiny(tmp_path, model=TINY_MODELS["mqvae"], discriminator="ch: 8\n  num_layers: 1"), tmp_path / "run"
        train(*words, "loss.disc_start=0", "loss.gan_start=0", config=config)
    else:
        config, run = write_tiny2(tmp_path, "gpt"), tmp_path / "run2"
        train2(config, *words)
    lines = [line for line in metrics(run) if "loss" in line or "bad_steps" in line]
    assert all(line["bad_steps"] == 0 for line in lines) and len(lines) == 16
    before, changed = weights(run, 1), []
    for step in range(2, 17):
        after = weights(run, step)
        changed.append({k.split(".")[0] for k in before if not torch.equal(before[k], after[k])})
        before = after
    assert changed[:3] == [set()] * 3 and changed[-1] >= {k.split(".")[0] for k in after} - {"custom_checkpoint_0"}  # LeCam is off
    assert [("grad_norm" in line) for line in lines[1:]] == [("model" in names) for names in changed]
    assert 0 < max(line.get("grad_norm", 0) for line in lines) < 50  # without the scale
    assert all(v.isfinite().all() for v in after.values())


@pytest.mark.parametrize("stage", [1, 2])
def test_a_bad_loss_under_fp16_counts_once_the_scale_is_not_the_reason(train, train2, tmp_path, monkeypatch, fp16, stage):
    fp16(4.0)
    poison(monkeypatch, train_stage1 if stage == 1 else train_stage2, "loss", set(range(2, 99)))
    bad = "steps 4 to 6" if stage == 2 else "steps 3 to 5"
    with pytest.raises(UserError, match=f"not finite in {bad}, more in a row"):
        words = ["train.max_train_steps=20", "train.max_bad_steps=2", "loss.disc_start=0"][:2 + (stage == 1)]
        train(*words) if stage == 1 else train2(write_tiny2(tmp_path, "gpt"), *words)


def test_bad_losses_do_not_shrink_the_scale_to_nothing(train, tmp_path, fp16):
    """Under which later gradients would vanish."""
    fp16(4.0)
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, train_stage1, "loss", set(range(1, 9)))
        train("train.max_train_steps=10", "train.max_bad_steps=99")
    state = torch.load(tmp_path / "run/checkpoints/step_00000010/scaler.pt", weights_only=True)
    assert state["scale"] == 1
    before, after = weights(tmp_path / "run", 9), weights(tmp_path / "run", 10)
    assert any(not torch.equal(before[k], after[k]) for k in before if k.startswith("model."))


def test_a_change_of_scale_between_two_optimizers_changes_no_gradient(train, tmp_path, monkeypatch, fp16):
    """The generator's step may change it before the discriminator's gradients are complete."""
    fp16(1024.0)
    for growth in (1, 999):
        monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(SCALER, growth_interval=growth))
        train(f"train.output_dir={tmp_path}/{growth}", "train.gradient_accumulation_steps=3", "loss.disc_start=0", "loss.gan_start=9",
              "train.max_train_steps=3")
    norms = [[line["d_grad_norm"] for line in metrics(tmp_path / run) if "d_grad_norm" in line] for run in ("1", "999")]
    assert norms[0] == pytest.approx(norms[1], rel=0.02) and len(norms[0]) == 3


def test_fp16_resumes_exactly(train, tmp_path, fp16):
    """Its scale included, which is coming down."""
    for words in ([f"train.output_dir={tmp_path}/whole"], ["train.max_train_steps=7"], []):
        fp16(2.0**30)
        more = ["train.max_train_steps=14", "train.checkpointing_steps=7", "train.lr_scheduler=constant"]
        train(*more, *words, resume=None if words else "auto")
    one, other = weights(tmp_path / "whole", 14), weights(tmp_path / "run", 14)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    scales = [torch.load(tmp_path / f"{run}/checkpoints/step_00000014/scaler.pt", weights_only=True) for run in ("whole", "run")]
    assert scales[0] == scales[1] and scales[0]["scale"] < 2.0**30


# ---------------------------------------------------------------------------------------------------------------------
# Kills and signals (train_stage1's are in test_train_stage1.py)


def test_killed_runs_lose_nothing(tmp_path):
    """SIGKILL amid checkpoints, caches and renames, of both stages, and code that looks at the result; see there."""
    assert "losses: 0" in forked(tmp_path, "benchmarks/faults.py", "kills", "--minutes", "0", "--seed", "1")


def test_what_a_kill_left_unfinished_is_removed(train, tmp_path):
    left = tmp_path / "run/checkpoints/.step_00000005"
    left.mkdir(parents=True)
    train()
    assert not left.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_stage_2_after_the_step(train2, tmp_path, monkeypatch, capsys, number):
    def tick(self, step, original=Guard.end):
        original(self, step)
        if step == 2:
            os.kill(os.getpid(), number)

    config = write_tiny2(tmp_path, "gpt")
    train2(config, f"train.output_dir={tmp_path}/whole")
    monkeypatch.setattr(Guard, "end", tick)
    train2(config)
    assert f"stopped by {signal.Signals(number).name} at step 2 of 6, saved; --resume auto continues" in capsys.readouterr().out
    train2(config, resume="auto")
    one, other = weights(tmp_path / "whole", 6), weights(tmp_path / "run2", 6)
    assert all(torch.equal(one[k], other[k]) for k in one)


# ---------------------------------------------------------------------------------------------------------------------
# Full disks


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_for_torch(*args, **kwargs):
    raise RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0: file write failed")


def full_for_safetensors(*args, **kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("what, error", [("harness.checkpoint.save_file", full_for_safetensors), ("torch.save", full_for_torch),
                                         ("harness.checkpoint.write_manifest", full)])
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


def test_pictures_logs_and_best_weights_that_do_not_fit_cost_no_training(train, tmp_path, monkeypatch):
    """A line that was cut short does not stay in the log, which goes on when there is room."""
    write = checkpoint.write_file

    def small(path, data):
        return full() if path.suffix in (".png", ".safetensors") else write(path, data)

    class Small(io.FileIO):  # takes 10 bytes at step 2
        def write(self, line):
            return super().write(line[:10] if b'"step": 2,' in line else line)

    for module in (checkpoint, log):
        monkeypatch.setattr(module, "write_file", small)
    def opened(path, mode="r", **kwargs):
        return Small(path, "a") if mode == "ab" else open(path, mode, **kwargs)

    monkeypatch.setattr(log, "open", opened, raising=False)
    with pytest.warns(UserWarning, match="could not be written.*training goes on") as told:
        train()
    assert {"the best weights", "metrics.jsonl", "the picture of step 3"} <= {str(w.message).split(" could")[0] for w in told}
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 3, 4, 5, 6]
    assert not list((tmp_path / "run/samples").iterdir()) and not list(tmp_path.rglob("*.tmp"))


def test_a_damaged_best_is_told_and_replaced(train, tmp_path, capsys):
    train("train.max_train_steps=3")
    best = tmp_path / "run/checkpoints/best.safetensors"
    best.write_bytes(best.read_bytes()[:100])
    train(resume="auto")
    assert "best.safetensors is damaged" in capsys.readouterr().out
    assert load_run(tmp_path / "run", "best")[0].state_dict().keys()


def test_results_that_cannot_be_kept_are_printed(train, tmp_path, monkeypatch, capsys):
    train()
    monkeypatch.setattr(evaluate, "write_file", full)
    evaluate.main(["--run", str(tmp_path / "run"), "--images", "2", "--without", "lpips", "inception"])
    told = capsys.readouterr().out
    assert "metrics.json could not be written (No space left on device)" in told and "PSNR" in told


# ---------------------------------------------------------------------------------------------------------------------
# Hostile input


def test_codes_that_are_none_are_refused(train2, tmp_path):
    config = write_tiny2(tmp_path, "gpt")
    train2(config, "train.max_train_steps=1")
    for path in tmp_path.glob("stage1_vqgan/codes/train_*/indices.bin"):
        with open(path, "r+b") as file:
            file.seek(100)
            file.write(b"\xff\xff")
    with pytest.raises(UserError, match="holds codes that the stage-1 model does not have; remove the folder"):
        train2(config, f"train.output_dir={tmp_path}/other")


def test_the_stage1_run_is_not_where_its_copy_goes(train2, tmp_path):
    config = write_tiny2(tmp_path, "gpt")
    inner = tmp_path / "other/stage1/vqgan"
    shutil.copytree(tmp_path / "stage1_vqgan", inner)
    with pytest.raises(UserError, match="is where this run would put its copy"):
        train2(config, f"codes.stage1={inner}", f"train.output_dir={tmp_path}/other")
    assert (inner / "config.yaml").is_file()


def test_weights_of_another_model_are_one_sentence(train, tmp_path):
    train("train.max_train_steps=3")
    path = tmp_path / "run/config.yaml"
    path.write_text(path.read_text().replace("codebook_size: 32", "codebook_size: 33"))
    with pytest.raises(UserError, match="does not hold the weights of the model in"):
        load_run(tmp_path / "run")


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


@pytest.fixture
def outside(tmp_path):
    """A folder with a file, which must stay as it is."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "step_00000006.npz").write_text("precious")
    yield folder
    assert [p.name for p in folder.iterdir()] == ["step_00000006.npz"] and (folder / "step_00000006.npz").read_text() == "precious"


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target, target_is_directory=target.is_dir())


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/.step_00000003", "samples", "tensorboard", "tensorboard/minVQ", "codebook"])
def test_training_follows_no_link_out_of_its_run_folder(train, tmp_path, outside, name):
    """Which an archive with a run folder may hold."""
    link(tmp_path / "run" / name, outside)
    with pytest.raises(UserError, match=f"{name} is a link to .*outside, outside of the run folder"):
        train("train.codebook_stats_every=3", "train.log_with=tensorboard", config=write_tiny(tmp_path, model=TINY_MODELS["dqvae_entropy"]))


def test_training_replaces_links_in_the_place_of_its_files(train, tmp_path, outside):
    config = write_tiny(tmp_path, model=TINY_MODELS["dqvae_entropy"])
    train("train.max_train_steps=3", config=config)
    names = ["metrics.jsonl", "thresholds.json", ".config.yaml.tmp", "checkpoints/best.safetensors", "samples/reconstructions_00000006.png"]
    for name in names[1:]:
        (tmp_path / "run" / name).unlink(missing_ok=True)
    for name in names[1:]:
        link(tmp_path / "run" / name, outside / "step_00000006.npz")
    train(config=config, resume="auto")
    shutil.rmtree(tmp_path / "run/checkpoints")
    train(config=config)  # anew
    assert not [name for name in names if (tmp_path / "run" / name).is_symlink()]


@pytest.mark.parametrize("name", ["config.yaml", "stage1/mine.txt", "metrics.jsonl"])
def test_training_writes_over_nothing_that_is_not_of_a_run(train2, tmp_path, name):
    file = tmp_path / "run2" / name
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    (tmp_path / "run2/checkpoints").mkdir()  # other programs have such folders too
    for resume in (None, "auto"):
        with pytest.raises(UserError, match=f"is not a run folder, but holds {name.split('/')[0]}, which a run would write over"):
            train2(write_tiny2(tmp_path, "gpt"), resume=resume)
    assert file.read_text() == "precious" and len(list((tmp_path / "run2").iterdir())) == 2


def test_a_run_folder_may_be_a_link_and_hold_links_to_itself(train, tmp_path):
    (tmp_path / "large").mkdir()
    link(tmp_path / "run", tmp_path / "large")
    link(tmp_path / "run/newest", tmp_path / "large/checkpoints/step_00000006")
    train()
    train(resume="auto")
    assert (tmp_path / "large/newest/model.safetensors").is_file()


def test_what_writes_to_a_run_that_it_reads_follows_no_link(train2, tmp_path, outside):
    """Nor goes where the run's config says: that is where somebody else kept things."""
    config = write_tiny2(tmp_path, "gpt")
    stage1, run = tmp_path / "stage1_vqgan", tmp_path / "run2"
    train2(config, "train.max_train_steps=1")
    for folder in (stage1, run, run / "stage1"):
        given = yaml.safe_load((folder / "config.yaml").read_text())
        given["train"] |= {"output_dir": str(outside), "calibration_file": str(outside / "x.json")}
        given |= {"codes": {"stage1": str(outside), "cache_dir": str(outside), "cache": True}} if folder == run else {}
        (folder / "config.yaml").write_text(yaml.safe_dump(given))
    shutil.rmtree(stage1 / "codes")
    calls = {
        "samples": lambda: sample.main(["--run", str(run), "-n", "2"]),
        "figures": lambda: visualize.main(["sequence", "--run", str(run)]),
        ".metrics.json.tmp": lambda: evaluate.main(["--run", str(run), "-n", "2", "--images", "2", "--without", "inception", "lpips"]),
        "codes": lambda *more: train2(config, "train.max_train_steps=1", f"train.output_dir={tmp_path}/other", *more),
    }
    for name, call in calls.items():
        path = (stage1 if name == "codes" else run) / name
        shutil.rmtree(path, ignore_errors=True)
        link(path, outside / "step_00000006.npz" if name.endswith("tmp") else outside)
        if not name.endswith("tmp"):  # that one is replaced
            with pytest.raises(UserError, match=f"{name} is a link to .*outside, outside of the run folder"):
                call()
            if name == "figures":  # the places that the sentence names are not refused
                visualize.main(["sequence", "--run", str(run), "--out", str(tmp_path / "a.png")])
            if name == "codes":
                call(f"codes.cache_dir={tmp_path}/caches")
                shutil.rmtree(tmp_path / "other")
            path.unlink()
        call()
        assert not path.is_symlink()
    assert json.loads((run / "metrics.json").read_text())["images"] == 2


@pytest.mark.parametrize("text, told", [
    ("[" * 3_000, "more than 20"), ("a: &a [x]\nb: *a", "aliases"), ("a: " + "x" * 2_000_000, "more than 1000000 char"),
    ("a: 2001-99-99", "not valid YAML"), ("a: !!bool 3", "not valid YAML"),
    ("a: !!python/object/apply:os.getcwd []", "not valid YAML at line 1"), (b"\xff\xfe\xfa", "is not text"), ("- 1", "must be a section"),
])
def test_hostile_yaml_is_refused(tmp_path, text, told):
    path = tmp_path / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=told) as error:
        read_yaml(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_names_that_are_not_utf8(train, train2, tmp_path, capsysbinary):
    """In both stages, with a tracker, and where they are printed."""
    folder = tmp_path / os.fsdecode(b"f\xe9es")
    for i in range(20):
        (folder / os.fsdecode(b"caf\xe9")).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (i, 9 * i, 0)).save(folder / os.fsdecode(b"caf\xe9/im\xe9ge%d.png" % i))
    given = ["train.max_train_steps=1", "train.log_with=tensorboard"]
    train(*given, "data.name=folder", f"data.root={folder}", "data.val_fraction=0.3")
    config = write_tiny2(tmp_path, "gpt", train="train_batch_size: 4\n  learning_rate: 1.0e-3\n  dataloader_num_workers: 0")
    train2(config, *given, f"codes.stage1={tmp_path}/run")
    assert yaml.safe_load((tmp_path / "run2/config.yaml").read_text())["data"]["root"] == str(folder)
    with pytest.raises(SystemExit, match="error: the name .* is not UTF-8"):
        launch.run_main(lambda: train(*given, f"train.output_dir={folder}/run"))
    (tmp_path / "say.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                                     "from harness import launch\nlaunch.run_main(lambda: print(sys.argv[1]))")
    assert forked(tmp_path, tmp_path / "say.py", folder.name, PYTHONIOENCODING="utf-8") == "f\\udce9es\n"


def everything(sections, name):
    """All keys that a config with this model may set."""
    targets = {section: target for section, target in sections.items() if "." not in section}
    return [k for section, t in targets.items() for k in setting_names(model_class(name) if isinstance(t, dict) else t, section)]


KEYS = sorted({k for name in STAGE1 for k in everything(STAGE1_SECTIONS, name)})
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-2, 40), st.floats(), st.text(max_size=5), st.sampled_from(["1e-4", 10**20]))
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)).map(json.dumps)
FUZZ = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


YAML = st.text(alphabet="[]{}:&*!|>'\"-,#%@ \n\tax01.", max_size=8)
WORDS = st.one_of(st.builds("{}{}={}".format, st.sampled_from(KEYS), st.sampled_from(["", "", ".", ".x"]), st.one_of(VALUES, YAML)),
                  st.builds("{}={}".format, st.text(max_size=9), VALUES), st.text(max_size=30))


@settings(max_examples=200, **FUZZ)
@given(st.lists(WORDS, min_size=1, max_size=2))
def test_any_words_are_a_config_or_one_sentence(words):
    for path, sections in (("vqgan", STAGE1_SECTIONS), ("gpt", STAGE2_SECTIONS)):
        try:
            found = load_config(str(ROOT / f"configs/quickstart/{path}.yaml"), words, sections)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            saved = yaml.safe_dump(found, sort_keys=False)
            assert repr(parse_yaml(saved)) == repr(found)  # what is saved can be read
            assert repr(check_config(parse_yaml(saved, TextLoader), sections, "saved")) == repr(found)  # also as a config


KEYS2 = sorted({k for name in STAGE2 for k in everything(STAGE2_SECTIONS, name)})
ENDLESS = ("train.max_", "train.num_train_epochs", "train.compile", "train.output_dir", "train.gradient_accumulation", "train.dataloader",
           "loss.perceptual_weight", "train.log_with", "codes.cache_dir", "codes.cache_views")


def changes(keys):
    return st.dictionaries(st.sampled_from([k for k in keys if not k.startswith(ENDLESS)]), VALUES, min_size=1, max_size=2)


@settings(max_examples=150, **FUZZ)
@example({"model.quantizer.entropy_weight": "1"})  # what random settings have found
@example({"model.z_channels": "0"})
@example({"train.gradient_accumulation_steps": str(10**20)})
@given(changes(KEYS))
def test_any_settings_are_a_run_or_one_sentence(train, tmp_path, changes):
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    try:
        train("train.max_train_steps=1", *(f"{k}={v}" for k, v in changes.items()))
    except (UserError, DataError) as error:
        assert "\n" not in str(error)


@settings(max_examples=60, **FUZZ)
@example({"data.root": "nowhere"})
@example({"train.adam_epsilon": "0"})  # weights that are not finite
@given(changes(KEYS2))
def test_any_settings_of_stage_2_are_a_run_or_one_sentence(train2, tmp_path, changes):
    shutil.rmtree(tmp_path / "run2", ignore_errors=True)
    config = tmp_path / "tiny2.yaml"
    try:
        train2(config if config.is_file() else write_tiny2(tmp_path, "dq_transformer"), "train.max_train_steps=1",
               *(f"{k}={v}" for k, v in changes.items()))
    except (UserError, DataError) as error:
        assert "\n" not in str(error)


# ---------------------------------------------------------------------------------------------------------------------
# Bad images (more kinds are in test_dataset.py)


def bomb():
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "png")
    return file.getvalue()


def png():
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "png")
    return file.getvalue()


PNG = png()
BAD = {"empty": lambda: b"", "no image": lambda: b"hello", "cut": lambda: png()[:1000], "bomb": bomb, "header alone": lambda: png()[:33]}


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


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def broken_script(tmp_path, code):
    """train_stage1.py with this code before; its command."""
    (tmp_path / "broken.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import os, signal, train_stage1, torch
from harness import checkpoint, guard, launch
Guard, rank = guard.Guard, int(os.environ.get("RANK", 0))
{code}
launch.run_main(train_stage1.main)
""")
    return [tmp_path / "broken.py", "--config", write_tiny(tmp_path)]


def test_processes_agree_on_bad_steps_and_disagreement_is_not_saved(tmp_path):
    """A loss that is bad on one process alone is skipped by both (the checkpoint of step 3 says that they agree); a codebook that
    differs is told."""
    output = forked(tmp_path, *broken_script(tmp_path, """
backward, end, steps = Guard.backward, Guard.end, [0]
Guard.backward = lambda self, loss: backward(self, loss * (torch.nan if rank and steps[0] == 1 else 1.0))
def end_step(self, step):
    end(self, step)
    steps[0] = step
    if rank and step == 5:
        self.modules["model"].quantizer.ema_sum[0, 0] += 1e-3
Guard.end = end_step
"""), processes=2, status=1)
    assert "the processes no longer hold the same model: model.quantizer.codebook" in output
    assert "became different between step 3 and step 6, which was not saved" in output
    assert os.listdir(tmp_path / "run/checkpoints") in (["step_00000003", "best.safetensors"], ["best.safetensors", "step_00000003"])
    assert [line["bad_steps"] for line in metrics(tmp_path / "run") if "loss" in line] == [0, 1, 0, 0, 0, 0]


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


def test_when_one_process_dies_the_other_ends_by_itself(train, tmp_path):
    """As on another machine, where no launcher ends it."""
    both = start_two(tmp_path / "log", *broken_script(tmp_path, """
import torch.utils.data._utils.worker as worker
worker.MP_STATUS_CHECK_INTERVAL = 0.1  # it looks every 5 seconds whether its process is there, and holds the connection until then
end = Guard.end
Guard.end = lambda self, step: os.kill(os.getpid(), signal.SIGKILL) if not rank and step == 5 else end(self, step)
"""), "train.dataloader_num_workers=1")
    try:
        [process.join(60) for process in both]
        assert [process.exitcode for process in both] == [-signal.SIGKILL, 1]
        error, end = (tmp_path / "log").read_text(), time.monotonic() + 30
        assert "error: another process has ended" in error and "Traceback" not in error
        for process in both:
            with pytest.raises(ProcessLookupError):  # not even workers of their loaders are left
                while time.monotonic() < end:
                    os.killpg(process.pid, 0)
                    time.sleep(0.01)
    finally:
        [process.kill() for process in both]
    assert not checkpoint.damage(tmp_path / "run/checkpoints/step_00000003")
    train("train.train_batch_size=8", resume="auto")
    assert metrics(tmp_path / "run")[-1]["step"] == 6


# ---------------------------------------------------------------------------------------------------------------------
# Long runs


def test_open_files_and_memory_stay_flat(train, monkeypatch):
    used, me = [], psutil.Process()

    def save(self, step, original=Run.save):
        original(self, step)
        used.append((me.num_fds(), len(me.children()), me.memory_info().rss))

    monkeypatch.setattr(Run, "save", save)
    train("train.max_train_steps=24", "train.validation_steps=2", "train.checkpointing_steps=2", "train.log_with=tensorboard",
          "train.checkpoints_total_limit=1")
    files, children, memory = zip(*used)
    assert len(set(files[3:])) == 1 and len(set(children)) == 1 and memory[-1] < memory[len(memory) // 2] + 30 * 2**20
