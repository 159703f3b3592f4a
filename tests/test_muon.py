import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, command_in_copy, forked
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

import muon
from dq_transformer import DQTransformer
from dqvae import DQVAE
from gpt import GPT, parameter_groups
from losses import PatchGAN
from mask_transformer import MaskTransformer
from mqvae import MQVAE
from muon import Muon, orthogonalized, split
from quantizers import SimVQ
from stackformer import Stackformer
from vqgan import VQGAN, VQVAE, VectorQuantizer


def close(one, other, atol=1e-6):
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


def stepped(weight, gradients, parts=1, **settings):
    """A copy of the weight after steps with these gradients."""
    weight = nn.Parameter(weight.clone(memory_format=torch.preserve_format))
    optimizer = Muon([{"params": [weight], "parts": parts}], **{"lr": 0.1, "weight_decay": 0.2} | settings)
    for gradient in gradients:
        weight.grad = gradient.clone(memory_format=torch.preserve_format)
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("shape", [(16, 16), (12, 20), (20, 12), (8, 72), (72, 8), (1, 9)])
def test_singular_values_become_about_one(shape):
    x = torch.randn(3, *shape)
    for scale in (1e-12, 1.0, 1e12):
        result = orthogonalized(x * scale)
        u, _, v = torch.linalg.svd(x[:2], full_matrices=False)  # the third is spoiled by a small value, maybe
        values = torch.linalg.svdvals(result[:2])
        assert values[torch.linalg.svdvals(x[:2]) > 2e-2 * x[:2].norm(dim=(1, 2)).unsqueeze(1)].sub(1).abs().max() < 0.13
        assert F.cosine_similarity(result[:2].flatten(1), (u @ v).flatten(1)).min() > 0.97
        for one, other in zip(x, result):  # together as alone
            close(orthogonalized(one.unsqueeze(0) * scale)[0], other, 1e-4)
    assert orthogonalized(torch.zeros(2, *shape)).count_nonzero() == 0


def test_the_two_ways_of_orthogonalizing_agree():
    """By steps on the wide matrix, and on its Gram matrix; also where singular values are hardly more than rounding."""
    u, _, v = torch.linalg.svd(torch.randn(4, 16, 100), full_matrices=False)
    x = u * torch.logspace(0, -7, 16) @ v
    whole = muon._iterate(x / x.norm(dim=(1, 2), keepdim=True))
    close(orthogonalized(x).norm(dim=1), whole.norm(dim=1), 2e-2)
    assert torch.linalg.svdvals(orthogonalized(x)).max() < 1.15
    x = u * torch.logspace(0, -2, 16) @ v
    close(orthogonalized(x), muon._iterate(x / x.norm(dim=(1, 2), keepdim=True)), 1e-4)


