"""Image files converted to network input, in the same way for training and prediction."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from meta_lightning.checks import InputError
from meta_lightning.data.tasks import Array

WHITE = {"I": 65535, "F": 1.0}  # white level of modes with more than 8 bits, by their first letter
UPRIGHT: dict[Any, Image.Transpose] = {  # undoes each EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def prepare_image(source: str | Path | BinaryIO, image_size: int, channels: int) -> Array:
    """Read an image, by its path or as a binary file, as network input.  # C H W, uint8

    The image is rotated according to its EXIF orientation and transparent parts become white. It is resized with
    anti-aliasing until its shorter side fits, and the central square is kept. 16-bit grey levels are divided by 257;
    32-bit integers beyond 16 bits and floating-point levels outside [0, 1] are scaled linearly from the image's minimum
    (black) and maximum (white). One channel is grey (ITU-R 601-2 luma), 3 are colour. The first frame or page is used.
    Colour profiles are ignored.

    Raises:
        InputError: If the file is not an image, or is corrupt.
        OSError: If the file cannot be read from disk.
    """
    name = source if isinstance(source, str | Path) else getattr(source, "name", "the file")
    data = Path(source).read_bytes() if isinstance(source, str | Path) else source.read()
    try:
        with Image.open(BytesIO(data)) as image:
            image.draft(None, (2 * image_size, 2 * image_size))  # a large JPEG decodes faster at 1/2, 1/4 or 1/8
            image.load()
            # not ImageOps.exif_transpose, which rewrites the other EXIF entries and fails if they are malformed
            turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
            upright = image.transpose(turn) if turn is not None else image
            plain = on_white(to_8_bits(upright)).convert("L" if channels == 1 else "RGB")
            square = ImageOps.fit(plain, (image_size, image_size), method=Image.Resampling.BILINEAR)
    except Exception as error:  # Pillow raises many types of exceptions for corrupt files
        reason = "no format that Pillow supports" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(f"{name} is not a readable image: {reason}") from error
    return np.array(square).reshape(image_size, image_size, channels).transpose(2, 0, 1)


def to_8_bits(image: Image.Image) -> Image.Image:
    """Scale grey levels of 16 or more bits, which Pillow would clip, to 8."""
    if image.mode[0] not in WHITE:  # I and F, and I;16 in its byte orders
        return image
    values = np.asarray(image, dtype=np.float64)  # H W
    black, white = 0.0, WHITE[image.mode[0]]
    finite = values[np.isfinite(values)]
    if finite.min() < black or finite.max() > white:
        black, white = finite.min(), finite.max()
    levels = np.nan_to_num((values - black) / max(white - black, 1e-12), nan=0, posinf=1, neginf=0)
    return Image.fromarray((255 * levels).round().astype(np.uint8))


def on_white(image: Image.Image) -> Image.Image:
    """Composite an image with transparency onto white."""
    if not image.has_transparency_data:
        return image
    opaque = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque)


def left_out(unread: Sequence[str], files: int, folder: str) -> str:
    """The warning about files that are not readable images: their number, and the first ten reasons."""
    more = f"; and {len(unread) - 10} more" if len(unread) > 10 else ""
    return f"{len(unread)} of the {files} files in {folder} are left out: {'; '.join(unread[:10])}{more}"
