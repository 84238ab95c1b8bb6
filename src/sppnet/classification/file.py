"""The file of a classifier: its network with all weights, what its classes are called, how it was made."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from sppnet.classification.scorer import NetworkSettings, Scorer
from sppnet.errors import SppnetError
from sppnet.features.stored import backbone_of, backbone_state
from sppnet.linear import Linear
from sppnet.models import model_path
from sppnet.pooling.bins import pyramid_length, valid_levels, valid_mode
from sppnet.storage import read_metadata, write_tensors

FORMAT, VERSION = "sppnet-network", "3"
IMAGENET = "imagenet"
"""Name of the classifier of ImageNet's 1,000 classes that comes with sppnet."""

_PHOTOS, _HEAD = "photos", "head."
# Sides of images beyond this are a mistake, and would take all memory.
_LARGEST_SIDE = 8192
_WORDNET = re.compile(r"n\d{8}")


class StoredNetwork(NamedTuple):
    """What the file of a classifier holds.

    Attributes
    ----------
    scorer : Scorer
        The network, ready to compute scores.
    titles : tuple of str
        What people call the classes.
    about : dict
        How it was made, in what JSON can hold.
    photos : (n,) uint64
        Of each photo that it was trained on a number, see `sppnet.images.photo_keys`.
    """

    scorer: Scorer
    titles: tuple[str, ...]
    about: dict[str, Any]
    photos: npt.NDArray[np.uint64]


def save_network(path: str | Path, stored: StoredNetwork) -> None:
    """Write a network to a safetensors file that describes itself.

    The backbone is in it with all its weights, as an ONNX file among the tensors. Of one that comes with
    sppnet there are only its name and the digest of its weights. Weights of the fully connected layers are in
    half precision.

    Parameters
    ----------
    path : path
        Replaced if it exists, as a whole or not at all.
    stored : StoredNetwork
        What to write.

    Raises
    ------
    OSError
        If the file cannot be written; an older one stays as it was.
    """
    origin, tensors = backbone_state(stored.scorer.backbone)
    tensors[_PHOTOS] = stored.photos
    for i, layer in enumerate(stored.scorer.layers):
        offsets = np.zeros(len(layer.weights), np.float32) if layer.offsets is None else layer.offsets
        tensors |= {f"{_HEAD}{i}.weights": layer.weights.astype(np.float16), f"{_HEAD}{i}.offsets": offsets}
    facts = {
        "network": stored.scorer.settings._asdict(),
        "titles": stored.titles,
        "backbone": origin,
        "about": stored.about,
    }
    texts = {name: json.dumps(value) for name, value in facts.items()}
    write_tensors(path, tensors, {"format": FORMAT, "version": VERSION, **texts})


def load_network(path: str | Path, device: str = "cpu") -> StoredNetwork:
    """Read what `save_network` wrote.

    Parameters
    ----------
    path : path
        The file.
    device : str
        Where the backbone is to run, see `Backbone`.

    Raises
    ------
    SppnetError
        If the file holds no network, one that does not fit its description, or is of another version, or its
        backbone came with another version of sppnet.
    FileNotFoundError
        If there is no such file.
    """
    facts = read_metadata(path, FORMAT, VERSION)
    try:
        settings, titles = _settings(json.loads(facts["network"])), tuple(json.loads(facts["titles"]))
        about, origin = dict(json.loads(facts["about"])), json.loads(facts["backbone"])
        if len(titles) != len(settings.classes):
            raise SppnetError(f"{len(titles)} titles of {len(settings.classes)} classes")
        with safe_open(path, "np") as file:
            layers = _layers(file)
            others = {
                name: file.get_tensor(name) for name in sorted(file.keys()) if not name.startswith(_HEAD)
            }
        scorer = Scorer(settings, backbone_of(path, origin, others, device), layers)
        _check(scorer)
        return StoredNetwork(scorer, titles, about, others[_PHOTOS])
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if reason.startswith(str(path)):
            raise
        raise SppnetError(f"{path}: found a network that does not fit its description ({reason})") from None


def _layers(file: Any) -> tuple[Linear, ...]:
    """Read the fully connected layers of an open file; of each, the sizes before the numbers."""
    names, layers = set(file.keys()), list[Linear]()
    while f"{_HEAD}{len(layers)}.weights" in names:
        places = tuple(f"{_HEAD}{len(layers)}.{part}" for part in ("weights", "offsets"))
        rows, offsets = (tuple(file.get_slice(place).get_shape()) for place in places)
        inputs = len(layers[-1].weights) if layers else rows[-1]
        if len(rows) != 2 or rows[1] != inputs or offsets != rows[:1] or 0 in rows:
            raise SppnetError(f"a layer of {rows} and {offsets} after {inputs} numbers")
        layers.append(Linear(*(file.get_tensor(place).astype(np.float32) for place in places)))
    return tuple(layers)


def _check(scorer: Scorer) -> None:
    """Raise an error unless the parts of a network fit each other."""
    settings, (channels,) = scorer.settings, scorer.backbone.channels
    bins = scorer.map_side**2 if settings.levels is None else pyramid_length(1, settings.levels)
    wanted = (channels * bins, len(settings.classes))
    found = (scorer.layers[0].weights.shape[1], len(scorer.layers[-1].weights)) if scorer.layers else ()
    if found != wanted:
        raise SppnetError(f"fully connected layers of {found}, expected {wanted} inputs and outputs")


def _settings(values: Mapping[str, Any]) -> NetworkSettings:
    """Return settings that were stored as JSON."""
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    settings = NetworkSettings(**plain)
    if settings.levels is not None:
        valid_levels(settings.levels)
    valid_mode(settings.mode)
    if not settings.classes or len(set(settings.classes)) != len(settings.classes):
        raise SppnetError(f"the classes {settings.classes}")
    if not isinstance(settings.size, int) or not 1 <= settings.size <= _LARGEST_SIDE:
        raise SppnetError(f"images of {settings.size}")
    if settings.norm is not None and not settings.norm > 0:
        raise SppnetError(f"the norm {settings.norm}")
    return settings


def titles_of(classes: tuple[str, ...]) -> tuple[str, ...]:
    """Return what people call classes: ImageNet's descriptions of WordNet ids, other names as they are."""
    if not any(map(_WORDNET.fullmatch, classes)):
        return classes
    known = _imagenet_titles()
    return tuple(known.get(name, name) for name in classes)


@functools.cache
def _imagenet_titles() -> dict[str, str]:
    facts = read_metadata(model_path(IMAGENET), FORMAT, VERSION)
    return dict(zip(json.loads(facts["network"])["classes"], json.loads(facts["titles"]), strict=True))
