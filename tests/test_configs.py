"""The files in configs/: all of them build, and what differs from the paper or release they name is marked as ours."""

import re
import shlex

import pytest
import torch
from conftest import ROOT

import train_stage2
from harness.config import build, load_config
from harness.models import make_model, model_class
from harness.settings import STAGE1_SECTIONS
from harness.settings_stage2 import STAGE2_SECTIONS

MQ = {"model.release_training": True, "model.demask_layers": 8, "model.ch_mult": [1, 1, 2, 2], "model.attn_resolutions": [32],
      "model.quantizer.codebook_size": 1024, "model.quantizer.dim": 256, "loss.disc_weight": 0.75, "loss.disc_weight_max": 1.0,
      "loss.disc_start": 0, "train.train_batch_size": 4, "train.base_lr": 4.5e-6, "train.lr_warmup_epochs": 0.1,
      "train.lr_scheduler": "cosine", "train.adam_beta1": 0.5, "train.adam_beta2": 0.9, "data.random_flip": True}
DQ = {"model.release_training": True, "model.factors": [16, 8], "model.ch_mult": [1, 1, 2, 2, 4], "model.attn_resolutions": [16, 32],
      "model.decoder_ch_mult": [1, 1, 2, 2], "model.ratios": [0.5], "loss.disc_weight": 1.0, "loss.disc_weight_max": 0.75,
      "loss.disc_start": 0, "train.train_batch_size": 30, "train.num_train_epochs": 50, "train.base_lr": 4.5e-6,
      "train.lr_warmup_epochs": 0.1, "train.lr_scheduler": "cosine", "train.adam_beta1": 0.5, "train.adam_beta2": 0.9}
TAMING = {"model.ch_mult": [1, 1, 2, 2, 4], "model.attn_resolutions": [16], "model.quantizer.codebook_size": 1024,
          "model.quantizer.legacy": True, "loss.disc_weight": 0.8, "train.base_lr": 4.5e-6, "train.adam_beta1": 0.5,
          "train.adam_beta2": 0.9, "data.random_flip": False, "data.min_scale": 1.0, "train.lr_scheduler": "constant"}
SECOND = {"train.learning_rate": 5e-4, "train.lr_scheduler": "cosine", "train.adam_beta1": 0.9, "train.adam_beta2": 0.95,
          "train.adam_weight_decay": 0.01, "model.dropout": 0.1, "train.lr_warmup_epochs": 0, "train.max_grad_norm": None,
          "train.use_ema": False, "train.mixed_precision": None, "model.label_dropout": 0, "model.rope": False,
          "model.qk_norm": False}
STACK = SECOND | {"model.code_layers": 12, "model.position_layers": 12, "model.n_head": 16, "model.n_embd": 1024,
                  "train.train_batch_size": 4, "train.num_train_epochs": 50, "sample.top_k": 100, "sample.top_p": 0.95,
                  "sample.top_k_pos": 10, "sample.top_p_pos": 0.95, "codes.stage1": "runs/mqvae_imagenet_r25"}
DQT = SECOND | {"model.content_layers": 18, "model.position_layers": 6, "model.n_head": 8, "model.n_embd": 1024, "sample.top_k": 300,
                "sample.top_k_pos": 1024, "train.train_batch_size": 30, "train.num_train_epochs": 100}
