"""Videos as one picture, and as one video."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

COLUMNS = 8


def picked(video: np.ndarray, columns: int = COLUMNS) -> np.ndarray:
    """At most so many frames of a video, evenly, the first and the last among them."""
    return video[np.linspace(0, len(video) - 1, min(columns, len(video))).round().astype(int)]


def contact_sheet(videos: Sequence[np.ndarray], captions: Sequence[str], *, columns: int = COLUMNS) -> Image.Image:
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
        for column, frame in enumerate(picked(video, columns)):
            sheet.paste(Image.fromarray(frame), (gap_px + column * (width + gap_px), top + line_px))
    return sheet


def moving_sheet(videos: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """The same as a video, uint8 [T, H, W, 3]: one below the other, all of T frames."""
    frames = range(len(videos[0]))
    return np.stack([np.asarray(contact_sheet([video[t : t + 1] for video in videos], captions)) for t in frames])
