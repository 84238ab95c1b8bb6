"""What every fitted thing here has in common: scikit-learn's way with settings, without scikit-learn.

A constructor stores its arguments under their own names and computes nothing; what `fit` learns ends in an
underscore. So `sklearn.base.clone`, pipelines and searches over settings take these estimators as their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, Self

from sppnet.errors import NotFittedError, SppnetError


class Estimator:
    """Settings that can be read, changed and printed."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the settings by name, sorted.

        Parameters
        ----------
        deep : bool
            Whether the settings of settings that are estimators are there, too, as ``outer__inner``.
        """
        found: dict[str, Any] = {}
        for name in _names(type(self)):
            found[name] = value = getattr(self, name)
            if deep and isinstance(value, Estimator):
                found |= {f"{name}__{inner}": v for inner, v in value.get_params().items()}
        return found

    def set_params(self, **settings: Any) -> Self:
        """Change settings by name, ``outer__inner`` for those of a setting, and return the estimator.

        Raises
        ------
        SppnetError
            If there is no setting of a name.
        """
        for name, value in settings.items():
            outer, _, inner = name.partition("__")
            if outer not in _names(type(self)):
                known = ", ".join(_names(type(self)))
                raise SppnetError(
                    f"found the setting {outer!r} of {type(self).__name__}, expected one of {known}"
                )
            if inner:
                getattr(self, outer).set_params(**{inner: value})
            else:
                setattr(self, outer, value)
        return self

    def __repr__(self) -> str:
        """Return the call that makes an estimator of these settings; defaults are left out."""
        defaults = {n: p.default for n, p in inspect.signature(type(self).__init__).parameters.items()}
        changed = (
            (name, value) for name, value in self.get_params(deep=False).items() if value != defaults[name]
        )
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in changed)})"

    def __sklearn_is_fitted__(self) -> bool:
        """Tell scikit-learn whether anything was learned."""
        return any(name.endswith("_") and not name.startswith("_") for name in vars(self))

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn what kind of estimator this is: none of its own kinds."""
        from sklearn.utils import InputTags, Tags, TargetTags

        return Tags(
            estimator_type=None,
            target_tags=TargetTags(required=False),
            input_tags=InputTags(two_d_array=False),
        )

    def _check_fitted(self) -> None:
        """Raise a `NotFittedError` unless `fit` or `load` was there before."""
        if not self.__sklearn_is_fitted__():
            name = type(self).__name__
            raise NotFittedError(f"this {name} is not fitted yet; call fit, or {name}.load a file")


def _names(kind: type[Estimator]) -> tuple[str, ...]:
    parameters: Iterable[str] = inspect.signature(kind.__init__).parameters
    return tuple(sorted(name for name in parameters if name != "self"))
