"""Work on many things in their order and in bounded memory: by threads here, or by whoever else runs it.

What is done with each thing is a `Work`, which can be sent elsewhere; who does it is a `Runner`. `Threads` is
the runner of this process, `sppnet.cluster.Cluster` that of many machines.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Generic, Protocol, TypedDict, TypeVar

if TYPE_CHECKING:
    from sppnet.progress import Track

Item = TypeVar("Item")
Result = TypeVar("Result")
Ready = TypeVar("Ready")
_Item = TypeVar("_Item", contravariant=True)
_Result = TypeVar("_Result", covariant=True)


TOGETHER = 32
"""How many things a worker elsewhere takes at a time, at most, unless they or their results are large."""


class Work(Protocol[_Item, _Result]):
    """What is done with each of many things: a value that can be pickled."""

    def open(self) -> Callable[[_Item], _Result]:
        """Return the function of one thing; called once in each process, it does what takes long there."""
        ...


@dataclass(frozen=True)
class Staged(Generic[Item, Ready, Result]):
    """A function in two stages, of which threads do the first for the next things.

    Attributes
    ----------
    first : callable
        Makes of a thing what the second stage takes: reads a file, say.
    second : callable
        Makes the result of that, one thing at a time.
    """

    first: Callable[[Item], Ready]
    second: Callable[[Ready], Result]

    def __call__(self, item: Item) -> Result:
        """Return the result of a thing."""
        return self.second(self.first(item))


class Runner(Protocol):
    """Who does work."""

    def stream(
        self, work: Work[Item, Result], items: Iterable[Item], together: int = TOGETHER
    ) -> Iterator[Result]:
        """Yield the result of each item, in their order; workers elsewhere take some `together`, at most."""
        ...


class Running(TypedDict, total=False):
    """How long work on many things is done: what shows how far it is, and whose workers do it."""

    track: Track
    cluster: Runner | None


@dataclass(frozen=True)
class Threads:
    """The runner of this process.

    Attributes
    ----------
    count : int
        How many threads work at once. Of `Staged` work they do the first stage, and the caller's thread does
        the second as it takes the results.
    """

    count: int

    def stream(
        self, work: Work[Item, Result], items: Iterable[Item], together: int = TOGETHER
    ) -> Iterator[Result]:
        """Yield the result of each item, in their order, a few of them ahead; as `in_order` does."""
        function = work.open()
        if isinstance(function, Staged):
            return map(function.second, in_order(function.first, items, self.count))
        return in_order(function, items, self.count)


def in_order(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Yield ``function(item)`` of each item, in their order, a few of them ahead of the consumer.

    Parameters
    ----------
    function : callable
        Called in another thread.
    items : iterable
        Drawn from as the results are taken: twice as many as threads are in work or done.
    threads : int

    Raises
    ------
    Whatever `function` raises, at its place.
    """
    source, pool = iter(items), ThreadPoolExecutor(threads)
    try:
        waiting: deque[Future[Result]] = deque(
            pool.submit(function, item) for item in islice(source, 2 * threads)
        )
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(source, 1))
    finally:
        # What no thread has begun is not begun for nobody.
        pool.shutdown(cancel_futures=True)


def thread_count() -> int:
    """Return how many threads are to compute at once.

    What ``torch.set_num_threads`` set where PyTorch is loaded, else ``OMP_NUM_THREADS``, else one for each
    core that this process may use.
    """
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        return int(torch.get_num_threads())
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given):
        return int(given)
    return core_count()


def core_count() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
