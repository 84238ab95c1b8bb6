import copy
import errno
import gc
import itertools
import json
import math
import subprocess
import sys
import textwrap
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import trees
from sppnet.classification import training
from sppnet.classification.batches import Batch, CentralCrops, CropBatches
from sppnet.classification.checkpoint import Checkpointing, _record
from sppnet.classification.network import NetworkSettings, build
from sppnet.classification.training import Recipe, train
from sppnet.errors import TrainingError

TESTS = [str(folder) for folder in Path(__file__).parents[:2]]  # For scripts that import this file.
RECIPE = Recipe(epochs=3, lr=0.02)
NOT_EXACT = {"rtol": 1e-4, "atol": 1e-5}
OURS = {"run": "ours"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def drawn(folder, count, width=74, first=0):
    """Write pictures with one coloured shape each, the classes in turn."""
    images = []
    for i in range(first, first + count):
        rng = np.random.default_rng(i)
        picture = rng.integers(90, 130, (74, width, 3), dtype=np.uint8)
        (x, y), side = rng.integers(4, 20, 2), rng.integers(36, 48)
        trees.draw(picture, trees.SHAPES[i % 3], (x, y, x + side, y + side))
        trees.save(path := folder / f"{i}.png", picture)
        images.append((path, i % 3))
    return images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return drawn(tmp_path_factory.mktemp("images"), 24)


@pytest.fixture(scope="module")
def unseen(tmp_path_factory):
    return drawn(tmp_path_factory.mktemp("unseen"), 11, first=100)


def new_network(dropout=0.0, **settings):
    """Build a tiny network; unlike the paper's wide layers, its narrow ones need weights that large."""
    settings = {"levels": (2, 1), "width": 0.03, "size": 64, "dropout": dropout} | settings
    network = build(NetworkSettings("zf5", ("a", "b", "c"), **settings))
    generator = torch.Generator().manual_seed(0)
    for module in network.head.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, generator=generator)
    return network


