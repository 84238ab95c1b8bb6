"""The pooling operator on the CPU, forward and backward.

Channels are pooled `LANES` at a time. A block of that many is first *packed*: the cells of the maps one after
the other, each a row of `LANES` numbers, which fills a few vector registers. Every window is then pooled from
those rows, one row per bin, and its bins are transposed into a page that goes to the output as it is. Maps in
channels-last order have such rows already; where no cell is read much more than once, they are not packed.

For the maximum, floats are packed as integers of the same order with NaN on top: one vector instruction then
takes a maximum that carries NaN along, where floats need three.

A level whose side divides that of a finer one is pooled from the finer bins. Its bins are exactly unions of
k x k finer ones, because ``floor(i * k * size / (k * n))`` is ``floor(i * size / n)``, and so for the ends.

The backward pass finds the maxima again instead of keeping their places, which would take as much memory as
the output. A task owns its channels of its images, so no two threads add to the same number.

The threads are Python's, around kernels that release the interpreter lock. Numba's own end the process if it
forked after they started (OpenMP) or if two threads call at once (workqueue). They are kept from call to
call: starting them takes as long as pooling small maps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from torch import Tensor

from sppnet.arrays import IntArray
from sppnet.compiling import compiled, inlined
from sppnet.pooling.bins import bounds_up_to

# Batch, its first image and how many, first channel and how many, windows.
Task = tuple[int, int, int, int, int, IntArray]

LANES = 64
TILE = 16
LINE = 64
INT32, INDEX = ir.IntType(32), ir.IntType(64)

# Work below so many numbers read or written is done before other threads would have woken.
SMALL = 2**20
# Outputs above so many bytes leave the caches before they are read: they are written past them.
LARGE = 2**22
# At most so many cells are packed for a task, if the images allow it, and so many bytes of output converted.
CELLS, CONVERTED = 2**12, 2**25


def _vector(numbers: Sequence[int], kind: Any = INT32) -> Any:
    """Return a constant vector of integers."""
    return ir.Constant(ir.VectorType(kind, len(numbers)), list(numbers))


def _spread(builder: Any, number: Any) -> Any:
    """Return a vector that holds `number` in every lane."""
    empty = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
    one = builder.insert_element(empty, number, INT32(0))
    return builder.shuffle_vector(one, one, _vector([0] * LANES))


def _address(builder: Any, context: Any, array_type: Any, array: Any, index: Any, vector: Any) -> Any:
    """Return a pointer to the vector that begins at element `index` of a contiguous array."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def _cells(
    builder: Any, context: Any, array_type: Any, array: Any, begin: Any, pitch: Any, vector: Any
) -> Callable[[Any], Any]:
    """Return what loads cell p, the vector that begins at element ``begin + p * pitch`` of an array."""

    def load(p: Any) -> Any:
        place = builder.add(begin, builder.mul(p, pitch))
        return builder.load(_address(builder, context, array_type, array, place, vector), align=4)

    return load


def _lowest(kind: Any) -> int:
    return -(1 << (int(kind.width) - 1))


