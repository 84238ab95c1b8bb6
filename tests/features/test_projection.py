import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from sppnet.errors import SppnetError
from sppnet.features.encoded import FeatureMaps
from sppnet.features.geometry import Geometry
from sppnet.features.projection import (
    PROJECTIONS,
    SCALE_RULES,
    choose_scale,
    covered_cells,
    project,
    project_onto,
    response_cells,
    responses,
)

# The released code's mapping: specification 5.4.
ZF5 = Geometry(16, 20)
HEIGHT, WIDTH = 375, 500
SIDES = (480, 576, 688, 874, 1200)
MAPS = {480: (39, 29), 576: (47, 35), 688: (56, 42), 864: (71, 53), 1200: (99, 74)}  # width, height of conv5
# Window (1-based, inclusive), expected side, scale, cells (1-based, inclusive) there, cells at 688.
VECTORS = [
    ((1, 1, 500, 375), 180, 480, (1, 1, 39, 29), (1, 1, 56, 42)),
    ((100, 100, 200, 250), 632, 576, (10, 10, 18, 23), (12, 12, 22, 28)),
    ((10, 20, 60, 70), 1529, 1200, (2, 4, 11, 13), (1, 2, 6, 7)),
    ((48, 240, 195, 371), 558, 576, (5, 23, 18, 35), (6, 28, 22, 42)),
    ((8, 12, 352, 348), 229, 480, (1, 1, 27, 27), (1, 1, 40, 39)),
    ((300, 200, 320, 220), 3714, 1200, (60, 40, 63, 43), (34, 23, 36, 24)),
    ((1, 1, 20, 20), 3900, 1200, (1, 1, 3, 3), (1, 1, 2, 2)),
    ((480, 350, 500, 375), 3338, 1200, (96, 70, 99, 74), (55, 40, 56, 42)),
]
# The same for the paper's rules, without the expected side. The formulas floor((x - 21) / 16) + 1 and
# ceil((x - 21) / 16) - 1 of 1-based x count the released network's cells from 0.
PAPER_SIDES = (480, 576, 688, 864, 1200)
PAPER_VECTORS = [
    ((1, 1, 500, 375), 480, (1, 1, 39, 29), (1, 1, 56, 42)),
    ((100, 100, 200, 250), 688, (12, 12, 22, 28), (12, 12, 22, 28)),
    ((10, 20, 60, 70), 1200, (2, 4, 11, 13), (1, 2, 6, 7)),
    ((48, 240, 195, 371), 576, (5, 23, 18, 35), (6, 28, 22, 42)),
    ((8, 12, 352, 348), 480, (1, 1, 27, 27), (1, 2, 40, 39)),
    ((300, 200, 320, 220), 1200, (60, 40, 63, 43), (35, 23, 36, 24)),
    ((1, 1, 20, 20), 1200, (1, 1, 3, 3), (1, 1, 1, 1)),
    ((480, 350, 500, 375), 1200, (96, 70, 99, 74), (55, 40, 56, 42)),
    ((200, 100, 296, 196), 864, (29, 15, 42, 27), (23, 12, 33, 22)),
]
WINDOWS = np.array([v[0] for v in VECTORS], np.float32) - np.array([1, 1, 0, 0], np.float32)  # half-open


def chosen_scales(boxes, height, width, sides, reference=None, rule="released"):
    """Choose the scales of boxes, as arrays and as tensors, which must agree."""
    wanted = reference or SCALE_RULES[rule]
    chosen = choose_scale(boxes, min(height, width), sides, wanted, rule)
    tensors = choose_scale(torch.from_numpy(boxes), torch.tensor(min(height, width)), sides, wanted, rule)
    assert tensors.dtype == torch.int64
    np.testing.assert_array_equal(tensors.numpy(), chosen)
    return chosen


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def matlab_cells(window, side, shrink):
    """Return the 1-based inclusive cells of a 1-based inclusive window, clamped to the map."""
    corners = (np.array(window, float) - 1) * (side - 1) / (min(HEIGHT, WIDTH) - 1)
    low, high = covered_cells(corners[:2], corners[2:], ZF5, shrink)
    limits = np.array(MAPS[side]) - 1
    return tuple(int(v) + 1 for v in (*np.clip(low, 0, limits), *np.clip(high, 0, limits)))


@pytest.mark.parametrize("vector", VECTORS)
def test_windows_cover_the_cells_of_the_released_code(vector):
    window, _, side, at_scale, at_688 = vector
    assert matlab_cells(window, side, 6.5) == at_scale
    assert matlab_cells(window, 688, 6.5) == at_688


@pytest.mark.parametrize("vector", PAPER_VECTORS)
def test_windows_cover_the_cells_of_the_paper(vector):
    window, side, at_scale, at_688 = vector
    assert matlab_cells(window, side, 8) == at_scale
    assert matlab_cells(window, 688, 8) == at_688


