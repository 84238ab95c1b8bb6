"""A fit in rounds whose shards workers of a cluster do, one of which dies."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import trees
from sppnet.cluster import Cluster
from sppnet.detection.detector import Detector
from sppnet.detection.shards import Mine
from trees import drawn

ray = pytest.importorskip("ray")


@dataclass(frozen=True)
class Deadly:
    """Some work; who first looks for hard windows in the second shard dies of it."""

    work: Any
    folder: Path

    def open(self):
        function = self.work.open()

        def careful(item):
            met = self.folder / "met"
            if isinstance(self.work.step, Mine) and item.shard.number == 1 and not met.exists():
                met.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return function(item)

        return careful


@dataclass(frozen=True)
class Unlucky:
    """A cluster one of whose workers dies in a round of mining."""

    cluster: Cluster
    folder: Path

    def stream(self, work, items):
        return self.cluster.stream(Deadly(work, self.folder), items)


def test_a_fit_is_the_same_by_workers_one_of_which_dies(tmp_path, threads):
    images, windows, targets = drawn(range(1, 9))
    paths = [tmp_path / f"{i}.png" for i in range(8)]
    for path, image in zip(paths, images, strict=True):
        trees.save(path, image)
    data = trees.samples(paths, targets)

    def fit(name, **options):
        settings = {"levels": (1,), "scales": (160,), "folds": 0}
        model = Detector(**settings).fit(data, windows=windows, cache=tmp_path / name, rounds=1, **options)
        model.save(tmp_path / f"{name}.safetensors")
        return (tmp_path / f"{name}.safetensors").read_bytes()

    here = fit("here", shards=2)
    with Cluster("local", workers=2) as cluster:
        there = fit("there", shards=4, cluster=Unlucky(cluster, tmp_path))
    assert (tmp_path / "met").exists()
    assert here == there
