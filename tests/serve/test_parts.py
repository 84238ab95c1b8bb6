"""The parts of the server by themselves: processes, regions, classes and boxes, the words of a fit."""

import os
import time
from concurrent.futures import CancelledError

import numpy as np
import pytest

from serving import noise
from sppnet import Detector
from sppnet.boxes import iou
from sppnet.errors import SppnetError
from sppnet.images import read_image, write_image
from sppnet.serve.demo import COUNT, demo_folder, scene
from sppnet.serve.engine import Engine
from sppnet.serve.errors import Busy, Refused
from sppnet.serve.fits import changes
from sppnet.serve.folders import Folder
from sppnet.serve.regions import RegionIndex, _overlap
from sppnet.serve.schema import ClassFacts, ClassQuality, Quality
from sppnet.serve.settings import SIDE
from sppnet.serve.store import Store
from sppnet.serve.training import can_fit, learned_classes
from sppnet.serve.workers import LATER, Kind, Worker
from sppnet.walking import LeftOut


class Answers:
    """What a worker process of the tests answers."""

    def __init__(self, offset=0):
        self.offset, self.tell = offset, lambda event: None

    def add(self, a, b):
        self.tell({"adding": a})
        return a + b + self.offset

    def sleep(self, seconds):
        time.sleep(seconds)
        return os.getpid()

    def pid(self):
        return os.getpid()

    def die(self):
        os._exit(3)

    def fail(self, kind):
        raise {"ours": SppnetError("found a, expected b"), "bug": KeyError("x")}[kind]

    def refuse(self):
        raise Refused(418, "a teapot", "none")


@pytest.fixture
def worker():
    made = []

    def make(told=lambda event: None, **more):
        made.append(Worker(Kind("serve.test_parts:Answers", **more), told))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """The processes import this module by the name that it has below the folder of the tests."""
    place = os.path.dirname(os.path.dirname(__file__))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([place, os.environ.get("PYTHONPATH", "")]))


def test_a_process_answers_and_tells(worker):
    told = []
    one = worker(told.append, arguments=(100,))
    assert one.ask("add", 1, 2).result(60) == 103
    assert told == [{"adding": 1}]
    assert one.alive


def test_errors_come_as_what_they_are(worker):
    one = worker()
    with pytest.raises(SppnetError, match="found a, expected b"):
        one.ask("fail", "ours").result(60)
    with pytest.raises(RuntimeError, match="KeyError"):
        one.ask("fail", "bug").result(60)
    with pytest.raises(Refused) as refused:
        one.ask("refuse").result(60)
    assert (refused.value.status, refused.value.found, refused.value.expected) == (418, "a teapot", "none")


def test_a_process_that_dies_is_replaced_and_others_get_their_answers(worker):
    one = worker()
    before = one.ask("pid").result(60)
    dying = one.ask("die")
    after = one.ask("pid")
    with pytest.raises(Refused, match="ended its process"):
        dying.result(60)
    assert after.result(60) != before


def test_who_asks_does_not_wait_for_a_process_that_starts(worker):
    one = worker()
    begun = time.monotonic()
    answers = [one.ask("add", b"x" * 2_000_000, b"") for _ in range(8)]
    asked = time.monotonic() - begun
    with pytest.raises(RuntimeError):
        answers[0].result(60)  # bytes and a number do not add up, but they came
    assert asked < time.monotonic() - begun - asked


def test_a_question_that_takes_too_long_is_given_up(worker):
    one = worker(limit=1.0)
    late = one.ask("sleep", 100)
    waiting = one.ask("add", 1, 1)
    with pytest.raises(Refused, match="took over 1 s") as refused:
        late.result(60)
    assert refused.value.status == 503
    assert waiting.result(60) == 2


def test_a_queue_that_is_full_refuses(worker):
    one = worker(capacity=2)
    first = one.ask("sleep", 0.5)
    one.ask("sleep", 0.01)
    with pytest.raises(Busy) as busy:
        one.ask("pid")
    assert busy.value.status == 429
    later = one.ask("pid", rank=LATER)  # Nobody waits for it: it takes no place.
    first.result(60)
    later.result(60)
    assert one.ask("pid").result(60)


