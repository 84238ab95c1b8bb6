"""Memory for large outputs on the CPU, kept from one call to the next.

The system hands out fresh memory page by page and zeroes each: for large outputs that takes longer than the
pooling. So the memory of the last large output is kept when its tensor is gone, and lent again.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Outputs between these sizes, in bytes, come from kept memory; at most one piece is kept.
SMALLEST, LARGEST = 2**20, 2**28
LINE = 64

_lock = threading.Lock()
_kept: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised CPU tensor; large ones start at a cache line."""
    size = math.prod(shape) * dtype.itemsize
    if size < SMALLEST:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    with _lock:
        piece = _kept[0][0] if _kept and _kept[0][1]() is None else None
        if piece is None or not size + LINE <= len(piece) <= 4 * size:
            # Somewhat more, so that a slightly larger output finds room next time; unused pages cost nothing.
            room = size + LINE if size > LARGEST else size + size // 4 + LINE
            piece = torch.empty(room, dtype=torch.uint8, device="cpu").numpy()
        skip = -piece.ctypes.data % LINE
        # Alive as long as any tensor uses the memory.
        lent = piece[skip : skip + size]
        if size <= LARGEST:
            _kept[:] = [(piece, weakref.ref(lent))]
    return torch.from_numpy(lent).view(dtype).view(tuple(shape))
