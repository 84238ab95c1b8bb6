"""However the work on the CPU is divided, and however the maps lie in memory, the numbers are the same."""

import math
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from loops import oracle, some_windows
from sppnet.pooling import (
    SpatialPyramidPooling,
    pool_regions,
)
from sppnet.pooling.cpu import scheduling


@pytest.mark.parametrize("channels", [1, 64, 257])
@pytest.mark.parametrize("mode", ["max", "average"])
def test_memory_layout_does_not_matter(rng, channels, mode):
    feature = torch.randn(1, channels, 12, 19)
    windows = some_windows(rng, 20, 12, 19)
    expected = pool_regions(feature, windows, mode=mode)
    wide = torch.zeros(channels, 24, 38)
    wide[:, ::2, ::2] = feature[0]
    for same in (
        feature.to(memory_format=torch.channels_last),
        wide[:, ::2, ::2],
        feature.mT.contiguous().mT,
    ):
        assert not same.is_contiguous() or channels == 1
        assert torch.equal(pool_regions(same, windows, mode=mode), expected)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mode", ["max", "average"])
@pytest.mark.parametrize("shape", [(1, 64, 9, 7), (7, 128, 30, 41), (2, 320, 13, 13), (3, 96, 50, 60)])
def test_whole_maps_and_few_windows_in_channels_last_order(rng, threads, shape, mode, dtype, count):
    # Few distinct values, so that nearly every bin has ties.
    maps = torch.from_numpy(rng.integers(-2, 3, shape)).to(dtype)
    if mode == "max":
        maps[torch.from_numpy(rng.random(shape) < 0.01)] = math.nan
    height, width = shape[2:]
    windows, index = torch.tensor([[1, 2, width, height], [0, 0, 3, 4]]), torch.tensor([shape[0] - 1, 0])
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        threads(1 if layout == torch.contiguous_format else count)
        given = maps.clone(memory_format=layout).requires_grad_()
        pooled = SpatialPyramidPooling(mode=mode)(given), pool_regions(given, windows, index=index, mode=mode)
        upstream = [torch.arange(p.numel(), dtype=dtype).reshape(p.shape) for p in pooled]
        grads = [torch.autograd.grad(p, given, u)[0] for p, u in zip(pooled, upstream, strict=True)]
        assert all(grad.stride() == given.stride() for grad in grads)
        found.append([*pooled, *grads])
    for packed, direct in zip(*found, strict=True):
        torch.testing.assert_close(direct, packed, rtol=0, atol=0, equal_nan=True)


def test_conversion_in_parts_changes_nothing(rng, monkeypatch):
    feature = torch.randn(17, 9, 8).half()
    windows = some_windows(rng, 50, 9, 8)
    expected = pool_regions(feature, windows)
    monkeypatch.setattr(scheduling, "CONVERTED", 4 * 3 * 50 * 17)
    assert torch.equal(pool_regions(feature, windows), expected)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_threads_do_not_change_the_result(rng, threads, count):
    feature = torch.randn(257, 20, 30)
    windows = some_windows(rng, 300, 20, 30)
    expected = pool_regions(feature, windows)
    threads(count)
    assert torch.equal(pool_regions(feature, windows), expected)


def test_callers_in_several_threads(rng, threads):
    feature = torch.randn(64, 20, 30)
    windows = some_windows(rng, 200, 20, 30)
    expected = pool_regions(feature, windows)
    threads(2)
    results = []
    callers = [
        threading.Thread(target=lambda: results.append(pool_regions(feature, windows))) for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_can_pool():
    script = (
        "import os, numpy as np, torch; from sppnet.pooling import pool_regions\n"
        "pool = lambda: pool_regions(torch.ones(256, 9, 9), np.array([[0, 0, 9, 9]] * 200))\n"
        "pool(); child = os.fork()\n"
        "if child == 0: os._exit(0 if bool((pool() == 1).all()) else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0


def test_many_images_of_many_sizes_in_threads(rng, threads):
    maps = [torch.randn(70, *rng.integers(1, 40, 2)) for _ in range(60)]
    layer = SpatialPyramidPooling((6, 3, 2, 1))
    threads(2)
    pooled = layer(maps)
    threads(1)
    assert torch.equal(pooled, torch.stack([layer(m) for m in maps]))
    index = rng.integers(0, 60, 1000)
    windows = np.concatenate([some_windows(rng, 4, *maps[i].shape[1:])[[3]] for i in index])
    threads(3)
    pooled = pool_regions(maps, windows, index=index)
    for r in range(0, 1000, 37):
        assert torch.equal(pooled[r], oracle(maps[index[r]], windows[r], (6, 3, 2, 1)))
