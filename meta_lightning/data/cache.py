"""Image cache: a folder of memory-mapped arrays with checksums, written atomically."""

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from functools import cached_property
from glob import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from meta_lightning.checks import require
from meta_lightning.data.tasks import SPLITS, Array, Split

FORMAT = 3  # version of the cached contents and of their files, part of the folder's name
BLOCK = 1024  # rows that are written at a time


class LabelledImages(NamedTuple):
    """A whole data set, its classes split into train, val and test."""

    images: Array  # M C H W, uint8
    labels: Array  # M, int64: the image's row in ``classes``
    classes: Array  # names, str
    splits: Array  # of each class: its row in SPLITS, or len(SPLITS) if it is in none

    def members(self, split: Split) -> list[int]:
        """The class numbers of a split."""
        return [int(c) for c in np.flatnonzero(self.splits == SPLITS.index(split))]


class NotWritableError(Exception):
    """The cache cannot be written, unlike errors of the build itself."""


class BuiltMeanwhileError(Exception):
    """Another process has built the cache since this one missed it."""

    def __init__(self, data: LabelledImages) -> None:
        self.data = data


class Part:
    """The temporary folder of a cache that is being built, which nobody else builds then."""

    def __init__(self, cache: Path, known: Callable[[], str | None], stack: ExitStack) -> None:
        self.cache, self.known, self.stack = cache, known, stack
        self.concatenated: list[tuple[Array, Path, int]] = []  # arrays, their files and checksums

    @cached_property
    def folder(self) -> Path:
        """Made when something is written to it, so that a build that fails at once leaves nothing."""
        parent, name = self.cache.parent, self.cache.name
        with writable(parent):
            parent.mkdir(parents=True, exist_ok=True)
            with suppress(NotImplementedError):  # file systems without locks
                self.stack.enter_context(FileLock(parent / f".{name}.lock"))
                for left in parent.glob(f"{escape(name)}.*.part"):  # by killed processes
                    shutil.rmtree(left, ignore_errors=True)
            if data := read(self.cache, self.known(), verify=False):
                raise BuiltMeanwhileError(data)
            return Path(self.stack.enter_context(part_of(self.cache)))

    def write(self, name: str, chunks: Iterable[Array]) -> tuple[Path, int]:
        """Write chunks into one .npy file, whose length is known at the end; return its path and checksum.

        It is written and not mapped: a full disk is an error, where writing to a mapping would end the process.
        """
        path, rows, crc = self.folder / name, 0, 0
        with writable(self.cache.parent):
            file = path.open("wb")
        try:
            for block in blocks(chunks):  # whose errors are the build's
                with writable(self.cache.parent):
                    if not rows:
                        write_header(file, 0, block)
                    file.write(block.data)
                rows, crc = rows + len(block), zlib.crc32(block.data, crc)
            with writable(self.cache.parent):
                file.seek(0)
                write_header(file, rows, block)  # as long as before: NumPy leaves room for any number
        finally:
            with writable(self.cache.parent):
                file.close()
        return path, with_form(crc, block.dtype, (rows, *block.shape[1:]))


building: ContextVar[Part | None] = ContextVar("building", default=None)


def concatenated(chunks: Iterable[Array]) -> Array:
    """Concatenate chunks of images in the file of the cache that is being built; without one, in memory.  # M ...

    For ``build`` of a data set that may be larger than memory. The chunks have one dtype and shape, except for their
    lengths, and there is at least one. A file is mapped read-only.
    """
    if (part := building.get()) is None:
        content = bytearray()
        for block in blocks(chunks):
            content += block.tobytes()
        return np.frombuffer(content, block.dtype).reshape(-1, *block.shape[1:])
    path, crc = part.write(f"{len(part.concatenated)}.npy", chunks)
    array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    part.concatenated.append((array, path, crc))
    return array


