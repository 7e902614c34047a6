"""Plain training on all classes, then fine-tuning."""

from typing import Any, cast

import torch
from torch import Tensor

from meta_lightning.algorithms.maml import MAML
from meta_lightning.checks import require
from meta_lightning.data.tasks import TaskBatch, as_task_batch
from meta_lightning.inner.heads import ComputedRows, Prototypes, require_no_meta_gradient
from meta_lightning.inner.params import Params, gradient, of_network, tree_map
from meta_lightning.inner.rules import require_no_parameters
from meta_lightning.inner.samples import Padded, first_task, one_task
from meta_lightning.inner.task_loss import TaskLoss


class Baseline(MAML):
    """Plain training of a classifier of all training classes; a new task fine-tunes it with a head of its own.

    ``θ ← θ − β ∇_θ L(θ)`` over all samples of a meta-batch, support and query, as one mini-batch. The head that is
    trained has a row per training class; in evaluation a task starts at ``head_start`` and takes inner steps from
    there, of the body too unless ``inner_freeze`` names it. This is the Baseline of Chen et al. (2019,
    https://arxiv.org/abs/1904.04232), whose new head starts at random and is all that adapts.

    The data module must have ``train_labels="split"``, and the network an output per training class. The arguments are
    those of ``MAML``; ``inner_steps`` are those of evaluation.

    Raises:
        InputError: If an argument is outside its range, or the head of a task starts at the trained rows.
    """

    train_labels = "split"
    default_head_start = Prototypes

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        came = f"got {type(self.head_start).__name__}"
        require(
            not isinstance(self.loss, TaskLoss), "loss of Baseline must be of predictions and targets, got a TaskLoss"
        )
        require(self.head_start.computed, f"head_start of Baseline must compute the rows of a task, {came}")
        require_no_meta_gradient(cast(ComputedRows, self.head_start), "Baseline")
        require_no_parameters(self.inner_rule, "since Baseline has no meta-gradient")

    def network_parameters(self) -> Params:
        """The network's parameters, those of the trained head included."""
        rows = self.head_start.replaced(self.network.named_parameters())
        trained = {name: p for name, p in rows.items() if p.requires_grad and name not in self.outer_frozen}
        return super().network_parameters() | trained

    def learned(self, params: Params) -> Params:
        """The network's parameters that the outer loop updates: the start of a task's head has no part in training."""
        return of_network(super().learned(params))

    def without_gradient(self, batch: TaskBatch) -> list[str]:
        """No parameters: the inner loop has no part in training."""
        return []

    def training_step(self, batch: TaskBatch, batch_idx: int) -> Tensor:
        """One step of the outer optimizer on all samples of the meta-batch."""
        batch = as_task_batch(batch)
        unequal = any(isinstance(part, Padded) for part in batch)
        require(not unequal, "tasks of Baseline must be of one size in a meta-batch, got padded ones")
        x, y = (
            tree_map(lambda s, q: torch.cat([s, q], 1).flatten(0, 1), *parts)
            for parts in ((batch.support_x, batch.query_x), (batch.support_y, batch.query_y))
        )
        came = y.dtype if isinstance(y, Tensor) else type(y).__name__
        require(came == torch.int64, f"targets of Baseline must be int64 class numbers, got {came}")
        features = first_task(self.task_network.ahead(one_task(x)))
        predictions = self.task_network.predict_valid(self.network_parameters(), features)
        classes, outputs = int(y.max()) + 1, predictions.shape[1]
        require(
            classes <= outputs, f"network must have an output per training class, at least {classes}, got {outputs}"
        )
        loss = self.loss(predictions, y)
        self.outer_step(gradient(loss, self.learned(self.meta_parameters())))
        return self.log_training(loss.detach()[None], lambda: self.scores(self.loss, predictions[None], y[None]))
