"""Seconds per image of views on the maps against crops of the image, for one network.

The classes do not depend on the weights' values, so random ones serve. Run as::

    python benchmarks/views.py --network zf5 --images 20 DATA

DATA is a folder of images. ``96 crops`` cuts the same 96 views out of the image at six scales and runs each
through the whole network; the scores of both ways are averages over as many views.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from scipy.special import softmax

from common import commit, machine
from sppnet.classification.augment import resize_shorter
from sppnet.classification.network import build, scorer_of
from sppnet.classification.scorer import NetworkSettings
from sppnet.classification.views import SCALES, probabilities
from sppnet.images import find_images, read_image, view_windows


def cropped(scorer, image, scales, sides) -> np.ndarray:
    """Return the probabilities by cropping: ten crops at a time, as many as fit a small memory."""
    crops, size = [], scorer.settings.size
    for scale in scales:
        resized = resize_shorter(image, round(size * scale / 224))
        height, width = resized.shape[:2]
        windows = view_windows(height, width, size, sides)
        views = [resized[y1:y2, x1:x2] for x1, y1, x2, y2 in windows]
        crops += [*views, *(view[:, ::-1] for view in views)]
    scores = [scorer.scores(np.stack(crops[i : i + 10])) for i in range(0, len(crops), 10)]
    return softmax(np.concatenate(scores), axis=1).mean(axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--network", default="zf5")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = NetworkSettings(arguments.network, tuple(map(str, range(1000))), width=arguments.width)
    scorer = scorer_of(build(settings), settings)
    ways = {
        "10 crops": partial(cropped, scorer, scales=(256,), sides=False),
        "maps10": partial(probabilities, scorer, views="maps10"),
        "96 crops": partial(cropped, scorer, scales=SCALES, sides=True),
        "maps96": partial(probabilities, scorer, views="maps96"),
        "one": partial(probabilities, scorer, views="one"),
        "full": partial(probabilities, scorer, views="full"),
    }
    files = find_images([arguments.data]).paths
    chosen = files[:: max(1, len(files) // arguments.images)][: arguments.images]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for path in track(chosen, description="Timing"):
        image = read_image(path)
        for name, way in ways.items():
            start = time.perf_counter()
            way(image=image)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {
        "maps10": medians["10 crops"] / medians["maps10"],
        "maps96": medians["96 crops"] / medians["maps96"],
    }
    print(f"{machine()}, {arguments.threads} threads, commit {commit()}, {len(chosen)} images")
    for name, value in medians.items():
        print(f"{name:10} {value:.3f} s per image")
    for name, value in ratios.items():
        print(f"{name} is {value:.2f} times as fast as cropping")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"seconds": medians, "ratios": ratios}, indent=1) + "\n")


if __name__ == "__main__":
    main()
