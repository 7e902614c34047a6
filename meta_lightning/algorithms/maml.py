"""Model-agnostic meta-learning."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.optim import Adam, Optimizer

from meta_lightning.algorithms.meta_learner import MetaLearner
from meta_lightning.checks import require, require_at_least, require_choice, require_positive
from meta_lightning.data.tasks import TaskBatch, as_task_batch
from meta_lightning.inner.loop import Support
from meta_lightning.inner.params import Params, gradient, leaves, mean_over_tasks, stack, tree_leaves, tree_map
from meta_lightning.inner.passes import Passes
from meta_lightning.inner.rules import MetaSGD, chosen_by
from meta_lightning.inner.samples import Samples, length
from meta_lightning.outer.update import OuterOptimizer

# in the errors of operators that have a first derivative only
ONCE_DIFFERENTIABLE = ("derivative for", "don't support automatic differentiation", "differentiate twice")


class MAML(MetaLearner):
    """Model-agnostic meta-learning (Finn, Abbeel and Levine, 2017, https://arxiv.org/abs/1703.03400, algorithm 2).

    ``θ ← θ − β ∇_θ mean_i L_query,i(θ'_i(θ))``, where ``θ'_i`` is θ after K steps of ``θ' ← θ' − α ∇L_support,i(θ')``.
    The gradient is taken through the K steps.

    For the shared arguments see ``MetaLearner``.

    Args:
        inner_lr: Inner learning rate (α).
        inner_steps: Inner steps in training (K).
        outer_lr: Outer learning rate (β).
        gradient_clip_val: Clip the meta-gradient at this value; None for no clipping.
        gradient_clip_algorithm: Clip by the norm of the meta-gradient, or each value.
        recompute_inner_steps: Recompute each inner step in backward instead of keeping its graph: exact, slower, and
            memory does not grow with ``inner_steps``. Passes are not recorded, which would keep every step.
        multi_step_loss: Number of first meta-iterations in which the query loss is taken after every inner step, with
            the weights of ``step_weights``, which move to the last step (MAML++: Antoniou et al., 2019,
            https://arxiv.org/abs/1810.09502). They move every meta-iteration; the authors' move every epoch of 500, for
            10 epochs on Omniglot (``multi_step_loss`` 5000) and 15 on mini-ImageNet (7500).
        first_order_steps: Number of first meta-iterations without second derivatives, as in FOMAML (derivative-order
            annealing of the same paper).
        learn_inner_lr: Former name of ``inner_rule: MetaSGD``.

    Raises:
        InputError: If an argument is outside its range.
    """

    second_order = True

    def __init__(
        self,
        *args: Any,
        inner_lr: float = 0.01,
        inner_steps: int = 5,
        outer_lr: float = 0.001,
        optimizer: OuterOptimizer = Adam,
        gradient_clip_val: float | None = 1.0,
        gradient_clip_algorithm: Literal["norm", "value"] = "norm",
        recompute_inner_steps: bool = False,
        multi_step_loss: int = 0,
        first_order_steps: int = 0,
        learn_inner_lr: bool = False,
        **options: Any,
    ) -> None:
        chosen_by("learn_inner_lr", MetaSGD() if learn_inner_lr else None, options)
        super().__init__(
            *args, inner_lr=inner_lr, inner_steps=inner_steps, outer_lr=outer_lr, optimizer=optimizer, **options
        )
        if gradient_clip_val is not None:
            require_positive(gradient_clip_val=gradient_clip_val)
        require_choice(("norm", "value"), gradient_clip_algorithm=gradient_clip_algorithm)
        require_at_least(0, multi_step_loss=multi_step_loss, first_order_steps=first_order_steps)
        if recompute_inner_steps and self.second_order:
            require(
                self.passes.option is not True,
                "compile_passes must not be combined with recompute_inner_steps, which sets random states, got both",
            )
            self.passes = Passes(self.passes.tasks_per_pass, compile_passes=False)  # a record would keep every step
        self.gradient_clip_val, self.gradient_clip_algorithm = gradient_clip_val, gradient_clip_algorithm
        self.recompute_inner_steps = recompute_inner_steps
        self.multi_step_loss, self.first_order_steps = multi_step_loss, first_order_steps
        self.first_order = not self.second_order  # in this meta-iteration; an attribute, to be in the key of a graph

    def training_step(self, batch: TaskBatch, batch_idx: int) -> Tensor:
        """One meta-iteration: compute the meta-gradient and update θ."""
        batch = as_task_batch(batch)
        meta_gradient, losses, predictions = self.meta_gradient(batch)
        self.outer_step(meta_gradient)
        return self.log_training(losses, lambda: self.training_scores(predictions, batch.query_y))

    def meta_gradient(self, batch: TaskBatch) -> tuple[Params, Tensor, Samples]:
        """``∇_θ mean_i L_query,i(θ'_i(θ))``, with the query losses and predictions of the tasks.  # ..., T, T R ..."""
        support_x, query_x = self.task_network.ahead_of_both(batch.support_x, batch.query_x)
        support = self.support(support_x, batch.support_y, self.inner_steps)
        self.first_order = not self.second_order or self.global_step < self.first_order_steps
        queries = [query_x, batch.query_y]
        if self.global_step < self.multi_step_loss:
            steps = max(1, len(support.batches))  # of an algorithm without inner steps, θ'_0 counts
            weights = torch.tensor(step_weights(steps, self.global_step / self.multi_step_loss))
            # a tensor, which a graph reads at each call; without a host sync
            weights = weights.to(tree_leaves(batch)[0].device, non_blocking=True)
            queries.append(weights.expand(length(batch.query_x), -1))  # T K
        try:
            meta_gradient, losses, predictions = self.in_passes(self.pass_gradient, support, *queries)
        except RuntimeError as error:
            require(
                not any(words in str(error) for words in ONCE_DIFFERENTIABLE),
                f"network and loss must have the derivatives of {type(self).__name__}, but torch says: {error}. "
                "MAML and IMAML take the second derivative, FOMAML and Reptile the first only",
            )
            raise
        return meta_gradient, losses, predictions

    def pass_gradient(
        self, support: Support, query_x: Samples, query_y: Samples, weights: Tensor | None = None
    ) -> tuple[Params, Tensor, Samples]:
        """``meta_gradient`` of the tasks of one pass; the lines are those of algorithm 2.

        ``weights`` are those of the query losses after each inner step; without them only the last loss counts.  # T K
        """
        theta = leaves(stack(self.meta_parameters(), length(query_x)))
        start = self.start(theta, support)
        options = {"second_order": not self.first_order, "recompute": self.recompute_inner_steps}
        if weights is None:
            of_steps = [self.inner_loop(start, support, **options)]  # lines 6 and 7: θ' ← θ' − α ∇L_support(θ')
        else:
            of_steps = [*self.inner_trajectory(start, support, **options)][-weights.shape[1] :]
        losses_after = []
        for adapted in of_steps:
            losses, predictions = self.task_network.query(adapted.params, start, query_x, query_y)
            losses_after.append(losses)
        objective = losses if weights is None else (weights * torch.stack(losses_after, 1)).sum(1)
        meta_gradient = mean_over_tasks(gradient(objective.sum(), self.learned(theta)))  # line 10: ∇_θ mean L_query(θ')
        return meta_gradient, losses.detach(), tree_map(Tensor.detach, predictions)

    def outer_step(self, meta_gradient: Params) -> None:
        """Update θ by the outer optimizer and a given meta-gradient."""
        theta = self.learned(self.meta_parameters())
        new = theta.keys() - self.wrapped if self.ranks > 1 else ()
        came = f"got {', '.join(sorted(new))}, unfrozen later, which DDP would not average"
        require(not new, f"several processes must train the same parameters from the start, {came}")
        for p in theta.values():
            p.grad = None
        # in backward, since DDP averages there, and waits for every parameter
        idle = self.outer_frozen or self.head_start.computed
        others = {p: torch.zeros_like(p) for p in self.parameters() if p.requires_grad} if idle else {}
        handed = others | {p: meta_gradient[name].detach() for name, p in theta.items()}
        self.manual_backward(WithGradient.apply([*handed.values()], *handed))
        for p in {*others} - {*theta.values()}:
            p.grad = None  # no weight decay either
        with self.outer_iteration({name: p.grad for name, p in theta.items() if p.grad is not None}) as optimizer:
            self.clip_gradients(optimizer.optimizer, self.gradient_clip_val, self.gradient_clip_algorithm)
            optimizer.step()

    def setup(self, stage: str) -> None:
        """As ``MetaLearner``; note the parameters that DDP will wrap."""
        super().setup(stage)
        self.wrapped = frozenset(self.learned(self.meta_parameters()))

    def configure_optimizers(self) -> Optimizer:
        """Construct the outer optimizer."""
        assert self.optimizer is not None
        theta = self.learned(self.meta_parameters())
        return self.outer_update.with_kernels(self.optimizer(theta.values(), self.outer_lr), self.device)


def step_weights(steps: int, progress: float) -> list[float]:
    """Weights of the query losses after K inner steps in MAML++, as progress goes from 0 to 1.

    They start equal, at 1/K. Those before the last step fall to 0.03/K, and the last one takes the rest (the authors'
    ``get_per_step_loss_importance_vector``, https://github.com/AntreasAntoniou/HowToTrainYourMAMLPytorch).
    """
    earlier = max(1 - progress, 0.03) / steps
    return [earlier] * (steps - 1) + [1 - earlier * (steps - 1)]


class WithGradient(Function):
    """A scalar whose gradient with respect to parameters is given."""

    @staticmethod
    def forward(ctx: Any, gradient: list[Tensor], *params: Tensor) -> Tensor:
        """Return 0."""
        ctx.gradient = gradient
        return params[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        """The gradient, times v."""
        return None, *(v * g for g in ctx.gradient)
