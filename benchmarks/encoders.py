"""The encoders that the paper compares itself with (table 8), and VLAD: Caltech101 by the paper's protocol.

All encode the same dense SIFT descriptors, and one SVM measures them all, that of
`sppnet.evaluation.protocols.caltech101_results`::

    python benchmarks/encoders.py DATA --splits 2 --json encoders.json

- spm: spatial pyramid matching (Lazebnik, 2006). Each descriptor counts for its nearest word; levels 1 x 1,
  2 x 2 and 4 x 4 with weights 1/4, 1/4 and 1/2; kernel of histogram intersection.
- llc: locality-constrained linear coding (Wang, 2010). Each descriptor is a combination of its 5 nearest
  words; maxima, at least 0, over the cells of the same levels; length 1.
- vlad: sums of residuals to the nearest of 64 words (Jegou, 2010), in the whole image and in its quadrants;
  signed square roots, then length 1 for each word of each cell, then length 1 altogether.
- fisher: improved Fisher vectors (Perronnin, 2010). Gradients to means and deviations of 64 Gaussians, in the
  same cells; signed square roots, then length 1 for each cell, then length 1 altogether.

VLAD and Fisher vectors take RootSIFT, by PCA reduced to 64 dimensions. Codebooks, PCA and Gaussians see no
labels but to draw as many images of each class, and only images that are training images in every split; of
two splits these are hundreds, of ten very few. So one codebook serves all splits, no test image is in it, and
it adds nothing to the deviation over the splits.

Seconds are of processor time and without reading the image; those of the descriptors come on top of each
encoder's. With ``--cache`` a later run of the same script with the same settings encodes nothing again.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numba import njit
from rich.console import Console
from rich.progress import track
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture

from common import commit, machine
from sppnet.datasets.image_folder import LabelledImages, read_image_folder
from sppnet.evaluation.protocols import caltech101_results, caltech101_splits, gram_matrix
from sppnet.images import read_image, resize, shorter_side_size
from sppnet.storage import atomic_path, check_writable

TRAIN, TEST, SEED = 30, 50, 0
# Pixels: shorter side of the images, sides of the patches, and from patch to patch.
SIDE, PATCHES, STEP = 200, (16, 24, 32), 6
# Patches whose grey values deviate less than this are flat: SIFT would describe their noise at full length.
FLAT = 2.0
PYRAMID, WEIGHTS = (1, 2, 4), (0.25, 0.25, 0.5)
CELLS = (1, 2)
NEIGHBOURS, RIDGE = 5, 1e-4
DIMENSIONS, CENTRES, GAUSSIANS = 64, 64, 64
# What codebooks learn from.
IMAGES_OF_CLASS, DESCRIPTORS_OF_IMAGE = 8, 250
BLOCK = 512


class Points(NamedTuple):
    """The descriptors of an image, (N, 128) of length 1 (0 if flat), and where they lie, (N, 2) in [0, 1)."""

    descriptors: np.ndarray
    places: np.ndarray


class Codebooks:
    """What the encoders learn from descriptors, each when it is first asked for."""

    def __init__(self, descriptors: np.ndarray, count: int):
        self.descriptors, self.count = descriptors, count

    @cached_property
    def words(self) -> np.ndarray:
        return centres(self.descriptors, self.count)

    @cached_property
    def components(self) -> PCA:
        return PCA(DIMENSIONS, random_state=SEED).fit(np.sqrt(root_sums(self.descriptors)))

    @cached_property
    def reduced(self) -> np.ndarray:
        return self.reduce(self.descriptors)

    @cached_property
    def residual_words(self) -> np.ndarray:
        return centres(self.reduced, CENTRES)

    @cached_property
    def mixture(self) -> GaussianMixture:
        model = GaussianMixture(GAUSSIANS, covariance_type="diag", random_state=SEED, reg_covar=1e-5)
        return model.fit(self.reduced.astype(np.float64))

    def reduce(self, descriptors: np.ndarray) -> np.ndarray:
        return self.components.transform(np.sqrt(root_sums(descriptors))).astype(np.float32)


def centres(vectors: np.ndarray, count: int) -> np.ndarray:
    return MiniBatchKMeans(count, batch_size=8192, n_init=1, random_state=SEED).fit(vectors).cluster_centers_


def root_sums(descriptors: np.ndarray) -> np.ndarray:
    """Return descriptors whose values sum to 1 (0 if flat): their square roots are RootSIFT."""
    return descriptors / np.maximum(descriptors.sum(axis=1, keepdims=True), 1e-12)


def describe(image: np.ndarray) -> Points:
    """Return SIFT of upright patches of all sizes on a dense grid."""
    height, width = image.shape[:2]
    if min(height, width) > SIDE:
        image = resize(image, *shorter_side_size(height, width, SIDE))
        height, width = image.shape[:2]
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    found, places = [], []
    for side in PATCHES:
        x, y = (positions(length, side) for length in (width, height))
        centre = np.stack(np.meshgrid(x, y), axis=2).reshape(-1, 2)
        # OpenCV's patch is six times the size of its keypoint; blurred by a sixth of one of its 4 x 4 bins.
        sift = cv2.SIFT.create(nOctaveLayers=1, sigma=side / 24)
        _, raw = sift.compute(grey, [cv2.KeyPoint(float(x), float(y), side / 6, 0.0) for x, y in centre])
        raw[deviations(grey, side)[tuple(centre.astype(int).T[::-1])] < FLAT] = 0
        found.append(raw / np.maximum(np.linalg.norm(raw, axis=1, keepdims=True), 1e-12))
        places.append((centre + 0.5) / (width, height))
    return Points(np.concatenate(found), np.concatenate(places))


def positions(length: int, side: int) -> np.ndarray:
    """Return centres of patches, the grid in the middle of the image; a shorter image has one patch."""
    count = max(0, length - side) // STEP + 1
    return np.arange(count) * STEP + (length - 1 - (count - 1) * STEP) // 2


def deviations(grey: np.ndarray, side: int) -> np.ndarray:
    """Return the standard deviation of the grey values of the patch around every pixel."""
    mean = cv2.boxFilter(grey, cv2.CV_64F, (side, side))
    return np.sqrt(np.maximum(cv2.sqrBoxFilter(grey, cv2.CV_64F, (side, side)) - mean**2, 0))


def cell_numbers(places: np.ndarray, level: int) -> np.ndarray:
    """Return for each place its cell, row by row, of level x level cells."""
    column, row = (places * level).astype(int).T
    return row * level + column


def cells(places: np.ndarray, levels: Iterable[int]) -> Iterator[np.ndarray]:
    """Yield which places lie in a cell, for every cell of every level."""
    for level in levels:
        number = cell_numbers(places, level)
        yield from (number == cell for cell in range(level * level))


def distances(vectors: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Return the (N, K) squared distances, less what is the same for all words."""
    return (words * words).sum(axis=1) - 2 * vectors @ words.T


