"""From the size of a job and the costs of its units to times, disk, memory and traffic: arithmetic alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from sppnet.errors import check_choice
from sppnet.planning.costs import FOLDS, Costs, Machines, Workload

# Of more photos a fit holds some out in one fold to measure on, else it has several folds of all.
_LARGE, _HELD_OUT = 500, 300
# Windows that start the SVMs, and those after whose joining they are trained anew.
_START, _RETRAIN = 2000, 4000
# What a fit mines, measured on 100 photos with 1, 6 and 11 classes and on some 400 with 15 (docs/scale.md).
# For each class, hard negatives add _HARD * photos ** _GROWTH examples where _USUAL windows of a photo are
# looked at; a window is one for 1 + _SHARED * (classes - 1) classes. Trainings leave _KEPT of the windows to
# start with, and _LEFT of the others.
_HARD, _GROWTH, _USUAL, _SHARED, _KEPT, _LEFT = 54.0, 0.9, 1024, 0.036, 0.75, 0.7
# In rounds over shards (`sppnet detect train --memory`): their number, examples of a photo for each class
# that the first SVMs find hard, and what share of a process's memory beyond the base may be examples.
_ROUNDS, _FIRST, _FILLED, _MEMORY, _BASE = 4, 35.0, 0.7, 8e9, 0.5e9
# Windows of a photo that teach box regression, and of a class at most.
_MOVED, _MOST_MOVED = 38, 4000
# Bytes of a window's box, of a detection, and of what a fit plans of a window beside its classes.
_BOX, _DETECTION, _PLANNED = 16, 24, 40
_DETECTIONS = 10


@dataclass(frozen=True)
class Stage:
    """A part of a job.

    Attributes
    ----------
    name : str
        What is done.
    seconds : float
        Of the wall clock.
    core_seconds : float
        Of all cores together.
    grows_with : str
        What its time grows with, in words.
    """

    name: str
    seconds: float
    core_seconds: float
    grows_with: str


@dataclass(frozen=True)
class Plan:
    """What a job will take.

    Attributes
    ----------
    job : str
        One of `JOBS`.
    stages : tuple of Stage
        In the order of the work.
    disk, memory, traffic : mapping of str to float
        Bytes, by what takes them: on all disks together, in one process, and over the network in all.
    """

    job: str
    stages: tuple[Stage, ...]
    disk: Mapping[str, float]
    memory: Mapping[str, float]
    traffic: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def core_seconds(self) -> float:
        """Seconds of all cores together."""
        return sum(stage.core_seconds for stage in self.stages)

    @property
    def dominant(self) -> Stage:
        """The stage that takes longest."""
        return max(self.stages, key=lambda stage: stage.seconds)


@dataclass(frozen=True)
class Mining:
    """What the hard negatives of a fit come to.

    Attributes
    ----------
    passes : int
        Times that all windows of all photos are looked at.
    held : float
        Windows that joined the training set and are held in one place at the end, of all classes together.
    trainings : float
        Times that all SVMs are trained.
    visits, last : float
        Examples of all classes in all of these trainings together, and in the last of them.
    """

    passes: int
    held: float
    trainings: float
    visits: float
    last: float


@dataclass(frozen=True)
class _Hands:
    """Turns seconds of one core into stages, by who does the work."""

    work: Workload
    machines: Machines
    costs: Costs

    def start(self, seconds: float) -> Stage:
        """Return the stage in which every process gets ready."""
        machines = self.machines
        turns = math.ceil(machines.started / machines.busy)
        wall = seconds * turns * self.costs.slowdown(machines.busy)
        count = machines.nodes * machines.started
        return Stage("starting", wall, seconds * count, "nothing: once for each process")

    def spread(self, name: str, each: float, grows_with: str, images: int | None = None) -> Stage:
        """Return a stage that all processes share, image by image."""
        machines, count = self.machines, self.work.images if images is None else images
        share = math.ceil(count / (machines.nodes * machines.started))
        turns = min(machines.started, count) / min(machines.busy, count)
        slow = self.costs.slowdown(min(machines.busy, count))
        return Stage(name, each * share * turns * slow, each * count * slow, grows_with)

    def head(self, name: str, seconds: float, grows_with: str) -> Stage:
        """Return a stage of one machine, whose cores share the classes."""
        cores = min(self.machines.cores, self.work.classes)
        slow = self.costs.slowdown(cores)
        return Stage(name, seconds * slow / cores, seconds * slow, grows_with)


def plan(job: str, work: Workload, costs: Costs, machines: Machines) -> Plan:
    """Predict what a job takes.

    Parameters
    ----------
    job : {"embed", "propose", "run", "evaluate", "train"}
        The command: of ``sppnet detect`` the last three.
    work : Workload
        How much there is to do.
    costs : Costs
        What units of it cost on one core.
    machines : Machines
        What does it: nodes that are as fast as the one that was measured.

    Raises
    ------
    SppnetError
        If there is no such job.
    """
    check_choice("job", job, JOBS)
    return JOBS[job](_Hands(work, machines, costs))


def drivers(job: str, work: Workload, costs: Costs, machines: Machines) -> dict[str, float]:
    """Return the wall-clock seconds that a job would take with less work or more machines, by the change."""
    changes = {
        "twice the nodes": (work, replace(machines, nodes=2 * machines.nodes)),
        "half the photos": (replace(work, images=-(-work.images // 2)), machines),
        "half the windows": (replace(work, windows=-(-work.windows // 2)), machines),
        "half the classes": (replace(work, classes=-(-work.classes // 2)), machines),
    }
    return {name: plan(job, less, costs, more).seconds for name, (less, more) in changes.items()}


def _embed(hands: _Hands) -> Plan:
    work, costs = hands.work, hands.costs
    stages = (
        hands.start(costs.start_embed),
        hands.spread("reading", costs.read * work.pixels, "photos x pixels"),
        hands.spread("network and pooling", costs.embed, "photos"),
    )
    vectors = {"vectors": work.images * costs.vector}
    return Plan("embed", stages, vectors, {"a process": costs.memory_embed}, _photos(work, 1) | vectors)


def _propose(hands: _Hands) -> Plan:
    work, costs = hands.work, hands.costs
    stages = (hands.start(costs.start_embed), *_windows(hands))
    windows = {"windows": float(work.images * work.windows * _BOX)}
    return Plan("propose", stages, windows, {"a process": costs.memory_embed}, _photos(work, 1) | windows)


def _run(hands: _Hands, job: str = "run") -> Plan:
    work, costs = hands.work, hands.costs
    stages = (
        hands.start(costs.start_detect),
        *_windows(hands),
        hands.spread("maps", costs.encode, "photos"),
        _pooling(hands),
        _scoring(hands),
    )
    found = {"detections": float(work.images * _DETECTIONS * _DETECTION)}
    return Plan(job, stages, found, {"a process": _detecting(hands)}, _photos(work, 1) | found)


def _evaluate(hands: _Hands) -> Plan:
    return _run(hands, "evaluate")


def _train(hands: _Hands) -> Plan:
    work, costs = hands.work, hands.costs
    mining = mining_of(work, costs, hands.machines)
    held, folds = (min(_HELD_OUT, work.images // 4), 1) if work.images > _LARGE else (work.images, FOLDS)
    moved = min(_MOVED * work.images / work.classes, _MOST_MOVED)
    ridges = work.classes * moved * (costs.ridge_window + costs.ridge_square * moved)
    stages = (
        hands.start(costs.start_detect),
        *_windows(hands),
        hands.spread("maps", costs.encode + costs.read * work.pixels, "photos"),
        hands.spread("maps to disk", costs.keep, "photos"),
        hands.head("box regression", ridges, "classes x windows^2, at most 4,000 windows"),
        *_mining(hands, mining),
        hands.head("SVMs", costs.visit * mining.visits, "classes x hard windows x trainings"),
        hands.head("SVMs of folds", costs.visit * mining.last * folds, "classes x hard windows x folds"),
        hands.spread("measuring", _measuring(hands), "at most 500 photos, x windows x classes", held),
    )
    weights = mining.passes * hands.machines.nodes * hands.machines.started * _svms(hands)
    return Plan(
        "train",
        stages,
        {"maps": work.images * costs.entry, "windows": float(work.images * work.windows * _BOX)},
        _train_memory(hands, mining),
        _photos(work, 3 + mining.passes) | {"hard windows": mining.held * costs.pooled, "weights": weights},
    )


def _mining(hands: _Hands, mining: Mining) -> tuple[Stage, ...]:
    """Return the stages in which all windows are looked at, as often as that is done."""
    work, costs, times = hands.work, hands.costs, mining.passes
    pool = costs.pool + costs.pool_window * work.windows
    score = costs.mine_pair * work.windows * work.classes
    return (
        hands.spread("maps from disk", times * costs.fetch, "photos"),
        hands.spread("pooling", times * pool, "photos x windows"),
        hands.spread("looking for hard windows", times * score, "photos x windows x classes"),
    )


def _measuring(hands: _Hands) -> float:
    """Return the seconds of one core for a photo that a fit measures on."""
    costs, work = hands.costs, hands.work
    return costs.fetch + costs.pool + costs.pool_window * work.windows + _score(hands)


def _train_memory(hands: _Hands, mining: Mining) -> dict[str, float]:
    work = hands.work
    hard = (_START + mining.held) * _example(hands)
    memory = {"a worker": _detecting(hands), "hard windows, where the SVMs learn": hard}
    if not _in_rounds(hands.machines):
        planned = float(work.images) * work.windows * (_PLANNED + work.classes)
        memory["plans of all windows"] = planned
    return memory


def _example(hands: _Hands) -> float:
    """Return the bytes of an example of the SVMs: its vector, and what it is to each class."""
    return hands.costs.pooled + 5 * hands.work.classes


def _in_rounds(machines: Machines) -> bool:
    return machines.nodes > 1 or machines.memory is not None


def mining_of(work: Workload, costs: Costs, machines: Machines) -> Mining:
    """Return what the hard negatives of a fit come to, as far as the numbers of a workload tell."""
    seen, shared = work.windows / _USUAL, 1 + _SHARED * (work.classes - 1)
    everything = float(work.images * work.windows)
    start = _KEPT * _START * work.classes
    if not _in_rounds(machines):
        pairs = work.classes * min(seen * _HARD * work.images**_GROWTH, everything)
        joined, trainings = pairs / shared, 1 + pairs / shared / _RETRAIN
        return Mining(
            1, _LEFT * joined, trainings, trainings * (start + _LEFT * pairs / 2), start + _LEFT * pairs
        )
    room = _FILLED * ((machines.memory or _MEMORY) - _BASE) / (costs.pooled + 5 * work.classes)
    held = max(min(seen * _FIRST * work.images * work.classes / shared, everything, room), 0.0)
    last = start + held * shared
    return Mining(_ROUNDS, held, _ROUNDS + 1.0, _ROUNDS * last + start, last)


def _windows(hands: _Hands) -> tuple[Stage, Stage]:
    costs = hands.costs
    return (
        hands.spread("reading", costs.read * hands.work.pixels, "photos x pixels"),
        hands.spread("candidate windows", costs.propose, "photos"),
    )


def _pooling(hands: _Hands) -> Stage:
    each = hands.costs.pool + hands.costs.pool_window * hands.work.windows
    return hands.spread("pooling", each, "photos x windows")


def _scoring(hands: _Hands) -> Stage:
    return hands.spread("scoring", _score(hands), "photos x windows x classes")


def _score(hands: _Hands) -> float:
    """Return the seconds of one core that the windows of a photo take once they are vectors."""
    costs, work = hands.costs, hands.work
    return work.windows * (costs.score_window + costs.score_pair * work.classes)


def _svms(hands: _Hands) -> float:
    """Return the bytes of the SVMs of all classes, in single precision."""
    return 2 * hands.costs.pooled * hands.work.classes


def _detecting(hands: _Hands) -> float:
    """Return the bytes of a process that detects: with SVMs and box regressions, and boxes of all classes."""
    work = hands.work
    return hands.costs.memory_detect + 5 * _svms(hands) + 60.0 * min(work.windows, 2000) * work.classes


def _photos(work: Workload, times: int) -> dict[str, float]:
    """Return the bytes of all photos, read so many times."""
    return {"photos": times * work.images * work.photo_bytes}


JOBS: Mapping[str, Callable[[_Hands], Plan]] = {
    "embed": _embed,
    "propose": _propose,
    "run": _run,
    "evaluate": _evaluate,
    "train": _train,
}
"""The jobs that can be planned, in the order in which they are listed."""
