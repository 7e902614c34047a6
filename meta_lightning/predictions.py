"""What ``predict`` leaves behind."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from meta_lightning.files import written_whole
from meta_lightning.loading import MetaBatches
from meta_lightning.tasks import TaskBatch


class PredictionTable(BasePredictionWriter):
    """Writes ``predictions.csv`` into the logger's folder: a row a query, with its task, target and probabilities.

    Where the classes have names, the target's stands beside its number, which means another class in every task.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")
        self.targets: list[Tensor] = []

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Note the targets, which the predictions do not hold."""
        query_y = TaskBatch(*batch).query_y.cpu()
        self.targets.append(query_y.flatten(2) if query_y.ndim > 2 else query_y.unsqueeze(2))

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
        task = trainer.global_rank
        batches: Any = getattr(trainer.predict_dataloaders, "dataset", None)
        class_names = batches.tasks.class_names if isinstance(batches, MetaBatches) else lambda task: []
        with written_whole(path) as part, part.open("w", newline="") as file:
            table = csv.writer(file)
            targets, outputs = (part[0][0, 0].numel() for part in (self.targets, predictions))
            named = ["target_class"] if class_names(task) else []
            columns = [*(f"target_{n}" for n in range(targets)), *named, *(f"output_{n}" for n in range(outputs))]
            table.writerow(["task", "query", *columns])
            for batch, batch_targets in zip(predictions, self.targets, strict=True):
                for rows, ys in zip(batch.flatten(2), batch_targets, strict=True):
                    names = class_names(task)
                    for query, (row, y) in enumerate(zip(rows.tolist(), ys.tolist(), strict=True)):
                        table.writerow([task, query, *y, *([names[y[0]]] if names else []), *row])
                    task += trainer.world_size
        self.targets.clear()
        rank_zero_info(f"Wrote the predictions to {path}")
