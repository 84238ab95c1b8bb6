"""The demonstration: forty little scenes with the faces of cats, dogs and pandas, drawn by chance.

Each is drawn anew where it is needed, the same ones each time: nothing is shipped, and nobody's rights touch
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from platformdirs import user_cache_path

from sppnet.arrays import Pixels
from sppnet.boxes import Target
from sppnet.images import write_image
from sppnet.storage import atomic_folder

COUNT, WIDTH, HEIGHT = 40, 640, 480

Colour = tuple[int, int, int]
Box = tuple[float, ...]
Random = np.random.Generator

# Shapes are drawn with so many bits behind the point.
_BITS = 4
_VERSION = 1
_COATS: dict[str, tuple[Colour, ...]] = {
    "cat": ((226, 143, 58), (92, 88, 92), (58, 48, 46), (214, 196, 170), (150, 112, 78)),
    "dog": ((150, 98, 52), (206, 168, 116), (96, 66, 44), (120, 112, 108), (222, 202, 178)),
    "panda": ((244, 242, 238), (232, 226, 214), (238, 240, 244), (226, 220, 212), (248, 244, 236)),
}
_INK: Colour = (38, 30, 30)
_PINK: Colour = (224, 138, 146)


class Scene(NamedTuple):
    """A scene that was drawn.

    Attributes
    ----------
    pixels : (480, 640, 3) uint8
    target : Target
        The faces in it.
    """

    pixels: Pixels
    target: Target


class Brush:
    """Draws smooth shapes in a frame of its own: unit lengths, turned, about the middle of a face.

    Parameters
    ----------
    canvas : (H, W, 3) uint8
        Is drawn on.
    x, y, size, turn : float
        Middle and half width of the frame in pixels, and its turn in degrees.
    """

    def __init__(self, canvas: Pixels, x: float, y: float, size: float, turn: float = 0.0) -> None:
        self.canvas, self.x, self.y, self.size, self.turn = canvas, x, y, size, turn

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Return the pixel of a place of the frame."""
        cos, sin = math.cos(math.radians(self.turn)), math.sin(math.radians(self.turn))
        return self.x + self.size * (x * cos - y * sin), self.y + self.size * (x * sin + y * cos)

    def oval(self, x: float, y: float, w: float, h: float, colour: Colour, turn: float = 0.0) -> None:
        """Draw an oval of half width `w` and half height `h`."""
        middle = tuple(round(v * 2**_BITS) for v in self.place(x, y))
        axes = round(self.size * w * 2**_BITS), round(self.size * h * 2**_BITS)
        angle = self.turn + turn
        cv2.ellipse(self.canvas, middle, axes, angle, 0, 360, colour, -1, cv2.LINE_AA, _BITS)

    def shape(self, corners: list[tuple[float, float]], colour: Colour) -> None:
        """Draw a polygon."""
        points = np.array([self.place(x, y) for x, y in corners]) * 2**_BITS
        cv2.fillPoly(self.canvas, [points.round().astype(np.int32)], colour, cv2.LINE_AA, _BITS)

    def line(self, points: list[tuple[float, float]], width: float, colour: Colour) -> None:
        """Draw a line through points."""
        places = (np.array([self.place(x, y) for x, y in points]) * 2**_BITS).round().astype(np.int32)
        thick = max(1, round(width * self.size))
        cv2.polylines(self.canvas, [places], False, colour, thick, cv2.LINE_AA, _BITS)


def _lighter(colour: Colour, by: float) -> Colour:
    """Return a colour nearer to white, or to black where `by` is negative."""
    end = 255 if by > 0 else 0
    r, g, b = (round(value + abs(by) * (end - value)) for value in colour)
    return r, g, b


def _face(brush: Brush, coat: Colour, muzzle: Colour, wide: float, high: float) -> None:
    """Draw what all faces have: a head, eyes, a muzzle with a nose."""
    brush.oval(0, 0.05, wide, high, coat)
    brush.oval(0, 0.42, 0.42, 0.32, muzzle)
    for side in (-1, 1):
        brush.oval(0.38 * side, -0.08, 0.15, 0.17, (250, 250, 246))
        brush.oval(0.38 * side, -0.06, 0.10, 0.14, _INK)
        brush.oval(0.38 * side - 0.04, -0.11, 0.035, 0.04, (255, 255, 255))


