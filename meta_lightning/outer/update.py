"""The outer update: the schedule of its learning rate, and steps that hold only where they are finite."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils._pytree import tree_leaves

from meta_lightning.checks import require, require_at_least, require_choice
from meta_lightning.inner.params import Params

Decay = Literal["constant", "linear", "cosine"]
DECAYS: dict[Decay, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: (1.0 + math.cos(math.pi * progress)) / 2.0,
}

Scheduler = Callable[[Optimizer], LRScheduler]
# parameters and learning rate; called so, an optimizer's first two arguments are not options of the command line
OuterOptimizer = Callable[[Iterable[Tensor], float], Optimizer]


class OuterUpdate(nn.Module):
    """Everything around a step of θ: schedule, roll-back of steps that are not finite, counters of these."""

    def __init__(self, decay: Decay, scheduler: Scheduler | None, max_skipped: int) -> None:
        super().__init__()
        require_choice(DECAYS, outer_lr_decay=decay)
        require_at_least(0, max_skipped=max_skipped)
        self.decay: Decay = decay
        self.scheduler = scheduler
        self.max_skipped = max_skipped
        self.steps = math.inf  # of the whole training
        self.options: list[dict[str, Any]] = []  # of the optimizer's groups, as it was made
        self.schedule: LRScheduler
        self.skipped: Tensor
        self.skipped_in_a_row: Tensor
        for counter in ("skipped", "skipped_in_a_row"):
            self.register_buffer(counter, torch.zeros((), dtype=torch.int64), persistent=False)

    def require_end(self, trainer: L.Trainer) -> None:
        """Refuse a decay that needs an end of training where there is none (InputError)."""
        require(
            self.scheduler is not None or self.decay == "constant" or math.isfinite(trainer.estimated_stepping_batches),
            f"outer_lr_decay {self.decay!r} needs an end of training: expected trainer.max_steps or "
            "trainer.max_epochs, got neither",
        )

    def made(self, optimizer: Optimizer, device: torch.device) -> Optimizer:
        """Note the options of an optimizer that was made just now."""
        for group in optimizer.param_groups:
            if device.type == "cuda" and "capturable" in group:
                group["capturable"] = True  # counts its steps on the device, as undone_unless needs it
        self.options = [{n: value for n, value in group.items() if n != "params"} for group in optimizer.param_groups]
        return optimizer

    def begin(self, optimizer: Optimizer, trainer: L.Trainer) -> None:
        """Let the arguments beat what a resumed checkpoint says of the optimizer, and go on with the schedule."""
        self.steps = trainer.estimated_stepping_batches
        scheduler = self.scheduler or (lambda optimizer: LambdaLR(optimizer, self.factor))
        self.schedule = schedule_from(scheduler, optimizer, self.options, trainer.global_step)
        optimizer.load_state_dict(optimizer.state_dict())  # which puts its tensors where its options want them

    def factor(self, step: int) -> float:
        """What the outer learning rate is multiplied by at a meta-iteration, by ``decay``."""
        return DECAYS[self.decay](step / self.steps)

    @contextmanager
    def step(self, update: Any, moved: Sequence[Tensor], optimizer: Optimizer) -> Iterator[None]:
        """Around what moves θ and steps the optimizer: undo it, and count it, where the update is not finite."""
        finite = is_finite(update)
        with torch.no_grad(), undone_unless(finite, moved, optimizer):
            yield
        self.schedule.step()
        self.skipped += ~finite
        self.skipped_in_a_row.add_(1).mul_(~finite)

    def counters(self) -> tuple[Tensor, Tensor]:
        """What a checkpoint keeps."""
        return self.skipped, self.skipped_in_a_row


def schedule_from(
    scheduler: Scheduler, optimizer: Optimizer, options: Sequence[dict[str, Any]], step: int
) -> LRScheduler:
    """Rebuild the scheduler and advance it to ``step``; only step-count schedules are supported."""
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


def mean_over_ranks(params: Params, strategy: Strategy) -> Params:
    """The mean over the ranks of what each has of its tasks."""
    # DDP averages gradients only; all in one message, since each waits for all ranks
    together = torch.cat([p.detach().flatten() for p in params.values()])
    mean: Tensor = strategy.reduce(together, reduce_op="mean")
    parts = mean.split([p.numel() for p in params.values()])
    return {name: part.view_as(p) for (name, p), part in zip(params.items(), parts, strict=True)}


@contextmanager
def undone_unless(condition: Tensor, tensors: Sequence[Tensor], optimizer: Optimizer) -> Iterator[None]:
    """Undo what is done inside to tensors and to an optimizer's state, unless the condition holds.

    Selected on the device without a host sync, except for state that the optimizer makes in this step.
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
