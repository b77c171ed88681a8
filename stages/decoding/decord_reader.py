"""Reading videos with decord, as far as it can be relied on.

decord scales a frame while it converts it to RGB. Of a picture of an even width swscale then keeps half of
the colour resolution; with an odd width it keeps it all, so an odd width is asked for.
"""

from collections.abc import Sequence

import decord
import numpy as np

from stages.decoding.fit import cover, crop_centre
from stages.decoding.pyav_frames import Deadline, too_short
from stages.decoding.pyav_reader import Shown, probe

GROUP_FRAMES = 8
"""Frames decoded between two looks at the clock."""

MISTIMED_FORMATS = frozenset({"mpegts"})
"""Containers of which decord loses the first frames."""


def read_shown_by_decord(
    path: str, wanted_s: Sequence[float], height: int, width: int, deadline: Deadline
) -> Shown | None:
    """As ``pyav_reader.read_shown``; None where decord fails, or where its frames would be the wrong ones.

    decord numbers frames by their packets. Packets that an edit list hides, as in a clip cut without being
    encoded again, have a number and a negative time but no frame: all that follow would be taken too late.
    It does not report damage: a clip that H.264 errors have ruined is returned like any other.
    """
    info = probe(path, deadline)  # turned and with square pixels, of which decord knows only the first
    if info.container in MISTIMED_FORMATS:
        return None
    size = cover((info.height, info.width), height, width)
    if size != (info.height, info.width):
        size = (size[0], size[1] | 1)
    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(path, num_threads=1, width=size[1], height=size[0])
        spans_s = reader.get_frame_timestamp(range(len(reader)))  # [frames, 2]: start, end
        if spans_s[0, 0] < 0 or (np.diff(spans_s[:, 0]) <= 0).any():
            return None
        numbers = _pick(spans_s - spans_s[0, 0], wanted_s, info.tolerance_s)
        different, times = np.unique(numbers, return_counts=True)
        shown = Shown(times=times.tolist(), source_fps=reader.get_avg_fps())
        for first in range(0, len(different), GROUP_FRAMES):
            deadline.check()
            group = reader.get_batch(different[first : first + GROUP_FRAMES].tolist()).asnumpy()
            shown.pictures += [crop_centre(picture, height, width) for picture in group]
    except (decord.DECORDError, RuntimeError, AssertionError):  # the last for a count of no frames
        return None
    return shown


def _pick(spans_s: np.ndarray, wanted_s: Sequence[float], late_s: float) -> np.ndarray:
    """The number of the frame that is on screen at each wanted time."""
    end_s = float(spans_s[-1, 1])
    if wanted_s[-1] >= end_s:
        raise too_short(end_s, wanted_s[-1])
    return np.searchsorted(spans_s[:, 0], np.asarray(wanted_s) + late_s, side="right") - 1
