"""A graph that is being written: calls and arithmetic add nodes to it instead of computing.

Values follow the array API as far as this package needs it, so that rules written once for arrays, such as
those of scales, projection and box deltas, write themselves into a graph, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from operator import mul
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

import onnx
from onnx import helper, numpy_helper
from sppnet.onnx import functions

# The results of operators that are not of the type of what they first take.
_INTEGERS = frozenset({"ArgMin", "NonMaxSuppression", "NonZero", "Shape"})
_BOOLEANS = frozenset({"And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or"})
# Arrays from this size on are kept in half precision where that loses nothing.
_LARGE = 1024


class Nodes:
    """The nodes of a graph: an attribute is an operator of ONNX, and a call of it adds a node.

    What a call takes are values of the graph, arrays, numbers (integers become int64, others the type of the
    first value) or lists of integers; attributes of the node go by name. What it returns are as many values
    as `outputs` says, one unless that is given.

    Parameters
    ----------
    opset : int
        Version of ONNX's operators.
    """

    def __init__(self, opset: int = 18) -> None:
        self.opset = opset
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._weights: dict[str, onnx.TensorProto] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Value] = {}
        # Values that depend on no input.
        self._fixed: set[str] = set()
        self._models = 0

    def __getattr__(self, operator: str) -> Callable[..., Any]:
        if not operator[:1].isupper():
            raise AttributeError(operator)
        return partial(self._add, operator)

    def node(self, operator: str, *given: Any, **attributes: Any) -> Value:
        """Add a node of an operator with one output, and return that."""
        result: Value = self._add(operator, *given, **attributes)
        return result

    def _add(self, operator: str, *given: Any, outputs: int = 1, **attributes: Any) -> Any:
        first = next((v.dtype for v in given if isinstance(v, Value)), np.dtype(np.int64))
        values = [self.value(v, None if _whole(v) else first) for v in given]
        names = [f"{operator}_{len(self._nodes)}_{i}" for i in range(outputs)]
        self._nodes.append(helper.make_node(operator, [v.name for v in values], names, **attributes))
        kinds = _kinds(operator, [v.dtype for v in values], attributes)
        results = [Value(self, name, kind) for name, kind in zip(names, kinds, strict=True)]
        return results[0] if outputs == 1 else results

    def input(self, name: str, kind: npt.DTypeLike, shape: Sequence[int | str]) -> Value:
        """Add an input; sizes that are words are free."""
        dtype = np.dtype(kind)
        tensor = helper.np_dtype_to_tensor_dtype(dtype)
        self._inputs.append(helper.make_tensor_value_info(name, tensor, shape))
        return Value(self, name, dtype)

    def value(self, given: Any, dtype: npt.DTypeLike | None = None) -> Value:
        """Return a value as it is, and what is none yet as a constant, equal ones once.

        Parameters
        ----------
        given : Value, array, number or list
            float32 arrays of many numbers that all have half precision are stored in it.
        dtype : dtype, optional
            Of a constant made of numbers; arrays keep their own.
        """
        if isinstance(given, Value):
            return given
        array = np.asarray(given, None if isinstance(given, np.ndarray | np.generic) else dtype)
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self._constants:
            self._constants[key] = self._store(array)
        return self._constants[key]

    def _store(self, array: npt.NDArray[Any]) -> Value:
        name = f"constant_{len(self._constants)}"
        self._fixed.add(name)
        if array.dtype == np.float32 and array.size >= _LARGE:
            with np.errstate(over="ignore"):
                half = array.astype(np.float16)
            if np.array_equal(half, array):
                self._weights[name] = numpy_helper.from_array(np.ascontiguousarray(half), name)
                return self.node("Cast", Value(self, name, half.dtype), to=onnx.TensorProto.FLOAT)
        # Not `np.ascontiguousarray` of all: it makes a row of a number.
        stored = np.ascontiguousarray(array) if array.ndim else array
        self._weights[name] = numpy_helper.from_array(stored, name)
        return Value(self, name, array.dtype)

    def network(self, model: onnx.ModelProto, *given: Value) -> list[Value]:
        """Add the nodes of a model of this version of operators, and return its outputs.

        However often that is done, its weights, and what is computed of them alone, are there once. A graph
        holds nodes of one model only.
        """
        self._models += 1
        names = {i.name: v.name for i, v in zip(model.graph.input, given, strict=True)}
        for tensor in model.graph.initializer:
            names[tensor.name] = f"network/{tensor.name}"
            if names[tensor.name] not in self._weights:
                copy = onnx.TensorProto()
                copy.CopyFrom(tensor)
                copy.name = names[tensor.name]
                self._weights[copy.name] = copy
                self._fixed.add(copy.name)
        for node in model.graph.node:
            copied = onnx.NodeProto()
            copied.CopyFrom(node)
            copied.input[:] = [names[name] if name else "" for name in node.input]
            fixed = all(name in self._fixed for name in copied.input if name)
            place = "network" if fixed else f"network_{self._models}"
            names |= {name: f"{place}/{name}" for name in node.output if name}
            copied.output[:] = [names[name] if name else "" for name in node.output]
            copied.name = f"{place}/{node.name}"
            if not fixed or copied.output[0] not in self._fixed:
                self._nodes.append(copied)
            if fixed:
                self._fixed |= set(copied.output)
        return [Value(self, names[output.name], np.dtype(np.float32)) for output in model.graph.output]

    def model(self, outputs: Mapping[str, tuple[Value, Sequence[int | str]]]) -> onnx.ModelProto:
        """Return the graph as a model, without what no output needs.

        Parameters
        ----------
        outputs : mapping of str to (Value, shape)
            The outputs by the names that they get; sizes that are words are free.
        """
        infos, needed, kept = [], set(), []
        for name, (value, shape) in outputs.items():
            kept.append(helper.make_node("Identity", [value.name], [name]))
            needed.add(value.name)
            kind = helper.np_dtype_to_tensor_dtype(value.dtype)
            infos.append(helper.make_tensor_value_info(name, kind, shape))
        for node in reversed(self._nodes):
            if needed & set(node.output):
                kept.append(node)
                needed |= set(node.input)
        weights = [tensor for name, tensor in self._weights.items() if name in needed]
        graph = helper.make_graph(kept[::-1], "sppnet", self._inputs, infos, weights)
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=helper.find_min_ir_version_for(opsets),
            producer_name="sppnet",
        )


class Value:
    """A tensor of a graph that is being written.

    Attributes
    ----------
    nodes : Nodes
        The graph.
    name : str
        Its name there.
    dtype : numpy.dtype
        The type of its numbers.
    """

    # NumPy leaves arithmetic of an array and a value to the value.
    __array_ufunc__ = None
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, nodes: Nodes, name: str, dtype: np.dtype[Any]) -> None:
        self.nodes, self.name, self.dtype = nodes, name, dtype

    def __array_namespace__(self, api_version: str | None = None) -> ModuleType:
        return functions

    def _with(self, operator: str, other: Any, *, swapped: bool = False) -> Value:
        pair = self, self.nodes.value(other, self.dtype)
        return self.nodes.node(operator, *(reversed(pair) if swapped else pair))

    def __add__(self, other: Any) -> Value:
        return self._with("Add", other)

    def __radd__(self, other: Any) -> Value:
        return self._with("Add", other, swapped=True)

    def __sub__(self, other: Any) -> Value:
        return self._with("Sub", other)

    def __rsub__(self, other: Any) -> Value:
        return self._with("Sub", other, swapped=True)

    def __mul__(self, other: Any) -> Value:
        return self._with("Mul", other)

    def __rmul__(self, other: Any) -> Value:
        return self._with("Mul", other, swapped=True)

    def __truediv__(self, other: Any) -> Value:
        return self._with("Div", other)

    def __rtruediv__(self, other: Any) -> Value:
        return self._with("Div", other, swapped=True)

    def __matmul__(self, other: Any) -> Value:
        return self._with("MatMul", other)

    def __pow__(self, power: int) -> Value:
        # Not ONNX's Pow, whose rounding runtimes choose.
        return reduce(mul, [self] * power)

    def __lt__(self, other: Any) -> Value:
        return self._with("Less", other)

    def __gt__(self, other: Any) -> Value:
        return self._with("Greater", other)

    def __ge__(self, other: Any) -> Value:
        return self._with("GreaterOrEqual", other)

    def __eq__(self, other: object) -> Value:  # type: ignore[override]
        return self._with("Equal", other)

    def __getitem__(self, key: Any) -> Value:
        """Return a part, as of an array: by integers, slices, None, or ... at the start."""
        parts = key if isinstance(key, tuple) else (key,)
        sized = [part for part in parts if part is not None and part is not ...]
        first = -len(sized) if parts[0] is ... else 0
        cut = [(first + i, p) for i, p in enumerate(sized) if isinstance(p, slice) and p != slice(None)]
        result = self
        if cut:
            starts = [p.start or 0 for _, p in cut]
            ends = [np.iinfo(np.int64).max if p.stop is None else p.stop for _, p in cut]
            result = self.nodes.node("Slice", self, starts, ends, [axis for axis, _ in cut])
        # From the last on, as each takes its axis away.
        for axis, part in reversed([(first + i, p) for i, p in enumerate(sized)]):
            if not isinstance(part, slice):
                result = self.nodes.node("Gather", result, part, axis=axis)
        left = [p for p in parts if p is None or isinstance(p, slice)]
        new = [i for i, p in enumerate(left) if p is None]
        return self.nodes.node("Unsqueeze", result, new) if new else result

    def reshape(self, *shape: int) -> Value:
        """Return the same numbers in another shape."""
        return self.nodes.node("Reshape", self, list(shape))

    def clip(self, min: Any = None, max: Any = None) -> Value:
        """Return the numbers, those below `min` and above `max` replaced by these."""
        low = self if min is None else self._with("Max", min)
        return low if max is None else low._with("Min", max)

    def cast(self, kind: npt.DTypeLike) -> Value:
        """Return the numbers as another type."""
        return self.nodes.node("Cast", self, to=helper.np_dtype_to_tensor_dtype(np.dtype(kind)))


def _kinds(
    operator: str, given: Sequence[np.dtype[Any]], attributes: Mapping[str, Any]
) -> list[np.dtype[Any]]:
    """Return the types of what an operator gives, of the types of what it takes."""
    if operator == "Cast":
        return [helper.tensor_dtype_to_np_dtype(attributes["to"])]
    if operator in _BOOLEANS:
        return [np.dtype(np.bool_)]
    # The only constants that are nodes are integers; arrays are weights.
    if operator in _INTEGERS or operator == "Constant":
        return [np.dtype(np.int64)]
    if operator == "TopK":
        return [given[0], np.dtype(np.int64)]
    return [given[1 if operator == "Where" else 0]]


def _whole(given: Any) -> bool:
    """Return whether something stands for integers whatever else an operator takes."""
    return isinstance(given, int | list)
