"""What a detector makes of windows, as nodes of a graph: scores, moved boxes, and probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sppnet.onnx.pyramid import Told, with_told
from sppnet.onnx.windows import Encoded, pooled
from sppnet.regression import decode_deltas

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from sppnet.detection.calibration import Calibration
    from sppnet.detection.detector import Detector
    from sppnet.onnx.nodes import Nodes, Value


def score(
    op: Nodes, detector: Detector, encoded: Encoded, windows: Value, told: Told | None = None
) -> tuple[Value, Value]:
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
    told : Told, optional
        What the network itself says of the windows, if it proposes them.

    Returns
    -------
    (R, K, 4) float32 value
        Boxes, cut off at the borders of the image.
    (R, K) float32 value
        Scores of the SVMs.
    """
    fitted = detector.fitted_
    vectors: Any = pooled(op, encoded, windows, detector.pooling) * fitted.feature_scale
    layers = vectors if fitted.head is None else fitted.head.activations(vectors, detector.layer)
    moved: Value = decode_deltas(windows[:, None], fitted.regression(vectors))
    scores = fitted.svms(layers)
    if told is not None:
        kinds = fitted.backbone.graph.facts.kinds
        columns = [kinds.index(name) if name in kinds else -1 for name in fitted.classes]
        scores = with_told(op, scores, told, columns)
    return moved.clip(0.0, encoded.limits), scores


def calibrate(
    op: Nodes,
    found: tuple[Value, Value, Value],
    calibration: Calibration,
    thresholds: npt.NDArray[np.float32],
) -> tuple[Value, Value, Value]:
    """Turn scores into probabilities and drop what is unlikely; see `Calibration.applied`.

    Parameters
    ----------
    op : Nodes
        The graph.
    found : (D, 4) float32, (D,) float32 and (D,) int64 values
        Boxes, scores of the SVMs, and classes.
    calibration : Calibration
        Of the K classes.
    thresholds : (K,) float32
        Least probability of each.

    Returns
    -------
    (D, 4) float32, (D,) float32 and (D,) int64 values
        Boxes, probabilities and classes by falling probability.
    """
    boxes, scores, labels = found
    low, high = (op.Gather(slopes, labels) for slopes in calibration.slopes.T)
    away = scores - op.Gather(calibration.knots, labels)
    levels = op.Gather(calibration.levels, labels)
    chances = op.Sigmoid(levels + low * away.clip(max=0) + high * away.clip(min=0))
    kept = op.NonZero(chances >= op.Gather(thresholds, labels))[0]
    values = op.Gather(chances, kept)
    falling, order = op.TopK(values, op.Shape(values), outputs=2)
    places = op.Gather(kept, order)
    return op.Gather(boxes, places), falling, op.Gather(labels, places)
