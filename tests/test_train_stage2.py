"""train_stage2.py and sample.py as a whole: on tiny runs, in this process, in two, interrupted and resumed."""

import functools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TRANSFORMERS, class_folders, forked, metrics, run_stage2, same_pictures, save_stage1, weights, write_tiny2
from PIL import Image

import evaluate
import sample
import train_stage2
from dataset import DataError, make_dataset
from gpt import GPT, Blocks
from harness.config import UserError
from harness.models import load_run
from harness.sampling import chosen_labels, draw, load_models
from vqgan import VQGAN


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_run_leaves_what_it_should(train2, tmp_path, name, monkeypatch):
    config, run = write_tiny2(tmp_path, name), tmp_path / "run2"
    train2(config, "train.use_ema=true", "train.log_with=tensorboard")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    parts = {"gpt": ["code"], "stackformer": ["code", "position"], "mask_vqgan": ["content"]}.get(name, ["content", "position"])
    parts = ["content", "layout"] if name in ("mask_mqvae", "mask_dqvae") else parts
    assert {"loss", "lr", "grad_norm", "tokens", "padding", "tokens_per_second", "val_loss", "val_bits"} <= set().union(*lines)
    assert {f"{v}perplexity_{p}" for p in parts for v in ("", "val_")} <= set().union(*lines)
    assert list((run / "tensorboard").rglob("events*"))
    model, saved = load_run(run)
    assert saved["model"]["num_classes"] == 10 and saved["model"]["codebook_size"] == 32
    maps = 0 if TRANSFORMERS[name][1] == "vqgan" else 1
    assert Image.open(run / "samples/samples_00000006.png").size == (3 * 130 + 2, ((maps + 2) + 2 * (maps + 1)) * 130 + 2)
    # The folder is all that sampling needs, wherever it is
    shutil.rmtree(tmp_path / f"stage1_{TRANSFORMERS[name][1]}")
    moved = run.rename(tmp_path / "moved")
    sample.main(["--run", str(moved), "-n", "5", "--seed", "3", "--cfg", "1.5", "--classes", "ring,0", "--out", str(tmp_path / "a.npz")])
    sample.main(["--run", str(moved), "-n", "5", "--seed", "3", "--cfg", "1.5", "--classes", "8,9,0", "--out", str(tmp_path / "b.npz"),
                 "--batch_size", "2"])
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert a["arr_0"].shape == (5, 16, 16, 3) and a["arr_0"].dtype == np.uint8
        assert same_images(a["arr_0"], b["arr_0"])
        assert a["arr_1"].tolist() == b["arr_1"].tolist() == [8, 9, 0, 8, 9]
    sample.main(["--run", str(moved), "-n", "5"])
    folder = moved / "samples/seed_0"
    assert sorted(p.name for p in folder.iterdir()) == [f"00000{i}.png" for i in range(5)] + ["grid.png", "samples.json"]
    assert json.loads((folder / "samples.json").read_text())["labels"] == [0, 1, 2, 3, 4]
    if name.startswith("mask"):
        sample.main(["--run", str(moved), "-n", "5", "--steps", "3", "--layout_steps", "2", "--choice_temperature", "1",
                     "--cfg_schedule", "linear", "--cfg", "2", "--order", "halton"])
        settings = {"steps": 3, "cfg_schedule": "linear", "order": "halton"}
        assert json.loads((folder / "samples.json").read_text())["settings"].items() > settings.items()
    else:
        with pytest.raises(UserError, match="sample.steps is not for a .*, which has temperature, top_k"):
            sample.main(["--run", str(moved), "-n", "5", "--steps", "3"])


def same_images(one, other):
    """Of samples in other batches: all but one, whose draw may fall on the edge of two codes."""
    return one.shape == other.shape and (one != other).any((1, 2, 3)).sum() <= 1


