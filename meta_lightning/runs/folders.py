"""Folders of runs, each of which belongs to one process at a time."""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import lightning as L
from filelock import BaseFileLock, FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_warn

from meta_lightning.checks import InputError

LOCK = ".lock"
HOUR = 3600.0
CLAIMED: set[Path] = set()  # log folders that this process has made for its present run


def run_folder(trainer: L.Trainer) -> Path:
    """The folder of a run, whatever its logger; all processes must call this.

    That of a logger that writes files, else ``save_dir/name/version`` as for checkpoints: with Weights & Biases
    ``PROJECT/ID``, with MLflow ``EXPERIMENT_ID/RUN_ID``. Without a logger the root.
    """
    logger, folder = trainer.logger, Path(trainer.default_root_dir)
    if logger is not None and logger.log_dir:
        folder = Path(logger.log_dir)
    elif logger is not None:
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = Path(logger.save_dir or folder, str(logger.name), version)
    return Path(trainer.strategy.broadcast(str(folder)))


def remove_remains(root: Path) -> None:
    """Remove checkpoints that killed runs left half-written, and their folders if nothing else is in them."""
    for folder in {part.parent for part in root.glob("*/checkpoints/*.part")}:
        with suppress(InputError):  # a run that is just saving
            release(lock(folder))
            remove_empty(folder.parent)


def remove_empty(log_folder: Path) -> None:
    """Remove the folder of a run, and that of its checkpoints, if nothing is in them."""
    with suppress(OSError):
        if {path.name for path in log_folder.iterdir()} == {"checkpoints"}:
            (log_folder / "checkpoints").rmdir()
        log_folder.rmdir()
        if log_folder.parent.name == "lightning_logs":  # made with it
            log_folder.parent.rmdir()


def remove_refused(log_folder: Path) -> None:
    """Remove the log folder of a run that was refused: this process has made it, and nothing is in it but its start."""
    found = [path for path in log_folder.rglob("*") if path.is_file()]
    start = ("config.yaml", "hparams.yaml", "events.out.tfevents.")
    if log_folder.resolve() in CLAIMED and all(path.name.startswith(start) for path in found):
        shutil.rmtree(log_folder, ignore_errors=True)
        remove_empty(log_folder)


def lock(folder: Path) -> BaseFileLock:
    """Lock a folder of checkpoints, once per process, and remove what killed runs left half-written.

    Raises:
        InputError: If another process has locked it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder.resolve() / LOCK, timeout=1, is_singleton=True)
    try:
        held.acquire()
    except Timeout:
        raise InputError(f"checkpoint.dirpath must be a folder of one run at a time, got {folder}, in use") from None
    except (OSError, NotImplementedError) as error:
        rank_zero_warn(f"The file system cannot lock {folder} ({error}): give each run a folder of its own")
    for part in folder.glob("*.part"):
        if left_behind(part):
            part.unlink(missing_ok=True)
    return held


def left_behind(part: Path) -> bool:
    """Whether no process of this machine is writing a file any more, whose name holds the number of its process."""
    process = part.stem.rpartition(".")[2]
    with suppress(OSError):
        if process.isdigit() and time.time() - part.stat().st_mtime < HOUR:
            os.kill(int(process), 0)
            return False
    return True


def release(held: BaseFileLock | None) -> None:
    """Remove the file of a lock, and release it."""
    if held is not None and held.is_locked:
        if held.lock_counter == 1:
            Path(held.lock_file).unlink(missing_ok=True)
        held.release()
