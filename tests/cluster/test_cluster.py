"""Work on a cluster of four machines, which this one plays: results as without, whoever dies."""

import os
import pickle
import signal
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import threadpoolctl

import trees
from sppnet import Classifier, Index, read_image_folder
from sppnet.boxes import Target
from sppnet.cluster import Cluster, connection, rounds
from sppnet.cluster.rounds import _opened, _Place, _Worker, dealt
from sppnet.detection.detector import Detector
from sppnet.detection.shards import Mine
from sppnet.errors import SppnetError
from sppnet.images import read_image, write_image
from sppnet.parallel import TOGETHER
from sppnet.photos import demo_photo
from sppnet.proposals.writing import propose
from sppnet.retrieval.embed import embed
from sppnet.retrieval.embedder import Embedder
from trees import drawn

ray = pytest.importorskip("ray")
SMALL = {"scales": (64,), "levels": (2, 1)}


@pytest.fixture(scope="module")
def machines():
    """Four machines of one core each; the last three may be removed."""
    from ray.cluster_utils import Cluster as Machines

    path = os.environ.get("PYTHONPATH")
    places = Path(connection.__file__).parents[2], Path(trees.__file__).parent
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, places))
    os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    store = {"num_cpus": 1, "object_store_memory": 100_000_000}
    made = Machines(initialize_head=True, head_node_args={**store, "include_dashboard": False})
    for _ in range(3):
        made.add_node(**store)
    ray.init(made.address, log_to_driver=False)
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()
    os.environ.pop("PYTHONPATH") if path is None else os.environ.update(PYTHONPATH=path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Ten photos of one size or another; the seventh cannot be read."""
    folder = tmp_path_factory.mktemp("photos")
    pixels = read_image(demo_photo())
    for i in range(10):
        write_image(folder / f"{i}.png", pixels[:: 4 + i % 2, i : 200 + 8 * i])
    (folder / "6.png").write_bytes((folder / "6.png").read_bytes()[:500])
    return folder


@dataclass(frozen=True)
class Everything:
    """All that is done with photos, as one work."""

    embedder: Embedder
    detector: Detector

    def open(self):
        return self.look

    def look(self, path):
        pixels = read_image(path)
        found = self.detector.predict(pixels, threshold=0.0)
        return self.embedder(pixels), found.boxes, found.scores


@dataclass(frozen=True)
class Deadly:
    """Squares of numbers; whoever meets a number among the deadly dies, so many times."""

    folder: Path
    deadly: tuple[int, ...]
    times: int

    def open(self):
        return self.square

    def square(self, number):
        deaths = self.folder / str(number)
        met = len(deaths.read_text()) if deaths.exists() else 0
        if number in self.deadly and met < self.times:
            deaths.write_text("x" * (met + 1))
            os.kill(os.getpid(), signal.SIGKILL)
        with (self.folder / "done").open("a") as file:
            file.write(f"{number}\n")
        return number * number


@dataclass(frozen=True)
class DeadlyRound:
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

    def stream(self, work, items, together=TOGETHER):
        return self.cluster.stream(DeadlyRound(work, self.folder), items, together)


@pytest.mark.parametrize(("count", "workers", "most"), [(0, 2, 32), (1, 3, 32), (300, 2, 32), (999, 7, 5)])
def test_blocks_hold_each_thing_once_and_shrink_to_the_end(count, workers, most):
    blocks = list(dealt(range(count), workers, most))
    assert [i for block in blocks for i in block] == list(range(count))
    sizes = list(map(len, blocks))
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes, default=1) <= most
    # When the last block is begun, no other worker has more than one thing left.
    assert sizes[-workers:] == [1] * min(workers, count)


def test_embed_and_propose_give_the_same_files(machines, photos, tmp_path):
    embedder = Embedder(**SMALL)
    with Cluster(workers=2) as cluster:
        here = embed(photos, tmp_path / "here.safetensors", embedder=embedder)
        there = embed(photos, tmp_path / "there.safetensors", embedder=embedder, cluster=cluster)
        assert (tmp_path / "here.safetensors").read_bytes() == (tmp_path / "there.safetensors").read_bytes()
        assert there.failures == here.failures
        assert ["6.png" in line for line in there.failures] == [True]
        assert there.vectors == 9

        assert propose([photos], "edge-boxes", tmp_path / "here.npz").images == 9
        propose([f"file://{photos}"], "edge-boxes", tmp_path / "there.npz", cluster=cluster)
        assert (tmp_path / "here.npz").read_bytes() == (tmp_path / "there.npz").read_bytes()


def test_any_number_of_workers_gives_the_same_bits(machines, photos):
    work = Everything(Embedder(**SMALL), Detector.load("animals"))
    paths = [path for path in sorted(photos.iterdir()) if path.stem != "6"][:4]
    with threadpoolctl.threadpool_limits(1), Cluster(workers=3) as cluster:
        look = work.open()
        for path, found in zip(paths, cluster.stream(work, paths), strict=True):
            assert all(map(np.array_equal, found, look(path)))
            assert len(found[1]) > 3


@pytest.mark.long
def test_measures_and_an_index_are_the_same(machines, photos, tmp_path):
    paths = [path for path in sorted(photos.iterdir()) if path.stem != "6"]
    detector, classifier = Detector.load("animals"), Classifier.load("imagenet")
    annotated = trees.samples(paths, [Target.of([[5, 5, 40, 40]], ["cow"])] * len(paths))
    for number, path in enumerate(paths):
        place = tmp_path / "labelled" / classifier.classes_[number % 2] / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
    labelled = read_image_folder(tmp_path / "labelled")
    with threadpoolctl.threadpool_limits(1), Cluster(workers=2) as cluster:
        here, there = (detector.evaluate(annotated, cluster=c) for c in (None, cluster))
        for one, other in zip(here.detections, there.detections, strict=True):
            assert np.array_equal(one.boxes, other.boxes)
            assert np.array_equal(one.scores, other.scores)
        here, there = (classifier.evaluate(labelled, cluster=c) for c in (None, cluster))
        assert here.facts() == there.facts()
        settings = {"embedder": Embedder(**SMALL), "windows": 4}
        for name, c in (("here", None), ("there", cluster)):
            Index.build(photos, tmp_path / name, cluster=c, **settings)
    files = {path.name for path in (tmp_path / "here").iterdir()}
    assert files == {path.name for path in (tmp_path / "there").iterdir()}
    hits = [Index.open(tmp_path / name).search(paths[0]) for name in ("here", "there")]
    assert [(h.image, h.score) for h in hits[0]] == [(h.image, h.score) for h in hits[1]]


@pytest.mark.long
def test_a_fit_is_the_same_by_workers_one_of_which_dies(machines, tmp_path, threads):
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
    with Cluster(workers=2) as cluster:
        there = fit("there", shards=4, cluster=Unlucky(cluster, tmp_path))
    assert (tmp_path / "met").exists()
    assert here == there


def test_a_thing_that_kills_every_worker_is_named(machines, tmp_path):
    with Cluster(workers=2) as cluster:
        stream = cluster.stream(Deadly(tmp_path, (9,), 99), range(12))
        assert [next(stream) for _ in range(9)] == [i * i for i in range(9)]
        with pytest.raises(SppnetError, match=r"^9: found that 3 workers died of it"):
            next(stream)


def test_a_bug_shows_where_it_was(machines, tmp_path):
    with Cluster(workers=1) as cluster, pytest.raises(TypeError) as caught:
        list(cluster.stream(Deadly(tmp_path, (), 0), ["a"]))
    assert "in square" in caught.value.__notes__[0]


def test_a_result_that_cannot_be_sent_is_a_bug():
    worker = _Worker(b"", _Place(".", {}))
    worker.function = lambda _: threading.Lock()
    with pytest.raises(TypeError, match="pickle"):
        _opened(worker.answer(pickle.dumps(1))).result()
    worker.function = lambda number: number + 1
    assert _opened(worker.answer(pickle.dumps(1))).result() == 2


class TwoWords(OSError):
    """An error that another process cannot make of what it says."""

    def __init__(self, one, other):
        super().__init__(f"{one} {other}")


class Locked(ValueError):
    """An error that cannot be sent."""

    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (TwoWords("no", "disk"), OSError, "TwoWords: no disk"),
        (Locked("no key"), RuntimeError, "Locked: no key"),
        (OSError(2, "gone", "a.jpg"), FileNotFoundError, "gone: 'a.jpg'"),
    ],
)
def test_an_error_that_cannot_be_sent_is_told_by_one_that_can(error, kind, says):
    def fail(_):
        raise error

    worker = _Worker(b"", _Place(".", {}))
    worker.function = fail
    with pytest.raises(kind, match=says) as caught:
        _opened(worker.answer(pickle.dumps(1))).result()
    if not isinstance(error, OSError):
        assert "in fail" in caught.value.__notes__[0]


@pytest.mark.parametrize(("large", "sizes"), [(10**9, [5]), (3000, [2, 2, 1]), (1, [1] * 5)])
def test_what_is_large_goes_on_its_way_at_once(large, sizes, monkeypatch):
    monkeypatch.setattr(rounds, "_LARGE", large)
    worker = _Worker(b"", _Place(".", {}))
    worker.function = lambda number: bytes(1500 + number)
    blocks = np.empty(2, object)
    blocks[:] = [pickle.dumps([(i, pickle.dumps(i)) for i in part]) for part in ((7, 8, 9), (3, 4))]
    found = list(worker({"block": blocks}))
    assert [len(rows["place"]) for rows in found] == sizes
    places = [int(place) for rows in found for place in rows["place"]]
    assert places == [7, 8, 9, 3, 4]
    contents = [_opened(content.as_buffer()).result() for rows in found for content in rows["content"]]
    assert list(map(len, contents)) == [1500 + place for place in places]


def test_what_is_wrong_is_said_before_work(machines, photos, tmp_path, monkeypatch):
    work = Deadly(tmp_path, (), 0)
    with pytest.raises(SppnetError, match="found 0 workers"):
        Cluster(workers=0)
    with pytest.raises(SppnetError, match="cores, expected 99"):
        Cluster(workers=99)
    with Cluster(workers=2) as cluster:
        with pytest.raises(SppnetError, match=r"/nowhere/a.jpg: found no such file on .*\("):
            cluster.stream(work, [Path("/nowhere/a.jpg")])
        own = connection._versions()
        monkeypatch.setattr(connection, "_versions", lambda: {**own, "sppnet": "9.9"})
        with pytest.raises(SppnetError, match=r"found sppnet .*, expected sppnet 9.9 as on this machine"):
            cluster.stream(work, [1])
    assert not (tmp_path / "done").exists()


def test_a_worker_that_is_killed_and_a_machine_that_is_gone_change_nothing(machines, tmp_path):
    with Cluster(workers=4) as cluster:
        stream = cluster.stream(Deadly(tmp_path, (3, 17), 1), range(400))
        found = [next(stream) for _ in range(50)]
        own = ray.get_runtime_context().get_node_id()
        gone = next(node for node in machines.worker_nodes if node.node_id != own)
        machines.remove_node(gone, allow_graceful=False)
        found += list(stream)
    assert found == [i * i for i in range(400)]
    done = [int(line) for line in (tmp_path / "done").read_text().split()]
    # Two workers and a machine died, each with the block in work and the next one.
    assert len(done) - 400 <= 3 * rounds._READY * TOGETHER


@dataclass(frozen=True)
class Waiting:
    """Numbers; the first comes when so many others are there, and one is bad."""

    folder: Path
    others: int
    bad: int

    def open(self):
        return self.number

    def number(self, number):
        end = time.monotonic() + 60
        while number == 0 and len(list(self.folder.iterdir())) < self.others:
            assert time.monotonic() < end
            time.sleep(0.01)
        (self.folder / str(number)).touch()
        if number == self.bad:
            raise SppnetError(f"{number}: found nothing")
        return number


@pytest.mark.parametrize(("ahead", "waiting", "others"), [(1024, 10**9, 12), (3, 10**9, 4), (1024, 1, 9)])
def test_results_come_in_order_and_errors_at_their_place(
    machines, tmp_path, monkeypatch, ahead, waiting, others
):
    monkeypatch.setattr(rounds, "_AHEAD", ahead)
    monkeypatch.setattr(rounds, "_WAITING", waiting)
    with Cluster(workers=2) as cluster:
        stream = cluster.stream(Waiting(tmp_path, others, 20), range(24), together=1)
        assert [next(stream) for _ in range(20)] == list(range(20))
        with pytest.raises(SppnetError, match="20: found nothing"):
            next(stream)


def test_results_of_a_cluster_that_is_closed_are_an_error(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    results = rounds.Rounds(Waiting(Path(), 0, 0), [1, 2], 1, 1).results()
    with pytest.raises(SppnetError, match="found the cluster closed, expected it open"):
        next(results)


def test_a_cluster_without_a_core_says_that_it_waits(monkeypatch):
    left, said = [2, 2, 0], []
    monkeypatch.setattr(rounds, "_LOOK", 0.01)
    monkeypatch.setattr(rounds, "cores", lambda: left.pop(0))
    monkeypatch.setattr(rounds.warnings, "warn", lambda text, stacklevel: said.append(text))
    with rounds._watched():
        while left:
            time.sleep(0.01)
    assert len(said) == 1
    assert said[0].startswith("found no core left in the cluster: waiting")


def test_no_cluster_at_the_address():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        if ray.is_initialized():
            ray.shutdown()
        with pytest.raises(SppnetError, match=f"{address}: found no cluster there"):
            Cluster(address)
    with pytest.raises(SppnetError, match="found no address of a cluster, expected one that `ray start"):
        Cluster("ray://somewhere")
