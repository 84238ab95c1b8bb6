"""The pooling operator as nodes of an ONNX graph, exact at every size.

PyTorch's exporter refuses adaptive pooling unless all sizes divide. Here the bins' bounds are integer
arithmetic on sizes within the graph: a map is cut into rows of bins and these into columns; a window of a map
is cut into its bins, each a rectangle for ONNX's ``MaxRoiPool`` or, for means, four corners in a table of
sums.

All of it runs while PyTorch exports: each call of `op` adds a node to the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sppnet.errors import SppnetError


def translate(maps: Any, windows: Any, index: Any, levels: Any, mode: Any, dtype: Any = None) -> Any:
    """Write a call of `sppnet.pooling.operator.pool` as nodes."""
    from onnxscript import opset20

    from onnx import TensorProto

    op: Any = opset20
    kind, channels = maps[0].dtype, maps[0].shape[1]
    if kind in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
        # Runtimes pool float32 only. The maximum is the same there, the mean is rounded once.
        maps = [op.Cast(m, to=TensorProto.FLOAT) for m in maps]
    if windows is None:
        grids = (partial(_map_grid, op, m, mode) for m in maps)
        pooled = op.Concat(*(_pyramid(op, grid, levels, mode, channels) for grid in grids), axis=0)
    elif mode == "max" and kind == TensorProto.DOUBLE:
        raise SppnetError("found float64 maps, expected float32, float16 or bfloat16 for maxima of windows")
    else:
        if index is None:
            index = op.Mul(op.Gather(windows, 0, axis=1), 0)
        parts, rows, first = [], [], op.Constant(value_int=0)
        for m in maps:
            past = op.Add(first, op.Squeeze(op.Shape(m, start=0, end=1)))
            inside = op.And(op.GreaterOrEqual(index, first), op.Less(index, past))
            rows.append(op.Squeeze(op.NonZero(inside), [0]))
            image = op.Sub(op.Gather(index, rows[-1]), first)
            grid = partial(_window_grid, op, m, op.Gather(windows, rows[-1]), image, mode, channels)
            parts.append(_pyramid(op, grid, levels, mode, channels))
            first = past
        # Row i of all parts in a line belongs to window order[i].
        order = op.Concat(*rows, axis=0)
        back = op.ScatterElements(order, order, op.Range(0, op.Squeeze(op.Shape(order)), 1), axis=0)
        pooled = op.Gather(op.Concat(*parts, axis=0), back)
    return op.Cast(pooled, to=int(kind if dtype is None else dtype))


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
    from onnx import TensorProto

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
