"""Small videos rendered for tests, each frame of which tells its number."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

LEVELS = 12
"""A numbered frame shows two grey levels side by side: the two digits of its number in this base."""


def numbered(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """``count`` frames, uint8 [T, H, W, 3], that ``numbers_of`` reads."""
    frames = np.empty((count, height, width, 3), np.uint8)
    for number in range(count):
        high, low = divmod(number, LEVELS)
        frames[number, :, : width // 2] = 18 + 20 * high
        frames[number, :, width // 2 :] = 18 + 20 * low
    return frames


def numbers_of(frames: np.ndarray) -> list[int]:
    """The numbers that frames [T, H, W, 3] of any size and quality show."""
    width = frames.shape[2]
    edge = width // 4
    halves = frames[:, :, :edge].mean((1, 2, 3)), frames[:, :, width - edge :].mean((1, 2, 3))
    high, low = (np.rint((half - 18) / 20).astype(int) for half in halves)
    return (high * LEVELS + low).tolist()


@contextmanager
def priority_kept() -> Iterator[None]:
    """Of root's thread SVT-AV1 makes a real-time one, which all that the thread then starts is too; others starve."""
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, priority)


def write_video(
    path: Path,
    frames: np.ndarray,
    *,
    rate: Fraction | int = 30,
    times_ms: Sequence[int] | None = None,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    rotation: int = 0,
    pixel_aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Frames [T, H, W, 3] RGB at a steady rate, or each at a time of its own."""
    pictures = [av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24") for frame in frames]
    with priority_kept(), av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format
        stream.options = options if options is not None else {"g": "12", "bf": "2", "crf": "12"}
        if pixel_aspect:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if rotation:
            stream.set_display_rotation(rotation)
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, picture in enumerate(pictures):
            if times_ms is not None:
                picture.pts, picture.time_base = times_ms[index], Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def write_planes(
    path: Path,
    planes: Sequence[np.ndarray],
    *,
    count: int = 8,
    codec: str,
    pixel_format: str,
    options: dict[str, str],
    matrix: int = 2,
    full_range: bool = False,
) -> Path:
    """``count`` equal frames given as their planes (luma, then chroma), tagged with an H.273 matrix and a range."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width = planes[0].shape
        stream.pix_fmt = pixel_format
        stream.options = options
        stream.codec_context.colorspace = matrix
        stream.codec_context.color_range = 2 if full_range else 1
        for _ in range(count):
            frame = av.VideoFrame(planes[0].shape[1], planes[0].shape[0], pixel_format)
            frame.colorspace, frame.color_range = matrix, 2 if full_range else 1
            for plane, values in zip(frame.planes, planes, strict=True):
                rows = np.zeros((plane.height, plane.line_size), np.uint8)
                data = np.ascontiguousarray(values).view(np.uint8)
                rows[:, : data.shape[1]] = data
                plane.update(rows.tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_audio(path: Path, seconds: float = 1.0) -> Path:
    """A file with a tone and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        for start in range(0, int(seconds * 48000), 1024):
            wave = np.sin(np.arange(start, start + 1024) * 0.05, dtype=np.float32)[None]
            frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 48000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def cut_without_encoding(source: Path, target: Path, start_s: float) -> Path:
    """What ``ffmpeg -ss START -c copy`` makes: packets from the key frame before, hidden until the start."""
    with av.open(str(source)) as whole, av.open(str(target), "w", options={"avoid_negative_ts": "disabled"}) as part:
        packets = whole.streams.video[0]
        stream = part.add_stream_from_template(packets)
        shift = int(start_s / packets.time_base)
        whole.seek(int(start_s * av.time_base))
        for packet in whole.demux(packets):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                part.mux(packet)
    return target


def flip_bits(source: Path, target: Path, places: Iterable[float]) -> Path:
    """A copy with one bit wrong at each place, a share of the file's length."""
    data = bytearray(source.read_bytes())
    for number, place in enumerate(places):
        data[int(place * len(data))] ^= 1 << (number % 8)
    target.write_bytes(data)
    return target
