"""What several tests of exports share."""

import numpy as np
import pytest

from sppnet.images import read_image
from sppnet.photos import demo_photo


@pytest.fixture(scope="session")
def photo():
    """Cows in a meadow, 300 x 451."""
    return np.ascontiguousarray(read_image(demo_photo())[:300, :451])
