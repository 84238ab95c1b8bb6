"""Windows proposed from the feature maps that the detector computes anyway, whatever the class of an object.

Two steps, the first as in Faster R-CNN's region proposals (Ren et al., arXiv 1506.01497), on a frozen
backbone. A small network looks at every cell of every scale and says of each anchor, a box of one size and
shape about the cell, how likely it is an object and how it is to be moved. The best are pooled from the few
channels of that network, then moved and scored once more by ridge regressions: two convex fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sppnet.arrays import Boxes, IntArray, Pixels, to_numpy
from sppnet.boxes import Target, Windows, clip, iou, nms
from sppnet.errors import SppnetError, check_extra
from sppnet.estimator import Estimator
from sppnet.features.encoded import EncodedImage, FeatureMaps
from sppnet.features.projection import choose_scale
from sppnet.progress import Track, no_track
from sppnet.proposals.anchors import AnchorNetwork, Floats, last_stage
from sppnet.proposals.method import Proposer, ranked
from sppnet.proposals.samples import Samples, sample_bins
from sppnet.proposals.truth import POSITIVE, Truth
from sppnet.regression import decode_deltas, encode_deltas, fit_ridge
from sppnet.storage import digest_of

# Best anchors of an image that are looked at, and the overlap from which one of two is enough.
ANCHORS, ANCHOR_IOU = 3000, 0.8
# A window is pooled with its surroundings, in bins of one sample each.
BINS, GROWTH = 5, 1.2
# Windows of an image, and of all, that teach the second step.
_TAUGHT_PER_IMAGE, _TAUGHT = 60, 30000
# Pooled features are scaled to this mean norm, so that one penalty fits every backbone, as in the detector.
_NORM = 20.0
LEAST_SIDE = 4.0

MAPS = "maps"
"""What stands for an objectness where the name of a method is asked for."""


class Objectness(Estimator, Proposer):
    """A proposal method that looks at feature maps: windows of objects of any class.

    Parameters
    ----------
    sizes : tuple of float
        Sides of the anchors (of the square of equal area) as multiples of `reference`. With several scales,
        every anchor stands for a smaller object at a larger scale.
    aspects : tuple of float
        Widths of the anchors over their heights.
    reference : float
        Side in pixels that a window should have at its scale; see `sppnet.features.projection.choose_scale`.
    width : int
        Number of channels inside the network.
    kernel : int
        Side, in cells, of the square about a cell that the network looks at; odd.
    limit : int
        Greatest number of windows of an image.
    nms_iou : float
        Windows that overlap a better one by more are dropped. Greater values give more windows about each
        object, and better places.
    ridge : float
        Penalty of the second step's regressions.
    steps : int
        Number of training steps, each on a few images.
    lr : float
        Highest learning rate of the training (AdamW).
    seed : int
        Seed of every random draw.

    Attributes
    ----------
    network_ : AnchorNetwork
        The first step, which scores and moves anchors.
    weights_, offsets_ : (5, D) and (5,) float32
        The second step: predicted overlap with an object, and four box deltas, of pooled windows.
    """

    network_: AnchorNetwork
    weights_: Floats
    offsets_: Floats

    def __init__(
        self,
        *,
        sizes: tuple[float, ...] = (0.25, 0.5, 1.0),
        aspects: tuple[float, ...] = (0.5, 1.0, 2.0),
        reference: float = 208,
        width: int = 128,
        kernel: int = 5,
        limit: int = 1000,
        nms_iou: float = 0.85,
        ridge: float = 1000,
        steps: int = 2000,
        lr: float = 2e-3,
        seed: int = 0,
    ) -> None:
        self.sizes, self.aspects, self.reference = sizes, aspects, reference
        self.width, self.kernel, self.limit, self.nms_iou = width, kernel, limit, nms_iou
        self.ridge, self.steps, self.lr, self.seed = ridge, steps, lr, seed

    def fit(
        self,
        read: Callable[[int], EncodedImage],
        targets: Sequence[Target],
        classes: Sequence[str] | None = None,
        *,
        track: Track = no_track,
    ) -> Objectness:
        """Learn what objects look like.

        Parameters
        ----------
        read : callable
            ``read(i)`` returns what the backbone made of image i; called whenever an image's turn comes, so
            that memory does not grow with the number of images.
        targets : sequence of Target
            The annotations of each image. Anchors on difficult and crowd boxes teach nothing.
        classes : sequence of str, optional
            What counts as an object; by default everything that is annotated. Other classes teach nothing.
        track : callable
            ``track(items, description)`` yields the items and may draw progress.

        Returns
        -------
        Objectness
            Itself.

        Raises
        ------
        SppnetError
            If there is no object, PyTorch, which trains the first step, is not installed, the images' maps
            are of several numbers of channels, or the loss is not finite.
        """
        truths = [Truth.of(t, classes) for t in targets]
        if not sum(len(t.boxes) for t in truths):
            wanted = "any class" if classes is None else ", ".join(classes)
            raise SppnetError(
                f"found no object of {wanted} in {len(targets)} images, expected at least one; difficult and "
                "crowd boxes do not count"
            )
        check_extra("torch", "learning to propose windows from maps")
        from sppnet.proposals.training import train

        network = train(self, read, truths, track)
        features, overlaps, deltas = self._second_examples(network, read, truths, track)
        scale = _NORM / max(float(np.linalg.norm(features[:, :-1], axis=1).mean()), 1e-12)
        features[:, :-1] *= scale
        close = overlaps > POSITIVE
        score = fit_ridge(features, overlaps[:, None], self.ridge)
        moves = fit_ridge(features[close], deltas[close], self.ridge)
        weights, offsets = (np.concatenate(part) for part in zip(score, moves, strict=True))
        self.network_, self.weights_, self.offsets_ = network, weights * np.float32(scale), offsets
        return self

    @property
    def signature(self) -> str:
        """Text that differs wherever the windows might: the settings and a digest of what was fitted."""
        return f"{super().signature} weights={digest_of(self.state())[:16]}"

    def __call__(self, image: Pixels | None, encoded: EncodedImage | None = None) -> Windows:
        """Propose windows for one image; see `sppnet.proposals.method.Proposer`.

        Parameters
        ----------
        image : (H, W, 3) uint8 or None
            Not looked at.
        encoded : EncodedImage
            What the backbone made of the image.

        Raises
        ------
        NotFittedError
            If it is not fitted.
        SppnetError
            If there is no encoded image, or it is of another backbone.
        """
        if encoded is None:
            raise SppnetError(
                "found an image without its maps, expected an encoded one to propose windows for"
            )
        return ranked(self.propose(encoded).boxes, encoded.size)

    def propose(self, encoded: EncodedImage) -> Windows:
        """Propose windows with what is known of each: how much of an object it is.

        Parameters
        ----------
        encoded : EncodedImage
            What the backbone made of the image, on any device. Of several stages the last is used.

        Returns
        -------
        Windows
            At most `limit`, best first, inside the image. The scores are the predicted overlaps with an
            object, unbounded.

        Raises
        ------
        NotFittedError
            If it is not fitted.
        SppnetError
            If the maps are of another backbone.
        """
        self._check_fitted()
        boxes, hidden = self._first(self.network_, encoded)
        answers = self._second(hidden, encoded, boxes)
        moved = clip(decode_deltas(boxes, answers[:, 1:]), encoded.size[1], encoded.size[0])
        return self._best(moved, answers[:, 0], self.nms_iou)

    def state(self) -> dict[str, Floats]:
        """Return what was fitted, as arrays."""
        self._check_fitted()
        network = {f"network.{name}": array for name, array in self.network_.state().items()}
        return network | {"weights": self.weights_, "offsets": self.offsets_}

    @classmethod
    def from_state(cls, arrays: Mapping[str, npt.NDArray[Any]], settings: Mapping[str, Any]) -> Objectness:
        """Return the objectness whose `state` and settings these are.

        Raises
        ------
        SppnetError
            If the two do not fit.
        """
        result = cls(**dict(settings))
        width, answers = result.width, 5 * len(result.sizes) * len(result.aspects)
        first = arrays.get("network.reduce.weight", np.zeros((width, 1)))
        expected = {
            "network.reduce.weight": (width, *first.shape[1:2]),
            "network.reduce.bias": (width,),
            "network.spread.weight": (width, 1, result.kernel, result.kernel),
            "network.spread.bias": (width,),
            "network.answer.weight": (answers, width),
            "network.answer.bias": (answers,),
            "weights": (5, width * BINS**2),
            "offsets": (5,),
        }
        wrong = [
            name for name, shape in expected.items() if name not in arrays or arrays[name].shape != shape
        ]
        if wrong:
            there = "missing" if wrong[0] not in arrays else f"of shape {arrays[wrong[0]].shape}"
            raise SppnetError(
                f"found no objectness of these settings: {wrong[0]} is {there}, expected one of shape "
                f"{expected[wrong[0]]}"
            )
        result.network_ = AnchorNetwork.from_state(
            {n.removeprefix("network."): arrays[n] for n in expected if n.startswith("network.")}
        )
        result.weights_, result.offsets_ = (arrays[n].astype(np.float32) for n in ("weights", "offsets"))
        return result

    def anchors(self, maps: FeatureMaps) -> Boxes:
        """Return the (h * w * A, 4) anchors of a map in pixels of the original image, row by row."""
        geometry, factors = maps.geometry[-1], np.array(maps.factors)
        height, width = maps.stages[-1].shape[-2:]
        cells = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).reshape(-1, 1, 2)
        # Resizing keeps pixel areas, and the centre of pixel p is at p + 1/2 in half-open coordinates.
        centres = (geometry.stride * cells + geometry.offset + 0.5) / factors
        shapes = [
            (size * math.sqrt(aspect), size / math.sqrt(aspect))
            for size in self.sizes
            for aspect in self.aspects
        ]
        half = self.reference * np.array(shapes) / factors / 2
        return np.concatenate([centres - half, centres + half], axis=-1).reshape(-1, 4).astype(np.float32)

    def _second_examples(
        self,
        network: AnchorNetwork,
        read: Callable[[int], EncodedImage],
        truths: Sequence[Truth],
        track: Track,
    ) -> tuple[Floats, Floats, Boxes]:
        """Return features, with a constant 1, overlaps and deltas of windows that the first step proposes."""
        rng = np.random.default_rng(self.seed)
        most = max(2, min(_TAUGHT_PER_IMAGE, _TAUGHT // (2 * len(truths))))
        features, overlaps, deltas = [], [], []
        for i in track(range(len(truths)), "Fitting the second step"):
            truth = truths[i]
            if not len(truth.boxes):
                continue
            encoded = read(i)
            boxes, hidden = self._first(network, encoded)
            # The objects themselves teach, too, so that there are close windows even where none was found.
            boxes = np.concatenate([truth.boxes, boxes])
            overlap = iou(boxes, truth.boxes)
            best, nearest = overlap.max(axis=1), overlap.argmax(axis=1)
            known = np.flatnonzero((best > POSITIVE) | ~truth.ignores(boxes))
            close = known[best[known] > POSITIVE]
            taught = np.union1d(*(rng.choice(s, min(len(s), most), replace=False) for s in (known, close)))
            pooled = self._pool(hidden, encoded, boxes[taught])
            features.append(np.concatenate([pooled, np.ones((len(taught), 1), np.float32)], axis=1))
            overlaps.append(best[taught])
            deltas.append(encode_deltas(boxes[taught], truth.boxes[nearest[taught]]))
        return np.concatenate(features), np.concatenate(overlaps), np.concatenate(deltas)

    def _first(self, network: AnchorNetwork, encoded: EncodedImage) -> tuple[Boxes, list[Floats]]:
        """Return the best anchors of all scales, moved, best first; and the network's own maps."""
        boxes, scores, hidden = [], [], []
        for maps in encoded.scales:
            stage = to_numpy(last_stage(maps, network.reduce.weights.shape[1]))
            answers, inner = network(stage)
            top = np.arange(len(answers))
            if len(top) > ANCHORS:
                top = np.sort(np.argpartition(-answers[:, 0], ANCHORS)[:ANCHORS])
            boxes.append(decode_deltas(self.anchors(maps)[top], answers[top, 1:]))
            scores.append(answers[top, 0])
            hidden.append(inner)
        moved, score = clip(np.concatenate(boxes), encoded.size[1], encoded.size[0]), np.concatenate(scores)
        first = np.argsort(-score, kind="stable")[:ANCHORS]
        return self._best(moved[first], score[first], ANCHOR_IOU).boxes, hidden

    def _best(self, boxes: Boxes, scores: npt.NDArray[np.float32], threshold: float) -> Windows:
        """Drop what is too small or overlaps a better box by more than `threshold`; best first."""
        large = np.flatnonzero((boxes[:, 2:] - boxes[:, :2] >= LEAST_SIDE).all(axis=1))
        kept = large[nms(boxes[large], scores[large], threshold, self.limit)]
        return Windows(boxes[kept], scores[kept])

    def _second(self, hidden: Sequence[Floats], encoded: EncodedImage, boxes: Boxes) -> Floats:
        """Return the (R, 5) answers of the second step: linear predictions from what `_pool` returns."""
        result = np.tile(self.offsets_, (len(boxes), 1))
        width, bins = hidden[0].shape[-1], np.arange(BINS**2)[:, None]
        weights = self.weights_.reshape(5, width, -1).transpose(1, 2, 0).reshape(width, -1)
        for s, mine, (cells, shares) in self._samples(hidden, encoded, boxes):
            # Sampling is linear, too: what each cell adds to the answers as part of each bin comes first, so
            # that five numbers are sampled of each cell, and not those of all channels.
            parts = (hidden[s].reshape(-1, width) @ weights).reshape(-1, 5)
            result[mine] += np.einsum("rbt,rbtn->rn", shares, parts[cells * len(bins) + bins])
        return result

    def _pool(self, hidden: Sequence[Floats], encoded: EncodedImage, boxes: Boxes) -> Floats:
        """Return the (R, D) features of windows, each at the scale where its size suits the backbone best."""
        width = hidden[0].shape[-1]
        pooled = np.zeros((len(boxes), width, BINS**2), np.float32)
        for s, mine, (cells, shares) in self._samples(hidden, encoded, boxes):
            pooled[mine] = np.einsum("rbt,rbtc->rcb", shares, hidden[s].reshape(-1, width)[cells])
        return pooled.reshape(len(boxes), -1)

    def _samples(
        self, hidden: Sequence[Floats], encoded: EncodedImage, boxes: Boxes
    ) -> Iterator[tuple[int, IntArray, Samples]]:
        """Yield for each scale the windows that it suits best, and where their bins are sampled."""
        which = choose_scale(boxes, min(encoded.size), encoded.sides, self.reference, "released")
        grown = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * GROWTH
        for s in np.unique(which):
            mine, geometry = np.flatnonzero(which == s), encoded.scales[s].geometry[-1]
            centre, half = (part[mine] * np.array(encoded.scales[s].factors) for part in grown)
            corners = np.concatenate([centre - half, centre + half], axis=1)
            height, width = hidden[s].shape[:2]
            windows = (corners - geometry.offset - 0.5) / geometry.stride
            yield s, mine, sample_bins(windows, (height, width), BINS)
