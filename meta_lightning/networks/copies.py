"""Copies of networks that share nothing with the original but what they are told to."""

import copy
import weakref
from collections.abc import Iterable, MutableMapping, MutableSequence
from types import CellType, FunctionType
from typing import Any

from torch import Tensor, nn

from meta_lightning.inner.params import tree_leaves


def copied(network: nn.Module, shared: Iterable[Tensor] = ()) -> nn.Module:
    """Deep copy of a network but for ``shared`` tensors.

    Other than ``copy.deepcopy``, it copies a network whose forward or hooks left activations on it (pruning and
    ``torch.nn.utils.weight_norm`` do), and functions among its attributes and hooks refer to the copy.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    for value in tree_leaves([vars(module) for module in network.modules()]):
        if isinstance(value, Tensor) and value.grad_fn is not None:
            memo[id(value)] = value.detach().clone()
    new: nn.Module = copy.deepcopy(network, memo)
    for module in new.modules():
        rebind(vars(module), memo)
    return new


class Original:
    """A weak reference to the network that a learner was given, which copies and pickles of the learner lack."""

    def __init__(self, network: nn.Module | None = None) -> None:
        self.get = weakref.ref(network) if network is not None else lambda: None

    def __reduce__(self) -> tuple[type["Original"], tuple[()]]:
        """Copy without the network."""
        return Original, ()

    def take_buffers(self, network: nn.Module) -> None:
        """Give the original the values of a copy's buffers."""
        original = self.get()
        if original is None:
            return
        for name, buffer in network.named_buffers():
            path, _, leaf = name.rpartition(".")
            module = original.get_submodule(path)
            old = getattr(module, leaf)
            setattr(module, leaf, buffer.detach().to(buffer.device if old is None else old.device, copy=True))


def rebind(container: Any, memo: dict[int, Any]) -> None:
    """Replace functions in a container that refer to copied objects by functions that refer to the copies."""
    if isinstance(container, MutableMapping | MutableSequence):
        pairs = container.items() if isinstance(container, MutableMapping) else enumerate(container)
        for key, value in [*pairs]:
            if isinstance(value, FunctionType):
                container[key] = rebound(value, memo)
            else:
                rebind(value, memo)


def rebound(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """The function itself, or, if its closure or defaults hold copied objects, the same function of the copies."""

    def new(value: Any) -> Any:
        return rebound(value, memo) if isinstance(value, FunctionType) else memo.get(id(value), value)

    cells = [cell for cell in function.__closure__ or () if cell is not None]
    contents = [new(cell.cell_contents) for cell in cells]
    defaults = tuple(map(new, function.__defaults__ or ()))
    unchanged = all(cell.cell_contents is value for cell, value in zip(cells, contents, strict=True))
    if unchanged and all(a is b for a, b in zip(defaults, function.__defaults__ or (), strict=True)):
        return function
    closure = tuple(map(CellType, contents)) or None
    result = FunctionType(function.__code__, function.__globals__, function.__name__, defaults or None, closure)
    result.__kwdefaults__ = function.__kwdefaults__
    result.__dict__.update(vars(function))
    return result


def with_parameters(network: nn.Module, params: dict[str, Tensor]) -> nn.Module:
    """A copy that holds other tensors in place of its parameters and shares everything else, also in a later backward.

    A function that backward calls again, as activation checkpointing does, then finds them; with ``functional_call``
    it would find the network's own parameters.
    """
    copies: dict[int, nn.Module] = {}

    def copy_of(module: nn.Module, prefix: str) -> nn.Module:
        if id(module) not in copies:
            new = copies[id(module)] = module.__new__(type(module))
            new.__dict__ = dict(vars(module))
            parameters, children = vars(module)["_parameters"], vars(module)["_modules"]
            new.__dict__ |= {
                "_parameters": {name: params.get(prefix + name, p) for name, p in parameters.items()},
                "_modules": {name: child and copy_of(child, f"{prefix}{name}.") for name, child in children.items()},
            }
        return copies[id(module)]

    return copy_of(network, "")
