"""Reading videos with PyAV: frames by timestamp, in one pass, at the size of a bucket."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from stages.decoding.pyav_frames import (
    Deadline,
    clock_s,
    decoded,
    demuxed,
    no_frame,
    on_screen,
    opened,
    timed,
    tolerance_s,
)
from stages.decoding.pyav_scaling import Filler, display_size
from stages.decoding.pyav_skipping import frames_on_screen, may_skip
from stages.errors import DecodeError

Item = TypeVar("Item")

PROBE_TIMEOUT_S = 60.0

SEEK_FROM_S = 1.0
"""A clip that starts earlier is read from the start of its file."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video is as a player shows it: sizes after rotation and with square pixels."""

    duration_s: float
    fps: float
    height: int
    width: int
    tolerance_s: float  # see ``tolerance_s``
    container: str  # FFmpeg's name of the format


@dataclass
class Shown:
    """The different pictures of a clip, uint8 [H, W, 3], and how many wanted times each is on screen."""

    pictures: list[np.ndarray] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    source_fps: float | None = None


def probe(path: str, deadline: Deadline | None = None) -> VideoInfo:
    """What a video is; its first frame is decoded to be sure of it. Raises DecodeError, as ``read_shown``."""
    deadline = deadline or Deadline(PROBE_TIMEOUT_S)
    with opened(path) as (container, stream):
        first = _first(timed(decoded(demuxed(container, stream, deadline)), stream))
        height, width = display_size(first.picture, stream)
        header_s = float((stream.duration or 0) * (stream.time_base or 0))
        fps, late_s, name = float(stream.average_rate or 0), tolerance_s(stream), container.format.name
    duration_s = header_s or max(first.end_s, _measured_duration_s(path, deadline))
    return VideoInfo(duration_s, fps, round(height), round(width), late_s, name)


def read_shown(path: str, wanted_s: Sequence[float], height: int, width: int, deadline: Deadline) -> Shown:
    """The pictures on screen at the times ``wanted_s`` (ascending, seconds after the stream's first frame).

    Raises DecodeError: missing_file, io_error, undecodable, too_short or timeout.
    """
    read = partial(_read_shown, path, wanted_s, height, width, deadline)
    seek = wanted_s[0] > SEEK_FROM_S
    # What fails may be whole once all is decoded, or, if it cannot be searched or its key frames are none,
    # when it is read from the start.
    attempts = [partial(read, seek=True, skip=True)] * seek + [partial(read, seek=seek, skip=not seek)]
    for attempt in attempts:
        try:
            return attempt()
        except DecodeError as error:
            if error.reason not in ("undecodable", "io_error"):
                raise
    return read(seek=False, skip=False)


def _read_shown(
    path: str, wanted_s: Sequence[float], height: int, width: int, deadline: Deadline, *, seek: bool, skip: bool
) -> Shown:
    shown = Shown()
    with opened(path) as (container, stream):
        filler = Filler(stream, height, width)
        shown.source_fps = float(stream.average_rate) if stream.average_rate else None
        origin_s = _seek(container, stream, wanted_s[0], deadline) if seek else None
        packets = demuxed(container, stream, deadline)
        if skip and may_skip(container, stream):
            frames = frames_on_screen(packets, stream, wanted_s, origin_s)
        else:
            frames = on_screen(timed(decoded(packets), stream, origin_s), wanted_s, tolerance_s(stream))
        for frame, times in frames:
            if frame.damaged:
                raise DecodeError("undecodable", f"damaged at {frame.start_s:.3f} s: errors were concealed")
            shown.pictures.append(filler.fill(frame.picture))
            shown.times.append(times)
    return shown


def _seek(container: InputContainer, stream: VideoStream, start_s: float, deadline: Deadline) -> float:
    """Goes to the last key frame at or before ``start_s``; returns the time of the stream's first frame."""
    first = _first(decoded(demuxed(container, stream, deadline)))
    origin_s = clock_s(first, stream)
    if origin_s is None or not stream.time_base:
        raise no_frame()
    container.seek(int((origin_s + start_s) / stream.time_base), stream=stream)
    return origin_s


def _first(items: Iterable[Item]) -> Item:
    first = next(iter(items), None)
    if first is None:
        raise no_frame()
    return first


def _measured_duration_s(path: str, deadline: Deadline) -> float:
    """The time from the first packet to the end of the last, for files whose header does not tell."""
    starts, ends = [], []
    with opened(path) as (container, stream):
        tick_s = float(stream.time_base or 0)
        for packet in demuxed(container, stream, deadline):
            if packet.pts is not None:
                starts.append(packet.pts * tick_s)
                ends.append((packet.pts + (packet.duration or 0)) * tick_s)
    return max(ends) - min(starts) if starts else 0.0
