import pickle
import random

import cv2
import numpy as np
import pytest
import torch

from sppnet.classification import batches as loading
from sppnet.classification.augment import colour_components
from sppnet.classification.batches import CentralCrops, CropBatches, Reading, sample_components
from sppnet.images import read_image, resize, shorter_side_size, write_image

# Crops of 14 x 14 from images whose shorter side is 14 * 256 / 224 = 16.
SIZE, SIDE = 14, 16
SHAPES = [(16, 24), (24, 16), (16, 16), (40, 60), (33, 16), (20, 22), (16, 30)]
COMPONENTS = np.diag([200.0, 100, 50])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Seventeen images of noise of several sizes, with their number as label."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(17):
        pixels = np.random.default_rng(i).integers(0, 256, (*SHAPES[i % len(SHAPES)], 3), np.uint8)
        write_image(folder / f"{i:02d}.png", pixels)
    return [(folder / f"{i:02d}.png", i) for i in range(17)]


@pytest.fixture
def some_unreadable(images, tmp_path):
    """The same images, but the third is no image and the eighth is missing."""
    (tmp_path / "bad.png").write_bytes(b"no image")
    changed = {2: tmp_path / "bad.png", 7: tmp_path / "gone.png"}
    return [(changed.get(label, path), label) for path, label in images]


def equal(one, other):
    """Return whether two batches are the same to the last bit."""
    return (
        one.images.shape == other.images.shape
        and torch.equal(one.images, other.images)
        and torch.equal(one.labels, other.labels)
        and one.names == other.names
        and one.unreadable == other.unreadable
    )


def all_equal(ones, others):
    ones, others = list(ones), list(others)
    return len(ones) == len(others) and all(map(equal, ones, others))


def labels_of(batches):
    return [batch.labels.tolist() for batch in batches]


def pictures_of(batch):
    """Return the images of a batch as arrays (H, W, 3)."""
    return [image.permute(1, 2, 0).numpy() for image in batch.images]


