"""The outer update: learning-rate schedule, and roll-back of steps that are not finite."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import Parameter, signature
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from meta_lightning.checks import require, require_at_least, require_choice
from meta_lightning.inner.params import Params, tree_leaves

Decay = Literal["constant", "linear", "cosine"]
DECAYS: dict[Decay, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: (1.0 + math.cos(math.pi * progress)) / 2.0,
}

Scheduler = Callable[[Optimizer], LRScheduler]
# called with parameters and learning rate, which are therefore no options of the command line
OuterOptimizer = Callable[[Iterable[Tensor], float], Optimizer]


class OuterUpdate(nn.Module):
    """Schedule, roll-back and count of outer steps whose update is not finite."""

    def __init__(self, decay: Decay, scheduler: Scheduler | None, max_skipped: int) -> None:
        super().__init__()
        require_choice(DECAYS, outer_lr_decay=decay)
        require_at_least(0, max_skipped=max_skipped)
        self.decay: Decay = decay
        self.scheduler = scheduler
        self.max_skipped = max_skipped
        self.steps = math.inf  # of the whole training
        self.lr = math.nan  # of the last step
        self.options: list[dict[str, Any]] = []  # initial options of the parameter groups
        self.schedule: LRScheduler
        self.skipped: Tensor
        self.skipped_in_a_row: Tensor
        for counter in ("skipped", "skipped_in_a_row"):
            self.register_buffer(counter, torch.zeros((), dtype=torch.int64), persistent=False)

    def require_end(self, trainer: L.Trainer) -> None:
        """Raise InputError if the decay needs a number of steps and training has none."""
        require(
            self.scheduler is not None or self.decay == "constant" or math.isfinite(trainer.estimated_stepping_batches),
            f"outer_lr_decay {self.decay!r} needs a number of steps: expected trainer.max_steps or trainer.max_epochs, "
            "got neither",
        )

    def made(self, optimizer: Optimizer, device: torch.device) -> Optimizer:
        """Choose capturable and fused kernels for a new optimizer, and record its options."""
        for group in optimizer.param_groups:
            if device.type == "cuda" and "capturable" in group:
                group["capturable"] = True  # step count on the device, for undone_unless
            if "fused" in group and group["fused"] is group.get("foreach") is None and not group.get("differentiable"):
                group["fused"] = all(p.is_floating_point() for p in group["params"])  # one kernel per step
        self.options = [{n: value for n, value in group.items() if n != "params"} for group in optimizer.param_groups]
        return optimizer

    def begin(self, optimizer: Optimizer, trainer: L.Trainer) -> None:
        """Apply the arguments over the options of a resumed optimizer, and advance the schedule."""
        self.steps = trainer.estimated_stepping_batches
        scheduler = self.scheduler or (lambda optimizer: LambdaLR(optimizer, self.factor))
        self.schedule = schedule_from(scheduler, optimizer, self.options, trainer.global_step)
        optimizer.load_state_dict(optimizer.state_dict())  # moves its state to where the options require

    def factor(self, step: int) -> float:
        """Factor of the outer learning rate at a meta-iteration."""
        return DECAYS[self.decay](step / self.steps)

    @contextmanager
    def step(self, update: Any, moved: Callable[[], Sequence[Tensor]], optimizer: Optimizer) -> Iterator[None]:
        """Wrap the update of θ and the optimizer step: undo and count it unless ``update`` is finite."""
        finite = is_finite(update)
        self.lr = optimizer.param_groups[0]["lr"]
        certain = known_to_hold(finite)
        guard: AbstractContextManager[None] = nullcontext()
        if not certain:
            # optimizers of other packages may have the option and not know found_inf
            fused = optimizer.state and all(group.get("fused") for group in optimizer.param_groups)
            skips = fused and type(optimizer).__module__.startswith("torch.optim.")
            guard = skipped_unless(finite, optimizer) if skips else undone_unless(finite, moved(), optimizer)
        with torch.no_grad(), guard:
            yield
        if self.scheduler or self.decay != "constant":
            self.schedule.step()
        if certain:
            self.skipped_in_a_row.zero_()
        else:
            self.skipped += ~finite
            self.skipped_in_a_row.add_(1).mul_(~finite)

    def counters(self) -> tuple[Tensor, Tensor]:
        """The counters, for checkpoints."""
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
        f"scheduler must depend on the number of meta-iterations only, got {type(schedule).__name__}, whose step needs "
        f"{', '.join(needed)}",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # no optimizer.step here
        for _ in range(step):
            schedule.step()
    return schedule


def is_finite(update: Any) -> Tensor:
    """Whether all tensors in a container are finite, as a tensor on the device."""
    tensors = [part.detach().flatten() for part in tree_leaves(update) if isinstance(part, Tensor)]
    return torch.cat(tensors).isfinite().all()  # at small sizes a third of the time of one tensor after another


def known_to_hold(condition: Tensor) -> bool:
    """Whether the condition is on the CPU and holds; never syncs with a GPU."""
    return condition.device.type == "cpu" and bool(condition)


def mean_over_ranks(params: Params, strategy: Strategy) -> Params:
    """Average the ranks' means over their tasks, in one message."""
    together = torch.cat([p.detach().flatten() for p in params.values()])
    mean: Tensor = strategy.reduce(together, reduce_op="mean")
    parts = mean.split([p.numel() for p in params.values()])
    return {name: part.view_as(p).to(p.dtype) for (name, p), part in zip(params.items(), parts, strict=True)}


@contextmanager
def skipped_unless(condition: Tensor, optimizer: Any) -> Iterator[None]:
    """Let a fused optimizer skip its step unless the condition holds, as ``torch.amp.GradScaler`` does."""
    optimizer.found_inf = (~condition).float()
    try:
        yield
    finally:
        vars(optimizer).pop("found_inf", None)  # a GradScaler has put its own in the place, and removed it


@contextmanager
def undone_unless(condition: Tensor, tensors: Sequence[Tensor], optimizer: Optimizer) -> Iterator[None]:
    """Restore tensors and optimizer state on exit unless the condition holds, without a host sync."""

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
    if new and optimizer.state and not condition:  # this syncs, once, where the optimizer creates state
        optimizer.state.clear()
