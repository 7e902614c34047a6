"""What MAML, FOMAML and Reptile share as Lightning modules, beside the outer loop: evaluation and checkpoints."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning import LightningDataModule
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from meta_lightning import inner_loop
from meta_lightning.algorithms.learner import Support
from meta_lightning.algorithms.outer import OuterLoop
from meta_lightning.checkpoints import load_network, network_description, verify_checkpoint
from meta_lightning.data.form import form_of
from meta_lightning.losses import Loss, score
from meta_lightning.metrics import TaskMean
from meta_lightning.outer_loop import Decay, Scheduler
from meta_lightning.tasks import TaskBatch, as_task_batch


class MetaLearner(OuterLoop):
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
        compile_passes: bool,
        transductive: bool,
        scheduler: Scheduler | None,
        inner_freeze: Sequence[str],
        outer_freeze: Sequence[str],
        init_from: str | None,
        max_skipped: int,
    ) -> None:
        super().__init__(
            network,
            loss,
            inner_lr,
            inner_steps,
            test_inner_steps,
            tasks_per_pass=tasks_per_pass,
            compile_passes=compile_passes,
            inner_freeze=inner_freeze,
            outer_freeze=outer_freeze,
            outer_lr=outer_lr,
            outer_lr_decay=outer_lr_decay,
            scheduler=scheduler,
            max_skipped=max_skipped,
        )
        # a configuration describes objects in plain words; from Python they are objects, which a checkpoint that is
        # loaded with weights_only cannot hold. A checkpoint has the weights, and so does not need init_from
        objects = [] if _given_hyperparameters.get() else ["network", "loss", "optimizer", "scheduler"]
        self.save_hyperparameters(ignore=["init_from", *objects])
        if init_from is not None:
            load_network(self.network, init_from)
        self.transductive = transductive
        self.description = network_description(self.hparams)
        self.evaluation: dict[str, TaskMean] = {}

    @abstractmethod
    def training_step(self, batch: TaskBatch, batch_idx: int) -> Tensor:
        """One meta-iteration; returns the mean loss of the meta-batch."""

    def on_fit_start(self) -> None:
        """Refuse what cannot work, before anything is trained, and note what the samples look like."""
        super().on_fit_start()
        data: LightningDataModule | None = getattr(self.trainer, "datamodule", None)
        if data is not None:
            self.form = form_of(data.hparams, type(data))

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

        _, before, after = self.in_evaluation_passes(predict, batch)
        return before, after

    def in_evaluation_passes(self, predict: Callable[..., tuple[Any, ...]], batch: TaskBatch) -> tuple[Any, ...]:
        """``in_passes`` of the support of each inner step, the support samples and the queries, outside of training."""
        # Lightning evaluates in inference mode, whose tensors autograd refuses even in enable_grad: hence the clones
        with torch.inference_mode(False), torch.enable_grad():
            batch = TaskBatch(*(part.clone() for part in batch))
            support = self.inner_batches(batch.support_x, batch.support_y, self.test_inner_steps)
            return self.in_passes(predict, support, batch.support_x, batch.query_x)

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
        checkpoint["tasks_that_fit"] = self.tasks_that_fit
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another algorithm or network (InputError), and note what its samples looked like."""
        verify_checkpoint(checkpoint, type(self).__name__, self.state_dict())
        self.form = form_of(checkpoint.get("datamodule_hyper_parameters", {}))
        self.description = network_description(checkpoint.get("hyper_parameters", {}))
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:  # elsewhere others may fit
            self.tasks_that_fit = checkpoint.get("tasks_that_fit")
        super().on_load_checkpoint(checkpoint)
