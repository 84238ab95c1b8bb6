"""How the server sees photos: what its engine, its fits and its cache of maps must agree on."""

from __future__ import annotations

SIDE = 384
"""Shorter side in pixels at which the network looks at photos."""
