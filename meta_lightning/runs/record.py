"""The record that ``fit`` and ``test`` write next to their logs."""

import json
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from meta_lightning.files import write_json
from meta_lightning.runs.folders import run_folder
from meta_lightning.runs.machine import PeakMemory, commit, machine, versions

POINTS = 200  # per curve


class RunRecord(SaveConfigCallback):
    """Writes ``config.yaml`` at the start of a run and ``fit.json`` or ``test.json`` at its successful end.

    The record holds the run (``algorithm``, ``config``, ``seed``; of an ``ensemble`` the file names), its code and
    hardware (``commit``, ``versions``, ``machine``), its cost (``steps``, ``train_seconds`` without validation,
    ``validation_seconds``, ``test_seconds``, and of training ``tasks_per_second`` and ``peak_memory``, see
    ``PeakMemory``), and its results: ``figures``, the last value of everything logged, and ``curves``, the scalars of
    TensorBoard as ``[step, value]``; of a test ``of_tasks``, the values of each task, process by process.

    Counts are of the first process. Checkpoints keep them, so that they include the time before a resume.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the configuration, and reset the counts."""
        self.folder = run_folder(trainer)
        super().setup(trainer, pl_module, stage)
        self.device = trainer.strategy.root_device  # the module is moved there later
        self.fitting = stage == "fit"
        self.counts: dict[str, float] = defaultdict(int)
        self.timed: str | None = None  # the count that is being timed since ``since``
        self.since = 0.0

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the configuration."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / self.config_filename
        self.parser.save(self.config, str(path), skip_unset=False, overwrite=self.overwrite, multifile=self.multifile)

    def count(self, name: str | None) -> None:
        """Stop the running clock and start another."""
        # Lightning's Timer counts validation as training, keeps only the last validation, and does not synchronize CUDA
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self.timed is not None:
            self.counts[self.timed] += now - self.since
        if self.timed == "train_seconds":
            self.counts["peak_memory"] = max(self.counts["peak_memory"], self.memory.peak())
        if name == "train_seconds":
            self.memory.start()
        self.timed, self.since = name, now

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Time training."""
        self.memory = PeakMemory(self.device)
        self.count("train_seconds")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Count the step."""
        self.counts["steps"] += 1

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Time validation in training, not the sanity check before it."""
        if self.timed is not None:
            self.count("validation_seconds")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Time training again."""
        if self.timed is not None:
            self.count("train_seconds")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Time the test."""
        self.count("test_seconds")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the record atomically."""
        self.count(None)
        if trainer.is_global_zero:
            write_json(self.folder / ("fit.json" if self.fitting else "test.json"), self.record(trainer, pl_module))
        trainer.strategy.barrier("record")  # no process exits while the first writes

    on_fit_end = on_test_end

    def state_dict(self) -> dict[str, Any]:
        """The counts so far."""
        self.count(self.timed)
        return dict(self.counts)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Add to the counts of the checkpoint when training resumes, not in a test of it."""
        if self.fitting:
            self.counts.update(state_dict)

    def record(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The contents of the record."""
        config = json.loads(self.parser.dump(self.config, format="json"))
        tasks = self.counts.get("steps", 0) * getattr(trainer, "datamodule").meta_batch_size  # noqa: B009
        seconds = self.counts.get("train_seconds")
        members = [*getattr(pl_module, "members", ())]
        return {
            "algorithm": type(pl_module).__name__,
            "seed": config.get("seed_everything"),
            **({"ensemble": members} if members else {}),
            **self.counts,
            "tasks_per_second": tasks / seconds if seconds else None,
            "figures": {name: finite(float(value)) for name, value in sorted(trainer.callback_metrics.items())},
            **({} if self.fitting else {"of_tasks": of_tasks(pl_module)}),
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "versions": versions(),
            "machine": machine(self.device),
            "config": config,
            "curves": curves(trainer),
        }


def of_tasks(learner: L.LightningModule) -> dict[str, list[float | None]]:
    """The values of each test task, by the name of their mean."""
    means = {f"test/{name}": metric.of_tasks for name, metric in getattr(learner, "evaluation").means.items()}  # noqa: B009
    return {name: [*map(rounded, values.tolist())] for name, values in means.items() if values is not None}


def rounded(value: float) -> float | None:
    """A value to the digits of float32, None if it is not finite."""
    return finite(float(f"{value:.7g}"))


def curves(trainer: L.Trainer) -> dict[str, list[tuple[int, float | None]]]:
    """TensorBoard's scalars of this run and of the runs it resumed."""
    found = {}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.flush()
            # all of them: of fewer the reader draws some at random, which differ after an interruption
            events = EventAccumulator(logger.log_dir, {SCALARS: 0}).Reload()
            for name in events.Tags()[SCALARS]:
                found[name] = [(event.step, finite(event.value)) for event in thinned(events.Scalars(name))]
    return found


def thinned(points: Sequence[Any]) -> Sequence[Any]:
    """At most ``POINTS`` of the points, evenly spaced from the first to the last."""
    if len(points) <= POINTS:
        return points
    return [points[round(number * (len(points) - 1) / (POINTS - 1))] for number in range(POINTS)]


def finite(value: float) -> float | None:
    """The value, or None if it is NaN or infinite, which JSON cannot represent."""
    return value if math.isfinite(value) else None
