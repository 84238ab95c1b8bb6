"""A calibration: what units of work cost on one core of this machine, measured in a minute and kept."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sppnet import __version__
from sppnet.errors import SppnetError
from sppnet.parallel import core_count
from sppnet.planning.costs import Costs
from sppnet.progress import Track, no_track
from sppnet.storage import read_json, write_json

FORMAT, VERSION = "sppnet-calibration", "1"

# Processes that are measured at once, at most; seconds that processes take to start and to learn.
_TOGETHER, _STARTS = 8, 24.0
_CHAIN = ("propose", "encode", "keep", "fetch", "pool")


@dataclass(frozen=True)
class Calibration:
    """What units of work cost, and where that was measured.

    Attributes
    ----------
    costs : Costs
        Seconds and bytes of one core.
    machine : str
        Processor and number of cores.
    sppnet : str
        Version of sppnet.
    """

    costs: Costs
    machine: str
    sppnet: str

    @property
    def doubt(self) -> str | None:
        """Why it may not hold for this machine and version, if that is so."""
        here = f"sppnet {__version__} on {machine()}"
        there = f"sppnet {self.sppnet} on {self.machine}"
        return None if here == there else f"the calibration is of {there}, this is {here}"


def machine() -> str:
    """Return the name of the processor and the number of cores that this process may use."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    cores = core_count()
    return f"{name}, {cores} core{'s' * (cores > 1)}"


def calibrate(photos: Sequence[Path], minutes: float = 1.0, track: Track = no_track) -> Calibration:
    """Measure what units of work cost, with the default embedder and detector on some photos.

    Parameters
    ----------
    photos : sequence of Path
        Some photos, at least one; looked at over and over.
    minutes : float
        About how long it may take; starting processes alone takes some 20 seconds.
    track : callable
        ``track(items, description)`` yields the items and may draw progress.

    Raises
    ------
    SppnetError
        If a process that measures fails, such as on a photo that cannot be read: what it says last.
    """
    seconds = max((60 * minutes - _STARTS) / 3, 0.0)
    asked: dict[str, Any] = {"photos": [str(photo) for photo in photos], "seconds": seconds}
    together = min(core_count(), _TOGETHER)
    found: dict[str, float] = {"together": together, "efficiency": 1.0}
    for kind in track(["embed", "detect", "learn", "together"], "Calibrating"):
        if kind == "together" and together > 1:
            found["efficiency"] = _share(found, _measured("detect", asked, together))
        elif kind != "together":
            length = {"length": found.get("pooled", 0.0) / 2}
            found |= _measured(kind, asked | length, 1)[0]
    known = sum(found[name] for name in ("start_embed", "read", "embed"))
    more = max(_command_seconds(photos[0]) - known, 0.0)
    found |= {name: found[name] + more for name in ("start_embed", "start_detect")}
    return Calibration(Costs(**found), machine(), __version__)  # type: ignore[arg-type]


def _share(alone: Mapping[str, float], others: Sequence[Mapping[str, float]]) -> float:
    """Return what one of several processes does of what it does alone; not more than that."""
    took = [sum(other[name] for name in _CHAIN) for other in others]
    return min(sum(alone[name] for name in _CHAIN) * len(took) / sum(took), 1.0)


def _command_seconds(photo: Path) -> float:
    """Return what a command takes of its core that embeds one photo: its options and progress count, too."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    call = [sys.executable, "-m", "sppnet", "embed", str(photo), "--out"]
    with TemporaryDirectory(prefix="sppnet-plan-") as folder:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        out = str(Path(folder) / "vectors.safetensors")
        subprocess.run([*call, out], env=_environment(), capture_output=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _environment() -> dict[str, str]:
    """Return the environment of processes of one core: with the sppnet that runs here, wherever it lies."""
    places = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, places))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def _measured(kind: str, asked: Mapping[str, Any], count: int) -> list[dict[str, float]]:
    """Return what some processes measured, all at the same time."""
    call = [sys.executable, "-m", "sppnet.measuring"]
    environment, pipe = _environment(), subprocess.PIPE
    with ExitStack() as stack:
        running = []
        for core in range(count):
            process = subprocess.Popen(call, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdin is not None
            process.stdin.write(json.dumps({**asked, "kind": kind, "core": core, "started": time.time()}))
            process.stdin.close()
            process.stdin = None
            running.append(process)
        return [_answer(process) for process in running]


def _answer(process: subprocess.Popen[str]) -> dict[str, float]:
    out, err = process.communicate()
    if process.returncode:
        last = err.strip().rpartition("\n")[2] or f"exit status {process.returncode}"
        raise SppnetError(f"cannot calibrate: {last.removeprefix('sppnet.errors.')}")
    found: dict[str, float] = json.loads(out.splitlines()[-1])
    return found


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write a calibration as JSON, whole or not at all.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    write_json(path, {"format": FORMAT, "version": VERSION, **asdict(calibration)})


def read_calibration(path: Path) -> Calibration:
    """Read a file that `write_calibration` wrote.

    Raises
    ------
    SppnetError
        If it is another file, or of another version of the format, or a cost is missing or no number.
    """
    content = read_json(path)
    about = content if isinstance(content, dict) else {}
    mark = " ".join(str(about[name]) for name in ("format", "version") if name in about)
    if mark != f"{FORMAT} {VERSION}":
        raise SppnetError(f"{path}: found {mark or 'no calibration'}, expected {FORMAT} {VERSION}")
    costs, names = about.get("costs"), {field.name for field in fields(Costs)}
    if (
        not isinstance(costs, dict)
        or costs.keys() != names
        or not all(map(_is_cost, costs.values()))
        or not all(isinstance(about.get(name), str) for name in ("machine", "sppnet"))
    ):
        raise SppnetError(
            f"{path}: found other content, expected the numbers of a calibration, all from 0 up"
        )
    try:
        return Calibration(Costs(**costs), about["machine"], about["sppnet"])
    except SppnetError as error:
        raise SppnetError(f"{path}: {error}") from None


def _is_cost(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return math.isfinite(value) and value >= 0
