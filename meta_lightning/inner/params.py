"""Parameters as dicts of tensors with a leading task dimension, and derivatives by them."""

from typing import Any

import torch
from torch import Tensor

Params = dict[str, Tensor]
RULE = "."  # before the names of an inner rule's own parameters among θ: no name in a network begins with a dot


def stack(params: Params, tasks: int) -> Params:
    """θ once per task, without a copy.  # ... -> T ..."""
    return {name: p.expand(tasks, *p.shape) for name, p in params.items()}


def unstack(stacked: Params | Tensor, task: int) -> Any:
    """One task's part of task-stacked parameters or samples.  # T ... -> ..."""
    return stacked[task] if isinstance(stacked, Tensor) else {name: p[task] for name, p in stacked.items()}


def leaves(params: Params) -> Params:
    """The same values as leaves of a new graph."""
    return {name: p.detach().requires_grad_() for name, p in params.items()}


def of_network(params: Params) -> Params:
    """The network's part of θ."""
    return {name: p for name, p in params.items() if not name.startswith(RULE)}


def of_rule(params: Params) -> Params:
    """The inner rule's part of θ, by the rule's own names."""
    return {name.removeprefix(RULE): p for name, p in params.items() if name.startswith(RULE)}


def for_rule(own: Params) -> Params:
    """The inverse of ``of_rule``."""
    return {RULE + name: p for name, p in own.items()}


def mean_over_tasks(params: Params) -> Params:
    """mean_i of task-stacked tensors.  # T ... -> ..."""
    return {name: p.mean(0) for name, p in params.items()}


def gradient(value: Tensor, params: Params, create_graph: bool = False) -> Params:
    """∇_params of a scalar; zeros for parameters that it does not depend on."""
    grads = torch.autograd.grad(value, list(params.values()), create_graph=create_graph, materialize_grads=True)
    return dict(zip(params, grads, strict=True))
