"""Image cache: a folder of memory-mapped arrays with checksums, written atomically."""

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from glob import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from meta_lightning.checks import require
from meta_lightning.data.tasks import SPLITS, Array, Split

FORMAT = 2  # version of the cached contents and of their files, part of the folder's name


class LabelledImages(NamedTuple):
    """A whole data set, its classes split into train, val and test."""

    images: Array  # M C H W, uint8
    labels: Array  # M, int64: the image's row in ``classes``
    classes: Array  # names, str
    splits: Array  # of each class: its row in SPLITS, or len(SPLITS) if it is in none

    def members(self, split: Split) -> list[int]:
        """The class numbers of a split."""
        return [int(c) for c in np.flatnonzero(self.splits == SPLITS.index(split))]


def load_or_build(
    folder: Path, build: Callable[[], LabelledImages], sources: Callable[[], Sequence[Path]] = list, verify: bool = True
) -> LabelledImages:
    """Memory-map a cache; build it if it is missing, corrupt or made from other versions of its sources."""
    known = fingerprint(sources())
    if data := read(folder, known, verify):
        return data
    if folder.exists():
        rank_zero_info(f"Rebuilding the cache {folder}, whose source files have changed.")
    data = build()
    known = known or fingerprint(sources())  # the build may have downloaded them
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            with suppress(NotImplementedError):  # file systems without locks
                stack.enter_context(FileLock(folder.with_name(f".{folder.name}.lock")))
                for part in folder.parent.glob(f"{escape(folder.name)}.*.part"):  # left by killed processes
                    shutil.rmtree(part, ignore_errors=True)
            if not read(folder, known, verify=False):  # else another process was faster
                pack(folder, data, known)
            return read(folder, known, verify=False) or data
    except OSError as error:
        rank_zero_warn(f"cache_dir must be writable, got {folder.parent} ({error}): images are kept in memory only.")
        return data


def fingerprint(files: Sequence[Path]) -> str | None:
    """A digest of the names, sizes and modification times of files; None without files."""
    versions = []
    for file in files:
        try:
            stat = file.stat()
            versions.append(f"{file.absolute()} {stat.st_size} {stat.st_mtime_ns}")
        except FileNotFoundError:  # a dangling link
            versions.append(f"{file.absolute()} missing")
    digest = hashlib.blake2b("\0".join(versions).encode(errors="surrogateescape"), digest_size=16)
    return digest.hexdigest() if versions else None


def part_of(folder: Path) -> TemporaryDirectory[str]:
    """A temporary folder on the cache's file system, so that renames are atomic."""
    return TemporaryDirectory(".part", f"{folder.name}.", folder.parent, ignore_cleanup_errors=True)


def pack(folder: Path, data: LabelledImages, sources: str | None) -> None:
    """Write a data set, the checksums last, and replace the cache; processes that have mapped it keep it."""
    with part_of(folder) as part:
        new = Path(part) / "new"
        new.mkdir()
        checksums = {}
        for name, array in data._asdict().items():
            np.save(new / f"{name}.npy", array)
            checksums[name] = checksum(array)
        (new / "checksums.json").write_text(json.dumps(checksums | {"sources": sources}))
        if folder.exists():
            folder.rename(Path(part) / "old")
        new.rename(folder)
    rank_zero_info(f"Packed {len(data.images)} images of {len(data.classes)} classes into {folder}.")


def read(folder: Path, sources: str | None, verify: bool) -> LabelledImages | None:
    """Memory-map a cache; None if it is missing, corrupt or made from sources with another fingerprint."""
    if not folder.exists():
        return None
    try:
        checksums = json.loads((folder / "checksums.json").read_text())
        if sources not in (None, checksums["sources"]):
            return None
        arrays = {}
        for name in LabelledImages._fields:
            # copy-on-write, so that torch does not warn of a read-only array; processes share the pages
            arrays[name] = np.load(folder / f"{name}.npy", mmap_mode="c", allow_pickle=False)
            require(not verify or checksum(arrays[name]) == checksums[name], f"wrong checksum of {name}.npy")
        return LabelledImages(**arrays)
    except (OSError, ValueError, KeyError, EOFError, TypeError) as error:
        rank_zero_warn(f"Rebuilding the cache {folder}, which is corrupt ({error}).")
        with part_of(folder) as part, suppress(FileNotFoundError):  # another process may have removed it
            folder.rename(Path(part) / "old")
        return None


def checksum(array: Array) -> int:
    """CRC-32 of an array's dtype, shape and bytes."""
    return zlib.crc32(np.ascontiguousarray(array).data, zlib.crc32(f"{array.dtype} {array.shape}".encode()))
