"""Tests of servers, and of the page in Chromium, start processes of their own: they run where asked for."""

import os

import pytest

ASKED = "SPPNET_TEST_SERVE"
QUICK = ("test_page_built", "test_parts")


def pytest_collection_modifyitems(items):
    """Skip, visibly, what needs a server, unless ``make test-serve`` runs it."""
    why = pytest.mark.skip(reason="needs a server of several processes: make test-serve runs it")
    for item in items:
        here = item.path.parent.name == "serve"
        if here and item.path.stem not in QUICK and not os.environ.get(ASKED):
            item.add_marker(why)
