"""Images and boxes embedded into a file by one call: what it takes, what it tells, how it goes on."""

import numpy as np
import pytest

import trees
from sppnet.errors import SppnetError
from sppnet.retrieval.embed import embed
from sppnet.retrieval.embedder import Embedder
from sppnet.retrieval.vectors import VectorWriter, read_vectors


def embedder(**settings):
    return Embedder(**{"scales": (64,), "levels": (1,), **settings})


@pytest.fixture
def out(tmp_path):
    return tmp_path / "v.safetensors"


def test_a_folder(photos, out):
    done = embed(photos, out, embedder=embedder())
    assert (done.vectors, done.length, done.images, done.earlier) == (8, 1280, 8, 0)
    assert done.failures == done.notes == ()
    assert done.seconds > 0
    found = read_vectors(out)
    names = [*(f"{n}.png" for n in range(1, 7)), "more/7.png", "more/8.png"]
    assert found.names == tuple(str(photos / name) for name in names)
    for name, vector in zip(found.names, found.vectors, strict=True):
        assert np.array_equal(vector, embedder()(name))


def test_some_files_of_a_data_set_of_boxes(out, tmp_path):
    drawn = trees.voc_tree(tmp_path / "voc")["train"]
    chosen = [str(tmp_path / "voc" / "JPEGImages" / f"{name}.jpg") for name in sorted(drawn)[:2]]
    done = embed(chosen, out, boxes=tmp_path / "voc", split="train", embedder=embedder(), half=True)
    found = read_vectors(out)
    assert done.vectors == len(found) == sum(len(drawn[name].boxes) for name in sorted(drawn)[:2])
    assert found.vectors.dtype == np.float16
    assert found.labels == tuple(label for name in sorted(drawn)[:2] for label in drawn[name].labels)


def test_images_without_boxes_are_counted(out, tmp_path, photos):
    table = trees.write(tmp_path / "b.csv", f"path,x1,y1,x2,y2\n{photos}/1.png,5,5,50,90\n")
    done = embed([photos], out, boxes=table, embedder=embedder())
    assert (done.images, done.vectors) == (1, 1)
    assert "images without boxes, left out: 7" in done.notes
    with pytest.raises(SppnetError, match="found no box of the 2 images"):
        embed([photos / "more"], out, boxes=table, embedder=embedder())


def test_classes_give_labels_and_what_is_left_out_is_told(out, tmp_path):
    drawn = trees.class_tree(tmp_path / "data")
    (tmp_path / "data" / "disc" / "notes.txt").write_text("")
    done = embed(tmp_path / "data", out, embedder=embedder())
    found = read_vectors(out)
    assert sorted(zip(found.names, found.labels, strict=True)) == sorted((str(p), s) for p, s in drawn)
    assert len(done.notes) == 1


def test_the_projection_is_learned_on_a_copy_and_kept(photos, out):
    given = embedder(pca=3)
    assert embed(f"{photos}/*.png", out, embedder=given).length == 3
    assert not given.__sklearn_is_fitted__()
    before = read_vectors(out)
    done = embed(photos, out, embedder=given, append=True)
    assert (done.vectors, done.images, done.earlier) == (8, 8, 6)
    assert np.array_equal(read_vectors(out).vectors[:6], before.vectors)
    with pytest.raises(SppnetError, match=r'another embedder.*"flip": false.*expected.*"flip": true'):
        embed(photos, out, embedder=embedder(pca=3, flip=True), append=True)


def test_goes_on_after_it_was_stopped(photos, out, monkeypatch):
    plain = VectorWriter.add

    def stopped(self, name, *rest):
        if name.endswith("5.png"):
            self.flush()
            raise KeyboardInterrupt
        plain(self, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(VectorWriter, "add", stopped)
        with pytest.raises(KeyboardInterrupt):
            embed(f"{photos}/*.png", out, embedder=embedder(pca=3))
    with pytest.raises(SppnetError, match=r"parts of a run with .*1\.png; start that again"):
        embed(photos / "more", out, embedder=embedder(pca=3))
    done = embed(f"{photos}/*.png", out, embedder=embedder(pca=3))
    assert (done.vectors, done.earlier) == (6, 4)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_what_cannot_be_read_is_named(photos, out, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"broken")
    done = embed([photos / "1.png", tmp_path / "bad.png"], out, embedder=embedder())
    assert (done.vectors, done.images) == (1, 2)
    assert "bad.png" in done.failures[0]
    before = out.read_bytes()
    done = embed(tmp_path / "bad.png", out, embedder=embedder())
    assert (done.vectors, len(done.failures)) == (0, 1)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("sources", "settings", "says"),
    [
        ([], {}, "found no image, expected image files, folders or patterns, or boxes"),
        (["1.png"], {"out": "v.npz"}, "expected .safetensors"),
        (["1.png"], {"boxes": "x", "embedder": embedder(view="crop")}, "found boxes for the view 'crop'"),
        (["1.png", "../own.safetensors"], {"out": "own.safetensors"}, "found a file that is to be read"),
        (["1.png"], {"embedder": embedder(pca=2)}, "found 1 vectors to learn 2 components"),
    ],
)
def test_refused(sources, settings, says, photos, tmp_path):
    (tmp_path / "own.safetensors").write_bytes(b"x")
    given = [photos / s if s.endswith("png") else tmp_path / s.removeprefix("../") for s in sources]
    out = tmp_path / settings.get("out", "v.safetensors")
    options = {"embedder": embedder()} | {k: v for k, v in settings.items() if k != "out"}
    with pytest.raises(SppnetError, match=says):
        embed(given, out, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["own.safetensors"]


def test_a_file_where_the_parts_are_to_be(photos, out):
    out.with_name(f"{out.name}.parts").write_text("")
    with pytest.raises(OSError, match="expected a folder"):
        embed(photos, out, embedder=embedder())


def test_tells_how_far_it_is(photos, out):
    told = []
    embed(
        photos,
        out,
        embedder=embedder(pca=3),
        track=lambda items, text: told.append((text, len(items))) or items,
    )
    assert told == [("Sampling", 8), ("Learning the projection", 1), ("Embedding", 8)]