def weights(network):
    plain = torch.contiguous_format
    return {name: value.clone(memory_format=plain) for name, value in network.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_near(a, b):
    torch.testing.assert_close(a, b, **NOT_EXACT)


def timeless(records):
    return [replace(record, seconds=0) for record in records]


def trained(source, recipe=RECIPE, dropout=0.5, **options):
    """Train a new network; return the records and its weights."""
    network = new_network(dropout)
    records = list(train(network, source, recipe, **options))
    return timeless(records), weights(network)


class Changed:
    """A source whose batches are changed on their way: ``change(batch, epoch, number)``."""

    def __init__(self, source, change):
        self.source, self.change, self.batch_size = source, change, source.batch_size
        self.side_of = source.side_of

    def __len__(self):
        return len(self.source)

    def epoch(self, number, start=0):
        for i, batch in enumerate(self.source.epoch(number, start), start):
            yield self.change(batch, number, i)


def emptied(batch, *lines):
    nothing = torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
    return Batch(nothing, torch.zeros(0, dtype=torch.int64), [], list(lines))


# ---- Learning ----


def test_it_learns_and_tells_of_every_epoch(images, unseen):
    network = new_network()
    recipe = Recipe(epochs=8, lr=0.02)
    records = list(
        train(network, CropBatches(images, 8, (64,)), recipe, validation=CentralCrops(unseen, 4, 64))
    )
    assert [r.epoch for r in records] == list(range(8))
    assert records[0].error > 0.2
    assert records[-1].error == 0
    assert records[-1].loss < 0.1 < records[0].loss
    assert records[-1].validation_error < 0.2 < records[0].validation_error
    for record in records:
        assert (record.side, record.lr, record.images) == (64, 0.02, 24)
        assert (record.unreadable, record.skipped) == (0, ())
        assert 0 < record.seconds < 60


def test_sizes_take_turns(images):
    records, _ = trained(CropBatches(images, 8, (64, 48)), validation=None)
    assert [r.side for r in records] == [64, 48, 64]
    assert {r.validation_error for r in records} == {None}


def test_loss_and_error_are_means_over_all_images(images):
    seen = []
    source = Changed(CropBatches(images[:20], 8, (64,)), lambda batch, *_: seen.append(batch) or batch)
    # So little is learnt that the first network judges all batches, of which one has an image less.
    first = seen_less = Changed(source, lambda b, _, i: Batch(b[0][i:], b[1][i:], b.names[i:], []))
    network = new_network()
    (record,) = train(copy.deepcopy(network), first, Recipe(epochs=1, lr=1e-12))
    pictures = torch.cat([b.images[i:] for i, b in enumerate(seen)])
    labels = torch.cat([b.labels[i:] for i, b in enumerate(seen)])
    with torch.no_grad():
        scores = network(pictures)
    assert record.images == len(pictures) == 15
    assert record.loss == pytest.approx(F.cross_entropy(scores, labels).item(), rel=1e-5)
    assert record.error == pytest.approx((scores.argmax(dim=1) != labels).float().mean().item())
    assert len(seen_less) == 2


def test_validation_error_is_that_of_central_views(images, unseen):
    network, views = new_network(0.5), CentralCrops(unseen, 4, 64)
    for record in train(network, CropBatches(images, 8, (64,)), Recipe(epochs=2, lr=0.005), validation=views):
        judge = copy.deepcopy(network).eval()
        wrong = 0
        for batch in views:
            for picture, label in zip(batch.images, batch.labels, strict=True):
                wrong += int(judge(picture[None]).argmax() != label)
        assert record.validation_error == wrong / len(unseen)
        assert 0 < wrong < len(unseen)


def learning_rates(errors, monkeypatch, **recipe):
    """Return the rates of the epochs whose validation errors are these."""
    given = iter(errors)
    monkeypatch.setattr(training._Run, "_error", lambda *_: next(given))
    images = [(Path("no.png"), 0)] * 8
    source = Changed(CropBatches(images, 8), lambda *_: emptied(None))
    records = train(new_network(), source, Recipe(**recipe), validation=[], unreadable_limit=99)
    return [round(record.lr, 9) for record in records]


def test_the_rate_drops_twice_on_a_plateau_and_then_training_ends(monkeypatch):
    errors = [0.9, 0.8, 0.8, 0.85, 0.7, 0.7, 0.7, 0.6, 0.6, 0.6, 0.5, 0.5]
    #                   1    2    -    1    2    -    1    2 the third time
    expected = [0.1] * 4 + [0.01] * 3 + [0.001] * 3
    assert learning_rates(errors, monkeypatch, epochs=70, lr=0.1, patience=2) == expected
    assert learning_rates([0.5] * 99, monkeypatch, epochs=70, lr=0.1, patience=1) == [0.1, 0.1, 0.01, 0.001]
    assert learning_rates(np.arange(70, 0, -1), monkeypatch, epochs=70, lr=0.1) == [0.1] * 70
    assert (
        learning_rates([math.nan] * 99, monkeypatch, lr=0.1, patience=2)
        == [0.1] * 2 + [0.01] * 2 + [0.001] * 2
    )


def test_the_rate_drops_before_chosen_epochs_only(monkeypatch):
    expected = [0.1, 0.01, 0.01, 0.001, 0.001, 0.001]
    assert learning_rates([0.5] * 6, monkeypatch, epochs=6, lr=0.1, patience=1, milestones=(1, 3)) == expected
    assert learning_rates([0.5] * 6, monkeypatch, epochs=6, lr=0.1, patience=1, milestones=()) == [0.1] * 6


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"lr": 0.0},
        {"patience": 0},
        {"accumulate": 0},
        {"backbone_lr": -1.0},
        {"frozen": -1},
    ],
)
def test_recipes_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match="expected epochs, lr, patience and accumulate above 0"):
        Recipe(**wrong)
    with pytest.raises(ValueError, match="found the label smoothing 1"):
        Recipe(label_smoothing=1.0)


# ---- The steps ----


def by_hand(network, source, recipe):
    """Train by the textbook: gradients of mean losses, weight decay, momentum."""
    momenta = {}
    network.train()
    for epoch in range(recipe.epochs):
        batches = list(source.epoch(epoch))
        for start in range(0, len(batches), recipe.accumulate):
            step = batches[start : start + recipe.accumulate]
            loss = sum(F.cross_entropy(network(b.images), b.labels) for b in step) / recipe.accumulate
            parameters = dict(network.named_parameters())
            gradients = torch.autograd.grad(loss, [*parameters.values()])
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                change = gradient + recipe.weight_decay * parameter.detach()
                momenta[name] = recipe.momentum * momenta.get(name, 0) + change
                factor = recipe.backbone_lr if name.startswith("backbone.") else 1
                with torch.no_grad():
                    parameter -= recipe.lr * factor * momenta[name]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"momentum": 0.5},
        {"weight_decay": 0.3},
        {"accumulate": 2},
        {"backbone_lr": 0.1},
        {"backbone_lr": 0.0},
    ],
    ids=str,
)
def test_steps_are_those_of_the_textbook(images, change):
    recipe = replace(Recipe(epochs=2, lr=0.005), **change)
    source = CropBatches(images, 8, (64, 48))
    ours, theirs = new_network(), new_network()
    list(train(ours, source, recipe))
    by_hand(theirs, source, recipe)
    before = weights(new_network())
    assert_near(weights(ours), weights(theirs))
    assert any(not torch.allclose(before[name], value, **NOT_EXACT) for name, value in weights(ours).items())


