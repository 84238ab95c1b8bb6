"""The fully connected layers while they learn; `sppnet.detection.head` has what comes of it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from torch import Tensor, nn

from sppnet.arrays import to_numpy


class HeadNetwork(nn.Module):
    """fc6, fc7, a classifier and box deltas as a network to train.

    The paper takes fc6 and fc7 of 4,096 units from pre-training; backbones of today have none, so these start
    at random. The deltas are learned with the classifier (Girshick, "Fast R-CNN", ICCV 2015).

    Parameters
    ----------
    length : int
        Length of the pooled vectors.
    count : int
        K, the number of classes; the background is one more.
    width : int
        Units of fc6 and of fc7.
    dropout : float
        After either, in training (paper: 0.5).
    """

    def __init__(self, length: int, count: int, width: int = 512, dropout: float = 0.5) -> None:
        super().__init__()
        self.length, self.count, self.dropout = length, count, dropout
        self.fc6, self.fc7 = _full(length, width), _full(width, width)
        self.scores, self.deltas = nn.Linear(width, count + 1), nn.Linear(width, 4 * count)
        for layer in (self.scores, self.deltas):
            nn.init.normal_(layer.weight, 0, 0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (R, K + 1) class scores, background last, and the (R, K, 4) deltas of (R, D) vectors."""
        x = self._dropped(F.relu(self.fc6(pooled)))
        x = self._dropped(F.relu(self.fc7(x)))
        return self.scores(x), self.deltas(x).view(-1, self.count, 4)

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def state(self) -> dict[str, npt.NDArray[np.float16]]:
        """Return the layers as they are saved: arrays, rounded to half precision."""
        return {name: to_numpy(value.half()) for name, value in self.state_dict().items()}


def _full(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer
