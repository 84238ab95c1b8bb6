"""Draw mAP against seconds per image from the JSON files that benchmarks/detection.py wrote. Run as::

    python benchmarks/detection_plot.py "frozen=frozen.json" "tuned=tuned.json" --out docs/detection.png

Each file is a series of the given name; a point is a set of scales with one kind of candidate windows, boxes
moved, at the seconds of all stages together. R-CNN's time comes from benchmarks/rcnn.py, not from here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("series", nargs="+", help="NAME=FILE")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for text in args.series:
        name, _, path = text.partition("=")
        rows = [row for row in json.loads(Path(path).read_text())["rows"] if row["regress"]]
        seconds = [sum(row["seconds"].values()) for row in rows]
        points = axes.scatter(seconds, [100 * row["mAP"] for row in rows], label=name)
        for row, x in zip(rows, seconds, strict=True):
            axes.annotate(
                f"{row['proposals']}, {len(row['scales'])} sc.",
                (x, 100 * row["mAP"]),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=7,
                color=points.get_facecolor()[0],
            )
    axes.set(
        xlabel="seconds per image, everything included, 2 cores",
        ylabel="mAP, VOC 2007's measure",
        xlim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
