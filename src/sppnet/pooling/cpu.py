"""The pooling operator on the CPU, forward and backward.

Channels are pooled `LANES` at a time. A block of that many is first *packed*: the cells of the maps one after
the other, each a row of `LANES` numbers, which fills a few vector registers. Every window is then pooled from
those rows, one row per bin, and its bins are transposed into a page that goes to the output as it is.

For the maximum, floats are packed as integers of the same order with NaN on top: one vector instruction then
takes a maximum that carries NaN along, where floats need three.

A level whose side divides that of a finer one is pooled from the finer bins. Its bins are exactly unions of
k x k finer ones, because ``floor(i * k * size / (k * n))`` is ``floor(i * size / n)``, and so for the ends.

The backward pass finds the maxima again instead of keeping their places, which would take as much memory as
the output. Each thread owns some channels, so no two add to the same number.

The threads are Python's, around kernels that release the interpreter lock. Numba's own end the process if it
forked after they started (OpenMP) or if two threads call at once (workqueue).
"""

from __future__ import annotations

import math
import threading
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

from sppnet.boxes import IntArray
from sppnet.compiling import compiled, inlined
from sppnet.pooling.bins import bounds_up_to

LANES = 64
TILE = 16
LINE = 64
INT32, INDEX = ir.IntType(32), ir.IntType(64)

# Work below so many numbers read or written is done before threads would have started.
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


def _lowest(kind: Any) -> int:
    return -(1 << (int(kind.width) - 1))


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
        integers = isinstance(vector.element, ir.IntType)
        at = builder.mul(first, INDEX(LANES))
        cells = _address(builder, context, signature.args[2], source, at, vector)
        total = cgutils.alloca_once(builder, vector)  # type: ignore[no-untyped-call]
        start = _lowest(vector.element) if integers else 0.0
        builder.store(ir.Constant(vector, [start] * LANES), total)
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
                count = builder.sitofp(side, vector.element)
                result = builder.fdiv(result, _spread(builder, count))
        at = builder.mul(bin_, INDEX(LANES))
        builder.store(result, _address(builder, context, signature.args[0], target, at, vector), align=4)
        return context.get_dummy_value()

    return types.void(target, types.int64, source, *[types.int64] * 4), generate


@inlined
def locate_cells(
    _: Any,
    target: Any,
    target_spots: Any,
    bin_: Any,
    source: Any,
    source_spots: Any,
    first: Any,
    rows: Any,
    columns: Any,
    step: Any,
) -> Any:
    """Reduce integers as `reduce_cells` does, and keep the spot of each maximum, the smallest on ties.

    The spot of row p of `source` is ``source_spots[p]``, or p itself where that is None.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, target_spots, bin_, source, source_spots, first, rows, columns, step = arguments
        vector = ir.VectorType(context.get_data_type(signature.args[0].dtype), LANES)
        given = isinstance(signature.args[4], types.Array)
        at = builder.mul(first, INDEX(LANES))
        cells = _address(builder, context, signature.args[3], source, at, vector)
        known = _address(builder, context, signature.args[4], source_spots, at, vector) if given else None
        best, spot = (cgutils.alloca_once(builder, vector) for _ in range(2))  # type: ignore[no-untyped-call]
        builder.store(ir.Constant(vector, [_lowest(vector.element)] * LANES), best)
        builder.store(ir.Constant(vector, [0] * LANES), spot)
        with cgutils.for_range(builder, rows) as y:
            row = builder.mul(y.index, step)
            with cgutils.for_range(builder, columns) as x:
                offset = builder.add(row, x.index)
                value = builder.load(builder.gep(cells, [offset]), align=4)
                old, old_spot = builder.load(best), builder.load(spot)
                better = builder.icmp_signed(">", value, old)
                if known is not None:
                    new_spot = builder.load(builder.gep(known, [offset]), align=4)
                    tie = builder.icmp_signed("==", value, old)
                    earlier = builder.icmp_signed("<", new_spot, old_spot)
                    better = builder.or_(better, builder.and_(tie, earlier))
                else:
                    # Cells come in row order, so the first of equal ones is there already.
                    number = builder.add(first, offset)
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

    integers = [types.int64] * 4
    return types.void(target, target_spots, types.int64, source, source_spots, *integers), generate


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
    kind = row.type.element
    sign = builder.ashr(row, _vector([kind.width - 1] * TILE, kind))
    return builder.xor(row, builder.and_(sign, _vector([-1 - _lowest(kind)] * TILE, kind)))


def _keys(builder: Any, row: Any) -> Any:
    """Turn the bits of floats into integers of the same order, every NaN into the largest."""
    kind = row.type.element
    magnitude = _vector([-1 - _lowest(kind)] * TILE, kind)
    infinity = _vector([{32: 0x7F800000, 64: 0x7FF0000000000000}[kind.width]] * TILE, kind)
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


@compiled(*_each(f"void(K[::1], {_LAYOUT}, K[:,::1])", KEYS + FLOATS))
def pack(
    flat: Any, at: Any, count: Any, cells: Any, channels: Any, image: Any, stride: Any, rows: Any
) -> None:
    """Write at most `LANES` channels of `count` images to `rows`, one row per cell.

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


