"""Vectors that are searched one by one or by a graph: both against a plain sort of all inner products."""

import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from sppnet.errors import SppnetError
from sppnet.retrieval import neighbours as module
from sppnet.retrieval.neighbours import Graph, Listed, check_count, read_neighbours, with_room


def vectors(count, seed, length=8):
    found = np.random.default_rng(seed).normal(size=(count, length)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def listed(length=8):
    return Listed(np.zeros(0, np.int64), np.zeros((0, length), np.float16))


def graph(length=8):
    pytest.importorskip("usearch", reason="needs the extra sppnet[search]")
    return Graph(length)


def nearest(stored, vector, count):
    """Sort all: pairs of number and inner product, of equal ones the first first."""
    pairs = [(row, float(half.astype(np.float32) @ vector)) for row, half in stored.items()]
    return sorted(pairs, key=lambda pair: -pair[1])[:count]


@pytest.mark.parametrize("make", [listed, graph])
def test_a_look_at_all_finds_what_a_sort_of_all_finds(make, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 7)
    known, stored = make(), {}
    for start, count in ((0, 10), (10, 1), (11, 40)):
        new = vectors(count, start)
        known.add(np.arange(start, start + count), new)
        stored |= dict(zip(range(start, start + count), new.astype(np.float16), strict=True))
    gone = np.array([3, 10, 50])
    known.remove(gone)
    stored = {row: half for row, half in stored.items() if row not in gone}
    assert len(known) == len(stored) == 48
    for seed in range(100, 105):
        (vector,) = vectors(1, seed)
        for count in (1, 7, 48, 99):
            expected = nearest(stored, vector, count)
            rows, scores = known.nearest(vector, count, exact=True)
            assert (rows.dtype, scores.dtype) == (np.int64, np.float32)
            assert rows.tolist() == [row for row, _ in expected]
            np.testing.assert_allclose(scores, [score for _, score in expected], atol=2e-3)


def test_of_equal_vectors_the_first_comes_first():
    known = listed()
    known.add(np.arange(9), np.repeat(vectors(1, 0), 9, axis=0))
    for count in (1, 4, 9):
        assert known.nearest(vectors(1, 1)[0], count)[0].tolist() == list(range(count))


def test_of_none_there_is_no_nearest():
    rows, scores = listed().nearest(vectors(1, 0)[0], 5)
    assert (len(rows), len(scores)) == (0, 0)


@pytest.mark.parametrize("make", [listed, graph])
def test_what_is_saved_is_read(make, tmp_path):
    known = make()
    known.add(np.arange(30), vectors(30, 0))
    known.remove(np.array([4, 5]))
    path = tmp_path / f"1{known.suffix}"
    known.save(path)
    read = read_neighbours(path, 8)
    assert type(read) is type(known)
    assert (len(read), read.length) == (28, 8)
    (vector,) = vectors(1, 9)
    for one, other in zip(*(each.nearest(vector, 28, exact=True) for each in (read, known)), strict=True):
        assert np.array_equal(one, other)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_memory_is_that_of_half_precision():
    known = listed()
    known.add(np.arange(30), vectors(30, 0))
    assert known.memory == 30 * (8 + 2 * 8)
    many = graph()
    many.add(np.arange(30), vectors(30, 0))
    assert many.memory > 30 * 2 * 8


def test_many_become_a_graph(monkeypatch):
    monkeypatch.setattr(module, "MOST_LISTED", 20)
    graph()
    known = listed()
    known.add(np.arange(15), vectors(15, 0))
    assert with_room(known, 5) is known
    many = with_room(known, 6)
    assert isinstance(many, Graph)
    assert with_room(many, 6) is many
    assert len(many) == 15
    (vector,) = vectors(1, 9)
    assert many.nearest(vector, 15, exact=True)[0].tolist() == known.nearest(vector, 15)[0].tolist()


def test_many_without_usearch_are_refused_with_what_helps(monkeypatch):
    monkeypatch.setitem(sys.modules, "usearch", None)
    check_count(module.MOST_LISTED)
    says = r'an index of more than 200000 regions needs usearch: pip install "sppnet\[search\]"'
    for attempt in (lambda: check_count(module.MOST_LISTED + 1), lambda: Graph(8)):
        with pytest.raises(SppnetError, match=says):
            attempt()


@pytest.mark.parametrize("count", [3, 300])
def test_a_full_disk_is_an_error_of_the_system(count, monkeypatch, tmp_path):
    known = graph()
    known.add(np.arange(count), vectors(count, 0))
    monkeypatch.setattr(module, "atomic_path", lambda _: nullcontext(Path("/dev/full")))
    with pytest.raises(OSError, match=r"1\.usearch: cannot write"):
        known.save(tmp_path / "1.usearch")
