"""Reading videos with PyAV: frames by timestamp, in one pass, at the size of a bucket.

Decoding uses one thread. That leaves the cores to other clips, and only then does FFmpeg report the frames in
which it concealed errors: with frame threads the report is lost and a damaged clip looks like a good one.
"""

import os
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from stages.errors import DecodeError
from stages.fit import cover, crop_centre

MAX_TOLERANCE_S = 0.0005

PROBE_TIMEOUT_S = 60.0

SEEK_FROM_S = 1.0
"""A clip that starts earlier is read from the start of its file."""

MAX_FRAME_PX = "67108864"  # 8192 x 8192: more is a damaged header that would take all memory

# swscale's flags; PyAV 17, the last for Python 3.10, has no names for all of them. Without the last three
# pictures of an even width lose half of their colour resolution, and pictures that keep their size get darker.
BICUBIC, FULL_CHROMA, ACCURATE_ROUNDING, BITEXACT = 0x4, 0x2000, 0x40000, 0x80000
SCALER = BICUBIC | FULL_CHROMA | ACCURATE_ROUNDING | BITEXACT

UNSPECIFIED = 2
MATRICES = frozenset({0, 1, UNSPECIFIED, 4, 5, 6, 7, 9})
"""Matrix coefficients of ITU-T H.273 that swscale converts; it takes BT.601 for an unspecified one."""


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


class Deadline:
    """A moment after which a clip is given up."""

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s

    def check(self) -> None:
        if time.monotonic() > self._end:
            raise DecodeError("timeout", f"decoding took longer than {self._timeout_s:g} s")


@dataclass(frozen=True)
class _Frame:
    """A frame and when it is on screen, in seconds after the first of its stream."""

    start_s: float
    end_s: float
    picture: VideoFrame
    damaged: bool


def probe(path: str, deadline: Deadline | None = None) -> VideoInfo:
    """What a video is; its first frame is decoded to be sure of it. Raises DecodeError, as ``read_shown``."""
    deadline = deadline or Deadline(PROBE_TIMEOUT_S)
    with opened(path) as (container, stream):
        first = next(_frames(container, stream, deadline), None)
        if first is None:
            raise _no_frame()
        height, width = display_size(first.picture, stream)
        header_s = float((stream.duration or 0) * (stream.time_base or 0))
        fps, late_s, name = float(stream.average_rate or 0), tolerance_s(stream), container.format.name
    duration_s = header_s or max(first.end_s, _measured_duration_s(path, deadline))
    return VideoInfo(duration_s, fps, round(height), round(width), late_s, name)


def read_shown(path: str, wanted_s: Sequence[float], height: int, width: int, deadline: Deadline) -> Shown:
    """The pictures on screen at the times ``wanted_s`` (ascending, seconds after the stream's first frame).

    Raises DecodeError: missing_file, io_error, undecodable, too_short or timeout.
    """
    if wanted_s[0] > SEEK_FROM_S:
        try:
            return _read_shown(path, wanted_s, height, width, deadline, seek=True)
        except DecodeError as error:
            if error.reason not in ("undecodable", "io_error"):
                raise
            # It cannot be searched, or its key frames are none: it may be whole when read from the start.
    return _read_shown(path, wanted_s, height, width, deadline, seek=False)


def _read_shown(
    path: str, wanted_s: Sequence[float], height: int, width: int, deadline: Deadline, *, seek: bool
) -> Shown:
    shown = Shown()
    scaler = VideoReformatter()
    with opened(path) as (container, stream):
        shown.source_fps = float(stream.average_rate) if stream.average_rate else None
        frames = _frames_from(container, stream, wanted_s[0] if seek else 0.0, deadline)
        for frame, times in _pick(frames, wanted_s, tolerance_s(stream)):
            if frame.damaged:
                raise DecodeError("undecodable", f"damaged at {frame.start_s:.3f} s: errors were concealed")
            shown.pictures.append(_fill(frame.picture, stream, height, width, scaler))
            shown.times.append(times)
    return shown


def tolerance_s(stream: VideoStream) -> float:
    """How late a frame may be and still be on time: containers round times to their ticks, WebM to 1 ms."""
    return min(float(stream.time_base or 0) / 2, MAX_TOLERANCE_S) + 1e-5


def _pick(frames: Iterator[_Frame], wanted_s: Sequence[float], late_s: float) -> Iterator[tuple[_Frame, int]]:
    """Of frames in the order of their times, those on screen at the wanted ones, and at how many of them."""
    done = 0
    on_screen = next(frames, None)
    if on_screen is None:
        raise _no_frame()
    if on_screen.start_s > wanted_s[0] + late_s:
        raise DecodeError("undecodable", f"no key frame at or before {wanted_s[0]:.3f} s was found")
    while done < len(wanted_s):
        following = next(frames, None)
        until_s = on_screen.end_s if following is None else following.start_s - late_s
        past = bisect_left(wanted_s, until_s)
        if past > done:
            yield on_screen, past - done
            done = past
        if following is None:
            break
        on_screen = following
    if done < len(wanted_s):
        raise too_short(on_screen.end_s, wanted_s[-1])


