"""Models as ONNX files, for any runtime and for images of any size.

All take the pixels of an image as they are, and return what the model says of it: resizing as OpenCV does it,
standardising, padding and, for a detector, candidate windows and suppression are in the graph. Writing a file
takes the backbone's own graph and adds the other nodes; PyTorch has no part in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sppnet.classification.scorer import Scorer
from sppnet.classification.views import WHOLE, side_of
from sppnet.errors import SppnetError
from sppnet.features.backbone import Backbone
from sppnet.onnx.file import write_graph
from sppnet.onnx.nodes import Nodes, Value
from sppnet.onnx.pooling import pool_maps
from sppnet.onnx.preparation import PixelRules, prepare
from sppnet.onnx.proposing import from_grid, from_maps
from sppnet.onnx.pyramid import own_windows
from sppnet.onnx.scoring import calibrate, score
from sppnet.onnx.suppression import suppress
from sppnet.onnx.windows import encode
from sppnet.pooling.bins import LEVELS, valid_levels
from sppnet.proposals.dense import DenseWindows
from sppnet.storage import check_suffix, check_writable

if TYPE_CHECKING:
    from sppnet.classification.classifier import Classifier
    from sppnet.detection.detector import Detector

# Outputs by name, each with its shape.
Outputs = Mapping[str, tuple[Value, Sequence[int | str]]]


def export_model(
    model: Detector | Classifier | Backbone,
    path: str | Path,
    *,
    threshold: float | None = None,
    scale: int = 224,
    levels: Sequence[int] = LEVELS,
) -> str:
    """Write a model to an ONNX file, whatever its kind.

    Parameters
    ----------
    model : Detector, Classifier or Backbone
        See `export_detector`, `export_classifier` and `export_features`.
    path : path
        The file to write, which ends in ``.onnx``; replaced if it exists, as a whole or not at all.
    threshold : float, optional
        For a detector: least probability of a detection; by default that of each class.
    scale : int
        For a backbone: shorter side in pixels to which the graph resizes the image.
    levels : sequence of int
        For a backbone: the pyramid over its maps.

    Returns
    -------
    str
        What the file takes and gives, such as ``"image -> probabilities of 10 classes"``.

    Raises
    ------
    SppnetError
        If the model is of another kind or not fitted, `path` does not end in ``.onnx``, or as in the function
        of its kind.
    OSError
        If the file cannot be written.
    """
    if isinstance(model, Backbone):
        export_features(model, path, scale=scale, levels=levels)
        return f"image -> features of {model.name}"
    # What was learned tells the kind: a question is no reason to import the doors of all of them.
    fitted: Any = model
    if hasattr(model, "scorer_"):
        export_classifier(fitted, path)
        return f"image -> probabilities of {len(fitted.classes_)} classes"
    if hasattr(model, "fitted_"):
        export_detector(fitted, path, threshold=threshold)
        return f"image -> boxes, scores and labels of {', '.join(fitted.classes_)}; {_windows(fitted)}"
    kind = type(model).__name__
    raise SppnetError(f"found {kind}, expected a fitted Detector, a fitted Classifier, or a Backbone")


def export_features(
    backbone: Backbone,
    path: str | Path,
    *,
    scale: int = 224,
    levels: Sequence[int] = LEVELS,
) -> None:
    """Write a backbone with a pyramid over its maps to an ONNX file: an image becomes a vector.

    The file takes ``image``, (H, W, 3) uint8 RGB, and returns ``features``, (D,) float32: the maps of
    ``backbone(image, scale)``, pooled by `sppnet.pooling.spatial_pyramid` stage by stage. Its metadata are
    JSON: ``backbone``, its signature, ``licence`` and ``source`` of its weights, ``scales``, a list of the
    one scale, and ``levels``.

    Parameters
    ----------
    backbone : Backbone
        Where the maps come from.
    path : path
        The file to write, which ends in ``.onnx``; replaced if it exists, as a whole or not at all.
    scale : int
        Shorter side in pixels to which the graph resizes the image.
    levels : sequence of int
        The pyramid: level n cuts the maps into n x n bins.

    Raises
    ------
    SppnetError
        If `path` does not end in ``.onnx``, or the levels are none.
    OSError
        If the file cannot be written.
    """
    pyramid = valid_levels(levels)

    def build(op: Nodes, image: Value) -> Outputs:
        encoded = encode(op, image, backbone, (scale,))
        pairs = zip(encoded.scales[0], encoded.channels, strict=True)
        vectors = [pool_maps(op, m, pyramid, "max", channels) for m, channels in pairs]
        return {"features": (op.Squeeze(op.Concat(*vectors, axis=1), [0]), ["length"])}

    _export(path, backbone, build, {"scales": [scale], "levels": pyramid})


def export_detector(
    detector: Detector,
    path: str | Path,
    *,
    threshold: float | None = None,
) -> None:
    """Write a detector to an ONNX file: an image becomes detections.

    The file takes ``image``, (H, W, 3) uint8 RGB, and returns by falling score ``boxes``, (D, 4) float32 in
    pixels of that image, ``scores``, (D,) float32 probabilities, and ``labels``, (D,) int64, places in the
    list of classes: what `Detector.predict` finds. Candidate windows are those that the detector has learned
    to propose from its maps; where it has not learned that, they are those of
    `sppnet.proposals.DenseWindows`, a grid, and not the detector's own, which come from the pixels by methods
    that no graph holds.

    The metadata are JSON: ``classes``, the K names, ``windows``, where they come from, ``thresholds``, one
    for each class, ``limit`` and ``nms_iou``, ``backbone``, its signature, ``licence`` and ``source`` of its
    weights, and the fields of `sppnet.features.windows.WindowPooling`.

    Parameters
    ----------
    detector : Detector
        A fitted one.
    path : path
        The file to write, which ends in ``.onnx``; replaced if it exists, as a whole or not at all.
    threshold : float, optional
        Least probability of a detection, fixed in the graph; by default that of each class, as in
        `Detector.predict`.

    Raises
    ------
    NotFittedError
        If the detector is not fitted.
    SppnetError
        If `path` does not end in ``.onnx``, or the detector moves windows several times.
    OSError
        If the file cannot be written.
    """
    classes, fitted = detector.classes_, detector.fitted_
    if detector.moves > 1 and fitted.regression.moves.any():
        raise SppnetError(
            f"found a detector that moves windows {detector.moves} times, expected one that moves them once, "
            "as a graph does: set its moves to 1"
        )
    objectness, grid = fitted.objectness, DenseWindows()
    chosen = detector.thresholds_ if threshold is None else threshold
    least = np.broadcast_to(np.float32(chosen), len(classes)).copy()

    def build(op: Nodes, image: Value) -> Outputs:
        encoded = encode(op, image, fitted.backbone, detector.pooling.scales)
        told = None
        if fitted.side is not None:
            windows, told = own_windows(op, encoded)
        elif objectness is not None:
            windows = from_maps(op, objectness, encoded)
        else:
            windows = from_grid(op, grid, encoded.size)
        scored = score(op, detector, encoded, windows, told)
        left = suppress(op, *scored, detector.suppression, fitted.least_score, detector.limit)
        found = calibrate(op, left, fitted.calibration, least)
        count = "detections"
        return {"boxes": (found[0], [count, 4]), "scores": (found[1], [count]), "labels": (found[2], [count])}

    facts = {"classes": classes, "windows": _windows(detector), "thresholds": least.tolist()}
    facts |= {"limit": detector.limit, "nms_iou": detector.suppression, **asdict(detector.pooling)}
    _export(path, fitted.backbone, build, facts)


def _windows(detector: Detector) -> str:
    """Say where the candidate windows of a fitted detector come from in its graph."""
    if detector.fitted_.side is not None:
        return "windows from the network itself"
    if detector.fitted_.objectness is not None:
        return "windows from its maps"
    other = "" if detector.proposals == "dense" else f", not by {detector.proposals}, which no graph holds"
    return f"windows from a grid{other}"


def export_classifier(classifier: Classifier, path: str | Path) -> None:
    """Write a classifier with a pyramid to an ONNX file: an image becomes class probabilities.

    The file takes ``image``, (H, W, 3) uint8 RGB, and returns ``probabilities``, (K,) float32, of the whole
    image: those of `sppnet.classification.views.probabilities` with the views ``"full"``. Its metadata are
    JSON: ``classes``, the K names, ``side``, to which the shorter side is resized, ``backbone``, its
    signature, and ``licence`` and ``source`` of its weights.

    Parameters
    ----------
    classifier : Classifier
        A fitted one, whose network has a pyramid.
    path : path
        The file to write, which ends in ``.onnx``; replaced if it exists, as a whole or not at all.

    Raises
    ------
    SppnetError
        If the network has no pyramid, or `path` does not end in ``.onnx``.
    OSError
        If the file cannot be written.
    """
    scorer = classifier.scorer_
    levels, mode, backbone = scorer.settings.levels, scorer.settings.mode, scorer.backbone
    if levels is None:
        raise SppnetError("the network has no pyramid and takes one size only, expected one with a pyramid")
    side, rules = side_of(scorer, WHOLE), PixelRules.of(backbone)._replace(multiple=1)

    def build(op: Nodes, image: Value) -> Outputs:
        (pixels,) = prepare(op, image, rules, (side,)).images
        (maps,) = op.network(backbone.model, pixels)
        vectors = pool_maps(op, maps, levels, mode, backbone.channels[0])
        shares = op.Softmax(_head(op, scorer, vectors), axis=1)
        return {"probabilities": (op.Squeeze(shares, [0]), [len(classifier.classes_)])}

    _export(path, backbone, build, {"classes": classifier.classes_, "side": side})


def _head(op: Nodes, scorer: Scorer, vectors: Value) -> Value:
    """Return the (N, K) scores of (N, D) pooled vectors; see `Scorer.head`."""
    if scorer.settings.norm is not None:
        vectors = vectors * scorer.settings.norm / op.ReduceL2(vectors, [1]).clip(min=1e-12)
    for layer in scorer.layers[:-1]:
        vectors = layer(vectors).clip(min=0)
    scores: Value = scorer.layers[-1](vectors)
    return scores


def _export(
    path: str | Path,
    backbone: Backbone,
    build: Callable[[Nodes, Value], Outputs],
    facts: Mapping[str, Any],
) -> None:
    """Write the graph of what `build` adds to an image, on a backbone."""
    check_suffix(path, ".onnx")
    check_writable(path)
    about = backbone.graph.facts
    origin = {"backbone": backbone.signature, "licence": about.licence, "source": about.source}
    op = Nodes(backbone.graph.model.opset_import[0].version)
    outputs = build(op, op.input("image", np.uint8, ["height", "width", 3]))
    metadata = {name: json.dumps(value) for name, value in {**facts, **origin}.items()}
    write_graph(op.model(outputs), path, metadata)
