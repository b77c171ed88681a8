"""Writing videos that a person can open anywhere. Each file appears whole or not at all."""

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from shards import storage

BT709 = 1  # the code of ITU-T H.273 for primaries, transfer and matrix alike
LIMITED_RANGE = 1


def write_mp4(
    path: Path, frames: np.ndarray, fps: float, *, crf: int = 16, tags: Mapping[str, str] | None = None
) -> None:
    """H.264, yuv420p, BT.709, playable in a browser while it loads.

    frames: uint8 [T, H, W, 3] RGB, H and W even. crf: x264's quality, 0 is lossless. tags: what the file says of
    itself under the names that players know, such as title and comment.
    """
    options = {"movflags": "+faststart"}
    with storage.write_whole(path) as file, av.open(file.name, "w", format="mp4", options=options) as container:
        container.metadata.update(tags or {})
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf)}
        context = stream.codec_context
        context.thread_count = 1  # x264 cuts frames by threads
        context.color_primaries = context.color_trc = context.colorspace = BT709
        context.color_range = LIMITED_RANGE
        for image in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", threads=1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def read_frames(path: Path) -> np.ndarray:
    """All frames of a video, uint8 [T, H, W, 3] RGB."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def read_tags(path: Path) -> dict[str, str]:
    """What a video file says of itself. Raises av.FFmpegError where it is no video."""
    with av.open(str(path)) as container:
        return dict(container.metadata)
