"""Spatial pyramid pooling: maps of any size become vectors of one length.

A level of side n divides a map or window into n x n bins and keeps one number of each bin and channel. The
bins follow one rule, `bin_bounds`, in all doors: `spatial_pyramid` pools whole maps, `SpatialPyramidPooling`
does so as a layer of a network, `pool_regions` pools any number of windows of maps that were computed once.

Maps are NumPy arrays, or PyTorch tensors. Behind both stands one kernel for the CPU, `sppnet.pooling.cpu`;
`sppnet.pooling.operator` makes an operator of PyTorch of it and of one for GPUs. Arrays do not need PyTorch.

The order of the numbers is the same, too: levels in the order given, and within a level channel-major,
``channel * n * n + row * n + column``.

Source: He, Zhang, Ren, Sun, "Spatial Pyramid Pooling in Deep Convolutional Networks for Visual Recognition"
(arXiv 1406.4729), section 2.2 and appendix A.

Names are imported on first use; ``__init__.pyi`` lists them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
