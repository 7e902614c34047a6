"""Batch norm by the statistics of the batch, or by those of a support set."""

import copy

import torch
from torch import Tensor, nn
from torch.func import replace_all_batch_norm_modules_
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from meta_lightning.checks import require


def with_batch_statistics(network: nn.Module) -> nn.Module:
    """A copy that normalises by the statistics of its batch and shares the network's parameters, the same objects."""
    lazy = [name for name, p in network.named_parameters() if is_lazy(p)]
    require(not lazy, f"network must have been called once, so that its parameters have shapes, got lazy {lazy}")
    shared = {id(p): p for p in network.parameters()}
    # running statistics raise under vmap in training, and mix the tasks' statistics in evaluation
    return replace_all_batch_norm_modules_(copy.deepcopy(network, memo=dict(shared)))


def hold_statistics(layer: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Let a batch norm normalise by these statistics.  # C, C"""
    layer.track_running_stats = True
    layer.running_mean, layer.running_var = mean, variance
    layer.num_batches_tracked = torch.tensor(0)  # unused, but a state dict is not loaded without it


def batch_norms(network: nn.Module) -> list[_BatchNorm]:
    """The layers that normalise by statistics of the batch."""
    return [part for part in network.modules() if isinstance(part, _BatchNorm)]


@torch.no_grad()
def freeze_statistics(network: nn.Module, x: Tensor) -> None:
    """Let batch norm normalise by the statistics of these samples, whatever comes beside a query from now on."""

    def hold(layer: _BatchNorm, inputs: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(inputs[0], [0, *range(2, inputs[0].ndim)], correction=0)
        hold_statistics(layer, mean, variance)

    hooks = [layer.register_forward_pre_hook(hold) for layer in batch_norms(network)]
    network(x)
    for hook in hooks:
        hook.remove()
