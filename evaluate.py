"""Measures runs: reconstructions of stage 1, samples of stage 2. Several runs give one table.

    python evaluate.py --run runs/vqgan [--run runs/mqvae ...] [--split val] [--images N]
                       [--markdown] [data.root=PATH ...]
    python evaluate.py --run runs/mqvae_any --rates 0.1,0.5,0.9
    python evaluate.py --run runs/dq_transformer -n 5000 [--samples FOLDER | FILE.npz]
                       [--reference FILE.npz] [sample.top_k=100 ...]
    accelerate launch --num_processes 8 evaluate.py --run ...

stage 1   psnr (dB), ssim, lpips (VGG)    of each image in 8 bits, by torchmetrics and lpips
          rfid, rsfid                     FID and sFID between images and reconstructions
          rfd, agreement                  (--features efficientnet_lite2) Frechet distance, and the
                                          share of images whose class stays what the network names
          usage, perplexity               share of the codes that occur in the set, and
                                          exp(entropy) of their frequencies
          usage_65536                     expected usage among 65,536 of the set's codes, comparable
                                          between sets of different sizes
          codes, bits, bits_per_pixel     per image
          kept_ratio, ratio_1, ratio_2    share of cells with a code; of regions with granularity 1
                                          and 2
stage 2   fid, is, precision, recall      of the samples against the split, by torch-fidelity;
                                          precision and recall with 3 nearest neighbours in
                                          Inception's features (Kynkaanniemi et al., NeurIPS 2019),
                                          as in the ADM suite
          sfid                            FID with features that know places: in place of the 2,048
                                          of pool_3 the first 7 channels of mixed_6/conv, 17 x 17 x
                                          7 (Nash et al., ICML 2021), as in the ADM suite
          fd, accuracy                    (--features efficientnet_lite2) Frechet distance; and the
                                          share of samples that the network gives the class asked
                                          for, if classes are named by ImageNet's WordNet numbers
          accuracy_of_images              ... and of the split's images, their own, to compare with
          bits                            negative log-likelihood of a validation image's codes; of
                                          a MaskTransformer an upper bound
          images_per_second               of sampling, on all processes together

EfficientNet-Lite2's features come with packages, where Inception's must be downloaded. A Frechet
distance in them is no FID: compare it with others of the same features only. Its precision and
recall are of these features, too.

--reference FILE.npz takes the place of the split: FID is against its `mu`, `sigma`, sFID against
its `mu_s`, `sigma_s`, precision and recall against its images `arr_0`. Statistics that it lacks are
those of its images; without images, precision and recall stay against the split. --save_statistics
FILE.npz writes the split's statistics under these names.

_std is the spread over images (of `is`: over ten splits). FID depends on the number of images;
compare equal numbers only. But for rounding, results do not depend on the batch size or the number
of processes. Images are not augmented, in --split train either. Of a class-conditional run, samples
are of each class as often as the split's images (`labels`: as in val). All is kept in each run's
metrics.json, with the `images` of `images_in_split` of `split` of `dataset` that were measured (in
stage 2 for `bits`), the `features` of Frechet distance, precision and recall, and the `real_images`
of the latter from `real_images_from`, a split or the reference. evaluations.jsonl keeps the results
of every call, a line each.
"""

import json
import math
import os
import re
import time
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

from harness.checkpoint import write_file
from harness.config import UserError
from harness.features import (
    PARTS, check_images, check_neighbours, distances, gaussians, imagenet_numbers,
    inception_features, inception_score, lite2_features, load_inception, load_reference,
    precision_and_recall, read_npz, save_statistics,
)
from harness.hub import run_folder
from harness.launch import run_main
from harness.metrics import collect, compare, mean_and_spread, perplexity, usage
from harness.models import STAGE2, class_names, load_run, run_config
from harness.run import PATIENCE
from harness.sampling import (
    draw, load_models, model_parser, parse_with_overrides, sampling_arguments, to_path,
)
from harness.settings_stage2 import SampleSettings
from harness.use import in_precision, overridden, run_dataset, set_rate, to_rates

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, tqdm
from torch.utils.data import BatchSampler

from data.sources import list_images
from dataset import eval_loader, make_dataset, read_image, spread, to_uint8
from losses import load_efficientnet_lite, load_lpips
from vqgan import sides

QUEUE = 65536
METRICS = {  # that need networks, by network and stage
    "lpips": {1: ["lpips"], 2: []},
    "inception": {1: ["rfid", "rsfid"], 2: ["fid", "sfid", "is", "precision", "recall"]},
    "efficientnet_lite2": {1: ["rfd", "agreement"], 2: ["fd", "precision", "recall"]},
}


def main(argv=None):
    args = parse_arguments(argv)
    names = {folder: run_config(folder)["model"]["name"] for folder in args.run}
    check_arguments(args, names)
    evaluation = Evaluation(args, names)
    evaluation.check_data()
    evaluation.load_networks()
    if args.save_statistics:
        evaluation.save_statistics()
    for folder in args.run:
        evaluation.measure(folder)
    evaluation.print_results()


def parse_arguments(argv):
    parser = model_parser(__doc__)
    option = parser.add_argument
    option("--run", action="append", required=True, type=run_folder,
           help="a run folder; several times for a comparison")
    option("--rates", type=to_rates,
           help="(stage 1, trained for a range) several rates, such as 0.1,0.5,0.9: a result for "
                "each")
    option("--split", choices=("train", "val"), default="val",
           help="the images to compare with (default val)")
    option("--images", type=int,
           help="at most so many of them, spread over the split (default: all)")
    option("-n", type=int, help="(stage 2) samples to draw (default: as many as images)")
    option("--samples", type=to_path,
           help="(stage 2) measure these instead: a folder of images, or an .npz of uint8 images")
    option("--reference", type=to_path,
           help="an .npz of statistics or images (ADM suite) for FID, in place of the split")
    option("--save_statistics", metavar="FILE.npz", type=to_path,
           help="write the split's statistics there, for --reference")
    option("--features", choices=list(PARTS), default="inception",
           help="the network that sees images for Frechet distances, precision and recall")
    option("--without", nargs="+", choices=list(METRICS), default=[],
           help="leave out what needs these networks")
    option("--batch_size", type=int, default=32, help="images at a time, per process")
    option("--num_workers", type=int, default=min(4, os.cpu_count()),
           help="processes that read images, per process")
    option("--markdown", action="store_true",
           help="print the table as Markdown, a row for each run")
    return parse_with_overrides(parser, argv)


def check_arguments(args, names):
    """UserError for what makes no sense, as far as the command line shows it."""
    counts = [args.batch_size, args.images, args.n, args.num_workers + 1]
    if any(count is not None and count < 1 for count in counts):
        raise UserError("--batch_size, --images and -n must be at least 1, and --num_workers at "
                        "least 0")
    in_stage2 = [name in STAGE2 for name in names.values()]
    if args.rates and any(in_stage2):
        raise UserError("--rates are for stage-1 runs; a stage-2 run has one, codes.ratio")
    if args.samples and not args.samples.exists():
        raise UserError(f"there is no {args.samples}")
    if args.samples and not all(in_stage2):
        raise UserError("--samples are compared with the data of a stage-2 run; give --run one")
    statistics = args.save_statistics
    if (args.reference or statistics) and args.features != "inception":
        raise UserError("--reference and --save_statistics are of Inception's features; leave out "
                        f"--features {args.features}")
    if (args.reference or statistics) and "inception" in args.without:
        raise UserError("--reference and --save_statistics need Inception; leave out --without "
                        "inception")
    if statistics and (statistics.suffix != ".npz" or not statistics.parent.is_dir()):
        raise UserError("--save_statistics must be FILE.npz in a folder that exists; it is "
                        f"{statistics}")


