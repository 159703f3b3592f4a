"""train.init_from and train.freeze, in both stages."""

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import TINY_MODELS, metrics, save_stage1, weights, write_tiny, write_tiny2

from dq_transformer import START, DQTransformer
from gpt import GPT
from harness.classes import match_classes
from harness.config import UserError
from harness.finetune import freeze
from harness.guard import Guard
from harness.models import load_run, make_model

DECODER_ALONE = ["train.freeze=[encoder,pre_quant,quantizer]", "train.use_ema=true", "train.max_train_steps=4"]


def test_other_frozen_parts_need_another_run(train, tmp_path):
    train("train.freeze=[encoder]", "train.max_train_steps=1")
    with pytest.raises(UserError, match="holds a run with train.freeze=.*encoder.*, but the config asks for None"):
        train("train.max_train_steps=2", resume="auto")


def test_the_decoder_alone_learns(train, tiny, tmp_path, capfd):
    """From another run, also from its averaged weights; resumed exactly, when the other run is gone."""
    source = str(tmp_path / "source")
    train("train.use_ema=true", "train.ema_decay=0.5", f"train.output_dir={source}")
    words = [*DECODER_ALONE, f"train.init_from={source}", "train.checkpointing_steps=1", "train.checkpoints_total_limit=9"]
    train(*words, f"train.output_dir={tmp_path}/whole")
    said = capfd.readouterr().out
    assert "ema.safetensors" in said and "discriminator: " in said and "; new are" not in said
    before, after = load_run(source)[0].state_dict(), weights(tmp_path / "whole", 4)
    for key, value in ((k, v) for k, v in before.items() if not k.endswith("queue")):
        same = torch.equal(value, after[f"model.{key}"])
        assert same == (key.split(".")[0] in ("encoder", "pre_quant", "quantizer")), key
    train(*words, "train.max_minutes=0", f"train.output_dir={tmp_path}/parts")
    shutil.rmtree(source)
    train(*words, f"train.output_dir={tmp_path}/parts", resume="auto")
    parts = weights(tmp_path / "parts", 4)
    assert after.keys() == parts.keys() and all(torch.equal(after[k], parts[k]) for k in after)


@pytest.mark.parametrize("name, frozen, moving", [
    ("vqgan", ["encoder", "pre_quant", "quantizer"], []),
    ("vqgan", ["encoder"], ["quantizer"]),
    ("mqvae", ["encoder", "score_net"], ["quantizer"]),
    ("mqvae", ["quantizer"], ["score_net"]),
    ("dqvae", ["down", "quantizer", "router"], ["thresholds"])])
def test_what_no_step_changes_is_not_kept(train, tmp_path, monkeypatch, name, frozen, moving):
    """A step that may be undone keeps codebook and statistics that move, and no frozen weight. A frozen quantizer has no usage."""
    kept, begin = set(), Guard.begin

    def watch(guard):
        begin(guard)
        kept.clear()
        names = {id(value): key for key, value in guard.modules["model"].state_dict(keep_vars=True).items()}
        kept.update(names[id(value)] for value in guard.moving["model"])
        assert sum(value.nbytes for value in guard.kept["model"]) == sum(value.nbytes for value in guard.moving["model"])
        assert len(guard.kept["discriminator"]) == 1  # LeCam's averages

    monkeypatch.setattr(Guard, "begin", watch)
    train(f"train.freeze=[{','.join(frozen)}]", "train.max_train_steps=2", config=write_tiny(tmp_path, model=TINY_MODELS[name]))
    assert {key.split(".")[0] for key in kept} == set(moving)
    if "quantizer" in moving:
        assert {f"quantizer.{part}" for part in ("codebook", "ema_sum", "ema_count", "queue")} <= kept
    line = metrics(tmp_path / "run")[0]
    assert ("usage" in line) == ("quantizer" not in frozen) and line.get("usage", 1) > 0 and line["perplexity"] >= 1


