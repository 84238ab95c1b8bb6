"""The rows of the paper's table 9: what the SVMs stand on, with and without box regression. Run as::

    python benchmarks/fully_connected.py DATA --scales 240,360,540,810 --cache FOLDER --json rows.json

Every row is a detector of its own, fitted on the split train and tested on val: SVMs on the pooled features,
on fc6 as it starts (at random: today's backbones come without fully connected layers), on the fine-tuned fc6
and fc7, and these with the backbone's layers behind ``--tune-after`` tuned as well; each with boxes as
proposed and moved. Maps and trained layers are kept in FOLDER, rows that are in the JSON file are not fitted
again, and ``--images`` fits on fewer images. Seconds are per image, one stage after another, on all cores.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from rich.progress import track

from common import commit, setting, table
from sppnet.boxes import Detections
from sppnet.datasets import read_dataset
from sppnet.detection.detector import Detector
from sppnet.detection.tuning import Tuning
from sppnet.evaluation.detection import mean_average_precision, voc_detection
from sppnet.features.cache import MapCache
from sppnet.progress import StageTimer
from sppnet.proposals import cache_folder, parse, propose_all
from sppnet.storage import atomic_path

CLASSES = ("cat", "cow", "dog", "horse", "person", "sheep")


def variants(args) -> dict[str, dict]:
    tuned = Tuning(batches=args.batches, width=args.width)
    rows = {
        "pool": {},
        "fc6, random": {"layer": "fc6", "tuning": Tuning(batches=0, width=args.width)},
        "fine-tuned fc6": {"layer": "fc6", "tuning": tuned},
        "fine-tuned fc7": {"layer": "fc7", "tuning": tuned},
    }
    if args.tune_after:
        deep = Tuning(args.tune_after, args.batches, width=args.width, epochs=args.epochs)
        rows |= {
            "tuned backbone, pool": {"layer": "pool", "tuning": deep},
            "tuned backbone, fc7": {"layer": "fc7", "tuning": deep},
        }
    return rows


def windows_of(samples, method):
    stream = propose_all([s.path for s in samples], parse(method), cache_folder())
    return [found.boxes for found in track(stream, "Windows", len(samples))]


def measure(detector, samples, windows, cache) -> dict:
    """Return mAP and AP with boxes as proposed and moved, and seconds of each stage behind the backbone."""
    store = MapCache(cache, detector.fitted_.backbone, detector.scales)
    timer, targets = StageTimer(), [s.target for s in samples]
    found: dict[bool, list[Detections]] = {False: [], True: []}
    for sample, boxes in track(list(zip(samples, windows, strict=True)), "Testing"):
        encoded = store(sample.path, StageTimer())
        for regress, results in found.items():
            watch = timer if regress else StageTimer()
            results.append(detector.predict(encoded, boxes, regress=regress, timer=watch))
    row: dict[str, dict] = {"seconds": {stage: s / len(samples) for stage, s in timer.seconds.items()}}
    for regress, results in found.items():
        scored = voc_detection(results, targets, detector.classes_)
        row["moved" if regress else "proposed"] = {
            "mAP": mean_average_precision(scored),
            "AP": {name: r.average_precision for name, r in scored.items()},
        }
    return row


def show(rows: dict) -> None:
    lines = []
    for name, row in rows.items():
        for kind, seconds in (("proposed", None), ("moved", row["seconds"])):
            cells = [f"{100 * row[kind]['mAP']:.1f}", *(f"{100 * row[kind]['AP'][c]:.1f}" for c in CLASSES)]
            cells += [f"{seconds[s]:.3f}" if seconds else "" for s in ("pooling", "scoring")]
            lines.append([name, "moved" if kind == "moved" else "as proposed", *cells])
    print("\n" + table(["SVMs on", "boxes", "mAP", *CLASSES, "pooling s", "scoring s"], lines))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument(
        "--backbone", default="efficientnet-lite0", help="each with a cache and a JSON file of its own"
    )
    parser.add_argument("--scales", default="240,360,540,810")
    parser.add_argument("--proposals", default="selective-search+edge-boxes")
    parser.add_argument("--batches", type=int, default=3000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=3, help="with --tune-after")
    parser.add_argument("--tune-after", help="backbone stage behind which the layers learn, too")
    parser.add_argument("--rows", help="only these, by semicolons")
    parser.add_argument("--images", type=int, help="fit on so many, evenly spread")
    parser.add_argument("--test", default="val", help="split to test on")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    train = list(read_dataset(args.data, "train"))
    train = train[:: max(1, len(train) // args.images)] if args.images else train
    test = list(read_dataset(args.data, args.test))
    others = ("rows", "cache", "json")
    chosen = {name: str(value) for name, value in vars(args).items() if name not in others}
    state: dict[str, dict] = (
        json.loads(args.json.read_text()) if args.json.exists() else {"setting": chosen, "rows": {}}
    )
    if state["setting"] != chosen:
        raise SystemExit(f"{args.json}: found rows of {state['setting']}, expected {chosen}")
    wanted = variants(args)
    names = args.rows.split(";") if args.rows else list(wanted)
    fit_on, test_on = windows_of(train, args.proposals), windows_of(test, args.proposals)
    for name in names:
        if name in state["rows"]:
            continue
        print(f"\n{name}", flush=True)
        start, timer = time.perf_counter(), StageTimer()
        detector = Detector(
            args.backbone,
            scales=tuple(map(int, args.scales.split(","))),
            proposals=args.proposals,
            **wanted[name],
        )
        detector.fit(
            train,
            classes=CLASSES,
            windows=fit_on,
            cache=args.cache,
            track=lambda items, text: track(items, text),
            timer=timer,
        )
        detector.save(args.cache / f"{name.replace(', ', '-').replace(' ', '-')}.detector")
        row = measure(detector, test, test_on, args.cache)
        row |= {"fit": {**timer.seconds, "wall": time.perf_counter() - start}, "commit": commit()}
        row |= {"machine": setting()}
        state["rows"][name] = row
        with atomic_path(args.json) as temporary:
            temporary.write_text(json.dumps(state, indent=1))
        show(state["rows"])
    show(state["rows"])


if __name__ == "__main__":
    main()
