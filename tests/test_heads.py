"""Head starts against literal loops over tasks and finite differences in float64, and any number of classes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from meta_lightning import (
    FOMAML,
    IMAML,
    MAML,
    SGD,
    Adam,
    Conv4,
    HeadStart,
    LearntRows,
    MetaLearner,
    MetaSGD,
    OneVector,
    Prototypes,
    Reptile,
    TaskBatch,
    ZeroRows,
)
from meta_lightning.checks import InputError
from references import EXACT, INNER_LR, TASKS_FROM_A_LIST, Params, error, trained

pytestmark = TASKS_FROM_A_LIST
STEPS, D = 3, 8
STARTS: list[HeadStart] = [ZeroRows(), OneVector(), Prototypes(0.7)]
Start = Callable[[Params, Tensor, Tensor], Params]  # θ and a support set to the head


def named(value: Any) -> str:
    return type(value).__name__ if isinstance(value, nn.Module) else getattr(value, "__name__", str(value))


class Network(nn.Module):
    """A smooth body, batch norm included, and a head of 5 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, D), nn.BatchNorm1d(D, track_running_stats=False), nn.Tanh())
        self.head = nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits


def tasks(ways: int, shots: int = 2, queries: int = 3, count: int = 3) -> TaskBatch:
    def part(samples: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(ways).repeat_interleave(samples).repeat(count, 1)
        order = torch.rand(count, ways * samples).argsort(1)
        return torch.randn(count, ways * samples, 6), y.gather(1, order)

    return TaskBatch(*part(shots), *part(queries))


def body_of(network: Network, params: Params, x: Tensor) -> Tensor:
    features: Tensor = functional_call(
        network.body, {n.removeprefix("body."): p for n, p in params.items() if n.startswith("body.")}, (x,)
    )
    return features


def rows(start: HeadStart, network: Network, params: Params, own: Params, x: Tensor, y: Tensor) -> Params:
    """The papers' formulas, class by class."""
    ways = int(y.max()) + 1
    if isinstance(start, Prototypes):
        z, s = body_of(network, params, x), own["learnt_scale"]
        centres = torch.stack([z[y == k].mean(0) for k in range(ways)])
        return {"head.weight": 2 * s * centres, "head.bias": -s * (centres**2).sum(1)}
    row = own["vector"] if isinstance(start, OneVector) else torch.zeros(D)
    return {"head.weight": torch.stack([row] * ways), "head.bias": torch.zeros(ways)}


def query_loss(
    network: Network, start: HeadStart, theta: Params, own: Params, batch: TaskBatch, follow: bool, steps: int = STEPS
) -> Tensor:
    """The mean query loss of a loop over tasks; without ``follow`` the inner gradients are constants."""
    losses = []
    for x, y, query_x, query_y in zip(*batch, strict=True):
        params = theta | rows(start, network, theta, own, x, y)
        for _ in range(steps):
            held = {n: p.detach().requires_grad_() for n, p in params.items()}
            if follow:  # a point of its own, so that the head is not differentiated by the body
                held = {n: p + torch.zeros_like(p).requires_grad_() for n, p in params.items()}
            loss = F.cross_entropy(functional_call(network, held, (x,)), y)
            grads = torch.autograd.grad(loss, list(held.values()), create_graph=follow)
            params = {n: p - INNER_LR * g for (n, p), g in zip(params.items(), grads, strict=True)}
        losses.append(F.cross_entropy(functional_call(network, params, (query_x,)), query_y))
    return torch.stack(losses).mean()


def body(network: Network) -> Params:
    return {name: p for name, p in trained(network).items() if name.startswith("body.")}


def prepared(algorithm: Callable[..., MetaLearner], start: HeadStart, **options: Any) -> tuple[Network, Any]:
    network = Network()
    return network, algorithm(network, inner_lr=INNER_LR, inner_steps=STEPS, head_start=start, **options)


@pytest.mark.parametrize("ways", [2, 5, 9])
@pytest.mark.parametrize("options", [{}, {"recompute_inner_steps": True}, {"tasks_per_pass": 1}], ids=str)
@pytest.mark.parametrize("algorithm", [MAML, FOMAML])
@pytest.mark.parametrize("start", STARTS, ids=named)
def test_meta_gradients_equal_a_loops(
    start: HeadStart, algorithm: type[MAML], options: dict[str, Any], ways: int
) -> None:
    network, learner = prepared(algorithm, start, **options)
    batch = tasks(ways)
    meta_gradient, losses, _ = learner.meta_gradient(batch)
    theta, own = body(network), dict(learner.head_start.named_parameters())
    loss = query_loss(network, start, theta, own, batch, follow=algorithm is MAML)
    expected = torch.autograd.grad(loss, [*theta.values(), *own.values()])
    assert losses.mean().item() == pytest.approx(loss.item(), abs=EXACT)
    names = [*theta, *(f".head.{name}" for name in own)]
    assert {*meta_gradient} == {*names}
    assert error(meta_gradient, dict(zip(names, expected, strict=True))) <= EXACT


@pytest.mark.parametrize("start", STARTS, ids=named)
def test_meta_gradients_equal_finite_differences(start: HeadStart) -> None:
    network, learner = prepared(MAML, start)
    batch = tasks(4)
    meta_gradient, *_ = learner.meta_gradient(batch)
    theta, own = body(network), dict(learner.head_start.named_parameters())
    for _ in range(3):
        along = {n: torch.randn_like(p) for n, p in {**theta, **own}.items()}
        values = []
        for sign in (1e-5, -1e-5):
            moved = [{n: (p + sign * along[n]).detach() for n, p in params.items()} for params in (theta, own)]
            values.append(query_loss(network, start, *moved, batch, follow=False).item())
        slope = sum((meta_gradient[n] * along[n]).sum() for n in theta)
        slope += sum((meta_gradient[f".head.{n}"] * along[n]).sum() for n in own)
        assert float(slope) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)