@pytest.mark.parametrize("name, frozen", [("mqvae", "score_net"), ("dqvae", "router")])
def test_a_frozen_router_does_not_explore(name, frozen):
    """A decoder that learns alone sees the codes that it will get."""
    settings = yaml.safe_load(f"model:\n  {TINY_MODELS[name]}\n  image_size: 16")
    model = make_model(settings).train()
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    model.schedule(0, 10)
    explored = model(images).codes  # and DQ-VAE's thresholds are set
    freeze(model, [frozen])
    before = {key: value.clone() for key, value in model.named_buffers()}
    chosen = model.train()(images).codes
    key = "positions" if name == "mqvae" else "grain"
    assert torch.equal(chosen[key], model.eval().encode(images)[key])
    assert chosen[key].shape != explored[key].shape or not torch.equal(chosen[key], explored[key])
    assert all(torch.equal(before[key], value) for key, value in model.named_buffers() if "threshold" in key)


@pytest.mark.parametrize("name, frozen", [("mqvae", ["score_net", "encoder"]), ("dqvae", ["router", "necks.0"]), ("vqvae", ["decoder"])])
def test_any_part_can_be_frozen(train, tmp_path, name, frozen):
    config = write_tiny(tmp_path, model=TINY_MODELS[name])
    train(f"train.freeze=[{','.join(frozen)}]", "train.checkpointing_steps=1", "train.checkpoints_total_limit=9", config=config)
    one, other = weights(tmp_path / "run", 1), weights(tmp_path / "run", 6)
    for key in one:
        if key.startswith("model."):
            inside = any(key.startswith(f"model.{part}.") for part in frozen)
            assert not inside or torch.equal(one[key], other[key]), key
    assert any(not torch.equal(one[k], other[k]) for k in one if k.startswith("model.pre_quant"))


def test_what_does_not_fit_is_named(train, train2, tiny, tmp_path, capfd):
    train("train.max_train_steps=1", f"train.output_dir={tmp_path}/source")
    smaller = TINY_MODELS["vqgan"].replace("codebook_size: 32", "codebook_size: 16")
    train(f"train.init_from={tmp_path}/source/checkpoints/step_00000001", "train.max_train_steps=1", f"train.output_dir={tmp_path}/other",
          config=write_tiny(tmp_path, model=smaller))
    assert "; new are quantizer.codebook" in capfd.readouterr().out
    alone = save_stage1(tmp_path, "vqgan")  # weights alone, as convert.py writes them
    train(f"train.init_from={alone}", "train.max_train_steps=1", f"train.output_dir={tmp_path}/from_alone", config=write_tiny(tmp_path))
    assert "tensors from" in (said := capfd.readouterr().out) and "; new are" not in said
    config = write_tiny2(tmp_path, "gpt")
    train2(config, "train.max_train_steps=3", f"train.output_dir={tmp_path}/labels")
    train2(config, "train.class_conditional=false", f"train.init_from={tmp_path}/labels", "train.freeze=[blocks,code_emb]",
           "train.max_train_steps=3")
    assert "tensors from" in (said := capfd.readouterr().out) and "; 1 of 1 start tokens\n" in said  # the null class
    one, other = weights(tmp_path / "labels", 3), weights(tmp_path / "run2", 3)
    frozen = [k for k in one if k.startswith(("model.blocks.", "model.code_emb."))]
    assert frozen and all(torch.equal(one[k], other[k]) for k in frozen)
    assert not torch.equal(one["model.head.weight"], other["model.head.weight"])
    assert metrics(tmp_path / "run2")[-1]["step"] == 3


