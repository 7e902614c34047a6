"""From a picture file to what the network sees: the same at training and when it predicts."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from meta_lightning.checks import InputError
from meta_lightning.data.tasks import Array

WHITE = {"I": 65535, "F": 1.0}  # of pixels with more than 8 bits, where the image keeps to it
TRANSPARENT = ("LA", "PA", "RGBA", "RGBa")
UPRIGHT: dict[Any, Image.Transpose] = {  # what undoes each EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def prepare_image(source: str | Path | BinaryIO, image_size: int, channels: int) -> Array:
    """Read one picture as the network gets it, at training and when it predicts.  # C H W, uint8

    It is turned as its EXIF orientation says, transparent parts show white, and it is shrunk or enlarged, anti-aliased,
    until the shorter side fits, and cut to the square in its middle. Grey levels of 16 bits are divided by 257; whole
    numbers beyond 16 bits, and floating-point ones outside [0, 1], run from the picture's least, black, to its
    greatest, white. Of an animation or several pages it is the first. Colour profiles are not applied.

    Args:
        source: The picture's path, or a file opened for reading bytes.
        image_size: Side of the square, in pixels.
        channels: 3 for colour, 1 for grey (ITU-R 601-2 luma).

    Raises:
        InputError: If it is not a picture, or not a whole one.
        OSError: If the file cannot be read from its disk.
    """
    name = source if isinstance(source, str | Path) else getattr(source, "name", "the file")
    data = Path(source).read_bytes() if isinstance(source, str | Path) else source.read()
    try:
        with Image.open(BytesIO(data)) as image:
            image.draft(None, (2 * image_size, 2 * image_size))  # a large JPEG decodes faster at 1/2, 1/4 or 1/8
            image.load()
            # ImageOps.exif_transpose would also write the remaining EXIF, and fail where that is malformed
            turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
            upright = image.transpose(turn) if turn is not None else image
            plain = on_white(to_8_bits(upright)).convert("L" if channels == 1 else "RGB")
            square = ImageOps.fit(plain, (image_size, image_size), method=Image.Resampling.BILINEAR)
    except Exception as error:  # a spoilt picture fails in many ways, and each means the same
        reason = "no format that pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(f"{name} does not read as a picture: {reason}") from error
    return np.array(square).reshape(image_size, image_size, channels).transpose(2, 0, 1)


def to_8_bits(image: Image.Image) -> Image.Image:
    """Scale grey levels of 16 or more bits, which pillow would clip, to 8."""
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
    """Lay an image with transparent parts on white."""
    if image.mode not in TRANSPARENT and "transparency" not in image.info:
        return image
    opaque = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque)


def left_out(unread: Sequence[str], files: int, folder: str) -> str:
    """What is said of files that do not read as pictures: how many of the folder's they are, and which."""
    more = f"; and {len(unread) - 10} more" if len(unread) > 10 else ""
    return f"{len(unread)} of the {files} files in {folder} are left out: {'; '.join(unread[:10])}{more}"
