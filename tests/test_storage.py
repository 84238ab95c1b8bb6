import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sppnet.errors import SppnetError
from sppnet.storage import (
    atomic_folder,
    atomic_path,
    check_folder,
    check_writable,
    digest_of,
    file_format,
    map_tensors,
    numbered_lines,
    read_checkpoint,
    read_json,
    read_metadata,
    read_text,
    write_tensors,
)

TENSORS = {
    "b": torch.arange(6).reshape(2, 3).T,
    "a": torch.zeros(0),
    "step": torch.tensor(7.0),
    "half": torch.tensor([0.5, -2], requires_grad=True).half(),
}


class TestWriting:
    def test_a_failed_write_leaves_the_old_file_alone(self, tmp_path):
        path = tmp_path / "state.txt"
        path.write_text("old")

        def fail():
            with atomic_path(path) as temporary:
                temporary.write_text("half")
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            fail()
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("state.txt", "old")]
        with atomic_path(path) as temporary:
            assert temporary.suffix == ".txt"
            temporary.write_text("new")
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("state.txt", "new")]

    def test_only_files_are_replaced(self, tmp_path):
        with pytest.raises(OSError, match="found a folder or a device"), atomic_path(tmp_path):
            pass

    def test_places_are_checked_before_work(self, tmp_path):
        check_writable(tmp_path / "new.txt")
        (tmp_path / "old.txt").write_text("old")
        check_writable(tmp_path / "old.txt")
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("old.txt", "old")]
        with pytest.raises(OSError, match=r"out.txt: cannot write \(No such file or directory\)"):
            check_writable(tmp_path / "gone" / "out.txt")
        with pytest.raises(OSError, match="found a folder or a device"):
            check_writable(tmp_path)

    def test_folders_are_checked_before_work(self, tmp_path):
        (tmp_path / "photos").mkdir()
        for place in ("photos", "new", "new/photos", "photos/a/b"):
            check_folder(tmp_path / place)
        assert [p.name for p in tmp_path.rglob("*")] == ["photos"]
        (tmp_path / "file").write_text("old")
        for place in ("file", "file/a", "file/a/b"):
            with pytest.raises(OSError, match=r"file: found a file, expected a folder"):
                check_folder(tmp_path / place)
        with pytest.raises(OSError, match=r"^/proc\S*: cannot write \("):
            check_folder(Path("/proc/none/found"))


