"""The commands that stand alone: candidate windows as a file, models as ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import sppnet.cli.console as console
import sppnet.cli.options as opt
from sppnet.errors import SppnetError

_MODEL = "Detector or classifier file, animals, imagenet, or the name of a timm model."


def propose(
    images: opt.Images,
    out: Annotated[Path, typer.Option(help="File for the windows (.npz).")],
    proposals: opt.Proposals = opt.PROPOSALS,
) -> None:
    """Compute candidate windows and write them to a file, for --proposals FILE.

    Methods: selective-search, selective-search-quality, edge-boxes, dense; joined by +.
    """
    from sppnet.proposals import writing

    proposed = writing.propose(images, proposals, out, track=console.track)
    if proposed.images:
        print(f"{out}: {proposed.windows} windows of {proposed.images} images")
    console.end(proposed.failures, proposed.images + len(proposed.failures))


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL, autocompletion=opt.models)],
    out: Annotated[Path, typer.Option(help="ONNX file to write.")],
    stages: opt.Stages = opt.STAGES,
    weights: opt.Weights = None,
    scale: Annotated[int, opt.network("--scales", min=1, help="Shorter side, of a backbone.")] = 224,
    levels: opt.Levels = "6,3,2,1",
) -> None:
    """Write a detector, a classifier or a backbone to an ONNX file, exact for images of any size.

    A detector takes an image and windows and returns scores and boxes; a classifier takes an image and
    returns probabilities; a backbone takes an image and returns its pyramid as one vector. They take the
    pixels as they are: resizing is in the file.
    """
    from sppnet.models import model_path
    from sppnet.storage import check_writable, file_format

    if out.suffix != ".onnx":
        raise SppnetError(f"{out}: found the suffix {out.suffix!r}, expected .onnx")
    check_writable(out)
    pyramid, path = opt.integers("--levels", levels), Path(model)
    ours = model in opt.SHIPPED or path.is_file() or bool(path.suffix)
    if ours:
        path = model_path(model)
        console.check_places(out, None, [path])

    from sppnet.classification.classifier import Classifier
    from sppnet.classification.file import FORMAT
    from sppnet.detection.detector import Detector
    from sppnet.features.backbone import Backbone
    from sppnet.onnx.export import export_model

    fitted: Backbone | Classifier | Detector
    if not ours:
        fitted = Backbone(model, opt.name_list(stages), weights=weights)
    elif file_format(path) == FORMAT:
        fitted = Classifier.load(model)
    else:
        fitted = Detector.load(path, weights=weights)
    print(f"{out}: {export_model(fitted, out, scale=scale, levels=pyramid)}")
