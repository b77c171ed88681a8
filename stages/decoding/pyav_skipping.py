"""Decoding the frames of a clip, but for those that are neither wanted nor referred to by others.

In H.264 about half of the frames are B-frames that nothing refers to. The times of packets tell which frames
are on screen at the wanted times before any is decoded, and FFmpeg leaves out a frame that nothing refers to
when it is told so. Those that come out are the same to the bit as in a pass that decodes all.

Damage in a frame that is left out goes unseen, and does no harm: nothing of it is in any other.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from stages.decoding.pyav_frames import Frame, Span, decoded, on_screen, timed, tolerance_s
from stages.errors import DecodeError

TIMED_FORMATS = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"})
"""Containers that store when each frame is shown; in others FFmpeg works it out."""

SKIPPABLE_CODECS = frozenset({"h264"})
"""Not HEVC: to what FFmpeg would leave out there, frames of a higher temporal layer may refer."""

MAX_AHEAD_BYTES = 1 << 26
"""Packets held in memory, at most: a clip that needs more is decoded whole."""


@dataclass(frozen=True)
class _Coming(Span):
    """A frame that has yet to be decoded."""

    pts: int


def may_skip(container: InputContainer, stream: VideoStream) -> bool:
    """Whether frames of this stream can be left out."""
    return container.format.name in TIMED_FORMATS and stream.codec_context.name in SKIPPABLE_CODECS


def frames_on_screen(
    packets: Iterator[Packet], stream: VideoStream, wanted_s: Sequence[float], origin_s: float | None
) -> Iterator[tuple[Frame, int]]:
    """The frames on screen at the wanted times, and at how many of them: ``on_screen`` of all frames, but faster.

    ``packets`` may begin at any key frame. ``origin_s``: the time of the stream's first frame; None if
    ``packets`` begin with it. Raises DecodeError: as ``on_screen``, or undecodable if frames come out that were
    not foreseen, which says nothing about what a pass over all frames would find.
    """
    ahead = _read_ahead(packets, stream, wanted_s[-1], origin_s)
    packets = chain(ahead, packets)
    picks = _foreseen(ahead, stream, wanted_s, origin_s)
    if not picks:
        frames = timed(decoded(packets), stream, origin_s)
        yield from on_screen(frames, wanted_s, tolerance_s(stream))
        return
    needed = _leaving_out(packets, stream, {coming.pts for coming, _ in picks})
    yield from _matched(timed(decoded(needed), stream, origin_s), picks)


def _read_ahead(packets: Iterator[Packet], stream: VideoStream, until_s: float, origin_s: float | None) -> list[Packet]:
    """Packets, in the order of decoding, of all frames that begin up to ``until_s`` and of at least one after."""
    ahead: list[Packet] = []
    size = 0
    for packet in packets:
        ahead.append(packet)
        size += packet.size
        if packet.pts is None or size > MAX_AHEAD_BYTES:
            break
        if origin_s is None and not packet.is_discard:
            origin_s = _seconds(packet.pts, stream)  # of a key frame: no earlier than the first to be shown
        if packet.dts is not None and origin_s is not None and _seconds(packet.dts, stream) > origin_s + until_s:
            break  # no frame is shown before it is decoded
    return ahead


def _foreseen(
    ahead: Sequence[Packet], stream: VideoStream, wanted_s: Sequence[float], origin_s: float | None
) -> list[tuple[_Coming, int]]:
    """What ``on_screen`` will find, by the times of the packets; nothing where these cannot be relied on.

    Where the packets begin with the stream, its first frame is the first of the list, wanted or not:
    that it comes out proves that the times count from it.
    """
    packets = [packet for packet in ahead if packet.size]  # not the one that flushes the decoder
    shown = sorted(
        (packet.pts, packet.duration or 0) for packet in packets if packet.pts is not None and not packet.is_discard
    )
    if not shown or not _reliable(packets):
        return []
    first_s = _seconds(shown[0][0], stream) if origin_s is None else origin_s
    comings = []
    for pts, duration in shown:
        start_s = _seconds(pts, stream) - first_s
        comings.append(_Coming(start_s, start_s + _seconds(duration, stream), pts))
    try:
        picks = list(on_screen(comings, wanted_s, tolerance_s(stream)))
    except DecodeError:
        return []
    lacks_first = origin_s is None and picks[0][0] is not comings[0]
    return [(comings[0], 0), *picks] if lacks_first else picks


def _reliable(packets: Sequence[Packet]) -> bool:
    """Whether each frame has a time of its own, none before that of its decoding, and the latter ascend."""
    shown = {packet.pts for packet in packets}
    decoding = [packet.dts for packet in packets if packet.dts is not None]
    return (
        None not in shown
        and len(shown) == len(packets)
        and all(one < following for one, following in pairwise(decoding))
        and all(packet.dts is None or packet.pts is None or packet.dts <= packet.pts for packet in packets)
        and sum(packet.size for packet in packets) <= MAX_AHEAD_BYTES
    )


def _leaving_out(packets: Iterable[Packet], stream: VideoStream, needed: set[int]) -> Iterator[Packet]:
    """Packets, the decoder being told of each whether to leave out its frame if nothing refers to it."""
    for packet in packets:
        keep = packet.pts is None or packet.pts in needed
        stream.codec_context.skip_frame = "DEFAULT" if keep else "NONREF"
        yield packet


def _matched(frames: Iterable[Frame], picks: Sequence[tuple[_Coming, int]]) -> Iterator[tuple[Frame, int]]:
    """The foreseen frames among those that came out, which are in the order of their times."""
    remaining = deque(picks)
    for frame in frames:
        coming, times = remaining[0]
        pts = frame.picture.pts
        # Of an interlaced frame each field may have a packet of its own, and one of the two be left out.
        if pts is None or pts > coming.pts or frame.picture.interlaced_frame:
            break
        if pts < coming.pts:
            continue  # decoded because others refer to it
        if times:
            yield frame, times
        remaining.popleft()
        if not remaining:
            return
    raise DecodeError("undecodable", f"the frame at {remaining[0][0].start_s:.3f} s did not come out")


def _seconds(ticks: int, stream: VideoStream) -> float:
    return float(ticks * (stream.time_base or 0))
