"""Build networks, and change their modes, parameters and heads."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import nn

from meta_lightning.inner.params import Params


@contextmanager
def in_evaluation(module: nn.Module) -> Iterator[None]:
    """Set a module to evaluation mode, and restore the mode of each submodule afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def build_network(description: Mapping[str, Any]) -> nn.Module:
    """Build a network from its class path and arguments, as stored in configurations and checkpoints."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "network")
    network: nn.Module = parser.instantiate(parser.parse_object({"network": dict(description)})).network
    return network


@torch.no_grad()
def set_parameters(network: nn.Module, params: Params) -> None:
    """Copy values into a network's parameters; linear layers grow to the number of rows."""
    for name, value in params.items():
        p = network.get_parameter(name)
        if p.shape == value.shape:  # in place, which keeps ties
            p.copy_(value)
        else:
            path, _, leaf = name.rpartition(".")
            layer = network.get_submodule(path)
            assert isinstance(layer, nn.Linear)
            setattr(layer, leaf, nn.Parameter(value.clone()))
            layer.out_features = len(value)
