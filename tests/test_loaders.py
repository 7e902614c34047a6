"""Batches of loaders of one's own, and tasks that do not depend on how they are batched."""

from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from meta_lightning import FOMAML, MAML, MLP, Conv4, Dashboard, Glyphs, MetaLearner, Reptile, Sinusoid
from meta_lightning.checks import InputError
from meta_lightning.data.tasks import as_task_batch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*configure_optimizers` returned `None`"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]
X, Y, LABELS = torch.randn(10, 3), torch.randn(10, 2), torch.arange(10) % 2


def train(learner: Any, batch: Any) -> None:
    trainer(max_steps=1).fit(learner, DataLoader([batch], batch_size=None))


def validate(learner: Any, batch: Any) -> None:
    trainer().validate(learner, DataLoader([batch], batch_size=None), verbose=False)


@pytest.mark.parametrize("run", [train, validate])
@pytest.mark.parametrize("algorithm", [MAML, FOMAML, Reptile])
@pytest.mark.parametrize(
    ("network", "batch", "message"),
    [
        pytest.param(nn.Linear(1, 1), (X[:, :1], Y[:, :1]) * 2, r"T S \.\.\..*got tasks of shape \[1\]", id="numbers"),
        pytest.param(nn.Linear(3, 2), (X, Y) * 2, r"T S \.\.\..*got tasks of shape \[3\]", id="vectors"),
        pytest.param(nn.Linear(3, 2), (X, Y[:, 0]) * 2, r"support_y .*got \[10\]", id="targets alone"),
        pytest.param(nn.Linear(3, 2), (X, LABELS) * 2, r"support_y .*got \[10\]", id="classes"),
        pytest.param(nn.Linear(3, 2), (X[None], Y[None], X[:5], Y[:5]), r"query_x .*got \[5, 3\]", id="queries"),
        pytest.param(nn.Linear(3, 2), ({"x": X[None]}, Y[None]) * 2, r"structure \{x: \*\}.*dict", id="dicts"),
        pytest.param(nn.Linear(3, 2), (X[None], [Y[None]]) * 2, r"loss must be given.*tuple", id="lists"),
        pytest.param(nn.Linear(3, 2), (X[None], Y[None]), r"batches .*got list of 2|got tuple of 2", id="two parts"),
        pytest.param(nn.Linear(3, 2), dict.fromkeys("abcd", X[None]), r"batches .*got dict of 4", id="a dict"),
    ],
)
def test_batches_that_are_no_tasks_are_refused(
    run: Any, algorithm: Any, network: nn.Module, batch: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(algorithm(network), batch)


@pytest.mark.parametrize("tasks", [True, False])
def test_images_without_the_dimension_of_tasks_are_said(tasks: bool, recwarn: pytest.WarningsRecorder) -> None:
    """A convolution takes an image for a batch of its channels, so that the shapes fit."""
    images = torch.randn(*([2] if tasks else []), 4, 2, 8, 8)
    train(MAML(nn.Conv2d(2, 2, 3, padding=1), inner_steps=1), (images,) * 4)
    said = (
        "no other number of samples per task than 2; unless that is meant, the batches lack the dimension of the tasks"
    )
    assert any(said in str(warning.message) for warning in recwarn) != tasks


@pytest.mark.parametrize(
    ("network", "x"),
    [
        pytest.param(nn.Linear(3, 2), torch.randn(2, 10, 3), id="vectors"),
        pytest.param(nn.Embedding(9, 2), torch.arange(10).repeat(2, 1) % 9, id="numbers of tokens"),
        pytest.param(nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 2)), torch.randn(2, 10), id="scalars"),
        pytest.param(
            nn.Sequential(nn.Conv1d(3, 2, 1), nn.Flatten(), nn.LazyLinear(2)), torch.randn(2, 10, 3, 4), id="c"
        ),
    ],
)
def test_batches_of_tasks_are_taken(network: nn.Module, x: Tensor, recwarn: pytest.WarningsRecorder) -> None:
    network(x[0])
    train(MAML(network, inner_steps=1), (x, torch.randn(2, 10, 2)) * 2)
    assert not [warning for warning in recwarn if "number of samples" in str(warning.message)]


def predictions(learner: MetaLearner, data: Sinusoid, split: str) -> Tensor:
    """The query predictions of all tasks of a split, in their order.  # T R D"""
    kept: list[Tensor] = []

    def step(batch: Any, batch_idx: int) -> Tensor:
        kept.append(MetaLearner.validation_step(learner, batch, batch_idx))
        return kept[-1]

    learner.validation_step = learner.test_step = step  # type: ignore[method-assign]
    run = trainer()
    (run.validate if split == "val" else run.test)(learner, data, verbose=False)
    return torch.cat(kept)


@pytest.mark.parametrize("split", ["val", "test"])
def test_minibatches_of_an_evaluation_depend_on_the_task_alone(split: str, mlp: MLP) -> None:
    found = []
    for size in (3, 4, 12):
        torch.manual_seed(0)
        learner = Reptile(mlp, inner_lr=0.05, test_inner_steps=4, test_inner_batch_size=2)
        data = Sinusoid(shots=7, meta_batch_size=size, val_tasks=12, test_tasks=12)
        found.append(predictions(learner, data, split))
    assert torch.allclose(found[0], found[1], atol=1e-6)
    assert torch.allclose(found[0], found[2], atol=1e-6)
    # each task has an order of its own
    learner.eval()
    x = torch.arange(7.0).repeat(2, 1)
    (batch, *_), (again, *_) = (learner.inner_batches(x, x, 3, first=first) for first in (0, 5))
    assert not torch.equal(batch[0][0], batch[0][1])
    assert not torch.equal(batch[0], again[0])


def test_predict_gives_what_a_test_gives(mlp: MLP) -> None:
    torch.manual_seed(0)
    learner = Reptile(mlp, inner_lr=0.05, test_inner_steps=4, test_inner_batch_size=2)
    data = Sinusoid(shots=7, meta_batch_size=4, test_tasks=10)
    predicted = trainer().predict(learner, data)
    assert predicted is not None
    assert torch.equal(torch.cat(predicted), predictions(learner, data, "test"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (LABELS.int(), r"targets must be int64 class numbers or real, got torch\.int32"),
        (LABELS.bool(), r"targets must be int64 .*got torch\.bool"),
        (LABELS[:, None], r"network must give outputs \[10, 2, 1\] per task, got \[10, 2\] for targets .*\[10, 1\]"),
        (LABELS + 1, r"network must give an output for each class: expected at least 3, got 2"),
    ],
)
def test_class_numbers_that_do_not_fit_are_refused(y: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(MAML(nn.Linear(3, 2)), (X[None], y[None]) * 2)


class Set(nn.Module):
    """A network of sets of six samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        assert len(x) == 6, "needs six"
        y: Tensor = self.layer(x - x.mean(0))
        return y


def test_a_network_of_sets_may_refuse_others_as_it_likes(recwarn: pytest.WarningsRecorder) -> None:
    train(MAML(Set(), inner_steps=1), (torch.randn(2, 6, 3), torch.randn(2, 6, 2)) * 2)
    assert any("no other number of samples per task than 6" in str(warning.message) for warning in recwarn)


def test_a_named_tuple_in_another_order_is_refused() -> None:
    swapped = namedtuple("swapped", "query_x query_y support_x support_y")
    with pytest.raises(InputError, match=r"batches must be .*got \(query_x, query_y, support_x, support_y\)"):
        as_task_batch(swapped(X[None], Y[None], X[None], Y[None]))
    same = namedtuple("same", "support_x support_y query_x query_y")
    as_task_batch(same(X[None], Y[None], X[None], Y[None]))


@pytest.mark.parametrize("made", [list, lambda loaders: dict(zip("ab", loaders, strict=True))], ids=["list", "dict"])
@pytest.mark.parametrize("run", ["validate", "test", "predict"])
def test_several_loaders_of_an_evaluation_are_refused(run: str, made: Callable[[Any], Any]) -> None:
    loaders = made(DataLoader([(X[None], Y[None]) * 2], batch_size=None) for _ in range(2))  # type: ignore[list-item,var-annotated]
    with pytest.raises(InputError, match=r"evaluation takes one loader.*got 2"):
        getattr(trainer(), run)(MAML(nn.Linear(3, 2), inner_steps=1), loaders)


def test_more_outputs_than_classes_are_drawn(glyphs: Any, tmp_path: Path) -> None:
    fit = trainer(
        logger=TensorBoardLogger(tmp_path), callbacks=[Dashboard()], limit_val_batches=1, limit_test_batches=1
    )
    fit.test(MAML(Conv4(filters=4, ways=7), inner_steps=1), Glyphs(ways=3, meta_batch_size=2), verbose=False)