@pytest.mark.parametrize("stride", [8, 12, 16, 32])
def test_a_shrink_of_half_a_stride_is_the_formula_of_the_paper(stride):
    for first in range(-50, 50):
        for last in range(first, first + 60, 7):
            low, high = response_cells(
                np.array([float(first)]), np.array([float(last)]), Geometry(stride, 0), stride / 2
            )
            assert (low, high) == (first // stride + 1, -(-last // stride) - 1)


def test_a_window_of_224_pixels_covers_all_13_cells():
    low, high = covered_cells(np.array([0.0]), np.array([223.0]), ZF5, 6.5)
    assert low == -1  # clamped to the first cell
    assert high == 12


@pytest.mark.parametrize(
    ("first", "last", "cell"), [(33, 34, 0), (37, 40, 1), (47, 48, 1), (20, 20, 0), (52, 52, 2), (2, 3, -1)]
)
def test_a_window_between_two_cells_gets_the_cell_before_or_around(first, last, cell):
    # Cells at 4, 20, 36, 52; chosen are those in first - 1.5 < centre < last + 1.5, else the one before.
    low, high = covered_cells(np.array([float(first)]), np.array([float(last)]), ZF5, 6.5)
    assert (low, high) == (cell, cell)


def test_covered_cells_have_their_centres_inside_up_to_a_tolerance(rng):
    geometry, shrink = Geometry(8, 3.5), 3.25
    first = rng.uniform(-60, 300, 500)
    last = first + rng.uniform(0, 60, 500)
    low, high = covered_cells(first, last, geometry, shrink)
    for a, b, found in zip(first, last, zip(low, high, strict=True), strict=True):
        inside = [u for u in range(-20, 60) if a - 0.75 < 8 * u + 3.5 < b + 0.75]
        before = max(u for u in range(-20, 60) if 8 * u + 3.5 < b + 0.75)
        assert found == ((inside[0], inside[-1]) if inside else (before, before))


def test_the_scale_of_each_window_is_that_of_the_released_code():
    chosen = chosen_scales(WINDOWS, HEIGHT, WIDTH, SIDES)
    assert chosen.dtype == np.int64
    assert [SIDES[i] for i in chosen] == [v[2] for v in VECTORS]
    every_side = range(1, 5000)
    expected = chosen_scales(WINDOWS, HEIGHT, WIDTH, every_side)
    assert [every_side[i] for i in expected] == [v[1] for v in VECTORS]


def test_the_scale_of_each_window_is_that_of_the_paper():
    boxes = np.array([v[0] for v in PAPER_VECTORS], np.float32) - np.array([1, 1, 0, 0], np.float32)
    chosen = chosen_scales(boxes, HEIGHT, WIDTH, PAPER_SIDES, rule="paper")
    assert [PAPER_SIDES[i] for i in chosen] == [v[1] for v in PAPER_VECTORS]


@pytest.mark.parametrize(
    ("scale_rule", "sides", "side", "switches"),
    [
        # Half a pixel more than the tie, which goes to the smaller scale, is rounded up.
        ("released", SIDES, 208, [528.5, 632.5, 781.5, 1037.5]),
        ("paper", PAPER_SIDES, 224, [530.2, 634.5, 781.0, 1045.6]),
    ],
)
def test_scales_switch_where_they_should(scale_rule, sides, side, switches):
    # Ten times the side in an image of ten times the height: the expected side is the height / 10.
    box = np.array([[0, 0, 10 * side, 10 * side]], np.float32)
    chosen = [int(chosen_scales(box, h, h, sides, rule=scale_rule)[0]) for h in range(4000, 13000)]
    assert (np.flatnonzero(np.diff(chosen)) + 4001).tolist() == [round(10 * s) for s in switches]
    assert np.diff(chosen).max() == 1


@pytest.mark.parametrize("scale_rule", ["released", "paper"])
@pytest.mark.parametrize("reference", [None, 100])
def test_scales_equal_a_search_in_exact_arithmetic(rng, scale_rule, reference):
    corners = rng.integers(0, 300, (400, 2))
    boxes = np.concatenate([corners, corners + rng.integers(1, 400, (400, 2))], axis=1)
    wanted = reference or {"released": 208, "paper": 224}[scale_rule]

    def gap(box, side):
        area = (box[2] - box[0]) * (box[3] - box[1])
        if scale_rule == "paper":
            return abs(Fraction(area * side**2, 375**2) - wanted**2)
        return abs(side - math.floor(wanted * 375 / math.sqrt(area) + 0.5))

    chosen = chosen_scales(boxes.astype(np.float32), 375, 500, PAPER_SIDES, reference, scale_rule)
    expected = [
        min(range(len(PAPER_SIDES)), key=lambda i: gap(box, PAPER_SIDES[i])) for box in boxes.tolist()
    ]
    assert chosen.tolist() == expected
    assert set(expected) == set(range(len(PAPER_SIDES)))


def test_the_rules_choose_other_scales():
    # An expected side of 632 to 634 by the paper's reference: past the switch of one rule only.
    box = np.array([[0, 0, 224, 224]], np.float32)
    assert chosen_scales(box, 634, 700, PAPER_SIDES, 224, "released").tolist() == [2]
    assert chosen_scales(box, 634, 700, PAPER_SIDES, 224, "paper").tolist() == [1]


def test_unknown_rules_are_errors():
    maps, box = blank_maps(ZF5, 375, 500, (1.0, 1.0)), WINDOWS[:1]
    for ask in (project, responses):
        with pytest.raises(SppnetError, match="found the projection 'roi', expected one of released, paper"):
            ask(box, maps, projection="roi")
    with pytest.raises(SppnetError, match="found the scale rule 'best', expected one of released, paper"):
        choose_scale(box, 375, SIDES, 208, "best")


def test_ties_go_to_the_smaller_scale_in_whatever_order():
    # The second window's expected side, 632, is in the middle of 576 and 688.
    assert chosen_scales(WINDOWS[1:2], HEIGHT, WIDTH, (688, 576)).tolist() == [1]
    assert chosen_scales(WINDOWS[1:2], HEIGHT, WIDTH, (576, 688)).tolist() == [0]


def test_expected_sides_are_rounded_half_up():
    # 208 * 1265 / 416 = 632.5, and 633 is nearer to 688.
    assert chosen_scales(np.array([[0, 0, 416, 416]], np.float32), 1265, 1300, (576, 688)).tolist() == [1]


def test_scales_of_degenerate_windows():
    boxes = np.array([[5, 5, 5, 9], [5, 5, 6, 6], [0, 0, 1e5, 1e5]], np.float32)
    assert chosen_scales(boxes, 100, 100, (50, 500)).tolist() == [1, 1, 0]
    assert chosen_scales(boxes[:0], 100, 100, (50, 500)).shape == (0,)


def blank_maps(geometry, height, width, factors):
    h, w = (round(v * f) for v, f in zip((height, width), reversed(factors), strict=True))
    stage = torch.zeros(1, geometry.cells(h), geometry.cells(w))
    return FeatureMaps((stage,), (geometry,), factors, min(h, w))


def projected(box, maps, projection):
    """Project one box by looking at every cell for those centred in it, up to 1.5 pixels at stride 16."""
    geometry = maps.geometry[0]
    tolerance = geometry.stride * {"released": 1.5 / 16, "paper": 0}[projection]
    result = []
    for low, high, factor, size in zip(
        box[:2], box[2:], maps.factors, maps.stages[0].shape[:0:-1], strict=True
    ):
        first, last = (low + 0.5) * factor - 0.5, (high - 0.5) * factor - 0.5
        cells = range(-300, 600)
        ends = [u for u in cells if geometry.stride * u + geometry.offset < last + tolerance]
        inside = [u for u in ends if geometry.stride * u + geometry.offset > first - tolerance] or ends[-1:]
        result.append((min(max(inside[0], 0), size - 1), min(max(inside[-1], 0), size - 1) + 1))
    (x1, x2), (y1, y2) = result
    return [x1, y1, x2, y2]


@pytest.mark.parametrize("geometry", [Geometry(16, 15), Geometry(32, 0), Geometry(8, 3.5)])
@pytest.mark.parametrize("factors", [(1.0, 1.0), (0.37, 0.39), (2.4, 2.5)])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_projection_equals_a_search_of_all_cells(rng, geometry, factors, projection):
    maps = blank_maps(geometry, 180, 240, factors)
    corners = rng.uniform(-40, 280, (60, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0, 150, (60, 2))], axis=1).astype(np.float32)
    windows = project(boxes, maps, projection=projection)
    assert windows.dtype == np.int64
    assert windows.tolist() == [projected(box, maps, projection) for box in boxes.astype(float).tolist()]


