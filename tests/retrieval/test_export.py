"""An index as Parquet, read back by pyarrow."""

import numpy as np
import pytest

import trees
from sppnet.errors import SppnetError
from sppnet.retrieval import export, neighbours
from sppnet.retrieval.embedder import Embedder
from sppnet.retrieval.export import export_parquet
from sppnet.retrieval.index import Index

parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra sppnet[ray]")
COLUMNS = ["id", "image", "x1", "y1", "x2", "y2", "vector"]


@pytest.fixture(params=["listed", "graph"])
def index(request, tmp_path, monkeypatch):
    """Twelve images of some regions each, one of which was removed, in either way to keep vectors."""
    if request.param == "graph":
        pytest.importorskip("usearch", reason="needs the extra sppnet[search]")
        monkeypatch.setattr(neighbours, "MOST_LISTED", 12)
    embedder = Embedder(scales=(64,), levels=(1,), pca=8).fit([trees.scene(n).image for n in range(1, 10)])
    made = Index.create(tmp_path / "index", embedder, "photos", "by hand")
    for n in range(12):
        made.add(name(n), "", boxes(n), vectors(n))
    made.remove([name(5)])
    return made


def name(n):
    return f"caf\xe9 {n}.jpg"


def boxes(n):
    return np.arange(4 * (n % 4), dtype=np.float32).reshape(-1, 4) + n


def vectors(n):
    found = np.random.default_rng(n).normal(size=(n % 4, 8)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def agree(table):
    """Compare rows, whatever their files, with what was added."""
    expected = [(n, k) for n in range(12) if n != 5 for k in range(n % 4)]
    assert table.column_names == COLUMNS
    assert table["id"].to_pylist() == list(range(len(expected)))
    assert table["image"].to_pylist() == [name(n) for n, _ in expected]
    edges = np.stack([table[edge].to_numpy() for edge in ("x1", "y1", "x2", "y2")], axis=1)
    assert np.array_equal(edges, [boxes(n)[k] for n, k in expected])
    kept = np.array([vectors(n)[k] for n, k in expected]).astype(np.float16)
    np.testing.assert_allclose(np.array(table["vector"].to_pylist()), kept, atol=1e-6)
    assert str(table.schema.field("vector").type).startswith("fixed_size_list<")
    assert str(table.schema.field("vector").type).endswith("[8]")


def test_a_file_comes_back(index, tmp_path):
    assert export_parquet(index, tmp_path / "i.parquet") == len(index) == 17
    table = parquet.read_table(tmp_path / "i.parquet")
    agree(table)
    about = table.schema.metadata
    assert about[b"sppnet.embedder"].decode() == index.embedder.signature
    assert about[b"sppnet.source"] == b"photos"


def test_a_saved_index_gives_the_same(index, tmp_path):
    index.save()
    export_parquet(Index.open(tmp_path / "index", mapped=True), tmp_path / "i.parquet")
    agree(parquet.read_table(tmp_path / "i.parquet"))


def test_a_folder_of_files_is_one_table(index, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_FILE", 7)
    monkeypatch.setattr(export, "_BLOCK", 3)
    export_parquet(index, tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 3
    agree(parquet.read_table(tmp_path / "out"))


def test_an_index_of_nothing_is_a_file_of_no_rows(index, tmp_path):
    index.remove(list(index.images))
    assert export_parquet(index, tmp_path / "i.parquet") == 0
    assert parquet.read_table(tmp_path / "i.parquet").column_names == COLUMNS
    export_parquet(index, tmp_path / "out")
    assert parquet.read_table(tmp_path / "out").num_rows == 0


def test_what_cannot_be_written_is_said(index, tmp_path, monkeypatch):
    with pytest.raises(OSError, match="nowhere"):
        export_parquet(index, tmp_path / "nowhere" / "i.parquet")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(OSError, match="found a folder with files in it"):
        export_parquet(index, tmp_path / "full")
    monkeypatch.setattr("sppnet.errors.find_spec", lambda name: None)
    with pytest.raises(SppnetError, match=r"writing Parquet needs .*sppnet\[ray\]"):
        export_parquet(index, tmp_path / "i.parquet")
