"""The pooling operator on GPUs, forward and backward, in Triton.

A program pools one window and a block of channels. It works on *slots*: a bin is one slot where a level has
many bins, and several where it has few, which share the bin's columns and are reduced at the end. So every
step of the loop over cells reads a cell for each of `SLOTS` slots: many loads in flight, for any level.

Maps are laid out with their channels last, so that a cell's channels are read together. The output holds a
channel's bins together: a program's part of a level is one run of memory, and written as such.

A level whose side divides that of a finer one is the maximum over the finer bins, as on the CPU. The program
reads them back from the output, where it has just written them, so their cells are not read again. That the
output may be of lower precision changes nothing: rounding keeps the order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton  # type: ignore[import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,unused-ignore]
from torch import Tensor
from triton.language import constexpr, tensor  # type: ignore[import-untyped,unused-ignore]

jit: Callable[[Callable[..., Any]], Any] = triton.jit

# 64 channels of a cell are whole cache lines: two for floats, one for halves, read 16 bytes per thread. With
# 64 slots, two warps hold 64 numbers per thread: enough loads in flight to hide the cache's latency, few
# enough registers for six programs on a multiprocessor. The backward pass holds two numbers per slot, and a
# double takes two registers, so each halves the channels.
CHANNELS, SLOTS, WARPS = 64, constexpr(64), 2
# A level is pooled from a finer one of up to so many times its side: the reads are unrolled.
RATIO = 8
# More than the number of any cell.
NO_CELL = constexpr(2**31 - 1)


@jit
def _maximum(a: tensor, b: tensor) -> tensor:
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def _peak(tile: tensor) -> tensor:
    """Return the maximum along the middle axis; unlike Triton's, it is NaN where there is a NaN."""
    has_nan = tl.max((tile != tile).to(tl.int32), 1) > 0
    return tl.where(has_nan, float("nan"), tl.max(tile, 1))


@jit
def _task(images: tensor, windows: tensor, index: tensor, channels: tensor, CHANNELS: constexpr) -> tl.tuple:
    """Return what this program pools: a window and a block of channels.

    The window's first cell among the cells of all maps, its map's width, its height and its width; the
    numbers of the channels, and how many there are.
    """
    # 64 bits, for outputs and maps of more numbers than 32 bits count.
    r = tl.program_id(0).to(tl.int64)
    image, corners = images + 2 * tl.load(index + r), windows + 4 * r
    x, y = tl.load(corners), tl.load(corners + 1)
    width, height = tl.load(corners + 2) - x, tl.load(corners + 3) - y
    step = tl.load(image + 1)
    first = tl.load(image) + y * step + x
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    return first, step.to(tl.int32), height.to(tl.int32), width.to(tl.int32), c, channels


@jit
def _slots(task: tl.tuple, start: tensor, n: constexpr, BINS: constexpr, COUNT: constexpr) -> tl.tuple:
    """Divide `BINS` bins of a level, from bin `start` on, among `COUNT` slots.

    Slot k of a bin has the columns k, k + COUNT // BINS, ... of it. Returns, for every slot: its first cell,
    counted from the window's; how many rows and columns there are from there to the end of the bin; how many
    cells the bin has. Bins past the last one have no rows.
    """
    _, step, height, width, _, _ = task
    slot = tl.arange(0, COUNT)
    # The slots of a bin are BINS apart, as are those of a thread: most are reduced in its registers.
    bins, skip = start + slot % BINS, slot // BINS
    i, j = bins // n, bins % n
    top, bottom = i * height // n, ((i + 1) * height + n - 1) // n
    left, right = j * width // n, ((j + 1) * width + n - 1) // n
    rows = tl.where(i < n, bottom - top, 0)
    return top * step + left + skip, rows, right - left - skip, (bottom - top) * (right - left)


