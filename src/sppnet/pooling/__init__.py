"""Spatial pyramid pooling: maps, or windows of them, of any size become vectors of one length.

A level of side n divides a map or window into n x n bins and keeps one number of each bin and channel. The
bins follow one rule, `bin_bounds`, in both doors: `SpatialPyramidPooling` pools whole maps as a layer of a
network, `pool_regions` pools any number of windows of maps that were computed once. Behind both stands one
operator, `sppnet.pooling.operator`, with a kernel for the CPU and one for GPUs.

The order of the numbers is the same, too: levels in the order given, and within a level channel-major,
``channel * n * n + row * n + column``.

Source: He, Zhang, Ren, Sun, "Spatial Pyramid Pooling in Deep Convolutional Networks for Visual Recognition"
(arXiv 1406.4729), section 2.2 and appendix A.
"""

from sppnet.pooling.bins import bin_bounds, pyramid_length, valid_levels
from sppnet.pooling.layer import SpatialPyramidPooling
from sppnet.pooling.regions import pool_region_chunks, pool_regions

__all__ = [
    "SpatialPyramidPooling",
    "bin_bounds",
    "pool_region_chunks",
    "pool_regions",
    "pyramid_length",
    "valid_levels",
]