class Evaluation:
    """What one call of this script measures.

    names      of the models, for each run folder
    results    the metrics, for each row of the table
    lpips, network    LPIPS, and that of --features, if they are there
    absent     for each of the others, why it is not
    reference  Gaussians of --reference; and `images`, if it has some
    samples    of --samples: images, or files
    seen       features and logits of real images: computed once for several runs
    """

    def __init__(self, args, names):
        self.args = args
        self.names = names
        self.results = {}
        self.absent = {}
        self.reference = load_reference(args.reference) if args.reference else {}
        self.images = self.reference.pop("images", None)
        self.seen = {}
        self.parts = PARTS[args.features]
        self.state = Accelerator(kwargs_handlers=[PATIENCE])

    # Runs, images and networks

    def load(self, folder):
        """A run: its config, its models on the device (`model` is of stage 2, or None), the images
        that it is measured on, and their settings."""
        args = self.args
        options = self.state.device, args.mixed_precision
        model = None
        if self.names[folder] in STAGE2:
            model, stage1, config, _ = load_models(folder, args.which, *options)
        else:
            stage1, config = load_run(folder, args.which)
            stage1 = in_precision(stage1, config, *options)
        dataset, data = run_images(args, config, args.split, stage1)
        return SimpleNamespace(folder=folder, config=config, model=model, stage1=stage1,
                               dataset=dataset, data=data)

    def check_data(self):
        """UserError for what cannot be measured, before anything is."""
        args = self.args
        data = set()
        asked = args.rates or args.reference or args.samples or args.save_statistics
        for folder in args.run if asked else ():
            run = self.load(folder)
            data.add(data_key(run.data))
            if self.images is not None:
                check_images(self.images, args.reference, sides(run.dataset.image_size))
            if args.samples:
                self.samples = open_samples(args.samples, sides(run.config["data"]["image_size"]))
            for rate in args.rates or ():
                set_rate(run.stage1, rate)
        if args.save_statistics and len(data) > 1:
            raise UserError("--save_statistics are of one data set, and these runs have several; "
                            "give --run one of them")

    def load_networks(self):
        needs_lpips = not all(name in STAGE2 for name in self.names.values())
        self.lpips = needs_lpips and self.load_network("lpips", load_lpips, "--without lpips")
        if self.args.features == "inception":
            self.network = self.load_network("inception", load_inception)
        else:
            self.network = self.load_network("efficientnet_lite2", load_efficientnet_lite, 2)

    def load_network(self, name, load, *args):
        """The network; or None, and `absent` says why."""
        reason = ""
        with self.state.local_main_process_first():  # may download
            try:
                if name in self.args.without:
                    raise FileNotFoundError(f"left out by --without {name}")
                network = load(*args).to(self.state.device)
            except FileNotFoundError as error:
                reason = str(error)
        reason = max(gather_object([reason]))  # here or on another machine
        if not reason:
            return network
        self.absent[name] = reason
        return None

    # The work of several processes

    def batches(self, dataset, what):
        """This process's share of a dataset: float images (B, 3, H, W) and labels (B,)."""
        args = self.args
        state = self.state
        loader = eval_loader(dataset, args.batch_size, args.images, args.num_workers,
                             state.process_index, state.num_processes, state.device)
        count = min(args.images or len(dataset), len(dataset))
        total = math.ceil(count / (args.batch_size * state.num_processes))
        return tqdm(loader, what, total)

    def split(self, count, what):
        """This process's share of the numbers below `count`, in lists."""
        mine = range(self.state.process_index, count, self.state.num_processes)
        return tqdm(BatchSampler(mine, self.args.batch_size, drop_last=False), what)

    # Images, as the network sees them

    def see(self, images):
        """Features (B, D) and logits (B, C) of uint8 images (B, 3, H, W)."""
        is_inception = self.args.features == "inception"
        features_of = inception_features if is_inception else lite2_features
        return features_of(self.network, images)

    def see_real(self, run, images=None):
        """Features (N, D) and logits (N, C) of these images, or else of the dataset's; on the first
        process."""
        key = data_key(run.data) if images is None else "reference"
        if key not in self.seen:
            if images is None:
                source = (to_uint8(batch) for batch, _ in self.batches(run.dataset, "originals"))
            else:
                source = (as_tensor(images[numbers])
                          for numbers in self.split(len(images), "reference"))
            self.seen[key] = collect_all(map(self.see, source))
        return self.seen[key]

    def real_side(self, run, neighbours=False):
        """What samples and reconstructions are compared with, on the first process: Gaussians; for
        neighbours also "features" (M, D) and where they are "from". Nothing without the network."""
        if not self.network:
            return {}
        is_enough = self.reference and (self.images is None or len(self.reference) == 2)
        if is_enough and not neighbours:
            return self.reference
        features, _ = self.see_real(run, self.images)
        if not self.state.is_main_process:
            return {}
        real = {} if is_enough else gaussians(features, self.parts)
        origin = self.args.split if self.images is None else self.args.reference.name
        return real | self.reference | {"features": self.main_part(features), "from": origin}

    def main_part(self, features):
        """Those of the features by which neighbours are found."""
        return features[:, next(iter(self.parts.values()))]

    def save_statistics(self):
        if not self.network:
            raise UserError(self.absent["inception"])
        features, _ = self.see_real(self.load(self.args.run[0]))
        if self.state.is_main_process:
            save_statistics(self.args.save_statistics, gaussians(features, self.parts))
            print(f"statistics of {len(features)} images: {self.args.save_statistics}")

    # Stage 1

    def measure_stage1(self, run):
        """The metrics; on the first process."""
        args = self.args
        model = run.stage1
        size = sides(run.dataset.image_size)
        if min(size) < 11:
            raise UserError("SSIM needs images of 11 pixels or more; these have "
                            f"{run.dataset.image_size}")
        real = self.real_side(run)
        books = model.quantizer.codebooks  # a residual quantizer may have one for each depth
        numbers = torch.arange(model.quantizer.codebook_size * books, device=self.state.device)
        offsets = numbers[::model.quantizer.codebook_size]
        uses = torch.zeros_like(numbers)
        rows = []
        seen = []
        for images, _ in self.batches(run.dataset, run.folder):
            codes = model.encode(images)
            reconstructions = to_uint8(model.decode(codes))
            values = compare(to_uint8(images), reconstructions, self.lpips) | model.counts(codes)
            rows.append(torch.stack([v.double() for v in values.values()], 1).cpu())
            spent = (codes["indices"] + offsets)[model.spent(codes)]
            uses += torch.bincount(spent, minlength=len(uses))
            if self.network:
                seen.append(self.see(reconstructions))
        uses = self.state.reduce(uses, "sum").cpu().chunk(books)
        rows = collect(rows)                                            # (N, metrics)
        features, logits = collect_all(seen)
        if not self.state.is_main_process:
            return {}
        metrics = measured_images(run.data, args.split, len(rows), run.dataset)
        for name, column in zip(values, rows.T):
            metrics |= mean_and_spread(name, column)
        if self.network:
            found = distances(features, self.parts, real)
            metrics |= {f"r{name}": distance for name, distance in found.items()}
        if self.network and args.features == "efficientnet_lite2":
            _, logits_of_real = self.see_real(run)
            is_kept = logits.argmax(1) == logits_of_real.argmax(1)
            metrics["agreement"] = is_kept.double().mean().item()
        metrics["usage"] = fmean(map(usage, uses))
        metrics[f"usage_{QUEUE}"] = fmean(usage(book, QUEUE) for book in uses)
        metrics["perplexity"] = fmean(map(perplexity, uses))
        metrics["bits_per_pixel"] = metrics["bits"] / math.prod(size)
        return metrics

    # Stage 2

    def measure_stage2(self, run):
        """The metrics; on the first process."""
        args = self.args
        dataset = run.dataset
        trained = run.config["data"]["image_size"]
        if sides(dataset.image_size) != sides(trained):
            raise UserError(f"the model of {run.folder} draws images of {trained} pixels, not "
                            f"{dataset.image_size}")
        validation = dataset
        if args.split != "val":
            validation, _ = run_images(args, run.config, "val", run.stage1)
        is_conditional = run.model.num_classes > 0
        for images in (dataset, validation) if is_conditional else ():
            set_classes(images, run)
        real = self.real_side(run, neighbours=True)
        bits = []
        for images, labels in self.batches(validation, f"{run.folder}: bits"):
            labels = labels if is_conditional else None
            bits.append(run.model.bits(run.stage1.encode(images), labels).double().cpu())
        bits = collect(bits)

        count = args.n or min(args.images or len(dataset), len(dataset))
        if not self.network:
            count = min(count, args.batch_size * self.state.num_processes)  # for the speed alone
        elif real and not args.samples:
            check_neighbours(count, len(real["features"]), args.features)
        seconds = []
        source = self.draw_samples(run, count, seconds)
        if args.samples:
            source = self.read_samples(sides(trained)) if self.network else ()
        seen = []
        asked = []  # the classes
        for images, labels in source:
            if self.network:
                seen.append(self.see(images))
                asked.append(labels)
        features, logits = collect_all(seen)
        asked = collect(asked) if is_conditional and not args.samples else None
        seconds = max(gather_object([sum(seconds)]))
        if not self.state.is_main_process:
            return {}
        metrics = measured_images(run.data, "val", len(bits), validation)
        metrics |= mean_and_spread("bits", bits)
        if not args.samples:
            metrics["images_per_second"] = count / seconds
        if not self.network:
            return metrics
        if is_conditional and not args.samples:
            metrics["labels"] = f"as in {args.split}"
        metrics |= precision_and_recall(self.main_part(features), real["features"], args.features)
        metrics |= distances(features, self.parts, real)
        if args.features == "inception":
            metrics |= inception_score(logits)
        elif asked is not None:
            metrics |= self.accuracy(run, logits, asked)
        return metrics | {"real_images": len(real["features"]), "real_images_from": real["from"]}

    def accuracy(self, run, logits, asked):
        """How often the network gives samples with these logits (N, 1000) the classes (N,) that
        were asked for, and the dataset's images their own."""
        dataset = run.dataset
        numbers = imagenet_numbers(dataset)
        if numbers is None:
            return {"missing": {"accuracy": "the classes are not named by WordNet numbers"}}
        _, logits_of_real = self.see_real(run)
        own = [dataset.label(i) for i in spread(len(dataset), self.args.images)]
        pairs = {"accuracy": (logits, asked), "accuracy_of_images": (logits_of_real, own)}
        return {name: (logits.argmax(1) == numbers[labels]).double().mean().item()
                for name, (logits, labels) in pairs.items()}

    def draw_samples(self, run, count, seconds):
        """This process's share of new images, uint8 (B, 3, H, W), and their labels (B,), which are
        as in the dataset, or None; adds to the list how long each batch took."""
        labels = spread_labels(run.dataset, count) if run.model.num_classes else None
        settings = overridden(run.config, self.args.overrides, **SECTIONS)["sample"]
        settings = sampling_arguments(run.model, settings, labels)
        for numbers in self.split(count, "sampling"):
            started = time.monotonic()
            images = draw(run.model, run.stage1, numbers, labels, self.args.seed, settings)
            seconds.append(time.monotonic() - started)
            yield as_tensor(images), None if labels is None else labels[numbers]

    def read_samples(self, size):
        """This process's share of --samples, uint8 (B, 3, H, W), and None for their labels."""
        for numbers in self.split(len(self.samples[:self.args.n]), "samples"):
            batch = [self.samples[number] for number in numbers]
            if self.args.samples.is_dir():
                batch = [read_pixels(file, size) for file in batch]
            yield as_tensor(np.stack(batch)), None

    # Results

    @torch.no_grad()
    def measure(self, folder):
        """Measures a run, at each of the rates, and writes its metrics.json."""
        args = self.args
        run = self.load(folder)
        stage = 2 if run.model else 1
        about = {"run": folder, "model": self.names[folder]}
        no_statistics = f"{args.reference} has neither `mu_s` and `sigma_s` nor images"
        by_rate = {}
        for rate in args.rates or [None]:
            row = folder
            if rate is not None:
                row = f"{Path(folder)} at {rate:g}"
                set_rate(run.stage1, rate)
            metrics = self.measure_stage2(run) if run.model else self.measure_stage1(run)
            if args.reference and self.network:
                metrics["reference"] = args.reference.name
            missing = {name: self.absent.get(network, no_statistics)
                       for network in ("lpips", args.features)
                       for name in METRICS[network][stage] if name not in metrics}
            metrics["missing"] = metrics.get("missing", {}) | missing
            if self.network:
                metrics["features"] = args.features
            by_rate[rate] = metrics
            self.results[row] = about | metrics
        if self.state.is_main_process:
            about |= {"which": args.which, "split": args.split, "data": args.overrides}
            about |= {"rates": by_rate} if args.rates else metrics
            try:
                write_file(Path(folder) / "metrics.json", json.dumps(about, indent=1) + "\n")
                with (Path(folder) / "evaluations.jsonl").open("a") as file:
                    file.write(json.dumps(about) + "\n")
            except OSError as error:  # somebody else's run, a full disk: the table follows
                print(f"{folder}/metrics.json could not be written ({error.strerror})")

    def print_results(self):
        if self.state.is_main_process:
            print(table(self.results, self.args.markdown))
            missing = {}  # names of metrics, by the reason
            for metrics in self.results.values():
                for name, reason in metrics["missing"].items():
                    missing.setdefault(reason, set()).add(name)
            for reason, names in missing.items():
                labels = [label for label, template in ROWS.items()
                          if re.split(r"\W", template)[1] in names]
                print(f"without {', '.join(labels)}: {reason}")
        self.state.wait_for_everyone()


