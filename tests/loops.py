"""Plain loops that pooling is judged by, and windows to pool."""

import math

import numpy as np

from sppnet.arrays import is_tensor, like

LEVELS = [(6, 3, 2, 1), (1, 2, 3), (4, 3, 2, 1), (5,), (7, 1), (2, 2)]
SIDES = [(1, 1), (1, 7), (5, 1), (2, 3), (6, 6), (13, 13), (10, 17), (60, 45)]


def oracle(feature, window, levels, mode="max"):
    """Pool one window of a (C, H, W) array or tensor bin by bin with NumPy's own maximum and mean."""
    x1, y1, x2, y2 = (int(v) for v in window)
    part = (feature.float().numpy() if is_tensor(feature) else feature)[:, y1:y2, x1:x2]
    reduce = np.max if mode == "max" else np.mean
    height, width = y2 - y1, x2 - x1
    vectors = []
    for n in levels:
        level = np.empty((len(part), n, n), part.dtype)
        for i in range(n):
            for j in range(n):
                rows = slice(math.floor(i * height / n), math.ceil((i + 1) * height / n))
                columns = slice(math.floor(j * width / n), math.ceil((j + 1) * width / n))
                level[:, i, j] = reduce(part[:, rows, columns], axis=(1, 2))
        vectors.append(level.ravel())
    return like(np.concatenate(vectors), feature)


def some_windows(rng, count, height, width):
    """Return 3 or more random windows: the first is the whole map, the next two are single cells."""
    xs, ys = (
        np.sort(rng.integers(0, side, (count, 2)), axis=1) + np.array([0, 1]) for side in (width, height)
    )
    windows = np.stack([xs[:, 0], ys[:, 0], xs[:, 1], ys[:, 1]], axis=1)
    windows[:3] = [[0, 0, width, height], [0, 0, 1, 1], [width - 1, height - 1, width, height]]
    return windows


def whole(feature):
    """Return the window that is the whole map."""
    height, width = feature.shape[-2:]
    return np.array([[0, 0, width, height]])
