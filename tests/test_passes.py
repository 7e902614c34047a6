"""Meta-batches computed in passes, and inner steps computed again: neither changes the result."""

import copy
import random
import re
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from conftest import trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from meta_lightning import FOMAML, MAML, MetaLearner, Reptile, TaskBatch
from meta_lightning.inner import passes as passes_module
from meta_lightning.inner.task_network import TaskNetwork
from meta_lightning.random_states import drew_from, random_states

TASKS = 5
ALGORITHMS: list[tuple[type[MetaLearner], dict[str, Any]]] = [
    (MAML, {}),
    (MAML, {"recompute_inner_steps": True}),
    (FOMAML, {}),
    (Reptile, {}),
    (Reptile, {"inner_optimizer": "adam", "inner_batch_size": 3, "inner_lr": 0.01}),
]
EACH = pytest.mark.parametrize(("algorithm", "options"), ALGORITHMS)


def classification(seed: int) -> TaskBatch:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(TASKS, 4 + 6, 6, generator=rng, dtype=torch.float64)
    y = torch.randint(3, (TASKS, 10), generator=rng)
    return TaskBatch(x[:, :4], y[:, :4], x[:, 4:], y[:, 4:])


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()


def train(algorithm: type[MetaLearner], network: nn.Module, **options: Any) -> tuple[MetaLearner, L.Trainer]:
    learner = algorithm(copy.deepcopy(network), **{"inner_lr": 0.1, "inner_steps": 3} | options)  # type: ignore[call-arg]
    fit = trainer(max_steps=3, limit_val_batches=0, precision="64-true")
    fit.fit(learner, DataLoader([classification(i) for i in range(3)], batch_size=None))  # type: ignore[arg-type]
    return learner, fit


def assert_same(ours: MetaLearner, expected: MetaLearner) -> None:
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("tasks_per_pass", [1, 2, 3, 5, 9])
@EACH
def test_passes_change_nothing(
    algorithm: type[MetaLearner], options: dict[str, Any], tasks_per_pass: int, network: nn.Module
) -> None:
    expected, fit = train(algorithm, network, **options)
    ours, our_fit = train(algorithm, network, **options, tasks_per_pass=tasks_per_pass)
    assert our_fit.callback_metrics["train/loss"].item() == pytest.approx(fit.callback_metrics["train/loss"].item())
    assert_same(ours, expected)
    batch = classification(9)
    for values, reference in zip(ours.predict_tasks(batch), expected.predict_tasks(batch), strict=True):
        torch.testing.assert_close(values, reference, rtol=1e-8, atol=1e-10)


@EACH
def test_out_of_memory_halves_the_tasks_of_a_pass_and_the_checkpoint_remembers(
    algorithm: type[MetaLearner],
    options: dict[str, Any],
    network: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, _ = train(algorithm, network, **options)
    forward = TaskNetwork.predict

    def short_of_memory(self: TaskNetwork, params: Any, x: Tensor) -> Tensor:
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, params, x)

    monkeypatch.setattr(TaskNetwork, "predict", short_of_memory)
    with pytest.warns(UserWarning, match=r"Out of memory\b.*at most \d tasks") as caught:
        ours, fit = train(algorithm, network, **options)
    said = [re.findall(r"at most (\d)", str(w.message)) for w in caught if "Out of memory" in str(w.message)]
    assert said == [["3"], ["2"]]
    assert_same(ours, expected)
    fit.save_checkpoint(tmp_path / "last.ckpt")
    again = algorithm(network, **{"inner_lr": 0.1, "inner_steps": 3} | options)  # type: ignore[call-arg]
    batches = DataLoader([classification(3)] * 2, batch_size=None)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Out of memory")
        resumed = trainer(max_steps=4, limit_val_batches=0, precision="64-true")
        resumed.fit(again, batches, ckpt_path=tmp_path / "last.ckpt")
    assert again.passes.tasks_that_fit == 2
    assert algorithm.load_from_checkpoint(tmp_path / "last.ckpt", network=network).passes.tasks_that_fit is None


def test_on_a_cpu_the_caches_bound_a_pass(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, sizes = classification(0), []
    monkeypatch.setattr(passes_module, "CACHED_VALUES", 2 * batch.query_x[0].numel() + 1)
    forward = TaskNetwork.predict

    def noted(self: TaskNetwork, params: Any, x: Tensor) -> Tensor:
        sizes.append(len(x))
        return forward(self, params, x)

    monkeypatch.setattr(TaskNetwork, "predict", noted)
    FOMAML(network, inner_steps=1).meta_gradient(batch)
    assert sizes == [2, 2, 2, 2, 1, 1]  # support and query of each pass


def test_a_single_task_that_does_not_fit_is_an_error(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(self: TaskNetwork, params: Any, x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TaskNetwork, "predict", out_of_memory)
    with pytest.warns(UserWarning, match="at most 1 tasks"), pytest.raises(torch.OutOfMemoryError):
        MAML(network).meta_gradient(classification(0))


def test_tasks_per_pass_has_a_range(network: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"tasks_per_pass .* 0"):
        Reptile(network, tasks_per_pass=0)


def test_recomputed_inner_steps_repeat_what_is_drawn_in_python() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (1 + random.random() + np.random.rand())  # noqa: NPY002

    network = nn.Sequential(nn.Linear(3, 8), Noise(), nn.Tanh(), nn.Linear(8, 2))
    batch, results = TaskBatch(*(torch.randn(2, 6, 3), torch.arange(2).repeat(2, 3)) * 2), []
    for recompute in (False, True):
        learner = MAML(network, inner_lr=0.5, inner_steps=3, recompute_inner_steps=recompute, compile_passes=False)
        learner.meta_gradient(batch)  # examines the network
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        results.append((*learner.meta_gradient(batch)[:2], random.random(), np.random.rand()))  # noqa: NPY002
    (kept, losses, *drawn), (recomputed, their_losses, *their_drawn) = results
    assert torch.equal(losses, their_losses)
    assert drawn == their_drawn
    for name, g in kept.items():
        torch.testing.assert_close(recomputed[name], g)


def test_the_check_before_training_draws_nothing() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (1 + random.random() + np.random.rand() + torch.rand(()))  # noqa: NPY002

    learner = MAML(nn.Sequential(nn.Linear(3, 2), Noise()), inner_steps=1)
    batch = TaskBatch(*(torch.randn(2, 6, 3), torch.arange(2).repeat(2, 3)) * 2)
    before = random_states(torch.device("cpu"))
    assert learner.without_gradient(batch) == []
    assert not drew_from(before, random_states(torch.device("cpu")))


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputed_inner_steps_give_the_same_meta_gradient(network: nn.Module, steps: int, dropout: float) -> None:
    network = nn.Sequential(*network[:3], nn.Dropout(dropout), *network[3:])  # type: ignore[index]
    batch, results = classification(0), []
    for recompute in (False, True):
        torch.manual_seed(1)
        learner = MAML(network, inner_lr=0.1, inner_steps=steps, recompute_inner_steps=recompute)
        results.append((*learner.meta_gradient(batch), torch.rand(3)))
    (kept, losses, _, random), (recomputed, their_losses, _, their_random) = results
    assert torch.equal(losses, their_losses)
    assert torch.equal(random, their_random)  # what is drawn afterwards
    for name, g in kept.items():
        torch.testing.assert_close(recomputed[name], g, rtol=1e-8, atol=1e-10)
