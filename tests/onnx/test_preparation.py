import numpy as np
import pytest

from graphs import run, written
from sppnet.images import resize
from sppnet.onnx.nodes import Nodes
from sppnet.onnx.preparation import PixelRules, prepare

RULES = PixelRules((10.0, 100.0, 120.5), (50.0, 60.0, 70.25), 32)


def session_of(scales, rules=RULES):
    op = Nodes()
    prepared = prepare(op, op.input("image", np.uint8, ["h", "w", 3]), rules, scales)
    return written(op, prepared.size, *prepared.sizes, *prepared.images)


def standardised(image, rules=RULES):
    """Return what a network takes of a resized image: standardised, and padded with what is 0 then."""
    height, width = (-(-n // rules.multiple) * rules.multiple for n in image.shape[:2])
    padded = np.zeros((height, width, 3), np.float32)
    padded[: image.shape[0], : image.shape[1]] = (image - np.float32(rules.mean)) / np.float32(rules.std)
    return padded.transpose(2, 0, 1)[None]


@pytest.fixture(scope="module")
def session():
    return session_of((64, 240, 270))


@pytest.mark.parametrize(
    ("height", "width"), [(300, 451), (451, 61), (240, 240), (97, 451), (13, 11), (9, 451), (451, 5), (1, 1)]
)
def test_preparation_is_the_backbones_to_the_bit(session, lite0, photo, height, width):
    image = np.ascontiguousarray(np.tile(photo, (2, 1, 1))[:height, :width])
    size, *found = run(session, image)
    sizes, images = found[:3], found[3:]
    assert size.tolist() == [height, width]
    for pixels, (h, w), side in zip(images, sizes, (64, 240, 270), strict=True):
        assert lite0(image, side).factors == (w / width, h / height)
        if height <= 2 * h or width <= 2 * w:
            assert np.array_equal(pixels, standardised(resize(image, h, w)))


@pytest.mark.parametrize("side", [37, 75, 100, 128, 149])
def test_preparation_shrinks_as_the_backbone_within_one_grey_level(photo, side):
    _, size, pixels = run(session_of((side,)), photo)
    apart = np.abs(pixels - standardised(resize(photo, *size)))[0].transpose(1, 2, 0) * RULES.std
    assert apart.max() < 1.001
    assert (apart > 1e-3).mean() < 2e-3


def test_without_padding(photo):
    rules = RULES._replace(multiple=1)
    _, size, pixels = run(session_of((150,), rules), photo)
    assert pixels.shape == (1, 3, *size)
    assert np.array_equal(pixels, standardised(resize(photo, *size), rules))
