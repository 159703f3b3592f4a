"""The sections of the training scripts' configs, their keys and defaults.

    STAGE1_SECTIONS     what takes the keys of each section (see load_config)
    TrainSettings       the section `train`, common to both stages

Those of stage 2 alone are in settings_stage2.py.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from dataset import make_dataset
from harness.models import QUANTIZERS, STAGE1
from losses import PatchGAN, Stage1Loss

Count = Annotated[int, (0, 2**62)]
Share = Annotated[float, (0, 1 - 1e-9)]


@dataclass
class TrainSettings:
    """The section `train`. Names follow accelerate's and diffusers' scripts."""

    # A subclass in another file inherits these annotations evaluated: so this file is without
    # `from __future__ import annotations`.

    output_dir: str | None = None  # the run folder; default: runs/NAME for configs/.../NAME.yaml
    seed: Annotated[int, (0, 2**32 - 1)] = 0
    train_batch_size: int = 12  # images per process and forward pass
    gradient_accumulation_steps: int = 1  # batch size x processes x this is the "global batch"
    # Start from the weights of this run or checkpoint, as far as they fit.
    init_from: str | None = None
    # Parts of the model that do not learn, such as [encoder, pre_quant, quantizer].
    freeze: list[str] | None = None
    max_train_steps: int | None = None  # give this
    # Or this; or both: the first to end.
    num_train_epochs: Annotated[float, (1e-9, 1e9)] | None = None
    # Save and stop, for clusters with time limits; --resume auto continues.
    max_minutes: float | None = None
    # Muon for matrices and AdamW for the rest, or AdamW for all.
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float | None = None
    base_lr: float | None = None  # or this: per image, multiplied by the global batch
    lr_scheduler: Literal["constant", "cosine", "linear"] = "constant"  # after the warm-up
    min_lr: float = 0.0  # where cosine and linear end
    lr_warmup_steps: Count = 0  # added to lr_warmup_epochs
    lr_warmup_epochs: float = 0.0
    adam_beta1: Share = 0.9
    adam_beta2: Share = 0.95
    adam_weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    # Gradient clipping, per optimizer.
    max_grad_norm: Annotated[float, (1e-12, 1e300)] | None = None
    # Steps with a non-finite loss or gradient are skipped; more than this in a row stop the run.
    max_bad_steps: Count = 10
    # null: what `accelerate launch` says.
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    use_ema: bool = False  # average the weights, for validation and load_run
    ema_decay: Annotated[float, (0, 1)] = 0.9999
    compile: bool = False  # torch.compile the parts of the model
    dataloader_num_workers: Annotated[int, (0, 1024)] = 4
    logging_steps: int = 50
    validation_steps: int = 1000
    num_validation_images: int | None = 1000  # spread evenly over the validation split; null: all
    checkpointing_steps: int = 5000
    checkpoints_total_limit: int | None = 2  # how many of the last checkpoints to keep; null: all
    log_with: str | None = "tensorboard"  # any tracker that accelerate knows, or null


@dataclass
class Stage1Settings(TrainSettings):
    # The memory layout that GPUs' convolutions like; needs compile, or each GroupNorm undoes it.
    channels_last: bool = False
    # Log the Frechet distance of the validation images' reconstructions, in these features.
    validation_features: Literal["inception", "efficientnet_lite2"] | None = None
    # How many training images the thresholds of an entropy router are computed from.
    calibration_images: int = 2000
    calibration_file: str | None = None  # thresholds.json of another run, to use instead
    # Record usage, norms and gradients of the codes every so many steps, for visualize.py.
    codebook_stats_every: int | None = None


STAGE1_SECTIONS = {
    "model": STAGE1,
    "model.quantizer": QUANTIZERS,
    "model.image_size": "data.image_size",
    "data": make_dataset,
    "loss": Stage1Loss,
    "discriminator": PatchGAN,
    "train": Stage1Settings,
}
