"""State of a network besides parameters: what is compared to see whether a forward, or anybody else, changed it."""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from meta_lightning.inner.copies import closure_of
from meta_lightning.inner.params import tree_leaves, tree_map

# replaced by functional_call, or looked at one by one
OF_TORCH = {"_buffers", "_parameters", "_modules", "_flat_weights", "_flat_weight_refs"}
Place = tuple[str, ...]  # kind, module and name


class Content(NamedTuple):
    """The value of an attribute or a buffer, for comparisons."""

    object: int
    identity: Any
    tensor: Tensor | None  # a copy


Contents = dict[Place, Content]


class Parts(NamedTuple):
    """The identity of an object and of what it holds."""

    object: int
    parts: tuple[Any, ...]


def setting(network: nn.Module, loss: Any) -> tuple[Any, ...]:
    """What a network and a loss compute with besides their inputs and the values of tensors."""
    modules = [module for root in (network, loss) if isinstance(root, nn.Module) for module in root.modules()]
    # modes, parameters, buffers, hooks, and what a forward assigns
    values = [value for module in modules for value in vars(module).values()]
    attributes = [identity(value) for value in values if not isinstance(value, dict) or value]
    return has_backward_hooks(modules), identity(loss), *map(id, modules), *attributes


def without_numbers(setting: tuple[Any, ...]) -> tuple[Any, ...]:
    """A setting without numbers and parts of objects, such as an annealed temperature: traits do not depend on them."""
    lasting = [value for value in setting if type(value) is not float and type(value) is not int]
    return tuple(value.object if isinstance(value, Parts) else value for value in lasting)


def has_backward_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether one of the modules has hooks that backward calls, or all modules have."""
    everywhere = global_hooks._global_backward_hooks or global_hooks._global_backward_pre_hooks
    return bool(everywhere) or any(module._backward_hooks or module._backward_pre_hooks for module in modules)


def hooked_parameters(network: nn.Module) -> list[str]:
    """Names of parameters that have hooks."""
    return [name for name, p in network.named_parameters() if p._backward_hooks]


def contents(network: nn.Module) -> Contents:
    """What a forward may change, by kind, module and name: attributes, and copies of the tensors among them."""
    found: Contents = {}
    for path, module in network.named_modules():
        buffers = dict(module.named_buffers(recurse=False))
        attributes = {name: value for name, value in vars(module).items() if name not in OF_TORCH}
        for kind, values in (("attribute", attributes), ("buffer", buffers)):
            for name, value in values.items():
                copy = value.clone() if isinstance(value, Tensor) else None
                found[kind, path, name] = Content(id(value), identity(value), copy)
    return found


def changes(before: Contents, after: Contents) -> set[Place]:
    """Places whose value is not what it was."""
    return {place for place in before.keys() | after.keys() if differ(before.get(place), after.get(place))}


def differ(before: Content | None, after: Content | None) -> bool:
    """Whether a value is not what it was."""
    if before is None or after is None or before.identity != after.identity:
        return True
    return before.tensor is not None and after.tensor is not None and not torch.equal(before.tensor, after.tensor)


def listed(places: Iterable[Place]) -> str:
    """Names of places, in order."""
    return ", ".join(sorted(".".join(filter(None, place)) for _, *place in places))


def identity(value: Any) -> Any:
    """A value for comparisons that changes whenever an attribute, its memory or the members of a container do."""
    if value is None or isinstance(value, int | float | str):
        return value
    if isinstance(value, Tensor):
        return id(value), value.data_ptr()  # a parameter that was moved is the same object
    if isinstance(value, dict):
        return id(value), *map(identity, value.values())
    held = closure_of(value) if isinstance(value, FunctionType) else [value]
    parts = [part for owner in held for part in (owner, *parts_of(owner))]
    return Parts(id(value), tuple(part if isinstance(part, int | float | str) else id(part) for part in parts))


def parts_of(value: Any) -> list[Any]:
    """Members of a container, or attributes of an object that is no module."""
    if isinstance(value, list | tuple | set | deque):
        return [*value]
    return [] if isinstance(value, nn.Module | type | Tensor) else [*getattr(value, "__dict__", {}).values()]


def is_new_activation(network: nn.Module, before: Content | None, kind: str, module: str, name: str) -> bool:
    """Whether an attribute is another tensor than before, or a new container of tensors."""
    value = vars(network.get_submodule(module)).get(name) if kind == "attribute" else None
    leaves = tree_leaves(value)
    new = before is None or before.object != id(value)
    return new and bool(leaves) and all(isinstance(leaf, Tensor) for leaf in leaves)


@contextmanager
def unchanged(network: nn.Module) -> Iterator[None]:
    """Restore the attributes and buffers of a network on exit."""
    kept = [(module, dict(vars(module))) for module in network.modules()]
    buffers = [(module, name, b, b.clone()) for module, _ in kept for name, b in module.named_buffers(recurse=False)]
    try:
        yield
    finally:
        for module, attributes in kept:
            vars(module).clear()
            vars(module).update(attributes)
        for module, name, buffer, value in buffers:
            setattr(module, name, buffer.copy_(value))


def release(network: nn.Module) -> None:
    """Detach activations that forwards left on a network from their graphs."""

    def detached(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) and value.grad_fn is not None else value

    for module in network.modules():
        for name, value in vars(module).items():
            if any(detached(leaf) is not leaf for leaf in tree_leaves(value)):
                vars(module)[name] = tree_map(detached, value)
