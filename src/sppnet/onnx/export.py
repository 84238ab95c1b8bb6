"""Networks and detectors as ONNX files, for any runtime and for images of any size.

Detectors, classifiers, and backbones with a pyramid take the pixels of an image as they are: resizing as
OpenCV does it, standardising and padding are in the graph.

Outside the promise are maps with NaN or infinity, on whose maximum runtimes disagree, and windows that are no
part of their map, which nobody checks in a graph.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from sppnet.classification.network import SPPNet
from sppnet.classification.views import WHOLE, side_of
from sppnet.errors import SppnetError
from sppnet.features.backbone import Backbone
from sppnet.onnx.graph import Names, free_sizes, import_onnx, to_onnx, write_graph
from sppnet.onnx.networks import Features, Probabilities, Scoring
from sppnet.onnx.preparation import PixelRules, Preparation
from sppnet.pooling.bins import LEVELS, valid_levels
from sppnet.storage import check_writable

if TYPE_CHECKING:
    from sppnet.detection.detector import Detector


def export_network(
    network: nn.Module,
    example: tuple[Any, ...],
    path: str | Path,
    *,
    input_names: Names = None,
    output_names: Names = None,
    dynamic_shapes: Any = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a network that has `SpatialPyramidPooling` or `pool_regions` in it to an ONNX file.

    Parameters
    ----------
    network : nn.Module
        Left as it is; exported in evaluation mode.
    example : tuple
        Arguments of the network: tensors on the CPU and lists of them. Values do not matter; a size that is
        to be free must be at least 2.
    path : path
        Replaced if it exists; the file appears whole or not at all.
    input_names, output_names : sequence of str, optional
        Names of the tensors in the file; a list counts as so many tensors.
    dynamic_shapes : optional
        As in `torch.onnx.export`. By default all sizes are free but the channels of (N, C, H, W) and
        (C, H, W) tensors; of others only the first.
    metadata : dict, optional
        Texts to keep in the file.

    Raises
    ------
    SppnetError
        If onnx and onnxscript are not installed, or PyTorch cannot export the network.

    Examples
    --------
    >>> from sppnet.pooling.layer import SpatialPyramidPooling
    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), SpatialPyramidPooling(), nn.Linear(400, 10))
    >>> export_network(network, (torch.zeros(2, 3, 64, 64),), "network.onnx")  # doctest: +SKIP
    """
    check_writable(path)
    free = tuple(free_sizes(value, f"_{i}" if i else "") for i, value in enumerate(example))
    model = to_onnx(network, example, dynamic_shapes or free, input_names, output_names)
    write_graph(model, path, metadata or {})


class FittedNetwork(Protocol):
    """A classifier that is fitted, such as `sppnet.classification.classifier.Classifier`.

    Attributes
    ----------
    network_ : SPPNet
        The network.
    """

    network_: SPPNet

    @property
    def classes_(self) -> Sequence[str]:
        """Names of the K classes, in the order of its outputs."""


def export_model(
    model: Detector | FittedNetwork | Backbone,
    path: str | Path,
    *,
    scale: int = 224,
    levels: Sequence[int] = LEVELS,
) -> str:
    """Write a model to an ONNX file, whatever its kind.

    Parameters
    ----------
    model : Detector, Classifier or Backbone
        See `export_detector`, `export_classifier` and `export_features`.
    path : path
        The file to write, which ends in ``.onnx``; replaced if it exists.
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
    """
    if Path(path).suffix != ".onnx":
        raise SppnetError(f"{path}: found the suffix {Path(path).suffix!r}, expected .onnx")
    if isinstance(model, Backbone):
        export_features(model, path, scale=scale, levels=levels)
        return f"image -> features of {model.name}"
    # What was learned tells the kind: a question is no reason to import the rooms of all of them.
    fitted: Any = model
    if isinstance(getattr(model, "network_", None), SPPNet):
        export_classifier(fitted, path)
        return f"image -> probabilities of {len(fitted.classes_)} classes"
    if hasattr(model, "fitted_"):
        export_detector(fitted, path)
        return f"image, windows -> scores, boxes of {', '.join(fitted.classes_)}"
    kind = type(model).__name__
    raise SppnetError(f"found {kind}, expected a fitted Detector, a fitted Classifier, or a Backbone")


