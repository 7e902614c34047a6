"""Batch norm with the statistics of the batch, of a support set, or, where it is frozen, its own."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import replace_all_batch_norm_modules_
from torch.nn.parameter import is_lazy

from meta_lightning.checks import require
from meta_lightning.inner.copies import copied

BATCH_NORM: Any = nn.BatchNorm1d.__base__  # base class of all batch norm layers, which custom layers may extend as well


def frozen_modules(network: nn.Module, trained: Iterable[Tensor]) -> list[nn.Module]:
    """The modules that have parameters, none of which is trained, and all modules in them."""
    ids = {*map(id, trained)}

    def of(module: nn.Module) -> list[nn.Module]:
        own = [*module.parameters()]
        if own and ids.isdisjoint(map(id, own)):
            return [*module.modules()]
        return [part for child in module.children() for part in of(child)]

    return of(network)


def with_batch_statistics(network: nn.Module, trained: Iterable[Tensor]) -> nn.Module:
    """A copy of a network that normalises with batch statistics and shares the parameters with the original.

    Modules none of whose parameters are ``trained`` keep the statistics that they have, and are in evaluation mode.
    """
    lazy = [name for name, p in network.named_parameters() if is_lazy(p)]
    require(not lazy, f"network must have been called once to initialise its lazy parameters, got {lazy}")
    unreal = [name for name, p in network.named_parameters() if p.is_complex()]
    require(not unreal, f"network must have real parameters, got complex {unreal}")
    several = [name for name, part in network.named_modules() if isinstance(part, nn.SyncBatchNorm)]
    require(not several, f"network must have no SyncBatchNorm, which mixes the tasks of processes, got {several}")
    copy = copied(network, shared=network.parameters())
    frozen = frozen_modules(copy, trained)
    for module in frozen:
        module.eval()
    for layer in {*batch_norms(copy)} - {*frozen}:
        # running statistics raise under vmap in training, and mix the tasks' statistics in evaluation
        replace_all_batch_norm_modules_(layer)
    return copy


def frozen_state(network: nn.Module, trained: Iterable[Tensor]) -> set[str]:
    """Names in the state dict of the parameters that are not trained, and of the buffers of frozen modules."""
    trained = [*trained]
    ids, frozen = {*map(id, trained)}, {*frozen_modules(network, trained)}
    names = {name for name, p in network.named_parameters(remove_duplicate=False) if id(p) not in ids}
    return names | {
        name
        for name in network.state_dict().keys() - names
        if network.get_submodule(name.rpartition(".")[0]) in frozen and name not in dict(network.named_parameters())
    }


def forget_statistics(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Normalise with batch statistics where a state lacks those of frozen batch norm, as former versions did."""
    for name, layer in network.named_modules():
        if isinstance(layer, BATCH_NORM) and f"{name}.running_mean".lstrip(".") not in state:
            replace_all_batch_norm_modules_(layer)


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
    """Make batch norm without statistics normalise with those of a forward: queries do not affect each other.

    Raises:
        InputError: If such a layer runs twice, each time with statistics of its own.
    """
    named: Any = network.named_modules()
    layers = {part: name for name, part in named if isinstance(part, BATCH_NORM) and part.running_mean is None}

    def hold(layer: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        expected = "network must run each batch norm once, to keep the statistics of the support set"
        require(layer.running_mean is None, f"{expected}, got several runs of {layers[layer]}")
        (x,) = *args, *kwargs.values()
        variance, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
        hold_statistics(layer, mean, variance)

    hooks = [layer.register_forward_pre_hook(hold, with_kwargs=True) for layer in layers]
    forward(network)
    for hook in hooks:
        hook.remove()
