"""Recall of candidate windows on annotated images, and seconds per image on one core.

"AR" is the mean recall over the overlaps 0.5, 0.55 ... 0.95, and "AR 300" that of the first 300 windows of
each image. Difficult objects do not count. The seconds are of processor time, without reading the image.
"""

import argparse
import json
import random
import time
from pathlib import Path

import cv2

from pooling import commit, machine
from sppnet.datasets import read_dataset
from sppnet.images import read_image
from sppnet.metrics import proposal_recall
from sppnet.proposals import METHODS, SelectiveSearch, parse

# OpenCV's "fast" mode; it finds the most when the image is not shrunk.
FAST = {
    f"fast mode, {side} x {side}": SelectiveSearch(
        side, ("hsv", "lab"), (150, 300, 450), 100, 0.8, ("CTSF", "TSF"), max_overlap=1
    )
    for side in (433, 217)
}


def measure(method, samples, classes):
    windows, seconds = [], 0.0
    for sample in samples:
        image = read_image(sample.path)
        start = time.thread_time()
        windows.append(method(image)[0])
        seconds += time.thread_time() - start
    targets = [sample.target for sample in samples]
    recall = proposal_recall(windows, targets, classes=classes)
    first = proposal_recall([w[:300] for w in windows], targets, classes=classes)
    return {
        "recall 0.5": recall.recall[0],
        "recall 0.7": recall.recall[4],
        "AR": recall.average_recall,
        "AR 300": first.average_recall,
        "windows": recall.mean_windows,
        "seconds": seconds / len(samples),
        "objects": recall.positives,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="dataset, as read_dataset takes it")
    parser.add_argument("--split", default="train")
    parser.add_argument("--images", type=int, default=200, help="drawn by a fixed seed")
    parser.add_argument("--classes", help="count objects of these classes, comma separated; default: all")
    parser.add_argument("--methods", nargs="*", help="names as sppnet.proposals.parse takes them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    args = parser.parse_args()

    cv2.setNumThreads(1)
    samples = list(read_dataset(args.data, args.split))
    random.Random(0).shuffle(samples)
    samples = samples[: args.images]
    classes = args.classes.split(",") if args.classes else None
    names = args.methods or [*METHODS, "selective-search+dense", "selective-search+edge-boxes"]
    methods = {name: parse(name) for name in names} | ({} if args.methods else FAST)

    results = {}
    print(f"{machine()}, one thread, OpenCV {cv2.__version__}, commit {commit()}")
    print(f"{'':28} recall 0.5  recall 0.7     AR  AR 300  windows  seconds")
    for name, method in methods.items():
        r = results[name] = measure(method, samples, classes)
        print(
            f"{name:28} {r['recall 0.5']:10.3f}  {r['recall 0.7']:10.3f}  {r['AR']:5.3f}  {r['AR 300']:6.3f}"
            f"  {r['windows']:7.0f}  {r['seconds']:7.3f}",
            flush=True,
        )
    print(f"{len(samples)} images, {r['objects']} objects")
    if args.json:
        facts = {"machine": machine(), "opencv": cv2.__version__, "commit": commit(), "images": len(samples)}
        args.json.write_text(json.dumps(facts | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
