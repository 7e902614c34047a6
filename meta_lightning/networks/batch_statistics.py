"""Batch norm with the statistics of the batch or of a support set."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import replace_all_batch_norm_modules_
from torch.nn.parameter import is_lazy

from meta_lightning.checks import require
from meta_lightning.inner.copies import copied

BATCH_NORM: Any = nn.BatchNorm1d.__base__  # base class of all batch norm layers, which custom layers may extend as well


def with_batch_statistics(network: nn.Module) -> nn.Module:
    """A copy of a network that normalises with batch statistics and shares the parameters with the original."""
    lazy = [name for name, p in network.named_parameters() if is_lazy(p)]
    require(not lazy, f"network must have been called once to initialise its lazy parameters, got {lazy}")
    unreal = [name for name, p in network.named_parameters() if p.is_complex()]
    require(not unreal, f"network must have real parameters, got complex {unreal}")
    several = [name for name, part in network.named_modules() if isinstance(part, nn.SyncBatchNorm)]
    require(not several, f"network must have no SyncBatchNorm, which mixes the tasks of processes, got {several}")
    # running statistics raise under vmap in training, and mix the tasks' statistics in evaluation
    return replace_all_batch_norm_modules_(copied(network, shared=network.parameters()))


def hold_statistics(layer: Any, mean: Tensor, variance: Tensor) -> None:
    """Make a batch norm layer normalise with these statistics.  # C, C"""
    layer.track_running_stats = True
    layer.running_mean, layer.running_var = mean, variance
    layer.num_batches_tracked = torch.tensor(0)  # unused, but loading a state dict requires it


def batch_norms(network: nn.Module) -> list[Any]:
    """The batch norm layers of a network."""
    return [part for part in network.modules() if isinstance(part, BATCH_NORM)]


@torch.no_grad()
def freeze_statistics(network: nn.Module, forward: Callable[[nn.Module], Any]) -> None:
    """Make batch norm normalise with the statistics of a forward, so that queries do not affect each other."""

    def hold(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(inputs[0], [0, *range(2, inputs[0].ndim)], correction=0)
        hold_statistics(layer, mean, variance)

    hooks = [layer.register_forward_pre_hook(hold) for layer in batch_norms(network)]
    forward(network)
    for hook in hooks:
        hook.remove()
