"""Outputs of the reference implementations, on small networks with stand-in weights.

On a GPU: MINVQ_DEVICE=cuda python -m pytest tests/test_reference.py tests/test_training_parity.py
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from fill import fill, image

import convert
from dq_transformer import DQTransformer
from losses import PatchGAN

FIXTURES = Path(__file__).parent / "fixtures"
DEVICE = torch.device(os.environ.get("MINVQ_DEVICE", "cpu"))
TOLERANCE = 1e-4 if DEVICE.type == "cpu" else 1e-3
torch.backends.cudnn.allow_tf32 = False


def from_reference(*args):
    return convert.from_reference(*args).to(DEVICE)


def load(name):
    about = json.loads((FIXTURES / f"{name}.json").read_text())
    state = {k: torch.as_tensor(fill(k, tuple(shape))) for k, shape in about.get("parameters", {}).items()}
    with np.load(FIXTURES / f"{name}.npz") as file:
        arrays = {k: torch.from_numpy(v).to(DEVICE) for k, v in file.items()}
    return about["config"], state, torch.from_numpy(image(**about["image"])).to(DEVICE) if "image" in about else None, arrays


def close(a, b):
    torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0)


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
    positions = out.codes["positions"]
    _, scores = model.features(images)
    close(scores.flatten(1).gather(1, positions), want["scores"].gather(1, order))
    close(model.encoder(images), want["features"])
    close(sum(out.losses.values()), want["quant_loss"])
    close(model.demask(model.quantizer.lookup(out.codes["indices"]), positions, (16, 16)), want["demasked"])
    close(out.images, want["reconstruction"])


@pytest.mark.parametrize("name", ["dqvae_dual", "dqvae_triple", "dqvae_entropy"])
@torch.no_grad()
def test_dqvae(name):
    config, state, images, want = load(name)
    model = from_reference("dqvae", state, config)
    out = model(images)
    assert torch.equal(out.codes["grain"], want["grain"])
    assert torch.equal(out.codes["indices"], want["indices"])
    close(model.vectors(model.features(images), out.codes["grain"]).permute(0, 3, 1, 2), want["latents"])
    close(out.losses["codebook"] + out.losses["commitment"], want["quant_loss"])
    close(out.images, want["reconstruction"])
    if name == "dqvae_entropy":
        close(model.entropy(images), want["entropy"])
    else:
        features = [neck(x) for neck, x in zip(model.necks, model.down(images)[::-1])]
        close(model.router(features), want["gate"])
        close(out.losses["budget"], want["budget_loss_of_hard_gate"])


@torch.no_grad()
def test_gpt():
    config, state, _, want = load("gpt_taming")
    model, K = from_reference("gpt_taming", state, config), config["codebook_size"]
    codes = {"indices": want["indices"].view(-1, config["grid"], config["grid"])}
    close(model.logits(codes)["indices"], want["logits"][..., :K])


@pytest.mark.parametrize("name", ["stackformer", "stackformer_class"])
@torch.no_grad()
def test_stackformer(name):
    config, state, _, want = load(name)
    model, first = from_reference("stackformer", state, config), config["n_classes"]
    logits = model.logits({k: want[k] for k in ("indices", "positions")}, want.get("labels"))
    close(logits["indices"], want["value_logits"][..., first:first + config["codebook_size"]])
    close(logits["positions"], want["position_logits"][..., :config["grid"] ** 2])


@torch.no_grad()
def test_dq_transformer():
    config, state, _, want = load("dq_transformer")
    model, K, special = from_reference("dq_transformer", state, config), config["codebook_size"], config["special"]
    logits = model.logits({k: want[k] for k in ("indices", "grain")})
    first = 0
    for g, (name, side) in enumerate([("coarse", config["coarse_hw"]), ("fine", config["fine_hw"])]):
        length, columns = int(logits["length"][g][0]), [*range(side**2), special[f"{name}_position_eos"]]
        assert logits["length"][g].tolist() == [length] * 3
        close(logits["content"][g], want["content_logits"][:, first:first + length, :K])
        close(logits["position"][g], want["position_logits"][:, first:first + length + 1, columns])
        first += length + 2


@pytest.mark.parametrize("name", ["dq_transformer", "dq_transformer_ragged"])
def test_order_of_dq_transformer(name):
    config, _, _, want = load(name)
    model = DQTransformer(config["codebook_size"], [config["coarse_hw"], config["fine_hw"]], position_layers=1, content_layers=1,
                          n_head=1, n_embd=8, order=config["fine_position_order"]).to(DEVICE)
    codes = {k: want[k] for k in ("indices", "grain")}
    tokens = model.order(codes)
    for i in range(3):
        first = 1
        for g, part in enumerate(["coarse", "fine"]):
            length = int(tokens.counts[i, g])
            mine = slice(first, first + length)
            assert tokens.content[i, mine].tolist() == want[f"{part}_content"][i, :length].tolist()
            assert model.slot_cell[tokens.slot[i, mine]].tolist() == want[f"{part}_position"][i, :length].tolist()
            assert want[f"{part}_position"][i, length] == config["special"][f"{part}_position_eos"]  # nothing is left out
            assert model.slot_kind[tokens.slot[i, first + length]] == 2
            first += length + 2
    again = model.unorder(tokens)
    assert all(torch.equal(codes[k], again[k]) for k in codes)


@torch.no_grad()
def test_patchgan():
    config, state, images, want = load("patchgan")
    model = PatchGAN(config["ndf"], config["n_layers"]).eval().to(DEVICE)
    missing, unexpected = model.load_state_dict({k.removeprefix("main."): v for k, v in state.items()}, strict=False)
    assert not unexpected and all(k.endswith("num_batches_tracked") for k in missing)
    close(model(images), want["logits"])


@pytest.mark.parametrize("change, named", [
    (lambda s: s.pop("decoder.norm_out.weight"), "missing what becomes decoder.up.norm_out.weight"),
    (lambda s: s.update({"encoder.extra.weight": torch.zeros(1)}), "unknown encoder.extra.weight"),
    (lambda s: s.update({"quant_conv.bias": torch.zeros(3)}), "quant_conv.bias (3,) cannot become pre_quant.bias (32,)"),
    (lambda s: s.pop("encoder.mid.attn_1.k.weight"), "missing a part of what becomes encoder.neck.mid.attn.qkv.weight"),
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
