"""User-provided images, in one folder per class."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
import PIL
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from meta_lightning.checks import InputError, require, require_at_least, require_choice
from meta_lightning.data import pictures
from meta_lightning.data.cache import LabelledImages, concatenated
from meta_lightning.data.image_module import FolderTasks
from meta_lightning.data.module import options
from meta_lightning.data.pictures import left_out, prepare_image
from meta_lightning.data.processes import mapped
from meta_lightning.data.splits import RandomSplit
from meta_lightning.data.tasks import SPLITS, Array, FewShotTasks, Split, least_and_most

LAYOUT = "root must hold images as root/{train,val,test}/<class>/* or, to be split at random, as root/<class>/*"
NO_SPLIT = len(SPLITS)  # in place of a class's split; -1 would index the last of SPLITS
# class names; of each class, its row in SPLITS or NO_SPLIT; files, not yet read; of each file, its row in the names
Listing = tuple[list[str], list[int], list[Path], list[int]]


@options
class ImageFolderTasks(RandomSplit, FolderTasks):
    """User-provided images; each folder is a class, named after it.

    ``root`` has one of two layouts, told apart by whether it has a folder ``train``, ``val`` or ``test`` that holds
    folders:

    * ``root/{train,val,test}/<class>/*``: the user's split. A class is in one split only, unless ``split_folders`` says
      otherwise; a split that is not used may be missing.
    * ``root/<class>/*``: a random split. ``numpy.random.default_rng(split_seed)`` permutes the classes, sorted by name;
      the first ``round(C * val)`` are for validation, the next ``round(C * test)`` for test and the rest for training.
      The split depends on the names of the folders only: not on images, ways or shots. Adding a class changes it.

    As in torchvision's ``ImageFolder``, images lie in the class's folder or at any depth below it, and links are
    followed. Hidden files and folders are ignored. Any format that Pillow reads is supported, see ``prepare_image``.
    Corrupt files are skipped with a warning, as are classes with fewer images than a task of their split takes.

    Raises:
        InputError: If an option is outside its range, ``root`` has neither layout, a class is in two splits, no file is
            an image, or a split that is used has too few classes.
        FileNotFoundError: If ``root`` does not exist or has no files in folders.
    """

    image_size: int = 84  # type: ignore[misc]  # fixed by other data sets
    """Height and width in pixels to which images are resized and cropped."""
    channels: Literal[1, 3] = 3  # type: ignore[misc]
    """3 for colour, 1 for grey."""
    split_folders: Literal["keep", "merge", "train", "val", "test"] = "keep"
    """What folders ``train``, ``val`` and ``test`` are: ``"keep"``, the split of the classes; ``"merge"``, parts of the
    same classes, which are split at random by ``split_fractions``. ``"train"``, ``"val"`` and ``"test"`` use one of the
    folders alone and split its classes at random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, image_size=self.image_size)
        require(self.channels in (1, 3), f"channels must be 1 or 3, got {self.channels}")
        require_choice(("keep", "merge", *SPLITS), split_folders=self.split_folders)

    @cached_property
    def listing(self) -> Listing:
        """The classes and their files, sorted by name."""
        root = self.folder
        if not root.is_dir():
            raise FileNotFoundError(f"{LAYOUT}, but {root} is not a folder")
        folders = folders_in(root)
        names = [folder.name for folder in folders]
        # a class may have the name of a split: a split holds folders
        if given := [split for split in SPLITS if split in names and folders_in(root / split)]:
            if others := [name for name in names if name not in given]:
                rank_zero_warn(f"root {root} is split into {' and '.join(given)}; ignoring: {', '.join(others)}.")
            folders = [folder for split in given for folder in folders_in(root / split)]
        elif names and set(names) <= set(SPLITS):
            raise FileNotFoundError(f"{LAYOUT}, but {root} has only {', '.join(names)}, with 0 class folders in them")
        classes = [folder.name for folder in folders]
        files = [(path, label) for label, folder in enumerate(folders) for path in files_below(folder)]
        if not files:
            raise FileNotFoundError(f"{LAYOUT}, but {root} has {len(classes)} class folders and no files in them")
        splits = [SPLITS.index(folder.parent.name) if given else NO_SPLIT for folder in folders]
        self.check_layout(classes, splits)
        return classes, splits, [path for path, _ in files], [label for _, label in files]

    def check_layout(self, classes: Sequence[str], splits: Sequence[int]) -> None:
        """Refuse a class in two splits that are kept, and ``split_folders`` where there are none."""
        given = [split for row, split in enumerate(SPLITS) if row in splits]
        if self.split_folders not in ("keep", *given, *["merge"] * bool(given)):
            has = ", ".join(given) or "no train, val or test with class folders"
            came = f"{self.split_folders!r}, but root {self.folder} has {has}"
            raise InputError(f"split_folders must be 'keep' or fit the folders of root, got {came}")
        twice = [name for name, count in Counter(classes).items() if count > 1]
        if twice and self.split_folders == "keep":
            came = f"{len(twice)} in several: {', '.join(twice[:5])}{', …' * (len(twice) > 5)}"
            merge = "--data.split_folders merge merges these and splits the classes at random"
            alone = f"--data.split_folders {given[0]} splits those of one folder, without the others"
            raise InputError(f"root {self.folder} must hold each class in one split, got {came}. {merge}; {alone}")

    @property
    def cache_name(self) -> str:
        """A name unique to ``root``, the form of the images and the code that prepares them."""
        name = f"image-folder-{self.image_size}x{self.channels}"
        return self.named_for_root(name, Path(pictures.__file__).read_text(), PIL.__version__)

    def sources(self) -> list[Path]:
        """The files of ``root``; empty if there are none."""
        with suppress(FileNotFoundError):
            return self.listing[2]
        return []

    def build(self) -> LabelledImages:
        """Read the images; the folders that are used and the split of the classes are up to ``arrange``."""
        classes, splits, paths, labels = self.listing
        rank_zero_info(f"Reading {len(paths)} files from {self.folder} …")
        prepare = partial(try_to_prepare, image_size=self.image_size, channels=self.channels)
        kept: list[int] = []  # labels

        def readable() -> Iterator[Array]:
            unread: list[str] = []
            for label, image in zip(labels, mapped(prepare, paths), strict=True):
                if isinstance(image, str):
                    unread.append(image)
                    continue
                kept.append(label)
                yield image[None]
            if unread:
                rank_zero_warn(left_out(unread, len(paths), f"root {self.folder}"))
            require(bool(kept), f"{LAYOUT}, but none of the {len(paths)} files in {self.folder} is a readable image")

        return LabelledImages(concatenated(readable()), np.array(kept), np.array(classes), np.array(splits))

    def arrange(self, data: LabelledImages) -> LabelledImages:
        """Split the classes if ``root`` does not, and leave out those with too few images for their split."""
        self.check_layout(data.classes.tolist(), data.splits.tolist())
        if self.split_folders == "merge":
            classes, rows = np.unique(data.classes, return_inverse=True)
            data = data._replace(classes=classes, labels=rows[data.labels], splits=np.full(len(classes), NO_SPLIT))
        splits = data.splits.copy()
        self.drawn = np.flatnonzero(splits == NO_SPLIT).tolist()  # the classes that are split at random
        if self.split_folders in SPLITS:
            self.drawn = data.members(self.split_folders)
            splits[:] = NO_SPLIT
        for split, members in self.drawn_splits(self.drawn).items():
            splits[members] = SPLITS.index(split)
        self.class_splits = splits  # including classes that are left out
        self.takes = [least_and_most(shots, "shots")[1] + queries for shots, queries in map(self.sizes, SPLITS)]
        self.counts = counts = np.bincount(data.labels, minlength=len(splits))
        takes = np.array([*self.takes, 0])[splits]
        small = counts < takes
        if small.any():
            few = [f"{data.classes[c]} ({SPLITS[splits[c]]}, {counts[c]} of {takes[c]})" for c in np.flatnonzero(small)]
            rank_zero_warn(f"Classes with fewer images than shots + queries are left out: {', '.join(few)}.")
        return data._replace(splits=np.where(small, NO_SPLIT, splits))

    def task_set(self, split: Split) -> FewShotTasks:
        """The tasks of a split."""
        data, ways, row = self.load(), self.most_ways(split), SPLITS.index(split)
        enough, of_split = len(data.members(split)), np.sum(self.class_splits == row)
        if enough < ways:
            drawn = f" (split_fractions gives it {of_split} of the {len(self.drawn)} classes)" if self.drawn else ""
            needs = f"{ways} classes ({self.ways_argument(split)}) of {self.takes[row]} images (shots + queries)"
            came = f"{enough} and {of_split - enough} with fewer images in {self.folder}"
            more = "; fewer shots or queries would do" if of_split >= ways else ""  # the classes are enough
            advice = f"; {self.fitting_fractions()}" if self.drawn and not more else more
            raise InputError(f"root must hold at least {needs} for the {split} split{drawn}, got {came}{advice}")
        return super().task_set(split)

    def fitting_fractions(self) -> str:
        """For messages: fractions that give each split enough classes with enough images."""
        takes = dict(zip(SPLITS, self.takes, strict=True))
        needs = {split: self.most_ways(split) for split in SPLITS}
        return self.advice(self.drawn, needs, lambda label, split: bool(self.counts[label] >= takes[split]))


def visible(folder: Path) -> list[Path]:
    """The entries of a folder that are not hidden, sorted by name."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder that are neither hidden nor links to it or above, sorted by name."""
    return [entry for entry in visible(folder) if entry.is_dir() and not is_loop(entry)]


def is_loop(entry: Path) -> bool:
    """Whether a folder is a link to one that it is in."""
    return entry.is_symlink() and entry.parent.resolve().is_relative_to(entry.resolve())


def files_below(folder: Path) -> Iterator[Path]:
    """The files at any depth below a folder, dangling links included: they are reported as unreadable."""
    for entry in visible(folder):
        if not entry.is_dir():
            if entry.is_file() or entry.is_symlink():
                yield entry
        elif not is_loop(entry):
            yield from files_below(entry)


def try_to_prepare(path: Path, image_size: int, channels: int) -> Array | str:
    """``prepare_image``, or why the file is no image; disk errors raise."""
    try:
        return prepare_image(path, image_size, channels)
    except (InputError, FileNotFoundError) as error:
        return str(error)
