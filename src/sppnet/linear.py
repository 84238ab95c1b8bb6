"""Linear layers on arrays or tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sppnet.arrays import like


class Linear(NamedTuple):
    """A linear layer: call it on vectors.

    Attributes
    ----------
    weights : (n, D) float32
        What a vector is multiplied with, for each of the n outputs.
    offsets : (n,) float32 or None
        What is added.
    """

    weights: npt.NDArray[np.float32]
    offsets: npt.NDArray[np.float32] | None = None

    def __call__(self, vectors: Any) -> Any:
        """Return the (R, n) outputs for (R, D) float32 vectors, an array or a tensor on any device."""
        outputs = vectors @ like(self.weights, vectors).T
        return outputs if self.offsets is None else outputs + like(self.offsets, vectors)