def collect_all(seen):
    """The same of features and logits, in pairs."""
    features, logits = zip(*seen) if (seen := list(seen)) else ((), ())
    return collect(features), collect(logits)


SECTIONS = {"data": make_dataset, "sample": SampleSettings}  # of stage 1: the first


def run_images(args, config, split, model):
    """A split of a run's data, or of other data by overrides, without augmentation; and the
    settings of that data."""
    sections = {name: SECTIONS[name] for name in SECTIONS if name in config}
    data = overridden(config, args.overrides, **sections)["data"]
    data |= {"random_crop": False, "random_flip": False}
    return run_dataset({"data": data}, [], split, model), data


def set_classes(dataset, run):
    """Makes the labels those of a stage-2 run, by name if it knows names."""
    dataset.set_classes(class_names(run.folder) or dataset.classes)
    if len(dataset.classes) != run.model.num_classes:
        raise UserError(f"the model of {run.folder} knows {run.model.num_classes} classes, and "
                        f"this data has {len(dataset.classes)}")


def data_key(data):
    """Equal for equal images (min_scale is of an augmentation that is off)."""
    return str(data | {"min_scale": None})


def measured_images(data, split, count, dataset):
    """Which images a row is about; a user's own are called by the last part of their path."""
    name = data["name"]
    if name in ("folder", "webdataset", "huggingface"):
        name = to_path(data["root"]).resolve().name
    return {"dataset": name, "split": split, "images": count, "images_in_split": len(dataset)}


