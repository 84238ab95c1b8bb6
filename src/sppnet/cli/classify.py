"""The commands on classifiers: training on folders of images, classes of images, how good a network is."""

from __future__ import annotations

import atexit
import csv
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sppnet.cli.console import check_places, make_folder, track, write_json
from sppnet.cli.options import Json, Out, integers
from sppnet.errors import SppnetError

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from rich.progress import Progress, TaskID
    from rich.table import Table
    from torch import Tensor

    from sppnet.classification.batches import Batch, CentralCrops, CropBatches, Source, WholeBatches
    from sppnet.classification.network import NetworkSettings, SPPNet
    from sppnet.classification.training import EpochRecord
    from sppnet.datasets.image_folder import LabelledImages

classify = typer.Typer(no_args_is_help=True, help="Train, run and evaluate image classifiers.")

Model = Annotated[str, typer.Argument(help="Network file; - is the installed one of ImageNet's classes.")]
Data = Annotated[Path, typer.Argument(help="Folder with a folder for each class, or a CSV of path,label.")]
Split = Annotated[str | None, typer.Option(help="Split of the data, such as train or val.")]
Views = Annotated[
    str | None,
    typer.Option(help="one, ten, full, maps10, maps96 or maps98; default: full, without a pyramid one."),
]
Device = Annotated[str, typer.Option(help="cpu, or a PyTorch device such as cuda.")]
_SHOWN, SHIPPED = 5, "-"
# Of the vectors of a pretrained backbone: the mean norm to which the paper's code scales features (section 4.1).
PRETRAINED_NORM = 20.0


