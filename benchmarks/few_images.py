"""Fit detectors to few images of a new domain as their user would, from cold caches, and time it. Run as::

    python benchmarks/few_images.py DATA --classes cat,cow,dog,horse,person,sheep --per-class 5,10,20 \\
        --draws 10 --minutes 0,1 --test 100

Draws images of the train split until each class is in so many, and runs ``sppnet detect train`` on them in a
new process with empty caches, of compiled code too; then ``sppnet detect evaluate`` on images of the test
split, the same ones for all. Prints means and standard deviations over the draws.
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
from typing import Any

import numpy as np

from common import commit, machine, table, write_json
from sppnet.datasets import Sample, read_dataset

SPPNET = (sys.executable, "-c", "from sppnet.cli import main; main()", "detect")


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
        writer.writerow(("path", "x1", "y1", "x2", "y2", "label", "difficult"))
        for sample in samples:
            target, place = sample.target, sample.path.absolute()
            for box, label, skip in zip(target.boxes, target.labels, target.difficult, strict=True):
                writer.writerow((place, *box.tolist(), label, int(skip)))


def fit(samples: Sequence[Sample], test: Path, minutes: str, args: argparse.Namespace) -> dict[str, Any]:
    """Fit to some images and measure."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(samples, folder / "few.csv")
        model, report = folder / "few.safetensors", folder / "report.json"
        cold = os.environ | {"XDG_CACHE_HOME": temporary, "NUMBA_CACHE_DIR": temporary}
        options = ["--minutes", minutes, *(["--classes", args.classes] if args.classes else [])]
        for name, value in (("--folds", args.folds), ("--backbone", args.backbone)):
            options += [] if value is None else [name, str(value)]
        start = time.perf_counter()
        subprocess.run([*SPPNET, "train", folder / "few.csv", "--out", model, *options], check=True, env=cold)
        seconds = time.perf_counter() - start
        subprocess.run([*SPPNET, "evaluate", model, test, "--json", report], check=True)
        mean = json.loads(report.read_text())["mAP"]
    return {"minutes": float(minutes), "images": len(samples), "seconds": seconds, "mAP": mean}


def summary(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return a line for each count of images a class and each time: means and deviations over the draws."""
    lines: list[tuple[str, ...]] = []
    for key in dict.fromkeys((row["per_class"], row["minutes"]) for row in rows):
        mine = [row for row in rows if (row["per_class"], row["minutes"]) == key]
        means = 100 * np.array([row["mAP"] for row in mine])
        images, seconds = (np.mean([row[name] for row in mine]) for name in ("images", "seconds"))
        spread = f"{means.mean():.1f} ± {means.std(ddof=1):.1f}" if len(mine) > 1 else f"{means[0]:.1f}"
        lines.append((str(key[0]), f"{images:.0f}", f"{key[1]:g}", f"{seconds:.0f}", str(len(mine)), spread))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--classes", help="default: all")
    parser.add_argument("--per-class", default="20", help="numbers between commas")
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--split", default="val", help="to test on")
    parser.add_argument("--test", type=int, help="images to test on, drawn once; default: all")
    parser.add_argument("--folds", type=int, help="of the fit; 0 leaves out what scores mean")
    parser.add_argument(
        "--minutes", default="0", help="to train the network for, between commas; 0: SVMs alone"
    )
    parser.add_argument("--backbone", help="a file, such as that of ImageNet's network")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    samples, rows = list(read_dataset(args.data, "train")), []
    names = args.classes.split(",") if args.classes else sorted({n for s in samples for n in s.target.labels})
    test = list(read_dataset(args.data, args.split))
    test = [test[i] for i in np.random.default_rng(0).permutation(len(test))[: args.test]]
    with TemporaryDirectory() as folder:
        write(test, Path(folder) / "test.csv")
        for count in map(int, args.per_class.split(",")):
            for seed in range(args.draws):
                chosen = draw(samples, names, count, seed)
                for minutes in args.minutes.split(","):
                    found = fit(chosen, Path(folder) / "test.csv", minutes, args)
                    rows.append({"per_class": count, "seed": seed, **found})
                    print(rows[-1], flush=True)
                    write_json(args.json, {"machine": machine(), "commit": commit(), "rows": rows})
    print(f"\n{machine()}; commit {commit()}; {len(test)} photos of {args.split}\n")
    print(table(("a class", "images", "minutes", "seconds", "draws", "mAP"), summary(rows)))


if __name__ == "__main__":
    main()
