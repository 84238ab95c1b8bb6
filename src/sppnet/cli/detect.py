"""The commands on detectors: training, detecting, measuring."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import sppnet.cli.console as console
import sppnet.cli.options as opt
from sppnet.errors import SppnetError

if TYPE_CHECKING:
    from sppnet.datasets import Dataset
    from sppnet.detection.detector import Detector
    from sppnet.detection.ensemble import Ensemble
    from sppnet.evaluation.detection import DetectionReport

detect = typer.Typer(no_args_is_help=True, help="Train, run and evaluate object detectors.")

# What is shown of an image scores at least this, as in the released demo; at 0 an SVM is undecided.
SHOWN = -0.5

_DETECTOR = "Detector file, or animals: the detector that comes with sppnet."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=_DETECTOR, autocompletion=opt.models)]
_DATA = "VOC folder, COCO JSON or folder, YOLO folder, or CSV of boxes."
Data = Annotated[Path, typer.Argument(metavar="DATA", help=_DATA)]
_MORE = "Another detector of the same classes, to detect together, on the windows of MODEL; may be repeated."
More = Annotated[list[str] | None, typer.Option("--ensemble", help=_MORE, autocompletion=opt.models)]
Rule = Literal["released", "paper"]
_NEGATIVES = "Negatives to keep; released: one of those with the same cells, paper: none overlaps 70 %."
_LAYER = "What the SVMs stand on: pooled maps, or a fully connected layer above them."
_TUNED = "The backbone's layers behind this stage learn, too."
_RESULTS = "COCO results JSON, or folder of VOC comp4_det_*_CLASS.txt files."
_CACHE = "Folder that keeps feature maps; default: OUT.cache, removed at the end."


@detect.command()
def train(
    context: typer.Context,
    data: Data,
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
def run(
    model: Model,
    images: opt.Images,
    out: opt.Out = None,
    json_file: opt.Json = None,
    threshold: Annotated[float, typer.Option(help="Least score; at 0 the SVM is undecided.")] = SHOWN,
    ensemble: More = None,
    proposals: opt.OtherProposals = None,
    device: opt.Device = "cpu",
) -> None:
    """Find objects in images, by one detector or several; print them, draw them, write them as JSON."""
    files = console.model_files([model, *(ensemble or [])])

    from sppnet.drawing import draw_detections, picture_paths
    from sppnet.images import image_files, write_image

    paths = image_files(images)
    pictures = [] if out is None else picture_paths(out, paths)
    console.check_places(json_file, out, [*paths, *files], pictures)
    detector = _load(files, device)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, ...]] = []
    records: list[dict[str, Any]] = []
    failures: list[str] = []
    stream = detector.stream(paths, proposals=proposals, threshold=threshold)
    for i, result in enumerate(console.track(stream, "Detecting", len(paths))):
        if isinstance(result, Exception):
            failures.append(str(result))
            continue
        (pixels, found), path = result, paths[i]
        height, width = pixels.shape[:2]
        records.append({"image": str(path), "height": height, "width": width, "detections": found.facts()})
        for label, score, box in zip(found.labels, found.scores, found.boxes, strict=True):
            rows.append((path.name, label, f"{score:.2f}", ", ".join(f"{edge:.0f}" for edge in box)))
        if not found.labels:
            rows.append((path.name, "-", "", f"nothing scores {threshold:g} or more"))
        if out is not None:
            write_image(pictures[i], draw_detections(pixels, found, detector.classes_))
    console.print_rows(("image", "class", "score", "box (x1, y1, x2, y2)"), rows)
    console.write_json(json_file, records)
    if out is not None and records:
        print(f"pictures in {out}")
    console.end(failures, len(paths))


@detect.command()
def evaluate(
    model: Model,
    data: Data,
    split: opt.Split = None,
    out: opt.Out = None,
    json_file: opt.Json = None,
    ensemble: More = None,
    regress: Annotated[bool, typer.Option(help="Move boxes by the box regression.")] = True,
    proposals: opt.OtherProposals = None,
    device: opt.Device = "cpu",
) -> None:
    """Measure a detector, or several together, on a data set: precision, curves, best and worst images."""
    names = [model, *(ensemble or [])]
    files = console.model_files(names)
    console.check_places(json_file, out, [*files, data])
    dataset = _read(data, split)

    from sppnet.progress import StageTimer

    detector, timer, start = _load(files, device), StageTimer(), time.perf_counter()
    seen, method = detector.seen(dataset), detector.proposer(proposals)
    if seen:
        console.warn(
            f"the detector was fitted on {seen} of these {len(dataset)} photos: on new ones it finds less"
        )
    unseen = sorted(set(dataset.classes) - set(detector.classes_))
    if dataset.classes and len(unseen) == len(dataset.classes):
        raise SppnetError(
            f"{data}: found objects of {', '.join(unseen)}, expected some of the detector's classes: "
            f"{', '.join(detector.classes_)}"
        )
    if unseen:
        print(f"left out, the detector does not know them: {', '.join(unseen)}")
    report = detector.evaluate(
        dataset, proposals=proposals, regress=regress, track=console.track, timer=timer
    )
    passed = {**timer.seconds, "wall": time.perf_counter() - start}
    seconds = {stage: total / len(dataset) for stage, total in passed.items()}
    facts = {"model": model, "ensemble": names[1:], "regress": regress, "seconds_per_image": seconds}
    facts["proposals"] = "maps" if method is None else method.signature
    _report(report, dataset, json_file, out, facts)
    console.print_seconds(seconds, "Seconds per image (stages overlap; wall is what passed)")


@detect.command()
def score(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help=_RESULTS)],
    data: Data,
    split: opt.Split = None,
    classes: Annotated[str | None, typer.Option(help="Classes that only the results hold.")] = None,
    out: opt.Out = None,
    json_file: opt.Json = None,
) -> None:
    """Measure anyone's results file on a data set."""
    console.check_places(json_file, out, [results, data])
    dataset = _read(data, split)

    from sppnet.datasets.results import read_results
    from sppnet.evaluation.detection import evaluate_detections

    more = () if classes is None else opt.name_list(classes)
    found = read_results(results, dataset, more)
    known = sorted({label for d in found.values() for label in d.labels} | {*dataset.classes, *more})
    report = evaluate_detections([found[s.name] for s in dataset], [s.target for s in dataset], known)
    _report(report, dataset, json_file, out, {"results": str(results)})


