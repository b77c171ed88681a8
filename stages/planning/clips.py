"""What a clip is cut to: its bucket, and the windows that are taken of it."""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import xxhash

from shards.schema import Bucket
from stages.planning.metadata import Row

MISSING_FILE, TOO_SHORT, TOO_SMALL = "missing_file", "too_short", "too_small"


@dataclass(frozen=True)
class ClipConfig:
    """What a clip is cut to: the longest of ``frames`` that it fills at ``fps``, never padded or slowed.

    height, width: pixels. sizes: several [height, width] instead; a clip goes to the one that keeps most of its
    picture, then to the largest. max_upscale: how much a picture may be enlarged for a size; what fits none is
    rejected. None: as much as needed, or 1.0 with several sizes. frames: one length or several; 1 makes images of
    clips too short for the rest. fps: frames a second taken, whatever the source has. windows: at most so many
    parts, which do not overlap, are taken of a long clip. trim_s: cut at both ends of a clip, where scenes end.
    """

    height: int = 256
    width: int = 256
    frames: int | tuple[int, ...] = 56
    fps: float = 8.0
    sizes: tuple[tuple[int, int], ...] = ()
    max_upscale: float | None = None
    windows: int = 1
    trim_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.lengths or min(*self.lengths, *(side for size in bucket_sizes(self) for side in size)) < 1:
            raise ValueError("height, width, sizes and frames must be at least 1")
        if not 0 < self.fps <= 1000:  # times are whole milliseconds
            raise ValueError(f"fps is {self.fps:g}, expected more than 0 and at most 1000")
        if self.windows < 1:
            raise ValueError(f"windows is {self.windows}, expected at least 1")
        if not 0 <= self.trim_s < 1e6:
            raise ValueError(f"trim_s is {self.trim_s:g}, expected seconds")
        if self.max_upscale is not None and not self.max_upscale > 0:
            raise ValueError(f"max_upscale is {self.max_upscale:g}, expected more than 0")

    @property
    def lengths(self) -> tuple[int, ...]:
        """The numbers of frames, longest first."""
        frames = (self.frames,) if isinstance(self.frames, int) else self.frames
        return tuple(sorted(set(frames), reverse=True))

    @property
    def upscale_limit(self) -> float | None:
        """``max_upscale``, or what it is by default."""
        return 1.0 if self.max_upscale is None and len(bucket_sizes(self)) > 1 else self.max_upscale

    def span_ms(self, frames: int) -> int:
        """How long a clip must be to fill so many frames, in whole milliseconds."""
        return math.ceil(frames * 1000 / Fraction(str(self.fps)))


def bucket_sizes(clip: ClipConfig) -> tuple[tuple[int, int], ...]:
    """The (height, width) that frames may get, ascending."""
    return tuple(sorted({(height, width) for height, width in clip.sizes or [(clip.height, clip.width)]}))


class Reject(NamedTuple):
    """Why a clip is not taken: a short name to count by, and the story for a person."""

    reason: str
    message: str


class Window(NamedTuple):
    """A part of a clip: where it begins after the clip's start, and in seconds in the file.

    ``fallback_s`` is where to begin instead when the file ends too early: where the clip does, but a second or
    further window, which must not show the first again, has only its own start.
    """

    start_ms: int
    start_s: float
    fallback_s: float


