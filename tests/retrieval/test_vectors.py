import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

import trees
from sppnet.errors import SppnetError
from sppnet.retrieval import vectors as module
from sppnet.retrieval.embedder import Embedder
from sppnet.retrieval.tables import VectorTable, join_tables
from sppnet.retrieval.vectors import VectorWriter, join_files, parts_folder, read_vectors, write_vectors

SMALL = {"scales": (64,), "levels": (1,)}


@pytest.fixture(scope="module")
def embedder():
    return Embedder(**SMALL)


@pytest.fixture(scope="module")
def scenes():
    return [trees.scene(n).image for n in range(1, 7)]


def table(names=("a.jpg", "a.jpg", "b é\n.jpg"), seed=0, length=6, dtype=np.float32):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(len(names), length)).astype(dtype)
    boxes = rng.uniform(size=(len(names), 4)).astype(np.float32)
    return VectorTable(values, tuple(names), boxes, tuple("cat" if i % 2 else "" for i in range(len(names))))


def same(one, other):
    return (
        np.array_equal(one.vectors, other.vectors)
        and one.vectors.dtype == other.vectors.dtype
        and np.array_equal(one.boxes, other.boxes)
        and (one.names, one.labels) == (other.names, other.labels)
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_what_is_written_is_read(dtype, embedder, tmp_path):
    known = table(dtype=dtype)
    write_vectors(tmp_path / "v.safetensors", known, embedder)
    assert same(read_vectors(tmp_path / "v.safetensors"), known)
    assert Embedder.load(tmp_path / "v.safetensors").signature == embedder.signature


def test_names_of_any_bytes(embedder, tmp_path):
    known = table(names=("\udcff.jpg", "x"))
    write_vectors(tmp_path / "v.safetensors", known, embedder)
    assert read_vectors(tmp_path / "v.safetensors").names == known.names


def test_other_files_are_refused(embedder, tmp_path):
    embedder.save(tmp_path / "e.safetensors")
    (tmp_path / "n.safetensors").write_bytes(b"nothing at all")
    for name, says in (("e", "found sppnet-embedder"), ("n", "expected an sppnet-vectors file")):
        with pytest.raises(ValueError, match=says):
            read_vectors(tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError):
        read_vectors(tmp_path / "none.safetensors")


def test_truncated_files_are_refused(embedder, tmp_path):
    path = tmp_path / "v.safetensors"
    write_vectors(path, table(), embedder)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="expected an sppnet-vectors file"):
        read_vectors(path)


def test_mixed_lengths_are_refused():
    with pytest.raises(ValueError, match="found vectors of 6 of float32, 7 of float32, expected one length"):
        join_tables([table(), table(length=7)])
    with pytest.raises(ValueError, match="no vectors"):
        join_tables([])


