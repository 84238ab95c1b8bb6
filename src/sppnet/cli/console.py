"""What the commands share beside options: checks before long work, progress, notes, tables, JSON."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from sppnet.errors import SppnetError

if TYPE_CHECKING:
    from sppnet.cluster import Cluster
    from sppnet.datasets import Dataset, LabelledImages
    from sppnet.datasets.writing import Written
    from sppnet.detection.augmented import Augmented
    from sppnet.detection.detector import Detector
    from sppnet.detection.ensemble import Ensemble
    from sppnet.detection.quality import Quality
    from sppnet.evaluation.protocols import VocReport
    from sppnet.images import Found
    from sppnet.proposals.writing import Proposed
    from sppnet.retrieval.embed import Embedded
    from sppnet.retrieval.index import Update

Read = TypeVar("Read", bound="Dataset | Embedded | Found | LabelledImages | Proposed | Update | Written")


def check_places(
    json_file: Path | None, out: Path | None, sources: Iterable[str | Path], pictures: Iterable[Path] = ()
) -> None:
    """Raise now, before long work, what could not be written after it, or would replace what is read."""
    from sppnet.storage import check_folder, check_writable

    if json_file is not None:
        check_writable(json_file)
    targets = [*pictures, *([] if json_file is None else [json_file])]
    if out is not None:
        check_folder(out)
        if out.exists() and targets:
            check_writable(targets[0])
    read = {Path(source).resolve() for source in sources}
    for target in targets:
        if target.resolve() in read:
            raise SppnetError(f"{target}: found a file that is to be read, expected another for the results")


def check_model(out: Path, source: Path | None = None) -> None:
    """Raise now if a model could not be written after long work, or would replace the one it is made of."""
    from sppnet.storage import check_suffix

    check_suffix(out, ".safetensors")
    check_places(out, None, [] if source is None else [source])


def model_files(names: Iterable[str]) -> list[Path]:
    """Return the files of models that are given by path or name; one that is not there is said at once."""
    from sppnet.models import model_path

    return [model_path(name) for name in names]


def together(
    detectors: Sequence[Detector], files: Sequence[Path], augment: bool
) -> Detector | Ensemble | Augmented:
    """Return the detector that was loaded from a file, to look once or several times, or several as one."""
    from sppnet.detection.augmented import Augmented
    from sppnet.detection.ensemble import Ensemble

    if augment and len(detectors) > 1:
        raise SppnetError("found --augment with --ensemble, expected one of them")
    try:
        one = detectors[0]
        return Ensemble(detectors) if len(detectors) > 1 else Augmented(one) if augment else one
    except SppnetError as error:
        raise SppnetError(f"{', '.join(map(str, files))}: {error}") from None


@contextmanager
def cluster_of(address: str | None, workers: int | None) -> Iterator[Cluster | None]:
    """Join the cluster that is asked for, if one is, and leave it in the end."""
    if address is None:
        if workers is not None:
            raise SppnetError("found --workers without --cluster, expected both: --cluster local, say")
        yield None
        return
    from sppnet.cluster import Cluster

    start = time.perf_counter()
    with Cluster(address, workers) as cluster:
        note(
            f"{cluster.workers} workers on the cluster {address}, {time.perf_counter() - start:.1f} s to join"
        )
        yield cluster


def track(items: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
    """Yield the items, `total` or else as many as their length says, under a bar with the time left."""
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        yield from bar.track(items, total=total, description=description)


def note(text: str) -> None:
    """Print a line on stderr that tells what was decided or put right."""
    print(f"note: {text}", file=sys.stderr)


def notes_of(data: Read) -> Read:
    """Print the notes on what was read, and return it."""
    for text in data.notes:
        note(text)
    return data


def warn(text: str) -> None:
    """Print a line on stderr, red where the terminal has colours."""
    from rich.console import Console

    Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False).print(
        f"warning: {text}", style="bold red"
    )


def end(failures: Sequence[str], total: int, max_bad: float = 0.0) -> None:
    """Print what was wrong with each image that failed, and their number.

    The program ends with status 2 if all failed, and with 1 if more did than `max_bad` percent.
    """
    for failure in failures:
        print(f"sppnet: {failure}", file=sys.stderr)
    if failures and total > 1:
        print(f"sppnet: {len(failures)} of {total} images failed", file=sys.stderr)
    if failures and len(failures) == total:
        raise typer.Exit(2)
    if 100 * len(failures) > max_bad * total:
        raise typer.Exit(1)


def print_rows(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    title: str | None = None,
    last: Iterable[Sequence[str]] = (),
) -> None:
    """Print a table whole, with the rows of `last` below a line; brackets and colons in it are text."""
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(*(Column(name, overflow="fold") for name in columns), title=title)
    for part in (rows, last):
        for row in part:
            table.add_row(*map(_shown, row))
        table.add_section()
    Console(markup=False, emoji=False).print(table)


def _shown(text: str) -> str:
    """Return what the terminal will show of a text, so that a table knows how wide that is."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def print_precisions(report: VocReport, column: str, title: str, digits: int) -> None:
    """Print a table of the average precisions of a report, in percent."""
    rows = []
    for name, result in report.classes.items():
        values = (result.average_precision, result.area)
        shown = [f"{100 * v:.{digits}f}" if result.positives else "no objects" for v in values]
        rows.append((name, str(result.positives), *shown))
    total = sum(result.positives for result in report.classes.values())
    means = (f"{100 * mean:.{digits}f}" for mean in (report.mean_ap, report.mean_ap_area))
    columns = ("class", column, "AP (11-point)", "AP (area)")
    print_rows(columns, rows, title, [("mean", str(total), *means)])


