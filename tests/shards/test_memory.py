import numpy as np

from shards.memory import RecycledMemory


def test_memory_is_taken_again_when_no_view_of_it_is_left():
    memory = RecycledMemory()
    array = memory.empty((2, 3, 5))
    assert array.shape == (2, 3, 5) and array.dtype == np.float16 and array.flags.c_contiguous
    array[:] = 7
    view, start = array[1, :2], array.ctypes.data
    del array
    other = memory.empty((2, 3, 5))
    other[:] = 1
    assert other.ctypes.data != start and (view == 7).all()  # of which the view is still there
    del view
    assert memory.empty((5, 6)).ctypes.data == start


def test_no_samples_take_no_memory():
    assert RecycledMemory().empty((0, 4)).shape == (0, 4)
