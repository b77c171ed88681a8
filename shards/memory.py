"""Memory that records are read into."""

import mmap
import weakref
from collections import defaultdict

import numpy as np

_ALIGNMENT = 64  # bytes; the kernel copies faster to such a place


def empty_rows(rows: int, length: int) -> np.ndarray:
    """An array [rows, length] uint8 with whatever content, well aligned."""
    memory = np.empty(rows * length + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + rows * length].reshape(rows, length)


class RecycledMemory:
    """Arrays whose memory is taken again once nobody refers to them, nor to a view of them. Threads may share it.

    The kernel clears a fresh page when it is first touched, which costs time.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, list[mmap.mmap]] = defaultdict(list)  # by their size, a power of two

    def empty_rows(self, rows: int, length: int) -> np.ndarray:
        """An array [rows, length] uint8 with whatever content, whose start is that of a page."""
        count = rows * length
        size = 1 << count.bit_length()
        free = self._free[size]
        try:
            memory = free.pop()  # the one that is likeliest in the CPU's cache still
        except IndexError:
            memory = mmap.mmap(-1, size)
        array = np.frombuffer(memory, np.uint8, count)
        weakref.finalize(array, free.append, memory)
        return array.reshape(rows, length)
