"""What several benchmarks need: the machine and commit that were measured, tables and files of figures."""

import json
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def machine() -> str:
    """Return the name of the processor."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {len(models)} cores"


def commit() -> str:
    """Return the commit that was measured, marked if files have changed since."""
    call = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(call, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "no commit"


def setting() -> str:
    """Return the machine, the number of threads and the version of PyTorch."""
    import torch  # Here, as some scripts run where it is not installed.

    return f"{machine()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write_json(path: Path | None, facts: Any) -> None:
    """Write figures to a file, if one is asked for; what JSON does not know becomes text."""
    if path:
        path.write_text(json.dumps(facts, indent=1, default=str) + "\n")
