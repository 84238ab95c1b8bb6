"""Work on many things by workers of a Ray cluster, some of which may die: rounds of Ray Data."""

from __future__ import annotations

import logging
import os
import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
import numpy.typing as npt

from sppnet.errors import SppnetError
from sppnet.parallel import Item, Result, Work

# Things that a worker takes at a time: few, so that little is done twice where one dies.
_BLOCK = 8
# Blocks that wait at a worker, beside the one in work.
_READY = 2
# A thing on which so many workers died, one after the other, is given up.
_DEATHS = 3
# Results that may wait for one before them; then what is missing is done first.
_AHEAD = 1024
# Deaths in a round, for each worker, after which it is looked into.
_PATIENCE = 8
# One core a worker: the libraries that it calls must not take those of others.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
# What of this process' environment counts in a worker, too.
_KEPT = ("SPPNET_MAX_PIXELS", "XDG_CACHE_HOME")


@dataclass(frozen=True)
class Rounds(Generic[Item, Result]):
    """Some work on some things, and who does it.

    Attributes
    ----------
    work : Work
        What is done with each.
    items : sequence
        The things.
    workers : int
        How many do it at once, each with a core.
    """

    work: Work[Item, Result]
    items: Sequence[Item]
    workers: int

    def results(self) -> Iterator[Result]:
        """Yield the result of each thing, in their order.

        What a worker had in hand when it died is done by another. A thing on which three died, with nothing
        else in hand, is given up: it raises a `SppnetError` at its place.

        Raises
        ------
        Whatever the work raises in a worker.
        """
        known: dict[int, Result] = {}
        left, place = list(range(len(self.items))), 0
        while left:
            last = -1
            for i, result in self._round(left, self._block(len(left)), _PATIENCE * self.workers):
                known[i], last = result, max(last, i)
                while place in known:
                    yield known.pop(place)
                    place += 1
                if len(known) > _AHEAD:
                    break
            left = [i for i in left if i >= place and i not in known]
            self._retry([i for i in left if i < last] or left[: self._block(len(left))], known)
            while place in known:
                yield known.pop(place)
                place += 1
            left = [i for i in left if i >= place and i not in known]

    def _retry(self, lost: Sequence[int], known: dict[int, Result]) -> None:
        """Do what was lost one by one, so that who died of what shows."""
        for _ in range(_DEATHS):
            known.update(self._round(lost, 1, -1))
            lost = [i for i in lost if i not in known]
            if not lost:
                return
        raise SppnetError(
            f"{_name(self.items[lost[0]])}: found that {_DEATHS} workers died of it, one after the other, "
            "expected none to; leave it out, or let fewer work on a machine, each with more memory"
        )

    def _block(self, count: int) -> int:
        return max(1, min(_BLOCK, count // (2 * self.workers)))

    def _round(self, places: Sequence[int], block: int, deaths: int) -> Iterator[tuple[int, Result]]:
        """Yield place and result of things as they are done; of those that dead workers had in hand, none.

        `deaths` is how many blocks may be lost before the round ends, -1 for any number.
        """
        if not places:
            return
        dataset = self._dataset(places, block, deaths)
        batches = iter(dataset.iter_batches(batch_size=None, prefetch_batches=0))
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:
                if not _lost_workers(error):
                    raise
                return
            if batch is None:
                return
            for place, content in zip(batch["place"].tolist(), batch["content"], strict=True):
                yield place, _opened(content)

    def _dataset(self, places: Sequence[int], block: int, deaths: int) -> Any:
        from ray import data

        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        rows = [{"place": i, "content": _pickled(self.items[i])} for i in places]
        dataset = data.from_items(rows, override_num_blocks=-(-len(rows) // block))
        context = dataset.context
        context.enable_progress_bars = context.print_on_execution_start = False
        context.max_errored_blocks = deaths
        size = min(self.workers, len(places))
        threads = dict.fromkeys(_THREADS, "1")
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        # Retried by hand: Ray would wait for a core of a machine that is gone, and try for ever.
        options = {"max_task_retries": 0, "runtime_env": {"env_vars": threads | kept}}
        return dataset.map_batches(
            _Worker,
            batch_size=block,
            compute=data.ActorPoolStrategy(
                size=size, max_tasks_in_flight_per_actor=_READY if deaths >= 0 else 1
            ),
            num_cpus=1,
            fn_constructor_args=(_pickled(self.work), os.getcwd()),
            ray_remote_args_fn=lambda: options,
        )


class _Worker:
    """Does the work on the things of a block; lives in a process of its own."""

    def __init__(self, work: bytes, folder: str) -> None:
        self.work = work
        # Paths may be relative; where all are not, the folder need not be there.
        with suppress(OSError):
            os.chdir(folder)
        self.function: Callable[[Any], Any] | None = None

    def __call__(self, block: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        contents = np.empty(len(block["content"]), object)
        for i, content in enumerate(block["content"]):
            contents[i] = pickle.dumps(self._result(content), pickle.HIGHEST_PROTOCOL)
        return {"place": block["place"], "content": contents}

    def _result(self, content: bytes) -> tuple[bool, Any]:
        """Return whether all went well, and the result or else what was raised."""
        try:
            if self.function is None:
                import cv2

                cv2.setNumThreads(1)
                self.function = pickle.loads(self.work).open()
            return True, self.function(pickle.loads(content))
        except Exception as error:  # a bug, too, is told of where the results are taken
            if not isinstance(error, SppnetError | OSError):
                error.add_note(f"in a worker:\n{traceback.format_exc()}")
            return False, error


def _opened(content: bytes) -> Any:
    well, value = pickle.loads(content)
    if not well:
        raise value
    return value


def _lost_workers(error: BaseException | None) -> bool:
    """Tell the deaths of workers from bugs."""
    from ray.exceptions import RayActorError, RaySystemError

    return error is not None and (
        isinstance(error, RayActorError | RaySystemError) or _lost_workers(error.__cause__)
    )


def _name(item: object) -> object:
    """Return what a thing is called: a file, or the first of several values."""
    return item[0] if isinstance(item, tuple) and item else item


def _pickled(value: object) -> bytes:
    """Pickle a value, with what it is made of where that can be found by no name in another process."""
    from ray import cloudpickle

    dumps: Callable[[object], bytes] = cloudpickle.dumps
    return dumps(value)
