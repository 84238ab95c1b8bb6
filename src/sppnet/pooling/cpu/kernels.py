"""The compiled loops of the pooling operator on the CPU.

Channels are pooled `LANES` at a time. A block of that many is first *packed*: the cells of the maps one after
the other, each a row of `LANES` numbers, which fills a few vector registers. Every window is then pooled from
those rows, one row per bin, and its bins are transposed into a page that goes to the output as it is. Maps in
channels-last order have such rows already; where no cell is read much more than once, they are not packed.

A level whose side divides that of a finer one is pooled from the finer bins. Its bins are exactly unions of
k x k finer ones, because ``floor(i * k * size / (k * n))`` is ``floor(i * size / n)``, and so for the ends.

The backward pass finds the maxima again instead of keeping their places, which would take as much memory as
the output.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sppnet.compiling import compiled
from sppnet.pooling import cpu
from sppnet.pooling.cpu import LANES, LINE, TILE, intrinsics
from sppnet.pooling.cpu.intrinsics import (
    locate_cells,
    locate_maps,
    read_columns,
    read_rows,
    reduce_cells,
    reduce_maps,
    stream,
    write_tile,
)

# Numba looks for changes in this file alone before it takes a kernel from its cache.
INLINED = (intrinsics.__file__, cpu.__file__)


@compiled(inlined=INLINED)
def pack(maps: Any, block: Any, rows: Any) -> None:
    """Write at most `LANES` channels of the images, from channel `block` on, to `rows`, a row for each cell.

    Up to `TILE` rows after the last cell are overwritten.
    """
    flat, cells, stride = maps.flat, maps.cells, maps.stride
    at, channels = maps.at + block * max(stride, 1), min(LANES, maps.channels - block)
    edge = np.empty(TILE * TILE, flat.dtype)
    for n in range(maps.images):
        for p in range(0, cells, TILE):
            for c in range(0, channels, TILE):
                row = n * cells + p
                full = p + TILE <= cells and c + TILE <= channels
                if stride > 0:
                    begin = at + n * maps.image + c * stride + p
                    if full:
                        read_columns(rows, row, c, flat, begin, stride)
                    else:
                        for i in range(min(TILE, channels - c)):
                            for j in range(min(TILE, cells - p)):
                                edge[i * TILE + j] = flat[begin + i * stride + j]
                        read_columns(rows, row, c, edge, 0, TILE)
                else:
                    begin = at + n * maps.image - p * stride + c
                    if full:
                        read_rows(rows, row, c, flat, begin, -stride)
                    else:
                        for j in range(min(TILE, cells - p)):
                            for i in range(min(TILE, channels - c)):
                                edge[j * TILE + i] = flat[begin - j * stride + i]
                        read_rows(rows, row, c, edge, 0, TILE)


@compiled(inlined=INLINED)
def unpack(maps: Any, block: Any, rows: Any) -> None:
    """Write `rows` to where `pack` reads them from."""
    flat, cells, stride = maps.flat, maps.cells, maps.stride
    at, channels = maps.at + block * max(stride, 1), min(LANES, maps.channels - block)
    for n in range(maps.images):
        for p in range(0, cells, TILE):
            for c in range(0, channels, TILE):
                row = n * cells + p
                if stride > 0 and p + TILE <= cells and c + TILE <= channels:
                    write_tile(flat, at + n * maps.image + c * stride + p, stride, rows, row * LANES + c)
                    continue
                for j in range(min(TILE, cells - p)):
                    for i in range(min(TILE, channels - c)):
                        if stride > 0:
                            flat[at + n * maps.image + (c + i) * stride + p + j] = rows[row + j, c + i]
                        else:
                            flat[at + n * maps.image - (p + j) * stride + c + i] = rows[row + j, c + i]


@compiled(inlined=INLINED)
def _source(maps: Any, block: Any, raw: Any, rows: Any) -> Any:
    """Return where the cells are read from channel `block` on: where they lie, or packed to `rows`."""
    if raw:
        return maps.flat, maps.at + block, -maps.stride
    pack(maps, block, rows)
    return rows, 0, LANES


@compiled(inlined=INLINED)
def pool_part(maps: Any, raw: Any, windows: Any, scratch: Any, out: Any, skew: Any) -> None:
    """Pool windows from a block of maps, which are read where they lie if `raw` is set, else packed.

    `skew` says how many numbers after a cache line `out` starts, to write it past the caches; where it is
    negative, `out` is small and written as usual.
    """
    places, low, high, plan = windows
    rows, bins, page = scratch
    finer_bins = (bins, 0, LANES)
    for block in range(0, maps.channels, LANES):
        some = min(LANES, maps.channels - block)
        source = _source(maps, block, raw, rows)
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
                            area = (finer_base + (i * finer + j) * k, k, k, finer)
                            reduce_cells(bins, bin_, finer_bins, area)
                            continue
                        x = low[width, edge + j]
                        area = (first + y * step + x, tall, high[width, edge + j] - x, step)
                        if raw:
                            reduce_maps(bins, bin_, source, area)
                        else:
                            reduce_cells(bins, bin_, source, area)
                size = n * n
                # A tile reaches beyond the bins of its channels, into what the tiles after it overwrite.
                for c in range(0, some, TILE):
                    for b in range((size - 1) // TILE * TILE, -1, -TILE):
                        write_tile(page, c * size + b, size, bins, (base + b) * LANES + c)
                start = offset + (maps.first + block) * size
                begin = end = 0
                if skew >= 0:
                    begin = -(skew + to * out.shape[1] + start) % (LINE // out.itemsize)
                    begin = min(begin, some * size)
                    tiles = (some * size - begin) // TILE
                    end = begin + tiles * TILE
                    stream(out[to], start + begin, page, begin, tiles)
                for i in range(begin):
                    out[to, start + i] = page[i]
                for i in range(end, some * size):
                    out[to, start + i] = page[i]


@compiled()
def _clear(maps: Any, total: Any) -> None:
    """Set the numbers of a block to 0 in an array that lies as its own does."""
    for n in range(maps.images):
        begin = maps.at + n * maps.image
        if maps.stride > 0:
            total[begin : begin + maps.channels * maps.cells] = 0
        else:
            for p in range(maps.cells):
                place = begin - p * maps.stride
                total[place : place + maps.channels] = 0


@compiled(inlined=INLINED)
def scatter_part(maps: Any, raw: Any, windows: Any, scratch: Any, grad: Any, total: Any) -> None:
    """Write to `total` the gradients of the images, each bin's where its maximum is; else as in `pool_part`.

    `total` lies as the block's numbers do.
    """
    places, low, high, plan = windows
    rows, bins, spots = scratch
    finer_bins, finer_spots = (bins, 0, LANES), (spots, 0, LANES)
    apart, along = maps.stride, 1
    if maps.stride < 0:
        apart, along = 1, -maps.stride
    _clear(maps, total)
    for block in range(0, maps.channels, LANES):
        some = min(LANES, maps.channels - block)
        source = _source(maps, block, raw, rows)
        for r in range(len(places)):
            first, step, height, width, to = places[r]
            origin = maps.at + block * apart + first // maps.cells * (maps.image - maps.cells * along)
            for level in range(len(plan)):
                n, edge, base, finer, finer_base, offset = plan[level]
                for i in range(n):
                    y = low[height, edge + i]
                    tall = high[height, edge + i] - y
                    for j in range(n):
                        bin_ = base + i * n + j
                        if finer:
                            k = finer // n
                            area = (finer_base + (i * finer + j) * k, k, k, finer)
                            locate_cells(bins, spots, bin_, finer_bins, finer_spots, area)
                            continue
                        x = low[width, edge + j]
                        area = (first + y * step + x, tall, high[width, edge + j] - x, step)
                        if raw:
                            locate_maps(bins, spots, bin_, source, None, area)
                        else:
                            locate_cells(bins, spots, bin_, source, None, area)
                size = n * n
                start = offset + (maps.first + block) * size
                for b in range(size):
                    for c in range(some):
                        # Signed numbers would be checked for being negative.
                        place = np.uint64(origin + spots[base + b, c] * along + c * apart)
                        total[place] += grad[np.uint64(to), np.uint64(start + c * size + b)]


@compiled(inlined=INLINED)
def spread_part(maps: Any, windows: Any, grad: Any, rows: Any) -> None:
    """Write the gradients of the images to a block, each bin's shared out evenly among its cells."""
    places, low, high, plan = windows
    count = maps.images * maps.cells
    sums = rows[: count * LANES].reshape(count, LANES)
    for block in range(0, maps.channels, LANES):
        some = min(LANES, maps.channels - block)
        sums[:] = 0
        for r in range(len(places)):
            first, step, height, width, to = places[r]
            for level in range(len(plan)):
                n, edge, _, _, _, offset = plan[level]
                size = n * n
                start = offset + (maps.first + block) * size
                share = np.zeros(LANES, sums.dtype)
                for i in range(n):
                    for j in range(n):
                        y, x = low[height, edge + i], low[width, edge + j]
                        tall, wide = high[height, edge + i] - y, high[width, edge + j] - x
                        for c in range(some):
                            share[c] = grad[to, start + c * size + i * n + j] / (tall * wide)
                        for p in range(tall):
                            for q in range(wide):
                                cell = first + (y + p) * step + x + q
                                for c in range(LANES):
                                    sums[cell, c] += share[c]
        unpack(maps, block, sums)
