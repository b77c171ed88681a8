"""A decoded frame -> the picture that fills a bucket. Most of what the bucket cuts off is not even scaled."""

from math import gcd, lcm

import numpy as np
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.plane import VideoPlane
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from stages.decoding.fit import cover, crop_centre

# swscale's flags; PyAV 17, the last for Python 3.10, has no names for all of them. Without the last three
# pictures of an even width lose half of their colour resolution, and pictures that keep their size get darker.
BICUBIC, FULL_CHROMA, ACCURATE_ROUNDING, BITEXACT = 0x4, 0x2000, 0x40000, 0x80000
SCALER = BICUBIC | FULL_CHROMA | ACCURATE_ROUNDING | BITEXACT

PLANAR_RGB = "gbrp"
"""swscale writes it with vector instructions, 2.5 times as fast as the same values in rows of RGB."""

UNSPECIFIED = 2
MATRICES = frozenset({0, 1, UNSPECIFIED, 4, 5, 6, 7, 9})
"""Matrix coefficients of ITU-T H.273 that swscale converts; it takes BT.601 for an unspecified one."""

CHROMA_PX = 4
"""The most pixels of a row or column that share a sample of chroma."""

MARGIN_PX, LEAST_REDUCTION = 6, 4 / 3
"""A scaled pixel takes in what lies at most so many scaled pixels away, where a frame gets that much smaller:
bicubic filters reach over two samples, of chroma too, or over two scaled pixels."""


class Filler:
    """Fills a bucket with the frames of one video."""

    def __init__(self, stream: VideoStream, height: int, width: int):
        self._stream = stream
        self._height, self._width = height, width
        self._scaler = VideoReformatter()
        self._cropper: _Cropper | None = None

    def fill(self, picture: VideoFrame) -> np.ndarray:
        """A frame as uint8 RGB [height, width, 3]."""
        turns = quarter_turns(picture)
        order = 1 if turns % 2 == 0 else -1
        scaled = cover(display_size(picture, self._stream), self._height, self._width)[::order]
        bucket = (self._height, self._width)[::order]
        top = unseen_px(picture.height, scaled[0], bucket[0])
        left = unseen_px(picture.width, scaled[1], bucket[1])
        height = scaled[0] - 2 * top * scaled[0] // picture.height
        width = scaled[1] - 2 * left * scaled[1] // picture.width
        seen = self._crop(picture, top, left) if top or left else picture
        seen.colorspace = picture.colorspace if picture.colorspace in MATRICES else UNSPECIFIED
        planar = self._scaler.reformat(seen, width, height, PLANAR_RGB, interpolation=SCALER, threads=1)
        green, blue, red = (_pixels(plane) for plane in planar.planes)
        turned = (np.rot90(plane[:, :width], turns) for plane in (red, green, blue))
        return np.stack([crop_centre(plane, self._height, self._width) for plane in turned], axis=-1)

    def _crop(self, picture: VideoFrame, top: int, left: int) -> VideoFrame:
        if self._cropper is None or not self._cropper.is_for(picture):
            self._cropper = _Cropper(picture, top, left)
        return self._cropper.crop(picture)


def _pixels(plane: VideoPlane) -> np.ndarray:
    """8-bit samples with the padding at the end of each row."""
    return np.frombuffer(plane, np.uint8).reshape(plane.height, -1)  # type: ignore[call-overload]  # it is a buffer


class _Cropper:
    """Takes the middle of frames of one size and format, without copying."""

    def __init__(self, picture: VideoFrame, top: int, left: int):
        self._kind = _kind(picture)
        self._graph = Graph()
        source = self._graph.add_buffer(
            width=picture.width, height=picture.height, format=picture.format, time_base=picture.time_base
        )
        middle = f"{picture.width - 2 * left}:{picture.height - 2 * top}:{left}:{top}:exact=1"
        crop = self._graph.add("crop", middle)
        self._graph.link_nodes(source, crop, self._graph.add("buffersink")).configure()

    def is_for(self, picture: VideoFrame) -> bool:
        return self._kind == _kind(picture)

    def crop(self, picture: VideoFrame) -> VideoFrame:
        self._graph.vpush(picture)
        return self._graph.vpull()


def _kind(picture: VideoFrame) -> tuple[int, int, str]:
    return picture.width, picture.height, picture.format.name


def unseen_px(source: int, scaled: int, seen: int) -> int:
    """How many pixels at each end of a row or column of ``source`` pixels need not be scaled.

    Of ``scaled`` pixels, which that makes, the ``seen`` ones in the middle stay as they are: what is cut off
    ends where the edges of source and scaled pixels meet, and beyond the reach of their filters. They may
    differ by one level, as one in a hundred does at most: swscale counts in 1/65536 of a pixel from the edge.
    """
    if source % CHROMA_PX or source < LEAST_REDUCTION * scaled:
        return 0
    step = lcm(source // gcd(source, scaled), CHROMA_PX)
    unseen = max(0, (scaled - seen) // 2 - MARGIN_PX)
    return unseen // (step * scaled // source) * step


def display_size(picture: VideoFrame, stream: VideoStream) -> tuple[float, float]:
    """The (height, width) that a frame is shown at: pixels made square, then turned."""
    aspect = float(stream.sample_aspect_ratio or 1)
    size = (float(picture.height), picture.width * aspect)
    return size if quarter_turns(picture) % 2 == 0 else size[::-1]


def quarter_turns(picture: VideoFrame) -> int:
    """Quarter turns, counterclockwise, that bring a frame upright."""
    return round(picture.rotation / 90) % 4
