import numpy as np
import pytest
import torch

from sppnet.detection.head import LAYERS, Head

LENGTH, COUNT, WIDTH = 12, 3, 7


@pytest.fixture
def head():
    """A head whose biases are not 0, in evaluation mode."""
    torch.manual_seed(0)
    made = Head(LENGTH, COUNT, WIDTH)
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return made.eval()


@pytest.fixture
def pooled():
    return torch.randn(5, LENGTH, generator=torch.Generator().manual_seed(1))


def affine(x, layer):
    """Multiply a row by a layer's weights and add its biases, number by number."""
    weights, biases = layer.weight.tolist(), layer.bias.tolist()
    return [
        sum(a * b for a, b in zip(x, row, strict=True)) + c for row, c in zip(weights, biases, strict=True)
    ]


def by_loops(head, pooled):
    """Return fc6, fc7, scores and deltas of each row, one number after the other."""
    rows = []
    for x in pooled.tolist():
        six = [max(v, 0) for v in affine(x, head.fc6)]
        seven = [max(v, 0) for v in affine(six, head.fc7)]
        deltas = affine(seven, head.deltas)
        rows.append(
            (six, seven, affine(seven, head.scores), [deltas[i : i + 4] for i in range(0, 4 * COUNT, 4)])
        )
    return [torch.tensor(part) for part in zip(*rows, strict=True)]


def test_layers_and_outputs_equal_the_loops(head, pooled):
    six, seven, scores, deltas = by_loops(head, pooled)
    assert (six == 0).any()
    assert (seven > 0).any()
    assert LAYERS == ("pool", "fc6", "fc7")
    for layer, expected in zip(LAYERS, (pooled, six, seven), strict=True):
        torch.testing.assert_close(head.activations(pooled, layer), expected)
    found = head(pooled)
    assert found[0].shape == (5, COUNT + 1)
    assert found[1].shape == (5, COUNT, 4)
    for ours, expected in zip(found, (scores, deltas), strict=True):
        torch.testing.assert_close(ours, expected)


def test_no_windows_have_no_scores(head):
    scores, deltas = head(torch.zeros(0, LENGTH))
    assert scores.shape == (0, COUNT + 1)
    assert deltas.shape == (0, COUNT, 4)


def test_dropout_is_for_training_only(pooled):
    torch.manual_seed(0)
    head = Head(LENGTH, COUNT, 400, dropout=0.75)
    for layer in LAYERS[1:]:
        plain = head.eval().activations(pooled, layer)
        assert torch.equal(plain, head.activations(pooled, layer))
        dropped = head.train().activations(pooled, layer)
        kept = (dropped != 0).sum() / (plain != 0).sum()
        assert 0.15 < kept < 0.75  # a quarter; above fc7, which sees other numbers, about that
        if layer == "fc6":
            kept = dropped != 0
            torch.testing.assert_close(dropped[kept], 4 * plain[kept])
    undropped = Head(LENGTH, COUNT, WIDTH, dropout=0).train()
    assert torch.equal(undropped(pooled)[0], undropped.eval()(pooled)[0])


def test_new_layers_keep_the_size_of_numbers_and_give_small_outputs():
    torch.manual_seed(0)
    x = torch.randn(500, 300)
    head = Head(300, COUNT, 400).eval()
    for layer in LAYERS[1:]:
        # Half of the units are silent, and the others have twice the power.
        assert float(head.activations(x, layer).square().mean()) == pytest.approx(1, rel=0.15)
    scores, deltas = head(x)
    assert scores.std() < 0.5
    assert deltas.std() < 0.5


def test_full_rank_changes_nothing(head, pooled):
    thin = head.compressed((WIDTH, WIDTH))
    assert thin.ranks == (WIDTH, WIDTH)
    for ours, expected in zip(thin(pooled), head(pooled), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def best_of_rank(weight, rank):
    u, s, vh = np.linalg.svd(weight.detach().numpy().astype(np.float64))
    return sum(s[i] * np.outer(u[:, i], vh[i]) for i in range(rank))


@pytest.mark.parametrize("ranks", [(1, 1), (4, 2), (0, 3), (5, 0), (0, 0)])
def test_thin_layers_multiply_to_the_best_of_their_rank(head, pooled, ranks):
    kept = {name: value.clone() for name, value in head.state_dict().items()}
    thin = head.compressed(ranks)
    assert thin.ranks == ranks
    for name, rank in zip(("fc6", "fc7"), ranks, strict=True):
        whole, layers = getattr(head, name), getattr(thin, name)
        if not rank:
            assert torch.equal(layers.weight, whole.weight)
            continue
        first, second = layers
        assert first.weight.shape == (rank, whole.in_features)
        assert second.weight.shape == (whole.out_features, rank)
        assert first.bias is None
        assert torch.equal(second.bias, whole.bias)
        product = second.weight.double() @ first.weight.double()
        np.testing.assert_allclose(product.detach().numpy(), best_of_rank(whole.weight, rank), atol=1e-5)
        # Each of the two has its share of the singular values.
        torch.testing.assert_close(first.weight.norm(), second.weight.norm())
    torch.testing.assert_close(thin.activations(pooled, "fc6"), torch.relu(thin.fc6(pooled)))
    # It is a head of its own.
    torch.nn.init.zeros_(thin.scores.weight)
    assert all(torch.equal(value, kept[name]) for name, value in head.state_dict().items())


def test_a_thin_head_stays_in_its_mode(head):
    assert not head.compressed((3, 3)).training
    assert all(m.training for m in head.train().compressed((3, 3)).modules())


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
    head = Head(4, COUNT, 9)
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
    again = Head.from_state(head.state_dict())
    assert not again.training
    assert again.ranks == ranks
    assert (again.length, again.count, again.width) == (LENGTH, COUNT, WIDTH)
    for ours, expected in zip(again(pooled), head(pooled), strict=True):
        assert torch.equal(ours, expected)
    rounded = Head.from_state({name: value.half() for name, value in head.state_dict().items()})
    for name, value in rounded.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, head.state_dict()[name].half().float())
