"""From a learner and the support set of one task to a predictor."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from meta_lightning import inner_loop
from meta_lightning.adaptation.predictor import Predictor
from meta_lightning.adaptation.surgery import freeze_statistics, in_evaluation, set_parameters, widened_head
from meta_lightning.checks import InputError, require, require_at_least
from meta_lightning.data.tensors import samples
from meta_lightning.tasks import Array

if TYPE_CHECKING:
    from meta_lightning.algorithms.learner import Learner


def adapt_learner(
    learner: "Learner",
    x: Tensor | Array,
    y: Tensor | Array | Sequence[str],
    steps: int,
    class_names: Sequence[str] | None,
) -> Predictor:
    """``Learner.adapt``, whose arguments these are."""
    require_at_least(1, steps=steps)
    x, (names, targets) = learner.form.check(samples(x, "x")), numbered(y, class_names)
    require(len(x) == len(targets), f"x and y must be of one length, got {len(x)} and {len(targets)}")
    with in_evaluation(learner), torch.inference_mode(False), torch.enable_grad():
        theta = learner.meta_parameters()
        # a tensor made in inference mode cannot be differentiated through, but its clone can
        inputs = learner.form.network_input(x.to(learner.device).clone(), next(iter(theta.values())).dtype)
        if names is not None:
            theta |= head_for(learner, len(names), inputs)
        support = learner.inner_batches(inputs[None], targets.to(learner.device)[None], steps)
        adapted = learner.adapt_tasks(inner_loop.leaves(inner_loop.stack(theta, tasks=1)), support)
        params = inner_loop.unstack(inner_loop.weights(adapted.params), 0)
        if not torch.stack([p.detach().sum() for p in params.values()]).isfinite().all():
            raise FloatingPointError(f"the adaptation diverged: its {steps} steps of {learner.inner_lr} are too large")
        network = copy.deepcopy(learner.network)
        set_parameters(network, params)
        freeze_statistics(network, inputs)
    return Predictor(network, names, x.shape[1:], learner.form, learner.description)


def numbered(y: Tensor | Array | Sequence[str], class_names: Sequence[str] | None) -> tuple[list[str] | None, Tensor]:
    """The names of the classes in y's sorted order, and their numbers; or no names, and a regression's targets.

    Raises:
        InputError: If there are fewer than two classes, or not a name for each.
    """
    values = y.numpy(force=True) if isinstance(y, Tensor) else np.asarray(y)
    if values.dtype.kind == "f":
        require(class_names is None, "class_names must be left out for floating-point targets, those of a regression")
        targets = samples(values, "y")
        return None, targets.unsqueeze(1) if targets.ndim == 1 else targets
    require(values.ndim == 1, f"y must be one class a sample, of shape [S], got shape {list(values.shape)}")
    distinct, numbers = np.unique(values, return_inverse=True)
    require(len(distinct) >= 2, f"y must hold at least 2 classes, got {distinct.tolist()}")
    names = [str(value) for value in (distinct if class_names is None else class_names)]
    require(
        len(names) == len(distinct) == len({*names}),
        f"class_names must be {len(distinct)} different names, one for each class of y, got {names}",
    )
    return names, torch.from_numpy(numbers)


def head_for(learner: "Learner", classes: int, inputs: Tensor) -> inner_loop.Params:
    """θ of the last layer where it has to grow; nothing where the network has outputs enough.

    Raises:
        InputError: If the network does not take the samples, is a regression's, or cannot be given more outputs.
    """
    try:
        with torch.no_grad():
            shape = learner.network(inputs).shape
    except (RuntimeError, ValueError) as error:
        raise InputError(f"x must hold samples that the network takes, got {list(inputs.shape)}: {error}") from None
    require(
        len(shape) == 2 and shape[1] >= 2,
        f"y must be floating-point, targets of a regression, since the network gives outputs of shape {list(shape)}; "
        f"got {classes} classes",
    )
    if classes <= shape[1]:
        return {}
    require(
        learner.inner_optimizer()[1] is None,
        f"y must hold at most {shape[1]} classes, since the inner optimizer's state is that of so many outputs, "
        f"got {classes}",
    )
    theta = learner.meta_parameters()
    adapted = {name: p for name, p in theta.items() if name not in learner.inner_frozen}
    return widened_head(learner.network, adapted, classes, shape[1])
