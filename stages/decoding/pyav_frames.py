"""Opening a video with PyAV, and its frames with the times at which they are on screen.

Decoding uses one thread. That leaves the cores to other clips, and only then does FFmpeg report the frames in
which it concealed errors: with frame threads the report is lost and a damaged clip looks like a good one.
"""

import os
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from stages.errors import DecodeError

MAX_TOLERANCE_S = 0.0005

MAX_FRAME_PX = "67108864"  # 8192 x 8192: more is a damaged header that would take all memory


class Deadline:
    """A moment after which a clip is given up."""

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s

    def check(self) -> None:
        if time.monotonic() > self._end:
            raise DecodeError("timeout", f"decoding took longer than {self._timeout_s:g} s")


@dataclass(frozen=True)
class Span:
    """When a frame is on screen, in seconds after the first of its stream."""

    start_s: float
    end_s: float


@dataclass(frozen=True)
class Frame(Span):
    """A decoded frame; ``damaged`` where errors were concealed in it or in what it builds on."""

    picture: VideoFrame
    damaged: bool


AnySpan = TypeVar("AnySpan", bound=Span)


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


def no_frame() -> DecodeError:
    return DecodeError("undecodable", "not one frame of it can be decoded")


def tolerance_s(stream: VideoStream) -> float:
    """How late a frame may be and still be on time: containers round times to their ticks, WebM to 1 ms."""
    return min(float(stream.time_base or 0) / 2, MAX_TOLERANCE_S) + 1e-5


def on_screen(spans: Iterable[AnySpan], wanted_s: Sequence[float], late_s: float) -> Iterator[tuple[AnySpan, int]]:
    """Of frames in the order of their times, those on screen at the wanted ones, and at how many of them.

    Raises DecodeError: undecodable where they begin too late, too_short where they end too early.
    """
    following_spans = iter(spans)
    done = 0
    current = next(following_spans, None)
    if current is None:
        raise no_frame()
    if current.start_s > wanted_s[0] + late_s:
        raise DecodeError("undecodable", f"no key frame at or before {wanted_s[0]:.3f} s was found")
    while done < len(wanted_s):
        following = next(following_spans, None)
        until_s = current.end_s if following is None else following.start_s - late_s
        past = bisect_left(wanted_s, until_s)
        if past > done:
            yield current, past - done
            done = past
        if following is None:
            break
        current = following
    if done < len(wanted_s):
        raise too_short(current.end_s, wanted_s[-1])


def demuxed(container: InputContainer, stream: VideoStream, deadline: Deadline) -> Iterator[Packet]:
    """The stream's packets from where the container stands, then an empty one that flushes the decoder."""
    for packet in container.demux(stream):
        deadline.check()
        yield packet


def decoded(packets: Iterable[Packet]) -> Iterator[VideoFrame]:
    """Every frame, in the order they are shown. What precedes the first that decodes is passed over:
    a stream cut out of another may start before its first key frame.
    """
    started = False
    for packet in packets:
        try:
            pictures = packet.decode()
        except av.error.InvalidDataError:
            if started:
                raise
            continue
        started = started or bool(pictures)
        yield from pictures  # type: ignore[misc]  # of a video stream's packet


def timed(pictures: Iterable[VideoFrame], stream: VideoStream, origin_s: float | None = None) -> Iterator[Frame]:
    """Frames with their times. ``origin_s``: the time of the stream's first frame; None if that comes now."""
    step_s = 1 / float(stream.average_rate or 25)
    last_s: float | None = None
    damaged = False
    for picture in pictures:
        now_s = clock_s(picture, stream)
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
        yield Frame(now_s - origin_s, now_s - origin_s + step_s, picture, damaged)


def clock_s(picture: VideoFrame, stream: VideoStream) -> float | None:
    """When a frame is shown, by the stream's clock.

    AVI stores no such times and FFmpeg's guess is out of order where there are B-frames. Frames leave the
    decoder in the order they are shown, so the times of the packets that pushed them out will do.
    """
    ticks = picture.dts if stream.container.format.name == "avi" else picture.pts
    return None if ticks is None or picture.time_base is None else float(ticks * picture.time_base)
