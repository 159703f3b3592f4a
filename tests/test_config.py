"""YAML and overrides to checked settings: what is read as what, one sentence for a mistake, and random settings."""

import json
import shutil

import pytest
import torch
import yaml
from conftest import ROOT, write_tiny2
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dataset import DataError
from harness.config import (
    TextLoader,
    UserError,
    build,
    check_config,
    load_config,
    parse_yaml,
    read_yaml,
    setting_names,
)
from harness.models import STAGE1, STAGE2, model_class
from harness.settings import STAGE1_SECTIONS
from harness.settings_stage2 import STAGE2_SECTIONS
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


SECTIONS = {"whole": whole, "whole.part": {"wide": f"{__name__}.Wide", "deep": f"{__name__}.Deep"},
            "whole.size": "images.size", "images": images}


def test_sections_give_the_choices_and_defaults_of_settings():
    """Of any setting: harness/config.py itself knows none."""
    config = check_config({"whole": {"part": {"name": "deep"}}}, SECTIONS, "a file")
    assert config == {"whole": {"part": {"name": "deep", "depth": 3}, "size": [4, 8]}, "images": {"size": [4, 8]}}
    assert "&" not in yaml.safe_dump(config)  # an alias, which could not be read again
    assert check_config({"whole": {"size": 5}}, SECTIONS, "a file")["whole"] == {"part": None, "size": 5}
    assert build(whole, {"part": {"width": 7}})[0].width == 7
    with pytest.raises(UserError, match="Wide cannot be made with these settings"):
        build(whole, {"part": {"name": "deep"}})  # a choice is for whoever knows the choices, as make_model


@pytest.mark.parametrize("part, sentence", [
    ({"name": "long"}, "whole.part.name must be one of wide, deep; it is 'long'"),
    ({"depth": 4}, "whole.part.depth is not a setting of Wide, which has width"),
    ({"widt": 4}, "unknown key whole.part.widt; the nearest valid one is whole.part.width"),
])
def test_mistakes_in_any_setting(part, sentence):
    with pytest.raises(UserError) as error:
        check_config({"whole": {"part": part}}, SECTIONS, "a file")
    assert sentence in str(error.value)


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


@pytest.mark.parametrize("text, told", [
    ("[" * 3_000, "more than 20"), ("a: &a [x]\nb: *a", "aliases"), ("a: " + "x" * 2_000_000, "more than 1000000 char"),
    ("a: 2001-99-99", "not valid YAML"), ("a: !!bool 3", "not valid YAML"),
    ("a: !!python/object/apply:os.getcwd []", "not valid YAML at line 1"), (b"\xff\xfe\xfa", "is not text"), ("- 1", "must be a section"),
])
def test_hostile_yaml_is_refused(tmp_path, text, told):
    path = tmp_path / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=told) as error:
        read_yaml(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


# Random settings


def everything(sections, name):
    """All keys that a config with this model may set."""
    targets = {section: target for section, target in sections.items() if "." not in section}
    return [k for section, t in targets.items() for k in setting_names(model_class(name) if isinstance(t, dict) else t, section)]


KEYS = sorted({k for name in STAGE1 for k in everything(STAGE1_SECTIONS, name)})
KEYS2 = sorted({k for name in STAGE2 for k in everything(STAGE2_SECTIONS, name)})
ENDLESS = ("train.max_", "train.num_train_epochs", "train.compile", "train.output_dir", "train.gradient_accumulation", "train.dataloader",
           "loss.perceptual_weight", "train.log_with", "codes.cache_dir", "codes.cache_views")
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-2, 40), st.floats(), st.text(max_size=5), st.sampled_from(["1e-4", 10**20]))
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)).map(json.dumps)
YAML = st.text(alphabet="[]{}:&*!|>'\"-,#%@ \n\tax01.", max_size=8)
WORDS = st.one_of(st.builds("{}{}={}".format, st.sampled_from(KEYS), st.sampled_from(["", "", ".", ".x"]), st.one_of(VALUES, YAML)),
                  st.builds("{}={}".format, st.text(max_size=9), VALUES), st.text(max_size=30))
FUZZ = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=200, **FUZZ)
@given(st.lists(WORDS, min_size=1, max_size=2))
def test_any_words_are_a_config_or_one_sentence(words):
    for path, sections in (("vqgan", STAGE1_SECTIONS), ("gpt", STAGE2_SECTIONS)):
        try:
            found = load_config(str(ROOT / f"configs/quickstart/{path}.yaml"), words, sections)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            saved = yaml.safe_dump(found, sort_keys=False)
            assert repr(parse_yaml(saved)) == repr(found)  # what is saved can be read
            assert repr(check_config(parse_yaml(saved, TextLoader), sections, "saved")) == repr(found)  # also as a config


def changes(keys):
    return st.dictionaries(st.sampled_from([k for k in keys if not k.startswith(ENDLESS)]), VALUES, min_size=1, max_size=2)


@settings(max_examples=150, **FUZZ)
@example({"model.quantizer.entropy_weight": "1"})  # what random settings have found
@example({"model.z_channels": "0"})
@example({"train.gradient_accumulation_steps": str(10**20)})
@given(changes(KEYS))
def test_any_settings_are_a_run_or_one_sentence(train, tmp_path, changes):
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    try:
        train("train.max_train_steps=1", *(f"{k}={v}" for k, v in changes.items()))
    except (UserError, DataError) as error:
        assert "\n" not in str(error)


@settings(max_examples=60, **FUZZ)
@example({"data.root": "nowhere"})
@example({"train.adam_epsilon": "0"})  # weights that are not finite
@given(changes(KEYS2))
def test_any_settings_of_stage_2_are_a_run_or_one_sentence(train2, tmp_path, changes):
    shutil.rmtree(tmp_path / "run2", ignore_errors=True)
    config = tmp_path / "tiny2.yaml"
    try:
        train2(config if config.is_file() else write_tiny2(tmp_path, "dq_transformer"), "train.max_train_steps=1",
               *(f"{k}={v}" for k, v in changes.items()))
    except (UserError, DataError) as error:
        assert "\n" not in str(error)
