"""Spatial pyramid pooling of any windows of maps that were computed once (section 4.1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sppnet.arrays import FloatArray, IntArray, is_tensor, to_numpy
from sppnet.errors import SppnetError
from sppnet.pooling.bins import LEVELS, pyramid_length, valid_levels, valid_mode
from sppnet.pooling.checks import (
    ARRAY_FLOATS,
    TENSOR_FLOATS,
    Integers,
    Maps,
    check_inside,
    checked_batches,
    described,
    is_float,
    is_integer,
)
from sppnet.pooling.cpu import scheduling
from sppnet.pooling.memory import empty


def pool_regions(
    maps: Maps | Sequence[Maps],
    windows: Integers,
    levels: Sequence[int] = LEVELS,
    *,
    mode: str = "max",
    index: Integers | None = None,
    dtype: Any = None,
    out: Any = None,
) -> Maps:
    """Pool every window of maps into a vector, as `spatial_pyramid` pools the maps cut out.

    With tensors it is differentiable in the maps, and works under `torch.compile` and `torch.export` with any
    number of windows. With arrays PyTorch is not needed.

    Parameters
    ----------
    maps : (C, H, W) or (N, C, H, W) array or tensor, or sequence of (C, H_i, W_i) ones
        float32, float16 or float64; tensors also bfloat16, on any device. In any memory layout.
    windows : (R, 4) integers
        ``x1, y1, x2, y2`` in cells of the map, 0-based and half-open; at least one cell wide and high. An
        array or a tensor, whatever the maps are.
    levels : sequence of int
        Sides of the levels.
    mode : {"max", "average"}
        What is kept of a bin. A NaN in it wins, as in PyTorch.
    index : (R,) integers, optional
        The map of each window; required if there are several maps.
    dtype : dtype of NumPy, or of PyTorch for tensors, optional
        Of the result; that of the maps by default.
    out : (R, C * M) float array, for tensors also a tensor, optional
        Contiguous memory on the maps' device to write to, without gradient.

    Returns
    -------
    (R, C * M) array or tensor, as the maps are
        One vector per window. It is `out`, or shares its memory, where that is given.

    Raises
    ------
    SppnetError
        If an argument is not as described; for windows and index, naming the first row that is wrong.

    See Also
    --------
    pool_region_chunks : Any number of windows in bounded memory.

    Notes
    -----
    On the CPU as many threads work as `sppnet.parallel.thread_count` says. On a GPU the check of the windows
    waits for the device once.

    Examples
    --------
    >>> maps = np.arange(24.0).reshape(2, 3, 4)
    >>> pool_regions(maps, np.array([[0, 0, 4, 3], [1, 0, 3, 2]]), levels=(1,))
    array([[11., 23.],
           [ 6., 18.]])
    """
    batches, places, which, sides = _checked(maps, windows, index, levels, mode)
    kind = _checked_dtype(dtype, batches[0])
    if out is not None:
        if any(is_tensor(m) and _learns(m) for m in batches):
            raise SppnetError(
                "maps that require a gradient cannot be pooled into out; detach them or use torch.no_grad()"
            )
        shape = (places.shape[0], pyramid_length(batches[0].shape[1], sides))
        out = _checked_output(out, shape, batches[0], None if dtype is None else kind)
    pooled: Maps = _pool(batches, places, which, sides, mode, kind, out)
    return pooled


def pool_region_chunks(
    maps: Maps | Sequence[Maps],
    windows: Integers,
    levels: Sequence[int] = LEVELS,
    *,
    mode: str = "max",
    index: Integers | None = None,
    dtype: Any = None,
    max_bytes: int = 2**28,
) -> Iterator[tuple[slice, Maps]]:
    """Pool any number of windows, a chunk at a time, in bounded memory and without gradient.

    Parameters
    ----------
    maps, windows, levels, mode, index, dtype
        As in `pool_regions`.
    max_bytes : int
        Most memory that a chunk may take; a chunk has at least one window.

    Yields
    ------
    slice, (r, C * M) array or tensor
        Which windows, and their vectors. All chunks use the same memory: a vector that is to outlive its turn
        must be copied.

    Raises
    ------
    SppnetError
        As `pool_regions`, when the chunk in question is reached; or if `max_bytes` is not positive.
    """
    if max_bytes < 1:
        raise SppnetError(f"max_bytes must be positive, found {max_bytes}")
    batches, places, which, sides = _checked(maps, windows, index, levels, mode)
    kind = _checked_dtype(dtype, batches[0])
    length = pyramid_length(batches[0].shape[1], sides)
    rows = max(1, min(len(places), max_bytes // (length * kind.itemsize)))
    memory: Any
    if is_tensor(batches[0]):
        batches = [m.detach() for m in batches]
        memory = batches[0].new_empty((rows, length), dtype=kind)
    else:
        memory = empty((rows, length), kind)
    for start in range(0, len(places), rows):
        part = slice(start, min(start + rows, len(places)))
        images = None if which is None else which[part]
        out = memory[: part.stop - start]
        yield part, _pool(batches, places[part], images, sides, mode, kind, out)


def _pool(
    batches: list[Any],
    windows: Any,
    index: Any,
    levels: tuple[int, ...],
    mode: str,
    dtype: Any,
    out: Any,
) -> Any:
    """Pool what has been checked, but for where the windows lie; `out` may be None."""
    if is_tensor(batches[0]):
        from sppnet.pooling import operator

        return operator.pooled(batches, windows, index, levels, mode, dtype, out)
    which: IntArray = np.zeros(len(windows), np.int64) if index is None else index
    check_inside(batches, windows, which)
    shape = (len(windows), pyramid_length(batches[0].shape[1], levels))
    result: FloatArray = empty(shape, dtype) if out is None else out
    scheduling.pool(batches, windows, which, levels, mode, result)
    return result


def _learns(maps: Any) -> bool:
    """Return whether a tensor's gradient is recorded."""
    import torch

    return torch.is_grad_enabled() and bool(maps.requires_grad)


