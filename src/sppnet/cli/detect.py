"""The commands on detectors: where data, candidate windows, detector, metrics and pictures meet."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from sppnet.cli.console import (
    Device,
    Json,
    Out,
    Split,
    Weights,
    check_folder,
    check_places,
    integers,
    make_folder,
    name_list,
    print_failures,
    print_seconds,
    print_table,
    track,
    write_json,
)
from sppnet.errors import SppnetError

if TYPE_CHECKING:
    from sppnet.boxes import Detections
    from sppnet.datasets import Dataset
    from sppnet.detection.detector import Detector
    from sppnet.detection.ensemble import Ensemble

Result = TypeVar("Result")

detect = typer.Typer(no_args_is_help=True, help="Train, run and evaluate object detectors.")

PROPOSALS = "selective-search+edge-boxes"
# Windows that the detector's own objectness proposes.
MAPS = "maps"
# What is shown of an image scores at least this, as in the released demo; at 0 an SVM is undecided.
SHOWN = -0.5
PROPOSALS_HELP = (
    "Candidate windows: a method (see sppnet propose --help) or a file that sppnet propose wrote."
)
Model = Annotated[str, typer.Argument(help="Detector file; - is the one installed with sppnet.")]
Data = Annotated[Path, typer.Argument(help="VOC folder, COCO JSON or folder, or YOLO folder.")]
More = Annotated[
    list[str] | None,
    typer.Option(
        "--with",
        help="Another detector of the same classes, to detect together; may be repeated. The candidate "
        "windows are those of MODEL, and so is --weights.",
    ),
]
Candidates = Annotated[
    str | None,
    typer.Option(
        "--proposals",
        help="Candidate windows: a method (see sppnet propose --help), a file that propose wrote, or maps: "
        "those that the detector itself proposes.",
    ),
]


@detect.command()
def train(
    data: Data,
    out: Annotated[Path, typer.Option(help="Detector file to write.")],
    split: Split = None,
    classes: Annotated[str | None, typer.Option(help="Classes to learn, by commas; default: all.")] = None,
    proposals: Annotated[str, typer.Option(help=PROPOSALS_HELP)] = PROPOSALS,
    scales: Annotated[str, typer.Option(help="Shorter sides in pixels, by commas.")] = "240,336,480,672",
    levels: Annotated[str, typer.Option(help="Pyramid levels, by commas.")] = "3,2,1",
    projection: Annotated[
        str, typer.Option(help="Cells that a window covers, by the rule of: released (code), paper.")
    ] = "released",
    scale_rule: Annotated[
        str, typer.Option(help="Scale of a window, by the rule of: released (code), paper.")
    ] = "paper",
    negatives: Annotated[
        str,
        typer.Option(
            help="Negatives to keep: all, released (code: one of those with the same cells), paper (none "
            "that overlaps another by more than 70 %)."
        ),
    ] = "all",
    layer: Annotated[
        str, typer.Option(help="What the SVMs stand on: pool, or the fully connected layers fc6, fc7.")
    ] = "pool",
    tune_after: Annotated[
        str | None, typer.Option(help="The backbone's layers behind this stage (1 to 4) learn, too.")
    ] = None,
    batches: Annotated[int, typer.Option(help="Of training the fully connected layers.")] = 3000,
    width: Annotated[int, typer.Option(help="Units of each fully connected layer.")] = 1024,
    epochs: Annotated[int, typer.Option(help="Over the images while the backbone learns.")] = 3,
    objectness: Annotated[
        bool, typer.Option(help="Learn to propose windows from the maps; detect run then needs no others.")
    ] = False,
    backbone: Annotated[str, typer.Option(help="timm model name.")] = "tf_efficientnet_lite0",
    stages: Annotated[str, typer.Option(help="Stages that feed the pyramid: 1 to 5, head.")] = "head",
    weights: Weights = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder for feature maps, kept; default: OUT.cache, removed at the end."),
    ] = None,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Of every random draw.")] = 0,
) -> None:
    """Fit a detector to annotated images. An interrupted fit goes on when it is started again."""
    from sppnet.detection.detector import Detector
    from sppnet.detection.finetune import Tuning
    from sppnet.progress import StageTimer, peak_memory
    from sppnet.proposals.maps import Objectness
    from sppnet.storage import check_writable

    start = time.perf_counter()
    check_writable(out)
    folder = cache or out.with_name(f"{out.name}.cache")
    check_folder(folder)
    dataset = _read(data, split)
    names = _learnable(dataset) if classes is None else name_list(classes)
    unknown = [name for name in names if name not in dataset.classes]
    if unknown or not names:
        found = f"no object of {', '.join(map(repr, unknown))}" if unknown else "no object"
        there = ", ".join(dataset.classes) or "annotated objects"
        raise SppnetError(f"{data}: found {found} in {len(dataset)} images, expected {there}")
    tuning = Tuning(tune_after, batches, width=width, epochs=epochs)
    detector = Detector(
        backbone,
        stages=tuple(name_list(stages)),
        weights=weights,
        device=device,
        scales=integers("--scales", scales),
        levels=integers("--levels", levels),
        projection=projection,
        scale_rule=scale_rule,
        proposals=proposals,
        negatives=negatives,
        layer=layer,
        tuning=None if layer == "pool" and tune_after is None else tuning,
        objectness=Objectness() if objectness else None,
        seed=seed,
    )
    timer = StageTimer()
    try:
        detector.fit(dataset, classes=names, cache=folder, track=track, timer=timer)
    except KeyboardInterrupt:
        print(
            f"feature maps so far are kept in {folder}; the same command goes on from them", file=sys.stderr
        )
        raise
    detector.save(out)
    if cache is None:
        _remove_maps(folder)
    print_seconds({**timer.seconds, "wall": time.perf_counter() - start})
    memory = peak_memory()
    held = "" if memory is None else f", {memory:.1f} GB of memory at the peak"
    print(f"{out}: {', '.join(names)} from {len(dataset)} images{held}")


@detect.command()
def run(
    model: Model,
    images: Annotated[list[str], typer.Argument(help="Image files, folders or glob patterns.")],
    more: More = None,
    out: Out = None,
    json_file: Json = None,
    threshold: Annotated[float, typer.Option(help="Least score; at 0 the SVM is undecided.")] = SHOWN,
    proposals: Candidates = None,
    weights: Weights = None,
    device: Device = "cpu",
) -> None:
    """Find objects in images, by one detector or several; print them, draw them, write them as JSON."""
    from sppnet.images import image_files

    models = [model, *(more or [])]
    failed = detect_in(models, image_files(images), out, json_file, threshold, proposals, device, weights)
    raise typer.Exit(int(failed))


@detect.command()
def evaluate(
    model: Model,
    data: Data,
    more: More = None,
    split: Split = None,
    json_file: Json = None,
    out: Out = None,
    proposals: Candidates = None,
    regress: Annotated[bool, typer.Option(help="Move boxes by the box regression.")] = True,
    weights: Weights = None,
    device: Device = "cpu",
) -> None:
    """Measure a detector, or several together, on a data set.

    Precision, curves, best and worst images, seconds per image.
    """
    from sppnet.progress import StageTimer

    models = [model, *(more or [])]
    check_places(json_file, out, [*models, data])
    dataset = _read(data, split)
    detector = _load(models, weights, device)
    unseen = sorted(set(dataset.classes) - set(detector.classes_))
    if unseen:
        print(f"left out, the detector does not know them: {', '.join(unseen)}")
    timer = StageTimer()
    start = time.perf_counter()
    detections: list[Detections] = []
    stream = detector.stream(
        [s.path for s in dataset], proposals=_windows(detector, proposals), regress=regress, timer=timer
    )
    for result in track(stream, "Detecting", len(dataset)):
        if isinstance(result, Exception):
            raise result
        detections.append(result[1])
    passed = {**timer.seconds, "wall": time.perf_counter() - start}
    seconds = {stage: total / len(dataset) for stage, total in passed.items()}
    facts = {"model": model, "with": models[1:], "regress": regress, "seconds_per_image": seconds}
    _report(dataset, detections, detector.classes_, json_file, out, facts)
    seen = detector.seen(dataset)
    if seen:
        print(
            f"note: the detector was fitted on {seen} of these {len(dataset)} images: on new ones it is worse",
            file=sys.stderr,
        )
    print_seconds(seconds, "Seconds per image (stages overlap; wall is what passed)")


@detect.command()
def compress(
    model: Model,
    out: Annotated[Path, typer.Option(help="Detector file to write.")],
    fc6: Annotated[int, typer.Option(help="Rank that is left of fc6; 0 leaves it whole.")] = 64,
    fc7: Annotated[int, typer.Option(help="Rank that is left of fc7; 0 leaves it whole.")] = 0,
    weights: Weights = None,
) -> None:
    """Make a detector's fully connected layers thin by truncated singular value decomposition."""
    from sppnet.detection.detector import Detector
    from sppnet.models import model_path
    from sppnet.storage import check_writable

    check_writable(out)
    path = model_path(model)
    Detector.load(path, weights=weights).compressed((fc6, fc7)).save(out)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, from {path.stat().st_size / 1e6:.1f} MB")


