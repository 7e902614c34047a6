"""Figures, norms, speed and hyperparameters for TensorBoard, Weights & Biases and MLflow."""

import time
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.utils import get_total_norm as norm

from meta_lightning.algorithms.meta_learner import MetaLearner
from meta_lightning.checks import plain, require_at_least
from meta_lightning.dashboard.boards import BOARDS, show_figure, show_hyperparameters
from meta_lightning.dashboard.task_records import TaskRecord
from meta_lightning.data.loading import class_names_of
from meta_lightning.data.module import FewShotDataModule
from meta_lightning.data.tasks import Split, as_task_batch, tasks_of
from meta_lightning.inner.params import Params


class Dashboard(L.Callback):
    """Figures and scalars for TensorBoard, Weights & Biases and MLflow; without a logger of one it does nothing.

    Each validation and test draws the query loss and accuracy (or mse) after 0, 1, …, K inner steps, and a few tasks
    with their answers; a test also draws the accuracy per alphabet, or per class if names have no alphabets. At the end
    TensorBoard's HParams gets a row per evaluation, named after it and its number of queries: the hyperparameters with
    the last loss and scores. At each log interval, training logs

    * ``train/gradient_norm``: norm of the meta-gradient before clipping; for algorithms without one, such as Reptile,
      ``‖θ_new − θ_old‖ / outer_lr``;
    * ``train/update_norm``: ``‖θ_new − θ_old‖``;
    * ``train/tasks_per_second``: tasks of all processes per second, validation time excluded.

    It changes neither θ nor random states. With several processes, the figures show the first one's tasks.

    Args:
        enabled: Whether to log anything.
        curve_tasks: Tasks of each evaluation behind the adaptation curves. They are adapted to a second time: on
            glyphs, with 4 steps and 50 of 200 tasks, adapting and drawing add two thirds to the time of validation.
        pictured_tasks: Tasks in the figure of tasks.

    Raises:
        InputError: If one of the numbers is less than 1.
    """

    def __init__(self, enabled: bool = True, curve_tasks: int = 50, pictured_tasks: int = 2) -> None:
        require_at_least(1, curve_tasks=curve_tasks, pictured_tasks=pictured_tasks)
        self.enabled = enabled
        self.curve_tasks = curve_tasks
        self.pictured_tasks = pictured_tasks
        self.boards: list[Logger] = []
        self.record: TaskRecord | None = None
        self.validated: dict[str, float] = {}  # values of the last validation
        self.outer_lr = 0.0  # of the current step
        self.theta: Params | None = None  # before the current step, if that is logged
        self.gradient_norm: Tensor | None = None
        self.started: float | None = None
        self.tasks = 0  # since ``started``

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the loggers and keep the learner."""
        shown = self.enabled and trainer.is_global_zero
        self.boards = [logger for logger in trainer.loggers if shown and isinstance(logger, BOARDS)]
        for board in self.boards:
            if isinstance(board, TensorBoardLogger):
                # private: otherwise Lightning logs hp_metric −1 at the start, and TensorBoard keeps the first metrics
                board._default_hp_metric = False
        if self.boards:
            assert isinstance(pl_module, MetaLearner)
            self.learner = pl_module

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Copy θ if the step will be logged."""
        if self.started is None:
            self.started, self.tasks = time.perf_counter(), 0
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set outside of __init__
        due = interval > 0 and ((trainer.global_step + 1) % interval == 0 or trainer.should_stop)
        if self.boards and due:
            self.theta = {name: p.detach().clone() for name, p in self.learner.meta_parameters().items()}
            self.outer_lr = self.learner.outer_optimizer().param_groups[0]["lr"]

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compute the norm of the meta-gradient, averaged over processes and not yet clipped."""
        if self.theta is not None:
            self.gradient_norm = norm([p.grad for p in self.learner.meta_parameters().values() if p.grad is not None])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the norms and the speed."""
        self.tasks += tasks_of(batch) * trainer.world_size
        if self.theta is None or self.started is None:
            return
        update_norm = norm([p.detach() - self.theta[name] for name, p in self.learner.meta_parameters().items()])
        values = {"train/update_norm": float(update_norm)}
        if self.gradient_norm is not None:
            values["train/gradient_norm"] = float(self.gradient_norm)
        elif self.outer_lr:
            values["train/gradient_norm"] = float(update_norm) / self.outer_lr
        values["train/tasks_per_second"] = self.tasks / (time.perf_counter() - self.started)
        for board in self.boards:
            board.log_metrics(values, logged_step(trainer))
        self.theta = self.gradient_norm = self.started = None

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the hyperparameters with the last validation."""
        self.log_hyperparameters(trainer, "val", self.validated, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """The last validation, which a run resumed after its last step does not repeat."""
        return {"validated": self.validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the last validation."""
        self.validated = state_dict["validated"]

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start a record, except in the sanity check, and stop timing the training."""
        self.started = None
        shown = self.boards and not trainer.sanity_checking
        name = "Test" if trainer.testing else "Validation"
        self.record = TaskRecord(name, self.curve_tasks, self.pictured_tasks) if shown else None

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Record the adaptation to the tasks of a batch, and for a test the accuracy per class."""
        if self.record is None:
            return
        loader = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        names = class_names_of(loader, batch_idx, tasks_of(batch))
        with trainer.precision_plugin.forward_context():
            self.record.add_adaptation(self.learner, as_task_batch(batch), names)
        if trainer.testing:
            groups = class_names_of(loader, batch_idx, tasks_of(batch), groups=True)
            self.record.add_answers(outputs, as_task_batch(batch).query_y, groups)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the record, and keep the values of a validation or log the hyperparameters with those of a test."""
        stage: Split = "test" if trainer.testing else "val"
        if self.record is not None:
            for name, figure in self.record.figures().items():
                for board in self.boards:
                    show_figure(board, f"{stage}/{name}", figure, logged_step(trainer))
            self.record = None
        if trainer.testing:
            self.log_hyperparameters(trainer, stage, final_values(trainer, stage), logged_step(trainer))
        elif not trainer.sanity_checking:
            self.validated = final_values(trainer, stage)

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]  # dataloader_idx has no name here
    on_test_end = on_validation_end

    def log_hyperparameters(self, trainer: L.Trainer, stage: Split, values: dict[str, float], step: int) -> None:
        """Add a row to HParams."""
        if self.boards and values:
            params = {"algorithm": type(self.learner).__name__, **described(self.learner.hparams)}
            evaluation: str = stage
            if data := getattr(trainer, "datamodule", None):
                params |= {"tasks": {"set": type(data).__name__, **described(data.hparams)}}
                if isinstance(data, FewShotDataModule):
                    evaluation = f"{stage}-{data.sizes(stage)[1]}-queries"
            for board in self.boards:
                show_hyperparameters(board, evaluation, params, values, step)


def final_values(trainer: L.Trainer, stage: str) -> dict[str, float]:
    """The values of an evaluation, for HParams."""
    # validation and test share names: TensorBoard takes the columns of all rows from the first one it finds
    return {
        name.replace(f"{stage}/", "final/", 1): float(value)
        for name, value in sorted(trainer.callback_metrics.items())
        if name.startswith(f"{stage}/") and "_before" not in name and not name.endswith("/tasks")
    }


def described(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters as plain values, without Lightning's own entries."""
    return {name: plain(value) for name, value in hparams.items() if not name.startswith("_")}


def logged_step(trainer: L.Trainer) -> int:
    """The step at which Lightning logs scalars: the current one in ``fit``, which ``global_step`` counts already."""
    return trainer.global_step - 1 if trainer.state.fn == TrainerFn.FITTING else trainer.global_step
