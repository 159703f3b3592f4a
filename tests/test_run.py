"""Config files and run folders."""

import pytest
import torch
import yaml
from conftest import ROOT

import train_stage2
from harness.config import UserError, build, check_config, load_config, read_yaml
from harness.models import load_run, make_model, model_class
from harness.run import learning_rate_at
from train_stage1 import STAGE1_SECTIONS
from vqgan import VQGAN


def load(path, *overrides):
    return load_config(str(path), list(overrides), STAGE1_SECTIONS)


def test_config_is_complete_and_typed(tiny):
    config = load(tiny, "model.quantizer.codebook_size=64", "train.learning_rate=1e-4", "data.image_size=8", "train.max_grad_norm=null")
    assert config["model"]["quantizer"] == {
        "codebook_size": 64, "dim": 8, "beta": 0.25, "legacy": False, "l2_norm": False, "ema_decay": 0.9, "ema_eps": 1e-5,
        "restart": True, "entropy_weight": 0.0, "entropy_temperature": 0.01, "queue_size": 65536, "rotation": False}
    assert config["train"]["learning_rate"] == 1e-4  # of which YAML makes a string
    assert config["model"]["image_size"] == 8  # follows the data
    assert load(tiny, "model.image_size=32")["model"]["image_size"] == 32
    assert yaml.safe_load(yaml.safe_dump(config)) == config
    assert load(tiny, "train.mixed_precision=no")["train"]["mixed_precision"] == "no"  # of which YAML makes false
    settings = dict(config["model"])
    settings.pop("name")
    assert isinstance(build(VQGAN, settings), VQGAN)


class Wide(torch.nn.Module):
    def __init__(self, width: int = 2):
        super().__init__()
        self.width = width


class Deep(torch.nn.Module):
    def __init__(self, depth: int = 3):
        super().__init__()


def whole(part: Wide | None = None, size: int | list[int] = 1):
    return part, size


def images(size: int | list[int] = [4, 8]):
    return size


def test_sections_give_the_choices_and_defaults_of_settings():
    """Of any setting: harness/config.py itself knows none."""
    sections = {"whole": whole, "whole.part": {"wide": f"{__name__}.Wide", "deep": f"{__name__}.Deep"}, "whole.size": "images.size",
                "images": images}
    config = check_config({"whole": {"part": {"name": "deep"}}}, sections, "a file")
    assert config == {"whole": {"part": {"name": "deep", "depth": 3}, "size": [4, 8]}, "images": {"size": [4, 8]}}
    assert "&" not in yaml.safe_dump(config)  # an alias, which could not be read again
    assert check_config({"whole": {"size": 5}}, sections, "a file")["whole"] == {"part": None, "size": 5}
    assert build(whole, {"part": {"width": 7}})[0].width == 7
    for part, sentence in (({"name": "long"}, "whole.part.name must be one of wide, deep; it is 'long'"),
                           ({"depth": 4}, "whole.part.depth is not a setting of Wide, which has width"),
                           ({"widt": 4}, "unknown key whole.part.widt; the nearest valid one is whole.part.width")):
        with pytest.raises(UserError) as error:
            check_config({"whole": {"part": part}}, sections, "a file")
        assert sentence in str(error.value)
    with pytest.raises(UserError, match="Wide cannot be made with these settings"):
        build(whole, {"part": {"name": "deep"}})  # a choice is for whoever knows the choices, as make_model


def test_an_override_may_fill_an_empty_section(tiny):
    tiny.write_text(tiny.read_text().replace("  ch: 8\n  num_layers: 1\n  norm: group\n", ""))
    assert load(tiny, "discriminator.ch=32")["discriminator"]["ch"] == 32


def test_a_resolved_config_resolves_to_itself(tiny, tmp_path):
    config = load(tiny)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("text", [
    "/data/shoot #2", "/data/a=b", "/data/100%", "~/photos", "~", "2023", "2024-05-01", "007", "1e3", "1_0", "0x1f", "1:30", "on", "True",
    "no", "/data/set: new", "[faces]", "{faces}", "C:\\images", "it's", "'", "'a' and 'b'", "*", "@home", "Null", "a\udce9"])