def load_or_build(
    folder: Path,
    build: Callable[[], LabelledImages],
    sources: Callable[[], Sequence[Path]] = list,
    verify: bool = False,
) -> LabelledImages:
    """Memory-map a cache; build it if it is missing, corrupt or made from other versions of its sources.

    ``verify`` compares all of it with its checksums, and not only the sizes of its files.
    """
    known = fingerprint(sources())
    if data := read(folder, known, verify):
        return data
    if folder.exists():
        rank_zero_info(f"Rebuilding the cache {folder}, whose source files have changed.")
    try:
        with ExitStack() as stack:
            part = Part(folder, lambda: known or fingerprint(sources()), stack)  # the build may download them
            data = built(build, part)
            with writable(folder.parent):
                pack(data, part)
            if data := read(folder, None, verify=True):
                return data
            raise NotWritableError(f"cache_dir must keep what is written, got other checksums in {folder.parent}")
    except BuiltMeanwhileError as found:
        return found.data
    except NotWritableError as error:
        rank_zero_warn(f"{error}: images are kept in memory only.")
        return data if data and not isinstance(data.images, np.memmap) else built(build, None)


@contextmanager
def writable(cache_dir: Path) -> Iterator[None]:
    """Raise NotWritableError where a file of the cache cannot be written."""
    try:
        yield
    except OSError as error:
        raise NotWritableError(f"cache_dir must be writable, got {cache_dir} ({error})") from None


def built(build: Callable[[], LabelledImages], part: Part | None) -> LabelledImages:
    """Build a data set, its ``concatenated`` images in a temporary folder or in memory."""
    token = building.set(part)
    try:
        return build()
    finally:
        building.reset(token)


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


def pack(data: LabelledImages, part: Part) -> None:
    """Write a data set, the checksums last, and replace the cache; processes that have mapped it keep it."""
    new, cache = part.folder / "new", part.cache
    new.mkdir()
    checksums = {}
    for name, array in data._asdict().items():
        # the very array: one that is part of it, or computed from it, has no file
        if found := [entry for entry in part.concatenated if entry[0] is array]:
            ((_, path, checksums[name]),) = found
            path.rename(new / f"{name}.npy")
        else:
            _, checksums[name] = part.write(f"{new.name}/{name}.npy", [array])
    (new / "checksums.json").write_text(json.dumps(checksums | {"sources": part.known()}))
    if cache.exists():
        cache.rename(part.folder / "old")
    new.rename(cache)
    rank_zero_info(f"Packed {len(data.images)} images of {len(data.classes)} classes into {cache}.")


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
            path = folder / f"{name}.npy"
            # copy-on-write, so that torch does not warn of a read-only array; processes share the pages
            arrays[name] = np.load(path, mmap_mode="c", allow_pickle=False)
            right = checksums[name]
            require(not verify or checksum(path, arrays[name]) == right, f"wrong checksum of {path.name}")
        return LabelledImages(**arrays)
    except (OSError, ValueError, KeyError, EOFError, TypeError) as error:
        rank_zero_warn(f"Rebuilding the cache {folder}, which is corrupt ({error}).")
        # another process may have removed it, or nothing can be written there
        with suppress(OSError), part_of(folder) as part:
            folder.rename(Path(part) / "old")
        return None


def blocks(chunks: Iterable[Array]) -> Iterator[Array]:
    """The rows of chunks in contiguous blocks of at most ``BLOCK``; without any row one empty block."""
    rows = 0
    for chunk in chunks:
        for start in range(0, len(chunk), BLOCK):
            yield np.ascontiguousarray(chunk[start : start + BLOCK])
        rows, empty = rows + len(chunk), np.ascontiguousarray(chunk[:0])
        del chunk  # it may be large, and so the next one
    if not rows:
        yield empty


def write_header(file: BinaryIO, rows: int, block: Array) -> None:
    """Write the header of a .npy file of ``rows`` rows like those of a block."""
    shape = (rows, *block.shape[1:])
    form = {"descr": block.dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, form)  # type: ignore[no-untyped-call]


def checksum(path: Path, array: np.memmap[Any, Any]) -> int:
    """CRC-32 of a mapped file's bytes, dtype and shape; the file is read, so that it takes no memory."""
    crc = 0
    with path.open("rb") as file:
        file.seek(array.offset)
        while block := file.read(2**20):
            crc = zlib.crc32(block, crc)
    return with_form(crc, array.dtype, array.shape)


def with_form(crc: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    """Add the form of an array to the CRC-32 of its bytes, after them since its length is known last."""
    return zlib.crc32(f"{dtype} {shape}".encode(), crc)
