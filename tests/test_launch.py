"""From the command line to main: one sentence for what a user can mend, and how processes end."""

import os
import signal
import time

import pytest
import torch
import yaml
from conftest import ROOT, broken_script, forked, metrics, start_two, write_tiny2
from PIL import Image

from harness import checkpoint, launch


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


def raise_(error):
    raise error


@pytest.mark.parametrize("main", [lambda: torch.empty(2**60), lambda: [0] * 2**60,
                                  lambda: raise_(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee ..."))])
def test_too_little_memory_is_one_sentence(main):
    with pytest.raises(SystemExit, match="error: out of memory .*; halve the batch size.*saved before is whole") as stop:
        launch.run_main(main)
    assert "\n" not in stop.value.code


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


# How processes end


def test_an_error_that_nobody_thought_of_ends_the_loaders_workers(tmp_path):
    """Python asks them by the one SIGTERM that they leave to the trainer, and waits."""
    words = broken_script(tmp_path, "def backward(self, loss):\n    raise RuntimeError('boom')\nGuard.backward = backward")
    output = forked(tmp_path, *words, "train.dataloader_num_workers=2", status=1)
    assert "Traceback" in output and "RuntimeError: boom" in output


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
