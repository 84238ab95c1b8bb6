"""Images on the web: the one place where something is fetched that a user names."""

from __future__ import annotations

import http.client
import os
from pathlib import Path
from urllib.error import URLError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from sppnet.errors import ImageError

LIMIT = 50_000_000
"""Most bytes of a file."""
TIMEOUT = 20.0
"""Seconds after which a server that says nothing is given up."""

_BLOCK = 1 << 16


def is_address(source: str | Path) -> bool:
    """Tell whether a source is the address of a file on the web."""
    return str(source).lower().startswith(("http://", "https://"))


def fetch(address: str, folder: Path) -> Path:
    """Fetch a file from the web.

    Parameters
    ----------
    address : str
        Beginning with ``http://`` or ``https://``.
    folder : Path
        Where to put it, in folders by the name of the server and its own: two addresses make two files.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ImageError
        If the server cannot be reached, refuses, says nothing for `TIMEOUT` seconds, or gives more than
        `LIMIT` bytes.
    """
    try:
        path = folder / path_of(address)
        with urlopen(Request(address, headers={"User-Agent": "sppnet"}), timeout=TIMEOUT) as answer:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                while block := answer.read(_BLOCK):
                    file.write(block)
                    if file.tell() > LIMIT:
                        raise ImageError(f"{address}: found more than {LIMIT} bytes, expected an image")
    except (URLError, http.client.HTTPException, TimeoutError, ConnectionError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
        status = f"{error.code} " if hasattr(error, "code") else ""
        raise ImageError(f"{address}: cannot fetch it ({status}{reason}), expected an image") from None
    return path


def path_of(address: str) -> Path:
    """Return the server and the name of a file on the web as a path: ``example.org/photos/1.jpg``."""
    parts = urlsplit(address)
    name = unquote(parts.path).strip("/") or "index"
    query = f"?{parts.query}" if parts.query else ""
    # No part may lead out of the folder, or be longer than a name may be.
    steps = [step for step in f"{parts.netloc}/{name}{query}".split("/") if step not in ("", ".", "..")]
    return Path(*(os.fsdecode(os.fsencode(step.replace("\0", ""))[-200:]) for step in steps))
