"""Parameters as dicts of tensors with a leading task dimension, and gradients with respect to them."""

import torch
from torch import Tensor

# torch has no public module for nested containers; the package imports these names from here
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_unflatten as tree_unflatten

Params = dict[str, Tensor]
# prefixes in θ of the parameters of inner rule and head start: no name of a network starts with a dot
RULE, HEAD = ".rule.", ".head."


def stack(params: Params, tasks: int) -> Params:
    """Expand θ to every task without copying.  # ... -> T ..."""
    return {name: p.expand(tasks, *p.shape) for name, p in params.items()}


def unstack(stacked: Params, task: int) -> Params:
    """Select one task of task-stacked parameters.  # T ... -> ..."""
    return {name: p[task] for name, p in stacked.items()}


def leaves(params: Params) -> Params:
    """Detached views, as leaves of a new graph."""
    return {name: p.detach().requires_grad_() for name, p in params.items()}


def of_network(params: Params) -> Params:
    """The network's parameters in θ."""
    return {name: p for name, p in params.items() if not name.startswith(".")}


def without_prefix(params: Params, part: str) -> Params:
    """The parameters of a part, such as ``RULE`` or ``HEAD`` in θ, under the part's names."""
    return {name.removeprefix(part): p for name, p in params.items() if name.startswith(part)}


def with_prefix(own: Params, part: str) -> Params:
    """The inverse of ``without_prefix``."""
    return {part + name: p for name, p in own.items()}


def mean_over_tasks(params: Params) -> Params:
    """mean_i of task-stacked tensors.  # T ... -> ..."""
    return {name: p.mean(0) if len(p) > 1 else p[0] for name, p in params.items()}


def gradient(value: Tensor, params: Params, create_graph: bool = False) -> Params:
    """Gradient of a scalar with respect to ``params``; zeros where it does not depend on them."""
    grads = torch.autograd.grad(value, list(params.values()), create_graph=create_graph, materialize_grads=True)
    return dict(zip(params, grads, strict=True))
