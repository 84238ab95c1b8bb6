"""The pooling operator on the CPU, forward and backward: the work is divided among threads.

A task owns its channels of its images, so no two threads add to the same number.

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
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sppnet.arrays import FloatArray, IntArray, like
from sppnet.parallel import thread_count
from sppnet.pooling.bins import bounds_up_to
from sppnet.pooling.cpu import LANES, LINE, TILE, Block, Scratch, Windows
from sppnet.pooling.memory import at_line

# Work below so many numbers read or written is done before other threads would have woken.
SMALL = 2**20
# Outputs above so many bytes leave the caches before they are read: they are written past them.
LARGE = 2**22
# At most so many cells are packed for a task, if the images allow it, and so many bytes of output converted.
CELLS, CONVERTED = 2**12, 2**25

Shape = tuple[int, ...]


class _Task(NamedTuple):
    """Some channels, and windows that follow each other when sorted by image, all of one batch.

    Attributes
    ----------
    batch : int
    image, images : int
        The first image of the batch that has the windows, and how many there are.
    channel, channels : int
        The first channel, and how many.
    places : (R, 5) int64
        Where the windows lie in the packed cells of these images, as in `Windows`.
    """

    batch: int
    image: int
    images: int
    channel: int
    channels: int
    places: IntArray


class _Batch:
    """A batch of maps as flat memory, read or written in blocks of channels.

    Parameters
    ----------
    maps : (N, C, H, W) array
    numbers : dtype
        What the kernels take the bits for.
    """

    def __init__(self, maps: FloatArray, numbers: npt.DTypeLike) -> None:
        self.shape: Shape = maps.shape
        _, channels, height, width = maps.shape
        self.cells = height * width
        self.image = channels * self.cells
        if maps.flags.c_contiguous:
            flat, self.stride = maps.reshape(-1), self.cells
        else:
            # `pack` tells a distance of cells from one of channels by its sign.
            flat, self.stride = np.ascontiguousarray(maps.transpose(0, 2, 3, 1)).reshape(-1), -channels
        # The kernels are compiled for memory that can be written, and is aligned.
        self.flat = np.require(flat, requirements=("A", "W")).view(numbers)

    def block(self, task: _Task) -> Block:
        """Return the channels and images of a task."""
        at = task.image * self.image + task.channel * max(self.stride, 1)
        counts = task.images, task.channels, task.channel
        return Block(self.flat, at, *counts, self.cells, self.image, self.stride)


@lru_cache(maxsize=64)
def _images(shapes: tuple[Shape, ...]) -> tuple[IntArray, IntArray, IntArray]:
    """Return where each batch's images begin, each image's packed cells and row step."""
    counts = [shape[0] for shape in shapes]
    heights, widths = (np.repeat([shape[axis] for shape in shapes], counts) for axis in (2, 3))
    numbers = np.concatenate([[0], np.cumsum(counts)])
    starts = np.concatenate([[0], np.cumsum(heights * widths)])
    return numbers, starts, widths


class _Work:
    """What the passes share: where the windows lie in the packed cells of the images, and the tasks.

    Parameters
    ----------
    shapes : tuple of shapes
        Those of the maps.
    direct : bool
        Whether the kernels could read the maps as they lie.
    windows, index : (R, 4) and (R,) int64
        The windows, and the image of each.
    levels : tuple of int
        Sides of the levels.
    whole : bool
        Whether all windows of an image belong to one task of each block of channels.
    threads : int
        At most so many threads work.
    """

    def __init__(
        self,
        shapes: tuple[Shape, ...],
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

    def _tasks(self) -> tuple[list[_Task], int]:
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
            tasks += [_Task(batch, *images, c, min(self.width, self.channels - c), places) for c in blocks]
        return tasks, cells

    def run(self, worker: Callable[[], Callable[[_Task], None]]) -> None:
        """Call ``worker()`` in each thread, and what it returns with every task."""
        tasks = iter(self.tasks)

        def work() -> None:
            call = worker()
            for task in tasks:
                call(task)

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
    shapes: tuple[Shape, ...], direct: bool, levels: tuple[int, ...], whole: bool, threads: int
) -> _Work:
    """Return the work of pooling each image as a whole."""
    windows = [[0, 0, shape[3], shape[2]] for shape in shapes for _ in range(shape[0])]
    index = np.arange(len(windows))
    return _Work(shapes, direct, np.array(windows), index, levels, whole, threads)


def _work(
    batches: Sequence[_Batch],
    windows: IntArray | None,
    index: IntArray | None,
    levels: tuple[int, ...],
    whole: bool,
) -> _Work:
    shapes = tuple(batch.shape for batch in batches)
    direct = all(batch.stride < 0 for batch in batches)
    threads = thread_count()
    if windows is None or index is None:
        return _whole_images(shapes, direct, levels, whole, threads)
    return _Work(shapes, direct, windows, index, levels, whole, threads)


@lru_cache(maxsize=64)
def _plan(channels: int, levels: tuple[int, ...], derive: bool) -> IntArray:
    """Return the plan of the levels, as in `Windows`; `derive` says whether levels come from finer ones."""
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


def _working(maps: FloatArray, mode: str) -> tuple[Any, Any]:
    """Return the dtype to compute in, and that of the numbers that the kernels see: bits for maxima."""
    wide = maps.dtype == np.float64
    if mode == "average":
        return (np.float64,) * 2 if wide else (np.float32,) * 2
    return (np.float64, np.int64) if wide else (np.float32, np.int32)


def pool(
    maps: Sequence[FloatArray],
    windows: IntArray | None,
    index: IntArray | None,
    levels: tuple[int, ...],
    mode: str,
    out: Any,
) -> None:
    """Pool valid windows into `out`.

    Parameters
    ----------
    maps : sequence of (N_i, C, H_i, W_i) float arrays
        Of one dtype, in any memory layout. Their images are numbered through.
    windows : (R, 4) int64, optional
        ``x1, y1, x2, y2`` in cells; None for each image as a whole.
    index : (R,) int64, optional
        The image of each window; given if `windows` are.
    levels : tuple of int
    mode : {"max", "average"}
    out : (R, C * M) float array or tensor, contiguous
        What is not an array of the dtype to compute in, float64 for float64 maps, else float32, is filled
        part by part.
    """
    working, kind = _working(maps[0], mode)
    if len(out) == 0:
        return
    if out.dtype != working:
        _pool_and_convert(maps, windows, index, levels, mode, out)
        return
    batches = [_Batch(m.astype(working, copy=False), kind) for m in maps]
    work = _work(batches, windows, index, levels, whole=False)
    numbers = out.view(kind)
    plan = _plan(work.channels, levels, mode == "max")
    skew = out.ctypes.data % LINE // out.itemsize if out.nbytes > LARGE else -1

    # Loaded late: the compiler takes its time.
    from sppnet.pooling.cpu.kernels import pool_part

    def worker() -> Callable[[_Task], None]:
        scratch = Scratch(*(at_line(shape, kind) for shape in ((work.rows,), work.bins, (work.page,))))

        def call(task: _Task) -> None:
            windows = Windows(task.places, *work.bounds, plan)
            pool_part(batches[task.batch].block(task), work.raw, windows, scratch, numbers, skew)

        return call

    work.run(worker)


def _pool_and_convert(
    maps: Sequence[FloatArray],
    windows: IntArray | None,
    index: IntArray | None,
    levels: tuple[int, ...],
    mode: str,
    out: Any,
) -> None:
    """Pool as `pool` does into an output of another dtype than that to compute in, some rows at a time."""
    working, _ = _working(maps[0], mode)
    wide = [m.astype(working, copy=False) for m in maps]
    # Vectors of whole images take little memory next to the maps.
    rows = len(out) if windows is None else max(1, CONVERTED // (out.shape[1] * np.dtype(working).itemsize))
    buffer = np.empty((min(rows, len(out)), out.shape[1]), working)
    for start in range(0, len(out), rows):
        part = slice(start, start + rows)
        target = buffer[: len(out[part])]
        places, which = (None if given is None else given[part] for given in (windows, index))
        pool(wide, places, which, levels, mode, target)
        out[part] = like(target, out)


def pool_backward(
    grad: FloatArray,
    maps: Sequence[FloatArray],
    windows: IntArray | None,
    index: IntArray | None,
    levels: tuple[int, ...],
    mode: str,
    totals: Sequence[FloatArray],
) -> None:
    """Write to `totals` the gradients of the maps for the gradient of the result of `pool`.

    Sums are taken window by window in order, whatever the number of threads.

    Parameters
    ----------
    grad : (R, C * M) float32 or float64, contiguous
    maps : sequence of (N_i, C, H_i, W_i) arrays of the same dtype
        Contiguous, or so with channels last.
    windows, index, levels, mode
        As in `pool`.
    totals : sequence of arrays
        Of the maps' shapes, dtype and strides.
    """
    _, kind = _working(maps[0], mode)
    batches = [_Batch(m, kind) for m in maps]
    work = _work(batches, windows, index, levels, whole=True)
    plan = _plan(work.channels, levels, mode == "max")
    targets = [_Batch(total, total.dtype) for total in totals]
    if not work.complete:
        # Tasks write the gradients of all images that have windows.
        for target in targets:
            target.flat.fill(0)

    from sppnet.pooling.cpu.kernels import scatter_part, spread_part

    def worker() -> Callable[[_Task], None]:
        scratch = Scratch(*(at_line(shape, kind) for shape in ((work.rows,), work.bins, work.bins)))

        def call(task: _Task) -> None:
            target, windows = targets[task.batch], Windows(task.places, *work.bounds, plan)
            if mode == "average":
                spread_part(target.block(task), windows, grad, scratch.rows)
            else:
                block = batches[task.batch].block(task)
                scatter_part(block, work.raw, windows, scratch, grad, target.flat)

        return call

    work.run(worker)