def test_two_halves_of_a_batch_make_its_step(images):
    halves = trained(CropBatches(images, 4, (64,)), replace(RECIPE, accumulate=2, epochs=2), dropout=0)
    whole = trained(CropBatches(images, 8, (64,)), replace(RECIPE, epochs=2), dropout=0)
    assert_near(halves[1], whole[1])
    assert [r.loss for r in halves[0]] == pytest.approx([r.loss for r in whole[0]], rel=1e-4)


def test_a_frozen_backbone_stays(images):
    network = new_network()
    network.backbone.append(nn.BatchNorm2d(8))
    before = weights(network)
    list(train(network, CropBatches(images, 8, (64,)), replace(RECIPE, backbone_lr=0.0, weight_decay=0.5)))
    after = weights(network)
    frozen = {name for name in before if name.startswith("backbone.")}
    assert any("running_mean" in name for name in frozen)
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not any(torch.equal(before[name], after[name]) for name in before.keys() - frozen)
    # Another run sets it free again.
    list(train(network, CropBatches(images, 8, (64,)), RECIPE))
    assert not any(torch.equal(before[n], value) for n, value in weights(network).items() if n in frozen)


def test_the_first_groups_of_a_backbone_stay(images):
    network = new_network()
    before = weights(network)
    list(train(network, CropBatches(images, 8, (64,)), replace(RECIPE, frozen=2, weight_decay=0.5)))
    changed = {name for name, value in weights(network).items() if not torch.equal(before[name], value)}
    still = {name for name in before if name.startswith(("backbone.conv1.", "backbone.conv2."))}
    assert still
    assert changed == before.keys() - still
    with pytest.raises(ValueError, match="found 6 groups to freeze, expected at most the 5 of the backbone"):
        list(train(network, CropBatches(images, 8, (64,)), replace(RECIPE, frozen=6)))


def test_smoothed_labels_are_spread_over_all_classes(images):
    source, network = CropBatches(images, 24, (64,)), new_network()
    (batch,) = source.epoch(0)
    with torch.no_grad():
        logs = network(batch.images).log_softmax(dim=1)
    target = F.one_hot(batch.labels, 3) * 0.7 + 0.3 / 3
    (record,) = train(network, source, replace(RECIPE, epochs=1, label_smoothing=0.3))
    assert record.loss == pytest.approx(float(-(target * logs).sum(dim=1).mean()), rel=1e-4)


def test_dropout_is_on_in_training_and_the_network_is_ready_between_epochs(images):
    plain = trained(CropBatches(images, 8, (64,)))
    network = new_network(0.5)
    records = []
    for record in train(network, CropBatches(images, 8, (64,)), RECIPE):
        assert not network.training
        network.eval()  # What a caller who measures something may do, or this:
        torch.manual_seed(99)
        records.append(record)
    assert not network.training
    assert timeless(records) == plain[0]
    assert same(weights(network), plain[1])
    assert not same(plain[1], trained(CropBatches(images, 8, (64,)), dropout=0)[1])
    assert not same(plain[1], trained(CropBatches(images, 8, (64,)), seed=1)[1])


def scores_of_one_picture(source, **options):
    """Train at a rate of next to nothing on one picture and return its score in every batch."""
    network, scores = new_network(0.5), []
    network.head[-1].register_forward_hook(lambda _, __, out: scores.append(out.detach()[0, 0].item()))
    picture = torch.full((1, 3, 64, 64), 99, dtype=torch.uint8)
    same_picture = Changed(source, lambda b, *_: Batch(picture, b.labels[:1], [], []))
    list(train(network, same_picture, Recipe(epochs=2, lr=1e-12), **options))
    return scores


def test_every_batch_drops_other_units(images):
    scores = scores_of_one_picture(CropBatches(images, 8, (64,)))
    assert len({round(score, 3) for score in scores}) == len(scores) == 6


