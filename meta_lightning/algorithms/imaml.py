"""Implicit model-agnostic meta-learning."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from meta_lightning.algorithms.maml import MAML
from meta_lightning.checks import require, require_at_least, require_positive
from meta_lightning.inner.loop import Support
from meta_lightning.inner.params import Params, gradient, leaves, mean_over_tasks, of_network, stack, tree_map
from meta_lightning.inner.rules import require_no_parameters
from meta_lightning.inner.samples import Samples, length
from meta_lightning.inner.task_loss import TaskLoss

Operator = Callable[[Params], Params]  # a linear map of task-stacked parameters, symmetric for each task


class IMAML(MAML):
    """Implicit MAML (Rajeswaran, Finn, Kakade and Levine, 2019, https://arxiv.org/abs/1909.04630, algorithms 1 and 2).

    ``θ ← θ − β mean_i (I + H_i/λ)⁻¹ ∇L_query,i(θ'_i)``, ``H_i = ∇²L_support,i(θ'_i)``, where the K inner steps approach
    the minimum ``θ'_i`` of ``L_support,i(θ') + λ/2 ‖θ' − θ‖²``. The meta-gradient depends on θ'_i alone, not on the
    steps to it, so memory does not grow with ``inner_steps``. It is exact if the inner steps and conjugate gradients
    have converged.

    A parameter that ``inner_freeze`` matches gets ``∂L_query/∂w − ∂⟨∇L_support, v⟩/∂w / λ``, v being the solution.

    The arguments are those of ``MAML``; ``recompute_inner_steps`` and ``first_order_steps`` have no effect, and
    ``multi_step_loss`` must be 0.

    Args:
        proximal_weight: Weight of the distance to θ in the inner loss (λ).
        cg_steps: Iterations of conjugate gradients from ∇L_query(θ'), with one Hessian-vector product each and one for
            the first residual.

    Raises:
        InputError: If an argument is outside its range, or the inner rule has parameters.
    """

    second_order = False
    depends_on_start = True

    def __init__(self, *args: Any, proximal_weight: float = 2.0, cg_steps: int = 5, **options: Any) -> None:
        super().__init__(*args, **options)
        require_positive(proximal_weight=proximal_weight)
        require_at_least(0, cg_steps=cg_steps)
        last_only = "multi_step_loss must be 0 for IMAML, whose meta-gradient depends on the last inner step alone"
        came = f"got {type(self.loss).__name__}"
        require(not isinstance(self.loss, TaskLoss), f"loss of IMAML must be of predictions and targets, {came}")
        require(self.multi_step_loss == 0, f"{last_only}, got {self.multi_step_loss}")
        require_no_parameters(self.inner_rule, "on which no minimum depends")
        self.proximal_weight, self.cg_steps = proximal_weight, cg_steps

    def inner_losses(self, params: Params, start: Params, x: Samples, y: Samples) -> Tensor:
        """``L_support(θ') + λ/2 ‖θ' − θ'_0‖²`` of every task.  # T"""
        distance = {name: params[name] - p for name, p in self.adapted(start).items()}
        return super().inner_losses(params, start, x, y) + self.proximal_weight / 2 * dot(distance, distance)

    def pass_gradient(
        self, support: Support, query_x: Samples, query_y: Samples, weights: Tensor | None = None
    ) -> tuple[Params, Tensor, Samples]:
        """``meta_gradient`` of the tasks of one pass (algorithm 2); there are no ``weights``."""
        theta = leaves(stack(self.meta_parameters(), length(query_x)))
        graph = self.start(theta, support)
        start = leaves(graph)  # the minimum does not depend on the steps to it
        params = leaves(of_network(self.inner_loop(start, support).params))  # line 3: θ'
        losses, predictions = self.task_network.query(params, start, query_x, query_y)
        by_query = gradient(losses.sum(), params)  # line 4: ∇L_query(θ')
        by_start = self.implicit_gradient(start, params, by_query, *support.batches[-1])  # line 5
        learned = self.learned(theta)
        grads = torch.autograd.grad(
            [graph[name] for name in by_start], [*learned.values()], [*by_start.values()], materialize_grads=True
        )
        meta_gradient = mean_over_tasks(dict(zip(learned, grads, strict=True)))
        return meta_gradient, losses.detach(), tree_map(Tensor.detach, predictions)

    def implicit_gradient(self, start: Params, params: Params, by_query: Params, x: Samples, y: Samples) -> Params:
        """dL_query/dθ'_0 by the implicit function theorem (lemma 1).  # T ..."""
        by_support = gradient(self.inner_losses(params, start, x, y).sum(), self.adapted(params), create_graph=True)

        def product(v: Params, by: Params) -> Params:  # ∂⟨∇(L_support + λ/2 ‖θ' − θ‖²), v⟩ / λ; by θ' it is (I + H/λ) v
            scaled = [v[name] / self.proximal_weight for name in by_support]
            grads = torch.autograd.grad(
                [*by_support.values()], [*by.values()], scaled, retain_graph=True, materialize_grads=True
            )
            return dict(zip(by, grads, strict=True))

        adapted = self.adapted(params)
        v = conjugate_gradients(lambda v: product(v, adapted), self.adapted(by_query), self.cg_steps)
        fixed = {name: p for name, p in params.items() if name not in adapted}
        mixed = product(v, fixed) if fixed else {}
        return v | {name: by_query[name] - mixed[name] for name in fixed}


def conjugate_gradients(operator: Operator, b: Params, steps: int) -> Params:
    """Solve ``operator(x) = b`` for every task, from ``x = b`` (Hestenes and Stiefel, 1952).

    A task stops for good where the operator is not positive along the search direction.
    """
    x = b
    residual = direction = add(b, -1.0, operator(b))
    square = dot(residual, residual)
    active = square >= 0
    for _ in range(steps):
        image = operator(direction)
        curvature = dot(direction, image)
        active = active & (curvature > 0)
        length = torch.where(active, square / curvature, 0.0)
        x, residual = add(x, length, direction), add(residual, -length, image)
        before, square = square, dot(residual, residual)
        direction = add(residual, torch.where(active, square / before, 0.0), direction)
    return x


def dot(a: Params, b: Params) -> Tensor:
    """⟨a, b⟩ of every task.  # T ..., T ... -> T"""
    products = [(a[name] * b[name]).reshape(len(a[name]), -1).sum(1) for name in a]
    return torch.stack(products).sum(0)


def add(a: Params, scale: Tensor | float, b: Params) -> Params:
    """Return ``a + scale · b``, with a scale per task.  # T ..., T"""
    if isinstance(scale, Tensor):
        return {name: p + scale.view(-1, *[1] * (p.ndim - 1)) * b[name] for name, p in a.items()}
    return {name: p + scale * b[name] for name, p in a.items()}