@pytest.mark.parametrize("name", ["vqgan", "vqvae", "mqvae", "dqvae", "dqvae_triple"])
def test_equal_codes_are_equal_images_in_any_batch(tmp_path, name):
    """Exactly: on the CPU, they are decoded one by one."""
    stage1, _ = load_run(save_stage1(tmp_path, name))
    data = make_dataset("shapes", image_size=16)
    with torch.no_grad():
        codes = stage1.encode(torch.stack([data[i][0] for i in range(9)]))
    drawn = []
    for first, last in ((0, 9), (0, 1), (1, 8), (8, 9)):
        part = {k: v[first:last] for k, v in codes.items()}
        model = SimpleNamespace(sample=lambda *_, part=part, **__: part)
        drawn.append(draw(model, stage1, list(range(first, last)), None, 0, {}))
    assert drawn[0].shape == (9, 16, 16, 3)
    assert (drawn[0] == np.concatenate(drawn[1:])).all()


@pytest.mark.parametrize("settings", [
    ["codes.cache=false"],
    ["train.mixed_precision=bf16", "train.gradient_accumulation_steps=2"],
    ["train.class_conditional=false", "codes.cache_views=1", "sample.top_k=5"],
    ["train.max_train_steps=null", "train.num_train_epochs=0.4", "sample.cfg_scale=2", "sample.temperature=0"],
])
@pytest.mark.parametrize("name", ["gpt", "dq_transformer"])
def test_settings(train2, tmp_path, name, settings):
    train2(write_tiny2(tmp_path, name), *settings)
    lines = metrics(tmp_path / "run2")
    assert all(np.isfinite(v) for line in lines for v in line.values()) and lines[-1]["val_bits"] > 0
    assert lines[-1]["step"] == (4 if settings[-1] == "sample.temperature=0" else 6)


def test_the_best_step_is_named_at_the_end(train2, tmp_path, capfd, monkeypatch):
    bits = iter([10.0, 20.0, 15.0, 5.0])
    mean_losses = train_stage2.mean_losses
    monkeypatch.setattr(train_stage2, "mean_losses", lambda *given: mean_losses(*given) | {"bits": next(bits)})
    config = write_tiny2(tmp_path, "gpt")
    sentence = "The best weights are those of step 3 (10.0 bits): sample.py --which best"
    train2(config)
    assert sentence in capfd.readouterr().out
    best, third = load_run(tmp_path / "run2", "best")[0].state_dict(), weights(tmp_path / "run2", 3)
    assert all(torch.equal(value, third[f"model.{key}"]) for key, value in best.items())
    train2(config, "train.max_train_steps=8", resume="auto")  # known from the file
    assert sentence in capfd.readouterr().out
    train2(config, "train.max_train_steps=9", resume="auto")
    assert "The best weights" not in capfd.readouterr().out


def test_it_learns(train2, tmp_path):
    train2(write_tiny2(tmp_path, "dq_transformer"), "train.max_train_steps=100", "train.learning_rate=1e-2", "train.validation_steps=10",
           "train.checkpointing_steps=100", "model.n_embd=32", "data.train_size=600", "data.val_size=50", "codes.cache_views=1")
    bits = [line["val_bits"] for line in metrics(tmp_path / "run2") if "val_bits" in line]
    assert bits[-1] < 0.95 * bits[0]


EVERYTHING = ["train.use_ema=true", "train.ema_decay=0.9", "train.lr_scheduler=cosine", "train.lr_warmup_steps=2",
              "train.max_grad_norm=1.0", "model.dropout=0.2", "train.gradient_accumulation_steps=2", "train.adam_weight_decay=0.1"]


