"""Draw docs/overview.png: a photo, windows on its maps, and what the shipped detector finds. Run as::

python docs/overview.py
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sppnet import Detector, read_image
from sppnet.boxes import score_texts
from sppnet.drawing import class_colour
from sppnet.features.projection import project
from sppnet.photos import demo_photo

SCALE, COLOURS = 2, ("#e69f00", "#56b4e9", "#cc79a7")


def main() -> None:
    """Draw the three panels."""
    photo = read_image(demo_photo())
    detector = Detector.load("animals")
    encoded = detector.encode(photo)
    found = detector.predict(photo)
    maps = encoded.scales[SCALE]
    energy = np.linalg.norm(maps.stages[0], axis=0)
    windows = np.array([*found.boxes[:2], [420, 10, 590, 130]], np.float32)
    cells = project(windows, maps, projection=detector.projection)

    figure = Figure(figsize=(12, 2.5), layout="constrained")
    axes = figure.subplots(1, 3)
    axes[0].imshow(photo)
    axes[1].imshow(energy, cmap="magma")
    axes[2].imshow(photo)
    scores = score_texts(found.scores)
    for (x1, y1, x2, y2), label, score in zip(found.boxes, found.labels, scores, strict=True):
        colour = np.array(class_colour(label, detector.classes_)) / 255
        axes[2].add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, lw=2))
        style = {"facecolor": colour, "edgecolor": "none", "pad": 1.5}
        axes[2].text((x1 + x2) / 2, y1 - 8, f"{label} {score}", ha="center", fontsize=9, bbox=style)
    for (x1, y1, x2, y2), (u1, v1, u2, v2), colour in zip(windows, cells, COLOURS, strict=True):
        axes[0].add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, lw=2))
        place = (u1 - 0.5, v1 - 0.5)
        axes[1].add_patch(Rectangle(place, u2 - u1, v2 - v1, fill=False, ec=colour, lw=2))
    titles = (
        "an image of any size, any windows",
        f"maps, computed once ({energy.shape[1]} x {energy.shape[0]} cells)",
        "every window pooled, scored, moved",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=11)
        axis.set_axis_off()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
