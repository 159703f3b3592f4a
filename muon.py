"""Muon for the matrices of transformers and convolutional networks, AdamW for the rest.

    Muon            one optimizer object for all of a module
    split           parts AdamW's parameter groups: what is Muon's, what AdamW's
    orthogonalized  matrices U S V' to about U V'

"Muon: An optimizer for hidden layers in neural networks" (Jordan et al., 2024), scaled as in "Muon
is Scalable for LLM Training" (Liu et al., arXiv 2502.16982), so that AdamW's learning rates and
weight decay carry over.

    groups = split(model, [{"params": model.parameters(), "weight_decay": 0.01}])
    optimizer = Muon(groups, lr=1e-3)

Differences: the coefficients of "The Polar Express" (Amsel et al., arXiv 2505.16932), whose results
are nearer to orthogonal after as many steps; matrices of one shape are orthogonalized together;
fused q, k, v are three; of several processes each does its share. torch.optim.Muon has none of
this, and takes 2-D parameters only. Shards of FSDP2 are gathered first, some matrices at a time.
Needs torch only, 2.9 or later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw

# Of five steps x <- a x + b (x x') x + c (x x')^2 x, for singular values from 0.001 to 1. The
# paper's safety factor of 1.01 is in them.
COEFFICIENTS = [
    (8.2052, -22.9019, 16.4607),
    (4.0664, -2.8612, 0.5184),
    (3.9096, -2.8234, 0.5250),
    (3.2856, -2.4153, 0.4853),
    (2.3007, -1.6689, 0.4188),
]


class Muon(torch.optim.Optimizer):
    """Parameter groups have AdamW's settings, and:

    parts       how many matrices each parameter is, one below the other; 0: left to AdamW
    momentum    Muon's, in Nesterov's form

    If `found_inf`, a tensor on the parameters' device, is 1.0, `step` leaves weights and state as
    they are, as AdamW's does with fused=True.
    """

    CHUNK = 2**25  # numbers that are orthogonalized at a time
    found_inf: Tensor | None = None

    def __init__(self, params: Iterable, lr: float = 1e-3,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.01, momentum: float = 0.95):
        super().__init__(params, {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "momentum": momentum, "parts": 0, "fused": True})

    def counts(self) -> tuple[int, int]:
        """The number of matrices, and of all other tensors."""
        groups = self.param_groups
        matrices = sum(group["parts"] * len(group["params"]) for group in groups)
        return matrices, sum(len(group["params"]) for group in groups if not group["parts"])

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        loss = torch.enable_grad()(closure)() if closure else None
        of_shape: dict[tuple[int, int], list] = {}
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not group["parts"]:
                self._adamw(params, group)
                continue
            for p in params:
                shape = len(p) // group["parts"], p.numel() // len(p)
                of_shape.setdefault(shape, []).append((p, group))
        for (rows, columns), members in of_shape.items():
            count = max(1, self.CHUNK // (rows * columns))
            for i in range(0, len(members), count):
                self._muon(members[i:i + count], rows, columns)
        return loss

    def _adamw(self, params: list[Tensor], group: dict) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {"step": torch.zeros((), device=p.device),
                                 "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        adamw(params, [p.grad for p in params], [state["exp_avg"] for state in states],
              [state["exp_avg_sq"] for state in states], [], [state["step"] for state in states],
              fused=True, found_inf=self.found_inf, amsgrad=False, beta1=beta1, beta2=beta2,
              lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False)

    def _muon(self, members: list[tuple[Tensor, dict]], rows: int, columns: int) -> None:
        """A step of some parameters, with their groups, that are matrices of this shape."""
        goes = 1 if self.found_inf is None else 1 - self.found_inf
        directions = []
        for p, group in members:
            if not self.state[p]:
                self.state[p] = {"momentum_buffer": torch.zeros_like(p)}
            buffer = self.state[p]["momentum_buffer"]
            gradient = p.grad
            if self.found_inf is not None:
                gradient = gradient.masked_fill(self.found_inf > 0, 0.0)
            new = (1 - group["momentum"]) * goes
            buffer.mul_(1 - new).add_(gradient * new)
            direction = gradient.lerp(buffer, group["momentum"])
            if hasattr(p, "full_tensor"):  # a DTensor
                direction = direction.full_tensor()
            directions.append(direction.reshape(-1, rows, columns))
        updates = shared(torch.cat(directions)).split([len(d) for d in directions])
        for (p, group), update in zip(members, updates):
            update = update.reshape(p.shape)
            if hasattr(p, "full_tensor"):
                from torch.distributed.tensor import distribute_tensor  # takes a second

                update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
            lr = group["lr"] * goes
            p.mul_(1 - lr * group["weight_decay"])
            p.sub_(update * (lr * 0.2 * math.sqrt(max(rows, columns))))


def split(module: nn.Module, groups: Iterable[dict]) -> list[dict]:
    """Parts groups of the module's parameters by their number of matrices, `parts`: 1 for weights
    of linear layers and convolutions with more than 4 inputs and more than 4 outputs (images have
    fewer), or what the layer's attribute `parts` says: 3 for fused q, k and v, 0 for a head or a
    codebook. 0 for all other parameters."""
    parts = {}
    for layer in module.modules():
        matrices = isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd))
        if matrices and min(layer.weight.shape[:2]) > 4:
            parts[layer.weight] = getattr(layer, "parts", 1)
    result = []
    for group in groups:
        params: dict[int, list[Tensor]] = {}
        for p in group["params"]:
            params.setdefault(parts.get(p, 0), []).append(p)
        result += [{**group, "params": params[n], "parts": n} for n in params]
    return result


def shared(x: Tensor) -> Tensor:
    """`orthogonalized`, but each process does a share of these matrices, which all of them have."""
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world == 1:
        return orthogonalized(x)
    count = len(x)
    share = math.ceil(count / world)
    padded = F.pad(x, (0, 0, 0, 0, 0, share * world - count))
    mine = orthogonalized(padded.split(share)[dist.get_rank()]).contiguous()
    everyone = mine.new_empty(padded.shape)
    dist.all_gather_into_tensor(everyone, mine)
    return everyone[:count]


def orthogonalized(x: Tensor) -> Tensor:
    """Matrices (B, rows, columns) with all singular values near 1 (0.88 to 1.12, if they are over
    0.001 of their norm): in bfloat16 on a GPU, else in float32."""
    if x.shape[1] > x.shape[2]:
        return orthogonalized(x.mT).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-20)
    x = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    if x.is_cuda or 2 * x.shape[1] > x.shape[2]:
        return _iterate(x)
    # y x, where the square y follows from x x' alone: less work, but it diverges in bfloat16.
    gram = x @ x.mT
    return _iterate(torch.eye(x.shape[1], device=x.device).expand_as(gram), gram) @ x


def _iterate(x: Tensor, inner: Tensor | None = None) -> Tensor:
    """The five steps on x; with inner = z z', what they are for x z, without its factor z."""
    for a, b, c in COEFFICIENTS:
        gram = (x if inner is None else x @ inner) @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x
