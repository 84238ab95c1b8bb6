"""An index built from a folder of images, brought up to date, and searched by images and regions."""

import inspect
import os
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

import trees
from sppnet.cli import search as command
from sppnet.errors import SppnetError
from sppnet.images import read_image
from sppnet.proposals import parse
from sppnet.retrieval import index as module
from sppnet.retrieval import neighbours
from sppnet.retrieval.embedder import Embedder
from sppnet.retrieval.index import SETTINGS, Index, Update
from sppnet.retrieval.regions import AHEAD, Describing, Regions


def embedder(**settings):
    return Embedder(**{"scales": (64,), "levels": (1,), "pca": 8, **settings})


def build(photos, folder, **settings):
    return Index.build(photos, folder, **{"embedder": embedder(), "windows": 6, **settings})


@pytest.fixture(scope="module")
def built(photos, tmp_path_factory):
    """The index of all photos; not to be changed."""
    return build(photos, tmp_path_factory.mktemp("built") / "index")


@pytest.fixture
def own(photos, tmp_path):
    """A copy of the photos that may be changed."""
    return shutil.copytree(photos, tmp_path / "own")


NAMES = (*(f"{n}.png" for n in range(1, 7)), *(os.path.join("more", f"{n}.png") for n in (7, 8)))


class TestBuild:
    def test_holds_all_images_with_the_whole_and_their_best_windows(self, built, photos):
        assert built.update == Update(8, NAMES, (), (), (), ())
        assert set(built.images) == set(NAMES)
        assert (built.source, built.regions) == (str(photos.resolve()), "edge-boxes, at most 6")
        opened, propose = Index.open(built.folder), parse("edge-boxes")
        assert opened.update is None
        assert opened.images == built.images
        pixels = read_image(photos / "3.png")
        boxes = propose(pixels).boxes[:6]
        assert boxes[0].tolist() == [0, 0, 128, 96]
        vectors = built.embedder(pixels, boxes)
        regions = Regions(windows=6)
        stored = [built.embedder(photos / name, regions(read_image(photos / name))) for name in NAMES]
        for vector in vectors:
            best = opened.search_vector(vector, 1)[0]
            assert best.image == "3.png"
            assert best.score == pytest.approx(1, abs=2e-3)
            # Windows that cover the same cells have equal vectors.
            alike = boxes[np.abs(vectors - vector).max(axis=1) < 1e-3]
            assert best.box.tolist() in alike.tolist()
            rows, scores = opened.nearest(vector, len(opened), exact=True)
            # In half precision; and BLAS rounds by where the numbers lie in memory.
            expected = np.concatenate(stored) @ vector
            np.testing.assert_allclose(scores[np.argsort(rows)], expected, atol=4e-3)

    def test_learns_the_projection_on_a_copy_of_the_embedder(self, photos, tmp_path):
        given = embedder()
        made = build(photos, tmp_path / "index", embedder=given, proposals="none")
        assert not given.__sklearn_is_fitted__()
        assert made.embedder.kind == given.kind
        assert len(made) == 8

    def test_takes_an_embedder_that_has_learned(self, built, photos, tmp_path):
        made = build(photos, tmp_path / "index", embedder=built.embedder)
        assert made.embedder.signature == built.embedder.signature
        plain = build(photos, tmp_path / "plain", embedder=embedder(pca=None), proposals="none")
        assert plain.embedder.length == 1280

    def test_is_brought_up_to_date(self, own, tmp_path):
        build(own, tmp_path / "index")
        (own / "1.png").unlink()
        trees.save(own / "2.png", trees.scene(20).image)
        trees.save(own / "9.png", trees.scene(21).image)
        again = build(str(own), str(tmp_path / "index"))
        assert again.update == Update(8, ("9.png",), ("2.png",), ("1.png",), (), ())
        assert set(Index.open(tmp_path / "index").images) == {*NAMES[1:], "9.png"}
        assert again.search(own / "9.png", top=1)[0].image == "9.png"
        assert again.search(own / "2.png", top=1)[0].image == "2.png"

    def test_names_what_cannot_be_read(self, own, tmp_path):
        (own / "4.png").write_bytes(b"")
        made = build(own, tmp_path / "index")
        (failure,) = made.update.failures
        assert "4.png" in failure
        assert set(Index.open(tmp_path / "index").images) == {*NAMES} - {"4.png"}

    def test_says_what_differs(self, built, photos, tmp_path):
        folder = shutil.copytree(built.folder, tmp_path / "index")
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(
            SppnetError, match=r'another embedder.*"scales": \[64\].*expected.*"scales": \[96\]'
        ):
            build(photos, folder, embedder=embedder(scales=(96,)))
        other = Embedder(**built.embedder.get_params() | {"seed": 1}).fit(
            [trees.scene(n).image for n in range(20)]
        )
        with pytest.raises(SppnetError, match=r"another embedder.*projection=.*expected.*projection="):
            build(photos, folder, embedder=other)
        with pytest.raises(SppnetError, match="at most 6; expected edge-boxes, at most 9"):
            build(photos, folder, windows=9)
        with pytest.raises(SppnetError, match="by edge-boxes, at most 6; expected none, at most 6"):
            build(photos, folder, proposals="none")
        trees.class_tree(tmp_path / "elsewhere")
        with pytest.raises(
            SppnetError, match=f"the index of {photos.resolve()}, expected that folder, found"
        ):
            build(tmp_path / "elsewhere", folder)
        assert before == {path.name: path.read_bytes() for path in folder.iterdir()}

    def test_too_many_regions_without_usearch_are_refused_at_once(self, photos, tmp_path, monkeypatch):
        monkeypatch.setattr(neighbours, "MOST_LISTED", 47)
        monkeypatch.setitem(sys.modules, "usearch", None)
        with pytest.raises(SppnetError, match=r'more than 47 regions needs usearch.*"sppnet\[search\]"'):
            build(photos, tmp_path / "index")
        assert len(build(photos, tmp_path / "index", proposals="none", windows=9)) == 8

    def test_bad_places(self, photos, tmp_path):
        with pytest.raises(SppnetError, match="found no such file or folder"):
            build(tmp_path / "nowhere", tmp_path / "index")
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="found a file, expected a folder"):
            build(photos, tmp_path / "file")
        with pytest.raises(SppnetError, match="found the proposal method 'edges'"):
            build(photos, tmp_path / "index", proposals="edges")
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_is_saved_now_and_then_and_when_it_is_stopped(self, photos, tmp_path, monkeypatch):
        def stopped(items, description):
            for i, item in enumerate(items):
                if description == "Indexing" and i == 3:
                    assert len(Index.open(tmp_path / "index").images) == 3
                    raise KeyboardInterrupt
                yield item

        monkeypatch.setattr(module, "_SAVE_EVERY", 0.0)
        with pytest.raises(KeyboardInterrupt):
            build(photos, tmp_path / "index", track=stopped)
        assert len(build(photos, tmp_path / "index").update.new) == 5

    def test_tells_how_far_it_is(self, photos, tmp_path):
        told = []
        build(
            photos,
            tmp_path / "index",
            proposals="none",
            track=lambda i, text: told.append((text, len(i))) or i,
        )
        assert told == [("Sampling", 8), ("Indexing", 8)]


