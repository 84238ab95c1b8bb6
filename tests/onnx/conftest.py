"""What several tests of exports share."""

import pytest


@pytest.fixture(scope="session")
def photo():
    """A cat, 300 x 451."""
    return pytest.importorskip("skimage.data").chelsea()
