"""Makes the tables of docs/results.md: trains what they need, measures it, prints them.

    python benchmarks/results.py TABLE [TABLE ...] --data PATH [--seeds 3] [--jobs 2] [--runs FOLDER]

PATH is a folder of photographs with train/ and val/ (measured: 100 classes of Tiny ImageNet), which
are scaled to 32 x 32. Each training is a run folder in --runs (default: runs/results): what is done
is not repeated, what was stopped goes on. A training has one thread; --jobs of them run at a time.

    rates_stage1, rates_stage2      learning rates of AdamW and Muon for each model
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Training:
    """A run of a script: a config and settings that replace its own."""

    name: str
    config: str  # of configs/quickstart
    settings: tuple[str, ...] = ()
    stage1: "Training | None" = None  # whose codes stage 2 learns

    def folder(self, args, seed):
        return args.runs / f"{self.name}_seed{seed}"

    def command(self, args, seed):
        script = "train_stage2.py" if self.stage1 else "train_stage1.py"
        words = [sys.executable, script, "--config", f"configs/quickstart/{self.config}.yaml",
                 "--resume", "auto", f"train.output_dir={self.folder(args, seed)}",
                 f"train.seed={seed}", "train.validation_steps=250", "train.log_with=null",
                 "train.num_validation_images=1000", "train.checkpoints_total_limit=1"]
        if self.stage1:
            words.append(f"codes.stage1={self.stage1.folder(args, 0)}")
        else:
            words += ["data.name=folder", f"data.root={args.data}", "data.image_size=32"]
        return words + list(self.settings)

    def lines(self, args, seed):
        """The lines of metrics.jsonl."""
        path = self.folder(args, seed) / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def scores(self, args, seed):
        """[(step, seconds of training so far, PSNR or bits)] of the validations."""
        score = "val_bits" if self.stage1 else "val_psnr"
        batch = 16
        seconds = last = 0
        scores = []
        for line in self.lines(args, seed):
            if "images_per_second" in line:
                seconds += (line["step"] - last) * batch / line["images_per_second"]
                last = line["step"]
            if score in line:
                scores.append((line["step"], seconds, line[score]))
        return scores

    def is_done(self, args, seed):
        steps = next(int(word.partition("=")[2]) for word in reversed(self.settings)
                     if word.startswith("train.max_train_steps="))
        path = self.folder(args, seed) / "metrics.jsonl"
        return path.is_file() and any(step == steps for step, *_ in self.scores(args, seed))


def train(training, args, seed):
    if training.is_done(args, seed):
        return
    folder = training.folder(args, seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "ab") as log:
        done = subprocess.run(training.command(args, seed), cwd=ROOT, stdout=log, stderr=log,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{folder} failed; see {folder}.log")
    print(f"{folder.name}: {training.scores(args, seed)[-1][2]:.2f}", flush=True)


def train_all(trainings, args):
    """All of these, after the stage-1 models that they need."""
    first = {training.stage1: [0] for training in trainings if training.stage1}
    for jobs in (first, {training: range(args.seeds) for training in trainings}):
        with ThreadPoolExecutor(args.jobs) as pool:
            pending = [pool.submit(train, training, args, seed)
                       for training, seeds in jobs.items() for seed in seeds]
            for job in pending:
                job.result()


def spread(values, digits=2):
    """A mean, and its standard deviation if there are several values."""
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def print_table(header, rows):
    for row in [header, ["---"] * len(header), *rows]:
        print(f"| {' | '.join(map(str, row))} |")


# Stage 1: squared error alone, 256 codes in an EMA codebook

PLAIN = ("loss.disc_weight=0", "train.train_batch_size=16", "train.dataloader_num_workers=0",
         "model.quantizer.codebook_size=256")
GAN = ("loss.disc_weight=0.1", "loss.disc_start=200", "loss.gan_start=250")
STAGE1 = {
    "VQGAN f4": ("vqgan", ()),
    "MQ-VAE, 25 % of the cells": ("mqvae", ("model.topk_ratio=0.25",)),
    "DQ-VAE f8/f4, 30 % fine": ("dqvae", ("model.ratios=[0.3]",)),
}
RATES = {"adamw": ["5e-4", "1e-3", "2e-3"], "muon": ["1e-3", "2e-3", "4e-3"]}
RATES_STEPS = 500


def optimizer(name, rate, steps):
    return (f"train.optimizer={name}", f"train.learning_rate={rate}",
            f"train.max_train_steps={steps}")


def rates_stage1(args):
    """The PSNR of each model for each learning rate; with the GAN on for the second half, too."""
    table = {}
    for label, (config, settings) in STAGE1.items():
        for loss, more in (("squared error", ()), ("and GAN", GAN)):
            for name, rates in RATES.items():
                table[label, loss, name] = [
                    Training(f"rates_{config}_{loss.split()[-1]}_{name}_{rate}", config,
                             PLAIN + settings + more + optimizer(name, rate, RATES_STEPS))
                    for rate in rates]
    compare_rates(args, table, "PSNR (dB)")


def rates_stage2(args):
    """The bits of each transformer for each learning rate, on codes of the embedded dataset."""
    table = {}
    for config, (source, settings) in STAGE2.items():
        stage1 = Training(f"codes_{source}", source, SHAPES)
        for name, rates in RATES.items():
            table[config, "", name] = [
                Training(f"rates_{config}_{name}_{rate}", config,
                         settings + optimizer(name, rate, RATES_STEPS), stage1)
                for rate in rates]
    compare_rates(args, table, "bits")


SHAPES = ("data.name=shapes", "data.root=null", "data.image_size=32", "data.max_objects=1",
          "loss.disc_weight=0", "train.train_batch_size=16", "train.dataloader_num_workers=0",
          "model.quantizer.codebook_size=128", "train.optimizer=muon", "train.learning_rate=2e-3",
          "train.max_train_steps=600")
STAGE2 = {
    "gpt": ("vqgan", ()),
    "stackformer": ("mqvae", ()),
    "dq_transformer": ("dqvae", ()),
    "mask_transformer": ("dqvae", ()),
}


def compare_rates(args, table, what):
    train_all([training for row in table.values() for training in row], args)
    rows = []
    for (label, loss, name), trainings in table.items():
        cells = [f"{rate}: {spread([t.scores(args, s)[-1][2] for s in range(args.seeds)])}"
                 for rate, t in zip(RATES[name], trainings)]
        rows.append([label, loss, name, *cells])
    print_table(["model", "loss", "optimizer", what, "", ""], rows)


TABLES = {table.__name__: table for table in (rates_stage1, rates_stage2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", choices=list(TABLES))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/results")
    args = parser.parse_args()
    args.runs = args.runs.resolve()
    for table in args.tables:
        TABLES[table](args)


if __name__ == "__main__":
    main()
