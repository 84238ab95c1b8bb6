"""Records become samples: photos are found, sizes compared, boxes judged; what does not fit is counted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sppnet.arrays import Boxes
from sppnet.boxes import Target
from sppnet.datasets.findings import Annotation, Findings, Record, several, text_of
from sppnet.datasets.records import Sample
from sppnet.datasets.sizes import Frame, Size, decided, frame_of, turned
from sppnet.datasets.tree import Tree, clean, find_photo
from sppnet.errors import DatasetError, ImageError
from sppnet.images import ImageHeader, image_header

_ROUNDING = 0.01  # pixels by which a box may pass the border without being counted
_NAMED = 3  # photos that a note names


class _Placed(NamedTuple):
    """A record, the path of its photo, what this one's header says, and what the boxes were drawn on."""

    record: Record
    path: str
    header: ImageHeader
    frame: Frame


def finish(
    tree: Tree,
    records: Iterable[Record],
    findings: Findings,
    splits: Collection[str],
    photos: bool,
    max_bad: float,
) -> tuple[list[Sample], list[int | str | None]]:
    """Return the samples that records stand for, one for each photo, and the ids of these.

    Parameters
    ----------
    tree : Tree
        The files of the data set.
    records : iterable of Record
        As a format yields them.
    findings : Findings
        Takes the errors, and counts what was put right or left out.
    splits : collection of str
        All splits of the data set.
    photos : bool
        Whether photos are looked up and their headers held against the annotated sizes; without, these count.
    max_bad : float
        Share of photos that may be left out since they are missing, unreadable, or not the ones annotated.

    Raises
    ------
    DatasetError
        If there are errors, more bad photos, or no sample.
    """
    placed: list[_Placed] = []
    bad: list[str] = []
    for record in records:
        with findings.collect():
            try:
                placed.append((_with_photo if photos else _without_photo)(tree, record, splits))
            except (ImageError, OSError) as error:
                bad.append(str(error))
    groups = _by_photo(placed, findings)
    samples = _samples(groups, findings)
    findings.check(tree.root)
    total = len(placed) + len(bad)
    if len(bad) > max_bad * total:
        expected = f"expected at most {max_bad:.0%} (max_bad) that are missing, unreadable or of another size"
        raise DatasetError(several(bad, f"{tree.root}: found {len(bad)} bad photos of {total}, {expected}"))
    if bad:
        lines = "; ".join([*bad[:_NAMED], *([f"and {len(bad) - _NAMED} more"] if len(bad) > _NAMED else [])])
        what = "photos that are missing, unreadable or of another size, left out"
        findings.counts[f"{what} ({lines})"] = len(bad)
    findings.counts["images without objects"] = sum(not sample.target.labels for sample in samples)
    return _with_names(samples, tree.base), [group[0].record.id for group in groups]


def _with_photo(tree: Tree, record: Record, splits: Collection[str]) -> _Placed:
    """Find the photo of a record and hold its size against the annotated one."""
    path = find_photo(tree, record, splits)
    if path is None:
        name = record.file or os.path.basename(record.stem)
        raise FileNotFoundError(f"{record.where}: found no image {name!r} in {tree.base}, expected one")
    tree.met.add(str(Path(path)))
    header = image_header(path)
    frame = Frame.SEEN if record.relative else frame_of(record.size, header)
    if frame is None:
        (height, width), (h, w) = record.size or header.size, header.size
        raise ImageError(f"{record.where}: annotated as {width} x {height}, the photo {path} is {w} x {h}")
    return _Placed(record, path, header, frame)


def _without_photo(tree: Tree, record: Record, splits: Collection[str]) -> _Placed:
    """Take the size of a photo as it is annotated, and its path even where nothing lies there."""
    path = find_photo(tree, record, splits)
    if record.size is None or record.relative:
        if path is None:
            raise DatasetError(f"{record.where}: found no size of the image, expected one, or its photo")
        return _with_photo(tree, record._replace(photo=path), splits)
    if path is None:
        path = os.path.join(record.source.parent, clean(record.file) or os.path.basename(record.stem))
    return _Placed(record, path, ImageHeader(*record.size, 1), Frame.SEEN)


def _by_photo(placed: Sequence[_Placed], findings: Findings) -> list[list[_Placed]]:
    """Return the records by photo, with what their boxes were drawn on decided."""
    headers = [one.header for one in placed]
    rule = decided([one.frame for one in placed], headers)
    groups: dict[str, list[_Placed]] = {}
    for one in placed:
        frame = rule if one.frame == Frame.EITHER else one.frame
        if frame == Frame.EITHER:
            told = "photos turned by EXIF, of which sizes do not tell what was annotated: boxes taken as of"
            findings.counts[f"{told} the upright photo"] += bool(one.record.rows)
        elif frame == Frame.STORED:
            findings.counts["photos turned by EXIF after they were annotated, boxes turned with them"] += 1
        elif one.record.relative and one.header.orientation > 1:
            findings.counts["photos turned by EXIF, boxes taken as of the upright photo"] += 1
        groups.setdefault(one.path, []).append(one._replace(frame=frame))
    findings.counts["records of a photo that has one already, merged"] += len(placed) - len(groups)
    return list(groups.values())


