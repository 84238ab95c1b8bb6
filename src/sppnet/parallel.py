"""Work on many things with several threads, in their order and in bounded memory."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


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
    source = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Result]] = deque(
            pool.submit(function, item) for item in islice(source, 2 * threads)
        )
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(source, 1))


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
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
