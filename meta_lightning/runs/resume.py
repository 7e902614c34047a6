"""What lets a run go on as if it had not been interrupted: whole files, random states, progress and logs."""

import csv
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from meta_lightning.checks import plain
from meta_lightning.files import written_whole


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of the random numbers of python, numpy and torch, of types that ``weights_only`` loads."""
    numpy = plain(np.random.get_state(legacy=False))  # noqa: NPY002  # which a network of the user's may draw from
    states = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Put back what ``random_states`` gave."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def settle_progress(fit_loop: dict[str, Any], epoch_length: float) -> None:
    """Let Lightning's progress in a checkpoint say that all steps so far are done: in training, validation and logs."""
    # Lightning counts on from where in a step the checkpoint was saved, and from most places off by one in the logs, in
    # the epochs or in the validations (https://github.com/Lightning-AI/pytorch-lightning/pull/20379). From these two it
    # goes on exactly: within an epoch after on_train_batch_end, and before one, see Checkpoints.on_train_start
    epochs, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    validation = fit_loop["epoch_loop.val_loop.batch_progress"]
    current = batches["current"]
    ended = current["processed"] >= epoch_length
    if ended and current["completed"] < current["processed"]:
        return  # of another callback, before a validation
    for counts in (epochs["total"], epochs["current"]):
        begun = counts["started"]
        done = begun if ended else begun - 1
        counts.update(ready=begun, started=begun, processed=done, completed=done)
    steps = batches["total"]["processed"]
    for counts, done in ((batches["total"], steps), (current, 0 if ended else current["processed"])):
        counts.update(ready=done, started=done, processed=done, completed=done if ended else done - 1)
    for counts in (validation["total"], validation["current"]):
        counts.update(ready=0, started=0, processed=0, completed=0)
    batches["is_last_batch"] = validation["is_last_batch"] = False
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = batches["total"]["completed"]


def log_folders(loggers: list[Logger], folder: str) -> list[str | None]:
    """Where each logger writes, seen from a checkpoint's folder."""
    return [logger.log_dir and os.path.relpath(logger.log_dir, folder) for logger in loggers]


def continue_logs(loggers: list[Logger], path: Path, checkpoint: dict[str, Any]) -> None:
    """Let the loggers go on in the folders of the run that left a checkpoint, from its step on."""
    # what was logged after it is dropped, since it will be computed again; a checkpoint that was copied elsewhere, or
    # of loggers that write elsewhere, begins a folder of its own
    step = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
    for logger, folder in zip(loggers, checkpoint.get("log_folders", []), strict=False):
        if not isinstance(logger, TensorBoardLogger | CSVLogger) or folder is None:
            continue
        before = (path.parent / folder).resolve()
        named = logger._version not in (None, SLURMEnvironment.job_id())
        ours = Path(logger.log_dir).resolve() == before if named else Path(logger.root_dir).resolve() == before.parent
        if not ours or not before.is_dir():
            continue
        logger._version = before.name
        if isinstance(logger, TensorBoardLogger):
            logger._kwargs["purge_step"] = step
            logger._default_hp_metric = False  # it was logged when the run began
        elif rank_zero_only.rank == 0:  # type: ignore[attr-defined]  # of several processes one writes the table
            logger._experiment = ContinuedTable(str(before), step)


class ContinuedTable(ExperimentWriter):
    """Goes on with the ``metrics.csv`` of a folder, where Lightning's deletes it."""

    def __init__(self, log_dir: str, step: int) -> None:
        self.step = step
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if not path.exists():
            return
        with path.open(newline="") as file:
            table = csv.DictReader([line for line in file if line.endswith("\n")])  # a kill may cut the last one
        self.metrics_keys = list(table.fieldnames or [])
        with written_whole(path) as part, part.open("w", newline="") as file:
            kept = csv.DictWriter(file, self.metrics_keys)
            kept.writeheader()
            kept.writerows(row for row in table if int(row["step"]) < self.step)
