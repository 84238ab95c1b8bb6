import copy

import pytest
import torch
from torch import nn

from sppnet.features.backbone import Backbone
from sppnet.features.geometry import Geometry
from sppnet.features.network import network_of
from sppnet.features.tracing import derive_geometry

LITE0 = "efficientnet-lite0"
# The released code's mapping: specification 5.4.
ZF5 = Geometry(16, 20)


def summing(network):
    """Return a copy of a network whose cells are sums with positive weights over what they see.

    Every kernel, stride, padding and dilation stays, but all weights are equal and positive, one channel
    stands for all, and nothing bends or gates. Then the pixels that a cell depends on are its whole receptive
    field, symmetric about its centre.
    """
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            kind = type(child).__name__
            if isinstance(child, nn.Conv2d):
                mean = 1 / child.weight[0, 0].numel()
                child.weight = nn.Parameter(torch.full((1, 1, *child.kernel_size), mean))
                child.bias, child.groups = None, 1
            elif isinstance(child, nn.MaxPool2d):
                setattr(parent, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
            elif any(word in kind for word in ("Norm", "SqueezeExcite", "ReLU", "Hardswish")):
                setattr(parent, name, nn.Identity())
    return network.requires_grad_(False)


def field(cell, pixels, axis):
    """Return the first and last row (axis 0) or column (axis 1) of `pixels` that `cell` depends on."""
    (gradient,) = torch.autograd.grad(cell, pixels, retain_graph=True)
    seen = torch.nonzero(gradient[0, 0].sum(dim=1 - axis))
    return int(seen[0]), int(seen[-1])


def check_geometry(network, geometry, lengths):
    """Compare the middle of the receptive field of two cells with their derived centre, in x and in y.

    Each derived stride and offset is a line through two centres, so two cells that agree prove both.
    """
    for length in lengths:
        for axis in (0, 1):
            size = (length, 64) if axis == 0 else (64, length)
            pixels = torch.zeros(1, 1, *size, dtype=torch.float64, requires_grad=True)
            for place, cells in zip(geometry, network(pixels), strict=True):
                line = cells[0, 0].sum(dim=1 - axis)
                middle = int(length / 2 / place.stride)
                for u in (middle, middle + 3):
                    first, last = field(line[u], pixels, axis)
                    assert first > 0, "the field must not be cut off by the border"
                    assert last < length - 1, "the field must not be cut off by the border"
                    assert (first + last) / 2 == place.stride * u + place.offset


@pytest.mark.parametrize(
    ("name", "stages", "output_stride"),
    [
        (LITE0, ("3", "4", "head"), 16),
        (LITE0, ("1", "5", "head"), 32),
        (LITE0, ("5", "head"), 8),
        ("tf_mobilenetv3_small_100", ("1", "3", "head"), 32),
        ("resnet18", ("2", "5", "head"), 16),
        ("resnet18", ("3", "5"), 32),
    ],
)
def test_derived_geometry_is_where_cells_look(backbone_file, name, stages, output_stride):
    backbone = Backbone(name if name == LITE0 else backbone_file(name), stages, output_stride)
    assert len(backbone.geometry) == len(stages)
    # Odd and even multiples of 32: TensorFlow's own padding would differ between sizes that are not.
    check_geometry(summing(network_of(backbone)).double(), backbone.geometry, (2304, 2336))


def test_derived_geometry_by_hand(backbone_file):
    def stages(output_stride):
        geometry = Backbone(stages=("1", "2", "3", "4", "5", "head"), output_stride=output_stride).geometry
        return [(g.stride, g.offset) for g in geometry]

    # SAME padding of a stride-2 layer on an even side: kernel 3 pads 0 before, 5 pads 1: centred at 2u + 1.
    assert stages(32) == [(2, 1), (4, 3), (8, 7), (16, 15), (32, 31), (32, 31)]
    assert stages(16) == [(2, 1), (4, 3), (8, 7), (16, 15), (16, 15), (16, 15)]
    # PyTorch's symmetric padding: all at 2u.
    resnet = Backbone(backbone_file("resnet18"), ("1", "2", "5"), 32).geometry
    assert [(g.stride, g.offset) for g in resnet] == [(2, 0), (4, 0), (32, 0)]


class Odd(nn.Module):
    """Layers with every kind of padding, a branch, and maps on the way."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.ConstantPad2d((2, 0, 2, 0), 0.0), nn.Conv2d(3, 4, 4, 2, 1), nn.ReLU())
        self.second = nn.Sequential(
            nn.MaxPool2d(3, 2), nn.Conv2d(4, 4, 3, 1, 4, dilation=2), nn.BatchNorm2d(4)
        )
        self.branch = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Sequential(
            nn.AvgPool2d(2), nn.Conv2d(4, 4, 5, 3), nn.ConstantPad2d((-1, 2, -1, 2), 0.0)
        )

    def forward(self, x):
        one = self.first(x)
        two = self.second(one)
        three = self.third(two + self.branch(two))
        return one, two, three


def test_derived_geometry_of_odd_paddings():
    network = Odd().eval()
    geometry, channels = derive_geometry(network)
    # 1.5 - 2 - 1; then 2 * 1 + 4 * (2 - 4); then 4 * 0.5 + 8 * 2 and a crop of one cell of 24.
    expected = [(2, -1.5), (4, -1.5 + 2 - 8), (24, -7.5 + 2 + 16 + 24)]
    assert geometry == tuple(Geometry(*g) for g in expected)
    assert channels == (4, 4, 4)
    check_geometry(summing(network).double(), geometry, (500, 501, 507))


def test_released_zf5_as_a_network():
    layers = [
        (nn.Conv2d(3, 8, 7, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
        (nn.Conv2d(8, 16, 5, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
        (nn.Conv2d(16, 24, 3, 1, 1), nn.ReLU(), nn.Conv2d(24, 24, 3, 1, 1), nn.Conv2d(24, 16, 3, 1, 1)),
    ]
    network = nn.Sequential(*(layer for group in layers for layer in group))
    geometry, channels = derive_geometry(lambda x: [network(x)])
    assert geometry == (ZF5,)
    assert channels == (16,)


def test_what_regroups_or_multiplies_cells_is_refused():
    regroups = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, 8, 3, 1, 1))
    multiplies = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 3))
    flattens = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(2))
    for network in (regroups, multiplies, flattens):
        with pytest.raises(ValueError, match="cannot be derived; expected a convolutional backbone"):
            derive_geometry(lambda x, network=network: [network(x)])
    with pytest.raises(ValueError, match="transposed convolutions"):
        derive_geometry(lambda x: [nn.ConvTranspose2d(3, 8, 2, 2)(x)])
    with pytest.raises(ValueError, match="the network does not take a 224 x 352 image"):
        derive_geometry(lambda x: [nn.Linear(224, 10)(x)])
