"""A video or picture file and a span of time -> the frames that a bucket holds.

Frames are picked by timestamp: frame i of a clip is the one on screen at ``start_s + i / fps``, whatever the
source's rate and however unsteady. A frame is scaled until it covers the bucket, in the shape that players
show (rotation and non-square pixels applied), and cropped around its centre.
"""

import faulthandler
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from stages.decoding.picture import decode_image
from stages.decoding.pyav_frames import Deadline
from stages.decoding.pyav_reader import Shown, read_shown
from stages.errors import DecodeError
from stages.planning.plan import PlannedClip

Decoder = Literal["pyav", "decord"]

POLICY = {
    "frames": "by timestamp",
    "resize": "cover, bicubic, antialiased, swscale",
    "crop": "centre, as much as the sampling grid allows before scaling",
}
"""What decoding does beside size, rate and decoder: part of the fingerprint of what is made of the frames."""

REPEATS_SHARE = 0.25
RATE_SLACK = 0.98
"""See ``_check_rate``."""


@dataclass(frozen=True)
class Frames:
    """What a bucket holds of a clip: uint8 [T, H, W, 3] RGB, and where in its file it starts."""

    pixels: np.ndarray
    start_s: float


def decode_source(
    clip: PlannedClip, frames: int, height: int, width: int, *, timeout_s: float, decoder: Decoder
) -> Frames:
    """The frames of a planned clip, a video or a picture: see ``decode_clip`` and ``decode_image``.

    A file may be shorter than its metadata says: where the planned window lies beyond its end, the clip's
    beginning is taken.
    """
    if clip.kind == "image":
        return Frames(decode_image(clip.path, height, width), 0.0)
    settings: dict[str, Any] = {"fps": clip.fps, "height": height, "width": width, "decoder": decoder}
    decode = partial(decode_clip, clip.path, frames=frames, timeout_s=timeout_s, **settings)
    try:
        return Frames(decode(start_s=clip.start_s), clip.start_s)
    except DecodeError as error:
        if error.reason != "too_short" or clip.start_s == clip.clip_start_s:
            raise
    return Frames(decode(start_s=clip.clip_start_s), clip.clip_start_s)


def decode_clip(
    path: str,
    *,
    start_s: float,
    frames: int,
    fps: float,
    height: int,
    width: int,
    timeout_s: float,
    decoder: Decoder = "pyav",
) -> np.ndarray:
    """``frames`` frames from ``start_s`` (seconds after the video's first frame), uint8 [T, H, W, 3] RGB.

    ``decoder`` "pyav" reads the video once and sees damage that H.264 and MPEG-4 decoders hide, but for damage
    in frames that none of the wanted ones needs. "decord" asks decord and leaves to PyAV what decord cannot
    decode or would mistime.

    Raises DecodeError, whose reason is one of
    missing_file   there is no such file
    io_error       it cannot be read now
    undecodable    it is no video, or is damaged where it was read
    too_short      the last wanted frame lies beyond the last frame's end
    low_frame_rate frames would have to be repeated: see ``_check_rate``
    timeout        it took longer than ``timeout_s``; checked between packets; for what hangs see ``hard_deadline``
    """
    wanted_s = [start_s + index / fps for index in range(frames)]
    deadline = Deadline(timeout_s)
    shown = None
    if decoder == "decord":
        from stages.decoding.decord_reader import read_shown_by_decord  # a second FFmpeg: loaded by those who use it

        shown = read_shown_by_decord(path, wanted_s, height, width, deadline)
    if shown is None:
        shown = read_shown(path, wanted_s, height, width, deadline)
    _check_rate(shown, frames, fps)
    return np.stack([picture for picture, times in zip(shown.pictures, shown.times, strict=True) for _ in range(times)])


HANGING = 2
"""After so many times the timeout, which decoders look at between packets only, a process is ended."""


@contextmanager
def hard_deadline(seconds: float) -> Iterator[None]:
    """Ends this process, with a traceback on stderr, if the block takes longer: for C code that hangs.

    One at a time in a process; for worker processes whose end somebody sees.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _check_rate(shown: Shown, frames: int, fps: float) -> None:
    """Refuses a source below the wanted rate, whose frames would be shown more than once.

    A source of an unsteady rate repeats a frame now and then and is welcome. Too slow is one that repeats
    more than a quarter of the frames, or any frame while its own mean rate is below the wanted one.
    """
    repeats = frames - len(shown.pictures)
    slow = shown.source_fps is not None and shown.source_fps < RATE_SLACK * fps
    if repeats > REPEATS_SHARE * frames or (repeats and slow):
        rate = f"{shown.source_fps:.3g} fps" if shown.source_fps else "an unknown rate"
        message = f"{repeats} of {frames} frames at {fps:g} fps would be repeats: the source has {rate}"
        raise DecodeError("low_frame_rate", message)
