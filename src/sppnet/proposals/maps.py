"""Windows proposed from the feature maps that the detector computes anyway, whatever the class of an object.

Two steps, the first as in Faster R-CNN's region proposals (Ren et al., arXiv 1506.01497), on a frozen
backbone. A small network looks at every cell of every scale and says of each anchor, a box of one size and
shape about the cell, how likely it is an object and how it is to be moved. The best are pooled from the few
channels of that network, then moved and scored once more by ridge regressions: two convex fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from sppnet.arrays import Boxes, Pixels
from sppnet.boxes import Target, Windows, clip, iou, nms
from sppnet.errors import SppnetError
from sppnet.estimator import Estimator
from sppnet.features.encoded import EncodedImage, FeatureMaps
from sppnet.features.projection import choose_scale
from sppnet.progress import Track, no_track
from sppnet.proposals.method import Proposer, ranked
from sppnet.proposals.truth import POSITIVE, Truth
from sppnet.storage import digest_of
from sppnet.regression import decode_deltas, encode_deltas, fit_ridge

# Anchors of an image that count in the loss, at most half of them objects (Ren et al.).
_SAMPLED = 256
_IMAGES_PER_STEP = 4
# Overlap at which the smooth L1 loss turns linear, in deltas.
_BETA = 0.1
# Best anchors of an image that are looked at, and the overlap from which one of two is enough.
_ANCHORS, _ANCHOR_IOU = 3000, 0.8
# A window is pooled with its surroundings, in bins of one sample each.
_BINS, _GROWTH = 5, 1.2
# Windows of an image, and of all, that teach the second step.
_TAUGHT_PER_IMAGE, _TAUGHT = 60, 30000
# Pooled features are scaled to this mean norm, so that one penalty fits every backbone, as in the detector.
_NORM = 20.0
_LEAST_SIDE = 4.0


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
    network_ : torch.nn.Module
        The first step, which scores and moves anchors.
    weights_, offsets_ : (5, D) and (5,) float32 tensors
        The second step: predicted overlap with an object, and four box deltas, of pooled windows.
    """

    network_: _Network
    weights_: Tensor
    offsets_: Tensor

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
            If there is no object, the images' maps are of several numbers of channels, or the loss is not
            finite.
        """
        truths = [Truth.of(t, classes) for t in targets]
        if not sum(len(t.boxes) for t in truths):
            wanted = "any class" if classes is None else ", ".join(classes)
            raise SppnetError(
                f"found no object of {wanted} in {len(targets)} images, expected at least one; difficult and "
                "crowd boxes do not count"
            )
        network = self._train(read, truths, track)
        features, overlaps, deltas = self._second_examples(network, read, truths, track)
        scale = _NORM / max(float(np.linalg.norm(features[:, :-1], axis=1).mean()), 1e-12)
        features[:, :-1] *= scale
        close = overlaps > POSITIVE
        score = fit_ridge(features.copy(), overlaps[:, None], self.ridge)
        moves = fit_ridge(features[close], deltas[close], self.ridge)
        weights, offsets = (torch.from_numpy(np.concatenate(p)) for p in zip(score, moves, strict=True))
        self.network_, self.weights_, self.offsets_ = network, weights * scale, offsets
        return self

    @property
    def signature(self) -> str:
        """Text that differs wherever the windows might: the settings and a digest of what was fitted."""
        return f"{super().signature} weights={digest_of({n: t.cpu().numpy() for n, t in self.state().items()})[:16]}"

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
        answers = (self._pool(hidden, encoded, boxes) @ self.weights_.T.to(hidden[0].device)).cpu()
        answers += self.offsets_
        moved = clip(_moved(boxes, answers[:, 1:]), encoded.size[1], encoded.size[0])
        return self._best(moved, answers[:, 0].numpy(), self.nms_iou)

    def state(self) -> dict[str, Tensor]:
        """Return what was fitted, as tensors."""
        self._check_fitted()
        network = {f"network.{name}": tensor for name, tensor in self.network_.state_dict().items()}
        return network | {"weights": self.weights_, "offsets": self.offsets_}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Any], settings: Mapping[str, Any]) -> Objectness:
        """Return the objectness whose `state` and settings these are.

        Raises
        ------
        SppnetError
            If the two do not fit.
        """
        tensors = {name: torch.as_tensor(value) for name, value in tensors.items()}
        result = cls(**dict(settings))
        anchors = len(result.sizes) * len(result.aspects)
        first = tensors.get("network.reduce.weight", torch.zeros(result.width, 1))
        result.network_ = _Network(first.shape[1], result.width, result.kernel, anchors).eval()
        expected = {f"network.{n}": t.shape for n, t in result.network_.state_dict().items()}
        expected |= {"weights": torch.Size([5, result.width * _BINS**2]), "offsets": torch.Size([5])}
        wrong = [n for n, shape in expected.items() if n not in tensors or tensors[n].shape != shape]
        if wrong:
            there = "missing" if wrong[0] not in tensors else f"of shape {tuple(tensors[wrong[0]].shape)}"
            raise SppnetError(
                f"found no objectness of these settings: {wrong[0]} is {there}, expected one of shape "
                f"{tuple(expected[wrong[0]])}"
            )
        result.network_.load_state_dict(
            {n.removeprefix("network."): tensors[n].float() for n in expected if n.startswith("network.")}
        )
        result.weights_, result.offsets_ = tensors["weights"].float(), tensors["offsets"].float()
        return result

    def _train(self, read: Callable[[int], EncodedImage], truths: Sequence[Truth], track: Track) -> _Network:
        """Fit the network that scores and moves anchors."""
        rng = np.random.default_rng(self.seed)
        encoded = read(0)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            network = _Network(
                encoded.channels[-1], self.width, self.kernel, len(self.sizes) * len(self.aspects)
            )
        network.to(torch.device("cpu"))
        optimizer = torch.optim.AdamW(network.parameters(), self.lr, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=self.steps + 1, pct_start=0.1
        )
        epochs = -(-self.steps * _IMAGES_PER_STEP // len(truths))
        order = np.concatenate([rng.permutation(len(truths)) for _ in range(epochs)])
        for step in track(range(self.steps), "Fitting objectness"):
            optimizer.zero_grad()
            for i in order[step * _IMAGES_PER_STEP : (step + 1) * _IMAGES_PER_STEP]:
                loss = self._loss(network, read(int(i)).scales, truths[i], rng) / _IMAGES_PER_STEP
                if not math.isfinite(loss.item()):
                    raise SppnetError(
                        f"found the loss {loss.item()} at image {i} and the learning rate "
                        f"{schedule.get_last_lr()[0]:g}, expected a finite number"
                    )
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        return network.eval().requires_grad_(False)

    def _loss(
        self, network: _Network, maps: Sequence[FeatureMaps], truth: Truth, rng: np.random.Generator
    ) -> Tensor:
        """Return the loss of a sample of one image's anchors: logistic, and smooth L1 of the deltas."""
        anchors = np.concatenate([self._anchors(m) for m in maps])
        labels, nearest = truth.label(anchors)
        objects, rest = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
        objects = rng.choice(objects, min(len(objects), _SAMPLED // 2), replace=False)
        rest = rng.choice(rest, min(len(rest), _SAMPLED - len(objects)), replace=False)
        answers = torch.cat([network(_cells(network, m))[0] for m in maps])
        chosen = answers[torch.from_numpy(np.concatenate([objects, rest])).to(answers.device)]
        wanted = torch.zeros(len(chosen), device=chosen.device)
        wanted[: len(objects)] = 1
        loss = F.binary_cross_entropy_with_logits(chosen[:, 0], wanted, reduction="sum")
        if len(objects):
            goals = torch.from_numpy(encode_deltas(anchors[objects], truth.boxes[nearest[objects]]))
            moves = chosen[: len(objects), 1:]
            loss = loss + F.smooth_l1_loss(moves, goals.to(moves.device), beta=_BETA, reduction="sum")
        return loss / _SAMPLED

    def _second_examples(
        self, network: _Network, read: Callable[[int], EncodedImage], truths: Sequence[Truth], track: Track
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], Boxes]:
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
            features.append(F.pad(self._pool(hidden, encoded, boxes[taught]), (0, 1), value=1.0).cpu())
            overlaps.append(best[taught])
            deltas.append(encode_deltas(boxes[taught], truth.boxes[nearest[taught]]))
        return torch.cat(features).numpy(), np.concatenate(overlaps), np.concatenate(deltas)

    def _first(self, network: _Network, encoded: EncodedImage) -> tuple[Boxes, list[Tensor]]:
        """Return the best anchors of all scales, moved, best first; and the network's own maps."""
        boxes, scores, hidden = [], [], []
        network.to(torch.device("cpu"))
        with torch.inference_mode():
            for scale in encoded.scales:
                answers, inner = network(_cells(network, scale))
                top = answers[:, 0].topk(min(_ANCHORS, len(answers))).indices
                answers, top = answers[top].cpu(), top.cpu()
                boxes.append(_moved(self._anchors(scale)[top.numpy()], answers[:, 1:]))
                scores.append(answers[:, 0].numpy())
                hidden.append(inner)
        moved, score = clip(np.concatenate(boxes), encoded.size[1], encoded.size[0]), np.concatenate(scores)
        first = np.argsort(-score, kind="stable")[:_ANCHORS]
        return self._best(moved[first], score[first], _ANCHOR_IOU).boxes, hidden

    def _best(self, boxes: Boxes, scores: npt.NDArray[np.float32], threshold: float) -> Windows:
        """Drop what is too small or overlaps a better box by more than `threshold`; best first."""
        large = np.flatnonzero((boxes[:, 2:] - boxes[:, :2] >= _LEAST_SIDE).all(axis=1))
        kept = large[nms(boxes[large], scores[large], threshold)[: self.limit]]
        return Windows(boxes[kept], scores[kept])

    def _anchors(self, maps: FeatureMaps) -> Boxes:
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

    def _pool(self, hidden: Sequence[Tensor], encoded: EncodedImage, boxes: Boxes) -> Tensor:
        """Return the (R, D) features of windows, each at the scale where its size suits the backbone best."""
        which = choose_scale(boxes, min(encoded.size), encoded.sides, self.reference, "released")
        pooled = hidden[0].new_zeros(len(boxes), hidden[0].shape[1] * _BINS**2)
        grown = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * _GROWTH
        for s in np.unique(which):
            mine, geometry = np.flatnonzero(which == s), encoded.scales[s].geometry[-1]
            centre, half = (part[mine] * np.array(encoded.scales[s].factors) for part in grown)
            corners = np.concatenate([centre - half, centre + half], axis=1)
            # roi_align takes the centre of cell u to be at u + 1/2.
            cells = torch.from_numpy((corners - geometry.offset - 0.5) / geometry.stride + 0.5).to(pooled)
            bins = roi_align(hidden[s], [cells], _BINS, sampling_ratio=1, aligned=True)
            pooled[torch.from_numpy(mine).to(pooled.device)] = bins.flatten(1)
        return pooled


def _moved(boxes: Boxes, deltas: Tensor) -> Boxes:
    moved: Boxes = decode_deltas(boxes, deltas.numpy())
    return moved


class _Network(nn.Module):
    """For each cell, the logit of objectness and four deltas of each anchor; and the few channels behind."""

    def __init__(self, channels: int, width: int, kernel: int, anchors: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, width)
        self.spread = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.answer = nn.Linear(width, 5 * anchors)
        nn.init.normal_(self.answer.weight, std=0.01)
        nn.init.zeros_(self.answer.bias)

    def forward(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Take (h, w, C) cells; return (h * w * A, 5) answers and (1, width, h, w) maps."""
        hidden = F.relu(self.reduce(cells)).permute(2, 0, 1)[None]
        answers: Tensor = self.answer(F.relu(self.spread(hidden))[0].permute(1, 2, 0))
        return answers.reshape(-1, 5), hidden


def _cells(network: _Network, maps: FeatureMaps) -> Tensor:
    """Return the last stage of maps as the network takes it, (h, w, C)."""
    stage = maps.stages[-1]
    if stage.shape[0] != network.reduce.in_features:
        raise SppnetError(
            f"found maps of {stage.shape[0]} channels, expected {network.reduce.in_features}: "
            "those of the backbone that the objectness was fitted with"
        )
    return torch.as_tensor(stage).permute(1, 2, 0)
