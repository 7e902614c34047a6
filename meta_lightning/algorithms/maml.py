"""Model-agnostic meta-learning."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from meta_lightning import inner_loop
from meta_lightning.algorithms.base import MetaLearner
from meta_lightning.algorithms.learner import Support
from meta_lightning.checks import require, require_choice, require_positive
from meta_lightning.inner_loop import (
    RATES,
    MetaSGD,
    Params,
    adapt_recomputing,
    gradient,
    leaves,
    mean_over_tasks,
    rate_of,
    stack,
    vector_jacobian,
)
from meta_lightning.losses import Loss, score
from meta_lightning.outer_loop import Decay, Scheduler, options_of
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
        tasks_per_pass: Tasks of a meta-batch that are computed at once, which changes nothing but time, memory and the
            draws of dropout. Default: on a CPU as many as its caches hold, elsewhere all; fewer after running out of
            memory.
        compile_passes: Compile the passes of training with ``torch.compile``, which changes nothing but time, rounding
            and the draws of dropout. It takes from seconds to minutes, and a C++ compiler or, on a GPU, Triton. A
            branch of the network by a value of a buffer or a random number of Python stays as it was then.
        transductive: Whether evaluation sends a task's queries forward together, so that batch norm takes their common
            statistics, or each alone with the support set.
        scheduler: Makes a learning-rate schedule of an optimizer, in the place of ``outer_lr_decay``: any of
            ``torch.optim.lr_scheduler`` that goes by the number of steps alone. It steps once a meta-iteration.
        inner_freeze: Parameters that inner steps leave as they are, by patterns of their names: ``features.*`` adapts
            the head alone (ANIL, Raghu et al., 2020, https://arxiv.org/abs/1909.09157), ``head.*`` the body alone
            (BOIL, Oh et al., 2021, https://arxiv.org/abs/2008.08882).
        outer_freeze: Parameters that outer steps leave as they are, likewise.
        init_from: A checkpoint, of any algorithm, whose network's weights to start from.
        max_skipped: Meta-iterations in a row that may be skipped since their update is not finite; with more of them
            training ends, at the next log interval.
        learn_inner_lr: Learn an inner rate for every number of θ, beginning at ``inner_lr``, with θ and as θ is learnt
            (Meta-SGD, Li et al., 2017, https://arxiv.org/abs/1707.09835).

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
        compile_passes: bool = False,
        transductive: bool = True,
        scheduler: Scheduler | None = None,
        inner_freeze: Sequence[str] = (),
        outer_freeze: Sequence[str] = (),
        init_from: str | None = None,
        max_skipped: int = 10,
        learn_inner_lr: bool = False,
    ) -> None:
        super().__init__(
            network,
            loss,
            inner_lr,
            inner_steps,
            test_inner_steps,
            outer_lr=outer_lr,
            outer_lr_decay=outer_lr_decay,
            tasks_per_pass=tasks_per_pass,
            compile_passes=compile_passes,
            transductive=transductive,
            scheduler=scheduler,
            inner_freeze=inner_freeze,
            outer_freeze=outer_freeze,
            init_from=init_from,
            max_skipped=max_skipped,
        )
        if gradient_clip_val is not None:
            require_positive(gradient_clip_val=gradient_clip_val)
        require(
            not (compile_passes and recompute_inner_steps and self.second_order),
            "compile_passes must be left out with recompute_inner_steps, whose second run of a step has to draw what "
            "the first drew, got both",
        )
        require_choice(("norm", "value"), gradient_clip_algorithm=gradient_clip_algorithm)
        self.optimizer = optimizer
        self.gradient_clip_val = gradient_clip_val
        self.gradient_clip_algorithm = gradient_clip_algorithm
        self.recompute_inner_steps = recompute_inner_steps
        rates = self.adapted(super().meta_parameters()) if learn_inner_lr else {}
        self.inner_rates = nn.ParameterDict(
            {rate_of(name).removeprefix(RATES): torch.full_like(p, inner_lr) for name, p in rates.items()}
        )

    def meta_parameters(self) -> Params:
        """θ, and the inner rates where they are learnt with it."""
        return super().meta_parameters() | {RATES + name: rate for name, rate in self.inner_rates.items()}

    def inner_optimizer(self) -> tuple[inner_loop.InnerOptimizer[None], None]:
        """SGD, at the learnt rates if there are any."""
        return (MetaSGD(), None) if self.inner_rates else super().inner_optimizer()

    def training_step(self, batch: TaskBatch, batch_idx: int) -> Tensor:
        """One meta-iteration: adapt to every task, then step θ along the meta-gradient."""
        batch = as_task_batch(batch)
        meta_gradient, losses, predictions = self.meta_gradient(batch)
        self.outer_step(meta_gradient)
        return self.log_training(losses, score(predictions, batch.query_y))

    def meta_gradient(self, batch: TaskBatch) -> tuple[Params, Tensor, Tensor]:
        """``∇_θ mean_i L_query,i(θ'_i(θ))``, with the query losses and predictions of the tasks.  # ..., T, T R ..."""
        support = self.inner_batches(batch.support_x, batch.support_y, self.inner_steps)
        meta_gradient, losses, predictions = self.in_passes(
            self.compiled(self.pass_gradient), support, batch.query_x, batch.query_y
        )
        return meta_gradient, losses, predictions

    def pass_gradient(self, support: Support, query_x: Tensor, query_y: Tensor) -> tuple[Params, Tensor, Tensor]:
        """``meta_gradient`` of the tasks of one pass."""
        theta = leaves(stack(self.meta_parameters(), len(query_x)))
        adapted, pull_back = self.adapt_and_pull_back(theta, support)
        adapted = leaves(adapted)
        predictions = self.forward_tasks(adapted, query_x)
        losses = self.task_losses(predictions, query_y)
        meta_gradient = self.learned(pull_back(gradient(losses.sum(), adapted)))
        return mean_over_tasks(meta_gradient), losses.detach(), predictions.detach()

    def adapt_and_pull_back(self, theta: Params, support: Support) -> tuple[Params, Callable[[Params], Params]]:
        """θ' of every task, and ``v ↦ vᵀ ∂θ'/∂θ``, which takes a gradient at θ' back to θ."""
        if self.second_order and self.recompute_inner_steps:
            losses, (optimizer, _) = self.support_losses(support), self.inner_optimizer()
            adapted, pull_back = adapt_recomputing(losses, theta, len(support), optimizer, self.adapted(theta))
            return adapted.params, pull_back
        adapted = self.adapt_tasks(theta, support, create_graph=self.second_order)
        return adapted.params, lambda v: vector_jacobian(adapted.params, theta, v)

    def outer_step(self, meta_gradient: Params) -> None:
        """Hand the meta-gradient to the outer optimizer, however it was computed."""
        theta = self.learned(self.meta_parameters())
        self.zero_grad()
        # g is the gradient of <θ, g>: by way of backward, since DDP does not average what is written to .grad by hand
        terms = [(p * meta_gradient[name].detach()).sum() for name, p in theta.items()]
        if self.outer_frozen:  # DDP waits for these as well
            terms += [0 * p.sum() for p in self.parameters() if p.requires_grad]
        self.manual_backward(torch.stack(terms).sum())
        with self.outer_iteration({name: p.grad for name, p in theta.items() if p.grad is not None}) as optimizer:
            self.clip_gradients(optimizer.optimizer, self.gradient_clip_val, self.gradient_clip_algorithm)
            optimizer.step()

    def configure_optimizers(self) -> Optimizer:
        """The outer optimizer over what is learnt."""
        optimizer = self.optimizer(self.learned(self.meta_parameters()).values(), self.outer_lr)
        for group in optimizer.param_groups:
            if self.device.type == "cuda" and "capturable" in group:
                group["capturable"] = True  # counts its steps on the device, as undone_unless needs it
        self.outer_options = [options_of(group) for group in optimizer.param_groups]
        return optimizer
