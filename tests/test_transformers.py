"""GPT, Stackformer and DQ-Transformer: identities on tiny networks."""

import gc
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import command_in_copy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dq_transformer
import gpt
import stackformer
from dataset import make_dataset
from dq_transformer import DQTransformer
from dqvae import DQVAE
from gpt import GPT, NotFinite, draw, filter_logits, parameter_groups
from harness.code_cache import CodeBatches
from mqvae import MQVAE
from stackformer import Stackformer
from vqgan import VQGAN, VectorQuantizer

K, CLASSES = 12, 5
TINY = {"n_head": 2, "n_embd": 16}
MODELS = {
    "gpt": lambda classes=0, **more: GPT(K, [2, 8], classes, 2, **TINY | more),
    "stackformer": lambda classes=0, **more: Stackformer(K, [8, 2], 6, classes, 1, 2, **TINY | more),
    "dual": lambda classes=0, **more: DQTransformer(K, [2, 4], classes, 1, 2, **TINY | more),
    "dual_region_first": lambda classes=0, **more: DQTransformer(K, [[3, 2], [6, 4]], classes, 1, 1, order="region-first", **TINY | more),
    "triple": lambda classes=0, **more: DQTransformer(K, [[1, 2], [2, 4], [4, 8]], classes, 1, 1, **TINY | more),
    "gpt_factors": lambda classes=0, **more: GPT(K, [2, 8], classes, 2, codebook_factors=[3, 4], **TINY | more),
    "stackformer_factors": lambda classes=0, **more: Stackformer(K, [8, 2], 6, classes, 1, 2, codebook_factors=[2, 3, 2], **TINY | more),
    "dual_factors": lambda classes=0, **more: DQTransformer(K, [2, 4], classes, 1, 2, codebook_factors=[4, 3], **TINY | more),
    "triple_region_first": lambda classes=0, **more: DQTransformer(K, [2, 4, 8], classes, 1, 1, order="region-first", **TINY | more),
}


