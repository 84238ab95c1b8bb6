"""What a data set is as a whole: its splits side by side, and the photos that they share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sppnet.datasets.reading import dataset_splits, read_dataset
from sppnet.datasets.records import Dataset
from sppnet.datasets.splits import ALL, without_unions
from sppnet.datasets.summary import Place, Summary, equal_photos, summarise
from sppnet.progress import Track, no_track

# Splits beyond these are named, and not read one by one: VOC has lists of images for each class.
_READ = 8


class Overview(NamedTuple):
    """What a data set holds, split by split.

    Attributes
    ----------
    whole : Dataset
        All of it, or the split that was asked for.
    summary : Summary
        What it holds.
    parts : mapping from str to Summary
        What each split holds; empty where there is one at most, or more than 8.
    splits : tuple of str
        The names of all splits.
    warnings : tuple of str
        A line for each thing that may be a mistake: those of the summary, and photos that are equal.
    """

    whole: Dataset
    summary: Summary
    parts: Mapping[str, Summary]
    splits: tuple[str, ...]
    warnings: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """Return all of it as JSON has it."""
        return {
            "format": self.whole.format,
            "splits": {name: _facts(part) for name, part in self.parts.items()} or list(self.splits),
            **_facts(self.summary),
            "notes": list(self.whole.notes),
            "warnings": list(self.warnings),
        }


def overview(root: str | Path, split: str | None = None, *, track: Track = no_track) -> Overview:
    """Read a data set to see what it holds.

    Parameters
    ----------
    root : path
        Folder or file, as `sppnet.read_dataset` takes it.
    split : str, optional
        Look at this one alone; by default at all.
    track : callable
        ``track(items, description)`` yields the items and may draw progress.

    Raises
    ------
    DatasetError, FileNotFoundError
        As `sppnet.read_dataset` does.
    """
    splits = dataset_splits(root)
    several = split is None and len(splits) > 1
    names = splits if several and len(splits) <= _READ else ()
    wanted = [*names, ALL if several else split]
    *parts, whole = [read_dataset(root, name) for name in track(wanted, "Reading")]
    summary = summarise(whole)
    own = without_unions(parts)[0] if parts else [whole]
    groups = equal_photos([Place(part.split or "", sample.path) for part in own for sample in part])
    shared = [g for g in groups if len({place.split for place in g}) > 1]
    twice = [g for g in groups if len({place.split for place in g}) == 1]
    return Overview(
        whole,
        summary,
        {name: summarise(part) for name, part in zip(names, parts, strict=True)},
        splits,
        (
            *summary.warnings,
            *_told("photos in more than one split", shared),
            *_told("photos that are there twice", twice),
        ),
    )


def _told(what: str, groups: list[list[Place]]) -> list[str]:
    """Return a line that counts groups of equal photos and names the first."""
    if not groups:
        return []
    first = " and ".join(str(place.path) for place in groups[0])
    return [f"{what}: {len(groups)} (first: {first})"]


def _facts(summary: Summary) -> dict[str, Any]:
    classes = {
        one.name: {
            "objects": one.objects,
            "images": one.images,
            "ignored": one.ignored,
            "sides": list(one.sides),
            "share": one.share,
        }
        for one in summary.classes
    }
    return {
        "images": summary.images,
        "objects": summary.objects,
        "empty": summary.empty,
        "classes": classes,
    }
