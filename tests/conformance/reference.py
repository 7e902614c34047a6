"""Literal loops over tasks, each step on a fresh network: no functional_call, no vmap, no graph over several steps.

And what the package computes in their place.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from meta_lightning import FOMAML, MAML, MetaLearner, Reptile, TaskBatch

Params = dict[str, Tensor]
Task = tuple[Tensor, Tensor]
ALGORITHMS: dict[str, type[MetaLearner]] = {"MAML": MAML, "FOMAML": FOMAML, "Reptile": Reptile}
WAYS: list[tuple[str, dict[str, Any]]] = [
    ("MAML", {}),
    ("MAML", {"recompute_inner_steps": True}),
    ("MAML", {"tasks_per_pass": 1}),
    ("FOMAML", {}),
    ("FOMAML", {"tasks_per_pass": 1}),
    ("Reptile", {}),
    ("Reptile", {"tasks_per_pass": 1}),
]
T, SAMPLES, STEPS, RATE, EXACT = 2, 4, 2, 0.1, 1e-9


def values(network: nn.Module) -> Params:
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def fresh(network: nn.Module, theta: Params) -> nn.Module:
    new = copy.deepcopy(network)
    with torch.no_grad():
        for name, p in new.named_parameters():
            p.copy_(theta[name])
    return new


def slope(network: nn.Module, theta: Params, task: Task, loss: nn.Module) -> Params:
    """The gradient of a loss."""
    new = fresh(network, theta)
    loss(new(task[0]), task[1]).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in new.named_parameters()}


def curvature(network: nn.Module, theta: Params, task: Task, loss: nn.Module, v: Params) -> Params:
    """The Hessian of a loss times v, by double backward."""
    new = fresh(network, theta)
    params = dict(new.named_parameters())
    grads = torch.autograd.grad(loss(new(task[0]), task[1]), params.values(), create_graph=True, allow_unused=True)
    pairs = [(g * v[name]).sum() for name, g in zip(params, grads, strict=True) if g is not None and g.requires_grad]
    if not pairs:
        return {name: torch.zeros_like(p) for name, p in params.items()}
    hessian = torch.autograd.grad(torch.stack(pairs).sum(), params.values(), materialize_grads=True, allow_unused=True)
    return dict(zip(params, hessian, strict=True))


def path(network: nn.Module, task: Task, steps: int, rate: float, loss: nn.Module) -> list[Params]:
    """θ_0 … θ_K by torch.optim.SGD."""
    thetas = [values(network)]
    for _ in range(steps):
        new = fresh(network, thetas[-1])
        optimizer = torch.optim.SGD(new.parameters(), rate)
        loss(new(task[0]), task[1]).backward()
        optimizer.step()
        thetas.append(values(new))
    return thetas


@sdpa_kernel(SDPBackend.MATH)  # torch's fused kernels have no second derivative
def update(algorithm: str, network: nn.Module, batch: TaskBatch, steps: int, rate: float, loss: nn.Module) -> Params:
    """The meta-gradient of MAML or FOMAML, or Reptile's mean θ'."""
    results = []
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        support = support_x, support_y
        *thetas, adapted = path(network, support, steps, rate, loss)
        if algorithm == "Reptile":
            results.append(adapted)
            continue
        v = slope(network, adapted, (query_x, query_y), loss)
        for theta in reversed(thetas) if algorithm == "MAML" else ():
            hessian_v = curvature(network, theta, support, loss, v)
            v = {name: v[name] - rate * hessian_v[name] for name in v}
        results.append(v)
    return {name: torch.stack([result[name] for result in results]).mean(0) for name in results[0]}


def worst(ours: Params, expected: Params) -> float:
    """max |ours − expected| / max |expected|, over all parameters; NaN stays."""
    assert ours.keys() == expected.keys()
    differences = torch.cat([(ours[name] - p).abs().flatten() for name, p in expected.items()])
    return float(differences.max() / torch.cat([p.abs().flatten() for p in expected.values()]).max())


def ours(algorithm: str, network: nn.Module, batch: TaskBatch, **options: Any) -> Params:
    """What an algorithm of the package computes of a batch: the meta-gradient, or Reptile's mean θ'."""
    learner = ALGORITHMS[algorithm](network, **{"inner_lr": RATE, "inner_steps": STEPS} | options)
    if isinstance(learner, MAML):
        return learner.meta_gradient(batch)[0]
    support = learner.support(batch.support_x, batch.support_y, STEPS)
    result: dict[str, Tensor] = learner.in_passes(learner.adapt_pass, support)[0]
    return result