@pytest.mark.parametrize("make", [
    lambda classes, **more: GPT(7, 4, classes, 1, 2, 16, **more),
    lambda classes, **more: DQTransformer(7, [2, 4, 8], classes, 1, 1, n_head=2, n_embd=16, **more),
    lambda classes, **more: DQTransformer(6, [2, 4], classes, 1, 1, n_head=2, n_embd=16, codebook_factors=[2, 3], **more),
])
def test_classes_are_taken_by_name(tmp_path, make):
    """Start tokens of the same classes and of the null class; all other tokens, wherever they are; what is new stays new."""
    def write(classes, dropout):
        (tmp_path / "config.yaml").write_text(f"model: {{name: gpt, num_classes: {len(classes)}, label_dropout: {dropout}}}")
        (tmp_path / "classes.json").write_text(json.dumps(classes))
        return make(len(classes), label_dropout=dropout)

    def rows(model, start):
        """The rows of its tables that start token `start` has."""
        if isinstance(model, GPT):
            return model.start_emb.weight[start].unsqueeze(0)
        first = (model.slot_kind == START).nonzero().squeeze(1)
        places = [model.rows(slot, model.slot_special[slot], torch.tensor(start)) for slot in first]
        return torch.stack([x for content, place, _ in places for x in (model.content_emb(content), model.position_emb(place))])

    old = write(["ant", "bee", "cat"], 0.1)
    for classes, dropout, taken, said in ((["dog", "cat", "ant", "eel"], 0.1, {1: 2, 2: 0, 4: 3},
                                           "; 3 of 5 start tokens; new are dog, eel"),
                                          (["cat"], 0.0, {0: 2}, "; 1 of 1 start tokens"), ([], 0.1, {0: 3}, "; 1 of 1 start tokens")):
        model, state = make(len(classes), label_dropout=dropout), old.state_dict()
        fresh, run = copy.deepcopy(model), SimpleNamespace(dataset=SimpleNamespace(classes=classes or ["image"]))
        assert match_classes(run, tmp_path, model, state) == said
        model.load_state_dict(state)
        for start in range(model.num_starts):
            source = (old, taken[start]) if start in taken else (fresh, start)
            assert torch.equal(rows(model, start), rows(*source)), (classes, start)
        if not isinstance(model, GPT):  # cells and ends
            places = model.slot_place[model.slot_kind != START], old.slot_place[old.slot_kind != START]
            assert torch.equal(model.position_emb.weight[places[0]], old.position_emb.weight[places[1]])
            codes = torch.arange(old.codebook_size + 1)
            assert torch.equal(model.content_emb(codes), old.content_emb(codes))
    (tmp_path / "classes.json").write_text('["bee", "ant", "cat"]')  # as many, in another order
    state = old.state_dict()
    match_classes(SimpleNamespace(dataset=SimpleNamespace(classes=["ant", "bee", "cat"])), tmp_path, model := make(3), state)
    model.load_state_dict(state)
    assert [torch.equal(rows(model, i), rows(old, j)) for i, j in ((0, 1), (1, 0), (2, 2), (3, 3))] == [True] * 4


@pytest.mark.parametrize("word, sentence", [
    ("train.init_from=TMP/stage1_mqvae", "holds a mqvae, but the config asks for a vqgan"),
    ("train.init_from=TMP/empty", "must be a run folder or one of its checkpoints"),
    ("train.init_from=/nowhere", "must be a run folder or one of its checkpoints"),
    ("train.freeze=[encodr]", "there is no part 'encodr'; the parts are quantizer, encoder, pre_quant"),
    ("train.freeze=[encoder,pre_quant,quantizer,post_quant,decoder,to_image]", "leaves nothing to learn"),
    ("train.freeze=[to_image]", "set loss.adaptive_weight=false"),
    ("train.freeze=encoder", "train.freeze must be list"),
])
def test_bad_questions(train, tmp_path, word, sentence):
    if "mqvae" in word:
        save_stage1(tmp_path, "mqvae")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=sentence):
        train(word.replace("TMP", str(tmp_path)), config=write_tiny(tmp_path))


def test_the_last_layer_can_be_frozen(train):
    train("train.freeze=[to_image]", "loss.adaptive_weight=false", "train.max_train_steps=3")
