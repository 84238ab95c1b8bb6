"""From a window of the image to a window of a map: the scale that suits it, then the cells that it covers.

The rules are written once, for whatever follows the array API: the detector follows them on arrays, and on
the values of a graph they write themselves into an ONNX file (paper section 4.1 and appendix A).
"""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace

from sppnet.arrays import FloatArray, IntArray
from sppnet.errors import check_choice
from sppnet.features.encoded import FeatureMaps
from sppnet.features.geometry import Geometry

# How a window is projected onto a map: the shrink of `covered_cells`, in strides. The released code has 6.5
# pixels at stride 16. Half a stride leaves no tolerance, which is the paper's rule (appendix A).
PROJECTIONS = {"released": 6.5 / 16, "paper": 0.5}

# How a window's scale is chosen: the side that it should have there, in pixels. See `choose_scale`.
SCALE_RULES = {"released": 208, "paper": 224}


def choose_scale(boxes: Any, shorter: Any, sides: Any, reference: float, rule: str) -> Any:
    """Choose for each box the scale at which it is nearest to `reference` pixels in side.

    The shorter side of the resized image that would give the box an area of ``reference ** 2`` is
    ``reference * shorter / sqrt(area)``. The smaller scale wins on ties.

    Parameters
    ----------
    boxes : (R, 4) float array or tensor
        Boxes in pixels of the original image, 0-based and half-open.
    shorter : int, or tensor of no dimension
        Shorter side of the original image in pixels.
    sides : sequence of int, or (S,) float64 array or tensor
        Shorter side of the resized image at each scale, in pixels.
    reference : float
        Side in pixels that a box should have at its scale: 224 in the paper, 208 in the released code.
    rule : {"released", "paper"}
        ``"released"``: the scale nearest to that side, rounded (released code, specification 5.3).
        ``"paper"``: the scale at which the number of the box's pixels is nearest to ``reference ** 2``
        (section 4.1).

    Returns
    -------
    (R,) int64 array or tensor
        Place of each box's scale in `sides`.

    Raises
    ------
    SppnetError
        If the rule has no such name.
    """
    check_choice("scale rule", rule, SCALE_RULES)
    xp = array_namespace(boxes)
    # In double precision: whether two scales are equally near must not hang on rounding.
    exact = xp.astype(boxes, xp.float64)
    areas = (exact[:, 2] - exact[:, 0]) * (exact[:, 3] - exact[:, 1])
    areas = xp.where(areas < 1, xp.ones_like(areas), areas)
    sides = xp.asarray(sides, dtype=xp.float64)
    wanted = reference * shorter
    if rule == "paper":
        # The numbers of pixels differ by area / shorter ** 2 times this.
        gaps = xp.abs(sides**2 - (wanted**2 / areas)[:, None])
    else:
        gaps = xp.abs(sides - xp.floor(wanted / xp.sqrt(areas) + 0.5)[:, None])
    nearest = gaps == xp.min(gaps, axis=1, keepdims=True)
    return xp.argmin(xp.where(nearest, sides, xp.inf), axis=1)


def response_cells(first: Any, last: Any, geometry: Geometry, shrink: float) -> tuple[Any, Any]:
    """Return the first and last cell of a window as the formulas give them; see `covered_cells`.

    ``first cell = floor((first - offset + shrink) / stride + 1/2)``,
    ``last cell = ceil((last - offset - shrink) / stride - 1/2)``. At a shrink of half a stride these are the
    paper's ``floor(x / S) + 1`` and ``ceil(x / S) - 1``, of ``x = first - offset`` and ``last - offset``. The
    last may lie before the first, and both outside the map.
    """
    xp = array_namespace(first)
    low = xp.floor((first - geometry.offset + shrink) / geometry.stride + 0.5)
    high = xp.ceil((last - geometry.offset - shrink) / geometry.stride - 0.5)
    return low, high


def covered_cells(first: Any, last: Any, geometry: Geometry, shrink: float) -> tuple[Any, Any]:
    """Return the first and last cell of a window given by its first and last pixel (specification 5.4).

    `response_cells`: the cells centred inside the window, with a tolerance of ``stride / 2 - shrink`` pixels.
    Where there is none, both become the middle of the two.

    Parameters
    ----------
    first, last : float arrays or tensors of one shape
        Pixels of the resized image, 0-based and inclusive.
    geometry : Geometry
        Where the cells of the map lie in the resized image.
    shrink : float
        6.5 pixels at stride 16 in the released code, 8 by the paper's rule.
    """
    xp = array_namespace(first)
    low, high = response_cells(first, last, geometry, shrink)
    middle, empty = xp.floor((low + high) / 2), low > high
    return xp.where(empty, middle, low), xp.where(empty, middle, high)


