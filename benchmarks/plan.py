"""Plans: of the paper's data sets, and checked against what commands really take. Run as::

    python benchmarks/plan.py calibrate PHOTOS --calibration F.json
    python benchmarks/plan.py cases --calibration F.json --plot docs/plan.png --json F
    python benchmarks/plan.py check PHOTOS --calibration F.json --detector FILE --json F

``check`` runs ``sppnet embed`` and ``sppnet detect run`` on 100, 400 and 1,600 photos of a folder by 1, 2 and
4 processes side by side, each on its share and on one core, and compares wall clock and core seconds with the
plan. FILE is a detector of ``sppnet detect train DATA --minutes 0 --backbone efficientnet-lite0``; with
``--jobs train`` one is fitted to the first photos of the VOC folder PHOTOS.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from common import commit, machine, table, write_json
from sppnet import Detector
from sppnet.datasets import read_dataset
from sppnet.images import find_images, image_size
from sppnet.parallel import core_count
from sppnet.planning.calibration import calibrate, read_calibration, write_calibration
from sppnet.planning.costs import Machines, Workload
from sppnet.planning.plan import plan

CASES = {
    "VOC 2007 (5,011 x 20)": Workload(5_011, 20, 2000, 0.187, 86_000),
    "ILSVRC DET (450,000 x 200)": Workload(450_000, 200, 2000, 0.2, 110_000),
    "ILSVRC CLS (1.28 million)": Workload(1_281_167, 1000, 1, 0.2, 110_000),
}
"""The paper's data sets: photos and classes, 2,000 windows, photos of some 375 x 500 pixels."""

JOBS = {"VOC": ("embed", "run", "train"), "DET": ("embed", "run", "train"), "CLS": ("embed",)}
NODES = (1, 2, 4, 8, 16, 32, 64, 128)
CORES, MEMORY = 32, 8e9
"""Of each node; and bytes of a process of a fit, which mines in rounds then, also on one node."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["calibrate", "cases", "check"])
    parser.add_argument("photos", type=Path, nargs="?")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--detector", type=Path)
    parser.add_argument("--jobs", default="embed,run")
    parser.add_argument("--counts", default="100,400,1600")
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(f"{machine()}; commit {commit()}\n", flush=True)
    if arguments.what == "calibrate":
        found = find_images([arguments.photos]).paths
        write_calibration(arguments.calibration, calibrate(found[:: max(1, len(found) // 12)][:12]))
    else:
        rows = (cases if arguments.what == "cases" else check)(arguments)
        write_json(arguments.json, {"machine": machine(), "commit": commit(), "rows": rows})


def cases(arguments: argparse.Namespace) -> list[dict]:
    """Plan the paper's data sets on nodes of many cores."""
    costs, rows = read_calibration(arguments.calibration).costs, []
    for (name, work), nodes in product(CASES.items(), (1, 8, 64)):
        for job in JOBS[name.split()[0 if "VOC" in name else 1]]:
            found = plan(job, work, costs, Machines(nodes, CORES, memory=MEMORY))
            rows.append(
                {
                    "case": name,
                    "job": job,
                    "nodes": nodes,
                    "hours": found.seconds / 3600,
                    "core hours": found.core_seconds / 3600,
                    "most": found.dominant.name,
                    "disk GB": sum(found.disk.values()) / 1e9,
                    "memory GB": max(found.memory.values()) / 1e9,
                    "network GB": sum(found.traffic.values()) / 1e9,
                }
            )
    print(table(tuple(rows[0]), [tuple(shown(value) for value in row.values()) for row in rows]))
    if arguments.plot:
        draw(costs, arguments.plot)
    return rows


def shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def draw(costs, path: Path) -> None:
    """Draw time against nodes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, work) in enumerate(CASES.items()):
        jobs = JOBS[name.split()[0 if "VOC" in name else 1]]
        for job, line in zip(("embed", "run", "train"), (":", "--", "-"), strict=True):
            if job in jobs:
                hours = [
                    plan(job, work, costs, Machines(n, CORES, memory=MEMORY)).seconds / 3600 for n in NODES
                ]
                axes.plot(NODES, hours, line, color=f"C{number}", marker="o", ms=3, label=f"{name}: {job}")
    axes.set(xscale="log", yscale="log", xlabel=f"nodes of {CORES} cores", ylabel="predicted")
    axes.set_xticks(NODES, [str(n) for n in NODES])
    axes.set_yticks([1 / 360, 1 / 60, 1 / 6, 1, 10], ["10 s", "1 min", "10 min", "1 h", "10 h"])
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120)


def check(arguments: argparse.Namespace) -> list[dict]:
    """Compare plans with what commands take."""
    costs, cores = read_calibration(arguments.calibration).costs, core_count()
    head = ("job", "photos", "processes", "wall s", "planned", "ratio", "core s", "planned", "ratio")
    rows, lines = [], []
    combinations = product(
        arguments.jobs.split(","), arguments.counts.split(","), arguments.processes.split(",")
    )
    for job, count, processes in combinations:
        with TemporaryDirectory() as folder:
            work, calls = prepared(job, arguments, int(count), int(processes), Path(folder))
            wall, used = measured(calls, cores)
        work = Workload(work.images, work.classes, round(costs.windows), work.pixels, work.photo_bytes)
        found = plan(job, work, costs, Machines(1, min(cores, int(processes)), int(processes)))
        rows.append(
            {"job": job, "photos": work.images, "processes": int(processes), "wall": wall, "core": used}
        )
        rows[-1] |= {"planned wall": found.seconds, "planned core": found.core_seconds}
        pairs = ((wall, found.seconds), (used, found.core_seconds))
        figures = [
            text for real, said in pairs for text in (f"{real:.1f}", f"{said:.1f}", f"{said / real:.2f}")
        ]
        lines.append((job, work.images, processes, *figures))
        print(*lines[-1], flush=True)
    print("\n" + table(head, lines))
    return rows


def prepared(
    job: str, arguments: argparse.Namespace, count: int, processes: int, folder: Path
) -> tuple[Workload, list[list[str]]]:
    """Return the work, and the command of each process on its share of the photos."""
    if job == "train":
        dataset, classes = first_of(arguments.photos, count, folder)
        call = ["detect", "train", str(dataset), "--minutes", "0", "--backbone", "efficientnet-lite0"]
        call += ["--out", str(folder / "fitted.safetensors")]
        return workload(sorted((dataset / "JPEGImages").iterdir()), classes), [call]
    photos = find_images([arguments.photos]).paths
    # Those of a smaller check come round again.
    chosen, calls = [photos[i % len(photos)] for i in range(count)], []
    for number in range(processes):
        share = folder / f"share-{number}"
        share.mkdir()
        for i in range(number, count, processes):
            (share / f"{i:05}{chosen[i].suffix}").symlink_to(chosen[i].resolve())
        out = str(folder / f"{number}.safetensors")
        found = ["--json", str(folder / f"{number}.json")]
        run = ["detect", "run", str(arguments.detector), str(share), *found]
        calls.append(["embed", str(share), "--out", out] if job == "embed" else run)
    return workload(chosen, 1 if job == "embed" else len(Detector.load(arguments.detector).classes_)), calls


def first_of(source: Path, count: int, folder: Path) -> tuple[Path, int]:
    """Make a VOC folder of the first training photos of another one."""
    names = [sample.path.stem for sample in read_dataset(source, "train")][:count]
    root = folder / "voc"
    for below, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        (root / below).mkdir(parents=True)
        for name in names:
            (root / below / f"{name}.{suffix}").symlink_to((source / below / f"{name}.{suffix}").resolve())
    return root, len(read_dataset(root).classes)


def workload(photos: list[Path], classes: int) -> Workload:
    sizes = [image_size(photo) for photo in photos]
    pixels = sum(height * width for height, width in sizes) / len(sizes) / 1e6
    return Workload(len(photos), classes, 1, pixels, sum(p.stat().st_size for p in photos) / len(photos))


def measured(calls: list[list[str]], cores: int) -> tuple[float, float]:
    """Return wall clock and core seconds of commands side by side, each on one core."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    allowed = sorted(os.sched_getaffinity(0))
    before, start, running = os.times(), time.perf_counter(), []
    with TemporaryDirectory() as empty:
        for number, call in enumerate(calls):
            pin = ["taskset", "-c", str(allowed[number % cores])]
            command = [*pin, sys.executable, "-m", "sppnet", *call]
            own = environment | {"XDG_CACHE_HOME": f"{empty}/{number}"}
            running.append(
                subprocess.Popen(command, env=own, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            )
        for process in running:
            _, said = process.communicate()
            if process.returncode:
                raise SystemExit(said.decode())
    wall, after = time.perf_counter() - start, os.times()
    return wall, after.children_user + after.children_system - before.children_user - before.children_system


if __name__ == "__main__":
    main()
