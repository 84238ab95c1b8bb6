"""The training of backbone, feature pyramid and region proposals: for so many pictures, or for so long."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from sppnet.errors import SppnetError
from sppnet.features.graph import Graph
from sppnet.progress import Track, no_track
from sppnet.rpn.frozen import run_first
from sppnet.rpn.losses import Truth, losses
from sppnet.rpn.making import graph_of
from sppnet.rpn.network import PyramidNetwork
from sppnet.rpn.pictures import Photo, Pictures
from sppnet.rpn.settings import Joint

# The learning rate rises over this share of a training, and over no more steps than so many.
_RISE, _RISE_STEPS = 0.1, 100
_LEAST_RATE = 0.01
_BETAS = (0.9, 0.99)
_LARGEST_GRADIENT = 10.0
# Batches that are drawn ahead.
_AHEAD = 3
# A step that takes so many times what is usual was interrupted, as by a laptop that slept.
_SLEPT = 20.0
# Parts that a training is drawn in.
_TICKS = 200


@dataclass
class Clock:
    """How much of a training is over: of so many steps, or of so many seconds.

    Attributes
    ----------
    steps : int or None
    seconds : float or None
    """

    steps: int | None = None
    seconds: float | None = None
    taken: int = 0
    passed: float = 0.0
    _last: float = field(default_factory=lambda: time.monotonic())  # looked up then, for tests
    _usual: float = 0.0

    def tick(self) -> None:
        """Count a step."""
        now = time.monotonic()
        step, self._last = now - self._last, now
        if self.taken >= 3 and step > _SLEPT * self._usual:
            step = self._usual
        self.taken, self.passed = self.taken + 1, self.passed + step
        self._usual = self.passed / self.taken

    @property
    def done(self) -> float:
        """The share that is over, from 0 to 1; with seconds, 1 as soon as no step more fits in."""
        if self.steps is not None:
            return min(1.0, self.taken / max(self.steps, 1))
        assert self.seconds is not None
        left = self.seconds - self.passed
        return 1.0 if left < self._usual else min(1.0, self.passed / self.seconds)


class Trainer:
    """A network in training; call `train` for a stretch of it, `graph` for what it has learned.

    Parameters
    ----------
    graph : Graph
        The backbone to start from, with or without a pyramid; stays as it is.
    kinds : sequence of str
        The classes.
    settings : Joint
    seed : int
        Seed of every random draw.
    """

    def __init__(self, graph: Graph, kinds: Sequence[str], settings: Joint, seed: int = 0) -> None:
        self.start, self.kinds, self.settings, self.seed = graph, tuple(kinds), settings, seed
        self.network = PyramidNetwork.start(graph, self.kinds, settings.width)
        # The weights of a stretch end as a mean of its last ones, which is better than any of them.
        self.mean = self.network
        self._stretches = 0

    def train(
        self, photos: list[Photo], side: int, clock: Clock, track: Track = no_track
    ) -> dict[str, float]:
        """Train until the clock says that it is over; return the losses of the last part.

        An interruption from the keyboard ends it early, and what was learned so far stays.

        Raises
        ------
        SppnetError
            If the loss is not finite.
        """
        settings = self.settings
        self.network.load_state_dict(self.mean.state_dict())
        network = self.network.train().to(memory_format=torch.channels_last)
        optimizer = _optimizer(network, settings)
        mean = _Mean(network)
        recent: list[list[float]] = []
        rng = np.random.default_rng([self.seed, self._stretches])
        self._stretches += 1
        pictures, layers = Pictures(photos, side, settings), network.first_layers(settings.frozen)
        first = run_first(layers, self.start.facts)
        with _drawn(pictures, rng, clock) as batches, suppress(KeyboardInterrupt):
            for _ in _until(clock, track, f"Training at {pictures.canvas} x {pictures.canvas} pixels"):
                drawn = next(batches)
                _set_rates(optimizer, clock, settings)
                # Not where they are drawn: threads of two libraries on the same cores are slow.
                values = first([one.pixels for one in drawn])
                found = losses(network(values, layers.count), [_truth(one) for one in drawn])
                if not math.isfinite(loss := found.total.item()):
                    raise SppnetError(
                        f"found a loss of {loss} in training, expected a number: lr is too high"
                    )
                optimizer.zero_grad(set_to_none=True)
                found.total.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(network.parameters(), _LARGEST_GRADIENT)
                optimizer.step()
                clock.tick()
                mean.follow(clock.taken)
                recent = [*recent[-49:], [value.item() for value in found]]
        self.mean = mean.network
        return dict(zip(found._fields, np.mean(recent, axis=0).tolist(), strict=True)) if recent else {}

    def graph(self, name: str) -> Graph:
        """Return the network as a backbone's graph; its licence and source are those of where it began."""
        return graph_of(self.mean, replace(self.start.facts, name=name), self.kinds)