@pytest.mark.parametrize("cache", ["true", "false"])
@pytest.mark.parametrize("name", ["stackformer", "dq_transformer", "mask_dqvae"])
def test_resume_is_exact(train2, tmp_path, name, cache):
    config = write_tiny2(tmp_path, name)
    settings = [*EVERYTHING, f"codes.cache={cache}", "train.max_train_steps=9"]
    train2(config, *settings, f"train.output_dir={tmp_path}/whole")
    train2(config, *settings, "train.max_minutes=0", f"train.output_dir={tmp_path}/parts")  # stops after a step
    for _ in range(3):
        train2(config, *settings, "train.max_minutes=0", f"train.output_dir={tmp_path}/parts", resume="auto")
    train2(config, *settings, f"train.output_dir={tmp_path}/parts", resume="auto")
    one, other = weights(tmp_path / "whole", 9), weights(tmp_path / "parts", 9)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    losses = [[line["loss"] for line in metrics(tmp_path / f) if "loss" in line] for f in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 9
    pictures = [(tmp_path / f / "samples/samples_00000009.png").read_bytes() for f in ("whole", "parts")]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("name", ["gpt", "dq_transformer_triple"])
def test_two_processes_equal_one(tmp_path, name):
    """Batches of 2 in two processes give the weights of batches of 4 in one, also where rows have different lengths."""
    config = write_tiny2(tmp_path, name)
    same = ["model.label_dropout=0", "train.learning_rate=1e-2", "train.adam_epsilon=1e-3"]  # a rounding error stays one
    for processes, batch in ((1, 4), (2, 2)):
        forked(tmp_path, "train_stage2.py", "--config", config, *same, f"train.train_batch_size={batch}",
               f"codes.cache_dir={tmp_path}/c{batch}", f"train.output_dir={tmp_path}/{batch}", processes=processes)
    one, two = (weights(tmp_path / str(b), 6) for b in (4, 2))
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=1e-5, rtol=0, msg=key)
    caches = [sorted((tmp_path / f"c{b}").rglob("*.bin")) for b in (4, 2)]
    assert len(caches[0]) == len(caches[1]) > 4
    for paths in zip(*caches):
        one, other = (np.fromfile(path, np.uint8) for path in paths)
        assert one.shape == other.shape and (one != other).mean() < 0.02  # encoded in other batches
    assert same_pictures(*(tmp_path / f"{b}/samples/samples_00000006.png" for b in (4, 2)))
    bits = [metrics(tmp_path / str(b))[-1]["val_bits"] for b in (4, 2)]
    assert bits[0] == pytest.approx(bits[1], rel=1e-4)
    if name == "gpt":
        for number in (1, 2):
            words = ["sample.py", "--run", tmp_path / "2", "-n", "5", "--out", tmp_path / f"{number}.npz"]
            assert "5 images" in forked(tmp_path, *words, processes=number)
        assert same_images(*(np.load(tmp_path / f"{number}.npz")["arr_0"] for number in (1, 2)))


# ---------------------------------------------------------------------------------------------------------------------
# Classes


def test_classes_of_a_resumed_run_are_its_own(train2, tmp_path):
    images, run = tmp_path / "images", tmp_path / "run2"
    config = write_tiny2(tmp_path, "gpt", data=f"name: folder\n  root: {images}\n  val_fraction: 0.2", sample="columns: 4\n  rows: 1")
    class_folders(images, ["bee", "cat", "dog"])
    train2(config, "train.max_train_steps=1")
    assert (run / "classes.json").read_text() == '["bee", "cat", "dog"]\n'
    class_folders(images, ["ant", "bee", "cat"])
    for resume in ("auto", str(run / "checkpoints/step_00000001")):
        with pytest.raises(DataError, match="is of class 'ant', which the run does not know; the 3 classes are, .* bee, cat, dog$"):
            train2(config, "train.max_train_steps=2", resume=resume)
    class_folders(images, ["cat", "dog"])  # labels do not shift
    seen, forward = set(), GPT.forward

    def spy(self, codes, labels=None):
        seen.update(labels.tolist())
        return forward(self, codes, labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT, "forward", spy)
        train2(config, "train.max_train_steps=4", resume="auto")
    assert seen == {1, 2} and load_run(run)[0].num_classes == 3
    assert (run / "classes.json").read_text() == '["bee", "cat", "dog"]\n'


CLASSES = ["10", "8", "crane, bird", "bird", "2", "big bird", "f-1"]


@pytest.mark.parametrize("asked, labels", [
    ("10", [0]), ("8", [1]), ("3,2", [3, 4]), ("Bird", [3]), ("big", [5]), ("crane, bird", [2]),
    ("ne,6", [2, 6])])
def test_chosen_classes(asked, labels):
    assert chosen_labels(asked, CLASSES, len(labels)).tolist() == labels