def _cat(brush: Brush, coat: Colour, random: Random) -> None:
    for side in (-1, 1):
        brush.shape([(0.92 * side, -1.0), (0.22 * side, -0.66), (0.86 * side, -0.2)], coat)
        brush.shape([(0.83 * side, -0.82), (0.40 * side, -0.62), (0.76 * side, -0.34)], _PINK)
    _face(brush, coat, _lighter(coat, 0.65), 0.92, 0.82)
    dark = _lighter(coat, -0.35)
    for x in (-0.2, 0.0, 0.2):
        brush.line([(x, -0.7), (0.8 * x, -0.42)], 0.07, dark)
    brush.shape([(-0.1, 0.26), (0.1, 0.26), (0, 0.37)], _PINK)
    brush.line([(-0.2, 0.5), (-0.08, 0.54), (0, 0.37), (0.08, 0.54), (0.2, 0.5)], 0.03, _INK)
    for side in (-1, 1):
        for i in (-1, 0, 1):
            brush.line(
                [(0.24 * side, 0.42 + 0.04 * i), (1.05 * side, 0.36 + 0.14 * i)], 0.02, (245, 245, 245)
            )


def _dog(brush: Brush, coat: Colour, random: Random) -> None:
    ears = _lighter(coat, -0.38)
    _face(brush, coat, _lighter(coat, 0.5), 0.80, 0.92)
    for side in (-1, 1):
        brush.oval(0.84 * side, 0.02, 0.23, 0.62, ears, -14 * side)
    brush.oval(0, 0.3, 0.19, 0.14, _INK)
    brush.oval(-0.05, 0.25, 0.05, 0.03, (150, 150, 150))
    brush.line([(0, 0.42), (0, 0.54)], 0.03, _INK)
    brush.line([(-0.24, 0.52), (-0.12, 0.6), (0, 0.54), (0.12, 0.6), (0.24, 0.52)], 0.03, _INK)
    if random.random() < 0.6:
        brush.oval(0.02, 0.72, 0.11, 0.17, (214, 92, 104))


def _panda(brush: Brush, coat: Colour, random: Random) -> None:
    dark = _lighter(coat, -0.82)
    for side in (-1, 1):
        brush.oval(0.72 * side, -0.68, 0.27, 0.27, dark)
    brush.oval(0, 0.05, 0.92, 0.84, coat)
    for side in (-1, 1):
        brush.oval(0.4 * side, -0.02, 0.24, 0.32, dark, 24 * side)
        brush.oval(0.36 * side, -0.05, 0.11, 0.12, (250, 250, 246))
        brush.oval(0.36 * side, -0.04, 0.07, 0.09, _INK)
    brush.oval(0, 0.34, 0.14, 0.1, dark)
    brush.line([(0, 0.42), (0, 0.52)], 0.03, _INK)
    brush.line([(-0.2, 0.5), (-0.1, 0.56), (0, 0.52), (0.1, 0.56), (0.2, 0.5)], 0.03, _INK)


_FACES: dict[str, Callable[[Brush, Colour, Random], None]] = {"cat": _cat, "dog": _dog, "panda": _panda}
# How far a face reaches from its middle, in half widths: left, up, right, down.
_REACH = {"cat": (0.95, 1.0, 0.95, 0.88), "dog": (1.06, 0.88, 1.06, 0.97), "panda": (0.97, 0.95, 0.97, 0.9)}


def scene(number: int) -> Scene:
    """Draw a scene.

    Parameters
    ----------
    number : int
        Which one: the same number gives the same pixels.
    """
    random = np.random.default_rng([_VERSION, number])
    canvas = _background(random)
    for _ in range(int(random.integers(1, 4))):
        _thing(canvas, random)
    boxes: list[Box] = []
    labels: list[str] = []
    for _ in range(int(random.integers(2, 5))):
        kind = ("cat", "dog", "panda")[int(random.integers(3))]
        box = _animal(canvas, kind, boxes, random)
        if box is not None:
            boxes.append(box)
            labels.append(kind)
    return Scene(_photographed(canvas, random), Target.of(boxes, labels))


def _animal(canvas: Pixels, kind: str, others: list[Box], random: Random) -> Box | None:
    """Draw an animal where none is yet, and return the box of its face; None without a place."""
    left, up, right, down = _REACH[kind]
    for _ in range(30):
        size = float(random.uniform(34, 92))
        x = float(random.uniform(size * left, WIDTH - size * right))
        y = float(random.uniform(size * up, HEIGHT - size * down))
        box = (x - size * left, y - size * up, x + size * right, y + size * down)
        if not any(_near(box, other) for other in others):
            break
    else:
        return None
    coats = _COATS[kind]
    coat = _lighter(coats[int(random.integers(len(coats)))], float(random.uniform(-0.12, 0.12)))
    body = Brush(canvas, x, y + 1.5 * size, size)
    body.oval(0, 0, 0.95, 1.1, _lighter(coat, -0.12))
    body.oval(0, 0.15, 0.5, 0.8, _lighter(coat, 0.35))
    _FACES[kind](Brush(canvas, x, y, size, float(random.uniform(-9, 9))), coat, random)
    return tuple(round(edge) for edge in box)


