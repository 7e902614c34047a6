"""What decides how a network runs for several tasks, found by running it once."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules import module as global_hooks
from torch.overrides import TorchFunctionMode

from meta_lightning.checks import InputError
from meta_lightning.inner.exact import EXACT
from meta_lightning.inner.params import Params, tree_leaves, tree_map
from meta_lightning.networks.copies import copied, with_parameters
from meta_lightning.random_states import random_states, set_random_states

MISSING = object()
# replaced by functional_call, or looked at one by one
OF_TORCH = {"_buffers", "_parameters", "_modules", "_flat_weights", "_flat_weight_refs"}


class Calls(TorchFunctionMode):
    """Notes the functions of torch that are called from Python."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the call."""
        self.seen.add(func)
        return func(*args, **(kwargs or {}))


class Traits(NamedTuple):
    """What decides how a network runs for several tasks."""

    aliases: dict[str, str]  # further names of tied parameters
    recurrent: bool
    alone: str = ""  # why vmap would be wrong; empty if it is right
    in_turn: str = ""  # why a task must take all its steps before the next one starts
    left: tuple[tuple[str, str], ...] = ()  # modules and attributes: activations that a forward leaves there
    recomputes: bool = False  # backward runs parts of the forward again
    replaced: bool = False  # forward calls functions that EXACT replaces

    @classmethod
    def of(cls, network: nn.Module, loss: Any, x: Tensor, y: Tensor | None) -> "Traits":
        """Those of a network and, if targets are given, a loss, on the samples of one task.  # S ..., S ...

        Raises:
            InputError: If the network does not take the samples, or does not compute with its own parameters.
        """
        recurrent = any(isinstance(module, nn.RNNBase) for module in network.modules())
        hooks = has_backward_hooks(network.modules())
        alone = "the network has backward hooks, which vmap does not call" if hooks else ""
        traits = cls(other_names(network), recurrent, alone)
        states = random_states(x.device)

        def run(function: Callable[[], Any]) -> Any:
            set_random_states(states, x.device)
            return function()

        try:
            with torch.inference_mode(False), torch.enable_grad():
                x, y = x.detach().clone(), None if y is None else y.detach().clone()
                return traits.probed(network, loss, x, y, run)
        finally:
            set_random_states(states, x.device)

    def probed(self, network: nn.Module, loss: Any, x: Tensor, y: Tensor | None, run: Callable[..., Any]) -> "Traits":
        """Complete them by running copies of the network and of the loss."""
        one, other = copied(network), copied(network)
        moved = {name: 1.1 * p.detach() for name, p in network.named_parameters() if p.requires_grad}
        before = contents(one)
        try:
            with Calls() as calls:
                first = run(lambda: self.forward(one, moved, x))
        except (RuntimeError, TypeError, ValueError) as error:
            if isinstance(x, Tensor) and not x.is_floating_point():
                expected = "x must be floating-point unless the network embeds it"
                raise InputError(f"{expected}, got {x.dtype}, of which it says: {error}") from None
            return self  # an error of the network itself, which training shows as well
        after = contents(one)
        changed = {place for place in before.keys() | after.keys() if differ(before.get(place), after.get(place))}
        traits = self._replace(replaced=bool(calls.seen & EXACT.keys()))
        if changed:
            activations = all(is_replaced_activation(one, before.get(place), *place) for place in changed)
            again = run(lambda: self.forward(one, moved, x))
            if activations and torch.allclose(first, again, rtol=1e-5, equal_nan=True):
                traits = traits._replace(left=tuple((module, name) for _, module, name in sorted(changed)))
            else:
                names = sorted(".".join(filter(None, place)) for _, *place in changed)
                traits = traits._replace(in_turn=f"the network's forward changes {', '.join(names)}")
        if y is not None and isinstance(loss, nn.Module) and not traits.in_turn and first.ndim:
            loss = copied(loss)
            before = contents(loss)
            run(lambda: loss(first, y))
            if changed := {place for place, value in contents(loss).items() if differ(before.get(place), value)}:
                names = sorted(".".join(filter(None, place)) for _, *place in changed)
                traits = traits._replace(in_turn=f"the loss changes {', '.join(names)}")
        return traits.compared(network, other, moved, x, run)

    def compared(
        self, network: nn.Module, other: nn.Module, moved: Params, x: Tensor, run: Callable[..., Any]
    ) -> "Traits":
        """Compare gradients with those of a copy that holds the parameters, which backward must see too."""
        with torch.no_grad():
            for name, p in other.named_parameters():
                p.copy_(moved.get(name, p))
        value = run(lambda: other(x)).abs().square().sum()
        if not value.requires_grad:
            return self
        again: list[nn.Module] = []
        for module in other.modules():
            module.register_forward_pre_hook(lambda module, args: again.append(module))
        value.backward()
        grads = {name: p.grad for name, p in other.named_parameters()}
        expected = {name: torch.zeros_like(p) if (g := grads[name]) is None else g for name, p in moved.items()}
        wrong: list[str] = []
        recomputing = self._replace(recomputes=True, alone=self.alone or "its backward runs parts of its forward again")
        for traits in [recomputing] if again else [self, recomputing]:
            leaves = {name: p.detach().requires_grad_() for name, p in moved.items()}
            value = run(partial(traits.forward, copied(network), leaves, x)).abs().square().sum()
            by_name = torch.autograd.grad(value, [*leaves.values()], materialize_grads=True)
            pairs = {
                n: (g.to_dense(), expected[n].to_dense()) for n, g in zip(leaves, by_name, strict=True) if g.numel()
            }
            scale = max(float(e.abs().max()) for _, e in pairs.values())  # of all: some are nothing but rounding
            wrong = [name for name, (g, e) in pairs.items() if float((g - e).abs().max()) > 1e-3 * scale]
            if not wrong:
                return traits
        raise InputError(
            f"network must compute with its own parameters, by torch.autograd.grad too, got other gradients of "
            f"{', '.join(wrong)}: activation checkpointing must have use_reentrant=False, and functions must refer "
            "to the network's own modules"
        )

    def forward(self, network: nn.Module, params: Params, x: Tensor) -> Tensor:
        """Predictions of a network with given parameters.  # S ... -> S ..."""
        weights = self.named(params)
        with self.kernels(), self.without_leaving(network) if self.left else nullcontext():
            if self.recomputes:
                predictions: Tensor = with_parameters(network, weights)(x)
            else:
                # torch's own tying restores parameters of a module with two names in the wrong order
                predictions = functional_call(network, weights, (x,), tie_weights=False)
        return predictions

    def kernels(self) -> Any:
        """Disable kernels that have not all derivatives: cuDNN's of recurrent layers, also the first in evaluation."""
        return torch.backends.cudnn.flags(enabled=False) if self.recurrent else nullcontext()

    def named(self, params: Params) -> Params:
        """Parameters, those with several names under each of them."""
        return params | {alias: params[name] for alias, name in self.aliases.items() if name in params}

    @contextmanager
    def without_leaving(self, network: nn.Module) -> Iterator[None]:
        """Remove what a forward leaves on the network's modules."""
        places = [(vars(network.get_submodule(module)), name) for module, name in self.left]
        before = [attributes.get(name, MISSING) for attributes, name in places]
        try:
            yield
        finally:
            for (attributes, name), value in zip(places, before, strict=True):
                if value is MISSING:
                    attributes.pop(name, None)
                else:
                    attributes[name] = value