def test_half_precision(images, unseen):
    source, views = CropBatches(images, 8, (64,)), CentralCrops(unseen, 4, 64)
    kinds = set()
    network = new_network(0.5)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, _, out: kinds.add((m.training, out.dtype)))
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    records = list(train(network, source, Recipe(epochs=6, lr=0.02), validation=views, fabric=fabric))
    assert kinds == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert records[-1].loss < records[0].loss / 2


# ---- Going on ----


@pytest.mark.parametrize("sizes", [(64,), (64, 48)])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_run_left_between_epochs_goes_on_bit_for_bit(images, unseen, tmp_path, sizes, precision):
    source = CropBatches(images, 8, sizes)
    recipe = Recipe(epochs=5, lr=0.02, patience=1)

    def options(name):
        fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
        views = CentralCrops(unseen, 4, 64)
        return {"checkpointing": Checkpointing(tmp_path / name), "validation": views, "fabric": fabric}

    whole = trained(source, recipe, **options("whole.safetensors"))
    assert len(whole[0]) >= 3
    for _ in range(2):  # One epoch each.
        run = train(new_network(0.5), source, recipe, **options("parts.safetensors"))
        seen = len(load_history(tmp_path / "parts.safetensors"))
        list(itertools.islice(run, seen + 1))
    assert len(load_history(tmp_path / "parts.safetensors")) == 2
    assert_equal_runs(trained(source, recipe, **options("parts.safetensors")), whole)
    # A run that is over gives its records and weights again.
    assert_equal_runs(trained(source, recipe, **options("parts.safetensors")), whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts.safetensors", "whole.safetensors"]


def load_history(path):
    return json.loads(progress_of(path))["history"] if path.exists() else []


def progress_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()["progress"]


def assert_equal_runs(a, b):
    assert a[0] == b[0]
    assert same(a[1], b[1])


class Stopped(Exception):
    """The end of a process, as far as the loop can tell."""


def stopping(source, epoch, number):
    def change(batch, *place):
        if place == (epoch, number):
            raise Stopped
        return batch

    return Changed(source, change)


@pytest.mark.parametrize(
    ("accumulate", "batch", "save_every"), [(1, 4, 0), (2, 3, 0), (2, 4, 0), (1, 4, 1e9)], ids=str
)
def test_a_run_stopped_within_an_epoch_goes_on_bit_for_bit(images, tmp_path, accumulate, batch, save_every):
    source = CropBatches(images, 4, (64, 48))
    recipe = replace(RECIPE, accumulate=accumulate)
    whole = trained(source, recipe)
    path = tmp_path / "run.safetensors"
    options = {"checkpointing": Checkpointing(path, every=save_every)}
    with pytest.raises(Stopped):
        trained(stopping(source, 1, batch), recipe, **options)
    progress = json.loads(progress_of(path))
    done = 0 if save_every else batch // accumulate * accumulate
    assert (progress["epoch"], progress["batch"], progress["images"]) == (1, done, 4 * done)
    assert_equal_runs(trained(source, recipe, **options), whole)
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


CHILD = """
import os, random, signal, sys, time
from pathlib import Path
sys.path[:0] = {tests!r}
from test_training import *

def run(**options):
    network, recipe = new_network(0.5, levels=None), Recipe(epochs=6, lr=0.02)
    records = timeless(train(network, CropBatches(images, 8, (64,)), recipe, **options))
    return weights(network), repr(records)

torch.set_num_threads(1)
folder = Path({folder!r})
images = drawn(folder / "images", 24)
run()  # Loads everything, so that children begin at once.
start = time.perf_counter()
expected = run()
duration = time.perf_counter() - start
within = 0
while True:
    child = os.fork()
    if not child:
        try:
            found, records = run(checkpointing=Checkpointing(folder / "run.safetensors", every=0))
            save_file(found, folder / "weights.safetensors")
            (folder / "records").write_text(records)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if within < 6:
        time.sleep(random.uniform(0.05, 0.5) * duration)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    within += status == signal.SIGKILL and (folder / "run.safetensors").exists()
    if status != signal.SIGKILL:
        break
assert status == 0
assert within
assert same(load_file(folder / "weights.safetensors"), expected[0])
assert (folder / "records").read_text() == expected[1]
print("killed in the middle", within)
"""


def test_killed_again_and_again_a_run_ends_as_if_it_had_not_been(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(tests=TESTS, folder=str(tmp_path)))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=250)
    assert done.stderr == "", "no warnings in an ordinary run"
    assert done.returncode == 0
    assert done.stdout.startswith("killed in the middle")


