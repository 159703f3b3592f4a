"""Makes the tables of docs/results.md: trains what they need, measures it, prints them.

    python benchmarks/results.py TABLE [TABLE ...] --data PATH [--seeds 3] [--jobs 2]
                                 [--runs FOLDER] [--mixed_precision bf16] [--seconds 1800]

PATH is a folder of photographs with train/CLASS/FILE and val/CLASS/FILE (measured: 100 classes of
Tiny ImageNet), which are scaled to 32 x 32 (rates_folder, claims: 64 x 64, photos: 128 x 128);
stage 2 learns the embedded shapes, in claims_stage2 the photographs. The claims and photos have
seeds of their own. Each training is a run folder in --runs (default: runs/results): what is done is
not repeated, what was stopped goes on. A training has one thread; --jobs of them run at a time.

    rates_stage1, rates_stage2      learning rates of AdamW and Muon for each model
    rates_folder                    ... for networks as large as those of the folder configs
    speed                           quality against seconds of training, drawn as assets/speed.png
    codes                           what the codes of each stage-1 model are worth
    any_rate                        models for any rate, beside those for one
    quantizers                      at 2^10, 2^14 and 2^18 codes, and in each model
    transformers                    all transformers on all codes, as a classifier sees the samples
    claims_stage1                   photographs of 64 x 64 with a perceptual loss and a GAN, judged by
                                    another network's features; drawn as assets/claims.png
    claims_stage2                   ... new ones, by transformers that train for equal --seconds
    photos                          claims_stage1's DQ-VAE for any rate goes on, on crops of larger
                                    photographs (--data)
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from statistics import mean, quantiles, stdev
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import harness  # noqa: F401  before torch, which reads its settings once

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from dataset import make_dataset, train_loader
from detail import measure as measure_detail
from harness.sampling import chosen_labels, draw, load_models, sampling_arguments

BATCH = 16


@dataclass(frozen=True)
class Training:
    """A run of a script: a config and settings that replace its own."""

    name: str
    config: str  # of configs/quickstart, or a path in configs/
    optimizer: str
    rate: str
    steps: int
    settings: tuple[str, ...] = ()
    stage1: "Training | None" = None  # whose codes stage 2 learns

    def folder(self, args, seed=0):
        return args.runs / f"{self.name}_seed{seed}"

    def command(self, args, seed):
        script = "train_stage2.py" if self.stage1 else "train_stage1.py"
        config = self.config if "/" in self.config else f"quickstart/{self.config}"
        words = [sys.executable, script, "--config", f"configs/{config}.yaml", "--resume",
                 "auto", f"train.output_dir={self.folder(args, seed)}",
                 f"train.seed={seed}", f"train.optimizer={self.optimizer}",
                 f"train.learning_rate={self.rate}", f"train.max_train_steps={self.steps}",
                 f"train.train_batch_size={BATCH}",
                 f"train.mixed_precision={args.mixed_precision}",
                 "train.validation_steps=250", "train.num_validation_images=1000",
                 "train.dataloader_num_workers=0", "train.log_with=null",
                 "train.checkpoints_total_limit=1"]
        if self.stage1:
            words.append(f"codes.stage1={self.stage1.folder(args)}")
        else:
            words += ["data.name=folder", f"data.root={args.data}", "data.image_size=32"]
        return words + list(self.settings)

    def lines(self, args, seed):
        """The lines of metrics.jsonl."""
        path = self.folder(args, seed) / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def scores(self, args, seed=0):
        """{step: PSNR or bits} of the validations."""
        score = "val_bits" if self.stage1 else "val_psnr"
        return {line["step"]: line[score] for line in self.lines(args, seed) if score in line}

    def step_seconds(self, args, seed):
        """Seconds of a step, where the machine was least busy with other work."""
        speeds = [line["images_per_second"] for line in self.lines(args, seed)
                  if "images_per_second" in line]
        return BATCH / quantiles(speeds, n=10, method="inclusive")[-1]

    def is_done(self, args, seed):
        path = self.folder(args, seed) / "metrics.jsonl"
        return path.is_file() and self.steps in self.scores(args, seed)

    def results(self, args):
        """The last score of each seed."""
        return [self.scores(args, seed)[self.steps] for seed in range(args.seeds)]


def train(training, args, seed):
    if training.is_done(args, seed):
        return
    folder = training.folder(args, seed)
    run_logged(training.command(args, seed), folder)
    print(f"{folder.name}: {training.scores(args, seed)[training.steps]:.2f}", flush=True)


def run_logged(words, folder):
    """Runs a command with one thread, its output in FOLDER.log."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "ab") as log:
        done = subprocess.run(words, cwd=ROOT, stdout=log, stderr=log,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{folder} failed; see {folder}.log")


def train_all(trainings, args, seeds=None):
    """All of these, after the stage-1 models that they need."""
    first = {training.stage1: [0] for training in trainings if training.stage1}
    for jobs in (first, {training: range(seeds or args.seeds) for training in trainings}):
        with ThreadPoolExecutor(args.jobs) as pool:
            pending = [pool.submit(train, training, args, seed)
                       for training, seeds_of in jobs.items() for seed in seeds_of]
            for job in pending:
                job.result()


def evaluated(training, args, seed=0, rates=None, features="inception"):
    """evaluate.py's metrics of a stage-1 run on 2,000 validation images; with rates, at each.
    Inception itself is left out."""
    folder = training.folder(args, seed)
    evaluate_stage1([folder], args, rates, features)
    metrics = json.loads((folder / "metrics.json").read_text())
    return list(metrics["rates"].values()) if rates else metrics


def evaluate_stage1(folders, args, rates, features):
    """Measures those of the runs that have not been."""
    words = ["--images", "2000", "--features", features, "--without", "lpips", "inception"]
    words += ["--rates", rates] if rates else []
    evaluate([folder for folder in folders if not (folder / "metrics.json").is_file()], args, words)


def evaluate(folders, args, words):
    """Runs that are measured together share the features of the originals."""
    def measure(share):
        runs = [word for folder in share for word in ("--run", str(folder))]
        run_logged([sys.executable, "evaluate.py", "--num_workers", "0", *words, *runs], share[0])

    shares = [folders[job::args.jobs] for job in range(args.jobs)]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(measure, filter(None, shares)))


