"""quantizers.py: identities, gradients, and vector-quantize-pytorch on the same weights where it has the method."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_MODELS, copy_test, write_tiny

import quantizers
from harness.config import UserError, load_class
from harness.models import QUANTIZERS
from mqvae import MQVAE
from quantizers import BSQ, FSQ, IBQ, LFQ, ResidualVQ, SimVQ
from vqgan import VQGAN, VectorQuantizer, rotate

ALL = {
    "vq": lambda: VectorQuantizer(32, 8), "rotation": lambda: VectorQuantizer(32, 8, rotation=True),
    "ema": lambda: VectorQuantizer(32, 8, ema_decay=0.9), "fsq": lambda: FSQ([4, 3, 2]), "lfq": lambda: LFQ(5, group_bits=2),
    "bsq": lambda: BSQ(5), "simvq": lambda: SimVQ(32, 8), "ibq": lambda: IBQ(32, 8),
    "residual": lambda: ResidualVQ(32, 8, 3), "shared": lambda: ResidualVQ(32, 8, 3, shared=True, ema_decay=0.9)}


def vectors(dim, *shape, seed=0):
    return torch.randn(*(shape or (6, 7)), dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ALL)
def test_contract(name):
    torch.manual_seed(0)
    quantizer = ALL[name]()
    z = vectors(quantizer.dim).requires_grad_()
    quantizer(z)  # EMA: codes become vectors
    quantizer.eval()
    z_q, indices, losses, info = quantizer(z)
    assert z_q.shape == z.shape and z_q.dtype == torch.float32 and indices.dtype == torch.int64
    assert indices.shape == z.shape[:-1] + ((3,) if quantizer.depth else ())
    assert torch.equal(indices, quantizer.nearest(z)) and torch.equal(quantizer.lookup(indices), z_q.detach())
    assert indices.min() >= 0 and indices.max() < quantizer.codebook_size and {"usage", "perplexity"} <= info.keys()
    with torch.autocast("cpu", torch.bfloat16):
        again = quantizer(z)
        assert torch.equal(again[0], z_q) and torch.equal(quantizer.nearest(z), indices) and torch.equal(quantizer.lookup(indices), z_q)
    rows = [quantizer(row) for row in z]
    torch.testing.assert_close(torch.stack([row[0] for row in rows]), z_q)  # SimVQ's product rounds
    # Every gradient that should be there
    quantizer.train()
    z_q, _, losses, _ = quantizer(z)
    ((z_q * vectors(quantizer.dim, seed=1)).sum() + sum(losses.values())).backward()
    assert z.grad.isfinite().all() and (z.grad != 0).any(-1).all()
    learned = [p for p in quantizer.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learned)
    assert bool(learned) == (name not in ("ema", "fsq", "lfq", "bsq", "shared"))
    assert 0 < quantizer(z)[3]["usage"] <= 1


@pytest.mark.parametrize("name", ALL)
def test_a_nan_gives_a_loss_or_output_that_is_nan(name):
    """Which skips the step; no index out of range."""
    quantizer, z = ALL[name](), vectors(ALL[name]().dim)
    z[0, 0, 0] = math.nan
    z_q, indices, losses, _ = quantizer.train()(z)
    assert indices.min() >= 0 and indices.max() < quantizer.codebook_size
    assert not (z_q.sum() + sum(losses.values())).isfinite()


@pytest.mark.parametrize("quantizer", [FSQ([8, 5, 2, 7]), LFQ(9), BSQ(9)], ids=["fsq", "lfq", "bsq"])
def test_all_codes_can_be_chosen(quantizer):
    every = torch.arange(quantizer.codebook_size)
    codes = quantizer.lookup(every)
    assert len(codes.unique(dim=0)) == len(every) and codes.abs().max() <= 1
    found = quantizer.nearest(vectors(quantizer.dim, 200_000) * 2)
    assert torch.equal(found.unique(), every)
    if not isinstance(quantizer, FSQ):
        assert torch.equal(quantizer.nearest(codes), every)


def test_fsq_is_the_papers_code():
    """Appendix A.1, also its gradient."""
    levels = [8, 5, 4, 2]
    quantizer, z = FSQ(levels), vectors(4, 500).requires_grad_()
    L = torch.tensor(levels, dtype=torch.float64)
    half = (L - 1) * (1 - 1e-3) / 2
    offset = torch.where(L % 2 == 1, 0.0, 0.5).double()
    bounded = torch.tanh(z.double() + torch.tan(offset / half)) * half - offset
    want = (bounded + (bounded.round() - bounded).detach()) / (L // 2)
    z_q, indices, losses, _ = quantizer(z)
    torch.testing.assert_close(z_q.double(), want)
    basis = torch.tensor([1, 8, 40, 160])
    assert torch.equal(indices, ((want * (L // 2) + L // 2) * basis).sum(-1).round().long()) and losses == {}
    weight = vectors(4, 500, seed=1)
    torch.testing.assert_close(*(torch.autograd.grad((x * weight).sum(), z, retain_graph=True)[0] for x in (z_q, want)))


def test_fsq_equals_the_library_where_it_follows_the_paper():
    """The library bounds a little wider (1 + 1e-3) and shifts even levels by atanh instead of tan. Indices and codes are numbered alike."""
    from vector_quantize_pytorch import FSQ as Library

    library, ours = Library([8, 5, 5, 3]), FSQ([8, 5, 5, 3])
    every = torch.arange(ours.codebook_size)
    torch.testing.assert_close(library.indices_to_codes(every), ours.lookup(every))
    library, ours = Library([7, 5, 3]), FSQ([7, 5, 3])
    z = vectors(3, 1, 2000).requires_grad_()
    (want, found), (z_q, indices, _, _) = library(z), ours(z)
    assert (found == indices).float().mean() > 0.98  # other bounds move the edges between two levels
    weight = vectors(3, 1, 2000, seed=1)
    a, b = (torch.autograd.grad((x * weight).sum(), z, retain_graph=True)[0] for x in (want, z_q))
    torch.testing.assert_close(a / 1.001, b / 0.999, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_sign_codes_equal_the_librarys(spherical, temperature):
    """With all channels in one group the entropies are those of the whole codebook."""
    from vector_quantize_pytorch import LFQ as Library

    library = Library(dim=6, spherical=spherical, entropy_loss_weight=0.1, commitment_loss_weight=0.25).train()
    ours = (BSQ if spherical else LFQ)(6, entropy_temperature=temperature, group_bits=6, beta=0.25).train()
    z = (vectors(6, 4, 50) * 0.3).requires_grad_()
    want = library(z, inv_temperature=1 / temperature)
    z_q, indices, losses, _ = ours(z)
    scale = 6**-0.5 if spherical else 1.0
    if spherical:  # the library's entropy takes codes of length 1, and so do we
        torch.testing.assert_close(z_q.norm(dim=-1), torch.ones(4, 50))
    torch.testing.assert_close(want[0], z_q)
    assert torch.equal(want[1], indices) and (z_q.abs() - scale).abs().max() < 1e-6
    # The library clamps probabilities at 1e-5 in both entropies, we in one
    tolerance = dict(atol=1e-5, rtol=1e-5) if temperature == 1 else dict(atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(want[2], sum(losses.values()), **tolerance)
    a, b = (torch.autograd.grad(x, z, retain_graph=True)[0] for x in (want[2], sum(losses.values())))
    torch.testing.assert_close(a, b, **tolerance)


def test_entropies_in_groups():
    """The first is exact in any groups; the second is the sum of the groups'."""
    z = vectors(6, 300) * 0.2
    ours, parts = LFQ(6, entropy_temperature=1.0, group_bits=6), LFQ(6, entropy_temperature=1.0, group_bits=2)
    p = torch.softmax(2 * z @ ours.lookup(torch.arange(64)).t(), 1)
    each, mean = -(p * p.log()).sum(1).mean(), p.mean(0)
    torch.testing.assert_close(ours._entropy(z), each + (mean * mean.log()).sum())
    marginals = [mean.view(4, 4, 4).sum(dim).flatten() for dim in ((1, 2), (0, 2), (0, 1))]
    torch.testing.assert_close(parts._entropy(z), each + sum((m * m.log()).sum() for m in marginals))


