"""Exact resume: Lightning's progress counters, and the folders of logs."""

import csv
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from meta_lightning.files import written_whole
from meta_lightning.runs.folders import CLAIMED, remove_remains


def settle_progress(fit_loop: dict[str, Any], epoch_length: float) -> None:
    """Rewrite the progress counters of a checkpoint as if every hook of the last step had finished."""
    # Lightning resumes from the hook in which the checkpoint was saved. From most hooks the step of the logs, the epoch
    # or the next validation is then off by one (https://github.com/Lightning-AI/pytorch-lightning/pull/20379). Two are
    # exact: within an epoch after on_train_batch_end, and before an epoch, with Checkpoints.on_train_start
    epochs, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    validation = fit_loop["epoch_loop.val_loop.batch_progress"]
    current = batches["current"]
    ended = current["processed"] >= epoch_length
    if ended and current["completed"] < current["processed"]:
        return  # saved by another callback before a validation
    for counts in (epochs["total"], epochs["current"]):
        done = counts["started"] if ended else counts["started"] - 1
        counts.update(ready=counts["started"], processed=done, completed=done)
    steps = batches["total"]["processed"]
    for counts, done in ((batches["total"], steps), (current, 0 if ended else current["processed"])):
        counts.update(ready=done, started=done, processed=done, completed=done if ended else done - 1)
    for counts in (validation["total"], validation["current"]):
        counts.update(ready=0, started=0, processed=0, completed=0)
    batches["is_last_batch"] = validation["is_last_batch"] = False
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = batches["total"]["completed"]


@rank_zero_only
def claim_log_folders(loggers: Iterable[Logger]) -> None:
    """Create the folder of the next version, atomically since other runs may start now, where none is set."""
    CLAIMED.clear()
    claimed: dict[str, str | int] = {}  # loggers with one root share a version
    for logger in loggers:
        if not isinstance(logger, TensorBoardLogger | CSVLogger) or "://" in logger.root_dir:
            continue
        if logger._version is None:
            root, version = logger.root_dir, int(logger.version)
            while root not in claimed:
                logger._version = version
                with suppress(FileExistsError):  # another run was faster, or a file has the name
                    Path(logger.log_dir).mkdir(parents=True)
                    claimed[root] = version
                    CLAIMED.add(Path(logger.log_dir).resolve())
                version += 1
            logger._version = claimed[root]
    for root in claimed:
        remove_remains(Path(root))


def continue_logs(loggers: list[Logger], path: Path, checkpoint: dict[str, Any]) -> None:
    """Make loggers continue in the folders of the run that saved a checkpoint, without what it logged afterwards."""
    # private names: a new logger would lose arguments that have no public name, such as prefix and log_graph
    step = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
    for logger, folder in zip(loggers, checkpoint.get("log_folders", []), strict=False):
        if not isinstance(logger, TensorBoardLogger | CSVLogger) or folder is None:
            continue
        before = (path.parent / folder).resolve()
        unnamed = logger._version in (None, SLURMEnvironment.job_id())
        same = Path(logger.root_dir).resolve() == before.parent if unnamed else Path(logger.log_dir).resolve() == before
        if not same or not before.is_dir():
            continue  # the checkpoint was copied, or the logger writes elsewhere: a new folder
        if unnamed:
            logger._version = before.name
        if isinstance(logger, CSVLogger):
            continue_table(logger, step)
        else:
            logger._kwargs["purge_step"] = step
            logger._default_hp_metric = False  # logged at the start of the run


@rank_zero_only
def continue_table(logger: CSVLogger, step: int) -> None:
    """Keep the rows of ``metrics.csv`` before a step; the logger itself would delete the file."""
    path = Path(logger.log_dir, "metrics.csv")
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    table = csv.DictReader(line for line in lines if line.endswith("\n"))  # a kill may truncate the last line
    names = list(table.fieldnames or [])
    with written_whole(path) as part, warnings.catch_warnings(action="ignore"):
        with part.open("w", newline="") as file:
            kept = csv.DictWriter(file, names)
            kept.writeheader()
            kept.writerows(row for row in table if int(row["step"]) < step)
        logger.experiment.metrics_keys = names  # creating the experiment deletes the file, which part then replaces
