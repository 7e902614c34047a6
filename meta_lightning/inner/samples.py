"""Samples and targets: a tensor, or a nest of dicts and tuples of tensors, each with the samples in front."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from meta_lightning.checks import require
from meta_lightning.inner.exact import without_fast_path
from meta_lightning.inner.params import tree_leaves, tree_map

Samples = Any  # Tensor, or dicts and tuples of Samples
Output = Callable[[Any], Samples]  # from what a network returns to predictions


class Padded(NamedTuple):
    """Samples or targets of tasks of unequal size: values that are padded, and which of them are not padding.

    ``pad_tasks`` makes them. Losses and scores leave the padding out.
    """

    values: Samples  # T S ...
    mask: Tensor  # T S, bool: False for padding


class FrozenFeatures(NamedTuple):
    """Features that the frozen modules that run first make of samples, in place of these."""

    values: Tensor  # T S ...


def bare(samples: Samples) -> Samples:
    """The samples or, in their place, features as tensors."""
    if isinstance(samples, Padded):
        return samples._replace(values=bare(samples.values))
    return samples.values if isinstance(samples, FrozenFeatures) else samples


def length(samples: Samples, dim: int = 0) -> int:
    """The size of a dimension that all tensors of a nest share."""
    return int(tree_leaves(samples)[0].shape[dim])


def first_task(samples: Samples) -> Samples:
    """The first task.  # T S ... -> S ..."""
    return tree_map(lambda t: t[0], samples)


def one_task(samples: Samples) -> Samples:
    """A task as a batch of one.  # S ... -> 1 S ..."""
    return tree_map(lambda t: t[None], samples)


def valid(samples: Samples) -> Samples:
    """The samples of one task without padding.  # S ... -> s ..."""
    if not isinstance(samples, Padded):
        return samples
    return tree_map(lambda t: t[samples.mask], samples.values)


def padded_with(predictions: Samples, y: Samples) -> Samples:
    """Predictions with the padding of their targets, if that has any."""
    return Padded(predictions, y.mask) if isinstance(y, Padded) else predictions


def values_of(samples: Samples) -> Samples:
    """The samples with their padding, if they have any."""
    return samples.values if isinstance(samples, Padded) else samples


def padded_like(predictions: Samples, mask: Tensor) -> Samples:
    """Predictions of the valid samples of one task, put back in their places.  # s ..., S -> S ..."""
    places = (mask.cumsum(0) - 1).clamp(min=0)
    return tree_map(lambda t: t[places], predictions)


def class_numbers(y: Samples, ignored: int) -> Samples:
    """Targets in which padding has the class number that losses leave out."""
    if not isinstance(y, Padded):
        return y
    return torch.where(y.mask, y.values, ignored) if isinstance(y.values, Tensor) and y.values.ndim == 2 else y.values


def is_real(y: Samples) -> bool:
    """Whether targets are anything but class numbers."""
    y = values_of(y)
    return not isinstance(y, Tensor) or y.is_floating_point()


def as_floats(x: Samples) -> Samples:
    """Integers as features, in torch's default dtype."""
    return tree_map(lambda t: t if t.is_floating_point() else t.to(torch.get_default_dtype()), x)


def by_keywords(network: nn.Module, x: Samples) -> bool:
    """Whether the network's forward takes every key of these samples as a keyword."""
    if not isinstance(x, Mapping):
        return False
    try:
        inspect.signature(network.forward).bind(**x)
    except TypeError:
        return False
    return True


def prediction_of(returned: Any, output: Output | None) -> Samples:
    """Predictions from what a network returned: those of ``output``, the ``logits`` of a model output, or itself."""
    made = returned if output is None else output(returned)
    if output is None and isinstance(getattr(made, "logits", None), Tensor):
        made = made.logits
    tensors = all(isinstance(leaf, Tensor) for leaf in tree_leaves(made))
    who = "network must return tensors, or something with logits; else output must make" if output is None else "output"
    require(tensors, f"{who} tensors of it, got {type(made).__name__}")
    return made


def call(
    network: Callable[..., Any], x: Samples, keywords: bool, output: Output | None, functional: bool = False
) -> Samples:
    """Predictions of a network, or of a ``functional_call`` of one.  # S ... -> S ..."""
    args, kwargs = ((), x) if keywords else ((x,), {})
    # an export, which cannot record a global setting, stands in this context itself
    with nullcontext() if torch.compiler.is_compiling() else without_fast_path():
        returned = network(args, kwargs) if functional else network(*args, **kwargs)
    return prediction_of(returned, output)


def collated(tasks: Sequence[Samples]) -> Samples:
    """Tasks of equal size, stacked.  # T of S ... -> T S ..."""
    return tree_map(lambda *parts: torch.stack(parts), *tasks)


def structure_of(samples: Samples, leaf: Callable[[Tensor], str] = lambda _: "*") -> str:
    """The structure of a nest, for messages; ``leaf`` describes a tensor."""
    if isinstance(samples, dict):
        return "{" + ", ".join(f"{name}: {structure_of(part, leaf)}" for name, part in sorted(samples.items())) + "}"
    if isinstance(samples, tuple):
        return f"({', '.join(structure_of(part, leaf) for part in samples)})"
    return leaf(samples)


def form_of_sample(tensor: Tensor) -> str:
    """Shape of one sample and dtype, for messages and comparisons.  # S ..."""
    return f"{list(tensor.shape[1:])}, {tensor.dtype}"


def shapes_of(samples: Samples) -> str:
    """The shapes in a nest, for messages."""
    return structure_of(samples, lambda tensor: str(list(tensor.shape)))
