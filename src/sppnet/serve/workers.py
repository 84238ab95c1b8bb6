"""A process of its own for heavy or risky work: it answers one question after another, and may die of one.

What reads photos of strangers, computes maps or fits runs there, so that the page goes on whatever becomes of
it. A process that takes too long over a question, or dies of it, is replaced; the other questions are put to
the new one.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.connection import Connection
from queue import PriorityQueue, SimpleQueue
from typing import Any

from sppnet.errors import SppnetError
from sppnet.serve.errors import Busy, Refused

URGENT, LATER = 0, 1
"""Questions that somebody waits for come before those that nobody does."""

# Seconds between two looks at the clock, and to wait for a process that was told to end.
_TICK, _FAREWELL = 0.5, 3.0
# A question that so many processes died of is not put to another one.
_TRIES = 2
_STARTS = 3


@dataclass(frozen=True)
class Kind:
    """What a worker process is.

    Attributes
    ----------
    make : str
        ``module:name`` of what makes the object whose methods answer.
    arguments : tuple
        What it is called with.
    threads : int
        How many questions are answered at once.
    capacity : int
        How many urgent ones may wait; more are refused.
    limit : float
        Seconds that an urgent question may take, once it is begun.
    niceness : int
        By how much the process stands back where there is other work.
    """

    make: str
    arguments: tuple[Any, ...] = ()
    threads: int = 1
    capacity: int = 64
    limit: float = 60.0
    niceness: int = 0


@dataclass
class _Question:
    method: str
    arguments: tuple[Any, ...]
    rank: int
    limit: float
    answer: Future[Any] = field(default_factory=Future)
    begun: float | None = None
    tries: int = 0


class Worker:
    """A process that is started when it is first needed, and anew whenever it is gone.

    Parameters
    ----------
    kind : Kind
        What it is.
    told : callable, optional
        Takes what the process tells on the way, in a thread of its own.
    """

    def __init__(self, kind: Kind, told: Callable[[Any], None] = lambda event: None) -> None:
        self.kind, self._told = kind, told
        self._lock, self._numbers = threading.RLock(), itertools.count()
        self._waiting: dict[int, _Question] = {}
        self._process: Any = None
        self._outbox: SimpleQueue[Any] = SimpleQueue()
        self._closed = False
        self.ready, self._failures = False, 0

    @property
    def load(self) -> int:
        """Number of urgent questions that are not answered yet."""
        with self._lock:
            return sum(question.rank == URGENT for question in self._waiting.values())

    @property
    def alive(self) -> bool:
        """Whether there is a process."""
        return self._process is not None and self._process.is_alive()

    def start(self) -> None:
        """Start the process now if there is none, so that the first question need not wait for it."""
        with self._lock:
            if self._closed or self._process is not None:
                return
            pipe, theirs = multiprocessing.Pipe()
            self._outbox = SimpleQueue()
            context = multiprocessing.get_context("spawn")
            self._process = context.Process(target=_run, args=(theirs, self.kind), daemon=True)
            self._process.start()
            theirs.close()
            lent = self._process, pipe, self._outbox
            threading.Thread(target=self._listen, args=lent, daemon=True).start()
            threading.Thread(target=_send, args=lent[1:], daemon=True).start()
            for number, question in sorted(self._waiting.items()):
                self._put(number, question)

    def ask(
        self, method: str, *arguments: Any, rank: int = URGENT, limit: float | None = None
    ) -> Future[Any]:
        """Put a question, a method of the process's object with its arguments, and return the answer to come.

        Parameters
        ----------
        method : str
        *arguments
            What can be sent to another process.
        rank : int
            `URGENT` or `LATER`.
        limit : float, optional
            Seconds that it may take; by default those of the kind for an urgent question, and ten times
            those for others.

        Raises
        ------
        Busy
            If too many wait already.
        """
        with self._lock:
            if rank == URGENT and self.load >= self.kind.capacity:
                raise Busy(self.load)
            most = limit or self.kind.limit * (1 if rank == URGENT else 10)
            question = _Question(method, arguments, rank, most)
            number = next(self._numbers)
            self._waiting[number] = question
            if self._process is None:
                self.start()
            else:
                self._put(number, question)
        return question.answer

    def _put(self, number: int, question: _Question) -> None:
        question.begun = None
        self._outbox.put((question.rank, number, question.method, question.arguments))

    def _listen(self, process: Any, pipe: Connection, outbox: SimpleQueue[Any]) -> None:
        try:
            while True:
                if pipe.poll(_TICK):
                    self._take(*pipe.recv())
                if self._overdue():
                    process.kill()
        except (EOFError, OSError):
            outbox.put(None)
            process.join(_FAREWELL)
            self._replace(process)

    def _take(self, kind: str, number: int, content: Any) -> None:
        if kind == "ready":
            self.ready, self._failures = True, 0
        elif kind == "told":
            self._told(content)
        elif kind == "begun":
            with self._lock:
                if number in self._waiting:
                    self._waiting[number].begun = time.monotonic()
        else:
            with self._lock:
                question = self._waiting.pop(number, None)
            if question is not None and question.answer.set_running_or_notify_cancel():
                if kind == "answer":
                    question.answer.set_result(content)
                else:
                    question.answer.set_exception(content)

    def _overdue(self) -> bool:
        with self._lock:
            now = time.monotonic()
            late = [
                question
                for question in self._waiting.values()
                if question.begun is not None and now - question.begun > question.limit
            ]
            for question in late:
                question.tries = _TRIES
            return bool(late)

    def _replace(self, process: Any) -> None:
        """Start another process for the questions that are left; those that this one died of get an error."""
        with self._lock:
            if self._process is not process:
                return
            # One that cannot even start is tried again a few times: what it stumbles over may pass.
            self._failures += not self.ready
            hopeless = self._failures >= _STARTS
            self._failures *= not hopeless
            self._process, self.ready = None, False
            for number, question in list(self._waiting.items()):
                question.tries += question.begun is not None
                if self._closed or hopeless or question.tries >= _TRIES:
                    del self._waiting[number]
                    if question.answer.set_running_or_notify_cancel():
                        found = f"{question.method} that ended its process, or took over {question.limit:g} s"
                        found = "a process that cannot start: see the log" if hopeless else found
                        question.answer.set_exception(Refused(503, found, "an answer"))
            if self._waiting:
                self.start()

    def kill(self) -> None:
        """End the process at once, with all questions; the next one starts another."""
        with self._lock:
            process, self._process = self._process, None
            waiting, self._waiting = list(self._waiting.values()), {}
            self.ready = False
        if process is not None:
            process.kill()
            process.join(_FAREWELL)
        for question in waiting:
            question.answer.cancel()

    def close(self) -> None:
        """End the process for good."""
        self._closed = True
        self.kill()


async def answer(worker: Worker, method: str, *arguments: Any, limit: float | None = None) -> Any:
    """Ask a process a question that somebody waits for; see `Worker.ask`."""
    try:
        return await asyncio.wrap_future(worker.ask(method, *arguments, limit=limit))
    except CancelledError:
        raise Refused(503, "a process that ended", "an answer: try again") from None


def _send(pipe: Connection, outbox: SimpleQueue[Any]) -> None:
    """Send what is put there until None is: who asks need not wait for a process that still starts."""
    with suppress(OSError):  # It has died: `_listen` is about to notice.
        while (question := outbox.get()) is not None:
            pipe.send(question)


def _run(pipe: Connection, kind: Kind) -> None:
    """Be the process: make the object, answer questions until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if kind.niceness and hasattr(os, "nice"):
        os.nice(kind.niceness)
    lock = threading.Lock()

    def send(what: str, number: int = 0, content: Any = None) -> None:
        with lock:
            pipe.send((what, number, content))

    module, name = kind.make.split(":")
    handler = getattr(import_module(module), name)(*kind.arguments)
    if hasattr(handler, "tell"):
        handler.tell = lambda event: send("told", 0, event)
    questions: PriorityQueue[tuple[int, int, str, tuple[Any, ...]]] = PriorityQueue()
    for _ in range(kind.threads):
        threading.Thread(target=_answer, args=(questions, handler, send), daemon=True).start()
    send("ready")
    try:
        while True:
            questions.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(0)  # Whatever is being computed, nobody waits for it.


def _answer(
    questions: PriorityQueue[tuple[int, int, str, tuple[Any, ...]]], handler: Any, send: Callable[..., None]
) -> None:
    while True:
        _, number, method, arguments = questions.get()
        send("begun", number)
        try:
            send("answer", number, getattr(handler, method)(*arguments))
        except Exception as error:
            send("error", number, _plain(error))


def _plain(error: Exception) -> Exception:
    """Return an error as it can be sent: of what is no mistake of the user's, its kind and message only."""
    if isinstance(error, Refused):
        return Refused(error.status, error.found, error.expected)
    if isinstance(error, SppnetError):
        return SppnetError(str(error))
    if isinstance(error, OSError):
        return OSError(error.errno, str(error))
    import traceback

    traceback.print_exc()
    return RuntimeError(f"{type(error).__name__}: {error}")
