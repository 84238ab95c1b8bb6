import os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from sppnet.boxes import Windows, iou
from sppnet.errors import ImageError, SppnetError
from sppnet.images import read_image
from sppnet.proposals import (
    METHODS,
    Combined,
    DenseWindows,
    EdgeBoxes,
    Proposer,
    SelectiveSearch,
    cache_folder,
    image_key,
    parse,
    propose,
    propose_all,
    read_windows,
    write_windows,
)
from sppnet.proposals.cache import propose_each

EVERY = [*METHODS, "selective-search+edge-boxes+dense"]


def scene(height=150, width=200, seed=0):
    """A textured ground with a red disc and a blue rectangle on it."""
    rng = np.random.default_rng(seed)
    image = rng.integers(90, 140, (height, width, 3)).astype(np.uint8)
    image = cv2.GaussianBlur(image, (0, 0), 2)
    cv2.circle(image, (width // 4, height // 2), min(height, width) // 5, (200, 40, 40), -1)
    cv2.rectangle(image, (width // 2, height // 4), (width * 7 // 8, height * 3 // 4), (40, 60, 200), -1)
    return image


def check_contract(windows, image):
    boxes, scores = windows
    assert isinstance(windows, Windows)
    height, width = image.shape[:2]
    assert boxes.dtype == scores.dtype == np.float32
    assert boxes.shape == (len(scores), 4)
    assert boxes[0].tolist() == [0, 0, width, height]
    assert (boxes >= 0).all()
    assert (boxes[:, [0, 2]] <= width).all()
    assert (boxes[:, [1, 3]] <= height).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert len(np.unique(boxes, axis=0)) == len(boxes)
    assert scores[0] == 1
    assert (np.diff(scores) < 0).all()
    assert (scores > 0).all()


def check_equal(found, expected):
    assert isinstance(found, Windows)
    np.testing.assert_array_equal(found.boxes, expected.boxes)
    np.testing.assert_array_equal(found.scores, expected.scores)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{i}.png" for i in range(6)]
    for i, path in enumerate(paths):
        Image.fromarray(scene(90 + 10 * i, 120, i)).save(path)
    return paths


# --- the methods, on pictures of every shape ---------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_finds_drawn_objects(name):
    image = scene(300, 400)
    windows = parse(name)(image)
    check_contract(windows, image)
    objects = np.array([[40, 90, 161, 211], [200, 75, 351, 226]], np.float32)
    wanted = 0.45 if name == "dense" else 0.8
    assert (iou(objects, windows.boxes).max(axis=1) > wanted).all()


SHAPES = [
    *[(1, 1), (1, 2), (3, 3), (7, 9), (11, 11), (1, 700), (700, 1), (25, 25)],
    *[(200, 500), (500, 200), (80, 400), (400, 80), (30, 600), (600, 30)],
    *[(20, 30000), (30000, 20)],
]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_any_shape(name, height, width):
    image = np.random.default_rng(0).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8)
    image = cv2.resize(image, (width, height))
    check_contract(parse(name)(image), image)


@pytest.mark.parametrize("name", ["selective-search", "edge-boxes"])
def test_nothing_to_see_leaves_the_whole_image(name):
    for grey in (0, 128, 255):
        image = np.full((120, 200, 3), grey, np.uint8)
        boxes, scores = parse(name)(image)
        assert boxes.tolist() == [[0, 0, 200, 120]]
        assert scores.tolist() == [1]


@pytest.mark.parametrize("name", ["selective-search", "edge-boxes"])
@pytest.mark.parametrize("pattern", ["slope", "diagonal", "stripes", "checks", "noise"])
def test_patterns_without_objects(name, pattern):
    y, x = np.mgrid[:150, :200]
    value = {
        "slope": x,
        "diagonal": (x + y) * 0.7,
        "stripes": x // 4 % 2 * 255,
        "checks": (x + y) % 2 * 255,
        "noise": np.random.default_rng(0).integers(0, 256, x.shape),
    }[pattern]
    image = np.repeat(value.astype(np.uint8)[..., None], 3, axis=2)
    check_contract(parse(name)(image), image)


@pytest.mark.parametrize("name", EVERY)
def test_same_image_same_windows(name):
    image = scene()
    boxes, scores = parse(name)(image)
    cv2.setRNGSeed(7)
    again, same = parse(name)(image.copy())
    np.testing.assert_array_equal(boxes, again)
    np.testing.assert_array_equal(scores, same)


def test_the_image_is_not_changed():
    image = scene()
    before = image.copy()
    for name in EVERY:
        parse(name)(image)
    np.testing.assert_array_equal(image, before)


def test_a_view_is_as_good_as_an_array():
    image = scene()
    for name in EVERY:
        np.testing.assert_array_equal(
            parse(name)(image[:, ::-1])[0], parse(name)(np.ascontiguousarray(image[:, ::-1]))[0]
        )


# --- settings ----------------------------------------------------------------------------------------------


def test_selective_search_settings():
    image = scene(300, 400)
    boxes = SelectiveSearch()(image)[0]
    sides = boxes[:, 2:] - boxes[:, :2]
    assert (sides >= 20).all()
    overlap = iou(boxes[1:], boxes[1:]) - np.eye(len(boxes) - 1)
    assert overlap.max() <= 0.9 + 1e-5
    assert len(SelectiveSearch(k=(75, 150))(image)[0]) > len(boxes)
    assert len(SelectiveSearch(max_overlap=1)(image)[0]) > len(boxes)
    large = SelectiveSearch(min_side=60)(image)[0]
    assert ((large[:, 2:] - large[:, :2]) >= 60).all()


def test_edge_boxes_settings():
    image = scene(300, 400)
    assert len(EdgeBoxes(max_boxes=50)(image)[0]) <= 51
    np.testing.assert_array_equal(EdgeBoxes(max_boxes=20)(image)[0][0], [0, 0, 400, 300])


def test_dense_windows_by_hand():
    # One scale of half the side of a square image: 3 positions each way at steps of half a window.
    boxes, _ = DenseWindows(sizes=(0.5,), aspects=(1.0,), step=0.5)(np.zeros((80, 80, 3), np.uint8))
    corners = [[x, y, x + 40, y + 40] for y in (0, 20, 40) for x in (0, 20, 40)]
    assert boxes.tolist() == [[0, 0, 80, 80], *corners]


def test_dense_windows_large_first():
    boxes, _ = DenseWindows()(np.zeros((300, 400, 3), np.uint8))
    areas = (boxes[1:, 2:] - boxes[1:, :2]).prod(axis=1)
    assert areas[0] > 0.4 * 300 * 400
    assert areas[:20].min() > areas[-20:].max()


def test_combined_takes_turns():
    class Fixed(Proposer):
        def __init__(self, *boxes):
            self.boxes = np.array(boxes, np.float32)

        def __call__(self, image, encoded=None):
            return Windows(self.boxes, np.linspace(1, 0, len(self.boxes), endpoint=False, dtype=np.float32))

    image = np.zeros((50, 50, 3), np.uint8)
    whole, a, b, c = [0, 0, 50, 50], [0, 0, 10, 10], [0, 0, 20, 20], [0, 0, 30, 30]
    windows = Combined((Fixed(whole, a), Fixed(whole, b, a, c)))(image)
    # Scores 1, 1/2 and 1, 3/4, 1/2, 1/4: the whole image, b, a, (a again), c.
    assert windows.boxes.tolist() == [whole, b, a, c]
    check_contract(windows, image)


def test_combined_has_the_windows_of_all():
    image = scene()
    parts = [parse(name)(image)[0] for name in ("selective-search", "edge-boxes")]
    together = parse("selective-search+edge-boxes")(image)[0]
    assert {tuple(b) for part in parts for b in part} == {tuple(b) for b in together}


# --- names -------------------------------------------------------------------------------------------------


def test_parse():
    assert parse("selective-search") == SelectiveSearch()
    assert parse("edge-boxes") == EdgeBoxes()
    assert parse("selective-search+dense") == Combined((SelectiveSearch(), DenseWindows()))


@pytest.mark.parametrize("text", ["", "+", "selective", "selective-search+", "dense+windows.csv", "a.json"])
def test_parse_says_what_is_allowed(text):
    with pytest.raises(SppnetError, match=r"expected selective-search, .*edge-boxes, dense.*npz") as error:
        parse(text)
    assert repr(text) in str(error.value)
    assert "\n" not in str(error.value)


def test_signatures_tell_settings_apart():
    methods = [*map(parse, EVERY), SelectiveSearch(side=131), replace(EdgeBoxes(), blur=2.0)]
    assert len({m.signature for m in methods}) == len(methods)
    assert SelectiveSearch().signature == SelectiveSearch(side=130).signature
    assert "side=130" in SelectiveSearch().signature


def test_opencv_without_contrib(monkeypatch):
    monkeypatch.delattr(cv2, "ximgproc")
    for name in ("selective-search", "edge-boxes"):
        with pytest.raises(SppnetError, match="opencv-contrib-python-headless"):
            parse(name)(scene())


# --- files of windows --------------------------------------------------------------------------------------


def test_file_round_trip(tmp_path, files):
    method = parse("edge-boxes")
    images = [read_image(path) for path in files]
    path = tmp_path / "windows.npz"
    write_windows(path, ((p.name, image_key(i), method(i)) for p, i in zip(files, images, strict=True)))
    stored = parse(str(path))
    for image in images:
        for ours, theirs in zip(stored(image), method(image), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    with np.load(path) as content:
        assert content["names"].tolist() == [p.name for p in files]
        assert content["counts"].sum() == len(content["boxes"]) == len(content["scores"])
    changed = images[0].copy()
    changed[0, 0, 0] ^= 1
    with pytest.raises(SppnetError, match=r"\(120 x 90\) without windows in .*windows.npz, .*6 images"):
        stored(changed)
    assert stored.signature != method.signature
    assert str(path) in stored.signature
    assert len(stored.signature) < len(str(path)) + 100


def test_windows_of_others_are_brought_in_order(tmp_path):
    image = np.zeros((50, 60, 3), np.uint8)
    boxes = np.array([[0, 0, 10, 10], [5, 5, 90, 90], [0, 0, 10, 10], [70, 0, 80, 10]], np.float32)
    given = np.array([-3, 9, 2, 1], np.float32)
    write_windows(tmp_path / "w.npz", [("a", image_key(image), Windows(boxes, given))])
    ours = read_windows(tmp_path / "w.npz")(image)
    assert ours.boxes.tolist() == [[0, 0, 60, 50], [5, 5, 60, 50], [0, 0, 10, 10]]
    check_contract(ours, image)


def test_a_file_is_read_once_until_it_changes(tmp_path, files):
    path, image = tmp_path / "windows.npz", read_image(files[0])
    for side in (20, 30):
        boxes = np.array([[0, 0, side, side]], np.float32)
        write_windows(path, [("a", image_key(image), Windows(boxes, np.ones(1, np.float32)))])
        os.utime(path, ns=(side, side))
        method = parse(str(path))
        assert parse(str(path)) is method
        assert np.array_equal(method(image).boxes[1:], boxes)  # after the whole image


def test_file_with_no_image_and_image_with_no_window(tmp_path):
    write_windows(tmp_path / "none.npz", [])
    assert read_windows(tmp_path / "none.npz").windows == {}
    image = np.zeros((50, 60, 3), np.uint8)
    write_windows(tmp_path / "w.npz", [("a", image_key(image), Windows(np.zeros((0, 4)), np.zeros(0)))])
    assert read_windows(tmp_path / "w.npz")(image)[0].tolist() == [[0, 0, 60, 50]]


def test_damaged_files(tmp_path):
    path = tmp_path / "w.npz"
    with pytest.raises(FileNotFoundError):
        parse(str(path))
    image = scene()
    write_windows(path, [("a", image_key(image), EdgeBoxes()(image))])
    whole = path.read_bytes()
    arrays = dict(np.load(path))
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:100] + b"x" * 100 + whole[200:]):
        path.write_bytes(content)
        with pytest.raises(SppnetError, match=r"w\.npz: found .*expected a file that sppnet propose wrote"):
            read_windows(path)
    for wrong in (
        {"boxes": arrays["boxes"][:-1]},
        {"scores": arrays["scores"][:-1]},
        {"boxes": arrays["boxes"] * np.nan},
        {"boxes": arrays["boxes"][:, ::-1]},
        {"boxes": arrays["boxes"][:, :3]},
        {"counts": arrays["counts"] + 1},
        {"counts": np.array([1, 2])},
        {"keys": np.array(["a", "b"])},
        {"boxes": np.array([object()])},
    ):
        np.savez(path, **(arrays | wrong))
        with pytest.raises(SppnetError, match=r"w\.npz: found .*expected") as error:
            read_windows(path)
        assert "\n" not in str(error.value)


def test_damaged_bytes(tmp_path):
    path, rng = tmp_path / "w.npz", np.random.default_rng(0)
    write_windows(path, [("a", "0" * 32, EdgeBoxes()(scene()))])
    whole = path.read_bytes()
    for _ in range(200):
        content = bytearray(whole)
        for place in rng.integers(len(whole), size=3):
            content[place] = rng.integers(256)
        path.write_bytes(content)
        try:
            read_windows(path)
        except SppnetError as error:
            assert "\n" not in str(error)  # noqa: PT017 - some damage goes unseen


def test_file_name_must_tell(tmp_path):
    with pytest.raises(SppnetError, match=r"windows\.json: found the suffix '\.json', expected \.npz"):
        write_windows(tmp_path / "windows.json", [])
    assert list(tmp_path.iterdir()) == []


def test_image_key():
    image = scene()
    assert image_key(image) == image_key(np.asfortranarray(image))
    assert image_key(image) != image_key(image[:, ::-1])
    assert image_key(np.zeros((2, 3, 3), np.uint8)) != image_key(np.zeros((3, 2, 3), np.uint8))


# --- many images -------------------------------------------------------------------------------------------


class Counted(Proposer):
    """Edge boxes that count how often they are asked."""

    def __init__(self):
        self.calls = 0

    def __repr__(self):
        return "Counted()"

    def __call__(self, image, encoded=None):
        self.calls += 1
        return EdgeBoxes()(image)


@pytest.mark.parametrize("workers", [None, 1, 3])
def test_propose_all_in_order(files, workers):
    method = parse("selective-search")
    results = list(propose_all(files, method, workers=workers))
    for path, found in zip(files, results, strict=True):
        check_equal(found, method(read_image(path)))


def test_propose_all_takes_pixels(files, tmp_path):
    images = [read_image(path) for path in files]
    method = Counted()
    expected = list(propose_all(files, EdgeBoxes()))
    for cache in (None, tmp_path, tmp_path):
        for found, wanted in zip(propose_all(images, method, cache), expected, strict=True):
            check_equal(found, wanted)
    assert method.calls == 2 * len(images), "the third time they came from the cache"
    # Equal bytes of another shape are another image.
    list(propose_all([images[0].reshape(120, -1, 3)], method, tmp_path))
    assert method.calls == 2 * len(images) + 1


def test_cache(files, tmp_path):
    cache, method = tmp_path / "not" / "there", Counted()
    fresh = list(propose_all(files, method, cache))
    assert method.calls == len(files)
    again = list(propose_all([str(p) for p in files], method, cache))
    assert method.calls == len(files)
    for ours, theirs in zip(fresh, again, strict=True):
        check_equal(ours, theirs)
        assert theirs.boxes.flags.writeable
        assert theirs.scores.flags.writeable
    # The same bytes under another name are the same image.
    copy = tmp_path / "copy.png"
    copy.write_bytes(files[0].read_bytes())
    list(propose_all([copy], method, cache))
    assert method.calls == len(files)
    # Other bytes under the old name are not.
    copy.write_bytes(files[1].read_bytes() + b"\0")
    list(propose_all([copy], method, cache))
    assert method.calls == len(files) + 1
    # Nor are other settings.
    list(propose_all(files[:1], EdgeBoxes(), cache))
    assert len(list(cache.iterdir())) == len(files) + 2


@pytest.mark.parametrize("damage", [lambda c: b"", lambda c: c[:-7], lambda c: c[:40] + b"?" + c[41:]])
def test_damaged_cache_entries_are_computed_again(files, tmp_path, damage):
    method = Counted()
    first = next(propose_all(files[:1], method, tmp_path))
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(damage(entry.read_bytes()))
    check_equal(next(propose_all(files[:1], method, tmp_path)), first)
    assert method.calls == 2
    list(propose_all(files[:1], method, tmp_path))
    assert method.calls == 2


def test_a_cache_that_cannot_be_is_warned_of(files, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match=r"file/windows: cannot keep windows there \(Not a directory\)"):
        found = list(propose_all(files[:1], METHODS["dense"], tmp_path / "file" / "windows"))
    assert len(found[0].boxes)


def test_windows_of_a_file_that_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"none\.npz: found no such file, expected windows"):
        parse("none.npz")


def test_failures_name_the_image(files, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    good, broken, *rest = propose_each([files[0], tmp_path / "broken.jpg", *files], EdgeBoxes())
    check_equal(good, EdgeBoxes()(read_image(files[0])))
    assert isinstance(broken, ImageError)
    assert "broken.jpg" in str(broken)
    assert len(rest) == len(files), "one that fails stops no other"
    check_equal(rest[0], good)
    (missing,) = propose_each([tmp_path / "missing.jpg"], EdgeBoxes(), tmp_path)
    assert isinstance(missing, FileNotFoundError)
    assert "missing.jpg" in str(missing)
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        list(propose_all([files[0], tmp_path / "broken.jpg"], EdgeBoxes()))
    write_windows(tmp_path / "none.npz", [])
    for error in propose_each(files, parse(str(tmp_path / "none.npz"))):
        assert isinstance(error, SppnetError)
        assert ".png: found an image" in str(error)


def test_stopping_early_leaves_no_work(files):
    method = Counted()
    stream = propose_all(files * 50, method, workers=2)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    done = method.calls
    assert done < len(files) * 50
    assert method.calls == done


def test_propose_writes_a_file_that_is_a_method(files, tmp_path):
    out, described = tmp_path / "windows.npz", []

    def track(items, description):
        described.append((len(items), description))
        return items

    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    proposed = propose([files[0].parent, tmp_path / "broken.jpg"], "edge-boxes", out, track=track)
    assert described == [(len(files) + 1, "Proposing windows")]
    stored = read_windows(out)
    for path in files:
        check_equal(stored(read_image(path)), EdgeBoxes()(read_image(path)))
    assert proposed.images == len(files)
    assert proposed.windows == sum(len(windows.boxes) for windows in stored.windows.values())
    (failure,) = proposed.failures
    assert str(tmp_path / "broken.jpg") in failure
    # A file is a method, a method need not be a name, and an image that it does not know is a failure.
    other = tmp_path / "other.png"
    Image.fromarray(scene(50, 60, 9)).save(other)
    again = propose([other, files[0]], stored, tmp_path / "again.npz")
    assert (again.images, len(again.failures)) == (1, 1)
    assert str(other) in again.failures[0]


def test_propose_writes_nothing_where_nothing_was_proposed(tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"")
    proposed = propose([broken], "dense", tmp_path / "windows.npz")
    assert (proposed.images, proposed.windows, len(proposed.failures)) == (0, 0, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["broken.jpg"]


def test_propose_says_what_is_wrong_before_any_work(files, tmp_path):
    def track(items, description):
        raise AssertionError("it began")

    out = tmp_path / "windows.npz"
    for images, method, place, said in [
        (files, "dense", tmp_path / "windows.json", r"found the suffix '\.json', expected \.npz"),
        (files, "sparse", out, "found the proposal method 'sparse', expected selective-search"),
        ([tmp_path], "dense", out, "found no image"),
        (str(files[0]), "dense", out, "found the path .*expected a list"),
    ]:
        with pytest.raises(SppnetError, match=said):
            propose(images, method, place, track=track)
    with pytest.raises(OSError, match="cannot write"):
        propose(files, "dense", tmp_path / "missing" / "windows.npz", track=track)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_do(tmp_path):
    assert list(propose_all([], EdgeBoxes(), tmp_path)) == []
    assert cache_folder() == Path(cache_folder())
    assert "sppnet" in str(cache_folder())


def test_opencv_threads_are_left_alone(files):
    before = cv2.getNumThreads()
    list(propose_all(files, parse("selective-search+edge-boxes"), workers=2))
    assert cv2.getNumThreads() == before
