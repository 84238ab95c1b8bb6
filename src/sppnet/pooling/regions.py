"""Spatial pyramid pooling of any windows of maps that were computed once (section 4.1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sppnet.errors import SppnetError
from sppnet.pooling import operator  # noqa: F401  (registers the operator)
from sppnet.pooling.bins import LEVELS, pyramid_length, valid_levels, valid_mode
from sppnet.pooling.checks import FLOATS, checked_maps, is_integer

Integers = npt.NDArray[np.integer[Any]] | Tensor


def pool_regions(
    maps: Tensor | Sequence[Tensor],
    windows: Integers,
    levels: Sequence[int] = LEVELS,
    *,
    mode: str = "max",
    index: Integers | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | npt.NDArray[np.floating[Any]] | None = None,
) -> Tensor:
    """Pool every window of maps into a vector, as `SpatialPyramidPooling` pools the maps cut out.

    Differentiable in the maps; works under `torch.compile` and `torch.export` with any number of windows.

    Parameters
    ----------
    maps : (C, H, W) tensor, (N, C, H, W) tensor or sequence of (C, H, W) tensors
        float32, float16, bfloat16 or float64, in any memory layout, on any device. The maps of a sequence may
        differ in height and width.
    windows : (R, 4) integers
        ``x1, y1, x2, y2`` in cells of the map, 0-based and half-open; at least one cell wide and high.
    levels : sequence of int
        Sides of the levels.
    mode : {"max", "average"}
        What is kept of a bin. A NaN in it wins, as in PyTorch.
    index : (R,) integers, optional
        The map of each window; required if there are several maps.
    dtype : torch.dtype, optional
        Of the result; that of the maps by default.
    out : (R, C * M) float tensor or array, optional
        Contiguous memory on the maps' device to write to, without gradient.

    Returns
    -------
    (R, C * M) tensor
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
    On the CPU as many threads work as ``torch.get_num_threads()`` says. On a GPU the check of the windows
    waits for the device once.

    Examples
    --------
    >>> maps = torch.arange(24.0).reshape(2, 3, 4)
    >>> pool_regions(maps, np.array([[0, 0, 4, 3], [1, 0, 3, 2]]), levels=(1,))
    tensor([[11., 23.],
            [ 6., 18.]])
    """
    valid_mode(mode)
    sides = valid_levels(levels)
    sources = _batches(maps)
    count = sum(m.shape[0] for m in sources)
    places = _checked_integers("windows", windows, ("R", 4))
    if index is None and count > 1:
        raise SppnetError(f"index must say which of the {count} maps each window belongs to, found None")
    which = None if index is None else _checked_integers("index", index, (places.shape[0],))
    if dtype is not None and dtype not in FLOATS:
        raise SppnetError(f"dtype must be one of {', '.join(map(str, FLOATS))}, found {dtype}")
    if out is None:
        pooled: Tensor = torch.ops.sppnet.pool(sources, places, which, sides, mode, dtype)
        return pooled
    if torch.is_grad_enabled() and any(m.requires_grad for m in sources):
        raise SppnetError(
            "maps that require a gradient cannot be pooled into out; detach them or use torch.no_grad()"
        )
    shape = (places.shape[0], pyramid_length(sources[0].shape[1], sides))
    result = _checked_output(out, shape, sources[0].device, dtype)
    torch.ops.sppnet.pool_into(sources, places, which, sides, mode, result)
    return result


def pool_region_chunks(
    maps: Tensor | Sequence[Tensor],
    windows: Integers,
    levels: Sequence[int] = LEVELS,
    *,
    mode: str = "max",
    index: Integers | None = None,
    dtype: torch.dtype | None = None,
    max_bytes: int = 2**28,
) -> Iterator[tuple[slice, Tensor]]:
    """Pool any number of windows, a chunk at a time, in bounded memory and without gradient.

    Parameters
    ----------
    maps, windows, levels, mode, index, dtype
        As in `pool_regions`.
    max_bytes : int
        Most memory that a chunk may take; a chunk has at least one window.

    Yields
    ------
    slice, (r, C * M) tensor
        Which windows, and their vectors. All chunks use the same memory: a vector that is to outlive its turn
        must be copied.

    Raises
    ------
    SppnetError
        As `pool_regions`, when the chunk in question is reached; or if `max_bytes` is not positive.
    """
    if max_bytes < 1:
        raise SppnetError(f"max_bytes must be positive, found {max_bytes}")
    sources = _batches(maps)
    places = _checked_integers("windows", windows, ("R", 4))
    which = None if index is None else _checked_integers("index", index, (len(places),))
    kind = dtype or sources[0].dtype
    length = pyramid_length(sources[0].shape[1], levels)
    rows = max(1, min(len(places), max_bytes // (length * kind.itemsize)))
    memory = torch.empty((rows, length), dtype=kind, device=sources[0].device)
    for start in range(0, len(places), rows):
        part = slice(start, min(start + rows, len(places)))
        images = None if which is None else which[part]
        with torch.no_grad():
            out = memory[: part.stop - start]
            yield part, pool_regions(maps, places[part], levels, mode=mode, index=images, out=out)


def _batches(maps: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return the maps as a list of batches (N, C, H, W)."""
    if isinstance(maps, Tensor) and maps.ndim == 4 and maps.shape[0] > 0:
        checked_maps([maps[0]])
        return [maps]
    sources = [maps] if isinstance(maps, Tensor) and maps.ndim == 3 else list(maps)
    return [m[None] for m in checked_maps(sources)]


def _checked_integers(name: str, values: Any, shape: tuple[Any, ...]) -> Tensor:
    """Return an int64 tensor of the shape, in which a letter stands for any number of rows."""
    array = values if isinstance(values, Tensor) else np.asarray(values)
    fits = array.ndim == len(shape) and all(
        isinstance(want, str) or got == want for got, want in zip(array.shape, shape, strict=True)
    )
    whole = is_integer(array.dtype) if isinstance(array, Tensor) else np.issubdtype(array.dtype, np.integer)
    if not fits or not whole:
        wanted = str(shape).replace("'", "")
        raise SppnetError(
            f"{name} must be integers of shape {wanted}, found {array.dtype} of shape {tuple(array.shape)}"
        )
    if isinstance(array, Tensor):
        return array.to(torch.int64)
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))


def _checked_output(
    out: Any, shape: tuple[int, int], device: torch.device, dtype: torch.dtype | None
) -> Tensor:
    """Return the tensor that shares the memory of `out`."""
    wanted = f"out must be contiguous {dtype or 'floats'} on {device}, without gradient, of shape {shape}"
    if not isinstance(out, Tensor | np.ndarray):
        raise SppnetError(f"{wanted}, found {type(out).__name__}")
    if isinstance(out, np.ndarray):
        if out.dtype.kind != "f" or not (out.flags.writeable and out.flags.c_contiguous):
            raise SppnetError(
                f"{wanted}, found a strided, read-only or {out.dtype} array of shape {out.shape}"
            )
        tensor = torch.from_numpy(out)
    else:
        tensor = out
    plain = tensor.is_contiguous() and not tensor.requires_grad and tensor.device == device
    kind = tensor.dtype in FLOATS if dtype is None else tensor.dtype == dtype
    if not plain or not kind or tensor.shape != shape:
        raise SppnetError(
            f"{wanted}, found {tensor.dtype} on {tensor.device} of shape {tuple(tensor.shape)}, "
            f"strides {tensor.stride()}"
        )
    return tensor