@jit
def _pool_cells(cells: tensor, task: tl.tuple, start: tensor, LEVEL: constexpr, AVERAGE: constexpr) -> tensor:
    """Return a tile (channels, bins) of a level, pooled from cells."""
    n: constexpr = LEVEL[0]
    BINS: constexpr = LEVEL[1]
    SHARE: constexpr = SLOTS // BINS
    EMPTY: constexpr = 0.0 if AVERAGE else float("-inf")
    FLOAT: constexpr = tl.float64 if cells.dtype.element_ty == tl.float64 else tl.float32
    origin, step, _, _, c, channels = task
    first, rows, columns, _ = _slots(task, start, n, BINS, SLOTS)
    corner = cells + (origin + first)[None, :] * channels + c[:, None]
    total = tl.full((c.shape[0], SLOTS), EMPTY, FLOAT)
    for y in range(tl.max(rows)):
        for x in range(0, tl.max(columns), SHARE):
            inside = (c < channels)[:, None] & ((y < rows) & (x < columns))[None, :]
            place = corner + (y * step + x).to(tl.int64) * channels
            value = tl.load(place, mask=inside, other=EMPTY).to(FLOAT)
            total = total + value if AVERAGE else _maximum(total, value)
    if SHARE > 1:
        total = tl.reshape(total, (c.shape[0], SHARE, BINS))
        total = tl.sum(total, 1) if AVERAGE else _peak(total)
    if AVERAGE:
        total /= _slots(task, start, n, BINS, BINS)[3][None, :].to(FLOAT)
    return total


