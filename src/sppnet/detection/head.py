"""The fully connected layers over pooled windows: fc6, fc7, a classifier and box deltas (paper section 4.1).

Nothing here knows images or windows; `sppnet.detection.finetune` trains a head.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sppnet.errors import SppnetError

LAYERS = ("pool", "fc6", "fc7")
"""What the SVMs can stand on: the pooled vector itself, or one of the two layers above it."""


class Head(nn.Module):
    """Two fully connected layers over a pooled vector, a (K + 1)-way classifier and the deltas of K classes.

    The paper takes fc6 and fc7 of 4,096 units from pre-training; backbones of today have none, so these start
    at random. The deltas are learned with the classifier (Girshick, "Fast R-CNN", ICCV 2015).

    Parameters
    ----------
    length : int
        Of the pooled vectors.
    count : int
        K, the number of classes; the background is one more.
    width : int
        Units of fc6 and of fc7.
    dropout : float
        After either, in training (paper: 0.5).
    """

    def __init__(self, length: int, count: int, width: int = 512, dropout: float = 0.5) -> None:
        super().__init__()
        self.length, self.count, self.width, self.dropout = length, count, width, dropout
        self.fc6: nn.Module = _full(length, width)
        self.fc7: nn.Module = _full(width, width)
        self.scores, self.deltas = nn.Linear(width, count + 1), nn.Linear(width, 4 * count)
        for layer in (self.scores, self.deltas):
            nn.init.normal_(layer.weight, 0, 0.01)
            nn.init.zeros_(layer.bias)

    def activations(self, pooled: Tensor, layer: str) -> Tensor:
        """Return what a layer of `LAYERS` makes of (R, D) pooled vectors: (R, D) or (R, width)."""
        if layer == "pool":
            return pooled
        x = self._dropped(F.relu(self.fc6(pooled)))
        return x if layer == "fc6" else self._dropped(F.relu(self.fc7(x)))

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (R, K + 1) class scores, background last, and the (R, K, 4) deltas of (R, D) vectors."""
        x = self.activations(pooled, "fc7")
        return self.scores(x), self.deltas(x).view(-1, self.count, 4)

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    @torch.no_grad()
    def compressed(self, ranks: Sequence[int]) -> Head:
        """Return this head with fc6 and fc7 as two thin layers each, by truncated SVD (paper section 4.3).

        ``W = U S V'`` becomes ``S^1/2 V'`` without and ``U S^1/2`` with the bias: of `ranks` r6 and r7, the
        largest singular values are kept. The layer then takes ``r (m + n)`` multiplications instead of
        ``m n`` (Girshick, "Fast R-CNN", ICCV 2015, section 3.1). A rank of 0 leaves the layer whole.

        Raises
        ------
        SppnetError
            If there are not two ranks, one is negative or more than the layer has, or the head is compressed
            already.
        """
        if any(self.ranks):
            raise SppnetError(
                f"found a head compressed to the ranks {list(self.ranks)}, expected a whole one"
            )
        most = [min(self.length, self.width), self.width]
        if len(ranks) != 2 or any(not 0 <= rank <= full for rank, full in zip(ranks, most, strict=True)):
            raise SppnetError(
                f"found the ranks {list(ranks)}, expected two, of fc6 to {most[0]}, of fc7 to {most[1]}"
            )
        thin = copy.deepcopy(self)
        for name, rank in zip(("fc6", "fc7"), ranks, strict=True):
            if rank:
                setattr(thin, name, _thin(getattr(thin, name), rank))
        return thin.train(self.training)

    @property
    def ranks(self) -> tuple[int, int]:
        """Ranks of fc6 and fc7 after compression; 0 for a layer that is whole."""
        first, second = (_linears(layer) for layer in (self.fc6, self.fc7))
        return _rank(first), _rank(second)

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Head:
        """Build the head, compressed or not, whose `state_dict` this is; it is in evaluation mode."""
        whole = "fc6.weight" in state
        length = state["fc6.weight" if whole else "fc6.0.weight"].shape[1]
        outputs, width = state["scores.weight"].shape
        head = cls(length, outputs - 1, width)
        for name in ("fc6", "fc7"):
            if f"{name}.0.weight" in state:
                setattr(head, name, _pair(getattr(head, name), len(state[f"{name}.0.weight"])))
        head.load_state_dict({name: value.float() for name, value in state.items()})
        return head.eval()


def activate(head: Head | None, layer: str, pooled: Tensor) -> Tensor:
    """Return what the SVMs take, of (R, D) pooled vectors: they themselves, or a layer's activations.

    Parameters
    ----------
    head : Head or None
        None where the SVMs stand on the pooled vectors.
    layer : {"pool", "fc6", "fc7"}
        The layer of the head.
    pooled : (R, D) float32 tensor
        On any device; so is the result.
    """
    if head is None:
        return pooled
    with torch.no_grad():
        return head.activations(pooled.to(head.scores.weight.device), layer).to(pooled.device)


def _full(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


def _rank(layers: Sequence[nn.Linear]) -> int:
    return layers[0].out_features if len(layers) == 2 else 0


def _pair(layer: nn.Linear, rank: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features))


def _thin(layer: nn.Linear, rank: int) -> nn.Sequential:
    u, s, vh = torch.linalg.svd(layer.weight, full_matrices=False)
    root = s[:rank].sqrt()
    pair = _pair(layer, rank).to(layer.weight.device)
    first, second = _linears(pair)
    first.weight.copy_(root[:, None] * vh[:rank])
    second.weight.copy_(u[:, :rank] * root)
    second.bias.copy_(layer.bias)
    return pair
