"""What ``predict`` leaves behind."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from meta_lightning.data.loading import class_names_of
from meta_lightning.data.tasks import TaskBatch
from meta_lightning.files import written_whole


class PredictionTable(BasePredictionWriter):
    """Writes ``predictions.csv`` into the logger's folder: a row per query, with its task, target and probabilities.

    Where the classes have names, the target's stands beside its number, which means another class in every task.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")
        self.targets: list[Tensor] = []  # of each task: R D
        self.class_names: list[list[str]] = []

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Note the targets, which the predictions do not hold."""
        query_y = TaskBatch(*batch).query_y.cpu()
        self.targets += query_y.flatten(2) if query_y.ndim > 2 else query_y.unsqueeze(2)
        self.class_names += class_names_of(trainer.predict_dataloaders, batch_idx, len(query_y))

    def write_on_epoch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, predictions: Sequence[Tensor], batch_indices: Any
    ) -> None:
        """Write the table, whole or not at all; of several processes each writes its own tasks."""
        rank = f"-rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = Path(trainer.log_dir or trainer.default_root_dir) / f"predictions{rank}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        outputs = [rows for batch in predictions for rows in batch.flatten(2)]  # of each task: R N
        targets = [f"target_{n}" for n in range(self.targets[0].shape[1])]
        targets += ["target_class"] if self.class_names[0] else []
        with written_whole(path) as part, part.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["task", "query", *targets, *(f"output_{n}" for n in range(outputs[0].shape[1]))])
            for i, (rows, ys, names) in enumerate(zip(outputs, self.targets, self.class_names, strict=True)):
                task = trainer.global_rank + i * trainer.world_size
                for query, (row, y) in enumerate(zip(rows.tolist(), ys.tolist(), strict=True)):
                    table.writerow([task, query, *y, *([names[y[0]]] if names else []), *row])
        self.targets, self.class_names = [], []
        rank_zero_info(f"Wrote the predictions to {path}")
