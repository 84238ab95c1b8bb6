"""The options of a cluster, and shards, end to end; the work of workers is tested in tests/cluster."""

import pytest

import trees
from commands import fails, succeeds
from sppnet import errors
from sppnet.retrieval.index import Index
from sppnet.retrieval.vectors import read_vectors

SMALL = ("--scales", "64", "--levels", "1")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(5):
        trees.save(folder / f"{i}.png", trees.scene(i).image)
    return folder


def test_shards_become_a_file_and_an_index(photos, tmp_path):
    said = succeeds("embed", photos, "--out", "v.parquet", "--per-shard", "2", *SMALL).out
    assert said.startswith("v.parquet: 5 vectors of 1280 numbers")
    again = succeeds("embed", photos, "--out", "v.parquet", "--per-shard", "2", *SMALL)
    assert "5 of 5 images are there already" in again.err
    assert succeeds("embed", "v.parquet", "--out", "v.safetensors").out.startswith("v.safetensors: 5 vectors")
    assert len(read_vectors(tmp_path / "v.safetensors")) == 5
    assert "5 regions of 5 images" in succeeds("index", "v.parquet", "--out", "photos.index").out
    assert len(Index.open(tmp_path / "photos.index")) == 5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--workers", "2"), "found --workers without --cluster"),
        (("--cluster", "somewhere"), "found no address of a cluster"),
        (("--cluster", "127.0.0.1:9"), "127.0.0.1:9: found no cluster there"),
    ],
)
def test_a_cluster_that_cannot_be_is_one_line(options, says, photos):
    fails("propose", photos, "--out", "w.npz", "--proposals", "dense", *options, says=[says])


def test_without_ray_the_extra_is_named(photos, monkeypatch):
    monkeypatch.setattr(errors, "has_extra", lambda extra: extra != "ray")
    says = ['pip install "sppnet[ray]"']
    fails("propose", photos, "--out", "w.npz", "--cluster", "local", says=says)
    fails("embed", photos, "--out", "v.parquet", *SMALL, says=says)
