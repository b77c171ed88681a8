"""What a file of the videos folder is: its length, rate and size, for rows whose metadata does not tell."""

import os
import struct
import zlib
from collections.abc import Callable, Iterator

from PIL import ExifTags, Image

from stages.errors import DecodeError
from stages.metadata import Row
from stages.pyav_reader import VideoInfo, probe

Probe = Callable[[Iterator[Row]], Iterator[VideoInfo | DecodeError]]
"""For each row in order: what its file is, or why it cannot be used."""

PILLOW_ERRORS = (  # what its parsers raise on damaged files
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


_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width


def probe_here(videos_folder: str) -> Probe:
    """A probe that looks at one file after the other, in this process."""
    return lambda rows: (probe_row(row, videos_folder) for row in rows)


def probe_row(row: Row, videos_folder: str) -> VideoInfo | DecodeError:
    """What the file of a row is; the error, not raised, where it cannot be used."""
    path = os.path.join(videos_folder, row.path or "")
    try:
        return probe_picture(path) if row.kind == "image" else probe(path)
    except DecodeError as error:
        return error


def probe_picture(path: str) -> VideoInfo:
    """The size of a picture, upright by its EXIF tag. Raises DecodeError: missing_file or undecodable."""
    try:
        with Image.open(path) as picture:
            turned = picture.getexif().get(ExifTags.Base.Orientation, 1) in _TURNED
            size = picture.size[::-1] if turned else picture.size
            name = (picture.format or "").lower()
    except FileNotFoundError:
        raise DecodeError("missing_file", "there is no such file") from None
    except PILLOW_ERRORS as error:
        raise DecodeError("undecodable", f"not a picture that can be read: {error}") from error
    return VideoInfo(duration_s=0, fps=0, height=size[1], width=size[0], tolerance_s=0, container=name)
