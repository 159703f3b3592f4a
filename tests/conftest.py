"""What the tests share. They run on small networks, on the CPU, and need neither a network nor downloaded weights."""

import errno
import json
import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side: one thread each, also for the processes that they start
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "fixtures")]
FORKS = multiprocessing.get_context("forkserver")  # its server imports these once, which is most of the time of a short script
FORKS.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "torchvision", "accelerate"])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A test goes to the process that is free, but tests that share runs go to one. (xdist_group, for this, does nothing in pytest 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return file if file.endswith(("test_fsdp.py", "test_evaluate.py")) else nodeid

    return Scheduling(config, log)


TINY = {  # a stage-1 run of about a second
    "model": "name: vqgan\n  ch: 32\n  ch_mult: [1, 1]\n  num_res_blocks: 1\n  attn_resolutions: []\n  z_channels: 32\n"
             "  quantizer: {codebook_size: 32, dim: 8, ema_decay: 0.9}",
    "data": "name: shapes\n  image_size: 16\n  train_size: 40\n  val_size: 4",
    "loss": "perceptual_weight: 0\n  disc_weight: 0.1\n  disc_start: 2",
    "discriminator": "ch: 8\n  num_layers: 1\n  norm: group",
    "train": "train_batch_size: 4\n  max_train_steps: 6\n  learning_rate: 1.0e-3\n  dataloader_num_workers: 0\n"
             "  logging_steps: 1\n  validation_steps: 3\n  checkpointing_steps: 3\n  log_with: null",
}


NET = "  ch: 32\n  num_res_blocks: 1\n  attn_resolutions: []\n  z_channels: 32\n  quantizer: {codebook_size: 32, dim: 8, ema_decay: 0.9}"
TINY_MODELS = {
    "vqgan": TINY["model"],
    "vqvae": "name: vqvae\n  ch: 32\n  quantizer: {codebook_size: 32, dim: 8, l2_norm: true}",
    "mqvae": f"name: mqvae\n  ch_mult: [1, 1]\n  demask_layers: 2\n{NET}",
    "dqvae": f"name: dqvae\n  factors: [4, 2]\n  ch_mult: [1, 1, 1]\n  decoder_ch_mult: [1, 1]\n{NET}",
    "dqvae_triple": "name: dqvae\n  factors: [8, 4, 2]\n  ratios: [0.3, 0.3]\n  ch_mult: [1, 1, 1, 1]\n"
                    f"  decoder_ch_mult: [1, 1]\n{NET}",
    "dqvae_entropy": f"name: dqvae\n  router: entropy\n  factors: [4, 2]\n  ch_mult: [1, 1, 1]\n  decoder_ch_mult: [1, 1]\n{NET}",
}


def share_of_others(one, other):
    """The share of integers that differ between two dicts of codes, the largest over their tensors.
    Rows alone and in a batch round differently, so that choices between near ties may too."""
    assert one.keys() == other.keys() and all(one[k].shape == other[k].shape for k in one)
    return max((one[k] != other[k]).float().mean().item() for k in one)


def same_pictures(one, other):
    """Whether two PNGs differ by rounding alone: by a grey level, or in some codes' pixels."""
    one, other = (np.asarray(Image.open(path), dtype=np.int64) for path in (one, other))
    return one.shape == other.shape and (abs(one - other) > 1).mean() < 0.2


def write_tiny(folder, **sections):
    """A tiny config in this folder, with other sections; its run folder is folder / "run"."""
    path = folder / "tiny.yaml"
    path.write_text("".join(f"{name}:\n  {lines}\n" for name, lines in (TINY | sections).items()) + f"  output_dir: {folder / 'run'}\n")
    return path


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture
def tiny(tmp_path):
    return write_tiny(tmp_path)


@pytest.fixture
def train(tiny):
    """Runs train_stage1 in this process on the tiny config: train("key.sub=value", ..., resume="auto")."""
    from accelerate.state import AcceleratorState, GradientState

    import train_stage1

    def run(*overrides, resume=None, config=tiny):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        train_stage1.main(["--config", str(config), *(["--resume", resume] if resume else []), *overrides])

    yield run
    AcceleratorState._reset_state(True)


def run_stage2(config, *overrides, resume=None):
    """Runs train_stage2 in this process."""
    from accelerate.state import AcceleratorState, GradientState

    import train_stage2

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    train_stage2.main(["--config", str(config), *(["--resume", resume] if resume else []), *overrides])
    AcceleratorState._reset_state(True)


@pytest.fixture
def train2():
    """Runs train_stage2 in this process: train2(config, "key.sub=value", ..., resume="auto")."""
    from accelerate.state import AcceleratorState

    yield run_stage2
    AcceleratorState._reset_state(True)


TRANSFORMERS = {  # and the stage-1 model whose codes they read
    "gpt": ("name: gpt\n  n_layer: 1", "vqgan"),
    "stackformer": ("name: stackformer\n  code_layers: 1\n  position_layers: 1", "mqvae"),
    "dq_transformer": ("name: dq_transformer\n  position_layers: 1\n  content_layers: 1", "dqvae"),
    "dq_transformer_triple": ("name: dq_transformer\n  position_layers: 1\n  content_layers: 1", "dqvae_triple"),
    "mask_vqgan": ("name: mask_transformer\n  layout_layers: 1\n  content_layers: 1", "vqgan"),
    "mask_mqvae": ("name: mask_transformer\n  layout_layers: 1\n  content_layers: 1", "mqvae"),
    "mask_dqvae": ("name: mask_transformer\n  layout_layers: 1\n  content_layers: 1", "dqvae"),
}


def save_stage1(folder, name, **data):
    """The run folder of an untrained stage-1 model whose codes vary."""
    import torch

    from dataset import make_dataset
    from harness.config import load_config
    from harness.models import make_model, save_run
    from harness.settings import STAGE1_SECTIONS

    config = load_config(str(write_tiny(folder, model=TINY_MODELS[name])), [], STAGE1_SECTIONS)
    config["data"] |= data
    torch.manual_seed(0)
    model = make_model(config)
    images = make_dataset("shapes", image_size=config["data"]["image_size"])
    images = torch.stack([images[i][0] for i in range(16)])
    model.calibrate([images])
    with torch.no_grad():
        model(images)  # in training mode: codes become vectors of these images
    save_run(folder / f"stage1_{name}", config, {"model": model})
    return folder / f"stage1_{name}"


def write_tiny2(folder, name, **sections):
    """A tiny stage-2 config, and the stage-1 run that it needs; its run folder is folder / "run2"."""
    model, stage1 = TRANSFORMERS[name]
    sections = {
        "model": f"{model}\n  n_head: 2\n  n_embd: 16\n  dropout: 0.0",
        "codes": f"stage1: {save_stage1(folder, stage1)}\n  batch_size: 8",
        "sample": "columns: 3\n  rows: 2",
        "train": "class_conditional: true\n  train_batch_size: 4\n  max_train_steps: 6\n  learning_rate: 1.0e-3\n"
                 "  dataloader_num_workers: 0\n  logging_steps: 1\n  validation_steps: 3\n  checkpointing_steps: 3\n  log_with: null",
    } | sections
    sections["train"] = sections.pop("train")  # the last
    path = folder / "tiny2.yaml"
    path.write_text("".join(f"{key}:\n  {lines}\n" for key, lines in sections.items()) + f"  output_dir: {folder / 'run2'}\n")
    return path


def command(*words, check=True, env=None, **kwargs):
    """Runs a command in the repository's folder; its combined output."""
    done = subprocess.run([str(w) for w in words], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=os.environ | (env or {}), **kwargs)
    assert done.returncode == 0 or not check, done.stdout
    return done.stdout


def start(output, *words, **env):
    """A process that runs `python WORDS`, a script and its arguments, but is a fork, and leads a group; its output is added to a file."""
    process = FORKS.Process(target=_script, args=(str(output), [str(w) for w in words], dict(os.environ | env)))
    process.start()
    return process


def _script(output, words, env):
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # its own processes are those of any script
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv[:] = words
    runpy.run_path(words[0], run_name="__main__")


def start_two(output, *words, **env):
    """Two such processes that train together, as torch's launcher starts them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    return [start(output, *words, ACCELERATE_USE_CPU="true", WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank, MASTER_ADDR="localhost",
                  MASTER_PORT=port, **env) for rank in "01"]


def forked(folder, *words, processes=1, status=0, **env):
    """Runs a script as such a process, or as two that train together, and checks how they end; their output."""
    output = folder / "forked.log"
    output.unlink(missing_ok=True)
    begun = start_two(output, *words, **env) if processes == 2 else [start(output, *words, **env)]
    for process in begun:
        process.join(100)
        process.kill()
    assert [process.exitcode for process in begun] == [status] * processes, output.read_text()
    return output.read_text()


def copy_test(folder, files, imports, *models):
    """The files alone, with nothing importable but torch: each stage-1 model trains a step and reconstructs."""
    command_in_copy(folder, files, f"""
from vqgan import VQGAN, VectorQuantizer
{imports}
for model in ({", ".join(models)},):
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    out = model(images)
    ((out.images - images).abs().mean() + sum(out.losses.values())).backward()
    optimizer.step()
    assert model.eval().decode(model.encode(images)).shape == images.shape
""")


def command_in_copy(folder, files, code):
    """Runs the code in an empty folder with these files, and nothing importable but torch."""
    for file in files:
        shutil.copy(ROOT / file, folder)
    places = ["", *(str(ROOT / place) for place in (".", "tests", "tests/fixtures"))]
    (folder / "use.py").write_text(f"""
import sys
class OnlyTorch:
    missing = {{"accelerate", "torchvision", "lpips", "yaml", "tqdm", "tensorboard", "safetensors", "einops",
               "dataset", "harness", "losses", "scipy", "PIL"}}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.missing:
            raise ImportError(name)
import torch
sys.meta_path.insert(0, OnlyTorch())
for name in [name for name in sys.modules if name.split(".")[0] in OnlyTorch.missing]:
    del sys.modules[name]
sys.path[:] = [{str(folder)!r}, *(path for path in sys.path if path not in {places!r})]
{code}
print("done")
""")
    assert "done" in forked(folder, folder / "use.py")


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


def disk_is_full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def class_folders(folder, classes, count=8):
    shutil.rmtree(folder, ignore_errors=True)
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(count * k + i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{name}{i}.png")


def metrics(folder):
    """The lines of metrics.jsonl without what depends on the clock."""
    clock = {"images_per_second", "tokens_per_second", "peak_memory_gib"}
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in (folder / "metrics.jsonl").open()]


def weights(folder, step):
    """All tensors in a checkpoint, by file and name."""
    from safetensors.torch import load_file

    tensors = {}
    for path in sorted((folder / f"checkpoints/step_{step:08d}").iterdir()):
        if path.suffix == ".safetensors":
            tensors |= {f"{path.stem}.{k}": v.clone() for k, v in load_file(path).items()}  # not a map of the file
        elif path.suffix in (".bin", ".pkl") and not path.name.startswith("random"):
            tensors |= {f"{path.stem}.{k}": v for k, v in _tensors(torch.load(path, weights_only=True))}
    return tensors


def _tensors(value, name=""):
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (dict, list)):
        for k, v in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(v, f"{name}.{k}")
