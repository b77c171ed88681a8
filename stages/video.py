"""Writing videos and pictures that a person can open anywhere."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

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


def contact_sheet(path: Path, videos: Sequence[np.ndarray], captions: Sequence[str], *, columns: int = 8) -> None:
    """One row a video: its frames, evenly picked, with the caption above. videos: uint8 [T, H, W, 3] each."""
    line_px, gap_px = 14, 4
    height, width = videos[0].shape[1:3]
    shown = min(columns, max(len(video) for video in videos))
    row_px = line_px + height + gap_px
    sheet = Image.new("RGB", (shown * (width + gap_px) + gap_px, len(videos) * row_px + gap_px), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (video, caption) in enumerate(zip(videos, captions, strict=True)):
        top = gap_px + row * row_px
        pen.text((gap_px, top), caption, fill="black")
        picked = np.linspace(0, len(video) - 1, min(shown, len(video))).round().astype(int)
        for column, index in enumerate(picked):
            sheet.paste(Image.fromarray(video[index]), (gap_px + column * (width + gap_px), top + line_px))
    sheet.save(path)
