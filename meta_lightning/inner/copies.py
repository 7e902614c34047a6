"""Copies of networks that share nothing with the original but what they are told to."""

import copy
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def copied(network: nn.Module, shared: Iterable[Tensor] = ()) -> nn.Module:
    """Deep copy of a network but for ``shared`` tensors.

    Unlike ``copy.deepcopy``, it copies a network whose forward or hooks left activations on it (pruning and
    ``torch.nn.utils.weight_norm`` do), and functions among its attributes and hooks refer to the copy.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    for module in network.modules():
        for value in tensors_in(vars(module), set()):
            if value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    known = dict(memo)
    try:
        new: nn.Module = copy.deepcopy(network, memo)
    except (RuntimeError, TypeError):  # hooks of a profiler hold what cannot be copied, and are shared
        hooks = [hook for m in network.modules() for kind in HOOKS for hook in vars(m)[kind].values()]
        memo = known | {id(hook): hook for hook in hooks}
        new = copy.deepcopy(network, memo)
    made = {*map(id, memo.values())}  # a copy may have the id of a temporary that deepcopy left in its memo
    of_originals = {key: value for key, value in memo.items() if key not in made}
    for module in new.modules():
        rebind(module, of_originals)
    return new


def tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Tensors in nested containers, which may hold themselves."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple) and id(value) not in seen:
        seen.add(id(value))
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part, seen)


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


def rebind(module: nn.Module, memo: dict[int, Any]) -> None:
    """Let functions among a module's attributes and hooks refer to copies."""
    for name, value in vars(module).items():
        if name not in ("_parameters", "_buffers", "_modules"):
            vars(module)[name] = rebound(value, memo)


def rebound(value: Any, memo: dict[int, Any], seen: frozenset[int] = frozenset()) -> Any:
    """A value whose functions refer to copies, ``memo`` maps ids to them; the value itself if there are none."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, FunctionType):
        return of_copies(value, memo) if refers(value, memo, seen) else value
    if isinstance(value, MethodType):
        owner = memo.get(id(value.__self__))
        return value if owner is None else MethodType(value.__func__, owner)
    if type(value) is partial:
        function, arguments, options = (rebound(part, memo, seen) for part in (value.func, value.args, value.keywords))
        return partial(function, *arguments, **options)
    if isinstance(value, dict | list | tuple | set | frozenset) and id(value) not in seen:
        seen = seen | {id(value)}
        parts = [*(value.values() if isinstance(value, dict) else value)]
        new = [rebound(part, memo, seen) for part in parts]
        if any(a is not b for a, b in zip(new, parts, strict=True)):
            if isinstance(value, dict):
                return type(value)(zip(value, new, strict=True))
            return value._make(new) if hasattr(value, "_make") else type(value)(new)
    return value


def refers(function: FunctionType, memo: dict[int, Any], seen: frozenset[int]) -> bool:
    """Whether a function's closure or defaults hold objects that have copies."""
    if id(function) in seen:
        return False
    seen = seen | {id(function)}
    held = [*closure_of(function), *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return any(rebound(part, memo, seen) is not part for part in held)


def of_copies(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """The same function of the copies."""
    cells = [CellType() for _ in function.__closure__ or ()]
    result = FunctionType(function.__code__, function.__globals__, function.__name__, None, tuple(cells) or None)
    memo = memo | {id(function): result}  # a function may refer to itself
    result.__defaults__ = rebound(function.__defaults__, memo)
    result.__kwdefaults__ = rebound(function.__kwdefaults__, memo)
    result.__dict__.update(vars(function))
    for new, old in zip(cells, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # an empty cell
            new.cell_contents = rebound(old.cell_contents, memo)
    return result


def closure_of(function: FunctionType) -> list[Any]:
    """The values that a function's closure holds."""
    values = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # an empty cell
            values.append(cell.cell_contents)
    return values


def with_parameters(network: nn.Module, params: dict[str, Tensor]) -> nn.Module:
    """A copy that holds other tensors in place of its parameters and shares everything else, also in a later backward.

    A function that backward calls again, as activation checkpointing does, then finds them; with ``functional_call``
    it would find the network's own parameters.
    """
    copies: dict[int, Any] = {}

    def copy_of(module: nn.Module, prefix: str) -> Any:
        if id(module) not in copies:
            new = copies[id(module)] = module.__new__(type(module))
            new.__dict__ = dict(vars(module))
            parameters, children = vars(module)["_parameters"], vars(module)["_modules"]
            new.__dict__ |= {
                "_parameters": {name: params.get(prefix + name, p) for name, p in parameters.items()},
                "_modules": {name: child and copy_of(child, f"{prefix}{name}.") for name, child in children.items()},
            }
        return copies[id(module)]

    new: nn.Module = copy_of(network, "")
    for shell in [*copies.values()]:
        rebind(shell, copies)
    return new