@pytest.mark.parametrize("asked", ["7", "-1", "-8", "cat", ""])
def test_classes_that_cannot_be_chosen(asked):
    sentence = "there is no class .*; the classes are 0 to 6: 10, 8, crane, bird, bird, 2, big bird, f-1$"
    with pytest.raises(UserError, match=sentence):
        chosen_labels(f"{asked},10", CLASSES, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("settings, sentence", [
    (["codes.stage1=STAGE1_mqvae"], "codes.stage1 does not fit: a GPT reads the codes indices; a MQVAE has indices, positions"),
    (["codes.stage1=/nowhere"], "has no config.yaml"),
    (["codes.stage1=null"], "codes.stage1 must be the run folder"),
    (["model.codebook_size=64"], "model.codebook_size follows from the stage-1 run and the data; it is 32, not 64"),
    (["sample.top_k_pos=5"], "sample.top_k_pos is not for a GPT, which has"),
    (["sample.top_k=0"], "top_k must be between 1"),
    (["sample.top_p=2"], "top_p must be above 0"),
    (["sample.cfg_scale=2", "train.class_conditional=false"], "cfg_scale other than 1 needs"),
    (["sample.cfg_scale=2", "model.label_dropout=0"], "cfg_scale other than 1 needs"),
    (["data.image_size=24"], None),  # any size that the factor divides suits a VQGAN
    (["data.image_size=25"], "data.image_size must be divisible by 2"),
    (["codes.cache_views=0"], "must be between 1"),
    (["codes.wich=best"], "nearest valid one is codes.which"),
    (["codes.which=best"], "has no best.safetensors"),
    (["model.n_head=3"], "multiple of n_head"),
    (["train.train_batch_size=64"], "fewer than one batch"),
])
def test_bad_settings_are_one_sentence(train2, tmp_path, settings, sentence):
    config = write_tiny2(tmp_path, "gpt")
    save_stage1(tmp_path, "mqvae")
    settings = [s.replace("STAGE1", str(tmp_path / "stage1")) for s in settings]
    if sentence is None:
        train2(config, *settings)
    else:
        with pytest.raises(UserError, match=sentence):
            train2(config, *settings)
        assert not list((tmp_path / "run2/checkpoints").glob("*")) and not list(tmp_path.glob("*/codes"))  # nothing was encoded in vain


def test_labels_are_asked_of_images_that_have_none(train2, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(12):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"images/{i}.png")
    config = write_tiny2(tmp_path, "gpt", data=f"name: folder\n  root: {tmp_path}/images\n  val_fraction: 0.3")
    with pytest.raises(UserError, match="needs images with labels, but this data has none"):
        train2(config)
    train2(config, "train.class_conditional=false", "train.max_train_steps=2")
    with pytest.raises(UserError, match="unconditional"):
        sample.main(["--run", str(tmp_path / "run2"), "--classes", "1"])


@pytest.fixture(scope="module")
def gpt_run(tmp_path_factory):
    """A run of a GPT, and beside it 000000.png."""
    folder = tmp_path_factory.mktemp("gpt")
    run_stage2(write_tiny2(folder, "gpt"), "train.max_train_steps=1")
    Image.new("RGB", (4, 4)).save(folder / "000000.png")
    return folder / "run2"


@pytest.mark.parametrize("words, sentence", [
    ("--run {run} --classes 10", "no class '10'; the classes are 0 to 9"),
    ("--run {run} --classes cat", "no class 'cat'"),
    ("--run {run} --classes 3,", "no class ''"),
    ("--run {run} --out {run}/x.jpg", "must be a folder"),
    ("--run {run} --out {run}/..", "already holds images"),
    ("--run {run} --top_k 0", "sample.top_k must be between 1 and"),
    ("--run {run} -n 0", "at least 1"),
    ("--run {run} --top_k_pos 3", "sample.top_k_pos is not for a GPT"),
    ("--run {run}/..", "not a run folder"),
    ("--run {run}/stage1", "holds a stage-1 model"),
])
def test_bad_questions_to_sample(gpt_run, words, sentence):
    with pytest.raises(UserError, match=sentence):
        sample.main(words.format(run=gpt_run).split())


def test_a_bad_question_is_one_line(gpt_run, tmp_path):
    said = forked(tmp_path, "sample.py", "--run", gpt_run, "--classes", "cat", status=1)
    assert said.count("\n") == 1 and said.startswith("error: there is no class 'cat'")


def test_the_stage1_run_is_never_the_copy(train2, tmp_path):
    """A stage-1 run at the place of the copy is refused, not overwritten; a resumed checkpoint of another folder brings its own."""
    config = write_tiny2(tmp_path, "gpt")
    shutil.copytree(tmp_path / "stage1_vqgan", tmp_path / "exp/stage1")
    with pytest.raises(UserError, match="choose another train.output_dir"):
        train2(config, f"codes.stage1={tmp_path}/exp/stage1", f"train.output_dir={tmp_path}/exp")
    assert load_run(tmp_path / "exp/stage1")
    train2(config, "train.max_train_steps=3")
    shutil.rmtree(tmp_path / "stage1_vqgan/checkpoints")
    train2(config, f"train.output_dir={tmp_path}/other", resume=str(tmp_path / "run2/checkpoints/step_00000003"))
    assert metrics(tmp_path / "other")[-1]["step"] == 6 and load_models(tmp_path / "other")[3][0] == "striped disc"


def test_the_stage1_run_is_not_where_its_copy_goes(train2, tmp_path):
    config = write_tiny2(tmp_path, "gpt")
    inner = tmp_path / "other/stage1/vqgan"
    shutil.copytree(tmp_path / "stage1_vqgan", inner)
    with pytest.raises(UserError, match="is where this run would put its copy"):
        train2(config, f"codes.stage1={inner}", f"train.output_dir={tmp_path}/other")
    assert (inner / "config.yaml").is_file()


def test_resume_knows_its_own_stage1(train2, tmp_path):
    """A run goes on with its copy of the stage-1 weights, even if the stage-1 run has trained on or is gone."""
    config = write_tiny2(tmp_path, "gpt")
    train2(config, "train.max_train_steps=3")
    shutil.rmtree(tmp_path / "stage1_vqgan")
    train2(config, resume="auto")
    assert metrics(tmp_path / "run2")[-1]["step"] == 6


def test_the_step_of_a_run_can_be_compiled(train2, tmp_path):
    train2(write_tiny2(tmp_path, "dq_transformer"), "train.max_train_steps=1")
    outs = []
    for compiled in (False, True):
        # In float64: the compiled step rounds differently
        model = load_models(tmp_path / "run2")[0].double()
        for blocks in (m for m in model.modules() if isinstance(m, Blocks) and compiled):
            blocks.step = torch.compile(blocks.step, backend="aot_eager")
        outs.append(model.sample(2, [0, 1], generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(outs[0][k], outs[1][k]) for k in outs[0])


# ---------------------------------------------------------------------------------------------------------------------
# Parts of an image drawn anew


def test_each_model_computes_in_the_precision_of_its_training(train2, tmp_path, monkeypatch):
    """And so in training, sampling and evaluation, with codes of each precision in a cache of their own."""
    config, run, stage1, seen = write_tiny2(tmp_path, "gpt"), tmp_path / "run2", tmp_path / "stage1_vqgan/config.yaml", {}

    def watch(kind, name):
        method = getattr(kind, name)

        @functools.wraps(method)
        def watched(*args, **kwargs):
            seen.setdefault(name, set()).add(str(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else "float32")
            return method(*args, **kwargs)

        monkeypatch.setattr(kind, name, watched)

    def used(script, *words):
        seen.clear()
        script(*words)
        return {name: precision for name, (precision,) in seen.items()}

    def sampled(*words):
        sample.main(["--run", str(run), "-n", "1", *words])

    def measured(*words):
        evaluate.main(["--run", str(run), "-n", "1", "--without", "lpips", "inception", "--num_workers", "0", *words])

    for kind, names in ((VQGAN, ("encode", "decode")), (GPT, ("bits", "sample"))):
        for name in names:
            watch(kind, name)
    words = ["train.max_train_steps=1", "data.val_size=4"]
    full, half = "float32", "torch.bfloat16"
    assert used(train2, config, *words) == {"encode": full, "decode": full, "bits": full, "sample": full}
    stage1.write_text(stage1.read_text().replace("mixed_precision: null", "mixed_precision: bf16"))
    shutil.rmtree(run)
    mixed = {"encode": half, "decode": half, "bits": full, "sample": full}
    assert used(train2, config, *words) == mixed and len(list((stage1.parent / "codes").glob("train_*"))) == 2
    assert used(sampled) == {"decode": half, "sample": full} and used(measured) == mixed
    for asked, precision in (("no", full), ("fp16", "torch.float16")):
        for script in (sampled, measured):
            assert set(used(script, "--mixed_precision", asked).values()) == {precision}
    other = [*words, "codes.cache=false", "train.mixed_precision=bf16", f"train.output_dir={tmp_path}/half"]
    run = tmp_path / "half"
    assert set(used(train2, config, *other).values()) == set(used(measured).values()) == {half}


KEEPS = {"gpt": "0,0,1,0.5", "stackformer": "0,0,1,0.5", "dq_transformer": "coarse", "dq_transformer_triple": "coarse,medium",
         "mask_vqgan": "0,0,0.5,0.5 0.5,0.5,1,1", "mask_mqvae": "0,0,0.5,1", "mask_dqvae": "MASK"}


def test_a_mask_may_be_a_transparent_layer(tmp_path):
    model, config = load_run(save_stage1(tmp_path, "vqgan"))
    Image.new("RGB", (16, 16)).save(tmp_path / "photo.png")
    new = np.zeros((16, 16), np.uint8)
    new[8:] = 255                                                                            # the lower half
    black, white = np.zeros_like(new), np.full_like(new, 255)
    layers = {"opaque": [new, new, new, white], "white strokes": [white, white, white, new],
              "faint strokes": [white, white, white, new // 4],
              "black strokes": [black, black, black, 255 - new], "all transparent": [white, white, white, black],
              "black under transparency": [new, new, new, new]}
    for name, layer in layers.items():
        Image.fromarray(np.dstack(layer)).save(tmp_path / f"{name}.png")
        args = SimpleNamespace(image=str(tmp_path / "photo.png"), keep=None, mask=str(tmp_path / f"{name}.png"))
        if name in ("all transparent", "faint strokes"):
            with pytest.raises(UserError, match="nothing stays"):
                sample.edit(args, model, config)
        else:
            known = sample.edit(args, model, config).known[0]
            assert known[:4].all() and not known[4:].any(), name


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_part_of_a_photo_is_drawn_anew(train2, tmp_path, name, monkeypatch):
    train2(write_tiny2(tmp_path, name), "train.max_train_steps=1", "sample.cfg_scale=2")
    run, photo, out = tmp_path / "run2", tmp_path / "photo.png", tmp_path / "out"
    pixels = make_dataset("shapes", image_size=64)[1][0].add(1).mul(127.5).byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).crop((0, 8, 64, 56)).save(photo)                                 # 64 x 48: its centre is cropped
    mask = Image.new("L", (64, 48))
    mask.paste(255, (23, 0, 24, 48))                                                         # one white line, in pixel 5 of 16
    mask.paste(255, (32, 0, 64, 48))
    mask.save(tmp_path / "mask.png")
    keep = ["--mask", str(tmp_path / "mask.png")] if KEEPS[name] == "MASK" else ["--keep", KEEPS[name]]
    drawn, edits = [], []
    edit = sample.edit
    monkeypatch.setattr(sample, "edit", lambda *args: edits.append(edit(*args)) or edits[-1])
    monkeypatch.setattr(sample, "draw", lambda *args: drawn.append(args) or draw(*args))
    sample.main(["--run", str(run), "-n", "3", "--image", str(photo), *keep, "--out", str(out)])
    assert sorted(p.name for p in out.iterdir()) == ["000000.png", "000001.png", "000002.png", "grid.png", "samples.json"]
    assert json.loads((out / "samples.json").read_text())["labels"] is None                  # the class of a photo is not known
    model, stage1, _, _ = load_models(run)
    assert len(drawn) == 1                                                                  # nothing is drawn as a check
    edited, known = edits[0], edits[0].known
    assert torch.equal(edited.shown[0], sample.load_image(str(photo), (16, 16))[0])
    want = torch.zeros(1, 8, 8, dtype=torch.bool)
    if name.startswith("dq"):
        want = torch.nn.functional.interpolate(edited.codes["grain"].unsqueeze(1).float(), (8, 8)).squeeze(1) < model.grains - 1
    elif name == "mask_vqgan":
        want[:, :4, :4] = want[:, 4:, 4:] = True
    elif name.startswith("mask"):
        want[:, :, :4] = True
        if name == "mask_dqvae":                                                             # a coarse code is 2 x 2 cells
            grain = torch.nn.functional.interpolate(edited.codes["grain"].unsqueeze(1).float(), (8, 8)).squeeze(1)
            want[:, :, 2] = False
            want[:, :, 3] &= grain[:, :, 3] > 0
    else:
        want[:, :4] = True
    shown = torch.nn.functional.interpolate(want.unsqueeze(1).float(), (16, 16))[0] > 0
    assert torch.equal(edited.shown[1], edited.shown[0].where(shown, 0.0))                   # the picture of what stays
    assert torch.equal(known, want) and 0 < want.sum() < 64
    if name.startswith("mask"):
        places, _ = model.places.kept(model.places.read(edited.codes)[0], known)
        codes = model.sample(1, codes=edited.codes, known=known)
        assert torch.equal(model.places.read(codes)[1][places], model.places.read(edited.codes)[1][places])
    # One picture: photo and mask first
    sample.main(["--run", str(run), "-n", "2", "--image", str(photo), *keep, "--out", str(tmp_path / "one.png"), "--classes", "3"])
    grid = np.asarray(Image.open(tmp_path / "one.png"))
    first = edited.shown[0].add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()
    assert grid.shape == (20, 74, 3) and (grid[2:18, 2:18] == first).all()
    if name in ("gpt", "stackformer"):
        before = {p.name: p.read_bytes() for p in out.iterdir()}
        with pytest.raises(UserError, match="only the first ones can stay: whole rows from the top"):
            sample.main(["--run", str(run), "--image", str(photo), "--keep", "0,0.5,1,1", "--out", str(out)])
        assert before == {p.name: p.read_bytes() for p in out.iterdir()}                     # earlier images are not lost
    if name == "dq_transformer":
        with pytest.raises(UserError, match="such as all coarse codes"):
            sample.main(["--run", str(run), "--image", str(photo), "--mask", str(tmp_path / "mask.png")])


@pytest.fixture(scope="module")
def mask_run(tmp_path_factory):
    """A run of a mask transformer, and beside it a photo, a mask and other files."""
    folder = tmp_path_factory.mktemp("mask")
    run_stage2(write_tiny2(folder, "mask_dqvae"), "train.max_train_steps=1", "sample.cfg_scale=2")
    Image.new("RGB", (64, 48)).save(folder / "photo.png")
    Image.new("L", (64, 48)).save(folder / "mask.png")
    Image.new("L", (64, 64)).save(folder / "large.png")
    (folder / "broken.png").write_bytes(b"no")
    return folder / "run2"


@pytest.mark.parametrize("words, error, sentence", [
    ("--image photo.png --keep 0,0,1,1", UserError, "nothing is left to draw"),
    ("--image photo.png --keep 0,0,1.5,1", UserError, "from 0 to 1"),
    ("--image photo.png --keep 0.5,0,0.5,1", UserError, "left below right"),
    ("--image photo.png --keep left", UserError, "rectangles left,top,right,bottom"),
    ("--image photo.png --keep coarse,fine", UserError, "but not the finest"),
    ("--image photo.png --keep medium", UserError, "but not the finest"),
    ("--image photo.png --mask large.png", UserError,
     "large.png is 64 x 64 pixels, but .*photo.png is 64 x 48"),
    ("--image photo.png --mask nowhere.png", UserError, "no image .*nowhere.png"),
    ("--image photo.png --keep ", UserError, "nothing stays"),
    ("--image photo.png --keep 0,0,0.01,0.01", UserError, "nothing stays"),
    ("--image photo.png --keep 0,0,1,0.5 --cfg 2", UserError, "--cfg needs --classes"),
    ("--image photo.png --keep 0,0,1,0.5 --steps 0", UserError, "sample.steps must be between 1"),
    ("--image photo.png", UserError, "give one of --keep and --mask"),
    ("--image photo.png --keep coarse --mask mask.png", UserError, "give one of --keep and --mask"),
    ("--keep 0,0,1,0.5", UserError, "say what of --image stays"),
    ("--image broken.png --keep 0,0,1,0.5", DataError, "cannot read .*broken.png"),
    ("--image photo.png --mask broken.png", DataError, "cannot read .*broken.png"),
])
def test_what_cannot_stay_of_a_photo(mask_run, words, error, sentence):
    words = [f"{mask_run}/../{word}" if word.endswith(".png") else word for word in words.split(" ")]
    with pytest.raises(error, match=sentence):
        sample.main(["--run", str(mask_run), *words])
