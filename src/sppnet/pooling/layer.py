"""Spatial pyramid pooling of whole maps, as a layer of a network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sppnet.arrays import is_tensor
from sppnet.errors import SppnetError
from sppnet.pooling.bins import LEVELS, valid_levels, valid_mode
from sppnet.pooling.checks import checked_batches, described, is_integer
from sppnet.pooling.operator import pooled


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
    free N, H and W. `sppnet.pooling.pyramid.spatial_pyramid` is the same as a function, for arrays, too.

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
        batches = checked_batches(maps)
        if not is_tensor(batches[0]):
            raise SppnetError("the layer takes tensors, found arrays; spatial_pyramid takes them")
        single = isinstance(maps, Tensor) and maps.ndim == 3
        if sizes is None:
            vectors = pooled(batches, None, None, self.levels, self.mode)
            return vectors[0] if single else vectors
        if single or not isinstance(maps, Tensor):
            found = "a single map (C, H, W)" if single else "a list of maps"
            raise SppnetError(f"sizes belong to a padded batch (N, C, H, W), found {found}")
        return pooled(batches, *_parts(maps, sizes), self.levels, self.mode)

    def extra_repr(self) -> str:
        """Return what `repr` shows between the parentheses."""
        return f"levels={self.levels}, mode={self.mode!r}"


def _parts(maps: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the windows that are the true maps of a padded batch, and the image of each."""
    count = len(maps)
    if not isinstance(sizes, Tensor) or sizes.shape != (count, 2) or not is_integer(sizes.dtype):
        raise SppnetError(
            f"sizes must be an integer tensor of shape ({count}, 2), height and width of each image, "
            f"found {described(sizes)}"
        )
    ends = sizes.to(maps.device, torch.int64).flip(1)
    return torch.cat([torch.zeros_like(ends), ends], dim=1), torch.arange(maps.shape[0], device=maps.device)
