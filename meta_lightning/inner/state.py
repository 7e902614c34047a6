"""State of a network besides parameters: what is compared to see whether a forward, or anybody else, changed it."""

import copy
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from meta_lightning.inner.copies import closure_of, tensors_in
from meta_lightning.inner.params import Params, tree_map

# replaced by functional_call, or looked at one by one
OF_TORCH = {"_buffers", "_parameters", "_modules", "_flat_weights", "_flat_weight_refs"}
PLAIN = int | float | str | torch.device | torch.dtype
MOST = 1000  # members of a container that are looked at
Place = tuple[str, ...]  # kind, module and name
RTOL = 1e-3  # differences below this, relative to the greatest value, are rounding, as of the kernels of a GPU


class Content(NamedTuple):
    """The value of an attribute or a buffer, for comparisons."""

    identity: Any
    tensor: Tensor | None  # a copy


Contents = dict[Place, Content]


def setting(network: nn.Module, loss: Any) -> tuple[Any, ...]:
    """What a network and a loss compute with besides their inputs and the values of tensors."""
    modules = modules_of(network, loss)
    # modes, parameters, buffers, hooks, and what a forward assigns
    values = [value for module in modules for value in vars(module).values()]
    attributes = [identity(value) for value in values if not isinstance(value, dict) or value]
    return has_backward_hooks(modules), identity(loss), *map(id, modules), *attributes


def form(network: nn.Module, loss: Any) -> tuple[Any, ...]:
    """The part of a setting that decides how tasks are computed: without numbers, which callbacks may anneal."""
    modules = modules_of(network, loss)
    values = [value for module in modules for value in vars(module).values()]
    kinds = [kind(value) for value in values if type(value) is not int and (not isinstance(value, dict) or value)]
    return has_backward_hooks(modules), id(loss), *map(id, modules), *kinds


def kind(value: Any, depth: int = 0) -> Any:
    """What is compared of an attribute in a form."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, nn.Parameter) or callable(value):
        return id(value)
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.requires_grad
    if isinstance(value, dict) and size(value) <= MOST and depth < 2:
        return tuple(kind(part, depth + 1) for part in value.values())
    return type(value), size(value)


def size(value: Any) -> int:
    """Number of members of a container, else 0."""
    try:
        return len(value)
    except TypeError:  # also of an array of no dimension
        return 0


def modules_of(*roots: Any) -> list[nn.Module]:
    """All modules of networks, losses and rules; none of a function."""
    return [module for root in roots if isinstance(root, nn.Module) for module in root.modules()]


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
                copied = value.clone() if isinstance(value, Tensor) else None
                found[kind, path, name] = Content(identity(value), copied)
    return found


def changes(before: Contents, after: Contents) -> set[Place]:
    """Places whose value is not what it was."""
    return {place for place in before.keys() | after.keys() if differ(before.get(place), after.get(place))}


def differ(before: Content | None, after: Content | None) -> bool:
    """Whether a value is not what it was."""
    if before is None or after is None or before.identity != after.identity:
        return True
    return before.tensor is not None and after.tensor is not None and not equal(before.tensor, after.tensor)


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same values, NaN included."""
    return torch.equal(a, b) or (a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


def listed(places: Iterable[Place]) -> str:
    """Names of places, in order."""
    return ", ".join(sorted(".".join(filter(None, place)) for _, *place in places))


def identity(value: Any, depth: int = 0) -> Any:
    """A value for comparisons that changes whenever an attribute, its memory or the members of a container do."""
    if value is None or isinstance(value, PLAIN):
        return value if value == value else "nan"
    if isinstance(value, Tensor):
        return id(value), value.data_ptr()  # a parameter that was moved is the same object
    if size(value) > MOST:
        return id(value), size(value)
    if isinstance(value, dict) and depth < 2:
        return id(value), *(identity(part, depth + 1) for part in value.values())
    held = closure_of(value) if isinstance(value, FunctionType) else [value]
    parts = [part for owner in held for part in (owner, *parts_of(owner))]
    return (
        0 if isinstance(value, tuple) else id(value),
        *(part if isinstance(part, PLAIN) else id(part) for part in parts if part is not value),
    )


def parts_of(value: Any) -> list[Any]:
    """Members of a container, or attributes of an object that is no module."""
    if isinstance(value, list | tuple | set | deque):
        return [*value]
    return [] if isinstance(value, nn.Module | type | Tensor) else [*getattr(value, "__dict__", {}).values()]


def taken_back(network: nn.Module, place: Place, moves: bool) -> bool:
    """Whether a change by forward on which no output depends can be taken back, or is made once only."""
    what, module, name = place
    value = vars(network.get_submodule(module)).get(name)
    if what == "buffer" or value is None or isinstance(value, PLAIN):
        return not moves
    return not moves or any(True for _ in tensors_in(value, set()))


def adopt(one: nn.Module, network: nn.Module, places: Iterable[Place]) -> None:
    """Give a network the buffers that its first forward makes."""
    for what, module, name in places:
        if what == "buffer":
            setattr(network.get_submodule(module), name, one.get_submodule(module).get_buffer(name).detach().clone())


def members(value: Any) -> Any:
    """A shallow copy of a list or dict, else None."""
    return copy.copy(value) if isinstance(value, list | dict) else None


def put_back(value: Any, members: Any) -> None:
    """Give a list or dict the members that it had."""
    if members is not None:
        value.clear()
        (value.update if isinstance(value, dict) else value.extend)(members)


def greatest(x: Tensor) -> float:
    """Max |x|."""
    return float(x.abs().max()) if x.numel() else 0.0


def apart(a: Tensor, b: Tensor) -> bool:
    """Whether tensors differ by more than rounding."""
    return greatest(a - b) > RTOL * greatest(b)


def set_values(network: nn.Module, params: Params) -> None:
    """Copy values into a network's parameters."""
    own = dict(network.named_parameters())
    with torch.no_grad():
        for name, value in params.items():
            own[name].copy_(value)


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
            if any(tensor.grad_fn is not None for tensor in tensors_in(value, set())):
                vars(module)[name] = tree_map(detached, value)