def spread_labels(dataset, count):
    """Labels (count,) in the dataset's proportions."""
    labels = sorted(map(dataset.label, range(len(dataset))))
    return torch.tensor([labels[i * len(labels) // count] for i in range(count)])


def open_samples(source, size):
    """--samples: the images (N, H, W, 3) of an .npz, or the files of a folder, but for sample.py's
    grid.png. UserError unless they are there and (the first file) of this size."""
    if source.suffix == ".npz":
        images = read_npz(source, "arr_0").get("arr_0")
        check_images(images, source, size)
        return images
    files = list_images(source)[0] if source.is_dir() else []
    files = [file for file in files if file.name != "grid.png"]
    if not files:
        raise UserError(f"there are no images in {source}")
    read_pixels(files[0], size)
    return files


def as_tensor(images):
    """Pixels (N, H, W, 3) as (N, 3, H, W)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def read_pixels(file, size):
    """An image (H, W, 3), which must be of this size, (height, width)."""
    try:
        pixels = np.asarray(read_image(file))
    except Exception as error:  # PIL raises almost anything on a broken file
        raise UserError(f"cannot read {file} ({type(error).__name__}); remove it from the "
                        "samples") from error
    if pixels.shape[:2] != size:
        raise UserError(f"{file} has {pixels.shape[1]} x {pixels.shape[0]} pixels, but the data "
                        f"that it is compared with {size[1]} x {size[0]}")
    return pixels


# The table

ROWS = {  # of the table, and what stands in a cell; the first metric is what it is about
    "model": "{model}",
    "data": "{dataset} {split}",
    "images": "{images} of {images_in_split}",
    "reference of FID": "{reference}",
    "PSNR (dB)": "{psnr:.2f}",
    "SSIM": "{ssim:.4f}",
    "LPIPS": "{lpips:.4f}",
    "rFID": "{rfid:.2f}",
    "rsFID": "{rsfid:.2f}",
    "rFD (Lite2)": "{rfd:.2f}",
    "same class": "{agreement:.1%}",
    "codes in use": "{usage:.1%}",
    f"... of {QUEUE:,} codes": f"{{usage_{QUEUE}:.1%}}",
    "perplexity": "{perplexity:.1f}",
    "codes per image": "{codes:.1f} ± {codes_std:.1f}",
    "bits per image": "{bits:.1f} ± {bits_std:.1f}",
    "bits per pixel": "{bits_per_pixel:.4f}",
    "kept cells": "{kept_ratio:.1%}",
    "granularity 1": "{ratio_1:.1%} ± {ratio_1_std:.1%}",
    "granularity 2": "{ratio_2:.1%} ± {ratio_2_std:.1%}",
    "samples": "{samples}",
    "their labels": "{labels}",
    "real images": "{real_images} from {real_images_from}",
    "FID": "{fid:.2f}",
    "sFID": "{sfid:.2f}",
    "FD (Lite2)": "{fd:.2f}",
    "class asked for": "{accuracy:.1%}",
    "... images' own class": "{accuracy_of_images:.1%}",
    "features": "{features}",
    "Inception Score": "{is:.2f} ± {is_std:.2f}",
    "precision": "{precision:.3f}",
    "recall": "{recall:.3f}",
    "sampled images/s": "{images_per_second:.2f}",
}


def table(results, markdown=False):
    """The results {run: metrics} as text: a column for each run, or in Markdown a row."""
    rows = [["run", *(Path(run).name for run in results)]]
    rows += [[label, *(cell(metrics, template) for metrics in results.values())]
             for label, template in ROWS.items()]
    rows = [row for row in rows if {*row[1:]} != {"-"}]
    if markdown:
        lines = zip(*([label, "---", *cells] for label, *cells in rows))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(map(len, line)) for line in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def cell(metrics, template):
    """Metrics as text, "-" if they are missing; a spread of 0 is left out."""
    try:
        return re.sub(" ± 0[.0]*%?$", "", template.format(**metrics))
    except KeyError:
        return "-"


if __name__ == "__main__":
    run_main(main)
