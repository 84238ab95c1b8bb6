"""Any windows of maps become vectors, each as the layer makes one of the map cut out."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torchvision.ops import roi_pool

from loops import LEVELS, SIDES, oracle, some_windows, whole
from sppnet.errors import SppnetError
from sppnet.pooling import (
    SpatialPyramidPooling,
    pool_region_chunks,
    pool_regions,
    spatial_pyramid,
)

ARRAY_DTYPES = [np.float32, np.float16, np.float64]


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("height_width", SIDES)
def test_the_window_that_is_the_whole_map_equals_the_layer(height_width, levels):
    feature = torch.randn(7, *height_width)
    assert torch.equal(
        pool_regions(feature, whole(feature), levels)[0], SpatialPyramidPooling(levels)(feature)
    )


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("channels", [1, 3, 7, 64, 257])
@pytest.mark.parametrize("mode", ["max", "average"])
def test_regions_equal_the_loops(rng, channels, levels, mode):
    for height, width in SIDES:
        feature = torch.randn(channels, height, width)
        windows = some_windows(rng, 4, height, width)
        pooled = pool_regions(feature, windows, levels, mode=mode)
        expected = torch.stack([oracle(feature, window, levels, mode) for window in windows])
        if mode == "max":
            assert torch.equal(pooled, expected)
        else:
            torch.testing.assert_close(pooled, expected)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("channels", [16, 64, 65, 257])
def test_many_windows_equal_the_layer_on_each(rng, threads, channels, levels):
    layer = SpatialPyramidPooling(levels)
    for _ in range(3):
        height, width = (int(side) for side in rng.integers(1, 60, 2))
        feature = torch.randn(channels, height, width) - 2
        windows = some_windows(rng, 100, height, width)
        threads(1)
        expected = [layer(feature[:, y1:y2, x1:x2]) for x1, y1, x2, y2 in windows]
        threads(2)
        assert torch.equal(pool_regions(feature, windows, levels), torch.stack(expected))


@pytest.mark.parametrize("mode", ["max", "average"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_result_has_the_dtype_of_the_maps_unless_told(rng, dtype, mode):
    feature = torch.randn(17, 9, 8).to(dtype)
    windows = some_windows(rng, 10, 9, 8)
    exact = pool_regions(feature.double(), windows, mode=mode)
    pooled = pool_regions(feature, windows, mode=mode)
    assert pooled.dtype == dtype
    torch.testing.assert_close(pooled, exact.to(dtype))
    for other in (torch.float32, torch.float16, torch.float64):
        asked = pool_regions(feature, windows, mode=mode, dtype=other)
        assert asked.dtype == other
        torch.testing.assert_close(asked, exact.to(other), rtol=1e-3, atol=1e-3)
        out = torch.empty_like(asked)
        assert pool_regions(feature, windows, mode=mode, out=out) is out
        assert torch.equal(out, asked)
    if mode == "max":
        assert torch.equal(pooled, exact.to(dtype))


def test_a_vector_is_levels_then_channels_then_rows():
    feature = torch.arange(2 * 4 * 4.0).reshape(2, 4, 4)
    expected = [15, 31, 5, 7, 13, 15, 21, 23, 29, 31]
    assert SpatialPyramidPooling((1, 2))(feature).tolist() == expected
    assert pool_regions(feature, whole(feature), (1, 2))[0].tolist() == expected


def test_several_maps(rng):
    maps = [torch.randn(65, *sides) for sides in [(9, 4), (1, 1), (20, 30)]]
    index = rng.integers(0, 3, 200)
    windows = np.concatenate([some_windows(rng, 4, *maps[i].shape[1:])[[3]] for i in index])
    expected = [pool_regions(maps[i], window[None])[0] for i, window in zip(index, windows, strict=True)]
    assert torch.equal(pool_regions(maps, windows, index=index), torch.stack(expected))
    assert torch.equal(
        pool_regions(maps, torch.tensor(windows), index=torch.tensor(index)), torch.stack(expected)
    )


def test_a_batch_is_several_maps(rng):
    batch = torch.randn(3, 5, 8, 9).to(memory_format=torch.channels_last)
    windows, index = some_windows(rng, 12, 8, 9), np.arange(12) % 3
    assert torch.equal(
        pool_regions(batch, windows, index=index), pool_regions(list(batch), windows, index=index)
    )


def test_one_map_needs_no_index(rng):
    feature = torch.randn(5, 8, 9)
    windows = some_windows(rng, 6, 8, 9)
    expected = pool_regions(feature, windows, index=np.zeros(6, int))
    for same in (feature, feature[None], [feature]):
        assert torch.equal(pool_regions(same, windows), expected)


def test_no_windows():
    for windows in (np.zeros((0, 4), int), torch.zeros(0, 4, dtype=torch.int64)):
        assert pool_regions(torch.randn(5, 8, 9), windows).shape == (0, 250)
    none = np.zeros(0, int)
    assert pool_regions(torch.randn(2, 5, 8, 9), np.zeros((0, 4), int), index=none).shape == (0, 250)


def test_output_of_the_caller(rng):
    for channels in (5, 32):
        feature = torch.randn(channels, 8, 9)
        windows = some_windows(rng, 6, 8, 9)
        expected = pool_regions(feature, windows)
        tensor = torch.full_like(expected, math.nan)
        assert pool_regions(feature, windows, out=tensor) is tensor
        assert torch.equal(tensor, expected)
        # A part of a larger array, at every offset from a cache line, and nothing beyond it changes.
        for skip in range(1, 17):
            memory = np.full(expected.numel() + 40, -7, np.float32)
            part = memory[skip : skip + expected.numel()].reshape(expected.shape)
            pooled = pool_regions(feature, windows, out=part)
            assert np.shares_memory(pooled.numpy(), part)
            assert np.array_equal(part, expected)
            assert (memory[:skip] == -7).all()
            assert (memory[skip + expected.numel() :] == -7).all()


@pytest.mark.parametrize("mode", ["max", "average"])
def test_nan_and_infinities_as_in_the_layer(rng, mode):
    values = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-42, -1e-42, -1.0, 3e38])
    feature = values[torch.from_numpy(rng.integers(0, len(values), (40, 9, 11)))]
    feature[0] = -math.inf
    feature[1] = math.nan
    layer = SpatialPyramidPooling(mode=mode)
    windows = some_windows(rng, 40, 9, 11)
    expected = torch.stack([layer(feature[:, y1:y2, x1:x2]) for x1, y1, x2, y2 in windows])
    assert expected.isnan().any()
    assert (expected == -math.inf).any()
    torch.testing.assert_close(pool_regions(feature, windows, mode=mode), expected, equal_nan=True)


def test_average_of_the_whole_map_equals_the_layer():
    feature = torch.rand(257, 31, 44)
    layer = SpatialPyramidPooling(mode="average")
    torch.testing.assert_close(pool_regions(feature, whole(feature), mode="average")[0], layer(feature))


@pytest.mark.parametrize("n", range(1, 7))
def test_torchvision_agrees_on_whole_cells(rng, n):
    feature = torch.randn(1, 16, 43, 58)
    windows = some_windows(rng, 200, 43, 58)
    # roi_pool wants inclusive corners, after the number of the map.
    rois = torch.from_numpy(np.pad(windows - [0, 0, 1, 1], ((0, 0), (1, 0)))).float()
    assert torch.equal(pool_regions(feature, windows, (n,)), roi_pool(feature, rois, n).flatten(1))


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (torch.zeros(3, 3), r"maps must be floats of shape .* found torch.float32 of shape \(3, 3\)"),
        (torch.zeros(2, 0, 3), "maps must be floats of shape"),
        (torch.zeros(0, 3, 3), "maps must be floats of shape"),
        (np.zeros((3, 3)), r"maps must be floats of shape .* found float64 of shape \(3, 3\)"),
        (np.zeros((1, 3, 3), int), "found int64 of shape"),
        (np.zeros((1, 3, 3), ">f4"), "found >f4 of shape"),
        (np.zeros((0, 2, 3, 3)), "at least one map"),
        ([torch.zeros(3, 3)], "map 0 must be floats of shape"),
        ([[[[1.0]]]], "map 0 must be floats of shape .* found list"),
        (
            [torch.zeros(1, 3, 3), np.zeros((1, 3, 3), np.float32)],
            "found float32 in an array for map 1 and torch",
        ),
        ([np.zeros((1, 3, 3)), np.zeros((1, 3, 3), np.float16)], "found float16 in an array for map 1"),
        ([], "at least one map"),
        (torch.zeros(0, 2, 3, 3), "at least one map"),
        ([torch.zeros(1, 3, 3), torch.zeros(2, 3, 3)], "map 1 has 2 channels, map 0 has 1"),
        (torch.zeros(1, 3, 3, dtype=torch.int32), "found torch.int32"),
        ([torch.zeros(1, 3, 3), torch.zeros(1, 3, 3).half()], "of one dtype and device, found torch.float16"),
        (
            [torch.zeros(1, 3, 3), torch.zeros(1, 3, 3, device="meta")],
            "found torch.float32 on meta for map 1",
        ),
    ],
)
def test_bad_maps_for_regions(maps, message):
    with pytest.raises(ValueError, match=message):
        pool_regions(maps, np.array([[0, 0, 1, 1]]))


def test_no_gradient_through_the_memory_of_the_caller():
    feature = torch.randn(1, 3, 3, requires_grad=True)
    out = torch.empty(1, 1)
    with pytest.raises(ValueError, match="require a gradient cannot be pooled into out"):
        pool_regions(feature, whole(feature), (1,), out=out)
    with torch.no_grad():
        assert torch.equal(pool_regions(feature, whole(feature), (1,), out=out)[0, 0], feature.max())


def test_a_bad_dtype():
    with pytest.raises(ValueError, match=r"dtype must be one of .* found torch.int32"):
        pool_regions(torch.zeros(1, 1, 1), [[0, 0, 1, 1]], dtype=torch.int32)


@pytest.mark.parametrize(
    "window",
    [
        [-1, 0, 2, 2],
        [0, -1, 2, 2],
        [0, 0, 5, 2],
        [0, 0, 2, 4],
        [2, 0, 1, 2],
        [0, 2, 2, 1],
        [1, 0, 1, 2],
        [0, 1, 2, 1],
    ],
)
def test_windows_that_are_no_part_of_the_map(window):
    windows = np.array([[0, 0, 4, 3], window, [9, 9, 9, 9]])
    with pytest.raises(ValueError, match=r"windows\[1\] must be .* x2 <= 4 .* y2 <= 3, found \[") as error:
        pool_regions(torch.zeros(1, 3, 4), windows)
    assert str(window) in str(error.value)


@pytest.mark.parametrize(
    "windows",
    [
        np.zeros((2, 4), np.float32),
        np.full((1, 4), np.nan),
        torch.zeros(2, 4),
        np.zeros((2, 4), bool),
        np.zeros((2, 5), int),
        np.zeros(4, int),
        [],
    ],
)
def test_windows_of_another_type_or_shape(windows):
    with pytest.raises(ValueError, match=r"windows must be integers of shape \(R, 4\), found"):
        pool_regions(torch.zeros(1, 3, 4), windows)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "which of the 2 maps"),
        ([0, 1, 2], r"index\[2\] must be from 0 to 1, found 2"),
        ([0, -1, 1], r"index\[1\] must be from 0 to 1, found -1"),
        ([0, 1], r"index must be integers of shape \(3,\), found int64 of shape \(2,\)"),
        ([0.0, 1.0, 1.0], r"index must be integers"),
    ],
)
def test_bad_index(index, message):
    with pytest.raises(ValueError, match=message):
        pool_regions(torch.zeros(2, 1, 3, 3), np.array([[0, 0, 1, 1]] * 3), index=index)


def test_limits_are_those_of_the_map_of_the_window():
    maps = [torch.zeros(1, 3, 4), torch.zeros(1, 2, 2)]
    windows = np.array([[0, 0, 4, 3], [0, 0, 4, 3]])
    with pytest.raises(ValueError, match=r"windows\[1\] must be .* x2 <= 2 .* y2 <= 2"):
        pool_regions(maps, windows, index=[0, 1])


@pytest.mark.parametrize(
    "out",
    [
        torch.zeros(1, 3),
        torch.zeros(2, 3, dtype=torch.int32),
        torch.zeros(2, 3, device="meta"),
        torch.zeros(3, 2).T,
        torch.zeros(2, 3, requires_grad=True),
        np.zeros((2, 3), np.int64),
        np.zeros((2, 6), np.float32)[:, ::2],
        np.broadcast_to(np.float32(0), (2, 3)),
        [[0.0] * 3] * 2,
    ],
)
def test_bad_output(out):
    with pytest.raises(ValueError, match="out must be contiguous floats on cpu"):
        pool_regions(torch.zeros(3, 2, 2), np.array([[0, 0, 1, 1]] * 2), (1,), out=out)


def test_an_output_of_another_dtype_than_asked():
    with pytest.raises(ValueError, match=r"out must be contiguous torch.float16 .* found torch.float32"):
        pool_regions(torch.zeros(3, 2, 2), [[0, 0, 1, 1]], (1,), dtype=torch.float16, out=torch.zeros(1, 3))


def test_chunks_are_the_parts_of_the_whole_in_one_memory(rng):
    maps = [torch.randn(5, 8, 9), torch.randn(5, 3, 4)]
    index = rng.integers(0, 2, 50)
    windows = np.concatenate([some_windows(rng, 4, *maps[i].shape[1:])[[3]] for i in index])
    expected = pool_regions(maps, windows, (2, 1), index=index)
    row = expected[0].numel() * 4
    for max_bytes, sizes in [(row * 7, [7] * 7 + [1]), (1, [1] * 50), (2**30, [50])]:
        seen, places = [], set()
        for part, pooled in pool_region_chunks(maps, windows, (2, 1), index=index, max_bytes=max_bytes):
            assert torch.equal(pooled, expected[part])
            seen.append(len(pooled))
            places.add(pooled.data_ptr())
        assert seen == sizes
        assert len(places) == 1
    assert list(pool_region_chunks(maps, windows[:0], index=index[:0])) == []
    halves = pool_region_chunks(maps, windows, (2, 1), index=index, dtype=torch.float16)
    assert torch.equal(next(halves)[1], expected.half())
    with pytest.raises(ValueError, match="max_bytes must be positive, found 0"):
        next(pool_region_chunks(maps, windows, index=index, max_bytes=0))


def test_integers_that_do_not_fit_are_no_part_of_the_map():
    huge = np.array([[0, 0, 2**64 - 1, 1]], dtype=np.uint64)
    with pytest.raises(ValueError, match=r"windows\[0\] must be"):
        pool_regions(torch.zeros(1, 3, 4), huge)
    with pytest.raises(ValueError, match=r"windows\[0\] must be"):
        pool_regions(torch.zeros(1, 3, 4), np.array([[0, 0, 2**62, 1]]))


def random_array(rng, dtype, *shape):
    return rng.standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("dtype", ARRAY_DTYPES)
@pytest.mark.parametrize("mode", ["max", "average"])
def test_arrays_equal_the_loops(rng, levels, dtype, mode):
    for channels in (1, 33, 64):
        maps = [random_array(rng, dtype, channels, *sides) for sides in SIDES]
        index = np.arange(4 * len(maps)) % len(maps)
        windows = np.stack([some_windows(rng, 4, *maps[i].shape[1:])[r % 4] for r, i in enumerate(index)])
        pooled = pool_regions(maps, windows, levels, mode=mode, index=index)
        assert isinstance(pooled, np.ndarray)
        assert pooled.dtype == dtype
        expected = np.stack(
            [oracle(maps[i], window, levels, mode) for i, window in zip(index, windows, strict=True)]
        )
        if mode == "max":
            np.testing.assert_array_equal(pooled, expected)
        else:
            np.testing.assert_allclose(pooled, expected, rtol=0, atol=8 * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", ARRAY_DTYPES)
@pytest.mark.parametrize("mode", ["max", "average"])
def test_arrays_and_tensors_give_the_same_bits(rng, dtype, mode):
    maps = random_array(rng, dtype, 3, 70, 9, 11)
    maps[0, 0, 2, 3], maps[1, 1] = math.nan, -math.inf
    windows, index = some_windows(rng, 40, 9, 11), rng.integers(0, 3, 40)
    tensor = torch.from_numpy(maps)
    expected = pool_regions(tensor, windows, mode=mode, index=index)
    for given in ((windows, index), (torch.tensor(windows), torch.tensor(index, dtype=torch.int32))):
        for found, kind in (
            (pool_regions(maps, given[0], mode=mode, index=given[1]), np.ndarray),
            (pool_regions(tensor, given[0], mode=mode, index=given[1]), torch.Tensor),
        ):
            assert isinstance(found, kind)
            np.testing.assert_array_equal(np.asarray(found), expected.numpy())


def test_memory_layout_of_arrays_does_not_matter(rng):
    maps, windows = random_array(rng, np.float32, 64, 12, 19), some_windows(rng, 20, 12, 19)
    expected = pool_regions(maps, windows)
    wide, bytes_ = np.zeros((64, 24, 38), np.float32), np.zeros(maps.nbytes + 1, np.uint8)
    wide[:, ::2, ::2] = maps
    unaligned = bytes_[1:].view(np.float32).reshape(maps.shape)
    unaligned[:] = maps
    read_only = maps.copy()
    read_only.flags.writeable = False
    channels_last = np.ascontiguousarray(maps.transpose(1, 2, 0)).transpose(2, 0, 1)
    backwards = maps[:, ::-1, ::-1].copy()[:, ::-1, ::-1]
    for same in (wide[:, ::2, ::2], unaligned, read_only, channels_last, backwards):
        np.testing.assert_array_equal(pool_regions(same, windows), expected)
        np.testing.assert_array_equal(same, maps)


@pytest.mark.parametrize("dtype", ARRAY_DTYPES)
def test_dtype_and_output_of_arrays(rng, dtype):
    maps, windows = random_array(rng, dtype, 17, 9, 8), some_windows(rng, 10, 9, 8)
    exact = pool_regions(maps, windows)
    for other in ARRAY_DTYPES:
        asked = pool_regions(maps, windows, dtype=other)
        assert asked.dtype == other
        np.testing.assert_array_equal(asked, exact.astype(other))
        out = np.empty_like(asked)
        assert pool_regions(maps, windows, dtype=np.dtype(other).name, out=out) is out
        np.testing.assert_array_equal(out, asked)


def test_no_windows_of_arrays(rng):
    maps = random_array(rng, np.float32, 2, 5, 8, 9)
    assert pool_regions(maps, np.zeros((0, 4), int), index=np.zeros(0, int)).shape == (0, 250)
    assert pool_regions(maps[0], np.zeros((0, 4), int)).dtype == np.float32
    assert list(pool_region_chunks(maps[0], np.zeros((0, 4), int))) == []


def test_chunks_of_arrays(rng):
    maps, windows = random_array(rng, np.float32, 5, 8, 9), some_windows(rng, 50, 8, 9)
    for dtype in (None, np.float16):
        expected = pool_regions(maps, windows, (2, 1), dtype=dtype)
        chunks = pool_region_chunks(maps, windows, (2, 1), dtype=dtype, max_bytes=7 * expected[0].nbytes)
        seen = [(part, pooled.copy()) for part, pooled in chunks]
        assert [len(pooled) for _, pooled in seen] == [7] * 7 + [1]
        for part, pooled in seen:
            np.testing.assert_array_equal(pooled, expected[part])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"windows": [[0, 0, 5, 1]]}, r"windows\[0\] must be x1, .* x2 <= 4 .* found \[0, 0, 5, 1\]"),
        ({"windows": [[0.0, 0, 1, 1]]}, "windows must be integers of shape .R, 4., found float64 of shape"),
        ({"index": [1]}, r"index\[0\] must be from 0 to 0, found 1"),
        ({"index": [0, 0]}, r"index must be integers of shape \(1,\)"),
        ({"dtype": "int32"}, "dtype must be one of float32, float16, float64, found int32"),
        ({"mode": "min"}, "mode must be one of"),
        (
            {"out": np.zeros((1, 4))},
            r"out must be contiguous floats on cpu, .* of shape \(1, 3\), found float64",
        ),
        ({"out": np.zeros((1, 3)), "dtype": np.float32}, "out must be contiguous float32"),
        ({"out": np.zeros((1, 6))[:, ::2]}, "out must be contiguous floats"),
        ({"out": np.zeros((1, 3), int)}, "out must be contiguous floats"),
        ({"out": torch.zeros(1, 3)}, "out must be contiguous floats on cpu, .* found Tensor"),
    ],
)
def test_what_is_refused_with_arrays(given, message):
    given = {"windows": [[0, 0, 1, 1]], **given}
    with pytest.raises(SppnetError, match=message):
        pool_regions(np.zeros((3, 3, 4)), levels=(1,), **given)


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import numpy as np
from sppnet.pooling import pool_region_chunks, pool_regions, spatial_pyramid
maps, windows = np.arange(24.0).reshape(2, 3, 4), np.array([[0, 0, 4, 3]])
print(pool_regions(maps, windows, (1,)).tolist(), spatial_pyramid(maps, (1,)).tolist())
print([pooled.tolist() for _, pooled in pool_region_chunks(maps.astype(np.float16), windows, (1,))])
"""


def test_arrays_need_no_torch():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[:2] == ["[[11.0, 23.0]] [11.0, 23.0]", "[[[11.0, 23.0]]]"], done.stderr


def test_a_whole_map_is_the_window_that_holds_it(rng):
    maps = random_array(rng, np.float32, 7, 10, 17)
    np.testing.assert_array_equal(pool_regions(maps, whole(maps))[0], spatial_pyramid(maps))
