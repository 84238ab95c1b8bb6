"""Search in shards that stay on disk: recall, latency and memory of millions of regions. Run as::

    python benchmarks/shards_search.py --millions 1,4,10 --json F
    python benchmarks/shards_search.py --millions 1 --shard 250000 --json F     # shards that are graphs

Random vectors of length 1 in half precision, 60 regions to an image, in shards of 200,000: these are looked
at whole. Larger shards are graphs of neighbours. They are written to a temporary folder and removed. A fresh
process opens them and searches, so that its memory is that of a search: what is its own (anonymous), and
what of the files is in memory (mapped), which the system takes back where it needs it. Queries are random,
too, the hardest case for a graph: recall is the share of the 10 best images of a look at all vectors.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from common import commit, machine, table, write_json
from sppnet import Embedder, Index
from sppnet.parallel import thread_count
from sppnet.retrieval.index import open_index
from sppnet.retrieval.sharded import ShardedIndex

REGIONS, QUERIES, TOP = 60, 20, 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--millions", default="1,4,10")
    parser.add_argument("--shard", type=int, default=200_000, help="regions of a shard, at most")
    parser.add_argument("--length", type=int, default=64, help="numbers in a vector")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--search", type=Path, help="for the fresh process: search this folder of shards")
    arguments = parser.parse_args()
    if arguments.search:
        print(json.dumps(search(arguments.search)))
        return
    print(f"{machine()}; commit {commit()}; {thread_count()} threads; vectors of {arguments.length}\n")
    rows = []
    for count in arguments.millions.split(","):
        with TemporaryDirectory(prefix="shards-", dir=arguments.folder) as folder:
            rows.append(measured(Path(folder), round(float(count) * 1e6), arguments))
        print(rows[-1], flush=True)
    print(
        "\n"
        + table(
            tuple(rows[0]), [[f"{v:.3g}" if isinstance(v, float) else v for v in r.values()] for r in rows]
        )
    )
    write_json(arguments.json, {"machine": machine(), "commit": commit(), "rows": rows})


def measured(folder: Path, count: int, arguments: argparse.Namespace) -> dict:
    """Write shards, and search them in a process of its own."""
    start = time.perf_counter()
    images, each = -(-count // REGIONS), max(arguments.shard // REGIONS, 1)
    embedder = embedder_of(arguments.length)
    for number, first in enumerate(range(0, images, each)):
        made = Index.create(folder / f"shard-{number:04}", embedder, "/photos")
        rng = np.random.default_rng(number)
        for image in range(first, min(first + each, images)):
            boxes = np.tile(np.array([0, 0, 1, 1], np.float32), (REGIONS, 1))
            made.add(f"{image}.jpg", "", boxes, unit(rng, REGIONS, arguments.length))
        made.save()
    wrote = time.perf_counter() - start
    call = [sys.executable, __file__, "--search", str(folder)]
    found = json.loads(
        subprocess.run(call, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )
    size = sum(path.stat().st_size for path in folder.glob("*/*"))
    facts = {"regions": images * REGIONS, "shards": number + 1, "write s": wrote, "disk GB": size / 1e9}
    return facts | found


def embedder_of(length: int) -> Embedder:
    plain = Embedder(scales=(64,), levels=(1,), pca=length)
    rng = np.random.default_rng(0)
    return plain.fit_vectors([rng.normal(size=(2 * length, 1280)).astype(np.float32)])


def unit(rng: np.random.Generator, count: int, length: int) -> np.ndarray:
    found = rng.standard_normal((count, length), np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def search(folder: Path) -> dict:
    """Open shards, search, and compare what was found with a look at all vectors."""
    start = time.perf_counter()
    index = open_index(folder)
    opened = time.perf_counter() - start
    assert isinstance(index, ShardedIndex)
    queries = unit(np.random.default_rng(10**6), QUERIES, index.embedder.length)
    before, seconds, found = memory(), [], []
    for query in queries:
        start = time.perf_counter()
        found.append([hit.image for hit in index.search_vector(query, TOP)])
        seconds.append(time.perf_counter() - start)
    after = memory()
    return {
        "open s": opened,
        "first s": seconds[0],
        "median s": float(np.median(seconds)),
        "recall@10": recall(index, queries, found),
        "own MB": after["Anon"] / 1e6,
        "mapped MB": after["File"] / 1e6,
        "own MB before": before["Anon"] / 1e6,
    }


def memory() -> dict[str, float]:
    """Return the bytes of this process that are its own, and those of files that are in memory."""
    text = Path(f"/proc/{os.getpid()}/status").read_text()
    return {name: 1024.0 * int(size) for name, size in re.findall(r"Rss(Anon|File):\s+(\d+) kB", text)}


def recall(index: ShardedIndex, queries: np.ndarray, found: list[list[str]]) -> float:
    """Return the share of the best images that were found."""
    best: list[dict[str, float]] = [{} for _ in queries]
    for shard in index.shards:
        for start in range(0, len(shard), REGIONS * 1000):
            names, _, vectors = shard.regions_from(start, REGIONS * 1000)
            scores = (queries @ vectors.T).reshape(len(queries), -1, REGIONS).max(axis=2)
            for known, row in zip(best, scores, strict=True):
                for place in np.argsort(-row)[:TOP].tolist():
                    known[names[place * REGIONS]] = float(row[place])
    right = 0
    for known, best_names in zip(best, found, strict=True):
        right += len(set(sorted(known, key=lambda name: -known[name])[:TOP]) & set(best_names))
    return right / (TOP * len(queries))


if __name__ == "__main__":
    main()
