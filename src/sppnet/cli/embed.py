"""The commands on vectors: of images and boxes, and the paper's protocols on them."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sppnet.cli.console import (
    Device,
    Json,
    Split,
    Weights,
    check_folder,
    check_places,
    integers,
    name_list,
    print_failures,
    print_table,
    track,
    write_json,
)
from sppnet.errors import DatasetError, SppnetError

if TYPE_CHECKING:
    from sppnet.arrays import Boxes
    from sppnet.retrieval.embedder import Embedder
    from sppnet.retrieval.vectors import VectorWriter

protocol = typer.Typer(no_args_is_help=True, help="The paper's protocols for frozen features.")

BackboneName = Annotated[str, typer.Option("--backbone", help="timm model name.")]
Stages = Annotated[str, typer.Option(help="Stages that feed the pyramid: 1 to 5, head.")]
Stride = Annotated[int, typer.Option(help="Largest stride of the backbone: 32, or 16 for finer maps.")]
Scales = Annotated[
    str, typer.Option(help="Shorter sides in pixels, by commas; each box takes the one that suits it.")
]
Levels = Annotated[str, typer.Option(help="Pyramid levels, by commas.")]
Mode = Annotated[str, typer.Option(help="What is kept of a bin: max or average.")]
View = Annotated[str, typer.Option(help="full: the whole image; crop: its centre; warp: pressed square.")]
Flip = Annotated[
    bool, typer.Option(help="Average with the mirror image, mirrored back; takes twice as long.")
]
Power = Annotated[float, typer.Option(help="Numbers are raised to it before the norm; 1 leaves them.")]
Pca = Annotated[int | None, typer.Option(min=1, help="Project to so many components.")]
Seed = Annotated[int, typer.Option(help="Of every random draw.")]

BACKBONE, STAGES = "tf_efficientnet_lite0", "head"
_STRIDE, _SCALES, _LEVELS = 32, "224", "3,2,1"
# The paper's best, of Overfeat-7 (tables 6 and 7).
_PUBLISHED = {"caltech101": 93.42, "voc": 82.44}


def embed(
    out: Annotated[Path, typer.Option(help="File of vectors to write (.safetensors).")],
    sources: Annotated[
        list[str] | None,
        typer.Argument(help="Image files, folders, patterns, or one folder of class folders."),
    ] = None,
    boxes: Annotated[
        Path | None,
        typer.Option(help="Boxes to embed: VOC folder, COCO JSON, YOLO folder, CSV of path,x1,y1,x2,y2."),
    ] = None,
    split: Split = None,
    append: Annotated[bool, typer.Option(help="Add images to OUT; those it has are not done again.")] = False,
    like: Annotated[
        Path | None, typer.Option(help="File of vectors whose settings and projection to take.")
    ] = None,
    backbone: BackboneName = BACKBONE,
    stages: Stages = STAGES,
    stride: Stride = _STRIDE,
    weights: Weights = None,
    scales: Scales = _SCALES,
    join_scales: Annotated[
        bool, typer.Option(help="Join a box's vectors of all scales, instead of taking one scale.")
    ] = False,
    levels: Levels = _LEVELS,
    mode: Mode = "max",
    view: View = "full",
    flip: Flip = False,
    power: Power = 0.5,
    norm: Annotated[str, typer.Option(help="l2: vectors of length 1; none: as they are.")] = "l2",
    pca: Pca = None,
    half: Annotated[bool, typer.Option(help="Write half precision.")] = False,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Write a vector for each image, or each of your boxes; a run that was stopped goes on."""
    from sppnet.retrieval.embedder import Embedder
    from sppnet.retrieval.vectors import VectorWriter, parts_folder
    from sppnet.storage import check_writable

    if out.suffix != ".safetensors":
        raise SppnetError(f"{out}: found the suffix {out.suffix!r}, expected .safetensors")
    check_writable(out)
    check_folder(parts_folder(out))
    embedder = make_embedder(
        *(backbone, stages, scales, levels),
        output_stride=stride,
        weights=weights,
        device=device,
        join_scales=join_scales,
        mode=mode,
        view=view,
        flip=flip,
        power=power,
        norm=norm,
        pca=pca,
        seed=seed,
    )
    default = Embedder(weights=weights, device=device)
    if like is not None and embedder.get_params() != default.get_params():
        raise SppnetError(f"--like {like}: found other settings beside it, expected it alone")
    if boxes is not None and view != "full":
        raise SppnetError(f"--view {view}: expected full for boxes")
    jobs = _jobs(sources or [], boxes, split)
    check_places(out, None, [path for path, _, _ in jobs])
    if like is not None:
        embedder = Embedder.load(like, weights=weights, device=device)
    embedder = _with_projection(embedder, out, append, jobs)
    writer = VectorWriter(out, embedder, half=half, append=append)
    waiting = _missing(jobs, writer)
    if len(waiting) < len(jobs):
        print(f"note: {len(jobs) - len(waiting)} of {len(jobs)} images are there already", file=sys.stderr)
    failures: list[str] = []
    stream = embedder.stream([path for path, _, _ in waiting], [asked for _, asked, _ in waiting])
    start = time.perf_counter()
    for (path, asked, labels), found in zip(waiting, track(stream, "Embedding", len(waiting)), strict=True):
        if isinstance(found, Exception):
            failures.append(str(found))
        else:
            writer.add(str(path), found, _boxes_of(path, asked), labels)
    seconds = time.perf_counter() - start
    print_failures(failures, len(jobs))
    if len(failures) == len(jobs):
        raise typer.Exit(1)
    count = writer.finish()
    speed = f", {len(waiting) / seconds:.3g} images per second" if waiting else ""
    print(f"{out}: {count} vectors of {embedder.length} numbers{speed}")
    raise typer.Exit(int(bool(failures)))


