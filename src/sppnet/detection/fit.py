"""How a detector is fitted to annotated images: fine-tuning, box regression, mined SVMs (section 4.1).

`fit` is a function of its arguments and changes none of them: what was learned is the value that it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from sppnet.arrays import Boxes, FloatArray, IntArray, like, to_numpy
from sppnet.boxes import Target
from sppnet.detection.calibration import Calibration
from sppnet.detection.folds import Folds, choose_folds, shown_classes
from sppnet.detection.gathering import Halves, drop_duplicates, find, later_negatives, pool_first
from sppnet.detection.head import Head, activate
from sppnet.detection.postprocess import LEAST_JOINT_SCORE, LEAST_SCORE
from sppnet.detection.quality import Learned, Quality, learn_scores, unmeasured
from sppnet.detection.sampling import Examples, Plan, SamplingRules, plan_images
from sppnet.detection.svm import Labelled, LinearSVMs, MiningSettings, mine_hard_negatives
from sppnet.detection.tuning import Tuning
from sppnet.features.backbone import Backbone
from sppnet.features.cache import MapCache
from sppnet.features.encoded import EncodedImage, OwnWindows
from sppnet.features.windows import WindowPooling
from sppnet.images import photo_keys
from sppnet.parallel import Runner
from sppnet.progress import StageTimer, Track, no_track
from sppnet.proposals.maps import Objectness
from sppnet.proposals.odds import told, with_told
from sppnet.regression import BoxRegression, fit_ridges
from sppnet.rpn.settings import Joint


@dataclass(frozen=True)
class FitSettings:
    """How a detector is fitted; see `sppnet.detection.detector.Detector` for what each setting does.

    Attributes
    ----------
    pooling : WindowPooling
        How windows become vectors.
    layer : {"pool", "fc6", "fc7"}
        What the SVMs stand on.
    tuning : Tuning or None
        How fully connected layers and the backbone are trained; None leaves them.
    objectness : Objectness or None
        What learns to propose windows from the maps; it stays as it is, a copy of it is fitted.
    mining : MiningSettings
        How SVMs are trained and hard negatives found.
    sampling : SamplingRules
        Which window teaches what.
    ridge : float
        Penalty of the box regression.
    seed : int
        Seed of every random draw.
    nms_iou : float
        Detections of a class that overlap a better one by more are dropped.
    limit : int
        Most detections of a class in an image.
    folds : int
        Number of folds of photos to measure on; less than 2: nothing is measured.
    maps : bool
        Whether the windows that the maps propose are all that is scored afterwards.
    moves : int
        How often windows are moved; at 0 no box regressions are fitted, and windows stay where they are.
    joint : Joint or None
        How the network is trained to propose windows; see `sppnet.detection.joint`, which does that.
    """

    pooling: WindowPooling = WindowPooling()  # noqa: RUF009  (frozen)
    layer: str = "pool"
    tuning: Tuning | None = None
    objectness: Objectness | None = None
    mining: MiningSettings = MiningSettings()  # noqa: RUF009
    sampling: SamplingRules = SamplingRules()  # noqa: RUF009
    ridge: float = 1000.0
    seed: int = 0
    nms_iou: float = 0.3
    limit: int = 100
    folds: int = 8
    maps: bool = False
    moves: int = 1
    joint: Joint | None = None


@dataclass(frozen=True)
class Fitted:
    """What a fit learned: everything that detects, but for the settings.

    Attributes
    ----------
    classes : tuple of str
        The names of the K classes, in the order of all that follows.
    backbone : Backbone
        Where the maps come from, tuned if that was asked for.
    head : Head or None
        The fully connected layers, if the SVMs stand on one.
    objectness : Objectness or None
        What proposes windows from the maps, if that was asked for.
    svms : LinearSVMs
        One for each class.
    regression : BoxRegression
        The box regression of each class.
    feature_scale : float
        Pooled vectors are multiplied by this, so that their mean norm is 20.
    photos : (n,) uint64
        The `sppnet.images.photo_keys` of the images that were learned from, rising.
    objects : (K,) int64
        Number of objects that each class was learned from.
    calibration : Calibration
        How scores become probabilities.
    thresholds : (K,) float32
        Least probability of a detection of each class, unless another is asked for.
    quality : Quality
        How good the classes are on photos that were not learned from.
    side : int or None
        Shorter side in pixels at which a network looks at photos that proposes windows itself.
    history : (n, 2) float32
        Where the network was trained: minutes, and the mean average precision then on photos that were not
        learned from.
    """

    classes: tuple[str, ...]
    backbone: Backbone
    head: Head | None
    objectness: Objectness | None
    svms: LinearSVMs
    regression: BoxRegression
    feature_scale: float
    photos: npt.NDArray[np.uint64]
    objects: IntArray
    calibration: Calibration
    thresholds: npt.NDArray[np.float32]
    quality: Quality
    side: int | None = None
    history: FloatArray = field(default_factory=lambda: np.zeros((0, 2), np.float32))

    @property
    def least_score(self) -> float:
        """What a window scores at least that is a detection at all."""
        return LEAST_SCORE if self.side is None else LEAST_JOINT_SCORE

    def score(
        self, pooled: Any, windows: Boxes, layer: str, regress: bool = True, own: OwnWindows | None = None
    ) -> tuple[Boxes, npt.NDArray[np.float32]]:
        """Score windows for all classes and move them.

        Parameters
        ----------
        pooled : (R, D) float32
            Their pooled features, an array or a tensor on any device; scaled in place.
        windows : (R, 4) float32
        layer : {"pool", "fc6", "fc7"}
            What the SVMs stand on.
        regress : bool
            Whether boxes are moved by the box regression.
        own : OwnWindows, optional
            What the network proposes itself, if it does: what it says of the windows counts, too.

        Returns
        -------
        (R, K, 4) float32
            The windows as each class's regression moves them.
        (R, K) float32
            Scores of the SVMs.
        """
        pooled *= self.feature_scale
        scores = to_numpy(self.svms(activate(self.head, layer, pooled)))
        if own is not None:
            scores = with_told(scores, *told(windows, own, self.backbone.graph.facts.kinds, self.classes))
        if regress:
            return self.regression.moved(windows, pooled), scores
        return np.repeat(windows[:, None], len(self.classes), axis=1), scores

    def without_fold(self, folds: Folds, f: int, svms: LinearSVMs, regression: BoxRegression) -> Fitted:
        """Return what was fitted, with what was learned without fold f in place of the rest."""
        # What cannot be learned without the fold finds nothing.
        biases = np.where(folds.learned[f], svms.biases, np.float32(-np.inf))
        return replace(self, svms=LinearSVMs(svms.weights, biases), regression=regression)

    def as_measured(self, other: Fitted) -> Fitted:
        """Return what was fitted, with what another one's scores were found to mean, of equal classes."""
        if other.classes != self.classes:
            return self
        return replace(
            self, calibration=other.calibration, thresholds=other.thresholds, quality=other.quality
        )

    def joined(self, other: Fitted) -> Fitted:
        """Return what was fitted with the classes of another one after its own, on the same features."""
        return replace(
            self,
            classes=(*self.classes, *other.classes),
            svms=self.svms.joined(other.svms),
            regression=self.regression.joined(other.regression),
            photos=np.union1d(self.photos, other.photos),
            objects=np.concatenate([self.objects, other.objects]),
            calibration=self.calibration.joined(other.calibration),
            thresholds=np.concatenate([self.thresholds, other.thresholds]),
            quality=self.quality.joined(other.quality),
        )


