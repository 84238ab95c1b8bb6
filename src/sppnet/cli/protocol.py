"""The commands that measure features by the paper's protocols."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import sppnet.cli.console as console
import sppnet.cli.options as opt

protocol = typer.Typer(no_args_is_help=True, help="The paper's protocols for frozen features.")

# The paper's best, of Overfeat-7 (tables 6 and 7).
_PUBLISHED = {"caltech101": 93.42, "voc": 82.44}


@protocol.command()
def caltech101(
    context: typer.Context,
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A folder of images for each class.")],
    splits: Annotated[int, typer.Option(min=1, help="Random splits.")] = 10,
    json_file: opt.Json = None,
    backbone: opt.BackboneName = opt.BACKBONE,
    stages: opt.Stages = opt.STAGES,
    stride: opt.Stride = opt.STRIDE,
    scales: Annotated[str, opt.network(help="Shorter sides, whose vectors are joined.")] = opt.SCALES,
    levels: opt.Levels = opt.LEVELS,
    mode: opt.Mode = "max",
    view: opt.View = "full",
    flip: opt.Flip = False,
    power: opt.Power = 0.5,
    max_pixels: opt.MaxPixels = None,
    device: opt.Device = "cpu",
    seed: opt.Seed = 0,
) -> None:
    """Measure features by Caltech101's protocol: 30 training and up to 50 test images of each class.

    C of the SVMs is chosen by cross-validation inside the training images of each split.
    """
    from sppnet.datasets.image_folder import read_image_folder
    from sppnet.evaluation.protocols import caltech101

    console.check_places(json_file, None, [data])
    images = console.notes_of(read_image_folder(data, "."))
    embedder = opt.embedder_of(context, join_scales="," in scales)
    report = caltech101(images, embedder, splits=splits, seed=seed, track=console.track)
    print(f"{100 * report.cross_validation:.2f} % by cross-validation inside the training images")
    spread = "" if report.std is None else f" ± {100 * report.std:.2f}"
    paper = f"(paper, Overfeat-7: {_PUBLISHED['caltech101']} ± 0.5)"
    print(f"{100 * report.mean:.2f} % mean class accuracy{spread} over {splits} splits {paper}")
    console.write_json(json_file, report.facts())


@protocol.command()
def voc(
    context: typer.Context,
    data: Annotated[Path, typer.Argument(metavar="DATA", help="VOC folder.")],
    train_split: Annotated[str, typer.Option(help="Images to learn from.")] = "trainval",
    test_split: Annotated[str, typer.Option(help="Images to test on.")] = "test",
    json_file: opt.Json = None,
    classes: opt.Classes = None,
    backbone: opt.BackboneName = opt.BACKBONE,
    stages: opt.Stages = opt.STAGES,
    stride: opt.Stride = opt.STRIDE,
    scales: Annotated[str, opt.network(help="Shorter sides to choose from.")] = "224,320,392",
    levels: opt.Levels = opt.LEVELS,
    mode: opt.Mode = "max",
    view: opt.View = "full",
    flip: opt.Flip = False,
    power: opt.Power = 0.5,
    max_pixels: opt.MaxPixels = None,
    device: opt.Device = "cpu",
    seed: opt.Seed = 0,
) -> None:
    """Measure features by PASCAL VOC's classification task: AP of each class.

    Scale, and C of the SVM of each class, are chosen by cross-validation inside the training images.
    """
    from sppnet.datasets import read_dataset
    from sppnet.evaluation.protocols import voc

    console.check_places(json_file, None, [data])
    sides = opt.integers("--scales", scales)
    embedders = {side: opt.embedder_of(context, scales=(side,)) for side in sides}
    seen, unseen = read_dataset(data, train_split), read_dataset(data, test_split)
    names = None if classes is None else opt.name_list(classes)
    report = voc(seen, unseen, embedders, classes=names, seed=seed, track=console.track)
    for side, value in report.cross_validation.items():
        print(f"shorter side {side}: {100 * value:.2f} mAP by cross-validation")
    console.print_precisions(report, "positives", f"shorter side {report.scale}", 2)
    print(f"paper, VOC 2007, 20 classes, Overfeat-7: {_PUBLISHED['voc']}")
    console.write_json(json_file, report.facts())
