"""Compiled passes: the same training to rounding, whatever changes in between."""

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from conftest import trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from meta_lightning import FOMAML, MAML, MetaLearner, Reptile, TaskBatch
from meta_lightning.checks import InputError

ALGORITHMS: list[tuple[type[MetaLearner], dict[str, Any]]] = [
    (MAML, {"learn_inner_lr": True}),
    (FOMAML, {"inner_freeze": ["0.*"], "tasks_per_pass": 2}),
    (Reptile, {"inner_optimizer": "adam", "inner_batch_size": 2, "inner_lr": 0.01}),
]
REFUSAL = "The passes run as they are, since they cannot be compiled"


def batches(*shape: int) -> DataLoader[TaskBatch]:
    rng = torch.Generator().manual_seed(0)

    def batch() -> TaskBatch:
        x, y = torch.rand(3, 8, *shape, generator=rng), torch.randint(2, (3, 8), generator=rng)
        return TaskBatch(x[:, :4], y[:, :4], x[:, 4:], y[:, 4:])

    return DataLoader([batch() for _ in range(3)], batch_size=None)  # type: ignore[arg-type]


def train(
    algorithm: type[MetaLearner],
    network: nn.Module,
    data: DataLoader[TaskBatch],
    **options: Any,
) -> MetaLearner:
    learner = algorithm(copy.deepcopy(network), **{"inner_lr": 0.1, "inner_steps": 2} | options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", REFUSAL)
        trainer(max_steps=3, limit_val_batches=0, precision="64-true").fit(learner, data)
    return learner


def compiled(learner: MetaLearner) -> int:
    assert learner.compiled_passes is not None
    return len(learner.compiled_passes.passes)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


@pytest.mark.parametrize(("algorithm", "options"), ALGORITHMS)
def test_training_is_the_same(algorithm: type[MetaLearner], options: dict[str, Any], network: nn.Module) -> None:
    """θ, learnt rates and the moments of Reptile's Adam move from step to step: the graph has to read them anew."""
    expected = train(algorithm, network, batches(6), **options)
    ours = train(algorithm, network, batches(6), **options, compile_passes=True)
    assert compiled(ours) == (2 if "tasks_per_pass" in options else 1)  # two tasks and one, or all three
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-9, atol=1e-11)


def test_pictures_in_bf16() -> None:
    """Convolution, batch norm and pooling at second order, with the casts of mixed precision in the graph."""
    torch.manual_seed(0)
    block = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    network = nn.Sequential(*block, nn.Flatten(), nn.Linear(36, 2))
    batch = next(iter(batches(1, 8, 8)))

    def gradient(bf16: bool, compile_passes: bool) -> Tensor:
        learner = MAML(network, inner_lr=0.1, inner_steps=1, compile_passes=compile_passes)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            grads = learner.meta_gradient(batch)[0]
        assert not compile_passes or compiled(learner) == 1
        return torch.cat([g.flatten() for g in grads.values()])

    exact = gradient(bf16=False, compile_passes=False)
    ours, expected = (
        (gradient(bf16=True, compile_passes=compile_passes) - exact).norm() / exact.norm()
        for compile_passes in (True, False)
    )
    # fused kernels round less often than the operations one by one, and still round
    assert 1e-4 < ours < 1.5 * expected


def test_what_changes_in_python_is_compiled_anew(network: nn.Module) -> None:
    learner = FOMAML(network, inner_lr=0.1, inner_steps=1, compile_passes=True)
    batch = next(iter(batches(6)))
    for change in ({}, {"inner_lr": 0.5}):
        for name, value in change.items():
            setattr(learner, name, value)
        reference = FOMAML(network, inner_lr=learner.inner_lr, inner_steps=1)
        for ours, expected in zip(*(x.meta_gradient(batch)[0].values() for x in (learner, reference)), strict=True):
            torch.testing.assert_close(ours, expected)
    assert compiled(learner) == 2


def test_a_copy_reads_its_own_parameters(network: nn.Module) -> None:
    learner = FOMAML(network, inner_lr=0.1, inner_steps=1, compile_passes=True)
    batch = next(iter(batches(6)))
    learner.meta_gradient(batch)
    other = copy.deepcopy(learner)
    assert compiled(other) == 0


def test_dropout_draws_anew_in_every_step(network: nn.Module) -> None:
    learner = FOMAML(nn.Sequential(nn.Dropout(0.5), network), inner_lr=0.1, inner_steps=1, compile_passes=True)
    batch = next(iter(batches(6)))
    first, second = (learner.meta_gradient(batch)[1] for _ in range(2))
    assert compiled(learner) == 1
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    third = learner.meta_gradient(batch)[1]
    torch.manual_seed(7)
    assert torch.equal(learner.meta_gradient(batch)[1], third)


class Branching(nn.Module):
    """Asks for a value in the middle, which no graph can hold."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.network(x)
        return y if y.sum().item() > 0 else 2 * y


def test_what_cannot_be_compiled_runs_as_it_is(network: nn.Module) -> None:
    network = Branching(network)
    batch = next(iter(batches(6)))
    learner = FOMAML(network, inner_lr=0.1, inner_steps=1, compile_passes=True)
    with pytest.warns(UserWarning, match=REFUSAL):
        ours = learner.meta_gradient(batch)[0]
    expected = FOMAML(network, inner_lr=0.1, inner_steps=1).meta_gradient(batch)[0]
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value)


def test_recomputed_steps_are_refused(network: nn.Module) -> None:
    with pytest.raises(InputError, match=re.escape("compile_passes must be left out with recompute_inner_steps")):
        MAML(network, compile_passes=True, recompute_inner_steps=True)