class Cutter:
    """Cuts clips as a ClipConfig says. needs_size: whether that depends on the size of a clip's pictures."""

    def __init__(self, clip: ClipConfig):
        self._windows = clip.windows
        self._sizes, self._limit = bucket_sizes(clip), clip.upscale_limit
        self._lengths = [(frames, clip.span_ms(frames)) for frames in clip.lengths]
        self._trim_ms = round(clip.trim_s * 1000)
        self._buckets = {(size, frames): Bucket(*size, frames) for size in self._sizes for frames in (*clip.lengths, 1)}
        self.needs_size = len(self._sizes) > 1 or self._limit is not None

    def check(self, row: Row) -> Reject | None:
        """Why a clip cannot be taken, as far as is known before its file is looked at."""
        if row.duration_ms is not None and not self._length(row)[0]:
            return self._too_short(row)
        if row.path is None:
            return Reject(MISSING_FILE, row.message or f"no file of {row.source} was found below the videos folder")
        return None

    def cut(self, row: Row, clip: int) -> tuple[Bucket, list[Window]] | Reject:
        """The windows that are taken of a clip whose length, and size where needed, is known; at least one.

        clip: its hash, from which windows are drawn.
        """
        frames, span_ms = self._length(row)
        if not frames:
            return self._too_short(row)
        size: tuple[int, int] | None = self._sizes[0]
        if self.needs_size:
            size = best_size(self._sizes, self._limit, row.height or 1, row.width or 1)
        if size is None:
            return self._too_small(row)
        bucket = self._buckets[size, frames]
        if row.kind == "image":
            return bucket, [Window(0, 0.0, 0.0)]
        begin_ms = row.start_ms + self._trim_ms
        windows: list[Window] = []
        for start_ms in window_starts(clip, bucket.name, self._windows, span_ms, self._usable_ms(row)):
            start_s = (begin_ms + start_ms) / 1000
            windows.append(Window(start_ms, start_s, start_s if windows else begin_ms / 1000))
        return bucket, windows

    def _length(self, row: Row) -> tuple[int, int]:
        """The longest number of frames that a clip fills, and what they last; 0 frames where it fills none."""
        if row.kind == "image":
            return 1, 0
        usable_ms = self._usable_ms(row)
        for frames, span_ms in self._lengths:
            if usable_ms >= (span_ms if frames > 1 else 1):  # whatever lasts at all has one frame
                return frames, span_ms
        return 0, 0

    def _usable_ms(self, row: Row) -> int:
        return (row.duration_ms or 0) - 2 * self._trim_ms

    def _too_short(self, row: Row) -> Reject:
        frames, span_ms = self._lengths[-1]
        beside = f" beside {self._trim_ms} ms at both ends" if self._trim_ms else ""
        return Reject(TOO_SHORT, f"it lasts {row.duration_ms} ms; {frames} frames need {span_ms} ms{beside}")

    def _too_small(self, row: Row) -> Reject:
        sizes = ", ".join(f"{height}x{width}" for height, width in self._sizes)
        return Reject(TOO_SMALL, f"its {row.height}x{row.width} pixels fill none of {sizes} at {self._limit:g} times")


@lru_cache(4096)  # videos come in few sizes
def best_size(
    sizes: tuple[tuple[int, int], ...], upscale_limit: float | None, height: float, width: float
) -> tuple[int, int] | None:
    """Of ``sizes`` (height, width) the one that keeps most of a ``height`` x ``width`` picture, then the largest.

    A picture is scaled until it covers the size, then cropped around its centre. None where every size needs
    more upscaling than allowed.
    """

    def upscaling(size: tuple[int, int]) -> Fraction:
        return max(size[0] / Fraction(height), size[1] / Fraction(width))

    def kept(size: tuple[int, int]) -> Fraction:
        across, along = size[0] * Fraction(width), size[1] * Fraction(height)
        return min(across, along) / max(across, along)

    fitting = [size for size in sizes if upscale_limit is None or upscaling(size) <= upscale_limit]
    return max(fitting, key=lambda size: (kept(size), size[0] * size[1], size), default=None)


def window_starts(clip: int, bucket: str, most: int, span_ms: int, duration_ms: int) -> list[int]:
    """Where the windows of a clip begin, in milliseconds after its start: up to ``most``, ascending, none overlapping.

    They depend on the hash of the clip and on its bucket alone.
    """
    number = max(1, min(most, duration_ms // span_ms))
    free_ms = max(0, duration_ms - number * span_ms)
    seeds = [f"{clip} {bucket}", *(f"{clip} {bucket} {window}" for window in range(1, number))]
    offsets = sorted(xxhash.xxh3_64_intdigest(seed.encode()) % (free_ms + 1) for seed in seeds)
    return [offset + window * span_ms for window, offset in enumerate(offsets)]
