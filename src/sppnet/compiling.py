"""How functions are compiled: by numba, once, where they are defined; they release the interpreter lock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

from numba import njit, types

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def compiled(*signatures: Any, inlined: str | None = None, **options: Any) -> Decorator:
    """Compile a function for these signatures when it is defined, or load it from the cache.

    Parameters
    ----------
    *signatures : str or numba signature
    inlined : str, optional
        Another file whose code the function takes in, so that a change of it is noticed, too.
    **options
        As for `numba.njit`.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        # Numba's cache knows a function by its name. It notices changes of its own file only, and to do so it
        # loads the old entry, which fails where that speaks of records that have got other names since.
        files = [function.__code__.co_filename, *([] if inlined is None else [inlined])]
        content = b"".join(Path(file).read_bytes() for file in files)
        function.__qualname__ += f"_{crc32(content):08x}"

        def compile_(cache: bool) -> Any:
            return njit(list(signatures), nogil=True, cache=cache, error_model="numpy", **options)(function)

        try:
            result: Callable[..., Any] = compile_(cache=True)
        except RuntimeError:  # Numba finds no folder that it may write to.
            result = compile_(cache=False)
        return result

    return decorate


def record(form: type[Any], *fields: Any) -> Any:
    """Return the type, for a signature, of a named tuple (or a tuple) whose fields have these types."""
    return types.BaseTuple.from_types(fields, form)  # type: ignore[no-untyped-call]
