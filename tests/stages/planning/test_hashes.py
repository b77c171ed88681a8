"""Counting hashes, against a Counter."""

from collections import Counter

import numpy as np
import pytest

from stages.planning.hashes import HashCounts


@pytest.mark.parametrize("sizes", [[1] * 40, [100, 1, 1, 50, 3], [0, 5, 0], [1000, 1000, 1000], [1, 2, 4, 8, 16, 32]])
@pytest.mark.parametrize("different", [3, 50, 2**63])
def test_it_counts_like_a_counter(sizes: list[int], different: int) -> None:
    rng = np.random.default_rng(len(sizes))
    counts, expected = HashCounts(), Counter[int]()
    for size in sizes:
        batch = rng.integers(0, different, size, np.uint64) * np.uint64(2)
        before = counts.add(batch).tolist()
        for value, earlier in zip(batch.tolist(), before, strict=True):
            assert expected[value] == earlier
            expected[value] += 1
        asked = np.concatenate([batch, batch[:2] + np.uint64(1), rng.integers(0, 2**64, 5, np.uint64)])
        assert counts.count(asked).tolist() == [expected[value] for value in asked.tolist()]


def test_the_largest_hashes_are_counted_too() -> None:
    counts = HashCounts()
    edges = np.array([2**64 - 1, 0, 2**63, 2**64 - 1], np.uint64)
    assert counts.add(edges).tolist() == [0, 0, 0, 1]
    assert counts.count(edges).tolist() == [2, 1, 1, 2]
