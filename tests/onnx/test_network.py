import numpy as np
import pytest
import torch
from torch import nn

from graphs import opened, run
from sppnet.errors import SppnetError
from sppnet.onnx.network import export_network
from sppnet.pooling import SpatialPyramidPooling, pool_regions

LEVELS = (1, 6, 4, 3, 2)
EDGES = (*range(1, 14), 20, 41, 79, 80)


def agree(found, expected, mode):
    """Maxima are the same numbers; means are summed in another order."""
    expected = expected.detach().numpy()
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if mode == "max":
        assert np.array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


class Regions(nn.Module):
    """Pool windows of maps that come as one batch or as a list."""

    def __init__(self, mode, levels=LEVELS, dtype=None):
        super().__init__()
        self.mode, self.levels, self.dtype = mode, levels, dtype

    def forward(self, maps, windows, index=None):
        return pool_regions(maps, windows, self.levels, mode=self.mode, index=index, dtype=self.dtype)


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool = SpatialPyramidPooling(LEVELS)

    def forward(self, maps, sizes):
        return self.pool(maps, sizes)


@pytest.fixture(scope="module", params=["max", "average"])
def layer(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("layer") / "layer.onnx"
    pool = SpatialPyramidPooling(LEVELS, request.param)
    export_network(pool, (torch.zeros(2, 3, 5, 7),), path)
    return pool, opened(path)


def test_layer_is_exact_at_every_size(layer):
    pool, session = layer
    rng = np.random.default_rng(0)
    sizes = range(1, 81) if pool.mode == "max" else EDGES
    for height in sizes:
        for width in sizes:
            maps = rng.standard_normal((1, 3, height, width), dtype=np.float32)
            agree(run(session, maps), pool(torch.from_numpy(maps)), pool.mode)


def test_layer_takes_any_batch_and_numbers_below_zero(layer):
    pool, session = layer
    for count in (1, 2, 5):
        maps = -torch.rand(count, 3, 9, 4) - 1
        agree(run(session, maps), pool(maps), pool.mode)


def test_layer_in_half_precision(tmp_path):
    pool = SpatialPyramidPooling((3, 2))
    export_network(pool, (torch.zeros(2, 3, 5, 7, dtype=torch.float16),), tmp_path / "half.onnx")
    maps = torch.randn(2, 3, 11, 6).half()
    agree(run(opened(tmp_path / "half.onnx"), maps), pool(maps), "max")


def test_layer_of_a_list_and_of_a_padded_batch(tmp_path):
    maps = [torch.randn(3, h, w) for h, w in ((4, 9), (7, 7), (1, 2))]
    pool = SpatialPyramidPooling(LEVELS)
    example = ([torch.zeros(3, 4 + i, 5 + i) for i in range(3)],)
    export_network(pool, example, tmp_path / "list.onnx", input_names=["a", "b", "c"])
    agree(run(opened(tmp_path / "list.onnx"), *maps), pool(maps), "max")

    export_network(Padded(), (torch.zeros(2, 3, 5, 7), torch.ones(2, 2).long()), tmp_path / "padded.onnx")
    padded = torch.full((3, 3, 8, 10), 1e9)
    for page, m in zip(padded, maps, strict=True):
        page[:, : m.shape[1], : m.shape[2]] = m
    sizes = torch.tensor([m.shape[1:] for m in maps])
    agree(run(opened(tmp_path / "padded.onnx"), padded, sizes), pool(maps), "max")


def drawn_windows(rng, sizes, count):
    """Return windows anywhere in maps of these (height, width), down to one cell, and the map of each."""
    index = rng.integers(0, len(sizes), count)
    limits = np.array(sizes)[index][:, ::-1]
    low = np.floor(rng.random((count, 2)) * limits)
    high = low + 1 + np.floor(rng.random((count, 2)) * (limits - low))
    return np.concatenate([low, high], axis=1).astype(np.int64), index.astype(np.int64)


@pytest.mark.parametrize("mode", ["max", "average"])
@pytest.mark.parametrize("form", ["map", "batch", "list"])
def test_regions(mode, form, tmp_path):
    network = Regions(mode)
    example = {
        "map": torch.zeros(4, 6, 7),
        "batch": torch.zeros(3, 4, 6, 7),
        "list": [torch.zeros(4, 6 + i, 7 + i) for i in range(3)],
    }[form]
    windows, index = torch.tensor([[0, 0, 1, 1]] * 3), torch.tensor([0, 1, 2])
    given = (windows,) if form == "map" else (windows, index)
    export_network(network, (example, *given), tmp_path / "regions.onnx")
    session = opened(tmp_path / "regions.onnx")
    rng = np.random.default_rng(1)
    for count in (0, 1, 2, 40) * 6:
        sizes = rng.integers(1, 81, (3, 2))
        if form != "list":
            sizes[:] = sizes[0]
        maps = [torch.from_numpy(rng.standard_normal((4, *size), dtype=np.float32)) for size in sizes]
        places, which = map(torch.from_numpy, drawn_windows(rng, sizes, count))
        if form == "map":
            agree(run(session, maps[0], places), network(maps[0], places), mode)
        elif form == "batch":
            batch = torch.stack(maps)
            agree(run(session, batch, places, which), network(batch, places, which), mode)
        else:
            agree(run(session, *maps, places, which), network(maps, places, which), mode)


def test_regions_in_half_precision_and_the_dtype_asked_for(tmp_path):
    network = Regions("max", (3, 2), torch.float32)
    maps, windows = torch.randn(2, 9, 8).half(), torch.tensor([[0, 0, 8, 9], [2, 1, 7, 3]])
    export_network(network, (torch.zeros(2, 5, 6).half(), windows), tmp_path / "half.onnx")
    agree(run(opened(tmp_path / "half.onnx"), maps, windows), network(maps, windows), "max")


def test_a_network_of_ones_own(tmp_path):
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        SpatialPyramidPooling((3, 1)),
        nn.Linear(80, 5),
    )
    network.train()
    path = tmp_path / "network.onnx"
    facts = {"classes": "a, b, c, d, e"}
    export_network(
        network,
        (torch.zeros(2, 3, 32, 32),),
        path,
        input_names=["image"],
        output_names=["scores"],
        metadata=facts,
    )
    assert network.training, "it was left as it was"
    session = opened(path)
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert [o.name for o in session.get_outputs()] == ["scores"]
    assert session.get_modelmeta().custom_metadata_map.items() >= facts.items()
    for shape in ((1, 3, 1, 1), (3, 3, 57, 20)):
        images = torch.randn(shape)
        expected = network.eval()(images).detach().numpy()
        np.testing.assert_allclose(run(session, images), expected, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["network.onnx"], "one file, weights inside"


def test_maxima_of_windows_in_double_precision_are_refused(tmp_path):
    maps, windows = torch.zeros(3, 5, 7, dtype=torch.float64), torch.tensor([[0, 0, 1, 1]] * 2)
    with pytest.raises(SppnetError, match="found float64 maps, expected float32"):
        export_network(Regions("max"), (maps, windows), tmp_path / "regions.onnx")
    assert list(tmp_path.iterdir()) == []
