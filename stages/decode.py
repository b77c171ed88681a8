"""A video or picture file and a time span -> the frames that a bucket holds.

Frames are picked by timestamp: frame i of a clip is the one on screen at ``start_s + i / fps``, whatever the
source's rate and however unsteady. A frame is scaled until it covers the bucket, in its display shape (rotation
and non-square pixels applied), and cropped around its centre.
"""

import faulthandler
import math
import os
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from stages.errors import DecodeError
from stages.pictures import cover
from stages.plan import PlannedClip
from stages.reader import Deadline, VideoInfo, read_info, read_pictures

DECODERS = ("pyav", "decord")
POLICY = {
    "frames": "shown at start_s + i / fps",
    "resize": "bicubic, antialiased, covering the bucket",
    "crop": "centre",
}
"""What decoding does to a clip, beside its size and rate: part of the fingerprint of what is made from it."""

REPEATS_SHARE = 0.25
RATE_SLACK = 0.98
"""See ``_check_rate``."""

_PILLOW_ERRORS = (  # what its parsers raise on damaged files
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    TypeError,
    KeyError,
    IndexError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def decode_source(clip: PlannedClip, frames: int, height: int, width: int, *, timeout_s: float) -> np.ndarray:
    """The frames of a planned clip, uint8 [frames, height, width, 3] RGB; DecodeError says why there are none."""
    if clip.kind == "image":
        return decode_image(clip.path, height, width)
    return decode_clip(
        clip.path,
        start_s=clip.start_s,
        frames=frames,
        fps=clip.fps,
        height=height,
        width=width,
        timeout_s=timeout_s,
    )
