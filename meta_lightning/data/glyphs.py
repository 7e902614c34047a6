"""The built-in data set: characters of many scripts, rendered from fonts and split by alphabet."""

import zlib
from importlib.metadata import version
from pathlib import Path

from meta_lightning.data import glyph_drawings
from meta_lightning.data.cache import LabelledImages
from meta_lightning.data.glyph_drawings import alphabet_of, draw_glyphs
from meta_lightning.data.image_module import ImageTasks


class Glyphs(ImageTasks):
    """About 1,600 characters of 15 alphabets, 20 drawings each, 28×28, from matplotlib's fonts.

    Nothing is downloaded: the drawings are rendered once, in seconds, and cached. Raw pixels are as hard to classify as
    Omniglot's. Training, validation and test have different alphabets (``glyph_drawings.ALPHABET_SPLIT``).
    """

    image_size = 28
    channels = 1
    ink = True

    @property
    def cache_name(self) -> str:
        """A name that changes with the drawing code and its libraries."""
        drawn_by = [Path(glyph_drawings.__file__).read_text(), version("matplotlib"), version("pillow")]
        return f"glyphs-28-{zlib.crc32(' '.join(drawn_by).encode()):08x}"

    def build(self) -> LabelledImages:
        """Draw the characters."""
        return draw_glyphs()

    @staticmethod
    def group_of(class_name: str) -> str:
        """The alphabet of a character."""
        return alphabet_of(class_name).title()
