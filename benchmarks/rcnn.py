"""R-CNN beside the detector: average precision and seconds per image, as in the paper's tables 9 and 10.

R-CNN (Girshick et al., "Rich feature hierarchies for accurate object detection and semantic segmentation",
CVPR 2014) warps every candidate window to one size and runs the backbone on each; the detector runs it on
the whole image. All else is the same here: backbone, pyramid, windows, SVMs, box regression, suppression.
Run as::

    python benchmarks/rcnn.py DATA --images 200 --test 100 --windows 300 --scales 480 \\
        --scales 480:3,4,head --scales 240,336,480,672 --cache FOLDER

With `--cache` an interrupted run goes on: the features of the warps are kept there in half precision, 36 KB
each, and the detector's maps. The seconds are of `--timed` images of `--timed-windows` windows each, without
reading and proposals; the systems take turns, one stage after another on all cores. Behind a colon stand the
stages whose maps are pooled side by side, the last alone where none do.
"""

from __future__ import annotations

import argparse
import hashlib
import random
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.progress import track

from common import commit, setting, table, write_json
from sppnet.boxes import Detections, clip
from sppnet.datasets import read_dataset
from sppnet.detection.detector import Detector
from sppnet.detection.postprocess import postprocess
from sppnet.detection.sampling import Examples, plan_images
from sppnet.detection.svm import Labelled, LinearSVMs, mine_hard_negatives
from sppnet.evaluation.detection import mean_average_precision, voc_detection
from sppnet.features.backbone import Backbone
from sppnet.features.inference import compile_graph
from sppnet.features.windows import WindowPooling
from sppnet.images import read_image, resize
from sppnet.pooling import spatial_pyramid
from sppnet.progress import StageTimer
from sppnet.proposals import parse, propose_all
from sppnet.regression import decode_deltas, encode_deltas, fit_ridge
from sppnet.storage import atomic_path

SIDE = 224
STAGES = ("warping", "backbone", "pooling", "scoring")


def warp(image, box, padding, fill):
    """Return a window as (224, 224, 3) float32 pixels, with `padding` pixels of context on each side.

    R-CNN's rule (appendix A, rcnn_im_crop.m): the window is enlarged so that it fills all but the padding,
    cut out and resized without regard to its aspect; what lies outside the image becomes `fill`.
    """
    height, width = image.shape[:2]
    centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2 * SIDE / (SIDE - 2 * padding)
    low = np.rint(centre - half).astype(int)
    high = np.maximum(np.rint(centre + half).astype(int), low + 1)
    first = np.clip(low, 0, [width - 1, height - 1])
    last = np.clip(high, first + 1, [width, height])
    factors = SIDE / (high - low)
    x1, y1 = np.minimum(np.rint((first - low) * factors).astype(int), SIDE - 1)
    x2, y2 = np.clip(np.rint((last - low) * factors).astype(int), [x1 + 1, y1 + 1], SIDE)
    warped = np.full((SIDE, SIDE, 3), fill, dtype=np.float32)
    warped[y1:y2, x1:x2] = resize(image[first[1] : last[1], first[0] : last[0]], y2 - y1, x2 - x1)
    return warped


class WarpedFeatures:
    """Features of windows, each warped, run through the backbone and pooled over its whole map."""

    def __init__(self, backbone, levels, padding, batch, cache):
        self.padding, self.batch, self.cache = padding, batch, cache
        self.fill = np.array(backbone.mean, np.float32)  # what becomes 0
        self.signature = f"{backbone.signature} {levels} {SIDE} {padding}"
        model = backbone.graph.at(backbone.stages, backbone.output_stride)
        self.run, self.levels = compile_graph(model, backbone.mean, backbone.std), levels
        # The last batch of an image is run whole, whatever is left in it.
        self.pixels = np.zeros((batch, SIDE, SIDE, 3), dtype=np.float32)

    def __call__(self, image, boxes, timer):
        """Return the (R, D) float32 features of (R, 4) windows."""
        parts = []
        for start in range(0, len(boxes), self.batch):
            part = boxes[start : start + self.batch]
            with timer("warping"):
                for i, box in enumerate(part):
                    self.pixels[i] = warp(image, box, self.padding, self.fill)
            with timer("backbone"):
                maps = self.run(self.pixels)[0].transpose(0, 3, 1, 2)[: len(part)]
            with timer("pooling"):
                parts.append(spatial_pyramid(maps, self.levels))
        with timer("pooling"):
            return np.concatenate(parts)

    def kept(self, path, boxes):
        """Return the features in half precision, from the disk where they are there."""
        key = hashlib.sha256(self.signature.encode() + path.read_bytes() + boxes.tobytes()).hexdigest()
        file = self.cache / f"{key}.npy"
        if not file.exists():
            features = self(read_image(path), boxes, StageTimer()).astype(np.float16)
            with atomic_path(file) as temporary:
                np.save(temporary, features)
        return np.load(file, mmap_mode="r")


