"""The outer update: learning-rate schedule, and roll-back of steps that are not finite."""

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import Parameter, signature
from types import NoneType
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
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

MISSING = object()  # what an optimizer has not kept


class OuterUpdate:
    """Schedule, roll-back and count of outer steps whose update is not finite."""

    def __init__(self, decay: Decay, scheduler: Scheduler | None, max_skipped: int) -> None:
        require_choice(DECAYS, outer_lr_decay=decay)
        require_at_least(0, max_skipped=max_skipped)
        self.decay: Decay = decay
        self.scheduler = scheduler
        self.max_skipped = max_skipped
        self.steps = math.inf  # of the whole training
        self.lr = math.nan  # of the last step
        self.options: list[dict[str, Any]] = []  # arguments of the parameter groups at the start of training
        self.schedule: LRScheduler | None = None
        self.scheduled = 0  # parameter groups that the schedule moves
        # no buffers, which callbacks average
        self.skipped, self.skipped_in_a_row = torch.zeros(2, dtype=torch.int64)

    def require_end(self, trainer: L.Trainer) -> None:
        """Raise InputError if the decay needs a number of steps and training has none."""
        require(
            self.scheduler is not None or self.decay == "constant" or math.isfinite(trainer.estimated_stepping_batches),
            f"outer_lr_decay {self.decay!r} needs a number of steps: expected trainer.max_steps or trainer.max_epochs, "
            "got neither",
        )

    def with_kernels(self, optimizer: Optimizer, device: torch.device) -> Optimizer:
        """Choose capturable and fused kernels for a new optimizer."""
        for group in optimizer.param_groups:
            if device.type == "cuda" and "capturable" in group:
                group["capturable"] = True  # step count on the device, for undone_unless
            if "fused" in group and group["fused"] is group.get("foreach") is None and not group.get("differentiable"):
                group["fused"] = all(p.is_floating_point() for p in group["params"])  # one kernel per step
        return optimizer

    def take_options(self, optimizers: Sequence[Optimizer]) -> None:
        """Keep the arguments of a new optimizer; raise InputError unless there is one that steps by itself."""
        kinds = [type(optimizer).__name__ for optimizer in optimizers]
        require(len(kinds) == 1, f"configure_optimizers must return one optimizer, got {', '.join(kinds) or None}")
        (optimizer,) = optimizers
        require(bool(optimizer.param_groups), "configure_optimizers must return one optimizer, got None")
        needed = ", ".join(required_arguments(type(optimizer).step))
        require(not needed, f"optimizer must step without arguments, got {kinds[0]}, whose step needs {needed}")
        # not what else the groups hold: some optimizers keep their state there
        kinds_of = [kind for kind in type(optimizer).__mro__ if "__init__" in vars(kind)]
        names = {"lr"}.union(*(signature(vars(kind)["__init__"]).parameters for kind in kinds_of)) - {"params"}
        self.options = [{n: value for n, value in group.items() if n in names} for group in optimizer.param_groups]

    def begin(self, optimizer: Optimizer, trainer: L.Trainer) -> None:
        """Apply the arguments over the options of a resumed optimizer, and advance the schedule."""
        device = trainer.strategy.root_device
        self.skipped, self.skipped_in_a_row = self.skipped.to(device), self.skipped_in_a_row.to(device)
        self.steps = trainer.estimated_stepping_batches
        for config in trainer.lr_scheduler_configs:
            require_step_count(config.scheduler, "the scheduler of configure_optimizers")
        self.schedule = None
        if trainer.lr_scheduler_configs:
            return  # of a subclass or a tuner; Lightning restores them
        groups = optimizer.param_groups
        # torch's mark of a group with a schedule: callbacks may add groups later, which they schedule themselves
        self.scheduled = sum("initial_lr" in group for group in groups) or len(groups)
        scheduler = self.scheduler or (lambda optimizer: LambdaLR(optimizer, self.factor))
        with first_groups(optimizer, self.scheduled):
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
        if self.schedule is not None and (self.scheduler or self.decay != "constant"):
            with first_groups(optimizer, self.scheduled):
                self.schedule.step()
        if certain:
            self.skipped_in_a_row.zero_()
        else:
            self.skipped += ~finite
            self.skipped_in_a_row.add_(1).mul_(~finite)

    def counters(self) -> tuple[Tensor, Tensor]:
        """The counters, for checkpoints."""
        return self.skipped, self.skipped_in_a_row


