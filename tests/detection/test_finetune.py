from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import trees
from sppnet.boxes import Target
from sppnet.detection.finetune import DELTA_UNITS, FineTuner
from sppnet.detection.sampling import Examples
from sppnet.detection.tuning import Tuning
from sppnet.features.backbone import Backbone
from sppnet.features.network import TrainableBackbone
from sppnet.features.windows import WindowPooling
from sppnet.regression import decode_deltas
from trees import drawn, grid

SCALES = (96, 160)
CLASSES = ("disc", "square", "triangle")
QUICK = Tuning(batches=20, batch=32, width=12, windows=24, epochs=3, images=2)


@pytest.fixture(scope="module")
def backbone(backbone_file):
    """A tiny one, for what does not ask how good it is."""
    return Backbone(backbone_file("test_efficientnet"))


def another(backbone):
    """Return a backbone of other weights."""
    rng = np.random.default_rng(1)
    learned = TrainableBackbone(backbone, "1").learning
    return backbone.retuned({n: p.numpy() + rng.normal(size=p.shape) for n, p in learned.items()})


@pytest.fixture(scope="module")
def three():
    return drawn((1, 3, 6))


def tuner(backbone, data, tuning=QUICK, classes=CLASSES, seed=0, folder=None, **changed):
    examples = Examples(*data, classes)
    pooling = WindowPooling(
        **{"scales": SCALES, "levels": (2, 1), "reference": 48, "scale_rule": "released"} | changed
    )

    def pool(i, boxes):
        return pooling(backbone.encode(data[0][i], pooling.scales), boxes)

    return FineTuner(backbone, examples, pooling, tuning, pool=pool, seed=seed, folder=folder)


def trained(*arguments, **options):
    made = tuner(*arguments, **options)
    made.train()
    return made


def weights(made):
    """Return all numbers of a head and its backbone."""
    return [*made.head.state_dict().values(), *map(torch.from_numpy, made.backbone.parameters.values())]


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


class Stop(Exception):
    pass


def stops_in(part, after):
    """Return a track that breaks off in a part, described so, after so many items."""

    def track(items, description):
        for n, item in enumerate(items):
            if description.startswith(part) and n == after:
                raise Stop
            yield item

    return track


@pytest.fixture(scope="module")
def frozen(lite0):
    tuning = Tuning(batches=400, batch=64, width=48, windows=48, lr=2e-3, dropout=0.2)
    return trained(lite0, drawn(range(1, 31)), tuning, scales=(160, 320), reference=160)


def test_shapes_are_learned_and_known_again(frozen, lite0):
    losses, errors = np.array([(record.loss, record.error) for record in frozen.history]).T
    assert [record.part for record in frozen.history] == ["head"] * 10
    assert losses[-2:].mean() < 0.4 * losses[0]
    # Some windows overlap an object by just more or just less than half.
    assert errors[-2:].mean() < 0.1
    known, total, before, after = 0, 0, [], []
    for image, _, target in zip(*drawn(range(101, 113)), strict=True):
        truth = target.boxes
        for shift in ([8, 6, 8, 6], [-7, 5, 8, -6]):
            boxes = truth + np.float32(shift)
            pooled = WindowPooling((320,), (2, 1))(lite0.encode(image, (320,)), boxes)
            scores, deltas = frozen.head(torch.from_numpy(pooled * np.float32(frozen.scale)))
            kinds = torch.tensor([CLASSES.index(name) for name in target.labels])
            known += int((scores.argmax(dim=1) == kinds).sum())
            total += len(kinds)
            chosen = deltas[torch.arange(len(kinds)), kinds] * torch.tensor(DELTA_UNITS)
            moved = decode_deltas(torch.from_numpy(boxes), chosen)
            before.append(np.abs(boxes - truth).mean())
            after.append(np.abs(moved.numpy() - truth).mean())
    assert total > 30
    assert known > 0.6 * total
    assert np.mean(after) < 0.9 * np.mean(before)


def test_a_backbone_that_is_not_tuned_stays_as_it_is(backbone, three):
    signature = backbone.signature
    made = trained(backbone, three)
    assert made.learning == {}
    assert made.backbone is backbone
    assert backbone.signature == signature


def test_when_training_ends_nothing_learns_any_more(frozen):
    assert not frozen.head.training
    assert not any(p.requires_grad for p in frozen.head.parameters())


