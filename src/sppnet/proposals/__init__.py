"""Candidate windows: boxes that may hold an object, whatever its class.

A method is a frozen record of settings. Called on an image it returns `sppnet.boxes.Windows`, best first;
what they promise stands at `Proposer`. `parse` makes a method of a name such as
``"selective-search+edge-boxes"``, `propose_all` runs one on many images, and `propose` writes their windows
to a file, which is a method, too. `sppnet.proposals.maps` has the one that looks at feature maps instead of
pixels.
"""

from sppnet.proposals.cache import cache_folder, propose_all
from sppnet.proposals.choosing import METHODS, Combined, parse
from sppnet.proposals.dense import DenseWindows
from sppnet.proposals.edge_boxes import EdgeBoxes
from sppnet.proposals.file import WindowsFromFile, image_key, read_windows, write_windows
from sppnet.proposals.method import Proposer
from sppnet.proposals.selective_search import SelectiveSearch
from sppnet.proposals.writing import Proposed, propose

__all__ = [
    "METHODS",
    "Combined",
    "DenseWindows",
    "EdgeBoxes",
    "Proposed",
    "Proposer",
    "SelectiveSearch",
    "WindowsFromFile",
    "cache_folder",
    "image_key",
    "parse",
    "propose",
    "propose_all",
    "read_windows",
    "write_windows",
]
