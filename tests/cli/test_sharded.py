"""Indexes side by side and as Parquet, from the command line."""

import shutil

import pytest

import trees
from commands import content, fails, read_json, succeeds
from sppnet.retrieval.index import Index

INDEX = ("--scales", "64", "--levels", "1", "--stride", "32", "--pca", "8", "--windows", "6")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Photos in two folders, an index of all, and one of each like it; not to be changed."""
    root = tmp_path_factory.mktemp("shards")
    for n in range(1, 9):
        trees.save(root / "photos" / ("a" if n < 5 else "b") / f"{n}.png", trees.scene(n).image)
    one = root / "one"
    succeeds("index", root / "photos", "--out", one, *INDEX)
    for name in "ab":
        succeeds(
            "index", root / "photos" / name, "--out", root / "all" / name, "--like", one, "--windows", "6"
        )
    return root


@pytest.fixture
def own(made, tmp_path, monkeypatch):
    """A copy that may be changed, where the command runs."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "own"))


@pytest.mark.usefixtures("own")
def test_a_folder_of_indexes_is_searched_like_one():
    found = []
    for store in ("one", "all"):
        succeeds("search", store, "--image", "photos/b/6.png", "--json", "found.json", "--out", "found")
        found.append(read_json("found.json")["hits"])
    names, other_names = ([hit["image"] for hit in hits] for hits in found)
    assert names == other_names
    assert names[0] == "b/6.png"
    for one, other in zip(*found, strict=True):
        assert other["box"] == one["box"]
        assert other["score"] == pytest.approx(one["score"], abs=1e-6)


@pytest.mark.usefixtures("own")
def test_a_damaged_shard_is_named():
    (path,) = trees.Path("all/b").glob("*.vectors.safetensors")
    path.write_bytes(path.read_bytes()[:-2])
    fails("search", "all", "--image", "photos/b/6.png", says=[path, "damaged"])


@pytest.mark.usefixtures("own")
def test_shards_with_projections_of_their_own_are_refused():
    shutil.rmtree("all/b")
    succeeds("index", "photos/b", "--out", "all/b", *INDEX)
    fails("search", "all", "--image", "photos/b/6.png", says=["all/b", "made by another embedder"])


@pytest.mark.usefixtures("own")
def test_like_takes_no_settings_beside_it():
    fails("index", "photos/b", "--out", "new", "--like", "one", "--pca", "8", says=["--like one", "--pca"])
    fails("index", "photos/b", "--out", "new", "--like", "none", says=["none"])


@pytest.mark.usefixtures("own")
def test_export_writes_what_the_index_holds():
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra sppnet[ray]")
    like = ("photos/a", "--out", "all/a", "--like", "one", "--windows", "6")
    outcome = succeeds("index", *like, "--export", "a.parquet")
    index = Index.open("all/a")
    assert f"a.parquet: {len(index)} regions" in outcome.out
    table = parquet.read_table("a.parquet")
    assert table.num_rows == len(index)
    assert set(table["image"].to_pylist()) == set(index.images)
    succeeds("index", *like, "--export", "files")
    assert parquet.read_table("files").equals(table)
    before = content()
    fails("index", *like, "--export", "files", says=["files", "found a folder with files in it"])
    fails("index", *like, "--export", "nowhere/a.parquet", says=["nowhere"])
    assert content() == before
