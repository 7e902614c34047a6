"""Scores of tasks, and their statistics over tasks."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from meta_lightning.checks import require
from meta_lightning.inner.copies import copied
from meta_lightning.inner.traits import Calls

RESERVED = ("loss", "tasks", "skipped", "outer_lr")  # names that the learners log
# functions that a loss applies to logits or probabilities, which are not in the units of the targets
OF_PROBABILITIES = {
    *("cross_entropy", "cross_entropy_loss", "nll_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits"),
    *("kl_div", "sigmoid", "logsigmoid", "log_sigmoid", "softmax", "log_softmax", "multilabel_soft_margin_loss"),
}


class Scores:
    """Scores of tasks: accuracy or mse, as the loss suggests, and given metrics."""

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        for name, metric in metrics.items():
            valid = isinstance(metric, Metric) and name not in RESERVED and "/" not in name
            expected = f"metrics must map names other than {', '.join(RESERVED)} to torchmetrics"
            require(valid, f"{expected}, got {name!r}: {type(metric).__name__}")
        self.metrics = {name: copy.deepcopy(metric) for name, metric in metrics.items()}
        for part in (part for metric in self.metrics.values() for part in metric.modules()):
            if isinstance(part, Metric):
                part.distributed_available_fn = bool  # False: of one task; TaskMean gathers those of all processes
        self.known: tuple[Any, bool] = None, False  # a loss, and whether it compares predictions with real targets

    @torch.no_grad()
    def __call__(self, loss: Any, predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The scores of each task by name.  # T S N ... or T S ..., T S ... -> T"""
        found = {}
        if targets.is_floating_point() and predictions.shape == targets.shape:
            if self.known[0] is not loss:
                self.known = loss, not applies(loss, OF_PROBABILITIES, predictions[0], targets[0])
            if self.known[1]:
                found["mse"] = (predictions - targets).square().flatten(1).mean(1)
        elif not targets.is_floating_point() and predictions.ndim == targets.ndim + 1:
            # not the labels that the loss leaves out; a partial function holds its arguments
            ignored = getattr(loss, "ignore_index", getattr(loss, "keywords", {}).get("ignore_index", -100))
            scored = (targets != ignored).flatten(1)
            right = (predictions.argmax(2) == targets).flatten(1) & scored
            found["accuracy"] = right.sum(1) / scored.sum(1)
        return found | {name: self.of_tasks(name, predictions, targets) for name in self.metrics}

    def of_tasks(self, name: str, predictions: Tensor, targets: Tensor) -> Tensor:
        """A given metric of each task.  # T S ..., T S ... -> T"""
        metric, values = self.metrics[name].to(predictions.device), []
        for task in zip(predictions, targets, strict=True):
            metric.reset()
            metric.update(*task)
            value = metric.compute()
            require(
                isinstance(value, Tensor) and value.numel() == 1,
                f"metrics must give one number per task, got {getattr(value, 'shape', type(value).__name__)} of {name}",
            )
            values.append(value.reshape(()))
        metric.reset()
        return torch.stack(values).to(predictions.dtype)


def applies(loss: Any, names: set[str], predictions: Tensor, targets: Tensor) -> bool:
    """Whether a loss calls one of these functions of torch.  # S ..., S ..."""
    with Calls() as calls:
        (copied(loss) if isinstance(loss, nn.Module) else loss)(predictions, targets)
    return any(getattr(function, "__name__", "") in names for function in calls.seen)


class Statistics(NamedTuple):
    """Mean over tasks, half-width of its 95 % confidence interval, and number of tasks."""

    mean: Tensor
    ci95: Tensor
    tasks: Tensor


class TaskMean(Metric):
    """Mean of a value over tasks, with its 95 % confidence interval.

    ``update`` takes one value per task.  # T
    ``compute`` returns ``Statistics`` over the tasks of all processes. Its ``ci95`` is ``1.96 · std / √tasks`` with the
    sample standard deviation (Finn et al., 2017, section 5.2), and NaN for a single task.

    Args:
        sync_on_compute: Whether ``compute`` gathers the tasks of all processes; then every process must call it.
    """

    full_state_update = False

    def __init__(self, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.values: list[Tensor]
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, values: Tensor) -> None:
        """Add one value per task.  # T"""
        self.values.append(values.detach().to(torch.float64 if values.device.type == "cpu" else torch.float32))

    def compute(self) -> Statistics:
        """The statistics of all tasks so far."""
        values = dim_zero_cat(self.values)
        spread = values.std() if len(values) > 1 else values.new_tensor(float("nan"))
        return Statistics(values.mean(), 1.96 * spread / len(values) ** 0.5, values.new_tensor(len(values)))


class Evaluation:
    """The values of one validation or test, collected batch by batch."""

    def __init__(self) -> None:
        self.means: dict[str, TaskMean] = {}
        self.first = self.tasks = 0  # before this batch, and with it; of this process

    def begin(self, batch: Sequence[Tensor]) -> int:
        """Count the tasks of a new batch, and return the number of the first one."""
        self.first, self.tasks = self.tasks, self.tasks + len(batch[0])
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
