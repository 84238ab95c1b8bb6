"""A fit that trains the network, too: backbone, feature pyramid and region proposals, then SVMs on its maps.

What comes of it is what the paper's best detector is, SVMs on the pooled maps of a fine-tuned network
(section 4.1), but that the network itself proposes the windows (Ren et al., "Faster R-CNN") and learns by
them. It goes by time. A detector on the network as it comes is first; then the network learns without some
photos, which tell how good it is and what its scores mean; then with all of them.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from sppnet.arrays import FloatArray
from sppnet.detection.fit import FitSettings, Fitted, Work, fit, fit_without, folds_of, scores_learned
from sppnet.detection.quality import Learned
from sppnet.detection.sampling import Examples
from sppnet.features.backbone import Backbone
from sppnet.features.graph import STAGES, STRIDES
from sppnet.images import image_size, pixels_of

if TYPE_CHECKING:
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
# What is left to do after training takes so many seconds, and so many a photo, until that was measured.
_SECONDS, _SECONDS_PER_PHOTO = 4.0, 0.12
# It takes up to so many times as long as it did.
_SPARE = 1.2


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
        from sppnet.rpn.pictures import kept_photo, side_for

        self.examples, self.start, self.work, self.budget = examples, start, work, budget
        self.joint, self.photos = settings.joint, []
        sizes: list[tuple[int, int]] = []
        for image, target in zip(
            work.track(examples.images, "Reading photos"), examples.targets, strict=True
        ):
            if self.joint is None:
                sizes.append(image_size(image) if isinstance(image, Path) else image.shape[:2])
                continue
            pixels = pixels_of(image)
            sizes.append((pixels.shape[0], pixels.shape[1]))
            self.photos.append(kept_photo(pixels, target, examples.classes))
        one = settings.pooling.scales[0] if len(settings.pooling.scales) == 1 else None
        asked = one if self.joint is None else self.joint.side
        self.side = asked or side_for(sizes, examples.targets)
        self.settings = replace(settings, pooling=replace(settings.pooling, scales=(self.side,)))
        self.folds = folds_of(examples, settings, one=True)
        self.history: list[tuple[float, float]] = []
        self.trained = 0.0
        self.cost = _SECONDS + _SECONDS_PER_PHOTO * len(examples)

    def fit(self) -> Fitted:
        """Fit as well as the time allows; an interruption from the keyboard ends the training early."""
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
        rest = np.flatnonzero(self.folds.numbers < 0).tolist()
        seconds, before = self._share(), -1.0
        while True:
            self._train(trainer, rest, seconds, _WITHOUT)
            begun, tuned = time.monotonic(), self._tuned(trainer)
            with self._folder() as work:
                model = fit_without(self.examples, self._after, tuned, work, self.folds)
                learned = scores_learned([model], self.folds, self.examples, self._after, work)
            self.cost = time.monotonic() - begun
            after = learned.quality.mean_ap
            gain, before = after - before, after
            self._measured(before)
            if model.classes == self.examples.classes:
                self._kept(replace(model, side=self.side, history=self._curve, **learned._asdict()))
            seconds = self.trained
            limited = self.budget.minutes is not None or self._counted is not None
            if limited or gain < _GAIN or self.budget.left < 3 * (seconds + self.cost):
                return learned

    @property
    def _after(self) -> FitSettings:
        """The settings of a fit on a trained network, which has seen the photos.

        Its windows fit them closely, so that box regressions would learn to leave others where they are.
        """
        return replace(self.settings, moves=False)

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
            fitted = fit(self.examples, settings, self._tuned(trainer), work)
        return replace(fitted, side=self.side, history=self._curve)

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
        self.history.append((self.budget.passed / 60, mean_ap))
