"""Memory for large outputs on the CPU, kept from one call to the next.

The system hands out fresh memory page by page and zeroes each: for large outputs that takes longer than the
pooling. So the memory of the last large output is kept when its array is gone, and lent again.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

# Outputs between these sizes, in bytes, come from kept memory; at most one piece is kept.
SMALLEST, LARGEST = 2**20, 2**28
LINE = 64


class _Loan:
    """A part of a piece of memory that starts at a cache line; alive as long as any array uses it.

    Arrays hold it as their base, which a view of the piece would not be: NumPy passes on the base of views.
    """

    def __init__(self, piece: npt.NDArray[np.uint8], size: int) -> None:
        address = piece.ctypes.data
        self.piece = piece
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (size,),
            "data": (address + -address % LINE, False),
        }


_lock = threading.Lock()
_kept: list[tuple[npt.NDArray[np.uint8], weakref.ref[_Loan]]] = []


def at_line(shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return an uninitialised array that starts at a cache line."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return _array(_Loan(np.empty(size + LINE, np.uint8), size), shape, dtype)


def empty(shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return an uninitialised array; large ones start at a cache line, in memory that is kept."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < SMALLEST:
        return np.empty(shape, dtype)
    with _lock:
        piece = _kept[0][0] if _kept and _kept[0][1]() is None else None
        if piece is None or not size + LINE <= len(piece) <= 4 * size:
            # Somewhat more, so that a slightly larger output finds room next time; unused pages cost nothing.
            room = size + LINE if size > LARGEST else size + size // 4 + LINE
            piece = np.empty(room, np.uint8)
        lent = _Loan(piece, size)
        if size <= LARGEST:
            _kept[:] = [(piece, weakref.ref(lent))]
    return _array(lent, shape, dtype)


def _array(lent: _Loan, shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return np.asarray(lent).view(dtype).reshape(shape)
