"""What is done to a network before it predicts: outputs for the task's classes, and batch norm's statistics held."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from meta_lightning.checks import require
from meta_lightning.inner_loop import Params, rate_of


@contextmanager
def in_evaluation(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode, and each part as it was afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def build_network(description: Mapping[str, Any]) -> nn.Module:
    """A network from its class path and arguments, as configurations and checkpoints hold them."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "network")
    network: nn.Module = parser.instantiate_classes(parser.parse_object({"network": dict(description)})).network
    return network


def last_linear(network: nn.Module) -> tuple[str, nn.Linear] | None:
    """The network's last layer and its name, if that is a linear one."""
    layers = [item for item in network.named_modules() if any(True for _ in item[1].parameters(recurse=False))]
    return next(((name, part) for name, part in layers[-1:] if isinstance(part, nn.Linear)), None)


def widened_head(network: nn.Module, theta: Params, classes: int, outputs: int) -> Params:
    """θ of the network's last layer with an output for each of more classes than it has outputs.

    Row i is row i mod N of the N that training left. In training the classes of a task come in any order, so each row
    is as good a start for any class, and two equal ones part at the first inner step. Rows of zeros, or their mean,
    would leave the other layers without a gradient in that step, on which few-step adaptation relies: on 8-way 1-shot
    glyphs with a 5-way learner they reach 24 % after 4 steps and 70 % after 10, the cycled rows 64 % and 71 %.

    Args:
        network: The network.
        theta: Its parameters that adapt, and their rates where these are learnt.
        classes: Number of classes.
        outputs: Number of outputs (N).

    Returns:
        The layer's parameters by name, and their rates, with ``classes`` rows.

    Raises:
        InputError: If the last layer is not linear, or does not adapt.
    """
    head = last_linear(network)
    fits = head is not None and head[1].out_features == outputs
    parameters = [n for n, _ in head[1].named_parameters(head[0])] if head and fits else []
    require(
        bool(parameters) and theta.keys() >= {*parameters},
        f"y must hold at most {outputs} classes, the outputs of the network, since its last layer is not a linear one "
        f"that is trained, to be given more; got {classes}",
    )
    rows = torch.arange(classes, device=theta[parameters[0]].device) % outputs
    return {n: theta[n][rows] for n in (*parameters, *map(rate_of, parameters)) if n in theta}


@torch.no_grad()
def set_parameters(network: nn.Module, params: Params) -> None:
    """Give a network copies of these values, and a linear layer as many outputs as they have rows."""
    for name, value in params.items():
        p = network.get_parameter(name)
        if p.shape == value.shape:  # in place, so that what shares it still does
            p.copy_(value)
        else:
            path, _, leaf = name.rpartition(".")
            layer = network.get_submodule(path)
            assert isinstance(layer, nn.Linear)
            setattr(layer, leaf, nn.Parameter(value.clone()))
            layer.out_features = len(value)


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
    """Let batch norm normalise by the statistics of these samples, whatever comes beside a query from now on.

    Args:
        network: A network in evaluation mode that normalises by the batch's own statistics.
        x: The samples: a support set.  # S ...
    """

    def hold(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(layer, _BatchNorm)
        variance, mean = torch.var_mean(inputs[0], [0, *range(2, inputs[0].ndim)], correction=0)
        hold_statistics(layer, mean, variance)

    hooks = [layer.register_forward_pre_hook(hold) for layer in batch_norms(network)]
    network(x)
    for hook in hooks:
        hook.remove()
