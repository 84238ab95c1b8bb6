"""ONNX files run by ONNX Runtime; whoever imports this is skipped where one of the packages is missing."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs the extra sppnet[onnx]")
pytest.importorskip("onnxscript", reason="needs the extra sppnet[onnx]")
runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime to run what was exported")


def opened(path):
    """Return a session of one thread, and check what the file says of its operators."""
    model = onnx.load(path, load_external_data=False)
    assert {o.domain for o in model.opset_import} == {""}
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(session, *values):
    """Return what a session makes of values: an array, or a list of several."""
    names = [i.name for i in session.get_inputs()]
    found = session.run(None, dict(zip(names, map(np.asarray, values), strict=True)))
    return found[0] if len(found) == 1 else found
