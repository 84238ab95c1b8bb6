import sys

import pytest

from sppnet.errors import SppnetError, check_extra


def test_an_extra_that_is_installed():
    check_extra("torch", "training a network")
    check_extra("search", "a large index")


@pytest.mark.parametrize("package", ["torch", "timm", "lightning_fabric"])
def test_a_package_of_an_extra_is_missing(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SppnetError) as caught:
        check_extra("torch", "training a network")
    assert str(caught.value) == 'training a network needs PyTorch: pip install "sppnet[torch]"'