def export_features(
    backbone: Backbone, path: str | Path, *, scale: int, levels: Sequence[int] = LEVELS
) -> None:
    """Write a backbone with a pyramid over its maps to an ONNX file: an image becomes a vector.

    The file takes ``image``, (H, W, 3) uint8 RGB, and returns ``features``, (D,) float32: the maps of
    ``backbone(image, scale)``, pooled by `SpatialPyramidPooling` stage by stage. Its metadata are JSON:
    ``backbone``, its signature, ``scales``, a list of the one scale, and ``levels``.

    Parameters
    ----------
    backbone : Backbone
        Where the maps come from.
    path : path
        The file to write; replaced if it exists.
    scale : int
        Shorter side in pixels to which the graph resizes the image.
    levels : sequence of int
        The pyramid: level n cuts the maps into n x n bins.

    Raises
    ------
    SppnetError
        As in `export_network`.
    """
    network = Features(backbone, valid_levels(levels))
    facts = {"backbone": backbone.signature, "scales": [scale], "levels": network.levels}
    _export_image(Preparation(PixelRules.of(backbone), (scale,)), network, ["features"], path, facts)


def export_detector(detector: Detector, path: str | Path) -> None:
    """Write a detector, up to suppression, to an ONNX file: image and candidate windows become scored boxes.

    Fully connected layers under the SVMs are part of it, what proposes windows from the maps is not.

    The file takes ``image``, (H, W, 3) uint8 RGB, and ``windows``, (R, 4) float32 in pixels of that image. It
    returns ``scores``, (R, K) float32, and ``boxes``, (R, K, 4) float32: the windows as each class's
    regression moves them, cut off at the borders. `Detector.predict` goes on, class by class, by dropping low
    scores and empty boxes and suppressing overlaps of more than ``nms_iou``.

    The metadata are JSON: ``classes``, the K names, ``nms_iou``, ``backbone``, and the fields of
    `sppnet.features.windows.WindowPooling`.

    Parameters
    ----------
    detector : Detector
        A fitted one.
    path : path
        The file to write; replaced if it exists.

    Raises
    ------
    NotFittedError
        If the detector is not fitted.
    SppnetError
        As in `export_network`.
    """
    facts = {"classes": detector.classes_, "nms_iou": detector.nms_iou, **asdict(detector.pooling)}
    backbone = detector.fitted_.backbone
    facts["backbone"] = backbone.signature
    preparation = Preparation(PixelRules.of(backbone), detector.scales)
    _export_image(preparation, Scoring(detector), ["scores", "boxes"], path, facts)


def export_classifier(classifier: FittedNetwork, path: str | Path) -> None:
    """Write a classifier with a pyramid to an ONNX file: an image becomes class probabilities.

    The file takes ``image``, (H, W, 3) uint8 RGB, and returns ``probabilities``, (K,) float32, of the whole
    image: those of `sppnet.classification.views.probabilities` with the views ``"full"``. Its metadata are
    JSON: ``classes``, the K names, and ``side``, to which the shorter side is resized.

    Parameters
    ----------
    classifier : Classifier
        A fitted one, whose network has a pyramid.
    path : path
        The file to write; replaced if it exists.

    Raises
    ------
    SppnetError
        If the network has no pyramid; or as in `export_network`.
    """
    network = classifier.network_
    if not network.takes_any_size:
        raise SppnetError("the network has no pyramid and takes one size only, expected one with a pyramid")
    side = side_of(network, WHOLE)
    rules = PixelRules(network.mean.flatten().cpu(), network.std.flatten().cpu(), multiple=1)
    facts = {"classes": [*classifier.classes_], "side": side}
    _export_image(Preparation(rules, (side,)), Probabilities(network), ["probabilities"], path, facts)


def _export_image(
    preparation: Preparation, network: nn.Module, outputs: list[str], path: str | Path, facts: dict[str, Any]
) -> None:
    """Write a network for prepared images (and windows, if it scores any) behind what prepares them.

    The two are exported one by one: PyTorch follows free sizes through any backbone, but not sizes computed
    from others, as those of resized images are.
    """
    compose = import_onnx().compose
    check_writable(path)
    count = len(preparation.scales)
    between = [*(f"prepared_{s}" for s in range(count)), "sizes", "size"]
    image = torch.zeros(60, 80, 3, dtype=torch.uint8)
    free: tuple[Any, ...] = ({0: "height", 1: "width"},)
    before = to_onnx(preparation, (image,), free, ["image"], between)

    windows = [torch.zeros(5, 4)] if "boxes" in outputs else []
    unit = max(preparation.multiple, 64)
    prepared = [torch.zeros(1, 3, unit * (s + 2), unit * (s + 3)) for s in range(count)]
    example = (prepared, torch.ones(count, 2, dtype=torch.int64), torch.tensor([60, 80]), *windows)
    free = ([{2: f"height_{s}", 3: f"width_{s}"} for s in range(count)], {}, {})
    free += tuple({0: "windows"} for _ in windows)
    after = to_onnx(network, example, free, [*between, *("windows" for _ in windows)], outputs)

    before = compose.add_prefix(before, "prepare/", rename_inputs=False, rename_outputs=False)
    model = compose.merge_models(before, after, [(name, name) for name in between])
    write_graph(model, path, {name: json.dumps(value) for name, value in facts.items()})
