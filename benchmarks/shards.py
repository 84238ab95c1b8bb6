"""A fit in rounds over shards against the one that goes photo by photo; and mining for many classes. Run as::

    python benchmarks/shards.py ../shared/data/voc2012-animals --photos 400 --val 200 --cache maps
    python benchmarks/shards.py --classes 20 50 200

The first fits the default detector to the same photos of the split train in several ways, each in a process
of its own, from maps and windows that were computed before (a first run makes them), and measures on photos
of the split val: mean average precision of VOC 2007, seconds, and the most memory of the process.
``--workers`` adds fits whose shards go to so many processes of a cluster on this machine; their memory is
measured, too. Of the process' memory what is its own is told apart: without pages of library files and of the
cluster's store, which other processes share.

The second mines random vectors that stand around a centre for each class, in shards, as the fit does: what
time and memory grow with.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from common import commit, machine, table, write_json
from sppnet.boxes import Windows
from sppnet.datasets import read_dataset
from sppnet.datasets.records import Sample
from sppnet.detection.detector import Detector
from sppnet.detection.sampling import Plan
from sppnet.detection.shards import Held, Mine, Planned, Shard, photo_of
from sppnet.detection.svm import MiningSettings, TrainingSet
from sppnet.evaluation.detection import mean_average_precision, voc_detection
from sppnet.features.cache import MapCache
from sppnet.progress import StageTimer, peak_memory
from sppnet.proposals import parse, propose_all
from sppnet.proposals.cache import cache_folder

ANIMALS = ("cat", "cow", "dog", "horse", "person", "sheep")
# Of the synthetic classes: length of the vectors, photos, windows of each, shards.
LENGTH, PHOTOS, WINDOWS, SHARDS = 4032, 20, 300, 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--photos", type=int, default=400)
    parser.add_argument("--val", type=int, default=200)
    parser.add_argument("--cache", type=Path, default=Path("maps"))
    parser.add_argument("--backbone", default="efficientnet-lite0")
    parser.add_argument("--rounds", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--memory", type=float, nargs="+", default=[1.0], help="GB of a process")
    parser.add_argument("--workers", type=int, nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=1, help="plain fits with so many seeds: what noise is")
    parser.add_argument("--classes", type=int, nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help="one fit, as JSON; for the processes that this one starts")
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(one(args, json.loads(args.one))))
        return
    print(f"{machine()}; commit {commit()}\n")
    facts: dict[str, Any] = {}
    if args.data is not None:
        facts["fits"] = fits(args)
    if args.classes:
        facts["classes"] = [mined(count) for count in args.classes]
        head = (
            "classes",
            "examples held",
            "MB of them",
            "s scoring 1,000 windows",
            "s training",
            "GB at the peak",
        )
        print(table(head, [list(row.values()) for row in facts["classes"]]))
    write_json(args.json, facts)


def fits(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Fit in several ways, each in a process, and print a table."""
    ways: list[dict[str, Any]] = [{"seed": seed} for seed in range(args.seeds)]
    ways += [{"rounds": rounds} for rounds in args.rounds]
    ways += [{"memory": memory} for memory in args.memory]
    ways += [{"memory": args.memory[0], "workers": workers} for workers in args.workers]
    found = []
    for way in ways:
        call = [sys.executable, __file__, str(args.data), "--one", json.dumps(way)]
        call += ["--photos", str(args.photos), "--val", str(args.val), "--cache", str(args.cache)]
        call += ["--backbone", args.backbone]
        done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True)
        found.append({"way": way, **json.loads(done.stdout.splitlines()[-1])})
        print(found[-1], file=sys.stderr, flush=True)
    head = (
        "fit",
        "AP on val",
        "AP it expects",
        "s in all",
        "s mining",
        "GB of the process",
        "GB of its own",
        "GB of a worker",
    )
    rows = [
        (
            ", ".join(f"{name} {value:g}" for name, value in row["way"].items()),
            f"{100 * row['ap']:.1f}",
            f"{100 * row['expected']:.1f}",
            f"{row['seconds']:.0f}",
            f"{row['stages']['SVMs']:.0f}",
            f"{row['peak']:.2f}",
            f"{row['own']:.2f}",
            f"{row['worker']:.2f}" if row["worker"] else "",
        )
        for row in found
    ]
    print(table(head, rows), "\n")
    return found


