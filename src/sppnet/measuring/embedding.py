"""What the default embedder takes, for a plan."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import tee
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from sppnet.images import pixels_of
from sppnet.measuring.process import Units, memory, photos, ready
from sppnet.retrieval.embedder import Embedder
from sppnet.retrieval.vectors import VectorWriter


def embed(asked: Mapping[str, Any]) -> Units:
    """Embed photos by the default embedder, into a file as the command does."""
    embedder = Embedder()
    first = embedder(asked["photos"][0])
    started, start = ready(asked), time.process_time()
    whole, seen = np.zeros((1, 4), np.float32), 0
    with TemporaryDirectory(prefix="sppnet-plan-") as folder:
        writer = VectorWriter(Path(folder) / "vectors.safetensors", embedder)
        looked_at, given = tee(photos(asked))
        for found in embedder.stream(given):
            if isinstance(found, Exception):
                raise found
            writer.add(f"{seen}: {next(looked_at)}", found, whole, ("",))
            seen += 1
        writer.finish()
    each = (time.process_time() - start) / seen
    read = _read_seconds(asked)
    return {
        "start_embed": max(started - each, 0.0),
        "embed": max(each - read, 0.0),
        "vector": 4.0 * len(first),
        "memory_embed": memory(),
    }


def _read_seconds(asked: Mapping[str, Any]) -> float:
    """Return the seconds that a core takes to read a photo of those that are looked at, on average."""
    start = time.process_time()
    for path in asked["photos"]:
        pixels_of(path)
    return (time.process_time() - start) / len(asked["photos"])
