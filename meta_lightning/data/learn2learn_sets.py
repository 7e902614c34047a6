"""What the published benchmarks share: three splits of classes, read and downloaded through learn2learn."""

import tempfile
import zlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from meta_lightning.checks import InputError, require
from meta_lightning.data.cache import LabelledImages
from meta_lightning.data.images import ImageTasks
from meta_lightning.data.transforms import ImageTransforms
from meta_lightning.tasks import SPLITS, Array, Split, import_learn2learn


class SplitImages(NamedTuple):
    """The images of one split."""

    images: Array  # M C H W, uint8
    labels: Array  # M, int64: the image's row in ``classes``
    classes: list[str]


class PublishedSplits(ImageTasks):
    """A benchmark that learn2learn reads, with its published split of the classes.

    A subclass names its ``title``, learn2learn's class (``loader``), the ``files`` under ``root`` and where to get them
    (``origin``), and reads one split.

    learn2learn has no checksums of these files: what it downloads is taken when all of it reads and fits together. A
    file that ends early or is another, and a class in two splits, are noticed so; altered pixels are not.

    Most of these files are pickles, and a pickle can run code when it is read: use none that you do not trust.

    Args:
        root: Folder that holds, or will hold, the files that learn2learn downloads.
        download: Download them, through learn2learn, when some are missing.
        ways: Classes a task (N).
        shots: Support images a class (K).
        queries: Query images a class (Q).
        train_ways: Classes a task in training. Default: ``ways``.
        train_shots: Support images a class in training, or the least and most of them, to be drawn for each meta-batch.
            Default: ``shots``.
        train_queries: Query images a class in training. Default: ``queries``.
        meta_batch_size: Tasks a meta-iteration, over all processes together (B).
        epoch_length: Meta-iterations an epoch.
        val_tasks: Validation tasks.
        test_tasks: Test tasks, also those of ``predict``.
        seed: Seed of the tasks; the splits do not depend on it.
        num_workers: Processes that load; with 0 the training process does.
        cache_dir: Where the packed images are kept. Default: ``meta_lightning`` in the user's cache folder.
        transforms: Normalisation, and the augmentation of training tasks.

    Raises:
        InputError: If an argument is outside its range, a split cannot give such tasks, a file does not read or a class
            is in two splits.
        FileNotFoundError: If the data set is not under ``root``, or not all of it.
        OSError: If it cannot be downloaded.
    """

    title: ClassVar[str]
    loader: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    origin: ClassVar[str]

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        train_ways: int | None = None,
        train_shots: int | tuple[int, int] | None = None,
        train_queries: int | None = None,
        meta_batch_size: int = 4,
        epoch_length: int = 500,
        val_tasks: int = 200,
        test_tasks: int = 600,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
        transforms: ImageTransforms | None = None,
    ) -> None:
        super().__init__(
            ways,
            shots,
            queries,
            train_ways,
            train_shots,
            train_queries,
            meta_batch_size,
            epoch_length,
            val_tasks,
            test_tasks,
            seed,
            num_workers,
            cache_dir,
            transforms,
        )
        self.root = Path(root).expanduser()
        self.download = download

    @property
    def cache_name(self) -> str:
        """A name for each ``root``, so that a wrong one is not answered from another's cache."""
        return f"{self.title.lower()}-{zlib.crc32(str(self.root.resolve()).encode()):08x}"

    def sources(self) -> list[Path]:
        """The files, where all of them are there; of a folder those in it."""
        paths = [] if self.missing() else [self.root / file for file in self.files]
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
                f"root must hold {self.title}: expected {', '.join(self.files)} in {self.root}, missing {which}. "
                f"Pass --data.download true to download what is missing; without a network, copy there {self.origin}"
            )
        images = np.empty(0, dtype=np.uint8)
        labels: list[Array] = []
        classes: list[str] = []
        splits: list[int] = []
        for split in SPLITS:
            rank_zero_info(f"Reading the {split} split of {self.title} from {self.root} …")
            part = self.read_split(split)
            labels.append(part.labels + len(classes))
            classes += part.classes
            splits += [SPLITS.index(split)] * len(part.classes)
            images = extend(images, part.images)
            del part  # the largest of these sets leaves no room for it beside the next
        self.require_no_class_twice(classes, splits)
        return LabelledImages(images, np.concatenate(labels), np.array(classes), np.array(splits))

    def missing(self) -> list[str]:
        """Those of ``files`` that are not under ``root``."""
        return [file for file in self.files if not (self.root / file).exists()]

    def dataset(self, root: Path, split: Split, download: bool = False) -> Any:
        """learn2learn's own data set of a split."""
        mode = "validation" if split == "val" else split
        return getattr(import_learn2learn().vision.datasets, self.loader)(str(root), mode=mode, download=download)

    def fetch(self) -> None:
        """Download what is missing; it comes into ``root`` only when all of it has been seen to read.

        Raises:
            OSError: If it cannot be had, saying how else to get it.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="download-", suffix=".part", dir=self.root) as part:
                for split in SPLITS:
                    # learn2learn saves a server's error page as if it were the data: reading it tells
                    self.dataset(Path(part), split, download=True)
                for file in self.missing():
                    (self.root / file).parent.mkdir(parents=True, exist_ok=True)
                    (Path(part) / file).rename(self.root / file)
        except Exception as error:
            # not chained: the command line would show its cause alone, without the way out
            raise OSError(
                f"{self.title} could not be downloaded to {self.root} ({type(error).__name__}: {error}). "
                f"Copy there, from a machine with a network, {self.origin}"
            ) from None

    def require_no_class_twice(self, classes: list[str], splits: list[int]) -> None:
        """Raise InputError, naming it, if a class is in more than one split."""
        twice = [name for name, count in Counter(classes).items() if count > 1]
        where = [
            f"{name} in {' and '.join(SPLITS[s] for c, s in zip(classes, splits, strict=True) if c == name)}"
            for name in twice[:5]
        ]
        require(
            not twice,
            f"every class of {self.title} must be in one split, got {len(twice)} in more of them under {self.root}: "
            f"{', '.join(where)}",
        )


def extend(images: Array, more: Array) -> Array:
    """Images with more of them behind, in place: the largest of these sets would hardly fit into memory twice.

    Args:
        images: What there is; anything of length 0 to begin with.  # M C H W, uint8
        more: What to append.  # M C H W, uint8

    Returns:
        All images.  # M C H W, uint8
    """
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
    """Say which file it is that does not read; a spoilt one fails in many ways, and each means the same.

    Raises:
        InputError: If anything but memory fails within.
    """
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
    """Decode the images of a data set that gives PIL images.

    Args:
        dataset: learn2learn's data set.
        name: What to call the image of a row if it does not read.

    Returns:
        All images.  # M C H W, uint8
    """
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