@pytest.mark.parametrize("geometry", [Geometry(16, 15), Geometry(32, 0), Geometry(64, 31), Geometry(4, -1)])
@pytest.mark.parametrize("height_width", [(1, 1), (1, 200), (96, 128), (375, 500)])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_every_window_has_a_cell_inside_the_map(rng, geometry, height_width, projection):
    height, width = height_width
    maps = blank_maps(geometry, height, width, (1.7, 1.7))
    h, w = maps.stages[0].shape[-2:]
    corners = rng.uniform(-3 * width, 4 * width, (300, 2))
    sizes = rng.choice([0, 0.01, 1, 7.3, width, 10 * width], (300, 2))
    boxes = np.concatenate([corners, corners + sizes], axis=1).astype(np.float32)
    x1, y1, x2, y2 = project(boxes, maps, projection=projection).T
    assert (x1 >= 0).all()
    assert (y1 >= 0).all()
    assert (x2 > x1).all()
    assert (y2 > y1).all()
    assert (x2 <= w).all()
    assert (y2 <= h).all()
    assert project(boxes[:0], maps, projection=projection).shape == (0, 4)


@pytest.mark.parametrize("geometry", [Geometry(16, 15), Geometry(16, 0), Geometry(8, 7), Geometry(32, 31)])
def test_the_window_that_is_the_whole_image_covers_the_whole_map(geometry):
    for width in range(33, 150):
        for factor in (0.25, 1.0, 2.0):
            maps = blank_maps(geometry, 64, width, (factor, factor))
            if math.isclose(width * factor, round(width * factor)):
                h, w = maps.stages[0].shape[-2:]
                whole = np.array([[0, 0, width, 64]], np.float32)
                assert project(whole, maps).tolist() == [[0, 0, w, h]]


