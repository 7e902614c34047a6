"""What a prediction is worth: scores of tasks, and their statistics over tasks."""

from collections.abc import Mapping
from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


def score(predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Every task's accuracy for class numbers, mse for floating-point targets, where the shapes have a meaning.

    Args:
        predictions: Logits ``T S N …``, as cross-entropy takes them, or regressed values ``T S …``.
        targets: Class numbers or values.  # T S ...

    Returns:
        The score by its name; empty for predictions of another form, which only the user's loss understands.  # T
    """
    if targets.is_floating_point() and predictions.shape == targets.shape:
        return {"mse": (predictions - targets).square().flatten(1).mean(1)}
    if not targets.is_floating_point() and predictions.ndim == targets.ndim + 1:
        return {"accuracy": (predictions.argmax(2) == targets).flatten(1).float().mean(1)}
    return {}


class Statistics(NamedTuple):
    """A mean over tasks, the half-width of its 95 % confidence interval, and the number of tasks."""

    mean: Tensor
    ci95: Tensor
    tasks: Tensor


class TaskMean(Metric):
    """Mean of a value over tasks, with its 95 % confidence interval.

    ``update`` takes one value per task  # T
    ``compute`` returns ``Statistics``, whose ``ci95`` is ``1.96 · std / √tasks`` (Finn et al., 2017, section 5.2), from
    the sample standard deviation; of a single task it is NaN. Over several processes they are those of all tasks.

    Args:
        sync_on_compute: Whether ``compute`` gathers the tasks of all processes, which all have to call it then.
    """

    full_state_update = False

    def __init__(self, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.values: list[Tensor]
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, values: Tensor) -> None:
        """Add tasks, one value each.  # T"""
        self.values.append(values.detach().to(torch.float64 if values.device.type == "cpu" else torch.float32))

    def compute(self) -> Statistics:
        """Mean, half-width of its 95 % confidence interval, and number of tasks."""
        values = dim_zero_cat(self.values)
        spread = values.std() if len(values) > 1 else values.new_tensor(float("nan"))
        return Statistics(values.mean(), 1.96 * spread / len(values) ** 0.5, values.new_tensor(len(values)))


class Evaluation:
    """The values of one validation or test, gathered batch by batch."""

    def __init__(self) -> None:
        self.means: dict[str, TaskMean] = {}

    def update(self, values: Mapping[str, Tensor]) -> None:
        """Add the tasks of a batch: each value by its name.  # T"""
        for name, tasks in values.items():
            if name not in self.means:
                self.means[name] = TaskMean().to(tasks.device)
            self.means[name].update(tasks)

    def log(self, module: L.LightningModule, stage: str) -> None:
        """Log each value's mean over the tasks of all ranks and its 95 % confidence interval."""
        for name, metric in self.means.items():
            mean, ci95, tasks = metric.compute()
            module.log(f"{stage}/{name}", mean, prog_bar=name in ("accuracy", "mse"), sync_dist=True)
            module.log(f"{stage}/{name}_ci95", ci95, sync_dist=True)
            module.log(f"{stage}/tasks", tasks, sync_dist=True)