def crops_of(path, crop, size):
    """Return the ten crops that an image may give: five views, each either way."""
    image = read_image(path)
    height, width = image.shape[:2]
    image = resize(image, *shorter_side_size(height, width, round(crop * 256 / 224)))
    bottom, right = (length - crop for length in image.shape[:2])
    places = [(bottom // 2, right // 2), (0, 0), (0, right), (bottom, 0), (bottom, right)]
    views = [resize(image[y : y + crop, x : x + crop], size, size) for y, x in places]
    return [way for view in views for way in (view, view[:, ::-1])]


class TestCropBatches:
    def test_an_epoch_has_the_same_batches_whenever_it_comes(self, images):
        source = CropBatches(images, 4, (SIZE, 11), components=COMPONENTS, seed=3)
        epochs = [list(source.epoch(number)) for number in range(3)]
        assert all_equal(source.epoch(1), epochs[1])
        assert all_equal(
            CropBatches(images, 4, (SIZE, 11), components=COMPONENTS, seed=3).epoch(2), epochs[2]
        )
        assert [len(epoch) for epoch in epochs] == [len(source)] * 3

    def test_epochs_and_seeds_differ_in_order_and_pixels(self, images):
        source = CropBatches(images, 4, (SIZE,), components=COMPONENTS)
        other = CropBatches(images, 4, (SIZE,), components=COMPONENTS, seed=1)
        epochs = [list(source.epoch(0)), list(source.epoch(1)), list(other.epoch(0))]
        orders = {str(labels_of(epoch)) for epoch in epochs}
        assert len(orders) == 3
        seen = [
            {
                name: picture.tobytes()
                for b in epoch
                for name, picture in zip(b.names, pictures_of(b), strict=True)
            }
            for epoch in epochs
        ]
        for one, two in ((0, 1), (0, 2), (1, 2)):
            assert all(seen[one][name] != seen[two][name] for name in seen[one].keys() & seen[two].keys())

    def test_an_epoch_goes_on_from_any_batch(self, images):
        source = CropBatches(images, 4, (SIZE,), components=COMPONENTS)
        whole = list(source.epoch(5))
        for start in range(len(whole) + 1):
            assert all_equal(source.epoch(5, start=start), whole[start:])

    def test_every_image_comes_at_most_once_with_its_label(self, images):
        source = CropBatches(images, 4, (SIZE,))
        for number in range(4):
            batches = list(source.epoch(number))
            assert [path for b in batches for path in b.names] == [
                images[label][0] for labels in labels_of(batches) for label in labels
            ]
            seen = [label for labels in labels_of(batches) for label in labels]
            assert len(set(seen)) == len(seen)
            assert all(0 < len(labels) <= 4 for labels in labels_of(batches))
            assert len(seen) == 16

    def test_sizes_take_turns(self, images):
        source = CropBatches(images, 4, (SIZE, 11, 7))
        assert [source.side_of(number) for number in range(7)] == [SIZE, 11, 7, SIZE, 11, 7, SIZE]
        for number, side in enumerate((SIZE, 11, 7)):
            for batch in source.epoch(number):
                assert {picture.shape[:2] for picture in pictures_of(batch)} == {(side, side)}

    def test_uniform_sizes_are_in_their_range_and_the_same_on_every_rank(self, images):
        ranks = [
            CropBatches(images, 4, (10, SIZE), uniform=True, seed=2, reading=Reading(world=2, rank=rank))
            for rank in (0, 1)
        ]
        sizes = [ranks[0].side_of(number) for number in range(60)]
        assert set(sizes) == {10, 11, 12, 13, 14}
        assert [ranks[1].side_of(number) for number in range(60)] == sizes
        assert [
            CropBatches(images, 4, (10, SIZE), uniform=True, seed=3).side_of(n) for n in range(60)
        ] != sizes
        for batch in ranks[0].epoch(1):
            assert {picture.shape[:2] for picture in pictures_of(batch)} == {(sizes[1], sizes[1])}

    @pytest.mark.parametrize("world", [2, 4])
    def test_ranks_together_give_the_images_of_one_process(self, images, world):
        whole = CropBatches(images, 4, (SIZE,), components=COMPONENTS)
        ranks = [
            CropBatches(images, 4, (SIZE,), components=COMPONENTS, reading=Reading(world=world, rank=r))
            for r in range(world)
        ]
        assert len({len(source) for source in ranks}) == 1
        epochs = [list(source.epoch(1)) for source in ranks]
        assert [len(epoch) for epoch in epochs] == [len(ranks[0])] * world
        for batch, *shares in zip(whole.epoch(1), *epochs, strict=True):
            assert len(batch.labels) == 4
            for rank, share in enumerate(shares):
                assert torch.equal(share.images, batch.images[rank::world])
                assert share.labels.tolist() == batch.labels[rank::world].tolist()

    def test_unreadable_files_are_named(self, some_unreadable):
        source = CropBatches(some_unreadable, 4, (SIZE,))
        batches = list(source.epoch(0))
        assert len(batches) == len(source)
        lines = sorted(line for batch in batches for line in batch.unreadable)
        assert len(lines) == 2
        assert f"{some_unreadable[2][0]}: found a file that starts with b'no image'" in lines[0]
        assert f"{some_unreadable[7][0]}: found no such file" in lines[1]
        for batch in batches:
            assert len(batch.images) == len(batch.labels) == len(batch.names) > 0
            assert not {2, 7} & set(batch.labels.tolist())
        read = sum(len(batch.labels) for batch in batches)
        assert read == 14
        assert all(len(batch.labels) + len(batch.unreadable) == 4 for batch in batches)

    def test_nothing_is_readable(self, tmp_path):
        source = CropBatches([(tmp_path / f"{i}.png", i) for i in range(5)], 2)
        batches = list(source.epoch(0))
        assert len(batches) == len(source) > 0
        for batch in batches:
            assert len(batch.images) == len(batch.labels) == len(batch.names) == 0
            assert batch.images.dtype == torch.uint8
            assert batch.images.ndim == 4
            assert batch.labels.dtype == torch.int64
            assert 0 < len(batch.unreadable) <= 2
        lines = [line for batch in batches for line in batch.unreadable]
        assert len(set(lines)) == len(lines) == 4

    def test_workers_change_nothing(self, some_unreadable):
        alone, together = (
            CropBatches(some_unreadable, 4, (SIZE, 11), components=COMPONENTS, reading=Reading(workers))
            for workers in (0, 2)
        )
        assert all_equal(together.epoch(1, start=1), alone.epoch(1, start=1))

    def test_examples_go_to_processes_that_do_not_fork(self, images, monkeypatch):
        sent = []
        monkeypatch.setattr(
            loading, "DataLoader", lambda examples, **_: sent.append(pickle.dumps(examples)) or ()
        )
        source = CropBatches(images, 4, (SIZE, 11), components=COMPONENTS)
        assert list(source.epoch(1)) == []
        monkeypatch.undo()
        examples = pickle.loads(sent[0])
        for batch in source.epoch(1):
            for picture, label, path in zip(
                pictures_of(batch), batch.labels.tolist(), batch.names, strict=True
            ):
                pixels, *others = examples[label]
                assert np.array_equal(pixels, picture)
                assert others == [label, path]

    def test_reading_leaves_the_random_state_alone(self, images):
        states = [torch.random.get_rng_state(), random.getstate()]
        list(CropBatches(images, 4, (SIZE,), components=COMPONENTS).epoch(0))
        assert torch.equal(torch.random.get_rng_state(), states[0])
        assert random.getstate() == states[1]

    def test_what_comes_depends_on_no_random_state(self, images):
        source = CropBatches(images, 4, (SIZE,), components=COMPONENTS)
        torch.manual_seed(1)
        first = list(source.epoch(0))
        torch.manual_seed(2)
        assert all_equal(source.epoch(0), first)

    def test_images_are_read_by_the_caller_s_function(self, images):
        source = CropBatches(
            images,
            4,
            (SIZE,),
            reading=Reading(read=lambda path: np.full((SIDE, SIDE, 3), int(path.stem), np.uint8)),
        )
        for batch in source.epoch(0):
            for picture, label in zip(pictures_of(batch), batch.labels.tolist(), strict=True):
                assert (picture == label).all()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"scales": ()}, r"expected scales from 1 up, found \(\)"),
            ({"scales": (14, 0)}, "expected scales from 1 up"),
            ({"batch_size": 18}, "found 17 images, expected at least a batch of 18"),
            (
                {"batch_size": 5, "reading": Reading(world=2)},
                "found batches of 5, expected a multiple of the 2 processes",
            ),
            ({"batch_size": 0}, "found batches of 0"),
        ],
    )
    def test_arguments_that_make_no_batches(self, images, options, message):
        with pytest.raises(ValueError, match=message):
            CropBatches(images, **({"batch_size": 4} | options))

    @pytest.mark.parametrize("size", [SIZE, 11])
    def test_images_are_one_of_ten_crops(self, images, size):
        source = CropBatches(images, 4, (SIZE, size))
        chosen = set()
        for batch in source.epoch(1):
            assert batch.images.dtype == torch.uint8
            assert batch.images.shape == (4, 3, size, size)
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            for picture, path in zip(pictures_of(batch), batch.names, strict=True):
                places = [i for i, c in enumerate(crops_of(path, SIZE, size)) if np.array_equal(c, picture)]
                assert places
                chosen.update(places)
        assert len(chosen) > 5

    def test_colours_change_if_components_are_given(self, images):
        plain, other = (CropBatches(images, 4, (SIZE,), components=c) for c in (None, COMPONENTS))
        changes = []
        for one, two in zip(plain.epoch(0), other.epoch(0), strict=True):
            assert one.names == two.names
            changes += [a.astype(int) - b for a, b in zip(pictures_of(one), pictures_of(two), strict=True)]
        shifts = [tuple(np.median(change, axis=(0, 1))) for change in changes]
        assert len(set(shifts)) == 16