@detect.command()
def compress(
    model: Model,
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


def _read(data: Path, split: str | None) -> Dataset:
    """Read a data set and say what its reader noticed."""
    from sppnet.datasets import read_dataset

    return console.notes_of(read_dataset(data, split))


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


def _load(paths: Sequence[Path], device: str) -> Detector | Ensemble:
    """Load a detector, or several that detect together."""
    from sppnet.detection.detector import Detector
    from sppnet.detection.ensemble import Ensemble

    detectors = [Detector.load(path, device=device) for path in paths]
    try:
        return Ensemble(detectors) if len(detectors) > 1 else detectors[0]
    except SppnetError as error:
        raise SppnetError(f"{', '.join(map(str, paths))}: {error}") from None


def _report(
    report: DetectionReport, dataset: Dataset, json_file: Path | None, out: Path | None, facts: dict[str, Any]
) -> None:
    """Print, write and draw how good detections are."""
    from sppnet.drawing import draw_detection_report

    if report.coco is None:
        console.note('COCO metrics need pip install "sppnet[coco]"')
    console.print_precisions(report, "objects", f"{report.images} images, IoU 0.5", 1)
    console.write_json(json_file, {**report.facts(), "split": dataset.split, **facts})
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        draw_detection_report(report, dataset, out, threshold=SHOWN)
        print(f"curves, best and worst images in {out}")
