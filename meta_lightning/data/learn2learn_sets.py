"""Base class of the published benchmarks, which learn2learn downloads and reads."""

import tempfile
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image

from meta_lightning.checks import InputError
from meta_lightning.data.cache import BLOCK, LabelledImages, concatenated
from meta_lightning.data.image_module import DownloadedTasks
from meta_lightning.data.module import options
from meta_lightning.data.tasks import SPLITS, Array, Split, import_learn2learn

# images M H W 3, or chunks of them; labels M: rows in the classes; classes
SplitImages = tuple[Array | Iterator[Array], Array, list[str]]


@options
class PublishedSplits(DownloadedTasks):
    """A benchmark with its published split of the classes.

    learn2learn has no checksums of these files. A download is accepted if all of it can be read and is consistent:
    truncated and wrong files and classes in two splits are detected, altered pixels are not. Most files are pickles,
    which can run code when they are read: use only files that you trust.

    Raises:
        InputError: If an option is outside its range, a split has too few classes or images for its tasks, a file is
            corrupt or a class is in two splits.
        FileNotFoundError: If files of the data set are missing under ``root``.
        OSError: If the download fails.
    """

    image_size: ClassVar[int]
    channels = 3
    loader: ClassVar[str]  # learn2learn's class
    files: ClassVar[tuple[str, ...]]  # under ``root``

    meta_batch_size: int = 4

    @property
    def cache_name(self) -> str:
        """A name unique to ``root``."""
        return self.named_for_root(self.title.lower())

    def sources(self) -> list[Path]:
        """All files, those of folders included; empty if one of ``files`` is missing."""
        paths = [] if self.missing() else [self.folder / file for file in self.files]
        return [file for path in paths for file in (sorted(path.rglob("*.*")) if path.is_dir() else [path])]

    def missing(self) -> str:
        """The missing files, for messages."""
        missing = [file for file in self.files if not (self.folder / file).exists()]
        which = "all of them" if len(missing) == len(self.files) else ", ".join(missing)
        return f"expected {', '.join(self.files)} in {self.folder}, missing {which}" if missing else ""

    @abstractmethod
    def read_split(self, split: Split) -> SplitImages:
        """Read one split from ``root``, which has all ``files``."""

    def build(self) -> LabelledImages:
        """Read the three splits."""
        self.require_files()
        labels: list[Array] = []
        found: dict[str, list[Split]] = {}  # the splits of each class
        images = concatenated(chunk for split in SPLITS for chunk in self.chunks(split, labels, found))
        if twice := [f"{name} in {' and '.join(splits)}" for name, splits in found.items() if len(splits) > 1]:
            which = ", ".join(twice[:5])
            raise InputError(f"{self.title} must have each class in one split, got {len(twice)} in several: {which}")
        splits = np.array([SPLITS.index(split) for (split,) in found.values()])
        return LabelledImages(images, np.concatenate(labels), np.array([*found]), splits)

    def chunks(self, split: Split, labels: list[Array], found: dict[str, list[Split]]) -> Iterator[Array]:
        """The images of one split, all of which need not fit into memory; add its labels and classes.  # M 3 H W"""
        rank_zero_info(f"Reading the {split} split of {self.title} from {self.folder} …")
        images, of_split, classes = self.read_split(split)
        if isinstance(images, np.ndarray):
            size = self.image_size
            if images.dtype != np.uint8 or images.shape != (len(of_split), size, size, 3):
                came = f"{images.dtype} of shape {images.shape} and {len(of_split)} labels"
                form = f"uint8 of shape (labels, {size}, {size}, 3)"
                raise InputError(f"images of the {split} split of {self.title} must be {form}, got {came}")
            images = iter([images])
        labels.append(of_split + len(found))
        for name in classes:
            found.setdefault(name, []).append(split)
        for chunk in images:
            yield chunk.transpose(0, 3, 1, 2)

    def dataset(self, root: Path, split: Split, download: bool = False) -> Any:
        """learn2learn's data set of a split."""
        mode = "validation" if split == "val" else split
        return getattr(import_learn2learn().vision.datasets, self.loader)(str(root), mode=mode, download=download)

    def fetch(self) -> None:
        """Download to a temporary folder, and move missing files to ``root`` once all splits can be read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="download-", suffix=".part", dir=self.folder) as part:
            for split in SPLITS:
                self.dataset(Path(part), split, download=True)  # fails if a server's error page was saved as data
            for source, target in ((Path(part) / file, self.folder / file) for file in self.files):
                if not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    source.rename(target)


@contextmanager
def reading(file: object) -> Iterator[None]:
    """Name the file in any error that a corrupt one raises."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        came, advice = f"{type(error).__name__}: {error}", "Delete it, and download or copy it again"
        raise InputError(f"root must hold readable files, but {file} cannot be read ({came}). {advice}") from None


def decode(size: int, count: int, load: Callable[[int], Image.Image], name: Callable[[int], object]) -> Iterator[Array]:
    """Decode square images, in chunks.  # M H W 3, uint8"""
    for start in range(0, count, BLOCK):
        rows = range(start, min(start + BLOCK, count))
        images = np.empty((len(rows), size, size, 3), dtype=np.uint8)
        for image, row in zip(images, rows, strict=True):
            with reading(name(row)):
                decoded = np.asarray(load(row).convert("RGB"))
            if decoded.shape != (size, size, 3):
                raise InputError(f"images must have shape {(size, size, 3)}, but {name(row)} has shape {decoded.shape}")
            image[:] = decoded
        yield images
