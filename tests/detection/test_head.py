import numpy as np
import pytest
import torch

from sppnet.detection.head import LAYERS, Head
from sppnet.detection.network import HeadNetwork
from sppnet.linear import Linear

LENGTH, COUNT, WIDTH = 12, 3, 7


def drawn_head(length=LENGTH, count=COUNT, width=WIDTH):
    rng = np.random.default_rng(0)

    def linear(inputs, outputs):
        return Linear(
            rng.normal(0, 0.5, (outputs, inputs)).astype(np.float32),
            rng.normal(size=outputs).astype(np.float32),
        )

    return Head(
        (linear(length, width),),
        (linear(width, width),),
        linear(width, count + 1),
        linear(width, 4 * count),
    )


@pytest.fixture
def head():
    """A head whose biases are not 0."""
    return drawn_head()


@pytest.fixture
def pooled():
    return np.random.default_rng(1).normal(size=(5, LENGTH)).astype(np.float32)


def affine(x, layer):
    """Multiply a row by a layer's weights and add its biases, number by number."""
    weights, biases = layer.weights.tolist(), layer.offsets.tolist()
    return [
        sum(a * b for a, b in zip(x, row, strict=True)) + c for row, c in zip(weights, biases, strict=True)
    ]


def by_loops(head, pooled):
    """Return fc6, fc7, scores and deltas of each row, one number after the other."""
    rows = []
    for x in pooled.tolist():
        six = [max(v, 0) for v in affine(x, head.fc6[0])]
        seven = [max(v, 0) for v in affine(six, head.fc7[0])]
        deltas = affine(seven, head.deltas)
        rows.append(
            (six, seven, affine(seven, head.scores), [deltas[i : i + 4] for i in range(0, 4 * COUNT, 4)])
        )
    return [np.float32(part) for part in zip(*rows, strict=True)]


def test_layers_equal_the_loops(head, pooled):
    six, seven, *_ = by_loops(head, pooled)
    assert (six == 0).any()
    assert (seven > 0).any()
    assert LAYERS == ("pool", "fc6", "fc7")
    for layer, expected in zip(LAYERS, (pooled, six, seven), strict=True):
        found = head.activations(pooled, layer)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        tensor = head.activations(torch.from_numpy(pooled), layer)
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-5, atol=1e-5)


def network_of(head):
    made = HeadNetwork(head.length, head.count, head.width).eval()
    made.load_state_dict({name: torch.from_numpy(value) for name, value in head.state().items()})
    return made


def test_the_outputs_of_the_network_equal_the_loops(head, pooled):
    scores, deltas = network_of(head)(torch.from_numpy(pooled))
    assert scores.shape == (5, COUNT + 1)
    assert deltas.shape == (5, COUNT, 4)
    for ours, expected in zip((scores, deltas), by_loops(head, pooled)[2:], strict=True):
        np.testing.assert_allclose(ours.detach(), expected, rtol=1e-5, atol=1e-5)


def test_a_frozen_network_is_rounded_to_half_precision(head):
    frozen = Head.from_state(network_of(head).state())
    assert frozen.state().keys() == head.state().keys()
    for name, value in frozen.state().items():
        rounded = head.state()[name].astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(value, rounded, strict=True)


def test_no_windows_have_no_scores(head):
    none = np.zeros((0, LENGTH), np.float32)
    assert head.activations(none, "fc7").shape == (0, WIDTH)
    scores, deltas = network_of(head)(torch.from_numpy(none))
    assert scores.shape == (0, COUNT + 1)
    assert deltas.shape == (0, COUNT, 4)


def test_dropout_is_for_training_only():
    torch.manual_seed(0)
    pooled = torch.randn(5, LENGTH)
    network = HeadNetwork(LENGTH, COUNT, 400, dropout=0.75)
    plain, dropped = network.eval()(pooled)[0], network.train()(pooled)[0]
    assert torch.equal(plain, network.eval()(pooled)[0])
    assert not torch.equal(plain, dropped)
    hidden = []
    network.fc7.register_forward_hook(lambda _, given, __: hidden.append(given[0]))
    network.eval()(pooled)
    network.train()(pooled)
    kept = hidden[1] != 0
    assert 0.15 < kept.sum() / (hidden[0] != 0).sum() < 0.35
    torch.testing.assert_close(hidden[1][kept], 4 * hidden[0][kept])
    undropped = HeadNetwork(LENGTH, COUNT, WIDTH, dropout=0).train()
    assert torch.equal(undropped(pooled)[0], undropped.eval()(pooled)[0])


def test_new_layers_keep_the_size_of_numbers_and_give_small_outputs():
    torch.manual_seed(0)
    x = torch.randn(500, 300)
    network = HeadNetwork(300, COUNT, 400).eval().requires_grad_(False)
    for layer in LAYERS[1:]:
        # Half of the units are silent, and the others have twice the power.
        power = np.square(Head.from_state(network.state()).activations(x.numpy(), layer)).mean()
        assert power == pytest.approx(1, rel=0.15)
    scores, deltas = network(x)
    assert scores.std() < 0.5
    assert deltas.std() < 0.5


