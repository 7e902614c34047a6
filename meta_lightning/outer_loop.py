"""The mechanics of the outer loop: its learning rate, and steps that hold only where they are finite."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_leaves

from meta_lightning.checks import require

Decay = Literal["constant", "linear", "cosine"]
DECAYS: dict[Decay, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: (1.0 + math.cos(math.pi * progress)) / 2.0,
}

Scheduler = Callable[[Optimizer], LRScheduler]


def options_of(group: dict[str, Any]) -> dict[str, Any]:
    """The options of an optimizer's group of parameters."""
    return {name: value for name, value in group.items() if name != "params"}


def schedule_from(
    scheduler: Scheduler, optimizer: Optimizer, options: Sequence[dict[str, Any]], step: int
) -> LRScheduler:
    """A schedule as it stands after so many steps, which it takes anew: it depends on nothing but their number.

    Args:
        scheduler: Makes the schedule.
        optimizer: The optimizer.
        options: Of each of its groups, as it was made: what the schedule starts from.
        step: The steps that were taken.

    Raises:
        InputError: If the schedule needs more than the number of steps, such as a metric.
    """
    for group, made in zip(optimizer.param_groups, options, strict=True):
        group.pop("initial_lr", None)
        group.update(made)
    schedule = scheduler(optimizer)
    needed = [p.name for p in signature(schedule.step).parameters.values() if p.default is Parameter.empty]
    require(
        not needed,
        f"scheduler must go by the number of meta-iterations alone, got {type(schedule).__name__}, whose step needs "
        f"{', '.join(needed)}",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # there is no optimizer.step in it
        for _ in range(step):
            schedule.step()
    return schedule


def is_finite(update: Any) -> Tensor:
    """Whether all numbers of all tensors in a container are finite; it stays on the device."""
    return torch.stack([part.isfinite().all() for part in tree_leaves(update) if isinstance(part, Tensor)]).all()


@contextmanager
def undone_unless(condition: Tensor, tensors: Sequence[Tensor], optimizer: Optimizer) -> Iterator[None]:
    """Undo what is done inside to tensors and to an optimizer's state, unless the condition holds.

    That is chosen on the device, which nobody waits for; but for state of the optimizer that is elsewhere, and for the
    step in which the optimizer makes its state.

    Args:
        condition: True or false.
        tensors: What is to be as it was.
        optimizer: The optimizer, whose state's tensors are to be as they were.
    """

    def kept() -> dict[Any, Tensor]:
        state = {(p, name): value for p, of_one in optimizer.state.items() for name, value in of_one.items()}
        return {i: t.detach() for i, t in enumerate(tensors)} | {
            place: value for place, value in state.items() if isinstance(value, Tensor)
        }

    new = not optimizer.state
    before = {place: t.clone() for place, t in kept().items()}
    yield
    after = kept()
    conditions = {device: condition.to(device) for device in {t.device for t in before.values()}}
    for place, then in before.items():
        after[place].copy_(torch.where(conditions[then.device], after[place], then))
    if new and optimizer.state and not condition:
        optimizer.state.clear()
