"""Folders of runs, each of which belongs to one process at a time."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from meta_lightning.checks import InputError

LOCK = ".lock"


@rank_zero_only
def claim_log_folders(loggers: Iterable[Logger]) -> None:
    """Create the folder of the next version, atomically since other runs may start now, where none is set."""
    claimed: dict[str, str | int] = {}  # loggers with one root share a version
    for logger in loggers:
        if not isinstance(logger, TensorBoardLogger | CSVLogger) or "://" in logger.root_dir:
            continue
        if logger._version is None:
            while logger.root_dir not in claimed:
                with suppress(FileExistsError):  # another run was faster
                    Path(logger.log_dir).mkdir(parents=True)
                    claimed[logger.root_dir] = logger.version
                logger._version = None
            logger._version = claimed[logger.root_dir]
    for root in claimed:
        remove_remains(Path(root))


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


def lock(folder: Path) -> BaseFileLock:
    """Lock a folder of checkpoints, and remove what killed runs left half-written; InputError if it is locked."""
    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / LOCK, timeout=1)
    try:
        with suppress(NotImplementedError):  # file systems without locks
            held.acquire()
    except Timeout:
        raise InputError(f"checkpoint.dirpath must be a folder of one run at a time, got {folder}, in use") from None
    for part in folder.glob("*.part"):
        part.unlink(missing_ok=True)
    return held


def release(held: BaseFileLock | None) -> None:
    """Release a lock, and remove its file."""
    if held is not None and held.is_locked:
        Path(held.lock_file).unlink(missing_ok=True)
        held.release()