def test_what_somebody_waits_for_comes_first(worker):
    one, order = worker(), []
    one.ask("pid").result(60)
    one.ask("sleep", 0.3)
    for name, rank in (("later", LATER), ("urgent", 0)):
        one.ask("sleep", 0.01, rank=rank).add_done_callback(lambda _, name=name: order.append(name))
    end = time.monotonic() + 30
    while len(order) < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert order == ["urgent", "later"]


def test_a_process_that_cannot_start_is_given_up(worker):
    one = worker(arguments=("too", "many", "arguments"))
    with pytest.raises(Refused, match="cannot start"):
        one.ask("pid").result(120)


def test_a_process_that_is_ended_ends_its_questions(worker):
    one = worker()
    one.ask("pid").result(60)
    long = one.ask("sleep", 100)
    one.kill()
    with pytest.raises(CancelledError):
        long.result(60)
    assert one.ask("add", 1, 1).result(60) == 2


@pytest.fixture(scope="module")
def backbone():
    return Detector("pyramid-lite0", scales=(SIDE,))._backbone(Detector("pyramid-lite0").settings)


def test_regions_are_found_again_after_a_restart(tmp_path, backbone):
    index = RegionIndex(tmp_path / "regions.sqlite")
    encoded = [backbone.encode(scene(i).pixels, (SIDE,)) for i in range(3)]
    for i, one in enumerate(encoded):
        index.add(f"photo {i}", "stamp", f"maps {i}", one)
    box = tuple(scene(0).target.boxes[0].tolist())
    query = index.vector(encoded[0], np.array([box], np.float32))
    found = index.nearest(query, "photo 0", box, 20)
    again = RegionIndex(tmp_path / "regions.sqlite")
    assert again.has("photo 1", "stamp")
    assert not again.has("photo 1", "another stamp")
    assert again.nearest(query, "photo 0", box, 20) == found
    again.remove(["photo 1"])
    assert {photo for photo, _, _ in again.nearest(query, "photo 0", box, 50)} == {"photo 0", "photo 2"}
    assert not RegionIndex(tmp_path / "regions.sqlite").has("photo 1", "stamp")


def test_maps_that_no_photo_has_any_more_are_told(tmp_path, backbone):
    index = RegionIndex(tmp_path / "regions.sqlite")
    encoded = backbone.encode(scene(0).pixels, (SIDE,))
    assert index.add("one", "first", "maps of it", encoded) == set()
    assert index.add("a copy", "first", "maps of it", encoded) == set()
    assert index.add("one", "saved again", "maps of it", encoded) == set()
    assert index.add("one", "edited", "others", encoded) == set()
    again = RegionIndex(tmp_path / "regions.sqlite")
    assert again.add("one", "edited once more", "third", encoded) == {"others"}
    assert again.remove(["one", "a copy", "never there"]) == {"third", "maps of it"}


def test_a_project_keeps_no_maps_of_photos_that_are_gone(tmp_path):
    engine, photo = Engine(tmp_path), tmp_path / "photo.png"
    kept = tmp_path / "maps"
    write_image(photo, scene(0).pixels)
    engine.encode("photo", "first", photo)
    assert len(list(kept.iterdir())) == 1
    write_image(photo, scene(1).pixels)
    engine.encode("photo", "second", photo)
    assert len(list(kept.iterdir())) == 1
    assert engine.known(["photo"]) == []
    assert not list(kept.iterdir())


def test_the_nearest_regions_are_those_of_a_plain_search(tmp_path, backbone):
    index = RegionIndex(tmp_path / "regions.sqlite")
    encoded = [backbone.encode(scene(i).pixels, (SIDE,)) for i in range(3)]
    for i, one in enumerate(encoded):
        index.add(str(i), "", str(i), one)
    boxes = [one.windows.boxes[:200] for one in encoded]
    query = index.vector(encoded[0], boxes[0][:1])
    best = index.nearest(query, "nowhere", (0, 0, 1, 1), 1)[0]
    vectors = [index.vector(one, place) for one, place in zip(encoded, boxes, strict=True)]
    scores = [(vector @ query[0]).max() for vector in vectors]
    assert best[0] == str(int(np.argmax(scores)))
    assert best[2] == pytest.approx(max(scores), abs=5e-3)
    assert best[1] == pytest.approx(boxes[0][0].tolist())


