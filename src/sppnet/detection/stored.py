"""What was fitted, as the arrays of a detector's file, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sppnet.detection.calibration import Calibration
from sppnet.detection.file import Arrays, dequantise, quantise, read_tensors, with_prefix
from sppnet.detection.fit import Fitted
from sppnet.detection.head import Head
from sppnet.detection.quality import PERCENTS, Quality
from sppnet.detection.svm import LinearSVMs
from sppnet.errors import SppnetError
from sppnet.features.stored import backbone_of, backbone_state
from sppnet.features.windows import WindowPooling
from sppnet.proposals.maps import Objectness
from sppnet.regression import BoxRegression


def state_of(fitted: Fitted) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arrays of what was fitted, and the facts that go with them."""
    backbone, kept = backbone_state(fitted.backbone)
    tensors: dict[str, Any] = {
        **kept,
        **quantise("svms", fitted.svms.weights, fitted.svms.biases),
        **quantise("regression", fitted.regression.weights, fitted.regression.offsets),
        **{name: getattr(fitted, name) for name in ("photos", "objects", "thresholds", "history")},
        **{f"calibration.{name}": value for name, value in vars(fitted.calibration).items()},
        **{f"quality.{name}": value for name, value in vars(fitted.quality).items()},
    }
    if fitted.head is not None:
        tensors |= {f"head.{n}": value.astype(np.float16) for n, value in fitted.head.state().items()}
    if fitted.objectness is not None:
        tensors |= {f"objectness.{name}": value for name, value in fitted.objectness.state().items()}
    facts = {
        "classes": fitted.classes,
        "feature_scale": fitted.feature_scale,
        "side": fitted.side,
        "backbone": backbone,
    }
    return tensors, facts


def fitted_of(
    path: Path,
    facts: dict[str, Any],
    layer: str,
    objectness: Objectness | None,
    pooling: WindowPooling,
    device: str,
) -> Fitted:
    """Return what was fitted of a detector's file.

    Parameters
    ----------
    path : Path
    facts : dict
        What the file says of itself.
    layer : {"pool", "fc6", "fc7"}
        What the SVMs stand on.
    objectness : Objectness or None
        The settings of what proposes windows from maps, if there is one.
    pooling : WindowPooling
        How windows become vectors.
    device : str
        ``"cpu"``, or a PyTorch device.

    Raises
    ------
    SppnetError
        If something is missing, or does not fit the settings.
    """
    tensors = read_tensors(path)
    try:
        backbone = backbone_of(path, facts["backbone"], tensors, device)
    except (KeyError, TypeError) as error:
        raise SppnetError(f"{path}: damaged, found no {error} of the backbone") from None
    fitted = Fitted(
        tuple(facts["classes"]),
        backbone,
        _head(path, tensors, layer),
        _objectness(path, tensors, objectness),
        LinearSVMs(*dequantise("svms", tensors)),
        BoxRegression(*dequantise("regression", tensors)),
        facts["feature_scale"],
        tensors["photos"],
        tensors["objects"],
        Calibration(**with_prefix("calibration", tensors)),
        tensors["thresholds"],
        Quality(**with_prefix("quality", tensors)),
        facts["side"],
        tensors["history"],
    )
    _check_lengths(path, fitted, pooling)
    return fitted


def _head(path: Path, tensors: Arrays, layer: str) -> Head | None:
    if layer == "pool":
        return None
    try:
        return Head.from_state(with_prefix("head", tensors))
    except SppnetError as error:
        raise SppnetError(f"{path}: damaged, found no fully connected layers ({error})") from None


def _objectness(path: Path, tensors: Arrays, settings: Objectness | None) -> Objectness | None:
    if settings is None:
        return None
    try:
        return Objectness.from_state(with_prefix("objectness", tensors), settings.get_params(deep=False))
    except SppnetError as error:
        raise SppnetError(f"{path}: {error}") from None


def _check_lengths(path: Path, fitted: Fitted, pooling: WindowPooling) -> None:
    """Raise an error unless what was fitted takes the vectors of this backbone and pyramid."""
    pooled = pooling.length(fitted.backbone.channels)
    head, count = fitted.head, len(fitted.classes)
    taken = pooled if head is None else head.width
    found = {
        "SVMs": (fitted.svms.weights.shape, (count, taken)),
        "regressions": (fitted.regression.weights.shape, (count, 4, pooled)),
        "thresholds": (fitted.thresholds.shape, (count,)),
        "slopes": (fitted.calibration.slopes.shape, (count, 2)),
        "curves": (fitted.quality.curve.shape, (count, PERCENTS, 2)),
    }
    if head is not None:
        found["fully connected layers"] = (head.length,), (pooled,)
    for name, (shape, expected) in found.items():
        if tuple(shape) != expected:
            raise SppnetError(
                f"{path}: found {name} of shape {tuple(shape)}, expected {expected}: for "
                f"{count} classes on this backbone and pyramid"
            )
