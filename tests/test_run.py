"""A run: its folder, which it writes to and nothing else, its processes, its learning rate and its end."""

import json
import os
import shutil
import signal
from contextlib import nullcontext

import psutil
import pytest
import torch
import yaml
from conftest import TINY_MODELS, weights, write_tiny, write_tiny2

import evaluate
import sample
import visualize
from harness.config import UserError
from harness.guard import Guard
from harness.models import load_run
from harness.run import Run, learning_rate_at


def test_learning_rate():
    train = dict(learning_rate=None, base_lr=1e-3, lr_scheduler="cosine", min_lr=0.0, lr_warmup_steps=4, lr_warmup_epochs=0.5)
    rates = [learning_rate_at(s, train, global_batch=8, max_steps=109, steps_per_epoch=10) for s in range(109)]
    assert rates[8] == pytest.approx(8 * 0.9e-3) and rates[9] == pytest.approx(8e-3)  # warmed up after 4 + 5 steps
    assert rates[59] == pytest.approx(4e-3) and 0 < rates[-1] < 1e-4
    for scheduler, step, rate in (("cosine", 59, 4.5e-3), ("linear", 34, 6.25e-3)):
        train |= {"lr_scheduler": scheduler, "min_lr": 1e-3}
        assert [learning_rate_at(s, train, 8, 109, 10) for s in (9, step, 109)] == pytest.approx([8e-3, rate, 1e-3])
    constant = dict(learning_rate=0.5, base_lr=None, lr_scheduler="constant", min_lr=0.0, lr_warmup_steps=0, lr_warmup_epochs=0)
    assert {learning_rate_at(s, constant, 8, 100, 10) for s in range(100)} == {0.5}


# What accelerate was told


@pytest.mark.parametrize("name, value, sentence", [
    ("DYNAMO_BACKEND", "EAGER", "asked for torch.compile; leave that to the config: --dynamo_backend no, and train.compile=true"),
    ("DYNAMO_BACKEND", "FAST", "accelerate cannot start as it was asked to"),
    ("GRADIENT_ACCUMULATION_STEPS", "2", "gradient_accumulation_steps=2 .* config says train.gradient_accumulation_steps=1"),
    ("GRADIENT_ACCUMULATION_STEPS", "auto", "accelerate cannot start as it was asked to"),
    ("MIXED_PRECISION", "half", "mixed_precision=half, which is not supported"),
    ("USE_PARALLELISM_CONFIG", "true", "a parallelism config, which is not supported"),
    ("USE_DEEPSPEED", "true", "accelerate cannot start as it was asked to .*DeepSpeed"),
    ("DYNAMO_BACKEND", "NO", None), ("GRADIENT_ACCUMULATION_STEPS", "1", None), ("MIXED_PRECISION", "no", None)])
def test_what_accelerate_was_told(train, monkeypatch, name, value, sentence):
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(UserError, match=sentence) if sentence else nullcontext():
        train("train.max_train_steps=1")


def test_the_config_s_precision_wins_and_says_so(train, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    train("train.max_train_steps=1", "train.mixed_precision=bf16")
    assert "train.mixed_precision=bf16 is used, not accelerate's fp16" in capfd.readouterr().out
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["train"]["mixed_precision"] == "bf16"


# Its folder


def test_load_run_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="has no config.yaml"):
        load_run(tmp_path)


def test_weights_of_another_model_are_one_sentence(train, tmp_path):
    train("train.max_train_steps=3")
    path = tmp_path / "run/config.yaml"
    path.write_text(path.read_text().replace("codebook_size: 32", "codebook_size: 33"))
    with pytest.raises(UserError, match="does not hold the weights of the model in"):
        load_run(tmp_path / "run")


@pytest.mark.parametrize("change, told", [
    ("model.quantizer.dim=4", "model.quantizer.dim=8, but the config asks for 4"),
    ("discriminator.ch=16", "discriminator.ch=8, but the config asks for 16"),
    ("train.use_ema=true", "train.use_ema=False, but the config asks for True"),
])
def test_resuming_another_model_is_refused(train, tmp_path, change, told):
    train()
    with pytest.raises(UserError) as error:
        train(change, resume="auto")
    assert f"holds a run with {told}" in str(error.value)
    with pytest.raises(UserError, match="holds a run with"):
        train(change, f"train.output_dir={tmp_path}/other", resume=f"{tmp_path}/run/checkpoints/step_00000006")
    with pytest.raises(UserError, match="checkpoint.json is missing"):
        train(f"train.output_dir={tmp_path}/other", resume=str(tmp_path / "nothing"))


def test_a_run_is_not_continued_over_another(train, tmp_path):
    train("train.max_train_steps=3")
    train("train.max_train_steps=3", f"train.output_dir={tmp_path}/other")
    with pytest.raises(UserError, match="already holds checkpoints of another run than"):
        train(f"train.output_dir={tmp_path}/other", resume=f"{tmp_path}/run/checkpoints/step_00000003")
    assert (tmp_path / "other/checkpoints/step_00000003").is_dir()
    train(f"train.output_dir={tmp_path}/third", resume=f"{tmp_path}/run/checkpoints/step_00000003")


@pytest.mark.parametrize("resume", [None, "auto"])
@pytest.mark.parametrize("name", ["config.yaml", "stage1/mine.txt", "metrics.jsonl"])
def test_training_writes_over_nothing_that_is_not_of_a_run(train2, tmp_path, name, resume):
    file = tmp_path / "run2" / name
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    (tmp_path / "run2/checkpoints").mkdir()  # other programs have such folders too
    with pytest.raises(UserError, match=f"is not a run folder, but holds {name.split('/')[0]}, which a run would write over"):
        train2(write_tiny2(tmp_path, "gpt"), resume=resume)
    assert file.read_text() == "precious" and len(list((tmp_path / "run2").iterdir())) == 2


# Links


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


# Its end


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


def test_second_interrupt_stops_at_once(train, monkeypatch):
    """The first Ctrl-C asks the loop to save and end, the second raises."""
    seen = []
    original = Run.stop_reason

    def interrupt(self, step):
        os.kill(os.getpid(), signal.SIGINT)
        seen.append(step)
        if len(seen) == 1:
            return None
        return original(self, step)

    monkeypatch.setattr(Run, "stop_reason", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train()
    assert len(seen) == 1


def test_open_files_and_memory_stay_flat(train, monkeypatch):
    used, me = [], psutil.Process()

    def save(self, step, original=Run.save):
        original(self, step)
        used.append((me.num_fds(), len(me.children()), me.memory_info().rss))

    monkeypatch.setattr(Run, "save", save)
    train("train.max_train_steps=24", "train.validation_steps=2", "train.checkpointing_steps=2", "train.log_with=tensorboard",
          "train.checkpoints_total_limit=1")
    files, children, memory = zip(*used)
    assert len(set(files[3:])) == 1 and max(children) == children[0]  # another test's worker may end meanwhile
    assert memory[-1] < memory[len(memory) // 2] + 30 * 2**20
