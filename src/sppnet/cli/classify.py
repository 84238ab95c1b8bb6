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
    from sppnet.evaluation.classification import ClassificationReport

classify = typer.Typer(no_args_is_help=True, help="Train, run and evaluate image classifiers.")

_MODEL = "Network file, or imagenet for ImageNet's 1,000 classes."
_DATA = "Folder with a folder for each class, or a CSV of path,label."
_VIEWS = "What is looked at; default: full, or one where there is no pyramid."
_VALIDATION = "Split measured after each epoch, or none; default: val, if any."
_NETWORK = "zf5, convnet5, overfeat5, overfeat7, efficientnet-lite0, or a backbone's file (.onnx)."
_LEVELS = "Pyramid, between commas; none: the paper's last pooling, one size only."
_BACKBONE_LR = "Factor of the learning rate for the backbone, 0 to freeze it; default: 1, pretrained 0.5."
_MILESTONES = "Epochs at which the learning rate falls to a tenth; default: when the error stalls."
_SMOOTHING = "Share of a label spread over all classes; default: 0, pretrained 0.1."
_FROZEN = "First groups of layers that stay; default: 0, pretrained half."
_BATCH = "Images of a batch in all; default: 128, pretrained 32."
_DEVICE = "cpu or cuda; torchrun starts several processes."

Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL, autocompletion=opt.models)]
Data = Annotated[Path, typer.Argument(metavar="DATA", help=_DATA)]
ViewsName = Literal["one", "ten", "full", "maps10", "maps96", "maps98"]
Views = Annotated[ViewsName | None, typer.Option(help=_VIEWS)]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


@classify.command()
def train(
    context: typer.Context,
    data: Data,
    out: Annotated[Path, typer.Option(help="Network file to write.")],
    split: opt.TrainingSplit = None,
    validation: Annotated[str | None, typer.Option(help=_VALIDATION)] = None,
    network: Annotated[str, opt.network(help=_NETWORK)] = opt.BACKBONE,
    levels: Annotated[str | None, opt.network(help=_LEVELS)] = None,
    mode: opt.Mode = "max",
    width: Annotated[float, opt.network(help="Factor on the paper's numbers of filters.")] = 1.0,
    scales: Annotated[str, opt.network(help="Sides of the images, which take turns.")] = "224,180",
    uniform: Annotated[bool, opt.training("--uniform", help="Draw sides between the scales.")] = False,
    epochs: Annotated[int | None, opt.training(min=1, help="At most; default: 70, pretrained 8.")] = None,
    lr: Annotated[float, opt.training(help="Learning rate.")] = 0.01,
    backbone_lr: Annotated[float | None, opt.training(help=_BACKBONE_LR)] = None,
    milestones: Annotated[str | None, opt.training(help=_MILESTONES)] = None,
    weight_decay: Annotated[float, opt.training(help="Penalty of large weights.")] = 5e-4,
    label_smoothing: Annotated[float | None, opt.training(help=_SMOOTHING)] = None,
    frozen: Annotated[int | None, opt.training(min=0, help=_FROZEN)] = None,
    batch_size: Annotated[int | None, opt.training("--batch", min=1, help=_BATCH)] = None,
    accumulate: Annotated[int, opt.training(min=1, help="Batches of a step.")] = 1,
    workers: Annotated[int, opt.machine(min=0, help="Processes that read images; 0: only this one.")] = 0,
    max_bad: opt.MaxBad = opt.BAD,
    max_pixels: opt.MaxPixels = None,
    device: Annotated[str, opt.machine(help=_DEVICE)] = "cpu",
    precision: Annotated[Precision, opt.machine(help="What training computes in.")] = "32-true",
    seed: opt.Seed = 0,
) -> None:
    """Train a network on images in class folders. An interrupted run goes on when it is started again.

    Beside OUT appear a table (.csv) and a picture (.png) of the curves; OUT.checkpoint is removed at the end.
    Several GPUs or machines: torchrun --nproc-per-node N --no-python sppnet classify train ...
    """
    from sppnet.errors import check_extra

    check_extra("torch", "training a network")
    console.check_model(out)
    lists = {
        "levels": () if levels == "none" else _integers("--levels", levels),
        "scales": opt.integers("--scales", scales),
        "milestones": _integers("--milestones", milestones),
    }

    from sppnet.datasets.training import read_training_images

    images, held = read_training_images(data, split, validation)
    for part in (images, *([] if held is None else [held])):
        console.notes_of(part)
    console.note("loading PyTorch takes some seconds")

    from sppnet.classification.classifier import Classifier

    classifier = Classifier(**opt.settings_of(Classifier, context.params) | lists)
    checkpoint = out.with_name(f"{out.name}.checkpoint")
    first = int(os.environ.get("RANK", 0)) == 0  # of those that torchrun started
    records = classifier.fit_epochs(
        images, held, checkpoint=checkpoint, max_bad=max_bad / 100, track=console.track
    )
    failures = _followed(records, out, checkpoint, first)
    if first:
        classifier.save(out)
        checkpoint.unlink(missing_ok=True)
        print(f"{out}: {len(images.classes)} classes from {len(images)} images")
        console.end(failures, len(images) + (0 if held is None else len(held)), max_bad)


