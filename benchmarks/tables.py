"""Tables 2 and 3 of the paper, run again from scratch on a folder of photos, by cross-validation.

Networks are trained with and without a pyramid, at one size, at two sizes in turn, and at random sizes; every
image is tested by the network that was not trained on its fold. Run as::

    python benchmarks/tables.py DATA --results docs/classification.json

The table and the plot are written beside the results, with the endings .md and .png.

DATA holds folders of classes, or the splits train and val of them, which are put together; with ``--folds 0``
one network is trained on train and tested on val, as for ImageNet (then with ``--width 1 --side 224
--epochs 70 --batch 128 --lr 0.01 --device cuda --precision bf16-mixed``). A run that was stopped goes on:
pieces that are in the results are not run again, and a piece goes on from its checkpoint in ``--work``.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from sklearn.model_selection import StratifiedKFold

from common import commit, machine
from sppnet.classification.augment import MARGIN, resize_shorter
from sppnet.classification.batches import CropBatches, Reading, sample_components
from sppnet.classification.checkpoint import Checkpointing
from sppnet.classification.network import build, scorer_of
from sppnet.classification.scorer import NetworkSettings
from sppnet.classification.training import Recipe, train
from sppnet.classification.views import probabilities
from sppnet.datasets.image_folder import read_image_folder
from sppnet.images import read_image
from sppnet.storage import atomic_path

PAPER = (6, 3, 2, 1)
# Errors of more than five classes are all written as 5: enough for top-1 and top-5.
BEYOND = 5


@dataclass(frozen=True)
class Row:
    levels: tuple[int, ...] | None = PAPER
    ratios: tuple[float, ...] = (1.0,)
    uniform: bool = False


ROWS = {
    "no SPP": Row(None),
    "SPP single-size": Row(),
    "SPP multi-size": Row(ratios=(1.0, 180 / 224)),
    "SPP random size": Row(ratios=(1.0, 180 / 224), uniform=True),
    "SPP 30 bins": Row((4, 3, 2, 1)),
}
COMPARISONS = (
    ("SPP single-size", "no SPP"),
    ("SPP multi-size", "SPP single-size"),
    ("SPP multi-size", "no SPP"),
    ("SPP random size", "SPP single-size"),
    ("SPP 30 bins", "no SPP"),
)
# Top-1 errors in percent on ImageNet, tables 2 and 3: ten views, one crop, full image.
PUBLISHED: dict[tuple[str, str], tuple[float | None, ...]] = {
    ("zf5", "no SPP"): (35.99, None, None),
    ("zf5", "SPP single-size"): (34.98, 38.01, 37.55),
    ("zf5", "SPP multi-size"): (34.60, 37.57, 37.07),
    ("zf5", "SPP 30 bins"): (35.06, None, None),
    ("convnet5", "no SPP"): (34.93, None, None),
    ("convnet5", "SPP single-size"): (34.38, None, None),
    ("convnet5", "SPP multi-size"): (33.94, None, None),
    ("overfeat5", "no SPP"): (34.13, None, None),
    ("overfeat5", "SPP single-size"): (32.87, None, None),
    ("overfeat5", "SPP multi-size"): (32.26, None, None),
    ("overfeat7", "no SPP"): (32.01, None, None),
    ("overfeat7", "SPP single-size"): (30.36, 33.18, 32.72),
    ("overfeat7", "SPP multi-size"): (29.68, 32.57, 31.25),
    ("overfeat7", "SPP random size"): (30.06, None, None),
}


def main() -> None:
    arguments = parsed()
    settings = {
        name: getattr(arguments, name) for name in ("width", "side", "epochs", "batch", "lr", "folds")
    }
    results = read_results(arguments.results, settings)
    # Of the code that runs, whatever happens to the files meanwhile.
    provenance = {"machine": machine(), "commit": commit()}
    missing = [piece for piece in pieces(arguments) if key_of(*piece) not in results["pieces"]]
    # Two small networks on a thread each train faster than one after the other on two threads.
    processes = ProcessPoolExecutor(
        arguments.jobs, get_context("spawn"), initializer=divide_threads, initargs=(arguments.jobs,)
    )
    with processes as pool:
        running = {pool.submit(run, arguments, *piece): key_of(*piece) for piece in missing}
        for done in as_completed(running):
            results["pieces"][running[done]] = done.result() | provenance
            with atomic_path(arguments.results) as temporary:
                temporary.write_text(json.dumps(results, indent=0) + "\n")
            checkpoint_of(arguments, running[done]).unlink()
    write_report(results, arguments.results)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--results", type=Path, required=True, help="JSON file, added to")
    parser.add_argument("--work", type=Path, default=Path("out/tables"), help="folder for checkpoints")
    parser.add_argument("--networks", nargs="+", default=["zf5"])
    parser.add_argument("--rows", nargs="+", default=list(ROWS)[:3], choices=ROWS)
    parser.add_argument("--views", nargs="+", default=["one", "ten", "full", "maps10"])
    parser.add_argument("--width", type=float, default=0.25, help="of the networks, 1 in the paper")
    parser.add_argument("--side", type=int, default=160, help="of crops, 224 in the paper")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0, help="0 keeps all images in memory")
    parser.add_argument("--jobs", type=int, default=1, help="networks that train at the same time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="32-true")
    return parser.parse_args()


def divide_threads(jobs: int) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))


def key_of(network: str, row: str, fold: int) -> str:
    return f"{network}/{row}/{fold}"


def pieces(arguments) -> list[tuple[str, str, int]]:
    folds = range(max(1, arguments.folds))
    return [(n, r, f) for f in folds for n in arguments.networks for r in arguments.rows]


def read_results(path: Path, settings: dict) -> dict:
    if not path.exists():
        return {"settings": settings, "pieces": {}}
    results = json.loads(path.read_text())
    if results["settings"] != settings:
        raise SystemExit(f"{path}: found results of {results['settings']}, expected {settings}")
    return results


@functools.cache
def images_of(data: Path) -> tuple[tuple[str, ...], list[tuple[Path, int]], int]:
    """Return classes, all images, and how many of them are of the split train."""
    if not (data / "train").is_dir():
        images = read_image_folder(data)
        return images.classes, list(images), len(images)
    first = read_image_folder(data, "train")
    second = read_image_folder(data, "val", classes=first.classes)
    return first.classes, [*first, *second], len(first)


def divided(arguments, fold: int) -> tuple[list, list]:
    _, images, count = images_of(arguments.data)
    if arguments.folds == 0:
        return images[:count], images[count:]
    labels = [label for _, label in images]
    folds = StratifiedKFold(arguments.folds, shuffle=True, random_state=0).split(labels, labels)
    seen, unseen = list(folds)[fold]
    return [images[i] for i in seen], [images[i] for i in unseen]


@functools.cache
def kept(path: Path, side: int) -> np.ndarray:
    return resize_shorter(read_image(path), side)


def run(arguments, name: str, title: str, fold: int) -> dict:
    """Train a network on all folds but one and rank the right class of every image of that one."""
    row, (seen, unseen) = ROWS[title], divided(arguments, fold)
    scales = tuple(round(arguments.side * ratio) for ratio in row.ratios)
    read = (
        functools.partial(kept, side=round(arguments.side * MARGIN)) if not arguments.workers else read_image
    )
    classes = images_of(arguments.data)[0]
    settings = NetworkSettings(name, classes, row.levels, width=arguments.width, size=arguments.side)
    network = build(settings, seed=fold)
    source = CropBatches(
        seen,
        arguments.batch,
        scales,
        uniform=row.uniform,
        components=sample_components(seen, read),
        seed=fold,
        reading=Reading(arguments.workers, read),
    )
    milestones = (round(arguments.epochs * 0.6), round(arguments.epochs * 0.85))
    recipe = Recipe(epochs=arguments.epochs, lr=arguments.lr, milestones=milestones)
    fabric = Fabric(accelerator=arguments.device, devices=1, precision=arguments.precision)
    key = key_of(name, title, fold)
    bound = {"piece": key, "network": settings._asdict(), "recipe": asdict(recipe)}
    checkpointing = Checkpointing(checkpoint_of(arguments, key), bound)
    for record in train(network, source, recipe, checkpointing=checkpointing, fabric=fabric):
        print(f"{key}: epoch {record.epoch}, side {record.side}, loss {record.loss:.3f}", flush=True)
    scorer = scorer_of(network, settings)
    ranks, seconds = {}, {}
    for views in arguments.views if row.levels else [v for v in arguments.views if v in ("one", "ten")]:
        start = time.perf_counter()
        ranks[views] = "".join(
            str(rank(probabilities(scorer, read_image(path), views), label)) for path, label in unseen
        )
        seconds[views] = (time.perf_counter() - start) / len(unseen)
        print(f"{key}: {views}, error {100 * error(ranks[views]):.2f}", flush=True)
    return {"ranks": ranks, "seconds_per_image": seconds, "loss": record.loss}


def checkpoint_of(arguments, key: str) -> Path:
    arguments.work.mkdir(parents=True, exist_ok=True)
    return arguments.work / f"{key.replace(' ', '-').replace('/', '-')}.safetensors"


def rank(scores: np.ndarray, label: int) -> int:
    return min(int((scores > scores[label]).sum()), BEYOND)


def error(ranks: str, within: int = 1) -> float:
    return float(np.mean([int(r) >= within for r in ranks]))


def errors(results: dict, network: str, row: str, views: str) -> dict[int, float]:
    """Return the top-1 error in percent of each fold that was run."""
    return {
        int(key.rsplit("/", 1)[1]): 100 * error(piece["ranks"][views])
        for key, piece in results["pieces"].items()
        if key.startswith(f"{network}/{row}/") and views in piece["ranks"]
    }


def paired(first: dict[int, float], second: dict[int, float]) -> np.ndarray:
    """Return the differences of the folds that both have."""
    return np.array([first[fold] - second[fold] for fold in sorted(first.keys() & second.keys())])


def spread(values: np.ndarray) -> str:
    """Return mean and standard error as text."""
    if len(values) < 2:
        return f"{values.mean():+.2f}"
    return f"{values.mean():+.2f} ± {values.std(ddof=1) / len(values) ** 0.5:.2f}"


def write_report(results: dict, path: Path) -> None:
    """Write the table and the plot beside the results."""
    networks = list(dict.fromkeys(key.split("/")[0] for key in results["pieces"]))
    views = ["one", "full", "ten", "maps10", "maps96", "maps98"]
    picture = path.with_suffix(".png")
    text = [HEAD.format(path=path, plot=picture.name, **results["settings"], **facts(results))]
    for network in networks:
        rows = [row for row in ROWS if errors(results, network, row, "ten")]
        shown = [v for v in views if any(errors(results, network, row, v) for row in rows)]
        text.append(f"## {network}\n\nTop-1 errors in percent: mean and standard deviation over the folds.\n")
        text.append(f"| | folds | {' | '.join(shown)} | paper, ImageNet, ten |")
        text.append("|---" * (len(shown) + 3) + "|")
        for row in rows:
            cells = [cell(errors(results, network, row, v)) for v in shown]
            published = PUBLISHED.get((network, row))
            count = len(errors(results, network, row, "ten"))
            text.append(f"| {row} | {count} | {' | '.join(cells)} | {published[0] if published else ''} |")
        text.append(
            "\nDifferences in the same folds: mean and standard error; below 0 the first is better.\n"
        )
        text.append("| | points | paper |\n|---|---|---|")
        text += differences(results, network, rows)
        text.append("")
    path.with_suffix(".md").write_text("\n".join(text) + "\n")
    plot(results, networks, picture)


def cell(found: dict[int, float]) -> str:
    values = np.array(list(found.values()))
    if not len(values):
        return ""
    return f"{values.mean():.2f} ± {values.std(ddof=1):.2f}" if len(values) > 1 else f"{values.mean():.2f}"


def less(first: float | None, second: float | None) -> str:
    """Return the difference of two of the paper's figures, nothing where it has none."""
    return "" if first is None or second is None else f"{first - second:+.2f}"