@detect.command()
def score(
    results: Annotated[
        Path, typer.Argument(help="COCO results JSON, or folder of VOC comp4_det_*_CLASS.txt files.")
    ],
    data: Data,
    split: Split = None,
    classes: Annotated[
        str | None, typer.Option(help="Classes, by commas, that the results may hold but the split does not.")
    ] = None,
    json_file: Json = None,
    out: Out = None,
) -> None:
    """Measure anyone's results file on a data set."""
    from sppnet.datasets.results import read_results

    check_places(json_file, out, [results, data])
    dataset = _read(data, split)
    more = [] if classes is None else name_list(classes)
    found = read_results(results, dataset, more)
    names = sorted({label for d in found.values() for label in d.labels} | {*dataset.classes, *more})
    _report(dataset, [found[s.name] for s in dataset], names, json_file, out, {"results": str(results)})


def _learnable(dataset: Dataset) -> list[str]:
    """Return the classes with an example to learn from; say which have none."""
    counted = {
        label
        for sample in dataset
        for label, ignored in zip(sample.target.labels, sample.target.ignored, strict=True)
        if not ignored
    }
    left_out = sorted(set(dataset.classes) - counted)
    if left_out and not counted:
        raise SppnetError(
            f"{dataset.root}: all examples of {', '.join(left_out)} in {len(dataset)} images are difficult "
            "or crowds, expected one to learn from"
        )
    if left_out:
        print(f"note: left out, all examples are difficult or crowds: {', '.join(left_out)}", file=sys.stderr)
    return sorted(counted)


