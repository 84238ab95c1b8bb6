"""The commands that make detectors."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import sppnet.cli.console as console
import sppnet.cli.options as opt
from sppnet.errors import SppnetError

if TYPE_CHECKING:
    from sppnet.detection.detector import Detector

detect = typer.Typer(no_args_is_help=True, help="Train, run and evaluate object detectors.")

Rule = Literal["released", "paper"]
_NEGATIVES = "Negatives to keep; released: one of those with the same cells, paper: none overlaps 70 %."
_MINUTES = (
    "Train the network, too, as well as the time allows; 0: SVMs on the network as it is. Default: until it "
    "no longer gains, at most 10; 0 without PyTorch, or where an option asks for scales, windows or layers."
)
_MOVES = (
    "How often the best windows are moved, scored and pooled; 2 finds more small ones; no network is trained."
)
_LAYER = "What the SVMs stand on: pooled maps, or a fully connected layer above them."
_TUNED = "The backbone's layers behind this stage learn, too."
_FOLDS = "Folds of photos, each scored by what the others taught; less than 2: nothing is measured."
_OTHER_DATA = "Annotated photos, none of which it was fitted on, to learn thresholds and probabilities from."
_SET = "Thresholds in percent, such as cow=40,dog=55."
_PRECISION = "Take the least thresholds at which so many percent of what is shown is right."
# Options of a fit in rounds over shards.
_SHARDED = ("shards", "memory", "rounds", "cluster")
# Options of a network that stays as it is.
_FROZEN = (
    "moves",
    "proposals",
    "scales",
    "stages",
    "stride",
    "layer",
    "tune_after",
    "negatives",
    "projection",
)
# A mean average precision of less is as good as nothing.
_NOTHING = 0.02
_DOUBTS = (
    "are the boxes where the objects are (sppnet dataset {data} draws them), are all objects of a photo "
    "annotated, and does each name stand for one thing?"
)
_SHARDS = "Fit in rounds over so many parts of the photos, at least, so that no process holds all windows."
_GIGABYTES = "GB that each process may hold, about: fit in rounds over parts of the photos that leave it so."
_ROUNDS = "Fit in rounds over parts of the photos, and find hard negatives in so many, at most; default: 4."
_CACHE = "Folder that keeps feature maps; default: OUT.cache, removed at the end."


@detect.command()
def train(
    context: typer.Context,
    data: opt.Data,
    out: Annotated[Path, typer.Option(help="Detector file to write.")],
    split: opt.TrainingSplit = None,
    classes: opt.Classes = None,
    minutes: Annotated[float | None, typer.Option(min=0, help=_MINUTES)] = None,
    proposals: opt.LearnedProposals = opt.PROPOSALS,
    moves: Annotated[int, opt.windows(min=1, help=_MOVES)] = 1,
    negatives: Annotated[Literal["all", "released", "paper"], opt.windows(help=_NEGATIVES)] = "all",
    projection: Annotated[Rule, opt.windows(help="Whose rule says what a window covers.")] = "released",
    scale_rule: Annotated[Rule, opt.windows(help="Whose rule says which scale suits a window.")] = "paper",
    backbone: opt.LearnedBackbone = None,
    stages: opt.Stages = opt.STAGES,
    stride: opt.Stride = 16,
    scales: opt.Scales = "240,336,480,672",
    levels: opt.Levels = "3,2,1",
    layer: Annotated[Literal["pool", "fc6", "fc7"], opt.training(help=_LAYER)] = "pool",
    tune_after: Annotated[Literal["1", "2", "3", "4"] | None, opt.training(help=_TUNED)] = None,
    batches: Annotated[int, opt.training(help="Batches that train the fully connected layers.")] = 3000,
    width: Annotated[int, opt.training(help="Units of each fully connected layer.")] = 1024,
    epochs: Annotated[int, opt.training(help="Times over the images while the backbone learns.")] = 3,
    folds: Annotated[int, opt.training(min=0, help=_FOLDS)] = 8,
    limit: Annotated[int, opt.training(min=1, help="Most detections of a class in a photo.")] = 100,
    cache: Annotated[Path | None, opt.machine(help=_CACHE)] = None,
    shards: Annotated[int | None, opt.machine(min=1, help=_SHARDS)] = None,
    memory: Annotated[float | None, opt.machine(min=0, help=_GIGABYTES)] = None,
    rounds: Annotated[int | None, opt.machine(min=1, help=_ROUNDS)] = None,
    cluster: opt.Cluster = None,
    workers: opt.Workers = None,
    max_bad: opt.MaxBad = opt.BAD,
    max_pixels: opt.MaxPixels = None,
    device: opt.Device = "cpu",
    seed: opt.Seed = 0,
) -> None:
    """Fit a detector to annotated images.

    Ends with how good it is on photos that it did not learn from. While the network is trained, OUT holds the
    best detector so far; Ctrl-C ends the training early, and not the command.
    """
    from sppnet.storage import check_folder

    given = opt.read_lists(context)
    console.check_model(out)
    folder = cache or out.with_name(f"{out.name}.cache")
    check_folder(folder)

    from sppnet.datasets.training import read_training_data

    dataset = console.notes_of(read_training_data(data, split, max_bad=max_bad / 100))

    from sppnet.detection.best import fit_best
    from sppnet.detection.detector import PYRAMID, Detector
    from sppnet.detection.tuning import Tuning
    from sppnet.rpn.settings import Joint

    tunes = layer != "pool" or tune_after is not None
    joint = _trains_network(context, minutes)
    several = (
        not joint and folds > 1 and not _given_of(context, (*_FROZEN, "backbone", "levels", "scale_rule"))
    )
    settings = opt.settings_of(Detector, given) | {
        "tuning": Tuning(tune_after, batches, width=width, epochs=epochs) if tunes else None,
        "joint": Joint() if joint else None,
    }
    detectors = [Detector(**settings)]
    if several:
        detectors.insert(0, Detector(**settings | {"backbone": PYRAMID}))
    names = None if classes is None else opt.name_list(classes)
    with console.cluster_of(cluster, workers) as runner, _work(folder, cache is None) as work:
        if joint:
            work["minutes"] = minutes
        work |= {"shards": shards, "memory": memory, "rounds": rounds, "cluster": runner}
        work |= {"classes": names, "max_bad": max_bad / 100, "keep": lambda so_far: so_far.save(out)}
        detector = fit_best(detectors, dataset, tell=console.note, **work)
        left_out = sorted(set(dataset.classes) - set(detector.classes_))
        if left_out and classes is None:
            console.note(f"left out, all examples are difficult or crowds: {', '.join(left_out)}")
    console.print_history(detector)
    console.print_quality(detector, detector.classes_)
    if detector.fitted_.quality.mean_ap < _NOTHING:
        console.warn(f"hardly anything is found on photos not learned from; {_DOUBTS.format(data=data)}")
    print(f"{out}: {', '.join(detector.classes_)} from {len(dataset)} images{_memory()}")


@detect.command()
def add_class(
    model: opt.Model,
    data: opt.Data,
    classes: Annotated[str, typer.Option(help="Names of the new classes between commas.")],
    out: Annotated[Path, typer.Option(help="Detector file to write.")],
    split: opt.TrainingSplit = None,
    cache: Annotated[Path | None, opt.machine(help=_CACHE)] = None,
    max_bad: opt.MaxBad = opt.BAD,
    max_pixels: opt.MaxPixels = None,
    device: opt.Device = "cpu",
) -> None:
    """Teach a detector further classes; the others stay exactly as they are."""
    from sppnet.storage import check_folder

    (path,) = console.model_files([model])
    console.check_model(out, path)
    folder = cache or out.with_name(f"{out.name}.cache")
    check_folder(folder)

    from sppnet.datasets.training import read_training_data

    dataset = console.notes_of(read_training_data(data, split, max_bad=max_bad / 100))

    from sppnet.detection.detector import Detector

    detector, names = Detector.load(path, device=device), opt.name_list(classes)
    with _work(folder, cache is None) as work:
        detector.add_class(names, dataset, max_bad=max_bad / 100, **work)
        detector.save(out)
    console.print_quality(detector, names)
    print(f"{out}: {', '.join(detector.classes_)}{_memory()}")


@detect.command()
def thresholds(
    model: opt.Model,
    data: Annotated[Path | None, typer.Argument(metavar="[DATA]", help=_OTHER_DATA)] = None,
    split: opt.Split = None,
    given: Annotated[str | None, typer.Option("--set", help=_SET)] = None,
    precision: Annotated[float | None, typer.Option(min=0, max=100, help=_PRECISION)] = None,
    out: Annotated[Path | None, typer.Option(help="Detector file to write, with what is changed.")] = None,
    max_bad: opt.MaxBad = opt.BAD,
    max_pixels: opt.MaxPixels = None,
    device: opt.Device = "cpu",
) -> None:
    """Show from which probability on a detector shows what it finds, and change that.

    Without a change: what it finds at its thresholds and at others, measured on photos that it was not fitted
    on. With DATA, annotated photos that it was not fitted on either, thresholds and probabilities are learned
    from these.
    """
    (path,) = console.model_files([model])
    if out is not None:
        console.check_model(out, path)
    elif data is not None or given is not None or precision is not None:
        raise SppnetError("found a change of thresholds without --out, expected a file to write")
    wanted = {} if given is None else _read_thresholds(given)
    dataset = None
    if data is not None:
        from sppnet.datasets import read_dataset

        dataset = console.notes_of(read_dataset(data, split, max_bad=max_bad / 100))

    from sppnet.detection.detector import Detector

    detector = Detector.load(path, device=device)
    if dataset is not None:
        detector = detector.calibrated(dataset, max_bad=max_bad / 100, track=console.track)
    detector = detector.with_thresholds(_precise(detector, precision) | wanted)
    console.print_quality(detector, detector.classes_, (0.25, 0.5, 0.75))
    if out is not None:
        detector.save(out)
        print(f"{out}: {_listed(detector)}")


@detect.command()
def compress(
    model: opt.Model,
    out: Annotated[Path, typer.Option(help="Detector file to write.")],
    fc6: Annotated[int, typer.Option(min=0, help="Rank that is left of fc6; 0 leaves it whole.")] = 64,
    fc7: Annotated[int, typer.Option(min=0, help="Rank that is left of fc7; 0 leaves it whole.")] = 0,
) -> None:
    """Make a detector's fully connected layers thin by truncated singular value decomposition."""
    (path,) = console.model_files([model])
    console.check_model(out, path)

    from sppnet.detection.detector import Detector

    Detector.load(path).compressed((fc6, fc7)).save(out)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, from {path.stat().st_size / 1e6:.1f} MB")