def spread(values, digits=2):
    """A mean, and its standard deviation if there are several values."""
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def print_table(header, rows):
    for row in [header, ["---"] * len(header), *rows]:
        print(f"| {' | '.join(map(str, row))} |")


# Learning rates

PLAIN = ("loss.disc_weight=0", "model.quantizer.codebook_size=256")  # squared error alone, EMA
GAN = ("loss.disc_weight=0.1", "loss.disc_start=200", "loss.gan_start=250", PLAIN[1])
SHAPES = ("data.name=shapes", "data.root=null", "data.max_objects=1", PLAIN[0],
          "model.quantizer.codebook_size=128")
RATES = {"adamw": ("1e-3", "2e-3", "4e-3"), "muon": ("2e-3", "4e-3", "8e-3", "1.6e-2")}
RATES_STEPS = 500


def rates_stage1(args):
    """The PSNR of each model for each learning rate; with the GAN on for the second half, too."""
    models = {
        "VQGAN f4": ("vqgan", ()),
        "MQ-VAE, 25 % of the cells": ("mqvae", ("model.topk_ratio=0.25",)),
        "DQ-VAE f8/f4, 30 % fine": ("dqvae", ("model.ratios=[0.3]",)),
    }
    losses = {"squared error": ("error", PLAIN), "and GAN": ("GAN", GAN)}
    table = {}
    for label, (config, settings) in models.items():
        for loss, (short, more) in losses.items():
            for name, rates in RATES.items():
                table[label, loss, name] = [
                    Training(f"rates_{config}_{short}_{name}_{rate}", config, name, rate,
                             RATES_STEPS, more + settings)
                    for rate in rates]
    compare_rates(args, table, "PSNR (dB)")


CODES = {  # stage-1 models of shapes, whose codes stage 2 learns
    config: Training(f"shapes_{config}", config, "muon", "2e-3", 600, SHAPES)
    for config in ("vqgan", "mqvae", "dqvae")}
OF = {"gpt": "vqgan", "stackformer": "mqvae", "dq_transformer": "dqvae",
      "mask_transformer": "dqvae"}


def rates_stage2(args):
    """The bits of each transformer for each learning rate."""
    table = {}
    for config, source in OF.items():
        for name, rates in RATES.items():
            table[config, "", name] = [
                Training(f"rates_{config}_{name}_{rate}", config, name, rate, RATES_STEPS, (),
                         CODES[source])
                for rate in rates]
    compare_rates(args, table, "bits")


