"""train_stage2.py under FSDP: two processes on the CPU that share the weights, as `accelerate launch --use_fsdp` starts them."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import ROOT, forked, metrics, same_pictures, weights, write_tiny2

import sample
from dataset import make_dataset
from harness.config import UserError
from harness.models import load_run
from harness.sampling import load_models

# accelerate shards on accelerators only. Here AcceleratorState says FSDP on the CPU too; what accelerate and torch do then, with the
# settings of `accelerate launch`, is their own: shards, collectives (gloo), optimizer. Several runs share a start of two processes,
# so a run does not end them; and each notes how many of the numbers this process holds when it saves. `fused` is what CUDA has.
DRIVER = f"""
import gc, json, os, sys
sys.path.insert(0, {str(ROOT)!r})
import accelerate, torch, train_stage2
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from harness.run import Run
from harness.guard import Guard
from harness.launch import run_main

init, save, AdamW = AcceleratorState.__init__, Run.save, torch.optim.AdamW
begin, backward, count = Guard.begin, Guard.backward, [0]

def state(self, mixed_precision=None, *args, fsdp_plugin=None, **kwargs):
    init(self, mixed_precision, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as accelerate does
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)

def note(self, step):
    states = self.checkpoints.optimizers["model"].state.values()
    moments = [v for s in states for k, v in s.items() if k != "step"]
    parts = {{"model": list(self.modules["model"].parameters()), "ema": list(self.modules["ema"].parameters()), "optimizer": moments}}
    shares = {{k: sum(p.to_local().numel() for p in v) / sum(p.numel() for p in v) for k, v in parts.items()}}
    blocks = sum(type(m).__name__ == "FSDPBlock" for m in self.modules["model"].modules())
    (self.folder / f"shares_{{self.accelerator.process_index}}.json").write_text(json.dumps(shares | {{"blocks": blocks}}))
    save(self, step)

def counted(self):
    begin(self)
    count[0] += 1

def spoiled(self, loss):  # in the second step of a run that is called so, on one of the processes
    is_spoiled = "/spoiled" in self.accelerator.project_dir
    bad = count[0] == 2 and is_spoiled and self.accelerator.process_index == 1
    backward(self, loss * torch.nan if bad else loss)

Guard.begin, Guard.backward = counted, spoiled
AcceleratorState.__init__, Run.save = state, note
gc.freeze()  # accelerate collects garbage in each run
for fused, arguments in json.load(open(sys.argv[1])):
    count[0] = 0
    torch.optim.AdamW = lambda *a, chosen=fused, **k: AdamW(*a, **k | {{"fused": chosen}})
    GradientState._reset_state()
    AcceleratorState._reset_state(True)
    train_stage2.main(arguments)