def test_layers_behind_a_stage_learn_and_the_others_stay(backbone, three):
    before, signature = dict(backbone.parameters), backbone.signature
    made = trained(backbone, three, replace(QUICK, stage="4", backbone_lr=1.0))
    names = list(TrainableBackbone(backbone, "4").learning)
    assert list(made.learning) == list(made.backbone.tuned) == names
    after = made.backbone.parameters
    for name, value in after.items():
        if name not in names:
            assert np.array_equal(value, before[name]), name
    changed = [n for n in names if not np.array_equal(after[n], before[n].astype(np.float16))]
    assert len(changed) > 0.9 * len(names)
    # What is used is what is kept: half precision.
    assert all(np.array_equal(after[name], value) for name, value in made.backbone.tuned.items())
    assert made.backbone.signature.startswith(f"{signature} tuned=")
    image = three[0][0]
    assert not np.array_equal(made.backbone(image, 96).stages[0], backbone(image, 96).stages[0])
    # The backbone that was given is as it was.
    assert backbone.signature == signature
    assert backbone.tuned == {}


@pytest.mark.parametrize(
    ("stage", "part", "after", "done"),
    [
        (None, "Pooling", 1, 0),
        (None, "Training layers, part 2 of 10", 0, 1),
        (None, "Training layers, part 10 of 10", 1, 9),
        ("4", "Training layers, part 3 of 10", 1, 2),
        ("4", "Tuning backbone, epoch 1 of 3", 0, 10),
        ("4", "Tuning backbone, epoch 3 of 3", 2, 12),
    ],
)
def test_going_on_is_as_not_stopping(backbone, three, tmp_path, stage, part, after, done):
    tuning = replace(QUICK, stage=stage)
    whole = trained(backbone, three, tuning)
    torch.manual_seed(1)
    broken = tuner(backbone, three, tuning, folder=tmp_path)
    with pytest.raises(Stop):
        broken.train(stops_in(part, after))
    torch.manual_seed(99)  # draws of others in between
    again = tuner(backbone, three, tuning, folder=tmp_path)
    assert again.history == whole.history[:done]
    again.train()
    assert again.history == whole.history
    assert again.scale == whole.scale
    assert equal(weights(again), weights(whole))
    assert again.backbone.signature == whole.backbone.signature
    # Now it is complete, and there is nothing left to train.
    finished = tuner(backbone, three, tuning, folder=tmp_path)
    finished.train(stops_in("", 0))
    assert equal(weights(finished), weights(whole))
    assert set(tmp_path.iterdir()) == set(again.checkpoints.values()), "pooled features are gone"


def test_equal_seeds_give_equal_weights_and_leave_other_draws_alone(backbone, three):
    torch.manual_seed(5)
    one = trained(backbone, three, seed=1)
    drawn_then = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn_then)
    twin, other = trained(backbone, three, seed=1), trained(backbone, three, seed=2)
    assert equal(weights(one), weights(twin))
    assert one.history == twin.history
    assert not equal(one.head.state_dict().values(), other.head.state_dict().values())


SHORT = replace(QUICK, batches=1)


@pytest.fixture(scope="module")
def checkpoint(backbone, three, tmp_path_factory):
    return trained(backbone, three, SHORT, folder=tmp_path_factory.mktemp("tuning")).checkpoints["head"]


def test_other_runs_have_other_checkpoints(backbone, three, checkpoint):
    tuning, folder = SHORT, checkpoint.parent
    images, windows, targets = three
    assert len(tuner(backbone, three, tuning, folder=folder).history) == 1
    moved = Target.of(targets[0].boxes + 1, targets[0].labels)
    renamed = Target.of(targets[0].boxes, ["disc"] * len(targets[0].labels))
    assert renamed.labels != targets[0].labels
    others = [
        {"tuning": replace(tuning, batches=2)},
        {"tuning": replace(tuning, width=13)},
        {"seed": 1},
        {"levels": (1, 2)},
        {"scales": (96, 128)},
        {"reference": 50},
        {"projection": "paper"},
        {"scale_rule": "paper"},
        {"classes": ("disc", "triangle", "square")},
        {"data": (images[:2], windows[:2], targets[:2])},
        {"data": (images, [windows[0][1:], *windows[1:]], targets)},
        {"data": (images, windows, [moved, *targets[1:]])},
        {"data": (images, windows, [renamed, *targets[1:]])},
        {"backbone": another(backbone)},
    ]
    for changed in others:
        arguments = {"backbone": backbone, "data": three, "tuning": tuning} | changed
        other = tuner(**arguments, folder=folder)
        assert other.checkpoints["head"].parent == folder
        assert other.checkpoints["head"] != checkpoint
        assert other.history == []