@contextmanager
def opened(path: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video stream, closed whatever happens. FFmpeg's errors become DecodeErrors."""
    url = os.path.abspath(path)  # FFmpeg takes what precedes a colon for a protocol, unless there is a slash
    try:
        with av.open(url, metadata_errors="replace") as container:
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams or streams[0].codec_context is None:
                kinds = ", ".join(stream.type for stream in container.streams) or "nothing"
                raise DecodeError("undecodable", f"expected a video that can be decoded, found: {kinds}")
            streams[0].codec_context.thread_count = 1
            streams[0].codec_context.options = {"max_pixels": MAX_FRAME_PX}
            yield container, streams[0]
    except av.error.FFmpegError as error:
        raise _named(error) from error


def _named(error: av.error.FFmpegError) -> DecodeError:
    if isinstance(error, FileNotFoundError):
        return DecodeError("missing_file", "there is no such file")
    broken_store = isinstance(error, OSError) and not isinstance(error, IsADirectoryError)
    return DecodeError("io_error" if broken_store else "undecodable", error.strerror or str(error))


def too_short(end_s: float, wanted_s: float) -> DecodeError:
    return DecodeError("too_short", f"it ends at {end_s:.3f} s, a frame is wanted at {wanted_s:.3f} s")


def _no_frame() -> DecodeError:
    return DecodeError("undecodable", "not one frame of it can be decoded")


def _decoded(container: InputContainer, stream: VideoStream, deadline: Deadline) -> Iterator[VideoFrame]:
    """Every frame, in the order they are shown. What precedes the first that decodes is passed over:
    a stream cut out of another may start before its first key frame.
    """
    started = False
    for packet in container.demux(stream):
        deadline.check()
        try:
            decoded = packet.decode()
        except av.error.InvalidDataError:
            if started:
                raise
            continue
        started = started or bool(decoded)
        yield from decoded


def _frames(
    container: InputContainer, stream: VideoStream, deadline: Deadline, origin_s: float | None = None
) -> Iterator[_Frame]:
    """Frames with their times. ``origin_s``: the time of the stream's first frame; None if that comes now."""
    step_s = 1 / float(stream.average_rate or 25)
    last_s: float | None = None
    damaged = False
    for picture in _decoded(container, stream, deadline):
        now_s = _clock_s(picture, stream)
        if now_s is None:
            now_s = 0.0 if last_s is None else last_s + step_s
        if last_s is not None and now_s <= last_s:
            continue  # a clock that steps back
        if picture.duration and picture.time_base:
            step_s = float(picture.duration * picture.time_base)
        elif last_s is not None:
            step_s = now_s - last_s
        origin_s = now_s if origin_s is None else origin_s
        last_s = now_s
        # Errors spread from frame to frame until the next key frame.
        damaged = picture.is_corrupt or (damaged and not picture.key_frame)
        yield _Frame(now_s - origin_s, now_s - origin_s + step_s, picture, damaged)


def _clock_s(picture: VideoFrame, stream: VideoStream) -> float | None:
    """When a frame is shown, by the stream's clock.

    AVI stores no such times and FFmpeg's guess is out of order where there are B-frames. Frames leave the
    decoder in the order they are shown, so the times of the packets that pushed them out will do.
    """
    ticks = picture.dts if stream.container.format.name == "avi" else picture.pts
    return None if ticks is None or picture.time_base is None else float(ticks * picture.time_base)


def _frames_from(
    container: InputContainer, stream: VideoStream, start_s: float, deadline: Deadline
) -> Iterator[_Frame]:
    """Frames from the last key frame at or before ``start_s``, or from the first frame when that is 0."""
    if not start_s:
        yield from _frames(container, stream, deadline)
        return
    first = next(_decoded(container, stream, deadline), None)
    origin_s = None if first is None else _clock_s(first, stream)
    if origin_s is None or not stream.time_base:
        raise _no_frame()
    container.seek(int((origin_s + start_s) / stream.time_base), stream=stream)
    yield from _frames(container, stream, deadline, origin_s)


def _measured_duration_s(path: str, deadline: Deadline) -> float:
    """The time from the first packet to the end of the last, for files whose header does not tell."""
    starts, ends = [], []
    with opened(path) as (container, stream):
        tick_s = float(stream.time_base or 0)
        for packet in container.demux(stream):
            deadline.check()
            if packet.pts is not None:
                starts.append(packet.pts * tick_s)
                ends.append((packet.pts + (packet.duration or 0)) * tick_s)
    return max(ends) - min(starts) if starts else 0.0


def display_size(picture: VideoFrame, stream: VideoStream) -> tuple[float, float]:
    """The (height, width) that a frame is shown at: pixels made square, then turned."""
    aspect = float(stream.sample_aspect_ratio or 1)
    size = (float(picture.height), picture.width * aspect)
    return size if _turns(picture) % 2 == 0 else size[::-1]


def _turns(picture: VideoFrame) -> int:
    """Quarter turns, counterclockwise, that bring a frame upright."""
    return round(picture.rotation / 90) % 4


def _fill(picture: VideoFrame, stream: VideoStream, height: int, width: int, scaler: VideoReformatter) -> np.ndarray:
    """A frame as uint8 RGB [height, width, 3]."""
    turns = _turns(picture)
    scaled = cover(display_size(picture, stream), height, width)
    before_turn = scaled if turns % 2 == 0 else scaled[::-1]
    if picture.colorspace not in MATRICES:
        picture.colorspace = UNSPECIFIED
    rgb = scaler.reformat(picture, before_turn[1], before_turn[0], "rgb24", interpolation=SCALER, threads=1)
    return crop_centre(np.rot90(rgb.to_ndarray(), turns), height, width)
