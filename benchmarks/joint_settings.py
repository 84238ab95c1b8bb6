"""Settings of the training of a network by time, compared on photos held out of the train split. Run as::

    python benchmarks/joint_settings.py DATA --classes cat,cow,dog,horse,person,sheep --per-class 20 \\
        --backbone efficientnet-lite0 --seconds 45 --variant "" --variant "batch=8 frozen=2"

Each variant, settings of `sppnet.rpn.settings.Joint` between blanks, trains a network for so many seconds on
some photos, drawn as in few_images.py or else seven of ten; SVMs are fitted on it as by ``sppnet detect
train``, and measured on the other photos, or some of them.
"""

from __future__ import annotations

import argparse
import ast
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from common import commit, machine, table
from few_images import draw
from sppnet.datasets import Sample, read_dataset
from sppnet.detection.detector import OWN_C, OWN_NMS_IOU, PYRAMID, Detector
from sppnet.detection.fit import FitSettings, Work, fit
from sppnet.detection.sampling import Examples
from sppnet.detection.svm import MiningSettings
from sppnet.evaluation.detection import evaluate_detections
from sppnet.features.backbone import Backbone, backbone_path
from sppnet.features.graph import STAGES, STRIDES, read_graph
from sppnet.features.windows import WindowPooling
from sppnet.images import pixels_of
from sppnet.rpn.pictures import kept_photo, side_for
from sppnet.rpn.settings import Joint
from sppnet.rpn.training import Clock, Trainer


def read_variant(text: str) -> dict[str, Any]:
    """Read ``batch=8 frozen=2``."""
    pairs = [part.split("=", 1) for part in text.split()]
    return {name: ast.literal_eval(value) for name, value in pairs}


def divided(args: argparse.Namespace, samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Return photos to learn from, and others."""
    if args.per_class:
        chosen = draw(samples, args.classes.split(","), args.per_class, args.seed)
        names = {sample.path for sample in chosen}
        rest = [sample for sample in samples if sample.path not in names]
        order = np.random.default_rng(5).permutation(len(rest))
        return chosen, [rest[i] for i in order[: args.held]]
    order = np.random.default_rng(args.seed).permutation(len(samples))
    part = round(0.7 * len(samples))
    return [samples[i] for i in order[:part]], [samples[i] for i in order[part:]]


def measured(
    data: Sequence[Sample],
    held: Sequence[Sample],
    classes: tuple[str, ...],
    args: argparse.Namespace,
    text: str,
) -> tuple[str, ...]:
    """Train, fit and measure one variant."""
    graph = read_graph(backbone_path(args.backbone))
    pixels, targets = [pixels_of(s.image) for s in data], [s.target for s in data]
    side = side_for([(p.shape[0], p.shape[1]) for p in pixels], targets)
    photos = [kept_photo(p, t, classes) for p, t in zip(pixels, targets, strict=True)]
    trainer = Trainer(graph, classes, replace(Joint(), **read_variant(text)), args.seed)
    clock, begun = Clock(seconds=args.seconds), time.perf_counter()
    trainer.train(photos, side, clock)
    passed = time.perf_counter() - begun
    backbone = Backbone(trainer.graph("trained"), STAGES, max(STRIDES))
    settings = FitSettings(
        WindowPooling((side,)), mining=MiningSettings(C=OWN_C), folds=0, moves=0, nms_iou=OWN_NMS_IOU
    )
    none = [np.zeros((0, 4), np.float32)] * len(data)
    with TemporaryDirectory() as folder:
        examples = Examples([s.image for s in data], none, targets, classes)
        fitted = fit(examples, settings, backbone, Work(Path(folder)))
    detector = Detector(folds=0)
    detector.fitted_ = replace(fitted, side=side)
    found = [detector.predict(s.image, threshold=0.0, scores="svm") for s in held]
    thresholds = dict.fromkeys(classes, 0.5)
    report = evaluate_detections(found, [s.target for s in held], classes, 0, thresholds)
    pictures = clock.taken * trainer.settings.batch
    return (text or "as it is", f"{passed:.0f}", str(pictures), f"{100 * report.mean_ap:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--classes", help="default: all")
    parser.add_argument("--per-class", type=int, help="photos to learn from; default: seven of ten photos")
    parser.add_argument("--held", type=int, default=200, help="of the others, with --per-class")
    parser.add_argument("--seconds", type=float, default=45)
    parser.add_argument("--backbone", default=PYRAMID)
    parser.add_argument("--variant", action="append")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    samples = list(read_dataset(args.data, "train"))
    names = {name for sample in samples for name in sample.target.labels}
    classes = tuple(args.classes.split(",") if args.classes else sorted(names))
    data, held = divided(args, samples)
    rows = []
    for text in args.variant or [""]:
        rows.append(measured(data, held, classes, args, text))
        print(rows[-1], flush=True)
    print(f"\n{machine()}; commit {commit()}; {len(data)} photos to learn from, {len(held)} others\n")
    print(table(("variant", "seconds", "pictures", "mAP"), rows))


if __name__ == "__main__":
    main()
