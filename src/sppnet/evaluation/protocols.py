"""The paper's protocols for frozen features: Caltech101 and PASCAL VOC classification (sections 3.2 and 3.3).

`caltech101` and `voc` go the whole way from images to a report, with any embedder. What they measure by,
`caltech101_results` and `voc_results`, takes a Gram matrix, the inner products of the vectors of all images,
and never the vectors themselves: a linear SVM needs no more, however long they are, and so any kernel can be
measured the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from sppnet.arrays import FloatArray, IntArray, Pixels
from sppnet.boxes import Target
from sppnet.errors import SppnetError
from sppnet.evaluation.classification import evaluate_classification
from sppnet.evaluation.detection import average_precision, mean_of_known
from sppnet.progress import Track, no_track

if TYPE_CHECKING:
    from sppnet.datasets.image_folder import LabelledImages
    from sppnet.datasets.records import Dataset

COSTS = (0.3, 1.0, 3.0, 10.0, 30.0)
"""The values of C that cross-validation chooses from."""

_FOLDS = 3
_BLOCK = 1024


class ImageEmbedder(Protocol):
    """What makes the vectors that a protocol measures, such as `sppnet.Embedder`."""

    @property
    def signature(self) -> str:
        """Everything that the vectors depend on, for the report."""

    def stream(self, images: Iterable[Path | Pixels], /) -> Iterator[npt.NDArray[np.float32] | Exception]:
        """Yield for each image in turn its (1, D) vector, or the error that it gave."""


@dataclass(frozen=True)
class SplitResult:
    """What one random split of Caltech101 gave.

    Attributes
    ----------
    accuracy : float
        Mean over the classes of the share of their test images that are right.
    C : float
        Cost of the SVMs, chosen by cross-validation inside the training images.
    cross_validation : float
        Accuracy that it had there: what to choose other settings by, without a look at the test images.
    """

    accuracy: float
    C: float
    cross_validation: float


@dataclass(frozen=True)
class Caltech101Report:
    """How good features are by Caltech101's protocol, from `caltech101`.

    Attributes
    ----------
    splits : tuple of SplitResult
        What each random split gave.
    images, classes : int
        How many there are in the data.
    embedder : str
        Signature of the embedder.
    """

    splits: tuple[SplitResult, ...]
    images: int
    classes: int
    embedder: str

    @property
    def mean(self) -> float:
        """Mean class accuracy over the splits, in [0, 1]."""
        return float(np.mean([split.accuracy for split in self.splits]))

    @property
    def std(self) -> float | None:
        """Standard deviation of the accuracy from split to split; None of one split."""
        values = [split.accuracy for split in self.splits]
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    @property
    def cross_validation(self) -> float:
        """Mean class accuracy by cross-validation inside the training images: to choose settings by."""
        return float(np.mean([split.cross_validation for split in self.splits]))

    def facts(self) -> dict[str, Any]:
        """Return the numbers as JSON has them."""
        return {
            "mean": self.mean,
            "std": self.std,
            "cross_validation": self.cross_validation,
            "splits": [asdict(split) for split in self.splits],
            "embedder": self.embedder,
            "images": self.images,
            "classes": self.classes,
        }


@dataclass(frozen=True)
class VocResult:
    """What VOC classification gave for one class.

    Attributes
    ----------
    average_precision, area : float
        In [0, 1]: VOC 2007's mean of 11 points, and the area under the curve. nan without test positives.
    C : float
        Cost of the SVM, chosen by cross-validation inside the training images.
    positives : int
        Number of test images of the class.
    """

    average_precision: float
    area: float
    C: float
    positives: int


@dataclass(frozen=True)
class VocReport:
    """How good features are by PASCAL VOC's classification task, from `voc`.

    Attributes
    ----------
    classes : mapping of str to VocResult
        What each class gave.
    scale : int
        Shorter side of the images in pixels, chosen by cross-validation inside the training images.
    cross_validation : mapping of int to float
        Mean average precision that each scale had there.
    embedder : str
        Signature of the embedder of the chosen scale.
    """

    classes: Mapping[str, VocResult]
    scale: int
    cross_validation: Mapping[int, float]
    embedder: str

    @property
    def mean_ap(self) -> float:
        """Mean of the 11-point average precisions of the classes that have test images."""
        return mean_of_known([result.average_precision for result in self.classes.values()])

    @property
    def mean_ap_area(self) -> float:
        """Mean of the areas under the curves of the classes that have test images."""
        return mean_of_known([result.area for result in self.classes.values()])

    def facts(self) -> dict[str, Any]:
        """Return the numbers as JSON has them; those that are not known are nan."""
        return {
            "mAP": self.mean_ap,
            "mAP_area": self.mean_ap_area,
            "classes": {
                name: {"AP": r.average_precision, "AP_area": r.area, "C": r.C, "positives": r.positives}
                for name, r in self.classes.items()
            },
            "scale": self.scale,
            "cross_validation": {str(scale): value for scale, value in self.cross_validation.items()},
            "embedder": self.embedder,
        }


def caltech101(
    images: LabelledImages,
    embedder: ImageEmbedder,
    *,
    splits: int = 10,
    train: int = 30,
    test: int = 50,
    seed: int = 0,
    track: Track = no_track,
) -> Caltech101Report:
    """Measure an embedder by Caltech101's protocol (section 3.3).

    Of each class `train` random images train one-vs-rest SVMs and up to `test` others test them. The cost C
    of the SVMs is chosen by cross-validation inside the training images of each split.

    Parameters
    ----------
    images : LabelledImages
        Images in class folders, from `sppnet.read_image_folder`.
    embedder : ImageEmbedder
        Makes a vector of each image, such as `sppnet.Embedder`.
    splits : int
        Number of random splits; the paper reports mean and deviation of 10.
    train, test : int
        Number of images of each class to learn from, and at most to test on.
    seed : int
        Seed of the random splits.
    track : callable
        ``track(items, description)`` yields the items and may draw progress.

    Returns
    -------
    Caltech101Report

    Raises
    ------
    SppnetError
        If a class has no image left to test, or an image cannot be read: a protocol on some of the images
        would be another one.
    OSError
        If a file cannot be opened.
    """
    labels = np.asarray(images.labels)
    check_caltech101(labels, splits, train, test)
    gram = _embedded([path for path, _ in images], embedder, "Embedding", track)
    results = caltech101_results(gram, labels, splits=splits, train=train, test=test, seed=seed)
    found = tuple(result for _, result in zip(track(range(splits), "Fitting SVMs"), results, strict=True))
    return Caltech101Report(found, len(images), len(images.classes), embedder.signature)


def voc(
    train: Dataset,
    test: Dataset,
    embedders: Mapping[int, ImageEmbedder],
    *,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    track: Track = no_track,
) -> VocReport:
    """Measure embedders by PASCAL VOC's classification task (section 3.2).

    One SVM for each class tells the images that show it. Its cost C, and the scale of the images, are chosen
    by cross-validation inside the training images.

    Parameters
    ----------
    train, test : Dataset
        Images to learn from and to test on, such as VOC's splits trainval and test.
    embedders : mapping of int to ImageEmbedder
        By the shorter side of the images in pixels an embedder of that scale, such as
        ``{side: Embedder(scales=(side,)) for side in (224, 320, 392)}``.
    classes : sequence of str, optional
        The classes to measure, by default those of `train`.
    seed : int
        Seed of the folds of the cross-validation.
    track : callable
        ``track(items, description)`` yields the items and may draw progress.

    Returns
    -------
    VocReport

    Raises
    ------
    SppnetError
        If there is no embedder, an image is given twice, a class lacks positives or negatives to learn from,
        or an image cannot be read.
    OSError
        If a file cannot be opened.
    """
    if not embedders:
        raise SppnetError("found no embedder, expected one for each scale to choose from")
    samples = [*train, *test]
    images = _distinct([sample.image for sample in samples])
    names = list(train.classes if classes is None else classes)
    signs = presence([sample.target for sample in samples], names)
    seen, unseen = np.arange(len(train)), np.arange(len(train), len(samples))
    check_voc(signs, seen, unseen, names)
    expected: dict[int, float] = {}

    def measured() -> Iterator[tuple[int, FloatArray]]:
        for scale, embedder in embedders.items():
            gram = _embedded(images, embedder, f"Embedding at {scale}", track)
            expected[scale] = cross_validated(gram, signs, seen, seed=seed)
            yield scale, gram

    # Of the large matrices only the best one so far is kept.
    chosen, gram = max(measured(), key=lambda found: expected[found[0]])
    results = voc_results(gram, signs, seen, unseen, seed=seed)
    by_name = dict(zip(names, results, strict=True))
    return VocReport(by_name, chosen, expected, embedders[chosen].signature)


def presence(targets: Sequence[Target], classes: Sequence[str]) -> IntArray:
    """Return which classes images show.

    Parameters
    ----------
    targets : sequence of n Target
        What is in each image.
    classes : sequence of K str
        Objects of others are passed over.

    Returns
    -------
    (n, K) int64
        1 where an image shows the class, 0 where it shows only difficult objects or crowds of it, else -1.
    """
    signs = np.full((len(targets), len(classes)), -1)
    columns = {name: k for k, name in enumerate(classes)}
    for row, target in zip(signs, targets, strict=True):
        for label, ignored in zip(target.labels, target.ignored, strict=True):
            if label in columns:
                row[columns[label]] = max(row[columns[label]], 0 if ignored else 1)
    return signs


def gram_matrix(vectors: npt.NDArray[np.floating[Any]]) -> FloatArray:
    """Return the (n, n) float32 inner products of (n, D) vectors of any float type, in bounded memory."""
    n = len(vectors)
    gram = np.empty((n, n), np.float32)
    blocks = [slice(i, min(i + _BLOCK, n)) for i in range(0, n, _BLOCK)]
    for i, rows in enumerate(blocks):
        left = np.asarray(vectors[rows], np.float32)
        for columns in blocks[: i + 1]:
            gram[rows, columns] = left @ np.asarray(vectors[columns], np.float32).T
            gram[columns, rows] = gram[rows, columns].T
    return gram


def caltech101_results(
    gram: FloatArray,
    labels: npt.NDArray[np.integer[Any]],
    *,
    splits: int = 10,
    train: int = 30,
    test: int = 50,
    costs: Sequence[float] = COSTS,
    seed: int = 0,
) -> Iterator[SplitResult]:
    """Measure features by Caltech101's protocol, see `caltech101`.

    Parameters
    ----------
    gram : (n, n) float array
        Inner products of the images' vectors, from `gram_matrix`, or any other kernel.
    labels : (n,) integers
        Class of each image.
    splits : int
        Number of random splits.
    train, test : int
        Number of images of each class to learn from, and at most to test on.
    costs : sequence of float
        Values of C, from which threefold cross-validation inside the training images chooses.
    seed : int
        Seed of the random splits.

    Yields
    ------
    SplitResult

    Raises
    ------
    SppnetError
        If the shapes disagree, or a class has no image left to test.
    """
    labels = np.asarray(labels)
    check_caltech101(labels, splits, train, test)
    _check(gram, len(labels))
    classes = np.unique(labels)
    signs = np.where(labels[:, None] == classes, 1, -1)
    positions, names = np.searchsorted(classes, labels), [str(label) for label in classes]
    for seen, unseen in caltech101_splits(labels, splits, train, test, seed):
        # Each class in turn, so that every fold has equally many of every class.
        folds = np.tile(np.arange(train) % _FOLDS, len(classes))
        held = _held_out_scores(gram, seen, signs[seen], folds, costs)
        quality = [evaluate_classification(scores, positions[seen], names).mean_class for scores in held]
        best = int(np.argmax(quality))
        cost = costs[best]
        scores = svm_scores(gram, seen, unseen, signs[seen], [cost] * len(classes))
        accuracy = evaluate_classification(scores, positions[unseen], names).mean_class
        yield SplitResult(accuracy, cost, quality[best])


def caltech101_splits(
    labels: npt.NDArray[np.integer[Any]], splits: int = 10, train: int = 30, test: int = 50, seed: int = 0
) -> Iterator[tuple[IntArray, IntArray]]:
    """Yield the training and test images of each split of `caltech101_results`, class by class."""
    for split in range(splits):
        rng = np.random.default_rng((seed, split))
        shuffled = [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
        yield (
            np.concatenate([order[:train] for order in shuffled]),
            np.concatenate([order[train : train + test] for order in shuffled]),
        )


def check_caltech101(
    labels: npt.NDArray[np.integer[Any]], splits: int = 10, train: int = 30, test: int = 50
) -> None:
    """Raise now, before long work, the error that `caltech101` would raise for these labels."""
    _, counts = np.unique(labels, return_counts=True)
    least = int(counts.min()) if len(counts) else 0
    if splits < 1 or train < _FOLDS or test < 1 or least <= train:
        raise SppnetError(
            f"found {splits} splits into {train} and {test} images of classes of {least} and more, expected "
            f"at least 1 split, {_FOLDS} images to train and one more to test"
        )


def voc_results(
    gram: FloatArray,
    signs: npt.NDArray[np.integer[Any]],
    train: IntArray,
    test: IntArray,
    *,
    costs: Sequence[float] = COSTS,
    seed: int = 0,
) -> list[VocResult]:
    """Measure features by PASCAL VOC's classification task, see `voc`.

    Parameters
    ----------
    gram : (n, n) float array
        Inner products of the images' vectors, from `gram_matrix`, or any other kernel.
    signs : (n, K) integers
        1 where the image shows the class, -1 where it does not, 0 where it shows only difficult objects of
        it: these neither train nor test that class. See `presence`.
    train, test : (m,) integers
        Images to learn from and to test on.
    costs : sequence of float
        Values of C, from which threefold cross-validation inside the training images chooses, for each class.
    seed : int
        Seed of the folds.

    Returns
    -------
    list of K VocResult

    Raises
    ------
    SppnetError
        If the shapes disagree, an image is both to learn from and to test on, or a class lacks positives or
        negatives to learn from.
    """
    signs, train, test = np.asarray(signs), np.asarray(train), np.asarray(test)
    _check(gram, len(signs))
    check_voc(signs, train, test)
    folds = _balanced_folds(signs[train], seed)
    held = _held_out_scores(gram, train, signs[train], folds, costs)
    chosen = [costs[i] for i in _held_out_precision(held, signs[train]).argmax(axis=0)]
    scores = svm_scores(gram, train, test, signs[train], chosen)
    return [
        VocResult(
            *_precision(scores[:, k], signs[test, k]), C=chosen[k], positives=int((signs[test, k] == 1).sum())
        )
        for k in range(signs.shape[1])
    ]


def check_voc(
    signs: npt.NDArray[np.integer[Any]], train: IntArray, test: IntArray, names: Sequence[str] | None = None
) -> None:
    """Raise now, before long work, the error that `voc` would raise; `names` are its classes."""
    both = np.intersect1d(train, test)
    if len(both):
        raise SppnetError(f"found {len(both)} images both to learn from and to test on, expected none")
    for sign, kind in ((1, "positive"), (-1, "negative")):
        counts = (signs[train] == sign).sum(axis=0)
        if counts.min(initial=_FOLDS) < _FOLDS:
            name = int(counts.argmin()) if names is None else repr(names[int(counts.argmin())])
            found = f"{counts.min()} {kind} training images of class {name}"
            raise SppnetError(f"found {found}, expected at least {_FOLDS} of each class")


def cross_validated(
    gram: FloatArray,
    signs: npt.NDArray[np.integer[Any]],
    train: IntArray,
    *,
    costs: Sequence[float] = COSTS,
    seed: int = 0,
) -> float:
    """Return the mean AP that features reach on held-out training images, to choose between features.

    Arguments are those of `voc_results`; every class takes its best C.
    """
    folds = _balanced_folds(signs[train], seed)
    held = _held_out_scores(gram, train, signs[train], folds, costs)
    return float(np.mean(_held_out_precision(held, signs[train]).max(axis=0)))


def svm_scores(
    gram: FloatArray,
    train: IntArray,
    test: IntArray,
    signs: npt.NDArray[np.integer[Any]],
    costs: Sequence[float],
) -> FloatArray:
    """Fit a binary SVM for each class and score other images (LIBSVM's hinge loss, with a free bias).

    Parameters
    ----------
    gram : (n, n) float array
        Inner products of the images' vectors, or any other kernel.
    train, test : (m,) and (t,) integers
        Rows of `gram` to learn from and to score.
    signs : (m, K) integers
        For each training image 1, -1, or 0 where a class does not learn from it.
    costs : sequence of K float
        C of each class.

    Returns
    -------
    (t, K) float64
        Distance from the border between the classes, positive on the side of the class.
    """
    from sklearn.svm import SVC

    kernel = np.asarray(gram[np.ix_(train, train)], np.float64)
    cross = np.asarray(gram[np.ix_(test, train)], np.float64)

    def score(k: int) -> FloatArray:
        known = np.flatnonzero(signs[:, k])
        svm = SVC(kernel="precomputed", C=costs[k])
        inside, outside = (
            (kernel, cross) if len(known) == len(train) else (kernel[np.ix_(known, known)], cross[:, known])
        )
        result: FloatArray = svm.fit(inside, signs[known, k]).decision_function(outside)
        return result

    # LIBSVM lets go of Python's lock.
    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(score, range(signs.shape[1]))), axis=1)


def _embedded(
    images: Sequence[Path | Pixels], embedder: ImageEmbedder, description: str, track: Track
) -> FloatArray:
    """Return the Gram matrix of the vectors of all images, which are held in half precision."""
    vectors = np.zeros((0, 0), np.float16)
    stream = embedder.stream(images)
    for i, (_, found) in enumerate(zip(track(images, description), stream, strict=True)):
        if isinstance(found, Exception):
            raise found
        if i == 0:
            vectors = np.empty((len(images), found.shape[1]), np.float16)
        vectors[i] = found[0]
    return gram_matrix(vectors)


def _distinct(images: Sequence[Path | Pixels]) -> Sequence[Path | Pixels]:
    """Return the images, unless two are one file."""
    files: dict[Path, Path] = {}
    for path in images:
        if not isinstance(path, Path):
            continue
        file = path.resolve()
        if file in files:
            raise SppnetError(f"{path}: found the same file as {files[file]}, expected each image once")
        files[file] = path
    return images


def _held_out_scores(
    gram: FloatArray,
    train: IntArray,
    signs: npt.NDArray[np.integer[Any]],
    folds: IntArray,
    costs: Sequence[float],
) -> Sequence[FloatArray]:
    """Return for each C the (m, K) scores of the training images by SVMs that did not learn from them."""
    found = [np.zeros((len(train), signs.shape[1])) for _ in costs]
    for fold in range(_FOLDS):
        inside, outside = train[folds != fold], train[folds == fold]
        score = partial(svm_scores, gram, inside, outside, signs[folds != fold])
        for scores, cost in zip(found, costs, strict=True):
            scores[folds == fold] = score([cost] * signs.shape[1])
    return found


def _held_out_precision(held: Sequence[FloatArray], signs: npt.NDArray[np.integer[Any]]) -> FloatArray:
    """Return the area under the precision-recall curve, (values of C, classes)."""
    return np.array([[_precision(s[:, k], signs[:, k])[1] for k in range(signs.shape[1])] for s in held])


def _balanced_folds(signs: npt.NDArray[np.integer[Any]], seed: int) -> IntArray:
    """Return a fold for each image, so that every class has positives and negatives in all of them."""
    rng = np.random.default_rng(seed)
    folds = np.full(len(signs), -1)
    # Positives before negatives, and the rarest class first: it is dealt out while there is room.
    for sign in (1, -1):
        for k in np.argsort((signs == 1).sum(axis=0), kind="stable"):
            free = rng.permutation(np.flatnonzero((signs[:, k] == sign) & (folds < 0)))
            taken = np.bincount(folds[(signs[:, k] == sign) & (folds >= 0)], minlength=_FOLDS)
            for image in free:
                folds[image] = int(np.argmin(taken))
                taken[folds[image]] += 1
    folds[folds < 0] = rng.integers(0, _FOLDS, int((folds < 0).sum()))
    return folds


def _precision(scores: FloatArray, signs: npt.NDArray[np.integer[Any]]) -> tuple[float, float]:
    """Return the average precisions, 11-point and area, of one class; images of sign 0 are passed over."""
    known = np.flatnonzero(signs)
    hits = signs[known][np.argsort(-scores[known], kind="stable")] == 1
    if not hits.any():
        return float("nan"), float("nan")
    found = np.cumsum(hits)
    recall, precision = found / found[-1], found / np.arange(1, len(hits) + 1)
    return average_precision(recall, precision, "11point"), average_precision(recall, precision, "area")


def _check(gram: FloatArray, count: int) -> None:
    if gram.shape != (count, count) or not np.isfinite(gram).all():
        raise SppnetError(f"found a Gram matrix {gram.shape} for {count} images, expected it square, finite")
