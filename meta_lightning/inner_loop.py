"""The mathematics of the inner loop: pure functions on parameters whose tensors carry a leading task dimension.

The tasks of a meta-batch go forward together, one ``vmap`` over the stacked parameters, and are differentiated outside
it: ``vmap`` over *gradients* is silently wrong at second order for normalisation layers whose scale and shift are
adapted, because torch's batching rule for their backward takes the saved statistics as constants.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

Params = dict[str, Tensor]
State = TypeVar("State")


def stack(params: Params, tasks: int) -> Params:
    """θ once for every task, without a copy: each tensor gets a leading dimension of ``tasks``."""
    return {name: p.expand(tasks, *p.shape) for name, p in params.items()}


def unstack(stacked: Params | Tensor, task: int) -> Any:
    """What one task has of task-stacked parameters or samples, without the task dimension."""
    return stacked[task] if isinstance(stacked, Tensor) else {name: p[task] for name, p in stacked.items()}


def leaves(params: Params) -> Params:
    """The same values as leaves of a new graph, ready to be differentiated by."""
    return {name: p.detach().requires_grad_() for name, p in params.items()}


def mean_over_tasks(params: Params) -> Params:
    """mean_i of task-stacked tensors."""
    return {name: p.mean(0) for name, p in params.items()}


def gradient(value: Tensor, params: Params, create_graph: bool = False) -> Params:
    """∇_params of a scalar; zeros for parameters that it does not depend on."""
    grads = torch.autograd.grad(value, list(params.values()), create_graph=create_graph, materialize_grads=True)
    return dict(zip(params, grads, strict=True))


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Attention by kernels that have a second derivative, in evaluation too, where torch would take its fast path."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def wrong_under_vmap(network: nn.Module) -> bool:
    """Whether vmap would run this network and yet be wrong: its rule for an embedding forgets ``padding_idx``.

    Of sparse embeddings it refuses the backward only, too late to loop instead.
    """
    embeddings = [module for module in network.modules() if isinstance(module, nn.Embedding)]
    return any(module.padding_idx is not None or module.sparse for module in embeddings)


def together(function: Callable[..., Tensor], *stacked: Params | Tensor) -> Tensor:
    """A function of one task on all tasks at once.

    Args:
        function: Takes what one task has of each argument, and returns a tensor.
        stacked: Task-stacked parameters or samples.

    Returns:
        The tasks' results, stacked.  # T ...

    Raises:
        RuntimeError: If the function does what vmap refuses: in-place writes into fresh tensors, control flow that
            depends on data, recurrent layers. ``one_by_one`` takes those.
    """
    with differentiable_attention():
        result: Tensor = vmap(function, randomness="different")(*stacked)
    return result


def one_by_one(function: Callable[..., Tensor], *stacked: Params | Tensor) -> Tensor:
    """What ``together`` computes, one task after another."""
    first = stacked[0] if isinstance(stacked[0], Tensor) else next(iter(stacked[0].values()))
    with differentiable_attention():
        return torch.stack([function(*(unstack(part, task) for part in stacked)) for task in range(len(first))])


class InnerOptimizer(Protocol[State]):
    """One step of the inner loop: gradients and its own state to the parameters' change and the next state."""

    def update(self, grads: Params, state: State) -> tuple[Params, State]:
        """The change of the parameters, and the state after it."""
        ...


class SGD(NamedTuple):
    """``θ' ← θ' − α g``; it has no state."""

    lr: float

    def update(self, grads: Params, state: None) -> tuple[Params, None]:
        """The change of the parameters, −α g."""
        return {name: -self.lr * g for name, g in grads.items()}, None


class AdamState(NamedTuple):
    """Adam's moments and the number of steps behind them."""

    step: Tensor
    first: Params
    second: Params


class Adam(NamedTuple):
    """Adam (Kingma and Ba, 2015) as Reptile uses it inside: β1 = 0 unless said otherwise."""

    lr: float
    beta1: float = 0.0
    beta2: float = 0.999
    eps: float = 1e-8

    def update(self, grads: Params, state: AdamState) -> tuple[Params, AdamState]:
        """The change of the parameters, −α m̂ / (√v̂ + ε), and the moments after it."""
        step = state.step + 1
        first = {n: self.beta1 * state.first[n] + (1 - self.beta1) * g for n, g in grads.items()}
        second = {n: self.beta2 * state.second[n] + (1 - self.beta2) * g.square() for n, g in grads.items()}
        scale1, scale2 = one_minus_power(self.beta1, step), one_minus_power(self.beta2, step)
        change = {n: -self.lr * (first[n] / scale1) / ((second[n] / scale2).sqrt() + self.eps) for n in grads}
        return change, AdamState(step, first, second)


def one_minus_power(beta: float, step: Tensor) -> Tensor:
    """1 − β^step, without the rounding of β^step near 1."""
    return -torch.expm1(step * (math.log(beta) if beta else -math.inf))


class Adapted(NamedTuple):
    """What the inner loop leaves behind."""

    params: Params  # θ'_K
    losses: Tensor  # K T: the support loss at θ'_0 … θ'_{K-1}
    state: Any  # the inner optimizer's, its tensors task-stacked


def adapt(
    support_losses: Callable[[Params, int], Tensor],
    params: Params,
    steps: int,
    optimizer: InnerOptimizer[State],
    state: State,
    create_graph: bool = False,
) -> Adapted:
    """K steps of gradient descent on every task's support loss (MAML, algorithm 1, lines 5 to 7).

    Args:
        support_losses: Parameters and the step's number to every task's loss.  # T
        params: Task-stacked parameters to start from.
        steps: Number of steps (K).
        optimizer: The inner optimizer.
        state: The inner optimizer's state.
        create_graph: Keep the graph of the gradients, so that one can differentiate through the steps. Without it
            ``∂θ'/∂θ`` is the identity: the first-order approximation.
    """
    trace = []
    for step in range(steps):
        losses = support_losses(params, step)
        grads = gradient(losses.sum(), params, create_graph)
        change, state = optimizer.update(grads, state)
        params = {name: p + change[name] for name, p in params.items()}
        trace.append(losses.detach())
    return Adapted(params, torch.stack(trace), state)
