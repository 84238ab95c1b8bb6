"""Networks of timm: built by name, cut into stages, padded alike."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from sppnet.errors import SppnetError

PREFIX = "model."
"""What the names of parameters begin with in `Stages`, and not in timm."""


class Stages(nn.Module):
    """A timm model that returns the maps of chosen stages: "1", "2" and so on, and "head", the last map."""

    def __init__(self, model: nn.Module, stages: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, stages
        self.indices = sorted(int(s) - 1 for s in stages if s.isdecimal())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the (N, C, h, w) map of each stage, of standardised (N, 3, H, W) images."""
        model: Any = self.model
        if not self.indices:
            return (model.forward_features(x),)
        final, maps = model.forward_intermediates(x, indices=self.indices)
        by_name = dict(zip((str(i + 1) for i in self.indices), maps, strict=True))
        return tuple(by_name.get(name, final) for name in self.names)


class UnevenConv2d(nn.Conv2d):
    """A convolution padded by `before` above and on the left, and by `after` below and on the right."""

    before: int
    after: int

    def forward(self, x: Tensor) -> Tensor:
        """Convolve maps (N, C, H, W)."""
        edges = (self.before, self.after, self.before, self.after)
        return super().forward(nn.functional.pad(x, edges))


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