RELEASES = {
    "stage1/mqvae_imagenet_r25": MQ | {"model.topk_ratio": 0.25, "train.num_train_epochs": 50},
    "stage1/mqvae_imagenet_r30": MQ | {"model.topk_ratio": 0.3, "train.num_train_epochs": 50},
    "stage1/mqvae_ffhq_r25": MQ | {"model.topk_ratio": 0.25, "data.min_scale": 0.75},
    "stage1/dqvae_imagenet_dual_r50": DQ | {"model.router": "feature", "model.budget_weight": 10.0},
    "stage1/dqvae_imagenet_triple_r30_r30": DQ | {
        "model.router": "feature", "model.budget_weight": 1.0, "model.factors": [32, 16, 8], "model.ratios": [0.3, 0.3],
        "model.ch_mult": [1, 1, 2, 2, 4, 4], "model.attn_resolutions": [8, 16, 32]},
    "stage1/dqvae_imagenet_entropy_r50": DQ | {"model.router": "entropy"},
    "stage1/dqvae_ffhq_entropy_r50": DQ | {"model.router": "entropy", "data.min_scale": 0.75},
    "stage1/vqgan_imagenet_f16": TAMING | {"loss.disc_start": 250_001, "train.train_batch_size": 12},
    "stage1/vqgan_ffhq_f16": TAMING | {"loss.disc_start": 30_001, "train.train_batch_size": 3},
    "stage1/vqgan_imagenet_f16_llamagen": {
        "model.attn_resolutions": [16], "model.quantizer.codebook_size": 16_384, "model.quantizer.dim": 8, "model.quantizer.l2_norm": True,
        "loss.reconstruction": "l2", "loss.disc_weight": 0.5, "loss.disc_start": 20_000, "loss.adaptive_weight": False,
        "loss.disc_loss_weight": 0.5, "train.learning_rate": 1e-4, "train.adam_beta1": 0.9, "train.adam_beta2": 0.95,
        "train.max_grad_norm": 1.0, "train.mixed_precision": "bf16", "train.num_train_epochs": 40, "data.min_scale": 0.64,
        "data.random_flip": True},
    "stage1/vqvae_celeba64": {"model.ch": 256, "model.quantizer.codebook_size": 512, "model.quantizer.dim": 64, "train.learning_rate": 4e-4,
                              "train.train_batch_size": 256, "train.max_train_steps": 500_000, "loss.reconstruction": "l2"},
    "stage2/stackformer_imagenet_v12p12_class": STACK | {"train.class_conditional": True},
    "stage2/stackformer_imagenet_v12p12_uncond": STACK | {"train.class_conditional": False, "model.label_dropout": 0.1},
    "stage2/dq_transformer_imagenet_p6c18_class": DQT | {
        "codes.stage1": "runs/dqvae_imagenet_entropy_r50", "train.class_conditional": True},
    "stage2/dq_transformer_imagenet_p6c18_uncond": DQT | {
        "codes.stage1": "runs/dqvae_imagenet_entropy_r50", "train.class_conditional": False, "model.label_dropout": 0.1},
    "stage2/dq_transformer_ffhq_p6c18": DQT | {"codes.stage1": "runs/dqvae_ffhq_entropy_r50", "model.label_dropout": 0.1},
    "stage2/gpt_ffhq": {
        "model.n_layer": 12, "model.n_head": 12, "model.n_embd": 768, "model.dropout": 0.0, "train.train_batch_size": 16,
        "train.max_train_steps": 25_000, "train.learning_rate": 1e-4, "train.lr_warmup_steps": 0, "train.lr_scheduler": "cosine",
        "train.adam_weight_decay": 0.1, "train.max_grad_norm": None, "train.mixed_precision": None, "train.adam_beta2": 0.95,
        "sample.top_k": 50, "model.rope": False, "model.qk_norm": False},
    "stage2/gpt_imagenet_class": {
        "model.n_layer": 24, "model.n_head": 16, "model.n_embd": 1024, "model.dropout": 0.0, "train.base_lr": 4.5e-6,
        "train.lr_scheduler": "constant", "train.adam_weight_decay": 0.01, "train.adam_beta2": 0.95, "train.max_grad_norm": None,
        "train.mixed_precision": None, "model.label_dropout": 0, "model.rope": False, "model.qk_norm": False},
    "stage2/maskgit_imagenet_class": {
        "model.content_layers": 24, "model.n_head": 16, "model.n_embd": 768, "model.dropout": 0.1, "model.label_dropout": 0,
        "sample.choice_temperature": 4.5, "train.train_batch_size": 32, "train.learning_rate": 1e-4, "train.lr_scheduler": "constant",
        "train.lr_warmup_steps": 5000, "train.adam_beta1": 0.9, "train.adam_beta2": 0.96, "train.adam_weight_decay": 0.045,
        "train.max_grad_norm": None, "train.mixed_precision": None},
    "stage2/mask_transformer_imagenet_dqvae_class": {"codes.stage1": "runs/dqvae_imagenet_entropy_r50", "model.n_head": 8},
    "stage2/mask_transformer_imagenet_mqvae_class": {"codes.stage1": "runs/mqvae_imagenet_r25", "model.n_head": 16},
}