def _near(box: Box, other: Box) -> bool:
    """Tell whether a face, with its body, and another one would lie over each other."""
    gap, body = 6, 1.2 * (box[3] - box[1])
    apart = box[2] + gap < other[0] or other[2] + gap < box[0]
    return not (apart or box[3] + body < other[1] or other[3] + body < box[1])


def _background(random: Random) -> Pixels:
    """Return a meadow, a room, a beach, snow or an evening, without anybody."""
    tops = ((150, 200, 240), (222, 206, 184), (120, 190, 230), (206, 218, 230), (60, 62, 110))
    bottoms = ((104, 160, 84), (150, 108, 76), (232, 212, 160), (242, 246, 250), (64, 84, 74))
    which = int(random.integers(len(tops)))
    horizon = int(random.uniform(0.35, 0.65) * HEIGHT)
    rows = np.linspace(0, 1, HEIGHT)[:, None, None]
    top, bottom = np.array(tops[which], float), np.array(bottoms[which], float)
    shade = np.where(rows * HEIGHT < horizon, top + 40 * rows, bottom - 50 * (rows - 0.5))
    canvas = np.ascontiguousarray(np.broadcast_to(shade, (HEIGHT, WIDTH, 3)).clip(0, 255).astype(np.uint8))
    if which != 1:
        for _ in range(3):
            x, w = random.uniform(0, WIDTH), random.uniform(90, 260)
            hill = _lighter(bottoms[which], float(random.uniform(-0.25, 0.1)))
            Brush(canvas, float(x), horizon + 20, float(w)).oval(0, 0, 1, 0.4, hill)
    return canvas


def _thing(canvas: Pixels, random: Random) -> None:
    """Draw a ball, a flower or a tree: what is no face."""
    colour = tuple(int(value) for value in random.integers(50, 240, 3))
    r, g, b = colour
    brush = Brush(
        canvas,
        float(random.uniform(0, WIDTH)),
        float(random.uniform(0.3, 1) * HEIGHT),
        float(random.uniform(16, 60)),
    )
    kind = int(random.integers(3))
    if kind == 0:
        brush.oval(0, 0, 1, 1, (r, g, b))
        brush.oval(-0.3, -0.3, 0.3, 0.25, _lighter((r, g, b), 0.5))
    elif kind == 1:
        brush.line([(0, 0), (0.1, 2.4)], 0.12, (70, 130, 60))
        for turn in range(0, 360, 60):
            away = math.radians(turn)
            brush.oval(0.6 * math.cos(away), 0.6 * math.sin(away), 0.4, 0.4, (r, g, b))
        brush.oval(0, 0, 0.35, 0.35, (240, 200, 60))
    else:
        brush.shape([(-0.18, 2), (0.18, 2), (0.12, 0), (-0.12, 0)], (110, 78, 52))
        for x, y in ((0, -0.5), (-0.6, 0), (0.6, 0)):
            brush.oval(x, y, 0.75, 0.7, (60, 120, 70))


def _photographed(canvas: Pixels, random: Random) -> Pixels:
    """Return a scene with the light and the grain of a photo."""
    x, y = np.meshgrid(np.linspace(-1, 1, WIDTH), np.linspace(-1, 1, HEIGHT))
    light = 1 + random.uniform(-0.15, 0.15) * x + random.uniform(-0.15, 0.15) * y - 0.12 * (x**2 + y**2)
    coarse = cv2.resize(random.normal(0, 4, (HEIGHT // 6, WIDTH // 6)), (WIDTH, HEIGHT))
    grain = random.normal(0, 3, (HEIGHT, WIDTH))
    bright = cv2.GaussianBlur(canvas, (3, 3), 0.6) * light[:, :, None] + (coarse + grain)[:, :, None]
    return np.asarray(bright.clip(0, 255), np.uint8)


def demo_folder() -> Path:
    """Return the folder of the demonstration's photos; drawn when it is first asked for, and kept.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    folder = user_cache_path("sppnet") / f"demo-{_VERSION}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as place:
            for number in range(COUNT):
                write_image(place / f"scene-{number + 1:02d}.jpg", scene(number).pixels, quality=88)
    return folder
