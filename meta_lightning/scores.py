"""Scores of tasks, and their statistics over tasks."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from meta_lightning.checks import InputError, require
from meta_lightning.inner.copies import copied
from meta_lightning.inner.params import tree_leaves, tree_map
from meta_lightning.inner.samples import Padded, Samples, first_task, length, padded_with, shapes_of, valid, values_of
from meta_lightning.inner.task_loss import TaskLoss
from meta_lightning.random_states import kept_random_states

RESERVED = ("loss", "tasks", "skipped", "outer_lr")  # names that the learners log
SUFFIXES = ("_before", "_ci95")


class Scores:
    """Scores of tasks: accuracy or mse, as the loss suggests, and given metrics."""

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        for name, metric in metrics.items():
            free = name not in RESERVED and "/" not in name and not name.endswith(SUFFIXES)
            others = ", ".join((*RESERVED, *SUFFIXES))
            expected = f"metrics must map names, without / and other than {others}, to torchmetrics"
            came = f"got {name!r}: {type(metric).__name__}"
            require(isinstance(metric, Metric) and free, f"{expected}, {came}")
        self.metrics = {name: copy.deepcopy(metric) for name, metric in metrics.items()}
        for part in (part for metric in self.metrics.values() for part in metric.modules()):
            if isinstance(part, Metric):
                part.distributed_available_fn = bool  # False: of one task; TaskMean gathers those of all processes
        self.known: tuple[Any, Trait] | None = None  # a loss, and what its scores depend on

    @torch.no_grad()
    def __call__(self, loss: Any, predictions: Samples, targets: Samples) -> dict[str, Tensor]:
        """The scores of each task by name.  # T S N ... or T S ..., T S ... -> T"""
        if self.known is None or self.known[0] is not loss:
            self.known = loss, Trait.of(loss, first_task(predictions), values_of(first_task(targets)))
        trait, y = self.known[1], values_of(targets)
        tensors = isinstance(predictions, Tensor) and isinstance(y, Tensor)
        scored = tensors and (trait.compares or not y.is_floating_point())
        mask = targets.mask if isinstance(targets, Padded) else None
        found = score(predictions, y, trait.ignored, mask) if scored else {}
        return found | {name: self.of_tasks(name, predictions, targets) for name in self.metrics}

    def of_tasks(self, name: str, predictions: Samples, targets: Samples) -> Tensor:
        """A given metric of each task.  # T S ..., T S ... -> T"""
        metric, values = self.metrics[name].to(tree_leaves(predictions)[0].device), []
        predictions = padded_with(predictions, targets)
        for number in range(length(predictions)):
            task = [valid(tree_map(lambda t, i=number: t[i], part)) for part in (predictions, targets)]
            metric.reset()
            try:
                metric.update(*task)
                value = metric.compute()
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                shapes = " and ".join(shapes_of(part) for part in task)
                came = f"{shapes} for {name} ({type(metric).__name__}: {error})"
                raise InputError(f"metrics must take the predictions and targets of a task, got {came}") from None
            came = getattr(value, "shape", type(value).__name__)
            number = isinstance(value, Tensor) and value.numel() == 1
            require(number, f"metrics must give one number per task, got {came} of {name}")
            values.append(value.reshape(()))
        metric.reset()
        of_tasks = torch.stack(values)
        return of_tasks if of_tasks.is_floating_point() else of_tasks.float()


