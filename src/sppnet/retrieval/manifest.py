"""The manifest of an index: what names its files, with their checksums, and is replaced last."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sppnet.errors import SppnetError
from sppnet.storage import read_json

FORMAT, VERSION = "sppnet-index", "3"
MANIFEST = "index.json"

_CHUNK = 1 << 24
_KEYS = {"generation", "source", "rows", "vectors", "regions", "images", "files"}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what the manifest of an index says.

    Raises
    ------
    SppnetError
        If there is none, or it is of another format or version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise SppnetError(f"{folder}: found no {MANIFEST}, expected an index that sppnet index made")
    about = read_json(path)
    if not isinstance(about, dict):
        raise SppnetError(f"{path}: found {type(about).__name__}, expected {FORMAT} {VERSION}")
    mark = (about.get("format"), about.get("version"))
    if mark != (FORMAT, VERSION):
        found = " ".join(str(part) for part in mark if part is not None) or "no format"
        raise SppnetError(f"{path}: found {found}, expected {FORMAT} {VERSION}; make the index anew")
    missing = _KEYS - about.keys()
    if missing:
        raise SppnetError(f"{path}: found no {', '.join(sorted(missing))}, expected all that an index has")
    return about


def damage(folder: Path, about: Mapping[str, Any], *, mapped: bool = False) -> str | None:
    """Return what is wrong with the files that a manifest names, if anything is.

    Of vectors that are `mapped`, and so are not read at once, only the size is looked at.
    """
    for name, facts in about["files"].items():
        path = folder / name
        brief = mapped and name == about["vectors"] and isinstance(facts, dict)
        if not path.is_file():
            found = None
        elif brief:
            found = {**facts, "bytes": path.stat().st_size}
        else:
            found = file_facts(path)
        if found != facts:
            return f"{path}: found a damaged or missing file ({found}), expected {facts}"
    return None


def file_facts(path: Path) -> dict[str, int]:
    """Return the size of a file in bytes, and a checksum by which damage shows."""
    checksum = 0
    with path.open("rb") as file:
        while content := file.read(_CHUNK):
            checksum = zlib.crc32(content, checksum)
    return {"bytes": path.stat().st_size, "crc32": checksum}