def make(name, classes=0, seed=0, **more):
    """A model in eval mode, with weights large enough for logits that differ."""
    torch.manual_seed(seed)
    model = MODELS[name](classes, **more)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def random_codes(model, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    if isinstance(model, GPT):
        return {"indices": torch.randint(K, (n, *model.grid), generator=g)}
    if isinstance(model, Stackformer):
        positions = torch.rand(n, 16, generator=g).argsort(1)[:, :6].sort(1).values
        return {"indices": torch.randint(K, (n, 6), generator=g), "positions": positions}
    grids = model.grids
    grain = torch.randint(model.grains, (n, *grids[0]), generator=g)
    grain[0] = torch.arange(model.cells[0]).view(grids[0]) * model.grains // model.cells[0]  # all granularities occur
    contents = torch.stack([F.interpolate(torch.randint(K, (n, 1, *s), generator=g).float(), grids[-1]).squeeze(1) for s in grids])
    cells = F.interpolate(grain.unsqueeze(1).float(), grids[-1]).long()                      # (n, 1, h, w)
    return {"indices": contents.long().permute(1, 0, 2, 3).gather(1, cells).squeeze(1), "grain": grain}


def rows(codes, chosen):
    return {k: v[chosen] for k, v in codes.items()}


def check_valid(model, codes):
    """What `decode` accepts: every position once, granularities that cover the image exactly, no special token."""
    assert all(v.dtype == torch.int64 for v in codes.values())
    assert codes["indices"].min() >= 0 and codes["indices"].max() < K
    if isinstance(model, Stackformer):
        assert (codes["positions"].diff(dim=1) > 0).all() and codes["positions"].min() >= 0 and codes["positions"].max() < 16
    if isinstance(model, DQTransformer):
        assert codes["grain"].min() >= 0 and codes["grain"].max() < model.grains
        again = model.unorder(model.order(codes))  # a coarse code covers all of its cells, or this would change the indices
        assert all(torch.equal(codes[k], again[k]) for k in codes)


@pytest.mark.parametrize("name", MODELS)
def test_codes_are_valid_whatever_the_weights(name):
    for seed in range(20):
        model = make(name, CLASSES, seed)
        settings = {} if name.startswith("gpt") else {"temperature_pos": 3.0, "top_k_pos": 1 + seed, "top_p_pos": 0.9}
        codes = model.sample(5, torch.arange(5), temperature=2.0, cfg_scale=1 + seed % 3, **settings)
        check_valid(model, codes)
        if isinstance(model, DQTransformer):
            check_valid(model, model.sample(5, fine_positions="sampled"))


def test_every_granularity_and_the_last_cell_can_be_sampled():
    seen = set()
    for seed in range(30):
        model = make("triple", seed=seed)
        grain = model.sample(8, temperature_pos=5.0)["grain"].flatten(1)
        seen |= set(grain[:, -1].tolist())
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("classes, blocks", [(0, {}), (CLASSES, {"rope": False, "qk_norm": False}), (CLASSES, {"qk_norm": False}),
                                             (CLASSES, {"rope": False})])
@pytest.mark.parametrize("name", [name for name in MODELS if not name.endswith("factors")])
def test_cached_logits_equal_full_ones(name, classes, blocks, monkeypatch):
    model, n = make(name, classes, **blocks), 6
    seen, kept = [], []
    for module in (gpt, stackformer, dq_transformer):
        monkeypatch.setattr(module, "filter_logits",
                            lambda logits, *settings: seen.append(logits.clone()) or filter_logits(logits, *settings))
    keep = gpt.Cache.keep
    monkeypatch.setattr(gpt.Cache, "keep", lambda self, rows: kept.append((len(seen), rows)) or keep(self, rows))
    labels = torch.arange(n) % classes if classes else None
    codes = model.sample(n, labels, generator=torch.Generator().manual_seed(3))
    full = model.logits(codes, labels)
    if isinstance(model, GPT):
        torch.testing.assert_close(torch.stack(seen, 1), full["indices"])
    elif isinstance(model, Stackformer):
        torch.testing.assert_close(torch.stack(seen[::2], 1), full["indices"])
        positions = torch.stack(seen[1::2], 1)
        possible = positions.isfinite()
        assert possible.gather(2, codes["positions"].unsqueeze(2)).all()
        torch.testing.assert_close(positions[possible], full["positions"][possible])
    else:
        tokens, here, compared = model.order(codes), torch.arange(n), 0
        for t in range(len(seen) // 2):
            for done, chosen in kept[::2]:  # two caches
                if done == 2 * t:
                    here = here[chosen]
            for i, row in enumerate(here.tolist()):
                if t + 1 >= int(tokens.counts[row].sum()) + 2 * model.grains:
                    continue  # this row has ended
                slot = tokens.slot[row, t + 1]
                g, kind = int(model.slot_grain[slot]), int(model.slot_kind[slot])
                if kind == 0:
                    continue  # start tokens are not predicted
                j = t - int(tokens.counts[row, :g].sum()) - 2 * g
                logits = seen[2 * t][i]
                side = model.cells[g]
                columns = torch.cat([logits[:side], logits[model.cells[-1] + g].view(1)])
                possible = columns.isfinite()
                assert possible[model.slot_cell[slot] if kind == 1 else side]
                torch.testing.assert_close(columns[possible], full["position"][g][row, j][possible])
                if kind == 1:
                    torch.testing.assert_close(seen[2 * t + 1][i], full["content"][g][row, j])
                compared += 1
        assert compared == int(tokens.counts.sum()) + n * model.grains


@pytest.mark.parametrize("name", ["gpt_factors", "stackformer_factors", "dual_factors"])
def test_digits_make_an_exact_likelihood(name, monkeypatch):
    """Probabilities of all codes sum to 1, `bits` counts them, and codes are sampled by them."""
    model, n, seen = make(name, CLASSES), 4, []
    labels = torch.arange(n)
    head = next(m for m in model.modules() if isinstance(m, gpt.FactoredHead))
    x = torch.randn(5, 3, 16)
    log_p = head(x)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(5, 3))
    for code in range(K):
        torch.testing.assert_close(head.nats(x, torch.full((5, 3), code)), -log_p[..., code])
    assert head.nats(x, torch.full((5, 3), -100)).eq(0).all()
    every = torch.arange(K)
    digits = torch.stack(gpt.digits_of(every, head.factors), 1)
    assert len(digits.unique(dim=0)) == K and (digits.amax(0) + 1).tolist() == head.factors
    # One hidden state, drawn often
    numbers = torch.rand(20_000, head.digits, generator=torch.Generator().manual_seed(0))
    drawn = head.draw(x[:1, 0].expand(20_000, -1), gpt.Guidance(1.0, 1), (1.0, None, None), numbers)
    torch.testing.assert_close(torch.bincount(drawn, minlength=K) / 20_000, log_p[0, 0].exp(), atol=0.02, rtol=0)
    # What is sampled step by step has the likelihood of the full pass
    monkeypatch.setattr(gpt, "filter_logits", lambda logits, *settings: seen.append(logits.clone()) or filter_logits(logits, *settings))
    codes = model.sample(n, labels)
    if name == "gpt_factors":
        full = model.logits(codes, labels)["indices"]
        for t, code in enumerate(codes["indices"].flatten(1).unbind(1)):
            steps = zip(seen[t * head.digits:], gpt.digits_of(code, head.factors))
            found = sum(logits.log_softmax(-1).gather(1, digit.unsqueeze(1)) for logits, digit in steps)
            torch.testing.assert_close(found, full[:, t].gather(1, code.unsqueeze(1)))
    elif name == "stackformer_factors":
        assert len(seen) == 6 * head.digits


@pytest.mark.parametrize("name", ["gpt", "stackformer", "dual_region_first", "triple"])
def test_tokens_turn_by_the_centres_of_their_cells(name):
    """In finest cells. Tokens without a cell do not turn."""
    model, seen = make(name, CLASSES), []
    for module in model.modules():
        if isinstance(module, gpt.Blocks):
            module.layers[0].register_forward_hook(lambda _, given, kept, out: seen.append(kept["rope"]), with_kwargs=True)
    codes = random_codes(model, 3)
    model.logits(codes, torch.arange(3))

    def check(rope, cells):  # cells: for each row the (grid, cell) of each token, None for those without
        rope = rope.expand(2, 3, 1, -1, -1) if rope.dim() == 5 else rope.unsqueeze(1).expand(2, 3, 1, -1, -1)
        for i, row in enumerate(cells):
            angles = torch.zeros(len(row), 4)
            for t, token in enumerate(row):
                if token is not None:
                    (h, w), cell = token
                    size = finest[0] / h
                    y, x = (cell // w + 0.5) * size, (cell % w + 0.5) * size
                    angles[t] = torch.tensor([y, 0.1 * y, x, 0.1 * x])
            cos, sin = rope[:, i, 0, :len(row)]
            torch.testing.assert_close(cos, angles.cos().repeat(1, 2))
            torch.testing.assert_close(sin, torch.cat([-angles.sin(), angles.sin()], 1))

    if name == "gpt":
        finest = model.grid
        check(seen[0], [[None] + [(finest, t) for t in range(15)]] * 3)  # each code its own cell, not that of the next
    elif name == "stackformer":
        finest = model.grid
        for rope in seen:
            check(rope, [[None] + [(finest, p) for p in row] for row in codes["positions"][:, :-1].tolist()])
    else:
        finest, tokens = model.grids[-1], model.order(codes)
        for rope, tail in zip(seen, (slice(0, -1), slice(1, None))):  # Position-Transformer: the last token; Content-Transformer: the next
            rows_ = []
            for i in range(3):
                slots = tokens.slot[i, :int(tokens.counts[i].sum()) + 2 * model.grains]
                rows_.append([(model.grids[model.slot_grain[s]], int(model.slot_cell[s])) if model.slot_kind[s] == dq_transformer.CODE
                              else None for s in slots][tail])
            check(rope, rows_)
    assert len(seen) == (1 if name == "gpt" else 2)
    assert make(name, rope=False).rope is None and not any("rope" in key for key in model.state_dict())


def test_qk_norm_bounds_attention():
    """Longer queries and keys change nothing with it, and something without."""
    for qk_norm in (True, False):
        model = make("gpt", qk_norm=qk_norm)
        codes = random_codes(model, 2)
        before = model.logits(codes)["indices"]
        for layer in model.blocks.layers:
            with torch.no_grad():
                layer.qkv.weight[:32] *= 8  # of 16 queries, 16 keys
                layer.qkv.bias[:32] *= 8
        same = torch.allclose(model.logits(codes)["indices"], before, atol=1e-4)
        assert same == qk_norm


def test_special_tokens_have_embeddings_of_their_own():
    emb = gpt.FactoredEmbedding([3, 4], 2, 8)
    found = emb(torch.arange(14))
    torch.testing.assert_close(found[7], emb.tables[0].weight[1] + emb.tables[1].weight[3])
    assert torch.equal(found[12:], emb.special.weight) and len(found.unique(dim=0)) == 14
    for factors in ([3, 5], [12, 1]):
        with pytest.raises(ValueError, match=r"codebook_factors must be numbers whose product is codebook_size, 12; they are"):
            GPT(12, 4, codebook_factors=factors)


@pytest.mark.parametrize("name", MODELS)
def test_a_sample_does_not_depend_on_the_batch(name):
    """In float64: rounding then decides nothing that is drawn."""
    model = make(name, CLASSES).double()
    labels = torch.arange(8) % CLASSES
    generators = [torch.Generator().manual_seed(i) for i in range(8)]
    settings = {"top_p": 0.9, "cfg_scale": 2.0, "cfg_schedule": "power-cosine"}
    together = model.sample(8, labels, generator=generators, **settings)
    for i in range(8):
        alone = model.sample(1, labels[i:i + 1], generator=torch.Generator().manual_seed(i), **settings)
        assert all(torch.equal(alone[k][0], together[k][i]) for k in alone)
    # One generator for all: the first of 8 rows is the only one of 1
    eight, one = (model.sample(n, labels[:n], generator=torch.Generator().manual_seed(7)) for n in (8, 1))
    assert all(torch.equal(one[k][0], eight[k][0]) for k in one)
    assert not all(torch.equal(eight["indices"][0], eight["indices"][i]) for i in range(1, 8))


@pytest.mark.parametrize("name", ["gpt", "stackformer", "dual", "gpt_factors"])
def test_extreme_settings_of_sampling(name):
    model, labels = make(name, CLASSES), torch.arange(4)

    def sample(**settings):
        return model.sample(4, labels, generator=[torch.Generator().manual_seed(i) for i in range(4)], **settings)

    greedy = sample(temperature=0)
    for coldest in (1e-38, 1e-300):
        assert all(torch.equal(v, greedy[k]) for k, v in sample(temperature=coldest).items())
    assert len(sample(temperature=1e300)["indices"].unique()) > K / 2  # not always the first, nor the last
    with pytest.raises(NotFinite, match="cfg_scale is far too large"):
        sample(cfg_scale=1e300)


@pytest.mark.parametrize("name", ["dual", "triple", "triple_region_first"])
def test_padding_changes_nothing(name):
    model = make(name, CLASSES)
    codes, labels = random_codes(model, 6), torch.arange(6) % CLASSES
    together, bits = model.logits(codes, labels), model.bits(codes, labels)
    assert len(set(model.lengths(codes).tolist())) > 2  # rows of different lengths
    content = position = 0.0
    for i in range(6):
        alone, one = model.logits(rows(codes, [i]), labels[i:i + 1]), model(rows(codes, [i]), labels[i:i + 1])
        for g in range(model.grains):
            length = int(alone["length"][g])
            assert length == together["length"][g][i]
            torch.testing.assert_close(together["content"][g][i, :length], alone["content"][g][0])
            torch.testing.assert_close(together["position"][g][i, :length + 1], alone["position"][g][0])
        torch.testing.assert_close(bits[i:i + 1], model.bits(rows(codes, [i]), labels[i:i + 1]))
        content += one["content"] * alone["length"][0].new_tensor([int(x) for x in alone["length"]]).sum()
    total = sum(x.sum() for x in together["length"])
    torch.testing.assert_close(model(codes, labels)["content"], content / total)
    for g in range(model.grains):  # the position loss, by hand
        nats = []
        for i in range(6):
            length = int(together["length"][g][i])
            grain = F.interpolate(codes["grain"][i:i + 1, None].float(), model.grids[g]).long().flatten()
            order = model.slot_cell[(model.slot_grain == g) & (model.slot_kind == 1)]
            target = torch.cat([order[(grain == g)[order]], torch.tensor([model.cells[g]])])
            nats.append(F.cross_entropy(together["position"][g][i, :length + 1], target, reduction="none"))
        position += torch.cat(nats).mean() / model.grains
    torch.testing.assert_close(model(codes, labels)["position"], position)


@pytest.mark.parametrize("name", ["dual", "dual_region_first", "triple", "triple_region_first"])
def test_order_and_back(name):
    model = make(name)
    for seed in range(10):
        codes = random_codes(model, 7, seed)
        tokens = model.order(codes)
        again = model.unorder(tokens)
        assert all(torch.equal(codes[k], again[k]) for k in codes)
        assert torch.equal(tokens.counts.sum(1) + 2 * model.grains - 1, model.lengths(codes))
        grain = model.slot_grain[tokens.slot]
        assert (grain.diff(dim=1) >= 0).all()  # from coarse to fine
    # In region-first order the cells of a region follow each other
    if name == "dual_region_first":
        region = model.slot_region[tokens.slot[0]][(model.slot_kind[tokens.slot[0]] == 1) & (grain[0] == 1)]
        assert (region.diff() >= 0).all() and region.tolist() == [r for r in region.unique().tolist() for _ in range(4)]


@pytest.mark.parametrize("name", ["gpt", "stackformer", "dual"])
def test_causal(name):
    """Later tokens do not change earlier predictions."""
    model = make(name)
    codes = random_codes(model, 1)
    changed = {k: v.clone() for k, v in codes.items()}
    changed["indices"].view(-1)[-1] = (changed["indices"].view(-1)[-1] + 1) % K
    before, after = model.logits(codes), model.logits(changed)
    for key in before:
        pairs = zip(before[key], after[key]) if isinstance(before[key], list) else [(before[key], after[key])]
        for a, b in pairs:
            if key.startswith("position"):
                a, b = a[:, :-1], b[:, :-1]  # the last code is known when its position (or the end) is predicted
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["gpt", "stackformer", "dual", "triple"])
def test_bits_are_the_loss(name):
    model = make(name, CLASSES)
    codes, labels = rows(random_codes(model, 4), [0]), torch.tensor([2])
    out, bits = model(codes, labels), model.bits(codes, labels)
    if name == "gpt":
        want = 16 * out["code"]
    elif name == "stackformer":
        want = 6 * (out["code"] + out["position"])
    else:
        logits = model.logits(codes, labels)
        tokens, want = model.order(codes), out["content"] * model.order(codes).counts.sum()
        for g in range(model.grains - 1):  # all positions but the finest
            cells = tokens.slot[0][model.slot_grain[tokens.slot[0]] == g][1:]
            target = torch.where(model.slot_kind[cells] == 1, model.slot_cell[cells], model.cells[g])
            want = want + F.cross_entropy(logits["position"][g][0, :len(target)], target, reduction="sum")
    torch.testing.assert_close(bits, want.view(1) / math.log(2))


def memorise(model, codes, labels, lr, steps, **settings):
    """Trains until labels give their codes, at most so many steps; whether they do."""
    optimizer = torch.optim.AdamW(parameter_groups(model.train(), 0.01), lr=lr, fused=True)
    for step in range(steps):
        loss = model(codes, labels)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 24:
            again = model.eval().sample(len(labels), labels, temperature=0, **settings)
            model.train()
            if all(torch.equal(again[k], codes[k]) for k in codes):
                return True
    return False


@pytest.mark.parametrize("name", ["gpt", "stackformer", "dual", "triple"])
def test_overfits_labelled_shapes(name):
    """Memorises 16 labelled images. At temperature 0, a label then gives its image's codes."""
    torch.manual_seed(0)
    data = make_dataset("shapes", image_size=32)
    images = torch.stack([data[i][0] for i in range(16)])
    quantizer, net = VectorQuantizer(K, 8, ema_decay=0.5), dict(ch=32, num_res_blocks=1, attn_resolutions=[], z_channels=32)
    more = dict(n_head=2, n_embd=64, dropout=0.0, label_dropout=0.1)
    if name == "gpt":
        stage1, model = VQGAN(32, ch_mult=[1, 1, 1, 1], quantizer=quantizer, **net), GPT(K, 4, 16, 2, **more)
    elif name == "stackformer":
        stage1 = MQVAE(32, ch_mult=[1, 1, 1], quantizer=quantizer, topk_ratio=0.2, demask_layers=1, **net)
        model = Stackformer(K, 8, 12, 16, 1, 2, **more)
    else:
        factors, ratios = ([16, 8], [0.4]) if name == "dual" else ([16, 8, 4], [0.3, 0.3])
        stage1 = DQVAE(32, factors, ratios, "entropy", ch_mult=[1] * 5, quantizer=quantizer, decoder_ch_mult=[1] * (5 - len(ratios)),
                       decoder_attn_resolutions=[], **net)
        stage1.calibrate([images])
        model = DQTransformer(K, [32 // f for f in factors], 16, 1, 2, **more)
    with torch.no_grad():
        stage1(images)  # in training mode: codes restart as vectors of these images
        codes = stage1.eval().encode(images)
    assert len(codes["indices"].unique()) == K
    labels = torch.arange(16)
    memorise(model, codes, labels, 3e-3, 400)
    shuffled = torch.randperm(16)
    again = model.eval().sample(16, labels[shuffled], temperature=0)
    for k in codes:
        assert torch.equal(again[k], codes[k][shuffled]), f"{name}: {(again[k] != codes[k][shuffled]).float().mean():.1%} of {k} differ"


def test_label_dropout_teaches_the_null_class():
    model = make("gpt", CLASSES, label_dropout=0.5).train()
    codes = random_codes(model, 32)
    model(codes, torch.zeros(32, dtype=torch.int64))["loss"].backward()
    gradient = model.start_emb.weight.grad.abs().sum(1)
    assert gradient[0] > 0 and gradient[CLASSES] > 0 and (gradient[1:CLASSES] == 0).all()
    model.eval()
    labels = torch.arange(CLASSES)
    assert not torch.equal(*(model.logits(rows(codes, range(5)), v)["indices"] for v in (labels, None)))


def test_guidance():
    """Scale 0 gives the null class, 1 the class; 2 extrapolates."""
    model = make("gpt", CLASSES)
    logits = []
    for scale in (0.0, 1.0, 2.0):
        starts, guide = model.start_sampling(3, torch.tensor([0, 1, 2]), scale)
        logits.append(guide(model.start_emb(starts)))
    assert torch.equal(logits[0], model.start_emb.weight[CLASSES].expand(3, -1)) and torch.equal(logits[1], model.start_emb.weight[:3])
    torch.testing.assert_close(logits[2], 2 * logits[1] - logits[0])


@pytest.mark.parametrize("name", ["gpt", "stackformer", "dual", "triple"])
def test_guidance_grows_over_the_image(name, monkeypatch):
    """From 1 to the scale: linearly, or by (1 - cos(pi s^3)) / 2, with the share s of codes, or of the area of a DQ-VAE's image."""
    model, scales, guide = make(name, CLASSES), [], gpt.Guidance.__call__
    monkeypatch.setattr(gpt.Guidance, "__call__", lambda self, logits: scales.append(self.scale) or guide(self, logits))
    share = {"constant": lambda s: 1 + 0 * s, "linear": lambda s: s, "power-cosine": lambda s: (1 - torch.cos(math.pi * s**3)) / 2}
    for schedule in share:
        scales.clear()
        codes = model.sample(1, [2], cfg_scale=3.0, cfg_schedule=schedule)
        if name == "gpt":
            s = torch.arange(1, 17) / 16
        elif name == "stackformer":
            s = torch.arange(1, 7).repeat_interleave(2) / 6
        else:
            slots = model.order(codes).slot[0, 1:]
            area = torch.zeros(len(model.slot_kind))
            for g in range(model.grains):
                area[(model.slot_grain == g) & (model.slot_kind == 1)] = model.cells[-1] / model.cells[g]
            after = area[slots].cumsum(0) / model.cells[-1]
            s = torch.stack([torch.cat([torch.zeros(1), after[:-1]]), after], 1).flatten()  # of each token's position and content
            assert s[-1] == 1
        got = torch.tensor([float(scale) for scale in scales[:len(s)]])
        torch.testing.assert_close(got, 1 + 2 * share[schedule](s))
        assert got[-1] == 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["gpt", "stackformer", "dual"])
def test_logits_that_are_not_finite_are_an_error(name, value):
    model = make(name, CLASSES)
    head = {"gpt": "head", "stackformer": "code_head", "dual": "content_head"}[name]
    with torch.no_grad():
        getattr(model, head).weight[3, 0] = value
    for scale in (1.0, 2.0):
        with pytest.raises(NotFinite, match="logits are not finite"):
            model.sample(2, torch.tensor([0, 1]), cfg_scale=scale)


@pytest.mark.parametrize("label", [-1, CLASSES])  # CLASSES is the row of the null class
def test_labels_outside_the_classes_are_an_error(label, monkeypatch):
    model = make("gpt", CLASSES)
    codes, labels = random_codes(model, 2), torch.tensor([0, label])
    with pytest.raises(ValueError, match="labels must be classes from 0 to 4"):
        model(codes, labels)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))  # an assertion on the device
    with pytest.raises(RuntimeError, match="labels must be classes from 0 to 4"):
        model.start_tokens(2, labels, torch.device("cpu"))
    assert model.start_tokens(2, torch.tensor([0, CLASSES - 1]), torch.device("cpu")).tolist() == [0, CLASSES - 1]