def test_a_text_setting_takes_the_text(tiny, tmp_path, text):
    config = load(tiny, "data.name=folder", f"data.root={text}")
    assert config["data"]["root"] == text
    tiny.write_text(yaml.safe_dump(config))  # as in a run folder
    assert load(tiny) == config == read_yaml(tiny)
    if text.isprintable():
        quoted = "'" + text.replace("'", "''") + "'"
        assert load(tiny, f"data.root={quoted}")["data"]["root"] == text
    assert load(tiny, "data.root=null")["data"]["root"] is load(tiny, "data.root=")["data"]["root"] is None
    assert load(tiny, "data.root='null'")["data"]["root"] == "null"


@pytest.mark.parametrize("scalar, key, value", [
    ("2023", "data.root", "2023"), ("2024-05-01", "data.root", "2024-05-01"), ("on", "data.root", "on"), ("'on' # yes", "data.root", "on"),
    ("~", "data.root", None), ("'~'", "data.root", "~"), ("[on, 1, '2']", "train.freeze", ["on", "1", "2"]), ("010", "train.seed", 10),
    ("010", "train.learning_rate", 10.0), ("1_000", "train.seed", 1000), ("1e-4", "train.learning_rate", 1e-4),
    ("on", "train.use_ema", True), ("No", "train.use_ema", False), ("no", "train.mixed_precision", "no"),
    ("[010, 2]", "model.ch_mult", [10, 2])])
def test_a_scalar_is_read_by_the_type_of_its_setting(tmp_path, scalar, key, value):
    section, name = key.split(".")
    text = f"{section}:\n  {name}: {scalar}\n" + ("  name: vqgan" if section == "model" else "model: {name: vqgan}")
    (tmp_path / "c.yaml").write_text(text)
    found = load(tmp_path / "c.yaml")[section][name]
    assert found == value and type(found) is type(value)
    if section != "data":
        assert load(tmp_path / "c.yaml", f"{key}={scalar}")[section][name] == value


@pytest.mark.parametrize("override, sentence", [
    ("train.train_batchsize=4", "unknown key train.train_batchsize; the nearest valid one is train.train_batch_size"),
    ("model.quantizer.codebook_sizes=4", "nearest valid one is model.quantizer.codebook_size"),
    ("train.max_trainsteps=4", "nearest valid one is train.max_train_steps"),
    ("losses.gan=hinge", "unknown section 'losses'"),
    ("model.name=vqgn", "model.name must be one of vqgan, vqvae, mqvae, dqvae; it is 'vqgn'"),
    ("model.name=[vqgan]", "model.name must be one of"),
    ("train.train_batch_size=four", "train.train_batch_size must be int; it is 'four'"),
    ("train.train_batch_size=4.5", "train.train_batch_size must be int; it is '4.5'"),
    ("train.train_batch_size=true", "train.train_batch_size must be int; it is 'true'"),
    ("train.learning_rate=fast", "train.learning_rate must be float; it is 'fast'"),
    ("train.use_ema=1", "train.use_ema must be bool; it is '1'"),
    ("train.seed=null", "train.seed must be int; it is None"),
    ("model.ch_mult=2", "model.ch_mult must be list[int]; it is '2'"),
    ("model.ch_mult=[1,x]", "model.ch_mult[1] must be int; it is 'x'"),
    ("model.quantizer=5", "model.quantizer must be a section"),
    ("model.z_channels=0", "model.z_channels must be between 1 and 2147483648; it is 0"),
    ("model.num_res_blocks=100000000000000000000", "model.num_res_blocks must be between 1 and"),
    ("model.ch_mult=[1,0]", "model.ch_mult[1] must be between 1 and"),
    ("model.quantizer.dim=-4", "model.quantizer.dim must be between 1 and"),
    ("model.quantizer.ema_decay=1", "model.quantizer.ema_decay must be between 0 and"),
    ("loss.disc_weight=-1", "loss.disc_weight must be between 0 and 1e+300; it is -1"),
    ("discriminator.num_layers=0", "discriminator.num_layers must be between 1 and"),
    ("data.max_objects=4", "data.max_objects must be between 1 and 3; it is 4"),
    ("data.min_scale=0", "data.min_scale must be between 1e-06 and 1; it is 0"),
    ("train.learning_rate=inf", "train.learning_rate must be between 0 and 1e+300; it is inf"),
    ("train.learning_rate=nan", "it is nan"),
    ("train.adam_beta1=1", "train.adam_beta1 must be between 0 and"),
    ("loss.gan=hing", "loss.gan must be one of hinge, vanilla, non_saturating; it is 'hing'"),
    ("train.seed", "'train.seed' is not of the form key.sub=value"),
    ("train.seed=[", "not valid YAML"),
    ("train.seed.sub=1", "must be int"),
    ("train.learning_rate=" + "9" * 400, "train.learning_rate must be between 0 and 1e+300; it is inf"),
    ("train.learning_rate=1:30", "train.learning_rate must be float; it is '1:30'"),  # 90, to YAML
    ("train.seed=0x10", "train.seed must be int; it is '0x10'"),
    ("train.seed='5'", "train.seed must be int; it is '5'"),
    ("model.quantizer={dim: 4, dim: 8}", "not valid YAML at line 1 (dim stands there a second time)"),
])
def test_mistakes_are_one_sentence(tiny, override, sentence):
    with pytest.raises(UserError) as error:
        load(tiny, override)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text, sentence", [
    ("model: [", "not valid YAML at line"), ("- 1", "must be a section"), ("train: 3", "train must be a section"),
    ("", "model.name must be one of"), ("train: {}\non: 3", "unknown section 'on'"),
    ("model: {name: vqgan}\ntrain: {seed: 1}\ndata: {}\ntrain: {}", r"c.yaml is not valid YAML at line 4 \(train stands there a second"),
    ("model:\n  name: vqgan\n  ch: 1\n  name: mqvae", r"at line 4 \(name stands there a second")])
