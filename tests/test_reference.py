"""Outputs of the reference implementations, on small networks with stand-in weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fill import fill, image

from convert import from_reference
from losses import PatchGAN

FIXTURES = Path(__file__).parent / "fixtures"


def load(name):
    about = json.loads((FIXTURES / f"{name}.json").read_text())
    state = {k: torch.as_tensor(fill(k, tuple(shape))) for k, shape in about["parameters"].items()}
    with np.load(FIXTURES / f"{name}.npz") as file:
        arrays = {k: torch.from_numpy(v) for k, v in file.items()}
    return about["config"], state, torch.from_numpy(image(**about["image"])), arrays


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["vqgan_taming", "vqgan_llamagen", "vqvae_simplecnn"])
@torch.no_grad()
def test_stage1(kind):
    config, state, images, want = load(kind)
    model = from_reference(kind, state, config)
    out = model(images)
    assert torch.equal(out.codes["indices"], want["indices"])
    close(out.images, want["reconstruction"])
    if "latents" in want:
        close(model.latents(images).permute(0, 3, 1, 2), want["latents"])
    if "quant_loss" in want:
        close(sum(out.losses.values()), want["quant_loss"])
    if "codebook_loss" in want:
        close(out.losses["codebook"], want["codebook_loss"])
        close(out.losses["commitment"], want["commit_loss"] * (0.25 if kind == "vqvae_simplecnn" else 1))
    if "perplexity" in want:
        close(out.info["perplexity"], want["perplexity"])


@torch.no_grad()
def test_mqvae():
    config, state, images, want = load("mqvae")
    model = from_reference("mqvae", state, config)
    out = model(images)
    order = want["positions"].argsort(1)  # the reference's are in order of score
    assert torch.equal(out.codes["positions"], want["positions"].gather(1, order))
    assert torch.equal(out.codes["indices"], want["indices"].gather(1, order))
    _, scores, positions = model._mask(images)
    close(scores.flatten(1).gather(1, positions), want["scores"].gather(1, order))
    close(model.encoder(images), want["features"])
    close(sum(out.losses.values()), want["quant_loss"])
    close(model.demask(model.quantizer.lookup(out.codes["indices"]), positions, 16), want["demasked"])
    close(out.images, want["reconstruction"])


@pytest.mark.parametrize("name", ["dqvae_dual", "dqvae_triple", "dqvae_entropy"])
@torch.no_grad()
def test_dqvae(name):
    config, state, images, want = load(name)
    model = from_reference("dqvae", state, config)
    out = model(images)
    assert torch.equal(out.codes["grain"], want["grain"])
    assert torch.equal(out.codes["indices"], want["indices"])
    close(model._route(images)[0].permute(0, 3, 1, 2), want["latents"])
    close(out.losses["codebook"] + out.losses["commitment"], want["quant_loss"])
    close(out.images, want["reconstruction"])
    if name == "dqvae_entropy":
        close(model.entropy(images), want["entropy"])
    else:
        features = [neck(x) for neck, x in zip(model.necks, model.down(images)[::-1])]
        close(model.router.logits(features), want["gate"])
        close(out.losses["budget"], want["budget_loss_of_hard_gate"])


@torch.no_grad()
def test_patchgan():
    config, state, images, want = load("patchgan")
    model = PatchGAN(config["ndf"], config["n_layers"]).eval()
    missing, unexpected = model.load_state_dict({k.removeprefix("main."): v for k, v in state.items()}, strict=False)
    assert not unexpected and all(k.endswith("num_batches_tracked") for k in missing)
    close(model(images), want["logits"])


@pytest.mark.parametrize("change, named", [
    (lambda s: s.pop("decoder.norm_out.weight"), "missing what becomes decoder.up.norm_out.weight"),
    (lambda s: s.update({"encoder.extra.weight": torch.zeros(1)}), "unknown encoder.extra.weight"),
    (lambda s: s.update({"quant_conv.bias": torch.zeros(3)}), "quant_conv.bias is (3,) instead of (32,)"),
    (lambda s: s.pop("encoder.mid.attn_1.k.weight"), "missing k of what becomes encoder.neck.mid.attn.qkv.weight"),
])
def test_weights_that_do_not_fit_are_named(change, named):
    config, state, _, _ = load("vqgan_taming")
    change(state)
    with pytest.raises(ValueError) as error:
        from_reference("vqgan_taming", state, config)
    assert named in str(error.value)


def test_training_leftovers_are_dropped():
    config, state, _, _ = load("vqgan_taming")
    from_reference("vqgan_taming", state | {"loss.discriminator.main.0.weight": torch.zeros(1)}, config)