def _reducer(raw: bool) -> Callable[..., Any]:
    def reduce(
        _: Any,
        target: Any,
        bin_: Any,
        source: Any,
        begin: Any,
        pitch: Any,
        first: Any,
        rows: Any,
        columns: Any,
        step: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            target, bin_, source, begin, pitch, first, rows, columns, step = arguments
            vector = ir.VectorType(context.get_data_type(signature.args[0].dtype), LANES)
            integers = isinstance(vector.element, ir.IntType)
            cells = _cells(builder, context, signature.args[2], source, begin, pitch, vector)
            total = cgutils.alloca_once(builder, vector)  # type: ignore[no-untyped-call]
            start = _lowest(vector.element) if integers else 0.0
            builder.store(ir.Constant(vector, [start] * LANES), total)
            with cgutils.for_range(builder, rows) as y:
                row = builder.add(first, builder.mul(y.index, step))
                with cgutils.for_range(builder, columns) as x:
                    value = cells(builder.add(row, x.index))
                    old = builder.load(total)
                    if integers:
                        key = _keys(builder, value) if raw else value
                        new = builder.select(builder.icmp_signed(">", old, key), old, key)
                    else:
                        new = builder.fadd(old, value)
                    builder.store(new, total)
            result = builder.load(total)
            if not integers:
                for side in (rows, columns):
                    count = builder.sitofp(side, vector.element)
                    result = builder.fdiv(result, _spread(builder, count))
            at = builder.mul(bin_, INDEX(LANES))
            builder.store(result, _address(builder, context, signature.args[0], target, at, vector), align=4)
            return context.get_dummy_value()

        return types.void(target, types.int64, source, *[types.int64] * 6), generate

    return inlined(reduce)


# Both reduce the cells ``first + y * step + x``, y < rows, x < columns, to ``target[bin_]``: integers to
# their maximum, floats to their mean. Cell p is the `LANES` numbers from ``source[begin + p * pitch]`` on.
# Integers are keys of floats, which the second computes from the bits of floats. The accumulator stays in
# registers, which plain loops do not achieve: their compiler must assume that writing the target changes the
# source.
reduce_cells, reduce_maps = _reducer(raw=False), _reducer(raw=True)


def _locator(raw: bool) -> Callable[..., Any]:
    def locate(
        _: Any,
        target: Any,
        target_spots: Any,
        bin_: Any,
        source: Any,
        source_spots: Any,
        begin: Any,
        pitch: Any,
        first: Any,
        rows: Any,
        columns: Any,
        step: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            target, target_spots, bin_, source, source_spots, begin, pitch, *arguments = arguments
            first, rows, columns, step = arguments
            vector = ir.VectorType(context.get_data_type(signature.args[0].dtype), LANES)
            given = isinstance(signature.args[4], types.Array)
            cells = _cells(builder, context, signature.args[3], source, begin, pitch, vector)
            known = None
            if given:
                known = _cells(builder, context, signature.args[4], source_spots, begin, pitch, vector)
            best, spot = (cgutils.alloca_once(builder, vector) for _ in range(2))  # type: ignore[no-untyped-call]
            builder.store(ir.Constant(vector, [_lowest(vector.element)] * LANES), best)
            builder.store(ir.Constant(vector, [0] * LANES), spot)
            with cgutils.for_range(builder, rows) as y:
                row = builder.add(first, builder.mul(y.index, step))
                with cgutils.for_range(builder, columns) as x:
                    number = builder.add(row, x.index)
                    value = cells(number)
                    if raw:
                        value = _keys(builder, value)
                    old, old_spot = builder.load(best), builder.load(spot)
                    better = builder.icmp_signed(">", value, old)
                    if known is not None:
                        new_spot = known(number)
                        tie = builder.icmp_signed("==", value, old)
                        earlier = builder.icmp_signed("<", new_spot, old_spot)
                        better = builder.or_(better, builder.and_(tie, earlier))
                    else:
                        # Cells come in row order, so the first of equal ones is there already.
                        if vector.element != INDEX:
                            number = builder.trunc(number, vector.element)
                        new_spot = _spread(builder, number)
                    builder.store(builder.select(better, value, old), best)
                    builder.store(builder.select(better, new_spot, old_spot), spot)
            at = builder.mul(bin_, INDEX(LANES))
            for place, array, kind in ((best, target, 0), (spot, target_spots, 1)):
                pointer = _address(builder, context, signature.args[kind], array, at, vector)
                builder.store(builder.load(place), pointer, align=4)
            return context.get_dummy_value()

        integers = [types.int64] * 6
        return types.void(target, target_spots, types.int64, source, source_spots, *integers), generate

    return inlined(locate)


# Both reduce integers as `reduce_cells` and `reduce_maps` do, and keep the spot of each maximum, the smallest
# on ties. The spot of cell p is found like the cell itself in `source_spots`, or is p where that is None.
locate_cells, locate_maps = _locator(raw=False), _locator(raw=True)


def _transpose(builder: Any, tile: list[Any]) -> list[Any]:
    """Return the columns of `TILE` vectors: in each round, rows `d` apart exchange off-diagonal squares."""
    lanes = range(TILE)
    for d in (8, 4, 2, 1):
        upper = _vector([TILE + i - d if i & d else i for i in lanes])
        lower = _vector([TILE + i if i & d else i + d for i in lanes])
        for b in [b for b in lanes if not b & d]:
            pair = tile[b], tile[b + d]
            tile[b], tile[b + d] = (builder.shuffle_vector(*pair, mask) for mask in (upper, lower))
    return tile


def _mirrored(builder: Any, row: Any) -> Any:
    """Turn the bits of floats into integers of the same order, or back: negative ones change direction."""
    kind, count = row.type.element, row.type.count
    sign = builder.ashr(row, _vector([kind.width - 1] * count, kind))
    return builder.xor(row, builder.and_(sign, _vector([-1 - _lowest(kind)] * count, kind)))


def _keys(builder: Any, row: Any) -> Any:
    """Turn the bits of floats into integers of the same order, every NaN into the largest."""
    kind, count = row.type.element, row.type.count
    magnitude = _vector([-1 - _lowest(kind)] * count, kind)
    infinity = _vector([{32: 0x7F800000, 64: 0x7FF0000000000000}[kind.width]] * count, kind)
    nan = builder.icmp_signed(">", builder.and_(row, magnitude), infinity)
    return builder.select(nan, magnitude, _mirrored(builder, row))


def _reader(transposed: bool) -> Callable[..., Any]:
    def read(_: Any, rows: Any, row: Any, lane: Any, source: Any, at: Any, stride: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            rows, row, lane, source, at, stride = arguments
            vector = ir.VectorType(context.get_data_type(signature.args[0].dtype), TILE)
            tile = []
            for k in range(TILE):
                place = builder.add(at, builder.mul(stride, INDEX(k)))
                pointer = _address(builder, context, signature.args[3], source, place, vector)
                value = builder.load(pointer, align=4)
                tile.append(_keys(builder, value) if isinstance(vector.element, ir.IntType) else value)
            for k, value in enumerate(_transpose(builder, tile) if transposed else tile):
                place = builder.add(builder.mul(builder.add(row, INDEX(k)), INDEX(LANES)), lane)
                builder.store(
                    value, _address(builder, context, signature.args[0], rows, place, vector), align=4
                )
            return context.get_dummy_value()

        integers = [types.int64] * 2
        return types.void(rows, *integers, source, *integers), generate

    return inlined(read)


# Both write a tile of `rows`, from lane `lane` on: keys of floats where they are read as integers. The first
# takes ``source[at + c * stride + p]``, lane c of row p, the other ``source[at + p * stride + c]``.
read_columns, read_rows = _reader(transposed=True), _reader(transposed=False)


@inlined
def write_tile(_: Any, target: Any, place: Any, stride: Any, source: Any, first: Any) -> Any:
    """Write ``source.flat[first + b * LANES + c]`` to ``target[place + c * stride + b]``, b and c < TILE.

    A transposition in registers. Rows are written by rising c. Integers turn back into the bits of floats.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, place, stride, source, first = arguments
        vector = ir.VectorType(context.get_data_type(signature.args[0].dtype), TILE)
        tile = []
        for b in range(TILE):
            at = builder.add(first, INDEX(b * LANES))
            row = builder.load(_address(builder, context, signature.args[3], source, at, vector), align=4)
            tile.append(_mirrored(builder, row) if isinstance(vector.element, ir.IntType) else row)
        for c, column in enumerate(_transpose(builder, tile)):
            at = builder.add(place, builder.mul(stride, INDEX(c)))
            builder.store(column, _address(builder, context, signature.args[0], target, at, vector), align=4)
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
            value = builder.load(builder.gep(before, [i.index]), align=LINE)
            store = builder.store(value, builder.gep(after, [i.index]), align=LINE)
            store.set_metadata("nontemporal", builder.module.add_metadata([INT32(1)]))
        return context.get_dummy_value()

    return types.void(target, types.int64, source, types.int64), generate


def _each(signature: str, kinds: Sequence[str]) -> list[str]:
    """Return a signature for each kind of number, K in it."""
    return [signature.replace("K", kind) for kind in kinds]


KEYS, FLOATS = ("i4", "i8"), ("f4", "f8")


_LAYOUT = "i8, i8, i8, i8, i8, i8"


@compiled(*_each(f"void(K[::1], {_LAYOUT}, K[::1])", KEYS + FLOATS))
def pack(
    flat: Any, at: Any, count: Any, cells: Any, channels: Any, image: Any, stride: Any, rows: Any
) -> None:
    """Write at most `LANES` channels of `count` images to `rows`, `LANES` numbers per cell.

    The first number lies at ``flat[at]``, images `image` apart. The channels lie `stride` apart and the cells
    next to each other; where `stride` is negative, the cells lie that far apart and the channels together.
    Up to `TILE` rows after the last cell are overwritten.
    """
    edge = np.empty(TILE * TILE, flat.dtype)
    for n in range(count):
        for p in range(0, cells, TILE):
            for c in range(0, channels, TILE):
                row = n * cells + p
                full = p + TILE <= cells and c + TILE <= channels
                if stride > 0:
                    begin = at + n * image + c * stride + p
                    if full:
                        read_columns(rows, row, c, flat, begin, stride)
                    else:
                        for i in range(min(TILE, channels - c)):
                            for j in range(min(TILE, cells - p)):
                                edge[i * TILE + j] = flat[begin + i * stride + j]
                        read_columns(rows, row, c, edge, 0, TILE)
                else:
                    begin = at + n * image - p * stride + c
                    if full:
                        read_rows(rows, row, c, flat, begin, -stride)
                    else:
                        for j in range(min(TILE, cells - p)):
                            for i in range(min(TILE, channels - c)):
                                edge[j * TILE + i] = flat[begin - j * stride + i]
                        read_rows(rows, row, c, edge, 0, TILE)


@compiled(*_each(f"void(K[::1], {_LAYOUT}, K[:,::1])", FLOATS))
def unpack(
    flat: Any, at: Any, count: Any, cells: Any, channels: Any, image: Any, stride: Any, rows: Any
) -> None:
    """Write `rows` to where `pack` reads them from."""
    for n in range(count):
        for p in range(0, cells, TILE):
            for c in range(0, channels, TILE):
                row = n * cells + p
                if stride > 0 and p + TILE <= cells and c + TILE <= channels:
                    write_tile(flat, at + n * image + c * stride + p, stride, rows, row * LANES + c)
                    continue
                for j in range(min(TILE, cells - p)):
                    for i in range(min(TILE, channels - c)):
                        if stride > 0:
                            flat[at + n * image + (c + i) * stride + p + j] = rows[row + j, c + i]
                        else:
                            flat[at + n * image - (p + j) * stride + c + i] = rows[row + j, c + i]


_WINDOWS = "i8[:,::1], i8[:,::1], i8[:,::1], i8[:,::1]"


@compiled(
    *_each(
        f"void(K[::1], {_LAYOUT}, b1, K[::1], {_WINDOWS}, K[:,::1], K[::1], K[:,::1], i8, b1)", KEYS + FLOATS
    )
)
def pool_part(
    flat: Any,
    at: Any,
    count: Any,
    cells: Any,
    channels: Any,
    image: Any,
    stride: Any,
    raw: Any,
    rows: Any,
    places: Any,
    low: Any,
    high: Any,
    plan: Any,
    bins: Any,
    page: Any,
    out: Any,
    channel: Any,
    aligned: Any,
) -> None:
    """Pool windows from some channels of `count` images, the first of which is `channel`.

    The images lie as `pack` says; where `raw` is set they are read there, else packed to `rows`. A window is
    a line of `places`: cell where it begins, row step of its map, height, width, row of the output. A level
    is a line of `plan`. The bounds of the bins of a side are ``low[side]`` and ``high[side]``, level after
    level.
    """
    for block in range(0, channels, LANES):
        some = min(LANES, channels - block)
        source, begin, pitch = rows, 0, LANES
        if raw:
            source, begin, pitch = flat, at + block, -stride
        else:
            pack(flat, at + block * max(stride, 1), count, cells, some, image, stride, rows)
        for r in range(len(places)):
            first, step, height, width, to = places[r]
            for level in range(len(plan)):
                n, edge, base, finer, finer_base, offset = plan[level]
                for i in range(n):
                    y = low[height, edge + i]
                    tall = high[height, edge + i] - y
                    for j in range(n):
                        bin_ = base + i * n + j
                        if finer:
                            k = finer // n
                            cell = finer_base + (i * finer + j) * k
                            reduce_cells(bins, bin_, bins, 0, LANES, cell, k, k, finer)
                            continue
                        x = low[width, edge + j]
                        wide = high[width, edge + j] - x
                        cell = first + y * step + x
                        if raw:
                            reduce_maps(bins, bin_, source, begin, pitch, cell, tall, wide, step)
                        else:
                            reduce_cells(bins, bin_, source, begin, pitch, cell, tall, wide, step)
                area = n * n
                # A tile reaches beyond the bins of its channels, into what the tiles after it overwrite.
                for c in range(0, some, TILE):
                    for b in range((area - 1) // TILE * TILE, -1, -TILE):
                        write_tile(page, c * area + b, area, bins, (base + b) * LANES + c)
                start = offset + (channel + block) * area
                if aligned:
                    stream(out[to], start, page, some * area // TILE)
                else:
                    for i in range(some * area):
                        out[to, start + i] = page[i]


@compiled(
    f"void(i4[::1], {_LAYOUT}, b1, i4[::1], {_WINDOWS}, i4[:,::1], i4[:,::1], f4[:,::1], f4[::1], i8)",
    f"void(i8[::1], {_LAYOUT}, b1, i8[::1], {_WINDOWS}, i8[:,::1], i8[:,::1], f8[:,::1], f8[::1], i8)",
)
def scatter_part(
    flat: Any,
    at: Any,
    count: Any,
    cells: Any,
    channels: Any,
    image: Any,
    stride: Any,
    raw: Any,
    rows: Any,
    places: Any,
    low: Any,
    high: Any,
    plan: Any,
    bins: Any,
    spots: Any,
    grad: Any,
    total: Any,
    channel: Any,
) -> None:
    """Write to `total` the gradients of the images, each bin's where its maximum is; else as in `pool_part`.

    `total` lies as `flat` does.
    """
    apart, along = stride, 1
    if stride < 0:
        apart, along = 1, -stride
    for n in range(count):
        begin = at + n * image
        if stride > 0:
            total[begin : begin + channels * cells] = 0
        else:
            for p in range(cells):
                total[begin + p * along : begin + p * along + channels] = 0
    for block in range(0, channels, LANES):
        some = min(LANES, channels - block)
        source, begin, pitch = rows, 0, LANES
        if raw:
            source, begin, pitch = flat, at + block, -stride
        else:
            pack(flat, at + block * max(stride, 1), count, cells, some, image, stride, rows)
        for r in range(len(places)):
            first, step, height, width, to = places[r]
            origin = at + block * apart + first // cells * (image - cells * along)
            for level in range(len(plan)):
                n, edge, base, finer, finer_base, offset = plan[level]
                for i in range(n):
                    y = low[height, edge + i]
                    tall = high[height, edge + i] - y
                    for j in range(n):
                        bin_ = base + i * n + j
                        if finer:
                            k = finer // n
                            cell = finer_base + (i * finer + j) * k
                            locate_cells(bins, spots, bin_, bins, spots, 0, LANES, cell, k, k, finer)
                            continue
                        x = low[width, edge + j]
                        wide = high[width, edge + j] - x
                        cell = first + y * step + x
                        if raw:
                            locate_maps(bins, spots, bin_, source, None, begin, pitch, cell, tall, wide, step)
                        else:
                            locate_cells(
                                bins, spots, bin_, source, None, begin, pitch, cell, tall, wide, step
                            )
                area = n * n
                start = offset + (channel + block) * area
                for b in range(area):
                    for c in range(some):
                        # Signed numbers would be checked for being negative.
                        place = np.uint64(origin + spots[base + b, c] * along + c * apart)
                        total[place] += grad[np.uint64(to), np.uint64(start + c * area + b)]


@compiled(*_each(f"void(K[::1], {_LAYOUT}, {_WINDOWS}, K[:,::1], K[::1], i8)", FLOATS))
def spread_part(
    total: Any,
    at: Any,
    count: Any,
    cells: Any,
    channels: Any,
    image: Any,
    stride: Any,
    places: Any,
    low: Any,
    high: Any,
    plan: Any,
    grad: Any,
    rows: Any,
    channel: Any,
) -> None:
    """Write to `total` the gradients of the images, each bin's shared out evenly among its cells."""
    sums = rows[: count * cells * LANES].reshape(count * cells, LANES)
    for block in range(0, channels, LANES):
        some = min(LANES, channels - block)
        sums[:] = 0
        for r in range(len(places)):
            first, step, height, width, to = places[r]
            for level in range(len(plan)):
                n, edge, _, _, _, offset = plan[level]
                area = n * n
                start = offset + (channel + block) * area
                share = np.zeros(LANES, sums.dtype)
                for i in range(n):
                    for j in range(n):
                        y, x = low[height, edge + i], low[width, edge + j]
                        tall, wide = high[height, edge + i] - y, high[width, edge + j] - x
                        for c in range(some):
                            share[c] = grad[to, start + c * area + i * n + j] / (tall * wide)
                        for p in range(tall):
                            for q in range(wide):
                                cell = first + (y + p) * step + x + q
                                for c in range(LANES):
                                    sums[cell, c] += share[c]
        unpack(total, at + block * max(stride, 1), count, cells, some, image, stride, sums)


@lru_cache(maxsize=64)
def _plan(channels: int, levels: tuple[int, ...], derive: bool) -> IntArray:
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


class _Batch:
    """A batch of maps as flat memory, read or written in blocks of channels."""

    def __init__(self, maps: Tensor) -> None:
        self.shape = maps.shape
        _, channels, height, width = maps.shape
        self.cells = height * width
        self.image = channels * self.cells
        if maps.is_contiguous():
            flat, self.stride = maps.view(-1), self.cells
        else:
            # `pack` tells a distance of cells from one of channels by its sign.
            flat, self.stride = maps.permute(0, 2, 3, 1).contiguous().view(-1), -channels
        self.flat = flat.numpy()

    def layout(self, first: int, count: int, channel: int, channels: int) -> tuple[Any, ...]:
        """Return the arguments of `pack` and `unpack` for some channels of some images, all but the rows."""
        at = first * self.image + channel * (self.stride if self.stride > 0 else 1)
        return self.flat, at, count, self.cells, channels, self.image, self.stride


@lru_cache(maxsize=64)
def _images(shapes: tuple[torch.Size, ...]) -> tuple[IntArray, IntArray, IntArray]:
    """Return where each batch's images begin, each image's packed cells and row step."""
    counts = [shape[0] for shape in shapes]
    heights, widths = (np.repeat([shape[axis] for shape in shapes], counts) for axis in (2, 3))
    numbers = np.concatenate([[0], np.cumsum(counts)])
    starts = np.concatenate([[0], np.cumsum(heights * widths)])
    return numbers, starts, widths


class _Work:
    """What the passes share: where the windows lie in the packed cells of the images, and the tasks.

    A task is some channels, and windows that follow each other when sorted by image, all of one batch.

    Parameters
    ----------
    shapes : sequence of torch.Size
        Those of the maps.
    direct : bool
        Whether the kernels could read the maps as they lie.
    windows, index : int64 arrays
    levels : tuple of int
    whole : bool
        Whether all windows of an image belong to one task of each block of channels.
    threads : int
    """

    def __init__(
        self,
        shapes: tuple[torch.Size, ...],
        direct: bool,
        windows: IntArray,
        index: IntArray,
        levels: tuple[int, ...],
        whole: bool,
        threads: int,
    ) -> None:
        self.numbers, self.starts, widths = _images(shapes)
        self.bounds = bounds_up_to(max(max(shape[2:]) for shape in shapes), levels)
        self.channels, self.whole = shapes[0][1], whole
        x1, y1, x2, y2 = windows.T
        step = widths[index]
        places = np.empty((len(index), 5), np.int64)
        for k, column in enumerate((self.starts[index] + y1 * step + x1, step, y2 - y1, x2 - x1)):
            places[:, k] = column
        places[:, 4] = np.arange(len(index))
        if (index[1:] < index[:-1]).any():
            order = np.argsort(index, kind="stable")
            places, index = places[order], index[order]
        self.places, self.index = places, index
        # A tile of the transposition reaches beyond the bins and the page.
        bins, cells = sum(n * n for n in levels), int(self.starts[-1])
        self.bins, self.page = (bins + TILE, LANES), max(levels) ** 2 * LANES + TILE
        small = max(cells, len(index) * bins) * self.channels < SMALL
        self.threads = 1 if small else threads
        self.width = self.channels if small else LANES
        # One image has only its channels to divide among the threads.
        if whole and self.numbers[-1] < self.threads and self.channels < LANES * self.threads:
            self.width = min(LANES, -(-self.channels // self.threads // TILE) * TILE)
        # Packing pays for cells that are read again and again.
        direct = direct and self.channels % LANES == self.width % LANES == 0
        self.raw = direct and int((places[:, 2] * places[:, 3]).sum()) <= cells
        self.complete = bool(np.all(np.bincount(index, minlength=self.numbers[-1])))
        self.tasks, packed = self._tasks()
        self.rows = (packed + TILE) * LANES

    def _parts(self, blocks: int) -> list[slice]:
        """Divide the windows so that the threads stay busy to the end and tasks pack few cells."""
        count = len(self.index)
        share = 1 if self.threads == 1 else math.ceil(4 * self.threads / blocks)
        parts = max(share, math.ceil(int(self.starts[-1]) / CELLS))
        # Every part packs its images again.
        parts = min(parts, max(math.ceil(count / 64), int(self.index[-1] - self.index[0]) + 1))
        cuts = np.linspace(0, count, parts + 1).astype(int)
        if self.whole:
            cuts[:-1] = np.searchsorted(self.index, self.index[cuts[:-1]])
        cuts = np.unique(np.concatenate([cuts, np.searchsorted(self.index, self.numbers)]))
        return [slice(a, b) for a, b in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)]

    def _tasks(self) -> tuple[list[Task], int]:
        """Return the tasks and the most cells that one of them packs."""
        tasks, cells = [], 0
        blocks = range(0, self.channels, self.width)
        for part in self._parts(len(blocks)):
            first, last = int(self.index[part.start]), int(self.index[part.stop - 1])
            batch = int(np.searchsorted(self.numbers, first, side="right")) - 1
            start, places = int(self.starts[first]), self.places[part]
            if start:
                places = places - np.array([start, 0, 0, 0, 0])
            cells = max(cells, int(self.starts[last + 1]) - start)
            images = first - int(self.numbers[batch]), last - first + 1
            tasks += [(batch, *images, c, min(self.width, self.channels - c), places) for c in blocks]
        return tasks, cells

    def run(self, worker: Callable[[], Callable[..., None]]) -> None:
        """Call ``worker()`` in each thread, and what it returns with the numbers of every task.

        They are the batch, its first image and how many, the first channel and how many, and the windows,
        which lie in the packed cells of these images.
        """
        tasks = iter(self.tasks)

        def work() -> None:
            call = worker()
            for task in tasks:
                call(*task)

        count = min(self.threads, len(self.tasks)) - 1
        helpers = [_executor(os.getpid(), self.threads).submit(work) for _ in range(count)]
        work()
        for helper in helpers:
            # One that has not begun by now finds nothing to do.
            if not helper.cancel():
                helper.result()


@lru_cache(maxsize=1)
def _executor(_: int, threads: int) -> ThreadPoolExecutor:
    """Return the threads of a process that help the caller; a forked process has none of its parent's."""
    return ThreadPoolExecutor(threads - 1)


@lru_cache(maxsize=64)
def _whole_images(
    shapes: tuple[torch.Size, ...], direct: bool, levels: tuple[int, ...], whole: bool, threads: int
) -> _Work:
    """Return the work of pooling each image as a whole."""
    windows = [[0, 0, shape[3], shape[2]] for shape in shapes for _ in range(shape[0])]
    index = np.arange(len(windows))
    return _Work(shapes, direct, np.array(windows), index, levels, whole, threads)


def _work(
    batches: Sequence[_Batch],
    windows: Tensor | None,
    index: Tensor | None,
    levels: tuple[int, ...],
    whole: bool,
) -> _Work:
    shapes = tuple(batch.shape for batch in batches)
    direct = all(batch.stride < 0 for batch in batches)
    threads = torch.get_num_threads()
    if windows is None or index is None:
        return _whole_images(shapes, direct, levels, whole, threads)
    return _Work(shapes, direct, windows.numpy(), index.numpy(), levels, whole, threads)


def _memory(dtype: torch.dtype, *shapes: int | tuple[int, ...]) -> list[Any]:
    """Return uninitialised arrays; PyTorch's start at a cache line."""
    return [torch.empty(shape, dtype=dtype, device="cpu").numpy() for shape in shapes]


def _working(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _bits(dtype: torch.dtype) -> torch.dtype:
    """Return the integers of a float's size."""
    return torch.int64 if dtype == torch.float64 else torch.int32


def pool(
    maps: Sequence[Tensor],
    windows: Tensor | None,
    index: Tensor | None,
    levels: Sequence[int],
    mode: str,
    out: Tensor,
) -> None:
    """Pool valid windows into `out`; the arguments are those of `sppnet.pooling.operator.pool`.

    Parameters
    ----------
    maps : sequence of (N_i, C, H_i, W_i) float tensors
    windows : (R, 4) int64, optional
    index : (R,) int64, optional
        Given if `windows` are.
    levels : sequence of int
    mode : {"max", "average"}
    out : (R, C * M) float tensor, contiguous
    """
    working, sides = _working(maps[0].dtype), tuple(levels)
    maps = [m.detach().to(working) for m in maps]
    if out.dtype != working:
        # Vectors of whole images take little memory next to the maps.
        rows = len(out) if windows is None else max(1, CONVERTED // (out.shape[1] * working.itemsize))
        buffer = torch.empty((min(rows, len(out)), out.shape[1]), dtype=working)
        for start in range(0, len(out), rows):
            part = slice(start, start + rows)
            target = buffer[: len(out[part])]
            places, which = (None if given is None else given[part] for given in (windows, index))
            pool(maps, places, which, levels, mode, target)
            out[part] = target
        return
    kind = _bits(working) if mode == "max" else working
    batches = [_Batch(m.view(kind)) for m in maps]
    work = _work(batches, windows, index, sides, whole=False)
    numbers = out.detach().view(kind).numpy()
    plan = _plan(work.channels, sides, mode == "max")
    large = numbers.nbytes > LARGE
    aligned = large and work.channels % TILE == 0 and out.data_ptr() % LINE == 0

    def worker() -> Callable[..., None]:
        rows, bins, page = _memory(kind, work.rows, work.bins, work.page)

        def task(batch: int, first: int, count: int, channel: int, channels: int, places: IntArray) -> None:
            layout = batches[batch].layout(first, count, channel, channels)
            scratch = *work.bounds, plan, bins, page
            pool_part(*layout, work.raw, rows, places, *scratch, numbers, channel, aligned)

        return task

    work.run(worker)


def pool_backward(
    grad: Tensor,
    maps: Sequence[Tensor],
    windows: Tensor | None,
    index: Tensor | None,
    levels: Sequence[int],
    mode: str,
) -> list[Tensor]:
    """Return the gradients of the maps for the gradient (R, C * M) of the result of `pool`.

    Sums are taken in float32 (float64 for float64 maps), window by window in order, whatever the number of
    threads.
    """
    working, sides = _working(maps[0].dtype), tuple(levels)
    wide = [m.detach().to(working) for m in maps]
    dense = [m if m.is_contiguous() else m.contiguous(memory_format=torch.channels_last) for m in wide]
    kind = _bits(working) if mode == "max" else working
    batches = [_Batch(m.view(kind)) for m in dense]
    work = _work(batches, windows, index, sides, whole=True)
    upstream = grad.detach().to(working).contiguous().numpy()
    plan = _plan(work.channels, sides, mode == "max")
    # Tasks write the gradients of all images that have windows.
    totals = [torch.empty_like(m) if work.complete else torch.zeros_like(m) for m in dense]
    targets = [_Batch(total) for total in totals]

    def worker() -> Callable[..., None]:
        rows, bins, spots = _memory(kind, work.rows, work.bins, work.bins)

        def task(batch: int, first: int, count: int, channel: int, channels: int, places: IntArray) -> None:
            target = targets[batch].layout(first, count, channel, channels)
            if mode == "average":
                spread_part(*target, places, *work.bounds, plan, upstream, rows, channel)
                return
            layout = batches[batch].layout(first, count, channel, channels)
            scratch = *work.bounds, plan, bins, spots
            scatter_part(*layout, work.raw, rows, places, *scratch, upstream, target[0], channel)

        return task

    work.run(worker)
    return [total.to(m.dtype) for total, m in zip(totals, maps, strict=True)]
