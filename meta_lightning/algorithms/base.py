"""What MAML, FOMAML and Reptile share as Lightning modules: the outer loop's frame, evaluation, checkpoints."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from torch import Tensor, nn

from meta_lightning import inner_loop
from meta_lightning.algorithms.learner import Learner, Support
from meta_lightning.checkpoints import network_description, verify_checkpoint
from meta_lightning.checks import require, require_choice, require_positive
from meta_lightning.data.form import form_of
from meta_lightning.inner_loop import Params
from meta_lightning.losses import Loss, score
from meta_lightning.metrics import TaskMean
from meta_lightning.tasks import TaskBatch, as_task_batch

Decay = Literal["constant", "linear", "cosine"]
DECAYS: dict[Decay, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: (1.0 + math.cos(math.pi * progress)) / 2.0,
}


class MetaLearner(Learner, ABC):
    """A learner whose initialisation θ is itself learnt, so that a few gradient steps on a new task suffice.

    The base of the algorithms, which differ in ``training_step``. The arguments are described there.

    Raises:
        InputError: If an argument is outside its range.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Loss | None,
        inner_lr: float,
        inner_steps: int,
        test_inner_steps: int | None,
        outer_lr: float,
        outer_lr_decay: Decay,
        tasks_per_pass: int | None,
        transductive: bool = True,
    ) -> None:
        super().__init__(network, loss, inner_lr, inner_steps, test_inner_steps, tasks_per_pass)
        require_positive(outer_lr=outer_lr)
        require_choice(DECAYS, outer_lr_decay=outer_lr_decay)
        # a configuration describes objects in plain words; from Python they are objects, which a checkpoint that is
        # loaded with weights_only cannot hold
        self.save_hyperparameters(ignore=[] if _given_hyperparameters.get() else ["network", "loss", "optimizer"])
        self.automatic_optimization = False
        self.outer_lr = outer_lr
        self.outer_lr_decay: Decay = outer_lr_decay
        self.transductive = transductive
        self.description = network_description(self.hparams)
        self.evaluation: dict[str, TaskMean] = {}

    @abstractmethod
    def training_step(self, batch: TaskBatch, batch_idx: int) -> Tensor:
        """One meta-iteration; returns the mean loss of the meta-batch."""

    # ------------------------------------------------------------------------------------------------ the outer loop

    def outer_lr_factor(self, step: int) -> float:
        """What ``outer_lr`` is multiplied by at this meta-iteration, by ``outer_lr_decay``."""
        # the number of steps is known only once the Trainer has its data
        return DECAYS[self.outer_lr_decay](step / self.trainer.estimated_stepping_batches if step else 0.0)

    def on_fit_start(self) -> None:
        """Refuse what cannot work, before anything is trained, and note what the samples look like."""
        require(
            self.trainer.precision != "16-mixed",
            "trainer.precision must not be 16-mixed: its scaler covers the outer loss only, and gradients of the inner "
            "loop underflow; bf16-mixed works",
        )
        require(
            self.outer_lr_decay == "constant" or math.isfinite(self.trainer.estimated_stepping_batches),
            f"outer_lr_decay {self.outer_lr_decay!r} needs an end of training: expected trainer.max_steps or "
            "trainer.max_epochs, got neither",
        )
        data: LightningDataModule | None = getattr(self.trainer, "datamodule", None)
        if data is not None:
            self.form = form_of(data.hparams, type(data))

    def log_training(self, losses: Tensor, scores: dict[str, Tensor], update: Params) -> Tensor:
        """Log a meta-batch's mean loss and scores, and stop before what is not finite spoils θ.

        Args:
            losses: Every task's loss.  # T
            scores: Every task's scores by name.  # T
            update: What θ is about to be moved by: the meta-gradient, or the adapted parameters.

        Raises:
            FloatingPointError: If a task's loss or the update is NaN or infinite.
        """
        loss = losses.detach().mean()
        if not torch.stack([loss, *(u.detach().sum() for u in update.values())]).isfinite().all():
            checkpoint = self.trainer.checkpoint_callback
            kept = getattr(checkpoint, "last_model_path", "") or getattr(checkpoint, "best_model_path", "")
            raise FloatingPointError(
                f"the loss became {loss.item()}, or its gradient not finite, at step {self.global_step}: inner_lr "
                f"{self.inner_lr} or outer_lr {self.outer_lr} is probably too large, or the data are not finite. θ was "
                f"left as it was before this step; last checkpoint: {kept or 'none yet'}"
            )
        values = {"train/loss": loss} | {f"train/{name}": value.mean() for name, value in scores.items()}
        self.log_dict(values, prog_bar=True, batch_size=len(losses))
        return loss

    # ------------------------------------------------------------------------------------------------ evaluation

    def predict_tasks(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """Predictions of every task's queries, before and after adaptation.  # T R ..., T R ..."""

        def predict(support: Support, support_x: Tensor, query_x: Tensor) -> tuple[tuple[()], Tensor, Tensor]:
            theta = inner_loop.leaves(inner_loop.stack(self.meta_parameters(), len(query_x)))
            adapted = self.adapt_tasks(theta, support).params
            with torch.no_grad():
                before, after = (
                    self.forward_queries(params, support_x, query_x, self.transductive) for params in (theta, adapted)
                )
            return (), before, after

        # Lightning evaluates in inference mode, whose tensors autograd refuses even in enable_grad: hence the clones
        with torch.inference_mode(False), torch.enable_grad():
            batch = TaskBatch(*(part.clone() for part in batch))
            support = self.inner_batches(batch.support_x, batch.support_y, self.test_inner_steps)
            _, before, after = self.in_passes(predict, support, batch.support_x, batch.query_x)
        return before, after

    def evaluate(self, batch: TaskBatch, stage: str) -> Tensor:
        """Adapt to each task, note its query loss and scores, before and after, and return the predictions after."""
        batch = as_task_batch(batch)
        for moment, predictions in zip(("_before", ""), self.predict_tasks(batch), strict=True):
            values = {"loss": self.task_losses(predictions, batch.query_y)} | score(predictions, batch.query_y)
            for name, tasks in values.items():
                key = f"{stage}/{name}{moment}"
                if key not in self.evaluation:
                    self.evaluation[key] = TaskMean().to(self.device)
                self.evaluation[key].update(tasks)
        return predictions

    def log_evaluation(self, stage: str) -> None:
        """Log each value's mean over the tasks of all ranks, and its 95 % confidence interval."""
        for name, metric in self.evaluation.items():
            mean, ci95, tasks = metric.compute()
            self.log(name, mean, prog_bar=name.endswith(("/accuracy", "/mse")), sync_dist=True)
            self.log(f"{name}_ci95", ci95, sync_dist=True)
            self.log(f"{stage}/tasks", tasks, sync_dist=True)

    def on_validation_epoch_start(self) -> None:
        """Begin the statistics anew."""
        self.evaluation = {}

    def on_test_epoch_start(self) -> None:
        """Begin the statistics anew."""
        self.evaluation = {}

    def validation_step(self, batch: TaskBatch, batch_idx: int) -> None:
        """Evaluate a batch of validation tasks."""
        self.evaluate(batch, "val")

    def test_step(self, batch: TaskBatch, batch_idx: int) -> Tensor:
        """Evaluate a batch of test tasks; callbacks get the predictions."""
        return self.evaluate(batch, "test")

    def predict_step(self, batch: TaskBatch, batch_idx: int) -> Tensor:
        """Class probabilities (for regression: predictions) of each task's queries.  # T R N, T R D"""
        batch = as_task_batch(batch)
        _, predictions = self.predict_tasks(batch)
        return predictions if batch.query_y.is_floating_point() else predictions.softmax(2)

    def on_validation_epoch_end(self) -> None:
        """Log the validation."""
        self.log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the test."""
        self.log_evaluation("test")

    # ------------------------------------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the algorithm in the checkpoint, and keep how many tasks fit in a pass."""
        checkpoint["algorithm"] = type(self).__name__
        checkpoint["tasks_per_pass"] = self.tasks_per_pass

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another algorithm or network (InputError), and note what its samples looked like."""
        verify_checkpoint(checkpoint, type(self).__name__, self.state_dict())
        self.form = form_of(checkpoint.get("datamodule_hyper_parameters", {}))
        self.description = network_description(checkpoint.get("hyper_parameters", {}))
        self.tasks_per_pass = self.tasks_per_pass or checkpoint.get("tasks_per_pass")
