"""What goes wrong that a user can mend: one tree of errors, each with a message of one line.

The command line prints the message of a `SppnetError` and ends; any other exception is a bug and shows its
traceback. A message says what was found, what was expected, and where: the file, and its line if it has one.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec

# Of each extra of the package's: what it is for people, and the packages that only it brings.
_EXTRAS = {
    "heic": ("pillow-heif", ("pillow_heif",)),
    "pandas": ("pandas", ("pandas",)),
    "ray": ("Ray", ("ray", "pyarrow", "fsspec")),
    "search": ("usearch", ("usearch",)),
    "serve": ("FastAPI and uvicorn", ("fastapi", "uvicorn", "prometheus_client")),
    "supervision": ("supervision", ("supervision",)),
    "torch": ("PyTorch", ("torch", "timm", "lightning_fabric", "onnxscript")),
}


class SppnetError(ValueError):
    """Something that was given is not what it must be."""


class ImageError(SppnetError):
    """A file that cannot be read as an image."""


class DatasetError(SppnetError):
    """A data set that cannot be read as it is; a line for each thing that is wrong."""


class TrainingError(SppnetError):
    """A training that cannot go on: its loss is not finite, or too many files are unreadable."""


class NotFittedError(SppnetError, AttributeError):
    """An estimator that was asked for what only `fit` or `load` gives it."""


def check_choice(kind: str, value: object, choices: Collection[str]) -> None:
    """Raise a `SppnetError` unless `value` is one of the `choices` of its kind."""
    if value not in choices:
        raise SppnetError(f"found the {kind} {value!r}, expected one of {', '.join(choices)}")


def has_extra(extra: str) -> bool:
    """Tell whether an extra of the package's is installed; nothing is imported."""
    return all(find_spec(package) is not None for package in _EXTRAS[extra][1])


def check_extra(extra: str, purpose: str) -> None:
    """Raise a `SppnetError` unless an extra of the package's is installed; nothing is imported.

    Parameters
    ----------
    extra : {"heic", "pandas", "ray", "search", "serve", "supervision", "torch"}
        Its name in brackets, ``sppnet[torch]``.
    purpose : str
        What needs it, the beginning of the message: ``"training a network"``.
    """
    if not has_extra(extra):
        raise SppnetError(f'{purpose} needs {_EXTRAS[extra][0]}: pip install "sppnet[{extra}]"')
