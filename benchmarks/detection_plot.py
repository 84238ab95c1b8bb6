"""Draw mAP against seconds per image from the JSON files that benchmarks/detection.py wrote. Run as::

    python benchmarks/detection_plot.py "frozen=frozen.json" "tuned=tuned.json" --out docs/detection.png

Each file is a series of the given name and a colour; a point is a set of scales with one kind of candidate
windows, its marker, boxes moved, at the seconds of all stages together.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MARKERS = "o^vDXP*<>"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("series", nargs="+", help="NAME=FILE")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    kinds: list[str] = []
    for number, text in enumerate(args.series):
        name, _, path = text.partition("=")
        colour = f"C{number}"
        axes.scatter([], [], color=colour, marker="s", label=name)
        for row in json.loads(Path(path).read_text())["rows"]:
            if row["regress"]:
                kinds += [] if row["proposals"] in kinds else [row["proposals"]]
                axes.scatter(
                    sum(row["seconds"].values()),
                    100 * row["mAP"],
                    s=50,
                    color=colour,
                    marker=MARKERS[kinds.index(row["proposals"])],
                )
    for kind, marker in zip(kinds, MARKERS, strict=False):
        axes.scatter([], [], color="grey", marker=marker, label=kind)
    axes.set(
        xlabel="seconds per image, everything included, 2 cores",
        ylabel="mAP, VOC 2007's measure",
        xlim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