def score(predictions: Tensor, targets: Tensor, ignored: int = -100, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Accuracy per task for class numbers, mse for real targets, else nothing; of the samples that are in the mask.

    # T S N ... or T S ..., T S ..., T S -> T
    """
    there = None if mask is None else mask.view(*mask.shape, *[1] * (targets.ndim - 2)).expand_as(targets).flatten(1)
    if targets.is_floating_point() and predictions.shape == targets.shape:
        errors = (predictions - targets).square().flatten(1)
        return {"mse": errors.mean(1) if there is None else (errors * there).sum(1) / there.sum(1)}
    if not targets.is_floating_point() and predictions.ndim == targets.ndim + 1:
        scored = (targets != ignored).flatten(1)
        scored = scored if there is None else scored & there
        right = (predictions.argmax(2) == targets).flatten(1) & scored
        return {"accuracy": right.sum(1) / scored.sum(1)}
    return {}


class Trait(NamedTuple):
    """What the scores of a loss depend on."""

    compares: bool  # predictions with targets in the same units: it is 0 where they are equal
    ignored: int  # class number that it leaves out

    @classmethod
    def of(cls, loss: Any, predictions: Samples, targets: Samples) -> "Trait":
        """Those of a loss, which runs on one task.  # S ..., S ..."""
        if not isinstance(predictions, Tensor) or not isinstance(targets, Tensor):
            return cls(compares=False, ignored=-100)
        same = targets.is_floating_point() and targets.shape == predictions.shape
        if isinstance(loss, TaskLoss):
            return cls(same, ignored=-100)
        with kept_random_states(predictions.device), Labels() as labels:
            value = (copied(loss) if isinstance(loss, nn.Module) else loss)(targets if same else predictions, targets)
        return cls(same and bool(value.abs() <= 1e-6), labels.ignored)


class Labels(TorchFunctionMode):
    """Notes the class number that a loss of torch ignores."""

    ignored = -100

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note ``ignore_index``."""
        if getattr(func, "__name__", "") in ("cross_entropy", "nll_loss"):
            self.ignored = (kwargs or {}).get("ignore_index", self.ignored)
        return func(*args, **(kwargs or {}))


class Statistics(NamedTuple):
    """Mean over tasks, half-width of its 95 % confidence interval, and number of tasks."""

    mean: Tensor
    ci95: Tensor
    tasks: Tensor


class TaskMean(Metric):
    """Mean of a value over tasks, with its 95 % confidence interval.

    ``update`` takes one value per task.  # T
    ``compute`` returns ``Statistics`` over the tasks of all processes. Its ``ci95`` is ``1.96 · std / √tasks`` with the
    sample standard deviation (Finn et al., 2017, section 5.2), and NaN for a single task. ``of_tasks`` holds the value
    of each of these tasks then.  # T

    Args:
        sync_on_compute: Whether ``compute`` gathers the tasks of all processes; then every process must call it.
    """

    full_state_update = False

    def __init__(self, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.values: list[Tensor]
        self.add_state("values", default=[], dist_reduce_fx="cat")
        self.of_tasks: Tensor | None = None

    def update(self, values: Tensor) -> None:
        """Add one value per task.  # T"""
        self.values.append(values.detach().to(torch.float64 if values.device.type == "cpu" else torch.float32))

    def compute(self) -> Statistics:
        """The statistics of all tasks so far."""
        values = self.of_tasks = dim_zero_cat(self.values)
        spread = values.std() if len(values) > 1 else values.new_tensor(float("nan"))
        return Statistics(values.mean(), 1.96 * spread / len(values) ** 0.5, values.new_tensor(len(values)))


class Evaluation:
    """The values of one validation, test or prediction, collected batch by batch."""

    def __init__(self) -> None:
        self.means: dict[str, TaskMean] = {}
        self.first = self.tasks = 0  # before this batch, and with it; of this process

    def begin(self, batch: Sequence[Tensor]) -> int:
        """Count the tasks of a new batch, and return the number of the first one."""
        self.first, self.tasks = self.tasks, self.tasks + length(batch[0])
        return self.first

    def update(self, values: Mapping[str, Tensor]) -> None:
        """Add the tasks of a batch, one tensor per name.  # T"""
        for name, tasks in values.items():
            if name not in self.means:
                self.means[name] = TaskMean().to(tasks.device)
            self.means[name].update(tasks)

    def log(self, module: L.LightningModule, stage: str) -> None:
        """Log mean and 95 % confidence interval of each value over the tasks of all ranks."""
        for name, metric in self.means.items():
            mean, ci95, tasks = metric.compute()
            shown = name != "loss" and not name.endswith("_before")
            module.log(f"{stage}/{name}", mean, prog_bar=shown, sync_dist=True)
            module.log(f"{stage}/{name}_ci95", ci95, sync_dist=True)
            module.log(f"{stage}/tasks", tasks, sync_dist=True)
