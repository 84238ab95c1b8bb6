"""The commands that measure detections: a detector's own, or anyone's results."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import sppnet.cli.console as console
import sppnet.cli.options as opt
from sppnet.errors import SppnetError

if TYPE_CHECKING:
    from sppnet.datasets import Dataset
    from sppnet.evaluation.detection import DetectionReport

_RESULTS = "COCO results JSON, or folder of VOC comp4_det_*_CLASS.txt files."


def evaluate(
    model: opt.Model,
    data: opt.Data,
    split: opt.Split = None,
    out: opt.Out = None,
    json_file: opt.Json = None,
    ensemble: opt.Ensemble = None,
    regress: Annotated[bool, typer.Option(help="Move boxes by the box regression.")] = True,
    proposals: opt.OtherProposals = None,
    device: opt.Device = "cpu",
) -> None:
    """Measure a detector, or several together, on a data set: precision, curves, best and worst images."""
    names = [model, *(ensemble or [])]
    files = console.model_files(names)
    console.check_places(json_file, out, [*files, data])
    dataset = _read(data, split)

    from sppnet.detection.detector import Detector
    from sppnet.progress import StageTimer

    detector = console.together([Detector.load(file, device=device) for file in files], files)
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
    report = detector.evaluate(
        dataset, proposals=proposals, regress=regress, track=console.track, timer=timer
    )
    passed = {**timer.seconds, "wall": time.perf_counter() - start}
    seconds = {stage: total / len(dataset) for stage, total in passed.items()}
    facts = {"model": model, "ensemble": names[1:], "regress": regress, "seconds_per_image": seconds}
    facts["proposals"] = "maps" if method is None else method.signature
    _report(report, dataset, json_file, out, facts)
    console.print_seconds(seconds, "Seconds per image (stages overlap; wall is what passed)")


def score(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help=_RESULTS)],
    data: opt.Data,
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


def _read(data: Path, split: str | None) -> Dataset:
    """Read a data set and say what its reader noticed."""
    from sppnet.datasets import read_dataset

    return console.notes_of(read_dataset(data, split))


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
        draw_detection_report(report, dataset, out, threshold=opt.SHOWN)
        print(f"curves, best and worst images in {out}")
