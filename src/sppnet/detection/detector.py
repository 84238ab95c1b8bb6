"""The detector: maps once per image and scale, every window pooled, linear SVMs, box regression, suppression.

The paper's section 4. By default only convex pieces are fitted, SVMs and ridge regressions on the frozen
features of a pretrained backbone. Where that is asked for, fully connected layers between the two, and the
backbone's last stages, are trained first. Windows are data here; `sppnet.proposals` makes them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sppnet.arrays import Boxes, Image
from sppnet.boxes import Detections, Target
from sppnet.detection.file import describe, named, packed, read, unpacked, write
from sppnet.detection.finetune import Tuning
from sppnet.detection.fit import Fitting
from sppnet.detection.head import LAYERS, Head
from sppnet.detection.postprocess import postprocess
from sppnet.detection.sampling import NEGATIVES
from sppnet.detection.svm import LinearSVMs, MiningSettings
from sppnet.errors import SppnetError
from sppnet.features.backbone import Backbone
from sppnet.features.geometry import PROJECTIONS, SCALE_RULES, FeatureMaps, check_rule
from sppnet.features.windows import encode, pool_windows
from sppnet.images import pixels_of
from sppnet.pooling.bins import pyramid_length
from sppnet.progress import StageTimer, Track, no_track
from sppnet.proposals.maps import Objectness
from sppnet.regression import decode_deltas

# Windows that are pooled and scored at once: memory does not grow with their number.
BLOCK, SMALLEST_BLOCK = 2000, 16


class Detector:
    """An object detector: linear SVMs and ridge box regressions over windows pooled from feature maps.

    Parameters
    ----------
    backbone : Backbone
        Where the features come from.
    levels : tuple of int
        Pyramid (paper: 6, 3, 2, 1).
    sides : tuple of int
        Shorter sides of the scales in pixels (paper: 480, 576, 688, 864, 1200).
    reference : float, optional
        Side that a window should have at its scale, in pixels; by default the scale rule's own (released
        code: 208, paper: 224).
    projection : {"released", "paper"}
        Which cells of a map a window covers; see `sppnet.features.geometry.project`.
    scale_rule : {"released", "paper"}
        Which scale suits a window; see `sppnet.features.geometry.choose_scale`. The paper's measured better.
    layer : {"pool", "fc6", "fc7"}
        What the SVMs stand on: the pooled features, or a fully connected layer above them.
    tuning : Tuning, optional
        How the fully connected layers are trained, and with them the backbone's last stages if it says so; `fit`
        then goes on with a tuned copy of the backbone. By default nothing is, and only ``"pool"`` is possible.
    objectness : Objectness, optional
        Fitted with the detector, it proposes windows from the maps: they join those that `fit` is given, and
        `predict` needs no others.
    mining : MiningSettings
        SVMs and hard-negative mining.
    negative_iou : float
        Windows that overlap a class by less are its negatives (paper: 0.3).
    negatives : {"all", "released", "paper"}
        Which of them are kept: all, one of those that cover the same cells (released code), or none that
        overlaps another by more than 70 % (paper); see `sppnet.detection.sampling.SamplingRules`.
    regression_iou : float
        Windows that overlap an object by more teach box regression (paper: 0.5).
    regression_windows : int
        At most so many windows, drawn at random, teach each class's box regression.
    ridge : float
        Penalty of the box regression (released code: 4000).
    nms_iou : float
        Detections of a class that overlap a better one by more are dropped (paper: 0.3).
    seed : int
        Of every random draw.

    Raises
    ------
    SppnetError
        If a projection, a scale rule, a rule for the negatives, a layer or the stage to tune after has no
        such name, or there is a layer without tuning.

    Attributes
    ----------
    classes_ : tuple of str
    head_ : Head or None
        The fully connected layers, if there are any.
    objectness_ : Objectness or None
        Proposes windows from the maps.
    svms_ : LinearSVMs
    regressors_ : (K, 4, D) float32, (K, 4) float32
        Weights and offsets of the box deltas.
    feature_scale_ : float
        Pooled features are multiplied by this, so that their mean norm is 20.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        levels: tuple[int, ...] = (3, 2, 1),
        sides: tuple[int, ...] = (240, 336, 480, 672),
        reference: float | None = None,
        projection: str = "released",
        scale_rule: str = "paper",
        layer: str = "pool",
        tuning: Tuning | None = None,
        objectness: Objectness | None = None,
        mining: MiningSettings = MiningSettings(),  # noqa: B008
        negative_iou: float = 0.3,
        negatives: str = "all",
        regression_iou: float = 0.5,
        regression_windows: int = 4000,
        ridge: float = 1000,
        nms_iou: float = 0.3,
        seed: int = 0,
    ) -> None:
        check_rule("projection", projection, PROJECTIONS)
        check_rule("scale rule", scale_rule, SCALE_RULES)
        check_rule("rule for negatives", negatives, NEGATIVES)
        self.backbone, self.levels, self.sides = backbone, tuple(levels), tuple(sides)
        self.projection, self.scale_rule, self.negatives = projection, scale_rule, negatives
        self.reference = SCALE_RULES[scale_rule] if reference is None else reference
        check_rule("layer", layer, LAYERS)
        if layer != "pool" and tuning is None:
            raise SppnetError(f"found the layer {layer} without tuning, expected tuning, which trains it")
        if tuning is not None and tuning.stage is not None:
            backbone.layers_after(tuning.stage)  # A stage that is not there is an error before any work.
        self.layer, self.tuning, self.objectness = layer, tuning, objectness
        self.mining, self.negative_iou, self.nms_iou = mining, negative_iou, nms_iou
        self.regression_iou, self.regression_windows, self.ridge = regression_iou, regression_windows, ridge
        self.seed = seed
        self.classes_: tuple[str, ...] = ()
        self.head_: Head | None = None
        self.objectness_: Objectness | None = None
        self.svms_: LinearSVMs
        self.regressors_: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
        self.feature_scale_: float

    def fit(
        self,
        images: Sequence[Image],
        windows: Sequence[Boxes],
        targets: Sequence[Target],
        classes: Sequence[str] | None = None,
        *,
        cache: Path | None = None,
        track: Track = no_track,
        timer: StageTimer | None = None,
    ) -> Detector:
        """Fit one SVM and one box regression per class.

        Goes through the images twice: for the positives, then for the hard negatives. Feature maps are kept
        on disk in between, in half precision, so memory does not grow with the number of images.

        Parameters
        ----------
        images : sequence of Path or (H, W, 3) uint8 arrays
        windows : sequence of (R, 4) float32
            Candidate windows of each image.
        targets : sequence of Target
            Annotations of each image.
        classes : sequence of str, optional
            The classes to learn; by default all that are annotated.
        cache : Path, optional
            Folder for the feature maps. Give one to resume an interrupted fit; by default a temporary one.
        track : callable
            ``track(items, description)`` yields the items and may draw progress.
        timer : StageTimer, optional
            Takes the seconds by stage.

        Returns
        -------
        Detector
            Itself.

        Raises
        ------
        SppnetError
            If the arguments disagree in length, there are no images, or a class has no example.
        """
        names = (
            sorted({n for t in targets for n in t.labels})
            if classes is None
            else list(dict.fromkeys(classes))
        )
        with _folder(cache) as folder:
            fitting = Fitting(self, images, windows, targets, names, folder, track, timer or StageTimer())
            self.svms_, self.regressors_, self.feature_scale_ = fitting.run()
        self.classes_ = tuple(names)
        return self

    def add_class(
        self,
        name: str,
        images: Sequence[Image],
        windows: Sequence[Boxes],
        targets: Sequence[Target],
        *,
        cache: Path | None = None,
        track: Track = no_track,
        timer: StageTimer | None = None,
    ) -> Detector:
        """Learn one more class and leave the others exactly as they are.

        One-vs-rest SVMs make that free. Parameters and errors are those of `fit`; a class that the detector
        already has is an error.
        """
        self._check_fitted()
        if name in self.classes_:
            raise SppnetError(f"class {name!r} is already there; the detector has {', '.join(self.classes_)}")
        with _folder(cache) as folder:
            fitting = Fitting(self, images, windows, targets, [name], folder, track, timer or StageTimer())
            svms, regressors, _ = fitting.run(self.feature_scale_)
        self.svms_ = LinearSVMs(
            np.concatenate([self.svms_.weights, svms.weights]),
            np.concatenate([self.svms_.biases, svms.biases]),
        )
        old, new = self.regressors_, regressors
        self.regressors_ = np.concatenate([old[0], new[0]]), np.concatenate([old[1], new[1]])
        self.classes_ = (*self.classes_, name)
        return self

    def predict(
        self,
        image: Image,
        windows: Boxes | None = None,
        *,
        regress: bool = True,
        threshold: float = -1.5,
        limit: int = 100,
        timer: StageTimer | None = None,
    ) -> Detections:
        """Detect objects in one image.

        Parameters
        ----------
        image : Path or (H, W, 3) uint8 RGB
        windows : (R, 4) float32, optional
            Candidate windows; by default those that the maps propose.
        regress : bool
            Whether boxes are moved by the box regression.
        threshold : float
            Least score (released code: -1.5). At 0 the SVM is undecided.
        limit : int
            Most detections per class.
        timer : StageTimer, optional
            Takes the seconds of the stages backbone, pooling and scoring.

        Returns
        -------
        Detections
            After suppression class by class, by falling score; boxes clipped to the image.
        """
        self._check_fitted()
        timer = timer or StageTimer()
        pixels = pixels_of(image)
        with timer("backbone"):
            maps = encode(self.backbone, pixels, self.sides)
        return self.predict_maps(
            maps, pixels.shape[:2], windows, regress=regress, threshold=threshold, limit=limit, timer=timer
        )

    def predict_maps(
        self,
        maps: Sequence[FeatureMaps],
        shape: tuple[int, int],
        windows: Boxes | None = None,
        *,
        regress: bool = True,
        threshold: float = -1.5,
        limit: int = 100,
        timer: StageTimer | None = None,
    ) -> Detections:
        """Detect objects in an image whose maps `sppnet.features.windows.encode` computed at the detector's `sides`.

        Any number of sets of windows can be tried on the same maps. `shape` is the height and width of the
        original image; all else is as in `predict`.
        """
        timer = timer or StageTimer()
        boxes, scores = self.score_maps(maps, shape, windows, regress=regress, timer=timer)
        with timer("scoring"):
            return postprocess(boxes, scores, self.classes_, shape, self.nms_iou, threshold, limit)

    def score_maps(
        self,
        maps: Sequence[FeatureMaps],
        shape: tuple[int, int],
        windows: Boxes | None = None,
        *,
        regress: bool = True,
        timer: StageTimer | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Score all windows and move them, without suppression; arguments as in `predict_maps`.

        Returns
        -------
        (R, K, 4) float32 tensor
            The windows as each class's regression moves them.
        (R, K) float32 tensor
            Scores. Both are on the device of the maps; boxes may reach beyond the image.
        """
        self._check_fitted()
        timer = timer or StageTimer()
        if windows is None:
            with timer("proposals"):
                windows = self.propose(maps, shape)
        places = np.asarray(windows, dtype=np.float32).reshape(-1, 4)
        boxes, scores = [], []
        start, size = 0, BLOCK
        while start < max(len(places), 1):
            part = places[start : start + size]
            try:
                moved, value = self._score_block(maps, shape, part, regress, timer)
            except torch.OutOfMemoryError:
                if size <= SMALLEST_BLOCK:
                    raise
                size //= 2
                torch.cuda.empty_cache()
                warnings.warn(
                    f"out of memory on {self.backbone.device}: going on with {size} windows at a time",
                    stacklevel=2,
                )
                continue
            boxes.append(moved)
            scores.append(value)
            start += size
        return torch.cat(boxes), torch.cat(scores)

    def propose(self, maps: Sequence[FeatureMaps], shape: tuple[int, int]) -> Boxes:
        """Return the (R, 4) windows that the maps of an image propose, best first; see `Objectness`.

        Raises
        ------
        SppnetError
            If the detector was fitted without objectness.
        """
        if self.objectness_ is None:
            raise SppnetError("found no windows, and a detector without objectness, which could propose some")
        return self.objectness_(maps, shape)[0]

    def pool(self, maps: Sequence[FeatureMaps], windows: Boxes, shape: tuple[int, int]) -> Tensor:
        """Return the (R, D) pooled features of (R, 4) windows, not scaled; see `sppnet.features.windows.pool_windows`."""
        return pool_windows(
            maps,
            windows,
            shape,
            self.sides,
            self.levels,
            self.reference,
            projection=self.projection,
            scale_rule=self.scale_rule,
        )

    def activations(self, pooled: Tensor) -> Tensor:
        """Return what the SVMs take, of (R, D) pooled features times `feature_scale_`: they, or a layer's."""
        if self.head_ is None:
            return pooled
        with torch.no_grad():
            there = pooled.to(self.head_.scores.weight.device)
            return self.head_.activations(there, self.layer).to(pooled.device)

    def _score_block(
        self,
        maps: Sequence[FeatureMaps],
        shape: tuple[int, int],
        windows: Boxes,
        regress: bool,
        timer: StageTimer,
    ) -> tuple[Tensor, Tensor]:
        with timer("pooling"):
            pooled = self.pool(maps, windows, shape).mul_(self.feature_scale_)
        with timer("scoring"):
            scores = self.svms_(self.activations(pooled))
            places = torch.from_numpy(windows).to(pooled.device)[:, None].expand(-1, len(self.classes_), 4)
            return (decode_deltas(places, self._deltas(pooled)) if regress else places), scores

    def _deltas(self, pooled: Tensor) -> Tensor:
        """Return the (R, K, 4) deltas that the regressions of the K classes predict."""
        weights, offsets = (torch.from_numpy(a).to(pooled.device) for a in self.regressors_)
        return (pooled @ weights.flatten(0, 1).T).view(-1, *offsets.shape) + offsets

    def _check_fitted(self) -> None:
        if not self.classes_:
            raise SppnetError("the detector is not fitted yet; call fit, or load one")

    def compressed(self, ranks: Sequence[int]) -> Detector:
        """Return the detector with its fully connected layers replaced by thin ones; see `Head.compressed`.

        Raises
        ------
        SppnetError
            If it has none, or the ranks do not fit.
        """
        if self.head_ is None:
            raise SppnetError("found a detector without fully connected layers, expected one on fc6 or fc7")
        thin = copy.copy(self)
        thin.head_ = self.head_.compressed(ranks)
        return thin

    def save(self, path: str | Path, about: dict[str, Any] | None = None) -> None:
        """Write the detector to one safetensors file that says everything needed to run it.

        Parameters
        ----------
        path : path
            Written atomically.
        about : dict, optional
            Further JSON-like facts to keep in the metadata, such as the candidate windows it was fitted with.
        """
        self._check_fitted()
        tensors = {
            **packed("svms", self.svms_.weights, self.svms_.biases),
            **packed("regressors", *self.regressors_),
        }
        if self.head_ is not None:
            tensors |= {f"head.{name}": value.half() for name, value in self.head_.state_dict().items()}
        tensors |= {f"backbone.{name}": value for name, value in self.backbone.tuned.items()}
        if self.objectness_ is not None:
            tensors |= {f"objectness.{name}": value for name, value in self.objectness_.state().items()}
        backbone = self.backbone
        facts = {
            "classes": self.classes_,
            "feature_scale": self.feature_scale_,
            "backbone": {
                "name": backbone.name,
                "stages": backbone.stages,
                "output_stride": backbone.output_stride,
                "weights": backbone.weights,
                "digest": backbone.digest,
            },
            "settings": {
                "levels": self.levels,
                "sides": self.sides,
                "reference": self.reference,
                "projection": self.projection,
                "scale_rule": self.scale_rule,
                "layer": self.layer,
                "tuning": None if self.tuning is None else asdict(self.tuning),
                "objectness": None if self.objectness is None else self.objectness.settings,
                "negative_iou": self.negative_iou,
                "negatives": self.negatives,
                "regression_iou": self.regression_iou,
                "regression_windows": self.regression_windows,
                "ridge": self.ridge,
                "nms_iou": self.nms_iou,
                "seed": self.seed,
                "mining": asdict(self.mining),
            },
            "about": about or {},
        }
        write(path, tensors, facts)

    @classmethod
    def load(cls, path: str | Path, *, weights: str | None = None, device: str = "cpu") -> Detector:
        """Read a detector that `save` wrote.

        Parameters
        ----------
        path : path
        weights : str, optional
            Where the backbone's weights lie now, if not where they were.
        device : str
            See `Backbone`.

        Raises
        ------
        SppnetError
            If the file is damaged, not a detector, of another version, or was fitted on other backbone weights.
        """
        path = Path(path)
        facts = describe(path)
        about = facts["backbone"]
        backbone = Backbone(
            about["name"], about["stages"], about["output_stride"], weights or about["weights"], device
        )
        if backbone.digest != about["digest"]:
            raise SppnetError(
                f"{path}: fitted on backbone weights {about['digest'][:16]}, found {backbone.digest[:16]}"
            )
        tensors = read(path)
        # The first files of this version do not say; there was one scale rule.
        settings = {"scale_rule": "released"} | facts["settings"]
        mining, tuning, objectness = (settings.pop(name) for name in ("mining", "tuning", "objectness"))
        settings |= {"levels": tuple(settings["levels"]), "sides": tuple(settings["sides"])}
        tuned = named("backbone", tensors)
        if tuned:
            try:
                backbone.retune(tuned)
            except ValueError as error:
                raise SppnetError(f"{path}: {error}") from None
        detector = cls(
            backbone,
            mining=MiningSettings(**mining),
            tuning=None if tuning is None else Tuning(**tuning),
            objectness=None if objectness is None else Objectness(**objectness),
            **settings,
        )
        if detector.layer != "pool":
            try:
                head = Head.from_state(named("head", tensors))
            except (KeyError, ValueError, RuntimeError) as error:
                reason = str(error).splitlines()[0]
                raise SppnetError(f"{path}: damaged, found no fully connected layers ({reason})") from None
            detector.head_ = head.to(device).requires_grad_(False)
        if objectness is not None:
            detector.objectness_ = Objectness.from_state(named("objectness", tensors), objectness)
            detector.objectness_.network_.to(device)
        detector.svms_ = LinearSVMs(*unpacked("svms", tensors))
        detector.regressors_ = unpacked("regressors", tensors)
        detector.feature_scale_, detector.classes_ = facts["feature_scale"], tuple(facts["classes"])
        detector._check_lengths(path)
        return detector

    def _check_lengths(self, path: Path) -> None:
        """Raise ValueError unless what was fitted takes the vectors of this backbone and pyramid."""
        pooled = sum(pyramid_length(channels, self.levels) for channels in self.backbone.channels)
        head, count = self.head_, len(self.classes_)
        taken = pooled if head is None else head.width
        found = {
            "SVMs": (self.svms_.weights.shape, (count, taken)),
            "regressions": (self.regressors_[0].shape, (count, 4, pooled)),
        }
        if head is not None:
            found["fully connected layers"] = (head.length,), (pooled,)
        for name, (shape, expected) in found.items():
            if tuple(shape) != expected:
                raise SppnetError(
                    f"{path}: found {name} of shape {tuple(shape)}, expected {expected}: for "
                    f"{count} classes on this backbone and pyramid"
                )


@contextmanager
def _folder(cache: Path | None) -> Iterator[Path]:
    """Yield the folder for the maps of a fit, by default a temporary one."""
    if cache is not None:
        yield cache
        return
    with TemporaryDirectory(prefix="sppnet-") as temporary:
        yield Path(temporary)
