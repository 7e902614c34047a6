"""Scores of tasks, and their statistics over tasks."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


def score(predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Accuracy per task for class numbers, mse for real targets, else nothing.  # T S N ... or T S ..., T S ... -> T"""
    if targets.is_floating_point() and predictions.shape == targets.shape:
        return {"mse": (predictions - targets).square().flatten(1).mean(1)}
    if not targets.is_floating_point() and predictions.ndim == targets.ndim + 1:
        return {"accuracy": (predictions.argmax(2) == targets).flatten(1).float().mean(1)}
    return {}


def query_scores(losses: Callable[[Tensor, Tensor], Tensor], predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Loss, from ``losses``, and score of each task by name.  # T R ..., T R ... -> T"""
    return {"loss": losses(predictions, targets)} | score(predictions, targets)


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
            module.log(f"{stage}/{name}", mean, prog_bar=name in ("accuracy", "mse"), sync_dist=True)
            module.log(f"{stage}/{name}_ci95", ci95, sync_dist=True)
            module.log(f"{stage}/tasks", tasks, sync_dist=True)
