import numpy as np
import pytest

from sppnet.features.geometry import Geometry

# The released code's mapping: specification 5.4.
ZF5 = Geometry(16, 20)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_released_zf5_layer_by_layer():
    geometry = Geometry(1, 0)
    layers = [(7, 2, 1), (3, 2, 0), (5, 2, 0), (3, 2, 0), (3, 1, 1), (3, 1, 1), (3, 1, 1)]
    # (k - 1) / 2 - padding times the product of earlier strides: 2, 1 * 2, 2 * 4, 1 * 8, 0, 0, 0.
    expected = [(2, 2), (4, 4), (8, 12), (16, 20), (16, 20), (16, 20), (16, 20)]
    for layer, after in zip(layers, expected, strict=True):
        geometry = geometry.through(*layer)
        assert (geometry.stride, geometry.offset) == after


def test_dilation_widens_the_kernel_about_its_centre():
    assert Geometry(4, 3).through(3, 1, 0, dilation=2) == Geometry(4, 3 + 2 * 4)
    assert Geometry(4, 3).through(2, 1, 0, dilation=3) == Geometry(4, 3 + 1.5 * 4)
    assert Geometry(4, 3).through(3, 2, 2, dilation=2) == Geometry(8, 3)


@pytest.mark.parametrize("geometry", [Geometry(16, 15), Geometry(32, 0), Geometry(8, 3.5), Geometry(4, -1)])
def test_cells_are_those_centred_inside_the_input(geometry):
    for length in (1, 2, 5, 8, 15, 16, 17, 31, 32, 33, 100, 224):
        inside = sum(geometry.stride * u + geometry.offset <= length - 0.5 for u in range(200))
        assert geometry.cells(length) == max(1, inside)
