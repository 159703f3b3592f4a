"""MaskTransformer: identities on tiny networks. And editing: what every transformer keeps of given codes."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import command_in_copy
from test_transformers import MODELS as OTHERS
from test_transformers import make, memorise, random_codes, rows

from gpt import Guidance, NotFinite, rotary_table, rotated
from mask_transformer import MaskTransformer, halton_rank

K, CLASSES = 12, 5
TINY = {"layout_layers": 1, "content_layers": 2, "n_head": 2, "n_embd": 16}
MODELS = {  # and the model whose codes have the same form
    "vq": (lambda **more: MaskTransformer(K, [[2, 8]], **TINY | more), "gpt"),
    "mq": (lambda **more: MaskTransformer(K, [[8, 2]], 6, **TINY | more), "stackformer"),
    "dual": (lambda **more: MaskTransformer(K, [2, 4], **TINY | more), "dual"),
    "triple": (lambda **more: MaskTransformer(K, [[1, 2], [2, 4], [4, 8]], **TINY | more), "triple"),
}


def make_mask(name, classes=CLASSES, seed=0, **more):
    torch.manual_seed(seed)
    model = MODELS[name][0](num_classes=classes, **more)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def codes_for(name, n=6, seed=0):
    return random_codes(OTHERS[MODELS[name][1]](), n, seed)


def random_mask(model, n, seed=0):
    return torch.rand(n, *model.places.grids[-1], generator=torch.Generator().manual_seed(seed)) < 0.5


def check_valid(model, codes):
    """Exactly N positions in ascending order, and coarse codes that cover all of their cells."""
    assert all(v.dtype == torch.int64 for v in codes.values()) and codes["indices"].min() >= 0 and codes["indices"].max() < K
    if model.num_codes:
        assert codes["positions"].shape == codes["indices"].shape == (len(codes["indices"]), model.num_codes)
        assert (codes["positions"].diff(dim=1) > 0).all() and codes["positions"].min() >= 0 and codes["positions"].max() < 16
    layout, content = model.places.read(codes)
    packed = model.places.pack(layout)
    again = model.places.codes(layout, packed.place, content.gather(1, packed.place))
    assert codes.keys() == again.keys() and all(torch.equal(codes[k], again[k]) for k in codes)


@pytest.mark.parametrize("name", MODELS)
def test_codes_are_valid_whatever_the_weights(name):
    kinds = set()
    for seed in range(10):
        model = make_mask(name, seed=seed)
        codes = model.sample(5, torch.arange(5), steps=1 + seed, layout_steps=1 + seed, temperature_pos=3.0, cfg_scale=1 + seed % 3,
                             cfg_schedule=("constant", "linear", "power-cosine")[seed % 3], top_k=1 + seed, choice_temperature=seed,
                             order=("confidence", "halton")[seed % 2])
        check_valid(model, codes)
        kinds |= set(codes.get("grain", torch.zeros(1, dtype=torch.int64)).flatten().tolist())
    assert kinds == set(range(len(model.places.grids)))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_known_stays(name):
    """All known: the codes themselves. A part: its codes and its layout stay, and the rest is drawn anew, in valid codes."""
    model, codes, labels = make_mask(name), codes_for(name), torch.arange(6) % CLASSES
    check_valid(model, codes)
    again = model.sample(6, labels, codes=codes, known=torch.ones(6, *model.places.grids[-1], dtype=torch.bool))
    assert all(torch.equal(again[k], codes[k]) for k in codes)
    layout, content = model.places.read(codes)
    for seed in range(5):
        known = random_mask(model, 6, seed)
        drawn = model.sample(6, labels, steps=3, codes=codes, known=known, generator=torch.Generator().manual_seed(seed))
        check_valid(model, drawn)
        new_layout, new_content = model.places.read(drawn)
        for place, (region, kind) in enumerate(zip(model.places.region.tolist(), model.places.kind.tolist())):
            cells = known.flatten(1)[:, (model.places.cover == place).any(0)].all(1) & (layout[:, region] == kind)
            assert (new_layout[cells, region] == kind).all() and torch.equal(new_content[cells, place], content[cells, place])
        if name == "mq":  # also the cells without a code
            assert torch.equal(new_layout[known.flatten(1)], layout[known.flatten(1)])
        assert not torch.equal(drawn["indices"], codes["indices"])


@pytest.mark.parametrize("name", MODELS)
def test_a_sample_does_not_depend_on_the_batch(name):
    """In float64: rounding then decides nothing that is drawn."""
    model, labels = make_mask(name).double(), torch.arange(6) % CLASSES
    settings = {"cfg_scale": 2.0, "top_p": 0.9, "steps": 4}
    together = model.sample(6, labels, generator=[torch.Generator().manual_seed(i) for i in range(6)], **settings)
    for i in range(6):
        alone = model.sample(1, labels[i:i + 1], generator=torch.Generator().manual_seed(i), **settings)
        assert all(torch.equal(alone[k][0], together[k][i]) for k in alone)
    assert not all(torch.equal(together["indices"][0], together["indices"][i]) for i in range(1, 6))


@pytest.mark.parametrize("name", MODELS)
def test_extreme_temperatures(name):
    model, labels = make_mask(name), torch.arange(4)

    def sample(**settings):
        return model.sample(4, labels, steps=4, generator=[torch.Generator().manual_seed(i) for i in range(4)], **settings)

    greedy = sample(temperature=0)
    for coldest in (1e-38, 1e-300):
        assert all(torch.equal(v, greedy[k]) for k, v in sample(temperature=coldest).items())
    hot = sample(temperature=1e300, choice_temperature=1e300)
    check_valid(model, hot)
    assert len(hot["indices"].unique()) > K / 2
    for place in ("positions", "grain"):  # the layout is random, too
        assert place not in hot or not torch.equal(hot[place][0], hot[place][1])


@pytest.mark.parametrize("name", MODELS)
def test_a_padded_row_equals_the_row_alone(name):
    model, codes, labels = make_mask(name), codes_for(name), torch.arange(6) % CLASSES
    masked, together, bits = random_mask(model, 6), None, model.bits(codes, labels)
    together = model.logits(codes, labels, masked)
    lengths = model.lengths(codes) - 1
    assert (len(lengths.unique()) > 2) == (name in ("dual", "triple"))
    for i in range(6):
        alone = model.logits(rows(codes, [i]), labels[i:i + 1], masked[i:i + 1])
        torch.testing.assert_close(together["content"][i, :lengths[i]], alone["content"][0])
        if "layout" in alone:
            torch.testing.assert_close(together["layout"][i], alone["layout"][0])
        torch.testing.assert_close(bits[i:i + 1], model.bits(rows(codes, [i]), labels[i:i + 1]))


@pytest.mark.parametrize("name", MODELS)
def test_each_step_keeps_one(name):
    """With as many steps as codes and temperature 0, a step keeps the code that the model is most
    confident of, given those before. In float64, where rounding decides nothing."""
    model, trace = make_mask(name).double(), []
    n = model.num_codes or model.places.cells
    codes = model.sample(1, [2], steps=n, temperature=0, choice_temperature=0, trace=trace)
    when, fixed = trace[0].flatten(1), torch.zeros(1, *model.places.grids[-1], dtype=torch.bool)
    layout, content = model.places.read(codes)
    packed = model.places.pack(layout)
    order = when.unique()[when.unique() > 0].tolist()
    assert order == list(range(1, int(packed.counts) + 1))
    for step in order:
        logits = model.logits(codes, torch.tensor([2]), ~fixed)["content"]                   # (1, L, K)
        places, _ = model.places.kept(layout, fixed)
        confidence, code = logits.log_softmax(-1).max(-1)
        confidence = confidence.masked_fill(places.gather(1, packed.place), -math.inf)
        best = int(confidence.argmax())
        assert code[0, best] == content.gather(1, packed.place)[0, best]
        fixed = fixed | (when == step).view_as(fixed)
        assert model.places.kept(layout, fixed)[0][0, packed.place[0, best]]


@pytest.mark.parametrize("name", MODELS)
def test_halton_order(name):
    """The cells of an image are decided as the sequence reaches them, whatever the model is confident of."""
    model = make_mask(name)
    for known in (None, random_mask(model, 5)):
        trace, codes = [], None if known is None else codes_for(name, 5)
        drawn = model.sample(5, torch.arange(5), steps=4, order="halton", trace=trace, codes=codes, known=known)
        layout, _ = model.places.read(drawn)
        packed = model.places.pack(layout)
        when = trace[0].flatten(1).gather(1, drawn["positions"]) if name == "mq" else trace[0]
        when = model.places.read(drawn | {"indices": when})[1].gather(1, packed.place)
        for row in range(5):
            there = packed.valid[row] & (when[row] > 0)
            ranks, steps = model.places.rank[packed.place[row, there]], when[row, there]
            assert len(ranks.unique()) == len(ranks)
            assert (steps[ranks.argsort()].diff() >= 0).all() and (known is not None or steps.max() == min(4, len(steps)))


def test_halton_sequence():
    """Points (1/2, 1/3), (1/4, 2/3), (3/4, 1/9), ... after (0, 0); every cell has one; early ones are spread."""
    assert halton_rank((2, 3)).tolist() == [0, 4, 2, 3, 1, 5]
    for grid in ((1, 1), (3, 5), (16, 16), (1, 7), (32, 8)):
        rank = halton_rank(grid)
        assert len(rank.unique()) == len(rank) == math.prod(grid) and rank.max() < 24 * len(rank)
    first = halton_rank((16, 16)).argsort()[:32]
    blocks = torch.bincount(first // 64 * 4 + first % 16 // 4, minlength=16)  # 4 x 4 cells each
    assert blocks.min() >= 1 and blocks.max() <= 3


@pytest.mark.parametrize("name", MODELS)
def test_the_schedule_and_the_trace(name):
    """The number of codes that each step decides; what was kept is step 0, and cells without a code are -1."""
    model, codes = make_mask(name), codes_for(name, 3)
    for steps in (1, 5, 100):
        for known in (torch.zeros(3, *model.places.grids[-1], dtype=torch.bool), random_mask(model, 3)):
            trace = []
            drawn = model.sample(3, [0, 1, 2], steps=steps, layout_steps=steps, trace=trace, codes=codes, known=known)
            layout, _ = model.places.read(drawn)
            packed = model.places.pack(layout)
            when = trace[0].flatten(1).gather(1, drawn["positions"]) if name == "mq" else trace[0]
            when = model.places.read(drawn | {"indices": when})[1].gather(1, packed.place)
            kept = model.places.kept(model.places.read(codes)[0], known)[0].gather(1, packed.place)
            for row in range(3):
                there, left = packed.valid[row], int((packed.valid & ~kept)[row].sum())
                assert torch.equal(when[row, there] == 0, kept[row, there])
                total = left
                for step in range(1, steps + 1):
                    after = max(min(left - 1, max(int(total * math.cos(math.pi / 2 * step / steps)), steps - step)), 0)
                    assert int((when[row, there] == step).sum()) == left - after
                    left = after
            if name == "mq":
                assert torch.equal(trace[0].flatten(1) == -1, layout == 0)


def test_rotary_embeddings_see_differences_of_position():
    """Of centres in two dimensions, in finest cells, whatever the granularity."""
    cos, sin = rotary_table([[1, 2], [2, 4], [4, 8]], 8)
    assert cos.shape == sin.shape == (1 + 2 + 8 + 32, 8) and (cos[0] == 1).all() and (sin[0] == 0).all()
    frequencies = torch.tensor([1.0, 0.1])
    for number, (y, x) in ((1, (2, 2)), (2, (2, 6)), (3, (1, 1)), (8, (3, 3)), (11, (0.5, 0.5)), (42, (3.5, 7.5))):
        angles = torch.cat([y * frequencies, x * frequencies])
        torch.testing.assert_close(cos[number], angles.cos().repeat(2))
        torch.testing.assert_close(sin[number], torch.cat([-angles.sin(), angles.sin()]))
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 1, 43, 8)
    turned = [rotated(v, cos, sin)[0, 0] for v in (q, k)]
    torch.testing.assert_close(turned[0].norm(dim=1), q[0, 0].norm(dim=1))
    scores = turned[0] @ turned[1].t()                                                       # (43, 43)

    def cell(y, x):
        return 11 + 8 * y + x

    torch.testing.assert_close(scores[cell(0, 0), cell(2, 3)], scores[cell(1, 4), cell(3, 7)])
    torch.testing.assert_close(scores[3, 8], scores[cell(0, 0), cell(2, 2)])                 # from (1, 1) to (3, 3)
    assert abs(scores[cell(0, 0), cell(2, 3)] - scores[cell(0, 0), cell(3, 2)]) > 1e-4
    model, seen = make_mask("dual"), []
    for layer in (*model.layout_blocks.layers, *model.content_blocks.layers):
        layer.register_forward_hook(lambda _, given, kept, out: seen.append(kept["rope"]), with_kwargs=True)
    model.logits(codes_for("dual"))
    assert len(seen) == 3 and all(rope is not None and rope.std() > 0.1 for rope in seen)


@pytest.mark.parametrize("name", ["vq", "mq", "dual"])
def test_the_bound_is_above_the_likelihood(name):
    """Of a model that draws tokens one by one in a random order, by enumeration of the orders; and equal for an order-free target."""
    shape = {"vq": {"grids": [[1, 3]]}, "mq": {"grids": [[1, 3]], "num_codes": 2}, "dual": {"grids": [[1, 2], [2, 4]]}}[name]
    torch.manual_seed(0)
    model = MaskTransformer(3, **shape, **TINY | {"n_embd": 8}).eval()
    codes = {"vq": {"indices": torch.tensor([[[2, 0, 1]]])}, "mq": {"indices": torch.tensor([[2, 1]]), "positions": torch.tensor([[0, 2]])},
             "dual": {"indices": torch.tensor([[[2, 2, 0, 1], [2, 2, 1, 1]]]), "grain": torch.tensor([[[0, 1]]])}}[name]
    if name == "dual":
        codes["indices"][0, :, 2:] = torch.tensor([[0, 1], [1, 2]])
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    layout, content = model.places.read(codes)
    packed = model.places.pack(layout)
    regions, count, kinds = layout.shape[1], int(packed.counts), model.kinds
    guess = count * math.log2(3) + regions * math.log2(kinds)
    torch.testing.assert_close(model.bits(codes), torch.tensor([guess]))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.8)
    forward, known = model._nats, {}

    def once(*args):  # for each mask, of which there are few
        mask = str({name: m.tolist() for name, m in args[3].items()})
        known[mask] = known[mask] if mask in known else forward(*args)
        return known[mask]

    model._nats, content, starts = once, content.gather(1, packed.place), torch.zeros(1, dtype=torch.int64)

    def nats(part, hidden):
        masks = {"layout": torch.zeros_like(layout, dtype=torch.bool), "content": torch.zeros_like(content, dtype=torch.bool)}
        masks[part][0, list(hidden)] = True
        return model._nats(layout, content, packed, masks, starts)[part][0]

    exact = bound = 0.0
    for part, n in (("layout", regions), ("content", count)) if kinds > 1 else (("content", count),):
        chains = torch.stack([sum(nats(part, order[i:])[order[i]] for i in range(n)) for order in itertools.permutations(range(n))])
        exact += -(chains.neg().logsumexp(0) - math.log(len(chains))) / math.log(2)
        bound += chains.mean() / math.log(2)
    assert exact < bound  # strictly: what a token is given matters
    torch.testing.assert_close(model.bits(codes, strata=4000)[0], bound, rtol=0.02, atol=0)
    assert torch.equal(model.bits(codes), model.bits(codes))


@pytest.mark.parametrize("name", MODELS)
def test_loss_by_hand(name):
    """In training, the loss is a sum over masked tokens; parts are means over them; dividing by the mean length weighs codes equally."""
    model, codes, seen = make_mask(name, dropout=0.0, label_dropout=0.0).train(), codes_for(name), []
    nats = model._nats
    model._nats = lambda *args: seen.append((args[3], nats(*args))) or seen[-1][1]
    model.survey([codes])
    assert model.mean_length == (model.lengths(codes) - 1).float().mean()
    out = model(codes, torch.arange(6) % CLASSES)
    hidden, found = seen[0]
    want = 0.0
    for part, x in found.items():
        masked, length = hidden[part], {"layout": model.regions, "content": model.mean_length}[part]
        assert (x[~masked] == 0).all() and (x[masked] > 0).all() and masked.any(1).all()
        torch.testing.assert_close(out[part], x.sum() / masked.sum())
        want = want + x.sum() / (6 * (length * 2 / math.pi + 0.5))
    torch.testing.assert_close(out["loss"], want)
    with torch.no_grad():
        model.mean_length = None  # without a survey: that of the batch
        many = [{k: float(v) for k, v in model(codes, torch.arange(6) % CLASSES).items()} for _ in range(300)]
    mean = {k: sum(one[k] for one in many) / len(many) for k in many[0]}
    assert mean["loss"] == pytest.approx(mean["content"] + mean.get("layout", 0.0), rel=0.05)  # it divides by the right numbers
    out["loss"].backward()
    assert not [k for k, p in model.named_parameters() if p.grad is None]


def test_masks_follow_the_cosine_schedule():
    model, seen = make_mask("vq").train(), []

    def nats(layout, content, packed, hidden, starts):
        seen.append(hidden["content"].sum(1))
        return {"content": torch.ones(hidden["content"].shape)}

    model._nats = nats
    codes = codes_for("vq", 64)
    for _ in range(20):
        model(codes, torch.arange(64) % CLASSES)
    counts = torch.cat(seen)
    want = torch.cos(torch.linspace(0, 1, 10_001) * math.pi / 2).mul(16).ceil().clamp(min=1)
    for k in range(1, 17):
        assert abs((counts == k).float().mean() - (want == k).float().mean()) < 0.02
    assert (torch.stack(seen).float().mean(1) / 16 - 2 / math.pi - 1 / 32).abs().max() < 0.01  # spread evenly over each batch
    model.eval()
    model(codes)
    model({"indices": codes["indices"][40:]})
    assert torch.equal(seen[-2][40:], seen[-1]) and len(seen[-1].unique()) > 5  # an image's own, in any batch


@pytest.mark.parametrize("name", MODELS)
def test_it_memorises(name):
    """16 labelled images; a label then gives its image's codes, and a part of an image the rest of it."""
    torch.manual_seed(0)
    model = MODELS[name][0](num_classes=16, n_embd=64, dropout=0.0, label_dropout=0.3)
    codes, labels = codes_for(name, 16), torch.arange(16)
    assert memorise(model, codes, labels, 1e-3, 1000, choice_temperature=0)
    many = {k: v.repeat_interleave(8, 0) for k, v in codes.items()}  # now the known part must say which image it is
    known = torch.rand(128, *model.places.grids[-1], generator=torch.Generator().manual_seed(0)) < 0.9
    rest = model.eval().sample(128, temperature=0, codes=many, known=known)
    same = torch.stack([(rest[k] == many[k]).flatten(1).all(1) for k in codes]).all(0).float().mean()
    nothing = model.sample(128, temperature=0)
    chance = torch.stack([(nothing[k] == many[k]).flatten(1).all(1) for k in codes]).all(0).float().mean()
    # A model that does not see it draws one of 16; seen were .48 to .87
    assert same > 0.2 and same > 2 * chance, (same, chance)