def _trains_network(context: typer.Context, minutes: float | None) -> bool:
    """Return whether the network is trained, too: if that is asked for, or nothing that speaks against it."""
    from importlib.util import find_spec

    given = _given_of(context, (*_FROZEN, *_SHARDED))
    if minutes is None:
        there = find_spec("torch") is not None
        if not given and not there:
            console.note('SVMs alone: the network learns, too, after pip install "sppnet[torch]"')
        return there and not given
    if minutes and given:
        option = given[0].replace("_", "-")
        raise SppnetError(
            f"found --{option} beside --minutes, expected one of them: a network that is trained has its own "
            "windows, and sees all photos in one process"
        )
    return minutes > 0


def _given_of(context: typer.Context, names: Sequence[str]) -> list[str]:
    """Return those of some options that were given."""
    sources = [(name, context.get_parameter_source(name)) for name in names]
    return [name for name, source in sources if source is not None and source.name == "COMMANDLINE"]


@contextmanager
def _work(folder: Path, remove: bool) -> Iterator[dict[str, Any]]:
    """Yield what a fit is told of its work; then say what it took, and remove its maps if so asked."""
    from sppnet.features.cache import remove_maps
    from sppnet.progress import StageTimer

    timer, start = StageTimer(), time.perf_counter()
    try:
        yield {"cache": folder, "track": console.track, "timer": timer}
    except KeyboardInterrupt:
        console.note(f"feature maps so far are kept in {folder}; the same command goes on from them")
        raise
    console.print_seconds({**timer.seconds, "wall": time.perf_counter() - start})
    if remove:
        remove_maps(folder)


