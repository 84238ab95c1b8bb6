from pathlib import Path

import numpy as np
import pytest

import trees
from sppnet.errors import ImageError, SppnetError
from sppnet.images import find_images, image_size, read_image
from sppnet.remote import address_of, listed
from sppnet.retrieval.embed import embed
from sppnet.retrieval.embedder import Embedder
from sppnet.retrieval.index import Index
from sppnet.retrieval.vectors import read_vectors

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def photos(tmp_path):
    """A folder of drawn photos, and the same in a file system in memory."""
    memory = fsspec.filesystem("memory")
    for i, name in enumerate(("a.png", "below/b.jpg", ".hidden.png", "notes.txt")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("no photo")
        else:
            trees.save(path, trees.scene(i).image)
        memory.pipe(f"/photos/{name}", path.read_bytes())
    yield tmp_path / "photos"
    memory.rm("/photos", recursive=True)


@pytest.mark.parametrize(
    ("path", "address"),
    [
        ("s3://bucket/a b/c.jpg", "s3://bucket/a b/c.jpg"),
        ("file:///data/c.jpg", "file:///data/c.jpg"),
        ("gs://bucket", "gs://bucket"),
        ("/data/c.jpg", None),
        ("data/s3/c.jpg", None),
        ("c:/data/c.jpg", None),
        ("C:/data/c.jpg", None),
    ],
)
def test_a_path_keeps_an_address(path, address):
    assert address_of(path) == address
    assert address_of(Path(path)) == address


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_photos_at_addresses_are_those_of_the_folder(photos, scheme):
    place = "memory://photos" if scheme == "memory" else f"file://{photos}"
    found = find_images([place])
    assert [path.name for path in found.paths] == ["a.png", "b.jpg"]
    assert "txt" in found.notes[0]
    for path in found.paths:
        local = photos / ("a.png" if path.name == "a.png" else "below/b.jpg")
        assert np.array_equal(read_image(path), read_image(local))
        assert image_size(path) == image_size(local)
    assert find_images([f"{place}/*.png"]).paths == [found.paths[0]]
    assert find_images([f"{place}/below/b.jpg"]).paths == [found.paths[1]]


def test_vectors_and_indices_of_addresses(photos, tmp_path):
    embedder = Embedder(scales=(64,), levels=(1,))
    embed("memory://photos", tmp_path / "there.safetensors", embedder=embedder)
    embed(photos, tmp_path / "here.safetensors", embedder=embedder)
    here, there = read_vectors(tmp_path / "here.safetensors"), read_vectors(tmp_path / "there.safetensors")
    assert np.array_equal(here.vectors, there.vectors)
    built = [
        Index.build("memory://photos", tmp_path / "index", embedder=embedder, proposals="none")
        for _ in range(2)
    ]
    assert built[1].source == "memory://photos"
    assert sorted(built[0].images) == ["a.png", "below/b.jpg"]
    assert (built[1].update.new, built[1].update.changed) == ((), ())


def test_what_is_wrong_with_an_address(photos):
    with pytest.raises(SppnetError, match="memory://none: found no image"):
        find_images(["memory://none"])
    with pytest.raises(FileNotFoundError, match="found no such file"):
        read_image("memory://photos/c.png")
    with pytest.raises(ImageError, match="found a file that starts with"):
        read_image("memory://photos/notes.txt")
    with pytest.raises(SppnetError, match="nosuch://a: found an address that cannot be read"):
        listed("nosuch://a")
