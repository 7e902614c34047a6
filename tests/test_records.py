"""Recorded passes have the gradients and random draws of passes as they are, to the bit, or do not run."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meta_lightning import FOMAML, MAML, TaskBatch
from meta_lightning.inner.compiling import same_to_rounding

STEPS = 6  # a record is compared at its replays 1, 2 and 4
MakeNetwork = Callable[[], Any]


def batch(step: int, *shape: int) -> TaskBatch:
    rng = torch.Generator().manual_seed(step)
    x, y = torch.randn(2, 3, 4, *(shape or (6,)), generator=rng), torch.arange(2).repeat(3, 2)
    return TaskBatch(x[0], y, x[1], y)


class Network(nn.Module):
    """Its middle is a function of the module and the activations."""

    def __init__(self, middle: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.middle = nn.Linear(6, 6), nn.Linear(6, 2), middle
        self.register_buffer("factor", torch.ones(()))
        self.counter = [torch.ones(())]  # no buffer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.middle(self, self.body(x).tanh()))
        return y


def data_assigned(_: nn.Module, z: Tensor) -> Tensor:
    z = z * 1
    z.data = z.data.clamp(max=0.5)
    return z


def clipped_by_numpy(_: nn.Module, z: Tensor) -> Tensor:
    if z.requires_grad:
        z.register_hook(lambda grad: torch.from_numpy(np.clip(grad.numpy(), -0.01, 0.01)))
    return z


def unused_draws(_: nn.Module, z: Tensor) -> Tensor:
    F.dropout(z, 0.5)
    return z


class Cell(nn.Module):
    """Draws before a layer that vmap refuses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dropout, self.cell, self.head = nn.Dropout(0.5), nn.LSTMCell(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.cell(self.dropout(x))[0])
        return y


class Counting(nn.Module):
    """A loss with a buffer that changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(()))

    def forward(self, predictions: Tensor, y: Tensor) -> Tensor:
        weight = self.get_buffer("weight").mul_(0.99)
        return weight * F.cross_entropy(predictions, y)


def network(middle: Callable[[Any, Tensor], Tensor]) -> MakeNetwork:
    return lambda: Network(middle)


UNSEEN: dict[str, MakeNetwork] = {
    "a tensor of tensors": network(lambda _, z: z - torch.tensor([z.mean(), z.std()])[0]),
    "a tensor of buffers": network(lambda own, z: z * torch.tensor([own.factor, 1, 1, 1, 1, 1])),
    "an index of tensors": network(lambda _, z: z[:, [*z.detach()[0].argsort()]]),
    "numpy in backward": network(clipped_by_numpy),
    "assigned data": network(data_assigned),
    "a tensor in a list that changes": network(lambda own, z: z * own.counter[0].mul_(0.99)),
    "kernels that are others where they are recorded": network(lambda _, z: z * (z + 1.5).prod(1, keepdim=True)),
    "draws before a layer that vmap refuses": Cell,
}


def meta_gradients(
    make: MakeNetwork,
    algorithm: Any = FOMAML,
    record: bool = True,
    between: Callable[[int], None] = lambda step: None,
    **options: Any,
) -> list[Any]:
    """Meta-gradients and random states of a training."""
    torch.manual_seed(1)
    how = "record" if record else False
    learner, seen = algorithm(make(), inner_lr=0.1, inner_steps=2, compile_passes=how, **options), []
    for step in range(STEPS):
        between(step)
        if "factor" in dict(learner.network.named_buffers()):
            learner.network.factor.fill_(1 + step)
        grads = learner.meta_gradient(batch(step))[0]
        seen.append(({name: grad.clone() for name, grad in grads.items()}, torch.get_rng_state()))
        with torch.no_grad():
            for name, p in learner.meta_parameters().items():
                p.sub_(grads[name], alpha=0.5)
    return seen


def assert_same(ours: list[Any], expected: list[Any]) -> None:
    for (grads, state), (others, other_state) in zip(ours, expected, strict=True):
        assert all(torch.equal(grad, others[name]) for name, grad in grads.items())
        assert torch.equal(state, other_state)


@pytest.mark.parametrize("name", UNSEEN)
def test_what_no_record_can_follow_runs_as_it_is(name: str) -> None:
    with pytest.warns(UserWarning, match="runs? as (it is|they are)"):
        ours = meta_gradients(UNSEEN[name])
    assert_same(ours, meta_gradients(UNSEEN[name], record=False))


@pytest.mark.parametrize("algorithm", [MAML, FOMAML])
def test_draws_that_nobody_reads_are_drawn(algorithm: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*runs? as (it is|they are)")
        ours = meta_gradients(network(unused_draws), algorithm)
    assert_same(ours, meta_gradients(network(unused_draws), algorithm, record=False))


def test_absolute_errors_are_recorded() -> None:
    """Whose second derivatives are zeros without memory."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*runs? as (it is|they are)")
        ours = meta_gradients(network(lambda _, z: z.abs()), MAML)
    assert_same(ours, meta_gradients(network(lambda _, z: z.abs()), MAML, record=False))


def test_a_loss_that_changes_its_buffer_runs_as_it_is() -> None:
    plain = network(lambda _, z: z)
    with pytest.warns(UserWarning, match=r"as it is.*writes into a tensor that is not its own"):
        ours = meta_gradients(plain, loss=Counting())
    assert_same(ours, meta_gradients(plain, loss=Counting(), record=False))


def test_what_a_closure_holds_may_be_annealed() -> None:
    weights = {"now": 1.0}

    def anneal(step: int) -> None:
        weights["now"] = 1 / (1 + step)

    def training(record: bool) -> list[Any]:
        return meta_gradients(
            network(lambda _, z: z),
            loss=lambda predictions, y: weights["now"] * F.cross_entropy(predictions, y),
            between=anneal,
            record=record,
        )

    with pytest.warns(UserWarning, match=r"as they are: the record of a pass is not what the pass is now"):
        ours = training(record=True)
    assert_same(ours, training(record=False))


def test_strides_may_change() -> None:
    learner = FOMAML(nn.Sequential(nn.Flatten(), nn.Linear(24, 2)), inner_lr=0.1, compile_passes="record")
    expected = copy.deepcopy(learner)
    expected.passes = type(expected.passes)(None, compile_passes=False)
    first, second = batch(0, 4, 6), batch(1, 4, 6)
    x = second.support_x.transpose(2, 3).contiguous().transpose(2, 3)
    for tasks in (first, second._replace(support_x=x), first):
        for name, grad in learner.meta_gradient(tasks)[0].items():
            assert torch.equal(grad, expected.meta_gradient(tasks)[0][name])


def test_the_parts_of_a_result_are_compared_one_by_one() -> None:
    """As on a GPU: large predictions do not hide that a gradient is lost."""
    gradient, predictions = torch.ones(10), torch.full((1000,), 100.0)
    result = {"w": gradient}, predictions
    assert same_to_rounding(({"w": gradient * 1.01}, predictions), result, lambda: result)
    assert not same_to_rounding(({"w": gradient * 0}, predictions), result, lambda: result)


def test_a_pass_that_does_not_repeat_itself_may_differ_as_much() -> None:
    """As on a GPU, where Adam takes full steps of gradients that are rounding."""
    params, predictions = torch.ones(10), torch.ones(10)
    result = params, predictions
    assert same_to_rounding((params * 1.05, predictions), result, lambda: (params * 1.03, predictions))
    assert not same_to_rounding((params * 1.05, predictions), result, lambda: (params, predictions * 1.03))
    assert not same_to_rounding((params * 1.2, predictions), result, lambda: (params * 1.03, predictions))