@pytest.mark.parametrize("name", ["dual", "triple"])
def test_batches_of_similar_length_give_the_gradients_of_random_ones(name, monkeypatch):
    """Summed over an epoch whose last pool is not full. Also for the mean over parts of a batch, as with several processes or gradient
    accumulation."""
    model = make(name, dropout=0.0).double().train()
    codes = random_codes(model, 20)
    lengths = model.survey([rows(codes, slice(0, 12)), rows(codes, slice(12, 20))])
    assert torch.equal(lengths, model.lengths(codes))
    monkeypatch.setattr(CodeBatches, "POOL", 3)  # of 5 batches
    epoch = iter(CodeBatches(lengths, 1, 4))
    similar = [next(epoch) for _ in range(5)]
    assert sorted(sum(similar, [])) == list(range(20))

    def gradients(batches):
        model.zero_grad()
        for batch in batches:
            (model(rows(codes, batch))["loss"] / len(batches)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    random = torch.randperm(20, generator=torch.Generator().manual_seed(1)).view(5, 4).tolist()
    want = gradients([list(range(20))])
    for batches in (similar, random, [half for batch in similar for half in (batch[::2], batch[1::2])]):
        torch.testing.assert_close(gradients(batches), want, rtol=1e-4, atol=1e-7)
    parts = [model(rows(codes, batch)) for batch in similar]  # logged values are means over the batch's own tokens
    own = [model.eval()(rows(codes, batch)) for batch in similar]
    for a, b in zip(parts, own):
        for key in ("content", "position"):
            torch.testing.assert_close(a[key], b[key])
    model.train().mean_counts = None  # each batch divided by its own counts: another objective
    assert (gradients(similar) - want).norm() > 1e-2 * want.norm()


def test_filters():
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0, -math.inf]])
    p = logits.softmax(-1)
    assert filter_logits(logits, top_k=2).isfinite().tolist() == [[True, False, True, False, False]]
    assert filter_logits(logits, top_k=99).isfinite().sum() == 4
    assert filter_logits(logits, top_p=0.5).isfinite().sum() == 1  # .64 alone is enough
    assert filter_logits(logits, top_p=0.65).isfinite().sum() == 2
    assert filter_logits(logits, top_p=1.0).isfinite().sum() == 4
    assert filter_logits(logits, temperature=0).isfinite().tolist() == [[True, False, False, False, False]]
    torch.testing.assert_close(filter_logits(logits, temperature=0.5)[:, :4], 2 * (logits[:, :4] - 3))
    for coldest in (1e-30, 1e-38, 1e-40, 1e-300):  # of which float32 makes 0, or infinite logits
        for scale in (1, -1, 1e8, 1e30):
            cold, greedy = (filter_logits(scale * logits[:, :4], t).softmax(-1) for t in (coldest, 0))
            assert torch.equal(cold, greedy)
    torch.testing.assert_close(filter_logits(logits, 1e300).softmax(-1)[0], torch.tensor([0.25] * 4 + [0]))
    assert filter_logits(logits, top_p=1e-300).isfinite().sum() == 1
    tied = filter_logits(torch.zeros(1, 5), top_k=2)
    assert tied.isfinite().sum() == 2  # never more than k
    # draw follows the distribution and never selects an excluded token
    numbers = torch.linspace(0, 1, 100_001)[:-1]
    drawn = draw(logits.expand(len(numbers), -1), numbers)
    torch.testing.assert_close(torch.bincount(drawn, minlength=5) / len(numbers), p[0], atol=1e-4, rtol=0)
    assert draw(logits, torch.tensor([1 - 2**-24])) == 3 and draw(torch.tensor([[-math.inf, 0.0, 1.0]]), torch.tensor([0.0])) == 1


