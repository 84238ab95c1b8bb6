"""The models that come with sppnet, by name."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path

from sppnet.errors import SppnetError


def shipped(suffix: str = ".safetensors") -> dict[str, Path]:
    """Return the files of a suffix that come with sppnet, by name."""
    folder = Path(str(resources.files("sppnet.models")))
    return {file.stem: file for file in sorted(folder.glob(f"*{suffix}"))}


def model_path(name: str | Path, *, suffix: str = ".safetensors") -> Path:
    """Return the file of a model that is given by its path or, if it came with sppnet, by its name.

    Parameters
    ----------
    name : str or path
        A file, or the name of a shipped model, such as ``"animals"``.
    suffix : str
        Of the files that are meant: ``".safetensors"`` for models, ``".onnx"`` for backbones.

    Raises
    ------
    FileNotFoundError
        If it looks like a path, and there is no such file.
    SppnetError
        If it looks like a name, and no shipped model has it; the message names those that are near.
    """
    path = Path(name)
    if path.is_file():
        return path
    ours = shipped(suffix)
    if str(name) in ours:
        return ours[str(name)]
    kind = "backbone" if suffix == ".onnx" else "model"
    if path.suffix or len(path.parts) > 1:
        raise FileNotFoundError(
            f"{path}: found no such file, expected a {kind} file, or one of {', '.join(ours)}"
        )
    near = difflib.get_close_matches(str(name), ours, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise SppnetError(
        f"found no {kind} {str(name)!r}, expected a {kind} file, or one of {', '.join(ours)}{hint}"
    )
