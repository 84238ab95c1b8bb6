"""Draw docs/overview.png: a photo, windows on its maps, and what the shipped detector finds. Run as::

    python docs/overview.py

The photo is two of scikit-image's side by side: a cat (S. van der Walt, CC0) and an astronaut (NASA, public
domain).
"""

from pathlib import Path

import numpy as np
import skimage
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sppnet import Detector, read_image
from sppnet.drawing import class_colour
from sppnet.features.projection import project
from sppnet.images import resize

SHOWN, SCALE, COLOURS = -0.5, 2, ("#e69f00", "#56b4e9", "#cc79a7")


def main() -> None:
    """Draw the three panels."""
    folder = Path(skimage.__file__).parent / "data"
    left, right = (read_image(folder / name) for name in ("chelsea.png", "astronaut.png"))
    photo = np.concatenate([left, resize(right, left.shape[0], left.shape[0])], axis=1)
    detector = Detector.load("animals")
    encoded = detector.encode(photo)
    found = detector.predict(photo).above(SHOWN)
    maps = encoded.scales[SCALE]
    energy = maps.stages[0].norm(dim=0).numpy()
    windows = np.array([*found.boxes[:2], [20, 30, 180, 170]], np.float32)
    cells = project(windows, maps, projection=detector.projection)

    figure = Figure(figsize=(12, 1.95), layout="constrained")
    axes = figure.subplots(1, 3)
    axes[0].imshow(photo)
    axes[1].imshow(energy, cmap="magma")
    axes[2].imshow(photo)
    for (x1, y1, x2, y2), label, score in zip(found.boxes, found.labels, found.scores, strict=True):
        colour = np.array(class_colour(label, detector.classes_)) / 255
        axes[2].add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, lw=2))
        style = {"facecolor": colour, "edgecolor": "none", "pad": 1.5}
        axes[2].text(x1 + 6, y1 + 26, f"{label} {score:.1f}", color="white", fontsize=9, bbox=style)
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
