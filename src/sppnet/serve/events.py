"""What changes is told to every page that listens, and to none that has gone away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from sppnet.serve.schema import Change

_MOST = 256


class Hub:
    """Passes changes on to those who listen.

    `tell` may be called from any thread; a listener that does not keep up loses the oldest changes.
    """

    def __init__(self) -> None:
        self._listeners: set[asyncio.Queue[Change | None]] = set()
        self._ended = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take the loop that listeners run in."""
        self._loop = loop

    @property
    def count(self) -> int:
        """How many listen."""
        return len(self._listeners)

    def tell(self, change: Change) -> None:
        """Pass a change on."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._spread, change)

    def end(self) -> None:
        """Let those who listen go, so that the server need not wait for them; called in their loop."""
        self._ended = True
        self._spread(None)

    def _spread(self, change: Change | None) -> None:
        for queue in self._listeners:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(change)

    async def listen(self) -> AsyncIterator[Change]:
        """Yield changes from now on, until whoever listens leaves or the server ends."""
        queue: asyncio.Queue[Change | None] = asyncio.Queue(_MOST)
        self._listeners.add(queue)
        try:
            while not self._ended and (change := await queue.get()) is not None:
                yield change
        finally:
            self._listeners.discard(queue)
