import numpy as np
import pytest
import torch

from sppnet.features.backbone import _FromPixels
from sppnet.images import resize
from sppnet.onnx.preparation import PixelRules, Preparation


def standardised(backbone, image):
    """Return what the backbone makes of the pixels of a resized image."""
    return _FromPixels(backbone.network).standardise(backbone._padded(image))


@pytest.mark.parametrize(
    ("height", "width"), [(300, 451), (451, 61), (240, 240), (97, 451), (13, 11), (9, 451), (451, 5), (1, 1)]
)
def test_preparation_is_the_backbones_to_the_bit(lite0, photo, height, width):
    image = np.ascontiguousarray(np.tile(photo, (2, 1, 1))[:height, :width])
    prepared, sizes, size = Preparation(PixelRules.of(lite0), (64, 240, 270))(torch.from_numpy(image))
    assert size.tolist() == [height, width]
    for found, (h, w), side in zip(prepared, sizes.tolist(), (64, 240, 270), strict=True):
        if height <= 2 * h or width <= 2 * w:
            assert torch.equal(found, standardised(lite0, resize(image, h, w)))
        maps = lite0(image, side)
        assert maps.factors == (w / width, h / height)


def test_preparation_shrinks_as_the_backbone_within_one_grey_level(lite0, photo):
    for side in (37, 75, 100, 128, 149):
        prepared, sizes, _ = Preparation(PixelRules.of(lite0), (side,))(torch.from_numpy(photo))
        apart = (prepared[0] - standardised(lite0, resize(photo, *sizes[0].tolist()))).abs() * 127.5
        assert apart.max() < 1.001
        assert (apart > 0).float().mean() < 2e-3