def some(data: Path, split: str, count: int) -> list[Sample]:
    """Return some photos of a split, evenly chosen."""
    samples = list(read_dataset(data, split))
    return [samples[i] for i in np.linspace(0, len(samples) - 1, min(count, len(samples))).astype(int)]


def one(args: argparse.Namespace, way: dict[str, Any]) -> dict[str, Any]:
    """Fit in one way and measure on other photos."""
    train, val = some(args.data, "train", args.photos), some(args.data, "val", args.val)
    timer = StageTimer()
    options: dict[str, Any] = {name: way[name] for name in ("rounds", "memory") if name in way}
    cluster = None
    if "workers" in way:
        from sppnet.cluster import Cluster

        cluster = options["cluster"] = Cluster("local", workers=way["workers"])
    begun = time.perf_counter()
    with watched() as most:
        detector = Detector(args.backbone, seed=way.get("seed", 0)).fit(
            train, classes=ANIMALS, cache=args.cache, timer=timer, **options
        )
    seconds, peak = time.perf_counter() - begun, peak_memory()
    if cluster:
        cluster.close()
    print(f"{way}: {seconds:.0f} s, {peak} GB", file=sys.stderr, flush=True)
    return {
        "ap": measured(detector, val, args.cache),
        "expected": detector.fitted_.quality.mean_ap,
        "seconds": seconds,
        "stages": timer.seconds,
        "peak": peak,
        "own": most.pop(str(os.getpid())),
        "worker": max(most.values(), default=None),
    }


def measured(detector: Detector, data: list[Sample], cache: Path) -> float:
    """Return the mean average precision on other photos, whose maps are kept, too."""
    store = MapCache(cache, detector.fitted_.backbone, detector.pooling.scales)
    windows: Iterator[Windows | None] = iter([None] * len(data))
    if detector.fitted_.side is None:
        windows = propose_all([s.image for s in data], parse(detector.proposals), cache_folder())
    found = [
        detector.predict(store(sample.image, StageTimer()), None if each is None else each.boxes, threshold=0)
        for sample, each in zip(data, windows, strict=True)
    ]
    return mean_average_precision(voc_detection(found, [s.target for s in data], detector.classes_))


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Note the most GB of memory of this process' own, and that each worker of its cluster holds, by number.

    Own is what is no page of a file, such as a library, nor of the cluster's store: other processes share
    these.
    """
    most: dict[str, float] = {str(os.getpid()): 0.0}
    ended = threading.Event()

    def look() -> None:
        here = Path("/proc/self")
        while not ended.wait(0.1):
            most[str(os.getpid())] = max(most[str(os.getpid())], gigabytes(status_of(here), "RssAnon"))
            for folder in Path("/proc").glob("[0-9]*"):
                status = status_of(folder)
                if status.get("Name", "").startswith("ray::") and below(folder):
                    # One that is ending has no memory any more.
                    most[folder.name] = max(most.get(folder.name, 0.0), gigabytes(status, "VmHWM"))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def gigabytes(status: dict[str, str], name: str) -> float:
    """Return one of a process' amounts of memory; 0 of one that has ended."""
    return int(status.get(name, "0 kB").split()[0]) * 1024 / 1e9


def status_of(folder: Path) -> dict[str, str]:
    """Return what Linux says of a process; nothing of one that has ended."""
    try:
        lines = (folder / "status").read_text().splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def below(folder: Path) -> bool:
    """Tell whether a process was started by this one, or by one that it started."""
    while (above := status_of(folder).get("PPid", "0")) != "0":
        if above == str(os.getpid()):
            return True
        folder = folder.parent / above
    return False


