"""What a fit learns from: the labelled photos of a project, and what of them is too little."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from sppnet.serve.errors import Gone
from sppnet.serve.matching import same
from sppnet.serve.schema import CanFit, ClassFacts, Labelled

if TYPE_CHECKING:
    from sppnet.serve.labels import Labels
    from sppnet.serve.store import Store

LEAST_BOXES = 5
"""A class with fewer boxes is not learned."""

# Detections from this probability on that nobody judged may be objects: they are no background.
_MAY_BE = 0.3


class Example(NamedTuple):
    """A photo to learn from, as it is sent to the process that fits.

    Attributes
    ----------
    path : str
        Its file.
    width, height : int
        Its size in pixels.
    boxes : list of four floats
    labels : list of str
        Class of each box.
    ignored : list of bool
        Boxes that teach nothing, neither as objects nor as background.
    """

    path: str
    width: int
    height: int
    boxes: list[tuple[float, ...]]
    labels: list[str]
    ignored: list[bool]


def can_fit(classes: Sequence[ClassFacts]) -> CanFit:
    """Tell whether there is enough to learn from, and what is missing or left out."""
    some = [one for one in classes if one.boxes]
    few = [f"{one.name} has {one.boxes} of {LEAST_BOXES}" for one in some if one.boxes < LEAST_BOXES]
    if not some:
        return CanFit(ok=False, reason=f"Draw {LEAST_BOXES} boxes of a class first.")
    if len(few) == len(some):
        return CanFit(ok=False, reason=f"Too few boxes: {', '.join(few)}.")
    return CanFit(ok=True, reason=f"Left out, too few boxes: {', '.join(few)}." if few else None)


def learned_classes(classes: Sequence[ClassFacts]) -> list[str]:
    """Return the classes that have boxes enough."""
    return [one.name for one in classes if one.boxes >= LEAST_BOXES]


def examples(labels: Labels, store: Store) -> list[Example]:
    """Return the photos to learn from: those with boxes or rejected detections, and reviewed ones.

    Photos that have vanished from their folder are passed over.
    """
    condition = "(reviewed OR id IN (SELECT photo FROM boxes))"
    found = []
    for photo in labels.photos.all(f"state != 'failed' AND {condition}"):
        with suppress(Gone):
            found.append(_example(labels, store, photo))
    return found


def _example(labels: Labels, store: Store, photo: str) -> Example:
    known = labels.of(photo)
    width, height = labels.photos.size(photo)
    complete = known.reviewed or any(box.origin != "accepted" for box in known.boxes)
    judged = [*known.boxes, *known.rejected]
    open_ = [] if complete else [one for one in _likely(store, photo) if not same(one, judged)]
    everything: list[Labelled] = [*known.boxes, *open_]
    return Example(
        str(labels.photos.path(photo)),
        width,
        height,
        [box.box for box in everything],
        [box.label for box in everything],
        [False] * len(known.boxes) + [True] * len(open_),
    )


def _likely(store: Store, photo: str) -> list[Labelled]:
    """Return the likely detections of a photo."""
    row = store.row("SELECT found FROM results WHERE photo = ?", photo)
    found: list[dict[str, Any]] = [] if row is None else json.loads(row["found"])
    likely = [one for one in found if one["score"] >= _MAY_BE]
    return [Labelled.model_construct(box=tuple(one["box"]), label=one["label"]) for one in likely]