def test_projection_uses_the_geometry_of_the_stage():
    fine, coarse = Geometry(8, 0), Geometry(16, 0)
    maps = FeatureMaps((torch.zeros(1, 20, 20), torch.zeros(1, 10, 10)), (fine, coarse), (1.0, 1.0), 160)
    box = np.array([[32, 48, 97, 145]], np.float32)  # covers the pixels 32 to 96 and 48 to 144
    assert project(box, maps, 0).tolist() == [[4, 6, 13, 19]]
    assert project(box, maps, 1).tolist() == [[2, 3, 7, 10]]


def test_the_projection_of_the_paper_leaves_out_cells_centred_on_the_first_and_last_pixel():
    maps = blank_maps(Geometry(16, 0), 33, 49, (1.0, 1.0))  # cells at 0, 16 ... 48
    boxes = np.array([[0, 0, 49, 33], [16, 15, 33, 18], [16, 16, 17, 17], [17, 17, 32, 32]], np.float32)
    released, paper = (project(boxes, maps, projection=name).tolist() for name in ("released", "paper"))
    assert released == [[0, 0, 4, 3], [1, 1, 3, 2], [1, 1, 2, 2], [1, 1, 3, 3]]
    # The third has no cell in it but the one that it is, the last none: the one before.
    assert paper == [[1, 1, 3, 2], [1, 1, 2, 2], [1, 1, 2, 2], [1, 1, 2, 2]]


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_responses_are_the_cells_before_they_are_clamped(rng, projection):
    fine, coarse = Geometry(8, 3.5), Geometry(16, 15)
    maps = FeatureMaps((torch.zeros(1, 500, 500), torch.zeros(1, 250, 250)), (fine, coarse), (1.5, 1.4), 4000)
    corners = rng.uniform(20, 300, (50, 2))
    inside = np.concatenate([corners, corners + rng.uniform(30, 90, (50, 2))], axis=1).astype(np.float32)
    rows = responses(inside, maps, projection)
    assert rows.dtype == np.int64
    expected = [project(inside, maps, t, projection) - np.array([0, 0, 1, 1]) for t in (0, 1)]
    np.testing.assert_array_equal(rows, np.concatenate(expected, axis=1))
    # Two that begin outside the image cover the same, and yet are told apart.
    outside = np.array([[-90, 40, 90, 60], [-60, 40, 90, 60]], np.float32)
    assert len(np.unique(project(outside, maps, 1, projection), axis=0)) == 1
    assert len(np.unique(responses(outside, maps, projection)[:, 4:], axis=0)) == 2


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_tensors_are_projected_as_arrays_are(rng, projection):
    corners = rng.uniform(-20, 300, (500, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0, 200, (500, 2))], axis=1).astype(np.float32)
    maps = blank_maps(Geometry(8, 3.5), 233, 301, (1.37, 1.21))
    height, width = maps.stages[0].shape[1:]
    limits = torch.tensor([width - 1, height - 1], dtype=torch.float64)
    factors = torch.tensor(maps.factors, dtype=torch.float64)
    found = project_onto(torch.from_numpy(boxes), factors, limits, maps.geometry[0], projection)
    assert found.dtype == torch.int64
    np.testing.assert_array_equal(found.numpy(), project(boxes, maps, projection=projection))
    # A factor and a limit for each box, as in the graph of an ONNX file, is the same.
    each = project_onto(
        torch.from_numpy(boxes), factors.expand(500, 2), limits.expand(500, 2), maps.geometry[0], projection
    )
    assert torch.equal(each, found)
