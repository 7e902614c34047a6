"""The table that ``predict`` writes."""

import csv
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from meta_lightning.data.loading import class_names_of
from meta_lightning.data.module import TaskDataModule
from meta_lightning.data.table_form import TableForm
from meta_lightning.data.tasks import as_task_batch, tasks_of
from meta_lightning.files import written_whole
from meta_lightning.inner.params import tree_leaves, tree_map
from meta_lightning.inner.samples import valid
from meta_lightning.runs.folders import run_folder


class PredictionTable(L.Callback):
    """Writes ``predictions.csv`` to the run's folder: a row per query with task, target, class name and outputs.

    Real targets of tables, and outputs of their shape, are in the units of the tables.
    """

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start a new table."""
        data = getattr(trainer, "datamodule", None)
        table = data.sample_form().table if isinstance(data, TaskDataModule) else None
        self.form = TableForm(**table) if table and table["classes"] is None else None
        self.tasks: list[tuple[Tensor, Tensor, list[str]]] = []  # outputs R N, targets R D or R 0, class names

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Keep the outputs, targets and class names of each task."""
        query_y = as_task_batch(batch).query_y
        names = class_names_of(trainer.predict_dataloaders, batch_idx, tasks_of(batch))
        for number, of_task in enumerate(names):
            answers, y = map(valid, tree_map(lambda t, i=number: t[i].cpu(), (outputs, query_y)))
            values = torch.cat([rows_of(part) for part in tree_leaves(answers)], 1)
            if self.form is not None and values.shape == y.shape:
                values, y = map(self.form.in_units, (values, y))
            # targets in nests have no columns of their own
            self.tasks.append((values, rows_of(y) if isinstance(y, Tensor) else values[:, :0], of_task))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the table atomically; each of several processes writes one of its own tasks."""
        rank = f"-rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = run_folder(trainer) / f"predictions{rank}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        outputs, targets, names = self.tasks[0]
        columns = [f"target_{n}" for n in range(targets.shape[1])] + (["target_class"] if names else [])
        with written_whole(path) as part, part.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["task", "query", *columns, *(f"output_{n}" for n in range(outputs.shape[1]))])
            for i, (outputs, targets, names) in enumerate(self.tasks):
                task = trainer.global_rank + i * trainer.world_size
                for query, (row, y) in enumerate(zip(outputs.tolist(), targets.tolist(), strict=True)):
                    table.writerow([task, query, *y, *([names[y[0]]] if names else []), *row])
        rank_zero_info(f"Wrote the predictions to {path}")


def rows_of(values: Tensor) -> Tensor:
    """The numbers of each query.  # R ... -> R D"""
    return values.reshape(len(values), -1)
