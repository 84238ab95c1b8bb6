"""Recall of candidate windows on annotated images, and seconds per image on one core.

"AR" is the mean recall over the overlaps 0.5, 0.55 ... 0.95, and "AR 300" that of the first 300 windows of
each image. Difficult objects do not count. The seconds are of processor time, without reading the image.

With ``--maps`` also the windows of `sppnet.proposals.maps`, fitted to images of the split that are not
measured; their seconds are those beyond the maps, which the detector computes anyway.
"""

import argparse
import random
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import torch

from common import commit, machine, write_json
from sppnet.datasets import read_dataset
from sppnet.evaluation.detection import proposal_recall
from sppnet.features.backbone import Backbone
from sppnet.features.cache import MapCache
from sppnet.images import read_image
from sppnet.progress import StageTimer
from sppnet.proposals import METHODS, SelectiveSearch, parse
from sppnet.proposals.maps import Objectness

# OpenCV's "fast" mode; it finds the most when the image is not shrunk.
FAST = {
    f"fast mode, {side} x {side}": SelectiveSearch(
        side, ("hsv", "lab"), (150, 300, 450), 100, 0.8, ("CTSF", "TSF"), max_overlap=1
    )
    for side in (433, 217)
}


def measure(method, source, samples, classes):
    """Measure a method that takes what `source` makes of a sample, which costs no time here."""
    windows, seconds = [], 0.0
    for sample in samples:
        inputs = source(sample)
        start = time.thread_time()
        windows.append(method(*inputs).boxes)
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


def pixels(sample):
    return (read_image(sample.path),)


def fit_to_maps(sides, samples, folder):
    """Return an objectness fitted to the maps of samples, and the source of such maps."""
    cache = MapCache(folder, Backbone(), sides)

    def maps(sample):
        return (cache(sample.path, StageTimer()),)

    start = time.process_time()
    fitted = Objectness().fit(lambda i: maps(samples[i])[0], [s.target for s in samples])
    print(
        f"fitted to {len(samples)} images in {time.process_time() - start:.0f} s, maps included", flush=True
    )
    return fitted.propose, maps


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="dataset, as read_dataset takes it")
    parser.add_argument("--split", default="train")
    parser.add_argument("--images", type=int, default=200, help="drawn by a fixed seed")
    parser.add_argument("--last", action="store_true", help="measure the last images instead of drawn ones")
    parser.add_argument("--classes", help="count objects of these classes, comma separated; default: all")
    parser.add_argument("--methods", nargs="*", help="names as sppnet.proposals.parse takes them")
    parser.add_argument("--maps", nargs="*", default=[], metavar="SIDES", help="scales: 480 240,336,480,672")
    parser.add_argument("--fit", type=int, default=1000, help="most images that the objectness is fitted to")
    parser.add_argument("--cache", type=Path, help="folder for the maps; default: a temporary one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    args = parser.parse_args()

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    everything = list(read_dataset(args.data, args.split))
    if args.last:
        everything.reverse()
    else:
        random.Random(0).shuffle(everything)
    samples, rest = everything[: args.images], everything[args.images :][-args.fit :]
    classes = args.classes.split(",") if args.classes else None
    usual = [*METHODS, "selective-search+dense", "selective-search+edge-boxes"]
    methods = {name: parse(name) for name in (usual if args.methods is None else args.methods)}
    if args.methods is None:
        methods |= FAST

    results = {}
    print(f"{machine()}, one thread, OpenCV {cv2.__version__}, commit {commit()}")
    print(f"{'':28} recall 0.5  recall 0.7     AR  AR 300  windows  seconds")

    def report(name, method, source):
        r = results[name] = measure(method, source, samples, classes)
        print(
            f"{name:28} {r['recall 0.5']:10.3f}  {r['recall 0.7']:10.3f}  {r['AR']:5.3f}  {r['AR 300']:6.3f}"
            f"  {r['windows']:7.0f}  {r['seconds']:7.3f}",
            flush=True,
        )

    for name, method in methods.items():
        report(name, method, pixels)
    with TemporaryDirectory() as temporary:
        for sides in args.maps:
            scales = tuple(int(side) for side in sides.split(","))
            report(f"maps {sides}", *fit_to_maps(scales, rest, args.cache or Path(temporary)))
    objects = next(iter(results.values()))["objects"]
    print(f"{len(samples)} images, {objects} objects")
    facts = {"machine": machine(), "opencv": cv2.__version__, "commit": commit(), "images": len(samples)}
    write_json(args.json, facts | {"results": results})


if __name__ == "__main__":
    main()
