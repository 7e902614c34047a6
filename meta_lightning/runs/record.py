"""The record that ``fit`` and ``test`` leave beside their logs."""

import json
import math
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from meta_lightning.files import write_json
from meta_lightning.runs.machine import PeakMemory, commit, machine, versions

POINTS = 200  # of a curve; of more the reader of the events keeps a sample, the last among them


class RunRecord(SaveConfigCallback):
    """Writes ``config.yaml`` when a run begins and, when it has ended well, ``fit.json`` or ``test.json`` beside it.

    The record says what ran (``algorithm``, ``config``, ``seed``), of which code and where (``commit``, ``versions``,
    ``machine``), what it took (``steps`` of training, ``train_seconds`` without and ``validation_seconds`` of
    validation, ``test_seconds``, ``tasks_per_second`` and ``peak_memory`` of training, see ``PeakMemory``), and what
    came of it: ``figures``, the last value of all that was logged, and ``curves``, what TensorBoard was given, as
    ``[step, value]``.

    A checkpoint keeps what was counted, so that a resumed run counts on. The counts are those of the first process.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the configuration, and begin to count."""
        super().setup(trainer, pl_module, stage)
        self.device = trainer.strategy.root_device  # where the module is moved after this
        self.fitting = stage == "fit"
        self.counts: dict[str, float] = {}
        self.timed: str | None = None  # what is being timed
        self.since = 0.0

    def count(self, name: str | None) -> None:
        """Time this from now on, and no longer what was timed before."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self.timed is not None:
            self.counts[self.timed] = self.counts.get(self.timed, 0.0) + now - self.since
        if self.timed == "train_seconds":
            self.counts["peak_memory"] = max(self.counts.get("peak_memory", 0.0), self.memory.peak())
        if name == "train_seconds":
            self.memory.start()
        self.timed, self.since = name, now

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Time the training."""
        self.memory = PeakMemory(self.device)
        self.count("train_seconds")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Count the step."""
        self.counts["steps"] = self.counts.get("steps", 0) + 1

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Time the validation, unless it is but a trial."""
        if not trainer.sanity_checking:
            self.count("validation_seconds")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Time the training again."""
        if not trainer.sanity_checking:
            self.count("train_seconds" if self.fitting else None)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self.count(None)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Time the test."""
        self.count("test_seconds")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write ``fit.json`` or ``test.json``, whole or not at all."""
        self.count(None)
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # which all processes have to ask for
        if trainer.is_global_zero:
            write_json(folder / ("fit.json" if self.fitting else "test.json"), self.record(trainer, pl_module))
        trainer.strategy.barrier("record")  # none leaves the others while the first one writes

    on_fit_end = on_test_end

    def state_dict(self) -> dict[str, Any]:
        """What was counted so far."""
        self.count(self.timed)
        return dict(self.counts)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on from a checkpoint, of which a test needs the parameters only."""
        if self.fitting:
            self.counts = dict(state_dict)

    def record(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """What is written."""
        config = json.loads(self.parser.dump(self.config, format="json"))
        tasks = self.counts.get("steps", 0) * getattr(trainer, "datamodule").meta_batch_size  # noqa: B009
        seconds = self.counts.get("train_seconds")
        return {
            "algorithm": type(pl_module).__name__,
            "seed": config.get("seed_everything"),
            **self.counts,
            "tasks_per_second": tasks / seconds if seconds else None,
            "figures": {name: finite(float(value)) for name, value in sorted(trainer.callback_metrics.items())},
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "versions": versions(),
            "machine": machine(self.device),
            "config": config,
            "curves": curves(trainer),
        }


def curves(trainer: L.Trainer) -> dict[str, list[tuple[int, float | None]]]:
    """What TensorBoard was given, in this run and in those that it resumes, by name."""
    found = {}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.flush()
            events = EventAccumulator(logger.log_dir, {SCALARS: POINTS}).Reload()
            for name in events.Tags()[SCALARS]:
                found[name] = [(event.step, finite(event.value)) for event in events.Scalars(name)]
    return found


def finite(value: float) -> float | None:
    """The value, or None where it is none: JSON has neither NaN nor infinity."""
    return value if math.isfinite(value) else None
