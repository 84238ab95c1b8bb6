"""The options that several commands share: one spelling, one help text and one panel for one thing.

Choices are literal types, so that help lists them and the shell completes them. What stands in no panel comes
first in the help of a command: the few options that matter to everyone.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sppnet.errors import SppnetError

if TYPE_CHECKING:
    from sppnet.retrieval.embedder import Embedder


BACKBONE, STAGES = "efficientnet-lite0", "head"
# Of an embedder.
STRIDE, SCALES, LEVELS = 32, "224", "3,2,1"
PROPOSALS = "selective-search+edge-boxes"
# What `sppnet.images` asks for the most pixels of an image, which tests hold together; and photos in percent.
PIXELS, BAD = "SPPNET_MAX_PIXELS", 1.0
# The names that `parse` and `model_path` know; tests hold them together.
METHODS = ("selective-search", "selective-search-quality", "edge-boxes", "dense")
SHIPPED = ("animals", "imagenet")


def methods(incomplete: str) -> list[str]:
    """Complete the name of a proposal method, also of one that is joined to others by +."""
    before, plus, begun = incomplete.rpartition("+")
    return [f"{before}{plus}{name}" for name in METHODS if name.startswith(begun)]


def methods_and_maps(incomplete: str) -> list[str]:
    """Complete the name of a proposal method, or of the maps."""
    return [*methods(incomplete), *(["maps"] if "maps".startswith(incomplete) else [])]


def models(incomplete: str) -> list[str]:
    """Complete the name of a model that comes with sppnet, or of a model file."""
    files = (path.name for path in Path().glob("*.safetensors"))
    return [name for name in (*SHIPPED, *sorted(files)) if name.startswith(incomplete)]


_DETECTOR = "Detector file, or animals: the detector that comes with sppnet."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=_DETECTOR, autocompletion=models)]
_DATA = "Annotated photos: a folder, or a file in it, as a labelling tool exports it; see docs/data.md."
Data = Annotated[Path, typer.Argument(metavar="DATA", help=_DATA)]
_MORE = "Another detector of the same classes, to detect together, on the windows of MODEL; may be repeated."
Ensemble = Annotated[list[str] | None, typer.Option("--ensemble", help=_MORE, autocompletion=models)]
Images = Annotated[list[str], typer.Argument(metavar="PHOTO", help="Image files, folders or patterns.")]
Json = Annotated[Path | None, typer.Option("--json", help="File for the results, as JSON.")]
Out = Annotated[Path | None, typer.Option(help="Folder for pictures; made if it is missing.")]
_PAGE = "Folder for report.html, one page with pictures; made if it is missing."
ReportOut = Annotated[Path | None, typer.Option("--out", help=_PAGE)]
Split = Annotated[str | None, typer.Option(help="Split of the data, such as train or val.")]
TrainingSplit = Annotated[
    str | None, typer.Option("--split", help="Split to learn from; default: train, or all.")
]
Classes = Annotated[str | None, typer.Option(help="Names of classes between commas; default: all.")]

# Options of a panel.
results, windows, network, training, machine = (
    partial(typer.Option, rich_help_panel=panel)
    for panel in ("Results", "Windows", "Network", "Training", "Machine")
)

_WINDOWS = "Candidate windows: a method (see sppnet propose --help), or a file that propose wrote"
_MAPS = "or maps, those that the detector itself"
_OTHERS = f"{_WINDOWS}; {_MAPS} has learned to propose; default: the detector's own."
_LEARNED = f"{_WINDOWS}; {_MAPS} learns to propose: the fastest."
Proposals = Annotated[str, windows(help=f"{_WINDOWS}.", autocompletion=methods)]
LearnedProposals = Annotated[str, windows("--proposals", help=_LEARNED, autocompletion=methods_and_maps)]
OtherProposals = Annotated[str | None, windows("--proposals", help=_OTHERS, autocompletion=methods_and_maps)]

_BACKBONE = "efficientnet-lite0, pyramid-lite0, a file of sppnet backbone make, or a detector to go on from."
BackboneName = Annotated[str, network("--backbone", help=_BACKBONE)]
_OF_FIT = (
    f"{_BACKBONE} Default: pyramid-lite0 to train the network; else, without other options, the better "
    "of the first two."
)
LearnedBackbone = Annotated[str | None, network("--backbone", help=_OF_FIT)]
Stages = Annotated[str, network(help="Stages that feed the pyramid, between commas: 1 to 5, head.")]
Stride = Annotated[int, network(help="Largest stride of the backbone: 32, or 16 for finer maps.")]
_SCALES = "Shorter sides of the image in pixels, between commas; each box takes the one that suits it."
Scales = Annotated[str, network(help=_SCALES)]
Levels = Annotated[str, network(help="Levels of the pyramid, between commas; 3,2,1 has 14 bins.")]
Mode = Annotated[Literal["max", "average"], network(help="What is kept of a bin.")]
View = Annotated[Literal["full", "crop", "warp"], network(help="The whole, its centre, or pressed square.")]
Flip = Annotated[bool, network("--flip", help="Average with the flipped image; takes twice as long.")]
_AUGMENT = "Look at each photo four times, larger and flipped, too: takes some four times as long."
Augment = Annotated[bool, network("--augment", help=_AUGMENT)]
Power = Annotated[float, network(help="Numbers are raised to it before the norm; 1 leaves them.")]


def _limit_pixels(most: int | None) -> int | None:
    """Tell all that reads images, in any thread or process, what the largest may be."""
    if most is not None:
        os.environ[PIXELS] = str(most)
    return most


_PIXELS = "Most pixels of a photo; larger ones are refused before they are decoded; default: 50 million."
MaxPixels = Annotated[
    int | None, machine("--max-pixels", min=1, envvar=PIXELS, callback=_limit_pixels, help=_PIXELS)
]
_THRESHOLD = "Least probability of a detection, in percent; default: the detector's own for each class."
Threshold = Annotated[float | None, typer.Option(min=0, max=100, help=_THRESHOLD)]
_SCORES = "What scores are: probabilities, or what the SVMs give."
ScoreKind = Literal["probability", "svm"]
Scores = Annotated[ScoreKind, typer.Option(help=_SCORES)]
_BAD = "Most photos, in percent, that may be unreadable for the work to count as done."
MaxBad = Annotated[float, machine("--max-bad", min=0, max=100, help=_BAD)]
_CLUSTER = "A Ray cluster whose workers do it: HOST:PORT, or auto; local: one of this machine alone."
Cluster = Annotated[str | None, machine("--cluster", metavar="ADDRESS", help=_CLUSTER)]
_WORKERS = "Workers of the cluster, one core each; default: as many as it has cores."
Workers = Annotated[int | None, machine("--workers", min=1, help=_WORKERS)]
Device = Annotated[str, machine(help="cpu, or a PyTorch device such as cuda.")]
Seed = Annotated[int, machine(help="Seed of every random draw.")]


def name_list(text: str) -> tuple[str, ...]:
    """Read names between commas."""
    return tuple(part.strip() for part in text.split(","))


def share(percent: float, option: str = "--threshold") -> float:
    """Return a threshold in percent as a probability."""
    if 0 < percent < 1:
        print(f"note: {option} is in percent: {percent:g} is less than one in a hundred", file=sys.stderr)
    return percent / 100


def integers(option: str, text: str) -> tuple[int, ...]:
    """Read positive integers between commas."""
    if not all(part.strip().isdecimal() and int(part) > 0 for part in text.split(",")):
        raise SppnetError(f"{option} {text}: expected positive integers between commas, such as 480,576")
    return tuple(int(part) for part in text.split(","))


def read_lists(context: typer.Context) -> dict[str, Any]:
    """Return a command's options by name, with those that are lists read as such."""
    given = dict(context.params)
    given["stages"] = name_list(given["stages"])
    for name in ("levels", "scales"):
        given[name] = integers(f"--{name}", given[name])
    return given


def settings_of(estimator: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a command's options that are settings of an estimator: their names are the same."""
    known = inspect.signature(estimator).parameters.keys() & options.keys()
    stride = {"output_stride": options["stride"]} if "stride" in options else {}
    return {name: options[name] for name in known} | stride


def embedder_of(context: typer.Context, **others: Any) -> Embedder:
    """Return the embedder of a command's options, with other settings in their place."""
    given = read_lists(context)

    from sppnet.retrieval.embedder import Embedder

    return Embedder(**settings_of(Embedder, given) | others)
