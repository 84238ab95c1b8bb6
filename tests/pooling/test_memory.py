"""Memory of large outputs is lent again, but only when nothing uses it."""

import gc

import torch

from sppnet.pooling import memory


def test_large_outputs_lend_each_other_their_memory():
    size = memory.SMALLEST // 4
    first = memory.empty((2, size), torch.float32)
    place = first.data_ptr()
    assert place % memory.LINE == 0
    second = memory.empty((2, size), torch.float32)
    assert second.data_ptr() != place
    part, place = second[1:], second.data_ptr()
    del first, second
    gc.collect()
    # A view keeps the memory, as does an array that shares it.
    assert memory.empty((2, size), torch.float32).data_ptr() != place
    array = part.numpy()
    del part
    array.fill(7)
    third = memory.empty((2, size), torch.float32)
    place = third.data_ptr()
    third.fill_(1)
    assert (array == 7).all()
    del third
    fourth = memory.empty((1, 2 * size + 5), torch.float32)
    assert fourth.data_ptr() == place
    del fourth
    assert memory.empty((4, size), torch.float16).data_ptr() == place


def test_kept_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(memory, "LARGEST", memory.SMALLEST)
    memory._kept.clear()
    assert memory.empty((memory.SMALLEST + 1,), torch.uint8).shape == (memory.SMALLEST + 1,)
    assert memory._kept == []
    assert memory.empty((3, 0), torch.float32).shape == (3, 0)
