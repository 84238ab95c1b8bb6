import numpy as np
import pytest
import torch

import sppnet.rpn.training as training
from sppnet.boxes import Target
from sppnet.errors import SppnetError
from sppnet.features.backbone import Backbone
from sppnet.features.graph import STAGES, read_graph
from sppnet.rpn.network import PyramidNetwork
from sppnet.rpn.pictures import kept_photo
from sppnet.rpn.settings import Joint
from sppnet.rpn.training import Clock, Trainer
from trees import SHAPES, scene

QUICK = Joint(width=16, batch=4, frozen=0)


@pytest.fixture(scope="module")
def start(backbone_file):
    return read_graph(backbone_file("test_efficientnet"))


@pytest.fixture(scope="module")
def photos():
    drawn = [scene(seed) for seed in range(8)]
    return [kept_photo(d.image, Target.of(d.boxes, d.labels), SHAPES) for d in drawn]


@pytest.fixture
def hands(monkeypatch):
    """A clock that goes when it is told to."""
    now = [100.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    return now


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.mean.parameters()])


class TestClock:
    def test_of_steps_ends_after_them(self):
        clock = Clock(steps=4)
        shares = []
        while clock.done < 1:
            shares.append(clock.done)
            clock.tick()
        assert shares == [0, 0.25, 0.5, 0.75]

    def test_of_seconds_ends_before_a_step_would_be_too_late(self, hands):
        clock = Clock(seconds=10)
        for _ in range(3):
            hands[0] += 3
            clock.tick()
        assert clock.passed == 9
        assert clock.done == 1

    def test_sleep_does_not_count(self, hands):
        clock = Clock(seconds=100)
        for step in (2, 2, 2, 2, 5000, 2):
            hands[0] += step
            clock.tick()
        assert clock.passed == 12
        assert clock.done == 0.12

    def test_slow_steps_do(self, hands):
        clock = Clock(seconds=100)
        for step in (2, 2, 2, 2, 20):
            hands[0] += step
            clock.tick()
        assert clock.passed == 28


def test_the_same_seed_gives_the_same_network(start, photos, threads):
    one, other, third = (Trainer(start, SHAPES, QUICK, seed) for seed in (0, 0, 1))
    for trainer in (one, other, third):
        trainer.train(photos, 96, Clock(steps=4))
    assert torch.equal(weights(one), weights(other))
    assert not torch.equal(weights(one), weights(third))


def test_losses_fall(start, photos, threads):
    trainer = Trainer(start, SHAPES, QUICK, 0)
    first = trainer.train(photos, 96, Clock(steps=8))
    for _ in range(2):
        last = trainer.train(photos, 96, Clock(steps=30))
    assert all(last[name] < 0.9 * first[name] for name in ("objects", "boxes", "kinds"))


def test_the_first_stages_and_the_statistics_of_the_backbone_stay(start, photos, threads):
    trainer = Trainer(start, SHAPES, Joint(width=16, batch=4, frozen=2), 0)
    trainer.train(photos, 96, Clock(steps=3))
    before, after = PyramidNetwork.start(start, SHAPES, 16).body.state_dict(), trainer.mean.body.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if "running" in name} <= same
    assert {name for name in before if name.startswith(("conv_stem", "bn1", "blocks.0", "blocks.1"))} <= same
    assert any(name.startswith("blocks.3") for name in before.keys() - same)


def test_an_interruption_ends_training_and_keeps_what_was_learned(start, photos, threads, monkeypatch):
    trainer, count, whole = Trainer(start, SHAPES, QUICK, 0), [0], training.losses

    def interrupted(answers, truths):
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        return whole(answers, truths)

    monkeypatch.setattr(training, "losses", interrupted)
    before = weights(trainer).clone()
    trainer.train(photos, 96, Clock(steps=50))
    assert count[0] == 3
    assert not torch.equal(before, weights(trainer))


def test_a_loss_that_is_no_number_is_an_error(start, photos, threads, monkeypatch):
    trainer = Trainer(start, SHAPES, QUICK, 0)
    with torch.no_grad():
        trainer.mean.objects[0].weight.fill_(float("nan"))
    with pytest.raises(SppnetError, match="found a loss of nan in training"):
        trainer.train(photos, 96, Clock(steps=2))


def test_the_graph_is_the_network(start, photos, threads):
    trainer = Trainer(start, SHAPES, QUICK, 0)
    trainer.train(photos, 96, Clock(steps=2))
    graph = trainer.graph("mine")
    assert graph.facts.name == "mine"
    assert graph.facts.proposes
    assert graph.facts.licence == start.facts.licence
    backbone = Backbone(graph, STAGES, 32)
    image = scene(20, 96, 128).image
    found = backbone.maps(image[None])
    mean, std = np.array(backbone.mean, np.float32), np.array(backbone.std, np.float32)
    values = torch.from_numpy(((image - mean) / std)[None]).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = trainer.mean.frozen()(values)
    for one, other in zip(found, expected, strict=True):
        other = other.permute(0, 2, 3, 1).numpy()
        assert np.abs(one - other).max() < 0.02 * max(1, np.abs(other).max())


def test_training_goes_on_from_a_graph(start, photos, threads):
    trainer = Trainer(start, SHAPES, QUICK, 0)
    trainer.train(photos, 96, Clock(steps=2))
    graph = trainer.graph("mine")
    again = PyramidNetwork.start(graph, "abcde")
    assert again.width == 16
    kept = {n: v for n, v in trainer.mean.state_dict().items() if not n.startswith("kinds")}
    for name, value in again.state_dict().items():
        if name in kept and value.is_floating_point():
            # Half precision of the file.
            torch.testing.assert_close(value, kept[name], rtol=1e-3, atol=1e-3)


def test_backbones_that_cannot_be_trained_are_refused(backbone_file):
    with pytest.raises(SppnetError, match="expected 8, 16 and 32 among them"):
        PyramidNetwork("test_vit", 3)
    graph = read_graph(backbone_file("test_efficientnet"))
    object.__setattr__(graph.facts, "network", "")
    with pytest.raises(SppnetError, match="expected one of a timm network, to train it"):
        PyramidNetwork.start(graph, SHAPES)


@pytest.mark.parametrize(
    "wrong",
    [
        {"photos": 0},
        {"side": 0},
        {"batch": 0},
        {"lr": 0},
        {"mosaic": 1.5},
        {"jitter": (0, 1)},
        {"jitter": (2, 1)},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(SppnetError, match="expected"):
        Joint(**wrong)
