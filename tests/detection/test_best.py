import pytest

from sppnet.boxes import Target
from sppnet.datasets.records import Sample
from sppnet.detection.best import fit_best
from sppnet.detection.detector import Detector
from trees import scene


@pytest.fixture(scope="module")
def shapes():
    drawn = [scene(seed) for seed in range(8)]
    return [Sample(f"s{i}", d.image, Target.of(d.boxes, d.labels)) for i, d in enumerate(drawn)]


@pytest.fixture
def detectors(backbone_file):
    tiny = str(backbone_file("test_efficientnet"))
    options = {"scales": (64,), "proposals": "dense", "folds": 2}
    # With so strong a penalty nothing is learned.
    return [Detector(tiny, ridge=1e9, levels=(1,), **options), Detector(tiny, **options)]


@pytest.mark.parametrize("turn", [1, -1])
def test_the_one_that_finds_most_is_taken_whatever_its_place(detectors, shapes, turn):
    told, kept = [], []
    best = fit_best(detectors[::turn], shapes, tell=told.append, keep=kept.append)
    figures = [d.fitted_.quality.mean_ap for d in detectors]
    assert figures[0] != figures[1]
    assert best is detectors[figures[1] > figures[0]]
    assert kept[0] is detectors[::turn][0]
    assert kept[-1] is best
    (line,) = told
    assert all(f"{100 * figure:.1f}" in line for figure in figures)


def test_a_single_one_needs_no_measure(detectors, shapes):
    told = []
    only = detectors[1].set_params(folds=0)
    assert fit_best([only], shapes, tell=told.append) is only
    assert told == []
