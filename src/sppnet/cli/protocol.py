"""The commands that measure features by the paper's protocols."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sppnet.cli.console import (
    Device,
    Json,
    Weights,
    check_places,
    integers,
    name_list,
    print_table,
    track,
    write_json,
)
from sppnet.cli.embedder import (
    BACKBONE,
    LEVELS,
    SCALES,
    STAGES,
    STRIDE,
    BackboneName,
    Flip,
    Levels,
    Mode,
    Power,
    Seed,
    Stages,
    Stride,
    View,
    embedder_of,
)

protocol = typer.Typer(no_args_is_help=True, help="The paper's protocols for frozen features.")

# The paper's best, of Overfeat-7 (tables 6 and 7).
_PUBLISHED = {"caltech101": 93.42, "voc": 82.44}


@protocol.command()
def caltech101(
    context: typer.Context,
    data: Annotated[
        Path, typer.Argument(help="Caltech101: a folder with a folder of images for each class.")
    ],
    splits: Annotated[int, typer.Option(min=1, help="Random splits.")] = 10,
    json_file: Json = None,
    backbone: BackboneName = BACKBONE,
    stages: Stages = STAGES,
    stride: Stride = STRIDE,
    weights: Weights = None,
    scales: Annotated[
        str, typer.Option(help="Shorter sides in pixels, by commas; the vectors of several are joined.")
    ] = SCALES,
    levels: Levels = LEVELS,
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
    embedder = embedder_of(context, join_scales="," in scales)
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
    context: typer.Context,
    data: Annotated[Path, typer.Argument(help="VOC folder.")],
    train_split: Annotated[str, typer.Option(help="Images to learn from.")] = "trainval",
    test_split: Annotated[str, typer.Option(help="Images to test on.")] = "test",
    json_file: Json = None,
    classes: Annotated[str | None, typer.Option(help="Classes, by commas; default: all.")] = None,
    backbone: BackboneName = BACKBONE,
    stages: Stages = STAGES,
    stride: Stride = STRIDE,
    weights: Weights = None,
    scales: Annotated[
        str, typer.Option(help="Shorter sides to choose from inside the training images, by commas.")
    ] = "224,320,392",
    levels: Levels = LEVELS,
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
    sides = integers("--scales", scales)
    embedders = {side: embedder_of(context, scales=(side,)) for side in sides}
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