def test_guidance_grows(monkeypatch):
    model, scales, guide = make_mask("dual"), [], Guidance.__call__
    monkeypatch.setattr(Guidance, "__call__", lambda self, logits: scales.append(self.scale) or guide(self, logits))
    for schedule, want in (("constant", [3.0] * 6), ("linear", [2.0, 3.0, 1.5, 2.0, 2.5, 3.0])):
        scales.clear()
        model.sample(2, [0, 1], steps=4, layout_steps=2, cfg_scale=3.0, cfg_schedule=schedule)
        assert scales == want


@pytest.mark.parametrize("name, head", [
    ("vq", "content_head"), ("mq", "layout_head"), ("dual", "content_head")])
def test_logits_that_are_not_finite_are_an_error(name, head):
    model = make_mask(name)
    with torch.no_grad():
        getattr(model, head).weight[1, 0] = math.nan
    with pytest.raises(NotFinite, match="logits are not finite"):
        model.sample(2, [0, 1])


@pytest.mark.parametrize("call, sentence", [
    (lambda m, c: m.sample(6, steps=0), "steps and layout_steps must be at least 1"),
    (lambda m, c: m.sample(6, choice_temperature=-1), "choice_temperature at least 0"),
    (lambda m, c: m.sample(6, order="random"), "order must be confidence or halton; it is 'random'"),
    (lambda m, c: m.sample(6, temperature_pos=-1), "temperature must be at least 0"),
    (lambda m, c: m.sample(6, codes=c), "both codes and known"),
    (lambda m, c: m.sample(6, known=torch.ones(6, 4, 4, dtype=torch.bool)), "both codes and known"),
    (lambda m, c: m.sample(6, codes=c, known=torch.ones(6, 2, 2, dtype=torch.bool)), r"known bool, \(6, 4, 4\); they are"),
    (lambda m, c: m.sample(6, codes=c, known=torch.ones(6, 4, 4)), "known bool"),
    (lambda m, c: m.sample(3, codes=c, known=torch.ones(3, 4, 4, dtype=torch.bool)), "codes must be those of 3 images"),
    (lambda m, c: m({"indices": c["indices"]}), r"grain must be \(B, 2, 2\)"),
    (lambda m, c: m(c | {"indices": c["indices"][:, :2]}), r"indices must be \(B, 4, 4\)"),
    (lambda m, c: MaskTransformer(K, [4, 2]), "each a multiple of the one before"),
    (lambda m, c: MaskTransformer(K, [2, 4], 3), "num_codes must be at most the cells of one grid"),
    (lambda m, c: MaskTransformer(K, [2], 5), "num_codes must be at most the cells of one grid"),
])
def test_bad_input(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(make_mask("dual"), codes_for("dual"))


def test_copy(tmp_path):
    command_in_copy(tmp_path, ["gpt.py", "mask_transformer.py"], """
from mask_transformer import MaskTransformer
model = MaskTransformer(8, [2, 4], None, 3, 1, 1, 2, 16)
codes = {'indices': torch.randint(8, (2, 4, 4)), 'grain': torch.ones(2, 2, 2, dtype=torch.int64)}
model(codes, torch.tensor([0, 2]))["loss"].backward()
assert model.eval().sample(2, torch.tensor([0, 2]), cfg_scale=2.0)["indices"].shape == codes["indices"].shape""")


# Editing with the autoregressive models


@pytest.mark.parametrize("name", ["gpt", "stackformer", "gpt_factors"])
def test_what_comes_first_stays(name):
    """Cells up to some cell, another one for each image; the rest is drawn as if the model had drawn the first ones itself."""
    model, n = make(name, CLASSES).double(), 5  # float64: given and drawn codes round differently
    codes, labels = random_codes(model, n), torch.arange(n)
    first = torch.tensor([0, 3, 8, 15, 16])
    known = (torch.arange(16) < first.unsqueeze(1)).view(n, *model.grid)
    for seed in range(5):
        drawn = model.sample(n, labels, cfg_scale=1.5, generator=torch.Generator().manual_seed(seed), codes=codes, known=known)
        for i, count in enumerate(first.tolist()):
            if name == "stackformer":
                assert (drawn["positions"][i].diff() > 0).all() and len(drawn["positions"][i]) == 6
                kept = codes["positions"][i] < count
                assert torch.equal(drawn["positions"][i] < count, kept)
                assert torch.equal(drawn["positions"][i][kept], codes["positions"][i][kept])
            else:
                kept = torch.arange(16).view(model.grid) < count
            assert torch.equal(drawn["indices"][i][kept], codes["indices"][i][kept])
        assert all(torch.equal(drawn[k][-1], codes[k][-1]) for k in codes) and not torch.equal(drawn["indices"][0], codes["indices"][0])
    if name != "stackformer":  # there, that the known cells have no more codes is known too
        own = model.sample(n, labels, generator=[torch.Generator().manual_seed(i) for i in range(n)])
        again = model.sample(n, labels, generator=[torch.Generator().manual_seed(i) for i in range(n)], codes=own, known=known)
        assert torch.equal(own["indices"], again["indices"])
    for given, sentence in (((codes, ~known), "only the first ones can stay"), ((codes, known.float()), "known bool"),
                            ((codes, None), "both codes and known"), ((None, known), "both codes and known"),
                            ((rows(codes, [0]), known), "codes must be those of 5 images")):
        with pytest.raises(ValueError, match=sentence):
            model.sample(n, labels, codes=given[0], known=given[1])
    with pytest.raises(ValueError, match="only the first ones can stay"):
        model.check_known(codes, ~known)
    model.check_known(codes, known)


@pytest.mark.parametrize("name", ["dual", "dual_region_first", "triple", "dual_factors"])
def test_coarse_codes_stay(name):
    model, n = make(name, CLASSES).double(), 6  # as above
    codes, labels = random_codes(model, n), torch.arange(n) % CLASSES
    grain = F.interpolate(codes["grain"].unsqueeze(1).float(), model.grids[-1]).squeeze(1)
    for level in range(model.grains):
        known = grain <= level
        drawn = model.sample(n, labels, cfg_scale=1.5, codes=codes, known=known)
        assert torch.equal(drawn["indices"][known], codes["indices"][known])
        assert torch.equal(drawn["grain"][codes["grain"] <= level], codes["grain"][codes["grain"] <= level])
        some = model.order(codes).counts[:, level] > 0  # a granularity of which all codes stay gets no others
        assert torch.equal(drawn["grain"][some] <= level, codes["grain"][some] <= level)
        again = model.unorder(model.order(drawn))
        assert all(torch.equal(drawn[k], again[k]) for k in drawn)
    assert all(torch.equal(drawn[k], codes[k]) for k in codes)  # all was known
    # The first coarse codes only
    tokens = model.order(codes)
    row = int(tokens.counts[:, 0].argmax())
    slots = tokens.slot[row, 1:1 + int(tokens.counts[row, 0])]
    known = torch.zeros(n, *model.grids[-1], dtype=torch.bool)
    known[row] = (model.cover == slots[0]).any(0).view(model.grids[-1])
    drawn = model.sample(n, labels, codes=codes, known=known)
    assert torch.equal(drawn["indices"][known], codes["indices"][known])
    for given in ((codes, None), (None, known)):
        with pytest.raises(ValueError, match="both codes and known"):
            model.sample(n, labels, codes=given[0], known=given[1])
    with pytest.raises(ValueError, match="such as all coarse codes"):
        model.sample(n, labels, codes=codes, known=grain == model.grains - 1)
    with pytest.raises(ValueError, match="such as all coarse codes"):
        model.check_known(codes, grain == model.grains - 1)
    model.check_known(codes, known)
    own = model.sample(n, labels, generator=[torch.Generator().manual_seed(i) for i in range(n)])
    known = F.interpolate(own["grain"].unsqueeze(1).float(), model.grids[-1]).squeeze(1) == 0
    again = model.sample(n, labels, generator=[torch.Generator().manual_seed(i) for i in range(n)], codes=own, known=known)
    assert all(torch.equal(own[k], again[k]) for k in own)