def test_files_that_are_no_config(tmp_path, text, sentence):
    (tmp_path / "c.yaml").write_text("model: {name: vqgan}\n" + text if text.startswith("train") else text)
    with pytest.raises(UserError, match=sentence):
        load(tmp_path / "c.yaml")
    with pytest.raises(UserError, match="cannot read the config"):
        load(tmp_path / "nowhere.yaml")


CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))
STAGE2_CONFIGS = [p for p in CONFIGS if "\ncodes:" in p.read_text()]


@pytest.mark.parametrize("path", [p for p in CONFIGS if p not in STAGE2_CONFIGS], ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_stage1_config_of_the_repo_builds(path):
    config = load(path)
    settings = dict(config["model"])
    with torch.device("meta"):  # shapes only
        model = build(model_class(settings.pop("name")), settings)
    assert config["train"]["output_dir"] == f"runs/{path.stem}"
    assert config["data"]["image_size"] % model.factor == 0


@pytest.mark.parametrize("path", STAGE2_CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_stage2_config_of_the_repo_builds_on_the_codes_of_its_stage1(path, monkeypatch):
    stage1_path = next(p for p in CONFIGS if f"stage1: runs/{p.stem}\n" in path.read_text())
    assert stage1_path.parent.name == {"quickstart": "quickstart", "stage2": "stage1"}[path.parent.name]
    theirs = load(stage1_path)
    config = load_config(str(path), [], train_stage2.STAGE2_SECTIONS,
                         lambda given: given.update(data=theirs["data"] | given.get("data", {})))
    settings = dict(theirs["model"])
    with torch.device("meta"):
        stage1 = make_model({"model": settings})
        train_stage2.complete(config, stage1, ["a", "b"])
        settings = dict(config["model"])
        model = build(model_class(settings.pop("name")), settings)
    assert model.codebook_size == stage1.quantizer.codebook_size


def test_learning_rate():
    train = dict(learning_rate=None, base_lr=1e-3, lr_scheduler="cosine", min_lr=0.0, lr_warmup_steps=4, lr_warmup_epochs=0.5)
    rates = [learning_rate_at(s, train, global_batch=8, max_steps=109, steps_per_epoch=10) for s in range(109)]
    assert rates[8] == pytest.approx(8 * 0.9e-3) and rates[9] == pytest.approx(8e-3)  # warmed up after 4 + 5 steps
    assert rates[59] == pytest.approx(4e-3) and 0 < rates[-1] < 1e-4
    for scheduler, step, rate in (("cosine", 59, 4.5e-3), ("linear", 34, 6.25e-3)):
        train |= {"lr_scheduler": scheduler, "min_lr": 1e-3}
        assert [learning_rate_at(s, train, 8, 109, 10) for s in (9, step, 109)] == pytest.approx([8e-3, rate, 1e-3])
    constant = dict(learning_rate=0.5, base_lr=None, lr_scheduler="constant", min_lr=0.0, lr_warmup_steps=0, lr_warmup_epochs=0)
    assert {learning_rate_at(s, constant, 8, 100, 10) for s in range(100)} == {0.5}


def test_load_run_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="has no config.yaml"):
        load_run(tmp_path)