def test_a_backbone_learns_behind_the_head_that_is_there(backbone, three, checkpoint):
    tuning, folder = replace(SHORT, stage="4"), checkpoint.parent
    whole = trained(backbone, three, tuning)
    after = tuner(backbone, three, tuning, folder=folder)
    assert [record.part for record in after.history] == ["head"]
    after.train()
    assert after.history == whole.history
    assert equal(weights(after), weights(whole))
    assert after.checkpoints["backbone"] not in (checkpoint, after.checkpoints["head"])
    assert after.checkpoints["head"] == checkpoint
    assert len(tuner(backbone, three, SHORT, folder=folder).history) == 1, "the head's stays as it was"


def test_damaged_checkpoints_are_refused(backbone, three, checkpoint, tmp_path):
    content = checkpoint.read_bytes()
    with safe_open(checkpoint, "pt") as file:
        facts = file.metadata()
    tensors = load_file(checkpoint)
    bad = tmp_path / checkpoint.name

    def refused(match):
        with pytest.raises(ValueError, match=match) as caught:
            tuner(backbone, three, SHORT, folder=tmp_path)
        assert str(bad) in str(caught.value)
        assert str(caught.value).endswith("; remove it to start anew")
        assert "\n" not in str(caught.value)

    for text in (b"", content[:100], content[: len(content) // 2], content[:-1], b"no weights" * 50):
        bad.write_bytes(text)
        refused("found no safetensors file")
    save_file({n: t for n, t in tensors.items() if n != "value.head.fc7.bias"}, bad, facts)
    refused(r"found a damaged checkpoint \('value.head.fc7.bias'\)")
    save_file(tensors | {"value.head.fc7.bias": torch.zeros(3)}, bad, facts)
    refused("found a damaged checkpoint .*size of tensor")
    save_file(tensors, bad, {k: v for k, v in facts.items() if k != "progress"})
    refused("found a damaged checkpoint")
    save_file(tensors, bad, facts | {"version": "0"})
    refused("found sppnet-tuning 0, expected sppnet-tuning 1")
    save_file(tensors, bad)
    refused("without a format mark, expected sppnet-tuning 1")


def test_a_loss_that_is_not_finite_names_the_image(backbone, three, tmp_path, monkeypatch):
    images, windows, targets = three
    images = [images[0], np.ascontiguousarray(images[1][:90]), images[2]]
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, image in zip(paths, images, strict=True):
        trees.save(path, image)

    plain_pooling = WindowPooling.__call__

    def broken(self, encoded, boxes):
        pooled = plain_pooling(self, encoded, boxes)
        return pooled * np.inf if encoded.size[0] == 90 else pooled

    for sources, name in ((images, "number 1"), (paths, str(paths[1]))):
        for batches, expected in (
            (1, f"{name}: found features that are not finite, expected numbers"),
            (0, f"found the loss nan in epoch 0; the image: {name}, expected a finite number"),
        ):
            made = tuner(backbone, (sources, windows, targets), replace(QUICK, stage="4", batches=batches))
            plain = made.pool
            with monkeypatch.context() as patch:
                patch.setattr(WindowPooling, "__call__", broken)
                patch.setattr(made, "pool", lambda i, boxes, p=plain: p(i, boxes) * (np.inf if i == 1 else 1))
                with pytest.raises(ValueError, match="finite") as caught:
                    made.train()
            assert str(caught.value) == expected


def test_a_head_that_diverges_is_an_error(backbone, three):
    made = tuner(backbone, three, replace(QUICK, lr=1e30))
    with pytest.raises(
        ValueError, match=r"found the loss (nan|inf) after \d+ batches, expected a finite number"
    ):
        made.train()


def overlap(a, b):
    """Return the intersection over union of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def covered(box, shape, flipped):
    """Return which pixels of an image a box covers once the image is flipped."""
    mask = np.zeros(shape, bool)
    x1, y1, x2, y2 = (int(v) for v in box)
    mask[y1:y2, x1:x2] = True
    return mask[:, ::-1] if flipped else mask


def looks(made, i, count, monkeypatch):
    """Look at an image so many times; return whether flipped, the side, windows, classes and deltas."""
    seen = []
    plain = TrainableBackbone.__call__

    def spied_backbone(self, pixels, side):
        seen.append([pixels, side])
        return plain(self, pixels, side)

    plain_pooling = WindowPooling.__call__

    def spied_pooling(self, encoded, boxes):
        seen[-1].append(boxes)
        return plain_pooling(self, encoded, boxes)

    image, rng, found = made.examples.images[i], np.random.default_rng(0), []
    with monkeypatch.context() as patch:
        patch.setattr(TrainableBackbone, "__call__", spied_backbone)
        patch.setattr(WindowPooling, "__call__", spied_pooling)
        for _ in range(count):
            pooled, labels, deltas = made._look(i, rng)
            pixels, side, boxes = seen.pop()
            flipped = not np.array_equal(pixels, image)
            assert np.array_equal(pixels, image[:, ::-1] if flipped else image)
            assert len(pooled) == len(labels) == len(deltas) == len(boxes)
            found.append((flipped, side, boxes, labels.tolist(), deltas))
    return found


def test_windows_are_what_their_overlap_says_in_flipped_images_too(backbone, three, monkeypatch):
    image, target = three[0][0], three[2][0]
    made = tuner(backbone, three, replace(QUICK, far=0.0, stage="4"))
    found = looks(made, 0, 24, monkeypatch)
    assert {flipped for flipped, *_ in found} == {True, False}
    assert {side for _, side, *_ in found} == set(SCALES)
    shape = image.shape[:2]
    masks = {m: {covered(b, shape, m).tobytes() for b in (*grid(), *target.boxes)} for m in (True, False)}
    shown = 0
    for flipped, _, boxes, labels, deltas in found:
        assert 0 < len(boxes) <= 24
        assert len({tuple(box) for box in boxes.tolist()}) == len(boxes), "none comes twice"
        assert sum(label < 3 for label in labels) <= 6, "a quarter of 24"
        truth = [covered(b, shape, flipped) for b in target.boxes]
        columns = [np.flatnonzero(m.any(axis=0)) for m in truth]
        rows = [np.flatnonzero(m.any(axis=1)) for m in truth]
        truth = [(c[0], r[0], c[-1] + 1, r[-1] + 1) for c, r in zip(columns, rows, strict=True)]
        moved = decode_deltas(torch.from_numpy(boxes), deltas)
        for box, label, back in zip(boxes, labels, moved.tolist(), strict=True):
            assert covered(box, shape, False).tobytes() in masks[flipped], "a window, flipped like the image"
            shares = [overlap(box, t) for t in truth]
            nearest = int(np.argmax(shares))
            if label == 3:
                assert 0.1 <= max(shares) < 0.5
                continue
            shown += 1
            assert max(shares) >= 0.5
            assert label == CLASSES.index(target.labels[nearest])
            np.testing.assert_allclose(back, truth[nearest], atol=1e-3)
    assert shown > 24


def test_images_without_objects_or_windows(backbone, three, monkeypatch):
    images, windows, targets = three
    none = np.zeros((0, 4), np.float32)
    nothing = Target.of([], [])
    data = [*images, images[0], images[1], images[2]], [*windows, grid(), none, none]
    tuning = replace(QUICK, stage="4", epochs=1)
    made = tuner(backbone, (*data, [*targets, nothing, nothing, targets[2]]), tuning)
    labels = [looks(made, i, 3, monkeypatch) for i in (3, 4, 5)]
    assert all(look[3] == [3] * 6 for look in labels[0]), "all is far background, as many as asked for"
    assert all(look[3] == [] for look in labels[1])
    assert all(look[3] == [CLASSES.index(targets[2].labels[0])] for look in labels[2]), "the object alone"
    made.train()
    assert all(np.isfinite([record.loss, record.error]).all() for record in made.history)
    # Where there is nothing anywhere, there is nothing to learn.
    empty = tuner(backbone, (images[:1], [none], [nothing]))
    before = [value.clone() for value in empty.head.state_dict().values()]
    empty.train()
    assert equal(before, empty.head.state_dict().values())
    assert np.isnan([record.loss for record in empty.history]).all()


def test_the_loss_is_cross_entropy_and_the_deltas_of_the_shown_class(backbone, three):
    made = tuner(backbone, three, replace(QUICK, dropout=0.0, stage="4"))
    pooled, labels, deltas = made._look(0, np.random.default_rng(7))
    scores, moves = (part.detach().double() for part in made.head(pooled * made.scale))
    loss, wrong = 0.0, 0
    for row, label in enumerate(labels.tolist()):
        loss -= float(scores[row].log_softmax(dim=0)[label])
        wrong += int(scores[row].argmax()) != label
        for d in range(4 if label < 3 else 0):
            apart = abs(float(moves[row, label, d] - deltas[row, d] / DELTA_UNITS[d]))
            loss += apart**2 / 2 if apart < 1 else apart - 0.5
    found, error = made._loss(pooled, labels, deltas)
    found.backward()
    assert 0 < (labels < 3).sum() < len(labels)
    assert (found.item(), error) == pytest.approx((loss / len(labels), wrong / len(labels)), rel=1e-5)
    assert made.head.fc6.weight.grad.abs().max() > 0


def test_features_have_a_mean_norm_of_20_at_the_start(frozen):
    norms = []
    for i in range(len(frozen.examples)):
        pooled, *_ = frozen._pool(i)
        norms.append(np.linalg.norm(pooled * frozen.scale, axis=1))
    assert float(np.concatenate(norms).mean()) == pytest.approx(20, rel=1e-5)


def test_rates_rise_then_fall_to_0_for_the_head_and_then_for_the_backbone(backbone, three, monkeypatch):
    made = tuner(backbone, three, replace(QUICK, stage="4", lr=0.01, backbone_lr=0.002))
    rates = []

    def spied(self):
        rates.append([group["lr"] for group in self.param_groups])

    monkeypatch.setattr(torch.optim.AdamW, "step", spied)
    made.train()
    assert {len(rate) for rate in rates} == {1}
    head, backbones = np.array(rates[:20])[:, 0], np.array(rates[20:])[:, 0]
    assert len(backbones) == 2 * QUICK.epochs, "three images, two to a step"
    np.testing.assert_allclose(head, 0.01 * (1 + np.cos(np.pi * np.arange(1, 21) / 20)) / 2, atol=1e-12)
    shares = np.array([(n + part) / 3 for n in range(3) for part in (2 / 3, 1)])
    np.testing.assert_allclose(backbones, 0.002 * (1 + np.cos(np.pi * shares)) / 2, atol=1e-12)
    made._step(0.01, 0.015)
    assert made.optimizer.param_groups[0]["lr"] == pytest.approx(0.005, rel=0.01), "half way up"


def test_half_of_the_windows_come_flipped(backbone, three, monkeypatch):
    made = tuner(backbone, three, replace(QUICK, batches=4, batch=48))
    plain, seen = made._loss, []

    def spied(pooled, labels, deltas):
        seen.append((pooled.clone(), deltas.clone()))
        return plain(pooled, labels, deltas)

    monkeypatch.setattr(made, "_loss", spied)
    made.train()
    known = [made._pool(i) for i in range(3)]
    stored = torch.from_numpy(np.concatenate([pooled for pooled, *_ in known])).half().float()
    goals = torch.from_numpy(np.concatenate([deltas for *_, deltas in known]))
    turned = made.pooling.flipped(stored, backbone.channels)
    counts = [0, 0]
    for pooled, deltas in seen:
        for row, moves in zip(pooled, deltas, strict=True):
            for flipped, features in enumerate((stored, turned)):
                same = (features == row).all(dim=1)
                sign = torch.tensor([-1.0 if flipped else 1.0, 1, 1, 1])
                if same.any() and (goals[same] * sign == moves).all(dim=1).any():
                    counts[flipped] += 1
                    break
            else:
                raise AssertionError("a window that is none of those, nor the mirror image of one")
    assert min(counts) > 0.3 * sum(counts)


def test_without_batches_the_layers_are_those_of_the_start(backbone, three):
    made = trained(backbone, three, replace(QUICK, batches=0))
    assert made.history == []
    assert equal(made.head.state_dict().values(), tuner(backbone, three).head.state_dict().values())
    assert not made.head.training


@pytest.mark.parametrize(
    "changed",
    [
        {"lr": 0.0},
        {"windows": 0},
        {"images": 0},
        {"width": 0},
        {"epochs": -1},
        {"batches": -1},
        {"batch": 0},
        {"far": 1.0},
        {"positives": 0.0},
        {"positives": 1.5},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"backbone_lr": 0.0},
        {"weight_decay": -1.0},
    ],
)
def test_settings_out_of_range(changed):
    ((name, value),) = changed.items()
    with pytest.raises(ValueError, match=f"found Tuning.*{name}={value}.*expected"):
        Tuning(**changed)


def test_a_stage_that_is_not_there(backbone, three):
    with pytest.raises(ValueError, match="found the stage '5', expected one from 1 to 4"):
        tuner(backbone, three, replace(QUICK, stage="5"))