def _checked(
    maps: Any, windows: Any, index: Any, levels: Sequence[int], mode: str
) -> tuple[list[Any], Any, Any, tuple[int, ...]]:
    """Return batches of maps, windows and index of the same kind, and levels."""
    valid_mode(mode)
    sides, batches = valid_levels(levels), checked_batches(maps)
    count = sum(m.shape[0] for m in batches)
    if count == 0:
        raise SppnetError("maps must hold at least one map, found none")
    places = _checked_integers("windows", windows, ("R", 4), batches[0])
    if index is None and count > 1:
        raise SppnetError(f"index must say which of the {count} maps each window belongs to, found None")
    which = None if index is None else _checked_integers("index", index, (places.shape[0],), batches[0])
    return batches, places, which, sides


def _checked_dtype(dtype: Any, maps: Any) -> Any:
    """Return the dtype of the result, that of the maps if none is asked for."""
    if dtype is None:
        return maps.dtype
    floats = TENSOR_FLOATS if is_tensor(maps) else ARRAY_FLOATS
    kind = dtype if is_tensor(maps) else np.dtype(dtype)
    if str(kind) not in floats:
        raise SppnetError(f"dtype must be one of {', '.join(floats)}, found {dtype}")
    return kind


def _checked_integers(name: str, values: Any, shape: tuple[Any, ...], maps: Any) -> Any:
    """Return int64 of the shape, in which a letter stands for any number of rows, as the maps' kind."""
    array: Any = values if is_tensor(values) else np.asarray(values)
    fits = array.ndim == len(shape) and all(
        isinstance(want, str) or got == want for got, want in zip(array.shape, shape, strict=True)
    )
    if not fits or not is_integer(array.dtype):
        wanted = str(shape).replace("'", "")
        raise SppnetError(f"{name} must be integers of shape {wanted}, found {described(array)}")
    if not is_tensor(maps):
        return np.ascontiguousarray(to_numpy(array), dtype=np.int64)
    import torch

    if is_tensor(array):
        return array.to(torch.int64)
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))


def _checked_output(out: Any, shape: tuple[int, int], maps: Any, dtype: Any) -> Any:
    """Return `out`, for tensors as the tensor that shares its memory."""
    device = maps.device if is_tensor(maps) else "cpu"
    wanted = f"out must be contiguous {dtype or 'floats'} on {device}, without gradient, of shape {shape}"
    if isinstance(out, np.ndarray):
        plain = out.flags.carray and str(device) == "cpu"
    elif is_tensor(out) and is_tensor(maps):
        plain = out.is_contiguous() and not out.requires_grad and out.device == device
    else:
        raise SppnetError(f"{wanted}, found {type(out).__name__}")
    names = (str(dtype), str(dtype).removeprefix("torch."))
    kind = is_float(out.dtype) if dtype is None else str(out.dtype) in names
    if not plain or not kind or out.shape != shape:
        where = f" on {out.device}, strides {out.stride()}" if is_tensor(out) else f", {out.flags}"
        raise SppnetError(f"{wanted}, found {described(out)}{where}")
    if not is_tensor(maps) or is_tensor(out):
        return out
    import torch

    return torch.from_numpy(out)


def load_kernels() -> None:
    """Load the kernels for float32 maxima on the CPU now; else the first call waits for that."""
    pool_regions(np.zeros((1, 1, 1), np.float32), np.array([[0, 0, 1, 1]]), (1,))