def rates_folder(args):
    """The same for networks of the size of configs/stage1/folder64*.yaml and stage2/folder64*.yaml,
    in 150 steps."""
    rates = {"adamw": ("2e-4", "5e-4", "1e-3"), "muon": ("1e-3", "2e-3", "4e-3")}
    more = "train.lr_warmup_steps=20", "train.use_ema=false"
    photographs = "data.image_size=64", "loss.disc_weight=0", "loss.perceptual_weight=0", *more
    for config, settings, source in (("stage1/folder64", photographs, None),
                                     ("stage2/folder64_dq_transformer", more, CODES["dqvae"])):
        compare_rates(args, {
            (config, "", name): [
                Training(f"rates_{config[7:]}_{name}_{rate}", config, name, rate, 150, settings,
                         source)
                for rate in rates[name]]
            for name in rates}, "bits" if source else "PSNR (dB)")


def compare_rates(args, table, what):
    train_all([training for row in table.values() for training in row], args)
    rows = [[*key, *(f"{t.rate}: {spread(t.results(args))}" for t in trainings)]
            for key, trainings in table.items()]
    header = ["model", "loss", "optimizer", what, "", "", ""]
    print_table(header, [row + [""] * (len(header) - len(row)) for row in rows])


# Quality against seconds

def speed(args):
    """AdamW and Muon in both stages, AdamW also for three times as many steps: there the
    transformer is as it was before rotary embeddings and QK norm."""
    plots = {
        "VQGAN f4, photographs 32 x 32": {
            "AdamW, long": Training("speed_vqgan_long", "vqgan", "adamw", "1e-3", 3000, PLAIN),
            "AdamW": Training("speed_vqgan_adamw", "vqgan", "adamw", "2e-3", 1000, PLAIN),
            "Muon": Training("speed_vqgan_muon", "vqgan", "muon", RATE, 1000, PLAIN),
        },
        "DQ-Transformer, shapes": {
            "AdamW, long, plain blocks": former("dq_transformer"),
            "AdamW": autoregressive("dq_transformer", "adamw", "2e-3"),
            "Muon": autoregressive("dq_transformer"),
        },
    }
    train_all([training for lines in plots.values() for training in lines.values()], args)
    draw_speed(plots, args)


RATE = "6e-3"  # of Muon in stage 1, by rates_stage1


def former(config):
    """An autoregressive transformer as it was trained before: AdamW, no rotary embeddings, no QK
    norm, three times as many steps."""
    return Training(f"former_{config}", config, "adamw", "2e-3", 5000,
                    ("model.rope=false", "model.qk_norm=false"), CODES[OF[config]])


def autoregressive(config, name="muon", rate="4e-3"):
    return Training(f"{name}_{config}", config, name, rate, 1667, (), CODES[OF[config]])


def masked(source, times=1):
    return Training(f"mask_{source}_{times}", "mask_transformer", "muon", "2e-3", 1667 * times, (),
                    CODES[source])


def draw_speed(plots, args):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(plots), figsize=(10, 3.6), layout="constrained")
    rows = []
    for ax, (title, lines) in zip(axes, plots.items()):
        for (label, training), colour in zip(lines.items(), ("tab:gray", "tab:blue", "tab:red")):
            for seed in range(args.seeds):
                seconds = training.step_seconds(args, seed)
                scores = training.scores(args, seed)
                ax.plot([step * seconds for step in scores], scores.values(), color=colour,
                        marker=".", label=None if seed else f"{label}, {training.steps} steps")
            times = [1000 * training.step_seconds(args, s) for s in range(args.seeds)]
            rows.append([title, label, training.steps, spread(training.results(args)),
                         spread(times, 0)])
        ax.set_title(title)
        ax.set_xlabel("seconds of one core")
        ax.set_ylabel("bits" if training.stage1 else "PSNR (dB)")
        ax.grid(alpha=0.3)
        ax.legend()
    figure.savefig(ROOT / "assets/speed.png", dpi=110)
    print_table(["", "optimizer", "steps", "PSNR or bits", "ms per step"], rows)


# What the codes are worth

STEPS = 1500


