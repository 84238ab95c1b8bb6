"""What work costs, and how far it is: seconds by stage, memory at the peak, progress."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Track = Callable[[Sequence[Any], str], Iterable[Any]]
"""``track(items, description)`` yields the items, and may draw how far it is."""


def no_track(items: Sequence[Any], description: str) -> Iterable[Any]:
    """Yield the items and draw nothing."""
    return items


@dataclass
class StageTimer:
    """Adds up wall-clock seconds by the name of a stage; several threads may use it.

    A stage that runs inside another one of the same thread counts for itself alone.

    Attributes
    ----------
    seconds : dict of str to float
    """

    seconds: dict[str, float] = field(default_factory=dict)
    _running: threading.local = field(default_factory=threading.local, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def __reduce__(self) -> tuple[type[StageTimer], tuple[dict[str, float]]]:
        """Tell pickle of the seconds so far: another process counts on its own."""
        return StageTimer, (dict(self.seconds),)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the time spent in the ``with`` block towards `stage`."""
        outer = getattr(self._running, "inside", 0.0)
        self._running.inside = 0.0
        start = time.perf_counter()
        try:
            yield
        finally:
            passed = time.perf_counter() - start
            with self._lock:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + passed - self._running.inside
            self._running.inside = outer + passed


def peak_memory() -> float | None:
    """Return the most memory in GB (10^9 bytes) that this process held at once, None where no one counts."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
