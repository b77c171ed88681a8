from collections import Counter

import numpy as np
import pytest

from shards.errors import DatasetError
from shards.subclip import Subclips


def clips(count: int, frames: int) -> np.ndarray:
    """[count, frames, 1]: the number of the frame."""
    return np.tile(np.arange(frames, dtype=np.float16)[:, None], (count, 1, 1))


def test_by_default_nothing_is_cut():
    subclips = Subclips((1,), (), 0)
    assert subclips.whole and {subclips.shape(step, 56) for step in range(50)} == {(1, 56)}
    assert not Subclips((2,), (), 0).whole and not Subclips((1,), (8,), 0).whole


@pytest.mark.parametrize(
    ("strides", "frames", "clip", "expected"),
    [
        ((1, 2, 3), (), 7, {(1, 7), (2, 3), (3, 2)}),  # as many as the stride leaves
        ((1,), (4, 16), 16, {(1, 4), (1, 16)}),
        ((1, 2), (4, 6), 7, {(1, 4), (1, 6), (2, 4)}),  # 6 at a stride of 2 do not fit, 4 do just
        ((1, 2), (4, 6), 6, {(1, 4), (1, 6)}),
        ((2, 3), (), 1, {(1, 1)}),  # a picture
        ((1,), (9,), 8, {(1, 8)}),
    ],
)
def test_what_fits_is_drawn_for_a_step(strides, frames, clip, expected):
    found = Counter(Subclips(strides, frames, 7).shape(step, clip) for step in range(600))
    assert set(found) == expected
    assert min(found.values()) > 0.7 * 600 / len(expected)
    assert found != Counter(Subclips(strides, frames, 8).shape(step, clip) for step in range(600)) or len(expected) == 1


def test_sub_clips_begin_anywhere_and_keep_their_stride():
    subclips = Subclips((1, 2), (4,), 7)
    cut = subclips.cut(clips(500, 9), np.arange(500), 2, 4)[:, :, 0]
    assert cut.shape == (500, 4) and (np.diff(cut) == 2).all()
    starts = Counter(cut[:, 0].tolist())
    assert set(starts) == {0, 1, 2} and min(starts.values()) > 120
    again = subclips.cut(clips(3, 9), np.array([400, 5, 17]), 2, 4)[:, :, 0]
    assert np.array_equal(again, cut[[400, 5, 17]])  # by position, wherever it is in a batch


@pytest.mark.parametrize(("strides", "frames"), [((), ()), ((0,), ()), ((1, -2), ()), ((1,), (0,))])
def test_what_cannot_be_cut_is_refused(strides, frames):
    with pytest.raises(DatasetError, match="expected numbers of frames, 1 or more, and at least one stride"):
        Subclips(strides, frames, 0)