def stage1(name, config, *settings):
    return Training(name, config, "muon", RATE, STEPS, PLAIN + settings)


def codes(args):
    release = ("model.release_training=true",)
    trainings = {
        "VQGAN f8": stage1("codes_vqgan_f8", "vqgan", "model.ch_mult=[1,1,2,2]"),
        "MQ-VAE, 16 of 64 cells, the release's training":
            stage1("codes_mqvae_release", "mqvae", "model.topk_ratio=0.25", *release),
        "MQ-VAE, 16 of 64 cells": ONE_RATE["mqvae", "0.25"],
        "DQ-VAE f8/f4, feature router, 30 % fine": ONE_RATE["dqvae", "0.3"],
        "DQ-VAE f8/f4, entropy router, 30 % fine": ONE_RATE["dqvae_entropy", "0.3"],
        "MQ-VAE, 32 of 64 cells": ONE_RATE["mqvae", "0.5"],
        "VQGAN f4": stage1("codes_vqgan", "vqgan"),
    }
    train_all(trainings.values(), args)
    rows = []
    for label, training in trainings.items():
        metrics = [evaluated(training, args, seed) for seed in range(args.seeds)]
        row = [label] + [spread([m[name] for m in metrics], digits)
                         for name, digits in (("codes", 1), ("bits", 0), ("psnr", 2), ("ssim", 3))]
        if training.config != "vqgan":
            options = SimpleNamespace(overrides=[], split="val", images=2000)
            detail = [measure_detail(str(training.folder(args, seed)), options)
                      for seed in range(args.seeds)]
            row += [f"{100 * mean(values):.0f} %" for values in list(zip(*detail))[1:]]
        gains = [last_fifth(training.scores(args, seed)) for seed in range(args.seeds)]
        rows.append(row + [""] * (7 - len(row)) + [f"{mean(gains):.2f}"])
    print_table(["model", "codes", "bits", "PSNR (dB)", "SSIM", "codes on detail", "places shared",
                 "last fifth (dB)"], rows)


def last_fifth(scores):
    """What the last fifth of the steps gained."""
    steps = list(scores)
    return scores[steps[-1]] - np.interp(0.8 * steps[-1], steps, list(scores.values()))


# One model for any rate

ONE_RATE = {
    (config, rate): stage1(f"codes_{config}_{rate}", config, setting.format(rate))
    for config, setting, rates in (("dqvae", "model.ratios=[{}]", ("0.1", "0.3", "0.7")),
                                   ("dqvae_entropy", "model.ratios=[{}]", ("0.1", "0.3", "0.7")),
                                   ("mqvae", "model.topk_ratio={}", ("0.25", "0.5", "0.75")))
    for rate in rates}


def any_rate(args):
    rows = []
    for config, setting, rates in (
            ("dqvae", "model.ratios=[[0.1,0.9]]", "0.1,0.3,0.5,0.7,0.9"),
            ("dqvae_entropy", "model.ratios=[[0.1,0.9]]", "0.1,0.3,0.5,0.7,0.9"),
            ("mqvae", "model.topk_ratio=[0.1,0.9]", "0.1,0.25,0.5,0.75,0.9")):
        flexible = stage1(f"any_{config}", config, setting)
        fixed = {rate: ONE_RATE[config, rate] for rate in rates.split(",")
                 if (config, rate) in ONE_RATE}
        train_all([flexible, *fixed.values()], args)
        by_rate = zip(*[evaluated(flexible, args, seed, rates) for seed in range(args.seeds)])
        rows.append([config, *map(psnr_and_bits, by_rate)])
        cells = []
        for rate in rates.split(","):
            runs = [evaluated(fixed[rate], args, s) for s in range(args.seeds) if rate in fixed]
            cells.append(psnr_and_bits(runs) if runs else "")
        rows.append(["... one rate", *cells])
    print_table(["32 x 32", "10 %", "25 / 30 %", "50 %", "70 / 75 %", "90 %"], rows)


def psnr_and_bits(metrics):
    return (f"{spread([m['psnr'] for m in metrics])} dB, "
            f"{mean(m['bits'] for m in metrics):.0f}")


# Quantizers

