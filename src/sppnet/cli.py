"""The command line: where data, candidate windows, detector, metrics and pictures meet.

Heavy modules are imported inside the commands, so that ``sppnet --help`` answers at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sppnet.boxes import Boxes, Detections
    from sppnet.clock import Clock
    from sppnet.datasets import Dataset
    from sppnet.detect import Detector

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Spatial pyramid pooling: detectors and more from one convolutional pass over images of any size.",
)
detect = typer.Typer(no_args_is_help=True, help="Train, run and evaluate object detectors.")
app.add_typer(detect, name="detect")

SHIPPED = "-"
PROPOSALS = "selective-search"

Model = Annotated[str, typer.Argument(help="Detector file; - is the one installed with sppnet.")]
Data = Annotated[Path, typer.Argument(help="VOC folder, COCO JSON or folder, or YOLO folder.")]
Split = Annotated[str | None, typer.Option(help="Split of the data set, such as train or val.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")]
Out = Annotated[Path | None, typer.Option(help="Folder for pictures; made if missing.")]
Device = Annotated[str, typer.Option(help="cpu, or a PyTorch device such as cuda, for the trunk.")]
Weights = Annotated[str | None, typer.Option(help="Weights file of the trunk, if not the installed ones.")]
Windows = Annotated[
    str | None,
    typer.Option(
        "--proposals", help="Candidate windows: a method (see sppnet propose --help) or a file that propose wrote."
    ),
]


def main() -> None:
    """Run the command line; what the user can mend is one line on stderr and exit status 1."""
    try:
        app()
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except (ValueError, OSError) as error:
        _fail(str(error), 1)


def _fail(message: str, status: int) -> None:
    print(f"sppnet: {message}", file=sys.stderr)
    raise SystemExit(status)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the annotated picture; made if missing.")] = Path("out"),
    device: Device = "cpu",
) -> None:
    """Detect a cat in a photo that comes with scikit-image, with the detector that comes with sppnet."""
    import skimage

    photo = Path(skimage.__file__).parent / "data" / "chelsea.png"
    # The score above which the demo speaks of an object; 0 is where an SVM is undecided.
    failed = _run_batch(SHIPPED, [photo], out, None, 0.0, None, device, None)
    print(
        "\nNext: your own photos      sppnet detect run - PHOTO... --out found"
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
    from sppnet import proposals
    from sppnet.images import image_files

    paths = image_files(images)
    boxes, bad = _propose(paths, method, keep_going=True)
    proposals.write_windows(out, [(p, b) for p, b in zip(paths, boxes, strict=True) if b is not None])
    print(f"{len(paths) - bad} images, windows in {out}")
    raise typer.Exit(int(bad > 0))


@detect.command()
def train(
    data: Data,
    out: Annotated[Path, typer.Option(help="Detector file to write.")],
    split: Split = None,
    classes: Annotated[str | None, typer.Option(help="Classes to learn, by commas; default: all.")] = None,
    proposals: Windows = PROPOSALS,
    scales: Annotated[
        str, typer.Option(help="Shorter sides in pixels, by commas. One is faster, five are better.")
    ] = "240,336,480,672,940",
    levels: Annotated[str, typer.Option(help="Pyramid levels, by commas.")] = "3,2,1",
    trunk: Annotated[str, typer.Option(help="timm model name.")] = "tf_efficientnet_lite0",
    stages: Annotated[str, typer.Option(help="Stages that feed the pyramid: 1 to 5, head.")] = "head",
    weights: Weights = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for feature maps, kept; default: beside OUT, removed at the end.")
    ] = None,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Of every random draw.")] = 0,
) -> None:
    """Fit a detector to annotated images; an interrupted fit goes on where it stopped."""
    import shutil

    from sppnet.clock import Clock
    from sppnet.detect import Detector
    from sppnet.files import atomic_path
    from sppnet.networks import Trunk

    with atomic_path(out.with_suffix(".probe")) as probe:  # fail before the work, not after it
        probe.unlink()
        probe.touch()
    out.with_suffix(".probe").unlink()
    dataset = _read(data, split)
    names = _names(classes, dataset)
    settings = {"sides": _integers("--scales", scales), "levels": _integers("--levels", levels)}
    detector = Detector(Trunk(trunk, stages.split(","), weights=weights, device=device), seed=seed, **settings)
    clock, folder = Clock(), cache or out.with_name(out.name + ".cache")
    with clock("proposals"):
        windows, _ = _propose([s.path for s in dataset], proposals or PROPOSALS)
    try:
        detector.fit(
            [s.path for s in dataset], windows, [s.target for s in dataset], names,
            cache=folder, track=_track, clock=clock,
        )
    except KeyboardInterrupt:
        print(f"feature maps so far are in {folder}; the same command goes on from them", file=sys.stderr)
        raise
    detector.save(out, {"proposals": proposals or PROPOSALS, "images": len(dataset)})
    if cache is None:
        shutil.rmtree(folder)
    _print_seconds(clock.seconds, "Seconds by stage")
    print(f"{out}: {', '.join(names)}; {len(dataset)} images, {sum(clock.seconds.values()):.0f} s")
