"""How the server sees photos: what its engine, its fits and its cache of maps must agree on."""

from __future__ import annotations

NETWORK = "pyramid-lite0"
"""The network, which comes with sppnet."""

SIDE = 384
"""Shorter side in pixels at which the network looks at photos."""