QUANTIZERS = {
    "2^10": [
        "{codebook_size: 1024, dim: 64}",
        "{codebook_size: 1024, dim: 64, ema_decay: 0.98}",
        "{codebook_size: 1024, dim: 64, rotation: true}",
        "{codebook_size: 1024, dim: 8, l2_norm: true}",
        "{name: fsq, levels: [8, 5, 5, 5]}",
        "{name: simvq, codebook_size: 1024, dim: 64}",
        "{name: bsq, bits: 10, entropy_weight: 0.01, entropy_temperature: 0.1}",
        "{name: lfq, bits: 10, entropy_weight: 0.01}",
        "{name: ibq, codebook_size: 1024, dim: 32, entropy_weight: 0.005}",
        "{name: residual, codebook_size: 32, dim: 64, depth: 2, ema_decay: 0.98}",
    ],
    "2^14": [
        "{codebook_size: 16384, dim: 64, ema_decay: 0.98}",
        "{codebook_size: 16384, dim: 8, l2_norm: true}",
        "{name: fsq, levels: [8, 8, 8, 6, 5]}",
        "{name: simvq, codebook_size: 16384, dim: 64}",
        "{name: bsq, bits: 14, entropy_weight: 0.01, entropy_temperature: 0.1}",
        "{name: lfq, bits: 14, entropy_weight: 0.01, entropy_temperature: 0.1}",
    ],
    "2^18": [
        "{name: fsq, levels: [8, 8, 8, 8, 8, 8]}",
        "{name: bsq, bits: 18, entropy_weight: 0.01, entropy_temperature: 0.1}",
        "{name: lfq, bits: 18, entropy_weight: 0.01, entropy_temperature: 0.1}",
    ],
}
QUANTIZER_STEPS = 750


def quantizers(args):
    rows = []
    for size, quantizers_of in QUANTIZERS.items():
        for number, quantizer in enumerate(quantizers_of):
            training = with_quantizer(f"quantizer_{size[2:]}_{number}", "vqgan", quantizer)
            rows.append((size, quantizer, "VQGAN f4", training))
    for config, label, setting in (("mqvae", "MQ-VAE", "model.topk_ratio=0.5"),
                                   ("dqvae_entropy", "DQ-VAE", "model.ratios=[0.5]")):
        for number in (1, 3, 4, 5):
            quantizer = QUANTIZERS["2^10"][number]
            training = with_quantizer(f"quantizer_{config}_{number}", config, quantizer, setting)
            rows.append(("2^10", quantizer, label, training))
    train_all([row[-1] for row in rows], args)
    table = []
    for size, quantizer, model, training in rows:
        metrics = [evaluated(training, args, seed) for seed in range(args.seeds)]
        of = {name: [m[name] for m in metrics] for name in ("psnr", "ssim", "usage_65536",
                                                             "perplexity")}
        table.append([model, size, f"`{quantizer}`", spread(of["psnr"]), spread(of["ssim"], 3),
                      f"{mean(of['usage_65536']):.0%}", f"{mean(of['perplexity']):.0f}"])
    print_table(["model", "codes", "`model.quantizer`", "PSNR (dB)", "SSIM", "usage", "perplexity"],
                table)


def with_quantizer(name, config, quantizer, *settings):
    return Training(name, config, "muon", RATE, QUANTIZER_STEPS,
                    (PLAIN[0], f"model.quantizer={quantizer}", *settings))


# Transformers

SAMPLES = 300


def transformers(args):
    """Bits, and how many samples a classifier gives the class (the form) that was asked for."""
    rows = []
    for source, config in (("vqgan", "gpt"), ("mqvae", "stackformer"), ("dqvae", "dq_transformer")):
        for training in (former(config), autoregressive(config), masked(source), masked(source, 3)):
            rows.append((source, training))
    train_all([row[-1] for row in rows], args)
    network = classifier(args)
    table = []
    for source, training in rows:
        named, form = zip(*[named_right(network, training, args, s) for s in range(args.seeds)])
        seconds = [training.step_seconds(args, s) * training.steps for s in range(args.seeds)]
        table.append([source, training.config, training.optimizer, training.steps,
                      spread(seconds, 0), spread(training.results(args), 1),
                      f"{spread(named, 0)} ({spread(form, 0)})"])
    print_table(["codes of", "model", "optimizer", "steps", "seconds", "bits",
                 "class (form) right (%)"], table)


