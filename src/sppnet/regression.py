"""Box regression: the deltas that move a window onto an object, and the ridge regression that predicts them.

The paper takes both from R-CNN (section 4.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from array_api_compat import array_namespace

from sppnet.arrays import Boxes, FloatArray, to_numpy
from sppnet.linear import Linear

# Examples whose products are summed up at once.
_AT_ONCE = 2048


def encode_deltas(windows: FloatArray, truth: FloatArray) -> Boxes:
    """Return the (R, 4) regression targets that move each window onto its ground-truth box.

    ``dx = (gx - px) / pw, dy = (gy - py) / ph, dw = ln(gw / pw), dh = ln(gh / ph)`` with x, y the centres
    (R-CNN's parametrisation, paper section 4.1).

    Parameters
    ----------
    windows, truth : (R, 4) float arrays of boxes with positive sides
    """
    sizes, goal = windows[:, 2:] - windows[:, :2], truth[:, 2:] - truth[:, :2]
    shift = (truth[:, :2] + goal / 2 - windows[:, :2] - sizes / 2) / sizes
    return np.concatenate([shift, np.log(goal / sizes)], axis=1).astype(np.float32)


def decode_deltas(windows: Any, deltas: Any) -> Any:
    """Apply (..., 4) deltas to (..., 4) windows that broadcast with them; the inverse of `encode_deltas`.

    Both are float32 arrays, or tensors on one device; so is the result. Scale deltas are limited to a factor
    of 16 so that a wild prediction cannot overflow.
    """
    xp = array_namespace(windows, deltas)
    sizes = windows[..., 2:] - windows[..., :2]
    centres = windows[..., :2] + sizes / 2 + deltas[..., :2] * sizes
    half = sizes * xp.exp(deltas[..., 2:].clip(-math.log(16), math.log(16))) / 2
    return xp.concat([centres - half, centres + half], axis=-1)


@dataclass(frozen=True)
class BoxRegression:
    """The box regressions of K classes: linear predictions of the deltas of a window from its vector.

    Attributes
    ----------
    weights : (K, 4, D) float32
        What a vector is multiplied with, for each delta of each class.
    offsets : (K, 4) float32
        What is added.
    """

    weights: npt.NDArray[np.float32]
    offsets: npt.NDArray[np.float32]

    def __call__(self, vectors: Any) -> Any:
        """Return the (R, K, 4) deltas of (R, D) float32 vectors, an array or a tensor on any device."""
        layer = Linear(self.weights.reshape(-1, self.weights.shape[-1]), self.offsets.reshape(-1))
        return layer(vectors).reshape(-1, *self.offsets.shape)

    @cached_property
    def moves(self) -> npt.NDArray[np.bool_]:
        """Which classes move windows at all, (K,): none where the network's own stay as they are."""
        weights, offsets = self.weights.any(axis=(1, 2)), self.offsets.any(axis=1)
        return np.logical_or(weights, offsets)

    def moved(self, windows: Boxes, vectors: Any) -> Boxes:
        """Return the (R, K, 4) places to which the classes move (R, 4) windows with these vectors."""
        places = windows[:, None]
        moved = np.repeat(places, len(self.offsets), axis=1)
        if self.moves.any():
            decoded: Boxes = decode_deltas(places, to_numpy(self(vectors)))
            moved[:, self.moves] = decoded[:, self.moves]
        return moved

    def joined(self, other: BoxRegression) -> BoxRegression:
        """Return the regressions of these classes and, after them, of others."""
        return BoxRegression(
            np.concatenate([self.weights, other.weights]), np.concatenate([self.offsets, other.offsets])
        )


def fit_ridge(
    features: FloatArray, targets: FloatArray, penalty: float
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Fit the box regression of one class: ridge on centred, whitened targets (section 4.1, released code).

    The targets are turned by ``T = V diag((D + 0.001)^-1/2) V'`` of their covariance, so that one penalty
    fits all four; the constant feature is punished like the others, as in the released code.

    Parameters
    ----------
    features : (n, D) float array
        The last is the constant 1.
    targets : (n, 4) float array
    penalty : float
        lambda of the ridge.

    Returns
    -------
    (4, D - 1) float32, (4,) float32
        Weights and offsets that predict unwhitened targets.
    """
    return fit_ridges(features, targets, penalty, [np.ones(len(features), bool)])[0]


def fit_ridges(
    features: FloatArray, targets: FloatArray, penalty: float, parts: Sequence[npt.NDArray[np.bool_]]
) -> list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
    """Fit the box regression of one class, as `fit_ridge` does, to each of some parts of its examples.

    With fewer examples than features, their inner products are computed and inverted once for all parts.

    Parameters
    ----------
    features, targets, penalty
        See `fit_ridge`.
    parts : sequence of (n,) bool
        Which examples to learn from.
    """
    few = len(features) < features.shape[1]
    inverse = _inverse(features @ features.T, penalty) if few else None
    found = []
    for part in parts:
        if inverse is None:
            found.append(Moments.of(features[part], targets[part]).ridge(penalty))
            continue
        mean = targets[part].mean(axis=0)
        centred = targets[part] - mean
        whiten, unwhiten = _whitening(centred.T @ centred / len(centred))
        goal = np.zeros((len(features), targets.shape[1]), features.dtype)
        goal[part] = centred @ whiten
        weights = unwhiten.T @ (_dual(inverse, goal, part) @ features)
        found.append((weights[:, :-1].astype(np.float32), (weights[:, -1] + mean).astype(np.float32)))
    return found


@dataclass(frozen=True)
class Moments:
    """The sums that a ridge follows from, over any number of examples; those of two parts add up.

    Attributes
    ----------
    features : (D, D) float64
        Sum of the products of features with each other, of which the last is the constant 1.
    crossed : (D, 4) float64
        Sum of the products of features and targets.
    targets : (4, 4) float64
        Sum of the products of targets with each other.
    """

    features: npt.NDArray[np.float64]
    crossed: npt.NDArray[np.float64]
    targets: npt.NDArray[np.float64]

    @classmethod
    def of(cls, features: FloatArray, targets: FloatArray) -> Moments:
        """Return the moments of (n, D) features, the last of them 1, and their (n, 4) targets."""
        length, width = features.shape[1], targets.shape[1]
        sums = cls(np.zeros((length, length)), np.zeros((length, width)), np.zeros((width, width)))
        # Part by part, as double precision takes twice the memory.
        for start in range(0, len(features), _AT_ONCE):
            x = features[start : start + _AT_ONCE].astype(np.float64)
            y = targets[start : start + _AT_ONCE].astype(np.float64)
            sums = sums + cls(x.T @ x, x.T @ y, y.T @ y)
        return sums

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of both parts together."""
        return Moments(*(a + b for a, b in zip(self._sums, other._sums, strict=True)))

    def __sub__(self, other: Moments) -> Moments:
        """Return the moments without those of a part."""
        return Moments(*(a - b for a, b in zip(self._sums, other._sums, strict=True)))

    @property
    def _sums(self) -> tuple[npt.NDArray[np.float64], ...]:
        return self.features, self.crossed, self.targets

    def ridge(self, penalty: float) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Fit the box regression of one class; see `fit_ridge`."""
        from scipy.linalg import solve

        count, mean = self.features[-1, -1], self.crossed[-1] / self.features[-1, -1]
        whiten, unwhiten = _whitening(self.targets / count - np.outer(mean, mean))
        matrix = self.features.copy()
        matrix.flat[:: len(matrix) + 1] += penalty
        goal = (self.crossed - np.outer(self.features[-1], mean)) @ whiten
        solved = solve(matrix, goal, assume_a="pos", overwrite_a=True, check_finite=False)
        weights = unwhiten.T @ solved.T
        return weights[:, :-1].astype(np.float32), (weights[:, -1] + mean).astype(np.float32)


def _whitening(covariance: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return what turns centred targets so that one penalty fits all, and what turns predictions back."""
    values, vectors = np.linalg.eigh(covariance)
    # Of targets that are all the same, rounding leaves less than 0.
    root = np.sqrt(np.maximum(values, 0) + 1e-3)
    return (vectors * (1 / root)) @ vectors.T, (vectors * root) @ vectors.T


def _inverse(products: FloatArray, penalty: float) -> FloatArray:
    """Return the inverse of inner products with the penalty on their diagonal, overwriting them."""
    from scipy.linalg import cho_factor, get_lapack_funcs

    products.flat[:: len(products) + 1] += penalty
    factor, _ = cho_factor(products, lower=True, overwrite_a=True, check_finite=False)
    (invert,) = get_lapack_funcs(("potri",), (factor,))
    triangle: FloatArray = np.tril(invert(factor, lower=True, overwrite_c=True)[0])
    return triangle + np.tril(triangle, -1).T


def _dual(inverse: FloatArray, goal: FloatArray, part: npt.NDArray[np.bool_]) -> FloatArray:
    """Return the (4, n) dual weights of a ridge on some examples, and 0 for the others.

    By the inverse of a matrix in four blocks, from that of all examples: only the block of those left out
    needs to be solved for.
    """
    from scipy.linalg import solve

    solved: FloatArray = inverse @ goal
    out = ~part
    if out.any():
        block = inverse[np.ix_(out, out)]
        solved -= inverse[:, out] @ solve(block, solved[out], assume_a="pos", check_finite=False)
        solved[out] = 0
    return solved.T
