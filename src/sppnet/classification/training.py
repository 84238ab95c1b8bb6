"""One training loop over any source of batches; it can be stopped at any moment and goes on bit for bit.

The loop is a generator of one record per epoch. It runs on one processor or, through Lightning Fabric, on
several GPUs or machines under ``torchrun``; Fabric wraps the model and the backward pass and leaves data,
loop and state alone (paper sections 2.3 and 3.1).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor

from sppnet.classification.batches import Batch, Source
from sppnet.classification.network import SPPNet
from sppnet.errors import SppnetError, TrainingError
from sppnet.pooling.padded import TrueSizes
from sppnet.storage import read_checkpoint, write_tensors

FORMAT, VERSION = "sppnet-checkpoint", "1"
_NAMED = 5


@dataclass(frozen=True)
class Recipe:
    """How weights move: stochastic gradient descent with momentum (paper section 3.1).

    Attributes
    ----------
    epochs : int
        How many at most; 70 for ZF-5 in the paper, 90 for the others.
    rate : float
        Learning rate.
    backbone_rate : float
        Factor of the rate for the backbone: 1 from random weights, less for a pretrained backbone, 0 to freeze it.
    drops : tuple of int, optional
        Epochs before which the rate is divided by 10. By default it is divided whenever the error has not
        improved for `patience` epochs, at most twice; the third time, training ends.
    patience : int
    momentum, decay : float
        Momentum, and weight decay.
    accumulate : int
        Batches whose gradients make one step; what is left at the end of an epoch makes a smaller one.
    frozen : int
        First groups of the backbone's layers that stay as they are, see `SPPNet.groups`. They cost no backward
        pass, and of a pretrained backbone they know already what they could learn.
    smoothing : float
        Share of each label that is spread evenly over all classes.
    """

    epochs: int = 70
    rate: float = 0.01
    backbone_rate: float = 1.0
    drops: tuple[int, ...] | None = None
    patience: int = 5
    momentum: float = 0.9
    decay: float = 5e-4
    accumulate: int = 1
    frozen: int = 0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        positive = (self.epochs, self.rate, self.patience, self.accumulate)
        if min(positive) <= 0 or min(self.backbone_rate, self.momentum, self.decay, self.frozen) < 0:
            raise SppnetError(f"found {self}, expected epochs, rate, patience and accumulate above 0")
        if not 0 <= self.smoothing < 1:
            raise SppnetError(f"found the smoothing {self.smoothing}, expected 0 or more and less than 1")


@dataclass(frozen=True)
class EpochRecord:
    """What an epoch was and gave.

    Attributes
    ----------
    epoch : int
        From 0.
    size : int
        Of the images.
    rate : float
    loss, error : float
        Means over the training images as they came: cross entropy, share of wrong answers.
    validation_error : float or None
        Share of wrong answers on central views.
    images : int
        That were trained on.
    unreadable : int
        Files that could not be read, so far, in training and validation.
    seconds : float
    skipped : tuple of str
        A line for each of these files that is met here for the first time.
    """

    epoch: int
    size: int
    rate: float
    loss: float
    error: float
    validation_error: float | None
    images: int
    unreadable: int
    seconds: float
    skipped: tuple[str, ...] = ()


@dataclass
class _Progress:
    """Where training stands, between two steps."""

    batches: int
    epoch: int = 0
    batch: int = 0
    loss: float = 0.0
    wrong: int = 0
    images: int = 0
    seconds: float = 0.0
    divided: int = 0
    best: float = math.inf
    waited: int = 0
    unreadable: list[str] = field(default_factory=list)
    history: list[EpochRecord] = field(default_factory=list)


def train(
    network: SPPNet,
    source: Source,
    recipe: Recipe,
    *,
    validation: Iterable[Batch] | None = None,
    checkpoint: str | Path | None = None,
    identity: str = "",
    fabric: Fabric | None = None,
    seed: int = 0,
    save_every: float = 300.0,
    unreadable_limit: int | None = None,
) -> Iterator[EpochRecord]:
    """Train a network; one record per epoch, those of an earlier, interrupted run included.

    Parameters
    ----------
    network : SPPNet
        Its weights are changed in place. Between epochs and afterwards it is in evaluation mode.
    source : Source
        Of batches, see `sppnet.classification.batches`.
    recipe : Recipe
    validation : iterable of Batch, optional
        Central views of other images (this process's share of them); their error decides when the rate drops.
    checkpoint : path, optional
        Written after every epoch and every `save_every` seconds, whole or not at all. If it exists, training
        goes on from it, on one processor to the same weights bit for bit, and on another number of processes
        if they still make the same batches together.
    identity : str
        What the run is, in words that are stored in the checkpoint; one of another identity is refused.
    fabric : lightning_fabric.Fabric, optional
        Device, precision and processes, launched; by default this processor. The scale of the precision
        ``16-mixed`` is not in the checkpoint; ``bf16-mixed`` has none.
    seed : int
        Of dropout, with the number of the batch: PyTorch's generator is seeded before each.
    save_every : float
    unreadable_limit : int, optional
        Most distinct files that may be unreadable; by default 1 % of the images met in an epoch, at least 10.
        A process counts its own, and those of the others whenever a checkpoint is due and after an epoch.

    Yields
    ------
    EpochRecord

    Raises
    ------
    TrainingError
        If the loss is not finite (names the files of the batch), or too many files are unreadable.
    SppnetError
        If `checkpoint` belongs to another run, or is damaged.
    OSError
        If the checkpoint cannot be written; the last good one stays.
    """
    fabric = fabric or Fabric(accelerator="cpu", devices=1)
    path = None if checkpoint is None else Path(checkpoint)
    if unreadable_limit is None:
        unreadable_limit = max(10, len(source) * source.batch_size // 100)
    run = _Run(network, source, recipe, path, identity, fabric, seed, save_every, unreadable_limit)
    yield from run.resume()
    while run.goes_on:
        run.set_rate()
        run.epoch()
        yield run.finish(validation)


def _optimizer(network: SPPNet, recipe: Recipe) -> torch.optim.SGD:
    groups = [{"params": list(network.head.parameters()), "factor": 1.0}]
    if recipe.backbone_rate:
        learning = [p for p in network.backbone.parameters() if p.requires_grad]
        groups.append({"params": learning, "factor": recipe.backbone_rate})
    return torch.optim.SGD(groups, recipe.rate, recipe.momentum, weight_decay=recipe.decay)


def _freeze(network: SPPNet, count: int) -> None:
    groups = network.groups
    if count > len(groups):
        raise SppnetError(
            f"found {count} groups to freeze, expected at most the {len(groups)} of the backbone"
        )
    for parameter in chain.from_iterable(groups[:count]):
        parameter.requires_grad_(False)


class _Run:
    """A network in training: its optimizer, where it stands, and where that is written."""

    def __init__(
        self,
        network: SPPNet,
        source: Source,
        recipe: Recipe,
        path: Path | None,
        identity: str,
        fabric: Fabric,
        seed: int,
        save_every: float,
        limit: int,
    ) -> None:
        self.network, self.source, self.recipe, self.fabric = network, source, recipe, fabric
        self.path, self.identity, self.save_every = path, identity, save_every
        self.seed, self.limit = seed, limit
        network.backbone.requires_grad_(recipe.backbone_rate > 0)
        _freeze(network, recipe.frozen)
        self.module, self.optimizer = fabric.setup(network, _optimizer(network, recipe))
        network.eval()
        self.progress = _Progress(len(source))
        self.saved = self.started = time.monotonic()

    def resume(self) -> list[EpochRecord]:
        """Go on from the checkpoint, if there is one; return the records of the epochs before it."""
        if self.path is not None and self.path.exists():
            self.progress = _resume(self.path, self.identity, self.network, self.optimizer, len(self.source))
            if self.fabric.global_rank:
                self.progress.loss, self.progress.wrong, self.progress.images = 0.0, 0, 0
        return list(self.progress.history)

    @property
    def goes_on(self) -> bool:
        """Whether there is another epoch."""
        return self.progress.epoch < self.recipe.epochs and self.progress.divided <= 2

    def set_rate(self) -> None:
        """Set the learning rate of the epoch that begins."""
        progress, drops = self.progress, self.recipe.drops
        divided = progress.divided if drops is None else sum(progress.epoch >= d for d in drops)
        self.rate = self.recipe.rate * 0.1**divided
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * group["factor"]

    def epoch(self) -> None:
        """Train on what is left of the epoch, and save now and then."""
        progress, every = self.progress, self.recipe.accumulate
        self.network.train()
        self.network.backbone.train(self.recipe.backbone_rate > 0)
        batches = self.source.epoch(progress.epoch, progress.batch)
        for i, batch in enumerate(batches, progress.batch):
            self._note(batch.unreadable)
            torch.manual_seed(self._seed(i))
            steps = (i + 1) % every == 0 or i == progress.batches - 1
            self._learn(batch, 1 / every, steps)
            if steps:
                progress.batch = i + 1
                if self.path is not None and self._due():
                    self.save(self.path)

    def _seed(self, batch: int) -> int:
        """Return the seed of what is random in a batch, so that none depends on what came before."""
        place = self.seed, self.progress.epoch, batch, self.fabric.global_rank
        return int(np.random.SeedSequence(place).generate_state(1)[0])

    def _learn(self, batch: Batch, share: float, steps: bool) -> None:
        """Add the gradient of a batch to that of its step, and make the step if it is complete."""
        images, labels, sizes, count = batch.images, batch.labels, batch.sizes, len(batch.labels)
        if not count:
            # A black image without weight: other processes wait for the gradient of this one.
            images = torch.zeros(1, 3, self.network.size, self.network.size, dtype=torch.uint8)
            labels, share = torch.zeros(1, dtype=torch.int64), 0.0
        images, labels = self.fabric.to_device(images), self.fabric.to_device(labels)
        waits = not steps and self.fabric.world_size > 1
        with self.fabric.no_backward_sync(self.module, enabled=waits):
            scores = self._scores(images, sizes)
            loss = F.cross_entropy(scores.float(), labels, label_smoothing=self.recipe.smoothing)
            value, wrong = loss.item(), int((scores.detach().argmax(dim=1) != labels).sum())
            if not math.isfinite(value):
                raise TrainingError(self._diverged(value, batch))
            self.fabric.backward(loss * share)
        if count:
            self.progress.loss += value * count
            self.progress.wrong += wrong
            self.progress.images += count
        if steps:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _scores(self, images: Tensor, sizes: Tensor | None) -> Tensor:
        with nullcontext() if sizes is None else TrueSizes(images, sizes):
            scores: Tensor = self.module(images)
        return scores

    def _diverged(self, value: float, batch: Batch) -> str:
        names = ", ".join(map(str, batch.names[:_NAMED]))
        more = f" and {len(batch.names) - _NAMED} more" if len(batch.names) > _NAMED else ""
        return (
            f"found the loss {value} in epoch {self.progress.epoch} at a learning rate of {self.rate:g}, "
            f"expected a finite number; the batch: {names}{more}"
        )

    def _note(self, lines: Sequence[str]) -> None:
        """Keep the names of files that could not be read; stop at too many."""
        known = self.progress.unreadable
        known += [line for line in dict.fromkeys(lines) if line not in known]
        if len(known) > self.limit:
            raise TrainingError(
                f"{len(known)} files could not be read, expected at most {self.limit}; last: {known[-1]}"
            )

    def _share_notes(self) -> None:
        """Let every process know what the others noted."""
        if self.fabric.world_size > 1:
            notes: list[list[str]] = [[]] * self.fabric.world_size
            torch.distributed.all_gather_object(notes, self.progress.unreadable)
            self.progress.unreadable = list(dict.fromkeys(chain.from_iterable(notes)))

    def _due(self) -> bool:
        due = time.monotonic() - self.saved > self.save_every
        return bool(self.fabric.broadcast(due)) if self.fabric.world_size > 1 else due

    def finish(self, validation: Iterable[Batch] | None) -> EpochRecord:
        """Close an epoch: measure, decide on the rate of the next, save."""
        self.network.eval()
        progress = self.progress
        loss, wrong, images = self._total([progress.loss, progress.wrong, progress.images])
        error = wrong / images if images else math.nan
        measured = None if validation is None else self._error(validation)
        self._share_notes()
        self._note([])
        before = progress.history[-1].unreadable if progress.history else 0
        record = EpochRecord(
            epoch=progress.epoch,
            size=self.source.size_of(progress.epoch),
            rate=self.rate,
            loss=loss / images if images else math.nan,
            error=error,
            validation_error=measured,
            images=int(images),
            unreadable=len(progress.unreadable),
            seconds=progress.seconds + time.monotonic() - self.started,
            skipped=tuple(progress.unreadable[before:]),
        )
        progress.history.append(record)
        self._wait(error if measured is None else measured)
        progress.epoch, progress.batch = progress.epoch + 1, 0
        progress.loss, progress.wrong, progress.images, progress.seconds = 0.0, 0, 0, 0.0
        self.started = time.monotonic()
        if self.path is not None:
            self.save(self.path)
        return record

    def _wait(self, error: float) -> None:
        """Divide the rate when the error has not improved for long enough."""
        progress = self.progress
        if error < progress.best:
            progress.best, progress.waited = error, 0
            return
        progress.waited += 1
        if self.recipe.drops is None and progress.waited >= self.recipe.patience:
            progress.divided, progress.waited = progress.divided + 1, 0

    def _error(self, validation: Iterable[Batch]) -> float:
        wrong = images = 0
        # Not through the wrapped module: the processes need not have equally many batches here.
        with torch.inference_mode(), self.fabric.autocast():
            for batch in validation:
                self._note(batch.unreadable)
                if len(batch.labels):
                    scores = self.network(self.fabric.to_device(batch.images)).cpu()
                    wrong += int((scores.argmax(dim=1) != batch.labels).sum())
                    images += len(batch.labels)
        total = self._total([wrong, images])
        return total[0] / total[1] if total[1] else math.nan

    def _total(self, values: list[float]) -> list[float]:
        """Return sums over all processes."""
        if self.fabric.world_size == 1:
            return values
        sums = self.fabric.all_reduce(torch.tensor(values, dtype=torch.float64), reduce_op="sum")
        return [float(value) for value in sums]

    def save(self, path: Path) -> None:
        """Write everything that the next step depends on."""
        progress, now = self.progress, time.monotonic()
        self._share_notes()
        sums = self._total([progress.loss, progress.wrong, progress.images])
        self.saved = now
        if self.fabric.global_rank:
            return
        stored = asdict(progress) | {"seconds": progress.seconds + now - self.started}
        stored |= {"loss": sums[0], "wrong": int(sums[1]), "images": int(sums[2])}
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        for name, parameter in self.network.named_parameters():
            momentum = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum.{name}"] = momentum
        facts = {"format": FORMAT, "version": VERSION, "identity": self.identity}
        write_tensors(path, tensors, {**facts, "progress": json.dumps(stored)})


def _resume(
    path: Path, identity: str, network: SPPNet, optimizer: torch.optim.SGD, batches: int
) -> _Progress:
    """Load a checkpoint into a network and its optimizer."""
    facts, tensors = read_checkpoint(path, FORMAT, VERSION)
    if facts.get("identity") != identity:
        raise SppnetError(
            f"{path}: found the checkpoint of another run ({facts.get('identity')}), expected {identity}; "
            "remove it to start anew"
        )
    try:
        progress = _Progress(**json.loads(facts["progress"]))
        progress.history = [_record(values) for values in progress.history]
        network.load_state_dict(
            {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
        )
        for name, parameter in network.named_parameters():
            if f"momentum.{name}" in tensors:
                # In the layout of the parameter, or every step would be slower from here on.
                momentum = torch.empty_like(parameter).copy_(tensors[f"momentum.{name}"])
                optimizer.state[parameter]["momentum_buffer"] = momentum
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise SppnetError(
            f"{path}: found a checkpoint that does not fit the network ({reason}); remove it to start anew"
        ) from None
    if progress.batches != batches:
        raise SppnetError(
            f"{path}: found a checkpoint of epochs of {progress.batches} batches, expected {batches}; "
            "remove it to start anew"
        )
    return progress


def _record(values: Any) -> EpochRecord:
    return EpochRecord(**{**values, "skipped": tuple(values["skipped"])})
