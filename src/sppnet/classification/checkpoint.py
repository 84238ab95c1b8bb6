"""Where a training stands, and the file from which it goes on after it was stopped."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sppnet.datasets.records import Contents
from sppnet.errors import SppnetError
from sppnet.storage import atomic_path, read_checkpoint, write_tensors

FORMAT, VERSION = "sppnet-checkpoint", "2"


@dataclass(frozen=True)
class EpochRecord:
    """What an epoch was and gave.

    Attributes
    ----------
    epoch : int
        Number of the epoch, from 0.
    side : int
        Side of its images in pixels.
    lr : float
        Learning rate.
    loss, error : float
        Means over the training images as they came: cross entropy, share of wrong answers.
    validation_error : float or None
        Share of wrong answers on central views of the validation images.
    images : int
        Number of images that were trained on.
    unreadable : int
        Number of files that could not be read, so far, in training and validation.
    seconds : float
        Wall-clock time.
    skipped : tuple of str
        A line for each of the unreadable files that is met here for the first time.
    """

    epoch: int
    side: int
    lr: float
    loss: float
    error: float
    validation_error: float | None
    images: int
    unreadable: int
    seconds: float
    skipped: tuple[str, ...] = ()


def write_records(records: Sequence[EpochRecord], path: str | Path) -> None:
    """Write what every epoch was and gave as a CSV file, a row for each; whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [entry.name for entry in fields(EpochRecord)])
        writer.writeheader()
        writer.writerows(asdict(record) for record in records)


@dataclass
class Progress:
    """Where training stands, between two steps.

    Attributes
    ----------
    batches : int
        Number of batches of an epoch.
    epoch, batch : int
        The next epoch, and the next batch of it.
    loss, wrong, images, seconds
        Sums over the part of the epoch that is done.
    divided : int
        How often the learning rate was divided because the error stalled.
    best, waited
        The least error, and for how many epochs there was no less.
    unreadable : list of str
        A line for each file that could not be read.
    history : list of EpochRecord
        The epochs before.
    """

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


@dataclass(frozen=True)
class Checkpointing:
    """Where a training is written down, how often, and what it is bound to.

    Attributes
    ----------
    path : Path
        The file. If it exists, training goes on from it.
    settings : mapping of str
        What the run depends on, in what JSON can hold. A checkpoint of a run with others is refused, and the
        error says which.
    data : mapping from str to Contents
        The data sets of the run by what they are for. A checkpoint of a run on others is refused, and the
        error says in what they differ.
    every : float
        Seconds after which it is written again, besides the ends of epochs.
    """

    path: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Contents] = field(default_factory=dict)
    every: float = 300.0

    def save(self, network: nn.Module, optimizer: torch.optim.SGD, progress: dict[str, Any]) -> None:
        """Write everything that the next step depends on, whole or not at all."""
        tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
        for name, parameter in network.named_parameters():
            momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum.{name}"] = momentum
        # NumPy has no bfloat16; as float32 every number is the same.
        tensors = {n: v.float() if v.dtype == torch.bfloat16 else v for n, v in tensors.items()}
        facts = {"format": FORMAT, "version": VERSION, "progress": json.dumps(progress)}
        facts |= {"settings": json.dumps(dict(self.settings)), "data": json.dumps(dict(self.data))}
        write_tensors(self.path, tensors, facts)

    def resume(self, network: nn.Module, optimizer: torch.optim.SGD, batches: int) -> Progress:
        """Load the checkpoint into a network and its optimizer, and return where the training stood.

        Raises
        ------
        SppnetError
            If it is damaged, of another run, on other data, or does not fit the network.
        """
        facts, tensors = read_checkpoint(self.path, FORMAT, VERSION)
        try:
            self._check(json.loads(facts["settings"]), json.loads(facts["data"]))
            values = json.loads(facts["progress"])
            progress = Progress(**{**values, "history": [_record(v) for v in values["history"]]})
            network.load_state_dict(
                {
                    name.removeprefix("network."): torch.from_numpy(value)
                    for name, value in tensors.items()
                    if name.startswith("network.")
                }
            )
            for name, parameter in network.named_parameters():
                if f"momentum.{name}" in tensors:
                    # In the layout of the parameter, or every step would be slower from here on.
                    momentum = torch.empty_like(parameter).copy_(
                        torch.from_numpy(tensors[f"momentum.{name}"])
                    )
                    optimizer.state[parameter]["momentum_buffer"] = momentum
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, RuntimeError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise self._refusal(f"a checkpoint that does not fit the network ({reason})") from None
        if progress.batches != batches:
            raise self._refusal(f"a checkpoint of epochs of {progress.batches} batches, expected {batches}")
        return progress

    def _check(self, settings: dict[str, Any], data: dict[str, Any]) -> None:
        """Raise an error unless a checkpoint is of a run with these settings on these data."""
        # As JSON has them, in which a tuple is a list.
        expected = json.loads(json.dumps(dict(self.settings)))
        changed = [k for k in {**settings, **expected} if settings.get(k) != expected.get(k)]
        if changed:
            found, wanted = (", ".join(f"{k} {s.get(k)}" for k in changed) for s in (settings, expected))
            raise self._refusal(f"the checkpoint of another run ({found}), expected {wanted}")
        if data.keys() != self.data.keys():
            found, wanted = (", ".join(names) or "nothing" for names in (data, self.data))
            raise self._refusal(f"the checkpoint of a run on {found}, expected {wanted}")
        for name, contents in self.data.items():
            difference = Contents(*data[name]).difference(contents)
            if difference:
                raise self._refusal(f"the checkpoint of a run on other {name}, now with {difference}")

    def _refusal(self, found: str) -> SppnetError:
        return SppnetError(f"{self.path}: found {found}; remove it to start anew")


def _record(values: dict[str, Any]) -> EpochRecord:
    return EpochRecord(**{**values, "skipped": tuple(values["skipped"])})
