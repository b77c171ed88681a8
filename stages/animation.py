"""Pictures that move, without a video encoder: the trainer shows its samples so, and loads none."""

from pathlib import Path
from typing import IO, Literal

import numpy as np
from PIL import Image

from shards import storage


def write_animation(path: Path, frames: np.ndarray, fps: float, kind: Literal["gif", "png"]) -> None:
    """As `encode_animation` makes it."""
    with storage.write_whole(path) as file:
        encode_animation(file, frames, fps, kind)


def encode_animation(file: IO[bytes], frames: np.ndarray, fps: float, kind: Literal["gif", "png"]) -> None:
    """A picture that moves for ever, in 256 colours a frame (gif) or without loss (png); of one frame, a still.

    frames: uint8 [T, H, W, 3] RGB. A frame that equals the one before is shown longer instead of stored again.
    """
    ends_cs = np.round(np.arange(len(frames) + 1) * 100 / fps).astype(int)  # GIF knows hundredths of a second
    first, *others = map(Image.fromarray, frames)
    durations_ms = (10 * np.diff(ends_cs)).tolist()
    first.save(file, kind, save_all=True, append_images=others, duration=durations_ms, loop=0)
