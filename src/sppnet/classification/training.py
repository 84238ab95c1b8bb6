"""One training loop over any source of batches; it can be stopped at any moment and goes on bit for bit.

The loop is a generator of one record per epoch. It runs on one processor or, through Lightning Fabric, on
several GPUs or machines under ``torchrun``; Fabric wraps the model and the backward pass and leaves data,
loop and state alone (paper sections 2.3 and 3.1).
"""

from __future__ import annotations

import atexit
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from lightning_fabric import Fabric

from sppnet.classification.batches import Batch, Source
from sppnet.classification.checkpoint import Checkpointing, EpochRecord, Progress
from sppnet.errors import SppnetError, TrainingError, check_choice

if TYPE_CHECKING:
    from sppnet.classification.network import SPPNet

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
_NAMED = 5


@dataclass(frozen=True)
class Recipe:
    """How weights move: stochastic gradient descent with momentum (paper section 3.1).

    Attributes
    ----------
    epochs : int
        Most epochs; 70 for ZF-5 in the paper, 90 for the others.
    lr : float
        Learning rate.
    backbone_lr : float
        Factor of the learning rate for the backbone: 1 from random weights, less for a pretrained backbone,
        0 to freeze it.
    milestones : tuple of int, optional
        Epochs before which the learning rate is divided by 10. By default it is divided whenever the error
        has not improved for `patience` epochs, at most twice; the third time, training ends.
    patience : int
        Epochs to wait for a lower error.
    momentum, weight_decay : float
        Constants of the gradient descent.
    accumulate : int
        Batches whose gradients make one step; what is left at the end of an epoch makes a smaller one.
    frozen : int
        First groups of the backbone's layers that stay as they are, see `SPPNet.groups`. They cost no
        backward pass, and of a pretrained backbone they know already what they could learn.
    label_smoothing : float
        Share of each label that is spread evenly over all classes.
    """

    epochs: int = 70
    lr: float = 0.01
    backbone_lr: float = 1.0
    milestones: tuple[int, ...] | None = None
    patience: int = 5
    momentum: float = 0.9
    weight_decay: float = 5e-4
    accumulate: int = 1
    frozen: int = 0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        positive = (self.epochs, self.lr, self.patience, self.accumulate)
        if min(positive) <= 0 or min(self.backbone_lr, self.momentum, self.weight_decay, self.frozen) < 0:
            raise SppnetError(f"found {self}, expected epochs, lr, patience and accumulate above 0")
        if not 0 <= self.label_smoothing < 1:
            found = self.label_smoothing
            raise SppnetError(f"found the label smoothing {found}, expected 0 or more and less than 1")

    @classmethod
    def pretrained(cls, groups: int, epochs: int | None = None) -> Recipe:
        """Return the recipe for a pretrained backbone.

        The first half of its layers stays; the rest learns at half the rate, which is divided by 10 after 60
        and 85 % of the epochs.

        Parameters
        ----------
        groups : int
            In how many groups its layers come, see `SPPNet.groups`.
        epochs : int, optional
            How many there are; by default 8.
        """
        epochs = 8 if epochs is None else epochs
        milestones = round(0.6 * epochs), round(0.85 * epochs)
        return cls(epochs, backbone_lr=0.5, milestones=milestones, frozen=groups // 2, label_smoothing=0.1)


def launch(device: str, precision: str = "32-true") -> Fabric:
    """Return the processes that train: this one, or those that torchrun started.

    Parameters
    ----------
    device : {"cpu", "cuda"}
        What they compute on.
    precision : {"32-true", "bf16-mixed", "16-mixed"}
        What they compute in.

    Raises
    ------
    SppnetError
        If there is no such device or precision, or there are fewer GPUs than processes.
    """
    check_choice("device of a training", device, ("cpu", "cuda"))
    check_choice("precision", precision, PRECISIONS)
    local, world = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda" and local > torch.cuda.device_count():
        raise SppnetError(f"found {torch.cuda.device_count()} GPUs, expected the {local} that were asked for")
    fabric = Fabric(
        accelerator=device,
        devices=local,
        num_nodes=world // local,
        strategy="ddp" if world > 1 else "auto",
        precision=precision,  # type: ignore[arg-type]
    )
    fabric.launch()
    if torch.distributed.is_initialized() and torch.distributed.get_backend() != "nccl":
        # Threads of a group that outlives Python can abort the process; Fabric only sees to nccl.
        atexit.register(torch.distributed.destroy_process_group)
    return fabric


def train(
    network: SPPNet,
    source: Source,
    recipe: Recipe,
    *,
    validation: Iterable[Batch] | None = None,
    checkpointing: Checkpointing | None = None,
    fabric: Fabric | None = None,
    seed: int = 0,
    unreadable_limit: int | None = None,
) -> Iterator[EpochRecord]:
    """Train a network; one record per epoch, those of an earlier, interrupted run included.

    Parameters
    ----------
    network : SPPNet
        Its weights are changed in place. Between epochs and afterwards it is in evaluation mode.
    source : Source
        The batches, see `sppnet.classification.batches`.
    recipe : Recipe
        How weights move.
    validation : iterable of Batch, optional
        Central views of other images (this process's share of them); their error decides when the learning
        rate drops.
    checkpointing : Checkpointing, optional
        Where the run is written down, whole or not at all. If the file exists, training goes on from it, on
        one processor to the same weights bit for bit, and on another number of processes if they still make
        the same batches together.
    fabric : lightning_fabric.Fabric, optional
        Device, precision and processes, launched; by default this processor. The scale of the precision
        ``16-mixed`` is not in the checkpoint; ``bf16-mixed`` has none.
    seed : int
        Seed of dropout, with the number of the batch: PyTorch's generator is seeded before each.
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
        If the checkpoint belongs to another run, or is damaged.
    OSError
        If the checkpoint cannot be written; the last good one stays.
    """
    fabric = fabric or Fabric(accelerator="cpu", devices=1)
    if unreadable_limit is None:
        unreadable_limit = max(10, len(source) * source.batch_size // 100)
    run = _Run(network, source, recipe, checkpointing, fabric, seed, unreadable_limit)
    yield from run.resume()
    while run.goes_on:
        run.set_lr()
        run.epoch()
        yield run.finish(validation)


def _optimizer(network: SPPNet, recipe: Recipe) -> torch.optim.SGD:
    groups = [{"params": list(network.head.parameters()), "factor": 1.0}]
    if recipe.backbone_lr:
        learning = [p for p in network.backbone.parameters() if p.requires_grad]
        groups.append({"params": learning, "factor": recipe.backbone_lr})
    return torch.optim.SGD(groups, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)


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
        checkpointing: Checkpointing | None,
        fabric: Fabric,
        seed: int,
        limit: int,
    ) -> None:
        self.network, self.source, self.recipe, self.fabric = network, source, recipe, fabric
        self.checkpointing, self.seed, self.limit = checkpointing, seed, limit
        network.backbone.requires_grad_(recipe.backbone_lr > 0)
        _freeze(network, recipe.frozen)
        self.module, self.optimizer = fabric.setup(network, _optimizer(network, recipe))
        network.eval()
        self.progress = Progress(len(source))
        self.saved = self.started = time.monotonic()

    def resume(self) -> list[EpochRecord]:
        """Go on from the checkpoint, if there is one; return the records of the epochs before it."""
        if self.checkpointing is not None and self.checkpointing.path.exists():
            self.progress = self.checkpointing.resume(self.network, self.optimizer, len(self.source))
            if self.fabric.global_rank:
                self.progress.loss, self.progress.wrong, self.progress.images = 0.0, 0, 0
        return list(self.progress.history)

    @property
    def goes_on(self) -> bool:
        """Whether there is another epoch."""
        return self.progress.epoch < self.recipe.epochs and self.progress.divided <= 2

    def set_lr(self) -> None:
        """Set the learning rate of the epoch that begins."""
        progress, milestones = self.progress, self.recipe.milestones
        divided = progress.divided if milestones is None else sum(progress.epoch >= m for m in milestones)
        self.lr = self.recipe.lr * 0.1**divided
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group["factor"]

    def epoch(self) -> None:
        """Train on what is left of the epoch, and save now and then."""
        progress, every = self.progress, self.recipe.accumulate
        self.network.train()
        self.network.backbone.train(self.recipe.backbone_lr > 0)
        batches = self.source.epoch(progress.epoch, progress.batch)
        for i, batch in enumerate(batches, progress.batch):
            self._note(batch.unreadable)
            torch.manual_seed(self._seed(i))
            steps = (i + 1) % every == 0 or i == progress.batches - 1
            self._learn(batch, 1 / every, steps)
            if steps:
                progress.batch = i + 1
                if self.checkpointing is not None and self._due(self.checkpointing.every):
                    self.save(self.checkpointing)

    def _seed(self, batch: int) -> int:
        """Return the seed of what is random in a batch, so that none depends on what came before."""
        place = self.seed, self.progress.epoch, batch, self.fabric.global_rank
        return int(np.random.SeedSequence(place).generate_state(1)[0])

    def _learn(self, batch: Batch, share: float, steps: bool) -> None:
        """Add the gradient of a batch to that of its step, and make the step if it is complete."""
        images, labels, count = batch.images, batch.labels, len(batch.labels)
        if not count:
            # A black image without weight: other processes wait for the gradient of this one.
            images = torch.zeros(1, 3, self.network.size, self.network.size, dtype=torch.uint8)
            labels, share = torch.zeros(1, dtype=torch.int64), 0.0
        images, labels = self.fabric.to_device(images), self.fabric.to_device(labels)
        waits = not steps and self.fabric.world_size > 1
        with self.fabric.no_backward_sync(self.module, enabled=waits):
            scores = self.module(images)
            loss = F.cross_entropy(scores.float(), labels, label_smoothing=self.recipe.label_smoothing)
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

    def _diverged(self, value: float, batch: Batch) -> str:
        names = ", ".join(map(str, batch.names[:_NAMED]))
        more = f" and {len(batch.names) - _NAMED} more" if len(batch.names) > _NAMED else ""
        return (
            f"found the loss {value} in epoch {self.progress.epoch} at a learning rate of {self.lr:g}, "
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

    def _due(self, every: float) -> bool:
        due = time.monotonic() - self.saved > every
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
            side=self.source.side_of(progress.epoch),
            lr=self.lr,
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
        if self.checkpointing is not None:
            self.save(self.checkpointing)
        return record

    def _wait(self, error: float) -> None:
        """Divide the rate when the error has not improved for long enough."""
        progress = self.progress
        if error < progress.best:
            progress.best, progress.waited = error, 0
            return
        progress.waited += 1
        if self.recipe.milestones is None and progress.waited >= self.recipe.patience:
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

    def save(self, checkpointing: Checkpointing) -> None:
        """Write everything that the next step depends on."""
        progress, now = self.progress, time.monotonic()
        self._share_notes()
        sums = self._total([progress.loss, progress.wrong, progress.images])
        self.saved = now
        if self.fabric.global_rank:
            return
        stored = asdict(progress) | {"seconds": progress.seconds + now - self.started}
        stored |= {"loss": sums[0], "wrong": int(sums[1]), "images": int(sums[2])}
        checkpointing.save(self.network, self.optimizer, stored)