def test_simvq_equals_the_librarys():
    from vector_quantize_pytorch import SimVQ as Library

    for rotation in (False, True):
        library, ours = Library(dim=8, codebook_size=32, rotation_trick=rotation), SimVQ(32, 8, rotation=rotation)
        with torch.no_grad():
            library.frozen_codebook.copy_(ours.frozen)
            library.code_transform.weight.copy_(ours.projection.weight)
        z, weight = vectors(8, 2, 40).requires_grad_(), vectors(8, 2, 40, seed=1)
        want, (z_q, indices, losses, _) = library(z), ours(z)
        torch.testing.assert_close(want[0], z_q, atol=1e-5, rtol=1e-5)
        assert torch.equal(want[1], indices)
        torch.testing.assert_close(want[2], sum(losses.values()), atol=1e-6, rtol=1e-5)
        grads = [torch.autograd.grad((out * weight).sum() + loss, [z, w], retain_graph=True)
                 for out, loss, w in ((want[0], want[2], library.code_transform.weight),
                                      (z_q, sum(losses.values()), ours.projection.weight))]
        if rotation:  # the library's codes also get the gradient of the output, by their norm; the paper has none
            grads = [each[:1] for each in grads]
        torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-5)


def test_residual_equals_the_librarys():
    from vector_quantize_pytorch import ResidualVQ as Library

    ours = ResidualVQ(16, 8, 3, beta=0.25).eval()
    library = Library(dim=8, num_quantizers=3, codebook_size=16, learnable_codebook=True, ema_update=False, commitment_weight=1.0,
                      rotation_trick=False).eval()
    for theirs, layer in zip(library.layers, ours.layers):
        layer.codebook.data.normal_(std=0.5)
        theirs._codebook.embed.data.copy_(layer.codebook.data.unsqueeze(0))
        theirs._codebook.initted.fill_(True)
    z = vectors(8, 2, 40)
    want, indices, _ = library(z)
    z_q, found, losses, _ = ours(z)
    assert torch.equal(indices, found)
    torch.testing.assert_close(want, z_q, atol=1e-5, rtol=1e-5)
    partial, total = torch.zeros_like(z), 0
    for layer, index in zip(ours.layers, found.unbind(-1)):  # eq. 6 of RQ-VAE, and the codebooks' part
        partial = partial + layer.lookup(index)
        total = total + 1.25 * (z - partial).square().mean()
    torch.testing.assert_close(sum(losses.values()), total)


