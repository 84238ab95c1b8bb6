"""A calibration: measured in real processes, kept in a file, refused where it is none."""

import json
from dataclasses import asdict, fields, replace

import numpy as np
import pytest

import trees
from costs import COSTS
from sppnet import __version__
from sppnet.errors import SppnetError
from sppnet.measuring.detecting import _score_seconds
from sppnet.measuring.process import line
from sppnet.planning import calibration
from sppnet.planning.calibration import (
    Calibration,
    calibrate,
    machine,
    read_calibration,
    write_calibration,
)
from sppnet.planning.costs import Costs

HERE = Calibration(COSTS, machine(), __version__)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for n in (1, 2):
        trees.save(folder / f"{n}.png", trees.scene(n).image)
    return sorted(folder.iterdir())


class TestFile:
    def test_comes_back_as_it_was(self, tmp_path):
        write_calibration(tmp_path / "c.json", HERE)
        assert read_calibration(tmp_path / "c.json") == HERE
        assert HERE.doubt is None

    @pytest.mark.parametrize(("name", "value"), [("machine", "abacus, 1 core"), ("sppnet", "0.0.1")])
    def test_of_another_machine_or_version_is_doubted(self, name, value):
        assert value in (replace(HERE, **{name: value}).doubt or "")

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"format": "other"}, "found other 1, expected sppnet-calibration 1"),
            ({"version": "2"}, "found sppnet-calibration 2, expected sppnet-calibration 1"),
            ({"machine": 3}, "found other content"),
            ({"costs": {}}, "found other content"),
            ({"costs": asdict(COSTS) | {"read": "fast"}}, "found other content"),
            ({"costs": asdict(COSTS) | {"read": -1}}, "found other content"),
            ({"costs": asdict(COSTS) | {"read": True}}, "found other content"),
            ({"costs": asdict(COSTS) | {"efficiency": 0}}, "expected at least 1 and a share"),
        ],
    )
    def test_of_other_content_is_refused(self, tmp_path, changes, says):
        path = tmp_path / "c.json"
        write_calibration(path, HERE)
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        with pytest.raises(SppnetError, match=f"c.json: .*{says}"):
            read_calibration(path)

    @pytest.mark.parametrize("text", ["", "[]", "3", "{"])
    def test_that_is_none_is_refused(self, tmp_path, text):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(SppnetError, match=r"c\.json.*expected"):
            read_calibration(tmp_path / "c.json")


class TestMeasuring:
    def test_every_cost_is_measured_in_processes(self, photos, monkeypatch):
        """With the shortest time there is: three photos in each of a few processes."""
        monkeypatch.setattr(calibration, "_TOGETHER", 1)
        found = calibrate(photos, 0.01)
        costs = asdict(found.costs)
        assert found.doubt is None
        assert costs.keys() == {field.name for field in fields(Costs)}
        usually_none = {"pool", "pool_window", "score_window", "ridge_window", "ridge_square"}
        assert all(costs[name] > 0 for name in costs.keys() - usually_none), costs
        assert costs["pooled"] == 2 * 14 * 1280
        assert costs["vector"] == 4 * 14 * 1280
        assert (costs["together"], costs["efficiency"]) == (1, 1)

    def test_several_are_measured_at_once(self, photos):
        asked = {"photos": [str(photo) for photo in photos], "seconds": 0}
        found = calibration._measured("embed", asked, 2)
        assert [one["vector"] for one in found] == [4 * 14 * 1280] * 2

    def test_a_photo_that_cannot_be_read_is_named(self, tmp_path):
        (tmp_path / "a.jpg").write_bytes(b"broken")
        with pytest.raises(SppnetError, match=r"cannot calibrate: .*a\.jpg"):
            calibrate([tmp_path / "a.jpg"], 0.01)

    def test_what_processes_take_from_each_other_is_their_mean(self):
        alone = dict.fromkeys(("propose", "encode", "keep", "fetch", "pool"), 1.0)
        others = [dict.fromkeys(alone, 1.5), dict.fromkeys(alone, 2.5)]
        assert calibration._share(alone, others) == 0.5
        assert calibration._share(alone, [dict.fromkeys(alone, 0.9)]) == 1

    def test_lines_go_through_both_and_never_fall(self):
        assert line((10, 20), [3.0, 5.0]) == pytest.approx((1.0, 0.2))
        assert line((10, 20), [5.0, 3.0]) == (5.0, 0.0)
        assert line((10, 20), [1.0, 11.0]) == (0.0, 1.0)

    def test_scores_are_of_windows_of_which_few_are_likely(self):
        vectors = np.random.default_rng(0).normal(size=(300, 64)).astype(np.float32)
        whole, svms = _score_seconds(vectors, 4, np.random.default_rng(0))
        assert 0 < svms < whole