def _read(data: Path, split: str | None) -> Dataset:
    """Read a data set and say what its reader noticed."""
    from sppnet.datasets import read_dataset

    dataset = read_dataset(data, split)
    for note in dataset.notes:
        print(f"note: {note}", file=sys.stderr)
    return dataset


def _remove_maps(folder: Path) -> None:
    """Remove the feature maps of a fit, and their folder if nothing else lies there."""
    for path in folder.glob("*.safetensors"):
        path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _load(models: Sequence[str], weights: str | None, device: str) -> Detector | Ensemble:
    """Load a detector, or several that detect together."""
    from sppnet.detection.detector import Detector
    from sppnet.detection.ensemble import Ensemble

    detectors = [
        Detector.load(model, weights=None if i else weights, device=device) for i, model in enumerate(models)
    ]
    if len(detectors) == 1:
        return detectors[0]
    try:
        return Ensemble(detectors)
    except SppnetError as error:
        raise SppnetError(f"{', '.join(models)}: {error}") from None


def _windows(detector: Detector | Ensemble, proposals: str | None) -> str | None:
    """Return the method that is asked for; None where it is the detector's own."""
    return None if proposals == MAPS else proposals


def detect_in(
    models: Sequence[str],
    paths: Sequence[Path],
    out: Path | None,
    json_file: Path | None,
    threshold: float,
    proposals: str | None,
    device: str,
    weights: str | None,
) -> bool:
    """Detect in every image, by all models together, report each, and return whether any was unreadable."""
    from rich.table import Table

    from sppnet.drawing import draw_detections
    from sppnet.images import write_image
    from sppnet.progress import StageTimer

    pictures = [] if out is None else _picture_paths(out, paths)
    check_places(json_file, out, [*paths, *models], pictures)
    detector = _load(models, weights, device)
    make_folder(out)
    table = Table("image", "class", "score", "box (x1, y1, x2, y2)")
    records: list[dict[str, Any]] = []
    failures: list[str] = []
    stream = detector.stream(
        paths, proposals=_windows(detector, proposals), threshold=threshold, timer=StageTimer()
    )
    results = track(stream, "Detecting", len(paths))
    for i, (path, result) in enumerate(zip(paths, results, strict=True)):
        if isinstance(result, Exception):
            failures.append(str(result))
            continue
        pixels, found = result
        rows = list(zip(found.labels, found.scores.tolist(), found.boxes.tolist(), strict=True))
        for label, value, box in rows:
            table.add_row(path.name, label, f"{value:.2f}", ", ".join(f"{edge:.0f}" for edge in box))
        if not rows:
            table.add_row(path.name, "-", "", f"nothing scores {threshold:g} or more")
        records.append(
            {
                "image": str(path),
                "height": pixels.shape[0],
                "width": pixels.shape[1],
                "detections": [{"label": n, "score": v, "box": b} for n, v, b in rows],
            }
        )
        if pictures:
            write_image(pictures[i], draw_detections(pixels, found, detector.classes_))
    print_table(table)
    if json_file is not None:
        write_json(json_file, records)
    if out is not None and records:
        print(f"pictures in {out}")
    print_failures(failures, len(paths))
    return bool(failures)


