"""The training script as a whole: on tiny runs, in this process, in two, killed and resumed."""

import json
import os
import re
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY_MODELS, command, forked, metrics, start, weights, write_tiny
from PIL import Image

import train_stage1
from dataset import DataError
from harness.config import UserError
from harness.models import load_run
from losses import PatchGAN, load_perceptual
from mqvae import MQVAE

EVERYTHING = ["train.use_ema=true", "train.ema_decay=0.9", "loss.lecam_weight=0.01", "loss.disc_start=1", "loss.gan_start=3",
              "train.lr_scheduler=cosine", "train.lr_warmup_steps=2", "train.max_grad_norm=1.0"]


def test_a_run_leaves_what_it_should(train, tmp_path):
    train("train.log_with=tensorboard", "train.use_ema=true", "train.checkpoints_total_limit=1", "train.max_train_steps=9")
    run = tmp_path / "run"
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["best.safetensors", "step_00000009"]
    assert sorted(p.name for p in (run / "samples").iterdir()) == [f"reconstructions_0000000{i}.png" for i in (3, 6, 9)]
    assert Image.open(run / "samples/reconstructions_00000009.png").size == (4 * 130 + 2, 2 * 130 + 2)
    assert list((run / "tensorboard").rglob("events*"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    logged = set().union(*lines)
    assert {"loss", "l1", "codebook", "commitment", "gan", "gan_weight", "d_loss", "lr", "grad_norm", "d_grad_norm", "usage",
            "perplexity", "images_per_second", "peak_memory_gib", "val_psnr"} <= logged
    model, config = load_run(run)
    assert config["train"]["max_train_steps"] == 9 and not model.training
    ema = weights(run, 9)
    assert all(torch.equal(v, ema[f"ema.{k}"]) for k, v in model.state_dict().items())  # averaged weights if there are any
    best = max((line for line in lines if "val_psnr" in line), key=lambda line: line["val_psnr"])
    if best["step"] == 9:
        assert all(torch.equal(v, w) for v, w in zip(model.state_dict().values(), load_run(run, "best")[0].state_dict().values()))


def test_it_learns(train, tmp_path):
    train("train.max_train_steps=60", "train.learning_rate=3e-3", "train.validation_steps=12", "train.checkpointing_steps=60")
    psnr = [line["val_psnr"] for line in metrics(tmp_path / "run") if "val_psnr" in line]
    assert psnr[-1] > psnr[0] + 1 and psnr[0] > 8  # measured: from 14.2 to 16.2 dB


@pytest.mark.parametrize("settings", [
    ["model.quantizer.l2_norm=true", "model.quantizer.ema_decay=null", "loss.reconstruction=l2", "loss.adaptive_weight=false"],
    ["train.gradient_accumulation_steps=2", "train.channels_last=true", "loss.gan=non_saturating", "discriminator.norm=batch"],
    ["train.mixed_precision=bf16"],
    ["train.learning_rate=null", "train.base_lr=1e-5", "train.max_train_steps=null", "train.num_train_epochs=0.4"],
])
def test_settings(train, tmp_path, settings):
    train(*settings)
    lines = metrics(tmp_path / "run")
    assert all("loss" in line or "val_psnr" in line for line in lines)  # what is not finite is not written
    assert all(abs(v) < 1e6 for line in lines for v in line.values())
    if "train.base_lr=1e-5" in settings:
        assert lines[-1]["step"] == 4 and lines[0]["lr"] == pytest.approx(4e-5)
    load_run(tmp_path / "run")


def test_steps_or_epochs_the_one_that_ends_first(train, tmp_path, capfd):
    """40 images in batches of 4: 10 steps are an epoch."""
    for steps, epochs, end in ((6, 0.3, 3), (6, 5, 6), (6, "null", 6), ("null", 0.2, 2)):
        run = tmp_path / f"{steps}_{epochs}"
        train(f"train.max_train_steps={steps}", f"train.num_train_epochs={epochs}", f"train.output_dir={run}")
        assert metrics(run)[-1]["step"] == end
        assert f"global batch 4, {end} steps ({end / 10} epochs)" in capfd.readouterr().out
    with pytest.raises(UserError, match="give train.max_train_steps or train.num_train_epochs, or both"):
        train("train.max_train_steps=null")


@pytest.mark.parametrize("words, told, hears", [
    (["loss.disc_start=6"], True, False),
    (["loss.disc_start=0", "loss.gan_start=9"], True, False),
    (["loss.disc_start=3", "train.num_train_epochs=0.3"], True, False),
    (["loss.disc_start=6", "loss.disc_weight=0"], False, False),
    (["loss.disc_start=5"], False, True)])
def test_a_generator_that_never_hears_the_discriminator(train, tmp_path, capfd, words, told, hears):
    train(*words)
    sentence = "the generator does not hear the discriminator in this run: loss.gan_start="
    assert (sentence in capfd.readouterr().out) == told
    assert any("gan_weight" in line for line in metrics(tmp_path / "run")) == hears


def test_accumulation_equals_a_larger_batch(train, tmp_path):
    """Both optimizers, and the EMA codebook with restarts; the weight of the GAN loss fixed, since it is per forward."""
    same = ["model.quantizer.codebook_size=256", "loss.adaptive_weight=false", "train.adam_epsilon=1e-3", "train.max_train_steps=3"]
    train(*same, f"train.output_dir={tmp_path}/a", "train.train_batch_size=4")
    train(*same, f"train.output_dir={tmp_path}/b", "train.train_batch_size=2", "train.gradient_accumulation_steps=2")
    a, b = weights(tmp_path / "a", 3), weights(tmp_path / "b", 3)
    compare(a, b)
    assert (a["model.quantizer.ema_count"] == 1).any()  # some codes did restart


def compare(a, b, skip=()):
    assert a.keys() == b.keys() and len(a) > 20
    for name in a:
        if not name.endswith(skip):
            assert torch.allclose(a[name], b[name], atol=1e-5, rtol=1e-4), (name, (a[name] - b[name]).abs().max())


def test_compiled_equals_eager(train, tmp_path, monkeypatch):
    """The parts that compile are cut so that the adaptive weight still gets its gradients. (Backend "aot_eager": what is
    tested is the cutting, not the code generator, which needs a compiler.)"""
    compile_ = torch.nn.Module.compile
    compiled = []

    def compile_without_compiler(self):
        compiled.append(type(self).__name__)
        compile_(self, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_compiler)
    train("train.adam_epsilon=1e-3", f"train.output_dir={tmp_path}/a", "train.max_train_steps=4")
    assert not compiled
    train("train.adam_epsilon=1e-3", f"train.output_dir={tmp_path}/b", "train.max_train_steps=4", "train.compile=true")
    assert compiled == ["Encoder", "Decoder"]
    compare(weights(tmp_path / "a", 4), weights(tmp_path / "b", 4))


# Every model

LOGS = {"vqgan": set(), "vqvae": set(), "mqvae": {"kept_ratio", "score_mean", "score_std", "codes", "bits"},
        "dqvae": {"ratio_1", "codes", "bits", "router"}, "dqvae_triple": {"ratio_1", "ratio_2", "codes", "bits", "router"},
        "dqvae_entropy": {"ratio_1", "codes", "bits"}}
ROWS = {"vqgan": 2, "vqvae": 2, "mqvae": 4}  # the DQ-VAEs have 3: images, map, reconstructions


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_model_trains_resumes_exactly_and_draws(train, tmp_path, name):
    config = write_tiny(tmp_path, model=TINY_MODELS[name])
    train(f"train.output_dir={tmp_path}/whole", config=config)
    train(f"train.output_dir={tmp_path}/parts", "train.max_minutes=0", resume="auto", config=config)
    train(f"train.output_dir={tmp_path}/parts", resume="auto", config=config)
    whole, parts = weights(tmp_path / "whole", 6), weights(tmp_path / "parts", 6)
    assert [k for k in whole if not torch.equal(whole[k], parts[k])] == []
    lines = metrics(tmp_path / "whole")
    assert [line for line in lines if "loss" in line] == [line for line in metrics(tmp_path / "parts") if "loss" in line]
    assert LOGS[name] <= set(lines[0])
    assert Image.open(tmp_path / "whole/samples/reconstructions_00000006.png").size == (4 * 130 + 2, ROWS.get(name, 3) * 130 + 2)
    model, _ = load_run(tmp_path / "whole")
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(model.decode(model.encode(images)), model(images).images)
    train(f"train.output_dir={tmp_path}/half", "train.mixed_precision=bf16", config=config)
    half = [line for line in metrics(tmp_path / "half") if "lr" in line]
    assert len(half) == 6 and all({"loss", "grad_norm"} | LOGS[name] <= line.keys() for line in half)  # finite, or not written


@pytest.mark.parametrize("name, setting", [("mqvae", "model.topk_ratio=[0.1,0.9]"), ("dqvae_triple", "model.ratios=[[0.1,0.4],[0.1,0.5]]"),
                                           ("dqvae_entropy", "train.mixed_precision=no")])
def test_two_processes_hold_the_same(tmp_path, name, setting):
    """Weights, codebook, BatchNorm statistics, thresholds, and what is drawn from ranges of rates. (Not those of one process with twice the
    batch: BatchNorm and Gumbel noise are of each process's own images.)"""
    (tmp_path / "agree.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train_stage1, torch
from harness import launch
from harness.run import Run
finish = Run.finish
def agree(self, *arguments):
    for name, module in self.modules.items():
        for key, value in module.state_dict().items():
            values = [torch.empty_like(value) for _ in range(2)]
            torch.distributed.all_gather(values, value.contiguous())
            assert key.endswith("quantizer.queue") or torch.equal(*values), (name, key)
    noise = [torch.zeros(1) for _ in range(2)]
    torch.distributed.all_gather(noise, torch.rand(1))
    assert noise[0] != noise[1]  # but each draws its own noise
    rates = [torch.zeros(1) for _ in range(2)]
    model = self.modules["model"]
    drawn = sum(model.training_ratios) if hasattr(model, "training_ratios") else model.training_ratio
    torch.distributed.all_gather(rates, torch.tensor([drawn]))
    assert rates[0] == rates[1]
    print("agreed", flush=True)
    finish(self, *arguments)
Run.finish = agree
launch.run_main(train_stage1.main)
""")
    config = write_tiny(tmp_path, model=TINY_MODELS[name], discriminator="ch: 8\n  num_layers: 1")
    output = forked(tmp_path, tmp_path / "agree.py", "--config", config, "train.mixed_precision=bf16", setting, processes=2)
    assert output.count("agreed") == 2 and "2 process(es)" in output
    assert LOGS[name] <= set(metrics(tmp_path / "run")[0])
    load_run(tmp_path / "run")


def test_thresholds_are_computed_once_kept_and_reused(train, tmp_path, capfd):
    config = write_tiny(tmp_path, model=TINY_MODELS["dqvae_entropy"])
    train("train.calibration_images=30", config=config)
    path = tmp_path / "run/thresholds.json"
    found = json.loads(path.read_text())
    assert found["patch_size"] == 4 and found["regions"] == 30 * 16
    want = load_run(tmp_path / "run")[0].thresholds
    assert want.tolist() == pytest.approx(found["thresholds"])
    ratios = [line["ratio_1"] for line in metrics(tmp_path / "run") if "ratio_1" in line]
    assert sum(ratios) / len(ratios) == pytest.approx(0.5, abs=0.1)
    capfd.readouterr()
    train("train.max_train_steps=7", resume="auto", config=config)
    assert "thresholds:" not in capfd.readouterr().err and torch.equal(load_run(tmp_path / "run")[0].thresholds, want)
    train(f"train.output_dir={tmp_path}/given", f"train.calibration_file={path}", config=config)
    assert torch.equal(load_run(tmp_path / "given")[0].thresholds, want)
    with pytest.raises(UserError, match=r"ratios \[0.5\], but the config asks for \[0.3\]"):
        train(f"train.output_dir={tmp_path}/bad", f"train.calibration_file={path}", "model.ratios=[0.3]", config=config)
    with pytest.raises(UserError, match="ranges of ratios need 99 ascending thresholds; they are 1"):
        train(f"train.output_dir={tmp_path}/bad", f"train.calibration_file={path}", "model.ratios=[[0.1,0.9]]", config=config)
    train(f"train.output_dir={tmp_path}/any", "model.ratios=[[0.1,0.9]]", config=config)
    train(f"train.output_dir={tmp_path}/any2", f"train.calibration_file={tmp_path}/any/thresholds.json", "model.ratios=[[0.2,0.6]]",
          config=config)
    assert torch.equal(load_run(tmp_path / "any2")[0].thresholds, load_run(tmp_path / "any")[0].thresholds)
    for text, told in [(json.dumps(found | {"patch_size": 16}), "16 x 16 pixels; this model's have 4 x 4"), ("{}", "thresholds"),
                       ("x", "Expecting")]:
        path.write_text(text)
        with pytest.raises(UserError, match=told):
            train(f"train.output_dir={tmp_path}/bad", f"train.calibration_file={path}", config=config)


# Resuming


def test_resumed_run_is_bit_identical(train, tmp_path):
    train(*EVERYTHING, f"train.output_dir={tmp_path}/whole", "train.max_train_steps=9")
    resumed = [*EVERYTHING, f"train.output_dir={tmp_path}/parts"]
    train(*resumed, "train.max_train_steps=9", "train.max_minutes=0", resume="auto")  # ends after a step
    with open(tmp_path / "parts/metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')  # as a kill leaves it
    with pytest.raises(UserError, match="--resume auto"):
        train(*resumed, "train.max_train_steps=9")
    train(*resumed, "train.max_train_steps=9", resume="auto")
    same_run(tmp_path / "whole", tmp_path / "parts", 9)
    train(*resumed, "train.max_train_steps=9", resume="auto")  # nothing left to do, nothing harmed
    same_run(tmp_path / "whole", tmp_path / "parts", 9)


def same_run(a, b, step):
    a_weights, b_weights = weights(a, step), weights(b, step)
    assert a_weights.keys() == b_weights.keys()
    saved = {re.match(r"optimizer\.\.\w+|\w+", k)[0] for k in a_weights}
    assert saved >= {"model", "ema", "discriminator", "optimizer..model",
                     "optimizer..discriminator", "custom_checkpoint_0"}
    assert [k for k in a_weights if not torch.equal(a_weights[k], b_weights[k])] == []
    a_lines, b_lines = ({line["step"]: line for line in metrics(x) if "loss" in line} for x in (a, b))
    assert a_lines == b_lines and len(a_lines) == step
    assert (a / f"samples/reconstructions_{step:08d}.png").read_bytes() == (b / f"samples/reconstructions_{step:08d}.png").read_bytes()


def test_killed_run_continues_bit_identically(tiny, tmp_path):
    words = ["train_stage1.py", "--config", tiny, *EVERYTHING, "train.max_train_steps=40", "train.checkpointing_steps=4",
             "train.validation_steps=40"]
    forked(tmp_path, *words, f"train.output_dir={tmp_path}/whole")
    killed = tmp_path / "killed"
    process = start(tmp_path / "log", *words, f"train.output_dir={killed}")
    deadline = time.monotonic() + 120
    while not list(killed.glob("checkpoints/step_*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    done = max(p.name for p in killed.glob("checkpoints/step_*"))
    assert done < "step_00000040", "it finished before it could be killed"
    forked(tmp_path, *words, f"train.output_dir={killed}", "--resume", "auto")
    same_run(tmp_path / "whole", killed, 40)


def test_signal_to_all_processes_saves_and_ends_cleanly(tiny, tmp_path):
    """To the loader's workers too, as schedulers do."""
    process = start(tmp_path / "log", "train_stage1.py", "--config", tiny, "train.max_train_steps=100000",
                    "train.validation_steps=100000", "train.dataloader_num_workers=2")
    log = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    process.join(60)
    process.kill()
    output = (tmp_path / "log").read_text()
    assert process.exitcode == 0 and "stopped by SIGTERM" in output and "--resume auto" in output
    last = json.loads(log.read_text().splitlines()[-1])["step"]
    assert (tmp_path / f"run/checkpoints/step_{last:08d}/checkpoint.json").is_file()


def test_mqvae_knows_how_far_its_training_is(train, tmp_path, monkeypatch):
    """Also in a run that continues."""
    config, seen, ours = write_tiny(tmp_path, model=TINY_MODELS["mqvae"]), [], MQVAE.explore
    monkeypatch.setattr(MQVAE, "explore", lambda self, *given: seen.append(self.progress) or ours(self, *given))
    train("train.max_train_steps=10", config=config)
    assert seen == [i / 10 for i in range(10)]
    seen.clear()
    train("train.max_train_steps=10", config=config, resume=f"{tmp_path}/run/checkpoints/step_00000009")
    assert seen == [0.9]
    seen.clear()
    train("train.max_train_steps=10", "model.release_training=true", f"train.output_dir={tmp_path}/release", config=config)
    assert not seen


# Several processes


def launch(tiny, *overrides, processes=2):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return command(*launcher, f"--nproc-per-node={processes}", "train_stage1.py", "--config", tiny,
                   *overrides)


def test_two_processes_equal_one_with_twice_the_batch(train, tiny, tmp_path):
    """Weights, EMA codebook with restarts, the discriminator and both optimizers. With GroupNorm, because BatchNorm's
    statistics are per process; with a large epsilon, because Adam turns a gradient that is zero but for rounding into a
    full step."""
    same = ["train.adam_epsilon=1e-3", "loss.lecam_weight=0.01", "train.use_ema=true", "model.quantizer.codebook_size=128"]
    train(*same, f"train.output_dir={tmp_path}/one", "train.train_batch_size=8")
    output = launch(tiny, *same, f"train.output_dir={tmp_path}/two", "train.train_batch_size=4")
    assert "2 process(es), global batch 8" in output
    one, two = (weights(tmp_path / x, 6) for x in ("one", "two"))
    compare(one, two, skip=("quantizer.queue",))
    assert (one["model.quantizer.ema_count"] == 1).any()  # some codes did restart
    one, two = (metrics(tmp_path / x) for x in ("one", "two"))
    for a, b in zip(one, two):
        for key in a.keys() - {"usage", "perplexity"}:  # of each process's own codes
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), key
    # A run of two processes goes on in two, and in one.
    train(*same, f"train.output_dir={tmp_path}/two", "train.train_batch_size=8", "train.max_train_steps=7", resume="auto")
    train(*same, f"train.output_dir={tmp_path}/one", "train.train_batch_size=8", "train.max_train_steps=7", resume="auto")
    compare(weights(tmp_path / "one", 7), weights(tmp_path / "two", 7), skip=("quantizer.queue",))


# What the user can put right


def test_mistakes_end_with_one_sentence(tiny, tmp_path):
    """As the user sees them: the script prints one line and no traceback."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "say.py").write_text(f"""
import sys, warnings, train_stage1
from harness import launch
def say(*words):
    sys.argv[1:] = ["--config", {str(tiny)!r}, *words]
    try:
        launch.run_main(train_stage1.main)
    except SystemExit as stop:
        print(stop.code, flush=True)
say("train.lr=3")
say("train.seed=x")
say("data.name=folder", "data.root={tmp_path}/nowhere")
say("data.name=folder", "data.root={tmp_path}/empty")
say("loss.perceptual_weight=1")
say("train.mixed_precision=fp16")
say("model.ch=40")
say("train.log_with=nothing")
say("train.max_train_steps=null")
say("train.train_batch_size=0")
say("data.image_size=17")
say("discriminator.num_layers=5")
say("train.adam_beta2=1")
say("train.validation_features=efficientnet_lite2", "train.num_validation_images=1")
""")
    # No network: the proxy does not exist.
    env = {"TORCH_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    output = forked(tmp_path, tmp_path / "say.py", **env).splitlines()
    lines = [line for line in output if line.startswith("error: ") or "Traceback" in line]
    for line, words in zip(lines, [
            "unknown key train.lr;", "train.seed must be int", "there is no folder", "no images for the train split",
            "vgg16-397923af.pth", "fp16", "multiple of 32", "nothing", "max_train_steps", "batch_size must be between 1", "divisible by 2",
            "too small for discriminator.num_layers", "train.adam_beta2 must be between",
            "needs two validation images or more"], strict=True):
        assert line.startswith("error: ") and words in line, line


def test_the_size_of_images_is_checked_without_memory():
    model, discriminator = SimpleNamespace(set_image_size=lambda size: None), PatchGAN()
    train_stage1.check_image_size(2**20, model, discriminator, load_perceptual("efficientnet_lite0"))
    with pytest.raises(UserError, match="too small for discriminator.num_layers"):
        train_stage1.check_image_size(8, model, discriminator, None)


def test_a_run_of_any_rate_resumes_exactly(train, tmp_path):
    config = write_tiny(tmp_path, model=TINY_MODELS["mqvae"])
    words = ["model.topk_ratio=[0.1,0.9]", "loss.disc_weight=0", "train.logging_steps=1"]
    train(*words, f"train.output_dir={tmp_path}/whole", config=config)
    train(*words, "train.max_minutes=0", config=config)
    train(*words, resume="auto", config=config)
    one, other = weights(tmp_path / "whole", 6), weights(tmp_path / "run", 6)
    assert all(torch.equal(one[k], other[k]) for k in one)
    kept = [line["kept_ratio"] for line in metrics(tmp_path / "whole") if "kept_ratio" in line]
    assert len(set(kept)) > 3 and kept == [line["kept_ratio"] for line in metrics(tmp_path / "run") if "kept_ratio" in line]


def test_unreadable_images_stop_the_run(train, tmp_path):
    for i in range(40):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{i}.png")
    for i in range(3):
        (tmp_path / f"broken{i}.png").write_bytes(b"")
    with pytest.raises(DataError, match="above 1% training stops"):
        train("data.name=folder", f"data.root={tmp_path}", "train.max_train_steps=30", "data.val_fraction=0.1")
