"""Exported adaptation: equal to ``adapt`` in a process without the package, for other sizes too, or refused by name."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import fails
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from meta_lightning import (
    FOMAML,
    LSLR,
    MAML,
    MLP,
    Adam,
    Conv4,
    InnerRule,
    MetaLearner,
    MetaSGD,
    OneVector,
    ProtoNet,
    Prototypes,
    Reptile,
    ResNet12,
    TaskLoss,
    TaskPredictor,
    ZeroRows,
    load_learner,
)
from meta_lightning.cli import main
from meta_lightning.inner.compiling import ReadingNoValues

Task = tuple[Any, Any, Any]
WAYS, FEATURES = 3, 4
# runs a program on tasks where the package cannot be imported
FRESH = """
import sys
sys.modules["meta_lightning"] = None
import torch
adapt = torch.export.load(sys.argv[1]).module()
torch.save([adapt(*task) for task in torch.load(sys.argv[2])], sys.argv[3])
assert not [name for name in sys.modules if name.startswith(("meta_lightning.", "lightning"))]
"""


def vectors(shots: int, queries: int) -> Task:
    return torch.randn(WAYS * shots, FEATURES), torch.arange(WAYS).repeat(shots), torch.randn(queries, FEATURES)


def curves(shots: int, queries: int) -> Task:
    x = 10 * torch.rand(3 * shots, 1) - 5
    return x, x.sin(), 10 * torch.rand(queries, 1) - 5


def words(shots: int, queries: int) -> Task:
    _, y, _ = vectors(shots, 1)
    return torch.randint(20, (len(y), 6)), y, torch.randint(20, (queries, 6))


def sequences(shots: int, queries: int) -> Task:
    _, y, _ = vectors(shots, 1)
    return torch.randn(len(y), 6, FEATURES), y, torch.randn(queries, 6, FEATURES)


def nests(shots: int, queries: int) -> Task:
    x, y, query_x = vectors(shots, queries)
    support, query = ({"a": part, "b": part[:, :1].exp()} for part in (x, query_x))
    return support, y, query


def images(shots: int, queries: int, ways: int = 5, channels: int = 1, size: int = 28) -> Task:
    shape = channels, size, size
    return torch.rand(ways * shots, *shape), torch.arange(ways).repeat(shots), torch.rand(queries, *shape)


def colours(shots: int, queries: int) -> Task:
    return images(shots, queries, channels=3, size=32)


class Body(nn.Module):
    """A layer, a head, and something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor] | nn.Module = nn.Tanh()) -> None:  # noqa: B008
        super().__init__()
        self.body, self.head, self.between = nn.Linear(FEATURES, 8), nn.Linear(8, WAYS), between

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.between(self.body(x)))
        return logits


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.tensor(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class OfKeywords(Body):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(a) * b


class OfDict(Body):
    def forward(self, x: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(x["a"]) * x["b"]


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 6, padding_idx=0), nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embedding(x).mean(1))
        return logits


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(FEATURES, 2, 8, batch_first=True)  # with dropout, off in evaluation
        self.head = nn.Linear(FEATURES, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(x).mean(1))
        return logits


class Slope(TaskLoss):
    """A loss with derivatives with respect to the samples."""

    def forward(self, network: TaskPredictor, x: Tensor, y: Tensor) -> Tensor:
        slope = torch.func.grad(lambda x: network(x).sum())(x)
        return F.mse_loss(network(x), y) + 0.1 * (slope - x.cos()).square().mean()


def maml(network: nn.Module, **options: Any) -> MetaLearner:
    return MAML(network, inner_lr=0.1, inner_steps=2, **options)


def normalised() -> nn.Module:
    return Body(nn.Sequential(nn.BatchNorm1d(8), nn.GroupNorm(2, 8), nn.LayerNorm(8), nn.ReLU()))


