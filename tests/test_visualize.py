"""visualize.py on small untrained runs: every command draws every model, and the pictures show what they should."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import TINY_MODELS, TRANSFORMERS, save_stage1, write_tiny2
from PIL import Image, ImageSequence

import visualize
from dataset import DataError, make_dataset, to_uint8
from harness.config import UserError, build
from harness.models import load_run, model_class
from harness.sampling import chosen_labels, draw, load_models, sampling_arguments


@pytest.fixture
def stage2(tmp_path, train2):
    def make(name, *overrides):
        train2(write_tiny2(tmp_path, name), "train.max_train_steps=1", "data.train_size=8", "codes.cache_views=1", *overrides)
        return tmp_path / "run2"

    return make


def colours(path):
    return len(Image.open(path).convert("RGB").getcolors(2**24))


# ---------------------------------------------------------------------------------------------------------------------
# Every command, every model


@pytest.mark.parametrize("name", TINY_MODELS)
def test_stage1_pictures(tmp_path, name, capsys):
    run = str(save_stage1(tmp_path, name))
    visualize.main(["recon", "--run", run, "-n", "1", "--dpi", "50"])
    visualize.main(["codes", "data.val_size=9", "--run", run, "-n", "2", "--images", "7", "--dpi", "50", "data.seed=5"])
    visualize.main(["codebook", "--run", run, "--images", "8", "--dpi", "50", "--split", "train"])
    printed = capsys.readouterr().out
    for command in ("recon", "codes", "codebook"):
        path = tmp_path / f"stage1_{name}/figures/{command}.png"
        assert str(path) in printed and colours(path) > 50
    assert f"{run} has no record" in printed


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_stage2_pictures(stage2, name):
    run = stage2(name)
    visualize.main(["sequence", "--run", str(run), "-n", "1", "--seed", "3", "--class", "ring", "--dpi", "50"])
    assert colours(run / "figures/sequence.png") > 50
    gif = Image.open(run / "figures/sequence.gif")
    assert gif.size == (136, 2 * 136)
    pages = [(np.array(f.convert("RGB")), f.info["duration"]) for f in ImageSequence.Iterator(gif)]  # repeated frames are merged
    frames = 11 if name.startswith("mask") else 35 if name.endswith("triple") else 31
    assert sum(duration for _, duration in pages) == frames * 120 + 2500
    # The last frame is sample.py's image, in 256 colours
    model, stage1, config, classes = load_models(run)
    labels = chosen_labels("ring", classes, 1)
    image = draw(model, stage1, [0], labels, 3, sampling_arguments(type(model), config["sample"]))[0]
    first, last = (np.abs(pages[i][0][4:132:8, 4:132:8].astype(int) - image).mean() for i in (0, -1))
    assert last < 8 < first


def test_curves(tmp_path, stage2, monkeypatch):
    """A panel for what a run has logged, with a line for each run and key."""
    drawn, save = [], visualize.save

    def kept(figure, *args):
        drawn.append({ax.get_title(): [line.get_xydata().tolist() for line in ax.get_lines()] for ax in figure.axes if ax.get_title()})
        save(figure, *args)

    monkeypatch.setattr(visualize, "save", kept)
    runs = []
    for name, last in (("one", {"val_psnr": 20.0}), ("two", {"val_rfid": 9.0})):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text("model:\n  name: vqgan\n")
        lines = [{"step": step, "l1": 1 / step, "d_real": 0.1, "d_fake": -0.1} for step in (1, 2)] + [{"step": 2, **last}]
        being_written = '{"step": 3, "l'
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + being_written)
        runs += ["--run", str(folder)]
    visualize.main(["curves", *runs, "--dpi", "50"])
    assert (tmp_path / "one/figures/curves.png").is_file()
    l1, real, fake = ([[1, a], [2, b]] for a, b in ((1, 0.5), (0.1, 0.1), (-0.1, -0.1)))
    assert drawn.pop() == {"L1": [l1, l1], "discriminator: real, fake (dashed)": [real, fake, real, fake],
                           "validation: PSNR (dB)": [[[2, 20]], []], "validation: rFID": [[], [[2, 9]]]}
    visualize.main(["curves", "--run", str(stage2("gpt")), "--dpi", "50"])
    assert set(drawn.pop()) == {"loss", "gradient's norm", "validation: bits per image"}


def test_runs_are_compared(tmp_path, capsys):
    runs = [str(save_stage1(tmp_path, name)) for name in ("vqgan", "mqvae")]
    both = ["--run", runs[0], "--run", runs[1]]
    visualize.main(["rate", *both, "--images", "3", "--out", str(tmp_path / "r.png")])
    lines = [line for line in capsys.readouterr().out.splitlines() if "bits per pixel" in line]
    assert lines[0].startswith("stage1_vqgan (VQGAN): 1.25 bits") and lines[1].startswith("stage1_mqvae (MQ-VAE): 0.5")
    # PSNR of 8-bit images, mean over the images
    model, _ = load_run(runs[0])
    data = make_dataset("shapes", split="val", image_size=16, train_size=40, val_size=4)
    values = []
    for i in (0, 1, 2):
        image = data[i * 4 // 3][0][None]
        with torch.no_grad():
            error = to_uint8(model.decode(model.encode(image))).double() - to_uint8(image).double()
        values.append(10 * np.log10(255**2 / error.square().mean().item()))
    assert float(re.search(r"psnr ([\d.]+)", lines[0])[1]) == pytest.approx(np.mean(values), rel=1e-3)
    assert colours(tmp_path / "r.png") > 50
    visualize.main(["recon", *both, "-n", "2", "--dpi", "50"])
    assert colours(tmp_path / "stage1_vqgan/figures/recon.png") > 50
    assert visualize.distinct(["/a/x", "/b/x"]) == ["a/x", "b/x"] and visualize.distinct(["/a/x", "/a/y", "/a/y"]) == ["x", "y", "y"]


# ---------------------------------------------------------------------------------------------------------------------
# What the pictures show


def test_error_map():
    a = torch.full((1, 3, 2, 2), -1.0)
    b = a.clone()
    b[0, :, 0, 1] = torch.tensor([1.0, 5.0, -1.0])  # values above 1 are white
    b[0, 0, 1, 0] = -1 + 30 / 127.5
    assert visualize.error_map(a, b).tolist() == [[[0, 170], [10, 0]]]


def test_errors_of_more_pixels_than_torch_takes_quantiles_of(tmp_path, monkeypatch):
    errors = torch.zeros(2, 2049, 4096)
    errors[0, 0, :2000] = 9.0  # fewer than 0.5 %
    monkeypatch.setattr(visualize, "error_map", lambda *_: errors)
    caught, draw = [], visualize.row
    monkeypatch.setattr(visualize, "row", lambda *args, **more: caught.append(more.get("vmax")) or draw(*args, **more))
    visualize.main(["recon", "--run", str(save_stage1(tmp_path, "vqgan")), "-n", "2", "--dpi", "30"])
    assert caught[-1] == 0


def test_examples_go_from_the_fewest_codes_to_the_most():
    counts = torch.tensor([5, 9, 1, 7, 3, 3])
    assert counts[visualize.examples(counts, 4)].tolist() == [1, 3, 5, 9]
    assert visualize.examples(counts, 99) == [2, 4, 5, 0, 3, 1] and visualize.examples(counts, 1) == [2]


def test_examples_are_images_of_the_data(tmp_path, monkeypatch):
    rows = {}
    monkeypatch.setattr(visualize, "row", lambda axes, images, label, *_, **options: rows.update({label: images}))
    visualize.main(["codes", "--run", str(save_stage1(tmp_path, "dqvae")), "-n", "4", "--dpi", "30"])
    data = make_dataset("shapes", split="val", image_size=16, train_size=40, val_size=4)
    assert {image.tobytes() for image in rows["original"]} == {visualize.pixels(image).tobytes() for image, _ in data}


def test_a_repeated_code_counts_once(tmp_path):
    model, _ = load_run(save_stage1(tmp_path, "dqvae_triple"))
    grain = torch.tensor([[[0, 1], [2, 0]]])
    codes = {"indices": torch.zeros(1, 8, 8, dtype=torch.int64), "grain": grain}
    assert model.counts(codes)["codes"].tolist() == [1 + 4 + 16 + 1]


@pytest.mark.parametrize("log", [False, True])
def test_heat_map(log):
    values = np.array([[0, 0, 1, 10], [0, 2, 3, 500], [7, 7, 7, 1000]], float)
    edges, shares = visualize.heat_map(values, log)
    assert shares.shape == (len(edges) - 1, 3) and np.allclose(shares.sum(0), 1)
    for t, row in enumerate(values):
        for value in row:
            at = np.log10(value) if log and value else edges[0] if log else value
            bin_ = min(np.searchsorted(edges, at, "right") - 1, len(shares) - 1)
            assert shares[bin_, t] > 0
    assert shares[0].tolist() == ([0.5, 0.25, 0] if log else [1, 0.75, 0.75])  # the share of zeros; in linear bins, of values below 25
    for same in (np.zeros((2, 5)), np.full((1, 3), 10.0)):
        assert np.allclose(visualize.heat_map(same, log)[1].sum(0), 1)


def test_record_over_training(tmp_path, capsys):
    run = save_stage1(tmp_path, "vqvae")
    (run / "codebook").mkdir()
    for step in (200, 20, 100):
        np.savez(run / f"codebook/step_{step:08d}.npz", uses=np.arange(32) * step, norms=np.full(32, step, np.float32),
                 gradient_norms=np.zeros(32, np.float32))
    history = visualize.read_history(run)
    assert history["steps"].tolist() == [20, 100, 200] and history["norms"][:, 0].tolist() == [20, 100, 200]
    assert history["uses"].shape == (3, 32)
    visualize.main(["codebook", "--run", str(run), "--images", "8", "--history"])
    assert "no record" not in capsys.readouterr().out
    high = Image.open(run / "figures/codebook.png").size[1]
    (run / "codebook/step_00000100.npz").write_bytes(b"cut short")
    with pytest.raises(UserError, match="step_00000100.npz is not a whole record"):
        visualize.main(["codebook", "--run", str(run)])
    shutil.rmtree(run / "codebook")
    visualize.main(["codebook", "--run", str(run), "--images", "8"])
    assert Image.open(run / "figures/codebook.png").size[1] < high


def test_gradient_norms_are_of_codes_that_are_used(tmp_path):
    model, _ = load_run(save_stage1(tmp_path, "dqvae"))
    data = make_dataset("shapes", split="val", image_size=16, val_size=4)
    norms = visualize.code_gradients(model, data)
    with torch.no_grad():
        used = model.encode(next(visualize.batches(data, 4, "images")))["indices"].unique()
    assert norms.shape == (32,) and (norms > 0).nonzero().flatten().tolist() == used.tolist() and len(used) > 2


@pytest.mark.parametrize("name", [name for name in TRANSFORMERS if not name.startswith("mask")])
def test_frames_show_what_has_a_code(tmp_path, name):
    stage1, _ = load_run(save_stage1(tmp_path, TRANSFORMERS[name][1]))
    data = make_dataset("shapes", image_size=16)
    with torch.no_grad():
        codes = stage1.encode(torch.stack([data[i][0] for i in range(3)]))
    more = {"gpt": dict(grid=8), "stackformer": dict(grid=8, num_codes=16), "dq_transformer": dict(grids=[4, 8]),
            "dq_transformer_triple": dict(grids=[2, 4, 8])}[name]
    model = build(model_class(name.removesuffix("_triple")), more | dict(codebook_size=32, n_embd=8, n_head=1)).eval()
    ranks, counts = visualize.code_ranks(model, codes)
    total = counts.sum(1)
    order = [sorted(set(r.flatten().tolist()) - {-1}) for r in ranks]
    assert order == [list(range(t)) for t in total.tolist()]  # every code, once
    assert (visualize.codes_done(counts, counts.shape[1]) == total).all()
    assert (visualize.codes_done(counts, 1) == counts[:, 0]).all()
    if "grain" in codes:  # coarse to fine, each granularity row by row
        side = codes["grain"].shape[1]
        cells = codes["grain"].repeat_interleave(8 // side, 1).repeat_interleave(8 // side, 2)
        for r, c, n in zip(ranks, cells, counts.tolist()):
            for g in c.unique().tolist():
                assert r[c == g].min() >= sum(n[:g]) and r[c == g].max() < sum(n[:g + 1])
            finest = r[c == len(n) - 1]
            assert (finest.diff() > 0).all()
    with torch.no_grad():
        assert torch.equal(visualize.partial_images(stage1, codes, ranks, total), stage1.decode(codes))
        done = visualize.codes_done(counts, 0.6 * counts.shape[1])
        images = visualize.partial_images(stage1, codes, ranks, done)
    if name == "stackformer":
        part = {k: v[:, :10] for k, v in codes.items()}
        assert done.tolist() == [10] * 3 and torch.equal(images, stage1.decode(part))
        return
    missing = (ranks >= done.view(-1, 1, 1)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    grey = (images == visualize.GREY).all(1)
    assert torch.equal(grey, missing) and 0 < missing.float().mean() < 1
    drawn = visualize.cell_map(ranks[0], int(done[0]), int(total[0]), 64)
    assert drawn.shape == (64, 64, 3)
    centres = (drawn[4::8, 4::8] == int(0.85 * 255)).all(-1)
    assert (centres == (ranks[0] >= done[0]).numpy()).all()


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_page_has_the_codes(tmp_path, name):
    run = save_stage1(tmp_path, name)
    visualize.main(["interactive", "--run", str(run), "-n", "3"])
    page = (run / "figures/interactive.html").read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[^\"]*", "", page)) and "{{" not in page
    data = json.loads(re.search(r"const data = (.*);\n", page)[1])
    model, _ = load_run(run)
    images = make_dataset("shapes", split="val", image_size=16, val_size=4)
    assert len(data["images"]) == 3
    for record, i in zip(data["images"], [0, 1, 2]):
        codes = model.encode(images[i * 4 // 3][0][None])
        assert record["codes"] == {k: v[0].tolist() for k, v in codes.items()}
        assert record["bits"] == pytest.approx(model.bits(codes).item(), abs=0.1)
        assert record["count"] == model.counts(codes)["codes"].item()


def test_the_page_in_a_browser(tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no chromium to open the page with")
    run = save_stage1(tmp_path, "dqvae")
    visualize.main(["interactive", "--run", str(run), "-n", "2"])
    model, _ = load_run(run)
    codes = model.encode(make_dataset("shapes", split="val", image_size=16, val_size=4)[2][0][None])
    grain, indices = codes["grain"][0], codes["indices"][0]

    def status(row, column):
        page = f"file://{run}/figures/interactive.html#image=1&row={row}&column={column}"
        dom = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                              "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}/profile", "--dump-dom", page],
                             text=True, capture_output=True, timeout=120).stdout
        return re.search(r'id="status"[^>]*>([^<]*)<', dom)[1], dom.count('class="here"'), dom.count('class="same"') // 3

    coarse, fine = ((grain == g).nonzero()[-1] * 2 for g in (0, 1))
    for (y, x), what in ((coarse.tolist(), " (2 x 2 cells), coarse"), (fine.tolist(), ", fine")):
        code = indices[y, x].item()
        same = ((indices[::2, ::2] == code) & (grain == 0)).sum() + ((indices == code) & model.to_finest(grain[None])[0].eq(1)).sum() - 1
        said, here, others = status(y, x)
        assert said.startswith(f"Row {y}, column {x}{what}: code {code}, which") and here == 3 and others == same


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("words, error, sentence", [
    ("recon --run {tmp}/none", UserError, "none is not a run folder"),
    ("recon --run {vq} --run {other}", UserError,
     "image sizes cannot be compared without data.image_size=...: .*vqgan has 16, .*vqvae has 32"),
    ("rate --run {vq} --run {other}", UserError, "different image sizes"),
    ("sequence --run {vq}", UserError, "holds a stage-1 model .vqgan.; give the run folder of a stage-2 one"),
    ("codebook --run {vq} --history", UserError, "no record .* train.codebook_stats_every"),
    ("codes --run {vq} -n 0", UserError, "-n, --images and --dpi must be at least 1"),
    ("codes --run {vq} --out x.pdf", UserError, "--out must end in .png; it is x.pdf"),
    ("interactive --run {vq} --out x.png", UserError, "--out must end in .html"),
    ("codes --run {vq} data.rot=3", UserError, "unknown key data.rot; the nearest valid one is data.root"),
    ("codes --run {vq} model.ch=3", UserError, "unknown section 'model'"),
    ("codes --run {vq} data.name=folder data.root={tmp}/nowhere", DataError, "there is no folder"),
    ("codes --run {vq} data.image_size=17", UserError, "data.image_size must be divisible by 2"),
    ("sequence --run {run2} --class heptagon", UserError, "there is no class 'heptagon'"),
    ("curves --run {vq}", UserError, "stage1_vqgan has logged nothing yet"),
    ("curves --run {vq} --run {run2}", UserError, "have no curves in common"),
    ("recon --run {run2}", UserError,
     "holds a stage-2 model .gpt.; use `visualize.py sequence`, or a stage-1 run such as .*run2/stage1"),
])
def test_errors_are_one_sentence(tmp_path, stage2, words, error, sentence):
    if "run2" in words:
        stage2("gpt")
    folders = {"tmp": tmp_path, "vq": tmp_path / "stage1_vqgan", "run2": tmp_path / "run2", "other": tmp_path / "stage1_vqvae"}
    if "{vq}" in words:
        save_stage1(tmp_path, "vqgan")
    if "{other}" in words:
        save_stage1(tmp_path, "vqvae", image_size=32)
    with pytest.raises(error, match=sentence) as raised:
        visualize.main(words.format(**folders).split())
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.rglob("figures"))


@pytest.mark.parametrize("words", [
    "recon --run x --colour 3", "recon --run x data.root=x -n 3 word", "sequence --run x data.root=x"])
def test_an_unknown_option_is_refused(words, capsys):
    with pytest.raises(SystemExit):
        visualize.main(words.split())
    assert "unrecognized arguments" in capsys.readouterr().err
