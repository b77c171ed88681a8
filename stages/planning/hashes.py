"""Multisets of millions of 64-bit hashes in twelve bytes each, asked a batch at a time."""

import numpy as np


class HashCounts:
    """How often each hash was added.

    Ascending runs, each more than twice as long as the next, so that adding and looking up stay cheap.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []  # hashes, ascending, and how often

    def count(self, hashes: np.ndarray) -> np.ndarray:
        """How often each of ``hashes`` (uint64 [N]) was added, int64 [N]."""
        order = np.argsort(hashes, kind="stable")
        total = np.zeros(len(hashes), np.int64)
        total[order] = self._count_ascending(hashes[order])
        return total

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Adds ``hashes`` (uint64 [N]) in their order; how often each had been added before, int64 [N]."""
        order = np.argsort(hashes, kind="stable")
        unique, first, inverse, times = np.unique(
            hashes[order], return_index=True, return_inverse=True, return_counts=True
        )
        before = np.zeros(len(hashes), np.int64)
        rank = np.arange(len(hashes)) - first[inverse]
        before[order] = self._count_ascending(unique)[inverse] + rank
        self._push(unique, times.astype(np.int32))
        return before

    def _count_ascending(self, hashes: np.ndarray) -> np.ndarray:
        total = np.zeros(len(hashes), np.int64)
        for run, times in self._runs:
            place = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            total += np.where(run[place] == hashes, times[place], 0)
        return total

    def _push(self, hashes: np.ndarray, times: np.ndarray) -> None:
        if not len(hashes):
            return
        while self._runs and len(self._runs[-1][0]) <= 2 * len(hashes):
            more, more_times = self._runs.pop()
            both = np.concatenate([more, hashes])
            order = np.argsort(both, kind="stable")
            hashes, first = np.unique(both[order], return_index=True)
            times = np.add.reduceat(np.concatenate([more_times, times])[order], first, dtype=np.int32)
        self._runs.append((hashes, times))