def scaled(boxes: Any, factors: Any) -> tuple[Any, Any]:
    """Return the (R, 2) first and last pixels, x and y, that boxes cover in the resized image.

    Parameters
    ----------
    boxes : (R, 4) float array or tensor
        Boxes in pixels of the original image, 0-based and half-open.
    factors : (2,) or (R, 2) float64 array or tensor
        Pixels of the resized image per pixel of the original, in x and y.
    """
    xp = array_namespace(boxes)
    exact = xp.astype(boxes, xp.float64)
    # Resizing keeps pixel areas: the centre of pixel p moves to (p + 1/2) * factor - 1/2.
    return (exact[:, :2] + 0.5) * factors - 0.5, (exact[:, 2:] - 0.5) * factors - 0.5


def project_onto(boxes: Any, factors: Any, limits: Any, geometry: Geometry, projection: str) -> Any:
    """Project boxes of the image onto a map of a given size; see `project`.

    Parameters
    ----------
    boxes : (R, 4) float array or tensor
        Boxes in pixels of the original image, 0-based and half-open.
    factors : (2,) or (R, 2) float64 array or tensor
        Pixels of the resized image per pixel of the original, in x and y.
    limits : (2,) or (R, 2) float64 array or tensor
        The last cells of the map, in x and y.
    geometry : Geometry
        Where the cells of the map lie in the resized image.
    projection : {"released", "paper"}
        See `project`.

    Returns
    -------
    (R, 4) int64 array or tensor
    """
    check_choice("projection", projection, PROJECTIONS)
    xp = array_namespace(boxes)
    low, high = covered_cells(*scaled(boxes, factors), geometry, PROJECTIONS[projection] * geometry.stride)

    def inside(cells: Any) -> Any:
        return xp.minimum(xp.maximum(cells, xp.zeros_like(cells)), limits)

    return xp.astype(xp.concat([inside(low), inside(high) + 1], axis=1), xp.int64)


def project(boxes: FloatArray, maps: FeatureMaps, stage: int = 0, projection: str = "released") -> IntArray:
    """Project boxes of the image onto one of its maps.

    The cells are those of `covered_cells`, with the offset derived from the network and the shrink in
    proportion to its stride.

    Parameters
    ----------
    boxes : (R, 4) float array
        Boxes in pixels of the original image, 0-based and half-open.
    maps : FeatureMaps
        The maps at one scale.
    stage : int
        Which of the maps.
    projection : {"released", "paper"}
        ``"released"`` takes the cells centred less than 1.5 pixels (at stride 16) outside the centres of the
        window's first and last pixel, as the released code does; ``"paper"`` those centred strictly between
        the two (appendix A).

    Returns
    -------
    (R, 4) int64
        Windows of the map, 0-based half-open cells, at least one cell, inside the map.

    Raises
    ------
    SppnetError
        If the projection has no such name.
    """
    xp = array_namespace(boxes)
    height, width = maps.stages[stage].shape[-2:]
    limits = xp.asarray([width - 1, height - 1], dtype=xp.float64)
    factors = xp.asarray(maps.factors, dtype=xp.float64)
    cells: IntArray = project_onto(boxes, factors, limits, maps.geometry[stage], projection)
    return cells


def responses(boxes: FloatArray, maps: FeatureMaps, projection: str = "released") -> IntArray:
    """Return what tells apart the cells that boxes cover on the maps of one scale.

    Boxes of equal rows cover the same cells of every stage. As in the released code, where windows of one
    "response box" are duplicates, these are the cells as the formulas give them (`response_cells`).
    Parameters are those of `project`.

    Returns
    -------
    (R, 4 * stages) int64
    """
    check_choice("projection", projection, PROJECTIONS)
    xp = array_namespace(boxes)
    first, last = scaled(boxes, xp.asarray(maps.factors, dtype=xp.float64))
    cells = [response_cells(first, last, g, PROJECTIONS[projection] * g.stride) for g in maps.geometry]
    rows: IntArray = xp.astype(xp.concat([end for ends in cells for end in ends], axis=1), xp.int64)
    return rows
