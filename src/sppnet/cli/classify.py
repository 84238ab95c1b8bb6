"""The commands on classifiers: training on folders of images, classes of images, how good a network is."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import sppnet.cli.console as console
import sppnet.cli.options as opt

if TYPE_CHECKING:
    from sppnet.classification.checkpoint import EpochRecord
    from sppnet.datasets.image_folder import LabelledImages
    from sppnet.evaluation.classification import ClassificationReport

classify = typer.Typer(no_args_is_help=True, help="Train, run and evaluate image classifiers.")

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Network file, or imagenet for ImageNet's 1,000 classes.",
        autocompletion=opt.models,
    ),
]
Data = Annotated[
    Path, typer.Argument(metavar="DATA", help="Folder with a folder for each class, or a CSV of path,label.")
]
Views = Annotated[
    Literal["one", "ten", "full", "maps10", "maps96", "maps98"] | None,
    typer.Option(help="What is looked at; default: full, or one where there is no pyramid."),
]
_SHOWN = 5


@classify.command()
def train(
    context: typer.Context,
    data: Data,
    out: Annotated[Path, typer.Option(help="Network file to write.")],
    split: opt.TrainingSplit = None,
    validation: Annotated[
        str | None, typer.Option(help="Split measured after each epoch, or none; default: val, if any.")
    ] = None,
    network: Annotated[
        str, opt.network(help="zf5, convnet5, overfeat5, overfeat7, or a timm model name.")
    ] = opt.BACKBONE,
    weights: Annotated[
        str | None, opt.network(help="Of a timm network: a file, or random; default: the installed ones.")
    ] = None,
    levels: Annotated[
        str | None, opt.network(help="Pyramid, by commas; none: the paper's last pooling, one size only.")
    ] = None,
    mode: opt.Mode = "max",
    width: Annotated[float, opt.network(help="Factor on the paper's numbers of filters.")] = 1.0,
    scales: Annotated[
        str, opt.training(help="Sides of the images, by commas; epochs take turns.")
    ] = "224,180",
    uniform: Annotated[
        bool, opt.training("--uniform", help="Draw each epoch's side between the scales.")
    ] = False,
    epochs: Annotated[int | None, opt.training(min=1, help="At most; default: 70, pretrained 8.")] = None,
    lr: Annotated[float, opt.training(help="Learning rate.")] = 0.01,
    backbone_lr: Annotated[
        float | None,
        opt.training(help="Its factor for the backbone, 0 to freeze it; default: 1, pretrained 0.5."),
    ] = None,
    milestones: Annotated[
        str | None, opt.training(help="Epochs at which it falls to a tenth; default: when the error stalls.")
    ] = None,
    weight_decay: Annotated[float, opt.training(help="Penalty of large weights.")] = 5e-4,
    label_smoothing: Annotated[
        float | None,
        opt.training(help="Share of a label spread over all classes; default: 0, pretrained 0.1."),
    ] = None,
    frozen: Annotated[
        int | None, opt.training(min=0, help="First groups of layers that stay; default: 0, pretrained half.")
    ] = None,
    batch_size: Annotated[
        int | None,
        opt.training("--batch", min=1, help="Images of a batch in all; default: 128, pretrained 32."),
    ] = None,
    accumulate: Annotated[int, opt.training(min=1, help="Batches of a step.")] = 1,
    workers: Annotated[int, opt.machine(min=0, help="Processes that read images; 0: only this one.")] = 0,
    device: Annotated[str, opt.machine(help="cpu or cuda; torchrun starts several processes.")] = "cpu",
    precision: Annotated[
        Literal["32-true", "bf16-mixed", "16-mixed"], opt.machine(help="What training computes in.")
    ] = "32-true",
    seed: opt.Seed = 0,
) -> None:
    """Train a network on images in class folders. An interrupted run goes on when it is started again.

    Beside OUT appear a table (.csv) and a picture (.png) of the curves; OUT.checkpoint is removed at the end.
    Several GPUs or machines: torchrun --nproc-per-node N --no-python sppnet classify train ...
    """
    from sppnet.storage import check_writable

    check_writable(out)
    lists = {
        "levels": () if levels == "none" else _integers("--levels", levels),
        "scales": opt.integers("--scales", scales),
        "milestones": _integers("--milestones", milestones),
    }

    from sppnet.classification.classifier import Classifier

    classifier = Classifier(**opt.settings_of(Classifier, context.params) | lists)
    images, held = _training_images(data, split, validation)
    checkpoint = out.with_name(f"{out.name}.checkpoint")
    first = int(os.environ.get("RANK", 0)) == 0  # of those that torchrun started
    records = classifier.fit_epochs(images, held, checkpoint=checkpoint, track=console.track)
    last = _followed(records, out, checkpoint, first)
    if first:
        classifier.save(out)
        checkpoint.unlink(missing_ok=True)
        if last.unreadable:
            console.note(f"{last.unreadable} files could not be read")
        print(f"{out}: {len(images.classes)} classes from {len(images)} images")


@classify.command()
def run(
    model: Model,
    images: opt.Images,
    views: Views = None,
    json_file: opt.Json = None,
    device: opt.Device = "cpu",
) -> None:
    """Tell the five most probable classes of images."""
    from sppnet.images import image_files

    paths = image_files(images)
    console.check_places(json_file, None, [*paths, model])

    from sppnet.classification.classifier import Classifier

    classifier = Classifier.load(model, device=device)
    found: list[dict[str, Any]] = []
    failures: list[str] = []
    results = console.track(classifier.stream(paths, views), "Classifying", len(paths))
    for path, result in zip(paths, results, strict=True):
        if isinstance(result, Exception):
            failures.append(str(result))
            continue
        classes = [{"class": n, "title": t, "probability": p} for n, t, p in result.top(_SHOWN)]
        found.append({"image": str(path), "classes": classes})
    rows = (
        ("" if place else Path(record["image"]).name, entry["title"], f"{entry['probability']:.3f}")
        for record in found
        for place, entry in enumerate(record["classes"])
    )
    console.print_rows(("image", "class", "probability"), rows)
    console.write_json(json_file, found)
    console.end(failures, len(paths))


@classify.command()
def evaluate(
    model: Model,
    data: Data,
    split: opt.Split = None,
    views: Views = None,
    json_file: opt.Json = None,
    out: opt.Out = None,
    device: opt.Device = "cpu",
) -> None:
    """Measure a network on labelled images: top-1, top-5, every class, what is taken for what."""
    console.check_places(json_file, out, [model, data])

    from sppnet.classification.classifier import Classifier
    from sppnet.drawing import draw_classification_report
    from sppnet.progress import StageTimer

    classifier, timer = Classifier.load(model, device=device), StageTimer()
    chosen, images = classifier.views(views), _read(data, split)
    report = classifier.evaluate(images, chosen, track=console.track, timer=timer)
    seconds = timer.seconds["classify"] / len(images)
    if report.seen:
        console.warn(
            f"the network was fitted on {report.seen} of these {len(images)} photos: new ones are harder"
        )
    _print_report(report, classifier.titles, chosen)
    print(f"{seconds:.3g} s per image")
    console.write_json(json_file, {**report.facts(), "views": chosen, "seconds_per_image": seconds})
    if out is not None:
        console.make_folder(out)
        draw_classification_report(report, out, classifier.titles)
        print(f"confusion matrix in {out}")
    console.end(report.unreadable, len(images))


def _integers(option: str, text: str | None) -> tuple[int, ...] | None:
    return None if text is None else opt.integers(option, text)


def _read(data: Path, split: str | None) -> LabelledImages:
    from sppnet.datasets.image_folder import read_image_folder

    return console.notes_of(read_image_folder(data, split))


def _training_images(
    data: Path, split: str | None, validation: str | None
) -> tuple[LabelledImages, LabelledImages | None]:
    """Read what to learn from and what to measure on, by default the splits train and val where they are."""
    from sppnet.datasets.image_folder import image_folder_splits
    from sppnet.datasets.splits import default_training_split

    splits = image_folder_splits(data)
    if validation is None and split is None:
        validation = next((name for name in ("val", "valid", "validation") if name in splits), None)
    chosen = split or default_training_split(splits)
    images = _read(data, chosen)
    if split is None:
        what = f"the split {chosen}" if chosen else "no split for training, so all"
        console.note(f"{data}: learning from {what}, {len(images)} photos")
    return images, None if validation in (None, "none") else _read(data, validation)


def _followed(records: Iterable[EpochRecord], out: Path, checkpoint: Path, first: bool) -> EpochRecord:
    """Take the epochs as they end and return the last; the first process writes and prints what each gave."""
    done: list[EpochRecord] = []
    try:
        for record in records:
            done.append(record)
            if first:
                _print_record(record)
                _write_curves(out, done)
    except KeyboardInterrupt:
        console.note(f"the last checkpoint is {checkpoint}; the same command goes on from it")
        raise
    return done[-1]


def _print_record(record: EpochRecord) -> None:
    held = "" if record.validation_error is None else f", validation {100 * record.validation_error:.2f} %"
    print(
        f"epoch {record.epoch + 1}: side {record.side}, lr {record.lr:g}, loss {record.loss:.4f}, "
        f"error {100 * record.error:.2f} %{held}, {record.seconds:.0f} s",
        flush=True,
    )


def _write_curves(out: Path, records: list[EpochRecord]) -> None:
    """Write what every epoch gave, as a table and as a picture."""
    from sppnet.classification.checkpoint import write_records
    from sppnet.drawing import plot_curves

    write_records(records, out.with_suffix(".csv"))
    plot_curves(records, out.with_suffix(".png"))


def _print_report(report: ClassificationReport, titles: tuple[str, ...], views: str) -> None:
    counts = zip(titles, report.images, report.right, strict=True)
    rows = [(title, str(n), f"{100 * right / n:.1f} %") for title, n, right in counts if n]
    total = str(report.images.sum())
    shares = (
        ("top-1", total, report.top1),
        ("top-5", total, report.top5),
        ("mean of classes", "", report.mean_class),
    )
    last = [(name, count, f"{100 * share:.2f} %") for name, count, share in shares]
    console.print_rows(("class", "images", "right"), rows, f"{total} images, views {views}", last)
