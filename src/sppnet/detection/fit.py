"""How a detector is fitted to annotated images: fine-tuning, regression, mined SVMs (section 4.1)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sppnet.arrays import Boxes, Image
from sppnet.boxes import Target
from sppnet.detection.finetune import FineTuner, Tuning
from sppnet.detection.sampling import Plan, SamplingRules, plan_images
from sppnet.detection.svm import LinearSVMs, mine_hard_negatives
from sppnet.errors import SppnetError
from sppnet.features.geometry import FeatureMaps
from sppnet.features.windows import MapCache, encode, first_responses
from sppnet.images import pixels_of
from sppnet.progress import StageTimer, Track
from sppnet.regression import encode_deltas, fit_ridge

if TYPE_CHECKING:
    from sppnet.detection.detector import Detector

Regressors = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


class Fitting:
    """One fit of a detector to annotated images.

    Parameters
    ----------
    detector : Detector
        Says how. Its backbone, layers and objectness are replaced where it learns them, too.
    images : sequence of Path or (H, W, 3) uint8 arrays
    windows : sequence of (R, 4) float32
        Candidate windows of each image.
    targets : sequence of Target
        Annotations of each image.
    names : sequence of str
        Classes to learn.
    folder : Path
        For the feature maps and the checkpoints of fine-tuning.
    track : callable
        Draws progress; see `Detector.fit`.
    timer : StageTimer
        Takes the seconds by stage.

    Raises
    ------
    SppnetError
        If the arguments disagree in length, there are no images, or a class has no example.
    """

    def __init__(
        self,
        detector: Detector,
        images: Sequence[Image],
        windows: Sequence[Boxes],
        targets: Sequence[Target],
        names: Sequence[str],
        folder: Path,
        track: Track,
        timer: StageTimer,
    ) -> None:
        if not len(images) == len(windows) == len(targets) > 0:
            raise SppnetError(
                "images, windows and targets must have one length of at least 1, "
                f"got {len(images)}, {len(windows)} and {len(targets)}"
            )
        self.detector, self.images, self.windows, self.targets = detector, images, windows, targets
        self.names, self.folder, self.track, self.timer = names, folder, track, timer
        # Planned before any work, because it finds the classes that have no example.
        self.plans = self._plan()

    def run(self, scale: float | None = None) -> tuple[LinearSVMs, Regressors, float]:
        """Fit SVMs and box regressions, and first what comes before them unless it is there.

        Parameters
        ----------
        scale : float, optional
            The factor of pooled features of a detector that is fitted already. Its backbone, layers and
            objectness stay as they are then.

        Returns
        -------
        LinearSVMs
            One per class.
        (K, 4, D) float32, (K, 4) float32
            Weights and offsets of the box deltas.
        float
            The factor of pooled features.
        """
        detector, timer = self.detector, self.timer
        new = scale is None
        if new and detector.tuning is not None:
            with timer("fine-tuning"):
                scale = self._tune(detector.tuning)
        store = MapCache(self.folder, detector.backbone, detector.sides)
        if new and detector.objectness is not None:
            with timer("objectness"):
                detector.objectness_ = copy.copy(detector.objectness).fit(
                    lambda i: store(self.images[i], timer), self.targets, self.names, track=self.track
                )
        if detector.objectness_ is not None:
            self.windows = self._more_windows(store)
            self.plans = self._plan()
        examples, regression = self._gather(store)
        # From here on the maps come from the disk.
        detector.backbone.release()
        if scale is None:
            scale = 20.0 / float(torch.linalg.vector_norm(examples[1].float(), dim=1).mean())
        with timer("box regression"):
            ridges = [
                self._regress(*regression.pop(0), scale)
                for _ in self.track(self.names, "Fitting box regression")
            ]
        with timer("SVMs"):
            # Popped, so that nothing holds them while they are not needed any more.
            positives = detector.activations(examples.pop(0).float() * scale)
            svms = self._mine(store, positives, detector.activations(examples.pop(0).float() * scale), scale)
        weights, offsets = (np.stack(parts) for parts in zip(*ridges, strict=True))
        return svms, (weights, offsets), scale

    def _plan(self) -> list[Plan]:
        d = self.detector
        rules = SamplingRules(d.negative_iou, d.regression_iou, d.regression_windows, d.negatives)
        return plan_images(self.windows, self.targets, self.names, rules, d.seed)

    def _planned(self, description: str) -> Iterable[tuple[Image, Plan]]:
        """Yield the images with their plans, and draw how far it is."""
        return self.track(list(zip(self.images, self.plans, strict=True)), description)

    def _tune(self, tuning: Tuning) -> float:
        """Train the head, and the backbone if so set; return the factor of pooled features."""
        detector = self.detector
        store = MapCache(self.folder, detector.backbone, detector.sides)

        def pool(i: int, boxes: Boxes) -> Tensor:
            if tuning.stage is None:
                maps, shape = store(self.images[i], self.timer)
                return detector.pool(maps, boxes, shape)
            # A backbone that will change: its maps now are of no use later.
            pixels = pixels_of(self.images[i])
            return detector.pool(encode(detector.backbone, pixels, detector.sides), boxes, pixels.shape[:2])

        tuner = FineTuner(
            detector.backbone,
            self.images,
            self.windows,
            self.targets,
            self.names,
            pool=pool,
            levels=detector.levels,
            sides=detector.sides,
            reference=detector.reference,
            projection=detector.projection,
            scale_rule=detector.scale_rule,
            tuning=tuning,
            seed=detector.seed,
            folder=self.folder,
        )
        tuner.train(self.track)
        # Rounded as it will be saved. Where the SVMs stand on the pooled features, only its backbone was wanted.
        head = None if detector.layer == "pool" else tuner.head.half().float()
        detector.backbone, detector.head_ = tuner.backbone, head
        return tuner.scale

    def _more_windows(self, store: MapCache) -> list[Boxes]:
        """Return the windows of each image with those that its maps propose."""
        found = []
        pairs = list(zip(self.images, self.windows, strict=True))
        for image, given in self.track(pairs, "Proposing windows from maps"):
            maps, shape = store(image, self.timer)
            with self.timer("proposals"):
                found.append(np.concatenate([np.reshape(given, (-1, 4)), self.detector.propose(maps, shape)]))
        return found

    def _gather(self, store: MapCache) -> tuple[list[Tensor], list[tuple[list[Tensor], Boxes]]]:
        """Pool the positives and the windows to start with, and each class's regression examples."""
        positives, start = [], []
        count = len(self.names)
        regression: list[tuple[list[Tensor], list[Boxes]]] = [([], []) for _ in range(count)]
        for image, plan in self._planned("Computing feature maps"):
            maps, shape = store(image, self.timer)
            if self.detector.negatives == "released":
                self._drop_duplicates(plan, maps, shape)
            wanted = np.concatenate(
                [np.arange(len(plan.labels)), plan.start, np.flatnonzero(plan.fitted >= 0)]
            )
            with self.timer("pooling"):
                features = self.detector.pool(maps, plan.boxes[wanted], shape).half().cpu()
            first, second = len(plan.labels), len(plan.labels) + len(plan.start)
            positives.append(features[:first].clone())
            start.append(features[first:second].clone())
            rest = wanted[second:]
            for k in np.unique(plan.fitted[rest]):
                mine = np.flatnonzero(plan.fitted[rest] == k)
                regression[k][0].append(features[second:][torch.from_numpy(mine)])
                regression[k][1].append(encode_deltas(plan.boxes[rest[mine]], plan.truth[rest[mine]]))
        return [torch.cat(positives), torch.cat(start)], [(f, np.concatenate(d)) for f, d in regression]

    def _drop_duplicates(self, plan: Plan, maps: Sequence[FeatureMaps], shape: tuple[int, int]) -> None:
        """Leave one negative of the windows that cover the same cells at the same scale."""
        d = self.detector
        duplicate = np.ones(len(plan.boxes), dtype=bool)
        rules = (d.reference, d.projection, d.scale_rule)
        duplicate[first_responses(maps, plan.boxes, shape, d.sides, *rules)] = False
        plan.negative[duplicate] = False

    def _regress(self, features: list[Tensor], deltas: Boxes, scale: float) -> Regressors:
        """Fit one class's box regression to half-precision features."""
        wide = np.ones((len(deltas), features[0].shape[1] + 1), dtype=np.float32)
        filled = 0
        for part in features:
            np.multiply(part.numpy(), np.float32(scale), out=wide[filled : filled + len(part), :-1])
            filled += len(part)
        return fit_ridge(wide, deltas, self.detector.ridge)

    def _mine(self, store: MapCache, positives: Tensor, start: Tensor, scale: float) -> LinearSVMs:
        """Fit the SVMs to activations of positives and first negatives, then with hard negatives."""
        centre, factor = self._standard(start)

        def standard(activations: Tensor) -> Tensor:
            # Those of mining come from the device of the maps.
            return activations.sub_(centre.to(activations.device)).mul_(factor)

        return mine_hard_negatives(
            standard(positives),
            np.concatenate([p.labels for p in self.plans]),
            standard(start),
            np.concatenate([p.negative[p.start] for p in self.plans]),
            (
                (standard(self.detector.activations(pooled)), negative)
                for pooled, negative in self._candidates(store, scale)
            ),
            self.detector.mining,
        ).folded(centre.numpy(), factor)

    def _standard(self, activations: Tensor) -> tuple[Tensor, float]:
        """Return the centre of activations, and the factor that gives them a mean norm of 20 about it.

        Pooled features are scaled already, and stay where they are, as in the paper. What windows have in
        common is most of a layer's activations; without it, one penalty of the SVMs suits both.
        """
        if self.detector.layer == "pool":
            return torch.zeros(1), 1.0
        centre = activations.mean(dim=0)
        spread = float(torch.linalg.vector_norm(activations - centre, dim=1).mean())
        return centre, 20 / spread if spread > 0 else 1.0

    def _candidates(self, store: MapCache, scale: float) -> Iterator[tuple[Tensor, npt.NDArray[np.bool_]]]:
        """Yield pooled features of all windows image by image, and for which classes each is a negative."""
        for image, plan in self._planned("Mining hard negatives"):
            maps, shape = store(image, self.timer)
            with self.timer("pooling"):
                features = self.detector.pool(maps, plan.boxes, shape).mul_(scale)
            negative = plan.negative.copy()
            negative[plan.start] = False  # These are in the training set from the start.
            yield features, negative
