"""What a plan is made of: how much work there is, what does it, and what a unit of it costs on one core."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sppnet.errors import SppnetError

FOLDS = 8
"""Folds of photos that a fit of at most 500 deals out to measure on."""


@dataclass(frozen=True)
class Workload:
    """How much there is to do.

    Attributes
    ----------
    images : int
        Number of photos, at least 1.
    classes : int
        Number of classes of the detector, at least 1.
    windows : int
        Candidate windows of a photo, at least 1.
    pixels : float
        Millions of pixels of a photo, on average.
    photo_bytes : float
        Bytes of a photo's file, on average.

    Raises
    ------
    SppnetError
        If there is nothing to do.
    """

    images: int
    classes: int
    windows: int
    pixels: float
    photo_bytes: float

    def __post_init__(self) -> None:
        for name in ("images", "classes", "windows"):
            if getattr(self, name) < 1:
                raise SppnetError(f"found {getattr(self, name)} {name}, expected at least 1")


@dataclass(frozen=True)
class Machines:
    """What does the work.

    Attributes
    ----------
    nodes : int
        Number of machines, at least 1.
    cores : int
        Cores of each, at least 1.
    processes : int or None
        Processes of one core each on a node; by default one for each core.
    memory : float or None
        Bytes that a process of a fit may hold; then, and on several nodes, it mines in rounds over shards of
        the photos.

    Raises
    ------
    SppnetError
        If there is none.
    """

    nodes: int = 1
    cores: int = 1
    processes: int | None = None
    memory: float | None = None

    def __post_init__(self) -> None:
        for name in ("nodes", "cores", "processes", "memory"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SppnetError(f"found {value:g} {name}, expected at least 1")

    @property
    def started(self) -> int:
        """Processes on a node."""
        return self.cores if self.processes is None else self.processes

    @property
    def busy(self) -> int:
        """Cores of a node that have a process."""
        return min(self.cores, self.started)


@dataclass(frozen=True)
class Costs:
    """What a unit of the work costs on one core of a machine: seconds, unless it says otherwise.

    Attributes
    ----------
    start_embed, start_detect : float
        From the start of a process until it is ready for photos.
    read : float
        Reading a photo, for each million of its pixels.
    embed : float
        Network and pooling of a photo at the scale of the default embedder.
    propose : float
        Candidate windows of a photo by the default method.
    encode, keep, fetch : float
        Maps of a photo at the default detector's four scales; writing them to disk, and reading them.
    pool, pool_window : float
        Pooling for each photo, and for each of its windows.
    score_window, score_pair : float
        SVMs, box regressions and suppression for each window, and for each window and class.
    mine_pair : float
        SVMs alone for each window and class.
    visit : float
        Training an SVM: for each example of each class, in all of its rounds.
    ridge_window, ridge_square : float
        Box regression of a class, with its folds: for each window that teaches it, and for the square of
        their number.
    entry, vector, pooled : float
        Bytes of a photo's maps on disk, of the vector of a photo, and of that of a window in half precision.
    memory_embed, memory_detect : float
        Bytes of a process at the peak.
    windows : float
        Windows that the default method proposes for a photo.
    together : int
        Number of processes that were measured at once.
    efficiency : float
        What each of these did then, of what one alone does.
    """

    start_embed: float
    start_detect: float
    read: float
    embed: float
    propose: float
    encode: float
    keep: float
    fetch: float
    pool: float
    pool_window: float
    score_window: float
    score_pair: float
    mine_pair: float
    visit: float
    ridge_window: float
    ridge_square: float
    entry: float
    vector: float
    pooled: float
    memory_embed: float
    memory_detect: float
    windows: float
    together: int
    efficiency: float

    def __post_init__(self) -> None:
        if not (0 < self.efficiency <= 1 and self.together >= 1):
            found = f"{self.together} processes at once with an efficiency of {self.efficiency:g}"
            raise SppnetError(f"found {found}, expected at least 1 and a share, above 0 and at most 1")

    def slowdown(self, cores: int) -> float:
        """Return how much longer a core takes where so many of a machine are at work.

        Cores share memory and its bandwidth. Each doubling of their number is taken to cost as much as one of
        those that were measured.
        """
        if self.together < 2:
            return 1.0
        doubling = self.efficiency ** (1 / math.log2(self.together))
        return float(doubling ** -math.log2(cores))
