"""How a detector is fitted to annotated images: fine-tuning, box regression, mined SVMs (section 4.1).

`fit` is a function of its arguments and changes none of them: what was learned is the value that it returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sppnet.arrays import Boxes, like, to_numpy
from sppnet.detection.head import Head, activate
from sppnet.detection.sampling import Examples, Plan, SamplingRules, plan_images
from sppnet.detection.svm import LinearSVMs, MiningSettings, mine_hard_negatives
from sppnet.detection.tuning import Tuning
from sppnet.features.backbone import Backbone
from sppnet.features.cache import MapCache
from sppnet.features.encoded import EncodedImage
from sppnet.features.windows import WindowPooling
from sppnet.images import photo_keys
from sppnet.progress import StageTimer, Track, no_track
from sppnet.proposals.maps import Objectness
from sppnet.regression import BoxRegression, encode_deltas, fit_ridge

Halves = npt.NDArray[np.float16]


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
    """

    pooling: WindowPooling = WindowPooling()  # noqa: RUF009  (frozen)
    layer: str = "pool"
    tuning: Tuning | None = None
    objectness: Objectness | None = None
    mining: MiningSettings = MiningSettings()  # noqa: RUF009
    sampling: SamplingRules = SamplingRules()  # noqa: RUF009
    ridge: float = 1000.0
    seed: int = 0


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
    """

    classes: tuple[str, ...]
    backbone: Backbone
    head: Head | None
    objectness: Objectness | None
    svms: LinearSVMs
    regression: BoxRegression
    feature_scale: float
    photos: npt.NDArray[np.uint64]


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
    disk in between, in half precision, so memory does not grow with the number of images.

    Raises
    ------
    SppnetError
        If a class has no example, or no background.
    """
    # Planned before any work, because it finds the classes that have no example.
    plans = plan_images(examples, settings.sampling, settings.seed)
    head, scale = None, None
    if settings.tuning is not None:
        with work.timer("fine-tuning"):
            backbone, head, scale = _tune(examples, settings, settings.tuning, backbone, work)
    objectness = fit_objectness(examples, settings, backbone, work)
    store = MapCache(work.folder, backbone, settings.pooling.scales)
    return _Learning(examples, settings, store, work).learn(plans, head, objectness, scale)


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
    plans = plan_images(examples, settings.sampling, settings.seed)
    store = MapCache(work.folder, fitted.backbone, settings.pooling.scales)
    learning = _Learning(examples, settings, store, work)
    more = learning.learn(plans, fitted.head, fitted.objectness, fitted.feature_scale)
    return replace(
        fitted,
        classes=(*fitted.classes, *more.classes),
        svms=fitted.svms.joined(more.svms),
        regression=fitted.regression.joined(more.regression),
        photos=np.union1d(fitted.photos, more.photos),
    )


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
    head = None if settings.layer == "pool" else tuner.head.frozen()
    return tuner.backbone, head, tuner.scale


@dataclass
class _Gathered:
    """Half-precision vectors of windows: the positives, those to start with, each class's for regression."""

    positives: Halves
    start: Halves
    regression: list[tuple[list[Halves], Boxes]]


class _Learning:
    """One fit of SVMs and box regressions on what they stand on."""

    def __init__(self, examples: Examples, settings: FitSettings, store: MapCache, work: Work) -> None:
        self.examples, self.settings, self.store, self.work = examples, settings, store, work

    def learn(
        self, plans: list[Plan], head: Head | None, objectness: Objectness | None, scale: float | None
    ) -> Fitted:
        """Fit what is convex; without a scale, it is the one that gives the start a mean norm of 20."""
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
            ridges = [
                self._regress(*gathered.regression.pop(0), scale)
                for _ in self.work.track(self.examples.classes, "Fitting box regression")
            ]
        with timer("SVMs"):
            svms = self._mine(plans, gathered, head, scale)
        weights, offsets = (np.stack(parts) for parts in zip(*ridges, strict=True))
        return Fitted(
            self.examples.classes,
            self.store.backbone,
            head,
            objectness,
            svms,
            BoxRegression(weights, offsets),
            scale,
            np.sort(photo_keys(self.examples.images)),
        )

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
        regression: list[tuple[list[Halves], list[Boxes]]] = [([], []) for _ in self.examples.classes]
        for i, plan in self._tracked(plans, "Computing feature maps"):
            encoded = self._encoded(i)
            if self.settings.sampling.negatives == "released":
                self._drop_duplicates(plan, encoded)
            wanted = np.concatenate(
                [np.arange(len(plan.labels)), plan.start, np.flatnonzero(plan.fitted >= 0)]
            )
            with self.work.timer("pooling"):
                features = to_numpy(self.settings.pooling(encoded, plan.boxes[wanted])).astype(np.float16)
            first, second = len(plan.labels), len(plan.labels) + len(plan.start)
            positives.append(features[:first].copy())
            start.append(features[first:second].copy())
            rest = wanted[second:]
            for k in np.unique(plan.fitted[rest]):
                mine = np.flatnonzero(plan.fitted[rest] == k)
                regression[k][0].append(features[second:][mine])
                regression[k][1].append(encode_deltas(plan.boxes[rest[mine]], plan.truth[rest[mine]]))
        joined = [(f, np.concatenate(d)) for f, d in regression]
        return _Gathered(np.concatenate(positives), np.concatenate(start), joined)

    def _drop_duplicates(self, plan: Plan, encoded: EncodedImage) -> None:
        """Leave one negative of the windows that cover the same cells at the same scale."""
        duplicate = np.ones(len(plan.boxes), dtype=bool)
        duplicate[self.settings.pooling.distinct(encoded, plan.boxes)] = False
        plan.negative[duplicate] = False

    def _regress(
        self, features: list[Halves], deltas: Boxes, scale: float
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Fit one class's box regression to half-precision features."""
        wide = np.ones((len(deltas), features[0].shape[1] + 1), dtype=np.float32)
        filled = 0
        for part in features:
            np.multiply(part, np.float32(scale), out=wide[filled : filled + len(part), :-1])
            filled += len(part)
        return fit_ridge(wide, deltas, self.settings.ridge)

    def _mine(self, plans: list[Plan], gathered: _Gathered, head: Head | None, scale: float) -> LinearSVMs:
        """Fit the SVMs to activations of positives and first negatives, then with hard negatives."""

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

        return mine_hard_negatives(
            standard(positives),
            np.concatenate([p.labels for p in plans]),
            standard(start),
            np.concatenate([p.negative[p.start] for p in plans]),
            ((standard(activations(pooled)), negative) for pooled, negative in self._candidates(plans)),
            self.settings.mining,
        ).folded(centre, factor)

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

    def _candidates(self, plans: list[Plan]) -> Iterator[tuple[Any, npt.NDArray[np.bool_]]]:
        """Yield pooled features of all windows image by image, and for which classes each is a negative."""
        for i, plan in self._tracked(plans, "Mining hard negatives"):
            encoded = self._encoded(i)
            with self.work.timer("pooling"):
                features = self.settings.pooling(encoded, plan.boxes)
            negative = plan.negative.copy()
            negative[plan.start] = False  # These are in the training set from the start.
            yield features, negative


def _mean_norm(vectors: npt.NDArray[np.float32]) -> float:
    return float(np.linalg.norm(vectors, axis=1).mean())