class TestWriter:
    def fill(self, writer, names):
        for name in names:
            writer.add(
                name, np.full((2, 6), ord(name[0]), np.float32), np.ones((2, 4), np.float32), ("", "k")
            )

    def test_makes_one_file_and_no_other(self, embedder, tmp_path):
        path = tmp_path / "v.safetensors"
        writer = VectorWriter(path, embedder, part_bytes=96)
        self.fill(writer, "abcde")
        assert writer.finish() == 10
        assert [p.name for p in tmp_path.iterdir()] == ["v.safetensors"]
        found = read_vectors(path)
        assert found.names == tuple(name for name in "abcde" for _ in range(2))
        assert found.vectors[:, 0].tolist() == [ord(name) for name in found.names]
        assert found.labels == ("", "k") * 5

    def test_goes_on_from_its_parts(self, embedder, tmp_path):
        path = tmp_path / "v.safetensors"
        self.fill(VectorWriter(path, embedder, part_bytes=96), "abc")  # and is killed: c is not written yet
        writer = VectorWriter(path, embedder, part_bytes=96)
        assert writer.done.keys() == writer.part_names == {"a", "b"}
        assert writer.done["a"].tolist() == [[1] * 4] * 2
        self.fill(writer, "cd")
        assert writer.finish() == 8
        assert read_vectors(path).names[::2] == ("a", "b", "c", "d")

    def test_appends(self, embedder, tmp_path):
        path = tmp_path / "v.safetensors"
        for names in ("ab", "c"):
            writer = VectorWriter(path, embedder, append=True)
            assert writer.done.keys() == (set() if names == "ab" else {"a", "b"})
            self.fill(writer, names)
            writer.finish()
        assert read_vectors(path).names[::2] == ("a", "b", "c")

    def test_half_precision(self, embedder, tmp_path):
        writer = VectorWriter(tmp_path / "v.safetensors", embedder, half=True)
        self.fill(writer, "a")
        writer.finish()
        assert read_vectors(tmp_path / "v.safetensors").vectors.dtype == np.float16

    def test_refuses_another_precision_at_once(self, embedder, tmp_path):
        path = tmp_path / "v.safetensors"
        writer = VectorWriter(path, embedder)
        self.fill(writer, "a")
        writer.flush()
        with pytest.raises(ValueError, match="found vectors of float32, expected float16"):
            VectorWriter(path, embedder, half=True)

    def test_killed_between_the_file_and_its_parts(self, embedder, tmp_path, monkeypatch):
        path = tmp_path / "v.safetensors"
        writer = VectorWriter(path, embedder, append=True)
        self.fill(writer, "ab")
        with monkeypatch.context() as patch:
            patch.setattr(module.shutil, "rmtree", lambda _: None)
            writer.finish()
        again = VectorWriter(path, embedder, append=True)
        self.fill(again, "c")
        assert again.finish() == 6
        assert read_vectors(path).names[::2] == ("a", "b", "c")

    def test_nothing_is_written_before_there_is_a_row(self, embedder, tmp_path):
        VectorWriter(tmp_path / "v.safetensors", embedder)
        assert not list(tmp_path.iterdir())

    def test_refuses_what_another_embedder_made(self, embedder, tmp_path):
        path = tmp_path / "v.safetensors"
        writer = VectorWriter(path, embedder)
        self.fill(writer, "a")
        writer.flush()
        other = Embedder(**{**SMALL, "levels": (2, 1)})
        both = f"{re.escape(embedder.signature)}.*expected {re.escape(other.signature)}"
        with pytest.raises(ValueError, match=both):
            VectorWriter(path, other)
        writer.finish()
        with pytest.raises(ValueError, match=both):
            VectorWriter(path, other, append=True)

    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    def test_joins_files_without_holding_them_byte_for_byte(self, dtype, scenes, tmp_path):
        learned = Embedder(**SMALL, pca=2).fit(scenes)
        tables = [table(seed=seed, dtype=dtype) for seed in range(3)]
        tables.append(table(names=('\udcff é "quoted".jpg',) * 5, seed=4, dtype=dtype))
        files = [tmp_path / f"{i}.safetensors" for i in range(len(tables))]
        for file, one in zip(files, tables, strict=True):
            write_vectors(file, one, learned, projection=False)
        write_vectors(tmp_path / "expected.safetensors", join_tables(tables), learned)
        assert join_files(tmp_path / "found.safetensors", files, learned) == 14
        found = tmp_path / "found.safetensors"
        assert found.read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
        assert same(read_vectors(found), join_tables(tables))
        # Also onto one of them.
        join_files(files[0], files, learned)
        assert files[0].read_bytes() == found.read_bytes()
        with pytest.raises(SppnetError, match="no vectors, expected one length and type"):
            join_files(found, [], learned)
        write_vectors(files[0], table(length=7, dtype=dtype), learned)
        with pytest.raises(SppnetError, match=r"found vectors of 6 of float.., 7 of float.., expected one"):
            join_files(found, files, learned)
        assert found.read_bytes() == (tmp_path / "expected.safetensors").read_bytes()

    def test_a_full_disk_leaves_what_was_there(self, embedder, tmp_path, monkeypatch):
        path = tmp_path / "v.safetensors"
        writer = VectorWriter(path, embedder)
        self.fill(writer, "a")
        writer.finish()
        before = path.read_bytes()

        writer = VectorWriter(path, embedder, append=True)
        self.fill(writer, "b")
        writer.flush()
        monkeypatch.setattr(module, "atomic_path", lambda _: nullcontext(Path("/dev/full")))
        with pytest.raises(OSError, match=r"v\.safetensors: cannot write \(No space left on device\)"):
            writer.finish()
        assert path.read_bytes() == before
        monkeypatch.undo()
        again = VectorWriter(path, embedder, append=True)
        assert again.done.keys() == {"a", "b"}
        assert again.finish() == 4
        assert not parts_folder(path).exists()
