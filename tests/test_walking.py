import os
import sys

import pytest

from sppnet.errors import DatasetError
from sppnet.walking import LeftOut, list_folder, shown, walk


@pytest.fixture
def folder(tmp_path):
    for name in (
        "__MACOSX/a.jpg",
        "deep/__MACOSX/._b",
        "b.txt",
        "a.jpg",
        ".hidden",
        "deep/c.gif",
        "deep/er/d e.jpg",
        ".git/e.jpg",
        "deep/.f",
        "B",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    return tmp_path


def test_all_files_at_any_depth_but_hidden_ones(folder):
    left = LeftOut()
    expected = [b"B", b"a.jpg", b"b.txt", b"deep/c.gif", b"deep/er/d e.jpg"]
    assert walk(folder, left) == expected
    assert walk(folder, left, b"deep/") == expected[3:]
    assert left.notes() == ()


def test_one_folder(folder):
    files, folders = list_folder(folder, b"deep/", LeftOut())
    assert (files, folders) == ([b"deep/c.gif"], [b"deep/er/"])


def test_links_are_followed(folder):
    (folder / "again").symlink_to("deep")
    (folder / "one.jpg").symlink_to("a.jpg")
    names = walk(folder, LeftOut())
    assert {b"again/c.gif", b"again/er/d e.jpg", b"one.jpg", b"deep/c.gif"} < set(names)


@pytest.mark.parametrize("target", [".", "..", "../deep", "er/.."])
def test_circles_are_refused(folder, target):
    (folder / "deep" / "link").symlink_to(target)
    with pytest.raises(DatasetError, match=r"deep/link: found a circle, expected no link to a folder that"):
        walk(folder, LeftOut())


def test_a_circle_of_two_links_is_refused(tmp_path):
    for one, other in (("a", "b"), ("b", "a")):
        (tmp_path / one).mkdir()
        (tmp_path / one / "link").symlink_to(f"../{other}")
    with pytest.raises(DatasetError, match="found a circle"):
        walk(tmp_path, LeftOut())


def test_what_is_no_file_is_counted(folder):
    left = LeftOut()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "nowhere").symlink_to("gone")
    (folder / "deep" / "itself").symlink_to("itself")
    assert walk(folder, left) == walk(folder, LeftOut())
    assert left.notes() == (
        "3 files left out: 2 leading nowhere, first deep/itself; 1 neither file nor folder, first pipe.jpg",
    )


def test_the_commonest_kind_comes_first_each_with_its_first_name():
    left = LeftOut()
    for kind, name in ((".a", "z"), (".b", "y"), (".b", b"x"), (".b", b"\xff")):
        left.add(kind, name)
    assert left.notes() == ("4 files left out: 3 .b, first x; 1 .a, first z",)
    left = LeftOut()
    left.add(".b", os.fsdecode(b"\xff"))
    assert left.notes() == (r"1 file left out: 1 .b, first \xff",)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone: cannot list .* expected a readable folder"):
        walk(tmp_path / "gone", LeftOut())


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_not_utf8(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff", "wb"):
        assert walk(tmp_path, LeftOut()) == [b"\xff"]
    assert shown(b"a", b"\xff") == r"a/\xff"
