"""Images packed once: a folder of memory-mapped arrays with checksums, whole or not there at all."""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import numpy as np
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from meta_lightning.checks import require
from meta_lightning.data.tasks import SPLITS, Array, Split

FORMAT = 2  # of what the data sets pack and of how it is written: another one is another cache


class LabelledImages(NamedTuple):
    """A whole data set, its classes split into train, val and test."""

    images: Array  # M C H W, uint8
    labels: Array  # M, int64: the image's row in ``classes``
    classes: Array  # names, str
    splits: Array  # of each class: its row in SPLITS, or len(SPLITS) where it is in none

    def members(self, split: Split) -> list[int]:
        """The class numbers of a split."""
        return [int(c) for c in np.flatnonzero(self.splits == SPLITS.index(split))]


def default_cache_dir() -> Path:
    """``meta_lightning`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meta_lightning"


def load_or_build(
    folder: Path, build: Callable[[], LabelledImages], sources: Callable[[], Sequence[Path]] = list, verify: bool = True
) -> LabelledImages:
    """Map a cache into memory, or build it where it is missing, spoilt or older than its sources."""
    known = fingerprint(sources())
    if folder.exists():
        try:
            if data := read(folder, known, verify):
                return data
            rank_zero_info(f"The files that the cache {folder} was made from have changed: it is built anew.")
        except (OSError, ValueError, KeyError, EOFError, TypeError) as error:
            rank_zero_warn(f"The cache {folder} is spoilt ({error}): it is built anew.")
            remove(folder)
    data = build()
    known = known or fingerprint(sources())  # they may have been downloaded only now
    try:
        with locked(folder):
            if not folder.exists() or not read(folder, known, verify=False):  # else another process was faster
                pack(folder, data, known)
            return read(folder, known, verify=False) or data
    except OSError as error:
        rank_zero_warn(f"cache_dir {folder.parent} cannot be written ({error}): the images are kept in memory only.")
        return data


def fingerprint(files: Sequence[Path]) -> str | None:
    """What changes with the names, sizes or times of these files; None of no files."""
    versions = []
    for file in files:
        try:
            stat = file.stat()
            versions.append(f"{file.absolute()} {stat.st_size} {stat.st_mtime_ns}")
        except FileNotFoundError:  # a link to nothing
            versions.append(f"{file.absolute()} missing")
    digest = hashlib.blake2b("\0".join(versions).encode(errors="surrogateescape"), digest_size=16)
    return digest.hexdigest() if versions else None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only process that writes a cache, and sweep away what killed ones left of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with suppress(NotImplementedError):  # a file system without locks: every process writes under a name of its own
            stack.enter_context(FileLock(folder.with_name(f".{folder.name}.lock")))
            for part in folder.parent.glob(f"{escape(folder.name)}.*.part"):
                shutil.rmtree(part, ignore_errors=True)
        yield


def pack(folder: Path, data: LabelledImages, sources: str | None) -> None:
    """Write a data set, last its checksums, and, when it is whole, put it in the place of whatever is there."""
    part = part_of(folder)
    try:
        part.mkdir(parents=True)
        checksums = {}
        for name, array in data._asdict().items():
            np.save(part / f"{name}.npy", array)
            checksums[name] = checksum(array)
        (part / "checksums.json").write_text(json.dumps(checksums | {"sources": sources}))
        if folder.exists():
            remove(folder)
        part.rename(folder)
        rank_zero_info(f"Packed {len(data.images)} images of {len(data.classes)} classes into {folder}.")
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove a cache, all of it at once; a process that has mapped it keeps it."""
    old = folder.rename(part_of(folder))
    old.unlink() if old.is_file() else shutil.rmtree(old, ignore_errors=True)


def part_of(folder: Path) -> Path:
    """A name for what is not a whole cache, of this process alone, on other machines too."""
    return folder.with_name(f"{folder.name}.{uuid4().hex}.part")


def read(folder: Path, sources: str | None, verify: bool) -> LabelledImages | None:
    """Map a data set that ``pack`` left; None if it was made from other sources than these, where these are known."""
    checksums = json.loads((folder / "checksums.json").read_text())
    if sources not in (None, checksums["sources"]):
        return None
    arrays = {}
    for name in LabelledImages._fields:
        # copy on write, and nobody writes: torch does not warn of it, and processes share the pages
        arrays[name] = np.load(folder / f"{name}.npy", mmap_mode="c", allow_pickle=False)
        require(not verify or checksum(arrays[name]) == checksums[name], f"wrong checksum of {name}.npy")
    return LabelledImages(**arrays)


def checksum(array: Array) -> int:
    """CRC-32 of an array's form and bytes, a few images at a time."""
    crc = zlib.crc32(f"{array.dtype} {array.shape}".encode())
    for start in range(0, len(array), 4096):
        crc = zlib.crc32(np.ascontiguousarray(array[start : start + 4096]).tobytes(), crc)
    return crc
