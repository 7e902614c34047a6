"""Losses that see the task: the network with the task's parameters, its samples and its targets."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from meta_lightning.inner.params import Params
from meta_lightning.inner.samples import Samples


class TaskPredictor(NamedTuple):
    """The network with the parameters of one task, as a function: ``network(x)`` returns predictions.  # S ... -> S ...

    Attributes:
        predict: Predictions of samples with given parameters.
        params: The task's parameters θ' by name.
        start: θ'_0, from which its inner steps started.
    """

    predict: Callable[[Params, Samples], Samples]
    params: Params
    start: Params

    def __call__(self, x: Samples) -> Samples:
        """Predictions of any samples, as many times as the loss wants them."""
        return self.predict(self.params, x)


class TaskLoss(nn.Module, ABC):
    """Base class of losses that need more than predictions and targets.

    A subclass implements ``forward``: derivatives with respect to the samples (residuals of differential equations;
    Raissi et al., 2019, https://doi.org/10.1016/j.jcp.2018.10.045), several forward passes, or a distance of
    ``network.params`` from ``network.start``. The meta-gradient follows all of it, to second order. If samples hold
    more than the network takes, such as coefficients of the task, it implements ``inputs`` as well.

    Derivatives by ``torch.func`` run for all tasks at once. Those by ``torch.autograd.grad`` are exact as well, in a
    loop over tasks. A training step logs no scores; validation and test log those of the predictions of the queries.
    """

    def inputs(self, x: Samples) -> Samples:
        """The part of a task's samples that the network takes. Default: all of them.  # S ... -> S ...

        ``adapt`` takes all; the predictor takes this part only.
        """
        return x

    @abstractmethod
    def forward(self, network: TaskPredictor, x: Samples, y: Samples) -> Tensor:
        """The loss of one task.

        Args:
            network: The network with the task's parameters.
            x: Support or query samples.  # S ...
            y: Their targets.  # S ...

        Returns:
            A scalar.
        """