def test_a_shared_residual_codebook_learns_from_all_depths():
    shared, alone = ResidualVQ(16, 4, 3, shared=True, ema_decay=0.9, restart=False), VectorQuantizer(16, 4, ema_decay=0.9, restart=False)
    alone.load_state_dict(shared.layers[0].state_dict())
    z = vectors(4, 100)
    rest, all_rest = z, []
    for _ in range(3):
        all_rest.append(rest)
        rest = rest - alone.lookup(alone.nearest(rest))
    shared(z)
    alone(torch.cat(all_rest))
    torch.testing.assert_close(shared.layers[0].codebook, alone.codebook)
    shared.accumulation_steps = 2
    before = shared.layers[0].codebook.clone()
    shared(z)
    assert torch.equal(before, shared.layers[0].codebook)
    shared(z)
    assert not torch.equal(before, shared.layers[0].codebook)


def test_the_rotation_trick_is_the_papers():
    """A constant map R with R z = e, a rotation in the plane of both times |e| / |z|: gradients are R^T g; and as the library's."""
    from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

    z, e, g = vectors(5, 7).requires_grad_(), vectors(5, 7, seed=1), vectors(5, 7, seed=2)
    out = rotate(z, e)
    torch.testing.assert_close(out, e)
    got = torch.autograd.grad((out * g).sum(), z)[0]
    torch.testing.assert_close(got, torch.autograd.grad((rotate_to(z, e) * g).sum(), z)[0])
    for row, target, grad, back in zip(z.detach(), e, g, got):
        R = torch.autograd.functional.jacobian(lambda x, target=target: rotate(x.view(1, -1), target.view(1, -1))[0], row)
        scale = target.norm() / row.norm()
        torch.testing.assert_close(R @ R.t(), scale**2 * torch.eye(5), atol=1e-5, rtol=1e-4)  # no reflection, no stretching:
        assert torch.linalg.det(R / scale).item() == pytest.approx(1, abs=1e-4)
        torch.testing.assert_close(R.t() @ grad, back, atol=1e-5, rtol=1e-4)