def test_a_step_is_that_of_torch_with_its_coefficients(monkeypatch):
    """torch.optim.Muon computes in bfloat16."""
    monkeypatch.setattr(muon, "COEFFICIENTS", [(3.4445, -4.7750, 2.0315)] * 5)
    weight, gradients = torch.randn(12, 30), torch.randn(4, 12, 30)
    reference = nn.Parameter(weight.clone())
    optimizer = torch.optim.Muon([reference], lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        reference.grad = gradient
        optimizer.step()
    moved = (stepped(weight, gradients) - weight).norm()
    assert (stepped(weight, gradients) - reference.detach()).norm() < 0.02 * moved


def test_a_convolution_is_a_matrix():
    weight, gradients = torch.randn(8, 6, 3, 3), torch.randn(3, 8, 6, 3, 3)
    matrix = stepped(weight.flatten(1), gradients.flatten(2))
    close(stepped(weight, gradients).flatten(1), matrix)
    last = [x.contiguous(memory_format=torch.channels_last) for x in (weight, *gradients)]
    channels_last = stepped(last[0], last[1:])
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    close(channels_last.flatten(1), matrix)


def test_fused_matrices_are_separate():
    weight, gradients = torch.randn(24, 8), torch.randn(3, 24, 8) * torch.tensor([1.0, 5.0, 25.0]).repeat_interleave(8).view(-1, 1)
    fused = stepped(weight, gradients, parts=3)
    close(fused, torch.cat([stepped(w, g) for w, g in zip(weight.chunk(3), gradients.chunk(3, 1))]))
    assert (fused - stepped(weight, gradients)).abs().max() > 0.05


def test_matrices_of_one_shape_are_taken_together(monkeypatch):
    weights = [torch.randn(shape) for shape in ((8, 6), (8, 6, 1, 1), (6, 8), (24, 6), (8, 2, 3))]
    gradients = [torch.randn(3, *w.shape) for w in weights]
    calls = []
    monkeypatch.setattr(muon, "orthogonalized", lambda x: calls.append(tuple(x.shape)) or orthogonalized(x))

    def together():
        params = [nn.Parameter(w.clone()) for w in weights]
        fused = {"params": params[3:4], "parts": 3, "weight_decay": 0.0}
        optimizer = Muon([{"params": params[:3] + params[4:], "parts": 1}, fused], lr=0.1, weight_decay=0.2)
        for i in range(3):
            for p, g in zip(params, gradients):
                p.grad = g[i].clone()
            optimizer.step()
        return [p.detach() for p in params]

    results = together()
    assert sorted(calls) == sorted([(6, 8, 6), (6, 6, 8), (1, 6, 8)] * 3)  # high ones turned
    monkeypatch.setattr(Muon, "CHUNK", 100)
    calls.clear()
    for one, other in zip(results, together()):
        close(one, other, 1e-5)
    assert {(2, 8, 6), (4, 8, 6)} <= set(calls) and (6, 8, 6) not in calls
    for i, (w, g) in enumerate(zip(weights, gradients)):
        close(results[i], stepped(w, g, **({"parts": 3, "weight_decay": 0.0} if i == 3 else {})), 1e-5)


def tiny():
    torch.manual_seed(0)
    return GPT(16, 4, num_classes=3, n_layer=2, n_head=2, n_embd=18, dropout=0.1, rope=False)


def optimizer_of(model, **settings):
    return Muon(split(model, parameter_groups(model, 0.1)), **{"lr": 1e-2} | settings)


def train(model, optimizer, steps, spoil=(), rows=slice(None)):
    """Steps with these numbers, some of them spoiled by gradients that are infinite or NaN, which found_inf says."""
    for step in steps:
        torch.manual_seed(step)
        indices, labels = torch.randint(0, 16, (4, 4, 4)), torch.randint(0, 3, (4,))
        model({"indices": indices[rows]}, labels[rows])["loss"].backward()
        if step in spoil:
            for p in model.parameters():
                p.grad.div_(0)
        if spoil:
            optimizer.found_inf = torch.tensor(float(step in spoil))
        optimizer.step()
        optimizer.zero_grad()


def numbers_of(model, optimizer):
    return [v.clone() for v in model.state_dict().values()] + [v.clone() for s in optimizer.state.values() for v in s.values()]


def test_the_rest_is_adamw():
    model = tiny()
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6}  # only AdamW's, without split
    reference = copy.deepcopy(model)
    train(model, Muon(parameter_groups(model, 0.1), **settings), range(4))
    train(reference, torch.optim.AdamW(parameter_groups(reference, 0.1), **settings), range(4))
    for one, other in zip(model.parameters(), reference.parameters()):
        close(one, other, 1e-5)


@pytest.mark.parametrize("spoil", [[0], [2]])
def test_a_skipped_step_leaves_all_as_it_was(spoil):
    model = tiny()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    before = numbers_of(model, optimizer)
    train(model, optimizer, [7], spoil=[7])
    assert all(torch.equal(one, other) for one, other in zip(before, numbers_of(model, optimizer), strict=True))
    train(model, optimizer, [2], spoil=[7])
    assert all(v.isfinite().all() for v in numbers_of(model, optimizer))
    # Also if it is the first one
    runs = []
    for steps in ([0, 1, 2], [step for step in [0, 1, 2] if step not in spoil]):
        model = tiny()
        optimizer = optimizer_of(model)
        train(model, optimizer, steps, spoil)
        runs.append(numbers_of(model, optimizer))
    assert len(runs[0]) == len(runs[1]) and all(torch.equal(one, other) for one, other in zip(*runs))


def test_parameters_without_a_gradient_stay():
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    optimizer = optimizer_of(model)
    model.blocks.layers[0].requires_grad_(False)
    train(model, optimizer, range(2))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if not name.startswith("blocks.layers.0.")}