# ---- Checkpoints that do not fit ----


@pytest.fixture
def checkpoint(images, tmp_path):
    path = tmp_path / "run.safetensors"
    trained(CropBatches(images, 8, (64,)), replace(RECIPE, epochs=1), checkpointing=Checkpointing(path, OURS))
    return path


def rewritten(path, facts=(), tensors=()):
    """Change what a checkpoint holds."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    changed = load_file(path) | dict(tensors)
    save_file({k: v for k, v in changed.items() if v is not None}, path, metadata | dict(facts))


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda p: p.write_bytes(b"nothing of the kind"), "found no safetensors file"),
        (lambda p: p.write_bytes(b""), "found no safetensors file"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "found no safetensors file"),
        (lambda p: p.write_bytes(p.read_bytes()[:99]), "found no safetensors file"),
        (
            lambda p: save_file({"a": torch.zeros(1)}, p),
            "without a format mark, expected sppnet-checkpoint 2",
        ),
        (lambda p: rewritten(p, {"version": "0"}), "found sppnet-checkpoint 0, expected sppnet-checkpoint 2"),
        (
            lambda p: rewritten(p, {"settings": '{"run": "theirs"}'}),
            "found the checkpoint of another run .run theirs., expected run ours",
        ),
        (lambda p: rewritten(p, {"progress": "{"}), "does not fit the network"),
        (lambda p: rewritten(p, {"progress": "{}"}), "does not fit the network"),
        (lambda p: rewritten(p, {"progress": '{"batches": 3, "history": [1]}'}), "does not fit the network"),
        (
            lambda p: rewritten(p, tensors={"network.head.fc8.linear.bias": None}),
            "does not fit the network .Missing key.*fc8.linear.bias",
        ),
        (
            lambda p: rewritten(p, tensors={"network.head.fc8.linear.bias": torch.zeros(4)}),
            r"does not fit the network .size mismatch for head.fc8.linear.bias.*\[4\].*\[3\]",
        ),
        (
            lambda p: rewritten(p, tensors={"momentum.head.fc8.linear.bias": torch.zeros(4)}),
            "does not fit the network",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(images, checkpoint, spoil, found):
    spoil(checkpoint)
    content = checkpoint.read_bytes()
    with pytest.raises(ValueError, match=f"run.safetensors: .*{found}") as caught:
        trained(CropBatches(images, 8, (64,)), checkpointing=Checkpointing(checkpoint, OURS))
    assert str(caught.value).endswith("; remove it to start anew")
    assert "\n" not in str(caught.value)
    assert checkpoint.read_bytes() == content


def test_a_checkpoint_of_another_network_or_other_data_is_refused(images, checkpoint):
    options = {"checkpointing": Checkpointing(checkpoint, OURS)}
    with pytest.raises(ValueError, match=r"run.safetensors: .*does not fit the network .size mismatch"):
        list(train(new_network(width=0.05), CropBatches(images, 8, (64,)), RECIPE, **options))
    with pytest.raises(ValueError, match=r"run.safetensors: .* epochs of 3 batches, expected 6"):
        trained(CropBatches(images, 4, (64,)), **options)
    with pytest.raises(ValueError, match=r"run.safetensors: .* another run .run ours., expected run theirs"):
        trained(CropBatches(images, 8, (64,)), checkpointing=Checkpointing(checkpoint, {"run": "theirs"}))


def test_a_full_disk_leaves_the_last_good_checkpoint(images, checkpoint, monkeypatch):
    source, content = CropBatches(images, 8, (64,)), checkpoint.read_bytes()
    options = {"checkpointing": Checkpointing(checkpoint, OURS)}

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"as much as there is room for")
        raise failures.pop()

    failures = [
        OSError(errno.ENOSPC, "No space left on device"),
        # What safetensors makes of it:
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ]
    with monkeypatch.context() as patched:
        patched.setattr("safetensors.numpy.save_file", full)
        for _ in range(2):
            with pytest.raises(OSError, match="No space left on device"):
                trained(source, **options)
    assert checkpoint.read_bytes() == content
    assert [p.name for p in checkpoint.parent.iterdir()] == [checkpoint.name]
    assert_equal_runs(trained(source, **options), trained(source))


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_file_that_grows_too_large(images, tmp_path):
    import resource

    path = tmp_path / "run.safetensors"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"run.safetensors: cannot write .*File too large"):
            trained(CropBatches(images, 8, (64,)), checkpointing=Checkpointing(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


# ---- Losses and files that are no good ----


def test_a_loss_that_is_no_number_names_the_batch(images, tmp_path):
    network = new_network()
    with torch.no_grad():
        network.head[-1].linear.bias[1] = math.inf
    source = CropBatches(images, 8, (64,))
    (first, *_) = source.epoch(0)
    with pytest.raises(TrainingError, match=r"found the loss (nan|inf) in epoch 0.*rate of 0.02") as caught:
        list(train(network, source, RECIPE, checkpointing=Checkpointing(tmp_path / "run.safetensors")))
    names = [str(path) for path in first.names]
    assert all(name in str(caught.value) for name in names[:5])
    assert not any(name in str(caught.value) for name in names[5:])
    assert str(caught.value).endswith(" and 3 more")
    assert list(tmp_path.iterdir()) == []


def overwriting(source, epoch, paths):
    """Spoil files before an epoch."""

    def change(batch, number, i):
        if (number, i) == (epoch - 1, len(source) - 1):
            for path in paths:
                path.write_bytes(b"spoilt")
        return batch

    return Changed(source, change)


def test_a_file_that_spoils_is_named_once_and_counted(tmp_path):
    images = drawn(tmp_path, 24)
    source = overwriting(CropBatches(images, 8, (64,)), 2, [images[5][0]])
    path = tmp_path / "run.safetensors"
    recipe = replace(RECIPE, epochs=5)
    run = train(new_network(), source, recipe, checkpointing=Checkpointing(path))
    records = list(itertools.islice(run, 4))
    records += list(train(new_network(), source, recipe, checkpointing=Checkpointing(path)))[4:]
    assert [r.unreadable for r in records] == [0, 0, 1, 1, 1]
    assert [r.images for r in records] == [24, 24, 23, 23, 23]
    assert [len(r.skipped) for r in records] == [0, 0, 1, 0, 0]
    assert str(images[5][0]) in records[2].skipped[0]
    assert isinstance(load_records(path)[2].skipped, tuple)


def load_records(path):
    return [_record(values) for values in load_history(path)]


def test_too_many_files_that_spoil_end_training(tmp_path):
    images = drawn(tmp_path, 24)
    spoilt = [path for path, _ in images[3:6]]
    source = overwriting(CropBatches(images, 8, (64,)), 1, spoilt)
    with pytest.raises(TrainingError, match=r"3 files could not be read, expected at most 2; last: .*png"):
        list(train(new_network(), source, RECIPE, unreadable_limit=2))
    assert [r.unreadable for r in train(new_network(), source, RECIPE, unreadable_limit=3)] == [3, 3, 3]


def test_the_limit_is_a_hundredth_of_the_images_and_at_least_ten(images):
    def run(count, spoilt):
        lines = [f"{i}.png: spoilt" for i in range(spoilt)]
        source = CropBatches((images * count)[:count], 400 if count > 400 else 8, (64,))
        source = Changed(source, lambda *_: emptied(None, *lines))
        return [r.unreadable for r in train(new_network(), source, replace(RECIPE, epochs=1))]

    assert run(24, 10) == [10]
    with pytest.raises(TrainingError, match="at most 10"):
        run(24, 11)
    assert run(1600, 16) == [16]
    with pytest.raises(TrainingError, match="at most 16"):
        run(1600, 17)


def test_unreadable_files_of_the_validation_count(images, unseen, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    views = CentralCrops([*unseen, (tmp_path / "bad.png", 0)], 4, 64)
    records, _ = trained(CropBatches(images, 8, (64,)), validation=views)
    assert [r.unreadable for r in records] == [1, 1, 1]
    assert [len(r.skipped) for r in records] == [1, 0, 0]
    without, _ = trained(CropBatches(images, 8, (64,)), validation=CentralCrops(unseen, 4, 64))
    assert [r.validation_error for r in records] == [r.validation_error for r in without]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_without_a_readable_image_is_passed_over(images, accumulate):
    def change(batch, epoch, i):
        return emptied(batch, "a", "b") if i == 1 else batch

    source = CropBatches(images, 4, (64,))
    recipe = replace(RECIPE, accumulate=accumulate, epochs=1)
    (record,), found = trained(Changed(source, change), recipe, dropout=0)
    assert (record.images, record.unreadable, record.skipped) == (20, 2, ("a", "b"))
    # As if its gradient were zero.
    theirs, black = new_network(), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    blackened = Changed(source, lambda b, _, i: Batch(black, b.labels[:1], [], []) if i == 1 else b)
    plain = F.cross_entropy
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(F, "cross_entropy", lambda s, y: plain(s, y) * (0.0 if len(y) == 1 else 1.0))
        by_hand(theirs, blackened, recipe)
    assert_near(found, weights(theirs))


def test_nothing_readable_at_all(images, unseen):
    nothing = Changed(CropBatches(images, 8, (64,)), lambda *_: emptied(None, "all.png: spoilt"))
    views = [emptied(None, "other.png: spoilt")]
    (record,) = train(new_network(), nothing, replace(RECIPE, epochs=1), validation=views)
    assert (record.images, record.unreadable) == (0, 2)
    assert math.isnan(record.loss)
    assert math.isnan(record.error)
    assert math.isnan(record.validation_error)


# ---- Several processes ----

SHARED = """
import itertools, json, sys
from dataclasses import asdict
from pathlib import Path
sys.path[:0] = {tests!r}
import torch
torch.set_num_threads(1)
from test_training import *
from sppnet.classification.batches import Reading
from datetime import timedelta
from lightning_fabric.strategies import DDPStrategy