def test_ibq_is_the_papers():
    """Straight-through over the softmax: one-hot in the forward pass, its gradient in the backward pass."""
    ours = IBQ(32, 8, entropy_weight=0)
    z, weight = vectors(8, 30).requires_grad_(), vectors(8, 30, seed=1)
    logits = z @ ours.codebook.t()
    p, hard = logits.softmax(1), F.one_hot(logits.argmax(1), 32).float()
    want = (hard - p.detach() + p) @ ours.codebook
    losses = ((want - z).square().mean() + (hard @ ours.codebook - z.detach()).square().mean()
              + 0.25 * ((hard @ ours.codebook).detach() - z).square().mean())
    z_q, indices, found, _ = ours(z)
    torch.testing.assert_close(z_q, want)
    assert torch.equal(indices, logits.argmax(1))
    torch.testing.assert_close(sum(found.values()), losses)
    a, b = (torch.autograd.grad((x * weight).sum() + loss, [z, ours.codebook], retain_graph=True)
            for x, loss in ((z_q, sum(found.values())), (want, losses)))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    assert (b[1] != 0).any(1).all()  # all codes learn
    want = torch.autograd.grad(found["codebook"], ours.codebook)[0].norm(dim=1)
    torch.testing.assert_close(quantizers.gradient_norms(ours, z, indices), want)


@pytest.mark.parametrize("settings, sentence", [
    (lambda: FSQ([8, 1]), "levels must be at least 2 and make at most 2.24 codes; they are .8, 1."),
    (lambda: FSQ([4] * 13), "at most 2.24"),
    (lambda: LFQ(25), "bits must be between 1 and 24; they are 25"), (lambda: BSQ(0), "bits must be"),
    (lambda: ResidualVQ(8, 4, 0), "depth must be at least 1"),
    (lambda: MQVAE(32, 32, [1, 2], quantizer=ResidualVQ(8, 4)), "MQ-VAE cannot read several codes per cell"),
])
def test_bad_settings_are_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        settings()
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# In the scripts

IN_CONFIG = {"vq": "codebook_size: 32, dim: 8, rotation: true", "fsq": "levels: [4, 3, 3]", "lfq": "bits: 5", "bsq": "bits: 5",
             "simvq": "codebook_size: 32, dim: 8", "ibq": "codebook_size: 32, dim: 8", "residual": "codebook_size: 32, dim: 8, depth: 2"}


def config_of(tmp_path, model, name):
    lines = TINY_MODELS[model]
    old = next(line for line in lines.splitlines() if "quantizer:" in line)
    return write_tiny(tmp_path, model=lines.replace(old, f"  quantizer: {{name: {name}, {IN_CONFIG[name]}}}"))


