"""Spatial pyramid pooling of whole maps, as a layer of a network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sppnet.errors import SppnetError
from sppnet.pooling import operator  # noqa: F401  (registers the operator)
from sppnet.pooling.bins import LEVELS, valid_levels, valid_mode

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class SpatialPyramidPooling(nn.Module):
    """Pool maps of any size into vectors of one length; differentiable.

    Parameters
    ----------
    levels : sequence of int
        Sides of the levels, finest first in the paper (section 3.1).
    mode : {"max", "average"}
        What is kept of a bin; the paper keeps the maximum.

    Notes
    -----
    Maps (N, C, H, W) become (N, C * M) and a single map (C, H, W) becomes (C * M,), where M is the number of
    bins, for every H and W from 1 up. The bins are those of PyTorch's adaptive pooling. NaN in a bin wins.

    Images of several sizes go through together in two ways: as a list of maps, or as a padded batch with the
    true size of each map, whose padding no bin sees. Both give the vectors that each map gives alone.

    Works in the dtype of the maps, also under autocast, and under `torch.compile` and `torch.export` with
    free N, H and W.

    Examples
    --------
    >>> SpatialPyramidPooling((3, 2, 1))(torch.zeros(2, 256, 10, 17)).shape
    torch.Size([2, 3584])
    """

    def __init__(self, levels: Sequence[int] = LEVELS, mode: str = "max") -> None:
        super().__init__()
        self.levels = valid_levels(levels)
        self.mode = valid_mode(mode)

    def forward(self, maps: Tensor | Sequence[Tensor], sizes: Tensor | None = None) -> Tensor:
        """Pool maps into vectors.

        Parameters
        ----------
        maps : (N, C, H, W) tensor, (C, H, W) tensor or sequence of (C, H_i, W_i) tensors
            float32, float16, bfloat16 or float64.
        sizes : (N, 2) integer tensor, optional
            True height and width of each map of a batch (N, C, H, W) that is padded below and on the right.

        Returns
        -------
        (N, C * M) or (C * M,) tensor

        Raises
        ------
        SppnetError
            If an argument is not as described.
        """
        if not isinstance(maps, Tensor):
            if sizes is not None:
                raise SppnetError("sizes belong to a padded batch (N, C, H, W), found a list of maps")
            return self._pool([m[None] for m in checked_maps(maps)])
        if maps.ndim not in (3, 4) or 0 in maps.shape[-3:] or maps.dtype not in FLOATS:
            raise SppnetError(
                "maps must be floats of shape (C, H, W) or (N, C, H, W) with at least one channel, row and "
                f"column, found {maps.dtype} of shape {tuple(maps.shape)}"
            )
        if maps.ndim == 3:
            if sizes is not None:
                raise SppnetError("sizes belong to a padded batch (N, C, H, W), found a single map (C, H, W)")
            return self._pool([maps[None]])[0]
        return self._pool([maps]) if sizes is None else self._pool([maps], *_parts(maps, sizes))

    def _pool(self, maps: list[Tensor], windows: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        pooled: Tensor = torch.ops.sppnet.pool(maps, windows, index, self.levels, self.mode)
        return pooled

    def extra_repr(self) -> str:
        """Return what `repr` shows between the parentheses."""
        return f"levels={self.levels}, mode={self.mode!r}"


def checked_maps(maps: Sequence[Tensor]) -> list[Tensor]:
    """Return maps (C, H_i, W_i) that can be pooled together, as a list."""
    sources = list(maps)
    if not sources:
        raise SppnetError("maps must hold at least one map, found none")
    for i, m in enumerate(sources):
        if not isinstance(m, Tensor) or m.ndim != 3 or 0 in m.shape:
            found = tuple(m.shape) if isinstance(m, Tensor) else type(m).__name__
            raise SppnetError(
                f"map {i} must be a tensor (C, H, W) with at least one channel, row and column, found {found}"
            )
        if m.shape[0] != sources[0].shape[0]:
            raise SppnetError(f"map {i} has {m.shape[0]} channels, map 0 has {sources[0].shape[0]}")
        if m.dtype not in FLOATS:
            raise SppnetError(f"map {i} must be float32, float16, bfloat16 or float64, found {m.dtype}")
        if m.dtype != sources[0].dtype or m.device != sources[0].device:
            raise SppnetError(
                f"maps must be of one dtype and device, found {m.dtype} on {m.device} for map {i} and "
                f"{sources[0].dtype} on {sources[0].device} for map 0"
            )
    return sources


def _parts(maps: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the windows that are the true maps of a padded batch, and the image of each."""
    found = (
        f"{sizes.dtype} of shape {tuple(sizes.shape)}" if isinstance(sizes, Tensor) else type(sizes).__name__
    )
    if not isinstance(sizes, Tensor) or sizes.shape != (maps.shape[0], 2) or not is_integer(sizes.dtype):
        raise SppnetError(
            f"sizes must be an integer tensor of shape ({maps.shape[0]}, 2), height and width of each map, "
            f"found {found}"
        )
    ends = sizes.to(maps.device, torch.int64).flip(1)
    return torch.cat([torch.zeros_like(ends), ends], dim=1), torch.arange(maps.shape[0], device=maps.device)


def is_integer(dtype: torch.dtype) -> bool:
    """Return whether a dtype holds whole numbers."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
