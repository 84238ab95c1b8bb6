"""The compiled loop of the linear SVMs: dual coordinate descent for the hinge loss, with shrinking.

Features come as the bits of half-precision floats, which take half the memory of single precision; what is
left to read per example is what the time goes into, too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types

from sppnet.compiling import compiled, record

# Bits of a half, moved to where single precision keeps them, are 2^112 times too small: the exponents' bias.
_REBIAS = np.float32(2.0**112)
_FAST = {"reassoc", "contract", "arcp", "nsz"}


class ClassExamples(NamedTuple):
    """The examples of one SVM.

    Attributes
    ----------
    features : (m, D) uint16
        Bits of half-precision floats, all finite.
    rows : (n,) int64
        The examples' rows in `features`.
    signs : (n,) float32
        1 for a positive, -1 for a negative.
    limits : (n,) float32
        Upper bounds of the dual variables: C times the weight of the example.
    constant : float32
        Value of the constant feature, whose weight is the bias.
    """

    features: Any
    rows: Any
    signs: Any
    limits: Any
    constant: Any


class Solution(NamedTuple):
    """Where one SVM stands; its arrays are improved in place.

    Attributes
    ----------
    alphas : (n,) float32
        Dual variables, between 0 and their bounds.
    weights, bias : (D,) and (1,) float32
        The primal solution that belongs to `alphas`.
    """

    alphas: Any
    weights: Any
    bias: Any


_FLOATS: Any = types.float32[::1]
_EXAMPLES = record(ClassExamples, types.uint16[:, ::1], types.int64[::1], _FLOATS, _FLOATS, types.float32)
_SOLUTION = record(Solution, _FLOATS, _FLOATS, _FLOATS)


@compiled("f4(u2)")
def _single(half: Any) -> Any:
    """Return the number that the 16 bits of a finite half-precision float stand for."""
    bits = np.uint32(half)
    moved = ((bits & np.uint32(0x8000)) << np.uint32(16)) | ((bits & np.uint32(0x7FFF)) << np.uint32(13))
    return np.uint32(moved).view(np.float32) * _REBIAS


@compiled(types.float32[::1](_EXAMPLES), fastmath=_FAST)
def _norms(examples: Any) -> Any:
    """Return the squared norm of each example, its constant feature included."""
    norms = np.empty(len(examples.rows), np.float32)
    for i in range(len(norms)):
        x = examples.features[examples.rows[i]]
        norms[i] = examples.constant * examples.constant
        for j in range(len(x)):
            norms[i] += _single(x[j]) * _single(x[j])
    return norms


@compiled("u8(i8[::1], u8)")
def _shuffle(order: Any, state: Any) -> Any:
    """Shuffle in place and return the next state of the random numbers."""
    for last in range(len(order) - 1, 0, -1):
        state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
        other = np.int64((state >> np.uint64(33)) % np.uint64(last + 1))
        order[last], order[other] = order[other], order[last]
    return state


@compiled(
    types.void(_EXAMPLES, _SOLUTION, types.float32, types.int64),
    fastmath=_FAST,
)
def descend(examples: Any, solution: Any, tolerance: Any, epochs: Any) -> None:
    """Improve the dual variables and weights of one SVM in place (Hsieh et al. 2008, algorithm 3).

    Parameters
    ----------
    examples : ClassExamples
    solution : Solution
        Where to start from, and afterwards the solution.
    tolerance : float32
        Largest spread of the projected gradients at the end.
    epochs : int
        Most rounds over the examples.
    """
    features, rows, signs, limits, constant = examples
    alphas, weights, bias = solution
    length, norms = features.shape[1], _norms(examples)
    order, active = np.arange(len(rows)), len(rows)
    shrink_high, shrink_low = np.float32(np.inf), np.float32(-np.inf)
    state = np.uint64(1)
    for _ in range(epochs):
        high, low = np.float32(-np.inf), np.float32(np.inf)
        state = _shuffle(order[:active], state)
        s = 0
        while s < active:
            i = order[s]
            x = features[rows[i]]
            score = bias[0] * constant
            for j in range(length):
                score += weights[j] * _single(x[j])
            gradient = signs[i] * score - np.float32(1)
            projected = gradient
            if alphas[i] == 0:
                if gradient > shrink_high:
                    active -= 1
                    order[s], order[active] = order[active], order[s]
                    continue
                projected = min(gradient, np.float32(0))
            elif alphas[i] == limits[i]:
                if gradient < shrink_low:
                    active -= 1
                    order[s], order[active] = order[active], order[s]
                    continue
                projected = max(gradient, np.float32(0))
            high, low = max(high, projected), min(low, projected)
            if abs(projected) > 1e-7:
                new = min(max(alphas[i] - gradient / norms[i], np.float32(0)), limits[i])
                step = (new - alphas[i]) * signs[i]
                alphas[i] = new
                for j in range(length):
                    weights[j] += step * _single(x[j])
                bias[0] += step * constant
            s += 1
        if high - low <= tolerance:
            if active == len(rows):
                return
            # Look at everything once more before stopping.
            active, shrink_high, shrink_low = len(rows), np.float32(np.inf), np.float32(-np.inf)
            continue
        shrink_high = high if high > 0 else np.float32(np.inf)
        shrink_low = low if low < 0 else np.float32(-np.inf)