IMAGES = {"imagenet": 1_281_167, "ffhq": 60_000}  # for training, as they are published
GPUS = 8
COMMANDS = [line for path in (ROOT / "docs/training.md", ROOT / "README.md")
            for line in re.findall(r"train_stage1\.py (--config configs/\S+\.yaml.*)", path.read_text().replace("\\\n", " "))]


@pytest.mark.parametrize("words", [*(f"--config {path}" for path in sorted((ROOT / "configs").glob("*/*.yaml"))
                                     if "\ncodes:" not in path.read_text()), *COMMANDS])
def test_the_generator_hears_the_discriminator(words):
    """In every config, and in every command of the docs, before the run ends."""
    _, path, *overrides = shlex.split(words, comments=True)
    config = load_config(str(ROOT / path), [word for word in overrides if "=" in word], STAGE1_SECTIONS)
    loss, settings = config["loss"], config["train"]
    if settings["max_train_steps"] is None:
        steps = settings["num_train_epochs"] * IMAGES[config["data"]["name"]] / (settings["train_batch_size"] * GPUS)
    else:
        steps = settings["max_train_steps"]
        assert settings["num_train_epochs"] is None, "how many steps this is depends on the folder"
    assert loss["disc_weight"] == 0 or (loss["gan_start"] or loss["disc_start"]) < steps


def test_the_documented_fine_tuning_is_among_them():
    assert any("train.freeze=[encoder,pre_quant,quantizer]" in words and "loss.gan_start=" in words for words in COMMANDS)


@pytest.mark.parametrize("name", RELEASES)
def test_what_differs_from_the_release_is_marked(name):
    path = ROOT / f"configs/{name}.yaml"
    sections = STAGE1_SECTIONS if name.startswith("stage1") else STAGE2_SECTIONS
    config = load_config(str(path), [], sections)
    marked = {line.partition(":")[0].strip() for line in path.read_text().splitlines() if "# ours" in line and not line.startswith("#")}
    for key, value in RELEASES[name].items():
        found = config
        for part in key.split("."):
            found = found[part]
        if found != value:
            assert key.split(".")[-1] in marked, f"{key} is {found}, in the release {value}, and not marked as ours"


def test_all_configs_of_papers_are_checked():
    """The others are ours as a whole."""
    paths = {f"{path.parent.name}/{path.stem}" for path in (ROOT / "configs").glob("stage*/*.yaml") if "folder" not in path.stem}
    assert paths == RELEASES.keys()


# Every config


CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))
STAGE2_CONFIGS = [p for p in CONFIGS if "\ncodes:" in p.read_text()]


@pytest.mark.parametrize("path", [p for p in CONFIGS if p not in STAGE2_CONFIGS], ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_stage1_config_of_the_repo_builds(path):
    config = load_config(str(path), [], STAGE1_SECTIONS)
    with torch.device("meta"):  # shapes only
        model = make_model(config)
    assert config["train"]["output_dir"] == f"runs/{path.stem}"
    assert config["data"]["image_size"] % model.factor == 0


@pytest.mark.parametrize("path", STAGE2_CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_stage2_config_of_the_repo_builds_on_the_codes_of_its_stage1(path, monkeypatch):
    stage1_path = next(p for p in CONFIGS if f"stage1: runs/{p.stem}\n" in path.read_text())
    assert stage1_path.parent.name == {"quickstart": "quickstart", "stage2": "stage1"}[path.parent.name]
    theirs = load_config(str(stage1_path), [], STAGE1_SECTIONS)
    config = load_config(str(path), [], train_stage2.STAGE2_SECTIONS,
                         lambda given: given.update(data=theirs["data"] | given.get("data", {})))
    settings = dict(theirs["model"])
    with torch.device("meta"):
        stage1 = make_model({"model": settings})
        train_stage2.complete(config, stage1, ["a", "b"])
        settings = dict(config["model"])
        model = build(model_class(settings.pop("name")), settings)
    assert model.codebook_size == stage1.quantizer.codebook_size
