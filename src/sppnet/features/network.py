"""The network of a backbone in PyTorch: for devices other than the CPU, and for tuning its last layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sppnet.arrays import Pixels, to_numpy
from sppnet.errors import SppnetError
from sppnet.features.architectures import ARCHITECTURES, staged
from sppnet.features.encoded import FeatureMaps
from sppnet.features.inference import Pixels32
from sppnet.features.timm import PREFIX, Stages, create_timm, fix_same_padding

if TYPE_CHECKING:
    from sppnet.features.backbone import Backbone


def network_of(backbone: Backbone) -> Any:
    """Build the network of a backbone, with its weights, for its stages and output stride.

    Returns
    -------
    Stages or Staged
        A network of timm's, or one of the paper's; in evaluation mode.

    Raises
    ------
    SppnetError
        If it is of neither kind.
    """
    facts = backbone.graph.facts
    if not facts.network:
        raise SppnetError(
            f"found the backbone {facts.name!r}, expected one of a timm network: PyTorch cannot build others"
        )
    weights = {name: torch.from_numpy(value) for name, value in backbone.parameters.items()}
    if facts.network in ARCHITECTURES:
        pooled = backbone.output_stride != ARCHITECTURES[facts.network].stride(False)
        return staged(facts.network, weights, pooled)
    with torch.random.fork_rng(devices=[]):
        model = create_timm(facts.network, backbone.output_stride)
    fix_same_padding(model)
    network = Stages(model, backbone.stages)
    network.load_state_dict({f"{PREFIX}{name}": value for name, value in weights.items()}, strict=False)
    return network.eval().requires_grad_(False)


def on_device(backbone: Backbone) -> Callable[[Pixels32], tuple[Tensor, ...]]:
    """Return what computes the maps of pixels on the backbone's device, (1, h, w, C) tensors there."""
    run = Runner(backbone)

    def without_gradient(pixels: Pixels32) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return run(pixels)

    return without_gradient


class Runner:
    """The network of a backbone behind the standardisation of pixels, channels last on both sides."""

    def __init__(self, backbone: Backbone) -> None:
        self.device = backbone.device
        self.network = network_of(backbone)
        self.network.to(self.device, memory_format=torch.channels_last)
        self.mean, self.std = (torch.tensor(v, device=self.device) for v in (backbone.mean, backbone.std))

    def __call__(self, pixels: Pixels32) -> tuple[Tensor, ...]:
        """Return the (1, h, w, C) maps of (1, H, W, 3) pixels, 0 to 255."""
        standard = (torch.from_numpy(pixels).to(self.device) - self.mean) / self.std
        return tuple(m.permute(0, 2, 3, 1) for m in self.network(standard.permute(0, 3, 1, 2)))


class TrainableBackbone:
    """A backbone whose last layers learn; call it on an image, as a `Backbone`, for maps with gradients.

    Parameters
    ----------
    backbone : Backbone
        Where training starts; stays as it is.
    stage : str
        The layers behind this stage learn, the classifier's left out.

    Attributes
    ----------
    learning : dict of str to nn.Parameter
        The parameters of these layers by name.

    Raises
    ------
    SppnetError
        If `stage` is none from "1" to the last but one, or the backbone was not made of a timm network.
    """

    def __init__(self, backbone: Backbone, stage: str) -> None:
        backbone.graph.facts.check_tunable(stage)
        self.backbone = backbone
        self._run = Runner(backbone)
        behind = _layers_after(self._run.network.model, stage)
        # Layers that no map needs are not in the file.
        self.learning = {name: p for name, p in behind.items() if name in backbone.parameters}

    def __call__(self, image: Pixels, side: int) -> FeatureMaps:
        """Compute the maps of an image through PyTorch, with gradients for the parameters that require one.

        Slower than the backbone itself on the CPU; the values are the same but for rounding.
        """
        return self.backbone.compute(self._run, image, side)

    def retuned(self) -> Backbone:
        """Return the backbone with what was learned, in half precision."""
        state = {name: to_numpy(value).astype(np.float32) for name, value in self.learning.items()}
        return self.backbone.retuned(state)


def _layers_after(model: Any, stage: str) -> dict[str, nn.Parameter]:
    """Return the parameters of all layers behind a stage by name, the classifier's left out."""
    modules = [info["module"] for info in model.feature_info]
    # Modules come in the order of the network. A stage may end in one without parameters.
    names, last = [name for name, _ in model.named_modules()], modules[int(stage) - 1]
    end = max(i for i, name in enumerate(names) if f"{name}.".startswith(f"{last}."))
    behind = set(names[end + 1 :])
    unused = {id(p) for p in model.get_classifier().parameters()}
    return {
        name: p
        for name, p in model.named_parameters()
        if name.rpartition(".")[0] in behind and id(p) not in unused
    }


def check_device(device: str) -> None:
    """Raise an error for a device that this machine does not have."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SppnetError(f"device {device!r} was asked for, but PyTorch finds no CUDA device")
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SppnetError(
            f"found the device {device!r} ({reason}), expected cpu or one that PyTorch can use"
        ) from None
