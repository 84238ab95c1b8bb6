import numpy as np
import pytest

from sppnet.datasets.runs import run_lengths


def counts_of(mask):
    """Return the runs over the columns of a mask, by a plain loop."""
    runs, inside = [0], False
    for value in mask.T.ravel().tolist():
        if value != inside:
            runs.append(0)
            inside = value
        runs[-1] += 1
    return runs


def packed(runs):
    """Return runs as the COCO tools write them, by their published rule."""
    text = ""
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            bits = value & 31
            value >>= 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(48 + bits + (32 if more else 0))
    return text


def masks():
    rng = np.random.default_rng(0)
    for _ in range(40):
        mask = np.zeros(rng.integers(1, 60, 2), bool)
        y, x = rng.integers(0, mask.shape[0]), rng.integers(0, mask.shape[1])
        mask[y : y + rng.integers(1, 30), x : x + rng.integers(1, 30)] = True
        yield mask & (rng.random(mask.shape) < rng.choice([0.1, 0.9, 1.1]))
    yield np.ones((3, 4), bool)


def test_the_box_around_a_mask():
    for mask in masks():
        rows, columns = np.nonzero(mask)
        expected = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if len(rows) else (0,) * 4
        runs = counts_of(mask)
        assert run_lengths(runs, *mask.shape) == run_lengths(packed(runs), *mask.shape) == expected


def test_known_string():
    """The COCO tools write a 4 x 5 mask, whose rows 1 and 2 are set in the columns 1 to 3, so."""
    mask = np.zeros((4, 5), bool)
    mask[1:3, 1:4] = True
    assert counts_of(mask) == [5, 2, 2, 2, 2, 2, 5]
    assert packed(counts_of(mask)) == "5220003"
    assert run_lengths("5220003", 4, 5) == (1, 1, 4, 3)


@pytest.mark.parametrize(
    ("counts", "size"), [([3, 4], (2, 3)), ("!", (1, 1)), ([-1, 2], (1, 1)), ([], (0, 0))]
)
def test_malformed(counts, size):
    with pytest.raises(ValueError, match="found"):
        run_lengths(counts, *size)
