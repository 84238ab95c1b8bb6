"""Fit a detector to few images of a new domain as its user would, from cold caches, and time it. Run as::

    python benchmarks/few_images.py DATA --classes cat,cow,dog,horse,person,sheep --per-class 20

Draws images of the train split until each class is in so many, and runs ``sppnet detect train`` on them in a
new process with empty caches, of compiled code too; then ``sppnet detect evaluate`` on the test split.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from common import commit, machine, write_json
from sppnet.datasets import Sample, read_dataset


def draw(samples: Sequence[Sample], names: Sequence[str], count: int, seed: int) -> list[Sample]:
    """Return images without difficult objects, at least so many with each class."""
    chosen: list[Sample] = []
    found: Counter[str] = Counter()
    for i in np.random.default_rng(seed).permutation(len(samples)):
        target = samples[i].target
        here = set(target.labels) & set(names)
        if not target.difficult.any() and any(found[name] < count for name in here):
            chosen.append(samples[i])
            found.update(here)
    if min(found[name] for name in names) < count:
        raise SystemExit(f"found {dict(found)} images by class, expected at least {count} of each")
    return chosen


def write(samples: Sequence[Sample], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "x1", "y1", "x2", "y2", "label"))
        for sample in samples:
            for box, label in zip(sample.target.boxes, sample.target.labels, strict=True):
                writer.writerow((sample.path.absolute(), *box.tolist(), label))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--classes", required=True)
    parser.add_argument("--per-class", type=int, default=20)
    parser.add_argument("--split", default="val", help="to test on")
    parser.add_argument("--folds", type=int, help="of the fit; 0 leaves out what scores mean")
    parser.add_argument("--minutes", type=float, default=0, help="to train the network for; 0: SVMs alone")
    parser.add_argument("--backbone", help="a file, such as that of ImageNet's network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    chosen = draw(list(read_dataset(args.data, "train")), args.classes.split(","), args.per_class, args.seed)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(chosen, folder / "few.csv")
        model, report = folder / "few.safetensors", folder / "report.json"
        cold = os.environ | {"XDG_CACHE_HOME": temporary, "NUMBA_CACHE_DIR": temporary}
        sppnet = (sys.executable, "-c", "from sppnet.cli import main; main()", "detect")
        train = ("train", folder / "few.csv", "--classes", args.classes, "--out", model)
        start = time.perf_counter()
        given = {"--folds": args.folds, "--minutes": args.minutes, "--backbone": args.backbone}
        options = [text for name, value in given.items() if value is not None for text in (name, str(value))]
        subprocess.run([*sppnet, *train, *options], check=True, env=cold)
        seconds = time.perf_counter() - start
        evaluate = ("evaluate", model, args.data, "--split", args.split, "--json", report)
        subprocess.run([*sppnet, *evaluate], check=True)
        mean = json.loads(report.read_text())["mAP"]
    print(f"{machine()}, commit {commit()}: {len(chosen)} images, {seconds:.0f} s, mAP {100 * mean:.1f}")
    facts = {"machine": machine(), "commit": commit(), "images": len(chosen)}
    write_json(args.json, facts | {"seconds": seconds, "mAP": mean})


if __name__ == "__main__":
    main()
