import json

import numpy as np
import pyarrow
import pytest
from pyarrow import dataset, parquet

import trees
from sppnet.errors import SppnetError
from sppnet.retrieval import shards as module
from sppnet.retrieval.embed import embed
from sppnet.retrieval.embedder import Embedder
from sppnet.retrieval.index import Index
from sppnet.retrieval.shards import is_shards, read_shards, shard_tables
from sppnet.retrieval.vectors import join_shards, read_vectors

SMALL = {"scales": (64,), "levels": (1,)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Seven drawn photos; the last two cannot be read."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(7):
        trees.save(folder / f"{i}.png", trees.scene(i).image)
    for i in (5, 6):
        (folder / f"{i}.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def shards(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "vectors.parquet"
    embed(photos, out, embedder=Embedder(**SMALL), per_shard=2)
    return out


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards_hold_what_a_file_holds(photos, shards, tmp_path):
    result = embed(photos, tmp_path / "file.safetensors", embedder=Embedder(**SMALL))
    expected, table = read_vectors(tmp_path / "file.safetensors"), read_shards(shards)
    assert len(result.failures) == 2
    assert (table.names, table.labels) == (expected.names, expected.labels)
    assert np.array_equal(table.vectors, expected.vectors)
    assert np.array_equal(table.boxes, expected.boxes)
    assert join_shards(shards, tmp_path / "joined.safetensors") == 5
    assert (tmp_path / "joined.safetensors").read_bytes() == (tmp_path / "file.safetensors").read_bytes()


def test_other_programs_read_them_as_one_table(shards):
    table = dataset.dataset(shards).to_table()
    assert table.column_names == ["image", "box", "label", "vector"]
    assert table.num_rows == 5
    assert table.schema.field("vector").type == pyarrow.list_(pyarrow.float32(), 1280)


def test_a_shard_of_unreadable_images_is_empty_and_read(shards):
    tables = list(shard_tables(shards))
    assert [len(table) for table in tables] == [2, 2, 1, 0]
    assert tables[-1].vectors.shape == (0, 1280)


def test_half_precision(photos, tmp_path):
    out = tmp_path / "half.parquet"
    result = embed(photos, out, embedder=Embedder(**SMALL), half=True)
    assert (result.vectors, result.images) == (5, 7)
    assert read_shards(out).vectors.dtype == np.float16


def test_boxes_have_rows_of_their_own(tmp_path):
    trees.voc_tree(tmp_path / "voc", {"train": 3})
    out, file = tmp_path / "boxes.parquet", tmp_path / "boxes.safetensors"
    for place in (out, file):
        embed([], place, boxes=tmp_path / "voc", embedder=Embedder(**SMALL), per_shard=2)
    assert read_shards(out).labels == read_vectors(file).labels
    assert np.array_equal(read_shards(out).boxes, read_vectors(file).boxes)


def test_a_run_that_met_a_full_disk_goes_on(photos, shards, tmp_path, monkeypatch):
    out, write, written = tmp_path / "vectors.parquet", parquet.write_table, []

    def full(table, path, **options):
        if len(written) == 2:
            path.write_bytes(b"half a shard")
            raise OSError(28, "No space left on device")
        written.append(path)
        write(table, path, **options)

    monkeypatch.setattr(parquet, "write_table", full)
    with pytest.raises(OSError, match=r"part-000002.parquet: cannot write \(No space left"):
        embed(photos, out, embedder=Embedder(**SMALL), per_shard=2)
    assert sorted(path.name for path in out.glob("*")) == [
        *("_embedder.safetensors", "_run.json", "part-000000.parquet", "part-000001.parquet"),
    ]
    with pytest.raises(SppnetError, match=r"found 2 of 4 shards, expected part-000002.parquet, too"):
        read_shards(out)
    monkeypatch.setattr(parquet, "write_table", write)
    result = embed(photos, out, embedder=Embedder(**SMALL), per_shard=2)
    assert (result.earlier, result.vectors, len(result.failures)) == (4, 5, 2)
    assert content(out) == content(shards)
    again = embed(photos, out, embedder=Embedder(**SMALL), per_shard=2)
    assert (again.earlier, again.vectors, len(again.failures)) == (7, 5, 2)


@pytest.mark.parametrize(
    ("settings", "options", "says"),
    [
        ({**SMALL, "levels": (2,)}, {}, r'embedder: .*"levels": \[1\].*; expected .*"levels": \[2\]'),
        (SMALL, {"half": True}, "precision: float32; expected float16"),
        (SMALL, {"per_shard": 3}, "images of a shard: 2; expected 3"),
    ],
)
def test_shards_of_another_run_are_refused(settings, options, says, photos, shards):
    before = content(shards)
    with pytest.raises(SppnetError, match=f"found the shards of another run, {says}"):
        embed(photos, shards, embedder=Embedder(**settings), **{"per_shard": 2, **options})
    assert content(shards) == before


def test_shards_of_other_photos_are_refused(photos, shards, tmp_path):
    with pytest.raises(SppnetError, match="images: 7; expected 1"):
        embed(photos / "0.png", shards, embedder=Embedder(**SMALL), per_shard=2)
    out = tmp_path / "vectors.parquet"
    embed(photos, out, embedder=Embedder(**SMALL), per_shard=3)
    (out / "part-000000.parquet").write_bytes((shards / "part-000000.parquet").read_bytes())
    with pytest.raises(SppnetError, match="found the shard of another run"):
        embed(photos, out, embedder=Embedder(**SMALL), per_shard=3)


def test_bad_places(photos, shards, tmp_path):
    embedder = Embedder(**SMALL)
    (tmp_path / "mine.parquet").mkdir()
    (tmp_path / "mine.parquet" / "notes.txt").write_text("mine")
    with pytest.raises(SppnetError, match=r"mine.parquet: found notes.txt"):
        embed(photos, tmp_path / "mine.parquet", embedder=embedder)
    with pytest.raises(SppnetError, match="to append to, expected a file"):
        embed(photos, shards, embedder=embedder, append=True)
    with pytest.raises(SppnetError, match=r"expected \.safetensors, or \.parquet for a folder of shards"):
        embed(photos, tmp_path / "vectors.txt", embedder=embedder)
    with pytest.raises(SppnetError, match="found no shards"):
        read_shards(tmp_path)
    assert not is_shards(tmp_path)


def test_a_damaged_shard_is_named(photos, tmp_path):
    out = tmp_path / "vectors.parquet"
    embed(photos, out, embedder=Embedder(**SMALL))
    (out / "part-000000.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(SppnetError, match=r"part-000000.parquet: found a damaged shard"):
        read_shards(out)
    with pytest.raises(SppnetError, match=r"part-000000.parquet: found no shard .*; remove it"):
        embed(photos, out, embedder=Embedder(**SMALL))


def test_a_projection_is_learned_once_and_kept(photos, tmp_path):
    out, file = tmp_path / "vectors.parquet", tmp_path / "vectors.safetensors"
    embed(photos, out, embedder=Embedder(**SMALL, pca=3))
    (out / "part-000000.parquet").unlink()
    embed(photos, out, embedder=Embedder(**SMALL, pca=3))
    embed(photos, file, embedder=Embedder.load(out / module.EMBEDDER))
    assert np.array_equal(read_shards(out).vectors, read_vectors(file).vectors)


def test_an_index_of_shards_finds_what_lies_in_them(photos, shards, tmp_path):
    index = Index.of_shards(shards, tmp_path / "index")
    assert (len(index), len(index.images)) == (5, 5)
    best = Index.open(tmp_path / "index").search(photos / "3.png", top=1)
    assert best[0].image == str(photos / "3.png")
    assert best[0].score > 0.999


def test_the_run_tells_what_it_is_of(shards):
    about = json.loads((shards / "_run.json").read_text())
    assert (about["format"], about["images"], about["images of a shard"]) == ("sppnet-shards", 7, 2)
