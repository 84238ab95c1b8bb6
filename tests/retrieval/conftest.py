"""A folder of photos that the tests of this room read and do not change."""

import pytest

import trees


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Eight pictures, two of them in a folder below; not to be changed."""
    root = tmp_path_factory.mktemp("photos")
    for n in range(1, 9):
        trees.save(root / ("more" if n > 6 else "") / f"{n}.png", trees.scene(n).image)
    return root