@compiled(*_each(f"void(K[:,::1], {_WINDOWS}, K[:,::1], K[::1], K[:,::1], i8, i8, b1)", KEYS + FLOATS))
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

    A window is a line of `places`: row of its first cell, row step of its map, height, width, row of the
    output. A level is a line of `plan`. The bounds of the bins of a side are ``low[side]`` and
    ``high[side]``, level after level.
    """
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
                stream(out[to], start, page, channels * area // TILE)
            else:
                for i in range(channels * area):
                    out[to, start + i] = page[i]


@compiled(
    f"void(i4[:,::1], {_WINDOWS}, i4[:,::1], i4[:,::1], f4[:,::1], f4[:,::1], i8, i8)",
    f"void(i8[:,::1], {_WINDOWS}, i8[:,::1], i8[:,::1], f8[:,::1], f8[:,::1], i8, i8)",
)
def scatter_block(
    rows: Any,
    places: Any,
    low: Any,
    high: Any,
    plan: Any,
    bins: Any,
    spots: Any,
    grad: Any,
    sums: Any,
    channel: Any,
    channels: Any,
) -> None:
    """Add the gradient of each bin to the row of `sums` where its maximum is; all else as in `pool_block`."""
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
                        at = finer_base + (i * finer + j) * k
                        locate_cells(bins, spots, bin_, bins, spots, at, k, k, finer)
                    else:
                        x = low[width, edge + j]
                        wide = high[width, edge + j] - x
                        locate_cells(bins, spots, bin_, rows, None, first + y * step + x, tall, wide, step)
            area = n * n
            start = offset + channel * area
            for c in range(channels):
                for b in range(area):
                    sums[spots[base + b, c], c] += grad[to, start + c * area + b]


@compiled(*_each(f"void({_WINDOWS}, K[:,::1], K[:,::1], i8, i8)", FLOATS))
def spread_block(
    places: Any, low: Any, high: Any, plan: Any, grad: Any, sums: Any, channel: Any, channels: Any
) -> None:
    """Share the gradient of each bin out evenly among the rows of `sums` that it covers."""
    for r in range(len(places)):
        first, step, height, width, to = places[r]
        for level in range(len(plan)):
            n, edge, _, _, _, offset = plan[level]
            area = n * n
            start = offset + channel * area
            share = np.zeros(LANES, sums.dtype)
            for i in range(n):
                for j in range(n):
                    y, x = low[height, edge + i], low[width, edge + j]
                    tall, wide = high[height, edge + i] - y, high[width, edge + j] - x
                    for c in range(channels):
                        share[c] = grad[to, start + c * area + i * n + j] / (tall * wide)
                    for p in range(tall):
                        for q in range(wide):
                            cell = first + (y + p) * step + x + q
                            for c in range(LANES):
                                sums[cell, c] += share[c]


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
def _images(shapes: tuple[torch.Size, ...]) -> tuple[IntArray, IntArray, IntArray, int]:
    """Return where each batch's images begin, each image's packed cells and row step; the longest side."""
    counts = [shape[0] for shape in shapes]
    heights, widths = (np.repeat([shape[axis] for shape in shapes], counts) for axis in (2, 3))
    numbers = np.concatenate([[0], np.cumsum(counts)])
    starts = np.concatenate([[0], np.cumsum(heights * widths)])
    return numbers, starts, widths, max(max(shape[2:]) for shape in shapes)


class _Work:
    """What the passes share: the images, where the windows lie in their packed cells, and the tasks.

    A task is a block of channels, and windows that follow each other when sorted by image. It packs the
    images of its windows only.

    Parameters
    ----------
    maps : sequence of (N_i, C, H_i, W_i) tensors
        In the dtype in which they are packed.
    windows, index, levels
        Those of `pool`.
    whole : bool
        Whether all windows of an image belong to one task of each block.
    """

    def __init__(
        self, maps: Sequence[Tensor], windows: Tensor, index: Tensor, levels: tuple[int, ...], whole: bool
    ) -> None:
        self.batches = [_Batch(m) for m in maps]
        self.numbers, self.starts, widths, longest = _images(tuple(m.shape for m in maps))
        self.bounds = bounds_up_to(longest, levels)
        self.dtype, self.channels, self.whole = self.batches[0].flat.dtype, maps[0].shape[1], whole
        which, (x1, y1, x2, y2) = index.numpy(), windows.numpy().T
        step = widths[which]
        places = np.empty((len(which), 5), np.int64)
        for k, column in enumerate((self.starts[which] + y1 * step + x1, step, y2 - y1, x2 - x1)):
            places[:, k] = column
        places[:, 4] = np.arange(len(which))
        if (which[1:] < which[:-1]).any():
            order = np.argsort(which, kind="stable")
            places, which = places[order], which[order]
        self.places, self.which = places, which
        bins = sum(n * n for n in levels)
        self.threads = torch.get_num_threads()
        if max(int(self.starts[-1]), len(which) * bins) * self.channels < SMALL:
            self.threads = 1
        self._scratch = threading.local()
        self._bins, self._area = bins, max(levels) ** 2

    def memory(self, name: str, *shape: int, dtype: Any = None) -> Any:
        """Return memory that starts at a cache line, for the tasks of one thread to use in turn."""
        kept = self._scratch.__dict__
        if name not in kept or kept[name].shape != shape:
            kind = getattr(torch, np.dtype(dtype or self.dtype).name)
            kept[name] = torch.empty(shape, dtype=kind, device="cpu").numpy()
        return kept[name]

    def bins(self, name: str) -> Any:
        """Return memory for the bins of a window, with room for a tile that reaches beyond them."""
        return self.memory(name, self._bins + TILE, LANES)

    def page(self) -> Any:
        """Return memory for the numbers of a level that go to the output."""
        return self.memory("page", self._area * LANES + TILE)

    def _parts(self, blocks: int) -> list[slice]:
        """Divide the windows so that the threads stay busy to the end and tasks pack few cells."""
        count = len(self.which)
        share = 1 if self.threads == 1 else math.ceil(4 * self.threads / blocks)
        parts = max(share, math.ceil(int(self.starts[-1]) / CELLS))
        # Every part packs its images again.
        parts = min(parts, max(math.ceil(count / 64), int(self.which[-1] - self.which[0]) + 1))
        if parts == 1:
            return [slice(0, count)]
        cuts = np.linspace(0, count, parts + 1).astype(int)
        if self.whole:
            cuts[:-1] = np.searchsorted(self.which, self.which[cuts[:-1]])
        cuts = np.unique(cuts)
        return [slice(a, b) for a, b in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)]

    def run(self, task: Callable[[int, int, slice], None]) -> None:
        """Call ``task(channel, channels, part)`` for every task, in threads if that pays."""
        width = LANES
        if self.whole and self.channels < LANES * self.threads:
            width = min(LANES, -(-self.channels // self.threads // TILE) * TILE)
        blocks = range(0, self.channels, width)
        tasks = [(c, min(width, self.channels - c), p) for p in self._parts(len(blocks)) for c in blocks]
        if min(self.threads, len(tasks)) == 1:
            for one in tasks:
                task(*one)
        else:
            with ThreadPoolExecutor(min(self.threads, len(tasks))) as executor:
                list(executor.map(lambda one: task(*one), tasks))

    def overlaps(self, part: slice) -> tuple[int, list[tuple[_Batch, int, int, int]]]:
        """Return the number of packed cells of a part's images, and what to pack.

        For each batch that holds some of them: the batch, its first of these images, how many, and the first
        one's row among the packed cells.
        """
        first, last = int(self.which[part.start]), int(self.which[part.stop - 1]) + 1
        found = []
        for b, batch in enumerate(self.batches):
            low, high = max(first, int(self.numbers[b])), min(last, int(self.numbers[b + 1]))
            if low < high:
                row = int(self.starts[low] - self.starts[first])
                found.append((batch, low - int(self.numbers[b]), high - low, row))
        return int(self.starts[last] - self.starts[first]), found

    def pack(self, channel: int, channels: int, part: slice) -> tuple[Any, IntArray]:
        """Return the packed cells of the images of a part's windows, and the windows in them."""
        cells, found = self.overlaps(part)
        rows = self.memory("rows", cells + TILE, LANES)
        for batch, first, count, row in found:
            pack(*batch.layout(first, count, channel, channels), rows[row:])
        return rows, self.windows(part)

    def windows(self, part: slice) -> IntArray:
        """Return a part's windows in the packed cells of its images."""
        start = self.starts[self.which[part.start]]
        if start == 0:
            return self.places[part]
        places: IntArray = self.places[part] - np.array([start, 0, 0, 0, 0])
        return places


