"""What the default embedder takes, for a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sppnet.images import pixels_of
from sppnet.measuring.process import Share, Units, memory, photos, ready
from sppnet.progress import StageTimer
from sppnet.retrieval.embedder import Embedder


def embed(asked: Mapping[str, Any]) -> Units:
    """Embed photos by the default embedder."""
    embedder, timer, seen = Embedder(), StageTimer(), 0
    embedder(asked["photos"][0])
    started, share = ready(asked), Share()
    for path in photos(asked):
        with timer("read"):
            pixels = pixels_of(path)
        with timer("embed"):
            embedder(pixels)
        seen += 1
    had = share()
    each = {name: had * seconds / seen for name, seconds in timer.seconds.items()}
    return {
        "start_embed": max(started - sum(each.values()), 0.0),
        "embed": each["embed"],
        "vector": 4.0 * embedder.length,
        "memory_embed": memory(),
    }
