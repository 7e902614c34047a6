"""Adapt a network and its initialisation to the support set of one task."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from meta_lightning.adaptation.partitions import Combined, partitions, samples_of, shares
from meta_lightning.adaptation.predictor import Predictor
from meta_lightning.adaptation.surgery import set_parameters
from meta_lightning.checks import InputError, require
from meta_lightning.data.form import SampleForm
from meta_lightning.data.tasks import Array
from meta_lightning.data.tensors import samples
from meta_lightning.inner.copies import copied
from meta_lightning.inner.params import Params
from meta_lightning.networks.batch_statistics import freeze_statistics


def adapt_to(
    network: nn.Module,
    inner_loop: Callable[[Tensor, Tensor], Params],
    x: Tensor | Array,
    y: Tensor | Array | Sequence[str],
    class_names: Sequence[str] | None,
    any_ways: bool,
    form: SampleForm,
    description: dict[str, Any] | None,
) -> Predictor:
    """Implement ``MetaLearner.adapt``, with its ``x``, ``y``, ``class_names`` and errors."""
    x, (names, targets) = form.check(samples(x, "x")), numbered(y, class_names)
    if unlike := form.unlike(x):
        rank_zero_warn(f"The images of x do not look like those of training: {unlike}. Expect a lower accuracy")
    require(len(x) == len(targets), f"x and y must have the same length, got {len(x)} and {len(targets)}")

    def adapted(inputs: Tensor, targets: Tensor) -> nn.Module:
        params, copy = inner_loop(inputs, targets), copied(network)
        set_parameters(copy, params)
        freeze_statistics(copy, inputs)
        return copy

    with torch.inference_mode(False), torch.enable_grad():
        p = next(network.parameters())
        # autograd rejects tensors made in inference mode, but not their clones
        inputs, targets = form.network_input(x.to(p.device).clone(), p.dtype), targets.to(p.device).clone()
        outputs = 0 if names is None or any_ways else outputs_of(network, inputs, len(names))
        if names is None or any_ways or len(names) <= outputs:
            return Predictor(adapted(inputs, targets), names, x.shape[1:], form, description)
        groups = partitions(len(names), outputs)
        came = f"the network has {outputs} outputs for {len(names)} classes"
        hint = "a learner that was trained with head_start Prototypes takes any number"
        rank_zero_warn(f"{len(groups)} adaptations to groups of the classes are combined, since {came}; {hint}")
        parts = [(inputs[rows], numbers) for rows, numbers in (samples_of(group, targets) for group in groups)]
        combination = Combined([adapted(*part) for part in parts], shares(groups, len(names)).to(p))
    return Predictor(combination, names, x.shape[1:], form, description)


def numbered(y: Tensor | Array | Sequence[str], class_names: Sequence[str] | None) -> tuple[list[str] | None, Tensor]:
    """Class names and numbers in the sorted order of y's values; for regression no names, and the targets."""
    values = y.numpy(force=True) if isinstance(y, Tensor) else np.asarray(y)
    if values.dtype.kind == "f":
        require(class_names is None, "class_names must be omitted for floating-point targets, which mean regression")
        targets = samples(values, "y")
        return None, targets.unsqueeze(1) if targets.ndim == 1 else targets
    require(values.ndim == 1, f"y must hold one class per sample, shape [S], got shape {list(values.shape)}")
    distinct, numbers = np.unique(values, return_inverse=True)
    require(len(distinct) >= 2, f"y must hold at least 2 classes, got {distinct.tolist()}")
    names = [str(value) for value in (distinct if class_names is None else class_names)]
    valid = len(names) == len(distinct) == len({*names})
    require(valid, f"class_names must be {len(distinct)} different names, one per class of y, got {names}")
    return names, torch.from_numpy(numbers)


def outputs_of(network: nn.Module, inputs: Tensor, classes: int) -> int:
    """Number of outputs of a classifier."""
    try:
        with torch.no_grad():
            shape = network(inputs).shape
    except (RuntimeError, ValueError) as error:
        raise InputError(f"x must hold samples that fit the network, got {list(inputs.shape)}: {error}") from None
    expected = f"y must be floating-point regression targets, since the network's outputs have shape {list(shape)}"
    require(len(shape) == 2 and shape[1] >= 2, f"{expected}; got {classes} classes")
    return int(shape[1])
