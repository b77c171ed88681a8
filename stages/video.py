"""Writing videos that a person can open anywhere."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BT709 = 1  # the code of ITU-T H.273 for primaries, transfer and matrix alike
LIMITED_RANGE = 1


def write_mp4(path: Path, frames: np.ndarray, fps: float, *, crf: int = 16) -> None:
    """H.264, yuv420p, BT.709, playable in a browser while it loads.

    frames: uint8 [T, H, W, 3] RGB, H and W even. crf: x264's quality, 0 is lossless.
    """
    options = {"movflags": "+faststart"}
    with av.open(str(path), "w", options=options) as container:
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