def unit(vector: np.ndarray) -> np.ndarray:
    """Return vectors (the last axis) of length 1, or 0 as they are."""
    return vector / np.maximum(np.linalg.norm(vector, axis=-1, keepdims=True), 1e-12)


def signed_root(vector: np.ndarray) -> np.ndarray:
    return np.sign(vector) * np.sqrt(np.abs(vector))


def spm(points: Points, books: Codebooks) -> np.ndarray:
    count = len(books.words)
    nearest = distances(points.descriptors, books.words).argmin(axis=1)
    histograms = [
        weight
        * np.bincount(cell_numbers(points.places, level) * count + nearest, minlength=level * level * count)
        for level, weight in zip(PYRAMID, WEIGHTS, strict=True)
    ]
    return np.concatenate(histograms) / len(nearest)


def llc(points: Points, books: Codebooks) -> np.ndarray:
    count = len(books.words)
    near = distances(points.descriptors, books.words).argpartition(NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
    codes = combinations(points.descriptors, books.words[near])
    maxima = []
    for level in PYRAMID:
        pooled = np.zeros(level * level * count, codes.dtype)
        np.maximum.at(pooled, cell_numbers(points.places, level)[:, None] * count + near, codes)
        maxima.append(pooled)
    return unit(np.concatenate(maxima))


def combinations(vectors: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Return weights, of sum 1, of the (N, k, D) words that come closest to each of the vectors."""
    apart = words - vectors[:, None]
    products = apart @ apart.transpose(0, 2, 1)
    ridge = RIDGE * np.trace(products, axis1=1, axis2=2) + 1e-12
    weights = np.linalg.solve(
        products + ridge[:, None, None] * np.eye(NEIGHBOURS, dtype=products.dtype),
        np.ones((len(vectors), NEIGHBOURS, 1), products.dtype),
    )[..., 0]
    return weights / weights.sum(axis=1, keepdims=True)


def vlad(points: Points, books: Codebooks) -> np.ndarray:
    vectors, words = books.reduce(points.descriptors), books.residual_words
    hits = np.eye(len(words), dtype=vectors.dtype)[distances(vectors, words).argmin(axis=1)]
    sums = [
        hits[inside].T @ vectors[inside] - hits[inside].sum(axis=0)[:, None] * words
        for inside in cells(points.places, CELLS)
    ]
    return unit(unit(signed_root(np.stack(sums))).ravel())


def fisher(points: Points, books: Codebooks) -> np.ndarray:
    vectors = books.reduce(points.descriptors).astype(np.float64)
    shares = books.mixture.predict_proba(vectors)
    found = [gradients(vectors[c], shares[c], books.mixture) for c in cells(points.places, CELLS)]
    return unit(unit(signed_root(np.stack(found))).ravel())


def gradients(vectors: np.ndarray, shares: np.ndarray, mixture: GaussianMixture) -> np.ndarray:
    """Return the gradients to means and deviations, by the closed form of their Fisher information."""
    means, variances = mixture.means_, mixture.covariances_
    mass, first, second = shares.sum(axis=0)[:, None], shares.T @ vectors, shares.T @ vectors**2
    scale = max(1, len(vectors)) * np.sqrt(mixture.weights_)[:, None]
    to_means = (first - mass * means) / np.sqrt(variances)
    to_deviations = (second - 2 * means * first + means**2 * mass) / variances - mass
    return np.concatenate([to_means / scale, to_deviations / (math.sqrt(2) * scale)]).ravel()


def intersection_matrix(histograms: np.ndarray) -> np.ndarray:
    """Return the (n, n) sums of the smaller values of each two histograms."""
    n, length = histograms.shape
    gram = np.zeros((n, n), np.float32)
    # Of some columns at a time, so that a few hundred rows fit the processor's cache.
    for start in progress(range(0, length, BLOCK), "Intersecting", -(-length // BLOCK)):
        columns = histograms[:, start : start + BLOCK].astype(np.float32)
        for i in range(0, n, BLOCK):
            for j in range(0, i + 1, BLOCK):
                add_intersections(columns[i : i + BLOCK], columns[j : j + BLOCK], gram[i:, j:])
    return np.tril(gram) + np.tril(gram, -1).T


# Without the freedom to reorder sums the loop could not be vectorised.
@njit(fastmath=True)
def add_intersections(left, right, sums):
    for i in range(len(left)):
        for j in range(len(right)):
            total = np.float32(0)
            for k in range(left.shape[1]):
                total += min(left[i, k], right[j, k])
            sums[i, j] += total


@dataclass(frozen=True)
class Encoder:
    """A row of the table; `published` is the paper's accuracy on Caltech101, in percent."""

    title: str
    encode: Callable[[Points, Codebooks], np.ndarray]
    settings: dict
    published: float | None = None
    kernel: Callable[[np.ndarray], np.ndarray] = gram_matrix


ENCODERS = {
    "spm": Encoder(
        "VQ, spatial pyramid", spm, {"levels": PYRAMID, "weights": WEIGHTS}, 74.41, intersection_matrix
    ),
    "llc": Encoder("LLC", llc, {"levels": PYRAMID, "neighbours": NEIGHBOURS, "ridge": RIDGE}, 76.95),
    "vlad": Encoder("VLAD", vlad, {"levels": CELLS, "dimensions": DIMENSIONS, "words": CENTRES}),
    "fisher": Encoder(
        "Fisher vectors", fisher, {"levels": CELLS, "dimensions": DIMENSIONS, "gaussians": GAUSSIANS}, 77.78
    ),
}


def main() -> None:
    arguments = parsed()
    cv2.setNumThreads(1)
    # Now, before an hour of work.
    check_writable(arguments.json)
    images = read_image_folder(arguments.data)
    if arguments.classes:
        images = images.subset(images.labels < arguments.classes)
    chosen = images_to_learn_from(images.labels, arguments.splits)
    facts = {
        "machine": machine(),
        "commit": commit(),
        "opencv": cv2.__version__,
        "images": len(images),
        "classes": len(np.unique(images.labels)),
        "protocol": {"splits": arguments.splits, "train": TRAIN, "test": TEST, "seed": SEED},
        "descriptors": {"shorter side": SIDE, "patches": PATCHES, "step": STEP, "flat below": FLAT},
        "codebook": f"unsupervised, from {DESCRIPTORS_OF_IMAGE} descriptors, none flat, of each of "
        f"{len(chosen)} images that are training images in every split, at most {IMAGES_OF_CLASS} of a class",
    }
    results = {}
    for name, (vectors, seconds) in read_or_encode(arguments, images, chosen).items():
        results[name] = measure(name, vectors, images.labels, arguments.splits) | {
            "seconds per image": {"descriptors": float(seconds[0]), "encoding": float(seconds[1])},
            "settings": ENCODERS[name].settings
            | ({"words": arguments.words} if name in ("spm", "llc") else {}),
        }
        with atomic_path(arguments.json) as temporary:
            temporary.write_text(json.dumps(facts | {"encoders": results}, indent=1) + "\n")
    report(facts, results)


def measure(name: str, vectors: np.ndarray, labels: np.ndarray, count: int) -> dict:
    gram = ENCODERS[name].kernel(vectors)
    measured = caltech101_results(gram, labels, splits=count, train=TRAIN, test=TEST, seed=SEED)
    splits = list(progress(measured, f"Splits of {name}", count))
    accuracies = [split.accuracy for split in splits]
    return {
        "mean": float(np.mean(accuracies)),
        "std": float(np.std(accuracies, ddof=1)) if count > 1 else None,
        "accuracies": accuracies,
        "C": [split.C for split in splits],
        "length": vectors.shape[1],
    }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder with a folder for each class")
    parser.add_argument("--splits", type=int, default=2)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="write the results here")
    parser.add_argument("--encoders", nargs="+", default=list(ENCODERS), choices=ENCODERS)
    parser.add_argument("--words", type=int, default=1024, help="of spm and llc")
    parser.add_argument("--classes", type=int, help="only so many, the first, to try things out")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keep the vectors here")
    return parser.parse_args()


def progress(steps: Iterable, title: str, total: int) -> Iterable:
    return track(steps, title, total, console=Console(stderr=True))


def images_to_learn_from(labels: np.ndarray, splits: int) -> np.ndarray:
    """Return some images of every class that `caltech101_results` takes for training in every split."""
    rng = np.random.default_rng(SEED)
    seen = [train for train, _ in caltech101_splits(labels, splits, TRAIN, TEST, SEED)]
    common = functools.reduce(np.intersect1d, seen)
    found = [rng.permutation(common[labels[common] == k])[:IMAGES_OF_CLASS] for k in np.unique(labels)]
    chosen = np.concatenate(found).astype(int)
    if not len(chosen):
        raise SystemExit(f"found no image that trains in each of {splits} splits, expected fewer splits")
    return chosen


def learn_from(images: LabelledImages, chosen: np.ndarray, count: int) -> Codebooks:
    rng = np.random.default_rng(SEED)
    found = []
    for i in progress(chosen, "Sampling", len(chosen)):
        descriptors = describe(read_image(images[int(i)][0])).descriptors
        found.append(rng.permutation(descriptors[descriptors.any(axis=1)])[:DESCRIPTORS_OF_IMAGE])
    return Codebooks(np.concatenate(found), count)


def read_or_encode(
    arguments: argparse.Namespace, images: LabelledImages, chosen: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return for each encoder the vectors of all images, and seconds per image: descriptors, and encoding."""
    names, folder = list(dict.fromkeys(arguments.encoders)), arguments.cache
    if folder is None:
        return encode(images, names, learn_from(images, chosen, arguments.words))
    folder.mkdir(parents=True, exist_ok=True)
    files = [str(path) for path, _ in images]
    key = repr((arguments.words, chosen.tolist(), files)).encode() + Path(__file__).read_bytes()
    digest = hashlib.sha256(key).hexdigest()[:12]
    paths = {name: folder / f"{name}-{digest}.npz" for name in names}
    missing = [name for name in names if not paths[name].exists()]
    if missing:
        found = encode(images, missing, learn_from(images, chosen, arguments.words))
        for name, (vectors, seconds) in found.items():
            with atomic_path(paths[name]) as temporary:
                np.savez(temporary, vectors=vectors, seconds=seconds)
    stored = {name: np.load(path) for name, path in paths.items()}
    return {name: (stored[name]["vectors"], stored[name]["seconds"]) for name in names}


def encode(
    images: LabelledImages, names: list[str], books: Codebooks
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    first = describe(read_image(images[0][0]))
    # Learns the codebooks, too, before anything is timed.
    lengths = {name: len(ENCODERS[name].encode(first, books)) for name in names}
    vectors = {name: np.empty((len(images), length), np.float16) for name, length in lengths.items()}
    seconds = dict.fromkeys(["descriptors", *names], 0.0)
    for i, (path, _) in enumerate(progress(images, "Encoding", len(images))):
        image = read_image(path)
        start = time.process_time()
        points = describe(image)
        seconds["descriptors"] += time.process_time() - start
        for name in names:
            start = time.process_time()
            vectors[name][i] = ENCODERS[name].encode(points, books)
            seconds[name] += time.process_time() - start
    return {
        name: (vectors[name], np.array([seconds["descriptors"], seconds[name]]) / len(images))
        for name in names
    }


def report(facts: dict, results: dict) -> None:
    print(f"{facts['machine']}, commit {facts['commit']}")
    print(f"{facts['images']} images of {facts['classes']} classes; codebooks {facts['codebook']}")
    print(f"{'accuracy in percent':22}    mean     std   paper  length  seconds per image, of descriptors")
    for name, r in results.items():
        encoder, seconds = ENCODERS[name], r["seconds per image"]
        std = "" if r["std"] is None else f"{100 * r['std']:.2f}"
        published = "" if encoder.published is None else f"{encoder.published:.2f}"
        print(
            f"{encoder.title:22} {100 * r['mean']:7.2f} {std:>7} {published:>7} {r['length']:7}"
            f"  {seconds['encoding']:.3f} {seconds['descriptors']:.3f}"
        )


if __name__ == "__main__":
    main()
