"""Build networks, and change their modes, parameters and heads."""

from argparse import ArgumentError
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import nn

from meta_lightning.checks import InputError
from meta_lightning.inner.params import Params

NOTICE = "Unable to serialize instance"  # in place of an object that is a default


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
    parser = network_parser()
    try:
        network: nn.Module = parser.instantiate(parser.parse_object({"network": dict(description)})).network
    except ValueError as error:  # as jsonargparse wraps those of constructors
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        raise
    return network


def network_parser() -> ArgumentParser:
    """A parser of descriptions of networks."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "network")
    return parser


def rebuildable(description: Mapping[str, Any]) -> dict[str, Any]:
    """A description from which the network can be built again: without defaults that are objects.

    Raises:
        InputError: If there is none.
    """
    described: dict[str, Any] = without_objects(dict(description))
    try:
        network_parser().parse_object({"network": described})
    except ArgumentError as error:
        expected = "network must have arguments that a checkpoint can describe, else pass it in Python"
        raise InputError(f"{expected}; got {described}: {error}") from None
    return described


def without_objects(value: Any) -> Any:
    """Arguments but for those for which jsonargparse has only a notice, which are defaults of the class."""
    if isinstance(value, dict):
        notices = [name for name, part in value.items() if isinstance(part, str) and part.startswith(NOTICE)]
        return {name: without_objects(part) for name, part in value.items() if name not in notices}
    return [*map(without_objects, value)] if isinstance(value, list) else value


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
