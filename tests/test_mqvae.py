import math

import pytest
import torch
import torch.nn.functional as F
from conftest import copy_test, share_of_others

from mqvae import MQVAE, DeMask
from vqgan import VectorQuantizer


def small(**settings):
    return MQVAE(**dict(image_size=32, ch=32, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[16], z_channels=32,
                        demask_layers=2, quantizer=VectorQuantizer(64, 16, ema_decay=0.9)) | settings)


@pytest.mark.parametrize("ratio", [0.01, 0.25, 0.3, 0.99])
def test_contract(ratio):
    torch.manual_seed(0)
    model, images = small(topk_ratio=ratio), torch.rand(3, 3, 32, 32) * 2 - 1
    n = int(ratio * 256)
    out = model(images)
    assert out.images.shape == images.shape and out.losses.keys() == {"codebook", "commitment"}
    (out.images.square().mean() + sum(out.losses.values())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert model.score_net.conv1.weight.grad.norm() > 1e-3 * model.pre_quant.weight.grad.norm()  # through the product

    model.eval()
    with torch.no_grad():
        out, codes = model(images), model.encode(images)
        assert all(torch.equal(codes[k], out.codes[k]) for k in ("indices", "positions"))
        assert codes["indices"].shape == codes["positions"].shape == (3, n) and codes["positions"].dtype == torch.int64
        assert (codes["positions"].diff() > 0).all() and codes["positions"].min() >= 0 and codes["positions"].max() < 256
        assert torch.equal(model.decode(codes), out.images)
        assert model.bits(codes).tolist() == pytest.approx([n * 6 + math.log2(math.comb(256, n))] * 3, rel=1e-5)
        assert out.info["kept_ratio"] == pytest.approx(n / 256)


@torch.no_grad()
def test_any_rate_equals_a_fixed_one_with_the_same_weights():
    torch.manual_seed(0)
    model, images = small(topk_ratio=[0.1, 0.9]).eval(), torch.rand(3, 3, 32, 32) * 2 - 1
    for ratio in (0.1, 0.3, 0.9, None):
        fixed = small(topk_ratio=ratio or 0.5).eval()
        fixed.load_state_dict(model.state_dict())
        want, codes = fixed.encode(images), model.encode(images, ratio)
        assert all(torch.equal(codes[k], want[k]) for k in want) and codes["indices"].shape == (3, int((ratio or 0.5) * 256))
        assert torch.equal(model.decode(codes), model(images, ratio).images) and torch.equal(fixed(images).images, model.decode(codes))
        rows = [model.encode(images[i:i + 1], ratio) for i in range(3)]
        rows = {k: torch.cat([row[k] for row in rows]) for k in codes}
        # By cell: another choice between two cells shifts all codes between them
        cells = [{"code": torch.full((3, 256), -1).scatter(1, one["positions"], one["indices"])}
                 for one in (codes, rows)]
        assert share_of_others(*cells) < 0.02
    with pytest.warns(UserWarning, match="ratio 0.95 is outside of what this model was trained for, 0.1 to 0.9"):
        model.encode(images, 0.95)
    for ratio in (0.0, 1.0, 0.001):
        with (pytest.warns(UserWarning, match="outside"),
              pytest.raises(ValueError, match="ratio must be between 0 and 1 and keep at least one of 256 cells")):
            model.encode(images, ratio)
    for bad in ([0.5, 0.2], [0.2, 1.0], [0.2, 0.4, 0.6], [0.0, 0.5]):
        with pytest.raises(ValueError, match="topk_ratio must be between 0 and 1, or two such numbers"):
            small(topk_ratio=bad)


@torch.no_grad()
def test_any_size():
    """What was made for one size gives the same codes as the same weights made for another, and any grid decodes."""
    torch.manual_seed(0)
    model, wide = small(attn_resolutions=[]).eval(), small(attn_resolutions=[], image_size=[48, 64]).eval()
    wide.load_state_dict(model.state_dict())
    images = torch.rand(2, 3, 48, 64) * 2 - 1
    codes, want = model.encode(images), wide.encode(images)
    assert all(torch.equal(codes[k], want[k]) for k in want) and codes["positions"].shape == (2, int(0.25 * 24 * 32))
    out = wide(images)
    assert out.images.shape == images.shape and torch.equal(model(images).images, out.images)
    assert torch.equal(model.decode(codes, (24, 32)), out.images) and torch.equal(wide.decode(codes), out.images)
    assert model.bits(codes, (24, 32)).tolist() == wide.bits(codes).tolist() == [out.info["bits"].item()] * 2
    kept = (model.maps(codes, images)["kept_map"] == images).all(1)[:, ::2, ::2].flatten(1)
    assert torch.equal(kept.nonzero()[:, 1].view(2, -1), codes["positions"])
    model.grid = (24, 32)
    assert torch.equal(model.decode(codes), out.images)


def test_every_training_step_takes_its_rate():
    model, images = small(topk_ratio=[0.25, 0.75]), torch.rand(2, 3, 32, 32) * 2 - 1
    drawn = []
    for step in range(20):
        assert model.seed == step
        drawn.append(model(images).codes["indices"].shape[1])
    again = small(topk_ratio=[0.25, 0.75])
    again.seed = 7
    assert [again(images).codes["indices"].shape[1] for _ in range(13)] == drawn[7:]
    assert min(drawn) >= 64 and max(drawn) <= 192 and min(drawn) < 90 and max(drawn) > 166
    assert model.eval()(images).codes["indices"].shape == (2, 128)


@torch.no_grad()
def test_the_highest_scores_are_kept():
    model, images = small().eval(), torch.rand(2, 3, 32, 32) * 2 - 1
    scores = model.score_net(model.encoder(images)).flatten(1)
    kept = torch.zeros(2, 256, dtype=torch.bool).scatter(1, model.encode(images)["positions"], True)
    assert scores.min() >= 0 and scores.max() <= 1
    for s, k in zip(scores, kept):
        assert s[k].min() >= s[~k].max()


@torch.no_grad()
def test_training_tries_other_cells():
    """Cells are sampled in proportion to (score / (1 - score)) ** power. The power grows to infinity; evaluation takes the maximum."""
    model, images = small(image_size=8, topk_ratio=1.5 / 16), torch.rand(1, 3, 8, 8).expand(400, -1, -1, -1)
    odds = torch.zeros(16).index_copy(0, torch.tensor([3, 9, 14]), torch.tensor([6.0, 3.0, 1.0]))
    model.score_net.forward = lambda z: (odds / (1 + odds)).view(1, 4, 4).expand(len(z), -1, -1)
    torch.manual_seed(0)
    for progress, power in ((0.5, 8 / 3), (0.8, math.inf)):
        model.progress = progress
        drawn = model.train()(images).codes["positions"].flatten().tolist()
        for cell, x in ((3, 6.0), (9, 3.0), (14, 1.0)):
            assert abs(drawn.count(cell) / 400 - (x / 6) ** power / sum((x / 6) ** power for x in (6, 3, 1))) < 0.05
    assert model.eval().encode(images)["positions"].unique().tolist() == [3]


def test_training_keeps_all_cells_at_first():
    model, images = small(), torch.rand(2, 3, 32, 32) * 2 - 1
    for progress, n in ((0, 256), (0.25, 160), (0.5, 64), (1, 64)):
        model.progress = progress
        assert model.train()(images).codes["indices"].shape == (2, n) and model.eval().encode(images)["indices"].shape == (2, 64)


def test_scores_learn_what_a_code_would_change():
    """The gradient of a masked cell's score: DeMask's input gradient along (vector - token), minus its mean over the image."""
    torch.manual_seed(0)
    model, images = small(), torch.rand(2, 3, 32, 32) * 2 - 1
    scores = torch.rand(2, 16, 16, requires_grad=True)
    model.score_net.forward = lambda z: scores
    seen = []
    model.demask.post_quant.register_forward_pre_hook(lambda _, given: seen.append(given[0]) or given[0].retain_grad())
    out = model(images)
    out.images.square().mean().backward()
    with torch.no_grad():
        z = model.encoder(images).flatten(2).transpose(1, 2)
        vectors = model.pre_quant(F.layer_norm(z, z.shape[-1:]) * scores.flatten(1).unsqueeze(-1))
    change = (seen[0].grad.flatten(2).transpose(1, 2) * (vectors - model.demask.token)).sum(-1)  # (B, hw)
    empty = torch.ones(2, 256, dtype=torch.bool).scatter(1, out.codes["positions"], False)
    expected = (change - change.mean(1, keepdim=True))[empty]
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(scores.grad.flatten(1)[empty], expected, atol=1e-8, rtol=1e-3)


@torch.no_grad()
def test_demask_equals_the_formula():
    """Compares with attention written out, one image at a time."""
    demask = DeMask(8, 32, layers=3)
    z_q, positions = torch.randn(2, 5, 8), torch.stack([torch.randperm(16)[:5].sort().values for _ in range(2)])
    got = demask(z_q, positions, (4, 4))
    for i in range(2):
        cells = demask.token.repeat(16, 1)
        cells[positions[i]] = z_q[i]
        mask = torch.full((16,), 0.02)
        mask[positions[i]] = 1.0
        x = demask.conv_in(demask.post_quant(cells.t().reshape(1, 8, 4, 4)))
        for block, attn in zip(demask.blocks, demask.attns):
            x = block(x)
            q, k, v = attn.qkv(attn.norm(x)).flatten(2).transpose(1, 2).squeeze(0).chunk(3, dim=1)
            p = F.softmax(q @ k.t() / math.sqrt(32), dim=1) * mask  # not renormalised
            x = x + attn.out((p @ v).t().reshape(1, 32, 4, 4))
            mask = mask.sqrt()
        torch.testing.assert_close(got[i:i + 1], demask.last_block(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ratio", [0.0, 0.003, 1.0, -0.1, 1.5])
def test_bad_ratios_are_one_sentence(ratio):
    with pytest.raises(ValueError, match="topk_ratio must be between 0 and 1.* keep at least one of 256 cells"):
        small(topk_ratio=ratio)


def test_bad_settings_and_images_are_one_sentence():
    with pytest.raises(ValueError, match="divisible by 2"):
        small(image_size=31)
    with pytest.raises(ValueError, match="images must be"):
        small()(torch.zeros(1, 3, 64, 63))
    with pytest.raises(ValueError, match="l2-normalised"):
        small(quantizer=VectorQuantizer(64, 8, l2_norm=True), release_training=True)


def test_copy(tmp_path):
    copy_test(tmp_path, ["mqvae.py", "vqgan.py"], "from mqvae import MQVAE",
              "MQVAE(32, 32, [1, 2], 1, [], 32, 0.25, 2, VectorQuantizer(64, 8, ema_decay=0.98))")
