"""What the published benchmarks share: three splits of classes, read and downloaded through learn2learn."""

import tempfile
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from meta_lightning.checks import InputError, require
from meta_lightning.data.cache import LabelledImages
from meta_lightning.data.image_module import DownloadedTasks
from meta_lightning.data.module import options
from meta_lightning.data.tasks import SPLITS, Array, Split, import_learn2learn


class SplitImages(NamedTuple):
    """The images of one split."""

    images: Array  # M C H W, uint8
    labels: Array  # M, int64: the image's row in ``classes``
    classes: list[str]


@options
class PublishedSplits(DownloadedTasks):
    """A benchmark that learn2learn reads, with its published split of the classes.

    A subclass names its ``title``, learn2learn's class (``loader``), the ``files`` under ``root`` and where to get them
    (``origin``), and reads one split.

    learn2learn has no checksums of these files: what it downloads is taken when all of it reads and fits together. A
    file that ends early or is another, and a class in two splits, are noticed so; altered pixels are not.

    Most of these files are pickles, and a pickle can run code when it is read: use none that you do not trust.

    Raises:
        InputError: If an option is outside its range, a split cannot give such tasks, a file does not read or a class
            is in two splits.
        FileNotFoundError: If the data set is not under ``root``, or not all of it.
        OSError: If it cannot be downloaded.
    """

    title: ClassVar[str]
    loader: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    origin: ClassVar[str]

    meta_batch_size: int = 4

    @property
    def cache_name(self) -> str:
        """A name for each ``root``."""
        return self.named_for_root(self.title.lower())

    def sources(self) -> list[Path]:
        """The files, where all of them are there; of a folder those in it."""
        paths = [] if self.missing() else [self.folder / file for file in self.files]
        return [file for path in paths for file in (sorted(path.rglob("*.*")) if path.is_dir() else [path])]

    @abstractmethod
    def read_split(self, split: Split) -> SplitImages:
        """Read one split from ``root``, where all ``files`` are."""

    def build(self) -> LabelledImages:
        """Read the three splits, downloaded where files are missing and that is allowed."""
        if self.download and self.missing():
            self.fetch()
        if missing := self.missing():
            which = "all of them" if len(missing) == len(self.files) else ", ".join(missing)
            raise FileNotFoundError(
                f"root must hold {self.title}: expected {', '.join(self.files)} in {self.folder}, missing {which}. "
                f"Pass --data.download true to download what is missing; without a network, copy there {self.origin}"
            )
        images = np.empty(0, dtype=np.uint8)
        labels: list[Array] = []
        found: dict[str, list[Split]] = {}  # the splits of each class
        for split in SPLITS:
            rank_zero_info(f"Reading the {split} split of {self.title} from {self.folder} …")
            part = self.read_split(split)
            labels.append(part.labels + len(found))
            for name in part.classes:
                found.setdefault(name, []).append(split)
            images = extend(images, part.images)
            del part  # the largest of these sets leaves no room for it beside the next
        twice = [f"{name} in {' and '.join(splits)}" for name, splits in found.items() if len(splits) > 1]
        require(
            not twice,
            f"every class of {self.title} must be in one split, got {len(twice)} in more of them under {self.folder}: "
            f"{', '.join(twice[:5])}",
        )
        splits = np.array([SPLITS.index(split) for (split,) in found.values()])
        return LabelledImages(images, np.concatenate(labels), np.array([*found]), splits)

    def missing(self) -> list[str]:
        """Those of ``files`` that are not under ``root``."""
        return [file for file in self.files if not (self.folder / file).exists()]

    def dataset(self, root: Path, split: Split, download: bool = False) -> Any:
        """learn2learn's own data set of a split."""
        mode = "validation" if split == "val" else split
        return getattr(import_learn2learn().vision.datasets, self.loader)(str(root), mode=mode, download=download)

    def fetch(self) -> None:
        """Download what is missing; it comes into ``root`` only when all of it has been seen to read."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="download-", suffix=".part", dir=self.folder) as part:
                for split in SPLITS:
                    # learn2learn saves a server's error page as if it were the data: reading it tells
                    self.dataset(Path(part), split, download=True)
                for file in self.missing():
                    (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
                    (Path(part) / file).rename(self.folder / file)
        except Exception as error:
            # not chained: the command line would show its cause alone, without the way out
            raise OSError(
                f"{self.title} could not be downloaded to {self.folder} ({type(error).__name__}: {error}). "
                f"Copy there, from a machine with a network, {self.origin}"
            ) from None


def extend(images: Array, more: Array) -> Array:
    """Images with more of them behind, in place: the largest of these sets would hardly fit into memory twice."""
    start, shape = len(images), more.shape[1:]
    require(
        start == 0 or images.shape[1:] == shape,
        f"images of all splits must have one shape (C, H, W), got {images.shape[1:]} and {shape}",
    )
    images.resize((start + len(more), *shape), refcheck=False)
    images[start:] = more
    return images


@contextmanager
def reading(file: object) -> Iterator[None]:
    """Say which file it is that does not read; a spoilt one fails in many ways, and each means the same."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise InputError(
            f"root must hold readable files, but {file} does not read ({type(error).__name__}: {error}). "
            "Delete it, and download or copy it again"
        ) from None


def channels_first(images: Array, file: object) -> Array:
    """Published images as ours, without a copy.  # M C H W, uint8"""
    require(
        images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3,
        f"images of {file} must be uint8 of shape (images, height, width, 3), got {images.dtype} of {images.shape}",
    )
    return images.transpose(0, 3, 1, 2)


def decode(dataset: Any, name: Callable[[int], object]) -> Array:
    """Decode the images of a data set that gives PIL images."""
    images = np.empty((len(dataset), 0, 0, 3), dtype=np.uint8)
    for row in range(len(dataset)):
        with reading(name(row)):
            image = np.asarray(dataset[row][0].convert("RGB"))
        if row == 0:
            images = np.empty((len(dataset), *image.shape), dtype=np.uint8)
        require(
            image.shape == images.shape[1:],
            f"images must have one shape (height, width, 3), got {images.shape[1:]} and, in {name(row)}, {image.shape}",
        )
        images[row] = image
    return images.transpose(0, 3, 1, 2)
