"""What half-precision weights of a backbone change: maps and detections of the shipped detector.

The backbone runs twice on each photo: as its file has it, and with the single-precision weights that the file
was made of, through PyTorch; what was tuned is the same in both. Needs sppnet[backbones]. Run as::

    python benchmarks/half_precision.py DATA --split val --images 400
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from common import commit, setting
from sppnet.boxes import Detections, iou
from sppnet.datasets import read_dataset
from sppnet.detection.detector import Detector
from sppnet.evaluation.detection import evaluate_detections
from sppnet.features.encoded import EncodedImage
from sppnet.features.network import Runner
from sppnet.features.timm import PREFIX, create_timm
from sppnet.features.weights import read_weights
from sppnet.images import read_image

CLOSE = 0.9


def single_precision(backbone):
    """Return what computes the backbone's maps with the weights that its file was made of."""
    runner, name = Runner(backbone), backbone.graph.facts.network
    weights = read_weights(create_timm(name), name).state
    kept = {f"{PREFIX}{n}": v for n, v in weights.items() if n not in backbone.tuned}
    runner.network.load_state_dict(kept, strict=False)

    def run(pixels):
        with torch.inference_mode():
            return tuple(m.numpy() for m in runner(pixels))

    return run


def pairs(one, other):
    """Return differences of scores and boxes of detections of one class that overlap by 0.9 or more."""
    found = []
    for i, label in enumerate(one.labels):
        same = [j for j, name in enumerate(other.labels) if name == label]
        shares = iou(one.boxes[i : i + 1], other.boxes[same])[0]
        if len(same) and shares.max() >= CLOSE:
            j = same[int(shares.argmax())]
            found.append((abs(one.scores[i] - other.scores[j]), np.abs(one.boxes[i] - other.boxes[j]).max()))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--images", type=int, default=400)
    arguments = parser.parse_args()
    samples = list(read_dataset(arguments.data, arguments.split))[: arguments.images]
    detector = Detector.load("animals")
    backbone = detector.fitted_.backbone
    run = single_precision(backbone)
    found: tuple[list[Detections], list[Detections]] = ([], [])
    apart, maps = [], []
    for sample in track(samples, "Detecting twice"):
        pixels = read_image(sample.path)
        half = detector.encode(pixels)
        single = EncodedImage(
            half.size, tuple(backbone.compute(run, pixels, side) for side in detector.scales)
        )
        for a, b in zip(half.scales, single.scales, strict=True):
            maps.append(np.linalg.norm(a.stages[-1] - b.stages[-1]) / np.linalg.norm(b.stages[-1]))
        windows = detector.propose(pixels, half)
        for results, encoded in zip(found, (half, single), strict=True):
            results.append(detector.predict(encoded, windows))
        apart += pairs(found[0][-1], found[1][-1])
    scores, boxes = np.array(apart).T
    print(f"{len(samples)} images, commit {commit()}, {setting()}")
    print(f"maps: {100 * np.mean(maps):.2f} % apart")
    counts = [sum(len(d.labels) for d in results) for results in found]
    print(f"detections: {counts[0]} in half precision, {counts[1]} in single; {len(apart)} in both,")
    print(f"scores {scores.mean():.4f} apart, at most {scores.max():.4f}")
    print(f"boxes {boxes.mean():.3f} pixels apart, at most {boxes.max():.2f}")
    for name, results in zip(("half", "single"), found, strict=True):
        report = evaluate_detections(results, [sample.target for sample in samples], detector.classes_)
        print(f"mAP, {name} precision: {100 * report.mean_ap:.2f}")


if __name__ == "__main__":
    main()
