"""Boxes as VOC XML, beside the photos or in the project: written after each change, read at first opening."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sppnet.boxes import Target
from sppnet.datasets.entries import Entry
from sppnet.datasets.voc import write_annotation
from sppnet.serve.schema import Annotations as Where
from sppnet.serve.schema import LabelledBox

if TYPE_CHECKING:
    from sppnet.serve.labels import Labels

BESIDE: Literal["beside"] = "beside"
PROJECT: Literal["project"] = "project"


class Annotations:
    """Keeps an XML file for each labelled photo up to date with the store.

    Parameters
    ----------
    labels : Labels
    project : Path
        The folder of the project; ``annotations`` in it takes the files unless they go beside the photos, and
        ``replaced`` those of others that would be written over.
    """

    def __init__(self, labels: Labels, project: Path) -> None:
        self.labels, self.photos, self.project = labels, labels.photos, project

    @property
    def where(self) -> Where:
        """``"beside"`` the photos, or in the ``"project"``."""
        return BESIDE if self.photos.store.fact("annotations") == BESIDE else PROJECT

    def write(self, photo: str) -> str | None:
        """Write the file of a photo; return why it cannot be: it is tried again at the next change."""
        try:
            self._write(photo)
        except (ValueError, OSError) as error:
            return f"The boxes are saved in the project, but their XML file is not: {error}"
        with self.photos.store.change() as connection:
            connection.execute("UPDATE photos SET unwritten = 0 WHERE id = ?", (photo,))
        return None

    def write_all(self) -> None:
        """Write the files of all photos for which that is still to be done."""
        for photo in self.photos.all("unwritten"):
            self.write(photo)

    def _write(self, photo: str) -> None:
        row, known = self.photos.row(photo), self.labels.of(photo)
        path = self._path(row)
        if path.exists() and row["revision"] <= 1 and self.where == BESIDE:
            self._put_aside(path)
        place = str(self.photos.place(row))
        target = Target.of([box.box for box in known.boxes], [box.label for box in known.boxes])
        width, height = self.photos.size(photo)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_annotation(path, Entry(Path(place).name, place, height, width, target))

    def _path(self, row: Any) -> Path:
        place = Path(os.fsdecode(row["place"]))
        name = f"{place.name if self._shares_stem(row) else place.stem}.xml"
        if self.where == BESIDE:
            return self.photos.folders[row["root"]].root / place.parent / name
        return self.project / "annotations" / place.parent / name

    def _shares_stem(self, row: Any) -> bool:
        """Tell whether another photo of the same folder has the same name but for its suffix."""
        stem = os.path.splitext(row["place"])[0]
        others = self.photos.store.rows(
            "SELECT place FROM photos WHERE id != ? AND gone = 0 AND instr(place, ?) = 1", row["id"], stem
        )
        return any(os.path.splitext(other["place"])[0] == stem for other in others)

    def _put_aside(self, path: Path) -> None:
        """Keep a copy of a file that somebody else wrote."""
        kept = self.project / "replaced" / path.name
        if not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, kept)

    def take_in(self, found: Iterable[tuple[str, list[tuple[Any, str]]]]) -> int:
        """Take in boxes that lie beside photos that nobody has labelled yet; return of how many photos."""
        known, taken = self._by_path(), 0
        for path, rows in found:
            photo = known.get(os.path.realpath(path))
            boxes = [LabelledBox(box=tuple(box), label=label) for box, label in rows]
            if photo is not None and boxes:
                self.labels.add_new(photo, boxes)
                taken += 1
        return taken

    def _by_path(self) -> dict[str, str]:
        rows = self.photos.store.rows("SELECT id, root, place FROM photos WHERE gone = 0")
        roots = {number: str(folder.root) for number, folder in self.photos.folders.items()}
        return {os.path.join(roots[row["root"]], os.fsdecode(row["place"])): row["id"] for row in rows}
