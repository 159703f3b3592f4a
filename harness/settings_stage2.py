"""The sections of stage 2's configs, their keys and defaults.

    STAGE2_SECTIONS                 what takes the keys of each section (see load_config)
    CodeSettings, SampleSettings    the sections `codes` and `sample`
"""

from dataclasses import dataclass
from typing import Literal

from dataset import make_dataset
from harness.models import STAGE2
from harness.settings import TrainSettings


@dataclass
class Stage2Settings(TrainSettings):
    class_conditional: bool = False  # learn the labels of the images


@dataclass
class CodeSettings:
    """The section `codes`."""

    stage1: str | None = None  # the run folder of the stage-1 model
    which: Literal["latest", "best"] = "latest"  # of its weights
    # Of a stage-1 model for any rate: the share of cells to keep or regions to refine; null: the
    # middle of its range. Or the shares of each granularity but the coarsest.
    ratio: float | None = None
    ratios: list[float] | None = None
    cache: bool = True  # encode the training images once; false: encode every batch anew
    cache_views: int = 2  # crops and flips of each image; epochs take them in turn
    # Default: the folder `codes` in the stage-1 run, which several runs can share.
    cache_dir: str | None = None
    batch_size: int = 64  # images encoded at a time, per process


@dataclass
class SampleSettings:
    """The section `sample`: of the pictures made while training, and the defaults of this script.
    See GPT.sample."""

    columns: int = 8  # of samples in a picture; a class-conditional model has a class per column
    rows: int = 4
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    cfg_scale: float = 1.0
    temperature_pos: float | None = None  # of positions, if the model has them; null: temperature
    top_k_pos: int | None = None
    top_p_pos: float | None = None
    steps: int | None = None  # from here on for MaskTransformer.sample; null: its default
    layout_steps: int | None = None
    choice_temperature: float | None = None
    cfg_schedule: Literal["constant", "linear"] | None = None


STAGE2_SECTIONS = {
    "model": STAGE2,
    "codes": CodeSettings,
    "data": make_dataset,
    "sample": SampleSettings,
    "train": Stage2Settings,
}
