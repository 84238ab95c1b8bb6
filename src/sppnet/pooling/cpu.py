"""Region pooling on the CPU.

Channels are pooled `LANES` at a time. A block of that many is first *packed*: the cells of all maps one after
the other, each a row of `LANES` numbers, which fills a few vector registers. Every window is then pooled from
those rows, one row per bin, and its bins are transposed into a page that goes to the output as it is.

For the maximum, floats are packed as integers of the same order with NaN on top: one vector instruction then
takes a maximum that carries NaN along, where floats need three.

A level whose side divides that of a finer one is pooled from the finer bins. Its bins are exactly unions of
k x k finer ones, because ``floor(i * k * size / (k * n))`` is ``floor(i * size / n)``, and so for the ends.

The threads are Python's, around kernels that release the interpreter lock. Numba's own end the process if it
forked after they started (OpenMP) or if two threads call at once (workqueue).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils

from sppnet.boxes import IntArray
from sppnet.compiling import compiled, inlined

LANES = 64
TILE = 16
INT32, INDEX = ir.IntType(32), ir.IntType(64)
LOWEST, MAGNITUDE, INFINITY = -(1 << 31), (1 << 31) - 1, 0x7F800000


def _vector(numbers: Sequence[int]) -> Any:
    """Return a constant vector of 32-bit integers."""
    return ir.Constant(ir.VectorType(INT32, len(numbers)), list(numbers))


def _spread(builder: Any, number: Any, lanes: int) -> Any:
    """Return a vector that holds `number` in every lane."""
    empty = ir.Constant(ir.VectorType(number.type, lanes), ir.Undefined)
    one = builder.insert_element(empty, number, INT32(0))
    return builder.shuffle_vector(one, one, _vector([0] * lanes))


def _address(builder: Any, context: Any, array_type: Any, array: Any, index: Any, vector: Any) -> Any:
    """Return a pointer to the vector that begins at element `index` of a contiguous array."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


@inlined
def reduce_cells(
    _: Any, target: Any, bin_: Any, source: Any, first: Any, rows: Any, columns: Any, step: Any
) -> Any:
    """Reduce ``source[first + y * step + x]``, y < rows, x < columns, to ``target[bin_]``.

    Integers to their maximum, floats to their mean. The accumulator stays in registers, which plain loops do
    not achieve: their compiler must assume that writing the target changes the source.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, bin_, source, first, rows, columns, step = arguments
        vector = ir.VectorType(context.get_data_type(signature.args[0].dtype), LANES)
        integers = vector.element == INT32
        at = builder.mul(first, INDEX(LANES))
        cells = _address(builder, context, signature.args[2], source, at, vector)
        total = cgutils.alloca_once(builder, vector)  # type: ignore[no-untyped-call]
        builder.store(ir.Constant(vector, [LOWEST if integers else 0.0] * LANES), total)
        with cgutils.for_range(builder, rows) as y:
            row = builder.mul(y.index, step)
            with cgutils.for_range(builder, columns) as x:
                value = builder.load(builder.gep(cells, [builder.add(row, x.index)]), align=4)
                old = builder.load(total)
                if integers:
                    new = builder.select(builder.icmp_signed(">", old, value), old, value)
                else:
                    new = builder.fadd(old, value)
                builder.store(new, total)
        result = builder.load(total)
        if not integers:
            for side in (rows, columns):
                count = builder.sitofp(side, ir.FloatType())
                result = builder.fdiv(result, _spread(builder, count, LANES))
        at = builder.mul(bin_, INDEX(LANES))
        builder.store(result, _address(builder, context, signature.args[0], target, at, vector), align=4)
        return context.get_dummy_value()

    return types.void(target, types.int64, source, *[types.int64] * 4), generate


@inlined
def write_tile(_: Any, target: Any, place: Any, stride: Any, source: Any, first: Any) -> Any:
    """Write ``source.flat[first + b * LANES + c]`` to ``target[place + c * stride + b]``, b and c < TILE.

    A transposition in registers: in each round, rows `d` apart exchange their off-diagonal squares. Rows are
    written by rising c. Integers turn back into the bits of floats.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, place, stride, source, first = arguments
        vector = ir.VectorType(context.get_data_type(signature.args[0].dtype), TILE)
        lanes = range(TILE)
        tile = []
        for b in lanes:
            at = builder.add(first, INDEX(b * LANES))
            row = builder.load(_address(builder, context, signature.args[3], source, at, vector), align=4)
            if vector.element == INT32:
                sign = builder.ashr(row, _vector([31] * TILE))
                row = builder.xor(row, builder.and_(sign, _vector([MAGNITUDE] * TILE)))
            tile.append(row)
        for d in (8, 4, 2, 1):
            upper = _vector([TILE + i - d if i & d else i for i in lanes])
            lower = _vector([TILE + i if i & d else i + d for i in lanes])
            for b in [b for b in lanes if not b & d]:
                pair = tile[b], tile[b + d]
                tile[b], tile[b + d] = (builder.shuffle_vector(*pair, mask) for mask in (upper, lower))
        for c in lanes:
            at = builder.add(place, builder.mul(stride, INDEX(c)))
            builder.store(tile[c], _address(builder, context, signature.args[0], target, at, vector), align=4)
        return context.get_dummy_value()

    return types.void(target, types.int64, types.int64, source, types.int64), generate


