"""What the commands share: options, checks before long work, progress, tables, JSON."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sppnet.errors import SppnetError

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

SHIPPED = "-"
Split = Annotated[str | None, typer.Option(help="Split of the data set, such as train or val.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")]
Out = Annotated[Path | None, typer.Option(help="Folder for pictures; made if missing.")]
Device = Annotated[str, typer.Option(help="cpu, or a PyTorch device such as cuda, for the backbone.")]
Weights = Annotated[str | None, typer.Option(help="Weights file of the backbone, if not the installed ones.")]


def name_list(text: str) -> list[str]:
    """Read names between commas, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


def integers(option: str, text: str) -> tuple[int, ...]:
    """Read positive integers between commas."""
    if not all(part.strip().isdecimal() and int(part) > 0 for part in text.split(",")):
        raise SppnetError(f"{option} {text}: expected positive integers between commas, such as 480,576")
    return tuple(int(part) for part in text.split(","))


def check_places(
    json_file: Path | None,
    out: Path | None,
    sources: Iterable[str | Path],
    pictures: Iterable[Path] = (),
) -> None:
    """Raise now, before long work, what could not be written after it, or would replace what is read."""
    from sppnet.storage import check_writable

    if json_file is not None:
        check_writable(json_file)
    if out is not None:
        check_folder(out)
    read = {Path(source).resolve() for source in sources}
    for target in (*pictures, *([] if json_file is None else [json_file])):
        if target.resolve() in read:
            raise SppnetError(f"{target}: found a file that is to be read, expected another for the results")


def check_folder(folder: Path) -> None:
    """Raise now, before long work, if there is a file where a folder is to be."""
    if folder.exists() and not folder.is_dir():
        raise OSError(f"{folder}: found a file, expected a folder, or nothing yet")


def make_folder(folder: Path | None) -> None:
    """Make a folder, if one is asked for and it is missing."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)


def progress_bar() -> Progress:
    """Return a bar for stderr with counts, the time passed and the time left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))


def track(items: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
    """Yield the items, `total` or else as many as their length says, under a bar with the time left."""
    with progress_bar() as progress:
        yield from progress.track(items, total=total, description=description)


def print_failures(failures: Sequence[str], total: int) -> None:
    """Print a line on stderr for each of `total` images that failed, and their number."""
    for failure in failures:
        print(f"sppnet: {failure}", file=sys.stderr)
    if failures and total > 1:
        print(f"sppnet: {len(failures)} of {total} images failed", file=sys.stderr)


def print_table(table: Table) -> None:
    """Print a table; names of files and classes are text, whatever brackets or colons they hold."""
    from rich.console import Console

    Console(markup=False, emoji=False).print(table)


def print_seconds(seconds: Mapping[str, float], title: str = "Seconds by stage") -> None:
    """Print a table of what each stage took."""
    from rich.table import Table

    table = Table("stage", "seconds", title=title)
    for stage, value in seconds.items():
        table.add_row(stage, f"{value:.3g}")
    print_table(table)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, with null for numbers that are not finite; the file appears whole or not at all."""
    from sppnet.storage import atomic_path

    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")


def _plain(content: Any) -> Any:
    """Return what JSON can hold: null for numbers that are not."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
