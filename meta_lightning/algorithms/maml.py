"""Model-agnostic meta-learning."""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from meta_lightning.algorithms.base import Decay, MetaLearner
from meta_lightning.algorithms.learner import Support
from meta_lightning.checks import require_choice, require_positive
from meta_lightning.inner_loop import (
    Params,
    adapt_recomputing,
    gradient,
    leaves,
    mean_over_tasks,
    stack,
    vector_jacobian,
)
from meta_lightning.losses import Loss, score
from meta_lightning.tasks import TaskBatch, as_task_batch

# parameters and learning rate; called so, an optimizer's first two arguments are not options of the command line
OuterOptimizer = Callable[[Iterable[Tensor], float], Optimizer]


class MAML(MetaLearner):
    """Model-agnostic meta-learning (Finn, Abbeel and Levine, 2017, https://arxiv.org/abs/1703.03400, algorithm 2).

    ``θ ← θ − β ∇_θ mean_i L_query,i(θ'_i(θ))``, where ``θ'_i`` is θ after K steps of ``θ' ← θ' − α ∇L_support,i(θ')``;
    the gradient goes through the K steps.

    Args:
        network: Any module from samples ``S …`` to predictions ``S …``; its parameters that require gradients are θ.
            Batch norm in it uses the batch's statistics.
        loss: Predictions and targets of one task to a scalar. Default: cross-entropy for integer targets, mean squared
            error for floating-point ones.
        inner_lr: Inner learning rate (α).
        inner_steps: Inner steps in training (K).
        test_inner_steps: Inner steps in validation, test and prediction. Default: ``inner_steps``.
        outer_lr: Outer learning rate (β).
        outer_lr_decay: How ``outer_lr`` falls over the training: not at all, linearly to zero, or to zero along half a
            cosine.
        optimizer: The outer optimizer, called with the parameters and ``outer_lr``.
        gradient_clip_val: Clip the meta-gradient at this value; None leaves it as it is.
        gradient_clip_algorithm: Clip the meta-gradient's norm, or each of its values.
        recompute_inner_steps: Recompute each inner step on the way back instead of keeping the graph of all of them:
            exact, more time, and memory that does not grow with ``inner_steps``.
        tasks_per_pass: Tasks of a meta-batch that are computed at once, which changes nothing but time and memory.
            Default: on a CPU as many as its caches hold, elsewhere all; fewer after running out of memory.
        transductive: Whether evaluation sends a task's queries forward together, so that batch norm takes their common
            statistics, or each alone with the support set.

    Raises:
        InputError: If an argument is outside its range.
    """

    second_order = True

    def __init__(
        self,
        network: nn.Module,
        loss: Loss | None = None,
        inner_lr: float = 0.01,
        inner_steps: int = 5,
        test_inner_steps: int | None = None,
        outer_lr: float = 0.001,
        outer_lr_decay: Decay = "constant",
        optimizer: OuterOptimizer = Adam,
        gradient_clip_val: float | None = 1.0,
        gradient_clip_algorithm: Literal["norm", "value"] = "norm",
        recompute_inner_steps: bool = False,
        tasks_per_pass: int | None = None,
        transductive: bool = True,
    ) -> None:
        super().__init__(
            network,
            loss,
            inner_lr,
            inner_steps,
            test_inner_steps,
            outer_lr,
            outer_lr_decay,
            tasks_per_pass,
            transductive,
        )
        if gradient_clip_val is not None:
            require_positive(gradient_clip_val=gradient_clip_val)
        require_choice(("norm", "value"), gradient_clip_algorithm=gradient_clip_algorithm)
        self.optimizer = optimizer
        self.gradient_clip_val = gradient_clip_val
        self.gradient_clip_algorithm = gradient_clip_algorithm
        self.recompute_inner_steps = recompute_inner_steps

    def training_step(self, batch: TaskBatch, batch_idx: int) -> Tensor:
        """One meta-iteration: adapt to every task, then step θ along the meta-gradient."""
        batch = as_task_batch(batch)
        meta_gradient, losses, predictions = self.meta_gradient(batch)
        loss = self.log_training(losses, score(predictions, batch.query_y), meta_gradient)
        self.outer_step(meta_gradient)
        return loss

    def meta_gradient(self, batch: TaskBatch) -> tuple[Params, Tensor, Tensor]:
        """``∇_θ mean_i L_query,i(θ'_i(θ))``, with the query losses and predictions of the tasks.  # ..., T, T R ..."""
        support = self.inner_batches(batch.support_x, batch.support_y, self.inner_steps)
        meta_gradient, losses, predictions = self.in_passes(self.pass_gradient, support, batch.query_x, batch.query_y)
        return meta_gradient, losses, predictions

    def pass_gradient(self, support: Support, query_x: Tensor, query_y: Tensor) -> tuple[Params, Tensor, Tensor]:
        """``meta_gradient`` of the tasks of one pass."""
        theta = leaves(stack(self.meta_parameters(), len(query_x)))
        adapted, pull_back = self.adapt_and_pull_back(theta, support)
        adapted = leaves(adapted)
        predictions = self.forward_tasks(adapted, query_x)
        losses = self.task_losses(predictions, query_y)
        return mean_over_tasks(pull_back(gradient(losses.sum(), adapted))), losses.detach(), predictions.detach()

    def adapt_and_pull_back(self, theta: Params, support: Support) -> tuple[Params, Callable[[Params], Params]]:
        """θ' of every task, and ``v ↦ vᵀ ∂θ'/∂θ``, which takes a gradient at θ' back to θ."""
        if self.recompute_inner_steps:
            optimizer, _ = self.inner_optimizer()
            adapted, pull_back = adapt_recomputing(self.support_losses(support), theta, len(support), optimizer)
            return adapted.params, pull_back
        adapted = self.adapt_tasks(theta, support, create_graph=True)
        return adapted.params, lambda v: vector_jacobian(adapted.params, theta, v)

    def outer_step(self, meta_gradient: Params) -> None:
        """Hand the meta-gradient to the outer optimizer, however it was computed."""
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, LightningOptimizer) and isinstance(schedule, LambdaLR)  # noqa: PT018
        theta = self.meta_parameters()
        optimizer.zero_grad()
        # g is the gradient of <θ, g>: by way of backward, since DDP does not average what is written to .grad by hand
        self.manual_backward(torch.stack([(p * meta_gradient[name].detach()).sum() for name, p in theta.items()]).sum())
        self.clip_gradients(optimizer.optimizer, self.gradient_clip_val, self.gradient_clip_algorithm)
        optimizer.step()
        schedule.step()

    def on_train_start(self) -> None:
        """Let the arguments beat what a resumed checkpoint says of the optimizer."""
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, LightningOptimizer)
        assert isinstance(schedule, LambdaLR)
        lr = self.outer_lr * self.outer_lr_factor(self.global_step)
        for group in optimizer.param_groups:
            group.update(optimizer.optimizer.defaults | {"initial_lr": self.outer_lr, "lr": lr})
        schedule.base_lrs = [self.outer_lr] * len(schedule.base_lrs)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The outer optimizer over θ, its learning rate decaying as ``outer_lr_decay`` says."""
        optimizer = self.optimizer(self.meta_parameters().values(), self.outer_lr)
        return {"optimizer": optimizer, "lr_scheduler": LambdaLR(optimizer, self.outer_lr_factor)}