def _samples(groups: Sequence[Sequence[_Placed]], findings: Findings) -> list[Sample]:
    """Bring all boxes to the pixels of the upright photos, judge them, and return the samples."""
    placed = [one for group in groups for one in group]
    rows = [row for one in placed for row in one.record.rows]
    boxes = np.array([row.box for row in rows], np.float64).reshape(-1, 4)
    owner = np.repeat(np.arange(len(placed)), [len(one.record.rows) for one in placed])
    boxes = _seen(boxes, placed, owner, findings)
    limits = np.array([one.header.size[::-1] * 2 for one in placed], np.float64).reshape(-1, 4)[owner]
    corners: Boxes = _judged(boxes, limits, rows, findings).astype(np.float32)
    flags = np.array([(row.difficult, row.crowd) for row in rows], bool).reshape(-1, 2)
    samples, start = [], 0
    for group in groups:
        end = start + sum(len(one.record.rows) for one in group)
        target = _target(rows[start:end], corners[start:end], flags[start:end], findings)
        first = group[0]
        for other in group:
            if other.header.size != first.header.size:  # without photos, what is annotated must agree
                (h, w), (height, width) = other.header.size, first.header.size
                found = f"{other.record.where}: found a photo of {w} x {h}"
                findings.errors.append(f"{found}, expected {width} x {height} as in {first.record.where}")
        samples.append(Sample(first.record.name, Path(first.path), target, first.header.size))
        start = end
    return samples


def _seen(
    boxes: npt.NDArray[np.float64], placed: Sequence[_Placed], owner: npt.NDArray[np.intp], findings: Findings
) -> npt.NDArray[np.float64]:
    """Return the boxes of (R,) placed records in pixels of the photos as they are seen."""
    sizes = np.array([_drawn_on(one) for one in placed], np.float64).reshape(-1, 2)
    seen = np.array([one.header.size for one in placed], np.float64).reshape(-1, 2)
    relative = np.array([one.record.relative for one in placed], bool)[owner]
    boxes[relative] *= seen[owner][relative][:, [1, 0, 1, 0]]
    turns = np.array([one.header.orientation if one.frame == Frame.STORED else 1 for one in placed], np.int64)
    for orientation in set(turns.tolist()) - {1}:
        mine = (turns == orientation)[owner]
        boxes[mine] = turned(boxes[mine], orientation, *sizes[owner][mine].T)
    sizes[turns >= 5] = sizes[turns >= 5][:, ::-1]
    factors = seen / sizes
    findings.counts["photos of another scale than annotated, boxes scaled"] = int((factors != 1).any(1).sum())
    return boxes * factors[owner][:, [1, 0, 1, 0]]


def _drawn_on(one: _Placed) -> Size:
    """Return the height and width of what the boxes of a record were drawn on."""
    if one.record.size is not None and not one.record.relative:
        return one.record.size
    return one.header[:2] if one.frame == Frame.STORED else one.header.size


def _judged(
    boxes: npt.NDArray[np.float64],
    limits: npt.NDArray[np.float64],
    rows: Sequence[Annotation],
    findings: Findings,
) -> npt.NDArray[np.float64]:
    """Return the boxes clipped to their images, whose width, height, width, height are `limits`."""
    inside = np.clip(boxes, 0, limits)
    proper = np.isfinite(boxes).all(axis=1) & np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
    visible = proper & np.all(inside[:, 2:] > inside[:, :2], axis=1)
    for i in map(int, np.flatnonzero(~visible)):
        size = " x ".join(f"{side:g}" for side in limits[i, :2])
        what = f"lies outside the image of {size}" if proper[i] else "is inverted or empty"
        place = text_of(rows[i].where)
        findings.errors.append(f"{place} {what}, expected a box with an area inside the image")
    clipped = visible & np.any(np.abs(inside - boxes) > _ROUNDING, axis=1)
    findings.counts["boxes that reached beyond their image, clipped"] += int(clipped.sum())
    return inside


def _target(
    rows: Sequence[Annotation], boxes: Boxes, flags: npt.NDArray[np.bool_], findings: Findings
) -> Target:
    """Return what is annotated in one image, each object once."""
    labels = tuple(row.label for row in rows)
    if len(set(labels)) < len(rows):
        keys = zip(labels, map(tuple, boxes.tolist()), strict=True)
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        if len(first) < len(rows):
            findings.counts["objects annotated twice, merged"] += len(rows) - len(first)
            keep = sorted(first.values())
            labels, boxes, flags = tuple(labels[i] for i in keep), boxes[keep], flags[keep]
    return Target(boxes, labels, flags[:, 0], flags[:, 1])


def _with_names(samples: Sequence[Sample], base: Path) -> list[Sample]:
    """Return samples whose names are told apart, where need be by the paths of the photos."""
    ways: tuple[Callable[[Sample], str], ...] = (
        lambda sample: sample.name,
        lambda sample: Path(os.path.relpath(sample.path.with_suffix(""), base)).as_posix(),
        lambda sample: Path(os.path.relpath(sample.path, base)).as_posix(),
    )
    for way in ways:
        names = [way(sample) for sample in samples]
        if max(Counter(names).values(), default=0) <= 1:
            break
    return [
        sample if name == sample.name else replace(sample, name=name)
        for name, sample in zip(names, samples, strict=True)
    ]
