"""What the commands share beside options: checks before long work, progress, notes, tables, JSON."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from sppnet.errors import SppnetError

if TYPE_CHECKING:
    from sppnet.datasets import Dataset, LabelledImages

Read = TypeVar("Read", bound="Dataset | LabelledImages")


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


def track(items: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
    """Yield the items, `total` or else as many as their length says, under a bar with the time left."""
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        yield from bar.track(items, total=total, description=description)


def note(text: str) -> None:
    """Print a line on stderr that tells what was decided or put right."""
    print(f"note: {text}", file=sys.stderr)


def notes_of(data: Read) -> Read:
    """Print what was put right in a data set, and return it."""
    for text in data.notes:
        note(text)
    return data


def warn(text: str) -> None:
    """Print a line on stderr, red where the terminal has colours."""
    from rich.console import Console

    Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False).print(
        f"warning: {text}", style="bold red"
    )


def end(failures: Sequence[str], total: int) -> None:
    """Print what was wrong with each image that failed, and their number; end with status 1 then."""
    for failure in failures:
        print(f"sppnet: {failure}", file=sys.stderr)
    if failures and total > 1:
        print(f"sppnet: {len(failures)} of {total} images failed", file=sys.stderr)
    if failures:
        raise typer.Exit(1)


def print_rows(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    title: str | None = None,
    last: Iterable[Sequence[str]] = (),
) -> None:
    """Print a table, with the rows of `last` below a line.

    Names of files and classes are text, whatever brackets or colons they hold.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title)
    for part in (rows, last):
        for row in part:
            table.add_row(*row)
        table.add_section()
    Console(markup=False, emoji=False).print(table)


def print_seconds(seconds: Mapping[str, float], title: str = "Seconds by stage") -> None:
    """Print a table of what each stage took."""
    print_rows(("stage", "seconds"), [(stage, f"{value:.3g}") for stage, value in seconds.items()], title)


def write_json(path: Path | None, content: Any) -> None:
    """Write JSON, if a file is asked for, with null for numbers that are not finite; whole or not at all."""
    from sppnet.storage import atomic_path

    if path is None:
        return
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")


def _plain(content: Any) -> Any:
    """Return what JSON can hold: null for numbers that are not."""
    if isinstance(content, Mapping):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