class TestReadingText:
    def test_json_errors_name_the_line(self, tmp_path):
        path = tmp_path / "a.json"
        path.write_text('{"a": 1,\n "b": }')
        with pytest.raises(ValueError, match=r"a.json:2: found no JSON"):
            read_json(path)
        path.write_bytes(b'{"\xff": 1}')
        with pytest.raises(ValueError, match=r"a.json: found bytes that are no text"):
            read_json(path)
        for text in ("[" * 100_000, f'{{"a": {"1" * 5000}}}'):
            path.write_text(text)
            with pytest.raises(ValueError, match=r"^\S+a.json: found no JSON that can be read"):
                read_json(path)

    def test_lines_are_counted_with_the_blank_ones(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_text("\ufeffone\n\n  two \r\n", encoding="utf-8")
        assert list(numbered_lines(path)) == [(f"{path}:1", "one"), (f"{path}:3", "two")]


class TestTensors:
    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "a.safetensors"
        write_tensors(path, TENSORS, {"version": "3", "format": "kind", "z": "\u00e4", "b": "1"})
        return path

    def test_round_trip(self, path):
        assert read_metadata(path, "kind", "3") == {"format": "kind", "version": "3", "b": "1", "z": "\u00e4"}
        assert file_format(path) == "kind"
        facts, tensors = read_checkpoint(path, "kind", "3")
        assert facts == read_metadata(str(path), "kind", "3")
        assert tensors.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            np.testing.assert_array_equal(tensors[name], tensor.detach(), strict=True)

    def test_arrays_and_tensors_give_equal_files(self, path, tmp_path):
        arrays = {name: tensor.detach().numpy() for name, tensor in TENSORS.items()}
        write_tensors(tmp_path / "b", arrays, {"version": "3", "format": "kind", "z": "\u00e4", "b": "1"})
        assert (tmp_path / "b").read_bytes() == path.read_bytes()

    def test_a_digest_is_that_of_the_numbers_in_their_order(self):
        one, two = np.float32([[1, 2], [3, 4]]), np.array(5)
        expected = hashlib.sha256(np.float32([1, 3, 2, 4]).tobytes() + two.tobytes()).hexdigest()
        assert digest_of({"a": one.T, "b": two}) == expected
        assert digest_of({"b": two, "a": one.T}) != expected

    def test_equal_content_gives_equal_files(self, path, tmp_path):
        for turn in range(5):
            again = tmp_path / f"{turn}.safetensors"
            facts = {"b": "1", "z": "\u00e4", "format": "kind", "version": "3"}
            write_tensors(again, TENSORS, facts)
            assert again.read_bytes() == path.read_bytes()
        assert load_file(again)["b"].tolist() == [[0, 3], [1, 4], [2, 5]]

    @pytest.mark.parametrize(
        ("expected", "version", "message"),
        [
            ("other", "3", "found kind 3, expected other 3"),
            ("kind", "2", r"found kind 3, expected kind 2 \(made by another version of sppnet\)"),
        ],
    )
    def test_other_marks(self, path, expected, version, message):
        with pytest.raises(SppnetError, match=f"a.safetensors: {message}$"):
            read_metadata(path, expected, version)
        with pytest.raises(SppnetError, match=f"a.safetensors: {message}; remove it to start anew$"):
            read_checkpoint(path, expected, version)

    def test_files_of_others(self, tmp_path):
        path = tmp_path / "b.safetensors"
        save_file({"b": torch.zeros(3)}, path)
        with pytest.raises(
            SppnetError, match="found a safetensors file without a format mark, expected kind 3"
        ):
            read_metadata(path, "kind", "3")
        assert file_format(path) is None
        path.write_text(json.dumps({}))
        with pytest.raises(SppnetError, match=r"found no safetensors file \(.*\), expected an kind file"):
            read_metadata(path, "kind", "3")
        assert file_format(path) is None

    def test_cut_short(self, path):
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(SppnetError, match=r"found no safetensors file .*; remove it to start anew$"):
            read_checkpoint(path, "kind", "3")

    def test_no_file(self, tmp_path):
        for read in (read_metadata, read_checkpoint):
            with pytest.raises(FileNotFoundError, match="gone: found no such file, expected an kind file"):
                read(tmp_path / "gone", "kind", "3")
        assert file_format(tmp_path / "gone") is None
        assert file_format(tmp_path) is None


class TestAtomicFolder:
    @pytest.mark.parametrize("made", [False, True])
    def test_it_appears_when_all_is_written(self, made, tmp_path):
        folder = tmp_path / "out"
        if made:
            folder.mkdir()
        with atomic_folder(folder) as temporary:
            (temporary / "a").write_text("a")
            assert list(folder.glob("[!.]*")) == []
        assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["out", "out/a"]

    def test_an_error_leaves_nothing(self, tmp_path):
        with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out") as temporary:
            (temporary / "a").write_text(str(1 / 0))
        assert list(tmp_path.iterdir()) == []

    def test_the_working_directory_itself(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with atomic_folder(Path(".")) as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / "a").touch()
        assert [path.name for path in sorted(Path.cwd().rglob("*"))] == ["sub", "a"]

    def test_a_folder_in_the_working_directory(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with atomic_folder(Path("out")) as temporary:
            (temporary / "a").touch()
        assert Path("out/a").exists()

    def test_what_is_in_the_way(self, tmp_path):
        (tmp_path / "file").touch()
        for name, says in (
            ("", "found a folder with files in it, expected an empty one"),
            ("file", "found a file, expected a folder"),
            ("gone/out", "cannot write"),
        ):
            with pytest.raises(OSError, match=says), atomic_folder(tmp_path / name):
                pass
        assert [p.name for p in tmp_path.iterdir()] == ["file"]


class TestText:
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    def test_encodings_and_ends_of_lines(self, tmp_path, encoding, end):
        file = tmp_path / "a.txt"
        file.write_bytes(f" ünï 猫\u2028(1)\x0b {end}{end}b{end}".encode(encoding))
        assert list(numbered_lines(file)) == [(f"{file}:1", "ünï 猫\u2028(1)"), (f"{file}:3", "b")]

    @pytest.mark.parametrize(
        ("content", "line", "found"),
        [
            ("a\n人\n".encode("gbk"), 2, "bytes that are no text in UTF-8"),
            (b"a\r\nb\r\n\xe9\r\n", 3, "bytes that are no text in UTF-8"),
            ("a\nb\n".encode("utf-16")[:-1], 2, "bytes that are no text in UTF-16"),
            ("a\nb\n".encode("utf-16-le"), 1, "a byte of 0"),
            (b"a\n\0", 2, "a byte of 0"),
        ],
    )
    def test_anything_else_is_refused(self, tmp_path, content, line, found):
        file = tmp_path / "a.txt"
        file.write_bytes(content)
        expected = "expected text in UTF-8, or in UTF-16 with its mark"
        with pytest.raises(SppnetError) as caught:
            read_text(file)
        assert str(caught.value) == f"{file}:{line}: found {found}, {expected}"

    def test_names_may_be_of_any_bytes(self, tmp_path):
        file = tmp_path / "a.txt"
        file.write_bytes(b"\xe9.jpg\nb.jpg\n")
        assert [os.fsencode(name) for _, name in numbered_lines(file, names=True)] == [b"\xe9.jpg", b"b.jpg"]


class TestMapping:
    def test_tensors_are_those_that_were_written(self, tmp_path):
        kinds = (np.float16, np.float32, np.float64, np.int64, np.uint8, np.uint64)
        written = {kind.__name__: np.arange(12).reshape(3, 4).astype(kind) for kind in kinds}
        written["nothing"] = np.zeros((0, 4), np.float32)
        write_tensors(tmp_path / "a.safetensors", written, {"format": "x"})
        before = (tmp_path / "a.safetensors").read_bytes()
        found = map_tensors(tmp_path / "a.safetensors")
        assert found.keys() == written.keys()
        for name, tensor in written.items():
            assert found[name].dtype == tensor.dtype
            assert np.array_equal(found[name], tensor)
        found["int64"][0] = 7
        assert (tmp_path / "a.safetensors").read_bytes() == before

    @pytest.mark.parametrize("content", [b"", b"short", b"\x05" + bytes(7) + b"[1,2]", bytes(100)])
    def test_another_file_is_refused(self, tmp_path, content):
        (tmp_path / "a.safetensors").write_bytes(content)
        with pytest.raises(SppnetError, match=r"a\.safetensors: found no safetensors file"):
            map_tensors(tmp_path / "a.safetensors")
