import pytest
import torch
import torch.nn.functional as F
from conftest import copy_test, share_of_others

from dataset import make_dataset
from dqvae import DQVAE, budget
from vqgan import VectorQuantizer

LEVELS = {2: dict(factors=[4, 2], ratios=[0.5], ch_mult=[1, 1, 2]),
          3: dict(factors=[8, 4, 2], ratios=[0.3, 0.3], ch_mult=[1, 1, 1, 2])}
KINDS = [(2, "feature"), (2, "entropy"), (3, "feature"), (3, "entropy")]


def small(grains=2, router="feature", **settings):
    torch.manual_seed(0)
    model = DQVAE(**dict(image_size=32, router=router, ch=32, num_res_blocks=1, attn_resolutions=[], z_channels=32,
                         decoder_ch_mult=[1, 1], decoder_attn_resolutions=[], quantizer=VectorQuantizer(64, 16, ema_decay=0.9))
                  | LEVELS[grains] | settings)
    if router == "entropy":
        model.calibrate([photos()])
    return model


def photos(n=8, size=32):
    """Smooth on the left, noise on the right; the boundary moves with the image's index."""
    x = torch.linspace(-0.8, 0.8, size).expand(n, 3, size, size) + torch.linspace(0, 0.15, n * size).view(n, 1, size, 1)
    noise = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1)) - 0.5
    right = torch.arange(size) >= torch.linspace(4, size - 4, n).view(n, 1, 1, 1)
    return (x + noise * right).clamp(-1, 1)


@pytest.mark.parametrize("grains, router", KINDS)
def test_contract(grains, router):
    model, images = small(grains, router), photos(3)
    out = model(images)
    assert out.images.shape == images.shape
    assert out.losses.keys() == {"codebook", "commitment"} | ({"router"} if router == "feature" else set())
    (out.images.square().mean() + sum(out.losses.values())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)

    model.eval()
    with torch.no_grad():
        out, codes = model(images), model.encode(images)
        indices, grain = codes["indices"], codes["grain"]
        assert all(torch.equal(codes[k], out.codes[k]) for k in ("indices", "grain"))
        side, regions = 32 // model.factors[-1], 32 // model.factors[0]
        assert indices.shape == (3, side, side) and grain.shape == (3, regions, regions)
        assert indices.dtype == grain.dtype == torch.int64 and grain.min() >= 0 and grain.max() < grains
        assert torch.equal(model.decode(codes), out.images)
        count = 0
        times = side // regions
        for b in range(3):
            for y in range(regions):
                for x in range(regions):
                    g = grain[b, y, x]
                    region = indices[b, y * times:(y + 1) * times, x * times:(x + 1) * times]
                    repeat = model.factors[g] // model.factors[-1]
                    own = region[::repeat, ::repeat]
                    assert torch.equal(region, own.repeat_interleave(repeat, 0).repeat_interleave(repeat, 1))
                    count += own.numel()
        bits = model.bits(codes)
        assert bits.sum().item() == pytest.approx(count * 6 + 3 * regions**2 * torch.tensor(grains).log2().item(), rel=1e-5)
        assert out.info["codes"].item() == pytest.approx(count / 3)


@pytest.mark.parametrize("grains", [2, 3])
def test_entropy_router_obeys_its_ratios(grains):
    model = small(grains, "entropy")
    grain = model.eval().encode(photos())["grain"]  # calibrated on these: the ratio is exact to a region
    for g, ratio in enumerate(model.ratios, 1):
        assert (grain == g).float().mean().item() == pytest.approx(ratio, abs=1 / 128)
    entropy = model.entropy(photos())
    for g in range(grains - 1):
        assert entropy[grain <= g].max() <= entropy[grain > g].min()


