"""Memory for batches that is taken again: the kernel clears a fresh page when it is first touched, which costs time."""

import math
import mmap
import weakref
from collections import defaultdict

import numpy as np


class RecycledMemory:
    """Arrays whose memory is taken again once nobody refers to them, nor to a view of them. Threads may share it."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[mmap.mmap]] = defaultdict(list)  # by their size, a power of two

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array with whatever content, float16, whose start is that of a page."""
        count = math.prod(shape)
        size = 1 << (2 * count).bit_length()
        free = self._free[size]
        try:
            memory = free.pop()  # the one that is likeliest in the CPU's cache still
        except IndexError:
            memory = mmap.mmap(-1, size)
        array = np.frombuffer(memory, np.float16, count)
        weakref.finalize(array, free.append, memory)
        return array.reshape(shape)
