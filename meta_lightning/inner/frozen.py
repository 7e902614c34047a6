"""Frozen modules that run first: their features of a sample do not depend on θ, and are computed once per sample."""

from collections import OrderedDict
from collections.abc import Collection
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor, nn

from meta_lightning.inner.copies import HOOKS, copied
from meta_lightning.inner.samples import as_floats
from meta_lightning.inner.state import RTOL, changes, contents, greatest, has_backward_hooks, listed
from meta_lightning.random_states import drew_from, kept_random_states, random_states


class Split(NamedTuple):
    """A network in two parts: ``rest(frozen(x)) = network(x)``. Parameters of the rest keep their names."""

    frozen: nn.Module
    rest: nn.Module


def is_chain(network: nn.Module) -> bool:
    """Whether a network does nothing but call its children one after another."""
    hooked = has_backward_hooks([network]) or any(vars(network)[kind] for kind in HOOKS)
    return type(network).forward is nn.Sequential.forward and not hooked


def split(network: nn.Module, trained: Collection[int]) -> Split | None:
    """Split a chain before its first module with a parameter among ``trained``, which are ids.

    The first part ends with a module that has parameters: dropout that follows belongs to the rest. None if there is no
    first part, or no rest.
    """
    if not is_chain(network):
        return None
    children = [*vars(network)["_modules"].items()]  # named_children leaves out the second of two equal ones
    first = [*takewhile(lambda child: not any(id(p) in trained for p in child[1].parameters()), children)]
    rest = children[len(first) :]
    if not rest:
        return None
    name, module = rest[0]
    if inner := split(module, trained):
        first, rest = [*first, (name, inner.frozen)], [(name, inner.rest), *rest[1:]]
    while first and not any(True for _ in first[-1][1].parameters()):
        rest.insert(0, first.pop())
    return Split(*(nn.Sequential(OrderedDict(part)) for part in (first, rest))) if first else None


@torch.no_grad()
def reason_against(frozen: nn.Module, x: Tensor) -> str | None:
    """Why frozen modules cannot run once per sample; empty if they can, None if they raise an error.  # S ..."""
    one = copied(frozen)
    before = contents(one)
    others = torch.cat([x, 0.9 * x]) if x.is_floating_point() else x.clone()
    with kept_random_states(x.device) as states:
        try:
            together, alone = one(others), one(x[:1].clone())  # which may be written into
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
            if x.is_floating_point() or reason_against(frozen, as_floats(x)) is None:
                return None  # an error of the network, which its examination shows
            return "take no integers: samples of floating point let them run once"
        drew = drew_from(states, random_states(x.device))
    if not isinstance(together, Tensor) or len(together) != len(others):
        return None
    if changed := changes(before, contents(one)):
        return f"change {listed(changed)}"
    if drew:
        return "draw random numbers"
    return "mix samples" if greatest(together[:1] - alone) > RTOL * greatest(together) else ""