def mined(count: int) -> dict[str, Any]:
    """Mine windows of so many classes in rounds, and return what it took."""
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 1, (count, LENGTH)).astype(np.float32)
    reader: Any = Synthetic(centres)
    shards = [
        Shard(s, np.arange(PHOTOS) + s * PHOTOS, (), (), None, np.zeros(0, np.uint64)) for s in range(SHARDS)
    ]
    none = np.zeros((0, LENGTH), np.float32), np.zeros((0, count), np.int8)
    training = TrainingSet(*none, MiningSettings(), np.zeros(0, np.int64))
    # Twenty objects of each class, and some background.
    labels = np.repeat(np.arange(count), 20)
    training.add(vectors(centres, labels, rng), np.eye(count, dtype=np.int8)[labels])
    background = vectors(centres, np.full(1000, -1), rng)
    training.add(background, np.full((len(background), count), -1, np.int8))
    scoring, learning = 0.0, 0.0
    for _ in range(3):
        begun = time.perf_counter()
        training.fit()
        learning += time.perf_counter() - begun
        places, negative = training.held
        photos = photo_of(places)
        for shard in shards:
            rows = np.isin(photos, shard.numbers)
            begun = time.perf_counter()
            hard = Mine(training.svms, 1.0, 2000)(reader, Held(shard, places[rows], negative[rows]))
            scoring += time.perf_counter() - begun - reader.seconds
            reader.seconds = 0.0
            training.mark(hard.places[~hard.fresh], hard.negative[~hard.fresh])
            if hard.fresh.any():
                signs = -hard.negative[hard.fresh].astype(np.int8)
                training.add(hard.features, signs, -1, hard.places[hard.fresh])
    begun = time.perf_counter()
    training.fit()
    return {
        "classes": count,
        "held": len(training),
        "MB": round(len(training) * (2 * LENGTH + 5 * count) / 1e6),
        "scoring": f"{scoring / (3 * SHARDS * PHOTOS * WINDOWS / 1000):.3f}",
        "learning": f"{learning + time.perf_counter() - begun:.1f}",
        "peak": f"{peak_memory():.2f}",
    }


def vectors(centres: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return vectors about the centres of their classes, of mean norm 20; those of label -1 about none."""
    found = rng.normal(0, 1.5, (len(labels), centres.shape[1])).astype(np.float32)
    found[labels >= 0] += 0.4 * centres[labels[labels >= 0]]
    found = np.maximum(found, 0)
    return found * np.float32(20 / np.linalg.norm(found, axis=1).mean())


class Synthetic:
    """What a worker reads of photos: random windows, of which each tenth looks like a class."""

    def __init__(self, centres: np.ndarray) -> None:
        self.centres, self.seconds = centres, 0.0
        pooling = self.pooled
        settings = SimpleNamespace(pooling=pooling, mining=MiningSettings())
        self.recipe = SimpleNamespace(settings=settings, block=WINDOWS)

    def encoded(self, shard: Shard) -> Iterator[tuple[Planned, int]]:
        """Yield plans of photos whose windows are all negatives, with numbers in place of maps."""
        boxes, none = np.zeros((WINDOWS, 4), np.float32), np.zeros(0, np.int64)
        for number in shard.numbers.tolist():
            negative = np.ones((WINDOWS, len(self.centres)), bool)
            plan = Plan(boxes, none, negative, none, np.full(WINDOWS, -1), boxes)
            yield Planned(number, np.zeros((1, 1, 3), np.uint8), plan, np.zeros(WINDOWS)), number

    def pooled(self, number: int, boxes: np.ndarray) -> np.ndarray:
        """Return the vectors of a photo's windows; what that takes is not counted."""
        begun = time.perf_counter()
        rng = np.random.default_rng([1, number])
        labels = np.where(rng.random(len(boxes)) < 0.1, rng.integers(0, len(self.centres), len(boxes)), -1)
        found = vectors(self.centres, labels, rng)
        self.seconds += time.perf_counter() - begun
        return found


if __name__ == "__main__":
    main()
