import pytest
import timm
import torch
from torch import nn

from sppnet.features.backbone import Backbone
from sppnet.features.network import network_of
from sppnet.features.timm import fix_same_padding

LITE0 = "tf_efficientnet_lite0"


@pytest.mark.parametrize("output_stride", [16, 32])
def test_fixed_padding_changes_nothing_on_full_strides(output_stride):
    torch.manual_seed(0)
    backbone = Backbone(stages=("2", "5", "head"), output_stride=output_stride)
    model = timm.create_model(LITE0, pretrained=False, output_stride=output_stride).eval()
    model.load_state_dict({n: torch.from_numpy(v) for n, v in backbone.parameters.items()}, strict=False)
    for height_width in [(96, 160), (224, 192), (32, 32)]:
        x = torch.randn(1, 3, *height_width)
        with torch.no_grad():
            final, maps = model.forward_intermediates(x, indices=[1, 4])
            for ours, theirs in zip(network_of(backbone)(x), (*maps, final), strict=True):
                torch.testing.assert_close(ours, theirs)


def test_fixed_padding_of_pooling():
    from timm.layers import Conv2dSame
    from timm.layers.pool2d_same import MaxPool2dSame

    layers = [
        MaxPool2dSame(3, 2),
        Conv2dSame(3, 4, 5, 2),
        MaxPool2dSame(2, 2),
        Conv2dSame(4, 4, 3, 1, dilation=2),
    ]
    model = nn.Sequential(*layers)
    # All negative, so that padding with 0 would win the maximum.
    x = -1 - torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
        fix_same_padding(model)
        torch.testing.assert_close(model(x), expected)