def test_entropy_equals_the_formula_and_survives_flushing():
    model = small()
    images = photos(2)
    grey = (images * torch.tensor([0.2989, 0.5870, 0.1140]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    pixels = F.unfold(grey, 4, stride=4).transpose(1, 2)                                     # (B, regions, 16)
    kernel = torch.exp(-0.5 * ((pixels.unsqueeze(-1) - torch.linspace(-1, 1, 32)) / 0.01) ** 2).mean(2).double()
    p = kernel / kernel.sum(-1, keepdim=True) + 1e-40
    want = -(p * p.log()).sum(-1).view(2, 8, 8).float()
    torch.testing.assert_close(model.entropy(images), want, atol=1e-4, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.entropy(images), want, atol=1e-4, rtol=0)
    torch.set_flush_denormal(True)
    try:
        assert model.entropy(torch.zeros(1, 3, 32, 32)).isfinite().all()
        torch.testing.assert_close(model.entropy(images), want, atol=1e-4, rtol=0)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("grains", [2, 3])
def test_budget_loss_is_the_papers(grains):
    model = small(grains, budget_weight=7.0)
    gate = F.one_hot(torch.randint(grains, (5, 4, 4)), grains).permute(0, 3, 1, 2).float()
    regions, g = 16, gate.sum((0, 2, 3)) / 5
    if grains == 2:
        r = (g[0] + 4 * g[1] - regions) / (3 * regions)
        want = 2 * 7 * (r - 0.5) ** 2
    else:
        medium = (g[0] + 4 * g[1] + g[2] - regions) / (3 * regions)
        fine = (g[0] + g[1] + 16 * g[2] - regions) / (15 * regions)
        want = (medium - 0.3) ** 2 + 7 * (fine - 0.3) ** 2
    torch.testing.assert_close(budget(gate, model.ratios, model.budget_weight), want)


def test_the_released_router_learns_the_ratio_and_hears_the_reconstruction():
    model, images = small(ratios=[0.25], release_training=True), photos(16)
    model(images).images.square().mean().backward()
    assert model.router.fc1.weight.grad.norm() > 1e-3 * model.pre_quant.weight.grad.norm()
    model.requires_grad_(False).router.requires_grad_(True)
    optimizer = torch.optim.Adam(model.router.parameters(), 3e-3)
    model._decode = lambda z: images  # which costs most, and the router does not learn from it here
    for _ in range(60):
        optimizer.zero_grad()
        model(images).losses["budget"].backward()  # by the straight-through gate
        optimizer.step()
    shares = [model(images).info["ratio_1"].item() for _ in range(10)]
    assert sum(shares) / 10 == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("grains", [2, 3])
def test_the_feature_router_obeys_its_ratios(grains):
    """In a batch, and in evaluation by the thresholds of the batches before; with what is routed at random at the same ratios."""
    model, images = small(grains), photos()
    with torch.no_grad():
        seen = torch.stack([model(images).codes["grain"] for _ in range(20)])
        found = model.eval().encode(images)["grain"]
    for g, ratio in enumerate(model.ratios, 1):
        assert (seen == g).float().mean().item() == pytest.approx(ratio, abs=0.02)
        assert (found == g).float().mean().item() == pytest.approx(ratio, abs=2 / found.numel())
    gain = torch.nn.functional.softplus(model.router([neck(x) for neck, x in zip(
        model.necks, model.down(images)[-1:-grains - 1:-1])]))
    gain = gain[:, 0] - gain[:, -1]
    assert all(gain[found <= g].max() <= gain[found > g].min() + 1e-6 for g in range(grains - 1))


def test_routing_is_random_more_often_at_first():
    model, images = small(), photos(32)
    found = {}
    for progress in (0.0, 0.25, 1.0):
        model.progress = progress
        with torch.no_grad():
            found[progress] = (model.train()(images).codes["grain"] != model.eval().encode(images)["grain"]).float().mean().item()
    for progress, share in ((0.0, 0.4), (0.25, 0.2), (1.0, 0.05)):
        assert found[progress] == pytest.approx(share / 2, abs=0.03)  # half of what is random is what it would have been


def test_the_router_learns_the_errors_of_regions():
    """By regression on the granularity that a region had; the encoder does not hear it."""
    model, images = small(), photos()
    grain, error = torch.randint(2, (8, 8, 8)), torch.rand(8, 8, 8)
    pixels = error.repeat_interleave(4, 1).repeat_interleave(4, 2)
    predicted = torch.stack([error, error], dim=1) / error.mean()
    assert model.router_loss(predicted, grain, pixels) < 1e-10
    wrong = predicted + torch.where(grain == 1, 0.0, 1.0).unsqueeze(1) * torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    assert model.router_loss(wrong, grain, pixels) < 1e-10  # of the other granularity nothing is known
    assert model.router_loss(predicted + 1, grain, pixels).item() == pytest.approx(0.1, rel=1e-4)
    model(images).losses["router"].backward()
    assert model.router.fc1.weight.grad.norm() > 0 and all(p.grad is None for p in model.down.parameters())


def test_losses_weigh_a_repeated_code_once():
    model, images = small(3, "entropy", quantizer=VectorQuantizer(64, 16)), photos()
    features = model.features(images)
    grain, _, _ = model.route(images, features, None)
    z = model.vectors(features, grain)
    cells = model.to_finest(grain)
    weight = torch.tensor([1 / 16, 1 / 4, 1])[cells].unsqueeze(-1)
    z_q = model.quantizer.lookup(model.quantizer.nearest(z))
    torch.testing.assert_close(model(images).losses["codebook"], ((z - z_q).square() * weight).mean())


def test_moving_averages_count_a_repeated_code_once_or_as_in_the_reference():
    images, counts = photos(), []
    for ema_weighted in (True, False):
        model = small(2, "entropy", ema_weighted=ema_weighted, quantizer=VectorQuantizer(64, 16, ema_decay=0.0, restart=False))
        out = model(images)
        counts.append(model.quantizer.ema_count.sum().item())
    assert counts[0] == pytest.approx(out.info["codes"].item() * 8) and counts[1] == 8 * 16 * 16


def test_codes_restart_as_vectors_of_different_codes():
    """Restarts draw only the first of the cells that repeat a code."""
    model, images = small(2, "entropy", quantizer=VectorQuantizer(300, 16, ema_decay=0.99)), photos()
    out = model(images)
    assert out.info["codes"] * 8 > 300  # there are enough different vectors
    assert model.quantizer.codebook.data.unique(dim=0).shape[0] == 300


RANGES = {2: [[0.1, 0.9]], 3: [[0.1, 0.4], [0.1, 0.5]]}


@pytest.mark.parametrize("grains, wanted", [(2, [[0.1], [0.3], [0.55], [0.9]]), (3, [[0.1, 0.1], [0.25, 0.5], [0.4, 0.33]])])
@torch.no_grad()
def test_any_rate_equals_a_fixed_one_with_the_same_weights(grains, wanted):
    model, images = small(grains, "entropy", ratios=RANGES[grains]).eval(), photos()
    assert model.thresholds.shape == (99,) and (model.thresholds.diff() >= 0).all()
    for ratios in [None, *wanted]:
        fixed = small(grains, "entropy", ratios=ratios or model.ratios).eval()  # calibrated on the same images
        fixed.load_state_dict(model.state_dict() | {"thresholds": fixed.thresholds})
        want, codes = fixed.encode(images), model.encode(images, ratios)
        # Thresholds are quantiles of these images' own entropies: rounding decides some regions
        assert share_of_others(codes, want) < 0.02
        assert torch.equal(model.decode(codes), model(images, ratios).images)
        assert torch.equal(fixed.decode(want), fixed(images).images)
        rows = [model.encode(images[i:i + 1], ratios) for i in range(8)]
        rows = {k: torch.cat([row[k] for row in rows]) for k in codes}
        assert share_of_others(codes, rows) < 0.02
        for g, ratio in enumerate(ratios or model.ratios, 1):
            assert (codes["grain"] == g).float().mean().item() == pytest.approx(ratio, abs=0.02)


@pytest.mark.parametrize("grains, router", KINDS)
def test_every_training_step_takes_its_rates(grains, router):
    model, images, seen = small(grains, router, ratios=RANGES[grains]), photos(), []
    lows, highs = torch.tensor(RANGES[grains]).T
    model._decode = lambda z: images  # which costs most, and is not looked at
    with torch.no_grad():
        for step in range(30):
            model.schedule(step, 30)
            grain = model(images).codes["grain"]
            seen.append([(grain == g).float().mean().item() for g in range(1, grains)])
        found = torch.tensor(seen)
        assert (found > lows - 0.06).all() and (found < highs + 0.06).all() and found.std(0).min() > 0.05
        assert (found.mean(0) - (lows + highs) / 2).abs().max() < 0.1
        again = small(grains, "entropy", ratios=RANGES[grains])  # without noise
        again._decode = model._decode
        first = []
        for step in range(5):
            again.schedule(step, 30)
            first.append(again(images).codes["grain"])
        again.schedule(2, 30)
        assert all(torch.equal(again(images).codes["grain"], first[2]) for _ in range(2))  # of a step, not of a forward
        again.schedule(2, 30, seed=1)
        assert not torch.equal(again(images).codes["grain"], first[2])
        for asked in (None, [r[0] for r in RANGES[grains]], [r[1] for r in RANGES[grains]]):
            grain = model.eval().encode(images, asked)["grain"]
            assert [(grain == g).float().mean().item() for g in range(1, grains)] == pytest.approx(asked or model.ratios, abs=0.05)


def test_rates_that_cannot_be_are_one_sentence():
    model, images = small(2, "entropy", ratios=[[0.2, 0.8]]).eval(), photos(1)
    with pytest.warns(UserWarning, match=r"ratios \[0.9\] are outside of what this model was trained for, \[\(0.2, 0.8\)\]"):
        model.encode(images, [0.9])
    for bad in ([0.0], [1.0], [0.2, 0.2]):
        with pytest.raises(ValueError, match="ratios must be a list of 1, above 0 and together less than 1"):
            model.encode(images, bad)
    with pytest.raises(ValueError, match=r"trained for ratios \[0.5\], not \[0.4\]; ranges"):
        small().eval().encode(images, [0.4])
    with pytest.raises(ValueError, match="ranges of ratios need 99 ascending thresholds; they are 1"):
        model.set_thresholds([1.0], 4)


@pytest.mark.parametrize("grains, router", KINDS)
@torch.no_grad()
def test_any_size(grains, router):
    """What was made for one size gives the same codes as the same weights made for another; positions are interpolated."""
    model, wide = small(grains, router), small(grains, router, image_size=[48, 64])
    for _ in range(2 if router == "feature" else 0):
        model(photos())
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("position.")}
    assert set(wide.load_state_dict(state, strict=False).missing_keys) == {k for k in wide.state_dict() if k.startswith("position.")}
    model, wide, images = model.eval(), wide.eval(), photos(4, 64)[:, :, :48]
    codes, want = model.encode(images), wide.encode(images)
    assert all(torch.equal(codes[k], want[k]) for k in want) and codes["grain"].shape == (4, 48 // model.factor, 64 // model.factor)
    assert len(codes["grain"].unique()) == grains
    out = model(images)
    assert out.images.shape == images.shape and torch.equal(model.decode(codes), out.images)
    assert model.spent(codes).sum((1, 2)).tolist() == torch.pow(4, codes["grain"]).sum((1, 2)).tolist()
    for lines, side, other in ((model.position.rows, 24, wide.position.rows), (model.position.columns, 32, wide.position.columns)):
        ends = lines[[0, -1]]
        places = torch.linspace(0, 15, side).tolist()
        other.copy_(torch.stack([torch.lerp(lines[int(x)], lines[min(int(x) + 1, 15)], x % 1) for x in places]))
        assert torch.equal(other[[0, -1]], ends)
    for key in ("weight", "bias"):
        getattr(wide.position.fourier, key).copy_(getattr(model.position.fourier, key))
    torch.testing.assert_close(wide.decode(codes), out.images, atol=1e-4, rtol=1e-4)


def test_calibration_is_kept_with_the_weights():
    model = small(3, "entropy")
    other = small(3, "entropy")
    other.set_thresholds([0.0, 0.0], 8)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.eval().encode(photos())["grain"], other.eval().encode(photos())["grain"])
    assert small().calibrate(iter(())) == {}  # a feature router needs none, and no images


@pytest.mark.parametrize("settings, sentence", [
    (dict(ratios=[0.0]), "ratios must be 1 for 2 factors, above 0 and together less than 1"), (dict(ratios=[1.0]), "ratios must be 1"),
    (dict(grains=3, ratios=[0.6, 0.5]), "ratios must be 2 for 3"), (dict(ratios=[0.3, 0.3]), "ratios must be 1 for 2"),
    (dict(ratios=[[0.5, 0.2]]), "or ranges of such, the lower first"), (dict(ratios=[[0.2, 1.0]]), "together less than 1"),
    (dict(ratios=[[0.2]]), "ratios must be 1"), (dict(grains=3, ratios=[[0.1, 0.6], 0.5]), "together less than 1"),
    (dict(ratios=[[0.2, 0.8]], release_training=True), "ranges as ratios need thresholds"),
    (dict(image_size=[32, 30]), "divisible by 4, the model's downsampling factor"),
    (dict(image_size=30), "divisible by 4, the model's downsampling factor; it is 30"),
    (dict(factors=[8, 4]), r"factors must be two or three, 4 \(from ch_mult\) halved down to 2 \(from decoder_ch_mult\)"),
    (dict(decoder_ch_mult=[1, 1, 2]), "halved down to 4"),
])
def test_bad_settings_are_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        small(**settings)
    assert "\n" not in str(error.value)


def test_bad_thresholds_and_images_are_one_sentence():
    model = small(2, "entropy")
    with pytest.raises(ValueError, match="regions of 16 x 16 pixels; this model's have 4 x 4"):
        model.set_thresholds([1.0], 16)
    with pytest.raises(ValueError, match="need 1 ascending thresholds"):
        model.set_thresholds([1.0, 2.0], 4)
    with pytest.raises(ValueError, match="ascending thresholds"):
        model.set_thresholds([float("nan")], 4)
    with pytest.raises(ValueError, match="at least one image"):
        model.calibrate([])
    with pytest.raises(ValueError, match="H and W divisible by 4"):
        model(torch.zeros(1, 3, 64, 62))
    uncalibrated = DQVAE(**dict(image_size=32, router="entropy", ch=32, num_res_blocks=1, decoder_ch_mult=[1, 1]) | LEVELS[2])
    with pytest.raises(ValueError, match="no thresholds yet"):
        uncalibrated(torch.zeros(1, 3, 32, 32))


def test_fine_regions_are_where_the_detail_is():
    """On the embedded dataset, where the detailed area is known."""
    from data.shapes import draw_shapes

    data = make_dataset("shapes", image_size=32, train_size=64)
    images = torch.stack([data[i][0] for i in range(64)])
    detail = torch.stack([draw_shapes(0, i, 32)[2] for i in range(64)]).float()
    model = small(2, "entropy", ratios=[0.25])
    model.calibrate([images])
    fine = model.eval().encode(images)["grain"].float()
    share = F.avg_pool2d(detail, 4)
    assert (fine * share).sum() / fine.sum() > 2 * share.mean()


def test_copy(tmp_path):
    copy_test(tmp_path, ["dqvae.py", "vqgan.py"], "from dqvae import DQVAE",
              "DQVAE(32, [4, 2], [0.5], 'feature', ch=32, ch_mult=[1, 1, 2], num_res_blocks=1, decoder_ch_mult=[1, 1])")