def test_weight_decay_is_for_linear_weights():
    model = make("stackformer", CLASSES)
    decay, rest = (g["params"] for g in parameter_groups(model, 0.1))
    names = {id(p): n for n, p in model.named_parameters()}
    assert len(decay) + len(rest) == len(names)
    assert all(names[id(p)].split(".")[-2] in ("qkv", "out", "0", "2", "code_head", "position_head") and p.ndim == 2 for p in decay)
    assert {names[id(p)] for p in rest if p.ndim == 2} == {"start_emb.weight", "code_emb.weight", "position_emb.weight", "index_emb"}


def test_initial_loss_is_that_of_guessing():
    for name, guess in (("gpt", math.log(K)), ("stackformer", math.log(K) + math.log(16)),
                        ("dual", math.log(K) + (math.log(5) + math.log(17)) / 2)):
        model = MODELS[name]()
        assert abs(model(random_codes(model, 8))["loss"].item() - guess) < 0.1


@pytest.mark.parametrize("call, sentence", [
    (lambda m, s: m.sample(2, top_k=0), "top_k must be at least 1"),
    (lambda m, s: m.sample(2, top_p=0.0), "top_p must be above 0"),
    (lambda m, s: m.sample(2, temperature=-1), "temperature must be at least 0"),
    (lambda m, s: m.sample(2, [0, 1]), "unconditional"),
    (lambda m, s: m.sample(2, cfg_scale=2.0), "needs labels"),
    (lambda m, s: m.sample(2, cfg_schedule="cosine"), "cfg_schedule must be one of constant, linear, power-cosine; it is 'cosine'"),
    (lambda m, s: GPT(K, 4, n_embd=12, n_head=2), "n_embd / n_head must be a multiple of 4; it is 6"),
    (lambda m, s: s.sample(2, [0, 9]), "classes from 0 to 4"),
    (lambda m, s: s.sample(2, [0]), "one for each of the 2 images"),
    (lambda m, s: m.sample(2, generator=[torch.Generator()]), "one generator for each of the 2 rows"),
    (lambda m, s: m.train().sample(2), "call eval"),
    (lambda m, s: m({"indices": torch.zeros(1, 5, 5, dtype=torch.int64)}), "indices must be"),
    (lambda m, s: GPT(K, 4, CLASSES, n_embd=10, n_head=3), "multiple of n_head"),
    (lambda m, s: GPT(K, 4, CLASSES, 1, 2, 16, label_dropout=0.0).eval().sample(1), "needs labels"),
    (lambda m, s: DQTransformer(K, [3, 4]), "multiple of the one before"),
])
def test_bad_input(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(make("gpt"), make("stackformer", CLASSES))


def test_step_compiles_to_the_same():
    model = make("gpt")
    want = model.sample(2, generator=torch.Generator().manual_seed(0))
    model.blocks.step = torch.compile(model.blocks.step, backend="eager", fullgraph=True)  # the whole step is one graph
    assert torch.equal(model.sample(2, generator=torch.Generator().manual_seed(0))["indices"], want["indices"])


class RecordedGraph(TorchDispatchMode):
    """torch.cuda.CUDAGraph without a GPU: keeps the operations between begin and end, and replays them on the same tensors."""

    log, alive = [], 0

    def __init__(self):
        super().__init__()
        RecordedGraph.alive += 1

    def __del__(self):
        RecordedGraph.alive -= 1

    def pool(self):
        return self

    def capture_begin(self, pool=None, capture_error_mode="global"):
        self.operations, self.of = [], pool
        self.log.append("begin")
        self.__enter__()

    def capture_end(self):
        self.__exit__(None, None, None)
        self.log.append("end")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        self.operations.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        for function, args, kwargs, out in self.operations:
            for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs))):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """graphs(): from here on, sampling as on a GPU: CUDA graphs, recorded and replayed on the CPU."""
    made, on = gpt.Cache.__init__, []
    main = SimpleNamespace(wait_stream=lambda _: RecordedGraph.log.append("main waits"))
    side = SimpleNamespace(wait_stream=lambda _: RecordedGraph.log.append("side waits"))
    for name, value in {"CUDAGraph": RecordedGraph, "Stream": lambda: side, "current_stream": lambda: main,
                        "stream": lambda _: nullcontext(), "device": lambda _: nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("streams", "first"):
        monkeypatch.setattr(gpt.Graph, name, {})
    monkeypatch.setattr(gpt.Cache, "graphs", True)
    monkeypatch.setattr(RecordedGraph, "log", [])

    def init(self, *args):
        made(self, *args)
        self.window, self.captured = 4, {} if on else None

    monkeypatch.setattr(gpt.Cache, "__init__", init)
    return lambda: on.append(True)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("autocast", [False, True])
def test_steps_are_replayed_from_a_graph_for_each_window(graphs, name, autocast):
    model, draws = make(name, CLASSES), []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            draws.append(model.sample(3, [0, 1, 4], top_k=8, cfg_scale=2.0, generator=torch.Generator().manual_seed(0)))
        graphs()
    assert all(torch.equal(draws[0][key], draws[1][key]) for key in draws[0])
    stacks = sum(isinstance(m, gpt.Blocks) for m in model.modules())
    captured = RecordedGraph.log.count("begin") - 1  # the first one is for its memory
    assert stacks * 2 <= captured <= stacks * math.ceil(model.length / 4)
    assert RecordedGraph.log == ["side waits", "begin", "end", "main waits"] * (captured + 1)
    gc.collect()
    assert RecordedGraph.alive == 1


def test_graphs_share_memory_and_warm_up_outside(graphs):
    calls = []

    def double(x):
        calls.append(RecordedGraph.log[-1])
        return 2 * x

    graph = gpt.Graph(double, torch.ones(2))
    first = gpt.Graph.first[torch.device("cpu")]
    assert calls == ["side waits", "begin"] and graph.graph.of is first.graph and first.graph.of is None
    assert graph(torch.tensor([3.0, 4.0])).tolist() == [6, 8]


def test_a_cache_that_keeps_rows_captures_anew(graphs):
    model = make("gpt")
    x = torch.randn(2, 16)
    wanted = []
    for _ in range(2):
        cache = gpt.Cache(model.blocks, 2, 8)
        with torch.no_grad():
            cache.step(x, 0)
            cache.keep(torch.tensor([1, 0]))
            wanted.append(cache.step(x, 1).clone())
        graphs()
    assert torch.equal(*wanted)


def test_a_step_that_cannot_be_captured_runs_without_a_graph(graphs, monkeypatch):
    def refuse(self, pool, **_):
        if pool is not None:
            raise RuntimeError("not permitted")
        begin(self, pool)

    model, begin = make("gpt"), RecordedGraph.capture_begin
    want = model.sample(2, generator=torch.Generator().manual_seed(0))
    graphs()
    monkeypatch.setattr(RecordedGraph, "capture_begin", refuse)
    with pytest.warns(UserWarning, match="without CUDA graphs from here on, which is slower: not permitted"):
        got = model.sample(2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(got["indices"], want["indices"]) and not gpt.Cache.graphs
    assert RecordedGraph.log == ["side waits", "begin", "end", "main waits", "side waits", "main waits"]


@pytest.mark.parametrize("files, code", [
    (["gpt.py"], "from gpt import GPT\nmodel, codes = GPT(8, 4, 3, 1, 2, 16), {'indices': torch.randint(8, (2, 4, 4))}"),
    (["gpt.py", "stackformer.py"], "from stackformer import Stackformer\nmodel = Stackformer(8, 4, 3, 3, 1, 1, 2, 16)\n"
     "codes = {'indices': torch.randint(8, (2, 3)), 'positions': torch.tensor([[0, 4, 9]] * 2)}"),
    (["gpt.py", "dq_transformer.py"], "from dq_transformer import DQTransformer\nmodel = DQTransformer(8, [2, 4], 3, 1, 1, 2, 16)\n"
     "codes = {'indices': torch.randint(8, (2, 4, 4)), 'grain': torch.ones(2, 2, 2, dtype=torch.int64)}"),
])
def test_copy(tmp_path, files, code):
    command_in_copy(tmp_path, files, code + """
model(codes, torch.tensor([0, 2]))["loss"].backward()
assert model.eval().sample(2, torch.tensor([0, 2]), cfg_scale=2.0)["indices"].shape == codes["indices"].shape""")