def classifier(args):
    """A network that names the shapes, trained for 1,500 steps of 64."""
    channels = [3, 32, 64, 128]
    layers = [layer for i, o in zip(channels, channels[1:])
              for layer in (nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU())]
    network = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10))
    path = args.runs / "classifier.pt"
    if path.is_file():
        network.load_state_dict(torch.load(path))
        return network.eval()
    torch.manual_seed(0)
    dataset = make_dataset("shapes", image_size=32, max_objects=1, train_size=50_000)
    batches = train_loader(dataset, 64, 0, 0, 0, 0, 1, torch.device("cpu"))
    network(next(batches)[0])
    adam = torch.optim.AdamW(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 2e-3, 1500)
    for _ in range(1500):
        images, labels = next(batches)
        F.cross_entropy(network(images), labels).backward()
        adam.step()
        adam.zero_grad()
        schedule.step()
    torch.save(network.state_dict(), path)
    return network.eval()


@torch.no_grad()
def named_right(network, training, args, seed):
    """The shares of samples (in %) that the classifier gives their class, and their form."""
    model, stage1, config, names = load_models(training.folder(args, seed))
    labels = chosen_labels(None, names, SAMPLES)
    sample = config["sample"] | {"cfg_scale": 2.0, "top_p": 0.8}
    settings = sampling_arguments(model, sample, labels)
    right = torch.zeros(2)
    for numbers in torch.arange(SAMPLES).split(50):
        images = torch.from_numpy(draw(model, stage1, numbers.tolist(), labels, 0, settings))
        images = images.permute(0, 3, 1, 2) / 127.5 - 1
        named, asked = network(images).argmax(1), labels[numbers]
        right += torch.stack([named == asked, named // 2 == asked // 2]).sum(1)
    return (100 * right / SAMPLES).tolist()


# The papers' claims

CLAIM_STEPS = 1500
CLAIM = (
    "data.image_size=64", "train.train_batch_size=8", "train.num_validation_images=500",
    "model.quantizer={name: simvq, codebook_size: 1024, dim: 64}",
    "loss.reconstruction=l1",
    "loss.perceptual=efficientnet_lite0", "loss.perceptual_weight=0.3", "loss.disc_weight=0.5",
    f"loss.disc_start={CLAIM_STEPS // 2}", f"loss.gan_start={CLAIM_STEPS // 2 + 50}")
CURVES = "train.validation_features=efficientnet_lite2"
FIVE = "0.1,0.3,0.5,0.7,0.9"


def claim(name, config, *settings):
    return Training(f"claim_{name}", config, "muon", RATE, CLAIM_STEPS, CLAIM + settings)


CLAIMS = {  # models for one rate, and the number of seeds
    "VQGAN f8": (claim("f8", "vqgan", "model.ch_mult=[1,1,2,2]"), 3),
    "VQGAN f8, 8,192 codes": (claim("f8_8192", "vqgan", "model.ch_mult=[1,1,2,2]",
                                    "model.quantizer.codebook_size=8192"), 1),
    "MQ-VAE f4, 25 %": (claim("mqvae_25", "mqvae", "model.topk_ratio=0.25", CURVES), 3),
    "MQ-VAE f4, 50 %": (claim("mqvae_50", "mqvae", "model.topk_ratio=0.5"), 1),
    "DQ-VAE f8/f4, feature router, 30 %": (claim("dqvae_30", "dqvae", "model.ratios=[0.3]"), 3),
    "DQ-VAE f8/f4, feature router, 50 %": (claim("dqvae_50", "dqvae", "model.ratios=[0.5]"), 1),
    "DQ-VAE f8/f4, entropy router, 30 %":
        (claim("entropy_30", "dqvae_entropy", "model.ratios=[0.3]"), 1),
    "DQ-VAE f8/f4, entropy router, 50 %":
        (claim("entropy_50", "dqvae_entropy", "model.ratios=[0.5]"), 1),
    "VQGAN f4": (claim("f4", "vqgan", CURVES), 1),
}
ANY_CLAIMS = {
    "MQ-VAE f4, any rate": claim("mqvae_any", "mqvae", "model.topk_ratio=[0.1,0.9]"),
    "DQ-VAE f8/f4, feature router, any rate":
        claim("dqvae_any", "dqvae", "model.ratios=[[0.1,0.9]]"),
    "DQ-VAE f8/f4, entropy router, any rate":
        claim("entropy_any", "dqvae_entropy", "model.ratios=[[0.1,0.9]]"),
}
CLAIM_METRICS = {"codes": 1, "bits": 0, "psnr": 2, "ssim": 3, "rfd": 1, "agreement": 3}


def claims_stage1(args):
    """One seed of all first, then three of the models at the centre."""
    first = [training for training, _ in CLAIMS.values()]
    train_all(first, args, seeds=1)
    train_all(list(ANY_CLAIMS.values()), args, seeds=1)
    train_all([training for training, seeds in CLAIMS.values() if seeds == 3], args, seeds=3)
    options = {"features": "efficientnet_lite2"}
    evaluate_stage1([training.folder(args, seed) for training, seeds in CLAIMS.values()
                     for seed in range(seeds)], args, None, **options)
    evaluate_stage1([training.folder(args) for training in ANY_CLAIMS.values()], args, FIVE,
                    **options)
    points = {label: [[evaluated(training, args, seed, **options) for seed in range(seeds)]]
              for label, (training, seeds) in CLAIMS.items()}
    points |= {label: [[metrics] for metrics in evaluated(training, args, 0, FIVE, **options)]
               for label, training in ANY_CLAIMS.items()}
    print_table(["model", "codes", "bits", "PSNR (dB)", "SSIM", "rFD (Lite2)", "same class"],
                [[label] + [spread([m[name] for m in runs], digits)
                            for name, digits in CLAIM_METRICS.items()]
                 for label, rows in points.items() for runs in rows])
    draw_claims(points)


def draw_claims(points):
    """rFD against codes and against bits, with the line between the VQGANs; a bar is the standard
    deviation of several seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), sharey=True, layout="constrained")
    colours = {"VQGAN": "black", "MQ-VAE": "tab:red", "feature": "tab:blue",
               "entropy": "tab:green"}
    for ax, axis in zip(axes, ("codes", "bits")):
        def means(name, rows):
            return [mean(metrics[name] for metrics in runs) for runs in rows]

        ends = points["VQGAN f8"] + points["VQGAN f4"]
        ax.plot(means(axis, ends), means("rfd", ends), "k--", lw=1)
        for (label, rows), marker in zip(points.items(), cycle("sD^vP")):
            colour = next(value for word, value in colours.items() if word in label)
            is_curve = len(rows) > 1
            bars = [stdev(metrics["rfd"] for metrics in runs) for runs in rows if len(runs) > 1]
            ax.errorbar(means(axis, rows), means("rfd", rows), bars or None,
                        fmt="-o" if is_curve else marker, ms=4 if is_curve else 7, color=colour,
                        capsize=3, alpha=0.6 if is_curve else 1, label=label)
        ax.set_xlabel(f"{axis} per image")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("Frechet distance (EfficientNet-Lite2)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    figure.savefig(ROOT / "assets/claims.png", dpi=110)


def draws(name, config, source, *settings):
    small = ("model.n_head=4", "model.n_embd=192", "sample.top_p=null",
             "train.num_validation_images=200", "train.logging_steps=20")
    return Training(f"claim_{name}", config, "muon", "2e-3", 0, small + settings,
                    CLAIMS[source][0])


MASKED = "model.layout_layers=1", "model.content_layers=5"
DRAWN = {
    "GPT on VQGAN f8": draws("gpt_f8", "gpt", "VQGAN f8", "model.n_layer=6"),
    "GPT on VQGAN f4": draws("gpt_f4", "gpt", "VQGAN f4", "model.n_layer=6"),
    "Stackformer on MQ-VAE 25 %": draws("stackformer", "stackformer", "MQ-VAE f4, 25 %",
                                        "model.code_layers=4", "model.position_layers=2"),
    "DQ-Transformer on DQ-VAE 30 %":
        draws("dq_transformer", "dq_transformer", "DQ-VAE f8/f4, feature router, 30 %",
              "model.position_layers=2", "model.content_layers=4"),
    "MaskTransformer on VQGAN f8": draws("mask_f8", "mask_transformer", "VQGAN f8", *MASKED),
    "MaskTransformer on MQ-VAE 25 %":
        draws("mask_mqvae", "mask_transformer", "MQ-VAE f4, 25 %", *MASKED),
    "MaskTransformer on DQ-VAE 30 %":
        draws("mask_dqvae", "mask_transformer", "DQ-VAE f8/f4, feature router, 30 %", *MASKED),
}
SCALES = 1.0, 2.0, 3.0  # of guidance
DRAWN_METRICS = {"fd": 1, "precision": 3, "recall": 3, "accuracy": 3, "bits": 0,
                 "images_per_second": 1}


def claims_stage2(args):
    """Samples after equal seconds of training, and after a third of them. Guidance is chosen on a
    tenth of the validation images, measured on the others."""
    tenth, others = split_validation(args)
    models = {label: replace(training, settings=(*training.settings, f"data.root={args.data}"))
              for label, training in DRAWN.items()}
    trials = {label: replace(training, name=f"{training.name}_trial", steps=100)
              for label, training in models.items()}
    train_all(list(trials.values()), args, seeds=1)
    table = {}
    for label, training in models.items():
        for seconds in (args.seconds // 3, args.seconds):
            steps = round(seconds / trials[label].step_seconds(args, 0))
            table[label, seconds] = replace(training, name=f"{training.name}_{seconds}s",
                                            steps=steps)
    train_all(list(table.values()), args, seeds=1)
    longest = [table[label, args.seconds] for label in models]
    for scale in SCALES:
        draw_and_measure(longest, args, scale, tenth, 250)
    best = {label: min(SCALES, key=lambda scale: drawn(training, args, scale, tenth)["fd"])
            for label, training in zip(models, longest)}
    for scale in SCALES:
        chosen = [training for (label, _), training in table.items() if best[label] == scale]
        draw_and_measure(chosen, args, scale, others, 1000)
    rows = []
    for (label, seconds), training in table.items():
        metrics = drawn(training, args, best[label], others)
        rows.append([label, seconds, training.steps, best[label],
                     *(f"{metrics[name]:.{digits}f}" for name, digits in DRAWN_METRICS.items())])
    print_table(["", "seconds", "steps", "guidance", "FD (Lite2)", "precision", "recall",
                 "class right", "bits", "images/s"], rows)


def split_validation(args):
    """Two folders of links: a tenth of the validation images of each class, and the others; each
    beside the training images."""
    folders = args.runs / "tenth", args.runs / "others"
    for folder in folders:
        folder.mkdir(exist_ok=True)
        if not (folder / "train").exists():
            (folder / "train").symlink_to((args.data / "train").resolve())
    for number, file in enumerate(sorted((args.data / "val").resolve().glob("*/*"))):
        link = folders[number % 10 > 0] / "val" / file.parent.name / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(file)
    return folders


def draw_and_measure(trainings, args, scale, data, count):
    """Samples of those that have none of this scale of guidance yet, against the images in data."""
    folders = {training.folder(args): record(training, args, scale, data) for training in trainings}
    folders = {folder: path for folder, path in folders.items() if not path.is_file()}
    evaluate(list(folders), args,
             ["-n", str(count), "--images", str(count), "--features", "efficientnet_lite2",
              f"data.root={data}", f"sample.cfg_scale={scale}"])
    for folder, path in folders.items():
        (folder / "metrics.json").rename(path)


def drawn(training, args, scale, data):
    """What draw_and_measure found."""
    return json.loads(record(training, args, scale, data).read_text())


def record(training, args, scale, data):
    return training.folder(args) / f"{data.name}_{scale}.json"


CROPS = ("data.image_size=128", "data.min_scale=0.2", "train.train_batch_size=4",
         "loss.disc_start=0", "loss.gan_start=50")


def photos(args):
    training = ANY_CLAIMS["DQ-VAE f8/f4, feature router, any rate"]
    settings = *training.settings, *CROPS, f"train.init_from={training.folder(args)}"
    train_all([replace(training, name="photos_dqvae_any", rate="3e-3", steps=700,
                       settings=settings)], args, seeds=1)


TABLES = {table.__name__: table
          for table in (rates_stage1, rates_stage2, rates_folder, speed, codes, any_rate, quantizers,
                        transformers, claims_stage1, claims_stage2, photos)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", choices=list(TABLES))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--seconds", type=int, default=1800,
                        help="of training on one core, and a third of them (claims_stage2)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/results")
    args = parser.parse_args()
    args.runs = args.runs.resolve()
    for table in args.tables:
        TABLES[table](args)


if __name__ == "__main__":
    main()