def differences(results: dict, network: str, rows: list[str]) -> list[str]:
    lines = []
    for first, second in COMPARISONS:
        if first in rows and second in rows:
            change = paired(*(errors(results, network, row, "ten") for row in (first, second)))
            known = [PUBLISHED.get((network, row), (None,))[0] for row in (first, second)]
            paper = less(known[0], known[1])
            lines.append(f"| {first} less {second}, ten views | {spread(change)} | {paper} |")
    for row in rows:
        for i, (first, second) in enumerate((("full", "one"), ("maps10", "ten"), ("maps96", "ten"))):
            change = paired(errors(results, network, row, first), errors(results, network, row, second))
            if len(change):
                views = PUBLISHED.get((network, row)) or (None, None, None)
                paper = less(views[2], views[1]) if i == 0 else ""
                lines.append(f"| {row}: {first} less {second} | {spread(change)} | {paper} |")
    return lines


def facts(results: dict) -> dict:
    found = list(results["pieces"].values())
    return {
        "small": round(results["settings"]["side"] * 180 / 224),
        "machine": ", ".join(sorted({piece["machine"] for piece in found})),
        "commit": ", ".join(sorted({piece["commit"] for piece in found})),
    }


def plot(results: dict, networks: list[str], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 1 + 2.2 * len(networks)), layout="constrained")
    for place, network in enumerate(networks):
        axes = figure.add_subplot(len(networks), 1, place + 1)
        rows = [row for row in ROWS if errors(results, network, row, "ten")]
        for fold in sorted({f for row in rows for f in errors(results, network, row, "ten")}):
            points = [errors(results, network, row, "ten").get(fold, np.nan) for row in rows]
            axes.plot(points, range(len(rows)), "o-", color="0.75", linewidth=1, markersize=4)
        means = [np.mean(list(errors(results, network, row, "ten").values())) for row in rows]
        axes.plot(means, range(len(rows)), "D", color="tab:red", label="mean")
        axes.set(
            yticks=range(len(rows)),
            yticklabels=rows,
            title=network,
            xlabel="top-1 error in percent, ten views",
        )
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.legend()
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_figure(temporary, dpi=120)


HEAD = """# Classification, measured

`python benchmarks/tables.py DATA --results {path} --width {width} --side {side}
--epochs {epochs} --rows ... --views ...` wrote this page: tables 2 and 3 of the paper, run again from scratch
at a reduced scale. Every image is tested by the network of its fold, which was not trained on it. Width of
the networks {width}, crops of {side} pixels ({small} where the paper has 180), {folds} folds of which those
in the tables have been run, {epochs} epochs, batches of {batch}, learning
rate {lr}, a tenth from 60 % and a hundredth from 85 % of the epochs on. {machine}; commit {commit}.

Views: the central crop (one), the whole image (full), ten crops (ten), ten windows of the maps (maps10),
96 windows of maps at six scales (maps96), and with the whole image and its flip (maps98).

![Errors of every fold]({plot})
"""


if __name__ == "__main__":
    main()