class WorkOptions(TypedDict, total=False):
    """What may be said of how a fit goes about its work; see `sppnet.detection.detector.Detector.fit`."""

    cache: str | Path | None
    keep: Callable[[Any], None] | None
    track: Track
    timer: StageTimer | None
    shards: int | None
    memory: float | None
    rounds: int | None
    cluster: Runner | None


@dataclass(frozen=True)
class Work:
    """Where a fit keeps what it computes on the way, and whom it tells how far it is.

    Attributes
    ----------
    folder : Path
        For feature maps and checkpoints; a fit that finds those of an earlier one goes on from them.
    track : callable
        ``track(items, description)`` yields the items and may draw progress.
    timer : StageTimer
        Takes the seconds by stage.
    """

    folder: Path
    track: Track = no_track
    timer: StageTimer = field(default_factory=StageTimer)


def fit(examples: Examples, settings: FitSettings, backbone: Backbone, work: Work) -> Fitted:
    """Fit SVMs and box regressions to annotated images, and first what they stand on.

    Goes through the images twice: for the positives, then for the hard negatives. Feature maps are kept on
    disk in between, in half precision, so memory does not grow with the number of images. Then each photo of
    a fold is scored by what was learned without this fold: that tells what scores mean, and how good they
    are.

    SVMs and box regressions of the folds are learned on the way. Where layers are trained, they would have
    seen the photos: all is fitted once more then, without the photos that are held out. An objectness alone
    sees all photos, and so do what is not learned here, such as the weights of the backbone.

    Raises
    ------
    SppnetError
        If a class has no example, or no background.
    """
    if backbone.proposes:
        examples = _with_own_windows(examples, settings, backbone, work)
    # Planned before any work, because it finds the classes that have no example.
    plans = plan_images(examples, settings.sampling, settings.seed)
    tuned = settings.tuning is not None
    folds = folds_of(examples, settings, one=tuned)
    inside = replace(folds, numbers=np.full(len(examples), -1), learned=folds.learned[:0]) if tuned else folds
    fitted, models = _fit(examples, settings, backbone, work, plans, inside)
    if tuned and folds.count:
        models = [fit_without(examples, settings, backbone, work, folds)]
    return _measured(fitted, models, folds, examples, settings, work)


