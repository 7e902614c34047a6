"""Omniglot."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch.nn import functional as F

from meta_lightning.checks import require_choice
from meta_lightning.data.cache import LabelledImages
from meta_lightning.data.image_module import DownloadedTasks
from meta_lightning.data.module import options
from meta_lightning.data.tasks import SPLITS, Array, Split, import_learn2learn

FOLDERS = ("images_background", "images_evaluation")
CHARACTERS = 964 + 659  # of these folders
DRAWINGS = 20  # of each character


@options
class Omniglot(DownloadedTasks):
    """1,623 handwritten characters of 50 alphabets, 20 drawings each (Lake, Salakhutdinov and Tenenbaum, Science 2015).

    Images are 28×28, anti-aliased, ink 1 on 0. ``root`` holds, or will hold, torchvision's ``omniglot-py``. Splits:

    * ``"vinyals"``: 1,028 characters to train on, 172 to validate and 423 to test, drawn from all alphabets by
      ``numpy.random.default_rng(0).permutation(1623)``, characters numbered in the order of their paths: the sizes of
      Vinyals et al. (2016) with a choice of our own, since theirs of 1,200 and 423 was not published.
    * ``"background"``: the data set's own; of the 30 background alphabets the last 5 by name validate, and the 20
      evaluation alphabets test.

    Raises:
        InputError: If an option is outside its range, or a split cannot give such tasks.
        FileNotFoundError: If the data set is not under ``root``, or not all of it.
    """

    image_size = 28
    channels = 1
    ink = True

    class_split: Literal["vinyals", "background"] = "vinyals"
    """How the characters are split into train, val and test."""
    rotations: bool = True
    """Multiply the classes by rotations of 90°: a rotated character is a new class, in the split of the character
    itself (Santoro et al., 2016)."""
    meta_batch_size: int = 32

    def __post_init__(self) -> None:
        """Refuse another split."""
        super().__post_init__()
        require_choice(("vinyals", "background"), class_split=self.class_split)

    @property
    def cache_name(self) -> str:
        """A name for each ``root``."""
        return self.named_for_root(f"omniglot-28{'-rotations' if self.rotations else ''}")

    def sources(self) -> list[Path]:
        """The drawings, where all of them are there."""
        _, paths = find_drawings(self.folder)
        return paths if len(paths) == DRAWINGS * CHARACTERS else []

    def build(self) -> LabelledImages:
        """Read the characters, downloaded where they are missing and that is allowed, and add the rotated ones."""
        try:
            data = read_omniglot(self.folder)
        except FileNotFoundError:
            if not self.download:
                raise
            download_omniglot(self.folder)
            data = read_omniglot(self.folder)
        if not self.rotations:
            return data
        C = len(data.classes)
        return LabelledImages(
            images=np.concatenate([np.rot90(data.images, turns, axes=(2, 3)) for turns in range(4)]),
            labels=np.concatenate([data.labels + turns * C for turns in range(4)]),
            classes=np.array([f"{name} {turns * 90}°" for turns in range(4) for name in data.classes]),
            splits=np.tile(data.splits, 4),
        )

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


def read_omniglot(root: Path) -> LabelledImages:
    """Read what torchvision leaves after its download, split into background and evaluation."""
    folder = root / "omniglot-py"
    characters, paths = find_drawings(root)
    if len(characters) != CHARACTERS or len(paths) != CHARACTERS * DRAWINGS:
        raise FileNotFoundError(
            f"root must hold Omniglot: expected {CHARACTERS * DRAWINGS} drawings of {CHARACTERS} characters in "
            f"{folder}/images_background and images_evaluation, got {len(paths)} of {len(characters)}. "
            "Pass --data.download true to download it (and if that leaves it like this, delete the folder first); "
            "without a network, copy there the folder omniglot-py that torchvision.datasets.Omniglot leaves elsewhere"
        )
    rank_zero_info(f"Reading {len(paths)} drawings from {folder} …")
    images = np.concatenate([shrink(paths[start : start + 1024]) for start in range(0, len(paths), 1024)])
    alphabets = [character.parent for character in characters]
    background = sorted({alphabet for alphabet in alphabets if alphabet.parent.name == "images_background"})
    split_of: dict[Path, Split] = {a: "val" if a in background[-5:] else "train" for a in background}
    return LabelledImages(
        images=images,
        labels=np.arange(CHARACTERS).repeat(DRAWINGS),
        classes=np.array([f"{character.parent.name}/{character.name}" for character in characters]),
        splits=np.array([SPLITS.index(split_of.get(alphabet, "test")) for alphabet in alphabets]),
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
    """Download Omniglot through learn2learn."""
    try:
        import_learn2learn().vision.datasets.FullOmniglot(str(root), download=True)
    except Exception as error:
        raise OSError(
            f"Omniglot could not be downloaded to {root}: {error}. Copy there the folder omniglot-py that "
            "torchvision.datasets.Omniglot leaves on a machine with a network"
        ) from None
