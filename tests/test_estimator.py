import pytest

from sppnet.errors import NotFittedError, SppnetError
from sppnet.estimator import Estimator


class Inner(Estimator):
    def __init__(self, width=3, *, lr=0.1):
        self.width, self.lr = width, lr


class Outer(Estimator):
    learned_: int
    _hidden_: int

    def __init__(self, name="a", *, inner=None, seed=0):
        self.name, self.inner, self.seed = name, inner, seed

    def predict(self):
        self._check_fitted()
        return self.learned_


def test_settings_are_read_by_name_those_of_settings_too():
    made = Outer("b", inner=Inner(lr=0.5))
    assert made.get_params() == {
        "name": "b",
        "inner": made.inner,
        "inner__width": 3,
        "inner__lr": 0.5,
        "seed": 0,
    }
    assert made.get_params(deep=False) == {"name": "b", "inner": made.inner, "seed": 0}


def test_settings_are_changed_by_name_those_of_settings_too():
    made = Outer(inner=Inner())
    assert made.set_params(seed=4, inner__width=9) is made
    assert (made.seed, made.inner.width, made.inner.lr) == (4, 9, 0.1)
    with pytest.raises(SppnetError, match="found the setting 'sed' of Outer, expected one of inner"):
        made.set_params(sed=1)
    assert made.seed == 4


def test_an_estimator_shows_the_call_that_makes_it():
    assert repr(Outer()) == "Outer()"
    assert repr(Outer("b", inner=Inner(lr=0.5))) == "Outer(inner=Inner(lr=0.5), name='b')"


def test_what_is_learned_ends_in_an_underscore():
    made = Outer()
    with pytest.raises(NotFittedError, match=r"this Outer is not fitted yet; call fit, or Outer\.load"):
        made.predict()
    made._hidden_ = 1
    assert not made.__sklearn_is_fitted__()
    made.learned_ = 7
    assert made.predict() == 7