@inlined
def stream(_: Any, target: Any, place: Any, source: Any, tiles: Any) -> Any:
    """Copy `tiles` aligned vectors to ``target[place:]`` past the caches, so that it is not read first."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, place, source, tiles = arguments
        vector = ir.VectorType(context.get_data_type(signature.args[0].dtype), TILE)
        before = _address(builder, context, signature.args[2], source, INDEX(0), vector)
        after = _address(builder, context, signature.args[0], target, place, vector)
        with cgutils.for_range(builder, tiles) as i:
            value = builder.load(builder.gep(before, [i.index]), align=4 * TILE)
            store = builder.store(value, builder.gep(after, [i.index]), align=4 * TILE)
            store.set_metadata("nontemporal", builder.module.add_metadata([INT32(1)]))
        return context.get_dummy_value()

    return types.void(target, types.int64, source, types.int64), generate


@compiled("void(i4[:,:,:], i4[:,::1])", "void(f4[:,:,:], f4[:,::1])")
def pack(block: Any, rows: Any) -> None:
    """Write a block of at most `LANES` channels of one map into `rows`, one row per cell."""
    channels, height, width = block.shape
    for y in range(height):
        for x in range(width):
            for c in range(channels):
                rows[y * width + x, c] = block[c, y, x]


@compiled("void(i4[:,::1])")
def order(rows: Any) -> None:
    """Turn the bits of floats into integers of the same order, every NaN into the largest."""
    for p in range(len(rows)):
        for c in range(LANES):
            bits = rows[p, c]
            magnitude = bits & np.int32(MAGNITUDE)
            key = bits ^ ((bits >> np.int32(31)) & np.int32(MAGNITUDE))
            rows[p, c] = MAGNITUDE if magnitude > np.int32(INFINITY) else key


@compiled(
    "void(i4[:,::1], i8[:,::1], i8[:,::1], i8[:,::1], i8[:,::1], i4[:,::1], i4[::1], i4[:,::1], i8, i8, b1)",
    "void(f4[:,::1], i8[:,::1], i8[:,::1], i8[:,::1], i8[:,::1], f4[:,::1], f4[::1], f4[:,::1], i8, i8, b1)",
)
def pool_block(
    rows: Any,
    places: Any,
    low: Any,
    high: Any,
    plan: Any,
    bins: Any,
    page: Any,
    out: Any,
    channel: Any,
    channels: Any,
    aligned: Any,
) -> None:
    """Pool every window from one packed block of `channels`, the first of which is `channel`.

    A window is a line of `places`: row of its first cell, row step of its map, height, width. A level is a
    line of `plan`. The bounds of the bins of a side are ``low[side]`` and ``high[side]``, level after level.
    """
    for r in range(len(places)):
        first, step, height, width = places[r]
        for level in range(len(plan)):
            n, edge, base, finer, finer_base, offset = plan[level]
            for i in range(n):
                y = low[height, edge + i]
                tall = high[height, edge + i] - y
                for j in range(n):
                    bin_ = base + i * n + j
                    if finer:
                        k = finer // n
                        reduce_cells(bins, bin_, bins, finer_base + (i * finer + j) * k, k, k, finer)
                    else:
                        x = low[width, edge + j]
                        wide = high[width, edge + j] - x
                        reduce_cells(bins, bin_, rows, first + y * step + x, tall, wide, step)
            area = n * n
            # A tile reaches beyond the bins of its channels, into what the tiles after it overwrite.
            for c in range(0, channels, TILE):
                for b in range((area - 1) // TILE * TILE, -1, -TILE):
                    write_tile(page, c * area + b, area, bins, (base + b) * LANES + c)
            start = offset + channel * area
            if aligned:
                stream(out[r], start, page, channels * area // TILE)
            else:
                for i in range(channels * area):
                    out[r, start + i] = page[i]


def _plan(channels: int, levels: Sequence[int], derive: bool) -> IntArray:
    """Return one line per level, finest first.

    Side of the level, its first column in the bounds, its first row in the bins, side and first row of the
    finer level that it is derived from (0 when it is pooled from the cells), its first column in the output.
    """
    bases: dict[int, int] = {}
    lines = []
    base = 0
    for i in sorted(range(len(levels)), key=lambda i: -levels[i]):
        n = levels[i]
        finer = min((side for side in bases if derive and side % n == 0), default=0)
        offset = channels * sum(side * side for side in levels[:i])
        lines.append((n, sum(levels[:i]), base, finer, bases.get(finer, 0), offset))
        bases[n] = base
        base += n * n
    return np.array(lines, dtype=np.int64)


def pool(
    maps: Sequence[torch.Tensor],
    windows: IntArray,
    index: IntArray,
    levels: Sequence[int],
    bounds: tuple[IntArray, IntArray],
    mode: str,
    out: torch.Tensor,
) -> None:
    """Pool valid windows into `out`; the arguments are those of `sppnet.pooling.pool_regions`, checked.

    Parameters
    ----------
    maps : sequence of (C, H, W) float32 tensors
    windows : (R, 4) int64
    index : (R,) int64
    levels : sequence of int
    bounds : two (S + 1, sum of levels) int64 arrays
        Starts and ends of the bins of all levels for every side up to the longest, S.
    mode : {"max", "average"}
    out : (R, C * M) float32 tensor, contiguous
    """
    dtype = torch.int32 if mode == "max" else torch.float32
    channels = maps[0].shape[0]
    sources = [m.detach().view(dtype).numpy() for m in maps]
    target = out.view(dtype).numpy()
    starts = np.cumsum([0] + [m[0].size for m in sources])
    x1, y1, x2, y2 = windows.T
    step = np.array([m.shape[2] for m in sources])[index]
    places = np.stack([starts[index] + y1 * step + x1, step, y2 - y1, x2 - x1], axis=1)
    plan = _plan(channels, levels, derive=mode == "max")
    aligned = channels % TILE == 0 and out.data_ptr() % (4 * TILE) == 0

    def memory(*shape: int) -> Any:
        """Return new memory that starts at a cache line, as torch's does and NumPy's does not."""
        return torch.empty(shape, dtype=dtype, device="cpu").numpy()

    def work(task: tuple[int, slice]) -> None:
        channel, part = task
        count = min(LANES, channels - channel)
        rows = memory(starts[-1], LANES)
        bins = memory(sum(n * n for n in levels) + TILE, LANES)
        page = memory(max(levels) ** 2 * LANES + TILE)
        for source, (start, stop) in zip(sources, pairwise(starts), strict=True):
            pack(source[channel : channel + count], rows[start:stop])
        if mode == "max":
            order(rows)
        pool_block(rows, places[part], *bounds, plan, bins, page, target[part], channel, count, aligned)

    blocks = range(0, channels, LANES)
    threads = torch.get_num_threads()
    # Every task packs its block again, so windows are split only to keep the threads busy to the end.
    parts = min(math.ceil(4 * threads / len(blocks)), math.ceil(len(windows) / 64)) if threads > 1 else 1
    cuts = np.linspace(0, len(windows), parts + 1).astype(int).tolist()
    tasks = list(product(blocks, map(slice, cuts, cuts[1:])))
    if min(threads, len(tasks)) == 1:
        for task in tasks:
            work(task)
    else:
        with ThreadPoolExecutor(min(threads, len(tasks))) as executor:
            list(executor.map(work, tasks))
