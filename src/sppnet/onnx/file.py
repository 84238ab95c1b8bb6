"""From a graph to a file."""

from __future__ import annotations

from pathlib import Path

import onnx
from sppnet.storage import atomic_path


def write_graph(model: onnx.ModelProto, path: str | Path, metadata: dict[str, str]) -> None:
    """Check an ONNX model and write it, with texts about it; the file appears whole or not at all."""
    from sppnet import __version__

    onnx.helper.set_model_props(model, {"sppnet": __version__, **metadata})
    onnx.checker.check_model(model, full_check=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