class RCNN:
    """The detector's SVMs, box regression and suppression on given features.

    Parameters
    ----------
    settings : Detector
        Its settings are taken, nothing that it has learned.
    features : WarpedFeatures
    """

    def __init__(self, settings, features):
        self.settings, self.features = settings, features

    def fit(self, samples, windows, classes):
        s = self.settings
        images, targets = [sample.path for sample in samples], [sample.target for sample in samples]
        plans = plan_images(Examples(images, windows, targets, tuple(classes)), s.settings.sampling, s.seed)
        positives, start = [], []
        near: list[list] = [[] for _ in classes]
        for sample, plan in track(list(zip(samples, plans, strict=True)), "Running the backbone on warps"):
            rows = self.features.kept(sample.path, plan.boxes)
            positives.append(rows[: len(plan.labels)])
            start.append(rows[plan.start])
            for k, examples in enumerate(near):
                mine = np.flatnonzero(plan.fitted == k)
                examples.append((rows[mine], encode_deltas(plan.boxes[mine], plan.truth[mine])))
        first = np.concatenate(start).astype(np.float32)
        self.classes, self.scale = classes, 20 / float(np.linalg.norm(first, axis=1).mean())
        self.regressors = [self.regress(*map(np.concatenate, zip(*n, strict=True))) for n in near]
        shown = np.concatenate([np.eye(len(classes), dtype=bool)[p.labels] for p in plans])
        self.svms: LinearSVMs = mine_hard_negatives(
            Labelled(self.scaled(np.concatenate(positives)), shown),
            Labelled(first * self.scale, np.concatenate([p.negative[p.start] for p in plans])),
            self.candidates(samples, plans),
            s.settings.mining,
        ).svms
        return self

    def scaled(self, rows):
        return rows.astype(np.float32) * np.float32(self.scale)

    def regress(self, rows, deltas):
        wide = np.ones((len(rows), rows.shape[1] + 1), dtype=np.float32)
        np.multiply(rows, np.float32(self.scale), out=wide[:, :-1])
        return fit_ridge(wide, deltas, self.settings.ridge)

    def candidates(self, samples, plans):
        for sample, plan in track(list(zip(samples, plans, strict=True)), "Mining warps"):
            negative = plan.negative.copy()
            negative[plan.start] = False
            yield Labelled(self.scaled(self.features.kept(sample.path, plan.boxes)), negative)

    def score(self, features, windows, shape, regress=True, threshold=-1.5, limit=100):
        """Return the detections among windows with (R, D) float32 features, which are scaled in place."""
        features *= np.float32(self.scale)
        boxes = np.repeat(windows[:, None], len(self.classes), axis=1)
        if regress:
            deltas = np.stack(
                [features @ weights.T + offsets for weights, offsets in self.regressors], axis=1
            )
            boxes = decode_deltas(boxes, deltas)
        scores = self.svms(features)
        return postprocess(
            boxes, scores, self.classes, shape, self.settings.settings.nms_iou, threshold, limit
        )

    def predict(self, image, windows, timer):
        features = self.features(image, windows, timer)
        with timer("scoring"):
            return self.score(features, windows, image.shape[:2])


@dataclass
class Row:
    system: str
    found: dict[bool, list[Detections]] = field(default_factory=lambda: {False: [], True: []})
    timer: StageTimer = field(default_factory=StageTimer)


