"""Adapt a network and its initialisation to the support set of one task."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
from meta_lightning.inner.params import Params, tree_leaves, tree_map
from meta_lightning.inner.samples import Output, Samples, call, length, shapes_of, structure_of
from meta_lightning.networks.batch_statistics import freeze_statistics, frozen_state


def adapt_to(
    network: nn.Module,
    inner_loop: Callable[[Samples, Samples], Params],
    x: Samples | Array,
    y: Samples | Array | Sequence[str],
    class_names: Sequence[str] | None,
    any_ways: bool,
    form: SampleForm,
    form_for: Callable[[Samples], SampleForm],
    inputs_of: Callable[[Samples], Samples],
    output: Output | None,
    description: dict[str, Any] | None,
) -> Predictor:
    """Implement ``MetaLearner.adapt``, with its ``x``, ``y``, ``class_names`` and errors.

    ``form_for`` completes the form by how the network takes samples, and ``inputs_of`` gives the part that it takes.
    """
    x, (names, targets) = form.check(samples(x, "x")), numbered(y, class_names)
    if unlike := form.unlike(x):
        rank_zero_warn(f"The images of x do not look like those of training: {unlike}. Expect a lower accuracy")
    lengths = {len(tensor) for tensor in tree_leaves((x, targets))}
    came = " and ".join(map(str, (length(x), length(targets)) if len(lengths) == 2 else sorted(lengths)))
    require(len(lengths) == 1, f"x and y must have the same length, got {came}")

    def forward(network: nn.Module, inputs: Samples) -> Samples:
        return call(network, inputs_of(inputs), bool(form.keywords), output)

    base: set[str] = set()

    def adapted(inputs: Samples, targets: Samples) -> nn.Module:
        params, copy = inner_loop(inputs, targets), copied(network)
        base.update(frozen_state(network, map(network.get_parameter, params)))
        set_parameters(copy, params)
        freeze_statistics(copy, lambda copy: forward(copy, inputs))
        return copy

    with torch.inference_mode(False), torch.enable_grad():
        p = next(network.parameters())
        # autograd rejects tensors made in inference mode, but not their clones
        moved, targets = tree_map(lambda t: t.to(p.device).clone(), (x, targets))
        form = form_for(form.network_input(moved, p.dtype))
        inputs, example = form.network_input(moved, p.dtype), tree_map(lambda t: t[:1], inputs_of(x))
        outputs = 0
        if names is not None and not any_ways:
            outputs = outputs_of(lambda: forward(network, inputs), inputs, len(names))
        if names is None or any_ways or len(names) <= outputs:
            return Predictor(adapted(inputs, targets), names, example, form, description, output, base)
        groups = partitions(len(names), outputs)
        came = f"the network has {outputs} outputs for {len(names)} classes"
        hint = "a learner that was trained with head_start Prototypes takes any number"
        rank_zero_warn(f"{len(groups)} adaptations to groups of the classes are combined, since {came}; {hint}")
        own = [samples_of(group, targets) for group in groups]
        parts = [(tree_map(lambda t, rows=rows: t[rows], inputs), numbers) for rows, numbers in own]
        networks = [adapted(*part) for part in parts]
        combination = Combined(networks, shares(groups, len(names)).to(p), bool(form.keywords), output)
    # its networks take care of keywords and output
    of_groups = {f"networks.{group}.{name}" for group in range(len(groups)) for name in base}
    return Predictor(combination, names, example, replace(form, keywords=False), description, base=of_groups)


def numbered(y: Samples | Array | Sequence[str], class_names: Sequence[str] | None) -> tuple[list[str] | None, Samples]:
    """Class names and numbers in the sorted order of y's values; for regression no names, and the targets."""
    if isinstance(y, Mapping) or (isinstance(y, tuple) and y and isinstance(y[0], Tensor | np.ndarray)):
        require(class_names is None, "class_names must be omitted for targets in a nest, which mean no classes")
        return None, samples(y, "y")
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


def outputs_of(forward: Callable[[], Samples], inputs: Samples, classes: int) -> int:
    """Number of outputs of a classifier."""
    try:
        with torch.no_grad():
            made = forward()
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise InputError(f"x must hold samples that fit the network, got {shapes_of(inputs)}: {error}") from None
    came = f"got {structure_of(made)}"
    require(
        isinstance(made, Tensor), f"output must make one tensor of class scores of what the network returns, {came}"
    )
    shape = made.shape
    expected = f"y must be floating-point regression targets, since the network's outputs have shape {list(shape)}"
    require(len(shape) == 2 and shape[1] >= 2, f"{expected}; got {classes} classes")
    return int(shape[1])
