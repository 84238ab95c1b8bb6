"""The way to a Ray cluster, and what must be alike on all its machines."""

from __future__ import annotations

import logging
import os
import platform
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sppnet import __version__
from sppnet.errors import SppnetError, check_extra
from sppnet.parallel import core_count

LOCAL = "local"
"""Address of a cluster of this machine alone, which lasts as long as the work."""

# Bytes on their way, for each worker of a cluster that is begun here; Ray would take a third of the memory.
_STORE = 150_000_000
# Seconds in which a cluster must answer.
_ANSWER = 5.0
_HOW = "expected one that `ray start --head` began, as HOST:PORT or auto, or local"


def connect(address: str, workers: int | None) -> bool:
    """Join a cluster, or begin one; return whether it is to be left again.

    Raises
    ------
    SppnetError
        If Ray is not installed, nothing answers at the address, or versions of Ray or Python differ.
    """
    check_extra("ray", "work on a cluster")
    # Else it tells of every actor what becomes of it if this machine is gone.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == LOCAL:
        store = _STORE * (workers or core_count())
        ray.init(LOCAL, num_cpus=workers, include_dashboard=False, object_store_memory=store, **quiet)
        return True
    _check_answer(address)
    try:
        ray.init(address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise SppnetError(f"{address}: found no cluster to join ({_line(error)}), {_HOW}") from None
    return True


def check_nodes(paths: Sequence[Path]) -> None:
    """Raise a `SppnetError` unless all machines have the same versions and see some files.

    Parameters
    ----------
    paths : sequence of Path
        Of each folder one file will do.
    """
    import ray
    from ray.exceptions import TaskUnschedulableError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    own = _versions()
    facts = ray.remote(num_cpus=0, max_retries=0)(_teller())
    asked = []
    for node in _alive():
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        name = f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"
        asked.append((name, facts.options(scheduling_strategy=there).remote(list(map(str, paths)))))
    for name, reference in asked:
        try:
            found, missing = ray.get(reference, timeout=60)
        except TaskUnschedulableError:
            continue  # It has gone since it was listed.
        except Exception as error:
            raise SppnetError(f"{name}: found a machine that does not answer ({_line(error)})") from None
        wrong = [f"{what} {found[what]}" for what in own if found[what] != own[what]]
        if wrong:
            expected = ", ".join(f"{what} {own[what]}" for what in own if found[what] != own[what])
            raise SppnetError(f"{name}: found {', '.join(wrong)}, expected {expected} as on this machine")
        if missing:
            raise SppnetError(
                f"{missing}: found no such file on {name}, expected a path that all machines see"
            )


def cores() -> int:
    """Return how many cores the machines of the cluster offer."""
    import ray

    resources: Callable[[], dict[str, float]] = ray.cluster_resources
    return int(resources().get("CPU", 0))


def _alive() -> list[dict[str, Any]]:
    """Return the machines on which workers may run."""
    import ray

    nodes: Callable[[], list[dict[str, Any]]] = ray.nodes
    return [node for node in nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]


def _versions() -> dict[str, str]:
    import ray

    return {"sppnet": __version__, "Ray": ray.__version__, "Python": platform.python_version()}


def _teller() -> Any:
    """Return what a machine is asked: its versions, and the first of some files that it does not see.

    A function inside a function goes to the other machine as it is, even if there is no sppnet there.
    """

    def tell(paths: list[str]) -> tuple[dict[str, str], str | None]:
        import importlib
        import os
        import platform

        import ray

        try:
            version = importlib.import_module("sppnet").__version__
        except ImportError:
            version = "none"
        found = {"sppnet": version, "Ray": ray.__version__, "Python": platform.python_version()}
        return found, next((path for path in paths if not os.path.exists(path)), None)

    return tell


def _check_answer(address: str) -> None:
    """Raise an error at once where nothing listens, for which Ray itself would wait."""
    host, colon, port = address.rpartition(":")
    if address == "auto":
        return
    if not (colon and host and port.isdecimal()) or "/" in address:
        raise SppnetError(f"--cluster {address}: found no address of a cluster, {_HOW}")
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise SppnetError(f"{address}: found no cluster there ({reason}), {_HOW}") from None


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
