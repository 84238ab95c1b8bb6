"""Pictures of results: detections on an image, contact sheets, curves, confusion, whole reports.

Pictures are (H, W, 3) uint8 RGB; what draws into a file replaces it whole or not at all. Classes have colours
that are told apart in colour blindness, the same in all pictures, and names are drawn whatever their script.
"""

from sppnet.drawing.colours import class_colour
from sppnet.drawing.detections import draw_detections, draw_region, draw_target, picture_paths
from sppnet.drawing.plots import draw_classification_report, plot_confusion, plot_curves
from sppnet.drawing.report import write_detection_report
from sppnet.drawing.sheets import contact_sheet, draw_dataset, draw_hits

__all__ = [
    "class_colour",
    "contact_sheet",
    "draw_classification_report",
    "draw_dataset",
    "draw_detections",
    "draw_hits",
    "draw_region",
    "draw_target",
    "picture_paths",
    "plot_confusion",
    "plot_curves",
    "write_detection_report",
]
