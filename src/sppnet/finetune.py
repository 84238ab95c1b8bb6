"""Fine-tuning on windows: a head on pooled features, and with it the trunk's last stages (paper section 4.1).

Each step looks at a few images, each at one scale drawn at random and mirrored or not, and at windows that
suit that scale, a quarter of which show an object. Where the trunk learns too, gradients pass through the
pooling.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sppnet.boxes import Boxes, Target, encode_deltas, mirror
from sppnet.clock import Track, no_track
from sppnet.files import write_tensors
from sppnet.geometry import choose_scale
from sppnet.head import Head
from sppnet.images import read_image
from sppnet.maps import Image, pool_windows
from sppnet.pooling.bins import pyramid_length
from sppnet.sampling import TuningPlan, plan_tuning
from sppnet.trunks import Trunk

FORMAT, VERSION = "sppnet-tuning", "1"
# Deltas are learned in these units, so that they vary about as much as one (Girshick, "Fast R-CNN").
DELTA_UNITS = (0.1, 0.1, 0.2, 0.2)
# The scale of an image's windows is chosen for a reference side that is up to so many e-folds off: about the
# step from one scale to the next, so that the head sees sizes that are a little off.
_JITTER = 0.35


@dataclass(frozen=True)
class Tuning:
    """How a head is trained.

    The paper moves pre-trained layers for 300,000 steps at 1e-4 and 1e-5; new ones on a small trunk are done
    after a few epochs of AdamW, with a rate that falls to 0 along a cosine.

    Attributes
    ----------
    stage : str, optional
        The trunk's layers behind this stage learn, too; by default none does.
    epochs : int
        How often each image is seen; 0 leaves the layers at random.
    rate : float
        Learning rate of the head.
    trunk_rate : float
        Factor of the rate for the trunk.
    decay : float
        AdamW's weight decay.
    windows : int
        Most windows of an image.
    positives : float
        Largest share of `windows` that shows an object (paper: 0.25).
    images : int
        Whose gradients make one step.
    width : int
        Units of fc6 and of fc7.
    dropout : float
        After either (paper: 0.5).
    """

    stage: str | None = None
    epochs: int = 6
    rate: float = 1e-3
    trunk_rate: float = 0.1
    decay: float = 0.01
    windows: int = 64
    positives: float = 0.25
    images: int = 4
    width: int = 512
    dropout: float = 0.5

    def __post_init__(self) -> None:
        if min(self.rate, self.windows, self.images, self.width) <= 0 or self.epochs < 0:
            raise ValueError(f"found {self}, expected rate, windows, images and width above 0, and epochs")
        if not 0 < self.positives <= 1 or not 0 <= self.dropout < 1 or min(self.trunk_rate, self.decay) < 0:
            raise ValueError(
                f"found {self}, expected positives above 0 to 1, dropout from 0 to below 1, no negative rates"
            )


@dataclass(frozen=True)
class TuningRecord:
    """What an epoch gave.

    Attributes
    ----------
    epoch : int
        From 0.
    loss : float
        Mean of the cross entropy and the loss of the deltas.
    error : float
        Share of windows that were given another class than theirs.
    """

    epoch: int
    loss: float
    error: float


class FineTuner:
    """A head, and a trunk of its own, in training.

    Parameters
    ----------
    trunk : Trunk
        Stays as it is.
    images : sequence of Path or (H, W, 3) uint8 arrays
    windows : sequence of (R, 4) float32
        Candidate windows of each image.
    targets : sequence of Target
        Annotations of each image.
    classes : sequence of str
    levels : sequence of int
        Pyramid.
    sides : sequence of int
        Shorter sides of the scales in pixels.
    reference : float
        Side that a window should have at its scale, in pixels.
    projection, scale_rule : str
        See `sppnet.geometry.project` and `sppnet.geometry.choose_scale`.
    tuning : Tuning
    seed : int
        Of every random draw.
    folder : Path, optional
        Where a checkpoint is written after every epoch. If it holds one of the same fit, training goes on
        from there.

    Attributes
    ----------
    history : list of TuningRecord
        One per epoch.
    trunk : Trunk
        The one that was given, or a copy whose layers behind `Tuning.stage` learn.
    head : Head
    scale : float
        Pooled features are multiplied by this, so that their mean norm is 20 at the start.

    Raises
    ------
    ValueError
        If the checkpoint is damaged.
    """

    def __init__(
        self,
        trunk: Trunk,
        images: Sequence[Image],
        windows: Sequence[Boxes],
        targets: Sequence[Target],
        classes: Sequence[str],
        *,
        levels: Sequence[int],
        sides: Sequence[int],
        reference: float,
        projection: str,
        scale_rule: str,
        tuning: Tuning,
        seed: int = 0,
        folder: Path | None = None,
    ) -> None:
        self.images, self.levels, self.sides, self.tuning, self.seed = images, levels, sides, tuning, seed
        self.reference, self.projection, self.scale_rule = reference, projection, scale_rule
        self.plans = [plan_tuning(w, t, classes) for w, t in zip(windows, targets, strict=True)]
        self.trunk = trunk if tuning.stage is None else trunk.copy()
        self.learning = {} if tuning.stage is None else self.trunk.layers_after(tuning.stage)
        for parameter in self.learning.values():
            parameter.requires_grad_(True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            length = sum(pyramid_length(channels, levels) for channels in trunk.channels)
            self.head = Head(length, len(classes), tuning.width, tuning.dropout).to(trunk.device)
        self.scale = self._measure_scale()
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.head.parameters()), "factor": 1.0},
                {"params": list(self.learning.values()), "factor": tuning.trunk_rate},
            ],
            lr=tuning.rate,
            weight_decay=tuning.decay,
        )
        self.history: list[TuningRecord] = []
        identity = json.dumps(
            [
                *(trunk.signature, list(levels), list(sides), reference, projection, scale_rule),
                *(asdict(tuning), list(classes), _digest(self.plans), seed),
            ]
        )
        name = f"tuning-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.safetensors"
        self.checkpoint = None if folder is None else folder / name
        if self.checkpoint is not None and self.checkpoint.exists():
            self._resume(self.checkpoint)

    def train(self, track: Track = no_track) -> None:
        """Train what is left of the epochs; `history` tells how they went.

        Raises
        ------
        ValueError
            If the loss is not finite; the message names the image.
        """
        with torch.random.fork_rng():
            while len(self.history) < self.tuning.epochs:
                self._epoch(len(self.history), track)
                if self.checkpoint is not None:
                    self._save(self.checkpoint)
        self._finish()

    def _finish(self) -> None:
        """Round the trunk's weights to the half precision that they are kept in, and end training."""
        if self.learning:
            self.trunk.network.requires_grad_(False)
            self.trunk.retune(self.learning)
        self.head.eval().requires_grad_(False)

    def _epoch(self, number: int, track: Track) -> None:
        count, tuning = len(self.images), self.tuning
        # Drawn anew for every epoch, so that training goes on after any of them as if it had not stopped.
        rng = np.random.default_rng([self.seed, number])
        torch.manual_seed(int(rng.integers(2**31)))
        self.head.train()
        results = []
        order = track(rng.permutation(count).tolist(), f"Fine-tuning, epoch {number + 1} of {tuning.epochs}")
        for n, i in enumerate(order, 1):
            results.append(self._learn(i, rng))
            if n % tuning.images == 0 or n == count:
                self._step((number + n / count) / tuning.epochs)
        met = [result for result in results if result is not None]
        loss, error = np.mean(met, axis=0) if met else (math.nan, math.nan)
        self.history.append(TuningRecord(number, float(loss), float(error)))

    @torch.no_grad()
    def _measure_scale(self) -> float:
        """Return what gives windows of a few images a mean norm of 20, as in the released code."""
        rng = np.random.default_rng(self.seed)
        norms = []
        for i in rng.permutation(len(self.images))[:50]:
            pooled, *_ = self._look(int(i), rng)
            norms.append(torch.linalg.vector_norm(pooled.detach(), dim=1))
        mean = float(torch.cat(norms).mean()) if norms else 0.0
        return 20 / mean if mean > 0 else 1.0

    def _look(self, i: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return the pooled features, classes and deltas of windows drawn from an image."""
        image, plan = self.images[i], self.plans[i]
        pixels = read_image(image) if isinstance(image, Path) else image
        side, there = self._draw_scale(plan, pixels.shape[:2], rng)
        chosen = there.draw(self.tuning.windows, self.tuning.positives, rng)
        boxes, truth = plan.boxes[chosen], plan.truth[chosen]
        if rng.random() < 0.5:
            width = pixels.shape[1]
            pixels = np.ascontiguousarray(pixels[:, ::-1])
            boxes, truth = mirror(boxes, width), mirror(truth, width)
        maps = self.trunk.differentiable(pixels, side) if self.learning else self.trunk(pixels, side)
        pooled = pool_windows(
            (maps,), boxes, pixels.shape[:2], (side,), self.levels, projection=self.projection
        )
        deltas = torch.from_numpy(encode_deltas(boxes, truth)) / torch.tensor(DELTA_UNITS)
        return pooled, torch.from_numpy(plan.labels[chosen]).to(pooled.device), deltas.to(pooled.device)

    def _draw_scale(
        self, plan: TuningPlan, shape: tuple[int, int], rng: np.random.Generator
    ) -> tuple[int, TuningPlan]:
        """Draw a scale, more often one that suits objects; return its side, and the plan of its windows."""
        reference = self.reference * np.exp(rng.uniform(-_JITTER, _JITTER))
        scale = choose_scale(plan.boxes, *shape, self.sides, reference, self.scale_rule)
        telling = plan.positive if len(plan.positive) else plan.background
        if not len(telling):
            return self.sides[0], plan
        weights = np.sqrt(np.bincount(scale[telling], minlength=len(self.sides)))
        s = rng.choice(len(self.sides), p=weights / weights.sum())
        return self.sides[s], replace(
            plan,
            positive=plan.positive[scale[plan.positive] == s],
            background=plan.background[scale[plan.background] == s],
        )

    def _learn(self, i: int, rng: np.random.Generator) -> tuple[float, float] | None:
        """Add the gradient of an image's windows; return loss and error, None if it has no window."""
        pooled, labels, deltas = self._look(i, rng)
        if not len(labels):
            return None
        scores, moves = self.head(pooled * self.scale)
        loss = F.cross_entropy(scores, labels)
        shown = labels < self.head.count
        moved = F.smooth_l1_loss(moves[shown, labels[shown]], deltas[shown], reduction="sum")
        loss = loss + moved / len(labels)
        value = loss.item()
        if not math.isfinite(value):
            raise ValueError(
                f"found the loss {value} in epoch {len(self.history)} at a rate of {self.tuning.rate:g}, "
                f"expected a finite number; the image: {_name(self.images[i], i)}"
            )
        (loss / self.tuning.images).backward()  # type: ignore[no-untyped-call]
        return value, float((scores.argmax(dim=1) != labels).float().mean())

    def _step(self, done: float) -> None:
        """Move the weights, when a share of all training is done: a short rise, then a cosine to 0."""
        rate = self.tuning.rate * min(1.0, done / 0.03) * (1 + math.cos(math.pi * done)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, 10.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _parameters(self) -> dict[str, nn.Parameter]:
        head = {f"head.{name}": p for name, p in self.head.named_parameters()}
        return head | {f"trunk.{name}": p for name, p in self.learning.items()}

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
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if facts.get("format") != FORMAT or facts.get("version") != VERSION:
                raise ValueError(f"{path}: found another file, expected {FORMAT} {VERSION}")
            progress = json.loads(facts["progress"])
            for name, parameter in self._parameters().items():
                parameter.copy_(tensors[f"value.{name}"])
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if f"{key}.{name}" in tensors:
                        self.optimizer.state[parameter][key] = tensors[f"{key}.{name}"].to(parameter.device)
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path}: found a damaged checkpoint ({error}); remove it") from None
        self.scale = progress["scale"]
        self.history = [TuningRecord(**record) for record in progress["history"]]


def _digest(plans: Sequence[TuningPlan]) -> str:
    """Return the SHA-256 of what the images' windows teach, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for plan in plans:
        for part in (plan.boxes, plan.labels, plan.truth, plan.positive, plan.background):
            digest.update(part.tobytes())
    return digest.hexdigest()


def _name(image: Image, i: int) -> str:
    return str(image) if isinstance(image, Path) else f"number {i}"
