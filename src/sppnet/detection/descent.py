"""The compiled loop of the linear SVMs: dual coordinate descent for the hinge loss, with shrinking.

Features come as the bits of half-precision floats, which take half the memory of single precision; what is
left to read per example is what the time goes into, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from sppnet.compiling import compiled, inlined

_SIGNATURE = "void(u2[:, ::1], i8[::1], f4[::1], f4[::1], f4[::1], f4[::1], f4[:], f4, f4, i8)"
# Bits of a half, moved to where single precision keeps them, are 2^112 times too small: the exponents' bias.
_REBIAS = np.float32(2.0**112)


@inlined
def _float(_: Any, bits: Any) -> Any:
    """Take 32 bits for a float."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@compiled("f4(u2)")
def _single(half: Any) -> Any:
    """Return the number that the 16 bits of a finite half-precision float stand for."""
    bits = np.uint32(half)
    moved = ((bits & np.uint32(0x8000)) << np.uint32(16)) | ((bits & np.uint32(0x7FFF)) << np.uint32(13))
    return _float(moved) * _REBIAS


@compiled(_SIGNATURE, fastmath={"reassoc", "contract", "arcp", "nsz"})
def descend(
    features: Any,
    rows: Any,
    signs: Any,
    limits: Any,
    alphas: Any,
    weights: Any,
    bias: Any,
    constant: Any,
    tolerance: Any,
    epochs: Any,
) -> None:
    """Improve the dual variables and weights of one SVM in place (Hsieh et al. 2008, algorithm 3).

    Parameters
    ----------
    features : (m, D) uint16
        Bits of half-precision floats, all finite.
    rows : (n,) int64
        The examples' rows in `features`.
    signs : (n,) float32
        1 or -1.
    limits : (n,) float32
        Upper bounds of the dual variables: C times the weight of the example.
    alphas : (n,) float32
        Dual variables, between 0 and their bounds.
    weights, bias : (D,) and (1,) float32
        The primal solution that belongs to `alphas`; the bias is the weight of the constant feature.
    constant : float32
        Value of the constant feature.
    tolerance : float32
        Largest spread of the projected gradients at the end.
    epochs : int
        Most rounds.
    """
    n, length = len(rows), features.shape[1]
    order, active = np.arange(n), n
    norms = np.empty(n, np.float32)
    for i in range(n):
        x = features[rows[i]]
        norms[i] = constant * constant
        for j in range(length):
            norms[i] += _single(x[j]) * _single(x[j])
    shrink_high, shrink_low = np.float32(np.inf), np.float32(-np.inf)
    state = np.uint64(1)
    for _ in range(epochs):
        high, low = np.float32(-np.inf), np.float32(np.inf)
        for last in range(active - 1, 0, -1):
            state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
            other = np.int64((state >> np.uint64(33)) % np.uint64(last + 1))
            order[last], order[other] = order[other], order[last]
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
            if active == n:
                return
            # Look at everything once more before stopping.
            active, shrink_high, shrink_low = n, np.float32(np.inf), np.float32(-np.inf)
            continue
        shrink_high = high if high > 0 else np.float32(np.inf)
        shrink_low = low if low < 0 else np.float32(-np.inf)
