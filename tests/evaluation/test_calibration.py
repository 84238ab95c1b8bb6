import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sppnet.errors import SppnetError
from sppnet.evaluation.calibration import expected_calibration_error, reliability


def slow(probabilities, hits, bins):
    """Bins of equal mass by counting one case after another; cases of one probability stay together."""
    ordered = sorted(zip(probabilities, hits, strict=True))
    groups, starts = [], {ordered[len(ordered) * i // bins][0] for i in range(bins)} if ordered else set()
    for i, (p, hit) in enumerate(ordered):
        if p in starts and (i == 0 or ordered[i - 1][0] != p):
            groups.append([])
        groups[-1].append((p, hit))
    return groups


CASES = st.lists(st.tuples(st.sampled_from([0, 0.05, 0.3, 0.31, 0.7, 1]) | st.floats(0, 1), st.booleans()))


@given(cases=CASES, bins=st.integers(1, 12))
def test_agrees_with_counting_one_by_one(cases, bins):
    p, hits = np.array([c[0] for c in cases], float), [c[1] for c in cases]
    found, groups = reliability(p, hits, bins), slow(p.tolist(), hits, bins)
    assert len(groups) <= bins
    assert found.counts.tolist() == [len(g) for g in groups]
    np.testing.assert_allclose(found.mean, [sum(q for q, _ in g) / len(g) for g in groups])
    np.testing.assert_allclose(found.observed, [sum(h for _, h in g) / len(g) for g in groups])
    if not cases:
        assert len(found.edges) == 0
        assert math.isnan(found.error)
        return
    assert found.edges.tolist() == [*(g[0][0] for g in groups), max(p)]
    error = sum(abs(sum(q for q, _ in g) - sum(h for _, h in g)) for g in groups) / len(cases)
    assert expected_calibration_error(p, hits, bins) == pytest.approx(error)


def test_of_equal_mass():
    p = np.linspace(0, 1, 100) ** 4  # Crowded near 0.
    assert reliability(p, p > 0.5).counts.tolist() == [10] * 10


def test_probabilities_that_keep_what_they_promise():
    rng = np.random.default_rng(0)
    p = rng.random(100_000)
    hits = rng.random(len(p)) < p
    assert expected_calibration_error(p, hits) < 0.005
    # Ten points too high, everywhere.
    assert expected_calibration_error(np.clip(p + 0.1, 0, 1), hits) == pytest.approx(0.095, abs=0.005)
    assert expected_calibration_error(np.ones(10), np.zeros(10)) == 1


def test_order_does_not_matter():
    rng = np.random.default_rng(1)
    p, hits = rng.integers(0, 8, 60) / 8, rng.random(60) < 0.5
    mixed = rng.permutation(60)
    for one, other in zip(
        vars(reliability(p, hits)).values(), vars(reliability(p[mixed], hits[mixed])).values(), strict=True
    ):
        np.testing.assert_allclose(one, other)


@pytest.mark.parametrize(
    ("p", "hits", "bins", "says"),
    [
        ([0.5], [True, False], 10, "one length"),
        ([0.5, 1.5], [True, False], 10, "probability 1.5"),
        ([-0.1], [True], 10, "probability -0.1"),
        ([math.nan], [True], 10, "probability nan"),
        ([0.5], [True], 0, "0 bins"),
    ],
)
def test_bad_input(p, hits, bins, says):
    with pytest.raises(SppnetError, match=says):
        reliability(np.array(p), hits, bins)
