"""The splits of a data set: which one is meant by a name, and which one to learn from if none is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from sppnet.errors import DatasetError

Part = TypeVar("Part")


def pick_split(root: Path, splits: Mapping[str, Part], split: str | None) -> tuple[str, Part]:
    """Choose a split by its name, by a beginning that only it has, or as the only one there is.

    Parameters
    ----------
    root : Path
        What an error names.
    splits : mapping from str
        The splits there are, by name.
    split : str, optional
        The name that was asked for.

    Returns
    -------
    tuple of str and value
        The whole name, and what `splits` holds for it.

    Raises
    ------
    DatasetError
        If it is none of them or the beginning of several, or if none was asked for and there are several.
    """
    fitting = [name for name in splits if name == split] or [n for n in splits if n.startswith(split or "")]
    if len(fitting) != 1:
        found = f"no single split {split!r}" if split else f"{len(splits)} splits and none chosen"
        raise DatasetError(f"{root}: found {found}, expected one of: {', '.join(sorted(splits)) or '(none)'}")
    return fitting[0], splits[fitting[0]]


def default_training_split(splits: Iterable[str]) -> str | None:
    """Return the split to learn from where none was named.

    Parameters
    ----------
    splits : iterable of str
        The names of the splits there are, as `dataset_splits` or `image_folder_splits` lists them.

    Returns
    -------
    str or None
        ``train`` or ``training``, or else the only one that begins with ``train`` (such as ``train2017``), or
        that begins with ``trainval`` where no other begins so; None where there is no such split, or several
        and none of these names.
    """
    beginning = [name for name in splits if name.casefold().startswith("train")]
    exact = [name for name in beginning if name.casefold() in ("train", "training")]
    plain = [name for name in beginning if not name.casefold().startswith("trainval")]
    fitting = exact[:1] or plain or beginning
    return fitting[0] if len(fitting) == 1 else None
