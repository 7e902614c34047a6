"""The user's own pictures, in one folder per class."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import PIL
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image

from meta_lightning.checks import InputError, require, require_at_least
from meta_lightning.data import pictures
from meta_lightning.data.cache import LabelledImages
from meta_lightning.data.image_module import FolderTasks
from meta_lightning.data.module import options
from meta_lightning.data.pictures import left_out, prepare_image
from meta_lightning.data.splits import RandomSplit
from meta_lightning.data.tasks import SPLITS, Array, FewShotTasks, Split, least_and_most

LAYOUT = "root must hold pictures as root/{train,val,test}/<class>/* or, for a split drawn here, as root/<class>/*"
NO_SPLIT = len(SPLITS)  # in place of a class's split; not -1, which would read as the last of SPLITS


class Listing(NamedTuple):
    """The files of a folder of pictures; whether they are pictures shows later."""

    classes: list[str]  # names
    splits: list[int]  # of each class: its row in SPLITS; NO_SPLIT where the folders do not split
    paths: list[Path]
    labels: list[int]  # of each path: its row in ``classes``


@options
class ImageFolderTasks(RandomSplit, FolderTasks):
    """The user's own pictures: every folder is a class, named after it.

    ``root`` is laid out in one of two ways, seen from whether it has a folder ``train``, ``val`` or ``test``:

    * ``root/{train,val,test}/<class>/*``: classes split by the user; no class is in two, and a split that is never
      asked for may be missing.
    * ``root/<class>/*``: the classes are split here. ``numpy.random.default_rng(split_seed)`` permutes them, sorted by
      name; the first ``round(C * val)`` validate, the next ``round(C * test)`` test and the rest train. The split
      depends on the names of the folders alone, so other pictures, ways or shots leave it; another class draws it anew.

    As for torchvision's ``ImageFolder``, pictures lie in the class's folder or at any depth below it, and links are
    followed; hidden files and folders are ignored. A picture may be in any format that pillow reads, see
    ``prepare_image``; a file that does not read is left out with a warning. So is a class with fewer pictures than a
    task of its split takes.

    Raises:
        InputError: If an option is outside its range, ``root`` is laid out in neither way, a class is in two splits,
            no file is a picture, or a split that is asked for has too few classes.
        FileNotFoundError: If ``root`` is missing or has no files in folders.
    """

    image_size: int = 84  # type: ignore[misc]  # fixed by other data sets
    """Side of the square that pictures are fitted into, in pixels."""
    channels: Literal[1, 3] = 3  # type: ignore[misc]
    """3 for colour, 1 for grey."""

    def __post_init__(self) -> None:
        """Refuse other forms of pictures."""
        super().__post_init__()
        require_at_least(1, image_size=self.image_size)
        require(self.channels in (1, 3), f"channels must be 1 or 3, got {self.channels}")

    @cached_property
    def listing(self) -> Listing:
        """The files, looked for once."""
        return list_pictures(self.folder)

    @property
    def cache_name(self) -> str:
        """A name for each ``root`` and form, and for the code that prepares the pictures."""
        name = f"image-folder-{self.image_size}x{self.channels}"
        return self.named_for_root(name, Path(pictures.__file__).read_text(), PIL.__version__)

    def sources(self) -> list[Path]:
        """The files of ``root``, while there are any."""
        try:
            return self.listing.paths
        except FileNotFoundError:
            return []

    def build(self) -> LabelledImages:
        """Read the pictures, in parallel: pillow decodes and resizes without Python's global lock."""
        paths, size = self.listing.paths, self.image_size
        rank_zero_info(f"Reading {len(paths)} files from {self.folder} …")
        Image.init()  # in one thread: while another loads pillow's formats, a file of a late one may go unrecognised
        images = np.empty((len(paths), self.channels, size, size), dtype=np.uint8)
        labels: list[int] = []
        unread: list[str] = []
        with ThreadPoolExecutor() as threads:
            prepared = threads.map(lambda path: try_to_prepare(path, size, self.channels), paths)
            for label, image in zip(self.listing.labels, prepared, strict=True):
                if isinstance(image, str):
                    unread.append(image)
                else:
                    images[len(labels)] = image
                    labels.append(label)
        if unread:
            rank_zero_warn(left_out(unread, len(paths), f"root {self.folder}"))
        require(bool(labels), f"{LAYOUT}, but none of the {len(paths)} files in {self.folder} reads as a picture")
        return LabelledImages(
            images=images[: len(labels)],
            labels=np.array(labels, dtype=np.int64),
            classes=np.array(self.listing.classes),
            splits=np.array(self.listing.splits, dtype=np.int64),
        )

    def arrange(self, data: LabelledImages) -> LabelledImages:
        """Split the classes where ``root`` does not, and leave out those with too few pictures for their split."""
        C = len(data.classes)
        self.drawn = bool(np.any(data.splits == NO_SPLIT))
        splits = data.splits.copy()
        if self.drawn:
            for split, members in self.drawn_splits(range(C)).items():
                splits[members] = SPLITS.index(split)
        takes = np.array([*map(self.images_per_class, SPLITS)])
        counts = np.bincount(data.labels, minlength=C)
        small = counts < takes[splits]
        if small.any():
            few = [
                f"{data.classes[c]} ({SPLITS[splits[c]]}, {counts[c]} of {takes[splits[c]]})"
                for c in small.nonzero()[0]
            ]
            rank_zero_warn(f"Classes with fewer images than shots + queries are left out: {', '.join(few)}.")
        self.class_splits = splits  # also of those that are left out
        return data._replace(splits=np.where(small, NO_SPLIT, splits))

    def images_per_class(self, split: Split) -> int:
        """The most images of a class that a task of a split takes."""
        shots, queries = self.sizes(split)
        return least_and_most(shots)[1] + queries

    def make_task_set(self, split: Split) -> FewShotTasks:
        """The tasks of a split."""
        data, ways = self.load(), self.ways_of(split)
        enough, of_split = len(data.members(split)), int(np.sum(self.class_splits == SPLITS.index(split)))
        drawn = f" (split_fractions gives it {of_split} of the {len(data.classes)} classes)" if self.drawn else ""
        require(
            enough >= ways,
            f"root must hold at least {ways} classes (ways) of {self.images_per_class(split)} images (shots + queries) "
            f"for the {split} split{drawn}, got {enough} and {of_split - enough} with fewer images in {self.folder}",
        )
        return super().make_task_set(split)


def list_pictures(root: Path) -> Listing:
    """Find the classes of ``root`` and their files, sorted by name."""
    if not root.is_dir():
        raise FileNotFoundError(f"{LAYOUT}, but {root} is not a folder")
    folders = [entry for entry in visible(root) if entry.is_dir()]
    names = [folder.name for folder in folders]
    there = [split for split in SPLITS if split in names]
    if there:
        others = sorted({*names} - {*SPLITS})
        if others:
            rank_zero_warn(f"root {root} is split into {' and '.join(there)}; it is not read: {', '.join(others)}.")
        found = [(c, SPLITS.index(split)) for split in there for c in visible(root / split) if c.is_dir()]
    else:
        found = [(folder, NO_SPLIT) for folder in folders]
    classes = [folder.name for folder, _ in found]
    twice = [name for name, count in Counter(classes).items() if count > 1]
    require(
        not twice,
        f"root must hold each class in one of train, val and test, but {root} has in more than one: {', '.join(twice)}",
    )
    pairs = [(path, label) for label, (folder, _) in enumerate(found) for path in files_below(folder)]
    if not pairs:
        raise FileNotFoundError(f"{LAYOUT}, but {root} has {len(classes)} class folders and no files in them")
    return Listing(classes, [row for _, row in found], [p for p, _ in pairs], [label for _, label in pairs])


def visible(folder: Path) -> list[Path]:
    """What is in a folder, sorted by name, without what is hidden."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def files_below(folder: Path) -> Iterator[Path]:
    """The files at any depth below a folder."""
    for entry in visible(folder):
        if not entry.is_dir():
            if entry.is_file() or entry.is_symlink():  # a link to nothing is to be named with what does not read
                yield entry
        elif not (entry.is_symlink() and folder.resolve().is_relative_to(entry.resolve())):  # a loop would not end
            yield from files_below(entry)


def try_to_prepare(path: Path, image_size: int, channels: int) -> Array | str:
    """``prepare_image``, or why it cannot be; a disk that fails is not the picture's fault, and raises."""
    try:
        return prepare_image(path, image_size, channels)
    except (InputError, FileNotFoundError) as error:
        return str(error)
