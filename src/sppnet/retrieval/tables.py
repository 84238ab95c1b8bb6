"""Vectors with what they stand for: the rows of files of vectors and of shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sppnet.arrays import Boxes, FloatArray
from sppnet.errors import SppnetError


@dataclass(frozen=True)
class VectorTable:
    """Vectors of images or of boxes in them, a row each.

    Attributes
    ----------
    vectors : (n, D) float32 or float16
        The vectors.
    names : tuple of n str
        The image of each row, as it was named.
    boxes : (n, 4) float32
        What of the image the vector stands for, in its pixels, 0-based and half-open; of a whole image all of
        it.
    labels : tuple of n str
        Class names where the boxes or images had some, else empty.
    """

    vectors: FloatArray
    names: tuple[str, ...]
    boxes: Boxes
    labels: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.names)


def join_tables(tables: Sequence[VectorTable]) -> VectorTable:
    """Put tables together, in their order.

    Raises
    ------
    SppnetError
        If there is none, or their vectors differ in length or type.
    """
    check_kinds(tables)
    return VectorTable(
        np.concatenate([table.vectors for table in tables]),
        tuple(name for table in tables for name in table.names),
        np.concatenate([table.boxes for table in tables]),
        tuple(label for table in tables for label in table.labels),
    )


def check_kinds(tables: Sequence[VectorTable]) -> None:
    """Raise an error unless the vectors of tables are all of one length and type."""
    kinds = {(table.vectors.shape[1], table.vectors.dtype.name) for table in tables}
    if len(kinds) != 1:
        found = ", ".join(f"{length} of {kind}" for length, kind in sorted(kinds)) or "no vectors"
        raise SppnetError(f"found vectors of {found}, expected one length and type")


def rows_by_name(table: VectorTable) -> dict[str, slice]:
    """Return the rows of each image, which lie together."""
    starts = [i for i, name in enumerate(table.names) if not i or name != table.names[i - 1]]
    ends = [*starts[1:], len(table)]
    return {table.names[start]: slice(start, end) for start, end in zip(starts, ends, strict=False)}