@jit
def _pool_bins(out: tensor, task: tl.tuple, start: tensor, LEVEL: constexpr) -> tensor:
    """Return a tile (channels, bins) of a level, pooled from the bins of a finer one in the output."""
    n: constexpr = LEVEL[0]
    finer: constexpr = LEVEL[3]
    K: constexpr = finer // n
    FLOAT: constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    _, _, _, _, c, channels = task
    bins = start + tl.arange(0, LEVEL[1])
    valid = (c < channels)[:, None] & (bins < n * n)[None, :]
    corner = (bins // n * finer + bins % n) * K
    place = out + LEVEL[4] * channels + (c * (finer * finer))[:, None] + corner[None, :]
    total = tl.load(place, mask=valid).to(FLOAT)
    for k in tl.static_range(1, K * K):
        total = _maximum(total, tl.load(place + k // K * finer + k % K, mask=valid).to(FLOAT))
    return total


@jit
def _pool_level(cells: tensor, out: tensor, task: tl.tuple, LEVEL: constexpr, AVERAGE: constexpr) -> None:
    n: constexpr = LEVEL[0]
    BINS: constexpr = LEVEL[1]
    _, _, _, _, c, channels = task
    for start in range(0, n * n, BINS):
        if LEVEL[3]:
            tile = _pool_bins(out, task, start, LEVEL)
        else:
            tile = _pool_cells(cells, task, start, LEVEL, AVERAGE)
        # Not all GPUs turn doubles into bfloat16 at once.
        if out.dtype.element_ty != tl.float64:
            tile = tile.to(tl.float32)
        bins = start + tl.arange(0, BINS)
        valid = (c < channels)[:, None] & (bins < n * n)[None, :]
        place = out + LEVEL[2] * channels + (c * (n * n))[:, None] + bins[None, :]
        tl.store(place, tile.to(out.dtype.element_ty), mask=valid)
    # Coarser levels read what other threads of the program have written.
    tl.debug_barrier()


@jit
def _pool(
    cells: tensor,
    images: tensor,
    windows: tensor,
    index: tensor,
    channels: tensor,
    out: tensor,
    FORM: constexpr,
) -> None:
    PLAN: constexpr = FORM[0]
    task = _task(images, windows, index, channels, FORM[2])
    vector = out + tl.program_id(0).to(tl.int64) * channels * FORM[1]
    for i in tl.static_range(len(PLAN)):
        _pool_level(cells, vector, task, PLAN[i], FORM[3])


@jit
def _first_maxima(cells: tensor, task: tl.tuple, start: tensor, LEVEL: constexpr, FLOAT: constexpr) -> tensor:
    """Return a tile (channels, bins): the cell with a bin's maximum, the first in row order of several."""
    BINS: constexpr = LEVEL[1]
    SHARE: constexpr = SLOTS // BINS
    origin, step, _, _, c, channels = task
    first, rows, columns, _ = _slots(task, start, LEVEL[0], BINS, SLOTS)
    best = tl.full((c.shape[0], SLOTS), float("-inf"), FLOAT)
    found = tl.where((rows > 0) & (columns > 0), first, NO_CELL)
    found = tl.broadcast_to(found[None, :], (c.shape[0], SLOTS))
    for y in range(tl.max(rows)):
        for x in range(0, tl.max(columns), SHARE):
            cell = first + y * step + x
            inside = (c < channels)[:, None] & ((y < rows) & (x < columns))[None, :]
            place = cells + (origin + cell)[None, :] * channels + c[:, None]
            value = tl.load(place, mask=inside, other=float("-inf")).to(FLOAT)
            better = (value > best) | ((value != value) & (best == best))
            best = tl.where(better, value, best)
            found = tl.where(better, cell[None, :], found)
    if SHARE == 1:
        return found
    best = tl.reshape(best, (c.shape[0], SHARE, BINS))
    found = tl.reshape(found, (c.shape[0], SHARE, BINS))
    peak = _peak(best)[:, None, :]
    return tl.min(tl.where((best == peak) | ((best != best) & (peak != peak)), found, NO_CELL), 1)


@jit
def _spread_level(
    cells: tensor, grad: tensor, sums: tensor, task: tl.tuple, LEVEL: constexpr, AVERAGE: constexpr
) -> None:
    n: constexpr = LEVEL[0]
    BINS: constexpr = LEVEL[1]
    FLOAT: constexpr = sums.dtype.element_ty
    origin, step, _, _, c, channels = task
    corner = sums + origin * channels + c[:, None]
    for start in range(0, n * n, BINS):
        bins = start + tl.arange(0, BINS)
        valid = (c < channels)[:, None] & (bins < n * n)[None, :]
        place = grad + LEVEL[2] * channels + (c * (n * n))[:, None] + bins[None, :]
        value = tl.load(place, mask=valid, other=0).to(FLOAT)
        if AVERAGE:
            # One slot per bin: additions, unlike loads, are not waited for.
            first, rows, columns, count = _slots(task, start, n, BINS, BINS)
            value /= count[None, :].to(FLOAT)
            for y in range(tl.max(rows)):
                for x in range(tl.max(columns)):
                    inside = (c < channels)[:, None] & ((y < rows) & (x < columns))[None, :]
                    cell = (first + y * step + x).to(tl.int64)[None, :]
                    tl.atomic_add(corner + cell * channels, value, mask=inside, sem="relaxed")
        else:
            cell = _first_maxima(cells, task, start, LEVEL, FLOAT).to(tl.int64)
            tl.atomic_add(corner + cell * channels, value, mask=valid, sem="relaxed")


@jit
def _spread(
    cells: tensor,
    images: tensor,
    windows: tensor,
    index: tensor,
    channels: tensor,
    grad: tensor,
    sums: tensor,
    FORM: constexpr,
) -> None:
    PLAN: constexpr = FORM[0]
    task = _task(images, windows, index, channels, FORM[2])
    vector = grad + tl.program_id(0).to(tl.int64) * channels * FORM[1]
    for i in tl.static_range(len(PLAN)):
        _spread_level(cells, vector, sums, task, PLAN[i], FORM[3])


def pool(
    maps: Sequence[Tensor], windows: Tensor, index: Tensor, levels: Sequence[int], mode: str, out: Tensor
) -> None:
    """Pool windows of maps into `out`.

    Parameters
    ----------
    maps : sequence of (N_i, C, H_i, W_i) float tensors
        Of one dtype, in any memory layout. Their images are numbered through.
    windows : (R, 4) int64 tensor
        ``x1, y1, x2, y2`` in cells, each a part of its image; at least one.
    index : (R,) int64 tensor
        The image of each window.
    levels : sequence of int
    mode : {"max", "average"}
        Averages are taken in double precision for double maps and in single precision for others.
    out : (R, C * M) float tensor, contiguous
        Of any dtype.
    """
    cells = _cells(maps)
    _launch(_pool, maps, windows, index, (cells, out), _form(cells, levels, mode))


def pool_backward(
    grad: Tensor, maps: Sequence[Tensor], windows: Tensor, index: Tensor, levels: Sequence[int], mode: str
) -> list[Tensor]:
    """Return the gradients of the maps, laid out as they are, for the gradient of the result of `pool`.

    The gradient of a maximum goes to the first cell in row order that holds it; NaN is larger than all else.

    The gradients are summed in double precision for double maps and in single precision for others, in no
    fixed order: the last bits may vary from run to run.
    """
    cells = _cells(maps)
    sums = torch.zeros_like(cells, dtype=torch.promote_types(cells.dtype, torch.float32))
    form = _form(cells, levels, mode, backward=True)
    _launch(_spread, maps, windows, index, (cells, grad.contiguous(), sums), form)
    return [torch.empty_like(m).copy_(part) for m, part in zip(maps, _parts(sums, maps), strict=True)]


def _launch(
    kernel: Any,
    maps: Sequence[Tensor],
    windows: Tensor,
    index: Tensor,
    numbers: Sequence[Tensor],
    form: tuple[Any, ...],
) -> None:
    """Launch a kernel on cells and other numbers, with one program per window and block of channels."""
    images, start = [], 0
    for m in maps:
        for _ in range(len(m)):
            images.append((start, m.shape[3]))
            start += m.shape[2] * m.shape[3]
    cells, *rest = numbers
    channels = cells.shape[1]
    # Triton launches on the current device.
    with torch.cuda.device_of(cells):  # type: ignore[no-untyped-call]
        kernel[len(windows), triton.cdiv(channels, form[2])](
            cells,
            torch.tensor(images, device=cells.device),
            windows.contiguous(),
            index.contiguous(),
            channels,
            *rest,
            FORM=form,
            num_warps=WARPS,
        )


def _form(cells: Tensor, levels: Sequence[int], mode: str, backward: bool = False) -> tuple[Any, ...]:
    """Return what a kernel is compiled for.

    The plan of the levels, the number of their bins, how many channels a program has, whether it averages.
    """
    average = mode == "average"
    plan = _plan(levels, derive=not average and not backward)
    block = (CHANNELS // 2 if backward else CHANNELS) * 4 // max(cells.itemsize, 4)
    block = min(block, triton.next_power_of_2(cells.shape[1]))
    return plan, sum(n * n for n in levels), block, average


def _plan(levels: Sequence[int], derive: bool) -> tuple[tuple[int, ...], ...]:
    """Return one line per level, finest first.

    Side of the level, how many bins are pooled at a time, number of bins before it in the output; side of the
    finer level that it is pooled from, 0 if it is pooled from the cells, and number of bins before that one.
    """
    bases: dict[int, int] = {}
    lines = []
    for i in sorted(range(len(levels)), key=lambda i: -levels[i]):
        n, base = levels[i], sum(side * side for side in levels[:i])
        finer = min((side for side in bases if derive and side % n == 0 and side <= RATIO * n), default=0)
        bins = min(SLOTS.value, triton.next_power_of_2(n * n))
        lines.append((n, bins, base, finer, bases.get(finer, 0)))
        bases[n] = base
    return tuple(lines)


def _cells(maps: Sequence[Tensor]) -> Tensor:
    """Return the cells of all maps one after the other, (cells, C) and contiguous; no copy if they are so."""
    channels = maps[0].shape[1]
    rows = maps[0].permute(0, 2, 3, 1)
    if len(maps) == 1 and rows.is_contiguous():
        return rows.view(-1, channels)
    cells = maps[0].new_empty((sum(m.numel() for m in maps) // channels, channels))
    for m, part in zip(maps, _parts(cells, maps), strict=True):
        part.copy_(m)
    return cells


def _parts(cells: Tensor, maps: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield, for each of the maps, a view of its cells that has its shape."""
    counts = [m.numel() // m.shape[1] for m in maps]
    for m, part in zip(maps, cells.split_with_sizes(counts), strict=True):
        yield part.view(len(m), *m.shape[2:], -1).permute(0, 3, 1, 2)