def _memory() -> str:
    from sppnet.progress import peak_memory

    memory = peak_memory()
    return "" if memory is None else f", {memory:.1f} GB of memory at the peak"


def _listed(detector: Detector) -> str:
    pairs = zip(detector.classes_, detector.thresholds_, strict=True)
    return ", ".join(f"{name} from {100 * threshold:.0f} %" for name, threshold in pairs)


def _read_thresholds(text: str) -> dict[str, float]:
    """Read ``cow=40,dog=55``, in percent."""
    found = {}
    for part in opt.name_list(text):
        name, equals, number = part.rpartition("=")
        try:
            percent = float(number)
        except ValueError:
            equals, percent = "", 0.0
        if not (equals and name and 0 <= percent <= 100):
            expected = "a class and percents from 0 to 100, such as cow=40"
            raise SppnetError(f"--set {text}: found {part!r}, expected {expected}")
        found[name] = opt.share(percent, "--set")
    return found


def _precise(detector: Detector, percent: float | None) -> dict[str, float]:
    """Return the thresholds that give a precision; say of which classes none does."""
    if percent is None:
        return {}
    found = {}
    for k, name in enumerate(detector.classes_):
        threshold = detector.fitted_.quality.threshold_of(k, percent / 100)
        if threshold is None:
            console.note(f"{name}: no threshold is known to give a precision of {percent:g} %; it stays")
        else:
            found[name] = threshold
    return found