def print_quality(detector: Detector, names: Sequence[str], others: Sequence[float] = ()) -> None:
    """Say how good classes are on photos that they were not learned from: in a table, and in words.

    `others` are thresholds to tell of besides the stored ones.
    """
    quality, rows = detector.fitted_.quality, []
    stored = dict(zip(detector.classes_, detector.thresholds_.tolist(), strict=True))
    for name in names:
        k = detector.classes_.index(name)
        known = f"{100 * quality.average_precision[k]:.1f}" if quality.objects[k] else "-"
        counts = str(quality.photos[k]), str(quality.objects[k])
        rows.append((name, *counts, known, *_row(quality, k, stored[name])))
        for threshold in others if quality.objects[k] else ():
            rows.append(("", "", "", "", *_row(quality, k, threshold)))
    columns = ("class", "photos", "objects", "AP", "threshold", "precision", "recall", "F1")
    print_rows(columns, rows, "On photos not learned from")
    for name in names:
        print(f"{name}: {quality.sentence(detector.classes_.index(name), stored[name])}")


def windows_of(detector: Detector) -> str:
    """Say where the candidate windows of a detector come from."""
    return detector.proposals if detector.fitted_.side is None else "of the network itself"


def print_history(detector: Detector) -> None:
    """Say how good a network was after how many minutes, where it was trained."""
    for minutes, mean_ap in detector.fitted_.history.tolist():
        print(f"after {minutes:.1f} minutes: mean AP {100 * mean_ap:.1f} on photos not learned from")


def _row(quality: Quality, k: int, threshold: float) -> tuple[str, ...]:
    counts = quality.at(k, threshold)
    shares = (counts.precision, counts.recall, counts.f1)
    shown = ("-" if isnan(share) else f"{100 * share:.0f} %" for share in shares)
    return (f"{100 * threshold:.0f} %", *shown)


def print_seconds(seconds: Mapping[str, float], title: str = "Seconds by stage") -> None:
    """Print a table of what each stage took."""
    print_rows(("stage", "seconds"), [(stage, f"{value:.3g}") for stage, value in seconds.items()], title)


def write_json(path: Path | None, content: Any) -> None:
    """Write JSON, if a file is asked for."""
    from sppnet import storage

    if path is not None:
        storage.write_json(path, content)
