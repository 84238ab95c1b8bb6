"""The commands that measure detections: a detector's own, or anyone's results."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import sppnet.cli.console as console
import sppnet.cli.options as opt
from sppnet.errors import SppnetError

if TYPE_CHECKING:
    from sppnet.datasets import Dataset
    from sppnet.evaluation.detection import Counts, DetectionReport

_REPORT = "report.html"
_RESULTS = "What detect run --json wrote, COCO results JSON, or folder of VOC comp4_det_*_CLASS.txt files."


def evaluate(
    model: opt.Model,
    data: opt.Data,
    split: opt.Split = None,
    out: opt.ReportOut = None,
    json_file: opt.Json = None,
    ensemble: opt.Ensemble = None,
    regress: Annotated[bool, typer.Option(help="Move boxes by the box regression.")] = True,
    proposals: opt.OtherProposals = None,
    augment: opt.Augment = False,
    max_bad: opt.MaxBad = opt.BAD,
    max_pixels: opt.MaxPixels = None,
    cluster: opt.Cluster = None,
    workers: opt.Workers = None,
    device: opt.Device = "cpu",
) -> None:
    """Measure a detector, or several together, on a data set; --out writes a report that shows it."""
    names = [model, *(ensemble or [])]
    files = console.model_files(names)
    _check_places(json_file, out, [*files, data])

    from sppnet.datasets import read_dataset

    share = max_bad / 100
    dataset = console.notes_of(read_dataset(data, split, max_bad=share))

    from sppnet.detection.detector import Detector
    from sppnet.progress import StageTimer

    detectors = [Detector.load(file, device=device) for file in files]
    detector = console.together(detectors, files, augment)
    timer, start = StageTimer(), time.perf_counter()
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
    options: dict[str, Any] = {"proposals": proposals, "regress": regress, "max_bad": share}
    with console.cluster_of(cluster, workers) as runner:
        report = detector.evaluate(dataset, **options, track=console.track, timer=timer, cluster=runner)
    passed = {**timer.seconds, "wall": time.perf_counter() - start}
    seconds = {stage: total / len(dataset) for stage, total in passed.items()}
    facts: dict[str, Any] = {"model": model, "ensemble": names[1:], "regress": regress, "augment": augment}
    facts["seconds_per_image"] = seconds
    facts["proposals"] = "maps" if method is None else method.signature
    left_out = f"objects of classes that the detector does not know: {', '.join(unseen)}"
    notes = [*dataset.notes, *([left_out] if unseen else [])]
    _report(report, dataset, json_file, facts)
    if out is not None:
        about = {
            "detector": " with ".join(names),
            **_about(data, dataset),
            "windows": proposals or console.windows_of(detectors[0]),
        }
        _write(report, dataset, out, about, notes=notes)
    console.print_seconds(seconds, "Seconds per image (stages overlap; wall is what passed)")


def score(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help=_RESULTS)],
    data: opt.Data,
    split: opt.Split = None,
    classes: Annotated[str | None, typer.Option(help="Classes that only the results hold.")] = None,
    out: opt.ReportOut = None,
    json_file: opt.Json = None,
) -> None:
    """Measure anyone's results file on a data set; its photos need not be there."""
    _check_places(json_file, out, [results, data])
    dataset, photos = _read_annotations(data, split)

    from sppnet.datasets.results import read_results
    from sppnet.evaluation.detection import evaluate_detections

    more = () if classes is None else opt.name_list(classes)
    found = read_results(results, dataset, more)
    empty = sum(not len(found[sample.name]) for sample in dataset)
    if empty:
        console.note(f"{results}: found no detection in {empty} of the {len(dataset)} images")
    known = sorted({label for d in found.values() for label in d.labels} | {*dataset.classes, *more})
    report = evaluate_detections([found[s.name] for s in dataset], [s.target for s in dataset], known)
    _report(report, dataset, json_file, {"results": str(results)})
    if out is not None:
        about = {"results": str(results), **_about(data, dataset)}
        _write(report, dataset, out, about, notes=dataset.notes, photos=photos)


def _check_places(json_file: Path | None, out: Path | None, sources: Sequence[str | Path]) -> None:
    """Raise now what could not be written, or would replace what is read."""
    console.check_places(json_file, out, sources, [] if out is None else [out / _REPORT])


def _read_annotations(data: Path, split: str | None) -> tuple[Dataset, bool]:
    """Read a data set, and return whether its photos are there; annotations alone will do."""
    from sppnet.datasets import read_dataset

    dataset = read_dataset(data, split, photos=False)
    there = sum(sample.path.exists() for sample in dataset)
    if there == len(dataset):
        # Boxes are held against the photos: EXIF may have turned them.
        dataset = read_dataset(data, split)
    else:
        absent = len(dataset) - there
        console.note(f"{absent} of {len(dataset)} photos are not there: sizes and boxes count as annotated")
    return console.notes_of(dataset), there == len(dataset)


def _about(data: Path, dataset: Dataset) -> dict[str, str]:
    """Return what a report says of the data, and of the day."""
    from datetime import date

    from sppnet import __version__

    return {
        "data": str(data),
        "split": dataset.split or "all",
        "measured": f"{date.today().isoformat()}, by sppnet {__version__}",
    }


def _report(report: DetectionReport, dataset: Dataset, json_file: Path | None, facts: dict[str, Any]) -> None:
    """Print and write how good detections are."""
    from sppnet.drawing.report import headline
    from sppnet.evaluation.confusion import detection_confusion

    if report.coco is None:
        console.note('COCO metrics need pip install "sppnet[coco]"')
    _print_classes(report)
    print(" ".join(headline(report)))
    targets = [sample.target for i, sample in enumerate(dataset) if i not in report.left_out]
    matrix = detection_confusion(report.detections, targets, list(report.classes), report.thresholds)
    confusion = {"classes": [*report.classes, "background"], "counts": matrix.tolist()}
    console.write_json(json_file, {**report.facts(), "confusion": confusion, "split": dataset.split, **facts})


def _write(
    report: DetectionReport,
    dataset: Dataset,
    out: Path,
    about: dict[str, str],
    *,
    notes: Sequence[str],
    photos: bool = True,
) -> None:
    """Write the report as a page."""
    from sppnet.drawing import write_detection_report

    out.mkdir(parents=True, exist_ok=True)
    path = out / _REPORT
    write_detection_report(report, dataset, path, about=about, notes=notes, photos=photos)
    print(f"report in {path}")


def _print_classes(report: DetectionReport) -> None:
    """Print the table of classes, in per cent."""
    from sppnet.drawing.report import class_rows

    rows = [(row["name"], *_cells(row)) for row in class_rows(report)]
    total = report.total
    means = map(_percent, (report.mean_ap, report.mean_ap_area))
    alarms = total.false_alarms / max(report.images, 1)
    last = ("all", str(report.objects), *means, "", *_rates(total), f"{alarms:.2f}")
    columns = ("class", "objects", "AP", "AP area", "from", "precision", "recall", "false alarms")
    title = f"{report.images} images, IoU 0.5, in per cent; shown from a score, false alarms of an image"
    console.print_rows(columns, rows, title, [last])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    result, counts = row["result"], row["counts"]
    precisions = map(_percent, (result.average_precision, result.area))
    return (str(result.positives), *precisions, row["threshold"], *_rates(counts), f"{row['alarms']:.2f}")


def _rates(counts: Counts) -> tuple[str, str]:
    return _percent(counts.precision), _percent(counts.recall)


def _percent(share: float) -> str:
    """Return a share as the table has it; one that is not known is a dash."""
    return "–" if math.isnan(share) else f"{100 * share:.1f}"
