"""Frame strides and sub-clips, cut from stored latents; exact where each frame was encoded alone.

Which stride and how many frames is drawn for a step, so that all its samples have one shape; where the sub-clip
begins is drawn for each sample. Both are pure functions: of (seed, step), and of (seed, position).
"""

from collections.abc import Sequence

import numpy as np
import xxhash

from shards.errors import DatasetError


class Subclips:
    """Draws from strides, and from numbers of frames: none means as many as the stride leaves of a clip.

    Each pair of both that fits into a clip is equally likely; a clip that none fits into is taken whole.
    """

    def __init__(self, strides: Sequence[int], frames: Sequence[int], seed: int):
        if not strides or min(*strides, *frames, 1) < 1:
            raise DatasetError(
                f"data.strides is {list(strides)}, data.subclip_frames {list(frames)}: expected numbers of frames, "
                "1 or more, and at least one stride"
            )
        self.whole = tuple(strides) == (1,) and not frames  # nothing is ever cut
        self._strides, self._frames, self._seed = strides, frames, seed

    def shape(self, step: int, frames: int) -> tuple[int, int]:
        """The stride, and how many frames are left, of clips of ``frames`` frames in a step."""
        pairs = [(stride, count) for stride in self._strides for count in self._frames or [frames // stride]]
        fitting = [(stride, count) for stride, count in pairs if 0 <= (count - 1) * stride < frames]
        return fitting[self._draw("step", step) % len(fitting)] if fitting else (1, frames)

    def cut(self, clips: np.ndarray, positions: np.ndarray, stride: int, count: int) -> np.ndarray:
        """``count`` frames of each clip, [b, T, ...] -> [b, count, ...], every ``stride``-th from a drawn one on."""
        length = (count - 1) * stride + 1
        starts = [self._draw("start", position) % (clips.shape[1] - length + 1) for position in positions.tolist()]
        windows = [clip[start : start + length : stride] for clip, start in zip(clips, starts, strict=True)]
        return np.stack(windows)

    def _draw(self, what: str, number: int) -> int:
        return xxhash.xxh3_64_intdigest(f"subclip {what} {self._seed} {number}".encode())