class TestCentralCrops:
    def test_every_image_comes_once_in_order(self, images):
        batches = list(CentralCrops(images, 5, SIZE))
        assert labels_of(batches) == [[*range(5)], [*range(5, 10)], [*range(10, 15)], [15, 16]]
        for batch in batches:
            assert batch.images.shape == (len(batch.labels), 3, SIZE, SIZE)
            for picture, path in zip(pictures_of(batch), batch.names, strict=True):
                assert np.array_equal(picture, crops_of(path, SIZE, SIZE)[0])

    def test_ranks_share_the_images(self, images):
        seen = [
            label
            for rank in range(3)
            for labels in labels_of(CentralCrops(images, 2, SIZE, Reading(world=3, rank=rank)))
            for label in labels
        ]
        assert sorted(seen) == list(range(17))

    def test_unreadable_files_are_named_and_workers_change_nothing(self, some_unreadable):
        batches = list(CentralCrops(some_unreadable, 3, SIZE))
        assert labels_of(batches) == [[0, 1], [3, 4, 5], [6, 8], [9, 10, 11], [12, 13, 14], [15, 16]]
        assert [len(batch.unreadable) for batch in batches] == [1, 0, 1, 0, 0, 0]
        assert all_equal(CentralCrops(some_unreadable, 3, SIZE, Reading(2)), batches)


class TestSampleComponents:
    def test_they_are_those_of_the_readable_images(self, images, some_unreadable):
        readable = [read_image(path) for path, label in images if label not in (2, 7)]
        found = sample_components(some_unreadable)
        expected = colour_components(readable)
        np.testing.assert_allclose(found @ found.T, expected @ expected.T)
        assert np.array_equal(sample_components(some_unreadable), found)

    def test_a_sample_is_taken_of_many(self, images):
        seen = []

        def read(path):
            seen.append(path)
            return read_image(images[0][0])

        sample_components([(i, 0) for i in range(700)], read)
        assert len(set(seen)) == len(seen) == 500
        assert max(seen) > 600

    def test_none_is_readable(self, tmp_path):
        with pytest.raises(ValueError, match=r"could not read any of 2 images, first .*[01].png"):
            sample_components([(tmp_path / f"{i}.png", 0) for i in range(2)])


@pytest.mark.timeout(60)
def test_workers_start_beside_the_threads_of_opencv(some_unreadable):
    """A copy of this process would wait for threads that it does not have."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(2)
    try:
        cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.uint8), (9, 9), 0)
        assert len(list(CropBatches(some_unreadable, 4, (SIZE,), reading=Reading(2)).epoch(0))) == 4
    finally:
        cv2.setNumThreads(threads)
