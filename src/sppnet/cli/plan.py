"""The command that says what long work will take, before it is begun."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Literal

import typer

import sppnet.cli.console as console
import sppnet.cli.options as opt
from sppnet.errors import SppnetError

if TYPE_CHECKING:
    from sppnet.planning.calibration import Calibration
    from sppnet.planning.costs import Machines, Workload
    from sppnet.planning.plan import Plan

# Photos whose headers tell the mean size, and photos that are looked at to calibrate.
_HEADERS, _LOOKED_AT = 1000, 12
_SIZE, _CLASSES = "375x500", 20
# Bytes of a photo's file for a pixel, where there is none to look at: JPEG of usual quality.
_BYTES = 0.25
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))

_DATA = "Photos, or annotated photos: how many, how large, how many classes."
_WINDOWS = "Candidate windows of a photo; default: as many as the method proposes."
_MEMORY = "Memory of a process of a fit in GB: it mines in rounds then, as it does on several nodes."
_CALIBRATION = "File of a calibration: read if it is there, else written (.json)."
_MINUTES = "How long a calibration may take, about."
_COUNT = "Number of photos; default: those of DATA."
_COUNTED = f"Number of classes; default: those of DATA, or {_CLASSES}."
Job = Literal["all", "embed", "propose", "run", "evaluate", "train"]


def plan(
    data: Annotated[Path | None, typer.Argument(metavar="[DATA]", help=_DATA)] = None,
    split: Annotated[str, typer.Option(help="Split of annotated photos.")] = "all",
    images: Annotated[int | None, typer.Option(min=1, help=_COUNT)] = None,
    classes: Annotated[int | None, typer.Option(min=1, help=_COUNTED)] = None,
    windows: Annotated[int | None, typer.Option(min=1, help=_WINDOWS)] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines like this one.")] = 1,
    cores: Annotated[int | None, typer.Option(min=1, help="Cores of each; default: those here.")] = None,
    job: Annotated[
        Job, typer.Option(help="What is planned; run, evaluate, train are of sppnet detect.")
    ] = "all",
    json_file: opt.Json = None,
    size: Annotated[
        str | None, opt.machine("--photo-size", help="Height x width of a photo in pixels, such as 375x500.")
    ] = None,
    memory: Annotated[float | None, opt.machine(help=_MEMORY)] = None,
    calibration: Annotated[Path | None, opt.machine(help=_CALIBRATION)] = None,
    minutes: Annotated[float, opt.machine(min=0, help=_MINUTES)] = 1,
) -> None:
    """Predict time, disk, memory and network traffic of long work, from a minute's measurement here.

    The default embedder is planned, and the default detector on candidate windows. Detectors whose network
    proposes the windows are not, nor is the training of networks.
    """
    if data is None and images is None:
        raise SppnetError("found neither DATA nor --images, expected photos to count, or their number")
    pixels = _pixels(size or _SIZE)
    console.check_places(json_file, None, [] if data is None else [data])
    photos, found = ([], None) if data is None else _counted(data, split)
    known = _calibration(calibration, photos, pixels, minutes)

    from sppnet.parallel import core_count
    from sppnet.planning.costs import Machines, Workload
    from sppnet.planning.plan import JOBS

    mean, file_bytes = _sizes(photos, pixels if size or not photos else None)
    count = len(photos) if images is None else images
    asked = windows or max(round(known.costs.windows), 1)
    work = Workload(count, classes or found or _CLASSES, asked, mean / 1e6, file_bytes)
    machines = Machines(nodes, cores or core_count(), None, None if memory is None else memory * 1e9)
    names = tuple(JOBS) if job == "all" else (job,)
    _print_plans(names, known, work, machines, json_file)


def _pixels(text: str) -> tuple[int, int]:
    """Read height and width."""
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if found is None:
        raise SppnetError(f"--photo-size {text}: expected height x width in pixels, such as {_SIZE}")
    return int(found[1]), int(found[2])


def _counted(data: Path, split: str) -> tuple[Sequence[Path], int | None]:
    """Return the photos of a data set and its number of classes; of a folder of photos alone these."""
    from sppnet.datasets.reading import dataset_format, read_dataset
    from sppnet.images import find_images

    if dataset_format(data) is None:
        return console.notes_of(find_images([data])).paths, None
    dataset = console.notes_of(read_dataset(data, split))
    return [sample.path for sample in dataset], len(dataset.classes) or None


def _sizes(photos: Sequence[Path], given: tuple[int, int] | None) -> tuple[float, float]:
    """Return the mean pixels and bytes of photos, by the headers of some or by a size that is given."""
    from sppnet.errors import ImageError
    from sppnet.images import image_size

    seen = _some(photos, _HEADERS)
    files = [path.stat().st_size for path in seen]
    if given is not None:
        pixels = float(given[0] * given[1])
        return pixels, sum(files) / len(files) if files else pixels * _BYTES
    areas = []
    for path in seen:
        try:
            height, width = image_size(path)
            areas.append(height * width)
        except ImageError as error:
            console.note(f"left out: {error}")
    if not areas:
        raise SppnetError(f"found no photo that can be read among {len(photos)}, expected some")
    return sum(areas) / len(areas), sum(files) / len(files)


def _some(photos: Sequence[Path], count: int) -> Sequence[Path]:
    """Return at most so many photos, evenly from all."""
    return photos[:: max(1, len(photos) // count)][:count]


def _calibration(
    path: Path | None, photos: Sequence[Path], pixels: tuple[int, int], minutes: float
) -> Calibration:
    """Return a calibration: that of the file, or a new one, which is written there."""
    from sppnet.planning.calibration import calibrate, read_calibration, write_calibration
    from sppnet.storage import check_suffix, check_writable

    if path is not None and path.exists():
        known = read_calibration(path)
        if known.doubt is not None:
            console.warn(f"{path}: {known.doubt}; times will differ")
        return known
    if path is not None:
        check_suffix(path, ".json", " for a calibration")
        check_writable(path)
    with _to_look_at(photos, pixels) as looked_at:
        known = calibrate(looked_at, minutes, console.track)
    if path is not None:
        write_calibration(path, known)
        print(f"calibration in {path}")
    return known


@contextmanager
def _to_look_at(photos: Sequence[Path], pixels: tuple[int, int]) -> Iterator[Sequence[Path]]:
    """Lend photos to calibrate on: some of those given, or the one that comes with sppnet in another size."""
    if photos:
        yield _some(photos, _LOOKED_AT)
        return

    from sppnet.images import read_image, resize, write_image
    from sppnet.photos import demo_photo

    with TemporaryDirectory(prefix="sppnet-") as folder:
        shown = resize(read_image(demo_photo()), *pixels)
        places = [Path(folder) / name for name in ("as-it-is.jpg", "flipped.jpg")]
        for place, picture in zip(places, (shown, shown[:, ::-1]), strict=True):
            write_image(place, picture)
        console.note("calibrated on the photo that comes with sppnet; yours may take other times: give DATA")
        yield places


def _print_plans(
    names: Sequence[str], known: Calibration, work: Workload, machines: Machines, json_file: Path | None
) -> None:
    from dataclasses import asdict

    from sppnet.planning.plan import drivers
    from sppnet.planning.plan import plan as planned

    found = {}
    for name in names:
        one = planned(name, work, known.costs, machines)
        others = drivers(name, work, known.costs, machines)
        _print_plan(one, others)
        found[name] = {
            **asdict(one),
            "seconds": one.seconds,
            "core_seconds": one.core_seconds,
            "with": others,
        }
    slow = known.costs.slowdown(machines.busy)
    print(
        f"{work.images} photos of {work.pixels:.2g} million pixels, {work.windows} windows, {work.classes} "
        f"classes; {machines.nodes} x {machines.cores} cores, each {slow:.2f} times as slow as one alone"
    )
    facts = {"machine": known.machine, "workload": asdict(work), "machines": asdict(machines)}
    console.write_json(json_file, {**facts, "costs": asdict(known.costs), "plans": found})


def _print_plan(plan: Plan, others: dict[str, float]) -> None:
    """Print a plan: time by stage, bytes, and what changes the time most."""
    title = plan.job if plan.job in ("embed", "propose") else f"detect {plan.job}"
    rows = [
        (s.name, _duration(s.seconds), f"{100 * s.seconds / plan.seconds:.0f} %", s.grows_with)
        for s in plan.stages
    ]
    total = ("all", _duration(plan.seconds), "100 %", f"{_duration(plan.core_seconds)} of one core")
    console.print_rows(("stage", "time", "share", "grows with"), rows, f"sppnet {title}", [total])
    for kind, sizes in (("disk", plan.disk), ("memory", plan.memory), ("network", plan.traffic)):
        print(f"{kind}: " + ", ".join(f"{name} {_bytes(size)}" for name, size in sizes.items()))
    changes = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in others.items())
    print(f"most of the time: {plan.dominant.name}; with {changes}\n")


def _duration(seconds: float) -> str:
    """Return seconds in words, two of their units at most."""
    for size, unit, below, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            whole, rest = divmod(round(seconds / below), size // below)
            return f"{whole} {unit} {rest} {smaller}" if whole < 100 else f"{whole} {unit}"
    return f"{seconds:.3g} s"


def _bytes(size: float) -> str:
    unit, name = next(((u, n) for u, n in _UNITS if size >= u), _UNITS[-1])
    return f"{size / unit:.3g} {name}"