folder = Path({folder!r})
fabric = Fabric(accelerator="cpu", devices=2, strategy=DDPStrategy(timeout=timedelta(seconds=120)))
fabric.launch()
rank = fabric.global_rank
if rank == 0:
    drawn(folder / "images", 24), drawn(folder / "unseen", 11, first=100)
fabric.barrier()
images = [(folder / "images" / f"{{i}}.png", i % 3) for i in range(24)]
unseen = [(folder / "unseen" / f"{{i}}.png", i % 3) for i in range(100, 111)]
share = Reading(world=2, rank=rank)
results = {{}}

def run(name, source, recipe=RECIPE, dropout=0.0, take=None, **options):
    network = new_network(dropout)
    options = {{"fabric": fabric, "validation": CentralCrops(unseen, 4, 64, share)}} | options
    try:
        records = list(itertools.islice(train(network, source, recipe, **options), take))
        results[name] = [asdict(record) for record in records]
    except TrainingError as error:
        results[name] = str(error)
    save_file(weights(network), folder / f"{{name}}-{{rank}}.safetensors")

source = CropBatches(images, 8, (64, 48), reading=share)
path = folder / "plain.safetensors"
run("left", source, checkpointing=Checkpointing(path), take=2)
run("plain", source, checkpointing=Checkpointing(path))
run("accumulated", CropBatches(images, 4, (64,), reading=share), replace(RECIPE, accumulate=2))
run("dropout", source, dropout=0.5)
run(
    "one rank reads nothing",
    Changed(source, lambda b, _, i: emptied(b, "c", "d", "e", "f") if (rank, i) == (1, 1) else b),
)
run("nothing at all", Changed(source, lambda b, *_: emptied(b, "all")))
noted = Changed(source, lambda b, *_: b._replace(unreadable=[f"only {{rank}}", "both"]))
run("notes", noted, unreadable_limit=3)
run("too many notes", noted, unreadable_limit=2)
results["units"] = scores_of_one_picture(source, fabric=fabric)
path = folder / "stopped.safetensors"
try:
    run("stopped", stopping(source, 1, 2), checkpointing=Checkpointing(path, every=0))
