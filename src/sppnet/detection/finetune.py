"""Fine-tuning on windows: a head on pooled features, and the backbone's last stages (paper section 4.1).

The head comes first. The backbone is frozen then, so windows are pooled once and kept on disk, and batches
are drawn from all images at random. Where the backbone is to learn, too, training goes on image by image,
each at one scale, with gradients through the pooling.
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
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sppnet.arrays import Boxes, FloatArray, IntArray, to_numpy
from sppnet.boxes import flip
from sppnet.detection.network import HeadNetwork
from sppnet.detection.sampling import Examples, TuningPlan, plan_tuning
from sppnet.detection.tuning import Tuning
from sppnet.errors import SppnetError
from sppnet.features.backbone import Backbone
from sppnet.features.encoded import EncodedImage
from sppnet.features.network import TrainableBackbone
from sppnet.features.projection import choose_scale
from sppnet.images import pixels_of
from sppnet.progress import Track, no_track
from sppnet.regression import encode_deltas
from sppnet.storage import read_checkpoint, write_tensors

if TYPE_CHECKING:
    from sppnet.features.windows import WindowPooling

FORMAT, VERSION = "sppnet-tuning", "1"
# Deltas are learned in these units, so that they vary about as much as one (Girshick, "Fast R-CNN").
DELTA_UNITS = (0.1, 0.1, 0.2, 0.2)
# A checkpoint is written after each of so many parts of the head's training.
ROUNDS = 10
# While the backbone learns, the scale of an image's windows is chosen for a reference side that is up to so
# many e-folds off: about the step from one scale to the next.
_JITTER = 0.35
# Images whose windows tell the mean norm of pooled features.
_SAMPLED = 50


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
    examples : Examples
        Annotated images with their candidate windows.
    pooling : WindowPooling
        How windows become vectors.
    tuning : Tuning
        How the head is trained, and with it the backbone.
    pool : callable
        ``pool(i, boxes)`` returns the (R, D) pooled vectors of (R, 4) boxes of image i, each at its scale.
    seed : int
        Seed of every random draw.
    folder : Path, optional
        Where pooled features lie while they are needed, and checkpoints are written. If there is one of the
        same fit, or of the same head before its backbone learned, training goes on from there.

    Attributes
    ----------
    history : list of TuningRecord
        One record for each round of the head and each epoch of the backbone.
    backbone : Backbone
        The one that was given; after `train` one with what its layers behind `Tuning.stage` learned.
    head : Head
        The fully connected layers.
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
        examples: Examples,
        pooling: WindowPooling,
        tuning: Tuning,
        *,
        pool: Callable[[int, Boxes], Any],
        seed: int = 0,
        folder: Path | None = None,
    ) -> None:
        self.examples, self.pooling, self.tuning = examples, pooling, tuning
        self.pool, self.seed, self.folder = pool, seed, folder
        self.plans = [
            plan_tuning(w, t, examples.classes)
            for w, t in zip(examples.windows, examples.targets, strict=True)
        ]
        self.backbone = backbone
        self.trainable = None if tuning.stage is None else TrainableBackbone(backbone, tuning.stage)
        self.learning = {} if self.trainable is None else self.trainable.learning
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            length = pooling.length(backbone.channels)
            self.head = HeadNetwork(length, len(examples.classes), tuning.width, tuning.dropout)
        self.head.to(backbone.device)
        self.scale = 1.0
        self.history: list[TuningRecord] = []
        self.checkpoints = self._checkpoints(backbone.signature)
        self.optimizer = self._new_optimizer()
        there = [path for path in self.checkpoints.values() if path.exists()]
        if there:
            self._resume(there[-1])
        else:
            self.scale = self._measure_scale()

    def _checkpoints(self, signature: str) -> dict[str, Path]:
        """Return where the parts of this fit are kept, by names that no other fit has."""
        if self.folder is None:
            return {}
        tuning, classes = self.tuning, list(self.examples.classes)
        fit = [signature, asdict(self.pooling), classes, _digest(self.plans), self.seed]
        # What the head learns before the backbone does is the same whatever the backbone learns then.
        alone = replace(tuning, stage=None, epochs=0, images=1, backbone_lr=1.0)
        settings = {"head": alone, "backbone": tuning} if self.learning else {"head": alone}
        return {
            part: self.folder / f"tuning-{_hash([*fit, asdict(s)])}.safetensors"
            for part, s in settings.items()
        }

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
        if self.trainable is not None:
            # Kept in half precision, so used in half precision from here on.
            self.backbone = self.trainable.retuned()
        self.head.eval().requires_grad_(False)

    def _new_optimizer(self) -> torch.optim.AdamW:
        """Return the optimizer of what comes next: the head's training, or that of head and backbone."""
        parameters = list(self.head.parameters())
        if len(self.history) >= self._rounds:
            for parameter in self.learning.values():
                parameter.requires_grad_(True)
            parameters += self.learning.values()
        return torch.optim.AdamW(parameters, weight_decay=self.tuning.weight_decay)

    def _keep(self, record: TuningRecord) -> None:
        self.history.append(record)
        if record.part in self.checkpoints:
            self._save(self.checkpoints[record.part])

    def _pool(self, i: int) -> tuple[FloatArray, IntArray, Boxes]:
        """Return the pooled features, classes and deltas of windows of an image, each at its own scale."""
        plan, tuning = self.plans[i], self.tuning
        chosen = plan.draw(
            tuning.windows, tuning.positives, tuning.far, np.random.default_rng([self.seed, i])
        )
        pooled = to_numpy(self.pool(i, plan.boxes[chosen]))
        if not np.isfinite(pooled).all():
            raise SppnetError(
                f"{self.examples.name(i)}: found features that are not finite, expected numbers"
            )
        return pooled, plan.labels[chosen], encode_deltas(plan.boxes[chosen], plan.truth[chosen])

    def _measure_scale(self) -> float:
        """Return what gives windows of a few images a mean norm of 20, as in the released code."""
        order = np.random.default_rng(self.seed).permutation(len(self.examples.images))
        norms = [np.linalg.norm(self._pool(int(i))[0], axis=1) for i in order[:_SAMPLED]]
        mean = float(np.concatenate(norms).mean()) if any(map(len, norms)) else 0.0
        return 20 / mean if mean > 0 else 1.0

    @contextmanager
    def _examples(self, track: Track) -> Iterator[_Examples]:
        """Pool the windows of all images into a file, which is there as long as the context."""
        with TemporaryDirectory(prefix="pooled-", dir=self.folder, ignore_cleanup_errors=True) as place:
            path = Path(place) / "pooled"
            labels, deltas = [], []
            with path.open("wb") as file:
                for i in track(range(len(self.examples.images)), "Pooling windows to learn from"):
                    pooled, kinds, moves = self._pool(i)
                    file.write(pooled.astype(np.float16).tobytes())
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
            turned = rng.random(len(rows)) < 0.5
            flipped = torch.from_numpy(turned)
            # What the backbone makes of a flipped image is about what it makes of the image, flipped.
            pooled[flipped] = self.pooling.flipped(pooled[flipped], self.backbone.channels)
            deltas[turned, 0] *= -1
            loss, error = self._loss(
                pooled.to(self.backbone.device),
                torch.from_numpy(examples.labels[rows]),
                torch.from_numpy(deltas),
            )
            self._check(loss, f"after {n} batches")
            loss.backward()  # type: ignore[no-untyped-call]
            self._step(tuning.lr, (n + 1) / tuning.batches)
            results.append((loss.item(), error))
        return _record("head", results)

    def _epoch(self, track: Track) -> TuningRecord:
        """Train backbone and head on all images once."""
        count, tuning, number = len(self.examples.images), self.tuning, len(self.history) - self._rounds
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
                self._check(loss, f"in epoch {number}; the image: {self.examples.name(i)}")
                (loss / tuning.images).backward()  # type: ignore[no-untyped-call]
                results.append((loss.item(), error))
            if n % tuning.images == 0 or n == count:
                self._step(tuning.backbone_lr, (number + n / count) / tuning.epochs)
        return _record("backbone", results)

    def _look(self, i: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return features, classes and deltas of windows of an image, turned or not, at one scale."""
        image, plan, tuning = self.examples.images[i], self.plans[i], self.tuning
        pixels = pixels_of(image)
        side, there = self._draw_scale(plan, pixels.shape[:2], rng)
        chosen = there.draw(tuning.windows, tuning.positives, tuning.far, rng)
        boxes, truth = plan.boxes[chosen], plan.truth[chosen]
        if rng.random() < 0.5:
            width = pixels.shape[1]
            pixels = np.ascontiguousarray(pixels[:, ::-1])
            boxes, truth = flip(boxes, width), flip(truth, width)
        assert self.trainable is not None
        maps = self.trainable(pixels, side)
        height, width = pixels.shape[:2]
        pooled = self.pooling(EncodedImage((height, width), (maps,)), boxes)
        return pooled, torch.from_numpy(plan.labels[chosen]), torch.from_numpy(encode_deltas(boxes, truth))

    def _draw_scale(
        self, plan: TuningPlan, shape: tuple[int, int], rng: np.random.Generator
    ) -> tuple[int, TuningPlan]:
        """Draw a scale, more often one that suits objects; return its side, and the plan of its windows."""
        scales, base = self.pooling.scales, self.pooling.reference
        assert base is not None
        reference = base * np.exp(rng.uniform(-_JITTER, _JITTER))
        scale = choose_scale(plan.boxes, min(shape), scales, reference, self.pooling.scale_rule)
        telling = plan.positive if len(plan.positive) else np.concatenate([plan.background, plan.far])
        if not len(telling):
            return scales[0], plan
        weights = np.sqrt(np.bincount(scale[telling], minlength=len(scales)))
        s = rng.choice(len(scales), p=weights / weights.sum())
        return scales[s], replace(
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

    def _step(self, lr: float, done: float) -> None:
        """Move the weights, when a share of a training is done: a short rise, then a cosine to 0."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * min(1.0, done / 0.03) * (1 + math.cos(math.pi * done)) / 2
            nn.utils.clip_grad_norm_(group["params"], 10.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

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
                parameter.copy_(torch.from_numpy(tensors[f"value.{name}"]))
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
                    value = torch.from_numpy(tensors[f"{key}.{name}"])
                    self.optimizer.state[parameter][key] = value.to(parameter.device)


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