def _fit(
    examples: Examples,
    settings: FitSettings,
    backbone: Backbone,
    work: Work,
    plans: list[Plan],
    folds: Folds,
) -> tuple[Fitted, list[Fitted]]:
    """Fit to all images, and to those outside of each fold."""
    head, scale = None, None
    if settings.tuning is not None:
        with work.timer("fine-tuning"):
            backbone, head, scale = _tune(examples, settings, settings.tuning, backbone, work)
    objectness = fit_objectness(examples, settings, backbone, work)
    store = MapCache(work.folder, backbone, settings.pooling.scales)
    return _Learning(examples, settings, store, work, folds).learn(plans, head, objectness, scale)


def fit_without(
    examples: Examples, settings: FitSettings, backbone: Backbone, work: Work, folds: Folds
) -> Fitted:
    """Fit anew to the images outside of the one fold, and the classes that are shown there."""
    rows = np.flatnonzero(folds.numbers < 0).tolist()
    names = tuple(name for name, there in zip(examples.classes, folds.learned[0], strict=True) if there)
    rest = examples.part(rows, names)
    if backbone.proposes:
        rest = _with_own_windows(rest, settings, backbone, work)
    plans = plan_images(rest, settings.sampling, settings.seed)
    none = Folds(np.full(len(rest), -1), np.zeros((0, len(names)), bool))
    return _fit(rest, settings, backbone, work, plans, none)[0]


def folds_of(examples: Examples, settings: FitSettings, *, one: bool = False) -> Folds:
    """Choose the folds of a fit, and find which classes can be learned outside of each."""
    return folds_with(photo_keys(examples.images), examples.targets, examples.classes, settings, one=one)


def folds_with(
    keys: npt.NDArray[np.uint64],
    targets: Sequence[Target],
    classes: Sequence[str],
    settings: FitSettings,
    *,
    one: bool = False,
) -> Folds:
    """Choose the folds of photos by their `photo_keys`, and find which classes are learned without each."""
    shown = shown_classes(targets, classes)
    numbers = choose_folds(shown, keys, settings.folds, settings.seed, one=one)
    learned = [shown[numbers != f].any(axis=0) for f in range(numbers.max(initial=-1) + 1)]
    return Folds(numbers, np.array(learned, bool).reshape(-1, len(classes)))


def _measured(
    fitted: Fitted,
    models: Sequence[Fitted],
    folds: Folds,
    examples: Examples,
    settings: FitSettings,
    work: Work,
) -> Fitted:
    """Return what was fitted with what its scores mean; the rest is as in `scores_learned`."""
    return replace(fitted, **scores_learned(models, folds, examples, settings, work)._asdict())


