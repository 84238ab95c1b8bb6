"""Average precision and seconds of a detector for several scales and kinds of candidate windows, in one pass.

Every image is encoded once for each set of scales; every kind of window is pooled from those maps. Run as::

    python benchmarks/detection.py MODEL DATA --split val --scales 240,336,480,672 --scales 480 \\
        --proposals selective-search+edge-boxes --proposals dense --json results.json

The stages run one after another on all cores but the proposals, which take one; nothing overlaps.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import track

from common import commit, setting, table, write_json
from sppnet.arrays import Boxes
from sppnet.boxes import Detections
from sppnet.datasets import read_dataset
from sppnet.detection.detector import Detector
from sppnet.evaluation.detection import mean_average_precision, proposal_recall, voc_detection
from sppnet.images import read_image
from sppnet.progress import StageTimer
from sppnet.proposals import parse
from sppnet.proposals.maps import MAPS


@dataclass
class Variant:
    scales: tuple[int, ...]
    proposals: str
    regress: bool
    windows: list[Boxes] = field(default_factory=list)
    found: list[Detections] = field(default_factory=list)
    timer: StageTimer = field(default_factory=StageTimer)


def measure(detector: Detector, dataset, scales, kinds) -> list[Variant]:
    methods = {kind: parse(kind) for kind in kinds if kind != MAPS}
    variants = [Variant(s, k, r) for s in scales for k in kinds for r in (False, True)]
    proposal_clock, encode_clock = StageTimer(), StageTimer()
    for sample in track(dataset, description="Detecting"):
        image, windows = read_image(sample.path), {}
        for kind, method in methods.items():
            with proposal_clock(kind):
                windows[kind] = method(image).boxes
        for sides in scales:
            detector.set_params(scales=sides)
            with encode_clock(str(sides)):
                encoded = detector.encode(image)
            if MAPS in kinds:
                with proposal_clock(f"{MAPS} {sides}"):
                    windows[MAPS] = detector.propose(None, encoded, MAPS)
            for v in variants:
                if v.scales == sides:
                    v.windows.append(windows[v.proposals])
                    v.found.append(detector.predict(encoded, v.windows[-1], regress=v.regress, timer=v.timer))
    for v in variants:
        stage = f"{MAPS} {v.scales}" if v.proposals == MAPS else v.proposals
        v.timer.seconds |= {
            "proposals": proposal_clock.seconds[stage],
            "backbone": encode_clock.seconds[str(v.scales)],
        }
    return variants


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="detector file, or the name of a shipped one")
    parser.add_argument("data")
    parser.add_argument("--split", default="val")
    parser.add_argument("--scales", action="append", help="shorter sides by commas; default: the detector's")
    parser.add_argument("--proposals", action="append", required=True, help="as parse takes them, or maps")
    parser.add_argument("--images", type=int, help="only so many, evenly spread")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    detector = Detector.load(args.model)
    scales = [tuple(map(int, s.split(","))) for s in args.scales] if args.scales else [detector.scales]
    dataset = list(read_dataset(args.data, args.split))
    dataset = dataset[:: max(1, len(dataset) // args.images)] if args.images else dataset
    targets = [s.target for s in dataset]
    first, kind = read_image(dataset[0].path), args.proposals[0]
    detector.predict(first, None if kind == MAPS else parse(kind)(first).boxes)

    variants = measure(detector, dataset, scales, args.proposals)
    rows: list[dict[str, Any]] = []
    for v in variants:
        results = voc_detection(v.found, targets, detector.classes_)
        recall = proposal_recall(v.windows, targets, classes=detector.classes_)
        rows.append(
            {
                "scales": v.scales,
                "proposals": v.proposals,
                "regress": v.regress,
                "mAP": mean_average_precision(results),
                "AP": {name: r.average_precision for name, r in results.items()},
                "recall_50": float(recall.recall[0]),
                "average_recall": recall.average_recall,
                "windows": recall.mean_windows,
                "seconds": {stage: s / len(dataset) for stage, s in v.timer.seconds.items()},
            }
        )
    print(f"\n{len(dataset)} images of {args.split}; {setting()}; commit {commit()}\n")
    names = detector.classes_
    stages_s = ("proposals s", "backbone s", "pooling s", "scoring s", "total s")
    lines = []
    for row in rows:
        s = row["seconds"]
        stages = [s[stage] for stage in ("proposals", "backbone", "pooling", "scoring")]
        cells = [
            ", ".join(map(str, row["scales"])),
            row["proposals"],
            "moved" if row["regress"] else "as proposed",
            f"{100 * row['mAP']:.1f}",
            *(f"{100 * row['AP'][n]:.1f}" for n in names),
            *(f"{value:.3f}" for value in [*stages, sum(stages)]),
        ]
        lines.append(cells)
    print(table(["scales", "windows", "boxes", "mAP", *names, *stages_s], lines))
    write_json(args.json, {"machine": setting(), "commit": commit(), "rows": rows})


if __name__ == "__main__":
    main()
