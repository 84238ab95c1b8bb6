import os
import sys
import threading
import time

import pytest

from sppnet.parallel import in_order, thread_count


def test_results_come_in_the_order_of_the_items():
    def slow(n):
        time.sleep(0.01 * (n % 3))
        return n

    assert list(in_order(slow, range(20), 4)) == list(range(20))
    assert list(in_order(slow, [], 4)) == []


def test_items_are_drawn_a_few_ahead():
    drawn = []

    def items():
        for n in range(100):
            drawn.append(n)
            yield n

    results = in_order(lambda n: n, items(), 2)
    assert not drawn
    for n in range(10):
        assert next(results) == n
        assert len(drawn) <= n + 5


def test_other_threads_do_the_work():
    names = set(in_order(lambda _: (time.sleep(0.02), threading.get_ident())[1], range(6), 3))
    assert len(names) == 3
    assert threading.get_ident() not in names


def test_an_error_comes_at_its_place():
    results = in_order(lambda n: 1 / n, [2, 1, 0, 4], 2)
    assert [next(results), next(results)] == [0.5, 1.0]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_threads_follow_pytorch_where_it_is_loaded(threads):
    threads(3)
    assert thread_count() == 3


@pytest.mark.parametrize(("given", "expected"), [("3", 3), ("0", None), ("many", None), ("", None)])
def test_without_pytorch_threads_follow_the_environment(monkeypatch, given, expected):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert thread_count() == (expected or len(os.sched_getaffinity(0)))


def test_what_nobody_waits_for_is_not_begun():
    done = []

    def slow(number):
        if number == 0:
            raise ValueError("bad")
        time.sleep(0.2)
        done.append(number)

    with pytest.raises(ValueError, match="bad"):
        next(in_order(slow, range(5), 2))
    assert 3 not in done
