"""The states of the random number generators."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from meta_lightning.checks import plain


def random_states(device: torch.device) -> dict[str, Any]:
    """States of the random generators of python, numpy and torch, in types that ``weights_only`` loads."""
    numpy = plain(np.random.get_state(legacy=False))  # noqa: NPY002  # a custom network may draw from it
    states = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def drew_from(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """The generators whose states differ between two results of ``random_states``."""

    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)

    return {kind for kind, state in before.items() if not same(state, after[kind])}


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Restore the result of ``random_states``."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


@contextmanager
def kept_random_states(device: torch.device) -> Iterator[dict[str, Any]]:
    """Restore the states at the end; they are the value."""
    states = random_states(device)
    try:
        yield states
    finally:
        set_random_states(states, device)
