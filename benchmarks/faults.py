"""Breaks trainings on purpose and counts what is lost, on tiny networks and the CPU.
(tests/test_checkpoint.py runs it for a moment.)

    python benchmarks/faults.py [--minutes 10] [--seed 0] [kills stops disk damage images processes fuzz leak]

    kills      SIGKILL, at random and at the worst moments (amid a checkpoint, a cache, a rename); --resume auto, until the run has ended
    stops      SIGTERM, SIGINT and SIGUSR1 at random moments; the same
    disk       runs on a file system that is too small, which then gets more room (Linux; it is mounted in a namespace of its own)
    damage     files of checkpoints cut short, with a bit flipped, or removed
    images     files that are broken at random places, in training and in evaluation
    processes  one of two processes killed
    fuzz       settings with random values: each must end in a run or in one sentence
    leak       2,000 steps of the quickstart with validation, checkpoints and pictures: memory and open files

What was broken must go on and end like a run that was not: weights, optimizers, random states, log, pictures and code caches, bit
for bit; a loss is anything else, and makes the exit status 1. The parts share the time, but `leak` takes as long as it takes.
"""

import argparse
import ctypes
import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import psutil
import torch
import torchvision
from accelerate.utils import load
from conftest import TINY_MODELS, metrics, weights, write_tiny, write_tiny2
from safetensors.torch import load_file

import dataset
import train_stage1
import train_stage2
from harness import checkpoint, code_cache, launch
from harness.config import setting_names, signature
from harness.models import model_class
from harness.settings import STAGE1_SECTIONS
from harness.settings_stage2 import STAGE2_SECTIONS
from vqgan import VQGAN

LOSSES: list[str] = []
SETTINGS = ["train.max_train_steps=12", "train.use_ema=true", "train.ema_decay=0.9", "train.checkpointing_steps=2",
            "train.validation_steps=4"]
STAGES = {1: (train_stage1, "mqvae", ["discriminator.norm=batch", "loss.lecam_weight=0.01", "loss.disc_start=1"]),
          2: (train_stage2, "dq_transformer", ["model.dropout=0.1", "train.gradient_accumulation_steps=2"])}
# Where a kill hurts most: when this is called.
MOMENTS = {
    "amid weights": (checkpoint, "save_file"), "amid optimizers": (torch, "save"), "before the manifest": (checkpoint, "write_manifest"),
    "before a rename": (os, "replace"), "before fsync": (os, "fsync"), "while removing": (shutil, "rmtree"),
    "amid a picture": (torchvision.utils, "save_image"), "amid a code cache": (os, "pwrite"),
    "making a cache": (code_cache, "make_file"),
}