def check_warps(features, backbone, levels, image):
    """Stop unless the warp of a whole image is what the detector makes of it at the same size."""
    square, whole = resize(image, SIDE, SIDE), np.array([[0, 0, SIDE, SIDE]], np.float32)
    padding, features.padding = features.padding, 0
    # Of one batch and one more: every place in a batch counts, and the last that is not full.
    theirs = features(square, np.repeat(whole, features.batch + 1, axis=0), StageTimer())
    features.padding = padding
    ours = WindowPooling((SIDE,), levels)(backbone.encode(square, (SIDE,)), whole)
    difference, largest = float(np.abs(theirs - ours).max()), float(np.abs(ours).max())
    print(f"A whole image warped and pooled at {SIDE}: differ by {difference:.1e}, largest {largest:.1f}")
    if difference > 1e-4 * largest:
        raise SystemExit("found other features of a warped image, expected those of the detector")


def fill_up(windows, count, image, rng):
    """Return exactly `count` windows: the first ones, then copies of them moved by up to a tenth."""
    more = windows[rng.integers(len(windows), size=max(count - len(windows), 0))]
    moves = rng.uniform(-0.1, 0.1, more.shape) * np.tile(more[:, 2:] - more[:, :2], 2)
    moved = clip(more + moves, image.shape[1], image.shape[0])
    return np.concatenate([windows[:count], moved])


def take_times(rcnn, detectors, rows, samples, count, proposals, seed):
    method, rng = parse(proposals), np.random.default_rng(seed)
    systems = [rcnn.predict, *(d.predict for d in detectors)]
    for number, sample in enumerate(track(samples, "Taking the time")):
        image = read_image(sample.path)
        windows = fill_up(method(image).boxes, count, image, rng)
        for row, predict in zip(rows, systems, strict=True):
            if number == 0:  # buffers and kernels come to be
                predict(image, windows[:100], timer=StageTimer())
            predict(image, windows, timer=row.timer)


def test(rcnn, detectors, rows, samples, windows):
    for sample, boxes in zip(track(samples, "Testing"), windows, strict=True):
        image, warped = read_image(sample.path), rcnn.features.kept(sample.path, boxes)
        for regress in (False, True):
            features = warped.astype(np.float32)
            rows[0].found[regress].append(rcnn.score(features, boxes, image.shape[:2], regress))
            for row, detector in zip(rows[1:], detectors, strict=True):
                row.found[regress].append(detector.predict(image, boxes, regress=regress, threshold=0))


def report_precision(rows, targets, classes, count):
    """Print the table of average precision; return its numbers."""
    numbers, lines = [], []
    for row in rows:
        for regress, found in row.found.items():
            results = voc_detection(found, targets, classes)
            each = {name: r.average_precision for name, r in results.items()}
            mean = mean_average_precision(results)
            numbers.append({"system": row.system, "moved": regress, "mAP": mean, "AP": each})
            boxes = "moved" if regress else "as proposed"
            cells = [f"{100 * v:.1f}" for v in (mean, *each.values())]
            lines.append([row.system, count, boxes, *cells])
    print("\n" + table(["system", "windows", "boxes", "mAP", *classes], lines))
    return numbers