def scores_learned(
    models: Sequence[Fitted], folds: Folds, examples: Examples, settings: FitSettings, work: Work
) -> Learned:
    """Return what the scores of detectors mean, by the photos of folds that they did not learn from.

    Parameters
    ----------
    models : sequence of Fitted
        What was learned without each fold, of some or all classes of the examples.
    folds, examples, settings, work
        Those of the fit.
    """
    stores = [MapCache(work.folder, model.backbone, settings.pooling.scales) for model in models]
    rows, found = np.flatnonzero(folds.numbers >= 0).tolist(), []
    for i in work.track(rows, "Scoring photos not learned from"):
        fold = int(folds.numbers[i])
        encoded = stores[fold](examples.images[i], work.timer)
        with work.timer("measuring"):
            found.append(find(models[fold], encoded, examples.windows[i], settings))
    targets = [examples.targets[i] for i in rows]
    return learn_scores(found, targets, examples.classes, folds.learned[folds.numbers[rows]], folds.count)


def _with_own_windows(examples: Examples, settings: FitSettings, backbone: Backbone, work: Work) -> Examples:
    """Return the examples with the windows that the network itself proposes."""
    store, windows = MapCache(work.folder, backbone, settings.pooling.scales), []
    for image in work.track(examples.images, "Computing feature maps"):
        own = store(image, work.timer).windows
        assert own is not None
        windows.append(own.boxes)
    return replace(examples, windows=windows)


def fit_objectness(
    examples: Examples, settings: FitSettings, backbone: Backbone, work: Work
) -> Objectness | None:
    """Learn to propose windows from the maps of a backbone, if the settings ask for that."""
    if settings.objectness is None:
        return None
    store = MapCache(work.folder, backbone, settings.pooling.scales)
    with work.timer("objectness"):
        return Objectness(**settings.objectness.get_params(deep=False)).fit(
            lambda i: store(examples.images[i], work.timer),
            examples.targets,
            examples.classes,
            track=work.track,
        )


def fit_more(fitted: Fitted, examples: Examples, settings: FitSettings, work: Work) -> Fitted:
    """Learn further classes; the others, and what all stand on, stay exactly as they are.

    One-vs-rest SVMs make that free. Errors are those of `fit`.
    """
    if fitted.backbone.proposes:
        examples = _with_own_windows(examples, settings, fitted.backbone, work)
    plans, folds = plan_images(examples, settings.sampling, settings.seed), folds_of(examples, settings)
    store = MapCache(work.folder, fitted.backbone, settings.pooling.scales)
    learning = _Learning(examples, settings, store, work, folds)
    more, models = learning.learn(plans, fitted.head, fitted.objectness, fitted.feature_scale)
    models = [replace(model, side=fitted.side) for model in models]
    return fitted.joined(_measured(more, models, folds, examples, settings, work))


def _tune(
    examples: Examples, settings: FitSettings, tuning: Tuning, backbone: Backbone, work: Work
) -> tuple[Backbone, Head | None, float]:
    """Train the head, and the backbone if so set; return both and the factor of pooled features."""
    # Imported late: most fits do without PyTorch.
    from sppnet.detection.finetune import FineTuner

    pooling = settings.pooling
    store = MapCache(work.folder, backbone, pooling.scales)

    def pool(i: int, boxes: Boxes) -> Any:
        image = examples.images[i]
        if tuning.stage is None:
            return pooling(store(image, work.timer), boxes)
        # A backbone that will change: its maps now are of no use later.
        return pooling(backbone.encode(image, pooling.scales), boxes)

    tuner = FineTuner(backbone, examples, pooling, tuning, pool=pool, seed=settings.seed, folder=work.folder)
    tuner.train(work.track)
    # Rounded as it will be saved. Where the SVMs stand on the pooled features, only its backbone was wanted.
    head = None if settings.layer == "pool" else Head.from_state(tuner.head.state())
    return tuner.backbone, head, tuner.scale


@dataclass
class _Gathered:
    """Half-precision vectors of windows: the positives, those to start with, each class's for regression."""

    positives: Halves
    start: Halves
    regression: list[_Moves]


@dataclass
class _Moves:
    """What teaches the box regression of a class: vectors, deltas and folds, image by image."""

    features: list[Halves] = field(default_factory=list)
    deltas: list[Boxes] = field(default_factory=list)
    folds: list[int] = field(default_factory=list)


