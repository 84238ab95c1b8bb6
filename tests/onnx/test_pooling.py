import numpy as np
import pytest

from graphs import run, written
from sppnet.onnx.nodes import Nodes
from sppnet.onnx.pooling import in_parts, pool_maps, pool_windows

LEVELS = (1, 6, 4, 3, 2)


def pooled(window, levels, mode):
    """Pool (C, h, w) cells by a loop over the bins."""
    height, width = window.shape[1:]
    reduce, bins = {"max": np.max, "average": np.mean}[mode], []
    for n in levels:
        rows = [window[:, i * height // n : -(-(i + 1) * height // n)] for i in range(n)]
        cells = [[r[:, :, j * width // n : -(-(j + 1) * width // n)] for j in range(n)] for r in rows]
        bins.append(np.array([[reduce(c, axis=(1, 2)) for c in row] for row in cells]).transpose(2, 0, 1))
    return np.concatenate([b.ravel() for b in bins])


def agree(found, expected, mode):
    expected = np.reshape(expected, found.shape)
    if mode == "max":
        assert np.array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["max", "average"])
def test_maps_of_any_size(mode):
    op = Nodes()
    session = written(op, pool_maps(op, op.input("m", np.float32, ["n", 3, "h", "w"]), LEVELS, mode, 3))
    rng = np.random.default_rng(0)
    for height in (1, 2, 5, 6, 7, 13, 40):
        for width in (1, 3, 4, 12, 29):
            maps = rng.standard_normal((2, 3, height, width)).astype(np.float32) - 3
            agree(run(session, maps), [pooled(m, LEVELS, mode) for m in maps], mode)


@pytest.mark.parametrize("mode", ["max", "average"])
def test_windows_of_several_maps(mode):
    op = Nodes()
    maps = [op.input(f"m{i}", np.float32, ["n", 3, f"h{i}", f"w{i}"]) for i in range(2)]
    windows, index = op.input("windows", np.int64, ["r", 4]), op.input("index", np.int64, ["r"])
    session = written(op, pool_windows(op, maps, windows, index, LEVELS, mode, 3))
    rng = np.random.default_rng(0)
    for count in (0, 1, 60):
        # Two images in the first batch, one in the second.
        batches = [rng.standard_normal((2, 3, 9, 14)), rng.standard_normal((1, 3, 21, 5))]
        batches = [b.astype(np.float32) - 3 for b in batches]
        images, which = [*batches[0], *batches[1]], rng.integers(0, 3, count)
        limits = np.array([m.shape[:0:-1] for m in images])[which].reshape(-1, 2)
        low = np.floor(rng.random((count, 2)) * limits)
        high = low + 1 + np.floor(rng.random((count, 2)) * (limits - low))
        places = np.concatenate([low, high], axis=1).astype(np.int64)
        found = run(session, *batches, places, which)
        assert found.shape == (count, 3 * sum(n * n for n in LEVELS))
        expected = [
            pooled(images[i][:, y1:y2, x1:x2], LEVELS, mode)
            for i, (x1, y1, x2, y2) in zip(which, places, strict=True)
        ]
        agree(found, expected, mode)


def test_parts_come_back_in_the_order_of_all():
    op = Nodes()
    kind, number = op.input("kind", np.int64, ["r"]), op.input("number", np.float32, ["r"])
    parts = [lambda x: x + 1, lambda x: x * 2, lambda x: x * x]
    masks = [kind == i for i in range(3)]
    result = in_parts(op, masks, lambda i, rows: parts[i](op.Gather(number, rows)))
    kinds, numbers = np.array([2, 0, 0, 1, 2, 1]), np.arange(6, dtype=np.float32)
    expected = [parts[i](x) for i, x in zip(kinds, numbers, strict=True)]
    assert run(written(op, result), kinds, numbers).tolist() == expected
