"""What a cluster costs and gains on one machine, on drawn photos. Run as::

    python benchmarks/cluster.py --images 1000 --json cluster.json

Three claims, ``--claim`` runs one of them. ``workers``: two workers on two cores against one on one core,
each time with Ray and the process that takes the results on the same cores, and against one that leaves these
the second core: photos in a second once all have started, and the seconds until then. ``overhead``: as many
workers as cores against the threads of one process. ``machine``: four machines of one core, played by this
one, of which one is removed when a quarter of the shards is made: are the files those of a plain run, and how
many were begun twice?
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from common import commit, machine, table, write_json
from sppnet.cluster import Cluster
from sppnet.detection.detector import Detector
from sppnet.images import write_image
from sppnet.parallel import TOGETHER, Runner, Work, core_count
from sppnet.proposals.writing import propose
from sppnet.retrieval.embed import embed

CORES = core_count()


class Stamp(NamedTuple):
    """Who did a thing, and when it was begun and done."""

    process: int
    begun: float
    done: float


@dataclass(frozen=True)
class Stamped:
    """A work whose results come with their stamps; a line in `log` says that a shard was begun.

    One that is there already, as the machine was lost that had made it, is not made again.
    """

    work: Any
    log: Path | None = None

    def open(self) -> Callable[[Any], tuple[Stamp, Any]]:
        function = self.work.open()

        def stamped(item: Any) -> tuple[Stamp, Any]:
            begun = time.monotonic()
            if self.log is not None and not item.path.exists():
                with self.log.open("a") as file:
                    file.write(f"{item.path.name}\n")
            result = function(item)
            return Stamp(os.getpid(), begun, time.monotonic()), result

        return stamped


class Watched:
    """A runner that keeps the stamps of what another does; `met` is told how many things are done."""

    def __init__(
        self, runner: Runner, log: Path | None = None, met: Callable[[int], None] | None = None
    ) -> None:
        self.runner, self.log, self.met = runner, log, met
        self.stamps: list[Stamp] = []
        self.asked = 0.0

    def stream(self, work: Work[Any, Any], items: Iterable[Any], together: int = TOGETHER) -> Iterator[Any]:
        self.stamps, self.asked = [], time.monotonic()
        for stamp, result in self.runner.stream(Stamped(work, self.log), items, together):
            self.stamps.append(stamp)
            if self.met is not None:
                self.met(len(self.stamps))
            yield result

    @property
    def start_up(self) -> float:
        """Seconds until every worker had its first thing in hand."""
        first: dict[int, float] = {}
        for stamp in self.stamps:
            first[stamp.process] = min(stamp.begun, first.get(stamp.process, stamp.begun))
        return max(first.values()) - self.asked

    @property
    def speed(self) -> float:
        """Things in a second from then until the last was done."""
        ready, last = self.asked + self.start_up, max(stamp.done for stamp in self.stamps)
        return sum(stamp.done > ready for stamp in self.stamps) / (last - ready)


def draw_photos(folder: Path, count: int) -> list[Path]:
    """Draw photos of 375 x 500 pixels: boxes of colours on noise."""
    rng, paths = np.random.default_rng(0), []
    for i in range(count):
        image = np.repeat(np.repeat(rng.integers(0, 255, (15, 20, 3), np.uint8), 25, 0), 25, 1)
        for _ in range(6):
            x, y, w, h = (int(v) for v in rng.integers((0, 0, 20, 20), (400, 300, 120, 120)))
            image[y : y + h, x : x + w] = rng.integers(0, 255, 3)
        noise = rng.integers(-8, 9, image.shape)
        paths.append(folder / f"{i:05}.jpg")
        write_image(paths[-1], np.clip(image + noise, 0, 255).astype(np.uint8), 90)
    return paths


def jobs(
    paths: Sequence[Path], place: Path, asked: Sequence[str] = ()
) -> dict[str, Callable[[Runner | None], None]]:
    """Return what is done with photos, by its command's name; all, or what is asked for."""
    detector = Detector.load("animals")

    def run_embed(cluster: Runner | None) -> None:
        (place / "vectors.safetensors").unlink(missing_ok=True)
        embed(paths, place / "vectors.safetensors", cluster=cluster)

    def run_propose(cluster: Runner | None) -> None:
        propose(paths, "edge-boxes", place / "windows.npz", cluster=cluster)

    def run_detect(cluster: Runner | None) -> None:
        for _ in detector.stream(paths, cluster=cluster):
            pass

    every = {"embed": run_embed, "propose": run_propose, "detect run": run_detect}
    return {name: every[name] for name in asked or every}


def seconds(job: Callable[[Runner | None], None], runner: Runner | None) -> float:
    start = time.perf_counter()
    job(runner)
    return time.perf_counter() - start


@contextmanager
def confined(count: int) -> Iterator[None]:
    """Keep this process, and all that it begins meanwhile, on so many cores."""
    whole = sorted(os.sched_getaffinity(0))
    try:
        _move(whole[:count])
        yield
    finally:
        _move(whole)


def _move(cores: Sequence[int]) -> None:
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cores)


