"""The fully connected layers over pooled windows: fc6 and fc7 (paper section 4.1).

Nothing here knows images or windows; `sppnet.detection.finetune` trains a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from sppnet.errors import SppnetError
from sppnet.linear import Linear

LAYERS = ("pool", "fc6", "fc7")
"""What the SVMs can stand on: the pooled vector itself, or one of the two layers above it."""


@dataclass(frozen=True)
class Head:
    """Two fully connected layers over a pooled vector, a (K + 1)-way classifier and the deltas of K classes.

    The last two are what the layers were trained with; the SVMs stand on one of the first two.

    Attributes
    ----------
    fc6, fc7 : tuple of Linear
        One layer each, or after compression two thin ones, the first without offsets. A ReLU follows.
    scores : Linear
        The K + 1 scores of classes, background last, of what fc7 gives.
    deltas : Linear
        The 4 K box deltas, class by class.
    """

    fc6: tuple[Linear, ...]
    fc7: tuple[Linear, ...]
    scores: Linear
    deltas: Linear

    @property
    def length(self) -> int:
        """Length of the pooled vectors."""
        return int(self.fc6[0].weights.shape[1])

    @property
    def width(self) -> int:
        """Units of fc6 and of fc7."""
        return int(self.scores.weights.shape[1])

    @property
    def count(self) -> int:
        """K, the number of classes; the background is one more."""
        return len(self.scores.weights) - 1

    @property
    def ranks(self) -> tuple[int, int]:
        """Ranks of fc6 and fc7 after compression; 0 for a layer that is whole."""
        return _rank(self.fc6), _rank(self.fc7)

    def activations(self, pooled: Any, layer: str) -> Any:
        """Return what a layer of `LAYERS` makes of (R, D) pooled vectors: (R, D) or (R, width).

        The vectors are a float32 array or a tensor on any device; so is the result.
        """
        if layer == "pool":
            return pooled
        parts = (self.fc6,) if layer == "fc6" else (self.fc6, self.fc7)
        for part in parts:
            for linear in part:
                pooled = linear(pooled)
            pooled = pooled.clip(min=0)
        return pooled

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
        six, seven = (
            _thin(part[0], rank) if rank else part
            for part, rank in zip((self.fc6, self.fc7), ranks, strict=True)
        )
        return replace(self, fc6=six, fc7=seven)

    def state(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return all numbers by name, such as ``fc6.weight``; ``fc6.0.weight`` and so on of a thin layer."""
        named: dict[str, Linear] = {}
        for name, part in (("fc6", self.fc6), ("fc7", self.fc7)):
            named |= {name: part[0]} if len(part) == 1 else {f"{name}.{i}": p for i, p in enumerate(part)}
        found = {}
        for name, linear in (named | {"scores": self.scores, "deltas": self.deltas}).items():
            found[f"{name}.weight"] = linear.weights
            if linear.offsets is not None:
                found[f"{name}.bias"] = linear.offsets
        return found

    @classmethod
    def from_state(cls, state: Mapping[str, npt.NDArray[Any]]) -> Head:
        """Return the head, compressed or not, whose `state` this is, in any precision.

        Raises
        ------
        SppnetError
            If something is missing, or the shapes do not go together.
        """

        def linear(name: str, biased: bool = True) -> Linear:
            names = [f"{name}.weight", *([f"{name}.bias"] if biased else [])]
            missing = [each for each in names if each not in state]
            if missing:
                raise SppnetError(f"found no {missing[0]}, expected it in the state of a head")
            return Linear(*(state[each].astype(np.float32) for each in names))

        def layers(name: str) -> tuple[Linear, ...]:
            thin = f"{name}.0.weight" in state
            return (linear(f"{name}.0", biased=False), linear(f"{name}.1")) if thin else (linear(name),)

        head = cls(layers("fc6"), layers("fc7"), linear("scores"), linear("deltas"))
        head._check_shapes()
        return head

    def _check_shapes(self) -> None:
        """Raise an error unless each layer takes what the one before it gives."""
        inside = [*self.fc6, *self.fc7]
        pairs = zip(inside, [*inside[1:], self.scores], strict=True)
        if not (
            all(
                layer.weights.ndim == 2
                and (layer.offsets is None or layer.offsets.shape == layer.weights.shape[:1])
                for layer in (*inside, self.scores, self.deltas)
            )
            and all(len(first.weights) == second.weights.shape[1] for first, second in pairs)
            and len(self.fc6[-1].weights) == self.width
            and self.deltas.weights.shape == (4 * self.count, self.width)
        ):
            found = ", ".join(f"{name} {value.shape}" for name, value in self.state().items())
            raise SppnetError(f"found layers of shapes {found}, expected ones that go together")


def activate(head: Head | None, layer: str, pooled: Any) -> Any:
    """Return what the SVMs take, of (R, D) pooled vectors: they themselves, or a layer's activations.

    Parameters
    ----------
    head : Head or None
        None where the SVMs stand on the pooled vectors.
    layer : {"pool", "fc6", "fc7"}
        The layer of the head.
    pooled : (R, D) float32
        An array, or a tensor on any device; so is the result.
    """
    return pooled if head is None else head.activations(pooled, layer)


def _rank(layers: Sequence[Linear]) -> int:
    return len(layers[0].weights) if len(layers) == 2 else 0


def _thin(layer: Linear, rank: int) -> tuple[Linear, Linear]:
    u, s, vh = np.linalg.svd(layer.weights, full_matrices=False)
    root = np.sqrt(s[:rank])
    return Linear(root[:, None] * vh[:rank]), Linear(u[:, :rank] * root, layer.offsets)