# what docs/how_to/deployment.md says of each, and the learner and its tasks
ANY, QUERIES, FIXED = "any sizes", "any number of queries", "the sizes of the example"
KINDS: dict[str, tuple[str, Callable[[], MetaLearner], Callable[[int, int], Task]]] = {
    "`MLP`, classes": (ANY, lambda: FOMAML(MLP(FEATURES, [8], WAYS), inner_lr=0.1, inner_steps=2), vectors),
    "`MLP`, regression": (ANY, lambda: MAML(MLP(hidden=[8]), inner_steps=2), curves),
    "a frozen body": (ANY, lambda: maml(MLP(FEATURES, [8], WAYS), inner_freeze=["features.*"]), vectors),
    "`MetaSGD`": (ANY, lambda: maml(MLP(FEATURES, [8], WAYS), inner_rule=MetaSGD()), vectors),
    "`LSLR`": (ANY, lambda: maml(MLP(FEATURES, [8], WAYS), inner_rule=LSLR(1)), vectors),
    "Reptile with `Adam`": (
        ANY,
        lambda: Reptile(MLP(FEATURES, [8], WAYS), inner_rule=Adam(), inner_lr=0.01, test_inner_steps=3),
        vectors,
    ),
    "`ProtoNet`": (ANY, lambda: ProtoNet(MLP(FEATURES, [8], 2)), vectors),
    "`Prototypes`, more classes than outputs": (
        ANY,
        lambda: maml(MLP(FEATURES, [8], 2), head_start=Prototypes()),
        vectors,
    ),
    "`ZeroRows`": (ANY, lambda: maml(MLP(FEATURES, [8], WAYS), head_start=ZeroRows()), vectors),
    "`OneVector`": (ANY, lambda: maml(MLP(FEATURES, [8], WAYS), head_start=OneVector()), vectors),
    "batch, group and layer norm": (ANY, lambda: maml(normalised()), vectors),
    "a dict as keywords": (ANY, lambda: maml(OfKeywords()), nests),
    "a dict as one argument": (ANY, lambda: maml(OfDict()), nests),
    "an embedding": (ANY, lambda: maml(Embedding()), words),
    "a `TaskLoss` with derivatives by the samples": (
        ANY,
        lambda: maml(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)), loss=Slope()),
        curves,
    ),
    "Reptile with `test_inner_batch_size`": (
        QUERIES,
        lambda: Reptile(MLP(FEATURES, [8], WAYS), test_inner_batch_size=4, test_inner_steps=3),
        vectors,
    ),
    "a forward that asks for `x.shape[0]`": (
        FIXED,
        lambda: maml(Body(lambda x: x * (2 if x.shape[0] > 1000 else 1))),
        vectors,
    ),
    "a forward that asks for `len(x)`": (FIXED, lambda: maml(Body(lambda x: x * (2 if len(x) > 1000 else 1))), vectors),
    "a forward that takes one number of samples": (FIXED, lambda: maml(Body(lambda x: x + torch.zeros(9, 1))), vectors),
    "a tensor that is an attribute, no buffer": (FIXED, lambda: maml(Body(Scaled())), vectors),
    '`Conv4`, `downsample="stride"`': (ANY, lambda: MAML(Conv4(filters=8), inner_lr=0.1), images),
    '`Conv4`, `downsample="max_pool"`': (
        ANY,
        lambda: Reptile(Conv4(filters=8, downsample="max_pool"), inner_rule=Adam(), inner_lr=0.002, inner_steps=5),
        images,
    ),
    "`ProtoNet` of `Conv4`": (ANY, lambda: ProtoNet(Conv4(filters=8)), images),
    "`ResNet12`": (ANY, lambda: MAML(ResNet12(filters=[4, 4, 8, 8], drop=0.1), inner_steps=1), colours),
    "a transformer": (ANY, lambda: maml(Attention()), sequences),
}


def run_fresh(path: str, tasks: list[Task]) -> list[Any]:
    """What a program answers in a process in which the package cannot be imported."""
    torch.save(tasks, "tasks.pt")
    subprocess.run([sys.executable, "-W", "ignore", "-c", FRESH, path, "tasks.pt", "answers.pt"], check=True)
    answers: list[Any] = torch.load("answers.pt")
    return answers


def check_kind(serves: str, make: Callable[[], MetaLearner], task: Callable[[int, int], Task]) -> None:
    torch.manual_seed(0)
    learner, example = make(), task(3, 15)
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    made = learner.export_adaptation("adapt.pt2", *example[:2])
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())
    S = len(example[1])
    assert (made["support_samples"], made["query_samples"]) == {
        ANY: ("any", "any"),
        QUERIES: (S, "any"),
        FIXED: (S, S),
    }[serves]
    assert (made["fixed_since"] is None) == (serves == ANY)
    shots, queries = (3, 1, 7) if serves == ANY else (3, 3, 3), (S, S, S) if serves == FIXED else (15, 1, 40)
    tasks = [task(*counts) for counts in zip(shots, queries, strict=True)]
    for (x, y, query_x), answer in zip(tasks, run_fresh("adapt.pt2", tasks), strict=True):
        expected = learner.adapt(x, y)(query_x)
        assert answer.shape == expected.shape
        assert (answer - expected).abs().max() < 1e-5


QUICK = {"`MLP`, regression", "`Prototypes`, more classes than outputs"}


@pytest.mark.filterwarnings("ignore:The program takes")
@pytest.mark.filterwarnings("ignore:The network takes no other number")
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in QUICK else [pytest.mark.slow]) for kind in KINDS]
)
def test_what_is_exported_is_adapt_without_the_package(kind: str) -> None:
    check_kind(*KINDS[kind])