run_main(lambda: None)  # which ends the two
"""


def launch(folder, runs):
    """Trains these runs, (AdamW is fused, arguments), one after another in two processes under FSDP."""
    (folder / "driver.py").write_text(DRIVER)
    (folder / "runs.json").write_text(json.dumps([(fused, [str(a) for a in arguments]) for fused, arguments in runs]))
    asked = ("--use_fsdp --fsdp_version 2 --num_processes 2 --num_machines 1 --num_cpu_threads_per_process 1 --mixed_precision no "
             "--dynamo_backend no driver.py")
    env = prepare_multi_gpu_env(launch_command_parser().parse_args(asked.split()))
    return forked(folder, folder / "driver.py", folder / "runs.json", processes=2, **env)


def equal(one, other, atol=0.0):
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], atol=atol, rtol=0, msg=key)


SAME = ["train.use_ema=true", "train.ema_decay=0.9", "train.max_grad_norm=0.5", "train.gradient_accumulation_steps=2",
        "train.adam_weight_decay=0.1", "model.label_dropout=0", "train.learning_rate=1e-2", "train.adam_epsilon=1e-3"]
NOISY = ["train.use_ema=true", "train.ema_decay=0.9", "train.max_grad_norm=0.5", "model.dropout=0.2", "train.adam_weight_decay=0.1",
         "train.max_train_steps=12", "train.validation_steps=6", "train.checkpointing_steps=100", "train.train_batch_size=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs under FSDP: `fsdp`, the same from step 3 of an ordinary run (`from_plain`), and one in bf16 with dropout, uninterrupted
    (`whole`) and stopped by a limit of time, then resumed (`parts`). `plain` is one process with twice the batch."""
    runs, folders = [], {}
    for name in ("gpt", "dq_transformer"):
        folders[name] = tmp_path_factory.mktemp(name)
        config = folders[name] / "tiny2.yaml"
        write_tiny2(folders[name], name)
        forked(folders[name], "train_stage2.py", "--config", config, *SAME, f"train.output_dir={folders[name]}/plain")
        half = ["--config", config, *SAME, "train.train_batch_size=2"]
        runs += [(name == "gpt", [*half, f"train.output_dir={folders[name]}/fsdp"]),
                 (False, [*half, f"train.output_dir={folders[name]}/from_plain", "--resume",
                          folders[name] / "plain/checkpoints/step_00000003"])]
    noisy = ["--config", config, *NOISY, "train.mixed_precision=bf16"]
    parts = [*noisy, f"train.output_dir={folders[name]}/parts"]
    three = ["train.max_train_steps=3", "train.checkpointing_steps=1", "train.checkpoints_total_limit=3"]
    runs += [(fused, [*half, *three, f"train.output_dir={folders[name]}/spoiled_{fused}"]) for fused in (True, False)]
    runs += [(False, [*noisy, f"train.output_dir={folders[name]}/whole"]), (False, [*parts, "train.max_minutes=0"]),
             (False, [*parts, "--resume", "auto"])]
    # Masks are drawn in each process, so a MaskTransformer is compared with the same two processes without FSDP
    folders["mask"] = tmp_path_factory.mktemp("mask")
    words = ["--config", write_tiny2(folders["mask"], "mask_dqvae"), *SAME, "train.train_batch_size=2"]
    runs.append((False, [*words, f"train.output_dir={folders['mask']}/fsdp"]))
    forked(folders["mask"], "train_stage2.py", *words, f"train.output_dir={folders['mask']}/plain", processes=2)
    folders["said"] = launch(folders[name], runs)
    return folders


def test_a_mask_transformer_learns_the_same_with_half_of_the_weights_each(folder):
    plain, fsdp = folder["mask"] / "plain", folder["mask"] / "fsdp"
    shares = json.loads((fsdp / "shares_0.json").read_text())
    assert shares.pop("blocks") == 2 and shares == pytest.approx({"model": 0.5, "ema": 0.5, "optimizer": 0.5}, abs=0.05)
    one, other = ({k: v for k, v in weights(run, 6).items() if k.startswith(("model.", "ema."))} for run in (plain, fsdp))
    equal(one, other, atol=1e-5)
    bits = [[line["val_bits"] for line in metrics(run) if "val_bits" in line] for run in (plain, fsdp)]
    assert bits[0] == pytest.approx(bits[1], rel=1e-4)
    # The bits do not depend on who shares the images out
    model, stage1, config, _ = load_models(plain)
    images = make_dataset(**config["data"], split="val")
    with torch.no_grad():
        codes = stage1.encode(torch.stack([images[i][0] for i in range(4)]))
        own = model.bits(codes, torch.tensor([images[i][1] for i in range(4)])).mean().item()
    assert own == pytest.approx(bits[0][-1], rel=1e-4)