def compare_workers(
    paths: Sequence[Path], place: Path, rounds: int, asked: Sequence[str]
) -> list[dict[str, Any]]:
    """Measure two workers against one, in turns, each time in a cluster of its own."""
    settings = {"one": (1, 1), "one, two cores": (1, 2), "two": (2, 2)}
    found: list[dict[str, Any]] = []
    for name, job in jobs(paths, place, asked).items():
        measured: dict[str, list[tuple[float, float]]] = {each: [] for each in settings}
        for _ in range(rounds):
            for each, (workers, cores) in settings.items():
                with confined(cores), Cluster("local", workers=workers) as cluster:
                    watched = Watched(cluster)
                    job(watched)
                    measured[each].append((watched.speed, watched.start_up))
        medians = {each: np.median(values, axis=0).tolist() for each, values in measured.items()}
        row: dict[str, Any] = {"job": name} | {each: speed for each, (speed, _) in medians.items()}
        row["ratio"], row["ratio, two cores"] = (row["two"] / row[e] for e in ("one", "one, two cores"))
        row["start"] = [start for _, start in medians.values()]
        found.append(row)
        cells = [f"{row[key]:.2f}" for key in (*settings, "ratio", "ratio, two cores")]
        cells.append(", ".join(f"{start:.1f}" for start in row["start"]))
        head = ["job", "1 worker, 1 core", "1 worker, 2 cores", "2 workers", "ratio", "ratio, 2 cores"]
        print(table((*head, "start-up, s"), [(name, *cells)]), flush=True)
    return found


def compare_plain(
    paths: Sequence[Path], place: Path, rounds: int, asked: Sequence[str]
) -> list[dict[str, Any]]:
    """Measure workers on all cores against this process, in turns."""
    found: list[dict[str, Any]] = []
    warm = jobs(paths[:8], place)
    for name, job in jobs(paths, place, asked).items():
        warm[name](None)
        plain, whole, start = [], [], []
        for _ in range(rounds):
            plain.append(seconds(job, None))
            watched = Watched(Cluster(workers=CORES))
            whole.append(seconds(job, watched))
            start.append(watched.start_up)
        values = {"plain": plain, "cluster": whole, "start": start}
        row: dict[str, Any] = {"job": name} | {key: float(np.median(v)) for key, v in values.items()}
        row["overhead"] = (row["cluster"] - row["start"]) / row["plain"] - 1
        found.append(row)
        cells = (name, *(f"{row[key]:.1f}" for key in values), f"{100 * row['overhead']:+.1f} %")
        print(table(("job", "plain, s", "cluster, s", "start-up, s", "overhead"), [cells]), flush=True)
    return found


def lose_machine(paths: Sequence[Path], place: Path, per_shard: int) -> dict[str, Any]:
    """Remove one of four machines while shards are made, and compare them to those of a plain run."""
    import ray
    from ray.cluster_utils import Cluster as Machines

    one: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 200_000_000}
    machines = Machines(initialize_head=True, head_node_args={**one, "include_dashboard": False})
    for _ in range(3):
        machines.add_node(**one)
    ray.init(machines.address, log_to_driver=False, logging_level=logging.ERROR)
    machines.wait_for_nodes()
    count = -(-len(paths) // per_shard)
    gone: list[Any] = []

    def met(done: int) -> None:
        if done >= count // 4 and not gone:
            # Not the one that this process itself is on.
            own = ray.get_runtime_context().get_node_id()
            gone.append(next(node for node in machines.worker_nodes if node.node_id != own))
            machines.remove_node(gone[0], allow_graceful=False)

    log = place / "begun"
    watched = Watched(Cluster(workers=4), log, met)
    took = seconds(lambda c: _shards(paths, place / "there.parquet", per_shard, c), watched)
    ray.shutdown()
    machines.shutdown()
    _shards(paths, place / "here.parquet", per_shard, None)
    here, there = (
        {path.name: path.read_bytes() for path in (place / name).iterdir()}
        for name in ("here.parquet", "there.parquet")
    )
    begun = log.read_text().split()
    twice = len(begun) - len(set(begun))
    return {"shards": count, "identical": here == there, "begun twice": twice, "seconds": took}


def _shards(paths: Sequence[Path], out: Path, per_shard: int, cluster: Runner | None) -> None:
    embed(paths, out, per_shard=per_shard, cluster=cluster)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--claim", choices=("workers", "overhead", "machine"))
    parser.add_argument(
        "--job", action="append", default=[], choices=("embed", "propose", "detect run"), help="default: all"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="times that each is measured; medians are shown"
    )
    parser.add_argument(
        "--per-shard", type=int, default=10, help="images of a shard, where a machine is lost"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    facts: dict[str, Any] = {"machine": machine(), "commit": commit(), "images": options.images}
    print(f"{machine()}; commit {commit()}; {options.images} drawn photos", flush=True)
    with TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "photos").mkdir()
        paths = draw_photos(place / "photos", options.images)
        wanted = (options.claim,) if options.claim else ("workers", "overhead", "machine")
        if "workers" in wanted:
            facts["workers"] = compare_workers(paths, place, options.rounds, options.job)
        if "overhead" in wanted:
            start = time.perf_counter()
            with Cluster("local", workers=CORES):
                facts["cluster start"] = time.perf_counter() - start
                print(f"a local cluster begins in {facts['cluster start']:.1f} s", flush=True)
                facts["overhead"] = compare_plain(paths, place, options.rounds, options.job)
        if "machine" in wanted:
            facts["machine lost"] = lose_machine(paths, place, options.per_shard)
            print(", ".join(f"{name}: {value}" for name, value in facts["machine lost"].items()))
    write_json(options.json, facts)


if __name__ == "__main__":
    main()