def test_the_scaler_of_half_precision():
    runs = []
    for scale, overflow in ((1.0, False), (64.0, False), (64.0, True)):
        model = tiny()
        optimizer = optimizer_of(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for step in range(2):
            torch.manual_seed(step)
            scaler.scale(model({"indices": torch.randint(0, 16, (4, 4, 4))}, torch.randint(0, 3, (4,)))["loss"]).backward()
            if overflow:
                model.blocks.layers[0].out.weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        runs.append(numbers_of(model, optimizer))
    for one, other in zip(*runs[:2]):
        close(one, other, 1e-5)
    assert scaler.get_scale() == 16 and not optimizer.state
    assert all(torch.equal(one, other) for one, other in zip(runs[2], tiny().state_dict().values(), strict=True))


def test_resume_is_exact(tmp_path):
    """Through the functions that checkpoint.py uses, which make the state by a step with lr 0."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model = tiny()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    torch.save([model.state_dict(), get_optimizer_state_dict(model, optimizer, options=whole)], tmp_path / "3.pt")
    train(model, optimizer, range(3, 6))
    weights, state = torch.load(tmp_path / "3.pt", weights_only=True)
    other = tiny()
    resumed = optimizer_of(other)
    set_optimizer_state_dict(other, resumed, state, options=whole)
    other.load_state_dict(weights)
    assert [group["parts"] for group in resumed.param_groups] == [group["parts"] for group in optimizer.param_groups]
    train(other, resumed, range(3, 6))
    assert all(torch.equal(*pair) for pair in zip(numbers_of(model, optimizer), numbers_of(other, resumed), strict=True))


def test_two_processes_equal_one(tmp_path):
    """With the same weights in both (DDP) and with a part of each weight in each (FSDP2); 1e-4 where a step is 1e-2 x 0.2 for a
    matrix's number. 18 rows are 9 for each, and the heads of 16 codes have 8; 3 label embeddings are 2 and 2."""
    (tmp_path / "train.py").write_text(f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
from test_muon import *
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
rows = slice(2 * rank, 2 * rank + 2)
model = tiny().eval()
optimizer = optimizer_of(model)
train(DistributedDataParallel(model), optimizer, range(4), [1], rows)
state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
sharded = tiny().eval()
mesh = torch.distributed.init_device_mesh("cpu", (2,))
for layer in sharded.blocks.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(sharded, mesh=mesh)
Muon.CHUNK = 1000
sharded_optimizer = optimizer_of(sharded)
assert sharded_optimizer.counts() == optimizer.counts() == (12, 22)
train(sharded, sharded_optimizer, range(4), [1], rows)
assert all(v.to_local().numel() < v.numel() for s in sharded_optimizer.state.values() for k, v in s.items() if k != "step")
whole = {{name: p.full_tensor() for name, p in sharded.named_parameters()}}
sharded_state = get_optimizer_state_dict(sharded, sharded_optimizer, options=StateDictOptions(full_state_dict=True))
torch.save([dict(model.named_parameters()), state["state"], whole, sharded_state["state"]], f"{tmp_path}/{{rank}}.pt")
torch.distributed.destroy_process_group()
""")
    forked(tmp_path, tmp_path / "train.py", processes=2)
    model = tiny().eval()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(4), [1])
    state = get_optimizer_state_dict(model, optimizer)["state"]
    for rank in range(2):
        weights, replicated, sharded_weights, sharded = torch.load(tmp_path / f"{rank}.pt")
        for name, p in model.named_parameters():
            close(weights[name].detach(), p.detach(), 1e-4)
            close(sharded_weights[name].detach(), p.detach(), 1e-4)
        for name, values in state.items():
            for key, value in values.items():
                close(replicated[name][key], value, 1e-5)
                if rank == 0 or sharded:  # a whole state is the first one's
                    close(sharded[name][key], value, 1e-5)


NET = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [8], "z_channels": 32}
OF_CODES = {"codebook_size": 32, "num_classes": 3, "n_head": 2, "n_embd": 16}
RULE = {  # what has two dimensions or more and is AdamW's
    "vqgan": (lambda: VQGAN(16, **NET, quantizer=VectorQuantizer(32, 8)), {
        "quantizer.codebook", "encoder.down.conv_in.weight", "to_image.weight"}),
    "simvq": (lambda: VQGAN(16, **NET, quantizer=SimVQ(32, 8)), {
        "quantizer.projection.weight", "encoder.down.conv_in.weight", "to_image.weight"}),
    "vqvae": (lambda: VQVAE(32, quantizer=VectorQuantizer(32, 8)), {
        "quantizer.codebook", "encoder.0.weight", "to_image.weight"}),
    "mqvae": (lambda: MQVAE(16, **NET, demask_layers=2), {
        "encoder.down.conv_in.weight", "score_net.conv2.weight", "to_image.weight"}),
    "dqvae": (lambda: DQVAE(16, [4, 2], **NET | {"ch_mult": [1, 1, 1]}, decoder_ch_mult=[1, 1]), {
        "down.conv_in.weight", "router.fc2.weight", "position.rows", "position.columns", "position.fourier.weight", "to_image.weight"}),
    "patchgan": (lambda: PatchGAN(8), {"0.weight", "11.weight"}),
    "gpt": (lambda: GPT(grid=4, n_layer=2, **OF_CODES), {"index_emb", "start_emb.weight", "code_emb.weight", "head.weight"}),
    "gpt_factored": (lambda: GPT(grid=4, n_layer=2, codebook_factors=[4, 8], **OF_CODES), {
        "index_emb", "start_emb.weight", "code_emb.tables.0.weight", "code_emb.tables.1.weight", "head.embs.0.weight",
        "head.heads.0.weight", "head.heads.1.weight"}),
    "stackformer": (lambda: Stackformer(grid=4, num_codes=5, code_layers=2, position_layers=1, **OF_CODES), {
        "index_emb", "start_emb.weight", "code_emb.weight", "position_emb.weight", "code_head.weight", "position_head.weight"}),
    "dq_transformer": (lambda: DQTransformer(grids=[2, 4], position_layers=1, content_layers=2, **OF_CODES), {
        "index_emb", "content_emb.weight", "position_emb.weight", "grain_emb.weight", "content_head.weight", "position_head.weight"}),
    "mask_transformer": (lambda: MaskTransformer(grids=[2, 4], layout_layers=1, content_layers=2, **OF_CODES), {
        "start_emb.weight", "kind_emb.weight", "region_emb.weight", "code_emb.weight", "place_emb.weight", "layout_head.weight",
        "content_head.weight"}),
}


@pytest.mark.parametrize("name", RULE)
def test_the_rule_takes_what_is_hidden(name):
    make, left = RULE[name]
    model = make()
    trained = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    groups = split(model, [{"params": [p for p in model.parameters() if p.requires_grad]}])
    parts = {trained[id(p)]: group["parts"] for group in groups for p in group["params"]}
    assert set(parts) == set(trained.values())
    assert {n for n, p in model.named_parameters() if n in parts and p.ndim > 1 and parts[n] == 0} == left
    assert all(p.ndim > 1 for n, p in model.named_parameters() if parts.get(n))
    assert {n for n in parts if parts[n] == 3} == {n for n in parts if n.endswith(".qkv.weight")}
    assert {1} <= set(parts.values()) <= {0, 1, 3}
    matrices = sum(parts.values())
    assert Muon(groups).counts() == (matrices, sum(n == 0 for n in parts.values()))


def test_weight_decay_is_that_of_the_groups():
    model = tiny()
    before = parameter_groups(model, 0.1)
    decay = {id(p): group["weight_decay"] for group in before for p in group["params"]}
    after = Muon(split(model, before)).param_groups
    assert {id(p): group["weight_decay"] for group in after for p in group["params"]} == decay
    assert sum(len(group["params"]) for group in after) == len(decay)
    assert [(group["parts"], group["weight_decay"]) for group in after] == [(3, 0.1), (1, 0.1), (0, 0.1), (0, 0.0)]
    assert {group["lr"] for group in after} == {1e-3}


def test_copy(tmp_path):
    command_in_copy(tmp_path, ["muon.py"], """
from muon import Muon, split
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 5))
model[2].parts = 0
x = torch.randn(64, 8)
optimizer = Muon(split(model, [{"params": model.parameters()}]), lr=1e-2)
assert optimizer.counts() == (1, 3)
losses = []
for _ in range(100):
    losses.append((model(x) - x[:, :5].sin()).square().mean())
    losses[-1].backward()
    optimizer.step()
    optimizer.zero_grad()
assert losses[-1] < 0.3 * losses[0]
""")
