"""The commands on data sets: what one holds, and the same in another format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

import sppnet.cli.console as console
import sppnet.cli.options as opt

if TYPE_CHECKING:
    from sppnet.datasets.overview import Overview

_NAMED = 8  # splits that are named


class _ShowsByDefault(TyperGroup):
    """A group of commands that shows what follows its name, if that is the name of no command."""

    def completed(self, args: list[str], context: Any) -> list[str]:
        """Put ``show`` before what names no command and asks for no help."""
        named = args and args[0] in {*self.commands, *self.get_help_option_names(context)}
        return args if named or not args else ["show", *args]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse what follows the name of the group."""
        return super().parse_args(ctx, self.completed(args, ctx))


_HELP = "Show what a data set holds: sppnet dataset DATA; or write it in another format."
dataset = typer.Typer(no_args_is_help=True, help=_HELP, cls=_ShowsByDefault)

To = Literal["coco", "csv", "labelstudio", "voc", "yolo"]
_PHOTOS = "Whether photos are copied, linked to or left where they are."
_SHEET = "Picture of some photos with their boxes (.jpg or .png)."


@dataset.command()
def show(
    data: opt.Data,
    split: Annotated[str | None, typer.Option(help="Split to show; default: all of them.")] = None,
    out: Annotated[Path, typer.Option(help=_SHEET)] = Path("out/dataset.jpg"),
    json_file: opt.Json = None,
) -> None:
    """Show what a data set holds: splits, classes, sizes of boxes, what looks odd, a sheet of photos."""
    from sppnet.images import check_picture
    from sppnet.storage import check_folder

    check_picture(out)
    check_folder(out.parent)
    console.check_places(json_file, None, [data], [out])

    from sppnet.datasets.overview import overview

    found = overview(data, split, track=console.track)
    console.notes_of(found.whole)
    for text in found.warnings:
        console.warn(text)
    print(f"{data}: {found.whole.format}, {_splits(found.splits)}")
    console.print_rows(*_table(found))

    from sppnet.drawing import draw_dataset
    from sppnet.images import write_image

    out.parent.mkdir(parents=True, exist_ok=True)
    write_image(out, draw_dataset(found.whole))
    console.write_json(json_file, found.facts())
    print(f"photos with their boxes in {out}")


def _splits(names: Sequence[str]) -> str:
    """Name the splits of a data set, as far as they can be read."""
    if not names:
        return "no splits"
    rest = [f"and {len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return f"{len(names)} split{'s' * (len(names) > 1)}: {', '.join([*names[:_NAMED], *rest])}"


def _table(found: Overview) -> tuple[Any, ...]:
    """Return columns, rows, title and last rows of a table of the classes of a data set, split by split."""
    parts = {**found.parts, "all": found.summary} if found.parts else {"objects": found.summary}
    counts = {name: {one.name: one.objects for one in part.classes} for name, part in parts.items()}
    rows = []
    for one in found.summary.classes:
        low, middle, high = one.sides
        share = "" if math.isnan(one.share) else f"{100 * one.share:.2g} %"
        held = [str(of.get(one.name, 0)) for of in counts.values()]
        rows.append((one.name, *held, str(one.images), f"{middle:.0f} px ({low:.0f}-{high:.0f})", share))
    last = [
        ("objects", *(str(part.objects) for part in parts.values()), "", "", ""),
        ("photos", *(str(part.images) for part in parts.values()), "", "", ""),
        ("without any", *(str(part.empty) for part in parts.values()), "", "", ""),
    ]
    columns = ("class", *parts, "photos", "box side (middle half)", "of photo")
    return columns, rows, None, last


@dataset.command()
def convert(
    data: opt.Data,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must be empty or missing.")],
    to: Annotated[To, typer.Option(help="Format to write.")],
    split: Annotated[str | None, typer.Option(help="Split to write; default: all, kept apart.")] = None,
    photos: Annotated[Literal["copy", "link", "none"], typer.Option(help=_PHOTOS)] = "copy",
) -> None:
    """Write a data set of any format in another one."""
    from sppnet.datasets.writing import convert

    written = convert(data, out, to, split, photos)
    console.notes_of(written)
    within = f" in {_splits(written.splits)}" if written.splits else ""
    print(
        f"{written.root}: {written.images} photos with {written.objects} objects{within}, as {written.format}"
    )
