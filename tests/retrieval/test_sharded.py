"""Indexes side by side: what they find together is what one index of everything finds."""

import json
import shutil

import numpy as np
import pytest

import trees
from sppnet.errors import SppnetError
from sppnet.retrieval import neighbours
from sppnet.retrieval.embedder import Embedder
from sppnet.retrieval.index import Index, embedder_of, open_index
from sppnet.retrieval.manifest import MANIFEST
from sppnet.retrieval.sharded import (
    SHARDS,
    ShardedIndex,
    shard_folders,
    write_shards,
)

IMAGES, REGIONS = 24, 5


@pytest.fixture(scope="module")
def embedder():
    """Vectors of 8 numbers."""
    return Embedder(scales=(64,), levels=(1,), pca=8).fit([trees.scene(n).image for n in range(1, 10)])


def vectors(count, seed):
    found = np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def boxes(n):
    return np.arange(4 * REGIONS, dtype=np.float32).reshape(REGIONS, 4) + n


def filled(folder, embedder, numbers, source="/photos", before=""):
    """Save an index of drawn regions; the names of its images follow from their numbers."""
    made = Index.create(folder, embedder, source, "by hand")
    for n in numbers:
        made.add(f"{before}{n}.jpg", "", boxes(n), vectors(REGIONS, n))
    made.save()
    return made


@pytest.fixture
def shards(embedder, tmp_path):
    """Three indexes side by side, the second of nothing, and one index of all."""
    for name, numbers in (("a", range(10)), ("b", ()), ("c", range(10, IMAGES))):
        filled(tmp_path / "all" / name, embedder, numbers)
    return tmp_path / "all", filled(tmp_path / "one", embedder, range(IMAGES))


def same(found, expected):
    assert [hit.image for hit in found] == [hit.image for hit in expected]
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one.box, other.box)
        assert one.score == pytest.approx(other.score, abs=1e-6)


class TestSearch:
    @pytest.mark.parametrize("top", [1, 7, IMAGES, 100])
    def test_finds_what_one_index_finds(self, shards, top):
        folder, one = shards
        found = open_index(folder)
        assert len(found) == len(one) == IMAGES * REGIONS
        for (query,) in (vectors(1, seed) for seed in range(100, 110)):
            same(found.search_vector(query, top), one.search_vector(query, top))

    def test_by_an_image_and_a_box(self, shards):
        folder, one = shards
        pixels = trees.scene(3).image
        found = open_index(folder)
        same(found.search(pixels), one.search(pixels))
        same(found.search(pixels, box=(5, 5, 60, 60), top=3), one.search(pixels, box=(5, 5, 60, 60), top=3))

    def test_graphs_find_nearly_all(self, embedder, tmp_path, monkeypatch):
        pytest.importorskip("usearch", reason="needs the extra sppnet[search]")
        monkeypatch.setattr(neighbours, "MOST_LISTED", 12)
        for name, numbers in (("a", range(60)), ("b", range(60, 120))):
            filled(tmp_path / "all" / name, embedder, numbers)
        monkeypatch.setattr(neighbours, "MOST_LISTED", 10_000)
        one, found = filled(tmp_path / "one", embedder, range(120)), open_index(tmp_path / "all")
        assert all(place.suffix == ".usearch" for place in (tmp_path / "all").glob("*/*.usearch"))
        right = 0
        for (query,) in (vectors(1, seed) for seed in range(1000, 1020)):
            images = {hit.image for hit in one.search_vector(query, 10)}
            right += len(images & {hit.image for hit in found.search_vector(query, 10)})
        assert right >= 190

    def test_bad_queries_are_those_of_an_index(self, shards):
        with pytest.raises(SppnetError, match=r"found a vector \(7,\)"):
            open_index(shards[0]).search_vector(np.zeros(7, np.float32))

    def test_names_of_images_lie_below_the_folder_of_all(self, embedder, tmp_path):
        for name, numbers in (("a", range(3)), ("b", range(3))):
            filled(tmp_path / "all" / name, embedder, numbers, f"/photos/{name}")
        found = open_index(tmp_path / "all")
        (query,) = vectors(1, 5)
        assert found.source == "/photos"
        assert {h.image for h in found.search_vector(query)} == {
            f"{s}/{n}.jpg" for s in "ab" for n in range(3)
        }


