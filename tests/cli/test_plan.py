"""The command that plans: what it counts, what it prints, and what it refuses."""

import json

import pytest

import trees
from commands import content, fails, read_json, succeeds
from costs import COSTS
from sppnet import __version__
from sppnet.cli.plan import _bytes, _duration
from sppnet.planning.calibration import Calibration, machine, write_calibration

JOBS = {"embed", "propose", "run", "evaluate", "train"}


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def known(tmp_path):
    """A calibration of this machine, in round numbers."""
    write_calibration(tmp_path / "known.json", Calibration(COSTS, machine(), __version__))
    return ("--calibration", "known.json")


def planned(*arguments):
    succeeds("plan", *arguments, "--json", "plan.json")
    return read_json("plan.json")


def test_prints_stages_bytes_and_what_changes_the_time(known):
    outcome = succeeds(
        "plan", "--images", "450000", "--classes", "200", "--windows", "2000", "--nodes", "8", *known
    )
    for text in (
        "sppnet detect train",
        "SVMs",
        "disk: maps 4.5 TB",
        "twice the nodes",
        "450000 photos of 0.19",
    ):
        assert text in outcome.out


def test_of_a_data_set_counts_photos_classes_and_pixels(known):
    trees.voc_tree(trees.Path("data"))
    found = planned("data", *known)["workload"]
    drawn = {
        label
        for scenes in trees.voc_tree(trees.Path("again")).values()
        for s in scenes.values()
        for label in s.labels
    }
    assert found["images"] == len(list(trees.Path("data/JPEGImages").iterdir()))
    assert found["classes"] == len(drawn)
    assert found["pixels"] == pytest.approx(128 * 96 / 1e6)
    assert found["windows"] == COSTS.windows


def test_of_a_folder_of_photos_with_an_unreadable_one(known):
    for n in (1, 2, 3):
        trees.save(trees.Path("photos") / f"{n}.png", trees.scene(n).image)
    trees.Path("photos/2.png").write_bytes(b"broken")
    found = planned("photos", "--images", "1000", "--job", "embed", *known)
    assert found["workload"]["images"] == 1000
    assert found["workload"]["classes"] == 20
    assert found["plans"].keys() == {"embed"}


def test_of_a_number_of_photos_of_a_size(known):
    found = planned("--images", "10", "--photo-size", "1000x2000", *known)
    assert found["workload"]["pixels"] == 2
    assert found["plans"].keys() == JOBS
    for plan in found["plans"].values():
        assert plan["seconds"] == pytest.approx(sum(stage["seconds"] for stage in plan["stages"]))


def test_memory_makes_a_fit_mine_in_rounds(known):
    found = planned("--images", "100000", "--job", "train", "--memory", "2", *known)
    assert found["plans"]["train"]["memory"]["hard windows, where the SVMs learn"] < 2e9


def test_calibrates_and_keeps_what_it_measured(monkeypatch):
    def calibrate(photos, minutes, track):
        assert minutes == 0
        assert all(photo.is_file() for photo in photos)
        return Calibration(COSTS, machine(), __version__)

    monkeypatch.setattr("sppnet.planning.calibration.calibrate", calibrate)
    outcome = succeeds(
        "plan", "--images", "10", "--minutes", "0", "--job", "embed", "--calibration", "new.json"
    )
    assert "calibration in new.json" in outcome.out
    assert "the photo that comes with sppnet" in outcome.err
    before = content()
    again = succeeds("plan", "--images", "10", "--job", "embed", "--calibration", "new.json")
    assert "calibration in" not in again.out
    assert content() == before


def test_a_calibration_of_another_machine_is_warned_of(known):
    about = json.loads(trees.Path("known.json").read_text()) | {"machine": "abacus, 1 core"}
    trees.Path("known.json").write_text(json.dumps(about))
    outcome = succeeds("plan", "--images", "10", *known)
    assert "warning: known.json: the calibration is of sppnet" in outcome.err
    assert "abacus" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), ["found neither DATA nor --images"]),
        (("--images", "0"), ["--images"]),
        (("--images", "5", "--classes", "0"), ["--classes"]),
        (("--images", "5", "--nodes", "0"), ["--nodes"]),
        (("--images", "5", "--photo-size", "large"), ["--photo-size large", "375x500"]),
        (("--images", "5", "--photo-size", "0x500"), ["--photo-size 0x500"]),
        (("--images", "5", "--photo-size", "375x500x3"), ["--photo-size 375x500x3"]),
        (("--images", "5", "--memory", "0"), ["found 0 memory"]),
        (("--images", "5", "--job", "fly"), ["--job"]),
        (("none",), ["none"]),
        (("--images", "5", "--json", "nowhere/plan.json"), ["nowhere"]),
        (("--images", "5", "--calibration", "new.txt"), ["new.txt", "expected .json"]),
    ],
)
def test_refused(arguments, says, known):
    given = () if "--calibration" in arguments else known
    fails("plan", *arguments, *given, says=says)


def test_a_folder_without_photos_is_refused(known):
    trees.Path("empty").mkdir()
    fails("plan", "empty", *known, says=["empty"])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.25, "0.25 s"),
        (59, "59 s"),
        (61, "1 min 1 s"),
        (3600, "1 h 0 min"),
        (90_000, "1 d 1 h"),
        (1e8, "1157 d"),
    ],
)
def test_durations(seconds, text):
    assert _duration(seconds) == text


def test_sizes():
    assert [_bytes(size) for size in (0, 999, 1500, 4.5e12)] == ["0 bytes", "999 bytes", "1.5 kB", "4.5 TB"]
