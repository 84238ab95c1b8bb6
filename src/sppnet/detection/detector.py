"""The detector: maps once per image and scale, every window pooled, linear SVMs, box regression, suppression.

The paper's section 4. By default only convex pieces are fitted, SVMs and ridge regressions on the frozen
features of a pretrained backbone. Where that is asked for, fully connected layers between the two, and the
backbone's last stages, are trained first.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from sppnet import __version__
from sppnet.arrays import Boxes, Image, Pixels
from sppnet.boxes import Detections, Windows
from sppnet.datasets.records import Dataset, Sample, class_names
from sppnet.detection.calibration import Scores
from sppnet.detection.file import read_facts, write_detector
from sppnet.detection.fit import FitSettings, Fitted, Work, WorkOptions, fit, fit_more, fit_objectness
from sppnet.detection.head import LAYERS
from sppnet.detection.moving import Scored, moved_again
from sppnet.detection.postprocess import postprocess
from sppnet.detection.quality import Learned, learn_scores
from sppnet.detection.rounds import ROUNDS, Sharding, Source, fit_in_rounds
from sppnet.detection.sampling import Examples, SamplingRules
from sppnet.detection.stored import fitted_of, state_of
from sppnet.detection.stream import Asked, Predictor, check_bad, check_data, look, tell_bad
from sppnet.detection.svm import MiningSettings
from sppnet.detection.tuning import Tuning
from sppnet.errors import SppnetError, check_choice, check_extra
from sppnet.estimator import Estimator
from sppnet.features.backbone import DEFAULT, Backbone, backbone_path
from sppnet.features.encoded import EncodedImage
from sppnet.features.graph import STAGES, STRIDES, read_graph
from sppnet.features.windows import WindowPooling
from sppnet.images import photo_keys, pixels_of
from sppnet.models import model_path
from sppnet.progress import StageTimer, Track, no_track
from sppnet.proposals.cache import cache_folder, propose_each
from sppnet.proposals.choosing import parse
from sppnet.proposals.maps import MAPS, Objectness
from sppnet.proposals.method import Proposer
from sppnet.rpn.settings import Joint

PYRAMID = "pyramid-lite0"
"""The network with a feature pyramid that comes with sppnet."""

OWN_C = 1e-2
"""Weight of the hinge loss where the network itself proposes the windows: fewer ones, and harder."""

NMS_IOU, OWN_NMS_IOU = 0.3, 0.5
"""Overlap from which one of two detections is enough: of others' windows, and of the network's own."""

PROPOSALS = "selective-search+edge-boxes"
"""The candidate windows of a detector unless others are asked for."""

# Windows that are pooled and scored at once: memory does not grow with their number.
BLOCK, SMALLEST_BLOCK = 2000, 16


class Detector(Estimator, Predictor):
    """An object detector: linear SVMs and ridge box regressions over windows pooled from feature maps.

    Parameters
    ----------
    backbone : str, optional
        Where the features come from: ``"efficientnet-lite0"`` or ``"pyramid-lite0"``, which come with sppnet,
        a file that ``sppnet backbone make`` wrote, or that of a detector, whose network goes on learning. By
        default the second where the network is trained, which comes with all that this takes, else the first.
    stages : tuple of str
        Which of the backbone's maps are pooled; see `sppnet.features.backbone.Backbone`.
    output_stride : int
        Largest stride of the backbone.
    device : str
        ``"cpu"``, or a PyTorch device.
    scales : tuple of int
        Shorter sides in pixels to which an image is resized; every window is pooled at the one that suits it
        (paper: 480, 576, 688, 864, 1200). A network that proposes windows takes one side: this one, if it is
        one, or else one that suits the smaller objects.
    levels : tuple of int
        The pyramid (paper: 6, 3, 2, 1).
    projection : {"released", "paper"}
        Which cells of a map a window covers; see `sppnet.features.projection.project`.
    scale_rule : {"released", "paper"}
        Which scale suits a window; see `sppnet.features.projection.choose_scale`. The paper's measured
        better.
    reference : float, optional
        Side in pixels that a window should have at its scale; by default the scale rule's own (released
        code: 208, paper: 224).
    proposals : str
        The candidate windows: a method of `sppnet.proposals.parse`, a file of windows, or ``"maps"``, which
        is faster: those that an objectness, fitted with the detector, finds on the maps.
    layer : {"pool", "fc6", "fc7"}
        What the SVMs stand on: the pooled features, or a fully connected layer above them.
    tuning : Tuning, optional
        How the fully connected layers are trained, and with them the backbone's last stages if it says so. By
        default nothing is, and only ``"pool"`` is possible.
    objectness : Objectness, optional
        Fitted with the detector, it proposes windows from the maps, which join the candidate windows in the
        fit; `predict` takes them alone where `proposals` are ``"maps"``.
    joint : Joint, optional
        The network is trained, too, and proposes the windows itself: how it learns. It starts from
        ``"pyramid-lite0"`` where no other backbone is named. By default it stays as it is.
    mining : MiningSettings, optional
        How SVMs are trained and hard negatives found.
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
    moves : int
        How often box regression moves windows: at 2 the 100 best of each class are pooled again where they
        were moved to, scored and moved once more, and the mean of both scores counts. Nothing moves where
        the network is trained.
    nms_iou : float, optional
        Detections of a class that overlap a better one by more are dropped; by default 0.3 as in the paper,
        or 0.5 of a network that proposes windows, whose boxes are closer.
    limit : int
        Most detections of a class in an image.
    folds : int
        Into how many folds the fit deals its photos to find out what scores mean and how good they are, each
        fold scored by what was learned from the others. Of more than 500 photos, and where layers are tuned,
        one fold of at most 300 photos is held out instead. Less than 2: nothing is measured, and scores mean
        what they did elsewhere.
    seed : int
        Seed of every random draw.

    Attributes
    ----------
    fitted_ : Fitted
        What `fit` learned.

    Examples
    --------
    >>> from sppnet.photos import demo_photo
    >>> found = Detector.load("animals").predict(demo_photo())
    >>> found.labels
    ('cow', 'cow', 'cow')
    """

    fitted_: Fitted

    def __init__(
        self,
        backbone: str | None = None,
        *,
        stages: tuple[str, ...] = ("head",),
        output_stride: int = 16,
        device: str = "cpu",
        scales: tuple[int, ...] = (240, 336, 480, 672),
        levels: tuple[int, ...] = (3, 2, 1),
        projection: str = "released",
        scale_rule: str = "paper",
        reference: float | None = None,
        proposals: str = PROPOSALS,
        layer: str = "pool",
        tuning: Tuning | None = None,
        objectness: Objectness | None = None,
        joint: Joint | None = None,
        mining: MiningSettings | None = None,
        negative_iou: float = 0.3,
        negatives: str = "all",
        regression_iou: float = 0.5,
        regression_windows: int = 4000,
        ridge: float = 1000.0,
        moves: int = 1,
        nms_iou: float | None = None,
        limit: int = 100,
        folds: int = 8,
        seed: int = 0,
    ) -> None:
        self.backbone, self.stages, self.output_stride = backbone, stages, output_stride
        self.device = device
        self.scales, self.levels, self.projection = scales, levels, projection
        self.scale_rule, self.reference, self.proposals = scale_rule, reference, proposals
        self.layer, self.tuning, self.objectness, self.mining = layer, tuning, objectness, mining
        self.joint = joint
        self.negative_iou, self.negatives, self.nms_iou = negative_iou, negatives, nms_iou
        self.regression_iou, self.regression_windows, self.ridge = regression_iou, regression_windows, ridge
        self.limit, self.folds, self.seed, self.moves = limit, folds, seed, moves

    @property
    def pooling(self) -> WindowPooling:
        """How windows become vectors."""
        side = self.fitted_.side if self.__sklearn_is_fitted__() else None
        if side is not None:
            return replace(self._pooling, scales=(side,))
        return self._pooling

    @property
    def _pooling(self) -> WindowPooling:
        """How windows become vectors where the network does not propose them."""
        return WindowPooling(
            self.scales,
            self.levels,
            projection=self.projection,
            scale_rule=self.scale_rule,
            reference=self.reference,
        )

    @property
    def settings(self) -> FitSettings:
        """How a fit goes.

        Raises
        ------
        SppnetError
            If a setting is none of its kind, or there is a layer without tuning.
        """
        check_choice("layer", self.layer, LAYERS)
        if self.moves < 1:
            raise SppnetError(f"found {self.moves} moves of windows, expected at least 1")
        if self.layer != "pool" and self.tuning is None:
            raise SppnetError(
                f"found the layer {self.layer} without tuning, expected tuning, which trains it"
            )
        return FitSettings(
            self._pooling,
            self.layer,
            self.tuning,
            self.objectness or (Objectness() if self.proposals == MAPS else None),
            self.mining or MiningSettings(),
            SamplingRules(self.negative_iou, self.regression_iou, self.regression_windows, self.negatives),
            self.ridge,
            self.seed,
            NMS_IOU if self.nms_iou is None else self.nms_iou,
            self.limit,
            self.folds,
            self.proposals == MAPS,
            self.moves,
            self.joint,
        )

    @property
    def suppression(self) -> float:
        """From which overlap on a detection of a class drops another: `nms_iou`, or its default."""
        if self.nms_iou is not None:
            return self.nms_iou
        return NMS_IOU if self.fitted_.side is None else OWN_NMS_IOU

    @property
    def classes_(self) -> tuple[str, ...]:
        """Names of the classes that it was fitted to."""
        self._check_fitted()
        return self.fitted_.classes

    @property
    def thresholds_(self) -> npt.NDArray[np.float32]:
        """Least probability of a detection of each class, unless another is asked for: (K,)."""
        self._check_fitted()
        return self.fitted_.thresholds

    def fit(
        self,
        data: Sequence[Sample],
        *,
        classes: Sequence[str] | None = None,
        windows: Sequence[Boxes] | None = None,
        max_bad: float = 0.01,
        minutes: float | None = None,
        **options: Unpack[WorkOptions],
    ) -> Detector:
        """Fit one SVM and one box regression per class, from the settings alone: a second fit starts anew.

        Goes through the images twice: for the positives, then for the hard negatives. Feature maps are kept
        on disk in between, in half precision, so memory does not grow with the number of images.

        Parameters
        ----------
        data : sequence of Sample
            The annotated images, such as `sppnet.read_dataset` reads.
        classes : sequence of str, optional
            The classes to learn; by default all that have an example which is neither difficult nor a crowd.
        windows : sequence of (R, 4) float32, optional
            Candidate windows of each image; by default those of `proposals`.
        max_bad : float
            Share of the photos that may be unreadable; these are left out, with a warning. They are found
            while windows are proposed.
        minutes : float, optional
            Train the network, too, as well as so much time allows: see `joint`, whose own defaults hold where
            it is None. If `joint` is set and this is not: until it no longer gains, at most 10.
        **options
            How it goes about its work. ``cache``: folder for the feature maps, to resume an interrupted fit;
            by default a temporary one. ``track``: a callable, ``track(items, description)`` yields the items
            and may draw progress. ``timer``: a `sppnet.progress.StageTimer`, which takes the seconds by
            stage. ``keep``: a callable, which takes the detector whenever there is a first or another one
            while the network is trained. ``shards``, ``memory``, ``rounds`` or ``cluster``: fit in rounds
            over shards of the photos, so that no process holds the windows of all; see
            `sppnet.detection.rounds.Sharding`, and ``memory`` is in GB. ``cluster`` is who does the shards,
            such as a `sppnet.cluster.Cluster`; by default this process, one after the other. The network, and
            layers above it, stay as they are then.

        Returns
        -------
        Detector
            Itself.

        Raises
        ------
        SppnetError
            If there are no images, a class has no example (said before any work), more photos than `max_bad`
            allows cannot be read, or a setting is none of its kind.
        """
        track, timer = options.get("track", no_track), options.get("timer") or StageTimer()
        settings, sharding = self._asked(minutes, windows), _sharding_of(options)
        if sharding is not None:
            _check_frozen(settings)
        check_data(data)
        _warn_of_crowds(data, self.limit)
        names = classes_to_learn(data, classes)
        backbone = self._ready(settings)
        own = backbone.proposes or settings.joint is not None
        seen = self._seen_before(data) if own else None
        if sharding is not None:
            given = windows is not None and not own
            source = Source(None if own or given else self.proposals, given, max_bad, options.get("cluster"))
            examples = _as_given(data, names, windows)
            with _folder(options.get("cache")) as folder:
                work = Work(folder, track, timer)
                self._fit_in_rounds(examples, settings, backbone, work, source, sharding, seen)
            return self
        examples = self._examples(data, names, windows, max_bad, Work(Path(), track, timer), own)
        with _folder(options.get("cache")) as folder:
            work = Work(folder, track, timer)
            if own:
                self._fit_own(examples, settings, backbone, work, minutes, options.get("keep"), seen)
            else:
                self.fitted_ = fit(examples, settings, backbone, work)
        return self

    def _asked(self, minutes: float | None, windows: object) -> FitSettings:
        """Return the settings of a fit that takes so long, checked as far as that goes without data."""
        settings = self.settings
        if minutes is not None:
            settings = replace(settings, joint=self.joint or Joint())
        _check_joint(settings, minutes, windows)
        learning = {
            "training the network": settings.joint,
            "training layers": settings.tuning,
            "learning to propose windows from maps": settings.objectness,
        }
        for purpose, learns in learning.items():
            if learns is not None:
                check_extra("torch", purpose)
        return settings

    def _ready(self, settings: FitSettings) -> Backbone:
        """Return the backbone to fit on or to start from; one that cannot run or learn is an error now."""
        backbone = self._backbone(settings)
        if self.tuning is not None and self.tuning.stage is not None:
            backbone.graph.facts.check_tunable(self.tuning.stage)
        backbone.compile()
        return backbone

    def _fit_own(
        self,
        examples: Examples,
        settings: FitSettings,
        backbone: Backbone,
        work: Work,
        minutes: float | None,
        keep: Callable[[Detector], None] | None,
        seen: Fitted | None,
    ) -> None:
        """Fit on windows that the network proposes itself; `keep` takes the detector on the way."""
        # Imported late: it is needed here alone.
        from sppnet.detection.joint import Budget, JointFit

        def known(fitted: Fitted) -> None:
            self.fitted_ = fitted
            if keep is not None:
                keep(self)

        settings = self._for_own_windows(settings)
        settings = settings if seen is None else replace(settings, folds=0)
        fitted = JointFit(examples, settings, backbone, work, Budget(minutes, known)).fit()
        self.fitted_ = fitted if seen is None else fitted.as_measured(seen)

    def _fit_in_rounds(
        self,
        examples: Examples,
        settings: FitSettings,
        backbone: Backbone,
        work: Work,
        source: Source,
        sharding: Sharding,
        seen: Fitted | None,
    ) -> None:
        """Fit in rounds over shards; the windows are proposed shard by shard, unless they are given."""
        side = None
        if backbone.proposes:
            # Imported late: it is needed for such networks alone.
            from sppnet.detection.joint import side_of

            side = side_of(examples, settings)
            pooling = replace(settings.pooling, scales=(side,))
            settings = self._for_own_windows(replace(settings, pooling=pooling))
        if seen is not None:
            settings = replace(settings, folds=0)
        fitted = replace(fit_in_rounds(examples, settings, backbone, work, source, sharding), side=side)
        self.fitted_ = fitted if seen is None else fitted.as_measured(seen)

    def _seen_before(self, data: Sequence[Sample]) -> Fitted | None:
        """Return what goes on learning, if it has seen some of the photos: these say nothing of new ones."""
        if self.backbone is None or Path(self.backbone).suffix != ".safetensors":
            return None
        other = Detector.load(self.backbone)
        seen = other.seen(data)
        if not seen:
            return None
        warnings.warn(
            f"{self.backbone}: its network has seen {seen} of these {len(data)} photos; what scores mean, "
            "and how good it is, stay as they were found before",
            stacklevel=3,
        )
        return other.fitted_

    def _backbone_of(self, name: str, stages: tuple[str, ...], stride: int) -> Backbone:
        """Return the backbone of another detector, trained or not."""
        other = Detector.load(name, device=self.device).fitted_.backbone
        if other.proposes or (other.stages, other.output_stride) == (stages, stride):
            return other
        return Backbone(other.graph, stages, stride, self.device).retuned(other.tuned)

    def _for_own_windows(self, settings: FitSettings) -> FitSettings:
        """Return the settings of a fit on a network that proposes windows: other SVMs, if none are set."""
        mining = self.mining or MiningSettings(C=OWN_C)
        nms_iou = OWN_NMS_IOU if self.nms_iou is None else self.nms_iou
        return replace(settings, mining=mining, nms_iou=nms_iou)

    def _backbone(self, settings: FitSettings) -> Backbone:
        """Return where the features come from, or where the network starts from."""
        name, stages, stride = self.backbone, self.stages, self.output_stride
        if name is None:
            name = DEFAULT if settings.joint is None else PYRAMID
        if Path(name).suffix == ".safetensors":
            return self._backbone_of(name, stages, stride)
        if read_graph(backbone_path(name)).facts.proposes:
            stages, stride = STAGES, max(STRIDES)
        return Backbone.shared(name, stages, stride, self.device)

    def add_class(
        self,
        name: str | Sequence[str],
        data: Sequence[Sample],
        *,
        windows: Sequence[Boxes] | None = None,
        max_bad: float = 0.01,
        cache: str | Path | None = None,
        track: Track = no_track,
        timer: StageTimer | None = None,
    ) -> Detector:
        """Learn one more class, or several, and leave the others exactly as they are.

        One-vs-rest SVMs make that free. Parameters and errors are those of `fit`; a class that the detector
        already has is an error. What the scores of the new classes mean is found out as in `fit`; layers that
        were tuned on the same photos have seen them.
        """
        self._check_fitted()
        names = [name] if isinstance(name, str) else class_names(name)
        for each in names:
            if each in self.classes_:
                there = ", ".join(self.classes_)
                raise SppnetError(f"class {each!r} is already there; the detector has {there}")
        check_data(data)
        names = classes_to_learn(data, names)
        timer = timer or StageTimer()
        _warn_of_crowds(data, self.limit)
        own, settings = self.fitted_.side is not None, replace(self.settings, pooling=self.pooling)
        settings = self._for_own_windows(settings) if own else settings
        examples = self._examples(data, names, windows, max_bad, Work(Path(), track, timer), own)
        with _folder(cache) as folder:
            self.fitted_ = fit_more(self.fitted_, examples, settings, Work(folder, track, timer))
        return self

    def learn_objectness(
        self,
        data: Sequence[Sample],
        objectness: Objectness | None = None,
        *,
        cache: str | Path | None = None,
        track: Track = no_track,
        timer: StageTimer | None = None,
    ) -> Detector:
        """Learn to propose windows from the maps, for ``proposals="maps"``; all else stays as it is.

        Parameters
        ----------
        data : sequence of Sample
            The annotated images; what is no class of the detector teaches nothing.
        objectness : Objectness, optional
            How it is fitted; stays as it is.
        cache, track, timer
            See `fit`.

        Returns
        -------
        Detector
            Itself.

        Raises
        ------
        NotFittedError
            If the detector is not fitted.
        SppnetError
            If PyTorch is not installed, or no image shows an object of its classes.
        """
        self._check_fitted()
        check_extra("torch", "learning to propose windows from maps")
        check_data(data)
        settings = replace(self.settings, objectness=objectness or Objectness())
        images, targets = [sample.image for sample in data], [sample.target for sample in data]
        none = [np.zeros((0, 4), np.float32)] * len(images)
        with _folder(cache) as folder:
            work = Work(folder, track, timer or StageTimer())
            learned = fit_objectness(
                Examples(images, none, targets, self.classes_), settings, self.fitted_.backbone, work
            )
        self.objectness, self.fitted_ = settings.objectness, replace(self.fitted_, objectness=learned)
        return self

    def _examples(
        self,
        data: Sequence[Sample],
        names: Sequence[str],
        windows: Sequence[Boxes] | None,
        max_bad: float,
        work: Work,
        own: bool = False,
    ) -> Examples:
        """Return what to learn from; where windows are to be proposed, without photos that cannot be read.

        With `own`, the network proposes them later.
        """
        if windows is None:
            bad: list[Exception] = []
            kept, windows, total = [], [], len(data)
            found = _readable(data) if own else self._proposed(data)
            doing = "Looking into the photos" if own else "Proposing windows"
            with work.timer("read" if own else "proposals"):
                for sample in work.track(data, doing):
                    proposed = next(found)
                    if isinstance(proposed, Exception):
                        bad.append(proposed)
                        check_bad(bad, total, max_bad)
                    else:
                        kept.append(sample)
                        windows.append(proposed.boxes)
            tell_bad(bad, total)
            data = kept
        images, targets = [sample.image for sample in data], [sample.target for sample in data]
        return Examples(images, windows, targets, tuple(names))

    def _proposed(self, data: Sequence[Sample]) -> Iterator[Windows | Exception]:
        """Yield the windows of photos; those that maps propose come later, of what the default ones show."""
        method = parse(PROPOSALS if self.proposals == MAPS else self.proposals)
        return propose_each([sample.image for sample in data], method, cache_folder())

    def encode(self, image: Image) -> EncodedImage:
        """Compute the maps of an image, the expensive step, once for any number of questions.

        Parameters
        ----------
        image : path, str, PIL.Image.Image or (H, W, 3) uint8 RGB
            See `sppnet.images.pixels_of`.
        """
        self._check_fitted()
        return self.fitted_.backbone.encode(image, self.pooling.scales)

    def predict(
        self,
        image: Image | EncodedImage,
        windows: Boxes | None = None,
        *,
        proposals: str | None = None,
        regress: bool = True,
        threshold: float | None = None,
        scores: Scores = "probability",
        timer: StageTimer | None = None,
    ) -> Detections:
        """Detect objects in one image.

        Parameters
        ----------
        image : path, str, PIL.Image.Image, (H, W, 3) uint8 RGB, or EncodedImage
            See `sppnet.images.pixels_of`. Any number of sets of windows can be tried on what `encode` gave.
        windows : (R, 4) float32, optional
            Candidate windows in pixels of the image; by default those of `proposals`.
        proposals : str, optional
            Other candidate windows than the detector's own.
        regress : bool
            Whether boxes are moved by the box regression.
        threshold : float, optional
            Least probability; by default that of each class, ``fitted_.thresholds``. At 0 all is returned
            that the SVM gives -1.5 or more (as in the released code).
        scores : {"probability", "svm"}
            What the scores of the result are: probabilities, or what the SVMs give.
        timer : StageTimer, optional
            Takes the seconds of the stages proposals, backbone, pooling and scoring.

        Returns
        -------
        Detections
            After suppression class by class, by falling score; boxes clipped to the image.

        Raises
        ------
        NotFittedError
            If the detector is not fitted.
        SppnetError, FileNotFoundError
            If the image cannot be read, or an encoded image comes without windows and its maps are not to
            propose any.
        """
        self._check_fitted()
        timer = timer or StageTimer()
        pixels = None
        if not isinstance(image, EncodedImage):
            pixels = pixels_of(image)
            with timer("backbone"):
                image = self.encode(pixels)
        if windows is None:
            with timer("proposals"):
                windows = self.propose(pixels, image, proposals)
        boxes, margins = self.score(image, windows, regress=regress, timer=timer)
        with timer("scoring"):
            limits = self.suppression, self.fitted_.least_score, self.limit
            found = postprocess(boxes, margins, self.classes_, image.size, *limits)
            likely = self.thresholds_ if threshold is None else threshold
            return self.fitted_.calibration.applied(found, self.classes_, likely, scores)

    def for_threads(self, count: int) -> Detector:
        """Return the same detector for `count` threads at once, on the CPU each with its share of the cores.

        Many images take less time so, and a single one more.
        """
        self._check_fitted()
        return self._with(backbone=self.fitted_.backbone.for_threads(count))

    def prepare(self) -> None:
        """Do now what the first image would wait for: compile the network."""
        self._check_fitted()
        self.fitted_.backbone.compile()

    def propose(self, image: Pixels | None, encoded: EncodedImage, proposals: str | None = None) -> Boxes:
        """Return the (R, 4) candidate windows that the detector takes of an image, best first.

        Parameters
        ----------
        image : (H, W, 3) uint8 RGB or None
            The pixels, if the windows come from these.
        encoded : EncodedImage
            Its maps.
        proposals : str, optional
            Other candidate windows than the detector's own.

        Raises
        ------
        SppnetError
            If the windows come from the pixels, and there are none.
        """
        method = self.proposer(proposals)
        if method is None and encoded.windows is not None:
            return encoded.windows.boxes
        if method is None:
            assert self.fitted_.objectness is not None
            return self.fitted_.objectness.propose(encoded).boxes
        if image is None:
            raise SppnetError(
                "found an encoded image without windows, expected some: this detector's come from the pixels"
            )
        return method(image).boxes

    def score(
        self,
        encoded: EncodedImage,
        windows: Boxes,
        *,
        regress: bool = True,
        timer: StageTimer | None = None,
    ) -> tuple[Boxes, npt.NDArray[np.float32]]:
        """Score all windows and move them, without suppression; arguments as in `predict`.

        Returns
        -------
        (R, K, 4) float32
            The windows as each class's regression moves them; they may reach beyond the image.
        (R, K) float32
            Scores of the SVMs.
        """
        self._check_fitted()
        scored = partial(self._scored, encoded, regress=regress, timer=timer or StageTimer())
        found = scored(np.asarray(windows, dtype=np.float32).reshape(-1, 4))
        return moved_again(scored, found, encoded.size, self.fitted_, self.moves - 1 if regress else 0)

    def _scored(self, encoded: EncodedImage, places: Boxes, *, regress: bool, timer: StageTimer) -> Scored:
        """Score windows and move them once, in blocks that the memory holds."""
        boxes, scores = [], []
        start, size = 0, BLOCK
        while start < max(len(places), 1):
            part = places[start : start + size]
            try:
                moved, value = self._score_block(encoded, part, regress, timer)
            except _out_of_memory():
                if size <= SMALLEST_BLOCK:
                    raise
                size //= 2
                sys.modules["torch"].cuda.empty_cache()
                device = self.fitted_.backbone.device
                warnings.warn(
                    f"out of memory on {device}: going on with {size} windows at a time", stacklevel=2
                )
                continue
            boxes.append(moved)
            scores.append(value)
            start += size
        return np.concatenate(boxes), np.concatenate(scores)

    def _score_block(
        self, encoded: EncodedImage, windows: Boxes, regress: bool, timer: StageTimer
    ) -> tuple[Boxes, npt.NDArray[np.float32]]:
        with timer("pooling"):
            pooled = self.pooling(encoded, windows)
        with timer("scoring"):
            return self.fitted_.score(pooled, windows, self.layer, regress, encoded.windows)

    def proposer(self, proposals: str | None = None) -> Proposer | None:
        """Return what proposes windows from pixels, by another method if asked; None where the maps do.

        Raises
        ------
        SppnetError
            If there is no such method, or the maps are to propose and no objectness was fitted.
        """
        self._check_fitted()
        if self.fitted_.side is not None and proposals in (None, MAPS):
            return None
        name = proposals or self.proposals
        if name != MAPS:
            return parse(name)
        if self.fitted_.objectness is None:
            raise SppnetError(
                "found the proposals 'maps' for a detector without objectness, expected a method, such as "
                f"{self.proposals}"
            )
        return None

    def seen(self, data: Sequence[Sample]) -> int:
        """Return how many of some images are among those that the detector was fitted on."""
        keys = photo_keys(sample.image for sample in data)
        return int(np.isin(keys, self.fitted_.photos).sum())

    def with_thresholds(self, thresholds: Mapping[str, float]) -> Detector:
        """Return the detector with other thresholds of some classes, as probabilities.

        Raises
        ------
        SppnetError
            If it does not know a class, or a threshold is no probability.
        """
        chosen = dict(zip(self.classes_, self.thresholds_.tolist(), strict=True))
        for name, value in thresholds.items():
            if name not in chosen:
                raise SppnetError(f"found a threshold of {name!r}, expected one of {', '.join(chosen)}")
            if not 0 <= value <= 1:
                raise SppnetError(f"found the threshold {value:g} of {name}, expected a probability, 0 to 1")
            chosen[name] = value
        return self._with(thresholds=np.array(list(chosen.values()), np.float32))

    def renamed(self, names: Mapping[str, str]) -> Detector:
        """Return the detector with other names of some classes, from old to new.

        Raises
        ------
        SppnetError
            If it does not know a class, or two would have one name.
        """
        strange = [name for name in names if name not in self.classes_]
        if strange:
            raise SppnetError(f"found the class {strange[0]!r}, expected one of {', '.join(self.classes_)}")
        classes = tuple(names.get(name, name) for name in self.classes_)
        twice = next((name for name in classes if classes.count(name) > 1), None)
        if twice is not None:
            raise SppnetError(f"found two classes of the name {twice!r}, expected one")
        return self._with(classes=classes)

    def calibrated(
        self,
        data: Sequence[Sample],
        *,
        proposals: str | None = None,
        max_bad: float = 0.01,
        track: Track = no_track,
        timer: StageTimer | None = None,
    ) -> Detector:
        """Return the detector with probabilities, thresholds and quality as other photos tell them.

        Where it will look at photos of another kind than it was fitted on, some annotated ones of these tell
        what its scores mean there. What it finds stays; classes that are not shown keep what they had.

        Parameters
        ----------
        data : sequence of Sample
            Annotated images, none of which it was fitted on.
        proposals, max_bad, track, timer
            See `evaluate`.

        Raises
        ------
        SppnetError
            If it was fitted on some of the images, or more than `max_bad` allows cannot be read.
        """
        check_data(data)
        if seen := self.seen(data):
            raise SppnetError(
                f"the detector was fitted on {seen} of these {len(data)} photos, expected others: what it "
                "makes of these says little of new ones"
            )
        asked = Asked(self.proposer(proposals), {"threshold": 0.0, "scores": "svm"}, timer or StageTimer())
        looked = look(self, data, asked, track, max_bad)
        measured = np.ones((len(looked.kept), len(self.classes_)), bool)
        targets = [sample.target for sample in looked.kept]
        learned = learn_scores(looked.found, targets, self.classes_, measured, 1)
        fitted = self.fitted_
        before = Learned(fitted.calibration, fitted.thresholds, fitted.quality)
        return self._with(**learned.where(learned.quality.objects > 0, before)._asdict())

    def _with(self, **learned: Any) -> Detector:
        """Return a detector that differs in some of what was fitted."""
        self._check_fitted()
        other = copy.copy(self)
        other.fitted_ = replace(self.fitted_, **learned)
        return other

    def compressed(self, ranks: Sequence[int]) -> Detector:
        """Return the detector with its fully connected layers replaced by thin ones; see `Head.compressed`.

        Raises
        ------
        SppnetError
            If it has none, or the ranks do not fit.
        """
        self._check_fitted()
        if self.fitted_.head is None:
            raise SppnetError("found a detector without fully connected layers, expected one on fc6 or fc7")
        return self._with(head=self.fitted_.head.compressed(ranks))

    def save(self, path: str | Path) -> None:
        """Write the detector to one safetensors file that holds everything needed to run it.

        Raises
        ------
        NotFittedError
            If the detector is not fitted.
        OSError
            If the file cannot be written; an older one stays as it was.
        """
        self._check_fitted()
        tensors, facts = state_of(self.fitted_)
        settings = self.get_params(deep=False)
        del settings["device"]
        for name in ("tuning", "mining", "joint"):
            settings[name] = None if settings[name] is None else asdict(settings[name])
        objectness = self.fitted_.objectness
        settings["objectness"] = None if objectness is None else objectness.get_params(deep=False)
        write_detector(path, tensors, {**facts, "settings": settings, "sppnet": __version__})

    @classmethod
    def load(cls, name: str | Path, *, device: str = "cpu") -> Detector:
        """Read a detector that `save` wrote, or one that comes with sppnet.

        Parameters
        ----------
        name : path or str
            A file, or the name of a shipped detector: ``"animals"`` finds cats, cows, dogs, horses, people
            and sheep.
        device : str
            ``"cpu"``, or a PyTorch device.

        Raises
        ------
        SppnetError
            If there is no shipped detector of that name (the message names those that are near), or the file
            is damaged, not a detector, of another version, or was fitted on other weights of a backbone
            than come with sppnet.
        FileNotFoundError
            If there is no such file.
        """
        path = model_path(name)
        facts = read_facts(path)
        settings = _tuples(facts["settings"])
        kinds: dict[str, Callable[..., Any]] = {
            "tuning": Tuning,
            "mining": MiningSettings,
            "objectness": Objectness,
            "joint": Joint,
        }
        for kind, make in kinds.items():
            settings[kind] = None if settings[kind] is None else make(**_tuples(settings[kind]))
        detector = cls(**settings, device=device)
        kept = (detector.layer, detector.objectness, detector.pooling)
        detector.fitted_ = fitted_of(path, facts, *kept, device)
        return detector


def _readable(data: Sequence[Sample]) -> Iterator[Windows | Exception]:
    """Yield no windows of each photo, or why it cannot be read."""
    none = Windows(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))
    for sample in data:
        try:
            pixels_of(sample.image)
            yield none
        except (SppnetError, OSError) as error:
            yield error


def _warn_of_crowds(data: Sequence[Sample], limit: int) -> None:
    """Warn where photos show more objects of a class than detections are given."""
    counts = [Counter(sample.target.labels).most_common(1) for sample in data]
    most = max((found[0][1] for found in counts if found), default=0)
    if most > limit:
        warnings.warn(
            f"found a photo with {most} objects of a class, and {limit} as the most detections of one: no "
            "more are shown; limit (--limit) sets another number",
            stacklevel=3,
        )


def _check_joint(settings: FitSettings, minutes: float | None, windows: object) -> None:
    """Raise an error unless a training of the network can go as it was asked for."""
    if settings.joint is None:
        return
    if minutes is not None and not minutes > 0:
        raise SppnetError(f"found {minutes:g} minutes, expected more than 0")
    if settings.moves > 1:
        raise SppnetError(
            f"found {settings.moves} moves of windows for a network that is trained, expected 1: its own stay"
        )
    if windows is not None:
        raise SppnetError("found windows for a network that is trained to propose its own, expected none")
    if settings.tuning is not None or settings.objectness is not None:
        other = "tuning" if settings.tuning is not None else "an objectness"
        raise SppnetError(f"found {other} beside the training of the whole network, expected one of them")


def _sharding_of(options: WorkOptions) -> Sharding | None:
    """Return how a fit is cut into shards, None where it is not."""
    shards, memory, rounds = options.get("shards"), options.get("memory"), options.get("rounds")
    if all(value is None for value in (shards, memory, rounds, options.get("cluster"))):
        return None
    return Sharding(shards, None if memory is None else 1e9 * memory, ROUNDS if rounds is None else rounds)


def _check_frozen(settings: FitSettings) -> None:
    """Raise an error unless a fit leaves the network as it is, and all below the SVMs."""
    for what in ("joint", "tuning", "objectness"):
        if getattr(settings, what) is not None:
            raise SppnetError(
                f"found {what} beside shards, a memory or a cluster, expected SVMs on the network as it is: "
                "what learns otherwise sees all photos in one process"
            )


def _as_given(data: Sequence[Sample], names: Sequence[str], windows: Sequence[Boxes] | None) -> Examples:
    """Return annotated images with the windows that were given, none where they are to be proposed."""
    images, targets = [sample.image for sample in data], [sample.target for sample in data]
    none = np.zeros((0, 4), np.float32)
    return Examples(images, [none] * len(images) if windows is None else windows, targets, tuple(names))


def _out_of_memory() -> tuple[type[Exception], ...]:
    """Return what is raised where a device's memory is full: PyTorch's own error, if it is loaded."""
    torch = sys.modules.get("torch")
    return () if torch is None else (torch.OutOfMemoryError,)


def _tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as they were before JSON made lists of their tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def classes_to_learn(data: Sequence[Sample], asked: Sequence[str] | None = None) -> list[str]:
    """Return the names of the classes with an example that is neither difficult nor a crowd, sorted.

    Parameters
    ----------
    data : sequence of Sample
        The annotated images.
    asked : sequence of str, optional
        Return these names instead, each once.

    Raises
    ------
    SppnetError
        If there is no class, or one that is asked for has no example.
    """
    labels = {label: 0 for sample in data for label in sample.target.labels}
    for sample in data:
        for label, ignored in zip(sample.target.labels, sample.target.ignored, strict=True):
            labels[label] += not ignored
    names = sorted(filter(labels.get, labels)) if asked is None else list(dict.fromkeys(class_names(asked)))
    missing = [name for name in names if name not in labels]
    ignored = [name for name in names or sorted(labels) if not labels.get(name)]
    place = f"{data.root}: " if isinstance(data, Dataset) else ""
    if missing or not labels:
        found = f"no object of {', '.join(map(repr, missing))}" if missing else "no object"
        there = ", ".join(sorted(labels)) or "annotated objects"
        raise SppnetError(f"{place}found {found} in {len(data)} images, expected {there}")
    if ignored:
        raise SppnetError(
            f"{place}all examples of {', '.join(ignored)} in {len(data)} images are difficult or crowds, "
            "expected one to learn from"
        )
    return names


@contextmanager
def _folder(cache: str | Path | None) -> Iterator[Path]:
    """Yield the folder for the maps of a fit, by default a temporary one."""
    if cache is not None:
        yield Path(cache)
        return
    with TemporaryDirectory(prefix="sppnet-") as temporary:
        yield Path(temporary)
