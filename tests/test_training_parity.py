"""One training step of the reference implementations: losses, gradients, codebook and statistics, on small networks."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fill import fill, image
from test_reference import DEVICE, FIXTURES, TOLERANCE

from convert import from_reference
from losses import PatchGAN, Stage1Loss

STAGE1 = ["vqgan_taming_train", "mqvae_train", "dqvae_dual_train", "dqvae_triple_train", "dqvae_entropy_train"]
STAGE2 = ["gpt_taming_train", "stackformer_train", "stackformer_class_train", "dq_transformer_train"]


def load(name):
    about = json.loads((FIXTURES / f"{name}.json").read_text())
    with np.load(FIXTURES / f"{name}.npz") as file:
        want = {k: torch.from_numpy(np.asarray(v)) for k, v in file.items()}
    return about, want, filled(about["parameters"])


def filled(shapes):
    return {name: torch.as_tensor(np.asarray(fill(name, tuple(shape)), np.float32)).reshape(shape) for name, shape in shapes.items()}


def reference_gradients(about, model):
    """Our gradients by the reference's names. Where each of our numbers comes from is seen by converting numbered weights."""
    first, numbers, total = {}, {}, 0
    for name, shape in about["parameters"].items():
        first[name], n = total, int(np.prod(shape))
        numbers[name] = torch.arange(total, total + n).float().view(shape)
        total += n
    assert total < 2**24  # float32 counts that far
    sources = dict(from_reference(about["kind"], numbers, dict(about["config"])).named_parameters())
    gradient = torch.zeros(total, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient.index_add_(0, sources[name].detach().long().flatten(), parameter.grad.flatten().double().cpu())
    return {name: gradient[first[name]:first[name] + x.numel()].view(x.shape) for name, x in numbers.items()}


def compare(gradients, names, norms, whole):
    """To 1e-3 of each gradient, or 1e-7 of all: biases before a norm have gradients that are rounding alone."""
    floor = 1e-4 * norms.double().norm()
    for name, norm in zip(names, norms.double()):
        assert abs(gradients[name].norm() - norm) <= 1e-3 * (norm + floor), name
    for name, want in whole.items():
        assert (gradients[name] - want.double()).norm() <= 1e-3 * (want.double().norm() + floor), name


def whole(want, prefix):
    return {name.removeprefix(prefix): x for name, x in want.items() if name.startswith(prefix)}


def same(ours, want, tolerance=TOLERANCE):
    ours, want = torch.as_tensor(ours).float().cpu(), torch.as_tensor(want).float()
    torch.testing.assert_close(ours, want, rtol=0, atol=tolerance * want.abs().max().item())


@pytest.mark.parametrize("name", STAGE1)
def test_stage1(name, monkeypatch):
    about, want, state = load(name)
    model = from_reference(about["kind"], state, dict(about["config"])).train().to(DEVICE)
    model.release_training = True
    if averages := "before:quantize.codebook.embed_ema" in want:
        model.quantizer.ema_sum.copy_(want["before:quantize.codebook.embed_ema"])
        model.quantizer.ema_count.copy_(want["before:quantize.codebook.cluster_size_ema"])

    def recorded_noise(logits, tau, hard, dim):
        assert (tau, hard, dim) == (1, True, 1)
        soft = (logits + want["gumbel"].to(DEVICE)).softmax(1)
        return F.one_hot(soft.argmax(1), soft.shape[1]).permute(0, 3, 1, 2) - soft.detach() + soft

    monkeypatch.setattr(F, "gumbel_softmax", recorded_noise)
    x = torch.from_numpy(image(**about["image"])).to(DEVICE)
    out = model(x)

    # Codes
    order = want["positions"].argsort(1) if "positions" in want else None  # the reference's are in order of score
    for key in out.codes:
        assert torch.equal(out.codes[key].cpu(), want[key] if order is None else want[key].gather(1, order)), key

    # Losses and gradients
    d, discriminator = about.get("discriminator"), None
    if d:
        discriminator = PatchGAN(d["ndf"], d["n_layers"]).to(DEVICE)
        filled_in = {k.removeprefix("main."): v for k, v in filled(d["parameters"]).items()}
        missing, unknown = discriminator.load_state_dict(filled_in, strict=False)
        assert not unknown and all(k.endswith("num_batches_tracked") for k in missing)
    criterion = Stage1Loss("l1", 0.0, "hinge", disc_weight=d["disc_weight"] if d else 0.0).to(DEVICE)
    loss, parts = criterion.generator(x, out, model.last_layer, discriminator, 0)
    loss.backward()
    parts |= {"l1_loss": parts["l1"], "quant_loss": parts["codebook"] + parts["commitment"]}
    for ours, theirs in {"loss": "loss", "l1_loss": "l1_loss", "quant_loss": "quant_loss", "budget": "budget_loss", "gan": "gan_loss",
                         "gan_weight": "gan_weight"}.items():
        assert (ours in parts) == (theirs in want)
        if ours in parts:
            same(parts[ours], want[theirs])
    compare(reference_gradients(about, model), about["grad_names"], want["grad_norm"], whole(want, "grad:"))

    if d:
        discriminator.zero_grad()
        loss, parts = criterion.discriminator(x, out.images, discriminator)
        loss.backward()
        for key in ("d_loss", "d_real", "d_fake"):
            same(parts[key], want[key])
        compare({f"main.{k}": p.grad.double().cpu() for k, p in discriminator.named_parameters()}, about["disc_grad_names"],
                want["disc_grad_norm"], whole(want, "disc_grad:"))
        for key, value in whole(want, "disc_after:main.").items():
            same(discriminator.state_dict()[key], value, TOLERANCE / 10)

    # What the forward pass changed
    if averages:
        same(model.quantizer.codebook.detach(), want["after:quantize.codebook.weight"][:-1], TOLERANCE / 10)  # the last row is padding
        same(model.quantizer.ema_sum, want["after:quantize.codebook.embed_ema"], TOLERANCE / 10)
        same(model.quantizer.ema_count, want["after:quantize.codebook.cluster_size_ema"], TOLERANCE / 10)
    if name == "mqvae_train":
        for key in ("running_mean", "running_var"):
            same(getattr(model.score_net.norm, key), want[f"after:masker.score_pred_net.4.{key}"], TOLERANCE / 10)


@pytest.mark.parametrize("name", STAGE2)
def test_stage2(name):
    about, want, state = load(name)
    model = from_reference(about["kind"], state, dict(about["config"])).train().to(DEVICE)
    codes = {k: want[k].to(DEVICE) for k in ("indices", "positions", "grain") if k in want}
    if name == "gpt_taming_train":
        codes["indices"] = codes["indices"].unflatten(1, (about["config"]["grid"],) * 2)
    out = model(codes, want["labels"].to(DEVICE) if "labels" in want else None)
    out["loss"].backward()
    same(out["loss"].detach(), want["loss"])
    for key in ("code", "content", "position"):
        if f"{key}_loss" in want:
            same(out[key], want[f"{key}_loss"])
    compare(reference_gradients(about, model), about["grad_names"], want["grad_norm"], whole(want, "grad:"))


@pytest.mark.parametrize("name", ["mqvae_train", "dqvae_dual_train"])
def test_our_training_is_another(name):
    """So release_training does something, and evaluation is the same with either."""
    def loss(out):
        return out.images.square().mean() + sum(out.losses.values())

    about, want, state = load(name)
    model = from_reference(about["kind"], state, dict(about["config"]))
    x = torch.from_numpy(image(**about["image"]))
    with torch.no_grad():
        ours = model(x).images
        model.release_training = True
        assert torch.equal(model(x).images, ours)
    model.train().release_training = False
    torch.manual_seed(0)
    loss(model(x)).backward()
    scores = model.score_net.conv2 if name == "mqvae_train" else model.router.fc2
    gradient = scores.weight.grad.clone()
    model.zero_grad()
    model.release_training = True
    torch.manual_seed(0)
    loss(model(x)).backward()
    assert (scores.weight.grad - gradient).norm() > 0.1 * gradient.norm()
