"""Metrics and pictures, and the record of a codebook over training."""

import io

import numpy as np
import pytest
from conftest import TINY_MODELS, disk_is_full, metrics, write_tiny

from harness import checkpoint, log


def test_pictures_logs_and_best_weights_that_do_not_fit_cost_no_training(train, tmp_path, monkeypatch):
    """A line that was cut short does not stay in the log, which goes on when there is room."""
    write = checkpoint.write_file

    def small(path, data):
        return disk_is_full() if path.suffix in (".png", ".safetensors") else write(path, data)

    class Small(io.FileIO):  # takes 10 bytes at step 2
        def write(self, line):
            return super().write(line[:10] if b'"step": 2,' in line else line)

    for module in (checkpoint, log):
        monkeypatch.setattr(module, "write_file", small)
    def opened(path, mode="r", **kwargs):
        return Small(path, "a") if mode == "ab" else open(path, mode, **kwargs)

    monkeypatch.setattr(log, "open", opened, raising=False)
    with pytest.warns(UserWarning, match="could not be written.*training goes on") as told:
        train()
    assert {"the best weights", "metrics.jsonl", "the picture of step 3"} <= {str(w.message).split(" could")[0] for w in told}
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 3, 4, 5, 6]
    assert not list((tmp_path / "run/samples").iterdir()) and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("name", ["vqgan", "vqvae", "mqvae", "dqvae"])
def test_the_codebook_is_recorded(tmp_path, train, name):
    from safetensors.torch import load_file

    config = write_tiny(tmp_path, model=TINY_MODELS[name])
    train("train.codebook_stats_every=2", "train.max_train_steps=3", "train.num_train_epochs=null", config=config)
    folder = tmp_path / "run/codebook"
    (folder / "step_00000099.npz").write_bytes(b"of a future that is not continued")
    train("train.codebook_stats_every=2", resume="auto", config=config)
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000002.npz", "step_00000004.npz", "step_00000006.npz"]
    model = load_file(tmp_path / "run/checkpoints/step_00000006/model.safetensors")
    record = np.load(folder / "step_00000006.npz")
    used = model["quantizer.queue"][model["quantizer.queue"] >= 0].tolist()
    assert record["uses"].tolist() == [used.count(k) for k in range(32)]
    assert np.allclose(record["norms"], model["quantizer.codebook"].norm(dim=1))
    assert 0 < (record["gradient_norms"] > 0).sum() <= (record["uses"] > 0).sum()