@classify.command()
def train(
    data: Data,
    out: Annotated[Path, typer.Option(help="Network file to write.")],
    split: Annotated[str | None, typer.Option(help="Split to learn from; default: train, if any.")] = None,
    validation: Annotated[
        str | None, typer.Option(help="Split measured after each epoch, or none; default: val, if any.")
    ] = None,
    network: Annotated[
        str, typer.Option(help="zf5, convnet5, overfeat5, overfeat7, or a timm model name.")
    ] = "tf_efficientnet_lite0",
    weights: Annotated[
        str | None,
        typer.Option(help="Of a timm network: a file, or random; default: the installed ImageNet weights."),
    ] = None,
    levels: Annotated[
        str | None, typer.Option(help="Pyramid, by commas; none: the paper's last pooling, one size only.")
    ] = None,
    mode: Annotated[str, typer.Option(help="What is kept of a bin: max or average.")] = "max",
    sizes: Annotated[
        str, typer.Option(help="Sides of the images, by commas; epochs take turns.")
    ] = "224,180",
    uniform: Annotated[bool, typer.Option(help="Draw each epoch's size between the sizes.")] = False,
    whole: Annotated[bool, typer.Option(help="Train on whole images in their own aspect ratios.")] = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="At most; default: 70, pretrained 8.")] = None,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 0.01,
    backbone_rate: Annotated[
        float | None,
        typer.Option(help="Its factor for the backbone; 0 freezes it; default: 1, pretrained 0.5."),
    ] = None,
    drops: Annotated[
        str | None,
        typer.Option(help="Epochs at which the rate falls to a tenth; default: when the error stalls."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images of a batch in all; default: 128, pretrained 32.")
    ] = None,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches of a step.")] = 1,
    frozen: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="First groups of the backbone's layers that stay; default: 0, pretrained half of them.",
        ),
    ] = None,
    smoothing: Annotated[
        float | None,
        typer.Option(help="Share of a label spread over all classes; default: 0, pretrained 0.1."),
    ] = None,
    width: Annotated[float, typer.Option(help="Factor on the paper's numbers of filters.")] = 1.0,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images; 0: only this one.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda; torchrun starts several processes.")] = "cpu",
    precision: Annotated[str, typer.Option(help="32-true, bf16-mixed or 16-mixed.")] = "32-true",
    seed: Annotated[int, typer.Option(help="Of every random draw.")] = 0,
) -> None:
    """Train a network on images in class folders. An interrupted run goes on when it is started again.

    Beside OUT appear a table (.csv) and a picture (.png) of the curves; OUT.checkpoint is removed at the end.
    Several GPUs or machines: torchrun --nproc-per-node N --no-python sppnet classify train ...
    """
    from sppnet.classification import training
    from sppnet.classification.network import ARCHITECTURES, NetworkSettings, build, save_network
    from sppnet.storage import check_writable

    check_writable(out)
    paper = network in ARCHITECTURES
    pretrained = not paper and weights != "random"
    sides, pyramid = integers("--sizes", sizes), _pyramid(levels, paper)
    if pyramid is None and (whole or uniform or len(sides) > 1):
        raise SppnetError("--levels none: a network without a pyramid trains at one size; found several")
    if not paper and (width != 1 or pyramid is None):
        raise SppnetError(f"--width and --levels none are for the paper's networks, found {network}")
    images, held = _training_images(data, split, validation)
    norm = PRETRAINED_NORM if pretrained else None
    settings = NetworkSettings(
        network, images.classes, pyramid, mode, width=width, norm=norm, size=max(sides)
    )
    model = build(settings, weights, seed)
    model.map_of(min(sides))
    length = epochs or (8 if pretrained else 70)
    recipe = training.Recipe(
        epochs=length,
        rate=rate,
        backbone_rate=(0.5 if pretrained else 1.0) if backbone_rate is None else backbone_rate,
        drops=_drops(drops, (round(0.6 * length), round(0.85 * length)) if pretrained else None),
        accumulate=accumulate,
        frozen=(len(model.groups) // 2 if pretrained else 0) if frozen is None else frozen,
        smoothing=(0.1 if pretrained else 0.0) if smoothing is None else smoothing,
    )
    fabric = _fabric(device, precision)
    source, central = _sources(
        images, held, fabric, batch or (32 if pretrained else 128), sides, whole, uniform, workers, seed
    )
    identity = (
        f"{settings} {recipe} of {len(images)} images, weights {weights}, batches of {source.batch_size}, "
        f"sizes {sizes}, uniform {uniform}, whole {whole}, precision {precision}, seed {seed}"
    )
    first = fabric.global_rank == 0
    checkpoint = out.with_name(f"{out.name}.checkpoint")
    with _watched(source, recipe.epochs, show=first) as batches:
        ended = training.train(
            model,
            batches,
            recipe,
            validation=central,
            checkpoint=checkpoint,
            identity=identity,
            fabric=fabric,
            seed=seed,
        )
        last = _followed(ended, out, checkpoint, show=first)
    if first:
        about = {"recipe": asdict(recipe), "images": len(images), "record": asdict(last)}
        save_network(out, model, settings, about)
        checkpoint.unlink(missing_ok=True)
        if last.unreadable:
            print(f"note: {last.unreadable} files could not be read", file=sys.stderr)
        print(f"{out}: {len(images.classes)} classes from {len(images)} images")


@classify.command()
def run(
    model: Model,
    images: Annotated[list[str], typer.Argument(help="Image files, folders or glob patterns.")],
    views: Views = None,
    json_file: Json = None,
    device: Device = "cpu",
) -> None:
    """Tell the five most probable classes of images."""
    from rich.table import Table

    from sppnet.images import image_files

    paths = image_files(images)
    check_places(json_file, None, [*paths, model])
    network, settings = _load(model, device)
    titles = _titles(settings.classes)
    table = Table("image", "class", "probability")
    records: list[dict[str, Any]] = []
    failures: list[str] = []
    for path, result in track(_classified(network, paths, _views(views, network)), "Classifying", len(paths)):
        if isinstance(result, Exception):
            failures.append(str(result))
            continue
        best = result.topk(min(_SHOWN, len(titles)))
        rows = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        for place, (label, value) in enumerate(rows):
            table.add_row("" if place else path.name, titles[label], f"{value:.3f}")
        table.add_section()
        found = [{"class": settings.classes[i], "title": titles[i], "probability": p} for i, p in rows]
        records.append({"image": str(path), "classes": found})
    print_table(table)
    if json_file is not None:
        write_json(json_file, records)
    print_failures(failures, len(paths))
    raise typer.Exit(int(bool(failures)))


@classify.command()
def evaluate(
    model: Model,
    data: Data,
    split: Split = None,
    views: Views = None,
    json_file: Json = None,
    out: Out = None,
    device: Device = "cpu",
) -> None:
    """Measure a network on labelled images: top-1, top-5, every class, what is taken for what."""
    import numpy as np
    from rich.table import Table

    from sppnet.drawing import draw_classification_report
    from sppnet.evaluation.classification import evaluate_classification

    check_places(json_file, out, [model, data])
    network, settings = _load(model, device)
    images = _read(data, split).relabelled(settings.classes)
    chosen = _views(views, network)
    scores: list[Tensor] = []
    labels: list[int] = []
    failures: list[str] = []
    start = time.perf_counter()
    results = _classified(network, [path for path, _ in images], chosen)
    for (_, result), (_, label) in zip(track(results, "Classifying", len(images)), images, strict=True):
        if isinstance(result, Exception):
            failures.append(str(result))
        else:
            scores.append(result)
            labels.append(label)
    seconds = (time.perf_counter() - start) / len(images)
    print_failures(failures, len(images))
    if not scores:
        raise typer.Exit(1)
    report = evaluate_classification(
        np.stack([s.numpy() for s in scores]), np.array(labels), settings.classes
    )
    titles = _titles(settings.classes)
    table = Table("class", "images", "right", title=f"{len(labels)} images, views {chosen}")
    for title, count, right in zip(titles, report.images, report.right, strict=True):
        if count:
            table.add_row(title, str(count), f"{100 * right / count:.1f} %")
    table.add_section()
    table.add_row("top-1", str(len(labels)), f"{100 * report.top1:.2f} %")
    table.add_row("top-5", str(len(labels)), f"{100 * report.top5:.2f} %")
    table.add_row("mean of classes", "", f"{100 * report.mean_class:.2f} %")
    print_table(table)
    print(f"{seconds:.3g} s per image")
    if json_file is not None:
        found = {"unreadable": failures, "views": chosen, "seconds_per_image": seconds}
        write_json(json_file, {**report.facts(), **found})
    if out is not None:
        make_folder(out)
        draw_classification_report(report, out, titles)
        print(f"confusion matrix in {out}")
    raise typer.Exit(int(bool(failures)))


def _read(data: Path, split: str | None) -> LabelledImages:
    from sppnet.datasets.image_folder import read_image_folder

    images = read_image_folder(data, split)
    for note in images.notes:
        print(f"note: {note}", file=sys.stderr)
    return images


def _training_images(
    data: Path, split: str | None, validation: str | None
) -> tuple[LabelledImages, LabelledImages | None]:
    """Read what to learn from and what to measure on, by default the folders train and val where they are."""
    images = _read(data, split or ("train" if (data / "train").is_dir() else None))
    if validation is None and split is None and (data / "val").is_dir():
        validation = "val"
    if validation in (None, "none"):
        return images, None
    return images, _read(data, validation).relabelled(images.classes)


def _pyramid(levels: str | None, paper: bool) -> tuple[int, ...] | None:
    """Read the levels; by default the paper's for its networks, one level less for a map of 7 x 7 cells."""
    if levels == "none":
        return None
    return integers("--levels", levels or ("6,3,2,1" if paper else "3,2,1"))


def _drops(text: str | None, default: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return default if text is None else integers("--drops", text)


def _fabric(device: str, precision: str) -> Fabric:
    """Return the processes that train: this one, or those that torchrun started."""
    import torch
    from lightning_fabric import Fabric

    if device not in ("cpu", "cuda"):
        raise SppnetError(f"--device {device}: expected cpu or cuda")
    if precision not in ("32-true", "bf16-mixed", "16-mixed"):
        raise SppnetError(f"--precision {precision}: expected 32-true, bf16-mixed or 16-mixed")
    local, world = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda" and local > torch.cuda.device_count():
        raise SppnetError(f"found {torch.cuda.device_count()} GPUs, expected the {local} that were asked for")
    fabric = Fabric(
        accelerator=device,
        devices=local,
        num_nodes=world // local,
        strategy="ddp" if world > 1 else "auto",
        precision=precision,  # type: ignore[arg-type]
    )
    fabric.launch()
    if torch.distributed.is_initialized() and torch.distributed.get_backend() != "nccl":
        # Threads of a group that outlives Python can abort the process; Fabric only sees to nccl.
        atexit.register(torch.distributed.destroy_process_group)
    return fabric


def _sources(
    images: LabelledImages,
    held: LabelledImages | None,
    fabric: Fabric,
    batch: int,
    sides: tuple[int, ...],
    whole: bool,
    uniform: bool,
    workers: int,
    seed: int,
) -> tuple[CropBatches | WholeBatches, CentralCrops | None]:
    from sppnet.classification.batches import CentralCrops, CropBatches, WholeBatches, sample_components

    share: dict[str, Any] = {"workers": workers, "world": fabric.world_size, "rank": fabric.global_rank}
    source = (WholeBatches if whole else CropBatches)(
        images,
        min(batch, len(images)),
        sides,
        uniform=uniform,
        components=sample_components(images, seed=seed),
        seed=seed,
        **share,
    )
    central = None if held is None else CentralCrops(held, batch, max(sides), **share)
    return source, central


@contextmanager
def _watched(source: Source, epochs: int, *, show: bool) -> Iterator[Source]:
    """Lend a source whose batches move a bar with the time left."""
    if not show:
        yield source
        return
    with progress_bar() as bar:
        yield _Watched(source, bar, bar.add_task("Training", total=epochs * len(source)))


class _Watched:
    def __init__(self, source: Source, bar: Progress, task: TaskID) -> None:
        self._source, self._bar, self._task = source, bar, task
        self._started = False

    def __len__(self) -> int:
        return len(self._source)

    @property
    def batch_size(self) -> int:
        return self._source.batch_size

    def size_of(self, number: int) -> int:
        return self._source.size_of(number)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        done = number * len(self) + start
        if not self._started:
            # The time left is that of the batches still to come, at the speed of this run alone.
            self._bar.reset(self._task, completed=done)
            self._started = True
        for i, batch in enumerate(self._source.epoch(number, start), done + 1):
            yield batch
            self._bar.update(self._task, completed=i)


def _followed(records: Iterable[EpochRecord], out: Path, checkpoint: Path, *, show: bool) -> EpochRecord:
    """Take the epochs as they end, write and print what each gave, and return the last."""
    done: list[EpochRecord] = []
    try:
        for record in records:
            done.append(record)
            if show:
                _print_record(record)
                _write_curves(out, done)
    except KeyboardInterrupt:
        print(f"the last checkpoint is {checkpoint}; the same command goes on from it", file=sys.stderr)
        raise
    return done[-1]


def _print_record(record: EpochRecord) -> None:
    held = "" if record.validation_error is None else f", validation {100 * record.validation_error:.2f} %"
    print(
        f"epoch {record.epoch + 1}: size {record.size}, rate {record.rate:g}, loss {record.loss:.4f}, "
        f"error {100 * record.error:.2f} %{held}, {record.seconds:.0f} s",
        flush=True,
    )


def _write_curves(out: Path, records: Sequence[EpochRecord]) -> None:
    """Write what every epoch gave, as a table and as a picture."""
    from sppnet.drawing import plot_curves
    from sppnet.storage import atomic_path

    with atomic_path(out.with_suffix(".csv")) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(records[0])))
        writer.writeheader()
        writer.writerows(asdict(record) for record in records)
    plot_curves(records, out.with_suffix(".png"))


