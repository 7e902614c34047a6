"""Statistics over tasks."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class Statistics(NamedTuple):
    """A mean over tasks, the half-width of its 95 % confidence interval, and the number of tasks."""

    mean: Tensor
    ci95: Tensor
    tasks: Tensor


class TaskMean(Metric):
    """Mean of a value over tasks, with its 95 % confidence interval.

    ``update`` takes one value a task  # T
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
