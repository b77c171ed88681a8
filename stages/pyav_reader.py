"""Reading videos with PyAV: frames by timestamp, in one pass, at the size of a bucket.

Decoding uses one thread. That leaves the cores to other clips, and only then does FFmpeg report the frames in
which it concealed errors: with frame threads the report is lost and a damaged clip looks like a good one.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

from stages.errors import DecodeError
from stages.fit import cover, crop_centre

TOLERANCE_S = 0.001
"""Containers such as WebM round timestamps to milliseconds; a frame so much late is still on time."""

SEEK_FROM_S = 1.0
"""A clip that starts earlier is read from the start of its file."""

MAX_FRAME_PX = "67108864"  # 8192 x 8192: more is a damaged header that would take all memory

SCALER = (  # else swscale halves the chroma of even widths and darkens frames that keep their size
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
)
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


def read_info(path: str, deadline: Deadline) -> VideoInfo:
    """The duration, rate and display size of a video; its first frame is decoded to be sure of it."""
    with opened(path) as (container, stream):
        first = next(_frames(container, stream, deadline), None)
        if first is None:
            raise _no_frame()
        height, width = display_size(first.picture, stream)
        rate = float(stream.average_rate or 0)
        if stream.duration and stream.time_base:
            duration_s = float(stream.duration * stream.time_base)
        else:
            duration_s = first.end_s
    if not stream.duration:
        duration_s = max(duration_s, _measured_duration_s(path, deadline))
    return VideoInfo(duration_s, rate, round(height), round(width))


def read_shown(path: str, wanted_s: Sequence[float], height: int, width: int, deadline: Deadline) -> Shown:
    """The pictures on screen at the times ``wanted_s`` (ascending, seconds after the stream's first frame).

    Raises DecodeError: missing_file, io_error, undecodable, too_short or timeout.
    """
    if wanted_s[0] > SEEK_FROM_S:
        try:
            return _read_shown(path, wanted_s, height, width, deadline, seek=True)
        except DecodeError as error:
            if error.reason != "undecodable":
                raise
            # No index, or a key frame that is none: what is damaged after a seek may be whole without.
    return _read_shown(path, wanted_s, height, width, deadline, seek=False)


def _read_shown(
    path: str, wanted_s: Sequence[float], height: int, width: int, deadline: Deadline, *, seek: bool
) -> Shown:
    shown = Shown()
    scaler = VideoReformatter()
    with opened(path) as (container, stream):
        shown.source_fps = float(stream.average_rate) if stream.average_rate else None
        frames = _frames_from(container, stream, wanted_s[0] if seek else 0.0, deadline)
        for frame, times in pick(frames, wanted_s):
            if frame.damaged:
                raise DecodeError("undecodable", f"damaged at {frame.start_s:.3f} s: the decoder hid errors there")
            shown.pictures.append(_fill(frame.picture, stream, height, width, scaler))
            shown.times.append(times)
    return shown


def pick(frames: Iterator[_Frame], wanted_s: Sequence[float]) -> Iterator[tuple[_Frame, int]]:
    """Of frames in the order of their times, those on screen at the wanted ones, and at how many of them."""
    done = 0
    on_screen = next(frames, None)
    if on_screen is None:
        raise _no_frame()
    if on_screen.start_s > wanted_s[0] + TOLERANCE_S:
        raise DecodeError("undecodable", f"no key frame at or before {wanted_s[0]:.3f} s was found")
    while done < len(wanted_s):
        following = next(frames, None)
        until_s = on_screen.end_s if following is None else following.start_s - TOLERANCE_S
        times = sum(1 for wanted in wanted_s[done:] if wanted < until_s)
        if times:
            yield on_screen, times
            done += times
        if following is None:
            break
        on_screen = following
    if done < len(wanted_s):
        raise DecodeError(
            "too_short", f"its last frame ends at {on_screen.end_s:.3f} s, a frame is wanted at {wanted_s[-1]:.3f} s"
        )


@contextmanager
def opened(path: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video stream, closed again whatever happens; FFmpeg's errors become DecodeErrors."""
    # "file:" and an absolute path, because InternVid's colons would be read as the name of a protocol; and no
    # other protocol, because what claims to be a video may be a playlist of addresses.
    url = "file:" + os.path.abspath(path)
    try:
        with av.open(url, metadata_errors="replace", container_options={"protocol_whitelist": "file"}) as container:
            videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not videos or videos[0].codec_context is None:
                kinds = ", ".join(stream.type for stream in container.streams) or "nothing"
                raise DecodeError("undecodable", f"there is no video in it that can be decoded; it holds: {kinds}")
            videos[0].thread_type = "NONE"
            videos[0].codec_context.thread_count = 1
            videos[0].codec_context.options = {"max_pixels": MAX_FRAME_PX}
            yield container, videos[0]
    except av.error.FFmpegError as error:
        raise _named(error) from error


def _named(error: av.error.FFmpegError) -> DecodeError:
    if isinstance(error, FileNotFoundError):
        return DecodeError("missing_file", "there is no such file")
    reason = "io_error" if isinstance(error, OSError) and not isinstance(error, IsADirectoryError) else "undecodable"
    return DecodeError(reason, error.strerror or str(error))


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
    """Frames with their times. ``origin_s`` is the time of the stream's first frame, if another is read first."""
    step_s = 1 / float(stream.average_rate or 25)
    last_s: float | None = None
    damaged = False
    for picture in _decoded(container, stream, deadline):
        shown_s = picture.time if picture.time is not None else (last_s or 0.0) + step_s * (last_s is not None)
        origin_s = shown_s if origin_s is None else origin_s
        if last_s is not None and shown_s <= last_s:
            continue  # a clock that steps back
        if not picture.duration and last_s is not None:
            step_s = shown_s - last_s
        if picture.duration and picture.time_base:
            step_s = float(picture.duration * picture.time_base)
        last_s = shown_s
        # Errors spread from frame to frame until the next key frame.
        damaged = picture.is_corrupt or (damaged and not picture.key_frame)
        start_s = shown_s - origin_s
        yield _Frame(start_s, start_s + step_s, picture, damaged)


def _frames_from(
    container: InputContainer, stream: VideoStream, start_s: float, deadline: Deadline
) -> Iterator[_Frame]:
    """Frames from the last key frame at or before ``start_s``, or from the first frame when that is 0."""
    if not start_s:
        yield from _frames(container, stream, deadline)
        return
    first = next(_decoded(container, stream, deadline), None)
    if first is None or first.time is None or stream.time_base is None:
        raise _no_frame()
    container.seek(int((first.time + start_s) / stream.time_base), stream=stream)
    yield from _frames(container, stream, deadline, origin_s=first.time)


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


def _fill(
    picture: VideoFrame, stream: VideoStream, height: int, width: int, scaler: VideoReformatter
) -> np.ndarray:
    """A frame as uint8 RGB [height, width, 3]."""
    turns = _turns(picture)
    scaled = cover(display_size(picture, stream), height, width)
    before_turn = scaled if turns % 2 == 0 else scaled[::-1]
    if picture.colorspace not in MATRICES:
        picture.colorspace = UNSPECIFIED
    rgb = scaler.reformat(picture, before_turn[1], before_turn[0], "rgb24", interpolation=SCALER, threads=1)
    return crop_centre(np.rot90(rgb.to_ndarray(), turns), height, width)