@pytest.mark.parametrize("name", IN_CONFIG)
@pytest.mark.parametrize("model", ["vqgan", "mqvae", "dqvae_entropy"])
def test_every_model_trains_with_every_quantizer_and_resumes_exactly(train, tmp_path, capsys, model, name):
    import evaluate
    import visualize
    from harness.models import load_run

    config = config_of(tmp_path, model, name)
    if name == "residual" and model != "vqgan":
        with pytest.raises(UserError, match="cannot read several codes per cell"):
            train(config=config)
        return
    learned = name in ("vq", "simvq", "ibq")
    same = [f"train.{key}_steps=4" for key in ("max_train", "validation", "checkpointing")]
    parts = [*same, f"train.output_dir={tmp_path}/parts", *(["train.codebook_stats_every=2"] if learned else [])]  # it changes nothing
    train(*same, f"train.output_dir={tmp_path}/whole", config=config)
    train(*parts, "train.max_minutes=0", resume="auto", config=config)
    train(*parts, resume="auto", config=config)
    whole, parts = (load_run(tmp_path / folder)[0] for folder in ("whole", "parts"))
    one, other = whole.state_dict(), parts.state_dict()
    assert type(whole.quantizer) is load_class(QUANTIZERS[name]) and [k for k in one if not torch.equal(one[k], other[k])] == []
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        codes = whole.encode(images)
        torch.testing.assert_close(whole.decode(codes), whole(images).images)
    if model == "vqgan":
        visualize.main(["recon", "--run", str(tmp_path / "whole"), "-n", "2", "--dpi", "50"])
        number = 64 * (2 if name == "residual" else 1)
        assert whole.bits(codes).tolist() == pytest.approx([number * math.log2(whole.quantizer.codebook_size)] * 2)
    run = ["--run", str(tmp_path / "whole")]
    evaluate.main([*run, "--without", "lpips", "inception", "--num_workers", "0"])
    visualize.main(["codes", *run, "-n", "2", "--dpi", "50"])
    visualize.main(["interactive", *run, "-n", "2"])
    assert hasattr(whole.quantizer, "codebook") == learned
    if learned:
        visualize.main(["codebook", *run, "--images", "4", "--dpi", "50"]) if model == "vqgan" else None
        assert len(list((tmp_path / "parts/codebook").glob("*.npz"))) == 2
    else:
        for call in (lambda: visualize.main(["codebook", *run]), lambda: train("train.codebook_stats_every=3", config=config)):
            with pytest.raises(UserError, match="codebook of learned vectors"):
                call()


@pytest.mark.parametrize("words, sentence", [
    (["model.quantizer.name=fqs"], f"model.quantizer.name must be one of {', '.join(QUANTIZERS)}; it is 'fqs'"),
    (["model.quantizer={name: simvq, restart: true}"], "model.quantizer.restart is not a setting of SimVQ, which has codebook_size, dim"),
    (["model.quantizer={name: fsq, levels: [8, 1]}"], r"model.quantizer.levels\[1\] must be between 2 and"),
    (["model.quantizer={name: lfq, bits: 25}"], "model.quantizer.bits must be between 1 and 24; it is 25"),
    (["model.quantizer={name: bsq, bit: 5}"], "unknown key model.quantizer.bit; the nearest valid one is model.quantizer.bits"),
])
def test_bad_configs_are_one_sentence(train, words, sentence):
    with pytest.raises(UserError, match=sentence):
        train(*words)


def test_usage_is_of_each_codebook(train, tmp_path):
    import json

    import evaluate
    from harness.models import load_run, save_run

    train("train.max_train_steps=1", config=config_of(tmp_path, "vqgan", "residual"))
    model, config = load_run(tmp_path / "run")
    for layer in model.quantizer.layers:
        layer.codebook.data[1:] = 1e3  # no vector is there
    save_run(tmp_path / "one", config, {"model": model})
    evaluate.main(["--run", str(tmp_path / "one"), "--without", "lpips", "inception", "--num_workers", "0"])
    found = json.loads((tmp_path / "one/metrics.json").read_text())
    assert found["usage"] == pytest.approx(1 / 32) and found["perplexity"] == pytest.approx(1)


def test_a_transformer_refuses_a_residual_one(train, train2, tmp_path):
    from conftest import write_tiny2

    train("train.max_train_steps=1", config=config_of(tmp_path, "vqgan", "residual"))
    with pytest.raises(UserError, match="a GPT reads one code per cell; this stage-1 model has 2"):
        train2(write_tiny2(tmp_path, "gpt"), f"codes.stage1={tmp_path}/run")


