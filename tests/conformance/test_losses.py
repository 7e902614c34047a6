"""Every loss class of torch.nn: what a literal loop over tasks computes, or refused by name."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from layers import LOSSES
from reference import ALGORITHMS, EXACT, RATE, SAMPLES, STEPS, WAYS, T, ours, update, worst
from torch import Tensor, nn

from meta_lightning import FOMAML, TaskBatch
from meta_lightning.checks import InputError

pytestmark = pytest.mark.usefixtures("double")

Call = Callable[[Any, Tensor, Tensor], Tensor]  # of the loss on predictions S 4 and targets S ...
Target = Callable[[torch.Generator], Tensor]


class Case(NamedTuple):
    """A loss, the targets of a task, and how it is called."""

    target: Target
    call: Call = lambda loss, prediction, target: loss(prediction, target)


class Called(nn.Module):
    """A loss of predictions and targets, whatever the class takes."""

    def __init__(self, name: str, call: Call) -> None:
        super().__init__()
        self.loss, self.call = getattr(nn, name)(), call

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.call(self.loss, prediction, target)


def classes(rng: torch.Generator) -> Tensor:
    return torch.randint(4, (SAMPLES,), generator=rng)


def numbers(rng: torch.Generator) -> Tensor:
    return torch.randn(SAMPLES, 4, generator=rng)


def bits(rng: torch.Generator) -> Tensor:
    return torch.randint(2, (SAMPLES, 4), generator=rng).double()


def signs(rng: torch.Generator) -> Tensor:
    return 2 * bits(rng) - 1


def positive(rng: torch.Generator) -> Tensor:
    return torch.rand(SAMPLES, 4, generator=rng) + 0.1


def ctc(loss: Any, prediction: Tensor, target: Tensor) -> Tensor:
    """Two positions of two symbols, of which the second is to be told."""
    positions = prediction.reshape(-1, 2, 2).transpose(0, 1).log_softmax(2)
    lengths = torch.full((len(target),), 2), torch.full((len(target),), 1)
    result: Tensor = loss(positions, target[:, :1].long() * 0 + 1, *lengths)
    return result


CASES: dict[str, Case] = {
    **dict.fromkeys(("CrossEntropyLoss", "MultiMarginLoss"), Case(classes)),
    "NLLLoss": Case(classes, lambda loss, p, t: loss(p.log_softmax(1), t)),
    "NLLLoss2d": Case(
        lambda rng: torch.randint(2, (SAMPLES, 2, 1), generator=rng),
        lambda loss, p, t: loss(p.reshape(-1, 2, 2, 1).log_softmax(1), t),
    ),
    **dict.fromkeys(("MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss"), Case(numbers)),
    **dict.fromkeys(("BCEWithLogitsLoss", "MultiLabelSoftMarginLoss"), Case(bits)),
    "BCELoss": Case(bits, lambda loss, p, t: loss(p.sigmoid(), t)),
    **dict.fromkeys(("SoftMarginLoss", "HingeEmbeddingLoss"), Case(signs)),
    "MultiLabelMarginLoss": Case(lambda rng: torch.tensor([[2, 0, -1, -1]]).repeat(SAMPLES, 1)),
    "PoissonNLLLoss": Case(positive),
    "KLDivLoss": Case(positive, lambda loss, p, t: loss(p.log_softmax(1), t.softmax(1))),
    "GaussianNLLLoss": Case(numbers, lambda loss, p, t: loss(p, t, p.exp())),
    "CosineEmbeddingLoss": Case(numbers, lambda loss, p, t: loss(p, t, torch.ones(len(p)))),
    "MarginRankingLoss": Case(numbers, lambda loss, p, t: loss(p, t, torch.ones_like(p))),
    **dict.fromkeys(
        ("TripletMarginLoss", "TripletMarginWithDistanceLoss"), Case(numbers, lambda loss, p, t: loss(p, t, p.flip(0)))
    ),
    "CTCLoss": Case(numbers, ctc),
}
# torch has no second derivative of these: MAML refuses them
ONCE_DIFFERENTIABLE = {"MultiMarginLoss", "MultiLabelMarginLoss", "CTCLoss"}
WITH_PARAMETERS = {"LinearCrossEntropyLoss"}  # which belong into the network


def tasks(target: Target) -> TaskBatch:
    def part(seed: int) -> tuple[Tensor, Tensor]:
        rng = torch.Generator().manual_seed(seed)
        return torch.randn(T, SAMPLES, 5, generator=rng), torch.stack([target(rng) for _ in range(T)])

    return TaskBatch(*part(1), *part(2))


def test_every_loss_has_a_case_or_a_reason() -> None:
    assert {*CASES} | WITH_PARAMETERS == {*LOSSES}


@pytest.mark.filterwarnings("ignore")  # of torch, on what the classes are given
@pytest.mark.parametrize("name", CASES)
def test_a_loss_is_as_in_a_loop_over_tasks(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
    loss, batch = Called(name, case.call), tasks(case.target)
    once = name in ONCE_DIFFERENTIABLE
    wrong = {}
    expected = {a: update(a, network, batch, STEPS, RATE, loss) for a in ALGORITHMS if a != "MAML" or not once}
    for algorithm, options in WAYS:
        if algorithm == "MAML" and once:
            with pytest.raises(InputError, match=r"loss .*torch says.*second derivative, FOMAML"):
                ours(algorithm, copy.deepcopy(network), batch, loss=loss, **options)
            continue
        got = ours(algorithm, copy.deepcopy(network), batch, loss=loss, **options)
        error = worst(got, expected[algorithm])
        if not error <= EXACT:
            wrong[algorithm, *options] = error
    assert not wrong, "\n".join(f"{place}: {error}" for place, error in wrong.items())


@pytest.mark.parametrize("name", sorted(WITH_PARAMETERS))
def test_a_loss_with_parameters_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="loss must have no trainable parameters"):
        FOMAML(nn.Linear(5, 4), loss=getattr(nn, name)(5, 4))
