import numpy as np

from shards.memory import RecycledMemory, empty_rows


def test_memory_is_taken_again_when_no_view_of_it_is_left():
    memory = RecycledMemory()
    array = memory.empty_rows(6, 10)
    assert array.shape == (6, 10) and array.dtype == np.uint8 and array.flags.c_contiguous
    array[:] = 7
    view, start = array[1, :2], array.ctypes.data
    del array
    other = memory.empty_rows(6, 10)
    other[:] = 1
    assert other.ctypes.data != start and (view == 7).all()  # of which the view is still there
    del view
    assert memory.empty_rows(5, 12).ctypes.data == start


def test_no_samples_take_no_memory():
    assert RecycledMemory().empty_rows(0, 4).shape == empty_rows(0, 4).shape == (0, 4)


def test_rows_begin_well_aligned():
    for length in range(1, 2000, 173):
        array = empty_rows(3, length)
        assert array.shape == (3, length) and array.ctypes.data % 64 == 0