class _Learning:
    """One fit of SVMs and box regressions on what they stand on, for all images and without each fold."""

    def __init__(
        self, examples: Examples, settings: FitSettings, store: MapCache, work: Work, folds: Folds
    ) -> None:
        self.examples, self.settings, self.store, self.work = examples, settings, store, work
        self.folds = folds

    def learn(
        self, plans: list[Plan], head: Head | None, objectness: Objectness | None, scale: float | None
    ) -> tuple[Fitted, list[Fitted]]:
        """Fit what is convex; without a scale, it is the one that gives the start a mean norm of 20.

        Returns what was learned from all images, and from those outside of each fold. What its scores mean is
        not known yet.
        """
        timer, settings = self.work.timer, self.settings
        if objectness is not None:
            self.examples = replace(self.examples, windows=self._more_windows(objectness))
            plans = plan_images(self.examples, settings.sampling, settings.seed)
        gathered = self._gather(plans)
        # From here on the maps come from the disk.
        self.store.backbone.release()
        if scale is None:
            scale = 20.0 / _mean_norm(gathered.start.astype(np.float32))
        with timer("box regression"):
            regressions = self._regressions(gathered, scale)
        with timer("SVMs"):
            svms = self._mine(plans, gathered, head, scale)
        count = len(self.examples.classes)
        labels = np.concatenate([plan.labels for plan in plans])
        fitted = Fitted(
            self.examples.classes,
            self.store.backbone,
            head,
            objectness,
            svms[0],
            regressions[0],
            scale,
            np.sort(photo_keys(self.examples.images)),
            np.bincount(labels, minlength=count),
            *unmeasured(count),
        )
        return fitted, [
            fitted.without_fold(self.folds, f, *learned)
            for f, learned in enumerate(zip(svms[1:], regressions[1:], strict=True))
        ]

    def _regressions(self, gathered: _Gathered, scale: float) -> list[BoxRegression]:
        """Fit the box regressions to all images, and to those outside of each fold."""
        found = []
        for k in self.work.track(range(len(self.examples.classes)), "Fitting box regression"):
            found.append(self._regress(k, gathered.regression.pop(0), scale))
        return [
            BoxRegression(*(np.stack(parts) for parts in zip(*ridges, strict=True)))
            for ridges in zip(*found, strict=True)
        ]

    def _encoded(self, i: int) -> EncodedImage:
        return self.store(self.examples.images[i], self.work.timer)

    def _tracked(self, plans: list[Plan], description: str) -> Iterable[tuple[int, Plan]]:
        """Yield the images' numbers with their plans, and draw how far it is."""
        return self.work.track(list(enumerate(plans)), description)

    def _more_windows(self, objectness: Objectness) -> list[Boxes]:
        """Return the windows of each image with those that its maps propose."""
        found = []
        for i in self.work.track(range(len(self.examples)), "Proposing windows from maps"):
            encoded = self._encoded(i)
            with self.work.timer("proposals"):
                given = np.reshape(self.examples.windows[i], (-1, 4))
                found.append(np.concatenate([given, objectness.propose(encoded).boxes]))
        return found

    def _gather(self, plans: list[Plan]) -> _Gathered:
        """Pool the positives and the windows to start with, and each class's regression examples."""
        positives, start = [], []
        regression = [_Moves() for _ in self.examples.classes]
        for i, plan in self._tracked(plans, "Computing feature maps"):
            encoded, pooling = self._encoded(i), self.settings.pooling
            if self.settings.sampling.negatives == "released":
                drop_duplicates(plan, encoded, pooling)
            with self.work.timer("pooling"):
                vectors = pool_first(plan, encoded, pooling)
            positives.append(vectors.positives)
            start.append(vectors.start)
            for k in np.unique(vectors.kinds):
                mine = vectors.kinds == k
                regression[k].features.append(vectors.moves[mine])
                regression[k].deltas.append(vectors.deltas[mine])
                regression[k].folds.append(int(self.folds.numbers[i]))
        return _Gathered(np.concatenate(positives), np.concatenate(start), regression)

    def _regress(
        self, k: int, moves: _Moves, scale: float
    ) -> list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
        """Fit class k's box regression to half-precision features, all and those outside of each fold."""
        if not self.settings.moves:
            still = np.zeros((4, moves.features[0].shape[1]), np.float32), np.zeros(4, np.float32)
            return [still] * (1 + self.folds.count)
        deltas = np.concatenate(moves.deltas)
        wide = np.ones((len(deltas), moves.features[0].shape[1] + 1), dtype=np.float32)
        filled = 0
        for part in moves.features:
            np.multiply(part, np.float32(scale), out=wide[filled : filled + len(part), :-1])
            filled += len(part)
        numbers = np.repeat(moves.folds, [len(part) for part in moves.deltas])
        return moves_of(wide, deltas, numbers, self.folds.learned[:, k], self.settings.ridge)

    def _mine(
        self, plans: list[Plan], gathered: _Gathered, head: Head | None, scale: float
    ) -> list[LinearSVMs]:
        """Fit the SVMs to activations of positives and first negatives, then with hard negatives.

        Returns those of all images, and those outside of each fold.
        """

        def activations(pooled: Any) -> Any:
            pooled *= scale
            return activate(head, self.settings.layer, pooled)

        positives, start = (activations(v.astype(np.float32)) for v in (gathered.positives, gathered.start))
        # Nothing holds the vectors while they are not needed any more.
        gathered.positives = gathered.start = np.empty((0, 0), np.float16)
        centre, factor = self._standard(start)

        def standard(vectors: Any) -> Any:
            # Those of mining may be tensors on the device of the maps.
            vectors -= like(centre, vectors)
            vectors *= factor
            return vectors

        count, numbers = len(self.examples.classes), self.folds.numbers
        training = mine_hard_negatives(
            Labelled(
                standard(positives),
                np.concatenate([np.eye(count, dtype=bool)[p.labels] for p in plans]),
                np.repeat(numbers, [len(p.labels) for p in plans]),
            ),
            Labelled(
                standard(start),
                np.concatenate([p.negative[p.start] for p in plans]),
                np.repeat(numbers, [len(p.start) for p in plans]),
            ),
            (
                candidates._replace(features=standard(activations(candidates.features)))
                for candidates in self._candidates(plans)
            ),
            self.settings.mining,
        )
        found = [training.svms, *map(training.without, range(self.folds.count))]
        return [svms.folded(centre, factor) for svms in found]

    def _standard(self, vectors: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], float]:
        """Return the centre of activations, and the factor that gives them a mean norm of 20 about it.

        Pooled features are scaled already, and stay where they are, as in the paper. What windows have in
        common is most of a layer's activations; without it, one penalty of the SVMs suits both.
        """
        if self.settings.layer == "pool":
            return np.zeros(1, np.float32), 1.0
        centre = vectors.mean(axis=0)
        spread = _mean_norm(vectors - centre)
        return centre, 20 / spread if spread > 0 else 1.0

    def _candidates(self, plans: list[Plan]) -> Iterator[Labelled]:
        """Yield pooled features of all windows image by image, and for which classes each is a negative."""
        for i, plan in self._tracked(plans, "Mining hard negatives"):
            encoded = self._encoded(i)
            with self.work.timer("pooling"):
                features = self.settings.pooling(encoded, plan.boxes)
            yield Labelled(features, later_negatives(plan), int(self.folds.numbers[i]))


def moves_of(
    features: FloatArray, deltas: Boxes, numbers: IntArray, learned: npt.NDArray[np.bool_], ridge: float
) -> list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
    """Fit the box regression of a class to all examples, and to those outside of each fold.

    Parameters
    ----------
    features : (n, D) float32
        The last is the constant 1.
    deltas : (n, 4) float32
    numbers : (n,) int64
        The fold of each example.
    learned : (F,) bool
        Whether there are examples of the class outside of a fold.
    ridge : float
        Penalty.
    """
    # A class that cannot be learned without a fold is not looked for there.
    parts = [(numbers != f) | ~there for f, there in enumerate(learned)]
    return fit_ridges(features, deltas, ridge, [np.ones(len(deltas), bool), *parts])


def _mean_norm(vectors: npt.NDArray[np.float32]) -> float:
    return float(np.linalg.norm(vectors, axis=1).mean())