class TestSearch:
    def test_takes_whatever_stands_for_an_image(self, built, photos):
        path, box = photos / "more" / "7.png", trees.scene(7).boxes[0]
        expected = built.search_vector(built.embedder(path, [box])[0], 5)
        for image in (path, str(path), Image.open(path), read_image(path), built.embedder.encode(path)):
            found = built.search(image, box=box, top=5)
            assert [(hit.image, hit.box.tolist(), hit.score) for hit in found] == [
                (hit.image, hit.box.tolist(), hit.score) for hit in expected
            ]

    def test_without_a_box_is_of_the_whole_image(self, built, photos):
        best = built.search(photos / "2.png", top=1)[0]
        assert (best.image, best.box.tolist()) == ("2.png", [0, 0, 128, 96])
        assert best.score == pytest.approx(1, abs=2e-3)

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"box": (9, 9, 9, 20)}, "expected x1 < x2"),
            ({"box": (300, 300, 400, 400)}, "inside the image of 128 x 96"),
            ({"box": (1, 2, 3)}, r"expected \(R, 4\)"),
            ({"top": 0}, "top 0"),
        ],
    )
    def test_bad_queries(self, settings, says, built, photos):
        with pytest.raises(SppnetError, match=says):
            built.search(photos / "1.png", **settings)


def test_images_are_described_in_order_and_errors_stay_at_their_place(photos, tmp_path):
    paths = [photos / "1.png", tmp_path / "none.png", photos / "2.png"]
    embedder = Embedder(scales=(64,))
    first, error, last = AHEAD.stream(Describing(embedder, Regions("none")), paths)
    assert isinstance(error, FileNotFoundError)
    for path, (boxes, vectors) in ((paths[0], first), (paths[2], last)):
        assert boxes.tolist() == [[0, 0, 128, 96]]
        assert np.array_equal(vectors, embedder(read_image(path), boxes))


def test_the_command_has_the_same_defaults():
    there = {name: p.default for name, p in inspect.signature(command.index).parameters.items()}
    here = {name: p.default for name, p in inspect.signature(Index.build).parameters.items()}
    assert (there["proposals"], there["windows"]) == (here["proposals"], here["windows"])
    numbers = {name: tuple(map(int, there[name].split(","))) for name in ("scales", "levels")}
    assert {**numbers, "output_stride": there["stride"], "pca": there["pca"]} == SETTINGS
