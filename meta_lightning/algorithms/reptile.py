"""Reptile."""

from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from meta_lightning.algorithms.meta_learner import MetaLearner
from meta_lightning.checks import UNSUPPORTED, require, require_at_least, require_choice
from meta_lightning.data.module import ClassificationTasks
from meta_lightning.data.streams import uniforms
from meta_lightning.data.tasks import TaskBatch, as_task_batch, least_and_most
from meta_lightning.inner.heads import ComputedRows, require_no_meta_gradient
from meta_lightning.inner.loop import Support, minibatches
from meta_lightning.inner.params import RULE, Params, mean_over_tasks, of_network, with_prefix, without_prefix
from meta_lightning.inner.rules import Adam, chosen_by, require_no_parameters
from meta_lightning.inner.samples import Samples, length
from meta_lightning.outer.update import mean_over_ranks

# support samples per class and inner steps of training below which a search on glyphs found nothing good, and ε below
# which outer_lr looks like a learning rate
FEW_SHOTS, FEW_STEPS, SMALL_EPSILON = 5, 3, 0.01


class Reptile(MetaLearner):
    """Reptile (Nichol, Achiam and Schulman, 2018, https://arxiv.org/abs/1803.02999, algorithm 2).

    ``θ ← θ + ε mean_i (θ'_i − θ)``, where ``θ'_i`` is θ after K inner steps on task i. There is no query set, no
    meta-gradient and no outer optimizer.

    The authors use ``inner_rule=Adam()`` with an ``inner_lr`` of 0.001, minibatches, and an ``outer_lr`` that decays
    linearly from 1. For the shared arguments see ``MetaLearner``.

    Args:
        inner_lr: Inner learning rate (α).
        inner_steps: Inner steps in training (K).
        outer_lr: Interpolation ε from θ towards the mean θ' of the tasks, in (0, 1]; it is not a learning rate.
        inner_batch_size: Support samples per inner step in training, drawn from a reshuffled cycle through the support
            set; None for all.
        test_inner_batch_size: Support samples per inner step in validation, test and prediction; None for all.
        inner_optimizer: Former name of ``inner_rule``, SGD or Adam.
        inner_beta1: Former name of Adam's ``beta1``.

    Raises:
        InputError: If an argument is outside its range, or an optimizer is given.
    """

    greatest_outer_lr = 1.0
    unsupported = UNSUPPORTED | {
        BackboneFinetuning: "sets learning rates of an optimizer, which Reptile does not have; subclass BaseFinetuning"
    }

    def __init__(
        self,
        *args: Any,
        inner_lr: float = 0.01,
        inner_steps: int = 5,
        outer_lr: float = 0.1,
        inner_batch_size: int | None = None,
        test_inner_batch_size: int | None = None,
        inner_optimizer: Literal["sgd", "adam"] = "sgd",
        inner_beta1: float = 0.0,
        **options: Any,
    ) -> None:
        require_choice(("sgd", "adam"), inner_optimizer=inner_optimizer)
        require(0 <= inner_beta1 < 1, f"inner_beta1 must be in [0, 1), got {inner_beta1}")
        chosen = {"sgd": None, "adam": Adam(inner_beta1)}[inner_optimizer]
        chosen_by("inner_optimizer", chosen, options)
        super().__init__(*args, inner_lr=inner_lr, inner_steps=inner_steps, outer_lr=outer_lr, **options)
        require(
            self.optimizer is None, f"optimizer must be None: Reptile interpolates by outer_lr, got {self.optimizer!r}"
        )
        require_no_parameters(self.inner_rule, "since Reptile has no meta-gradient")
        require(
            bool(self.learned(self.adapted(self.meta_parameters()))),
            "inner_freeze and outer_freeze must leave Reptile a parameter that both loops update, got patterns of all",
        )
        if isinstance(head := self.head_start, ComputedRows):
            require_no_meta_gradient(head, "Reptile")
            came = f"got {type(head).__name__}, with which the first moves the head alone"
            require(inner_steps > 1 or not head.equal, f"inner_steps 1 of Reptile needs another head_start, {came}")
        for name, size in (("inner_batch_size", inner_batch_size), ("test_inner_batch_size", test_inner_batch_size)):
            require_at_least(1, **{name: 1 if size is None else size})
        if outer_lr < SMALL_EPSILON:
            rank_zero_warn(f"outer_lr {outer_lr} looks like a learning rate; Reptile's ε is usually between 0.01 and 1")
        if inner_steps == 1 and inner_batch_size is None:
            rank_zero_warn(
                "inner_steps 1 on the full support set reduces Reptile to joint training; expected at least 2"
            )
        self.inner_batch_size, self.test_inner_batch_size = inner_batch_size, test_inner_batch_size

    def training_step(self, batch: TaskBatch, batch_idx: int) -> Tensor:
        """One meta-iteration: adapt to every task, then move θ towards the mean of the tasks."""
        batch = as_task_batch(batch)
        support = self.support(batch.support_x, batch.support_y, self.inner_steps)
        mean, losses = self.in_passes(self.adapt_pass, support)
        self.outer_step(mean)
        return self.log_training(losses)

    def adapt_pass(self, support: Support) -> tuple[Params, Tensor]:
        """``mean_i θ'_i`` of one pass, with the inner rule's carried state, and the last losses.  # ..., T"""
        params, losses, state = self.inner_loop(self.start_alone(support), support)
        theta = self.network_parameters()
        moved = {name: p for name, p in self.learned(self.adapted(params)).items() if name in theta}
        return mean_over_tasks(moved | with_prefix(self.inner_rule.carried(state), RULE)), losses

    def outer_step(self, mean: Params) -> None:
        """Update ``θ ← θ + ε mean_i (θ'_i − θ)``, the mean over the tasks of all ranks."""
        theta, mean = self.meta_parameters(), mean_over_ranks(mean, self.trainer.strategy)
        with self.outer_iteration(mean) as stand_in:
            for name, target in of_network(mean).items():
                theta[name].lerp_(target, stand_in.param_groups[0]["lr"])
            self.inner_rule.keep(without_prefix(mean, RULE), self.inner_steps)
            stand_in.step()  # only counts global_step

    def inner_batches(
        self, x: Samples, y: Samples, steps: int, first: int | None = None
    ) -> list[tuple[Samples, Samples]]:
        """Support samples and targets of each inner step, in minibatches if configured."""
        size = self.inner_batch_size if self.training else self.test_inner_batch_size
        if size is None:
            return super().inner_batches(x, y, steps)

        def draw(amount: int) -> Tensor:
            seed, tasks, rank, ranks = torch.initial_seed(), length(x), self.global_rank, self.ranks
            if first is not None:  # a function of the task's number alone
                numbers = range(first * ranks + rank, (first + tasks) * ranks, ranks)
                return torch.from_numpy(uniforms((seed,), numbers, amount))
            # a function of the step, so that resumed runs draw the same; to adapt always the same
            step, rank, ranks = (self.global_step, rank, ranks) if self.training else (0, 0, 1)
            sequence = np.random.SeedSequence((seed, step))
            generator = torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))
            # for the tasks of all ranks, each of which takes every R-th: the same as in one process
            return torch.rand(tasks * ranks, amount, generator=generator)[rank::ranks]

        return minibatches(x, y, steps, size, draw)

    def configure_optimizers(self) -> None:
        """No outer optimizer."""

    def on_fit_start(self) -> None:
        """Let Lightning's stand-in for the optimizer hold ε, and name settings that suit Reptile badly."""
        self.hold_step()
        super().on_fit_start()
        if unsuited := self.unsuited(self.data_module()):
            rank_zero_warn(
                f"Reptile learns little with {' and '.join(unsuited)}: reptile.yaml has settings that suit it"
            )

    def unsuited(self, data: Any) -> list[str]:
        """Settings with which Reptile learns little, which are usual for MAML."""
        few: dict[str, tuple[float, float]] = {}
        if isinstance(data, ClassificationTasks):
            few["data.train_shots"] = least_and_most(data.sizes("train")[0], "train_shots")[1], FEW_SHOTS
        few |= {"inner_steps": (self.inner_steps, FEW_STEPS), "outer_lr": (self.outer_lr, SMALL_EPSILON)}
        return [f"{name} {value} (expected at least {least})" for name, (value, least) in few.items() if value < least]

    def hold_step(self) -> None:
        """Let Lightning's stand-in hold ε, for schedules and monitors, unless a callback has restored it."""
        if not self.outer_optimizer().param_groups:
            self.outer_optimizer().param_groups.append({"params": [], "lr": self.outer_lr, "weight_decay": 0.0})

    def on_train_start(self) -> None:
        """Refuse schedulers of Lightning, which need an optimizer."""
        names = [type(config.scheduler).__name__ for config in self.trainer.lr_scheduler_configs]
        expected = "outer_lr of Reptile is no optimizer's learning rate: expected scheduler or outer_lr_decay"
        require(not names, f"{expected} and no lr_find, got {', '.join(names)}")
        self.hold_step()  # again: callbacks train before on_fit_start, to find a batch size
        super().on_train_start()