def _load(model: str, device: str) -> tuple[SPPNet, NetworkSettings]:
    from sppnet.classification.network import imagenet_classifier, load_network
    from sppnet.features.backbone import check_device

    check_device(device)
    network, settings = imagenet_classifier() if model == SHIPPED else load_network(model)
    return network.to(device), settings


def _views(views: str | None, network: SPPNet) -> str:
    """Return the views to take; by default the whole image, where the network takes it."""
    from sppnet.classification.views import check_views

    chosen = views or ("full" if network.takes_any_size else "one")
    check_views(network, chosen)
    return chosen


def _titles(classes: Sequence[str]) -> list[str]:
    """Return what people call the classes: descriptions of WordNet ids, other names as they are."""
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo()
    known = set(info.label_names())  # type: ignore[no-untyped-call]
    return [info.label_name_to_description(name) if name in known else name for name in classes]


def _classified(
    network: SPPNet, paths: Sequence[Path], views: str
) -> Iterator[tuple[Path, Tensor | Exception]]:
    """Yield the probabilities of each image, or the error that it gave; the next is read meanwhile."""
    from concurrent.futures import ThreadPoolExecutor

    from sppnet.classification.views import probabilities
    from sppnet.images import read_image

    with ThreadPoolExecutor(1) as ahead:
        waiting = [ahead.submit(read_image, path) for path in paths[:1]]
        for i, path in enumerate(paths):
            if i + 1 < len(paths):
                waiting.append(ahead.submit(read_image, paths[i + 1]))
            try:
                yield path, probabilities(network, waiting.pop(0).result(), views)
            except (SppnetError, OSError) as error:
                yield path, error


def progress_bar() -> Progress:
    """Return a bar for stderr with counts, the time passed and the time left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))


def print_failures(failures: Sequence[str], total: int) -> None:
    """Print a line on stderr for each of `total` images that failed, and their number."""
    for failure in failures:
        print(f"sppnet: {failure}", file=sys.stderr)
    if failures and total > 1:
        print(f"sppnet: {len(failures)} of {total} images failed", file=sys.stderr)


def print_table(table: Table) -> None:
    """Print a table; names of files and classes are text, whatever brackets or colons they hold."""
    from rich.console import Console

    Console(markup=False, emoji=False).print(table)
