"""Fine-tuning on windows: a head on pooled features, and with it the backbone's last stages (paper section 4.1).

The head comes first. The backbone is frozen then, so windows are pooled once and kept on disk, and batches are
drawn from all images at random. Where the backbone is to learn, too, training goes on image by image, each at
one scale, with gradients through the pooling.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sppnet.arrays import Boxes, Image, IntArray
from sppnet.boxes import Target, flip
from sppnet.detection.head import Head
from sppnet.detection.sampling import TuningPlan, plan_tuning
from sppnet.errors import SppnetError
from sppnet.features.backbone import Backbone
from sppnet.features.geometry import choose_scale
from sppnet.features.windows import mirror_bins, pool_windows
from sppnet.images import pixels_of
from sppnet.pooling.bins import pyramid_length
from sppnet.progress import Track, no_track
from sppnet.regression import encode_deltas
from sppnet.storage import read_checkpoint, write_tensors

FORMAT, VERSION = "sppnet-tuning", "1"
# Deltas are learned in these units, so that they vary about as much as one (Girshick, "Fast R-CNN").
DELTA_UNITS = (0.1, 0.1, 0.2, 0.2)
# A checkpoint is written after each of so many parts of the head's training.
ROUNDS = 10
# While the backbone learns, the scale of an image's windows is chosen for a reference side that is up to so many
# e-folds off: about the step from one scale to the next.
_JITTER = 0.35
# Images whose windows tell the mean norm of pooled features.
_SAMPLED = 50


@dataclass(frozen=True)
class Tuning:
    """How a head is trained.

    The paper moves pre-trained layers for 300,000 batches at rates of 1e-4 and 1e-5; new ones on a small
    backbone are done after some thousands of AdamW, with a rate that falls to 0 along a cosine.

    Attributes
    ----------
    stage : str, optional
        The backbone's layers behind this stage learn, too; by default none does.
    batches : int
        Of training the head; 0 leaves it at random.
    batch : int
        Windows of one of them.
    rate : float
        Learning rate of the head.
    decay : float
        AdamW's weight decay.
    windows : int
        Most windows of an image.
    positives : float
        Largest share of them that shows an object (paper: 0.25).
    far : float
        Largest share that overlaps objects by less than 0.1 (paper: 0). With few images they teach what the
        rest of the world looks like.
    width : int
        Units of fc6 and of fc7.
    dropout : float
        After either (paper: 0.5).
    epochs : int
        How often each image is seen while the backbone learns.
    images : int
        Whose gradients make one step then.
    backbone_rate : float
        Learning rate of backbone and head then.
    """

    stage: str | None = None
    batches: int = 3000
    batch: int = 256
    rate: float = 5e-4
    decay: float = 0.1
    windows: int = 64
    positives: float = 0.25
    far: float = 0.25
    width: int = 1024
    dropout: float = 0.5
    epochs: int = 3
    images: int = 4
    backbone_rate: float = 1e-4

    def __post_init__(self) -> None:
        counts = min(self.batch, self.windows, self.width, self.images)
        if counts <= 0 or min(self.batches, self.epochs) < 0 or min(self.rate, self.backbone_rate) <= 0:
            raise SppnetError(
                f"found {self}, expected batch, windows, width, images and rates above 0, batches and epochs"
            )
        if not (0 < self.positives <= 1 and 0 <= self.far < 1 and 0 <= self.dropout < 1 and self.decay >= 0):
            raise SppnetError(
                f"found {self}, expected positives above 0 to 1, far and dropout from 0 to below 1, "
                "no negative decay"
            )


@dataclass(frozen=True)
class TuningRecord:
    """What a round of the head, or an epoch of the backbone, gave.

    Attributes
    ----------
    part : {"head", "backbone"}
    loss : float
        Mean of the cross entropy and the loss of the deltas.
    error : float
        Share of windows that were given another class than theirs.
    """

    part: str
    loss: float
    error: float


@dataclass(frozen=True)
class _Examples:
    """Pooled windows of all images on disk, with their classes and deltas."""

    pooled: npt.NDArray[np.float16]
    labels: IntArray
    deltas: Boxes


class FineTuner:
    """A head, and a backbone of its own, in training.

    Parameters
    ----------
    backbone : Backbone
        Stays as it is.
    images : sequence of Path or (H, W, 3) uint8 arrays
    windows : sequence of (R, 4) float32
        Candidate windows of each image.
    targets : sequence of Target
        Annotations of each image.
    classes : sequence of str
    pool : callable
        ``pool(i, boxes)`` returns the (R, D) pooled features of (R, 4) boxes of image i, each at its scale.
    levels : sequence of int
        Pyramid.
    sides : sequence of int
        Shorter sides of the scales in pixels.
    reference : float
        Side that a window should have at its scale, in pixels.
    projection, scale_rule : str
        See `sppnet.features.geometry.project` and `sppnet.features.geometry.choose_scale`.
    tuning : Tuning
    seed : int
        Of every random draw.
    folder : Path, optional
        Where pooled features lie while they are needed, and checkpoints are written. If there is one of the
        same fit, or of the same head before its backbone learned, training goes on from there.

    Attributes
    ----------
    history : list of TuningRecord
        One per round of the head and epoch of the backbone.
    backbone : Backbone
        The one that was given, or a copy whose layers behind `Tuning.stage` learn.
    head : Head
    scale : float
        Pooled features are multiplied by this, so that their mean norm is 20 at the start.

    Raises
    ------
    SppnetError
        If the checkpoint is damaged.
    """

    def __init__(
        self,
        backbone: Backbone,
        images: Sequence[Image],
        windows: Sequence[Boxes],
        targets: Sequence[Target],
        classes: Sequence[str],
        *,
        pool: Callable[[int, Boxes], Tensor],
        levels: Sequence[int],
        sides: Sequence[int],
        reference: float,
        projection: str,
        scale_rule: str,
        tuning: Tuning,
        seed: int = 0,
        folder: Path | None = None,
    ) -> None:
        self.images, self.pool, self.levels, self.sides = images, pool, levels, sides
        self.reference, self.projection, self.scale_rule = reference, projection, scale_rule
        self.tuning, self.seed, self.folder = tuning, seed, folder
        self.plans = [plan_tuning(w, t, classes) for w, t in zip(windows, targets, strict=True)]
        self.backbone = backbone if tuning.stage is None else backbone.copy()
        self.learning = {} if tuning.stage is None else self.backbone.layers_after(tuning.stage)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            length = sum(pyramid_length(channels, levels) for channels in backbone.channels)
            self.head = Head(length, len(classes), tuning.width, tuning.dropout).to(backbone.device)
        self.scale = 1.0
        self.history: list[TuningRecord] = []
        fit = [
            *(backbone.signature, list(levels), list(sides), reference, projection, scale_rule),
            *(list(classes), _digest(self.plans), seed),
        ]
        # What the head learns before the backbone does is the same whatever the backbone learns then.
        alone = replace(tuning, stage=None, epochs=0, images=1, backbone_rate=1.0)
        settings = {"head": alone, "backbone": tuning} if self.learning else {"head": alone}
        self.checkpoints = {
            part: folder / f"tuning-{_hash([*fit, asdict(s)])}.safetensors"
            for part, s in settings.items()
            if folder is not None
        }
        self.optimizer = self._new_optimizer()
        there = [path for path in self.checkpoints.values() if path.exists()]
        if there:
            self._resume(there[-1])
        else:
            self.scale = self._measure_scale()

    @property
    def _rounds(self) -> int:
        return min(ROUNDS, self.tuning.batches)

    @property
    def _length(self) -> int:
        """Of the history in the end."""
        return self._rounds + (self.tuning.epochs if self.learning else 0)

    def train(self, track: Track = no_track) -> None:
        """Train what is left; `history` tells how it went.

        Raises
        ------
        SppnetError
            If features or the loss are not finite; the message names the image where there is one.
        """
        with torch.random.fork_rng():
            if len(self.history) < self._rounds:
                with self._examples(track) as examples:
                    while len(self.history) < self._rounds:
                        self._keep(self._round(examples, track))
                self.optimizer = self._new_optimizer()
            while len(self.history) < self._length:
                self._keep(self._epoch(track))
        if self.learning:
            # Kept in half precision, so used in half precision from here on.
            self.backbone.network.requires_grad_(False)
            self.backbone.retune(self.learning)
        self.head.eval().requires_grad_(False)

    def _new_optimizer(self) -> torch.optim.AdamW:
        """Return the optimizer of what comes next: the head's training, or that of head and backbone."""
        parameters = list(self.head.parameters())
        if len(self.history) >= self._rounds:
            for parameter in self.learning.values():
                parameter.requires_grad_(True)
            parameters += self.learning.values()
        return torch.optim.AdamW(parameters, weight_decay=self.tuning.decay)

    def _keep(self, record: TuningRecord) -> None:
        self.history.append(record)
        if record.part in self.checkpoints:
            self._save(self.checkpoints[record.part])

    def _pool(self, i: int) -> tuple[Tensor, IntArray, Boxes]:
        """Return the pooled features, classes and deltas of windows of an image, each at its own scale."""
        plan, tuning = self.plans[i], self.tuning
        chosen = plan.draw(
            tuning.windows, tuning.positives, tuning.far, np.random.default_rng([self.seed, i])
        )
        pooled = self.pool(i, plan.boxes[chosen])
        if not torch.isfinite(pooled).all():
            raise SppnetError(f"{self._name(i)}: found features that are not finite, expected numbers")
        return pooled, plan.labels[chosen], encode_deltas(plan.boxes[chosen], plan.truth[chosen])

    def _measure_scale(self) -> float:
        """Return what gives windows of a few images a mean norm of 20, as in the released code."""
        order = np.random.default_rng(self.seed).permutation(len(self.images))
        norms = [torch.linalg.vector_norm(self._pool(int(i))[0], dim=1) for i in order[:_SAMPLED]]
        mean = float(torch.cat(norms).mean()) if any(map(len, norms)) else 0.0
        return 20 / mean if mean > 0 else 1.0

    @contextmanager
    def _examples(self, track: Track) -> Iterator[_Examples]:
        """Pool the windows of all images into a file, which is there as long as the context."""
        with TemporaryDirectory(prefix="pooled-", dir=self.folder, ignore_cleanup_errors=True) as place:
            path = Path(place) / "pooled"
            labels, deltas = [], []
            with path.open("wb") as file:
                for i in track(range(len(self.images)), "Pooling windows to learn from"):
                    pooled, kinds, moves = self._pool(i)
                    file.write(pooled.half().cpu().numpy().tobytes())
                    labels.append(kinds)
                    deltas.append(moves)
            count = sum(map(len, labels))
            shape = (count, self.head.length)
            stored = np.memmap(path, np.float16, "r", shape=shape) if count else np.empty(shape, np.float16)
            yield _Examples(stored, np.concatenate(labels), np.concatenate(deltas))

    def _round(self, examples: _Examples, track: Track) -> TuningRecord:
        """Train the head on its share of the batches."""
        tuning, number, count = self.tuning, len(self.history), len(examples.labels)
        batches = np.array_split(np.arange(tuning.batches), self._rounds)[number].tolist()
        # Drawn anew for every round, so that training goes on after any of them as if it had not stopped.
        rng = np.random.default_rng([self.seed, number])
        torch.manual_seed(int(rng.integers(2**31)))
        self.head.train()
        results = []
        for n in track(batches, f"Training layers, part {number + 1} of {self._rounds}") if count else ():
            rows = np.sort(rng.choice(count, min(tuning.batch, count), replace=False))
            pooled, deltas = torch.from_numpy(examples.pooled[rows]).float(), examples.deltas[rows].copy()
            mirrored = rng.random(len(rows)) < 0.5
            flipped = torch.from_numpy(mirrored)
            # What the backbone makes of a mirror image is about the mirror image of what it makes of the image.
            pooled[flipped] = mirror_bins(pooled[flipped], self.backbone.channels, self.levels)
            deltas[mirrored, 0] *= -1
            loss, error = self._loss(
                pooled.to(self.backbone.device),
                torch.from_numpy(examples.labels[rows]),
                torch.from_numpy(deltas),
            )
            self._check(loss, f"after {n} batches")
            loss.backward()  # type: ignore[no-untyped-call]
            self._step(tuning.rate, (n + 1) / tuning.batches)
            results.append((loss.item(), error))
        return _record("head", results)

    def _epoch(self, track: Track) -> TuningRecord:
        """Train backbone and head on all images once."""
        count, tuning, number = len(self.images), self.tuning, len(self.history) - self._rounds
        rng = np.random.default_rng([self.seed, len(self.history)])
        torch.manual_seed(int(rng.integers(2**31)))
        self.head.train()
        results = []
        order = track(
            rng.permutation(count).tolist(), f"Tuning backbone, epoch {number + 1} of {tuning.epochs}"
        )
        for n, i in enumerate(order, 1):
            pooled, labels, deltas = self._look(i, rng)
            if len(labels):
                loss, error = self._loss(pooled, labels, deltas)
                self._check(loss, f"in epoch {number}; the image: {self._name(i)}")
                (loss / tuning.images).backward()  # type: ignore[no-untyped-call]
                results.append((loss.item(), error))
            if n % tuning.images == 0 or n == count:
                self._step(tuning.backbone_rate, (number + n / count) / tuning.epochs)
        return _record("backbone", results)

    def _look(self, i: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return features, classes and deltas of windows of an image, mirrored or not, at one scale."""
        image, plan, tuning = self.images[i], self.plans[i], self.tuning
        pixels = pixels_of(image)
        side, there = self._draw_scale(plan, pixels.shape[:2], rng)
        chosen = there.draw(tuning.windows, tuning.positives, tuning.far, rng)
        boxes, truth = plan.boxes[chosen], plan.truth[chosen]
        if rng.random() < 0.5:
            width = pixels.shape[1]
            pixels = np.ascontiguousarray(pixels[:, ::-1])
            boxes, truth = flip(boxes, width), flip(truth, width)
        maps = self.backbone.differentiable(pixels, side)
        pooled = pool_windows(
            (maps,), boxes, pixels.shape[:2], (side,), self.levels, projection=self.projection
        )
        return pooled, torch.from_numpy(plan.labels[chosen]), torch.from_numpy(encode_deltas(boxes, truth))

    def _draw_scale(
        self, plan: TuningPlan, shape: tuple[int, int], rng: np.random.Generator
    ) -> tuple[int, TuningPlan]:
        """Draw a scale, more often one that suits objects; return its side, and the plan of its windows."""
        reference = self.reference * np.exp(rng.uniform(-_JITTER, _JITTER))
        scale = choose_scale(plan.boxes, *shape, self.sides, reference, self.scale_rule)
        telling = plan.positive if len(plan.positive) else np.concatenate([plan.background, plan.far])
        if not len(telling):
            return self.sides[0], plan
        weights = np.sqrt(np.bincount(scale[telling], minlength=len(self.sides)))
        s = rng.choice(len(self.sides), p=weights / weights.sum())
        return self.sides[s], replace(
            plan,
            positive=plan.positive[scale[plan.positive] == s],
            background=plan.background[scale[plan.background] == s],
            far=plan.far[scale[plan.far] == s],
        )

    def _loss(self, pooled: Tensor, labels: Tensor, deltas: Tensor) -> tuple[Tensor, float]:
        """Return the loss of windows and the share of wrong answers."""
        scores, moves = self.head(pooled * self.scale)
        labels, goals = labels.to(scores.device), (deltas / torch.tensor(DELTA_UNITS)).to(scores.device)
        shown = labels < self.head.count
        moved = F.smooth_l1_loss(moves[shown, labels[shown]], goals[shown], reduction="sum")
        loss = F.cross_entropy(scores, labels) + moved / len(labels)
        return loss, float((scores.argmax(dim=1) != labels).float().mean())

    def _check(self, loss: Tensor, where: str) -> None:
        if not math.isfinite(loss.item()):
            raise SppnetError(f"found the loss {loss.item()} {where}, expected a finite number")

    def _step(self, rate: float, done: float) -> None:
        """Move the weights, when a share of a training is done: a short rise, then a cosine to 0."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * min(1.0, done / 0.03) * (1 + math.cos(math.pi * done)) / 2
            nn.utils.clip_grad_norm_(group["params"], 10.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _name(self, i: int) -> str:
        image = self.images[i]
        return str(image) if isinstance(image, Path) else f"number {i}"

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Return what the last part of `history` taught."""
        head = {f"head.{name}": p for name, p in self.head.named_parameters()}
        if len(self.history) <= self._rounds:
            return head
        return head | {f"backbone.{name}": p for name, p in self.learning.items()}

    def _save(self, path: Path) -> None:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._parameters().items():
            state = self.optimizer.state.get(parameter, {})
            tensors |= {f"{key}.{name}": value for key, value in state.items()} | {f"value.{name}": parameter}
        progress = {"scale": self.scale, "history": [asdict(record) for record in self.history]}
        facts = {"format": FORMAT, "version": VERSION}
        write_tensors(path, tensors, {**facts, "progress": json.dumps(progress)})

    @torch.no_grad()
    def _resume(self, path: Path) -> None:
        facts, tensors = read_checkpoint(path, FORMAT, VERSION)
        try:
            progress = json.loads(facts["progress"])
            self.scale = progress["scale"]
            self.history = [TuningRecord(**record) for record in progress["history"]]
            for name, parameter in self._parameters().items():
                parameter.copy_(tensors[f"value.{name}"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise SppnetError(
                f"{path}: found a damaged checkpoint ({error}); remove it to start anew"
            ) from None
        self.optimizer = self._new_optimizer()
        if len(self.history) == self._rounds:
            return  # The next optimizer starts anew.
        for name, parameter in self._parameters().items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"{key}.{name}" in tensors:
                    self.optimizer.state[parameter][key] = tensors[f"{key}.{name}"].to(parameter.device)


def _record(part: str, results: Sequence[tuple[float, float]]) -> TuningRecord:
    loss, error = np.mean(results, axis=0) if results else (math.nan, math.nan)
    return TuningRecord(part, float(loss), float(error))


def _hash(facts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _digest(plans: Sequence[TuningPlan]) -> str:
    """Return the SHA-256 of what the images' windows teach, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for plan in plans:
        for part in (plan.boxes, plan.labels, plan.truth, plan.positive, plan.background, plan.far):
            digest.update(part.tobytes())
    return digest.hexdigest()
