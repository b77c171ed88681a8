"""A picture file as a clip of one frame."""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps

from stages.decoding.fit import cover, crop_centre
from stages.decoding.pyav_reader import VideoInfo
from stages.errors import DecodeError

_PILLOW_ERRORS = (  # what its parsers raise on damaged files
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    TypeError,
    LookupError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

_EXIF_ORIENTATION = 0x0112
_LYING = frozenset({5, 6, 7, 8})
"""Values of the tag at which a picture is stored with its rows upright."""


def probe_picture(path: str) -> VideoInfo:
    """What a picture is, upright, by its header alone: no frame rate, and a duration of 0.

    Raises DecodeError: missing_file or undecodable.
    """
    with _opened(path) as file:
        lying = file.getexif().get(_EXIF_ORIENTATION) in _LYING
        width, height = file.size[::-1] if lying else file.size
        return VideoInfo(0.0, 0.0, height, width, 0.0, (file.format or "").lower())


def decode_image(path: str, height: int, width: int) -> np.ndarray:
    """A picture as a clip of one frame, uint8 [1, H, W, 3] RGB.

    Upright by its EXIF tag; white where it is transparent. Raises DecodeError: missing_file or undecodable.
    """
    with _opened(path) as file:
        picture = _eight_bit(ImageOps.exif_transpose(file))
    scaled = cover((picture.height, picture.width), height, width)
    rgb = np.asarray(picture.resize((scaled[1], scaled[0]), Image.Resampling.BICUBIC))
    return crop_centre(rgb, height, width)[None].copy()


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """The file, closed whatever happens. Pillow's errors become DecodeErrors."""
    try:
        with Image.open(path) as file:
            yield file
    except FileNotFoundError:
        raise DecodeError("missing_file", "there is no such file") from None
    except _PILLOW_ERRORS as error:
        raise DecodeError("undecodable", f"not a picture that can be read: {error}") from error


def _eight_bit(picture: Image.Image) -> Image.Image:
    """A picture of any mode as 8-bit RGB."""
    if picture.mode.startswith("I;16"):  # Pillow would clip at 255
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")
