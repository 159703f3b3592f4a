""""hf:user/name", with a local folder as the Hub, and the upload of docs/hub.md."""

import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import ROOT, save_stage1, write_tiny2
from huggingface_hub.utils import validate_repo_id

import evaluate
import sample
import visualize
from harness.config import UserError
from harness.models import load_run


@pytest.fixture
def on_hub(tmp_path, monkeypatch):
    """The folder that stands for the Hub; runs are downloaded below tmp_path / "elsewhere"."""
    def download(repo_id, local_dir, ignore_patterns=()):
        validate_repo_id(repo_id)
        source = tmp_path / "hub" / repo_id
        if not source.is_dir():
            raise ConnectionError("404: no such repository\nsee there")
        for path in source.rglob("*"):
            name = path.relative_to(source)
            ignored = any(fnmatch(str(name), pattern) for pattern in ignore_patterns)
            if path.is_file() and not ignored:
                Path(local_dir, name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, Path(local_dir, name))

    def download_file(repo_id, name, local_dir):
        shutil.copy(tmp_path / "hub" / repo_id / name, local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download_file)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "hub"


def prepared(run, to):
    """The folder that the code in docs/hub.md makes of a run."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/hub.md").read_text(), re.DOTALL)[1]
    assert '"runs/NAME"' in code and '"upload"' in code
    exec(code.replace('"runs/NAME"', repr(str(run))).replace('"upload"', repr(str(to))), {})


def test_a_run_that_was_uploaded_as_it_is(train, tmp_path, on_hub):
    """It loads, both of its weights, and training goes on from it. Caches and logs stay there."""
    train("train.use_ema=true", "train.log_with=tensorboard")
    shutil.copytree(tmp_path / "run", on_hub / "me/vqgan")
    (on_hub / "me/vqgan/codes").mkdir()
    (on_hub / "me/vqgan/codes/indices.bin").write_text("many")
    for which in ("latest", "best"):
        one = load_run("hf:me/vqgan", which)[0].state_dict()
        other = load_run(tmp_path / "run", which)[0].state_dict()
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    here = Path("runs/me/vqgan")
    assert not (here / "codes").exists() and not (here / "tensorboard").exists()
    shutil.rmtree(on_hub)  # it is here already
    load_run("hf:me/vqgan")
    words = ["train.use_ema=true", "train.max_train_steps=7", f"train.output_dir={here}"]
    train(*words, resume="auto")
    assert (here / "checkpoints/step_00000007").is_dir()


def test_a_stage1_run_goes_up_and_comes_down(train, tmp_path, on_hub, capsys):
    train("train.use_ema=true", "train.init_from=null")
    prepared(tmp_path / "run", on_hub / "me/vqgan")
    assert {p.name for p in (on_hub / "me/vqgan").rglob("*")} == {
        "config.yaml", "checkpoints", "step_00000000", "model.safetensors", "checkpoint.json"}
    assert str(tmp_path) not in (on_hub / "me/vqgan/config.yaml").read_text()
    (model, config), (before, _) = load_run("hf:me/vqgan"), load_run(tmp_path / "run")
    assert all(torch.equal(v, before.state_dict()[k]) for k, v in model.state_dict().items())
    assert config["model"]["name"] == "vqgan"
    evaluate.main(["--run", "hf:me/vqgan", "--without", "lpips", "inception", "--num_workers", "0"])
    assert "vqgan" in capsys.readouterr().out
    visualize.main(["recon", "--run", "hf:me/vqgan", "-n", "2"])
    train("train.init_from=hf:me/vqgan", "train.freeze=[encoder,quantizer]", f"train.output_dir={tmp_path}/tuned")
    tuned = load_run(tmp_path / "tuned")[0].state_dict()
    assert all(torch.equal(v, tuned[k]) for k, v in before.state_dict().items() if k.startswith("encoder"))


def test_a_stage2_run_brings_its_stage1(train2, tmp_path, on_hub):
    config = write_tiny2(tmp_path, "dq_transformer")
    prepared(tmp_path / "stage1_dqvae", on_hub / "me/dqvae")
    train2(config, "codes.stage1=hf:me/dqvae", "data.root=null", "train.max_train_steps=1")
    assert [p.name for p in Path().iterdir()] == ["runs"] and (Path("runs/me/dqvae/codes")).is_dir()
    prepared(tmp_path / "run2", on_hub / "me/dq")
    pictures = []
    for run in (str(tmp_path / "run2"), "hf:me/dq"):
        sample.main(["--run", run, "-n", "3", "--out", str(tmp_path / "out.npz")])
        pictures.append((tmp_path / "out.npz").read_bytes())
    assert pictures[0] == pictures[1]


def test_a_download_that_breaks_off_is_no_run(tmp_path, on_hub, monkeypatch):
    shutil.copytree(save_stage1(tmp_path, "vqgan"), on_hub / "me/vqgan")
    download = huggingface_hub.snapshot_download

    def once(*words, **more):
        download(*words, **more)
        raise TimeoutError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", once)
    with pytest.raises(UserError, match="could not be downloaded .*TimeoutError"):
        load_run("hf:me/vqgan")
    assert (tmp_path / "elsewhere/runs/me/vqgan/checkpoints").is_dir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_run("hf:me/vqgan")


@pytest.mark.parametrize("call", [load_run, lambda name: sample.main(["--run", name])],
                         ids=["load_run", "sample"])
@pytest.mark.parametrize("name", ["hf:", "hf:../vqgan", "hf:me/vqgan/latest", "hf:me/none"])
def test_what_is_not_on_the_hub(on_hub, name, call):
    with pytest.raises(UserError, match=f"{name} could not be downloaded .*; check the name") as told:
        call(name)
    assert "\n" not in str(told.value)


def test_best_weights_that_are_damaged(train, tmp_path):
    train("train.max_train_steps=3")
    best = tmp_path / "run/checkpoints/best.safetensors"
    best.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match="best.safetensors is damaged .*; copy or download it"):
        load_run(tmp_path / "run", "best")
