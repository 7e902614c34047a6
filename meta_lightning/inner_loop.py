"""The mathematics of the inner loop: pure functions on parameters whose tensors carry a leading task dimension.

The tasks of a meta-batch go forward together, one ``vmap`` over the stacked parameters, and are differentiated outside
it: ``vmap`` over *gradients* is silently wrong at second order for normalisation layers whose scale and shift are
adapted, because torch's batching rule for their backward takes the saved statistics as constants.
"""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import get_device_states, set_device_states

from meta_lightning.task_parallel import TasksAsChannels

Params = dict[str, Tensor]
State = TypeVar("State")
RATES = "inner_rates."  # before the names of learnt inner rates, which travel among the parameters


def stack(params: Params, tasks: int) -> Params:
    """θ once for every task, without a copy: each tensor gets a leading dimension of ``tasks``."""
    return {name: p.expand(tasks, *p.shape) for name, p in params.items()}


def unstack(stacked: Params | Tensor, task: int) -> Any:
    """What one task has of task-stacked parameters or samples, without the task dimension."""
    return stacked[task] if isinstance(stacked, Tensor) else {name: p[task] for name, p in stacked.items()}


def leaves(params: Params) -> Params:
    """The same values as leaves of a new graph, ready to be differentiated by."""
    return {name: p.detach().requires_grad_() for name, p in params.items()}


def rate_of(name: str) -> str:
    """The name of a parameter's learnt inner rate; a module's own names cannot hold a dot."""
    return RATES + name.replace(".", "/")


def weights(params: Params) -> Params:
    """The network's part of the parameters, without learnt inner rates."""
    return {name: p for name, p in params.items() if not name.startswith(RATES)}


def mean_over_tasks(params: Params) -> Params:
    """mean_i of task-stacked tensors."""
    return {name: p.mean(0) for name, p in params.items()}


def gradient(value: Tensor, params: Params, create_graph: bool = False) -> Params:
    """∇_params of a scalar; zeros for parameters that it does not depend on."""
    grads = torch.autograd.grad(value, list(params.values()), create_graph=create_graph, materialize_grads=True)
    return dict(zip(params, grads, strict=True))


def vector_jacobian(outputs: Params, inputs: Params, v: Params) -> Params:
    """vᵀ ∂outputs/∂inputs; zeros for inputs that the outputs do not depend on."""
    grads = torch.autograd.grad(
        list(outputs.values()), list(inputs.values()), [v[name] for name in outputs], materialize_grads=True
    )
    return dict(zip(inputs, grads, strict=True))


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
    with differentiable_attention(), TasksAsChannels():
        result: Tensor = vmap(function, randomness="different")(*stacked)
    return result


def one_by_one(function: Callable[..., Tensor], *stacked: Params | Tensor) -> Tensor:
    """What ``together`` computes, one task after another."""
    first = stacked[0] if isinstance(stacked[0], Tensor) else next(iter(stacked[0].values()))
    with differentiable_attention():
        return torch.stack([function(*(unstack(part, task) for part in stacked)) for task in range(len(first))])


class InnerOptimizer(Protocol[State]):
    """One step of the inner loop: gradients and its own state to the parameters' change and the next state."""

    def update(self, grads: Params, state: State, params: Params) -> tuple[Params, State]:
        """The change of the parameters, and the state after it."""
        ...


class SGD(NamedTuple):
    """``θ' ← θ' − α g``; it has no state."""

    lr: float

    def update(self, grads: Params, state: None, params: Params) -> tuple[Params, None]:
        """The change of the parameters, −α g."""
        return {name: -self.lr * g for name, g in grads.items()}, None


class MetaSGD(NamedTuple):
    """``θ' ← θ' − α ⊙ g`` with a rate for every number of θ, itself a parameter that is learnt (Li et al., 2017)."""

    def update(self, grads: Params, state: None, params: Params) -> tuple[Params, None]:
        """The change of the parameters, −α ⊙ g."""
        return {name: -params[rate_of(name)] * g for name, g in grads.items()}, None


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

    def update(self, grads: Params, state: AdamState, params: Params) -> tuple[Params, AdamState]:
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
    adapted: Collection[str],
    create_graph: bool = False,
) -> Adapted:
    """K steps of gradient descent on every task's support loss (MAML, algorithm 1, lines 5 to 7).

    Args:
        support_losses: Parameters and the step's number to every task's loss.  # T
        params: Task-stacked parameters to start from.
        steps: Number of steps (K).
        optimizer: The inner optimizer.
        state: The inner optimizer's state.
        adapted: Names of the parameters that move; the others arrive in θ' as they are.
        create_graph: Keep the graph of the gradients, so that one can differentiate through the steps. Without it
            the gradients are constants, ``∂θ'/∂θ`` is the identity: the first-order approximation.
    """
    trace = []
    for step in range(steps):
        losses = support_losses(params, step)
        grads = gradient(losses.sum(), {name: params[name] for name in adapted}, create_graph)
        change, state = optimizer.update(grads, state, params)
        params = params | {name: params[name] + moved for name, moved in change.items()}
        trace.append(losses.detach())
    return Adapted(params, torch.stack(trace), state)


def adapt_recomputing(
    support_losses: Callable[[Params, int], Tensor],
    params: Params,
    steps: int,
    optimizer: InnerOptimizer[None],
    adapted: Collection[str],
) -> tuple[Adapted, Callable[[Params], Params]]:
    """``adapt``, and its pull-back ``v ↦ vᵀ ∂θ'_K/∂θ`` without the graph of the K steps.

    It keeps θ'_0 … θ'_{K-1} alone and recomputes one step after another on the way back, each a product of v with
    ``I − α ∇²L_support(θ'_k)``: exact, and of a memory that does not grow with the activations of K steps (Griewank and
    Walther, 2008, chapter 12).

    Args:
        support_losses: Parameters and the step's number to every task's loss.  # T
        params: Task-stacked parameters to start from.
        steps: Number of steps (K).
        optimizer: The inner optimizer, one that has no state.
        adapted: Names of the parameters that move.
    """

    def inner_step(params: Params, step: int, create_graph: bool) -> Adapted:
        return adapt(lambda params, _: support_losses(params, step), params, 1, optimizer, None, adapted, create_graph)

    trajectory, trace = [], []
    for step in range(steps):
        trajectory.append((params, torch.get_rng_state(), get_device_states(*params.values())))
        params, losses, _ = inner_step(leaves(params), step, create_graph=False)
        params = {name: p.detach() for name, p in params.items()}
        trace.append(losses)

    def pull_back(v: Params) -> Params:
        for step, (params, random, devices) in reversed([*enumerate(trajectory)]):
            start = leaves(params)
            with torch.random.fork_rng(devices[0]):  # dropout drops what it dropped
                torch.set_rng_state(random)
                set_device_states(*devices)
                v = vector_jacobian(inner_step(start, step, create_graph=True).params, start, v)
        return v

    return Adapted(params, torch.cat(trace), None), pull_back
