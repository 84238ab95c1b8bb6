"""Memory of large outputs is lent again, but only when nothing uses it."""

import gc

import numpy as np

from sppnet.pooling import memory


def test_large_outputs_lend_each_other_their_memory():
    size = memory.SMALLEST // 4
    first = memory.empty((2, size), np.float32)
    place = first.ctypes.data
    assert place % memory.LINE == 0
    second = memory.empty((2, size), np.float32)
    assert second.ctypes.data != place
    part, place = second[1:], second.ctypes.data
    del first, second
    gc.collect()
    # A view keeps the memory, as does an array that shares it.
    assert memory.empty((2, size), np.float32).ctypes.data != place
    array = part.view(np.int32)
    del part
    array.fill(7)
    third = memory.empty((2, size), np.float32)
    place = third.ctypes.data
    third.fill(1)
    assert (array == 7).all()
    del third
    fourth = memory.empty((1, 2 * size + 5), np.float32)
    assert fourth.ctypes.data == place
    del fourth
    assert memory.empty((4, size), np.float16).ctypes.data == place


def test_kept_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(memory, "LARGEST", memory.SMALLEST)
    memory._kept.clear()
    assert memory.empty((memory.SMALLEST + 1,), np.uint8).shape == (memory.SMALLEST + 1,)
    assert memory._kept == []
    assert memory.empty((3, 0), np.float32).shape == (3, 0)


def test_scratch_starts_at_a_cache_line():
    for shape in ((1,), (3, 5), (1000, 64)):
        array = memory.at_line(shape, np.float64)
        assert array.ctypes.data % memory.LINE == 0
        assert (array.shape, array.dtype) == (shape, np.float64)
        array[:] = 1