def other_names(network: nn.Module) -> dict[str, str]:
    """Map further names of tied parameters, those in other modules, to the first name."""
    first: dict[int, str] = {}
    places: set[tuple[int, str]] = set()
    others = {}
    for name, p in network.named_parameters(remove_duplicate=False):
        owner, _, attribute = name.rpartition(".")
        place = (id(network.get_submodule(owner)), attribute)
        if id(p) in first and place not in places:
            others[name] = first[id(p)]
        first.setdefault(id(p), name)
        places.add(place)
    return others


def has_backward_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether one of the modules has hooks that backward calls, or all modules have."""
    everywhere = global_hooks._global_backward_hooks or global_hooks._global_backward_pre_hooks
    return bool(everywhere) or any(module._backward_hooks or module._backward_pre_hooks for module in modules)


def setting(network: nn.Module, loss: Any) -> list[Any]:
    """What the traits depend on besides the samples."""
    modules = [*network.modules()]
    return [has_backward_hooks(modules), id(loss), *map(id, modules), *[module.training for module in modules]]


def release(network: nn.Module) -> None:
    """Detach activations that forwards left on a network from their graphs."""

    def detached(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) and value.grad_fn is not None else value

    for module in network.modules():
        for name, value in vars(module).items():
            if any(detached(leaf) is not leaf for leaf in tree_leaves(value)):
                vars(module)[name] = tree_map(detached, value)


def contents(network: nn.Module) -> dict[tuple[str, ...], Any]:
    """What a forward may change, by kind, module and name: attributes, and copies of the tensors among them."""
    found: dict[tuple[str, ...], Any] = {}
    for path, module in network.named_modules():
        buffers = dict(module.named_buffers(recurse=False))
        attributes = {name: value for name, value in vars(module).items() if name not in OF_TORCH}
        for kind, values in (("attribute", attributes), ("buffer", buffers)):
            for name, value in values.items():
                found[kind, path, name] = identity(value), value.clone() if isinstance(value, Tensor) else None
    return found


def differ(before: Any, after: Any) -> bool:
    """Whether an attribute has another value than before; None where it was or is missing."""
    if before is None or after is None or before[0] != after[0]:
        return True
    return before[1] is not None and not torch.equal(before[1], after[1])


def identity(value: Any) -> Any:
    """A value for comparisons that changes whenever an attribute, its memory or the members of a container do."""
    if isinstance(value, int | float | str):
        return value
    if isinstance(value, Tensor):
        return id(value), value.data_ptr()  # a parameter that was moved is the same object
    if isinstance(value, dict):
        return id(value), *map(identity, value.values())
    return (id(value), *map(id, value)) if isinstance(value, list | tuple | set | deque) else id(value)


def is_replaced_activation(network: nn.Module, before: Any, kind: str, module: str, name: str) -> bool:
    """Whether an attribute, other than before, is another tensor or a new container of tensors."""
    value = vars(network.get_submodule(module)).get(name) if kind == "attribute" else None
    leaves = tree_leaves(value)
    new = before is None or not isinstance(before[0], tuple) or before[0][0] != id(value)
    return new and bool(leaves) and all(isinstance(leaf, Tensor) for leaf in leaves)
