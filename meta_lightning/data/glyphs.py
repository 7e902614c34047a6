"""The embedded default: characters of many scripts, drawn here and split by alphabet."""

import numpy as np

from meta_lightning.data.glyph_drawings import ALPHABET_SPLIT, draw_glyphs
from meta_lightning.data.images import ImageTasks, LabelledImages
from meta_lightning.tasks import SPLITS


class Glyphs(ImageTasks):
    """About 1,600 characters of 15 alphabets, 20 drawings each, 28×28, from the fonts that matplotlib ships.

    As hard as Omniglot for raw pixels, and nothing is downloaded: the drawings are made in seconds, once, and cached.
    Training, validation and test have different alphabets (``glyph_drawings.ALPHABET_SPLIT``).

    The arguments are those of ``ImageTasks``.
    """

    cache_name = "glyphs-28"

    def build(self) -> LabelledImages:
        """Draw the characters."""
        drawings = draw_glyphs()
        C, D = drawings.images.shape[:2]
        return LabelledImages(
            images=drawings.images.flatten(0, 1).unsqueeze(1).numpy(),
            labels=np.arange(C).repeat(D),
            classes=np.array(drawings.classes),
            splits=np.array([SPLITS.index(ALPHABET_SPLIT[alphabet]) for alphabet in drawings.alphabets]),
        )