@classify.command()
def run(
    model: Model,
    images: opt.Images,
    views: Views = None,
    json_file: opt.Json = None,
    max_bad: opt.MaxBad = opt.BAD,
    max_pixels: opt.MaxPixels = None,
    device: opt.Device = "cpu",
) -> None:
    """Tell the five most probable classes of images."""
    console.model_files([model])

    from sppnet.classification.classifier import Classifier
    from sppnet.images import find_images

    paths = console.notes_of(find_images(images)).paths
    console.check_places(json_file, None, [*paths, model])
    classifier = Classifier.load(model, device=device)
    found: list[dict[str, Any]] = []
    failures: list[str] = []
    results = console.track(classifier.stream(paths, views), "Classifying", len(paths))
    for path, result in zip(paths, results, strict=True):
        if isinstance(result, Exception):
            failures.append(str(result))
            continue
        classes = [{"class": n, "title": t, "probability": p} for n, t, p in result.top(5)]
        found.append({"image": str(path), "classes": classes})
    rows = (
        ("" if place else Path(record["image"]).name, entry["title"], f"{entry['probability']:.3f}")
        for record in found
        for place, entry in enumerate(record["classes"])
    )
    console.print_rows(("image", "class", "probability"), rows)
    console.write_json(json_file, found)
    console.end(failures, len(paths), max_bad)


@classify.command()
def evaluate(
    model: Model,
    data: Data,
    split: opt.Split = None,
    views: Views = None,
    json_file: opt.Json = None,
    out: opt.Out = None,
    max_bad: opt.MaxBad = opt.BAD,
    max_pixels: opt.MaxPixels = None,
    cluster: opt.Cluster = None,
    workers: opt.Workers = None,
    device: opt.Device = "cpu",
) -> None:
    """Measure a network on labelled images: top-1, top-5, every class, what is taken for what."""
    console.model_files([model])
    console.check_places(json_file, out, [model, data])

    from sppnet.classification.classifier import Classifier
    from sppnet.datasets.image_folder import read_image_folder
    from sppnet.drawing import draw_classification_report
    from sppnet.progress import StageTimer

    classifier, timer = Classifier.load(model, device=device), StageTimer()
    chosen, images = classifier.views(views), console.notes_of(read_image_folder(data, split))
    seen = classifier.seen(images)
    if seen:
        console.warn(f"the network was fitted on {seen} of these {len(images)} photos: new ones are harder")
    with console.cluster_of(cluster, workers) as runner:
        report = classifier.evaluate(images, chosen, track=console.track, timer=timer, cluster=runner)
    seconds = timer.seconds["classify"] / len(images)
    _print_report(report, classifier.titles_, chosen)
    print(f"{seconds:.3g} s per image")
    console.write_json(json_file, {**report.facts(), "views": chosen, "seconds_per_image": seconds})
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        draw_classification_report(report, out, classifier.titles_)
        print(f"confusion matrix in {out}")
    console.end(report.unreadable, len(images), max_bad)


def _integers(option: str, text: str | None) -> tuple[int, ...] | None:
    return None if text is None else opt.integers(option, text)


def _followed(records: Iterable[EpochRecord], out: Path, checkpoint: Path, first: bool) -> list[str]:
    """Take the epochs as they end; the first process writes and prints what each gave.

    Returns a line for each image that could not be read.
    """
    from sppnet.classification.checkpoint import write_records
    from sppnet.drawing import plot_curves

    done: list[EpochRecord] = []
    try:
        for record in records:
            done.append(record)
            if first:
                _print_record(record)
                write_records(done, out.with_suffix(".csv"))
                plot_curves(done, out.with_suffix(".png"))
    except KeyboardInterrupt:
        console.note(f"the last checkpoint is {checkpoint}; the same command goes on from it")
        raise
    return [line for record in done for line in record.skipped]


def _print_record(record: EpochRecord) -> None:
    held = "" if record.validation_error is None else f", validation {100 * record.validation_error:.2f} %"
    print(
        f"epoch {record.epoch + 1}: side {record.side}, lr {record.lr:g}, loss {record.loss:.4f}, "
        f"error {100 * record.error:.2f} %{held}, {record.seconds:.0f} s",
        flush=True,
    )


def _print_report(report: ClassificationReport, titles: tuple[str, ...], views: str) -> None:
    counts = zip(titles, report.images, report.right, strict=True)
    rows = [(title, str(n), f"{100 * right / n:.1f} %") for title, n, right in counts if n]
    total = str(report.images.sum())
    tops = (("top-1", report.top1), ("top-5", report.top5))
    last = [(name, total, f"{100 * share:.2f} %") for name, share in tops]
    last.append(("mean of classes", "", f"{100 * report.mean_class:.2f} %"))
    console.print_rows(("class", "images", "right"), rows, f"{total} images, views {views}", last)
