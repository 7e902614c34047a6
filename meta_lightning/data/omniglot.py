"""Omniglot."""

import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch.nn import functional as F

from meta_lightning.checks import require_choice
from meta_lightning.data.cache import LabelledImages
from meta_lightning.data.images import ImageTasks
from meta_lightning.data.transforms import ImageTransforms
from meta_lightning.tasks import SPLITS, Array, Split, import_learn2learn

FOLDERS = {"images_background": 964, "images_evaluation": 659}  # characters in each, 20 drawings a character
DRAWINGS = 20


class Omniglot(ImageTasks):
    """1,623 handwritten characters of 50 alphabets, 20 drawings each (Lake, Salakhutdinov and Tenenbaum, Science 2015).

    Images are 28×28, anti-aliased, ink 1 on 0. Splits:

    * ``"vinyals"``: 1,028 characters to train on, 172 to validate and 423 to test, drawn from all alphabets by
      ``numpy.random.default_rng(0).permutation(1623)``, characters numbered in the order of their paths: the sizes of
      Vinyals et al. (2016) with a choice of our own, since theirs of 1,200 and 423 was not published.
    * ``"background"``: the data set's own; of the 30 background alphabets the last 5 by name validate, and the 20
      evaluation alphabets test.

    Args:
        root: Folder that holds, or will hold, torchvision's ``omniglot-py``.
        download: Download it, through learn2learn, when it is missing.
        class_split: How the characters are split into train, val and test.
        rotations: Multiply the classes by rotations of 90°: a rotated character is a new class, in the split of the
            character itself (Santoro et al., 2016).
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
        InputError: If an argument is outside its range, or a split cannot give such tasks.
        FileNotFoundError: If the data set is not under ``root``, or not all of it.
    """

    image_size, channels, ink = 28, 1, True

    @property
    def cache_name(self) -> str:
        """A name for each ``root``, so that a wrong one is not answered from another's cache."""
        rotations = "-rotations" if self.rotations else ""
        return f"omniglot-28{rotations}-{zlib.crc32(str(self.root.resolve()).encode()):08x}"

    def sources(self) -> list[Path]:
        """The drawings, where all of them are there."""
        _, paths = find_drawings(self.root)
        return paths if len(paths) == DRAWINGS * sum(FOLDERS.values()) else []

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        class_split: Literal["vinyals", "background"] = "vinyals",
        rotations: bool = True,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        train_ways: int | None = None,
        train_shots: int | tuple[int, int] | None = None,
        train_queries: int | None = None,
        meta_batch_size: int = 32,
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
        require_choice(("vinyals", "background"), class_split=class_split)
        self.root = Path(root).expanduser()
        self.download = download
        self.class_split = class_split
        self.rotations = rotations

    def build(self) -> LabelledImages:
        """Read the characters, downloaded where they are missing and that is allowed, and add the rotated ones."""
        try:
            data = read_omniglot(self.root)
        except FileNotFoundError:
            if not self.download:
                raise
            download_omniglot(self.root)
            data = read_omniglot(self.root)
        return rotated(data) if self.rotations else data

    def arrange(self, data: LabelledImages) -> LabelledImages:
        """Split the characters as ``class_split`` says."""
        if self.class_split == "background":
            return data
        turns = 4 if self.rotations else 1
        characters = np.random.default_rng(0).permutation(len(data.classes) // turns)
        splits = np.empty_like(characters)
        for split, members in enumerate(np.split(characters, [1028, 1028 + 172])):
            splits[members] = split
        return data._replace(splits=np.tile(splits, turns))


def rotated(data: LabelledImages) -> LabelledImages:
    """The characters turned by 0, 90, 180 and 270 degrees, each a class in the split of its character."""
    C = len(data.classes)
    return LabelledImages(
        images=np.concatenate([np.rot90(data.images, turns, axes=(2, 3)) for turns in range(4)]),
        labels=np.concatenate([data.labels + turns * C for turns in range(4)]),
        classes=np.array([f"{name} {turns * 90}°" for turns in range(4) for name in data.classes]),
        splits=np.tile(data.splits, 4),
    )


def read_omniglot(root: Path) -> LabelledImages:
    """Read what torchvision leaves after its download, split into background and evaluation.

    Raises:
        FileNotFoundError: If images are missing, saying how to get them.
        OSError: If an image does not read.
    """
    folder = root / "omniglot-py"
    characters, paths = find_drawings(root)
    expected = sum(FOLDERS.values())
    if len(characters) != expected or len(paths) != expected * DRAWINGS:
        raise FileNotFoundError(
            f"root must hold Omniglot: expected {expected * DRAWINGS} drawings of {expected} characters in "
            f"{folder}/images_background and images_evaluation, got {len(paths)} of {len(characters)}. "
            "Pass --data.download true to download it (and if that leaves it like this, delete the folder first); "
            "without a network, copy there the folder omniglot-py that torchvision.datasets.Omniglot leaves elsewhere"
        )
    rank_zero_info(f"Reading {len(paths)} drawings from {folder} …")
    images = np.concatenate([shrink(paths[start : start + 1024]) for start in range(0, len(paths), 1024)])
    alphabets = [character.parent for character in characters]
    validation = sorted({a for a in alphabets if a.parent.name == "images_background"})[-5:]
    split_of: dict[Path, Split] = {alphabet: "val" if alphabet in validation else "train" for alphabet in alphabets}
    split_of |= {a: "test" for a in alphabets if a.parent.name == "images_evaluation"}
    return LabelledImages(
        images=images,
        labels=np.arange(expected).repeat(DRAWINGS),
        classes=np.array([f"{character.parent.name}/{character.name}" for character in characters]),
        splits=np.array([SPLITS.index(split_of[alphabet]) for alphabet in alphabets]),
    )


def find_drawings(root: Path) -> tuple[list[Path], list[Path]]:
    """The folders of the characters under ``root``, and the drawings in them."""
    characters = [character for name in FOLDERS for character in sorted((root / "omniglot-py" / name).glob("*/*"))]
    return characters, [path for character in characters for path in sorted(character.glob("*.png"))]


def shrink(paths: list[Path]) -> Array:
    """Read drawings, black ink on white, as 28×28 with ink 255 on 0.  # M 1 28 28, uint8"""
    drawings = torch.stack([read_drawing(path) for path in paths]).unsqueeze(1).float()
    small = F.interpolate(255 * drawings, size=(28, 28), mode="bilinear", antialias=True)
    return small.round().to(torch.uint8).numpy()


def read_drawing(path: Path) -> torch.Tensor:
    """The ink of one drawing.  # 105 105, bool"""
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("1")) == 0)
    except OSError as error:
        raise OSError(f"root must hold readable drawings, but {path} does not read: {error}") from None


def download_omniglot(root: Path) -> None:
    """Download Omniglot through learn2learn.

    Raises:
        OSError: If it cannot be had, saying how else to get it.
    """
    try:
        import_learn2learn().vision.datasets.FullOmniglot(str(root), download=True)
    except Exception as error:
        raise OSError(
            f"Omniglot could not be downloaded to {root}: {error}. Copy there the folder omniglot-py that "
            "torchvision.datasets.Omniglot leaves on a machine with a network"
        ) from None
