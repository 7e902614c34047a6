"""Callbacks of the command line."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from meta_lightning.tasks import TaskBatch


class Checkpoints(ModelCheckpoint):
    """Keeps the best checkpoint of the validations, and the last one: also when training is interrupted.

    Args:
        dirpath: Folder of the checkpoints. Default: ``checkpoints`` in the logger's folder.
        filename: Name of the best one.
        monitor: The value that decides which is best.
        mode: Whether the best is the greatest or the least.
        save_top_k: How many of the best to keep; -1 for every one, 0 for none.
        save_last: Whether to keep the last one, as ``last.ckpt``.
        every_n_train_steps: Save after so many meta-iterations rather than after validation.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        filename: str | None = "best",
        monitor: str | None = "val/accuracy",
        mode: Literal["min", "max"] = "max",
        save_top_k: int = 1,
        save_last: bool = True,
        every_n_train_steps: int | None = None,
    ) -> None:
        super().__init__(
            dirpath,
            filename,
            monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_last=save_last,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=save_top_k not in (0, 1),
        )

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save the last checkpoint when training is interrupted; an error leaves the last good one as it is."""
        if isinstance(exception, KeyboardInterrupt | SIGTERMException) and self.save_last and self.dirpath:
            path = Path(self.dirpath, self.CHECKPOINT_NAME_LAST + self.FILE_EXTENSION)
            trainer.save_checkpoint(path)
            rank_zero_info(f"Interrupted after {trainer.global_step} meta-iterations; go on with --ckpt_path {path}")


class PredictionTable(BasePredictionWriter):
    """Writes ``predictions.csv`` into the logger's folder: a row a query, with its task, target and probabilities."""

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")
        self.targets: list[Tensor] = []

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Note the targets, which the predictions do not hold."""
        self.targets.append(TaskBatch(*batch).query_y.cpu())

    def write_on_epoch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        predictions: Sequence[Tensor],
        batch_indices: Sequence[Any],
    ) -> None:
        """Write the table, whole or not at all; of several processes each writes its own tasks."""
        rank = f"-rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = Path(trainer.log_dir or trainer.default_root_dir) / f"predictions{rank}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        task = trainer.global_rank
        with part.open("w", newline="") as file:
            table = csv.writer(file)
            outputs = predictions[0].shape[-1]
            table.writerow(["task", "query", "target", *(f"output_{n}" for n in range(outputs))])
            for batch, targets in zip(predictions, self.targets, strict=True):
                for rows, ys in zip(batch, targets, strict=True):
                    for query, (row, y) in enumerate(zip(rows.tolist(), ys.tolist(), strict=True)):
                        table.writerow([task, query, y, *row])
                    task += trainer.world_size
        part.replace(path)
        self.targets.clear()
        rank_zero_info(f"Wrote the predictions to {path}")