def test_overlaps_of_two_boxes_are_those_of_arrays():
    random = np.random.default_rng(0)
    for _ in range(50):
        one, other = (np.sort(random.uniform(0, 9, (2, 2)), axis=0).ravel() for _ in range(2))
        expected = iou(one[None].astype(np.float32), other[None].astype(np.float32))[0, 0]
        assert _overlap(tuple(one), tuple(other)) == pytest.approx(expected, abs=1e-4)


def test_scenes_are_the_same_each_time_and_show_all_kinds():
    assert (scene(5).pixels == scene(5).pixels).all()
    targets = [scene(i).target for i in range(COUNT)]
    labels = [label for target in targets for label in target.labels]
    assert {labels.count(kind) >= 15 for kind in ("cat", "dog", "panda")} == {True}
    for target in targets:
        assert (target.boxes[:, 2:] - target.boxes[:, :2] >= 50).all()
        assert (target.boxes[:, :2] >= -1).all()
        assert (target.boxes <= [641, 481, 641, 481]).all()


def test_the_demonstration_is_drawn_once():
    folder = demo_folder()
    assert len(list(folder.iterdir())) == COUNT
    assert read_image(folder / "scene-01.jpg").shape == (480, 640, 3)
    assert demo_folder() == folder


def test_dropped_names_stay_in_their_folder_and_replace_nothing(tmp_path):
    folder = Folder(tmp_path)
    for given, name in {
        "..%2F..%2Fetc%2Fpasswd": "passwd.jpg",
        "a%00b.png": "a_b.png",
        "...": "photo.jpg",
        "": "photo.jpg",
        "C%3A%5Cphotos%5Cd.JPG": "d.JPG",
        "x" * 500 + ".png": "x" * 120 + ".png",
        "%FF%FE.jpg": "\ufffd\ufffd.jpg",
        "page.html": "page.jpg",
    }.items():
        assert folder.free_name(given, ".jpg") == folder.root / name
    write_image(tmp_path / "a.png", noise())
    assert folder.free_name("a.png", ".jpg").name == "a (1).png"


def test_a_folder_leaves_the_project_out(tmp_path):
    for place in ("a.jpg", "project/b.jpg", "deep/er/c.jpg", ".hidden/d.jpg"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        write_image(tmp_path / place, noise())
    found = Folder(tmp_path, tmp_path / "project").photos(LeftOut())
    assert sorted(one.place for one in found) == [b"a.jpg", b"deep/er/c.jpg"]


def test_changes_are_made_together_or_not_at_all(tmp_path):
    store = Store(tmp_path / "store.sqlite")

    def interrupted():
        with store.change() as connection:
            connection.execute("INSERT INTO facts VALUES ('a', '1')")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert store.fact("a") is None
    store.keep("a", "2")
    store.close()
    assert Store(tmp_path / "store.sqlite").fact("a") == "2"


def facts(**counts):
    return [ClassFacts(name=name, boxes=count, threshold=None) for name, count in counts.items()]


def test_a_fit_needs_five_boxes_of_a_class():
    assert not can_fit(facts()).ok
    assert can_fit(facts(cat=4, dog=0)).reason == "Too few boxes: cat has 4 of 5."
    assert can_fit(facts(cat=5)).model_dump() == {"ok": True, "reason": None}
    assert can_fit(facts(cat=5, dog=2)).reason == "Left out, too few boxes: dog has 2 of 5."
    assert learned_classes(facts(cat=5, dog=2)) == ["cat"]


def quality(photos, **recalls):
    classes = {
        name: ClassQuality(objects=10, ap=0.5, precision=0.9, recall=recall, threshold=0.5)
        for name, recall in recalls.items()
    }
    words = {"fit": "a", "made": "now", "objects": 10, "words": [], "mean_ap": 0.5, "changed": []}
    return Quality(photos=photos, classes=classes, **words)


def test_what_changed_is_said_in_words():
    assert changes(quality(8, cat=0.5), quality(8, cat=0.5)) == []
    assert changes(quality(8, cat=0.5, cow=0.1), quality(10, cat=0.8, dog=None)) == [
        "learned from 10 photos, 2 more than before",
        "dog is new",
        "cow is not learned any more",
        "cat: finds 80 %, before 50 %",
    ]
