"""The detector: maps once per image and scale, every window pooled, linear SVMs, box regression, suppression.

The paper's section 4 with the convex pieces only: nothing but SVMs and ridge regressions is fitted, on the
frozen features of a pretrained trunk. Windows are data here; `sppnet.proposals` makes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from sppnet.boxes import Boxes, Detections, Target, area, clip, decode_deltas, encode_deltas, nms
from sppnet.clock import Clock
from sppnet.files import write_tensors
from sppnet.geometry import PROJECTIONS, SCALE_RULES, FeatureMaps, check_rule
from sppnet.images import read_image
from sppnet.linear import LinearSVMs, MiningSettings, fit_ridge, mine_hard_negatives
from sppnet.maps import Image, MapCache, encode, first_responses, pool_windows
from sppnet.sampling import NEGATIVES, Plan, SamplingRules, plan_images
from sppnet.trunks import Trunk

FORMAT, VERSION = "sppnet-detector", "1"
_FACTS = {"classes", "feature_scale", "trunk", "settings", "about"}

Track = Callable[[Sequence[Any], str], Iterable[Any]]


def _no_track(items: Sequence[Any], description: str) -> Iterable[Any]:
    return items


class Detector:
    """An object detector on frozen features: linear SVMs and ridge box regressions over pooled windows.

    Parameters
    ----------
    trunk : Trunk
        Where the features come from.
    levels : tuple of int
        Pyramid (paper: 6, 3, 2, 1).
    sides : tuple of int
        Shorter sides of the scales in pixels (paper: 480, 576, 688, 864, 1200).
    reference : float, optional
        Side that a window should have at its scale, in pixels; by default the scale rule's own (released
        code: 208, paper: 224).
    projection : {"released", "paper"}
        Which cells of a map a window covers; see `sppnet.geometry.project`.
    scale_rule : {"released", "paper"}
        Which scale suits a window; see `sppnet.geometry.choose_scale`.
    mining : MiningSettings
        SVMs and hard-negative mining.
    negative_iou : float
        Windows that overlap a class by less are its negatives (paper: 0.3).
    negatives : {"all", "released", "paper"}
        Which of them are kept: all, one of those that cover the same cells (released code), or none that
        overlaps another by more than 70 % (paper); see `sppnet.sampling.SamplingRules`.
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
    ValueError
        If a projection, a scale rule or a rule for the negatives has no such name.

    Attributes
    ----------
    classes_ : tuple of str
    svms_ : LinearSVMs
    regressors_ : (K, 4, D) float32, (K, 4) float32
        Weights and offsets of the box deltas.
    feature_scale_ : float
        Pooled features are multiplied by this, so that their mean norm is 20.
    """

    def __init__(
        self,
        trunk: Trunk,
        *,
        levels: tuple[int, ...] = (3, 2, 1),
        sides: tuple[int, ...] = (240, 336, 480, 672),
        reference: float | None = None,
        projection: str = "released",
        scale_rule: str = "released",
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
        self.trunk, self.levels, self.sides = trunk, tuple(levels), tuple(sides)
        self.projection, self.scale_rule, self.negatives = projection, scale_rule, negatives
        self.reference = SCALE_RULES[scale_rule] if reference is None else reference
        self.mining, self.negative_iou, self.nms_iou = mining, negative_iou, nms_iou
        self.regression_iou, self.regression_windows, self.ridge = regression_iou, regression_windows, ridge
        self.seed = seed
        self.classes_: tuple[str, ...] = ()
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
        track: Track = _no_track,
        clock: Clock | None = None,
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
        clock : Clock, optional
            Takes the seconds by stage.

        Returns
        -------
        Detector
            Itself.

        Raises
        ------
        ValueError
            If the arguments disagree in length, there are no images, or a class has no example.
        """
        names = (
            sorted({n for t in targets for n in t.labels})
            if classes is None
            else list(dict.fromkeys(classes))
        )
        fitted = self._fit(images, windows, targets, names, None, cache, track, clock or Clock())
        self.svms_, self.regressors_, self.feature_scale_ = fitted
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
        track: Track = _no_track,
        clock: Clock | None = None,
    ) -> Detector:
        """Learn one more class and leave the others exactly as they are.

        One-vs-rest SVMs make that free. Parameters and errors are those of `fit`; a class that the detector
        already has is an error.
        """
        self._check_fitted()
        if name in self.classes_:
            raise ValueError(f"class {name!r} is already there; the detector has {', '.join(self.classes_)}")
        scale = self.feature_scale_
        svms, regressors, _ = self._fit(
            images, windows, targets, [name], scale, cache, track, clock or Clock()
        )
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
        windows: Boxes,
        *,
        regress: bool = True,
        threshold: float = -1.5,
        limit: int = 100,
        clock: Clock | None = None,
    ) -> Detections:
        """Detect objects in one image.

        Parameters
        ----------
        image : Path or (H, W, 3) uint8 RGB
        windows : (R, 4) float32
            Candidate windows.
        regress : bool
            Whether boxes are moved by the box regression.
        threshold : float
            Least score (released code: -1.5). At 0 the SVM is undecided.
        limit : int
            Most detections per class.
        clock : Clock, optional
            Takes the seconds of the stages trunk, pooling and scoring.

        Returns
        -------
        Detections
            After suppression class by class, by falling score; boxes clipped to the image.
        """
        self._check_fitted()
        clock = clock or Clock()
        pixels = read_image(image) if isinstance(image, Path) else image
        with clock("trunk"):
            maps = encode(self.trunk, pixels, self.sides)
        return self.predict_maps(
            maps, pixels.shape[:2], windows, regress=regress, threshold=threshold, limit=limit, clock=clock
        )

    def predict_maps(
        self,
        maps: Sequence[FeatureMaps],
        shape: tuple[int, int],
        windows: Boxes,
        *,
        regress: bool = True,
        threshold: float = -1.5,
        limit: int = 100,
        clock: Clock | None = None,
    ) -> Detections:
        """Detect objects in an image whose maps `sppnet.maps.encode` computed at the detector's `sides`.

        Any number of sets of windows can be tried on the same maps. `shape` is the height and width of the
        original image; all else is as in `predict`.
        """
        self._check_fitted()
        clock = clock or Clock()
        boxes, scores = [], []
        for part in _blocks(np.asarray(windows, dtype=np.float32).reshape(-1, 4)):
            with clock("pooling"):
                features = self._pool(maps, part, shape).mul_(self.feature_scale_)
            with clock("scoring"):
                unmoved = np.broadcast_to(part[:, None], (len(part), len(self.classes_), 4))
                boxes.append(self._move(part, features) if regress else unmoved)
                scores.append(self.svms_(features))
        with clock("scoring"):
            return self._select(np.concatenate(boxes), np.concatenate(scores), shape, threshold, limit)

    def _select(
        self,
        boxes: Boxes,
        scores: npt.NDArray[np.float32],
        shape: tuple[int, int],
        threshold: float,
        limit: int,
    ) -> Detections:
        """Suppress (R, K, 4) boxes with (R, K) scores class by class, and merge what is left by score."""
        parts = []
        for k, name in enumerate(self.classes_):
            inside, score = clip(boxes[:, k], shape[1], shape[0]), scores[:, k]
            good = np.flatnonzero((score >= threshold) & (area(inside) > 0))
            kept = good[nms(inside[good], score[good], self.nms_iou)[:limit]]
            parts.append((inside[kept], score[kept], [name] * len(kept)))
        found, value, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(-value, kind="stable")
        return Detections(found[order], value[order], tuple(str(labels[i]) for i in order))

    def _move(self, windows: Boxes, features: Tensor) -> Boxes:
        """Return the (R, K, 4) boxes that the regressions of the K classes make of (R, 4) windows."""
        weights, offsets = self.regressors_
        deltas = (
            features @ torch.from_numpy(weights.reshape(-1, weights.shape[-1])).T
        ).numpy() + offsets.reshape(-1)
        count = len(self.classes_)
        return decode_deltas(np.repeat(windows, count, axis=0), deltas.reshape(-1, 4)).reshape(-1, count, 4)

    def _pool(self, maps: Sequence[FeatureMaps], boxes: Boxes, shape: tuple[int, int]) -> Tensor:
        return pool_windows(
            maps,
            boxes,
            shape,
            self.sides,
            self.levels,
            self.reference,
            projection=self.projection,
            scale_rule=self.scale_rule,
        )

    def _check_fitted(self) -> None:
        if not self.classes_:
            raise ValueError("the detector is not fitted yet; call fit, or load one")

    def _fit(
        self,
        images: Sequence[Image],
        windows: Sequence[Boxes],
        targets: Sequence[Target],
        names: Sequence[str],
        scale: float | None,
        cache: Path | None,
        track: Track,
        clock: Clock,
    ) -> tuple[LinearSVMs, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]], float]:
        if not len(images) == len(windows) == len(targets) > 0:
            raise ValueError(
                "images, windows and targets must have one length of at least 1, "
                f"got {len(images)}, {len(windows)} and {len(targets)}"
            )
        rules = SamplingRules(self.negative_iou, self.regression_iou, self.regression_windows, self.negatives)
        plans = plan_images(windows, targets, names, rules, self.seed)
        folder: AbstractContextManager[Any] = (
            TemporaryDirectory(prefix="sppnet-") if cache is None else nullcontext(cache)
        )
        with folder as place:
            store = MapCache(Path(place), self.trunk, self.sides)
            examples, regression = self._gather(images, plans, store, track, clock)
            # From here on the maps come from the disk.
            self.trunk.release()
            if scale is None:
                scale = 20.0 / float(torch.linalg.vector_norm(examples[1].float(), dim=1).mean())
            with clock("box regression"):
                ridges = [
                    self._regress(*regression.pop(0), scale) for _ in track(names, "Fitting box regression")
                ]
            with clock("SVMs"):
                svms = mine_hard_negatives(
                    # Popped, so that nothing holds them while they are not needed any more.
                    examples.pop(0).float() * scale,
                    np.concatenate([p.labels for p in plans]),
                    examples.pop(0).float() * scale,
                    np.concatenate([p.negative[p.start] for p in plans]),
                    self._candidates(images, plans, store, scale, track, clock),
                    self.mining,
                )
        weights, offsets = (np.stack(parts) for parts in zip(*ridges, strict=True))
        return svms, (weights, offsets), scale

    def _candidates(
        self,
        images: Sequence[Image],
        plans: Sequence[Plan],
        store: MapCache,
        scale: float,
        track: Track,
        clock: Clock,
    ) -> Iterator[tuple[Tensor, npt.NDArray[np.bool_]]]:
        """Yield the features of all windows image by image, and for which classes each is a negative."""
        for image, plan in track(list(zip(images, plans, strict=True)), "Mining hard negatives"):
            maps, shape = store(image, clock)
            with clock("pooling"):
                features = self._pool(maps, plan.boxes, shape).mul_(scale)
            negative = plan.negative.copy()
            negative[plan.start] = False  # These are in the training set from the start.
            yield features, negative

    def _gather(
        self, images: Sequence[Image], plans: Sequence[Plan], store: MapCache, track: Track, clock: Clock
    ) -> tuple[list[Tensor], list[tuple[list[Tensor], Boxes]]]:
        """Pool the positives and the windows to start with, and each class's regression examples."""
        positives, start = [], []
        count = plans[0].negative.shape[1]
        regression: list[tuple[list[Tensor], list[Boxes]]] = [([], []) for _ in range(count)]
        for image, plan in track(list(zip(images, plans, strict=True)), "Computing feature maps"):
            maps, shape = store(image, clock)
            if self.negatives == "released":
                self._drop_duplicates(plan, maps, shape)
            wanted = np.concatenate(
                [np.arange(len(plan.labels)), plan.start, np.flatnonzero(plan.fitted >= 0)]
            )
            with clock("pooling"):
                features = self._pool(maps, plan.boxes[wanted], shape).half()
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
        rules = (self.reference, self.projection, self.scale_rule)
        duplicate = np.ones(len(plan.boxes), dtype=bool)
        duplicate[first_responses(maps, plan.boxes, shape, self.sides, *rules)] = False
        plan.negative[duplicate] = False

    def _regress(
        self, features: list[Tensor], deltas: Boxes, scale: float
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Fit one class's box regression to half-precision features."""
        wide = np.ones((len(deltas), features[0].shape[1] + 1), dtype=np.float32)
        filled = 0
        for part in features:
            np.multiply(part.numpy(), np.float32(scale), out=wide[filled : filled + len(part), :-1])
            filled += len(part)
        return fit_ridge(wide, deltas, self.ridge)

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
        weights = np.concatenate([self.svms_.weights[:, None], self.regressors_[0]], axis=1)
        offsets = np.concatenate([self.svms_.biases[:, None], self.regressors_[1]], axis=1)
        # Half precision keeps three digits of each weight relative to the largest of its row.
        largest = np.maximum(np.abs(weights).max(axis=2, keepdims=True), 1e-30)
        tensors = {
            "weights": torch.from_numpy((weights / largest).astype(np.float16)),
            "largest": torch.from_numpy(largest[..., 0]),
            "offsets": torch.from_numpy(offsets),
        }
        trunk = self.trunk
        facts = {
            "classes": self.classes_,
            "feature_scale": self.feature_scale_,
            "trunk": {
                "name": trunk.name,
                "stages": trunk.stages,
                "output_stride": trunk.output_stride,
                "weights": trunk.weights,
                "digest": trunk.digest,
            },
            "settings": {
                "levels": self.levels,
                "sides": self.sides,
                "reference": self.reference,
                "projection": self.projection,
                "scale_rule": self.scale_rule,
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
        write_tensors(path, tensors, {"format": FORMAT, "version": VERSION, "detector": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path, *, weights: str | None = None, device: str = "cpu") -> Detector:
        """Read a detector that `save` wrote.

        Parameters
        ----------
        path : path
        weights : str, optional
            Where the trunk's weights lie now, if not where they were.
        device : str
            See `Trunk`.

        Raises
        ------
        ValueError
            If the file is damaged, not a detector, of another version, or was fitted on other trunk weights.
        """
        path = Path(path)
        facts = describe(path)
        about = facts["trunk"]
        trunk = Trunk(
            about["name"], about["stages"], about["output_stride"], weights or about["weights"], device
        )
        if trunk.digest != about["digest"]:
            raise ValueError(
                f"{path}: fitted on trunk weights {about['digest'][:16]}, found {trunk.digest[:16]}"
            )
        # Files written before these could be chosen do not name them.
        older = {"projection": "released", "scale_rule": "released", "negatives": "all"}
        settings = older | facts["settings"]
        mining = MiningSettings(**settings.pop("mining"))
        settings |= {"levels": tuple(settings["levels"]), "sides": tuple(settings["sides"])}
        detector = cls(trunk, mining=mining, **settings)
        tensors = load_file(path)
        if not tensors.keys() >= {"weights", "largest", "offsets"}:
            raise ValueError(f"{path}: damaged, found the tensors {', '.join(tensors)}, expected a detector")
        matrix = (tensors["weights"].float() * tensors["largest"][..., None]).numpy()
        offsets = tensors["offsets"].numpy()
        detector.svms_ = LinearSVMs(np.ascontiguousarray(matrix[:, 0]), offsets[:, 0].copy())
        detector.regressors_ = np.ascontiguousarray(matrix[:, 1:]), offsets[:, 1:].copy()
        detector.feature_scale_, detector.classes_ = facts["feature_scale"], tuple(facts["classes"])
        return detector


def describe(path: str | Path) -> dict[str, Any]:
    """Return what a detector file says of itself, without loading it.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, or it is damaged, not a detector or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: model file not found")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged or not a model file ({error})") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path}: not an sppnet detector, found {metadata.get('format', 'no format mark')!r}"
        )
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{path}: detector format {metadata.get('version')!r} found, this sppnet reads {VERSION!r}"
        )
    try:
        facts: dict[str, Any] = json.loads(metadata.get("detector", ""))
    except ValueError:
        facts = {}
    if not isinstance(facts, dict) or not facts.keys() >= _FACTS:
        raise ValueError(f"{path}: damaged, found no {', '.join(sorted(_FACTS))}, expected a detector")
    return facts


def shipped() -> Path:
    """Return the path of the detector that is installed with sppnet."""
    return Path(str(resources.files("sppnet") / "data" / "animals.safetensors"))


def _blocks(windows: Boxes, size: int = 2000) -> Iterator[Boxes]:
    """Yield at most `size` windows at a time, at least once: memory does not grow with their number."""
    for start in range(0, max(len(windows), 1), size):
        yield windows[start : start + size]
