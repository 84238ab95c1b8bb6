"""What all kinds of measuring have in common.

The process reads what to measure from its input as JSON and prints what it measured as JSON. It is a
process of its own, so that its time to start and its memory are those of a command.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

from sppnet.progress import peak_memory

Units = dict[str, float]
"""What units of work cost, by the names of `sppnet.planning.costs.Costs`."""

_LEAST_PHOTOS = 3
# Seconds that a process waits for disks until it is ready, at most.
_WAITING = 0.5


def photos(asked: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the photos that are asked for, over and over until the time is up, but some in any case."""
    end = time.perf_counter() + asked["seconds"]
    for count, photo in enumerate(cycle(asked["photos"])):
        if count >= _LEAST_PHOTOS and time.perf_counter() > end:
            return
        yield Path(photo)


class Share:
    """What this process had of its core since it began: others may have been at work there, too."""

    def __init__(self) -> None:
        self._wall, self._own = time.perf_counter(), time.process_time()

    def __call__(self) -> float:
        """Return the share so far, at most 1."""
        wall, own = time.perf_counter() - self._wall, time.process_time() - self._own
        return float(min(own / wall, 1.0))


def ready(asked: Mapping[str, Any]) -> float:
    """Return the seconds from the start of this process until now, less what others had of its core."""
    return float(min(time.time() - asked["started"], time.process_time() + _WAITING))


def memory() -> float:
    """Return the bytes that this process held at the peak."""
    return (peak_memory() or 0.0) * 1e9


def line(places: tuple[int, int], values: list[float]) -> tuple[float, float]:
    """Return offset and slope of the line through two values, neither below 0."""
    slope = max(values[1] - values[0], 0.0) / (places[1] - places[0])
    return max(values[0] - slope * places[0], 0.0), slope
