"""What a person gets for some minutes: mAP and seconds per photo of detectors fitted by time. Run as::

    python benchmarks/people.py raccoon=DATA chess=OTHER --minutes 1,2,4,8 --json people.json --out people.png

Each data set is fitted once for each budget by ``sppnet detect train --minutes`` in a process of its own, on
its train split; ``sppnet detect evaluate`` measures the test split. ``--frozen`` adds the SVMs on an ImageNet
network as it is (``--minutes 0``). Results of another program on the same photos are scored as by ``sppnet
detect score`` where ``--peer NAME,SET,MINUTES,SECONDS=FILE`` names a file of them; minutes are those of its
training, seconds those that it took for a photo on the same machine. A number in place of the file is an mAP
that was measured elsewhere so. ``--add FILE`` adds the rows of an earlier run's JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib

from common import commit, machine, table, write_json

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1)
SPPNET = (sys.executable, "-c", "from sppnet.cli import main; main()", "detect")


def fit(data: str, args: argparse.Namespace, minutes: float) -> dict[str, Any]:
    """Fit for some minutes and measure."""
    with TemporaryDirectory() as folder:
        model, report = Path(folder) / "m.safetensors", Path(folder) / "r.json"
        options = ["--minutes", str(minutes), *(["--classes", args.classes] if args.classes else [])]
        options += ["--backbone", args.backbone] if args.backbone else []
        begun = time.perf_counter()
        subprocess.run([*SPPNET, "train", data, "--split", "train", "--out", model, *options], check=True)
        passed = time.perf_counter() - begun
        evaluate = ["evaluate", model, data, "--split", args.split, "--json", report]
        subprocess.run([*SPPNET, *evaluate], check=True)
        found = json.loads(report.read_text())
    stages = found["seconds_per_image"]
    return {"mAP": found["mAP"], "minutes": passed / 60, "seconds": stages.pop("wall"), "stages": stages}


def score(data: str, split: str, file: str) -> float:
    """Return the mAP of another program's results."""
    with TemporaryDirectory() as folder:
        report = Path(folder) / "r.json"
        subprocess.run([*SPPNET, "score", file, data, "--split", split, "--json", report], check=True)
        return json.loads(report.read_text())["mAP"]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw mAP against minutes and against seconds per photo, a column for each data set."""
    names = list(dict.fromkeys(row["set"] for row in rows))
    figure, panels = plt.subplots(
        2, len(names), figsize=(4.5 * len(names), 7.5), squeeze=False, layout="constrained", sharey=True
    )
    for name, (above, below) in zip(names, panels.T, strict=True):
        for who in dict.fromkeys(row["who"] for row in rows if row["set"] == name):
            mine = [r for r in rows if (r["set"], r["who"]) == (name, who)]
            mine.sort(key=lambda r: r["minutes"])
            means = [100 * r["mAP"] for r in mine]
            above.plot([r["minutes"] for r in mine], means, "o-", label=who)
            below.plot([r["seconds"] for r in mine], means, "o", label=who)
        above.set(title=name, xlabel="minutes", ylim=(0, 100), xlim=(0, None))
        below.set(xlabel="seconds per photo", xscale="log", xlim=(0.02, 1))
        below.set_xticks(SECONDS, [f"{value:g}" for value in SECONDS])
        below.minorticks_off()
        for panel in (above, below):
            panel.set_ylabel("mAP on the test photos")
            panel.grid(alpha=0.3)
        above.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", nargs="*", metavar="NAME=DATA")
    parser.add_argument("--minutes", default="1,2,4,8")
    parser.add_argument("--split", default="test")
    parser.add_argument("--classes")
    parser.add_argument("--backbone")
    parser.add_argument("--frozen", action="store_true")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME,SET,MINUTES,SECONDS=FILE|mAP")
    parser.add_argument("--add", action="append", default=[], type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    places = dict(text.split("=", 1) for text in args.sets)
    rows: list[dict[str, Any]] = [row for file in args.add for row in json.loads(file.read_text())["rows"]]
    asked = [float(text) for text in args.minutes.split(",") if text]
    for name, data in places.items():
        for minutes in [*([0.0] if args.frozen else []), *asked]:
            who = "sppnet" if minutes else "sppnet, network as it is"
            rows.append({"set": name, "who": who, "asked": minutes, **fit(data, args, minutes)})
            print(rows[-1], flush=True)
    for text in args.peer:
        about, file = text.split("=", 1)
        who, name, minutes, seconds = about.split(",")
        mean = _number(file)
        mean = score(places[name], args.split, file) if mean is None else mean / 100
        rows.append(
            {"set": name, "who": who, "mAP": mean, "minutes": float(minutes), "seconds": float(seconds)}
        )
    facts = {"machine": machine(), "commit": commit(), "split": args.split, "rows": rows}
    write_json(args.json, facts)
    print(f"\n{machine()}; commit {commit()}; {args.split} photos\n")
    lines = [
        (r["set"], r["who"], f"{r['minutes']:.1f}", f"{100 * r['mAP']:.1f}", f"{r['seconds']:.3f}")
        for r in rows
    ]
    print(table(("set", "who", "minutes", "mAP", "s/photo"), lines))
    if args.out:
        draw(rows, args.out)


if __name__ == "__main__":
    main()
