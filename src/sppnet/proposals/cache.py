"""Windows of many images, several at a time, and found again on disk."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
from platformdirs import user_cache_path

from sppnet.arrays import Pixels
from sppnet.boxes import Windows
from sppnet.errors import SppnetError
from sppnet.images import pixels_of
from sppnet.parallel import Runner, Threads
from sppnet.proposals.file import image_key
from sppnet.proposals.method import Proposer, propose_for
from sppnet.storage import atomic_path


def cache_folder() -> Path:
    """Return the folder of the user's caches for `propose_all`; it may not exist yet."""
    return user_cache_path("sppnet") / "proposals"


def propose_all(
    images: Sequence[str | Path | Pixels],
    method: Proposer,
    cache: str | Path | None = None,
    workers: int | None = None,
) -> Iterator[Windows]:
    """Propose windows for many images, as `propose_each` does, of which all must be readable.

    Raises
    ------
    SppnetError, OSError
        From the first image that cannot be read or proposed for; the message names it.
    """
    for found in propose_each(images, method, cache, workers):
        if isinstance(found, Exception):
            raise found
        yield found


def propose_each(
    images: Sequence[str | Path | Pixels],
    method: Proposer,
    cache: str | Path | None = None,
    workers: int | None = None,
    cluster: Runner | None = None,
) -> Iterator[Windows | Exception]:
    """Propose windows for many images, several at a time.

    Parameters
    ----------
    images : sequence of path, str or (H, W, 3) uint8
        Image files, or pixels, RGB and upright.
    method : Proposer
        What proposes the windows, from the pixels alone.
    cache : path, optional
        Folder to keep windows in, made if missing. They are found again by the bytes of the image,
        whatever its name, and the `Proposer.signature` of the method; a damaged entry is computed again. A
        folder that cannot be written to is warned of, and not used.
    workers : int, optional
        Number of threads; by default one for each core. OpenCV works without holding Python's lock.
    cluster : Runner, optional
        Whose workers propose, each with the cache of that place on its machine; by default these threads.

    Yields
    ------
    Windows, or the SppnetError or OSError that an image gave, which names it
        In the order of the images.
    """
    if cache is not None:
        try:
            Path(cache).mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=cache):
                pass
        except OSError as error:
            warnings.warn(
                f"{cache}: cannot keep windows there ({error.strerror}); going on without", stacklevel=2
            )
            cache = None
    runner = cluster or Threads(workers or os.cpu_count() or 1)
    yield from runner.stream(_Proposing(method, cache), images)


@dataclass(frozen=True)
class _Proposing:
    """The work of proposing windows for an image, or the error that it gave."""

    method: Proposer
    cache: str | Path | None

    def open(self) -> Callable[[str | Path | Pixels], Windows | Exception]:
        return partial(_result, self.method, self.cache)


def _result(method: Proposer, cache: str | Path | None, image: str | Path | Pixels) -> Windows | Exception:
    try:
        return _propose(image, method, cache)
    except (SppnetError, OSError) as error:
        return error


def _propose(image: str | Path | Pixels, method: Proposer, cache: str | Path | None) -> Windows:
    if cache is None:
        return propose_for(image, pixels_of(image), method)
    key = hashlib.blake2b(method.signature.encode(), digest_size=16)
    if isinstance(image, np.ndarray):
        key.update(image_key(image).encode())
    else:
        key.update(Path(image).read_bytes())
    entry = Path(cache) / f"{key.hexdigest()}.windows"
    windows = _read_entry(entry)
    if windows is None:
        windows = propose_for(image, pixels_of(image), method)
        table = np.column_stack(windows).tobytes()
        with atomic_path(entry) as temporary:
            temporary.write_bytes(_checksum(table) + table)
    return windows


def _read_entry(entry: Path) -> Windows | None:
    """Return the windows of a cache entry; None if it is missing or damaged."""
    if not entry.exists():
        return None
    content = entry.read_bytes()
    checksum, table = content[:16], content[16:]
    if checksum != _checksum(table):
        return None
    columns = np.frombuffer(table, np.float32).reshape(-1, 5)
    return Windows(columns[:, :4].copy(), columns[:, 4].copy())


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