def _working(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _bits(dtype: torch.dtype) -> torch.dtype:
    """Return the integers of a float's size."""
    return torch.int64 if dtype == torch.float64 else torch.int32


def pool(
    maps: Sequence[Tensor], windows: Tensor, index: Tensor, levels: Sequence[int], mode: str, out: Tensor
) -> None:
    """Pool valid windows into `out`; the arguments are those of `sppnet.pooling.operator.pool`.

    Parameters
    ----------
    maps : sequence of (N_i, C, H_i, W_i) float tensors
    windows : (R, 4) int64
    index : (R,) int64
    levels : sequence of int
    mode : {"max", "average"}
    out : (R, C * M) float tensor, contiguous
    """
    working = _working(maps[0].dtype)
    maps = [m.detach().to(working) for m in maps]
    if out.dtype != working:
        rows = max(1, CONVERTED // (out.shape[1] * working.itemsize))
        buffer = torch.empty((min(rows, len(out)), out.shape[1]), dtype=working)
        for start in range(0, len(out), rows):
            part = slice(start, start + rows)
            target = buffer[: len(out[part])]
            pool(maps, windows[part], index[part], levels, mode, target)
            out[part] = target
        return
    kind = _bits(working) if mode == "max" else working
    sides = tuple(levels)
    work = _Work([m.view(kind) for m in maps], windows, index, sides, whole=False)
    numbers = out.detach().view(kind).numpy()
    plan = _plan(work.channels, sides, mode == "max")
    large = numbers.nbytes > LARGE
    aligned = large and work.channels % TILE == 0 and out.data_ptr() % LINE == 0

    def task(channel: int, channels: int, part: slice) -> None:
        rows, places = work.pack(channel, channels, part)
        scratch = work.bins("bins"), work.page()
        pool_block(rows, places, *work.bounds, plan, *scratch, numbers, channel, channels, aligned)

    work.run(task)


def pool_backward(
    grad: Tensor, maps: Sequence[Tensor], windows: Tensor, index: Tensor, levels: Sequence[int], mode: str
) -> list[Tensor]:
    """Return the gradients of the maps for the gradient (R, C * M) of the result of `pool`.

    Sums are taken in float32 (float64 for float64 maps), window by window in order, whatever the number of
    threads.
    """
    working, sides = _working(maps[0].dtype), tuple(levels)
    wide = [m.detach().to(working) for m in maps]
    dense = [m if m.is_contiguous() else m.contiguous(memory_format=torch.channels_last) for m in wide]
    work = _Work([m.view(_bits(working)) for m in dense], windows, index, sides, whole=True)
    upstream = grad.detach().to(working).contiguous().numpy()
    plan = _plan(work.channels, sides, mode == "max")
    totals = [torch.zeros_like(m) for m in dense]
    targets = dict(zip(work.batches, map(_Batch, totals), strict=True))

    def task(channel: int, channels: int, part: slice) -> None:
        cells, found = work.overlaps(part)
        sums = work.memory("sums", cells, LANES, dtype=upstream.dtype)
        sums.fill(0)
        if mode == "max":
            rows, places = work.pack(channel, channels, part)
            scratch = work.bins("bins"), work.bins("spots")
            scatter_block(rows, places, *work.bounds, plan, *scratch, upstream, sums, channel, channels)
        else:
            spread_block(work.windows(part), *work.bounds, plan, upstream, sums, channel, channels)
        for batch, first, count, row in found:
            unpack(*targets[batch].layout(first, count, channel, channels), sums[row:])

    work.run(task)
    return [total.to(m.dtype) for total, m in zip(totals, maps, strict=True)]
