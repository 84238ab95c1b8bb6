"""Work on many things by workers of a Ray cluster, some of which may die: rounds of Ray Data."""

from __future__ import annotations

import logging
import os
import pickle
import threading
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple

import numpy as np
import numpy.typing as npt

from sppnet.cluster.connection import cores
from sppnet.errors import SppnetError
from sppnet.parallel import Item, Result, Work

# The fewer things are left, the fewer a worker takes at a time: all of them in so many turns of all workers.
# So all end at about the same time.
_SHARES = 2
# Bytes of results that are sent together, about: what is large goes on its way at once.
_LARGE = 16_000_000
# Blocks that a worker has in hand: one in work, and the next.
_READY = 2
# A thing is given up when so many workers that had nothing else in hand died, one after the other.
_DEATHS = 2
# Results, and bytes of results, that may wait for one before them; then what is missing is done first.
_AHEAD, _WAITING = 1024, 256_000_000
# Deaths in a round, for each worker, after which it is looked into.
_PATIENCE = 8
# Seconds between two looks at what is left of the cluster.
_LOOK = 5.0
# What of this process' environment counts in a worker, too.
_KEPT = ("SPPNET_MAX_PIXELS", "XDG_CACHE_HOME")


class _Answer(NamedTuple):
    """What came of a thing.

    Attributes
    ----------
    well : bool
    value : object
        The result where all went well, else what was raised.
    size : int
        Bytes that were sent.
    """

    well: bool
    value: Any
    size: int

    def result(self) -> Any:
        """Return the result, or raise what was raised."""
        if not self.well:
            raise self.value
        return self.value


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
    together : int
        How many things a worker takes at a time, at most: each time costs some milliseconds, and what it has
        in hand is done again where it dies.
    """

    work: Work[Item, Result]
    items: Sequence[Item]
    workers: int
    together: int

    def results(self) -> Iterator[Result]:
        """Yield the result of each thing, in their order.

        What a worker had in hand when it died is done by another. A thing on which then two more died, who
        had nothing else in hand, is given up: it raises a `SppnetError` at its place.

        Raises
        ------
        Whatever the work raises in a worker, at its place.
        """
        with _watched():
            yield from self._results()

    def _results(self) -> Iterator[Result]:
        known: dict[int, _Answer] = {}
        left, place, dead = list(range(len(self.items))), 0, None
        while left and dead is None:
            last = -1
            # Closed whatever is raised here: the workers would go on as long as somebody holds the exception.
            with closing(self._round(left, self.together, _PATIENCE * self.workers)) as answers:
                for i, answer in answers:
                    known[i], last = answer, max(last, i)
                    while place in known:
                        yield known.pop(place).result()
                        place += 1
                    if self._too_far(known):
                        break
            left = [i for i in left if i >= place and i not in known]
            following = next(dealt(left, self.workers, self.together), ())
            dead = self._retry([i for i in left if i < last] or following, known)
            while place in known:
                yield known.pop(place).result()
                place += 1
            left = [i for i in left if i >= place and i not in known]
        if dead is not None:
            raise SppnetError(
                f"{_name(self.items[dead])}: found that {_DEATHS + 1} workers died of it, one after the "
                "other, expected none to; leave it out, or let fewer work on a machine, each with more memory"
            )

    def _too_far(self, known: Mapping[int, _Answer]) -> bool:
        """Tell whether more results wait for one before them than the workers have in hand, and too many."""
        many = len(known) > 2 * _READY * self.workers
        return len(known) > _AHEAD or (many and sum(answer.size for answer in known.values()) > _WAITING)

    def _retry(self, lost: Sequence[int], known: dict[int, _Answer]) -> int | None:
        """Do what was lost one by one, so that it shows who died of what; return the first that is deadly."""
        for left in reversed(range(_DEATHS)):
            known.update(self._round(lost, 1, -1, last=not left))
            lost = [i for i in lost if i not in known]
        return lost[0] if lost else None

    def _round(
        self, places: Sequence[int], most: int, deaths: int, *, last: bool = False
    ) -> Generator[tuple[int, _Answer]]:
        """Yield place and answer of things as they are done; of those that dead workers had in hand, none.

        `most` is how many a worker takes at a time, at most, and `deaths` how many blocks may be lost before
        the round ends, -1 for any number. A round also ends where the cluster lost what was done; in the
        `last` one that is an error.
        """
        if not places:
            return
        import ray
        from ray.exceptions import RayError

        # Ray would begin a cluster of its own, which nobody ends.
        if not ray.is_initialized():
            raise SppnetError("found the cluster closed, expected it open until all results are taken")
        dataset = self._dataset(places, most, deaths)
        # As they lie in the cluster's store: NumPy arrays of bytes would be copies of all results.
        tables = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        with closing(iter(tables)) as batches:
            while True:
                try:
                    batch = next(batches, None)
                except RayError as error:
                    if not last:
                        return
                    found = f"found that the cluster failed ({str(error).strip().partition(chr(10))[0]})"
                    raise SppnetError(f"{found}, expected it to go on; what is done is kept") from error
                if batch is None:
                    return
                for place, content in zip(batch["place"].to_pylist(), batch["content"], strict=True):
                    yield place, _opened(content.as_buffer())

    def _dataset(self, places: Sequence[int], most: int, deaths: int) -> Any:
        from ray import data

        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        blocks = [
            {"block": _pickled([(i, _pickled(self.items[i])) for i in block])}
            for block in dealt(places, self.workers, most)
        ]
        dataset = data.from_items(blocks, override_num_blocks=len(blocks))
        context = dataset.context
        context.enable_progress_bars = context.print_on_execution_start = False
        context.max_errored_blocks, context.target_max_block_size = deaths, _LARGE
        size = min(self.workers, len(places))
        place = _Place(os.getcwd(), {name: os.environ[name] for name in _KEPT if name in os.environ})
        in_hand = _READY if deaths >= 0 else 1
        with warnings.catch_warnings():
            # Ray 2.64 will have another way to say how often a task is tried again.
            warnings.simplefilter("ignore", DeprecationWarning)
            return dataset.map_batches(
                _Worker,
                batch_size=1,
                compute=data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=in_hand),
                num_cpus=1,
                fn_constructor_args=(_pickled(self.work), place),
                # Retried by hand: Ray would wait for a core of a machine that is gone, and try for ever.
                ray_remote_args_fn=lambda: {"max_task_retries": 0},
            )


def dealt(places: Sequence[int], workers: int, most: int) -> Iterator[Sequence[int]]:
    """Yield the blocks that workers take, in order and of `most` at most: smaller ones to the end."""
    start = 0
    while start < len(places):
        end = start + max(1, min(most, (len(places) - start) // (_SHARES * workers)))
        yield places[start:end]
        start = end


@contextmanager
def _watched() -> Iterator[None]:
    """Say while work goes on if the cluster has lost its last core: Ray waits for another without a word."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(_LOOK):
            left = None
            with suppress(Exception):  # the cluster may be closed before its results are taken
                left = cores()
            if left == 0:
                warnings.warn(
                    "found no core left in the cluster: waiting for a machine to join it; "
                    "Ctrl-C ends the command, and what is done is kept",
                    stacklevel=2,
                )
                return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@dataclass(frozen=True)