class Lab:
    """A folder with the configs of one stage, and runs of it in child processes, which cost no imports."""

    def __init__(self, folder: Path, stage: int, rng: random.Random):
        self.folder, self.stage, self.rng = folder, stage, rng
        folder.mkdir(parents=True)
        self.loop, name, more = STAGES[stage]
        self.config = write_tiny(folder, model=TINY_MODELS[name]) if stage == 1 else write_tiny2(folder, name)
        self.settings = [*SETTINGS, *more]
        began = time.monotonic()
        self.whole = self.run(folder / "whole")
        self.seconds = time.monotonic() - began

    def words(self, run: Path, *more: str) -> list[str]:
        caches = [f"codes.cache_dir={run}_codes"] if self.stage == 2 else []
        return ["--config", str(self.config), "--resume", "auto", *self.settings, f"train.output_dir={run}", *caches, *more]

    def start(self, run: Path, *more: str, before=lambda: None) -> int:
        """A child process that trains; its id. `before` is called in it first."""
        sys.stdout.flush()
        if pid := os.fork():
            return pid
        status = 70
        try:
            torch.set_num_threads(1)
            log = os.open(log_of(run), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            before()
            launch.run_main(lambda: self.loop.main(self.words(run, *more)))
            status = 0
        except SystemExit as stop:
            print(stop.code, flush=True)
            status = 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            os._exit(status)

    def run(self, run: Path) -> Path:
        status = wait(self.start(run))
        if status:
            lose(f"{run} ended with {status}: {tail(run)}")
        return run

    def compare(self, run: Path) -> None:
        """A run that was broken with the one that was not."""
        if wrong := different(self.whole, run):
            lose(f"{run} differs from a run that was not broken: {wrong}")
        if left := [*run.rglob(".*")]:
            lose(f"{run} holds leftovers: {left}")
        shutil.rmtree(run.parent)


def different(a: Path, b: Path) -> list[str]:
    """What is not the same in two runs: tensors and random states of the last checkpoint and the best, pictures, log, code caches."""
    found = [{p.name for p in (run / "samples").iterdir()} for run in (a, b)]
    wrong = [f"pictures {found[0] ^ found[1]}"] if found[0] != found[1] else []
    one, other = contents(a), contents(b)
    wrong += [k for k in one if k not in other or not torch.equal(one[k], other[k])]
    wrong += [n for n in found[0] & found[1] if not filecmp.cmp(a / "samples" / n, b / "samples" / n, shallow=False)]
    # A run that was killed after its last step validates once more.
    lines = [list(dict.fromkeys(json.dumps(line) for line in metrics(run))) for run in (a, b)]
    wrong += [f"metrics.jsonl: {x}" for x in lines[0] if x not in lines[1]] + [f"metrics.jsonl: {x}" for x in lines[1] if x not in lines[0]]
    for path in Path(f"{a}_codes").rglob("*.bin"):
        if not filecmp.cmp(path, Path(f"{b}_codes") / path.relative_to(f"{a}_codes"), shallow=False):
            wrong.append(path.name)
    return wrong


def contents(run: Path) -> dict[str, torch.Tensor]:
    states = load(run / "checkpoints/step_00000012/random_states_0.pkl")
    best = {f"best.{k}": v for k, v in load_file(run / "checkpoints/best.safetensors").items()}
    random_states = {"torch": states["torch_manual_seed"], "python": torch.tensor(states["random_state"][1]),
                     "numpy": torch.tensor(states["numpy_random_seed"][1].astype(int))}
    return weights(run, 12) | best | random_states


def wait(pid: int, seconds: float = 600) -> int | None:
    """Its exit status, negative for a signal; None if it still runs after so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def tail(run: Path) -> str:
    lines = tail_all(run).strip().splitlines()
    return lines[-1][-300:] if lines else ""


def lose(sentence: str) -> None:
    LOSSES.append(sentence)
    print(f"LOSS: {sentence}", flush=True)


def whole(run: Path) -> None:
    """Among the checkpoints that have their final name, all but the one that was being removed must be whole."""
    found = sorted((run / "checkpoints").glob("step_*"), reverse=True)
    for path in found[:1]:
        if what := checkpoint.damage(path):
            lose(f"{path} is damaged: {what}")


def rounds(labs: list[Lab], seconds: float, do) -> None:
    """do(lab, run) for a new run, by turns of the stages, for so long and at least once for each."""
    end, number = time.monotonic() + seconds, 0
    while number < len(labs) or time.monotonic() < end:
        lab = labs[number % len(labs)]
        do(lab, Path(tempfile.mkdtemp(prefix="run", dir=lab.folder)) / "run")
        number += 1


# ---------------------------------------------------------------------------------------------------------------------
# The parts: each prints what it did


def kills(labs: list[Lab], seconds: float) -> None:
    count: Counter = Counter()

    def at(moment: str, number: int):
        """Kills this process at the number-th call of what belongs to the moment, half done where that can be."""
        module, name = MOMENTS[moment]
        original, calls = getattr(module, name), [0]

        def fatal(*args, **kwargs):
            calls[0] += 1
            if calls[0] == number:
                if name in ("save_file", "save"):
                    original(*args, **kwargs)
                    written = Path(args[1])
                    os.truncate(written, written.stat().st_size // 2)
                if name == "pwrite":
                    original(args[0], args[1][:len(args[1]) // 2], args[2])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(module, name, fatal)

    def broken(lab: Lab, run: Path) -> None:
        for _ in range(3):
            moment = lab.rng.choice(["at random", *MOMENTS])
            if moment == "at random":
                pid = lab.start(run)
                status = wait(pid, lab.rng.uniform(0, 1.2 * lab.seconds))
                if status is None:
                    os.kill(pid, signal.SIGKILL)
                    status = wait(pid)
            else:
                number = lab.rng.randint(1, 6)
                status = wait(lab.start(run, before=lambda moment=moment, number=number: at(moment, number)))
            if status == -signal.SIGKILL:
                count[moment] += 1
                whole(run)
            elif status:
                lose(f"{run} ended with {status}: {tail(run)}")
        lab.run(run)
        lab.compare(run)

    rounds(labs, seconds, broken)
    print(f"kills: {sum(count.values())} survived ({', '.join(f'{v} {k}' for k, v in sorted(count.items()))})", flush=True)


def stops(labs: list[Lab], seconds: float) -> None:
    count: Counter = Counter()

    def broken(lab: Lab, run: Path) -> None:
        for _ in range(3):
            number = lab.rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
            pid = lab.start(run, f"train.dataloader_num_workers={lab.rng.randint(0, 1)}")
            opened = time.monotonic() + 60  # before Run is made, a signal ends the process as it would any other
            while "encoding" not in (text := tail_all(run)) and "parameters" not in text and time.monotonic() < opened:
                time.sleep(0.002)
            status = wait(pid, lab.rng.uniform(0, lab.seconds))
            if status is None:
                os.kill(pid, number)
                status = wait(pid)
                said = tail_all(run)
                count[number.name] += 1
                over = "on validation images" in said or "bits per validation image" in said  # the last line of a run
                obeyed = f"stopped by {number.name}" in said or "12 steps" in said
                if "Traceback" in said or not (status in (0, 1) and obeyed or status == -number and over):
                    lose(f"{run} ended with {status} after {number.name}: {tail(run)}")
            Path(f"{run}.log").unlink()
            whole(run)
        lab.run(run)
        lab.compare(run)

    rounds(labs, seconds, broken)
    print(f"stops: {sum(count.values())} signals obeyed ({', '.join(f'{v} {k}' for k, v in sorted(count.items()))})", flush=True)


def tail_all(run: Path) -> str:
    return log_of(run).read_text() if log_of(run).is_file() else ""


def log_of(run: Path) -> Path:
    """Beside the run; for one on the small disk, beside that."""
    return (run.parent if run.parent.name == "small" else run).with_suffix(".log")


def disk(labs: list[Lab], seconds: float) -> None:
    """In a namespace of its own, in which this process may mount."""
    libc, place = ctypes.CDLL(None, use_errno=True), labs[0].folder.parent / "small"
    place.mkdir()
    count: Counter = Counter()

    def mount(size: int, flags: int = 0) -> bool:
        return libc.mount(b"tmpfs", str(place).encode(), b"tmpfs", flags, f"size={size}".encode()) == 0

    try:
        private = libc.unshare(0x20000) == 0 and libc.mount(b"none", b"/", None, 0x44000, None) == 0  # others do not see what we mount
        possible = private and mount(2**20)
    except AttributeError:  # not Linux
        possible = False
    if not possible:
        print("disk: left out, because this machine does not let us mount a file system (try as root)", flush=True)
        return
    libc.umount(str(place).encode())

    def broken(lab: Lab, run: Path) -> None:
        full = sum(p.stat().st_size for f in (lab.whole, Path(f"{lab.whole}_codes")) for p in f.rglob("*") if p.is_file())
        size, run = lab.rng.randint(1, full), place / "run"
        mount(size)
        for _ in range(6):
            log_of(run).unlink(missing_ok=True)
            status = wait(lab.start(run))
            said = tail_all(run)
            told = "could not be written" in said or "No space left on device" in said
            if status not in (0, 1) or "Traceback" in said or (status == 1 and not told):
                lose(f"on a full disk {run} ended with {status}: {tail(run)}")
            if status == 0 and "could not be written" not in said:
                break
            count["disks"] += 1
            count["checkpoints"] += "the checkpoint of step" in said
            count["pictures and logs"] += said.count("training goes on")
            whole(run)
            if list((run / "checkpoints").glob(".*")) or list(run.rglob("*.tmp")):
                lose(f"{run} holds leftovers")
            if status == 0:
                break
            size += full // 4
            mount(size, 32)  # remount
        mount(10 * full, 32)
        if wait(lab.start(run)) or [w for w in different(lab.whole, run) if w.startswith("checkpoints/step")]:
            lose(f"{run} could not go on with more room: {tail(run)}")
        libc.umount(str(place).encode())

    rounds(labs, seconds, broken)
    print(f"disk: {count['disks']} full disks, on which {count['checkpoints']} checkpoints and {count['pictures and logs']} pictures, logs "
          "or best weights could not be written", flush=True)


def damage(labs: list[Lab], seconds: float) -> None:
    count: Counter = Counter()

    def broken(lab: Lab, run: Path) -> None:
        shutil.copytree(lab.whole, run)
        if lab.stage == 2:
            shutil.copytree(f"{lab.whole}_codes", f"{run}_codes")
        newest = run / "checkpoints/step_00000012"
        path = lab.rng.choice(sorted(newest.iterdir()))
        how = lab.rng.choice(["cut short", "flipped", "removed"])
        data = bytearray(path.read_bytes())
        if how == "removed":
            path.unlink()
        elif how == "cut short":
            path.write_bytes(data[:lab.rng.randrange(len(data))])
        else:
            data[lab.rng.randrange(len(data))] ^= 1 << lab.rng.randrange(8)
            path.write_bytes(data)
        count[how] += 1
        harmless = path.name == "checkpoint.json" and how == "flipped"  # in its white space
        if wait(lab.start(run)) != 0 or not (f"{newest} is damaged" in tail_all(run) or harmless):
            lose(f"{path}, {how}, was not found: {tail(run)}")
        shutil.rmtree(run / "checkpoints/abandoned_step_00000012", ignore_errors=True)
        lab.compare(run)

    rounds(labs, seconds, broken)
    print(f"damage: {sum(count.values())} files ({', '.join(f'{v} {k}' for k, v in sorted(count.items()))})", flush=True)


def images(labs: list[Lab], seconds: float) -> None:
    import numpy as np
    from PIL import Image

    rng, root, count, end = labs[0].rng, labs[0].folder.parent / "images", Counter(), time.monotonic() + seconds
    (root / "train").mkdir(parents=True)
    for i in range(200):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(root / f"train/{i:03}.png")
    shutil.copytree(root / "train", root / "val")
    while time.monotonic() < end or not count:
        size, kind = (rng.randint(1, 40), rng.randint(1, 40)), rng.choice(["png", "jpeg", "gif", "webp", "bmp", "tiff", "ppm"])
        mode = rng.choice(["RGB", "L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
        path = root / f"train/100.{kind}"
        try:
            Image.effect_noise(size, 99).convert(mode).save(path, kind)
        except (OSError, ValueError):  # the format has no such mode
            continue
        data = bytearray(path.read_bytes())
        for _ in range(rng.randint(0, 3)):
            how = rng.choice(["flip", "cut", "swap"])
            if how == "flip":
                data[rng.randrange(min(len(data), 60))] = rng.randrange(256)  # of the header, most likely
            elif how == "cut":
                data = data[:max(1, rng.randrange(len(data)))]
            else:
                rng.shuffle(data)
        path.write_bytes(data)
        (root / "train/100.png").unlink(missing_ok=True) if kind != "png" else None
        shutil.copy(path, root / "val" / path.name)
        for split in ("train", "val"):
            found = dataset.make_dataset("folder", str(root), split, 8)
            index = found.source.name
            index = next(i for i in range(len(found)) if index(i).endswith(path.name))
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                try:
                    shape = found[index][0].shape
                    verdict = "replaced" if any(path.name in str(w.message) for w in told) else "read"
                except dataset.DataError as error:
                    shape, verdict = (3, 8, 8), "refused" if path.name in str(error) and split == "val" else "lost"
            if shape != (3, 8, 8) or verdict == "lost" or (verdict == "replaced" and split == "val"):
                lose(f"{path} ({mode}) of {split}: {verdict}")
            count[f"{split} {verdict}"] += 1
        path.unlink()
        (root / "val" / path.name).unlink()
        shutil.copy(root / "train/000.png", root / "train/100.png")
        shutil.copy(root / "train/000.png", root / "val/100.png")
    print(f"images: {sum(count.values())} files tried ({', '.join(f'{v} {k}' for k, v in sorted(count.items()))})", flush=True)


def processes(labs: list[Lab], seconds: float) -> None:
    count, slowest = 0, 0.0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def begin(lab: Lab, run: Path):
        words = [*launch, Path(lab.loop.__file__), *lab.words(run, "train.max_train_steps=40", "train.checkpointing_steps=4",
                                                                "train.dataloader_num_workers=1")]
        with open(f"{run}.log", "ab") as log:
            return subprocess.Popen([str(w) for w in words], stdout=log, stderr=log, env=env, cwd=ROOT)

    def broken(lab: Lab, run: Path) -> None:
        nonlocal count, slowest
        if not (lab.folder / "two").is_dir() and begin(lab, lab.folder / "two").wait(300):
            lose(f"two processes: {tail(lab.folder / 'two')}")
        launcher = psutil.Process(begin(lab, run).pid)
        while "2 process(es)" not in tail_all(run) and launcher.is_running() and launcher.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        time.sleep(lab.rng.uniform(0, 3))
        everyone = launcher.children(recursive=True)
        commands = {p: " ".join(p.cmdline()) for p in everyone if p.is_running()}
        workers = [p for p, words in commands.items() if lab.loop.__name__ in words and "torch.distributed" not in words]
        workers = [p for p in workers if p.ppid() not in {w.pid for w in workers}]  # and not those of their loaders
        if workers:
            lab.rng.choice(workers).kill()
        died = time.monotonic()
        try:
            status = launcher.wait(60)
            gone, alive = psutil.wait_procs(everyone, max(0.1, died + 60 - time.monotonic()))
        except psutil.TimeoutExpired:
            status, alive = 0, everyone
        slowest = max(slowest, time.monotonic() - died)
        count += bool(workers)
        if (workers and status == 0) or alive:
            lose(f"a minute after one process of {run} was killed: status {status}, {len(alive)} still there")
            [p.kill() for p in alive]
        whole(run)
        if begin(lab, run).wait(300) or [w for w in metrics(run) if w not in metrics(lab.folder / "two")]:
            lose(f"{run} went on to something else: {tail(run)}")

    rounds(labs, seconds, broken)
    print(f"processes: {count} of two killed; the other and the launcher ended within {slowest:.0f} s", flush=True)


VALUES = {
    int: ["-1", "0", "1", "2", "3", "4", "8", "16", "32", "40", "1e3", "3.5"],
    float: ["-1", "0", "1e-30", "1e-4", "0.1", "0.5", "0.9", "1", "2", "50", "1e30", ".nan", ".inf", "-.inf"],
    bool: ["true", "false", "0"], str: ["x", "''", "../x", "/proc/nowhere", "ä b", "1", "no", "fp16", "bf16"],
    list: ["[]", "[1]", "[2, 1]", "[0]", "[-1]", "[4, 2]", "[8, 4, 2]", "[0.3]", "[0.3, 0.3]", "[.nan]", "[x]", "1", "[1, 1, 1, 1]"],
}
ANY = ["null", "[]", "{}", "x", "-1", "true", "''", "[[[1]]]", "{a: 1}", "2001-01-01", "!!bool 3", "2001-99-99", "'\\0'", "&a [*a]", "["]
ODD = ["", "x", "=", "a=", "=3", ".=1", "train=3", "train.=1", "train..seed=1", "model.quantizer=3", "model=", "data=null", "codes=[]",
       "train.seed.x=1", "1=2", "?=1", "model.quantizer.dim.x=3", "train=[]", "ä=ö", "loss={a: {b: {c: 1}}}"]
ENDLESS = ("train.max_", "train.num_train_epochs", "train.compile", "train.output_dir", "codes.cache_dir", "codes.cache_views",
           "train.gradient_accumulation_steps", "train.dataloader_num_workers")  # valid runs that would take hours, or go elsewhere


def settings_of(lab: Lab) -> dict[str, list[str]]:
    """Every key that a config of this lab may set, and values worth trying."""
    name, found = STAGES[lab.stage][1], {}

    def kinds(target, where):
        for key, (kind, _) in signature(target).items():
            words = str(kind)
            of = next((k for k in (list, bool, float, int) if k.__name__ in words), str)
            found[f"{where}.{key}"] = VALUES[of] * 3 + ANY

    for section, target in (STAGE1_SECTIONS if lab.stage == 1 else STAGE2_SECTIONS).items():
        if "." not in section:
            kinds(model_class(name) if isinstance(target, dict) else target, section)
    for key in setting_names(VQGAN, "model") if lab.stage == 1 else []:
        if key.startswith("model.quantizer."):
            found[key] = VALUES[int] + VALUES[float] + VALUES[bool]
    found = {k: v + ["9" * 20] * (k.split(".")[0] in ("train", "sample")) for k, v in found.items()}  # of layers, that would take for ever
    return {k: v for k, v in found.items() if not k.startswith(ENDLESS)}


def fuzz(labs: list[Lab], seconds: float) -> None:
    count: Counter = Counter()

    def tried(lab: Lab, run: Path) -> None:
        known = settings_of(lab)
        words = [f"{key}={lab.rng.choice(known[key])}" for key in lab.rng.sample(sorted(known), lab.rng.choice([1, 1, 2, 3]))]
        words += [lab.rng.choice(ODD)] * (lab.rng.random() < 0.1)
        status = wait(pid := lab.start(run, "train.max_train_steps=1", *words), 60)
        said = tail_all(run)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            wait(pid)
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        if "Traceback" in said or status not in (0, 1) or (status == 1 and len(errors) != 1):
            lose(f"{words} ended with {status}: {tail(run)}")
        count["a sentence" if status else "a run"] += 1
        shutil.rmtree(run.parent)

    rounds(labs, seconds, tried)
    print(f"fuzz: {sum(count.values())} configs ({', '.join(f'{v} {k}' for k, v in sorted(count.items()))})", flush=True)


def leak(labs: list[Lab], seconds: float) -> None:
    config, run = ROOT / "configs/quickstart/vqgan.yaml", labs[0].folder.parent / "leak"
    code = f"""
import os, sys, psutil
sys.path.insert(0, {str(ROOT)!r})
import train_stage1
from harness.run import Run
me, save = psutil.Process(), Run.save
def measured(self, step):
    save(self, step)
    print("USED", step, me.memory_info().rss, me.num_fds(), len(me.children()), flush=True)
Run.save = measured
train_stage1.main(sys.argv[1:])
"""
    words = ["--config", config, f"train.output_dir={run}", "train.max_train_steps=2000", "train.checkpointing_steps=50",
             "train.validation_steps=50", "train.num_validation_images=64", "train.dataloader_num_workers=1", "loss.disc_start=100",
             "loss.gan_start=200"]
    output = subprocess.run([sys.executable, "-c", code, *map(str, words)], text=True, capture_output=True, cwd=ROOT)
    used = [[int(v) for v in line.split()[1:]] for line in output.stdout.splitlines() if line.startswith("USED")]
    if output.returncode or not used or used[-1][0] != 2000:
        lose(f"the long run ended with {output.returncode}: {output.stderr[-300:]}")
        return
    early, late = used[len(used) // 4:len(used) // 2], used[-len(used) // 4:]
    memory, files = ([max(u[i] for u in part) for part in (early, late)] for i in (1, 2))
    print(f"leak: from the second to the last quarter of 2000 steps memory went from {memory[0] / 2**20:.0f} to "
          f"{memory[1] / 2**20:.0f} MiB, open files from {files[0]} to {files[1]}", flush=True)
    if memory[1] > memory[0] * 1.03 or files[1] > files[0]:
        lose(f"memory or open files grow: {used[::8]}")


PARTS = {p.__name__: p for p in (kills, stops, disk, damage, images, processes, fuzz, leak)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="which (default: all)", metavar="part")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    chosen = [p for p in PARTS if p in (args.parts or PARTS)]
    timed = [p for p in chosen if p != "leak"]
    with tempfile.TemporaryDirectory() as folder:
        labs = [Lab(Path(folder) / f"stage{stage}", stage, random.Random(args.seed + stage)) for stage in (1, 2)]
        for part in chosen:
            PARTS[part](labs, 60 * args.minutes / max(1, len(timed)))
    print(f"losses: {len(LOSSES)}" + "".join(f"\n  {loss}" for loss in LOSSES))
    sys.exit(bool(LOSSES))


if __name__ == "__main__":
    main()
