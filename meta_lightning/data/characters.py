"""Glyphs and Omniglot together."""

from typing import Literal

import numpy as np

from meta_lightning.checks import require_choice
from meta_lightning.data.cache import LabelledImages
from meta_lightning.data.glyph_drawings import draw_glyphs
from meta_lightning.data.glyphs import Glyphs
from meta_lightning.data.module import options
from meta_lightning.data.omniglot import Omniglot


@options
class Characters(Omniglot):
    """The characters of ``Glyphs`` and of ``Omniglot``, each in the split of its alphabet.

    Training has the 25 background alphabets of Omniglot that are not for validation, and the training alphabets of
    the glyphs.

    Raises:
        InputError: If an option is outside its range, or a split has too few classes or images for its tasks.
        FileNotFoundError: If files of Omniglot are missing under ``root``.
        OSError: If the download fails, or a drawing is corrupt.
    """

    class_split: Literal["vinyals", "background"] = "background"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(("background",), class_split=self.class_split)

    @staticmethod
    def group_of(class_name: str) -> str:
        """The alphabet of a character."""
        return class_name.rpartition("/")[0] or Glyphs.group_of(class_name)

    @property
    def cache_name(self) -> str:
        """A name unique to ``root`` and the rotations."""
        return f"characters-{super().cache_name}"

    def build(self) -> LabelledImages:
        """Read the drawings and draw the glyphs."""
        omniglot, glyphs = super().build(), draw_glyphs()
        return LabelledImages(
            images=np.concatenate([omniglot.images, glyphs.images]),
            labels=np.concatenate([omniglot.labels, glyphs.labels + len(omniglot.classes)]),
            classes=np.concatenate([omniglot.classes, glyphs.classes]),
            splits=np.concatenate([omniglot.splits, glyphs.splits]),
        )
