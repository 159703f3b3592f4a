"""Everything that a GPU must show, in one command: first that it computes what the CPU does, then how fast.

    python benchmarks/gpu.py --minutes 9 --out DIR          # writes DIR/gpu.md and DIR/gpu.json

Needs one CUDA GPU and neither network nor weights. Each part runs in a process of its own and reports its results, its error, or "no time
left"; the files are written after every result. Without a GPU all parts run at toy size on the CPU, which tests this script.

models      each model on the device against the CPU, same weights: outputs, gradients, codes and samples; float32 (TF32 off) and bf16
fixtures    the tests against the reference implementations, on the device
training    train_stage1.py and train_stage2.py: bf16, fp16 with a scaler, train.compile against eager, resumed against uninterrupted,
            and no wait for the GPU within a step between log lines; evaluate.py of the runs in bf16
stage1      steps at the papers' sizes: images/s, MFU, memory. LPIPS has random weights there, of the same arithmetic
stage2      the same for the transformers, on random codes: tokens/s, padding
sampling    images/s and share of the memory bandwidth: without graphs, with CUDA graphs (the default), and compiled
data        JPEG decoding per core, and by all workers

MFU: multiplications and additions of forward and backward passes (torch's FlopCounterMode) against --peak_tflops. Bandwidth: weights and
half of the cache of keys and values, read once per step, against --peak_gbs.
"""

import argparse
import copy
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # whether there is a GPU can then be asked before a fork

import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from sampling import bandwidth, cached, stacks, whole_prefix
from torchvision.models import vgg
from training import measure, padding, stage1_step, stage2_step

import evaluate
import losses
import train_stage1
import train_stage2
from dataset import make_dataset, train_loader
from gpt import Cache
from harness.config import load_config
from harness.guard import Guard
from harness.models import make_model, model_class
from harness.settings import STAGE1_SECTIONS
from harness.settings_stage2 import STAGE2_SECTIONS

