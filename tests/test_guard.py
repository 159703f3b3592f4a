"""A loss or gradient that is not finite changes nothing, is counted, and in the end stops the run."""

import functools
import json
import os
import re

import pytest
import torch
from accelerate import Accelerator
from conftest import TINY_MODELS, broken_script, forked, metrics, weights, write_tiny, write_tiny2

import train_stage1
import train_stage2
from harness.config import UserError
from harness.guard import Guard


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


# fp16


SCALER = torch.amp.GradScaler
SMALL = "data.image_size=8"  # CPUs take long for the backward of a convolution in fp16


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
        train(*words, "loss.disc_start=0", "loss.gan_start=0", SMALL, config=config)
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
        words = ["train.max_train_steps=20", "train.max_bad_steps=2"]
        train(*words, "loss.disc_start=0", SMALL) if stage == 1 else train2(write_tiny2(tmp_path, "gpt"), *words)


def test_bad_losses_do_not_shrink_the_scale_to_nothing(train, tmp_path, fp16):
    """Under which later gradients would vanish."""
    fp16(4.0)
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, train_stage1, "loss", set(range(1, 9)))
        train("train.max_train_steps=10", "train.max_bad_steps=99", SMALL)
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
              "train.max_train_steps=3", SMALL)
    norms = [[line["d_grad_norm"] for line in metrics(tmp_path / run) if "d_grad_norm" in line] for run in ("1", "999")]
    assert norms[0] == pytest.approx(norms[1], rel=0.02) and len(norms[0]) == 3


def test_fp16_resumes_exactly(train, tmp_path, fp16):
    """Its scale included, which is coming down."""
    for words in ([f"train.output_dir={tmp_path}/whole"], ["train.max_train_steps=7"], []):
        fp16(2.0**30)
        more = ["train.max_train_steps=14", "train.checkpointing_steps=7", "train.lr_scheduler=constant", SMALL]
        train(*more, *words, resume=None if words else "auto")
    one, other = weights(tmp_path / "whole", 14), weights(tmp_path / "run", 14)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    scales = [torch.load(tmp_path / f"{run}/checkpoints/step_00000014/scaler.pt", weights_only=True) for run in ("whole", "run")]
    assert scales[0] == scales[1] and scales[0]["scale"] < 2.0**30
