"""The pooling operator as nodes of an ONNX graph, exact at every size.

The bins' bounds are integer arithmetic on sizes within the graph: a map is cut into rows of bins and these
into columns; a window of a map is cut into its bins, each a rectangle for ONNX's ``MaxRoiPool`` or, for
means, four corners in a table of sums.

All functions take `op`, of which each call adds a node: `sppnet.onnx.nodes.Nodes`, or the operators of
onnxscript while PyTorch exports.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from onnx import TensorProto


def pool_maps(op: Any, maps: Any, levels: Sequence[int], mode: str, channels: int) -> Any:
    """Pool whole maps.

    Parameters
    ----------
    op
        What writes nodes.
    maps : (N, C, H, W) float value
    levels : sequence of int
        The pyramid.
    mode : {"max", "average"}
        What is kept of a bin.
    channels : int
        C.

    Returns
    -------
    (N, C * M) value
        In the order of `sppnet.pooling.layer.SpatialPyramidPooling`.
    """
    return _pyramid(op, partial(_map_grid, op, maps, mode), levels, mode, channels)


def pool_windows(
    op: Any, maps: Sequence[Any], windows: Any, index: Any, levels: Sequence[int], mode: str, channels: int
) -> Any:
    """Pool windows of maps.

    Parameters
    ----------
    op, levels, mode, channels
        As in `pool_maps`.
    maps : sequence of (N_i, C, H_i, W_i) float32 values
        Their images are numbered through. Of means float64, too.
    windows : (R, 4) int64 value
        ``x1, y1, x2, y2`` in cells, inside the map.
    index : (R,) int64 value
        The image of each window.

    Returns
    -------
    (R, C * M) value
        In the order of `sppnet.pooling.regions.pool_regions`.
    """
    first, starts = op.Constant(value_int=0), []
    for m in maps:
        past = op.Add(first, op.Squeeze(op.Shape(m, start=0, end=1)))
        starts.append((first, past))
        first = past

    def pool(i: int, rows: Any) -> Any:
        image = op.Sub(op.Gather(index, rows), starts[i][0])
        grid = partial(_window_grid, op, maps[i], op.Gather(windows, rows), image, mode, channels)
        return _pyramid(op, grid, levels, mode, channels)

    inside = [op.And(op.GreaterOrEqual(index, first), op.Less(index, past)) for first, past in starts]
    return in_parts(op, inside, pool)


def in_parts(op: Any, masks: Sequence[Any], compute: Callable[[int, Any], Any]) -> Any:
    """Compute something of the rows of each part by itself, and return it in the order of all rows.

    Parameters
    ----------
    op
        What writes nodes.
    masks : sequence of (R,) bool values
        The rows of each part; each row is in one.
    compute : callable
        Given the place of a part and its rows, (r,) int64, returns a value of r rows.
    """
    rows = [op.Squeeze(op.NonZero(mask), [0]) for mask in masks]
    parts = [compute(i, r) for i, r in enumerate(rows)]
    # Row i of all parts in a line belongs to row order[i].
    order = op.Concat(*rows, axis=0)
    back = op.ScatterElements(order, order, op.Range(0, op.Squeeze(op.Shape(order)), 1), axis=0)
    return op.Gather(op.Concat(*parts, axis=0), back)


def _pyramid(op: Any, grid: Callable[[int], Any], levels: Any, mode: str, channels: int) -> Any:
    """Return the (R, C * M) vectors of a pyramid, where ``grid(n)`` gives a level as (R, C, n, n)."""
    grids: dict[int, Any] = {}
    for n in sorted(set(levels), reverse=True):
        # A bin is the union of the finer level's bins in it, whose maximum is cheaper.
        finer = next((m for m in grids if mode == "max" and m % n == 0), None)
        if finer is None:
            grids[n] = grid(n)
        else:
            blocks = op.Reshape(grids[finer], [0, channels, n, finer // n, n, finer // n])
            grids[n] = op.ReduceMax(blocks, [3, 5], keepdims=0)
    return op.Concat(*(op.Flatten(grids[n], axis=1) for n in levels), axis=1)


def _map_grid(op: Any, m: Any, mode: str, n: int) -> Any:
    """Return the (N, C, n, n) bins of maps: rows of bins first, then the columns of these."""
    reduce = op.ReduceMax if mode == "max" else op.ReduceMean
    for axis in (2, 3):
        size = op.Shape(m, start=axis, end=axis + 1)
        bounds = [_bounds(op, 0, size, i, n) for i in range(n)]
        bins = [reduce(op.Slice(m, start, end, [axis]), [axis], keepdims=1) for start, end in bounds]
        m = op.Concat(*bins, axis=axis)
    return m


def _window_grid(op: Any, m: Any, windows: Any, image: Any, mode: str, channels: int, n: int) -> Any:
    """Return the (R, C, n, n) bins of windows, each of the image of maps (N, C, H, W) that it says."""
    x1, y1, x2, y2 = (op.Gather(windows, [i], axis=1) for i in range(4))
    steps = op.Constant(value_ints=list(range(n)))
    left, right = (op.Unsqueeze(v, [1]) for v in _bounds(op, x1, op.Sub(x2, x1), steps, n))
    top, bottom = (op.Unsqueeze(v, [2]) for v in _bounds(op, y1, op.Sub(y2, y1), steps, n))
    image = op.Unsqueeze(image, [1, 2])
    if mode == "max":
        shape = op.Concat(op.Shape(windows, start=0, end=1), op.Constant(value_ints=[n, n, 1]), axis=0)
        # Its corners are inclusive. They are whole numbers, exact in float32 below 2 ** 24.
        corners = (image, left, top, op.Sub(right, 1), op.Sub(bottom, 1))
        rois = op.Concat(*(op.Expand(op.Unsqueeze(v, [3]), shape) for v in corners), axis=3)
        rois = op.Cast(op.Reshape(rois, [-1, 5]), to=TensorProto.FLOAT)
        bins = op.Reshape(op.MaxRoiPool(m, rois, pooled_shape=[1, 1]), [-1, n, n, channels])
    else:
        sums = op.CumSum(op.CumSum(op.Cast(m, to=TensorProto.DOUBLE), 2), 3)
        sums = op.Transpose(op.Pad(sums, [0, 0, 1, 1, 0, 0, 0, 0]), perm=[0, 2, 3, 1])
        height, width = (op.Shape(sums, start=i, end=i + 1) for i in (1, 2))
        table = op.Reshape(sums, [-1, channels])

        def corner(y: Any, x: Any) -> Any:
            return op.Gather(table, op.Add(op.Mul(op.Add(op.Mul(image, height), y), width), x))

        right_part, left_part = (op.Sub(corner(bottom, x), corner(top, x)) for x in (right, left))
        cells = op.Unsqueeze(op.Mul(op.Sub(right, left), op.Sub(bottom, top)), [3])
        bins = op.Div(op.Sub(right_part, left_part), op.Cast(cells, to=TensorProto.DOUBLE))
    return op.Transpose(bins, perm=[0, 3, 1, 2])


def _bounds(op: Any, first: Any, size: Any, i: Any, n: int) -> tuple[Any, Any]:
    """Return where bin i of n starts and ends along `size` cells from `first`; see `bin_bounds`."""
    start, end = op.Mul(size, i), op.Add(op.Mul(size, op.Add(i, 1)), n - 1)
    return op.Add(first, op.Div(start, n)), op.Add(first, op.Div(end, n))
