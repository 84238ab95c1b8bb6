"""Draw docs/architecture.svg, the rooms and the way of one image: python docs/draw_architecture.py."""

from html import escape
from pathlib import Path

FLOORS = (
    (("cli", "options in, one call, tables and pictures out"),),
    (
        ("serve", "a page to label, fit and look; an API"),
        ("cluster", "many machines"),
        ("measuring", "what units of work take"),
    ),
    (("drawing", "pictures"), ("onnx", "exact files for other runtimes")),
    (
        ("detection", "what is where in an image"),
        ("classification", "what an image shows"),
        ("retrieval", "vectors, search by region"),
    ),
    (
        ("features", "maps, vectors"),
        ("datasets", "any format"),
        ("proposals", "windows"),
        ("rpn", "networks learn"),
        ("planning", "what work takes"),
        ("evaluation", "how good"),
    ),
    (("pooling", "the paper's idea: any window of a map as a vector of fixed length"),),
    (("ground", "arrays, boxes, images, storage, errors, estimator, progress, models, photos"),),
)
STEPS = (
    ("photo.jpg", "a file"),
    ("images.read_image", "(H, W, 3) uint8, upright"),
    ("features: Backbone.encode", "EncodedImage: maps at every scale, once"),
    ("proposals", "(R, 4) windows in pixels"),
    ("features: WindowPooling", "scale by size, pixels to cells"),
    ("pooling: pool_regions", "(R, D) vectors"),
    ("detection: SVMs, ridge", "(R, K) scores, moved boxes"),
    ("detection: postprocess", "threshold, suppression"),
    ("Detections", "boxes, scores, labels"),
)
LEFT, ROOM_WIDTH, ROOM_HEIGHT, GAP = 20, 640, 62, 14
STEP_LEFT, STEP_WIDTH, STEP_HEIGHT = 740, 300, 44
STYLE = """
  text { font: 14px system-ui, sans-serif; fill: #16302d } .small { font-size: 11px; fill: #3f5753 }
  .title { font-weight: 600 }
  rect { fill: #e3f2ef; stroke: #2c7a6f; rx: 6 } .step { fill: #fdf3df; stroke: #b07d1e }
  path { stroke: #b07d1e; stroke-width: 1.5; fill: none; marker-end: url(#head) }
  .paper { fill: #ffffff; stroke: none }
"""


def box(x: float, y: float, width: float, height: float, name: str, text: str, kind: str = "room") -> str:
    """Return a rectangle with a name and a line below it."""
    centre, middle = f'x="{x + width / 2:g}" text-anchor="middle"', y + height / 2
    return (
        f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"/>'
        f'<text class="title" y="{middle - 3:g}" {centre}>{escape(name)}</text>'
        f'<text class="small" y="{middle + 13:g}" {centre}>{escape(text)}</text>'
    )


def picture() -> str:
    """Return the whole picture as SVG."""
    parts = []
    for floor, rooms in enumerate(FLOORS):
        y, width = 50 + floor * (ROOM_HEIGHT + GAP), (ROOM_WIDTH - GAP * (len(rooms) - 1)) / len(rooms)
        for place, (name, text) in enumerate(rooms):
            parts.append(box(LEFT + place * (width + GAP), y, width, ROOM_HEIGHT, name, text))
    pitch = STEP_HEIGHT + 12
    for number, (name, text) in enumerate(STEPS):
        y, middle = 50 + number * pitch, STEP_LEFT + STEP_WIDTH / 2
        parts.append(box(STEP_LEFT, y, STEP_WIDTH, STEP_HEIGHT, name, text, "step"))
        if number:
            parts.append(f'<path d="M{middle:g} {y - 12:g} V{y - 2:g}"/>')
    height = 50 + max(len(FLOORS) * (ROOM_HEIGHT + GAP), len(STEPS) * pitch)
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
        'orient="auto">'
        '<polygon points="0,0 8,4 0,8" fill="#b07d1e"/></marker>'
    )
    view = f"0 0 {STEP_LEFT + STEP_WIDTH + 20} {height}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view}" role="img">'
        "<title>The rooms of sppnet, and the way of one image</title>"
        f'<style>{STYLE}</style><defs>{head}</defs><rect class="paper" width="100%" height="100%"/>'
        f'<text class="title" x="{LEFT}" y="32">The rooms: each may know those on its floor and below</text>'
        f'<text class="title" x="{STEP_LEFT}" y="32">The way of one image</text>'
        + "\n".join(parts)
        + "</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_name("architecture.svg").write_text(picture(), encoding="utf-8")