def advance(configs: Sequence[LRSchedulerConfig], interval: str, count: int) -> None:
    """Step Lightning's schedulers, which it leaves to the module in manual optimization."""
    for config in configs:
        if config.interval == interval and count % config.frequency == 0:
            config.scheduler.step()  # type: ignore[call-arg]  # require_step_count has excluded others


def required_arguments(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments without default, except ``self``."""
    required = [p for p in signature(function).parameters.values() if p.default is Parameter.empty]
    several = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return [p.name for p in required if p.name != "self" and p.kind not in several]


def require_step_count(schedule: Any, argument: str) -> None:
    """Raise InputError for a scheduler whose step depends on more than the number of steps."""
    needed = ", ".join(required_arguments(schedule.step))
    came = f"got {type(schedule).__name__}, whose step needs {needed}"
    require(not needed, f"{argument} must depend on the number of meta-iterations only, {came}")


@contextmanager
def first_groups(optimizer: Optimizer, number: int) -> Iterator[None]:
    """Hide all but the first parameter groups, for schedulers, which move all that they see."""
    groups = optimizer.param_groups
    optimizer.param_groups = groups[:number]
    try:
        yield
    finally:
        optimizer.param_groups = groups


def schedule_from(
    scheduler: Scheduler, optimizer: Optimizer, options: Sequence[dict[str, Any]], step: int
) -> LRScheduler:
    """Rebuild the scheduler and advance it to ``step``; only step-count schedules are supported."""
    # callbacks that train before the start of the fit, to find a batch size, have no options yet
    for group, made in zip(optimizer.param_groups, options, strict=False):
        group.pop("initial_lr", None)
        group.update(made)
    schedule = scheduler(optimizer)
    require_step_count(schedule, "scheduler")
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
    """Restore tensors and all that an optimizer keeps, on exit, unless the condition holds.

    Without a host sync, except for values that are no tensors and have changed, and for new ones.
    """
    before = {place: t.clone() if isinstance(t, Tensor) else copy.deepcopy(t) for place, t in kept(tensors, optimizer)}
    yield
    after = dict(kept(tensors, optimizer))
    moved = [place for place, t in before.items() if alike(t, after.get(place))]
    conditions = {device: condition.to(device) for device in {before[place].device for place in moved}}
    for place in moved:
        t = before[place]
        after[place].copy_(torch.where(conditions[t.device], after[place], t))
    places = (before.keys() | after.keys()) - {*moved}
    others = [place for place in places if not same(before.get(place, MISSING), after.get(place, MISSING))]
    if others and not condition:
        for owner, name in others:
            owners: Any = optimizer.param_groups if isinstance(owner, int) else optimizer.state
            holder, key = (owners, owner) if name is None else (owners[owner], name)
            if (owner, name) in before:
                holder[key] = before[owner, name]
            else:
                del holder[key]
        for owner in [owner for owner, state in optimizer.state.items() if state == {}]:
            del optimizer.state[owner]


def kept(tensors: Sequence[Tensor], optimizer: Optimizer) -> Iterator[tuple[tuple[Any, Any], Any]]:
    """Tensors, and the state and options of an optimizer, by their places."""
    yield from ((("", i), t.detach()) for i, t in enumerate(tensors))
    for owner, holder in [*enumerate(optimizer.param_groups), *optimizer.state.items()]:
        if isinstance(holder, dict):
            yield from (((owner, name), value) for name, value in holder.items() if name != "params")
        else:
            yield (owner, None), holder


def alike(a: Any, b: Any) -> bool:
    """Whether these are tensors of one form."""
    tensors = isinstance(a, Tensor) and isinstance(b, Tensor)
    return tensors and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def same(a: Any, b: Any) -> bool:
    """Whether these are the same plain value; other objects count as changed."""
    if isinstance(a, list | tuple) and type(a) is type(b) and len(a) == len(b):
        return all(map(same, a, b))
    return type(a) is type(b) and isinstance(a, int | float | str | NoneType) and a == b