def report_seconds(rows, images, count):
    """Print the table of seconds per image; return its numbers."""
    numbers: list[dict] = []
    lines = []
    for row in rows:
        seconds = {stage: row.timer.seconds.get(stage, 0.0) / images for stage in STAGES}
        seconds["total"] = sum(seconds.values())
        slowest = numbers[0]["seconds"] if numbers else seconds
        ratios = {stage: slowest[stage] / seconds[stage] for stage in ("backbone", "total")}
        numbers.append({"system": row.system, "seconds": seconds, "ratios": ratios})
        cells = [*(f"{s:.3f}" for s in seconds.values()), *(f"{r:.1f} x" for r in ratios.values())]
        lines.append([row.system, count, *cells])
    head = ["system", "windows", *(f"{stage} s" for stage in STAGES), "total s", "backbone", "total"]
    print("\n" + table(head, lines))
    print("\nThe last columns: R-CNN's seconds divided by those of the row.")
    return numbers


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--split", default="train", help="what is tested on; the fit is on train")
    parser.add_argument("--images", type=int, default=200, help="fitted to")
    parser.add_argument("--test", type=int, default=100, help="images tested on")
    parser.add_argument("--windows", type=int, default=300, help="per image, of both")
    parser.add_argument("--scales", action="append", help="shorter sides, :stages; may be repeated")
    parser.add_argument("--classes", default="cat,cow,dog,horse,person,sheep")
    parser.add_argument("--levels", default="3,2,1")
    parser.add_argument("--padding", type=int, default=16, help="pixels of context around a warp")
    parser.add_argument("--batch", type=int, default=32, help="warps at a time")
    parser.add_argument("--proposals", default="selective-search+edge-boxes")
    parser.add_argument("--timed", type=int, default=5, help="test images that the time is taken of")
    parser.add_argument("--timed-windows", type=int, default=2000)
    parser.add_argument("--timed-proposals", default="selective-search-quality+edge-boxes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="keep features, maps and windows in this folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    return parser.parse_args()


def draw(args):
    """Return the samples to fit and to test, drawn by the seed; never the same image."""
    samples = list(read_dataset(args.data, "train"))
    random.Random(args.seed).shuffle(samples)
    rest = samples[args.images :]
    if args.split != "train":
        rest = list(read_dataset(args.data, args.split))
        random.Random(args.seed).shuffle(rest)
    return samples[: args.images], rest[: args.test]


def run(args, cache):
    levels, classes = tuple(map(int, args.levels.split(","))), args.classes.split(",")
    asked = [text.partition(":") for text in args.scales or ["480", "240,336,480,672"]]
    systems = [(tuple(map(int, sides.split(","))), tuple((s or "head").split(","))) for sides, _, s in asked]
    fitting, testing = draw(args)
    backbone, method = Backbone(), parse(args.proposals)
    paths = [s.path for s in fitting + testing]
    proposed = propose_all(paths, method, cache / "windows")
    windows = [found.boxes[: args.windows] for found in track(proposed, "Proposing", total=len(paths))]
    train_windows, test_windows = windows[: len(fitting)], windows[len(fitting) :]

    features = WarpedFeatures(backbone, levels, args.padding, args.batch, cache)
    check_warps(features, backbone, levels, read_image(testing[0].path))
    detectors = [
        Detector(levels=levels, scales=sides, stages=stages, seed=args.seed) for sides, stages in systems
    ]
    rcnn = RCNN(detectors[0], features).fit(fitting, train_windows, classes)
    for detector in detectors:
        detector.fit(fitting, classes=classes, windows=train_windows, cache=cache, track=track)
    rows = [Row(f"R-CNN, padding {args.padding}")]
    for sides, stages in systems:
        more = "" if stages == ("head",) else f"; stages {', '.join(stages)}"
        rows.append(Row(f"SPP, {', '.join(map(str, sides))}{more}"))
    test(rcnn, detectors, rows, testing, test_windows)
    timed = testing[: args.timed]
    if timed:
        take_times(rcnn, detectors, rows, timed, args.timed_windows, args.timed_proposals, args.seed)

    print(
        f"\nFitted to {len(fitting)} images of train, tested on {len(testing)} of {args.split}, times of "
        f"{len(timed)}; batches of {args.batch} warps; {setting()}; commit {commit()}"
    )
    precision = report_precision(rows, [s.target for s in testing], classes, args.windows)
    seconds = report_seconds(rows, len(timed), args.timed_windows) if timed else []
    facts = {"machine": setting(), "commit": commit(), "arguments": vars(args)}
    facts |= {"precision": precision, "seconds": seconds}
    write_json(args.json, facts)


def main():
    args = parse_arguments()
    if args.cache:
        args.cache.mkdir(parents=True, exist_ok=True)
        run(args, args.cache)
    else:
        with TemporaryDirectory(prefix="sppnet-") as folder:
            run(args, Path(folder))


if __name__ == "__main__":
    main()