class TestFolders:
    def test_a_file_names_shards_anywhere(self, shards, tmp_path):
        folder, one = shards
        write_shards(tmp_path / "named", [folder / "c", folder / "a"])
        assert json.loads((tmp_path / "named" / SHARDS).read_text())["shards"] == ["../all/c", "../all/a"]
        found = open_index(tmp_path / "named")
        (query,) = vectors(1, 100)
        same(found.search_vector(query), one.search_vector(query))

    def test_an_index_is_opened_as_one(self, shards):
        folder, one = shards
        assert isinstance(open_index(one.folder), Index)
        assert isinstance(open_index(folder), ShardedIndex)

    def test_another_shard_is_made_with_the_embedder_of_the_first(self, shards, embedder):
        folder, one = shards
        for place in (folder, one.folder):
            assert embedder_of(place).signature == embedder.signature

    def test_vectors_stay_on_disk(self, shards):
        found = open_index(shards[0])
        (_, kept), _ = found.shards[0]._vectors.arrays(), None
        assert isinstance(kept, np.memmap)


class TestBad:
    def test_no_shard(self, tmp_path):
        with pytest.raises(SppnetError, match=f"found no {MANIFEST}"):
            open_index(tmp_path)
        with pytest.raises(SppnetError, match="found no shard"):
            ShardedIndex([])
        with pytest.raises(SppnetError, match="found no index, expected folders of indexes"):
            write_shards(tmp_path / "named", [tmp_path])
        with pytest.raises(SppnetError, match="found no index, expected folders of indexes"):
            write_shards(tmp_path / "named", [])

    @pytest.mark.parametrize("suffix", [".safetensors", ".vectors.safetensors"])
    def test_a_damaged_shard_is_named(self, shards, suffix):
        folder, _ = shards
        path = folder / "c" / f"1{suffix}"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(SppnetError, match=f"c/1{suffix}: found a damaged or missing file"):
            open_index(folder)

    def test_a_shard_that_is_gone_is_named(self, shards, tmp_path):
        folder, _ = shards
        write_shards(tmp_path / "named", [folder / "a", folder / "c"])
        shutil.rmtree(folder / "c")
        with pytest.raises(SppnetError, match=r"all/c: found no index\.json"):
            open_index(tmp_path / "named")

    def test_shards_of_different_embedders_are_refused(self, shards):
        folder, _ = shards
        other = Embedder(scales=(64,), levels=(1,), pca=8).fit([trees.scene(n).image for n in range(11, 20)])
        filled(folder / "d", other, range(50, 52))
        with pytest.raises(SppnetError, match="all/d: made by another embedder"):
            open_index(folder)

    def test_an_image_in_two_shards_is_refused(self, shards, embedder):
        folder, _ = shards
        filled(folder / "d", embedder, [3])
        with pytest.raises(SppnetError, match=r"all/d: found '3\.jpg', which is in .*all/a, too"):
            open_index(folder)

    @pytest.mark.parametrize(
        "content", ["[]", "{}", '{"format": "sppnet-shards", "version": "1", "shards": []}', "3"]
    )
    def test_a_file_that_names_nothing_is_refused(self, tmp_path, content):
        (tmp_path / SHARDS).write_text(content)
        with pytest.raises(SppnetError, match=r"shards\.json: found other content"):
            shard_folders(tmp_path)

    def test_an_index_that_is_no_more_is_an_error_of_an_index(self, tmp_path):
        with pytest.raises(SppnetError, match=f"found no {MANIFEST}"):
            open_index(tmp_path)
