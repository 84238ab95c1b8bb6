import json
import sys

import numpy as np
import pytest

import trees
from sppnet.errors import SppnetError
from sppnet.retrieval import neighbours
from sppnet.retrieval.embedder import Embedder
from sppnet.retrieval.index import Hit, Index
from sppnet.retrieval.manifest import MANIFEST
from sppnet.retrieval.regions import changes


@pytest.fixture(scope="module")
def embedder():
    """Vectors of 8 numbers."""
    images = [trees.scene(n).image for n in range(1, 10)]
    return Embedder(scales=(64,), levels=(1,), pca=8).fit(images)


def vectors(count, seed):
    rng = np.random.default_rng(seed)
    found = rng.normal(size=(count, 8)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def boxes(count):
    return np.arange(4 * count, dtype=np.float32).reshape(count, 4)


@pytest.fixture(params=["listed", "graph"])
def index(request, embedder, tmp_path, monkeypatch):
    """Thirty images of five regions each, in either way to keep vectors."""
    if request.param == "graph":
        pytest.importorskip("usearch", reason="needs the extra sppnet[search]")
        monkeypatch.setattr(neighbours, "MOST_LISTED", 12)
    made = Index.create(tmp_path / "index", embedder, "photos", "by hand")
    for n in range(30):
        made.add(f"{n}.jpg", f"stamp {n}", boxes(5) + n, vectors(5, n))
    return made


def exact(query, names):
    """Return image, region and score of the best region of each image, best first."""
    hits = []
    for name in names:
        scores = vectors(5, int(name.removesuffix(".jpg"))).astype(np.float16).astype(np.float32) @ query
        hits.append((name, int(scores.argmax()), float(scores.max())))
    return sorted(hits, key=lambda hit: -hit[2])


def agree(found: list[Hit], query, names, top):
    expected = exact(query, names)[:top]
    assert [hit.image for hit in found] == [name for name, _, _ in expected]
    for hit, (name, region, score) in zip(found, expected, strict=True):
        assert np.array_equal(hit.box, boxes(5)[region] + int(name.removesuffix(".jpg")))
        assert hit.score == pytest.approx(score, abs=2e-3)


class TestSearch:
    @pytest.mark.parametrize("top", [1, 7, 30])
    def test_finds_the_best_region_of_the_best_images(self, top, index):
        for seed in range(100, 105):
            (query,) = vectors(1, seed)
            agree(index.search_vector(query, top), query, index.images, top)

    def test_the_graph_finds_nearly_all(self, embedder, tmp_path, monkeypatch):
        pytest.importorskip("usearch", reason="needs the extra sppnet[search]")
        monkeypatch.setattr(neighbours, "MOST_LISTED", 1000)
        made = Index.create(tmp_path / "i", embedder)
        for n in range(60):
            made.add(str(n), "", boxes(50), vectors(50, n))
        stored = np.concatenate([vectors(50, n) for n in range(60)])
        right = 0
        for query in vectors(20, 1000):
            rows, scores = made.nearest(query, 10)
            assert (np.diff(scores) <= 0).all()
            right += len(set(rows.tolist()) & set(np.argsort(-(stored @ query))[:10].tolist()))
        assert right >= 190

    def test_gives_all_images_where_more_are_asked_for(self, index):
        assert len(index.search_vector(vectors(1, 0)[0], 100)) == 30

    def test_an_empty_index_has_no_hits(self, embedder, tmp_path):
        assert Index.create(tmp_path / "i", embedder).search_vector(vectors(1, 0)[0]) == []

    def test_looks_past_many_regions_of_one_image(self, embedder, tmp_path):
        crowded = Index.create(tmp_path / "i", embedder)
        (query,) = vectors(1, 7)
        crowded.add("crowd", "", boxes(500), np.repeat(query[None], 500, axis=0))
        for n in range(5):
            crowded.add(str(n), "", boxes(5), vectors(5, n))
        hits = crowded.search_vector(query, 4)
        assert len({hit.image for hit in hits}) == 4
        assert hits[0].image == "crowd"

    def test_bad_queries(self, index):
        with pytest.raises(ValueError, match=r"found a vector \(7,\)"):
            index.search_vector(np.zeros(7, np.float32))
        with pytest.raises(ValueError, match="top 0"):
            index.search_vector(vectors(1, 0)[0], 0)


class TestChanging:
    def test_removed_images_are_not_found_and_others_stay(self, index):
        gone = [f"{n}.jpg" for n in range(0, 30, 3)]
        index.remove(gone)
        assert len(index) == 100
        (query,) = vectors(1, 100)
        agree(index.search_vector(query, 20), query, index.images, 20)

    def test_an_image_comes_back_with_other_regions(self, index):
        index.remove(["4.jpg"])
        (query,) = vectors(1, 55)
        index.add("4.jpg", "new", boxes(1), query[None])
        assert index.search_vector(query, 1)[0].image == "4.jpg"
        assert index.images["4.jpg"] == "new"
        assert len(index) == 146

    def test_images_without_regions(self, index):
        index.add("empty.jpg", "", boxes(0), vectors(0, 0))
        assert "empty.jpg" in index.images
        index.remove(["empty.jpg"])
        assert len(index) == 150

    def test_refused(self, index):
        with pytest.raises(ValueError, match=r"found '3.jpg' in the index already"):
            index.add("3.jpg", "", boxes(5), vectors(5, 0))
        with pytest.raises(ValueError, match=r"found vectors \(5, 7\) of 'x'"):
            index.add("x", "", boxes(5), np.zeros((5, 7), np.float32))
        with pytest.raises(ValueError, match="found no 'x' in the index of 30 images"):
            index.remove(["3.jpg", "x"])
        assert "3.jpg" in index.images

    def test_changes(self):
        known, found = {"a": "1", "b": "1", "c": "1"}, {"d": "1", "b": "2", "a": "1"}
        assert changes(known, found) == (["d"], ["b"], ["c"])


class TestDisk:
    def test_what_is_saved_is_opened(self, index, embedder):
        index.remove(["0.jpg", "17.jpg"])
        index.save()
        opened = Index.open(index.folder)
        assert opened.images == index.images
        assert (opened.source, opened.regions) == ("photos", "by hand")
        assert opened.embedder.signature == embedder.signature
        for seed in range(100, 105):
            (query,) = vectors(1, seed)
            agree(opened.search_vector(query, 10), query, opened.images, 10)
        opened.add("new.jpg", "", boxes(1), vectors(1, 0))
        opened.remove(["1.jpg"])
        opened.save()
        again = Index.open(index.folder)
        assert again.images == opened.images
        assert len(again) == 136
        assert len(list(index.folder.iterdir())) == 3  # of the old generation nothing stays

    @pytest.mark.parametrize("damage", ["cut", "flip", "lose"])
    @pytest.mark.parametrize("what", ["rows", "vectors"])
    def test_damage_is_detected(self, damage, what, index):
        index.save()
        path = index.folder / json.loads((index.folder / MANIFEST).read_text())[what]
        content = bytearray(path.read_bytes())
        if damage == "lose":
            path.unlink()
        else:
            content[len(content) // 2] ^= 1
            path.write_bytes(content[:-5] if damage == "cut" else content)
        with pytest.raises(ValueError, match="found a damaged or missing file"):
            Index.open(index.folder)

    def test_a_save_that_fails_leaves_the_old_index(self, index, monkeypatch):
        index.save()
        before = {p.name: p.read_bytes() for p in index.folder.iterdir()}
        index.add("new.jpg", "", boxes(1), vectors(1, 0))
        monkeypatch.setattr(
            "sppnet.retrieval.index.write_tensors", lambda *_: (_ for _ in ()).throw(OSError("full"))
        )
        with pytest.raises(OSError, match="full"):
            index.save()
        assert len(Index.open(index.folder)) == 150
        assert before == {p.name: p.read_bytes() for p in index.folder.iterdir()}

    def test_other_folders_are_refused(self, embedder, tmp_path):
        with pytest.raises(ValueError, match="expected an index"):
            Index.open(tmp_path)
        (tmp_path / MANIFEST).write_text(json.dumps({"format": "something"}))
        with pytest.raises(ValueError, match="found something"):
            Index.open(tmp_path)
        with pytest.raises(ValueError, match="found an index, expected none"):
            Index.create(tmp_path, embedder)
        for content, says in (
            ([], "found list"),
            ({"format": "sppnet-index", "version": "2"}, "found sppnet-index 2, expected sppnet-index 3"),
            ({"format": "sppnet-index", "version": "3"}, "found no files"),
        ):
            (tmp_path / MANIFEST).write_text(json.dumps(content))
            with pytest.raises(ValueError, match=says):
                Index.open(tmp_path)

    @pytest.mark.parametrize("index", ["graph"], indirect=True)
    def test_a_graph_without_usearch_is_refused_with_what_helps(self, index, monkeypatch):
        index.save()
        monkeypatch.setitem(sys.modules, "usearch", None)
        with pytest.raises(SppnetError, match=r'needs usearch: pip install "sppnet\[search\]"'):
            Index.open(index.folder)

    def test_vectors_of_any_length_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="expected 'l2'"):
            Index.create(tmp_path, Embedder(norm="none"))
