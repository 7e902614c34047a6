"""Reptile."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from meta_lightning import inner_loop
from meta_lightning.algorithms.base import MetaLearner
from meta_lightning.algorithms.learner import Support
from meta_lightning.checks import require, require_at_least, require_choice
from meta_lightning.inner_loop import AdamState, Params
from meta_lightning.losses import Loss
from meta_lightning.outer_loop import Decay, Scheduler
from meta_lightning.tasks import TaskBatch, as_task_batch


class Reptile(MetaLearner):
    """Reptile (Nichol, Achiam and Schulman, 2018, https://arxiv.org/abs/1803.02999, algorithm 2).

    ``θ ← θ + ε mean_i (θ'_i − θ)``, where ``θ'_i`` is θ after K inner steps on task i. It needs no query set, no
    meta-gradient and no outer optimizer.

    The authors' settings are ``inner_optimizer="adam"`` with an ``inner_lr`` of 0.001, minibatches, and an ``outer_lr``
    of 1 that decays linearly. Adam's moments persist: every task starts from those that training has left, which are
    averaged over the tasks of each meta-batch.

    Args:
        network: Any module from samples ``S …`` to predictions ``S …``; its parameters that require gradients are θ.
            Batch norm in it uses the batch's statistics.
        loss: Predictions and targets of one task to a scalar. Default: cross-entropy for integer targets, mean squared
            error for floating-point ones.
        inner_lr: Inner learning rate (α).
        inner_steps: Inner steps in training (K).
        test_inner_steps: Inner steps in validation, test and prediction. Default: ``inner_steps``.
        outer_lr: The interpolation ε from θ towards the tasks' mean θ', in (0, 1]; it is not a learning rate.
        outer_lr_decay: How ``outer_lr`` falls over the training: not at all, linearly to zero, or to zero along half a
            cosine.
        inner_optimizer: Rule of the inner steps.
        inner_beta1: β1 of the inner Adam.
        inner_batch_size: Support samples an inner step in training, from a reshuffled cycle through the support set;
            None takes all of them in every step.
        test_inner_batch_size: The same in validation, test and prediction.
        tasks_per_pass: Tasks of a meta-batch that are computed at once, which changes nothing but time, memory and the
            draws of dropout. Default: on a CPU as many as its caches hold, elsewhere all; fewer after running out of
            memory.
        compile_passes: Compile the passes of training with ``torch.compile``, which changes nothing but time, rounding
            and the draws of dropout. It takes from seconds to minutes, and a C++ compiler or, on a GPU, Triton. A
            branch of the network by a value of a buffer or a random number of Python stays as it was then.
        optimizer: Not accepted: Reptile's outer loop is an interpolation.
        transductive: Whether evaluation sends a task's queries forward together, so that batch norm takes their common
            statistics, or each alone with the support set.
        scheduler: Makes a schedule of ε, in the place of ``outer_lr_decay``: any of
            ``torch.optim.lr_scheduler`` that goes by the number of steps alone. It steps once a meta-iteration.
        inner_freeze: Parameters that inner steps leave as they are, by patterns of their names: ``features.*`` adapts
            the head alone (ANIL, Raghu et al., 2020, https://arxiv.org/abs/1909.09157), ``head.*`` the body alone
            (BOIL, Oh et al., 2021, https://arxiv.org/abs/2008.08882).
        outer_freeze: Parameters that outer steps leave as they are, likewise.
        init_from: A checkpoint, of any algorithm, whose network's weights to start from.
        max_skipped: Meta-iterations in a row that may be skipped since their update is not finite; with more of them
            training ends, at the next log interval.

    Raises:
        InputError: If an argument is outside its range, or an optimizer is given.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Loss | None = None,
        inner_lr: float = 0.01,
        inner_steps: int = 5,
        test_inner_steps: int | None = None,
        outer_lr: float = 0.1,
        outer_lr_decay: Decay = "constant",
        inner_optimizer: Literal["sgd", "adam"] = "sgd",
        inner_beta1: float = 0.0,
        inner_batch_size: int | None = None,
        test_inner_batch_size: int | None = None,
        tasks_per_pass: int | None = None,
        compile_passes: bool = False,
        optimizer: Any = None,
        transductive: bool = True,
        scheduler: Scheduler | None = None,
        inner_freeze: Sequence[str] = (),
        outer_freeze: Sequence[str] = (),
        init_from: str | None = None,
        max_skipped: int = 10,
    ) -> None:
        require(
            optimizer is None,
            "optimizer must be left out: Reptile moves θ towards the adapted parameters by outer_lr, with no gradient "
            f"for an optimizer to step along, got {optimizer!r}",
        )
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
        require(
            bool(self.learned(self.adapted(self.meta_parameters()))),
            "inner_freeze and outer_freeze must leave Reptile a parameter that both loops move, got "
            f"{inner_freeze} and {outer_freeze}",
        )
        require(outer_lr <= 1, f"outer_lr must be in (0, 1]: it is Reptile's interpolation ε, got {outer_lr}")
        require_choice(("sgd", "adam"), inner_optimizer=inner_optimizer)
        require(0 <= inner_beta1 < 1, f"inner_beta1 must be in [0, 1), got {inner_beta1}")
        for name, size in (("inner_batch_size", inner_batch_size), ("test_inner_batch_size", test_inner_batch_size)):
            if size is not None:
                require_at_least(1, **{name: size})
        if outer_lr < 0.01:
            rank_zero_warn(
                f"outer_lr {outer_lr} looks like a learning rate; for Reptile it is the interpolation ε, "
                "usually from 0.01 to 1"
            )
        if inner_steps == 1 and inner_batch_size is None:
            rank_zero_warn(
                "inner_steps 1 on the full support set makes Reptile joint training on all tasks, not meta-learning; "
                "expected at least 2 inner steps"
            )
        self.inner_beta1 = inner_beta1
        self.inner_batch_size = inner_batch_size
        self.test_inner_batch_size = test_inner_batch_size
        self.moments = Moments(self.adapted(self.meta_parameters())) if inner_optimizer == "adam" else None

    def training_step(self, batch: TaskBatch, batch_idx: int) -> Tensor:
        """One meta-iteration: adapt to every task, then move θ towards the tasks' mean."""
        batch = as_task_batch(batch)
        support = self.inner_batches(batch.support_x, batch.support_y, self.inner_steps)
        means, losses = self.in_passes(self.compiled(self.adapt_pass), support)
        self.outer_step(*means)
        return self.log_training(losses, {})

    def adapt_pass(self, support: Support) -> tuple[list[Params], Tensor]:
        """``mean_i θ'_i`` of one pass, with the means of the inner Adam's moments, and the last step's losses.  # T"""
        theta = inner_loop.leaves(inner_loop.stack(self.meta_parameters(), len(support[0][0])))
        params, losses, state = self.adapt_tasks(theta, support)
        moved = self.learned(self.adapted(params))
        moments = [] if self.moments is None else [state.first, state.second]
        return [inner_loop.mean_over_tasks(values) for values in (moved, *moments)], losses[-1]

    def outer_step(self, *means: Params) -> None:
        """θ ← θ + ε mean_i (θ'_i − θ), the mean over the tasks of all ranks; no optimizer."""
        theta, (mean, *moments) = self.meta_parameters(), [self.mean_over_ranks(values) for values in means]
        with self.outer_iteration((mean, moments)) as stand_in:
            epsilon = stand_in.param_groups[0]["lr"]
            for name, target in mean.items():
                theta[name].lerp_(target, epsilon)
            if self.moments is not None:
                self.moments.store(self.moments.step + self.inner_steps, *moments)
            stand_in.step()  # moves nothing, and counts global_step

    def mean_over_ranks(self, params: Params) -> Params:
        """The mean over the ranks of what each has of its tasks."""
        # DDP averages gradients only, and Reptile has none; all in one message, since each waits for all ranks
        together = torch.cat([p.detach().flatten() for p in params.values()])
        mean: Tensor = self.trainer.strategy.reduce(together, reduce_op="mean")
        parts = mean.split([p.numel() for p in params.values()])
        return {name: part.view_as(p) for (name, p), part in zip(params.items(), parts, strict=True)}

    def inner_optimizer(self) -> tuple[inner_loop.InnerOptimizer[Any], Any]:
        """SGD, or Adam with the moments that training has left."""
        if self.moments is None:
            return super().inner_optimizer()
        return inner_loop.Adam(self.inner_lr, self.inner_beta1), self.moments.state()

    def inner_batches(self, x: Tensor, y: Tensor, steps: int) -> Support:
        """The support samples of each step: minibatches that cycle through the set and reshuffle at each round."""
        size = self.inner_batch_size if self.training else self.test_inner_batch_size
        if size is None:
            return super().inner_batches(x, y, steps)
        T, S = x.shape[:2]
        rounds = -(-steps * size // S)
        # of the step alone, so that a resumed run draws what comes next, and evaluation the same each time; and for the
        # tasks of all ranks, of which each has every R-th, so that they draw what one process does
        step = self.global_step if self.training else 0
        R = self._trainer.world_size if self._trainer else 1
        seed = np.random.SeedSequence((torch.initial_seed(), step))
        generator = torch.Generator().manual_seed(int(seed.generate_state(1)[0]))
        order = torch.rand(T * R, rounds, S, generator=generator)[self.global_rank :: R].argsort(-1)
        order = order.flatten(1).to(x.device)  # T rounds*S
        tasks = torch.arange(T, device=x.device)[:, None]
        return [(x[tasks, rows], y[tasks, rows]) for rows in torch.split(order, size, dim=1)[:steps]]

    def configure_optimizers(self) -> None:
        """No outer optimizer."""

    def on_train_start(self) -> None:
        """Let the stand-in that Lightning gives without an optimizer hold ε, for schedules and their monitors."""
        self.outer_optimizer().param_groups.append({"params": []})
        self.outer_options = [{"lr": self.outer_lr}]
        super().on_train_start()


class Moments(nn.Module):
    """The inner Adam's moments between meta-iterations, as buffers: they move and are saved with the learner."""

    def __init__(self, theta: Params) -> None:
        super().__init__()
        self.names = {name: name.replace(".", "/") for name in theta}  # a buffer's name cannot hold a dot
        self.step: Tensor
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.first, self.second = nn.Module(), nn.Module()
        for name, p in theta.items():
            self.first.register_buffer(self.names[name], torch.zeros_like(p))
            self.second.register_buffer(self.names[name], torch.zeros_like(p))

    def state(self) -> AdamState:
        """The state that every task starts with."""
        return AdamState(self.step, *({n: m.get_buffer(b) for n, b in self.names.items()} for m in self.orders()))

    def store(self, step: Tensor, first: Params, second: Params) -> None:
        """Keep the state that a meta-iteration left."""
        self.step.copy_(step)
        for module, moments in zip(self.orders(), (first, second), strict=True):
            for name, buffer in self.names.items():
                module.get_buffer(buffer).copy_(moments[name])

    def orders(self) -> tuple[nn.Module, nn.Module]:
        """The first and the second moments."""
        return self.first, self.second