class _Place:
    """Where work is asked for: what a worker takes over of that process.

    Attributes
    ----------
    folder : str
        Its working directory: paths may be relative.
    environment : dict of str to str
        Of its environment what counts in a worker.
    """

    folder: str
    environment: dict[str, str]

    def enter(self) -> None:
        """Make this process such a place, of one core: others have the other cores of the machine."""
        import cv2
        from threadpoolctl import threadpool_limits

        os.environ.update(self.environment, OMP_NUM_THREADS="1")
        threadpool_limits(1)
        cv2.setNumThreads(1)
        # Where no path is relative, the folder need not be there.
        with suppress(OSError):
            os.chdir(self.folder)


class _Worker:
    """Does the work on the things of a block; lives in a process of its own."""

    def __init__(self, work: bytes, place: _Place) -> None:
        self.work, self.place = work, place
        self.function: Callable[[Any], Any] | None = None

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> Iterator[Any]:
        places: list[int] = []
        answers: list[bytes] = []
        for place, content in (pair for block in batch["block"] for pair in pickle.loads(block)):
            places.append(place)
            answers.append(self.answer(content))
            if sum(map(len, answers)) >= _LARGE:
                table = _rows(places, answers)
                # Not held beside the table while it is sent.
                places, answers = [], []
                yield table
        if places:
            yield _rows(places, answers)

    def answer(self, content: bytes) -> bytes:
        """Return, pickled, whether all went well, and the result of a thing or else what was raised."""
        try:
            if self.function is None:
                self.place.enter()
                self.function = pickle.loads(self.work).open()
            return _pickled((True, self.function(pickle.loads(content))))
        except Exception as error:  # a bug, too, is told of where the results are taken
            if not isinstance(error, SppnetError | OSError):
                error.add_note(f"in a worker:\n{traceback.format_exc()}")
            return _pickled((False, _sendable(error)))


def _rows(places: Sequence[int], answers: Sequence[bytes]) -> Any:
    import pyarrow

    contents = pyarrow.array(answers, pyarrow.large_binary())
    return pyarrow.table({"place": list(places), "content": contents})


def _opened(content: Any) -> _Answer:
    well, value = pickle.loads(content)
    return _Answer(well, value, len(content))


def _sendable(error: Exception) -> Exception:
    """Return an exception as another process can open it: what says the same, of one that it cannot."""
    try:
        pickle.loads(_pickled(error))
    except Exception:
        kind = OSError if isinstance(error, OSError) else RuntimeError
        plain = kind(f"{type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", ()):
            plain.add_note(note)
        return plain
    return error


def _name(item: object) -> object:
    """Return what a thing is called: a file, that of its own, or the first of several values."""
    first = item[0] if isinstance(item, tuple) and item else getattr(item, "path", item)
    return f"an image of {first.shape}" if isinstance(first, np.ndarray) else first


def _pickled(value: object) -> bytes:
    """Pickle a value, with what it is made of where that can be found by no name in another process."""
    from ray import cloudpickle

    dumps: Callable[[object], bytes] = cloudpickle.dumps
    return dumps(value)
