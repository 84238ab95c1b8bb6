"""How functions are compiled: by numba, once for a processor and then kept; they release Python's lock."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

announce: Callable[[str], None] | None = None
"""Called once, before a process first compiles instead of loading what was kept: it may tell who waits."""


def compiled(*signatures: Any, inlined: tuple[str, ...] = (), **options: Any) -> Decorator:
    """Compile a function, or load it from the cache.

    Parameters
    ----------
    *signatures : str or numba signature
        For these it is compiled where it is defined; without any, at its first call with arguments of new
        types.
    inlined : tuple of str
        Other files whose code the function takes in, so that a change of them is noticed, too.
    **options
        As for `numba.njit`.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        from numba import njit

        # Numba's cache knows a function by its name. It notices changes of its own file only, and to do so it
        # loads the old entry, which fails where that speaks of records that have got other names since.
        files = (function.__code__.co_filename, *inlined)
        content = b"".join(Path(file).read_bytes() for file in files)
        function.__qualname__ += f"_{crc32(content):08x}"
        _load_without_scipy()
        _listen()

        def compile_(cache: bool) -> Any:
            given = list(signatures) or None
            return njit(given, nogil=True, cache=cache, error_model="numpy", **options)(function)

        try:
            result: Callable[..., Any] = compile_(cache=True)
        except RuntimeError:  # Numba finds no folder that it may write to.
            result = compile_(cache=False)
        return result

    return decorate


@cache
def _load_without_scipy() -> None:
    """Load numba's functions of arrays, which look for SciPy's algebra, without it: it takes the longest.

    They need it to multiply matrices. No kernel does, and who does later finds it as before.
    """
    if "scipy.linalg" in sys.modules:
        return
    sys.modules["scipy.linalg"] = None  # type: ignore[assignment]
    try:
        from numba.np import arraymath
    finally:
        del sys.modules["scipy.linalg"]
    arraymath._HAVE_BLAS = True


@cache
def _listen() -> None:
    """Have numba tell when it compiles what is not in its cache."""
    from numba.core import event

    class Listener(event.Listener):
        told = False

        def on_start(self, event: Any) -> None:
            if announce is not None and not self.told:
                self.told = True
                announce("compiling kernels for this processor, once: it takes some seconds")

        def on_end(self, event: Any) -> None:
            pass

    event.register("numba:compile", Listener())  # type: ignore[no-untyped-call]


def record(form: type[Any], *fields: Any) -> Any:
    """Return the type, for a signature, of a named tuple (or a tuple) whose fields have these types."""
    from numba import types

    return types.BaseTuple.from_types(fields, form)  # type: ignore[no-untyped-call]
