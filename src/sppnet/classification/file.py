"""The file of a network: its weights, what it was built from, how it was made and from which photos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from sppnet.classification.network import NetworkSettings, SPPNet, build
from sppnet.errors import SppnetError
from sppnet.pooling.bins import valid_levels
from sppnet.storage import read_metadata, write_tensors

FORMAT, VERSION = "sppnet-network", "2"
_PHOTOS = "photos"


class StoredNetwork(NamedTuple):
    """What the file of a network holds.

    Attributes
    ----------
    network : SPPNet
        In evaluation mode.
    settings : NetworkSettings
        What it was built from.
    about : dict
        How it was made, in what JSON can hold.
    photos : (n,) uint64
        Of each photo that it was trained on a number, see `sppnet.images.photo_keys`.
    """

    network: SPPNet
    settings: NetworkSettings
    about: dict[str, Any]
    photos: npt.NDArray[np.uint64]


def save_network(
    path: str | Path,
    network: SPPNet,
    settings: NetworkSettings,
    about: dict[str, Any] | None = None,
    photos: npt.NDArray[np.uint64] | None = None,
) -> None:
    """Write a network to a safetensors file that describes itself.

    Parameters
    ----------
    path : path
        Replaced if it exists, as a whole or not at all.
    network, settings, about, photos
        See `StoredNetwork`.

    Raises
    ------
    OSError
        If the file cannot be written; an older one stays as it was.
    """
    facts = {"format": FORMAT, "version": VERSION, "network": json.dumps(settings._asdict())}
    keys = np.zeros(0, np.uint64) if photos is None else photos
    tensors = {**network.state_dict(), _PHOTOS: torch.from_numpy(keys)}
    write_tensors(path, tensors, {**facts, "about": json.dumps(about or {})})


def load_network(path: str | Path) -> StoredNetwork:
    """Read a network that `save_network` wrote, ready to compute scores.

    Raises
    ------
    SppnetError
        If the file holds no network, one that does not fit its description, or is of another version.
    FileNotFoundError
        If there is no such file.
    """
    facts = read_metadata(path, FORMAT, VERSION)
    try:
        settings = _settings(json.loads(facts["network"]))
        network = build(settings)
        tensors = load_file(path)
        photos = tensors.pop(_PHOTOS).numpy()
        network.load_state_dict(tensors)
        return StoredNetwork(network.eval(), settings, json.loads(facts["about"]), photos)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, SppnetError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise SppnetError(f"{path}: found a network that does not fit its description ({reason})") from None


def _settings(values: dict[str, Any]) -> NetworkSettings:
    """Return settings that were stored as JSON."""
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    settings = NetworkSettings(**plain)
    if settings.levels is not None:
        valid_levels(settings.levels)
    return settings
