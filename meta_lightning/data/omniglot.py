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
from meta_lightning.data.processes import mapped
from meta_lightning.data.tasks import Array, import_learn2learn

CHARACTERS = 964 + 659  # of images_background and images_evaluation
DRAWINGS = 20  # of each character


@options
class Omniglot(DownloadedTasks):
    """1,623 handwritten characters of 50 alphabets, 20 drawings each (Lake, Salakhutdinov and Tenenbaum, Science 2015).

    Images are 28×28, anti-aliased, ink 1 on 0. ``root`` holds torchvision's folder ``omniglot-py``. Splits:

    * ``"vinyals"``: 1,028 characters for training, 172 for validation and 423 for test, drawn from all alphabets by
      ``numpy.random.default_rng(0).permutation(1623)``, with characters numbered in the order of their paths. The sizes
      are those of Vinyals et al. (2016), who did not publish their split of 1,200 and 423.
    * ``"background"``: the data set's own split. The last 5 by name of the 30 background alphabets are for validation,
      the 20 evaluation alphabets for test.

    Raises:
        InputError: If an option is outside its range, or a split has too few classes or images for its tasks.
        FileNotFoundError: If files of the data set are missing under ``root``.
        OSError: If the download fails, or a drawing is corrupt.
    """

    image_size = 28
    channels = 1
    ink = True
    title = "Omniglot"
    origin = "the folder omniglot-py that torchvision.datasets.Omniglot downloads"

    class_split: Literal["vinyals", "background"] = "vinyals"
    """Split of the characters into train, val and test."""
    rotations: bool = True
    """Multiply the classes by rotations of 90°: a rotated character is a new class, in the split of the original
    character (Santoro et al., 2016)."""
    meta_batch_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(("vinyals", "background"), class_split=self.class_split)

    @property
    def cache_name(self) -> str:
        """A name unique to ``root`` and the rotations."""
        return self.named_for_root(f"omniglot-28{'-rotations' if self.rotations else ''}")

    def drawings(self) -> list[Path]:
        """The drawings under ``root``, sorted by path."""
        folders = [self.folder / "omniglot-py" / f"images_{part}" for part in ("background", "evaluation")]
        return [path for folder in folders for path in sorted(folder.glob("*/*/*.png"))]

    def sources(self) -> list[Path]:
        """The drawings; empty if some are missing."""
        paths = self.drawings()
        return paths if len(paths) == CHARACTERS * DRAWINGS else []

    def missing(self) -> str:
        """The numbers of drawings and characters, for messages; empty if they are complete."""
        paths = self.drawings()
        expected = f"{CHARACTERS * DRAWINGS} drawings of {CHARACTERS} characters"
        found = f"{len(paths)} drawings of {len({path.parent for path in paths})} characters"
        where = f"{self.folder}/omniglot-py (delete an incomplete folder first)"
        return "" if found == expected else f"expected {expected} in {where}, got {found}"

    def fetch(self) -> None:
        """Download torchvision's folder."""
        import_learn2learn().vision.datasets.FullOmniglot(str(self.folder), download=True)

    def build(self) -> LabelledImages:
        """Read the characters, with the split "background", and add the rotated ones."""
        self.require_files()
        paths = self.drawings()
        rank_zero_info(f"Reading {len(paths)} drawings from {self.folder} …")
        parts = [paths[start : start + 1024] for start in range(0, len(paths), 1024)]
        images = np.concatenate([*mapped(shrink, parts, chunk=1)])
        characters = [path.parent for path in paths[::DRAWINGS]]
        val = sorted({c.parent for c in characters if c.parent.parent.name == "images_background"})[-5:]
        splits = [2 if c.parent.parent.name == "images_evaluation" else int(c.parent in val) for c in characters]
        names = [f"{character.parent.name}/{character.name}" for character in characters]
        turns = range(4 if self.rotations else 1)
        return LabelledImages(
            images=np.concatenate([np.rot90(images, turn, axes=(2, 3)) for turn in turns]),
            labels=np.arange(len(turns) * CHARACTERS).repeat(DRAWINGS),
            classes=np.array([f"{name} {turn * 90}°" if self.rotations else name for turn in turns for name in names]),
            splits=np.tile(splits, len(turns)),
        )

    def arrange(self, data: LabelledImages) -> LabelledImages:
        """Split the characters by ``class_split``."""
        if self.class_split == "background":
            return data
        splits = np.empty(CHARACTERS, dtype=np.int64)
        splits[np.random.default_rng(0).permutation(CHARACTERS)] = np.repeat([0, 1, 2], [1028, 172, 423])
        return data._replace(splits=np.tile(splits, len(data.classes) // CHARACTERS))


def shrink(paths: list[Path]) -> Array:
    """Read drawings, black ink on white, as 28×28 images with ink 255 on 0.  # M 1 28 28, uint8"""
    drawings = torch.stack([read_drawing(path) for path in paths]).unsqueeze(1).float()
    small = F.interpolate(255 * drawings, size=(28, 28), mode="bilinear", antialias=True)
    return small.round().to(torch.uint8).numpy()


def read_drawing(path: Path) -> torch.Tensor:
    """The ink of one drawing.  # 105 105, bool"""
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("1")) == 0)
    except OSError as error:
        raise OSError(f"root must hold readable drawings, but {path} cannot be read: {error}") from None
