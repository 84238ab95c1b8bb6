"""A fit that trains the network, too: backbone, feature pyramid and region proposals, then SVMs on its maps.

What comes of it is what the paper's best detector is, SVMs on the pooled maps of a fine-tuned network
(section 4.1), but that the network itself proposes the windows (Ren et al., "Faster R-CNN") and learns by
them. It goes by time. A detector on the network as it comes is first; then the network learns without some
photos, which tell how good it is and what its scores mean; then with all of them.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import TYPE_CHECKING

import numpy as np

from sppnet.arrays import FloatArray, Image, IntArray
from sppnet.boxes import nms
from sppnet.detection.fit import FitSettings, Fitted, Work, fit, fit_without, folds_of, scores_learned
from sppnet.detection.folds import assign_folds, shown_classes
from sppnet.detection.quality import Learned
from sppnet.detection.sampling import Examples
from sppnet.errors import SppnetError
from sppnet.features.backbone import Backbone
from sppnet.features.graph import STAGES, STRIDES
from sppnet.images import image_size, photo_keys, pixels_of
from sppnet.pooling.regions import load_kernels

if TYPE_CHECKING:
    from sppnet.rpn.pictures import Photo
    from sppnet.rpn.training import Trainer

MOST = 10.0
"""Minutes that a fit takes at most where none are given."""

# Of the time for training, so much goes without the photos that are held out.
_WITHOUT = 0.45
# Without a limit, the first stretch of training takes so many seconds, each later one as long as all before.
_FIRST = 60.0
# A gain in mean average precision of less is none.
_GAIN = 0.005
# Training for fewer seconds teaches nothing.
_LEAST = 15.0
# What is left to do after training takes so many seconds, and so many passes of the network a photo, until
# that was measured; before, passes over some photos tell how long one takes.
_SECONDS, _PASSES, _TRIED = 4.0, 3.0, 4
# SVMs are fitted twice, and may take so much of the time together; of at least so many photos.
_SVMS, _FEWEST = 0.45, 100
# It takes up to so many times as long as it did.
_SPARE = 1.15


@dataclass
class Budget:
    """How long a fit may take.

    Attributes
    ----------
    minutes : float or None
        None: until it no longer gains, at most `MOST`.
    keep : callable
        Takes what was fitted as soon as there is something.
    """

    minutes: float | None = None
    keep: Callable[[Fitted], None] = lambda fitted: None
    _begun: float = field(default_factory=time.monotonic)

    @property
    def passed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._begun

    @property
    def most(self) -> float:
        """Minutes that it takes at most."""
        return MOST if self.minutes is None else self.minutes

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return 60 * self.most - self.passed


class JointFit:
    """One fit of network, SVMs and box regressions.

    Parameters
    ----------
    examples : Examples
        Their windows are not looked at: the network proposes others.
    settings : FitSettings
        Its `joint` says how the network learns; without, it stays as it is.
    start : Backbone
        Where the network starts from, with or without a pyramid.
    work : Work
    budget : Budget
    """

    def __init__(
        self, examples: Examples, settings: FitSettings, start: Backbone, work: Work, budget: Budget
    ) -> None:
        from sppnet.rpn.pictures import on_disk

        self.examples, self.start, self.work, self.budget = examples, start, work, budget
        self.joint, self.photos = settings.joint, []
        if self.joint is not None:
            work.folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=work.folder) as file:
                self.photos = on_disk(self._read(), file)
        self.side = side_of(examples, settings)
        self.settings = replace(settings, pooling=replace(settings.pooling, scales=(self.side,)))
        pace = 0.0
        if self.joint is not None:
            self.keys, pace = photo_keys(examples.images), _PASSES * self._pass()
            # The network learns from all photos, the SVMs from as many as there is time for.
            self.rows = self._taught(pace)
            self.examples = examples.part(self.rows.tolist())
        self.folds = folds_of(self.examples, settings, one=True)
        self.history: list[tuple[float, float]] = []
        self.trained = 0.0
        self.cost = _SECONDS + pace * len(self.examples)

    def _pass(self) -> float:
        """Return how many seconds the network takes for a photo, once it runs."""
        seconds = []
        for image in self.examples.images[:_TRIED]:
            begun = time.monotonic()
            self.start.encode(image, (self.side,))
            seconds.append(time.monotonic() - begun)
        return min(seconds)

    def _taught(self, pace: float) -> IntArray:
        """Return the photos that the SVMs learn from, at so many seconds for each: some of all classes."""
        count = len(self.examples)
        most = max(_FEWEST, int((_SVMS * 60 * self.budget.most / 2 - _SECONDS) / pace))
        if self._counted is not None or count <= most:
            return np.arange(count)
        shown = shown_classes(self.examples.targets, self.examples.classes)
        return np.flatnonzero(assign_folds(shown, self.keys, -(-count // most), self.settings.seed) == 0)

    def fit(self) -> Fitted:
        """Fit as well as the time allows; an interruption from the keyboard ends the training early."""
        # Compiled once for a machine: what a fit takes is measured without it.
        load_kernels()
        nms(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))
        first = self._first()
        if self.joint is None:
            assert first is not None
            return first
        if first is not None and self.budget.left < 2 * (self.cost + _LEAST):
            warnings.warn(self._too_short(), stacklevel=3)
            return first
        # Imported late, and with it PyTorch.
        from sppnet.rpn.training import Trainer

        trainer = Trainer(self.start.graph, self.examples.classes, self.joint, self.settings.seed)
        judged = self._without(trainer) if self.folds.count else None
        if first is not None and judged is not None and judged.quality.mean_ap < first.quality.mean_ap:
            return replace(first, history=self._curve)
        self._train(trainer, range(len(self.photos)), self._rest(), 1 - _WITHOUT)
        fitted = self._fitted(trainer, replace(self._after, folds=0))
        return fitted if judged is None else replace(fitted, **judged._asdict())

    def _read(self) -> Iterator[Photo]:
        """Yield the photos as training needs them."""
        from sppnet.rpn.pictures import kept_photo

        images = self.work.track(self.examples.images, "Reading photos")
        for image, target in zip(images, self.examples.targets, strict=True):
            yield kept_photo(pixels_of(image), target, self.examples.classes)

    def _first(self) -> Fitted | None:
        """Fit to the network as it comes, if it proposes windows: it has seen none of the photos."""
        if not self.start.proposes:
            return None
        begun = time.monotonic()
        with self._folder() as work:
            fitted = fit(self.examples, self.settings, self.start, work)
        self.cost = time.monotonic() - begun
        self._measured(fitted.quality.mean_ap)
        return self._kept(replace(fitted, side=self.side, history=self._curve))

    def _without(self, trainer: Trainer) -> Learned:
        """Train without the photos that are held out, and return what these tell."""
        held = self.keys[self.rows[self.folds.numbers >= 0]]
        rest = np.flatnonzero(~np.isin(self.keys, held)).tolist()
        seconds, before = self._share(), -1.0
        while True:
            self._train(trainer, rest, seconds, _WITHOUT)
            begun, tuned = time.monotonic(), self._tuned(trainer)
            with self._folder() as work:
                model = fit_without(self.examples, self._after, tuned, work, self.folds)
                self.cost = (time.monotonic() - begun) / max(float(np.mean(self.folds.numbers < 0)), 0.1)
                learned = scores_learned([model], self.folds, self.examples, self._after, work)
            after = learned.quality.mean_ap
            gain, before = after - before, after
            self._measured(before)
            if model.classes == self.examples.classes:
                self._kept(self._known(replace(model, **learned._asdict())))
            seconds = self.trained
            limited = self.budget.minutes is not None or self._counted is not None
            if limited or gain < _GAIN or self.budget.left < 3 * (seconds + self.cost):
                return learned

    @property
    def _after(self) -> FitSettings:
        """The settings of a fit on a trained network, which has seen the photos.

        Its windows fit them closely, so that box regressions would learn to leave others where they are.
        """
        return replace(self.settings, moves=0)

    def _share(self) -> float:
        """Return how many seconds to train without the photos that are held out."""
        if self.budget.minutes is None:
            return _FIRST
        return max(_LEAST, _WITHOUT * (self.budget.left - (1 + _SPARE) * self.cost))

    def _rest(self) -> float:
        """Return how many seconds to train with all photos: what is left, or as long as without some."""
        left = self.budget.left - _SPARE * self.cost
        if self.budget.minutes is None:
            left = min(left, max(self.trained, _FIRST))
        return max(_LEAST, left)

    @property
    def _counted(self) -> int | None:
        """How many pictures are seen, unless time counts."""
        return None if self.joint is None or self.budget.minutes is not None else self.joint.photos

    def _train(self, trainer: Trainer, rows: Sequence[int], seconds: float, share: float) -> None:
        """Train for some seconds or, where pictures count, for a share of them."""
        from sppnet.rpn.training import Clock

        clock = Clock(seconds=seconds)
        if self._counted is not None:
            clock = Clock(steps=max(1, round(share * self._counted / trainer.settings.batch)))
        with self.work.timer("training"):
            trainer.train([self.photos[i] for i in rows], self.side, clock, self.work.track)
        self.trained += clock.passed

    def _tuned(self, trainer: Trainer) -> Backbone:
        return Backbone(trainer.graph(self.start.name), STAGES, max(STRIDES), self.start.device)

    def _fitted(self, trainer: Trainer, settings: FitSettings) -> Fitted:
        with self._folder() as work:
            return self._known(fit(self.examples, settings, self._tuned(trainer), work))

    def _known(self, fitted: Fitted) -> Fitted:
        """Return what was fitted on the trained network, with what is known of it: it has seen all photos."""
        return replace(fitted, side=self.side, history=self._curve, photos=np.unique(self.keys))

    def _kept(self, fitted: Fitted) -> Fitted:
        self.budget.keep(fitted)
        return fitted

    @contextmanager
    def _folder(self) -> Iterator[Work]:
        """Yield where the maps of a network lie as long as they are needed: a trained one has others."""
        self.work.folder.mkdir(parents=True, exist_ok=True)
        if self.joint is None:
            yield self.work
            return
        with TemporaryDirectory(prefix="maps-", dir=self.work.folder, ignore_cleanup_errors=True) as place:
            yield replace(self.work, folder=Path(place))

    def _too_short(self) -> str:
        needed = (self.budget.passed + 2 * (self.cost + _LEAST)) / 60
        return (
            f"found {self.budget.most:g} minutes, expected {needed:.1f} or more to train the network on "
            f"{len(self.examples)} photos: the detector stands on the network as it comes"
        )

    @property
    def _curve(self) -> FloatArray:
        return np.array(self.history, np.float32).reshape(-1, 2)

    def _measured(self, mean_ap: float) -> None:
        """Note how good the network is now; nothing is known of that where no photo was held out."""
        if not math.isnan(mean_ap):
            self.history.append((self.budget.passed / 60, mean_ap))


def side_of(examples: Examples, settings: FitSettings) -> int:
    """Return the shorter side in pixels at which a network looks at photos that proposes windows itself.

    It is the one that the settings ask for, or else suits the smaller objects. A photo that cannot be read
    says nothing of it.
    """
    from sppnet.rpn.pictures import side_for

    one = settings.pooling.scales[0] if len(settings.pooling.scales) == 1 else None
    asked = one if settings.joint is None else settings.joint.side
    if asked:
        return asked
    sizes, targets = [], []
    for image, target in zip(examples.images, examples.targets, strict=True):
        try:
            sizes.append(_size(image))
        except (SppnetError, OSError):
            continue
        targets.append(target)
    return side_for(sizes, targets)


def _size(image: Image) -> tuple[int, int]:
    """Return height and width of an image."""
    if isinstance(image, str | Path):
        return image_size(image)
    height, width = pixels_of(image).shape[:2]
    return height, width
