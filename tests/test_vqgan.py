
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, copy_test, forked

from quantizers import gradient_norms
from vqgan import VQGAN, VQVAE, VectorQuantizer

SMALL = dict(image_size=32, ch=32, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[16], z_channels=32)


def models(**quantizer):
    q = dict(codebook_size=64, dim=16) | quantizer
    return [VQGAN(**SMALL, quantizer=VectorQuantizer(**q)), VQVAE(ch=32, quantizer=VectorQuantizer(**q))]


@pytest.mark.parametrize("quantizer", [{}, {"ema_decay": 0.9}, {"l2_norm": True}, {"l2_norm": True, "ema_decay": 0.9},
                                       {"entropy_weight": 0.1}, {"legacy": True}])
def test_contract(quantizer):
    images = torch.rand(2, 3, 32, 64) * 2 - 1
    for model in models(**quantizer):
        out = model(images)
        assert out.images.shape == images.shape
        assert {"codebook", "commitment"} <= out.losses.keys() and all(v.ndim == 0 for v in out.losses.values())
        (out.images.square().mean() + sum(out.losses.values())).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        assert model.last_layer.grad is not None

        model.eval()
        with torch.no_grad():
            out, codes = model(images), model.encode(images)
            assert codes.keys() == out.codes.keys() == {"indices"}
            assert codes["indices"].dtype == torch.int64
            assert codes["indices"].shape == (2, 32 // model.factor, 64 // model.factor)
            assert torch.equal(codes["indices"], out.codes["indices"])
            assert torch.equal(model.decode(codes), out.images)
            assert model.bits(codes).tolist() == [6.0 * codes["indices"][0].numel()] * 2


def test_straight_through():
    quantizer = VectorQuantizer(16, 4)
    z = torch.randn(5, 4, requires_grad=True)
    z_q, indices, _, _ = quantizer(z)
    assert torch.equal(z_q, quantizer.codebook[indices])
    g = torch.randn(5, 4)
    assert torch.equal(torch.autograd.grad(z_q, z, g)[0], g)


@pytest.mark.parametrize("l2_norm", [False, True])
def test_nearest_is_nearest(l2_norm):
    quantizer = VectorQuantizer(300, 8, l2_norm=l2_norm)
    z = torch.randn(7, 11, 8) * 0.01
    vectors, codes = (F.normalize(x, dim=-1) if l2_norm else x for x in (z, quantizer.codebook.detach()))
    want = torch.cdist(vectors.double(), codes.double()).argmin(-1)
    assert torch.equal(quantizer.nearest(z), want)
    quantizer.CHUNK = 1000  # several chunks, the last one smaller
    assert torch.equal(quantizer.nearest(z), want)


def test_large_codebook_needs_little_memory(tmp_path):
    """16,384 codes and 32,768 vectors: no 2 GB distance matrix."""
    (tmp_path / "large.py").write_text("import resource, torch, vqgan; q = vqgan.VectorQuantizer(16384, 8); z = torch.randn(32768, 8);"
                                       "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; i = q(z)[1];"
                                       "print(i.shape, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)")
    *_, shape, mib = forked(tmp_path, tmp_path / "large.py").rsplit(maxsplit=1)
    assert "32768" in shape and int(mib) < 700


def test_losses_by_hand():
    z = torch.randn(6, 4, requires_grad=True)
    for legacy in (False, True):
        quantizer = VectorQuantizer(8, 4, beta=0.3, legacy=legacy)
        _, indices, losses, _ = quantizer(z)
        distance = (z - quantizer.codebook[indices]).square().mean()
        torch.testing.assert_close(losses["codebook"], distance * (0.3 if legacy else 1))
        torch.testing.assert_close(losses["commitment"], distance * (1 if legacy else 0.3))
        assert torch.autograd.grad(losses["codebook"], z, retain_graph=True, allow_unused=True)[0] is None
        assert torch.autograd.grad(losses["commitment"], quantizer.codebook, allow_unused=True)[0] is None
        weight = torch.tensor([0.0, 1, 0, 0, 0, 0])
        weighted = quantizer(z, loss_weight=weight)[2]["codebook"]
        torch.testing.assert_close(weighted, (z - quantizer.codebook[indices])[1].square().mean() / 6 * (0.3 if legacy else 1))


def test_ema_equals_the_one_hot_formula():
    quantizer = VectorQuantizer(8, 4, ema_decay=0.9, restart=False)
    codebook, count, total = quantizer.codebook.clone(), torch.ones(8), quantizer.codebook.clone()
    for _ in range(3):
        z, before = torch.randn(50, 4), quantizer.codebook.clone()
        z_q, indices, _, _ = quantizer(z)
        assert torch.equal(z_q, before[indices])  # looked up before the update
        one_hot = F.one_hot(indices, 8).float()
        count = 0.9 * count + 0.1 * one_hot.sum(0)
        total = 0.9 * total + 0.1 * one_hot.t() @ z
        n = count.sum()
        codebook = total / ((count + 1e-5) / (n + 8e-5) * n).unsqueeze(1)
        torch.testing.assert_close(quantizer.codebook.data, codebook)
    after = quantizer.codebook.clone()
    quantizer.eval()(z)
    assert torch.equal(after, quantizer.codebook)


def test_ema_weight_counts_vectors():
    z = torch.randn(20, 4)
    a, b = (VectorQuantizer(4, 4, ema_decay=0.9, restart=False) for _ in range(2))
    b.load_state_dict(a.state_dict())
    a(torch.cat([z, z[:5]]))
    b(z, ema_weight=torch.tensor([2.0] * 5 + [1.0] * 15))
    torch.testing.assert_close(a.codebook.data, b.codebook.data)


def test_dead_codes_restart_as_current_vectors():
    quantizer = VectorQuantizer(16, 4, ema_decay=0.99)
    with torch.no_grad():
        quantizer.codebook[0] = 100
    z = torch.randn(40, 4) + 100  # the first code takes all vectors, the others are dead
    quantizer(z)
    distance = torch.cdist(quantizer.codebook.data, z, compute_mode="donot_use_mm_for_euclid_dist").min(1).values
    assert (distance < 1e-3).sum() >= 15 and quantizer.codebook.data.unique(dim=0).shape[0] == 16
    assert (quantizer.ema_count >= 1).all()
    few = VectorQuantizer(16, 4, ema_decay=0.99)
    few(z[:3])  # fewer vectors than codes: repeated, with noise
    assert torch.cdist(few.codebook.data, z[:3]).min(1).values.max() < 0.02
    assert few.codebook.data.unique(dim=0).shape[0] == 16


@pytest.mark.parametrize("weighted", [False, True])
def test_micro_batches_equal_one_batch(weighted):
    """Gradient accumulation: one EMA update per step from the vectors of all micro-batches, restarts included."""
    whole, parts = (VectorQuantizer(16, 4, ema_decay=0.9, queue_size=50) for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    parts.accumulation_steps = 4
    for step in range(3):
        z, weight = torch.randn(40, 4), torch.randint(2, (40,)) if weighted else None
        torch.manual_seed(step)
        whole(z, ema_weight=weight)
        torch.manual_seed(step)
        for i in range(4):
            before = parts.codebook.clone()
            parts(z[i * 10:i * 10 + 10], ema_weight=None if weight is None else weight[i * 10:i * 10 + 10])
            assert i == 3 or torch.equal(parts.codebook, before)
        assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values()))
    assert (whole.ema_count == 1).any()  # some codes did restart


