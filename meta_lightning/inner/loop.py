"""The inner loop of all tasks of a pass: pure functions of task-stacked parameters.

The forward runs under one ``vmap`` over the stacked parameters and is differentiated outside it. ``vmap`` over
*gradients* is silently wrong at second order for normalisation layers with adapted scale and shift: torch's batching
rule for their backward treats the saved statistics as constants.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from meta_lightning.checks import require
from meta_lightning.inner.params import (
    RULE,
    Params,
    gradient,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
    without_prefix,
)
from meta_lightning.inner.rules import InnerRule
from meta_lightning.inner.samples import Padded, Samples, length
from meta_lightning.random_states import kept_random_states, random_states, set_random_states


class Support(NamedTuple):
    """The support sets of the tasks of a pass."""

    x: Samples  # T S ...
    y: Samples  # T S ...
    batches: Sequence[tuple[Samples, Samples]]  # samples and targets of each inner step: K of T s ..., T s ...
    classes: Tensor  # T N: samples per class; T 0 if nobody asks


class Adapted(NamedTuple):
    """The result of an inner step."""

    params: Params  # θ'_k
    losses: Tensor  # T: the support losses at θ'_{k-1}; empty for θ'_0
    state: Any  # of the inner rule, task-stacked once a step was taken


class InnerStep(NamedTuple):
    """One inner step of every task: ``θ' ← θ' + rule(∇L_support(θ'))``, for SGD ``θ' − α ∇L_support(θ')``."""

    support_losses: Callable[[Params, Params, Samples, Samples], Tensor]  # θ', start, samples, targets -> T
    rule: InnerRule
    lr: float
    moved: Collection[str]
    start: Params  # θ'_0 where the losses depend on it, else empty

    def __call__(self, params: Params, state: Any, x: Samples, y: Samples, create_graph: bool = False) -> Adapted:
        """Take the step."""
        losses = self.support_losses(params, self.start, x, y)
        grads = gradient(losses.sum(), {name: params[name] for name in self.moved}, create_graph)
        change, state = self.rule.update(grads, state, without_prefix(params, RULE), self.lr)
        params = params | {name: params[name] + delta for name, delta in change.items()}
        return Adapted(params, losses.detach(), state)


def trajectory(
    step: InnerStep,
    params: Params,
    batches: Sequence[tuple[Samples, Samples]],
    second_order: bool = False,
    recompute: bool = False,
) -> Iterator[Adapted]:
    """θ'_0 … θ'_K of every task (Finn et al., 2017, algorithm 2, lines 6 and 7)."""
    state = step.rule.start()
    yield Adapted(params, torch.zeros(0), state)
    take: Callable[..., Adapted] = partial(step.__call__, create_graph=second_order)
    if second_order and recompute:
        take = partial(recomputed, step)
    for x, y in batches:
        adapted = take(params, state, x, y)
        params, state = adapted.params, adapted.state
        yield adapted


def minibatches(
    x: Samples, y: Samples, steps: int, size: int, draw: Callable[[int], Tensor]
) -> list[tuple[Samples, Samples]]:
    """Minibatches for each inner step: a cycle through the support set, reshuffled each round.

    ``draw`` returns ``count`` random numbers per task.  # T count
    """
    unequal = isinstance(x, Padded)
    require(not unequal, f"inner_batch_size must be None for tasks of unequal size, got {size}")
    T, S = length(x), length(x, 1)
    device = tree_leaves(x)[0].device
    rounds = -(-steps * size // S)
    order = draw(rounds * S).view(T, rounds, S).argsort(-1)
    order = order.flatten(1).to(device)  # T rounds*S
    tasks = torch.arange(T, device=device)[:, None]
    batches = torch.split(order, size, dim=1)[:steps]
    return [tree_map(lambda t, rows=rows: t[tasks, rows], (x, y)) for rows in batches]


def recomputed(step: InnerStep, params: Params, state: Any, x: Samples, y: Samples) -> Adapted:
    """An inner step whose graph is recomputed in backward (Griewank and Walther, 2008, chapter 12)."""
    tensors, structure = tree_flatten((params, state, step.start))
    device = tree_leaves(x)[0].device.type
    cast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    structures: list[Any] = []  # of the step's result

    def run(tensors: list[Tensor], create_graph: bool) -> list[Tensor]:
        with torch.enable_grad(), torch.autocast(*cast):
            params, state, start = tree_unflatten(tensors, structure)
            left, after = tree_flatten(step._replace(start=start)(params, state, x, y, create_graph))
        structures.append(after)
        return left

    left = Recomputed.apply(run, *tensors)
    adapted: Adapted = tree_unflatten(list(left), structures[0])
    return adapted


class Recomputed(Function):
    """A function of tensors that runs again in backward, with its graph."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., list[Tensor]], *tensors: Tensor) -> Any:
        """Run the function and save the states of the random number generators."""
        ctx.run, ctx.random = run, random_states(tensors[0].device)
        ctx.save_for_backward(*tensors)
        return tuple(tensor.detach() for tensor in run(fresh(tensors), create_graph=False))

    @staticmethod
    def backward(ctx: Any, *v: Tensor) -> Any:
        """Run it again and backpropagate v."""
        tensors = fresh(ctx.saved_tensors)
        device = tensors[0].device
        with kept_random_states(device):
            set_random_states(ctx.random, device)  # the same dropout masks
            left = ctx.run(tensors, create_graph=True)
        outputs = [(tensor, g) for tensor, g in zip(left, v, strict=True) if tensor.requires_grad]
        inputs = [tensor for tensor in tensors if tensor.requires_grad]
        values, grads = map(list, zip(*outputs, strict=True))
        by_input = iter(torch.autograd.grad(values, inputs, grads, materialize_grads=True))
        return None, *(next(by_input) if tensor.requires_grad else None for tensor in tensors)


def fresh(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Leaves of a new graph with the same values; integers are passed through."""
    return [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in tensors]
