"""What a detector makes of windows, as nodes of a graph: scores and moved boxes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sppnet.onnx.windows import Encoded, pooled
from sppnet.regression import decode_deltas

if TYPE_CHECKING:
    from sppnet.detection.detector import Detector
    from sppnet.onnx.nodes import Nodes, Value


def score(op: Nodes, detector: Detector, encoded: Encoded, windows: Value) -> tuple[Value, Value]:
    """Score windows for all classes and move them; see `Detector.score`.

    Parameters
    ----------
    op : Nodes
        The graph.
    detector : Detector
        A fitted one.
    encoded : Encoded
        The image.
    windows : (R, 4) float32 value

    Returns
    -------
    (R, K, 4) float32 value
        Boxes, cut off at the borders of the image.
    (R, K) float32 value
        Scores.
    """
    fitted = detector.fitted_
    vectors: Any = pooled(op, encoded, windows, detector.pooling) * fitted.feature_scale
    layers = vectors if fitted.head is None else fitted.head.activations(vectors, detector.layer)
    moved: Value = decode_deltas(windows[:, None], fitted.regression(vectors))
    return moved.clip(0.0, encoded.limits), fitted.svms(layers)
