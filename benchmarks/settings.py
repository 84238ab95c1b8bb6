"""Compare detector settings on held-out images of the train split; the test split is never looked at.

Run as::

    python benchmarks/settings.py DATA --train 300 --held 200 --classes cat,cow,dog,horse,person,sheep \\
        --variant scales=480 --variant "scales=480 levels=6,3,2,1" \\
        --variant "scales=240,336,480,672 ridge=4000"

A variant names arguments of `sppnet.Detector`, or C of its SVMs; what it does not name keeps its default.
Maps are kept in a temporary folder for variants of the same scales: about 12 MB an image at four scales.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.progress import track

from common import commit
from sppnet import Detector, read_dataset
from sppnet.detection.svm import MiningSettings
from sppnet.evaluation.detection import mean_average_precision, voc_detection
from sppnet.features.cache import MapCache
from sppnet.progress import StageTimer
from sppnet.proposals import cache_folder, parse, propose_all


def settings(text: str) -> dict:
    values = dict(part.split("=") for part in text.split())
    read: dict[str, Callable] = {
        "scales": lambda v: tuple(map(int, v.split(","))),
        "levels": lambda v: tuple(map(int, v.split(","))),
        "projection": str,
        "scale_rule": str,
        "negatives": str,
        "moves": int,
    }
    found = {name: read.get(name, float)(value) for name, value in values.items()}
    return found | ({"mining": MiningSettings(C=found.pop("C"))} if "C" in found else {})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--train", type=int, default=300)
    parser.add_argument("--held", type=int, default=200)
    parser.add_argument("--classes", help="default: all")
    parser.add_argument("--variant", action="append", required=True)
    parser.add_argument("--proposals", default="selective-search+edge-boxes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data = read_dataset(args.data, "train")
    names = args.classes.split(",") if args.classes else list(data.classes)
    order = np.random.default_rng(args.seed).permutation(len(data))
    chosen = [data[i] for i in order[: args.train + args.held]]
    stream = propose_all([s.path for s in chosen], parse(args.proposals), cache_folder())
    windows = [found.boxes for found in track(stream, "Windows", total=len(chosen))]
    fit, held = slice(args.train), slice(args.train, None)
    targets = [s.target for s in chosen]

    print(f"{args.train} images to fit, {args.held} held out of train, seed {args.seed}; commit {commit()}\n")
    print("| variant | SVM | + box regression | fit s |\n|---|---|---|---|", flush=True)
    with TemporaryDirectory() as folder:
        for variant in args.variant:
            detector = Detector(**settings(variant))
            start = time.perf_counter()
            detector.fit(chosen[fit], classes=names, windows=windows[fit], cache=folder)
            seconds = time.perf_counter() - start
            store, means = MapCache(Path(folder), detector.fitted_.backbone, detector.scales), []
            for regress in (False, True):
                found = [
                    detector.predict(store(sample.path, StageTimer()), boxes, regress=regress, threshold=0)
                    for sample, boxes in zip(chosen[held], windows[held], strict=True)
                ]
                means.append(100 * mean_average_precision(voc_detection(found, targets[held], names)))
            print(f"| {variant} | {means[0]:.1f} | {means[1]:.1f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
