"""The commands that stand alone: candidate windows as a file, models as ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import sppnet.cli.console as console
import sppnet.cli.options as opt
from sppnet.errors import SppnetError

if TYPE_CHECKING:
    from sppnet.classification.classifier import Classifier
    from sppnet.detection.detector import Detector
    from sppnet.features.backbone import Backbone

_MODEL = "Detector or classifier file, animals, imagenet, or a backbone: its file, or efficientnet-lite0."


def propose(
    images: opt.Images,
    out: Annotated[Path, typer.Option(help="File for the windows (.npz).")],
    proposals: opt.Proposals = opt.PROPOSALS,
    max_bad: opt.MaxBad = opt.BAD,
    max_pixels: opt.MaxPixels = None,
    cluster: opt.Cluster = None,
    workers: opt.Workers = None,
) -> None:
    """Compute candidate windows and write them to a file, for --proposals FILE.

    Methods: selective-search, selective-search-quality, edge-boxes, dense; joined by +.
    """
    from sppnet.proposals import writing

    with console.cluster_of(cluster, workers) as runner:
        found = writing.propose(images, proposals, out, track=console.track, cluster=runner)
    proposed = console.notes_of(found)
    if proposed.images:
        print(f"{out}: {proposed.windows} windows of {proposed.images} images")
    console.end(proposed.failures, proposed.images + len(proposed.failures), max_bad)


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL, autocompletion=opt.models)],
    out: Annotated[Path, typer.Option(help="ONNX file to write.")],
    threshold: opt.Threshold = None,
    stages: opt.Stages = opt.STAGES,
    scale: Annotated[int, opt.network("--scales", min=1, help="Shorter side, of a backbone.")] = 224,
    levels: opt.Levels = "6,3,2,1",
) -> None:
    """Write a detector, a classifier or a backbone to an ONNX file that takes images of any size.

    The file takes the pixels of an image as they are. A detector's returns boxes, scores and labels, after
    suppression; a classifier's returns probabilities; a backbone's returns its pyramid as one vector.
    """
    from sppnet.storage import check_suffix

    check_suffix(out, ".onnx")
    pyramid, path = opt.integers("--levels", levels), _path(model)
    console.check_places(out, None, [path])

    from sppnet.onnx.export import export_model

    for file in console.track([path], "Exporting"):
        found = _read_backbone(file, stages) if file.suffix == ".onnx" else _read_model(file)
        least = None if threshold is None else opt.share(threshold)
        said = export_model(found, out, threshold=least, scale=scale, levels=pyramid)
    print(f"{out}: {said}")


def _path(model: str) -> Path:
    """Return the file of a model or backbone that is given by its path or name."""
    from sppnet.models import model_path, shipped

    backbones = shipped(".onnx")
    if model in backbones or Path(model).suffix == ".onnx":
        return model_path(model, suffix=".onnx")
    try:
        return model_path(model)
    except SppnetError as error:
        raise SppnetError(f"{error}; or a backbone: {', '.join(backbones)}, or a file (.onnx)") from None


def _read_backbone(path: Path, stages: str) -> Backbone:
    from sppnet.features.backbone import Backbone

    return Backbone(path, opt.name_list(stages))


def _read_model(path: Path) -> Classifier | Detector:
    from sppnet.classification.file import FORMAT
    from sppnet.storage import file_format

    if file_format(path) == FORMAT:
        from sppnet.classification.classifier import Classifier

        return Classifier.load(path)
    from sppnet.detection.detector import Detector

    return Detector.load(path)
