"""The program: its commands and its errors.

Heavy modules are imported inside the commands, so that ``sppnet --help`` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import typer

from sppnet.cli.classify import classify
from sppnet.cli.console import Device, Weights, check_places, integers, print_failures, track
from sppnet.cli.detect import PROPOSALS, SHOWN, detect, detect_in
from sppnet.cli.embed import embed
from sppnet.cli.protocol import protocol
from sppnet.cli.search import index, search
from sppnet.errors import SppnetError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Spatial pyramid pooling: classifiers, detectors and vectors from one pass over images of any size.",
)
app.add_typer(detect, name="detect")
app.add_typer(classify, name="classify")
app.command()(embed)
app.add_typer(protocol, name="protocol")
app.command()(index)
app.command()(search)


def main() -> None:
    """Run the command line; what the user can mend is one line on stderr and exit status 1."""
    try:
        app()
    except SystemExit as end:
        if end.code == 130:  # what Typer makes of Ctrl-C
            _fail("interrupted", 130)
        raise
    except (SppnetError, OSError) as error:
        _fail(str(error), 1)


def _fail(message: str, status: int) -> None:
    print(f"sppnet: {message}", file=sys.stderr)
    raise SystemExit(status)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the annotated picture; made if missing.")] = Path(
        "out"
    ),
    device: Device = "cpu",
) -> None:
    """Detect a cat in a photo that comes with scikit-image, with the detector that comes with sppnet."""
    import skimage

    photo = Path(skimage.__file__).parent / "data" / "chelsea.png"
    failed = detect_in(["animals"], [photo], out, None, SHOWN, None, device, None)
    print(
        "\nNext: your own photos      sppnet detect run animals PHOTO... --out found"
        "\n      your own classes     sppnet detect train DATA --out my.safetensors"
        "\n      how good it is       sppnet detect evaluate my.safetensors DATA --split val --out report"
    )
    raise typer.Exit(int(failed))


@app.command()
def propose(
    images: Annotated[list[str], typer.Argument(help="Image files, folders or glob patterns.")],
    out: Annotated[Path, typer.Option(help="File for the windows.")],
    method: Annotated[str, typer.Option("--proposals", help="Which method.")] = PROPOSALS,
) -> None:
    """Compute candidate windows and write them to a file, for --proposals FILE.

    Methods: selective-search, selective-search-quality, edge-boxes, dense; joined by +.
    """
    from sppnet.proposals import writing

    proposed = writing.propose(images, method, out, track=track)
    print_failures(proposed.failures, proposed.images + len(proposed.failures))
    if proposed.images:
        print(f"{out}: {proposed.windows} windows of {proposed.images} images")
    raise typer.Exit(int(bool(proposed.failures)))


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(help="Detector or network file, - for the installed detector, or a timm name.")
    ],
    out: Annotated[Path, typer.Option(help="ONNX file to write.")],
    levels: Annotated[str, typer.Option(help="Pyramid levels of a backbone, by commas.")] = "6,3,2,1",
    side: Annotated[
        int, typer.Option(min=1, help="Shorter side of the image for a backbone, in pixels.")
    ] = 224,
    stages: Annotated[str, typer.Option(help="Stages of a backbone that feed the pyramid.")] = "head",
    weights: Weights = None,
) -> None:
    """Write a detector, a classifier or a backbone with a pyramid to an ONNX file, exact for images of any size.

    A detector takes an image and windows and returns scores and boxes; a classifier takes an image and
    returns probabilities; a backbone its pyramid as one vector. They take the pixels as they are: resizing is in
    the file.
    """
    from sppnet.classification import network as networks
    from sppnet.detection.detector import Detector
    from sppnet.features.backbone import Backbone
    from sppnet.models import model_path
    from sppnet.onnx.export import export_model
    from sppnet.storage import check_writable, file_format

    if out.suffix != ".onnx":
        raise SppnetError(f"{out}: found the suffix {out.suffix!r}, expected .onnx")
    check_writable(out)
    path = Path(model)
    if model == "animals" or path.is_file() or path.suffix:
        path = model_path(model)
        check_places(out, None, [path])
        if file_format(path) == networks.FORMAT:
            network, settings = networks.load_network(path)
            classifier = SimpleNamespace(network_=network, classes_=settings.classes)
            what = export_model(classifier, out)
        else:
            what = export_model(Detector.load(path, weights=weights), out)
    else:
        backbone = Backbone(model, stages.split(","), weights=weights)
        what = export_model(backbone, out, scale=side, levels=integers("--levels", levels))
    print(f"{out}: {what}")