def _optimizer(network: PyramidNetwork, settings: Joint) -> torch.optim.AdamW:
    groups = []
    rates = (settings.backbone_lr, settings.lr)
    for rate, parameters in zip(rates, network.learn(settings.frozen), strict=True):
        for decay, chosen in (
            (settings.weight_decay, [p for p in parameters if p.ndim > 1]),
            (0.0, [p for p in parameters if p.ndim <= 1]),
        ):
            groups.append({"params": chosen, "lr": rate, "highest": rate, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=_BETAS, fused=True)


def _set_rates(optimizer: torch.optim.AdamW, clock: Clock, settings: Joint) -> None:
    """Set the learning rates: one rise, then down along a cosine (Smith, "Super-Convergence")."""
    done = clock.done
    rise = min(1.0, max(done / _RISE, (clock.taken + 1) / _RISE_STEPS))
    rate = rise * (_LEAST_RATE + (1 - _LEAST_RATE) * (1 + math.cos(math.pi * done)) / 2)
    for group in optimizer.param_groups:
        group["lr"] = group["highest"] * rate


class _Mean:
    """The mean of a network's weights over its last steps, over more of them the longer training goes on."""

    def __init__(self, network: PyramidNetwork) -> None:
        self.network = copy.deepcopy(network).eval()
        learned = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
        stay = {name for name, _ in network.named_parameters()} - learned
        mine, others = self.network.state_dict(), network.state_dict()
        names = [n for n in mine if n not in stay and mine[n].dtype.is_floating_point]
        self.pairs = [mine[n] for n in names], [others[n] for n in names]

    @torch.no_grad()
    def follow(self, taken: int) -> None:
        """Move towards what the weights are now, after so many steps."""
        torch._foreach_lerp_(*self.pairs, 1 - min(0.998, taken / (taken + 9)))


def _until(clock: Clock, track: Track, description: str) -> Iterator[None]:
    """Yield until a clock is done, and draw how far it is."""
    for tick in track(range(_TICKS), description):
        while clock.done < (tick + 1) / _TICKS:
            yield


class _drawn:
    """Draws batches ahead in a thread of its own, while it is entered."""

    def __init__(self, pictures: Pictures, rng: np.random.Generator, clock: Clock) -> None:
        self.pictures, self.rng, self.clock = pictures, rng, clock

    def __enter__(self) -> Iterator[list[Photo]]:
        self.pool = ThreadPoolExecutor(1)
        return self._batches()

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def _batches(self) -> Iterator[list[Photo]]:
        waiting = [self.pool.submit(self._draw, True) for _ in range(_AHEAD)]
        while True:
            yield waiting.pop(0).result()
            waiting.append(self.pool.submit(self._draw, self.clock.done < 1 - self.pictures.settings.close))

    def _draw(self, mosaics: bool) -> list[Photo]:
        return [self.pictures.draw(self.rng, mosaics) for _ in range(self.pictures.settings.batch)]


def _truth(picture: Photo) -> Truth:
    shown = picture.kinds >= 0
    boxes = torch.from_numpy(picture.boxes)
    return Truth(boxes[shown], torch.from_numpy(picture.kinds[shown]), boxes[~shown])
