"""Plans: arithmetic on sizes and costs that can be done by hand."""

from dataclasses import asdict, replace

import pytest

from costs import COSTS
from sppnet.errors import SppnetError
from sppnet.planning.costs import Costs, Machines, Workload
from sppnet.planning.plan import JOBS, drivers, mining_of, plan

WORK = Workload(images=100, classes=5, windows=1000, pixels=0.2, photo_bytes=50_000)


def seconds(found):
    return {stage.name: stage.seconds for stage in found.stages}


class TestTime:
    def test_of_one_core_by_hand(self):
        found = seconds(plan("run", WORK, COSTS, Machines()))
        expected = {
            "starting": 2.0,
            "reading": 100 * 0.1 * 0.2,
            "candidate windows": 100 * 0.2,
            "maps": 100 * 0.4,
            "pooling": 100 * (0.01 + 1000 * 1e-4),
            "scoring": 100 * 1000 * (1e-5 + 5e-6),
        }
        assert found == pytest.approx(expected)
        assert plan("run", WORK, COSTS, Machines()).seconds == pytest.approx(sum(expected.values()))
        assert plan("run", WORK, COSTS, Machines()).dominant.name == "maps"

    def test_is_shared_by_nodes_and_cores_but_for_the_start(self):
        one, many = (plan("embed", WORK, COSTS, machines) for machines in (Machines(), Machines(5, 2)))
        assert seconds(many)["starting"] == seconds(one)["starting"]
        assert seconds(many)["network and pooling"] == pytest.approx(seconds(one)["network and pooling"] / 10)
        assert many.core_seconds == pytest.approx(one.core_seconds + 9 * COSTS.start_embed)

    def test_of_more_processes_than_cores_is_no_shorter(self):
        two, four = (plan("embed", WORK, COSTS, Machines(1, 2, count)) for count in (2, 4))
        assert seconds(four)["network and pooling"] == pytest.approx(seconds(two)["network and pooling"])
        assert seconds(four)["starting"] == 2 * seconds(two)["starting"]

    def test_of_a_photo_does_not_get_shorter_with_more_cores_than_photos(self):
        few = replace(WORK, images=3)
        assert seconds(plan("embed", few, COSTS, Machines(4, 8)))["network and pooling"] == pytest.approx(
            0.05
        )

    @pytest.mark.parametrize(("cores", "slower"), [(1, 1.0), (2, 1.25), (8, 1.25**3)])
    def test_grows_by_what_cores_take_from_each_other(self, cores, slower):
        costs = replace(COSTS, efficiency=0.8)
        assert costs.slowdown(cores) == pytest.approx(slower)
        found = seconds(plan("embed", replace(WORK, images=800), costs, Machines(1, cores)))
        assert found["network and pooling"] == pytest.approx(800 * 0.05 * slower / cores)

    def test_of_a_calibration_of_one_process_knows_nothing_of_that(self):
        assert replace(COSTS, together=1).slowdown(16) == 1

    def test_of_a_fit_learns_in_one_place(self):
        work = replace(WORK, images=8000)
        one, many = (seconds(plan("train", work, COSTS, m)) for m in (Machines(2, 4), Machines(20, 4)))
        assert many["maps"] == pytest.approx(one["maps"] / 10)
        for name in ("SVMs", "box regression", "SVMs of folds"):
            assert many[name] == one[name]

    def test_drivers_are_plans_of_less(self):
        found = drivers("run", WORK, COSTS, Machines())
        assert found["half the photos"] == plan("run", replace(WORK, images=50), COSTS, Machines()).seconds
        assert found["twice the nodes"] == plan("run", WORK, COSTS, Machines(2)).seconds
        assert found["half the windows"] < plan("run", WORK, COSTS, Machines()).seconds
        assert set(drivers("embed", replace(WORK, images=1, classes=1, windows=1), COSTS, Machines())) == set(
            found
        )


class TestBytes:
    def test_of_disks(self):
        assert plan("embed", WORK, COSTS, Machines()).disk == {"vectors": 100 * 4000}
        assert plan("train", WORK, COSTS, Machines()).disk["maps"] == 100 * 1e7

    def test_of_photos_over_the_network(self):
        assert plan("run", WORK, COSTS, Machines(2)).traffic["photos"] == 100 * 50_000
        assert plan("train", WORK, COSTS, Machines()).traffic["photos"] == 4 * 100 * 50_000

    def test_of_a_fit_in_rounds_stay_within_the_memory(self):
        work = replace(WORK, images=1_000_000)
        for memory in (1e9, 4e9):
            found = plan("train", work, COSTS, Machines(1, 2, None, memory))
            assert found.memory["hard windows, where the SVMs learn"] <= memory
            assert "plans of all windows" not in found.memory
        assert plan("train", work, COSTS, Machines()).memory["plans of all windows"] > 1e10


class TestMining:
    def test_photo_by_photo_trains_after_each_4000_windows(self):
        found = mining_of(WORK, COSTS, Machines())
        assert found.passes == 1
        # Seven of ten that have joined are held at the end.
        assert found.trainings == pytest.approx(1 + found.held / 0.7 / 4000)
        assert found.held <= WORK.images * WORK.windows

    def test_in_rounds_holds_what_memory_allows(self):
        work = replace(WORK, images=1_000_000)
        less, more = (mining_of(work, COSTS, Machines(memory=memory)) for memory in (1e9, 2e9))
        assert less.passes == more.passes == 4
        assert more.held == pytest.approx(3 * less.held)

    def test_on_several_nodes_is_in_rounds(self):
        assert mining_of(WORK, COSTS, Machines(2)) == mining_of(WORK, COSTS, Machines(memory=8e9))


class TestBad:
    @pytest.mark.parametrize("name", ["images", "classes", "windows"])
    def test_nothing_to_do(self, name):
        with pytest.raises(SppnetError, match=f"found 0 {name}, expected at least 1"):
            replace(WORK, **{name: 0})

    @pytest.mark.parametrize("name", ["nodes", "cores", "processes", "memory"])
    def test_no_machines(self, name):
        with pytest.raises(SppnetError, match=f"found 0 {name}"):
            Machines(**{name: 0})

    @pytest.mark.parametrize("changes", [{"efficiency": 0.0}, {"efficiency": 1.5}, {"together": 0}])
    def test_costs(self, changes):
        with pytest.raises(SppnetError, match="expected at least 1 and a share"):
            Costs(**asdict(COSTS) | changes)

    def test_job(self):
        with pytest.raises(SppnetError, match="found the job 'fly', expected one of embed, propose, run"):
            plan("fly", WORK, COSTS, Machines())

    @pytest.mark.parametrize("job", JOBS)
    def test_every_job_of_one_photo(self, job):
        found = plan(job, Workload(1, 1, 1, 0.01, 1000), COSTS, Machines(100, 100))
        assert 0 < found.seconds < 60
