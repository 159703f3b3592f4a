"""push_to_hub.py and "hf:user/name", with a local folder as the Hub."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import metrics, save_stage1, write_tiny2

import evaluate
import push_to_hub
import sample
import visualize
from config import UserError
from experiment import load_run


@pytest.fixture
def on_hub(tmp_path, monkeypatch):
    """The folder that stands for the Hub; runs are downloaded below tmp_path / "elsewhere"."""
    def upload(_, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, tmp_path / "hub" / repo_id, dirs_exist_ok=True)

    def download(repo_id, local_dir, allow_patterns, ignore_patterns=()):
        source = tmp_path / "hub" / repo_id
        if not source.is_dir():
            raise ConnectionError("404: no such repository")
        for path in source.rglob("*"):
            name = path.relative_to(source)
            wanted, unwanted = (any(fnmatch(str(name), p) for p in patterns) for patterns in (allow_patterns, ignore_patterns))
            if path.is_file() and wanted and not unwanted:
                Path(local_dir, name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, Path(local_dir, name))

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda _, repo, **__: f"https://hub/{repo}")
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "hub"


def test_a_stage1_run_goes_up_and_comes_down(train, tiny, tmp_path, on_hub, capsys):
    train("train.use_ema=true", "train.init_from=null")
    push_to_hub.main(["--run", str(tmp_path / "run"), "--to", "me/vqgan"])
    assert "https://hub/me/vqgan" in capsys.readouterr().out
    assert {p.name for p in (on_hub / "me/vqgan").iterdir()} == {"model.safetensors", "config.yaml", "README.md", "picture.png"}
    text = (on_hub / "me/vqgan/README.md").read_text() + (on_hub / "me/vqgan/config.yaml").read_text()
    assert str(tmp_path) not in text and f"val_psnr {metrics(tmp_path / 'run')[-1]['val_psnr']:.5g}" in text
    evaluate.main(["--run", str(tmp_path / "run"), "--without", "lpips", "inception", "--num_workers", "0"])
    found = json.loads((tmp_path / "run/metrics.json").read_text())
    assert found["missing"] and found["run"]
    push_to_hub.main(["--run", str(tmp_path / "run"), "--to", "me/best", "--which", "best"])
    assert "PSNR (dB)" not in (on_hub / "me/best/README.md").read_text()  # which was measured for other weights
    push_to_hub.main(["--run", str(tmp_path / "run"), "--to", "me/vqgan"])
    card = (on_hub / "me/vqgan/README.md").read_text()
    assert "PSNR (dB)" in card and not {"missing", "run", "data"} & json.loads((on_hub / "me/vqgan/metrics.json").read_text()).keys()

    (model, config), (before, _) = load_run("hf:me/vqgan"), load_run(tmp_path / "run")
    assert all(torch.equal(v, before.state_dict()[k]) for k, v in model.state_dict().items())
    assert config["model"]["name"] == "vqgan"
    shutil.rmtree(on_hub)  # it is here already
    capsys.readouterr()
    evaluate.main(["--run", "hf:me/vqgan", "--without", "lpips", "inception", "--num_workers", "0"])
    assert "vqgan" in capsys.readouterr().out
    assert json.loads((tmp_path / "elsewhere/runs/me/vqgan/metrics.json").read_text())["psnr"] == pytest.approx(
        json.loads((tmp_path / "run/metrics.json").read_text())["psnr"])
    visualize.main(["recon", "--run", "hf:me/vqgan", "-n", "2"])
    train("train.init_from=hf:me/vqgan", "train.freeze=[encoder,quantizer]", f"train.output_dir={tmp_path}/tuned")
    tuned = load_run(tmp_path / "tuned")[0].state_dict()
    assert all(torch.equal(v, tuned[k]) for k, v in before.state_dict().items() if k.startswith("encoder"))


def test_a_stage2_run_brings_its_stage1(train2, tmp_path, on_hub):
    config = write_tiny2(tmp_path, "dq_transformer")
    push_to_hub.push_to_hub(tmp_path / "stage1_dqvae", "me/dqvae")
    train2(config, "codes.stage1=hf:me/dqvae", "data.root=null", "train.max_train_steps=1")
    assert [p.name for p in Path().iterdir()] == ["runs"] and (Path("runs/me/dqvae/codes")).is_dir()
    push_to_hub.push_to_hub(tmp_path / "run2", "me/dq")
    pictures = []
    for run in (str(tmp_path / "run2"), "hf:me/dq"):
        sample.main(["--run", run, "-n", "3", "--out", str(tmp_path / "out.npz")])
        pictures.append((tmp_path / "out.npz").read_bytes())
    assert pictures[0] == pictures[1]


def test_a_download_that_breaks_off_is_no_run(tmp_path, on_hub, monkeypatch):
    push_to_hub.push_to_hub(save_stage1(tmp_path, "vqgan"), "me/vqgan")
    download = huggingface_hub.snapshot_download

    def once(*words, **more):
        download(*words, **more)
        raise TimeoutError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", once)
    with pytest.raises(UserError, match="could not be downloaded .*TimeoutError"):
        load_run("hf:me/vqgan")
    assert (tmp_path / "elsewhere/runs/me/vqgan/model.safetensors").is_file()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_run("hf:me/vqgan")


def test_an_exported_run_is_not_trained_on(train, tiny, tmp_path, on_hub):
    train("train.max_train_steps=1")
    push_to_hub.export(tmp_path / "run", tmp_path / "exported")
    for resume in (None, "auto"):
        with pytest.raises(UserError, match="holds an exported run.*train.init_from="):
            train(f"train.output_dir={tmp_path}/exported", resume=resume)
    with pytest.raises(UserError, match="one set of weights; leave --which best out"):
        load_run(tmp_path / "exported", "best")
    (tmp_path / "exported/model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match="model.safetensors is damaged .*; copy or download it again"):
        load_run(tmp_path / "exported")


def test_what_is_not_on_the_hub(tmp_path, on_hub, monkeypatch):
    for name in ("hf:", "hf:vqgan", "hf:../vqgan", "hf:me/vqgan/latest"):
        with pytest.raises(UserError, match=f"is hf:user/name; this is {name}"):
            load_run(name)
    for call in (lambda: load_run("hf:me/none"), lambda: sample.main(["--run", "hf:me/none"])):
        with pytest.raises(UserError, match="hf:me/none could not be downloaded .*404"):
            call()
    run = save_stage1(tmp_path, "vqgan")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no network")))
    with pytest.raises(UserError, match="could not be written .*no network.*hf auth login"):
        push_to_hub.push_to_hub(run, "me/vqgan")
    with pytest.raises(UserError, match="not a run folder"):
        push_to_hub.push_to_hub(tmp_path, "me/vqgan")
