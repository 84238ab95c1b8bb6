"""ONNX graphs run by ONNX Runtime; whoever imports this is skipped where it is missing."""

import numpy as np
import pytest

import onnx

runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime to run what was exported")


def opened(graph):
    """Return a session of one thread for a file or a model, and check what it says of its operators."""
    model = graph if isinstance(graph, onnx.ModelProto) else onnx.load(graph, load_external_data=False)
    assert {o.domain for o in model.opset_import} == {""}
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def written(op, *values):
    """Return a session of a graph that returns values of any shape."""
    outputs = {f"result_{i}": (value, None) for i, value in enumerate(values)}
    return opened(op.model(outputs))


def run(session, *values):
    """Return what a session makes of values: an array, or a list of several."""
    names = [i.name for i in session.get_inputs()]
    found = session.run(None, dict(zip(names, map(np.asarray, values), strict=True)))
    return found[0] if len(found) == 1 else found
