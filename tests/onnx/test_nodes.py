import numpy as np
import pytest

import onnx
from graphs import opened, run, written
from onnx import TensorProto, helper, numpy_helper
from sppnet.features.geometry import Geometry
from sppnet.features.projection import choose_scale, project_onto
from sppnet.linear import Linear
from sppnet.onnx.nodes import Nodes
from sppnet.regression import decode_deltas

EXPRESSIONS = {
    "arithmetic": lambda x: (1.5 - x) * 2 + x / 4 - (3 - x) * x + 1 / (x + 100),
    "power": lambda x: x**3,
    "array first": lambda x: np.float32([[1], [2], [3], [4]])[:, :, None] * x + np.float32(1),
    "product": lambda x: x @ np.arange(10, dtype=np.float32).reshape(5, 2),
    "row": lambda x: x[1],
    "column": lambda x: x[:, 2],
    "last": lambda x: x[..., 3],
    "slices": lambda x: x[1:3, :2],
    "inner": lambda x: x[:-1, 1:, 2],
    "ends": lambda x: x[..., 1:, 2:],
    "end": lambda x: x[-1, 0],
    "new axes": lambda x: x[None, 0, :, None],
    "new axis before": lambda x: x[:, None],
    "shape": lambda x: x.reshape(-1, 2, 5),
    "clip": lambda x: x.clip(-1, 1) + x.clip(min=0) + x.clip(max=0.5),
    "less": lambda x: x < 0,
    "greater": lambda x: x > 0.25,
    "at least": lambda x: x >= x[:, :1],
    "equal": lambda x: x == x[:, 1:2],
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_values_compute_what_arrays_do(name):
    array = np.random.default_rng(0).standard_normal((4, 3, 5)).astype(np.float32)
    op = Nodes()
    found = run(written(op, EXPRESSIONS[name](op.input("x", np.float32, ["a", "b", "c"]))), array)
    expected = EXPRESSIONS[name](array)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_types_of_values():
    op = Nodes()
    x = op.input("x", np.float64, ["a"])
    assert (x.cast(np.int64) + 1).dtype == np.int64
    assert (x > 0).dtype == np.bool_
    assert op.Where(x > 0, x, 0.0).dtype == np.float64
    assert [v.dtype for v in op.TopK(x, [1], outputs=2)] == [np.float64, np.int64]
    assert op.Shape(x).dtype == np.int64
    assert op.Gather(op.Shape(x), 0).dtype == np.int64
    with pytest.raises(AttributeError):
        op.lower  # noqa: B018


def random_boxes(count):
    ends = np.random.default_rng(0).random((2, count, 2)) * [640, 480]
    return np.concatenate([ends.min(axis=0), ends.max(axis=0) + 1], axis=1).astype(np.float32)


@pytest.mark.parametrize("rule", ["released", "paper"])
def test_rules_on_arrays_write_themselves_into_graphs(rule):
    boxes = random_boxes(2000)
    sides, factors = np.array([240.0, 336, 240]), np.array([[0.5, 0.5], [0.7, 0.71], [0.5, 0.5]])
    geometry, layer = Geometry(16, 7.5), Linear(np.eye(4, dtype=np.float32)[:3], np.float32([1, 2, 3]))

    def rules(boxes, shorter, sides, factors):
        scale = choose_scale(boxes, shorter, sides, 208, rule)
        cells = project_onto(boxes, factors[scale], factors[scale] * 40, geometry, rule)
        return scale, cells, decode_deltas(boxes[:, None], boxes[:, None] / 640), layer(boxes)

    op = Nodes()
    values = [op.input("boxes", np.float32, ["r", 4]), op.input("shorter", np.float64, [])]
    values += [op.input("sides", np.float64, ["s"]), op.input("factors", np.float64, ["s", 2])]
    given = boxes, np.float64(480), sides, factors
    found = run(written(op, *rules(*values)), *given)
    expected = rules(*given)
    assert len(np.unique(expected[0])) == 2
    for exact in (0, 1):
        assert found[exact].dtype == np.int64
        assert np.array_equal(found[exact], expected[exact])
    for close in (2, 3):
        np.testing.assert_allclose(found[close], expected[close], rtol=1e-5, atol=1e-3)


def weights_of(model):
    return {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}


def test_weights_are_kept_once_and_in_half_precision_where_that_loses_nothing():
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((64, 32)).astype(np.float16).astype(np.float32)
    inexact, few, large = exact * np.float32(1 + 1e-6), exact[:2], exact * np.float32(1e6)
    op = Nodes()
    x = op.input("x", np.float32, ["n", 64])
    layers = [x @ w for w in (exact, exact.copy(), inexact, large)]
    model = op.model({f"y{i}": (y, None) for i, y in enumerate([*layers, x[:, :32] @ few.T])})
    stored = {(v.dtype.name, v.shape) for v in weights_of(model).values()}
    assert stored >= {("float16", (64, 32)), ("float32", (64, 32)), ("float32", (32, 2))}
    kinds = [v.dtype.name for v in weights_of(model).values() if v.shape == (64, 32)]
    assert kinds == ["float16", "float32", "float32"]
    points = rng.standard_normal((3, 64)).astype(np.float32)
    for found, w in zip(run(opened(model), points), (exact, exact, inexact, large), strict=False):
        np.testing.assert_allclose(found, points @ w, rtol=1e-4, atol=1e-4 * np.abs(w).max())


def small_network():
    """Return a model of y = Relu(x * w) + c: w in half precision, c from a node, and a node for nothing."""
    nodes = [
        helper.make_node("Cast", ["w"], ["w.single"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "w.single"], ["inner"], "mul"),
        helper.make_node("Relu", ["inner"], ["relu"], "relu"),
        helper.make_node("Constant", [], ["c"], "constant", value_float=2.0),
        helper.make_node("Add", ["relu", "c"], ["y"], "add"),
        helper.make_node("Exp", ["y"], ["unused"], "exp"),
    ]
    kind = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "small",
        [kind("x", TensorProto.FLOAT, ["n"])],
        [kind("y", TensorProto.FLOAT, ["n"])],
        [numpy_helper.from_array(np.float16([3]), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


def test_a_network_is_called_often_and_its_weights_are_there_once():
    op, network = Nodes(), small_network()
    before = network.SerializeToString()
    x = op.input("x", np.float32, ["n"])
    (once,) = op.network(network, x)
    (twice,) = op.network(network, once)
    model = op.model({"y": (twice, ["n"])})
    onnx.checker.check_model(model, full_check=True)
    assert network.SerializeToString() == before
    assert [len(weights_of(model)), len(op.model({"y": (once, ["n"])}).graph.initializer)] == [1, 1]
    kinds = [node.op_type for node in model.graph.node]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        **{"Cast": 1, "Constant": 1, "Mul": 2, "Relu": 2, "Add": 2, "Identity": 1}
    }, "what depends on weights alone once, what no output needs not at all"
    expected = np.maximum((np.maximum(np.float32([-1, 2]) * 3, 0) + 2) * 3, 0) + 2
    assert run(opened(model), np.float32([-1, 2])).tolist() == expected.tolist()
