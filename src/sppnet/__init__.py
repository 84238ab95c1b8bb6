"""Spatial pyramid pooling: one convolutional pass over an image of any size, then any window as a vector.

Names are imported on first use, so that ``import sppnet`` stays light; ``__init__.pyi`` lists them.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
