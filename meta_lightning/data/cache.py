"""Images packed once: a folder of memory-mapped arrays with checksums, whole or not there at all."""

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from meta_lightning.checks import require
from meta_lightning.tasks import SPLITS, Array, Split


class LabelledImages(NamedTuple):
    """A whole data set, its classes split into train, val and test."""

    images: Array  # M C H W, uint8
    labels: Array  # M, int64: the image's row in ``classes``
    classes: Array  # names, str
    splits: Array  # of each class: its row in SPLITS

    def members(self, split: Split) -> list[int]:
        """The class numbers of a split."""
        return [int(c) for c in np.flatnonzero(self.splits == SPLITS.index(split))]


def default_cache_dir() -> Path:
    """``meta_lightning`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meta_lightning"


def load_or_build(folder: Path, build: Callable[[], LabelledImages], verify: bool = True) -> LabelledImages:
    """Map a cache into memory, or build it where it is missing or spoilt.

    Processes that start at once may each build it: the first to finish puts its own in place, and all read that one.

    Args:
        folder: The cache.
        build: Makes the data set from its source.
        verify: Read the whole cache to compare its checksums; without it only its form is looked at.
    """
    if folder.exists():
        try:
            return read(folder, verify)
        except (OSError, ValueError, KeyError, EOFError, TypeError) as error:
            rank_zero_warn(f"The cache {folder} is spoilt ({error}): it is built anew.")
            spoilt = folder.rename(folder.with_name(f"{folder.name}.{uuid4().hex}.part"))
            spoilt.unlink() if spoilt.is_file() else shutil.rmtree(spoilt, ignore_errors=True)
    data = build()
    part = folder.with_name(f"{folder.name}.{uuid4().hex}.part")  # of this build alone, on other machines too
    try:
        write(part, data)
        try:
            part.rename(folder)
        except OSError:  # another process was faster
            if not folder.exists():
                raise
        rank_zero_info(f"Packed {len(data.images)} images of {len(data.classes)} classes into {folder}.")
        return read(folder, verify=False)
    except OSError as error:
        rank_zero_warn(f"cache_dir {folder.parent} cannot be written ({error}): the images are kept in memory only.")
        return data
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write(folder: Path, data: LabelledImages) -> None:
    """Write a data set as arrays and, last, their checksums."""
    folder.mkdir(parents=True)
    checksums = {}
    for name, array in data._asdict().items():
        np.save(folder / f"{name}.npy", array)
        checksums[name] = checksum(array)
    (folder / "checksums.json").write_text(json.dumps(checksums))


def read(folder: Path, verify: bool) -> LabelledImages:
    """Map a data set that ``write`` left.

    Raises:
        OSError, ValueError, KeyError, EOFError, TypeError: If it is not what ``write`` left.
    """
    checksums = json.loads((folder / "checksums.json").read_text())
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