def test_full_rank_changes_nothing(head, pooled):
    thin = head.compressed((WIDTH, WIDTH))
    assert thin.ranks == (WIDTH, WIDTH)
    for layer in LAYERS:
        ours, expected = thin.activations(pooled, layer), head.activations(pooled, layer)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


def best_of_rank(weights, rank):
    u, s, vh = np.linalg.svd(weights.astype(np.float64))
    return sum(s[i] * np.outer(u[:, i], vh[i]) for i in range(rank))


@pytest.mark.parametrize("ranks", [(1, 1), (4, 2), (0, 3), (5, 0), (0, 0)])
def test_thin_layers_multiply_to_the_best_of_their_rank(head, pooled, ranks):
    kept = {name: value.copy() for name, value in head.state().items()}
    thin = head.compressed(ranks)
    assert thin.ranks == ranks
    for name, rank in zip(("fc6", "fc7"), ranks, strict=True):
        (whole,), layers = getattr(head, name), getattr(thin, name)
        if not rank:
            np.testing.assert_array_equal(layers[0].weights, whole.weights)
            continue
        first, second = layers
        assert first.weights.shape == (rank, whole.weights.shape[1])
        assert second.weights.shape == (whole.weights.shape[0], rank)
        assert first.weights.dtype == second.weights.dtype == np.float32
        assert first.offsets is None
        np.testing.assert_array_equal(second.offsets, whole.offsets)
        product = second.weights.astype(np.float64) @ first.weights
        np.testing.assert_allclose(product, best_of_rank(whole.weights, rank), atol=1e-5)
        # Each of the two has its share of the singular values.
        norms = [np.linalg.norm(layer.weights) for layer in layers]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    six = pooled
    for layer in thin.fc6:
        six = six @ layer.weights.T + (0 if layer.offsets is None else layer.offsets)
    np.testing.assert_allclose(thin.activations(pooled, "fc6"), np.maximum(six, 0), rtol=1e-5, atol=1e-6)
    assert (thin.scores, thin.deltas) == (head.scores, head.deltas)
    for name, value in head.state().items():
        np.testing.assert_array_equal(value, kept[name])


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        ((), r"the ranks \[\], expected two, of fc6 to 7, of fc7 to 7"),
        ((3,), r"the ranks \[3\]"),
        ((3, 3, 3), r"the ranks \[3, 3, 3\]"),
        ((-1, 3), r"the ranks \[-1, 3\]"),
        ((3, 8), r"the ranks \[3, 8\]"),
        ((8, 3), r"the ranks \[8, 3\]"),
    ],
)
def test_ranks_that_do_not_fit(head, ranks, says):
    with pytest.raises(ValueError, match=says):
        head.compressed(ranks)


def test_no_rank_is_more_than_the_vector_is_long():
    head = drawn_head(4, COUNT, 9)
    assert head.compressed((4, 9)).ranks == (4, 9)
    with pytest.raises(ValueError, match=r"the ranks \[5, 9\], expected two, of fc6 to 4, of fc7 to 9"):
        head.compressed((5, 9))


def test_a_thin_head_is_not_made_thinner(head):
    for ranks in ((3, 0), (0, 3)):
        with pytest.raises(ValueError, match="found a head compressed to the ranks"):
            head.compressed(ranks).compressed((2, 2))


@pytest.mark.parametrize("ranks", [(0, 0), (4, 0), (0, 2), (4, 2)])
def test_the_state_is_all_of_a_head(head, pooled, ranks):
    head = head.compressed(ranks)
    again = Head.from_state(head.state())
    assert again.ranks == ranks
    assert (again.length, again.count, again.width) == (LENGTH, COUNT, WIDTH)
    for layer in LAYERS:
        np.testing.assert_array_equal(again.activations(pooled, layer), head.activations(pooled, layer))
    halves = {name: value.astype(np.float16) for name, value in head.state().items()}
    for name, value in Head.from_state(halves).state().items():
        np.testing.assert_array_equal(value, halves[name].astype(np.float32), strict=True)


@pytest.mark.parametrize("ranks", [(0, 0), (4, 2)])
def test_a_state_that_is_none_is_refused(head, ranks):
    state = head.compressed(ranks).state()
    for name, value in state.items():
        without = {n: v for n, v in state.items() if n != name}
        with pytest.raises(ValueError, match=f"found no {name.replace('.0', '(.0)?')}, expected"):
            Head.from_state(without)
        wrong = [value[0], value[None], np.concatenate([value, value[:1]])]
        if value.ndim == 2 and not name.startswith(("fc6.weight", "fc6.0.")):  # Any length of vector is good.
            wrong.append(value[:, :-1])
        for other in wrong:
            with pytest.raises(
                ValueError, match=r"found layers of shapes .*, expected ones that go together"
            ):
                Head.from_state(state | {name: other})