@protocol.command()
def caltech101(
    data: Annotated[
        Path, typer.Argument(help="Caltech101: a folder with a folder of images for each class.")
    ],
    splits: Annotated[int, typer.Option(min=1, help="Random splits.")] = 10,
    json_file: Json = None,
    backbone: BackboneName = BACKBONE,
    stages: Stages = STAGES,
    stride: Stride = _STRIDE,
    weights: Weights = None,
    scales: Annotated[
        str, typer.Option(help="Shorter sides in pixels, by commas; the vectors of several are joined.")
    ] = _SCALES,
    levels: Levels = _LEVELS,
    mode: Mode = "max",
    view: View = "full",
    flip: Flip = False,
    power: Power = 0.5,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Measure features by Caltech101's protocol: 30 training and up to 50 test images of each class.

    C of the SVMs is chosen by cross-validation inside the training images of each split.
    """
    from sppnet.datasets.image_folder import read_image_folder
    from sppnet.evaluation.protocols import caltech101

    check_places(json_file, None, [data])
    images = read_image_folder(data, ".")
    for note in images.notes:
        print(f"note: {note}", file=sys.stderr)
    embedder = make_embedder(
        *(backbone, stages, scales, levels),
        output_stride=stride,
        weights=weights,
        device=device,
        join_scales="," in scales,
        mode=mode,
        view=view,
        flip=flip,
        power=power,
    )
    report = caltech101(images, embedder, splits=splits, seed=seed, track=track)
    print(f"{100 * report.cross_validation:.2f} % by cross-validation inside the training images")
    print(
        f"{100 * report.mean:.2f} % mean class accuracy"
        + ("" if report.std is None else f" ± {100 * report.std:.2f}")
        + f" over {splits} splits (paper, Overfeat-7: {_PUBLISHED['caltech101']} ± 0.5)"
    )
    if json_file is not None:
        write_json(json_file, report.facts())


@protocol.command()
def voc(
    data: Annotated[Path, typer.Argument(help="VOC folder.")],
    train_split: Annotated[str, typer.Option(help="Images to learn from.")] = "trainval",
    test_split: Annotated[str, typer.Option(help="Images to test on.")] = "test",
    json_file: Json = None,
    classes: Annotated[str | None, typer.Option(help="Classes, by commas; default: all.")] = None,
    backbone: BackboneName = BACKBONE,
    stages: Stages = STAGES,
    stride: Stride = _STRIDE,
    weights: Weights = None,
    scales: Annotated[
        str, typer.Option(help="Shorter sides to choose from inside the training images, by commas.")
    ] = "224,320,392",
    levels: Levels = _LEVELS,
    mode: Mode = "max",
    view: View = "full",
    flip: Flip = False,
    power: Power = 0.5,
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Measure features by PASCAL VOC's classification task: AP of each class.

    Scale, and C of the SVM of each class, are chosen by cross-validation inside the training images.
    """
    from rich.table import Table

    from sppnet.datasets import read_dataset
    from sppnet.evaluation.protocols import voc

    check_places(json_file, None, [data])
    embedders = {
        side: make_embedder(
            *(backbone, stages, str(side), levels),
            output_stride=stride,
            weights=weights,
            device=device,
            mode=mode,
            view=view,
            flip=flip,
            power=power,
        )
        for side in integers("--scales", scales)
    }
    seen, unseen = read_dataset(data, train_split), read_dataset(data, test_split)
    names = None if classes is None else name_list(classes)
    report = voc(seen, unseen, embedders, classes=names, seed=seed, track=track)
    for side, value in report.cross_validation.items():
        print(f"shorter side {side}: {100 * value:.2f} mAP by cross-validation")
    table = Table("class", "positives", "AP (11-point)", "AP (area)", title=f"shorter side {report.scale}")
    for name, result in report.classes.items():
        values = (result.average_precision, result.area)
        table.add_row(name, str(result.positives), *(f"{100 * v:.2f}" for v in values))
    table.add_section()
    table.add_row("mean", "", *(f"{100 * mean:.2f}" for mean in (report.mean_ap, report.mean_ap_area)))
    print_table(table)
    print(f"paper, VOC 2007, 20 classes, Overfeat-7: {_PUBLISHED['voc']}")
    if json_file is not None:
        write_json(json_file, report.facts())


def make_embedder(backbone: str, stages: str, scales: str, levels: str, **settings: Any) -> Embedder:
    """Return the embedder of a command's options; `settings` are `Embedder`'s own."""
    from sppnet.retrieval.embedder import Embedder

    return Embedder(
        backbone,
        stages=tuple(name_list(stages)),
        scales=integers("--scales", scales),
        levels=integers("--levels", levels),
        **settings,
    )


Job = tuple[Path, "Boxes | None", tuple[str, ...]]


def _jobs(sources: Sequence[str], boxes: Path | None, split: str | None) -> list[Job]:
    """Return the images to embed, with the boxes that are asked of each and the labels of the rows."""
    from sppnet.datasets import read_dataset
    from sppnet.datasets.image_folder import read_image_folder
    from sppnet.images import image_files

    if boxes is None:
        if not sources:
            raise SppnetError("found no image, expected image files, folders or patterns, or --boxes")
        place = Path(sources[0])
        if len(sources) == 1 and _is_dataset(place):
            try:
                return [(sample.path, None, ("",)) for sample in read_dataset(place, split)]
            except DatasetError:
                labelled = read_image_folder(place, split)
            for note in labelled.notes:
                print(f"note: {note}", file=sys.stderr)
            return [(path, None, (labelled.classes[label],)) for path, label in labelled]
        return [(path, None, ("",)) for path in _distinct(image_files(sources))]
    dataset = read_dataset(boxes, split)
    for note in dataset.notes:
        print(f"note: {note}", file=sys.stderr)
    own = _distinct([sample.path for sample in dataset])
    targets = {sample.path.resolve(): sample.target for sample in dataset if sample.target.labels}
    paths = _distinct(image_files(sources)) if sources else own
    found = [(path, targets[path.resolve()]) for path in paths if path.resolve() in targets]
    if not found:
        raise SppnetError(f"{boxes}: found no box of the {len(paths)} images, expected some")
    if len(found) < len(paths):
        print(f"note: images without boxes, left out: {len(paths) - len(found)}", file=sys.stderr)
    return [(path, target.boxes, target.labels) for path, target in found]


def _is_dataset(place: Path) -> bool:
    """Tell a folder of folders, or a table, from images and a folder of images."""
    from sppnet.images import SUFFIXES

    if place.is_dir():
        return not any(path.suffix.lower() in SUFFIXES for path in place.iterdir())
    return place.suffix.lower() in (".csv", ".json", ".yaml", ".yml")


def _missing(jobs: Sequence[Job], writer: VectorWriter) -> list[Job]:
    """Return the images still to embed; raise a ValueError if what is there is not what is asked for."""
    import numpy as np

    names = {str(path) for path, _, _ in jobs}
    strange = sorted(writer.part_names - names)
    if strange:
        raise SppnetError(
            f"{writer.folder}: parts of a run with {strange[0]}; start that again, or remove the folder"
        )
    waiting = []
    for path, asked, labels in jobs:
        known = writer.done.get(str(path))
        if known is None:
            waiting.append((path, asked, labels))
        elif not np.array_equal(known, _boxes_of(path, asked)):
            raise SppnetError(
                f"{writer.path}: found other boxes of {path}, expected those that are asked for"
            )
    return waiting


def _distinct(paths: Sequence[Path]) -> Sequence[Path]:
    """Return the paths, unless two are one file."""
    files: dict[Path, Path] = {}
    for path in paths:
        first = files.setdefault(path.resolve(), path)
        if first is not path:
            raise SppnetError(f"{path}: found the same file as {first}, expected each image once")
    return paths


def _boxes_of(path: Path, asked: Boxes | None) -> Boxes:
    """Return the boxes that were embedded: those that were asked for, or the whole image."""
    import numpy as np

    from sppnet.images import image_size

    if asked is not None:
        return asked
    height, width = image_size(path)
    return np.array([[0, 0, width, height]], np.float32)


def _with_projection(embedder: Embedder, out: Path, append: bool, jobs: Sequence[Job]) -> Embedder:
    """Return the embedder ready to embed: with the projection of an earlier run, or a new one."""
    import numpy as np

    from sppnet.retrieval.embedder import SAMPLE, Embedder
    from sppnet.retrieval.vectors import parts_folder

    if embedder.pca is None or embedder.__sklearn_is_fitted__():
        return embedder
    kept = parts_folder(out) / "embedder.safetensors"
    for earlier in (out if append else kept, kept):
        if earlier.exists():
            known = Embedder.load(earlier, weights=embedder.weights, device=embedder.device)
            check_kind(earlier, known, embedder)
            return known
    order = np.random.default_rng(embedder.seed).permutation(len(jobs))[:SAMPLE]
    chosen = [jobs[i] for i in order.tolist()]
    stream = embedder.unprojected().stream([p for p, _, _ in chosen], [asked for _, asked, _ in chosen])
    results = list(track(stream, "Sampling", len(chosen)))
    rows = [found for found in results if not isinstance(found, Exception)]
    if not rows:
        raise next(found for found in results if isinstance(found, Exception))
    embedder.fit_vectors(rows)
    kept.parent.mkdir(exist_ok=True)
    embedder.save(kept)
    return embedder


def check_kind(place: Path, known: Embedder, asked: Embedder) -> None:
    """Raise a ValueError, with both names, if what is there was made with other settings."""
    if known.kind != asked.kind:
        raise SppnetError(f"{place}: made by another embedder, {known.kind}; expected {asked.kind}")
