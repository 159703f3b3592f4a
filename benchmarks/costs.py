"""What a config's training takes: parameters, arithmetic, hours. Computed, nothing is trained.

    python benchmarks/costs.py                      # all configs of stage1/ and stage2/
    python benchmarks/costs.py configs/quickstart/dqvae.yaml configs/stage2/gpt_ffhq.yaml
    python benchmarks/costs.py --tflops 312         # another GPU's peak, here an A100's in bf16

Prints a Markdown table. Needs no data, no weights and no GPU; 6 GB of memory and about 5 seconds a
config.

GFLOP per image     forward and backward, an addition and a multiplication counting as two: matrix
                    products, convolutions and attention (the whole matrix, also if it is causal),
                    as torch's FlopCounterMode counts them. Stage 1: a step that trains generator
                    and discriminator, LPIPS (VGG-16) included. Stage 2: on codes that are encoded
                    already. Validation and samples are left out.
images              of the whole training: epochs times the images that were published for training,
                    or steps times the batch (one process); for your own images, the steps
hours               that the arithmetic takes at `--share` of `--tflops`
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
from gpu import RandomLPIPS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from training import stage1_step

import losses
import train_stage2
from dataset import make_dataset
from harness.config import UserError, build, load_config, read_yaml
from harness.launch import run_main
from harness.models import make_model, set_image_size
from harness.settings import STAGE1_SECTIONS
from harness.settings_stage2 import STAGE2_SECTIONS
from losses import PatchGAN
from vqgan import sides

# Images for training: ILSVRC 2012; the first of FFHQ; CelebA's and CIFAR-10's own split.
IMAGES = {"imagenet": 1_281_167, "ffhq": 60_000, "celeba": 162_770, "cifar10": 50_000}
CLASSES = {"imagenet": 1000, "cifar10": 10}
CPU = torch.device("cpu")
ONE_IMAGE = ["train.train_batch_size=1", "train.mixed_precision=no", "train.compile=false",
             "train.channels_last=false"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", type=Path)
    parser.add_argument("--tflops", type=float, default=989.4,
                        help="the GPU's peak, without sparsity (default: H100, bf16)")
    parser.add_argument("--share", type=float, default=0.4, help="of it that training reaches")
    args = parser.parse_args(argv)
    losses.load_lpips = RandomLPIPS
    print("| config | parameters | discriminator | GFLOP per image | images | hours |\n"
          "| --- | --- | --- | --- | --- | --- |")
    for path in args.configs or sorted(ROOT.glob("configs/stage?/*.yaml")):
        is_stage2 = "codes" in read_yaml(path)
        parameters, of_discriminator, flops, config = (stage2 if is_stage2 else stage1)(path)
        images = training_images(config)
        hours = images * flops / (args.share * args.tflops * 1e12) / 3600
        print(f"| `{path.parent.name}/{path.name}` | {millions(parameters)} "
              f"| {millions(of_discriminator)} | {rounded(flops / 1e9)} | {millions(images)} "
              f"| {rounded(hours)} |", flush=True)


def rounded(number: float) -> str:
    if number < 1:
        return f"{number:.2g}"
    return f"{number:,.1f}" if number < 100 else f"{number:,.0f}"


def millions(number: int) -> str:
    return f"{rounded(number / 1e6)} M" if number else ""


def stage1(path: Path) -> tuple[int, int, int, dict]:
    """Parameters of the model and of its discriminator, FLOPs per image, and the config."""
    config = load_config(str(path), [], STAGE1_SECTIONS)
    model = make_model(config)
    has_gan = config["loss"]["disc_weight"] > 0
    discriminator = build(PatchGAN, config["discriminator"]) if has_gan else None
    step = stage1_step(load_config(str(path), ONE_IMAGE, STAGE1_SECTIONS), CPU)
    return size_of(model), size_of(discriminator), count(step), config


def stage2(path: Path) -> tuple[int, int, int, dict]:
    """The same for a transformer, on the codes of the stage-1 config that its own one names."""
    stage1_config = load_config(str(stage1_path(path)), [], STAGE1_SECTIONS)

    def inherit(settings: dict) -> None:
        settings["data"] = stage1_config["data"] | settings.get("data", {})

    config = load_config(str(path), [], STAGE2_SECTIONS, inherit)
    size = config["data"]["image_size"]
    autoencoder = make_model(stage1_config).eval()
    set_image_size(autoencoder, size)
    _, classes = training_set(config["data"])
    train_stage2.complete(config, autoencoder, classes)
    model = make_model(config)
    codes = codes_of_one_image(autoencoder, size)
    labels = torch.zeros(1, dtype=torch.int64) if config["train"]["class_conditional"] else None
    return size_of(model), 0, count(lambda: model(codes, labels)["loss"].backward()), config


def stage1_path(path: Path) -> Path:
    """The config whose run folder is codes.stage1."""
    name = Path(str(read_yaml(path)["codes"].get("stage1"))).name
    for folder in ("stage1", "quickstart"):
        if (ROOT / f"configs/{folder}/{name}.yaml").is_file():
            return ROOT / f"configs/{folder}/{name}.yaml"
    raise UserError(f"{path} is for the codes of {name}, which no config makes")


@torch.no_grad()
def codes_of_one_image(autoencoder: torch.nn.Module, size: int | list[int]) -> dict:
    """As many codes as an average image has."""
    image = torch.rand(1, 3, *sides(size)) * 2 - 1
    autoencoder.calibrate([image])
    with WithoutArithmetic():
        codes = autoencoder.encode(image)
    if "grain" in codes:  # the shares of DQ-VAE's granularities as they are asked for
        grain = codes["grain"].zero_().flatten()
        first = 0
        for granularity, share in enumerate(autoencoder.ratios, 1):
            last = first + round(share * len(grain))
            grain[first:last] = granularity
            first = last
    return codes


def training_images(config: dict) -> int:
    train = config["train"]
    number, _ = training_set(config["data"])
    ends = []
    if train["max_train_steps"] is not None:
        batch = train["train_batch_size"] * train["gradient_accumulation_steps"]
        ends.append(train["max_train_steps"] * batch)
    if train["num_train_epochs"] is not None and number is not None:
        ends.append(round(train["num_train_epochs"] * number))
    if not ends:
        raise UserError("how many images these epochs are depends on data.root; put "
                        "train.max_train_steps into the config")
    return min(ends)


def training_set(data: dict) -> tuple[int | None, list[str]]:
    """How many images there are, if that is known without them, and the names of their classes."""
    if data["name"] == "shapes":
        shapes = build(make_dataset, data, split="train")
        return len(shapes), shapes.classes
    return IMAGES.get(data["name"]), [str(i) for i in range(CLASSES.get(data["name"], 0))]


def size_of(model: torch.nn.Module | None) -> int:
    return sum(p.numel() for p in model.parameters()) if model is not None else 0


def count(step: Callable[[], None]) -> int:
    """Floating-point operations of a step, exactly, without doing those that are counted."""
    with (WithoutArithmetic(), sdpa_kernel(SDPBackend.MATH),
          FlopCounterMode(display=False) as counter):
        step()
    return counter.get_total_flops()


class WithoutArithmetic(TorchDispatchMode):
    """Matrix products and convolutions give zeros of the right shape, at once."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket not in flop_registry:
            return func(*args, **(kwargs or {}))
        shapes = tree_map_only(torch.Tensor, lambda x: x.to("meta"), (args, kwargs or {}))
        result = func(*shapes[0], **shapes[1])
        return tree_map_only(torch.Tensor, lambda x: torch.zeros_like(x, device="cpu"), result)


if __name__ == "__main__":
    run_main(main)
