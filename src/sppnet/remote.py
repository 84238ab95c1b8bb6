"""Files at addresses, such as ``s3://bucket/photos``, read through fsspec.

A `Path` holds an address without its second slash, ``s3:/bucket/photos``: all that goes on with paths goes on
with addresses, and only what opens or lists files asks here. Web addresses, which programs fetch first, are
those of `sppnet.fetching`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import IO, Any

from sppnet.errors import SppnetError, check_extra

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)", re.DOTALL)


def address_of(path: str | Path) -> str | None:
    """Return the address that a path stands for, None for a path on this machine."""
    match = _ADDRESS.fullmatch(str(path))
    if match is None:
        return None
    scheme, rest = match.groups()
    # Of what follows the slashes, a local file system takes all from its root.
    return f"{scheme}:///{rest}" if scheme in ("file", "local") else f"{scheme}://{rest}"


def open_file(path: Path) -> IO[bytes]:
    """Open a file to read its bytes, wherever it lies.

    Raises
    ------
    FileNotFoundError
        If there is none.
    SppnetError
        If fsspec, or what it needs for such an address, is not installed.
    """
    address = address_of(path)
    if address is None:
        return path.open("rb")
    system, place = _system(address)
    opened: IO[bytes] = system.open(place, "rb")
    return opened


def stamp_of(path: Path) -> str:
    """Return a text that changes when the content of a file does: its size, and when it was written."""
    address = address_of(path)
    if address is None:
        facts = path.stat()
        return f"{facts.st_size} {facts.st_mtime_ns}"
    system, place = _system(address)
    about = system.info(place)
    times = [about[name] for name in ("ETag", "mtime", "LastModified", "created") if name in about]
    return f"{about['size']} {times[0] if times else ''}".rstrip()


def listed(address: str) -> list[Path]:
    """Return the files that an address names: one, all in a folder at any depth, or those of a pattern.

    Sorted, and without those that are hidden.
    """
    system, place = _system(address)
    if system.isfile(place):
        return [Path(address)]
    found = system.glob(place) if any(sign in place for sign in "*?[") else system.find(place)
    names = [os.fspath(system.unstrip_protocol(name)) for name in sorted(found)]
    return [Path(name) for name in names if not Path(name).name.startswith(".")]


def _system(address: str) -> tuple[Any, str]:
    """Return the file system of an address, and the place in it."""
    check_extra("ray", f"{address}: reading addresses")
    from fsspec.core import url_to_fs

    try:
        system, place = url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise SppnetError(f"{address}: found an address that cannot be read ({error})") from None
    return system, place
