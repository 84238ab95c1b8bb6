"""The commands that make detectors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

import sppnet.cli.console as console
import sppnet.cli.options as opt

if TYPE_CHECKING:
    from sppnet.datasets import Dataset
    from sppnet.detection.detector import Detector

detect = typer.Typer(no_args_is_help=True, help="Train, run and evaluate object detectors.")

Rule = Literal["released", "paper"]
_NEGATIVES = "Negatives to keep; released: one of those with the same cells, paper: none overlaps 70 %."
_LAYER = "What the SVMs stand on: pooled maps, or a fully connected layer above them."
_TUNED = "The backbone's layers behind this stage learn, too."
_CACHE = "Folder that keeps feature maps; default: OUT.cache, removed at the end."


@detect.command()
def train(
    context: typer.Context,
    data: opt.Data,
    out: Annotated[Path, typer.Option(help="Detector file to write.")],
    split: opt.TrainingSplit = None,
    classes: opt.Classes = None,
    proposals: opt.LearnedProposals = opt.PROPOSALS,
    negatives: Annotated[Literal["all", "released", "paper"], opt.windows(help=_NEGATIVES)] = "all",
    projection: Annotated[Rule, opt.windows(help="Whose rule says what a window covers.")] = "released",
    scale_rule: Annotated[Rule, opt.windows(help="Whose rule says which scale suits a window.")] = "paper",
    backbone: opt.BackboneName = opt.BACKBONE,
    stages: opt.Stages = opt.STAGES,
    stride: opt.Stride = 16,
    scales: opt.Scales = "240,336,480,672",
    levels: opt.Levels = "3,2,1",
    layer: Annotated[Literal["pool", "fc6", "fc7"], opt.training(help=_LAYER)] = "pool",
    tune_after: Annotated[Literal["1", "2", "3", "4"] | None, opt.training(help=_TUNED)] = None,
    batches: Annotated[int, opt.training(help="Batches that train the fully connected layers.")] = 3000,
    width: Annotated[int, opt.training(help="Units of each fully connected layer.")] = 1024,
    epochs: Annotated[int, opt.training(help="Times over the images while the backbone learns.")] = 3,
    cache: Annotated[Path | None, opt.machine(help=_CACHE)] = None,
    device: opt.Device = "cpu",
    seed: opt.Seed = 0,
) -> None:
    """Fit a detector to annotated images. An interrupted fit goes on when it is started again."""
    from sppnet.storage import check_folder, check_writable

    given = opt.read_lists(context)
    check_writable(out)
    folder = cache or out.with_name(f"{out.name}.cache")
    check_folder(folder)

    from sppnet.datasets.training import read_training_data

    dataset = console.notes_of(read_training_data(data, split))

    from sppnet.detection.detector import Detector
    from sppnet.detection.tuning import Tuning
    from sppnet.features.cache import remove_maps

    tunes = layer != "pool" or tune_after is not None
    settings = opt.settings_of(Detector, given) | {
        "tuning": Tuning(tune_after, batches, width=width, epochs=epochs) if tunes else None,
    }
    _fit(Detector(**settings), dataset, None if classes is None else opt.name_list(classes), folder, out)
    if cache is None:
        remove_maps(folder)


@detect.command()
def compress(
    model: opt.Model,
    out: Annotated[Path, typer.Option(help="Detector file to write.")],
    fc6: Annotated[int, typer.Option(min=0, help="Rank that is left of fc6; 0 leaves it whole.")] = 64,
    fc7: Annotated[int, typer.Option(min=0, help="Rank that is left of fc7; 0 leaves it whole.")] = 0,
) -> None:
    """Make a detector's fully connected layers thin by truncated singular value decomposition."""
    from sppnet.storage import check_writable

    check_writable(out)
    (path,) = console.model_files([model])

    from sppnet.detection.detector import Detector

    Detector.load(path).compressed((fc6, fc7)).save(out)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, from {path.stat().st_size / 1e6:.1f} MB")


def _fit(
    detector: Detector, dataset: Dataset, classes: Sequence[str] | None, folder: Path, out: Path
) -> None:
    """Fit a detector, write it, and say what it holds and what it took."""
    from sppnet.progress import StageTimer, peak_memory

    timer, start = StageTimer(), time.perf_counter()
    try:
        detector.fit(dataset, classes=classes, cache=folder, track=console.track, timer=timer)
    except KeyboardInterrupt:
        console.note(f"feature maps so far are kept in {folder}; the same command goes on from them")
        raise
    detector.save(out)
    left_out = sorted(set(dataset.classes) - set(detector.classes_))
    if left_out and classes is None:
        console.note(f"left out, all examples are difficult or crowds: {', '.join(left_out)}")
    console.print_seconds({**timer.seconds, "wall": time.perf_counter() - start})
    memory = peak_memory()
    held = "" if memory is None else f", {memory:.1f} GB of memory at the peak"
    print(f"{out}: {', '.join(detector.classes_)} from {len(dataset)} images{held}")