@pytest.mark.parametrize("name", ["gpt", "dq_transformer"])
def test_two_processes_with_half_of_the_weights_each_equal_one(folder, name):
    plain, fsdp = folder[name] / "plain", folder[name] / "fsdp"
    for rank in (0, 1):
        shares = json.loads((fsdp / f"shares_{rank}.json").read_text())
        assert shares.pop("blocks") == {"gpt": 1, "dq_transformer": 2}[name]  # each is gathered on its own
        assert shares == pytest.approx({"model": 0.5, "ema": 0.5, "optimizer": 0.5}, abs=0.03)
    files = [{p.name for p in (run / "checkpoints/step_00000006").iterdir()} for run in (plain, fsdp)]
    assert files[1] - files[0] == {"random_states_1.pkl"} and not files[0] - files[1]
    equal(weights(plain, 6), weights(fsdp, 6), atol=1e-5)  # optimizer.bin too
    lines = [[{k: line[k] for k in ("step", "loss", "grad_norm", "val_bits") if k in line} for line in metrics(run)]
             for run in (plain, fsdp)]
    for one, other in zip(*lines, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert len(lines[0]) == 8 and max(line.get("grad_norm", 0) for line in lines[0]) > 0.5  # some were clipped
    assert same_pictures(*(run / "samples/samples_00000006.png" for run in (plain, fsdp)))
    equal(*[load_run(run, "best")[0].state_dict() for run in (plain, fsdp)], atol=1e-5)


@pytest.mark.parametrize("name", ["gpt", "dq_transformer"])
def test_a_checkpoint_goes_on_with_and_without_fsdp(folder, name, train2, tmp_path):
    train2(folder[name] / "tiny2.yaml", *SAME, f"train.output_dir={tmp_path}", resume=str(folder[name] / "fsdp/checkpoints/step_00000003"))
    for run in (tmp_path, folder[name] / "from_plain"):
        equal(weights(folder[name] / "plain", 6), weights(run, 6), atol=1e-5)


def test_sample_reads_its_checkpoints(folder, tmp_path):
    for run in ("plain", "fsdp"):
        sample.main(["--run", str(folder["gpt"] / run), "-n", "5", "--out", str(tmp_path / f"{run}.npz")])
    with np.load(tmp_path / "plain.npz") as one, np.load(tmp_path / "fsdp.npz") as other:
        changed = abs(one["arr_0"].astype(int) - other["arr_0"]) > 1
        assert changed.any((1, 2, 3)).sum() <= 1  # of 5: their weights are equal but for rounding


def test_resume_is_exact(folder, train2, tmp_path):
    assert "stopped by train.max_minutes=0 at step 10 of 12" in folder["said"]
    whole, parts = folder["dq_transformer"] / "whole", folder["dq_transformer"] / "parts"
    equal(weights(whole, 12), weights(parts, 12))
    assert metrics(whole) == metrics(parts)
    # bf16: the weights stay float32, and so does the loss: the mean of two from 2 to 4 in bf16 would be a multiple of 1/128
    assert {v.dtype for k, v in weights(whole, 12).items() if k.startswith("model.")} == {torch.float32}
    losses = torch.tensor([line["content"] for line in metrics(whole) if "content" in line])
    assert len(losses) == 12 and losses.min() > 2 and losses.max() < 4 and not torch.equal(losses, (losses * 128).round() / 128)
    train2(folder["dq_transformer"] / "tiny2.yaml", *NOISY, "train.mixed_precision=bf16", "model.dropout=0", "train.train_batch_size=4",
           f"train.output_dir={tmp_path}")
    plain = torch.tensor([line["content"] for line in metrics(tmp_path) if "content" in line])
    torch.testing.assert_close(losses, plain, atol=0.2, rtol=0)


@pytest.mark.parametrize("fused", [True, False])
def test_a_bad_step_of_one_process_changes_nothing(folder, fused):
    run = folder["dq_transformer"] / f"spoiled_{fused}"
    before, after, last = (weights(run, step) for step in (1, 2, 3))
    changed = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"ema"} and all(v.isfinite().all() for v in last.values())
    assert {"model", "optimizer"} <= {k.split(".")[0] for k in last if not torch.equal(after[k], last[k])}
    assert [line["bad_steps"] for line in metrics(run) if "loss" in line] == [0, 1, 0]


@pytest.mark.parametrize("stage, kind, options, sentence", [
    (2, "FSDP", {"fsdp_version": 2}, "FSDP, with train.mixed_precision=fp16, which is not supported; use bf16"),
    (2, "FSDP", {"fsdp_version": 1}, "accelerate was asked for FSDP, version 1, which is not supported; add --fsdp_version 2"),
    (2, "FSDP", {"fsdp_version": 2, "cpu_offload": True}, "FSDP, with weights on the CPU, which is not supported"),
    (2, "DEEPSPEED", {}, "accelerate was asked for DEEPSPEED, which is not supported; use --multi_gpu, or in stage 2 --use_fsdp"),
    (2, "MEGATRON_LM", {}, "accelerate was asked for MEGATRON_LM, which is not supported; use --multi_gpu"),
    (1, "FSDP", {"fsdp_version": 2}, "FSDP, but stage 1 needs the whole model in every process; use --multi_gpu"),
])
def test_what_is_refused(train, train2, tmp_path, monkeypatch, stage, kind, options, sentence):
    class Asked(Accelerator):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.state.distributed_type, self.state.fsdp_plugin = DistributedType[kind], FullyShardedDataParallelPlugin(**options)

    monkeypatch.setattr("harness.run.Accelerator", Asked)
    with pytest.raises(UserError, match=sentence) as error:
        setting = "train.mixed_precision=" + ("fp16" if "fp16" in sentence else "no")
        train(setting) if stage == 1 else train2(write_tiny2(tmp_path, "gpt"), setting)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("run*"))
