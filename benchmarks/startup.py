"""Time commands as their user sees them, from the start of Python to the end, and their memory. Run as::

    python benchmarks/startup.py --python before=old/.venv/bin/python --python after=.venv/bin/python

Each command is a process of its own, in a folder of its own. Each interpreter has caches of its own, empty
at first: a command runs once for them, unmeasured, then ``--runs`` times. Several interpreters take turns.
A dash is a command that did not end as it should.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

# Nothing heavy: a process counts the memory of the one that started it until it has its own.
from common import commit, machine, table, write_json

PHOTO = Path(__file__).parents[1] / "src" / "sppnet" / "photos" / "cows.jpg"
SPPNET = ("-m", "sppnet")
# The program where these packages are not installed, whether they are or not.
WITHOUT = (
    "import sys; sys.modules.update(dict.fromkeys(('torch', 'timm'))); from sppnet.cli import main; main()"
)


class Task(NamedTuple):
    """A command: its title in the table, what follows the interpreter, whether it shall end in an error."""

    title: str
    words: tuple[str, ...]
    fails: bool = False
    cold: bool = False


class Measured(NamedTuple):
    """What a run took: seconds from start to end, and the most memory, in MB."""

    seconds: float
    megabytes: float


RUN = (*SPPNET, "detect", "run", "animals", "photo.jpg", "--out", "found")
TASKS = (
    Task("`import sppnet`", ("-c", "import sppnet")),
    Task("`sppnet --help`", (*SPPNET, "--help")),
    Task("`sppnet demo`, empty caches", (*SPPNET, "demo"), cold=True),
    Task("`sppnet demo`", (*SPPNET, "demo")),
    Task("`sppnet detect run animals PHOTO --out found`", RUN),
    Task("the same with `--proposals maps`", (*RUN, "--proposals", "maps")),
    Task("`sppnet export animals --out FILE`", (*SPPNET, "export", "animals", "--out", "animals.onnx")),
    Task(
        "error: no such folder",
        (*SPPNET, "detect", "train", "nowhere", "--out", "mine.safetensors"),
        fails=True,
    ),
    Task(
        "error: `--box 5,5,1`",
        (*SPPNET, "search", "photos.index", "--image", "photo.jpg", "--box", "5,5,1"),
        fails=True,
    ),
    Task(
        "error: a missing extra",
        ("-c", WITHOUT, "classify", "train", "photos", "--out", "mine.safetensors"),
        fails=True,
    ),
)


def measured(command: Sequence[str], fails: bool, caches: Path, photo: Path) -> Measured | None:
    """Run a command in a folder of its own; None if it does not end as it should."""
    with TemporaryDirectory() as folder, TemporaryDirectory() as said:
        shutil.copy(photo, Path(folder) / "photo.jpg")
        (Path(folder) / "photos").mkdir()
        error = Path(said) / "stderr"
        with error.open("w") as file:
            start = time.perf_counter()
            process = subprocess.Popen(
                command, cwd=folder, env=surroundings(caches), stdout=subprocess.DEVNULL, stderr=file
            )
            _, status, used = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        lines = error.read_text().splitlines()
    if fails:
        well = process.returncode in (1, 2) and len(lines) == 1 and lines[0].startswith("sppnet: ")
    else:
        well = process.returncode == 0
    return Measured(seconds, used.ru_maxrss / 1024) if well else None


def surroundings(caches: Path) -> Mapping[str, str]:
    """Return the environment of a command: the user's with these caches, and nothing else about Python."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {"XDG_CACHE_HOME": str(caches), "NUMBA_CACHE_DIR": str(caches / "numba")}


def median(found: Sequence[Measured | None]) -> Measured | None:
    """Return the medians of some runs; None if one of them did not end as it should."""
    good = [one for one in found if one]
    if len(good) < len(found):
        return None
    seconds, megabytes = zip(*good, strict=True)
    return Measured(statistics.median(seconds), statistics.median(megabytes))


def rounds(
    task: Task, pythons: Mapping[str, str], caches: Path, runs: int, photo: Path
) -> dict[str, Measured | None]:
    """Return the medians of a task, by label."""

    def once(label: str) -> Measured | None:
        command = (pythons[label], *task.words)
        if not task.cold:
            return measured(command, task.fails, caches / label, photo)
        with TemporaryDirectory() as empty:
            return measured(command, task.fails, Path(empty), photo)

    found: dict[str, list[Measured | None]] = {label: [] for label in pythons}
    if not task.cold:
        for label in pythons:
            once(label)
    for _ in range(runs):
        for label in pythons:
            found[label].append(once(label))
    return {label: median(some) for label, some in found.items()}


def installed_megabytes(python: str) -> float:
    """Return the size of all files below an interpreter's prefix, but for compiled Python."""
    call = (python, "-c", "import sys; print(sys.prefix)")
    prefix = Path(subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip())
    files = (path for path in prefix.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files if path.suffix != ".pyc") / 1e6


def figure(one: Measured | None) -> str:
    return "-" if one is None else f"{one.seconds:.2f} s, {one.megabytes:.0f} MB"


def labelled(text: str) -> tuple[str, str]:
    """Return label and path of ``LABEL=PATH``."""
    label, sign, path = text.partition("=")
    if not sign or not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"found {text}, expected LABEL=PATH with the path of a Python")
    return label, str(Path(path).absolute())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", type=labelled, action="append", required=True, metavar="LABEL=PATH")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", default="", help="measure tasks whose title holds this")
    parser.add_argument("--photo", type=Path, default=PHOTO, help="what is looked at, but for the demo")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pythons = dict(args.python)
    rows, facts = [], {}
    with TemporaryDirectory() as caches:
        for task in TASKS:
            if args.only in task.title:
                found = rounds(task, pythons, Path(caches), args.runs, args.photo)
                facts[task.title] = {label: one and one._asdict() for label, one in found.items()}
                rows.append((task.title, *(figure(one) for one in found.values())))
    sizes = {label: installed_megabytes(python) for label, python in pythons.items()}
    rows.append(("the virtual environment, without `.pyc`", *(f"{size:.0f} MB" for size in sizes.values())))
    print(f"{machine()}, commit {commit()}, medians of {args.runs}: seconds, and most memory at once\n")
    print(table(("what", *pythons), rows))
    write_json(
        args.json,
        {"machine": machine(), "commit": commit(), "runs": args.runs, "tasks": facts, "installed": sizes},
    )


if __name__ == "__main__":
    main()
