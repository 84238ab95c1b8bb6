"""Indexes that are searched side by side, as one: more regions than the memory of a machine holds.

The shards lie in one folder, or a file `SHARDS` in it names them. Their vectors stay on disk.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sppnet.arrays import Image
from sppnet.errors import SppnetError
from sppnet.features.encoded import EncodedImage
from sppnet.parallel import thread_count
from sppnet.retrieval.embedder import Vectors, check_same
from sppnet.retrieval.manifest import MANIFEST
from sppnet.storage import read_json, write_json

if TYPE_CHECKING:
    from sppnet.retrieval.index import Hit, Index

SHARDS = "shards.json"
"""Name of the file in a folder that names the shards, each by its path below or from that folder."""

_FORMAT, _VERSION = "sppnet-shards", "1"


class ShardedIndex:
    """Several indexes of one embedder that are searched side by side.

    A search asks each shard for its best images and merges what they give. Where shards are exact, so is the
    whole: it finds what one index of all images would.

    Parameters
    ----------
    shards : sequence of Index
        At least one; of different images.

    Attributes
    ----------
    embedder : Embedder
        Makes the vectors of all shards, those of the queries, too.
    source : str
        The folder that the images of all shards lie below.

    Raises
    ------
    SppnetError
        If there is no shard, two were made by different embedders, or two have an image in common; names
        them.
    """

    def __init__(self, shards: Sequence[Index]) -> None:
        if not shards:
            raise SppnetError("found no shard, expected at least one index")
        self.shards, self.embedder = tuple(shards), shards[0].embedder
        for shard in self.shards[1:]:
            check_same(shard.folder, shard.embedder, self.embedder)
        self.source = _common([shard.source for shard in self.shards])
        self._before = [_prefix(shard.source, self.source) for shard in self.shards]
        self._check_distinct()

    def _check_distinct(self) -> None:
        owners: dict[str, Index] = {}
        for shard, before in zip(self.shards, self._before, strict=True):
            for name in shard.images:
                first = owners.setdefault(before + name, shard)
                if first is not shard:
                    raise SppnetError(
                        f"{shard.folder}: found {before + name!r}, which is in {first.folder}, too; expected "
                        "each image in one shard"
                    )

    def __len__(self) -> int:
        """Return the number of regions."""
        return sum(map(len, self.shards))

    def search(
        self, image: Image | EncodedImage, *, box: npt.ArrayLike | None = None, top: int = 20
    ) -> list[Hit]:
        """Find the images with the regions most like an image, or a region of one.

        Parameters, results and errors are those of `sppnet.retrieval.index.Index.search`; the names of images
        are their paths below `source`.
        """
        if box is None:
            return self.search_vector(self.embedder(image), top)
        return self.search_vector(self.embedder(image, np.asarray(box, np.float32)[None])[0], top)

    def search_vector(self, vector: Vectors, top: int = 20) -> list[Hit]:
        """Find the images with the regions most like a vector; see `Index.search_vector`."""
        with ThreadPoolExecutor(min(thread_count(), len(self.shards))) as threads:
            found = threads.map(lambda shard: shard.search_vector(vector, top), self.shards)
            hits = [
                replace(hit, image=before + hit.image)
                for before, some in zip(self._before, found, strict=True)
                for hit in some
            ]
        # Of equal scores, those of the earlier shard come first, as in one index.
        return sorted(hits, key=lambda hit: -hit.score)[:top]


def shard_folders(folder: Path) -> list[Path]:
    """Return the folders of the shards that a folder names, or else holds, by name; none if there is neither.

    Raises
    ------
    SppnetError
        If the file that names them is damaged.
    """
    path = folder / SHARDS
    if not path.is_file():
        return sorted(place.parent for place in folder.glob(f"*/{MANIFEST}"))
    about = read_json(path)
    about = about if isinstance(about, dict) else {}
    mark, names = (about.get("format"), about.get("version")), about.get("shards")
    good = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if mark != (_FORMAT, _VERSION) or not good or not names:
        raise SppnetError(f"{path}: found other content, expected {_FORMAT} {_VERSION} with names of shards")
    return [folder / name for name in names]


def write_shards(folder: str | Path, shards: Sequence[str | Path]) -> None:
    """Name indexes that lie anywhere as the shards of a folder, which is made if it is missing.

    Parameters
    ----------
    folder : path
        What `sppnet.retrieval.index.open_index` and ``sppnet search`` take.
    shards : sequence of path
        Folders of indexes, at least one; kept as paths from `folder`, so that both can be moved together.

    Raises
    ------
    SppnetError
        If there is none, or one is no index.
    """
    folder, places = Path(folder), [Path(shard).resolve() for shard in shards]
    missing = [place for place in places if not (place / MANIFEST).is_file()]
    if missing or not places:
        raise SppnetError(f"{missing[0] if missing else folder}: found no index, expected folders of indexes")
    folder.mkdir(parents=True, exist_ok=True)
    names = [Path(os.path.relpath(place, folder.resolve())).as_posix() for place in places]
    write_json(folder / SHARDS, {"format": _FORMAT, "version": _VERSION, "shards": names})


def _common(sources: Sequence[str]) -> str:
    """Return the folder that all sources lie in."""
    if len(set(sources)) == 1:
        return sources[0]
    try:
        return os.path.commonpath(sources)
    except ValueError:  # of different disks, or of one's own, without a folder
        return ""


def _prefix(source: str, common: str) -> str:
    """Return what comes before the names of a shard's images where they are told from those of others."""
    below = os.path.relpath(source, common) if common and source != common else source if not common else ""
    return f"{Path(below).as_posix()}/" if below else ""
