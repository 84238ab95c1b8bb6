"""Those functions of the array API that rules on arrays call, for values of a graph that is being written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from sppnet.onnx.nodes import Value

float64, int64, inf = np.float64, np.int64, np.inf


def astype(x: Value, dtype: npt.DTypeLike) -> Value:
    """Return the numbers as a type."""
    return x.cast(dtype)


def asarray(x: Value, dtype: npt.DTypeLike) -> Value:
    """Return the numbers as a type."""
    return x.cast(dtype)


def abs(x: Value) -> Value:
    """Return the absolute values."""
    return x.nodes.node("Abs", x)


def ceil(x: Value) -> Value:
    """Round up."""
    return x.nodes.node("Ceil", x)


def floor(x: Value) -> Value:
    """Round down."""
    return x.nodes.node("Floor", x)


def exp(x: Value) -> Value:
    """Return the exponentials."""
    return x.nodes.node("Exp", x)


def sqrt(x: Value) -> Value:
    """Return the square roots."""
    return x.nodes.node("Sqrt", x)


def min(x: Value, *, axis: int, keepdims: bool = False) -> Value:
    """Return the least along an axis."""
    return x.nodes.node("ReduceMin", x, [axis], keepdims=int(keepdims))


def argmin(x: Value, *, axis: int) -> Value:
    """Return the first place of the least along an axis."""
    return x.nodes.node("ArgMin", x, axis=axis, keepdims=0)


def where(condition: Value, x: Any, y: Any) -> Value:
    """Return `x` where the condition holds, else `y`; one of the two may be a number."""
    dtype = x.dtype if hasattr(x, "nodes") else y.dtype
    op = condition.nodes
    return op.node("Where", condition, op.value(x, dtype), op.value(y, dtype))


def concat(values: Sequence[Value], *, axis: int) -> Value:
    """Join values along an axis."""
    return values[0].nodes.node("Concat", *values, axis=axis)


def minimum(x: Value, y: Any) -> Value:
    """Return the lesser of each two."""
    return x.clip(max=y)


def maximum(x: Value, y: Any) -> Value:
    """Return the greater of each two."""
    return x.clip(min=y)


def ones_like(x: Value) -> Any:
    """Return a 1 of the type of a value; it broadcasts as all of them would."""
    return x.dtype.type(1)


def zeros_like(x: Value) -> Any:
    """Return a 0 of the type of a value; it broadcasts as all of them would."""
    return x.dtype.type(0)
