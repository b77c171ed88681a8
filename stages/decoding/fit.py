"""How a picture of any shape fills a bucket: scaled until it covers it, cropped around its centre."""

import math

import numpy as np

from stages.errors import DecodeError

MAX_SCALED_PX = 1 << 26
"""A clip whose scaled frame would be larger has a damaged header rather than so long a shape."""


def cover(display: tuple[float, float], height: int, width: int) -> tuple[int, int]:
    """The size (height, width) at which a picture of the size ``display`` (height, width) covers a bucket."""
    scale = max(height / display[0], width / display[1])
    scaled = (max(height, round(display[0] * scale)), max(width, round(display[1] * scale)))
    if math.prod(scaled) > MAX_SCALED_PX:
        raise DecodeError("undecodable", f"a shape of {display[1]:g}x{display[0]:g} pixels is absurd")
    return scaled


def crop_centre(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle [height, width, 3] of a picture [H, W, 3]."""
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return picture[top : top + height, left : left + width]