Checks = Iterator[tuple[str, Callable[[], dict[str, Any]]]]  # what is shown, and the function that finds it
TOLERANCE = {"no": 1e-3, "bf16": 5e-2}  # of the largest absolute value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="of the GPU in bf16 (default: H100 / H200)")
    parser.add_argument("--peak_gbs", type=float, default=4800.0, help="memory bandwidth in GB/s (default: H200)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    end, rows, device = time.monotonic() + 60 * args.minutes, [], "no device yet"
    for name in args.parts:
        # Each part gets twice an equal share of the time that is left, so that none takes it all.
        left = end - time.monotonic()
        limit = min(left, 2 * left / (len(args.parts) - args.parts.index(name)))
        for row in in_process(name, args, limit):
            if "device" in row:
                device = row["device"]
                continue
            rows.append({"part": name, **row})
            print(" | ".join(str(v) for v in rows[-1].values()), flush=True)
            (args.out / "gpu.json").write_text(json.dumps({"device": device, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
            (args.out / "gpu.md").write_text(markdown(rows, device, args))


def in_process(name: str, args: argparse.Namespace, seconds: float) -> Iterator[dict[str, Any]]:
    """The results of a part, as they come. What breaks it (even the GPU's context) ends with its process."""
    fork = multiprocessing.get_context("fork")  # torch is imported already, and this process never touches the GPU
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=run_part, args=(name, args, theirs))
    process.start()
    theirs.close()
    end = time.monotonic() + seconds
    try:
        while ours.poll(max(0.0, end - time.monotonic())):
            yield ours.recv()
        yield {"what": "the rest", "result": "no time left"}
    except EOFError:  # it has ended
        process.join()
        if process.exitcode:
            yield {"what": "the rest", "result": f"ended with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def run_part(name: str, args: argparse.Namespace, results: Any) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False
    if device.type == "cpu":
        torch.compiler.set_stance("force_eager")  # a toy need not be compiled
    results.send({"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"})
    losses.load_lpips = RandomLPIPS
    warnings.filterwarnings("error", message="sampling without CUDA graphs")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for what, check in PARTS[name](device, args):
            start = time.monotonic()
            try:
                found = check()
            except Exception as error:
                traceback.print_exc()
                found = {"result": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
            results.send({"what": what, **found, "seconds": round(time.monotonic() - start, 1)})


def markdown(rows: list[dict[str, Any]], device: str, args: argparse.Namespace) -> str:
    """A table for each part."""
    text = f"# benchmarks/gpu.py\n\ntorch {torch.__version__}, {device}; peaks: {args.peak_tflops:g} TFLOP/s, {args.peak_gbs:g} GB/s. " \
           "`seconds` are those of the whole check.\n"
    if device == "cpu":
        text += "\n**Toy sizes on the CPU, compared with itself: this tests the script, and its speeds mean nothing.**\n"
    for part in dict.fromkeys(row["part"] for row in rows):
        of_part = [row for row in rows if row["part"] == part]
        keys = dict.fromkeys(k for row in of_part for k in row if k != "part")
        lines = [keys, ["---"] * len(keys), *([str(row.get(k, "")) for k in keys] for row in of_part)]
        text += f"\n## {part}\n\n{LEGEND[part]}\n\n" + "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return text


LEGEND = {
    "models": f"Device against CPU: differences are the largest, relative to the largest value on the CPU; above {TOLERANCE['no']:g} in "
              f"float32 (`no`) and {TOLERANCE['bf16']:g} in bf16, they DIFFER. `equal codes`: of encoding, or of sampling with the same "
              "random numbers.",
    "fixtures": "Tests that passed, and the names of those that failed.",
    "training": "`loss`: of the last step. `resumed`: against an uninterrupted run, `compiled`: against eager; `losses` are those of the "
                "last two steps, and `differences` relative to them. `no wait`: where a step waits for the GPU between log lines, in the "
                "`watched steps`.",
    "stage1": "Random images on the device; generator and discriminator step. `GiB`: peak memory. LPIPS has random weights.",
    "stage2": "Random codes. `padding`: of this batch, `of random batches`, and `of similar lengths`, as training makes them.",
    "sampling": "`graphs`: with CUDA graphs, the default. `x the whole prefix`: how many times as fast as without a cache.",
    "data": "JPEG to training batch, on the device."}


class RandomLPIPS(torch.nn.Module):
    """The arithmetic of LPIPS with VGG-16, without its weights."""

    def __init__(self, *_):
        super().__init__()
        self.features = vgg.make_layers(vgg.cfgs["D"])[:30].eval().requires_grad_(False)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        distance = 0.0
        for i, layer in enumerate(self.features):
            a, b = layer(a), layer(b)
            if i in (3, 8, 15, 22, 29):
                distance = distance + (a - b).square().mean((1, 2, 3))
        return distance.view(-1, 1, 1, 1)


# Correctness


def models(device: torch.device, args: argparse.Namespace) -> Checks:
    precisions = list(TOLERANCE)[:2 if device.type == "cuda" else 1]
    small = ["model.ch=32", "data.image_size=32", "model.quantizer.codebook_size=64", "model.quantizer.dim=16"]
    for name in ("vqgan", "vqvae", "mqvae", "dqvae", "dqvae_triple", "dqvae_entropy"):
        config = load_config(str(ROOT / f"configs/quickstart/{name}.yaml"), small, STAGE1_SECTIONS)
        for precision in precisions:
            yield f"{name}, {precision}", lambda c=config, p=precision: compare_stage1(c, p, device)
    side = 8 if device.type == "cuda" else 2  # on a GPU, more codes than the 64 of a CUDA graph
    grids = {"grids": [side // 2, side]}
    kinds = {"gpt": {"grid": 3 * side // 2}, "stackformer": {"grid": 2 * side, "num_codes": side * (side + 2)},
             "dq_transformer": grids, "mask_transformer": grids}
    for name, settings in kinds.items():
        for precision in precisions:
            settings = settings | {"codebook_size": 64, "num_classes": 10, "n_head": 4, "n_embd": 64}
            yield f"{name}, {precision}", lambda n=name, s=settings, p=precision: compare_stage2(n, s, p, device)


def compare_stage1(config: dict, precision: str, device: torch.device) -> dict[str, Any]:
    """Forward and backward in eval mode, in which nothing is drawn at random."""
    torch.manual_seed(0)
    model, data = make_model(config), make_dataset("shapes", image_size=config["data"]["image_size"])
    images = torch.stack([data[i][0] for i in range(8)])
    if hasattr(model, "calibrate"):
        model.calibrate([images])
    model(images)  # in training mode: codes become vectors of these images
    outs = []
    for where, copied in ((torch.device("cpu"), model.eval()), (device, copy.deepcopy(model).to(device))):
        with torch.autocast(where.type, torch.bfloat16, enabled=precision == "bf16"):
            out = copied(images.to(where))
            decoded = copied.decode({k: v.to(where) for k, v in (outs[0][1] if outs else out.codes).items()})
        (out.images.float().square().mean() + sum(out.losses.values())).backward()
        gradient = {k: p.grad.cpu() for k, p in copied.named_parameters() if p.grad is not None}
        outs.append((decoded.float().cpu(), {k: v.cpu() for k, v in out.codes.items()}, gradient))
    (images_a, codes_a, gradient_a), (images_b, codes_b, gradient_b) = outs
    same = min((codes_a[k] == codes_b[k]).float().mean().item() for k in codes_a)
    gradients = {"gradients": (joined(gradient_a), joined(gradient_b))} if same == 1 else {}
    return verdict(precision, same, {"images of the same codes": (images_a, images_b)} | gradients)


def compare_stage2(name: str, settings: dict, precision: str, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    model = model_class(name)(**settings, dropout=0.0, label_dropout=0.1).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    grids = [(side, side) for side in settings.get("grids", ())]
    codes = random_codes(SimpleNamespace(grids=grids, codebook_size=64) if name == "mask_transformer" else model, 8)
    labels, outs = torch.arange(8), []
    for where, copied in ((torch.device("cpu"), model), (device, copy.deepcopy(model).to(device))):
        with torch.autocast(where.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = copied({k: v.to(where) for k, v in codes.items()}, labels.to(where))["loss"]
            if loss.requires_grad:  # a MaskTransformer's is a bound in eval mode
                loss.backward()
            drawn, without = (drawn_by(copied, labels, graphs) for graphs in (True, False))
        gradient = {k: p.grad.cpu() for k, p in copied.named_parameters() if p.grad is not None}
        outs.append((loss.detach().float().cpu(), drawn, gradient))
    (loss_a, drawn_a, gradient_a), (loss_b, drawn_b, gradient_b) = outs
    same = min((drawn_a[k] == drawn_b[k]).float().mean().item() for k in drawn_a)
    gradients = {"gradients": (joined(gradient_a), joined(gradient_b))} if gradient_a else {}
    graphs = all(torch.equal(without[k], drawn_b[k]) for k in drawn_b)
    found = verdict(precision, same, {"loss": (loss_a, loss_b)} | gradients)
    return found | ({} if graphs else {"result": "DIFFERS with CUDA graphs"})


def drawn_by(model: torch.nn.Module, labels: torch.Tensor, graphs: bool) -> dict[str, torch.Tensor]:
    """Codes from the same random numbers, with or without CUDA graphs (of a MaskTransformer, without in any case)."""
    Cache.graphs = graphs
    codes = model.sample(8, labels, top_k=32, cfg_scale=2.0, generator=torch.Generator().manual_seed(0))
    return {key: value.cpu() for key, value in codes.items()}


def joined(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[k].flatten() for k in sorted(tensors)])


def verdict(precision: str, same: float, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
    """Codes must be equal in float32; the rest to TOLERANCE of the largest value."""
    found = {f"{k}, difference": ((a - b).abs().max() / a.abs().max()).item() for k, (a, b) in pairs.items()}
    good = all(v <= TOLERANCE[precision] for v in found.values()) and (same == 1 or precision != "no")
    return {"result": "agrees" if good else "DIFFERS", "equal codes": f"{same:.2%}", **{k: f"{v:.1e}" for k, v in found.items()}}


def random_codes(model: Any, n: int) -> dict[str, torch.Tensor]:
    """Codes that a transformer reads: uniformly random, half of a DQ-VAE's regions fine."""
    if hasattr(model, "grids"):
        grain = torch.randint(2, (n, *model.grids[0]))
        indices = torch.randint(model.codebook_size, (n, *model.grids[-1]))
        scale = model.grids[-1][0] // model.grids[0][0]
        fine, coarse = (x.repeat_interleave(scale, 1).repeat_interleave(scale, 2) for x in (grain, indices[:, ::scale, ::scale]))
        return {"indices": torch.where(fine == 1, indices, coarse), "grain": grain}
    if hasattr(model, "cells"):
        positions = torch.rand(n, model.cells).argsort(1)[:, :model.length].sort(1).values
        return {"indices": torch.randint(model.codebook_size, (n, model.length)), "positions": positions}
    return {"indices": torch.randint(model.codebook_size, (n, *model.grid))}


def fixtures(device: torch.device, args: argparse.Namespace) -> Checks:
    def run(file: str) -> dict[str, Any]:
        import pytest

        passed, failed = [], []

        class Outcomes:
            def pytest_runtest_logreport(self, report) -> None:
                if report.when == "call" or report.failed:
                    (passed if report.passed else failed).append(report.nodeid.rpartition("::")[2])

        os.environ["MINVQ_DEVICE"] = device.type
        code = pytest.main([str(ROOT / "tests" / file), "--rootdir", str(ROOT), "-p", "no:cacheprovider",
                     *(["-k", "stackformer"] if device.type == "cpu" else [])], plugins=[Outcomes()])
        return {"result": f"{len(passed)} passed" if code == 0 else f"pytest ended with {int(code)}", "failed": ", ".join(failed)}

    yield "outputs", lambda: run("test_reference.py")
    yield "training steps", lambda: run("test_training_parity.py")


def training(device: torch.device, args: argparse.Namespace) -> Checks:
    few = ["data.image_size=32", "data.train_size=64", "data.val_size=8", "train.train_batch_size=4", "train.lr_warmup_steps=0",
           "train.num_validation_images=8", "train.log_with=null", "train.dataloader_num_workers=0", "train.logging_steps=1",
           "train.checkpointing_steps=2", "train.checkpoints_total_limit=null"]
    gan = ["loss.disc_start=0", "loss.gan_start=0", "discriminator.num_layers=1", "discriminator.ch=8", "model.ch=32",
           "loss.perceptual_weight=0"]
    names = ("vqgan", "mqvae", "dqvae", "dqvae_entropy")[:1 if device.type == "cpu" else 4]
    codes = {name: [f"codes.stage1=bf16_{stage1}", "model.n_embd=64", "sample.columns=2", "sample.rows=1"]
             for name, stage1 in {"gpt": "vqgan", "stackformer": "mqvae", "dq_transformer": "dqvae",
                                  "mask_transformer": names[-1]}.items() if stage1 in names}  # which reads the codes of any

    def train(script: Any, name: str, run: str, steps: int, *words: str, resume: bool = False) -> Path:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        script.main(["--config", str(ROOT / f"configs/quickstart/{name}.yaml"), *few, *words, f"train.max_train_steps={steps}",
                     "train.lr_scheduler=constant", f"train.output_dir={run}", *(["--resume", "auto"] if resume else [])])
        return Path(run)

    def finite(run: Path) -> dict[str, Any]:
        steps = [m for m in map(json.loads, (run / "metrics.jsonl").open()) if "lr" in m]
        good = all("loss" in m for m in steps)  # one that is not finite is not logged
        return {"result": "trains" if good else "DIVERGED", "loss": round(steps[-1].get("loss", math.nan), 4),
                "skipped steps": sum(m.get("bad_steps", 0) for m in steps)}

    def evaluated(run: str, *words: str) -> dict[str, Any]:
        AcceleratorState._reset_state(True)
        evaluate.main(["--run", run, *words, "--without", "lpips", "inception", "--batch_size", "4", "--num_workers", "0"])
        found = json.loads((Path(run) / "metrics.json").read_text())
        return {"result": "ran", "bits": round(found["bits"], 1)} | ({"psnr": round(found["psnr"], 2)} if "psnr" in found else {})

    for name in names:
        yield f"{name}, bf16", lambda n=name: finite(train(train_stage1, n, f"bf16_{n}", 4, *gan, "train.mixed_precision=bf16"))
        yield f"{name}, evaluated", lambda n=name: evaluated(f"bf16_{n}")
        yield f"{name}, no wait in a step", lambda n=name: without_waiting(
            lambda: train(train_stage1, n, f"quick_{n}", 4, *gan, "train.mixed_precision=bf16", "train.logging_steps=100"), device)
        if device.type == "cuda":
            yield f"{name}, fp16", lambda n=name: finite(train(train_stage1, n, f"fp16_{n}", 4, *gan, "train.mixed_precision=fp16"))
        yield f"{name}, resumed", lambda n=name: difference(
            train(train_stage1, n, f"whole_{n}", 4, *gan),
            train(train_stage1, n, str(train(train_stage1, n, f"parts_{n}", 4, *gan, "train.max_minutes=0")), 4, *gan, resume=True))
    for name in codes:
        for kind in ("bf16", "fp16")[:2 if device.type == "cuda" else 1]:
            yield f"{name}, {kind}", lambda n=name, k=kind: finite(
                train(train_stage2, n, f"{k}_{n}", 2, *codes[n], f"train.mixed_precision={k}"))
        yield f"{name}, evaluated", lambda n=name: evaluated(f"bf16_{n}", "-n", "4")
        yield f"{name}, no wait in a step", lambda n=name: without_waiting(
            lambda: train(train_stage2, n, f"quick_{n}", 4, *codes[n], "train.mixed_precision=bf16", "train.logging_steps=100"), device)
    for script, name, words in [*((train_stage1, name, gan) for name in names), *((train_stage2, name, codes[name]) for name in codes)]:
        yield f"{name}, compiled", lambda s=script, n=name, w=words: difference(
            train(s, n, f"eager_{n}", 3, *w), train(s, n, f"compiled_{n}", 3, *w, "train.compile=true"))


def difference(one: Path, other: Path) -> dict[str, Any]:
    """Of the last losses of two runs: weights differ by more, since Adam's first steps enlarge rounding errors."""
    losses = [[m["loss"] for m in map(json.loads, (run / "metrics.jsonl").open()) if "loss" in m] for run in (one, other)]
    found = [abs(a - b) / abs(a) for a, b in zip(*(values[-2:] for values in losses))]
    good = len(found) == 2 and all(x <= 1e-3 for x in found)
    return {"result": "agrees" if good else "DIFFERS", "losses": ", ".join(f"{x:.6g}" for x in losses[0][-2:]),
            "differences": ", ".join(f"{x:.1e}" for x in found)}


def without_waiting(train: Callable[[], Path], device: torch.device) -> dict[str, Any]:
    """Where a step waits for the GPU, from the third on: between log lines it should not."""
    begin, end, steps = Guard.begin, Guard.end, []

    def watch(on: bool) -> None:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn" if on else "default")

    def watched_begin(self: Guard) -> None:
        begin(self)
        steps.append(len(steps))
        watch(len(steps) > 2)

    def watched_end(self: Guard, step: int) -> None:
        end(self, step)
        watch(False)

    Guard.begin, Guard.end = watched_begin, watched_end
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            train()
    finally:
        Guard.begin, Guard.end = begin, end
        watch(False)
    places = {f"{Path(w.filename).name}:{w.lineno}" for w in seen if "called a synchronizing" in str(w.message)}
    return {"result": f"waits at {', '.join(sorted(places))}" if places else "does not wait" if device.type == "cuda" else "ran",
            "watched steps": max(0, len(steps) - 2)}


# Speed


def stage1(device: torch.device, args: argparse.Namespace) -> Checks:
    toy = ["data.image_size=32", "model.ch=32", "model.z_channels=32", "model.num_res_blocks=1", "model.quantizer.dim=32",
           "discriminator.num_layers=1", "discriminator.ch=8"] if device.type == "cpu" else []
    names = ["vqgan_imagenet_f16", "dqvae_imagenet_dual_r50", "mqvae_imagenet_r25", "dqvae_imagenet_entropy_r50"]
    flops: dict[str, int] = {}  # per image

    def run(name: str, batch: int, *words: str) -> dict[str, Any]:
        config = load_config(str(ROOT / f"configs/stage1/{name}.yaml"), [f"train.train_batch_size={batch}", *words, *toy],
                             STAGE1_SECTIONS)
        count = batch * flops[name] if name in flops else None
        found = measure(stage1_step(config, device), batch, *((3, 10) if device.type == "cuda" else (0, 1)), flops=count)
        flops[name] = found["flops"] // batch
        return speeds(found, args)

    ways = [(32, True, False), (32, True, True), (32, False, False), (8, True, False), (8, True, True), (32, False, True)]
    for batch, channels_last, compiled in ways if device.type == "cuda" else [(2, True, False), (2, False, True)]:
        for name in names[:1 if device.type == "cpu" and compiled else 4]:
            words = [f"train.channels_last={str(channels_last).lower()}", f"train.compile={str(compiled).lower()}"]
            what = f"{name}, batch {batch}{', channels_last' * channels_last}{', compiled' * compiled}"
            yield what, lambda n=name, b=batch, w=words: run(n, b, *w)


def speeds(found: dict[str, float], args: argparse.Namespace) -> dict[str, Any]:
    return {"images/s": f"{found['images_per_second']:.1f}", "ms/step": f"{1e3 * found['seconds']:.1f}",
            "GFLOP/image": f"{found['gflop_per_image']:.2f}", "GiB": f"{found['gib']:.2f}"} | (
                {"MFU": f"{found['tflops'] / args.peak_tflops:.1%}"} if torch.cuda.is_available() else {})


def transformer(name: str, device: torch.device, *words: str) -> dict:
    """The config of a stage-2 file, for codes of 256 x 256 images (K = 1024)."""
    sections = {k: v for k, v in STAGE2_SECTIONS.items() if k != "data"}
    config = load_config(str(ROOT / f"configs/stage2/{name}.yaml"), [*words], sections)
    side = 2 if device.type == "cpu" else 16
    of_codes = {"gpt": {"grid": side}, "stackformer": {"grid": 2 * side, "num_codes": side**2},
                "dq_transformer": {"grids": [side, 2 * side]}}
    toy = {"n_embd": 32, "n_head": 2} if device.type == "cpu" else {}
    layers = {k: 1 for k in config["model"] if k.endswith(("_layers", "n_layer"))} if device.type == "cpu" else {}
    config["model"] |= of_codes[config["model"]["name"]] | {"codebook_size": 1024, "num_classes": 0} | toy | layers
    config["train"]["class_conditional"] = False
    return config


def stage2(device: torch.device, args: argparse.Namespace) -> Checks:
    def run(name: str, batch: int, compiled: str) -> dict[str, Any]:
        model, step = stage2_step(transformer(name, device, f"train.compile={compiled}"), device)
        codes = {k: v.to(device) for k, v in random_codes(model, batch).items()}
        tokens = model.lengths(codes).float()
        flops = measure(lambda: step(codes, None), batch, 0, 1)["flops"] if compiled == "false" else counted[name]
        counted[name] = flops
        found = measure(lambda: step(codes, None), batch, *((5, 20) if device.type == "cuda" else (0, 1)), flops=flops)
        random, similar = padding(model.lengths(random_codes(model, 64 * batch)), batch)
        return {**speeds(found, args), "tokens/s": f"{tokens.sum().item() / found['seconds']:.0f}",
                "padding": f"{(1 - tokens.mean() / tokens.max()).item():.1%}", "of random batches": f"{random:.1%}",
                "of similar lengths": f"{similar:.1%}"}

    counted: dict[str, int] = {}
    batch = 30 if device.type == "cuda" else 2
    for compiled in ("false", "true"):
        for name in ("dq_transformer_imagenet_p6c18_uncond", "stackformer_imagenet_v12p12_uncond", "gpt_ffhq"):
            yield f"{name}, batch {batch}{', compiled' * (compiled == 'true')}", lambda n=name, c=compiled: run(n, batch, c)


def sampling(device: torch.device, args: argparse.Namespace) -> Checks:
    def run(name: str, batch: int, way: str) -> dict[str, Any]:
        settings = transformer(name, device)["model"]
        with device:
            model = model_class(settings["name"])(**{k: v for k, v in settings.items() if k != "name"}).to(dtype).eval()
        Cache.graphs = way != "no graphs"
        for blocks in stacks(model) if way == "compiled" else ():
            blocks.step = torch.compile(blocks.step)
        model.sample(batch)
        seconds, steps = cached(model, batch)
        share = bandwidth(model, batch, steps, seconds) / args.peak_gbs
        found = {"images/s": f"{batch / seconds:.2f}", "steps": steps, "ms/step": f"{1e3 * seconds / steps:.2f}"}
        found |= {"bandwidth": f"{share:.1%}"} if device.type == "cuda" else {}
        if way == "graphs" and batch == batches[1]:
            found["x the whole prefix"] = f"{whole_prefix(model, batch, steps, 8) / seconds:.1f}"
        return found

    dtype, batches = (torch.bfloat16, (1, 8, 64, 256)) if device.type == "cuda" else (torch.float32, (1, 2))
    names = ["stackformer_imagenet_v12p12_uncond", "dq_transformer_imagenet_p6c18_uncond", "gpt_ffhq"]
    for way in ("graphs", "no graphs", "compiled"):
        for batch in batches:
            for name in names:
                if way != "no graphs" or batch == 8 or device.type == "cpu":
                    yield f"{name}, batch {batch}, {way}", lambda n=name, b=batch, w=way: run(n, b, w)


def data(device: torch.device, args: argparse.Namespace) -> Checks:
    count, size, cores = (400, (500, 375), os.cpu_count() or 1) if device.type == "cuda" else (4, (60, 45), 1)
    folder = Path("images")
    folder.mkdir()
    for i, (shapes, _) in enumerate(make_dataset("shapes", image_size=64, uint8=True, train_size=count)):
        image = Image.fromarray(shapes.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BICUBIC)
        Image.blend(image, Image.effect_noise(size, 64).convert("RGB"), 0.2).save(folder / f"{i}.jpg", quality=90)
        if i == count - 1:
            break
    kb = sum(path.stat().st_size for path in folder.iterdir()) / count / 1e3

    def run(workers: int) -> dict[str, Any]:
        batch = 64 if device.type == "cuda" else 2
        dataset = make_dataset("folder", str(folder), image_size=256 if device.type == "cuda" else 32)
        loader = train_loader(dataset, batch, num_workers=workers, device=device)
        for _ in range(1 + 4 * bool(workers) * (device.type == "cuda")):
            next(loader)  # workers start, queues fill
        start, steps = time.perf_counter(), 4 * max(1, workers) if device.type == "cuda" else 1
        for _ in range(steps):
            next(loader)
        speed = steps * batch / (time.perf_counter() - start)
        return {"images/s": f"{speed:.0f}", "per core": f"{speed / max(1, workers):.0f}"}

    yield f"JPEG of {size[0]} x {size[1]} ({kb:.0f} kB), this process", lambda: run(0)
    yield f"JPEG of {size[0]} x {size[1]}, {cores} workers", lambda: run(cores)


PARTS = {"models": models, "fixtures": fixtures, "training": training, "stage1": stage1, "stage2": stage2, "sampling": sampling,
         "data": data}

if __name__ == "__main__":
    main()
