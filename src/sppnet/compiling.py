"""How functions are compiled: by numba, once, where they are defined; they release the interpreter lock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from numba import njit
from numba.extending import intrinsic

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

inlined: Decorator = cast(Any, intrinsic)


def compiled(*signatures: str, **options: Any) -> Decorator:
    """Compile a function for these signatures when it is defined, or load it from the cache."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        def compile_(cache: bool) -> Any:
            return njit(list(signatures), nogil=True, cache=cache, error_model="numpy", **options)(function)

        try:
            result: Callable[..., Any] = compile_(cache=True)
        except RuntimeError:  # Numba finds no folder that it may write to.
            result = compile_(cache=False)
        return result

    return decorate