def _picture_paths(out: Path, paths: Sequence[Path]) -> list[Path]:
    """Return where the picture of each image goes; images of one name in several folders get a number."""
    counts = Counter(path.stem for path in paths)
    taken, pictures = set(counts), []
    for path in paths:
        name = path.stem
        if counts[name] > 1:
            name = next(n for i in count(1) if (n := f"{path.stem}-{i}") not in taken)
            taken.add(name)
        pictures.append(out / f"{name}.png")
    return pictures


def _report(
    dataset: Dataset,
    detections: Sequence[Detections],
    classes: Sequence[str],
    json_file: Path | None,
    out: Path | None,
    facts: dict[str, Any],
) -> None:
    """Print, write and draw how good detections are."""
    from rich.table import Table

    from sppnet.drawing import draw_detection_report
    from sppnet.evaluation.detection import evaluate_detections

    report = evaluate_detections(detections, [s.target for s in dataset], classes)
    if report.coco is None:
        print('note: COCO metrics need pip install "sppnet[coco]"', file=sys.stderr)
    table = Table("class", "objects", "AP (11-point)", "AP (area)", title=f"{report.images} images, IoU 0.5")
    for name, result in report.classes.items():
        values = (result.average_precision, result.area)
        shown = [f"{100 * v:.1f}" if result.positives else "no objects" for v in values]
        table.add_row(name, str(result.positives), *shown)
    table.add_section()
    means = (report.mean_ap, report.mean_ap_area)
    table.add_row("mean", str(report.objects), *(f"{100 * mean:.1f}" for mean in means))
    print_table(table)
    if json_file is not None:
        write_json(json_file, {**report.facts(), "split": dataset.split, **facts})
    if out is not None:
        make_folder(out)
        draw_detection_report(report, dataset, out, threshold=SHOWN)
        print(f"curves, best and worst images in {out}")