@pytest.mark.parametrize("name, stage1, quantizer, factors", [("gpt", "vqgan", "lfq, bits: 14", [128, 128]),
                                                               ("stackformer", "mqvae", "fsq, levels: [8, 5, 5, 5]", [8, 125]),
                                                               ("dq_transformer", "dqvae_entropy", "bsq, bits: 12", [16, 16, 16])])
def test_large_codebooks_in_stage2(train, train2, tmp_path, name, stage1, quantizer, factors):
    """Trained, resumed exactly, sampled and measured by digits; without, the model would have K rows."""
    import json

    from conftest import write_tiny2

    import evaluate
    import sample
    from harness.models import load_run

    lines = TINY_MODELS[stage1]
    old = next(line for line in lines.splitlines() if "quantizer:" in line)
    train("train.max_train_steps=1", f"train.output_dir={tmp_path}/large",
          config=write_tiny(tmp_path, model=lines.replace(old, f"  quantizer: {{name: {quantizer}}}")))
    words = [f"codes.stage1={tmp_path}/large", f"model.codebook_factors={factors}"]
    config = write_tiny2(tmp_path, name)
    train2(config, *words, f"train.output_dir={tmp_path}/whole")
    train2(config, *words, "train.max_minutes=0")
    train2(config, *words, resume="auto")
    one, other = (load_run(tmp_path / folder)[0] for folder in ("whole", "run2"))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))
    assert one.codebook_size == math.prod(factors) and sum(p.numel() for p in one.parameters()) < 16 * math.prod(factors)
    run = ["--run", str(tmp_path / "run2")]
    sample.main([*run, "-n", "2"])
    evaluate.main([*run, "--without", "inception", "--num_workers", "0", "-n", "2"])
    assert json.loads((tmp_path / "run2/metrics.json").read_text())["bits"] > 0
    with pytest.raises(UserError, match="codebook_factors must be numbers whose product is codebook_size"):
        train2(config, words[0], "model.codebook_factors=[7,11]", f"train.output_dir={tmp_path}/bad")


@pytest.mark.parametrize("name", ["lfq", "ibq", "simvq", "residual"])
def test_two_processes_equal_one(tmp_path, name):
    """Gradients of a batch are the mean of its halves', each in a process of its own."""
    torch.multiprocessing.start_processes(_half, (str(tmp_path), name), nprocs=2, start_method="forkserver")
    torch.manual_seed(0)
    quantizer, z = ALL[name](), vectors(ALL[name]().dim, 40).requires_grad_()
    quantizer.load_state_dict(torch.load(tmp_path / "weights.pt"))
    loss = sum(quantizer(z)[2].values())
    loss.backward()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(sum(p["loss"] for p in parts) / 2, loss.detach())
    torch.testing.assert_close(torch.cat([p["z"] for p in parts]) / 2, z.grad)
    for key, p in quantizer.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(sum(part[key] for part in parts) / 2, p.grad)


def _half(rank, folder, name):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    quantizer = ALL[name]()
    z = vectors(quantizer.dim, 40)[rank * 20:][:20].requires_grad_()
    loss = sum(quantizer(z)[2].values())
    loss.backward()
    if rank == 0:
        torch.save(quantizer.state_dict(), f"{folder}/weights.pt")
    torch.save({"loss": loss.detach(), "z": z.grad} | {k: p.grad for k, p in quantizer.named_parameters()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_copy(tmp_path):
    copy_test(tmp_path, ["quantizers.py", "vqgan.py"], "from quantizers import *",
              *(f"VQGAN(32, 32, [1, 2], 1, [], 32, quantizer={q})" for q in (
                  "FSQ([8, 5])", "LFQ(6)", "BSQ(6)", "SimVQ(32, 8)", "IBQ(32, 8)", "ResidualVQ(32, 8, 2)")))


def test_the_names_are_those_of_the_docstring():
    kinds = [path.split(".")[1] for name, path in QUANTIZERS.items() if name != "vq"]
    assert all(f"    {kind} " in quantizers.__doc__ for kind in kinds)
    assert isinstance(VQGAN(32, 32, [1, 2], 1, [], 32, FSQ([4, 4])).quantizer, FSQ)