@pytest.mark.parametrize("restart", [False, True])
def test_micro_batches_of_two_processes_equal_one_batch(tmp_path, restart):
    (tmp_path / "ema.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from vqgan import VectorQuantizer
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.manual_seed(0)
quantizer, z = VectorQuantizer(16, 4, ema_decay=0.6, restart={restart}), torch.randn(2, 3, 10, 4)
quantizer.accumulation_steps = 3
for part in z[rank]:
    quantizer(part)
torch.save([quantizer.codebook.data, quantizer.ema_count], f"{tmp_path}/{{rank}}.pt")
torch.distributed.destroy_process_group()
""")
    forked(tmp_path, tmp_path / "ema.py", processes=2)
    torch.manual_seed(0)
    quantizer, z = VectorQuantizer(16, 4, ema_decay=0.6, restart=restart), torch.randn(2, 3, 10, 4).flatten(0, 2)
    quantizer(z)
    for rank in range(2):
        codebook, count = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(count, quantizer.ema_count)
        new = quantizer.ema_count == 1 if restart else torch.zeros(16, dtype=torch.bool)
        torch.testing.assert_close(codebook[~new], quantizer.codebook.data[~new])
        if restart:
            assert new.any() and torch.cdist(codebook[new], z, compute_mode="donot_use_mm_for_euclid_dist").min(1).values.max() < 1e-4


def test_overflow_does_not_enter_the_codebook():
    quantizer = VectorQuantizer(8, 4, ema_decay=0.9)
    quantizer(torch.randn(20, 4))
    before = quantizer.codebook.clone()
    quantizer(torch.full((20, 4), float("inf")))
    assert torch.equal(before, quantizer.codebook)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_are_chosen_in_float32_under_autocast(dtype):
    quantizer = VectorQuantizer(512, 64)
    with torch.no_grad():  # codes closer than half precision resolves
        quantizer.codebook.copy_(1 + 1e-4 * torch.randn(512, 64))
    z = 1 + 1e-4 * torch.randn(200, 64)
    want = quantizer.nearest(z)
    with torch.autocast("cpu", dtype):
        z_q, indices, losses, _ = quantizer(z)
        rounded = torch.addmm(quantizer.codebook.square().sum(1), z, quantizer.codebook.t(), alpha=-2).argmin(1)
    assert torch.equal(indices, want) and z_q.dtype == losses["codebook"].dtype == torch.float32
    assert not torch.equal(rounded, want)  # the test can tell the difference


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_step_is_finite(dtype):
    for model in models(ema_decay=0.9):
        with torch.autocast("cpu", dtype):
            out = model(torch.rand(2, 3, 32, 32) * 2 - 1)
            loss = out.images.float().square().mean() + sum(out.losses.values())
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_usage_and_perplexity():
    quantizer = VectorQuantizer(8, 4, queue_size=10)
    assert quantizer.usage() == 0
    quantizer.record(torch.tensor([[1, 1], [2, 3]]))
    assert quantizer.usage() == 3 / 8
    quantizer.record(torch.full((3, 9), 5))  # the queue holds ten of these
    assert quantizer.usage() == 1 / 8
    assert quantizer.perplexity(torch.tensor([0, 0, 0])).item() == pytest.approx(1)
    assert quantizer.perplexity(torch.arange(8)).item() == pytest.approx(8)
    assert quantizer.perplexity(torch.tensor([0, 0, 1, 1])).item() == pytest.approx(2)


def test_entropy_loss_prefers_sharp_and_even_use():
    quantizer = VectorQuantizer(4, 4, entropy_weight=1.0, entropy_temperature=0.01)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.eye(4))
    sharp_even = quantizer(torch.eye(4))[2]["entropy"]
    sharp_one = quantizer(torch.eye(4)[[0, 0, 0, 0]])[2]["entropy"]
    blurred = quantizer(torch.zeros(4, 4))[2]["entropy"]
    assert sharp_even < sharp_one - 1 and sharp_even < blurred - 1


def test_bad_sizes_are_one_sentence():
    with pytest.raises(ValueError, match="divisible by 2; they are"):
        models()[0](torch.zeros(1, 3, 31, 32))


def test_channels_that_group_norm_cannot_split_are_one_sentence():
    with pytest.raises(ValueError, match="multiple of 32"):
        VQGAN(ch=48)


def test_copy(tmp_path):
    copy_test(tmp_path, ["vqgan.py"], "from vqgan import VQVAE",
              "VQGAN(32, 32, [1, 2], 1, [16], 32, VectorQuantizer(64, 8, ema_decay=0.99))", "VQVAE(32)")


@pytest.mark.parametrize("l2_norm, legacy", [(False, False), (True, False), (False, True)])
def test_gradient_norms_are_those_of_the_codebook_loss(l2_norm, legacy):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 4, beta=0.3, legacy=legacy, l2_norm=l2_norm)
    z, weight = torch.randn(2, 3, 3, 4), torch.rand(2, 3, 3)
    _, indices, losses, _ = quantizer(z, weight)
    losses["codebook"].backward()
    norms = gradient_norms(quantizer, z, indices, weight)
    assert torch.allclose(norms, quantizer.codebook.grad.norm(dim=1), atol=1e-6) and norms.max() > 0
    before = quantizer.codebook.detach().clone()
    with torch.no_grad():
        quantizer.codebook.mul_(-1)
    assert torch.equal(gradient_norms(quantizer, z, indices, weight, before), norms)