except Stopped:
    run("stopped", source, checkpointing=Checkpointing(path, every=0))
(folder / f"results-{{rank}}.json").write_text(json.dumps(results))
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder and the results, by rank, of runs of two processes."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "shared.py"
    script.write_text(SHARED.format(tests=TESTS, folder=str(folder)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads((folder / f"results-{rank}.json").read_text()) for rank in (0, 1)]
    return folder, results


def curve(records, *names):
    return [[record[name] for name in names or ("loss", "error", "validation_error")] for record in records]


def of_rank(two, name, rank):
    return load_file(two[0] / f"{name}-{rank}.safetensors")


def in_two_folders(folder):
    images = [(folder / "images" / f"{i}.png", i % 3) for i in range(24)]
    unseen = [(folder / "unseen" / f"{i}.png", i % 3) for i in range(100, 111)]
    return images, unseen


def test_two_processes_train_as_one(two):
    folder, (first, second) = two
    images, unseen = in_two_folders(folder)
    views = CentralCrops(unseen, 4, 64)
    for name, size, sizes, accumulate in (("plain", 8, (64, 48), 1), ("accumulated", 4, (64,), 2)):
        recipe = replace(RECIPE, accumulate=accumulate)
        records, expected = trained(CropBatches(images, size, sizes), recipe, dropout=0, validation=views)
        assert curve(first[name]) == curve(second[name])
        for ours, theirs in zip(curve(first[name]), records, strict=True):
            assert ours == pytest.approx([theirs.loss, theirs.error, theirs.validation_error], rel=1e-4)
        assert [r["images"] for r in first[name]] == [24] * 3
        assert same(of_rank(two, name, 0), of_rank(two, name, 1))
        assert_near(of_rank(two, name, 0), expected)
    assert len(first["left"]) == 2


def test_one_process_goes_on_where_two_left(two, tmp_path):
    folder, (first, _) = two
    images, unseen = in_two_folders(folder)
    recipe = replace(RECIPE, epochs=5)
    path = tmp_path / "plain.safetensors"
    path.write_bytes((folder / "plain.safetensors").read_bytes())
    options = {"dropout": 0, "validation": CentralCrops(unseen, 4, 64)}
    source = CropBatches(images, 8, (64, 48))
    records, found = trained(source, recipe, checkpointing=Checkpointing(path), **options)
    expected_records, expected = trained(source, recipe, **options)
    assert len(records) == 5
    assert curve(first["plain"], "loss") == [[r.loss] for r in records[:3]]
    assert [r.loss for r in records] == pytest.approx([r.loss for r in expected_records], rel=1e-4)
    assert_near(found, expected)


def test_two_processes_drop_different_units_and_stay_together(two):
    _, (first, second) = two
    for name in ("dropout", "one rank reads nothing", "nothing at all", "notes", "stopped"):
        assert same(of_rank(two, name, 0), of_rank(two, name, 1)), name
        assert repr(curve(first[name])) == repr(curve(second[name])), name
    assert len(first["units"]) == 6
    assert not {*np.round(first["units"], 3)} & {*np.round(second["units"], 3)}


def test_two_processes_stopped_within_an_epoch_go_on(two):
    _, (first, _) = two
    names = "loss", "error", "validation_error", "images"
    assert np.ravel(curve(first["stopped"], *names)) == pytest.approx(np.ravel(curve(first["plain"], *names)))
    assert_near(of_rank(two, "stopped", 0), of_rank(two, "plain", 0))


def test_what_one_process_cannot_read_does_not_stop_the_other(two):
    _, (first, second) = two
    for results in (first, second):
        assert curve(results["one rank reads nothing"], "images", "unreadable") == [[20, 4]] * 3
        assert curve(results["nothing at all"], "images", "unreadable") == [[0, 1]] * 3


def test_two_processes_count_unreadable_files_together(two):
    _, (first, second) = two
    for results in (first, second):
        assert curve(results["notes"], "unreadable") == [[3]] * 3
        assert [sorted(r["skipped"]) for r in results["notes"]] == [["both", "only 0", "only 1"], [], []]
        assert results["too many notes"].startswith("3 files could not be read, expected at most 2")


# ---- What it costs ----


def test_memory_does_not_grow(images, unseen):
    source, views = CropBatches(images, 8, (64, 48)), CentralCrops(unseen, 4, 64)
    records = train(new_network(0.5), source, Recipe(epochs=99, lr=0.002, milestones=()), validation=views)

    def held():
        gc.collect()
        count = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        return count, tracemalloc.get_traced_memory()[0]

    assert len(list(itertools.islice(records, 6))) == 6
    tracemalloc.start()
    try:
        tensors, traced = held()
        assert len(list(itertools.islice(records, 12))) == 12
        tensors_after, traced_after = held()
    finally:
        tracemalloc.stop()
    assert tensors_after <= tensors
    # The epochs' batches have 24 times as many bytes; Python keeps tuples of the first ones for later.
    assert traced_after - traced < 150_000


@pytest.mark.parametrize("use", ["import sppnet", "from sppnet.cli import main; main()"])
def test_what_does_not_train_does_not_load_the_trainer(use):
    code = f"""
        import sys
        sys.argv = ["sppnet", "--help"]
        try:
            {use}
        except SystemExit as end:
            assert end.code == 0
        print(sorted({{"lightning_fabric", "torch"}} & {{*sys.modules}}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
