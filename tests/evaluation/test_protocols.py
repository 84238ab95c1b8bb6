import json
import math

import numpy as np
import pytest
from sklearn.metrics import precision_recall_curve
from sklearn.svm import SVC

import trees
from sppnet.boxes import Target
from sppnet.datasets.image_folder import read_image_folder
from sppnet.datasets.reading import read_dataset
from sppnet.errors import ImageError
from sppnet.evaluation import protocols
from sppnet.evaluation.protocols import (
    SplitResult,
    VocReport,
    VocResult,
    caltech101,
    caltech101_results,
    check_voc,
    cross_validated,
    gram_matrix,
    presence,
    svm_scores,
    voc,
    voc_results,
)
from sppnet.images import read_image


def clusters(classes=4, each=12, noise=1.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    vectors = rng.normal(size=(classes, 20))[labels] + noise * rng.normal(size=(len(labels), 20))
    return vectors.astype(np.float32), labels


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_gram_matrix(dtype, monkeypatch):
    monkeypatch.setattr(protocols, "_BLOCK", 7)
    vectors = np.random.default_rng(0).normal(size=(23, 5)).astype(dtype)
    expected = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    np.testing.assert_allclose(gram_matrix(vectors), expected, atol=1e-4)
    assert gram_matrix(vectors[:0]).shape == (0, 0)


def test_svm_scores_are_those_of_the_vectors():
    vectors, labels = clusters()
    seen, unseen = np.arange(0, 48, 2), np.arange(1, 48, 2)
    signs = np.where(labels[:, None] == np.arange(4), 1, -1)
    signs[2, 0] = 0
    found = svm_scores(gram_matrix(vectors), seen, unseen, signs[seen], [1.0, 2.0, 3.0, 4.0])
    for k, cost in enumerate((1.0, 2.0, 3.0, 4.0)):
        known = seen[signs[seen, k] != 0]
        svm = SVC(kernel="linear", C=cost).fit(vectors[known], signs[known, k])
        np.testing.assert_allclose(found[:, k], svm.decision_function(vectors[unseen]), atol=1e-3)


class TestCaltech101:
    def test_separable_classes_are_all_right(self):
        vectors, labels = clusters(noise=0.05)
        results = list(caltech101_results(gram_matrix(vectors), labels, splits=3, train=6))
        assert [result.accuracy for result in results] == [1.0] * 3
        assert [result.cross_validation for result in results] == [1.0] * 3

    def test_noise_is_near_chance(self):
        vectors, labels = clusters(classes=5, each=40, noise=50)
        results = list(caltech101_results(gram_matrix(vectors), labels, splits=4, train=6))
        assert 0.1 < np.mean([result.accuracy for result in results]) < 0.3
        assert 0.05 < np.mean([result.cross_validation for result in results]) < 0.4

    def test_splits_follow_the_seed(self):
        vectors, labels = clusters(noise=3)
        gram = gram_matrix(vectors)
        once, again, other = (
            list(caltech101_results(gram, labels, splits=3, train=6, seed=s)) for s in (0, 0, 1)
        )
        assert once == again != other
        assert len({result.accuracy for result in once}) > 1

    def test_never_tests_on_what_it_learnt_from(self, monkeypatch):
        uses = []
        plain = protocols.svm_scores

        def spied(gram, train, test, signs, costs):
            uses.append((set(train), set(test)))
            return plain(gram, train, test, signs, costs)

        monkeypatch.setattr(protocols, "svm_scores", spied)
        vectors, labels = clusters(each=12)
        list(caltech101_results(gram_matrix(vectors), labels, splits=1, train=6, test=4))
        assert all(not (train & test) for train, test in uses)
        (seen, unseen), chosen = uses[-1], uses[:-1]
        assert (len(seen), len(unseen)) == (24, 16)
        # The choice of C sees training images alone.
        assert all(train | test <= seen for train, test in chosen)

    @pytest.mark.parametrize("settings", [{"train": 12}, {"train": 2}, {"splits": 0}, {"test": 0}])
    def test_bad_settings(self, settings):
        vectors, labels = clusters()
        with pytest.raises(ValueError, match="expected at least 1 split"):
            list(caltech101_results(gram_matrix(vectors), labels, **{"train": 6, **settings}))

    def test_bad_matrix(self):
        vectors, labels = clusters()
        with pytest.raises(ValueError, match="expected it square"):
            list(caltech101_results(gram_matrix(vectors)[:5], labels, train=6))


class TestVoc:
    def signs(self, labels):
        return np.where(labels[:, None] == np.arange(4), 1, -1)

    def test_precision_is_that_of_scikit_learn(self):
        vectors, labels = clusters(noise=2.5, each=20)
        signs, gram = self.signs(labels), gram_matrix(vectors)
        seen, unseen = np.arange(0, 80, 2), np.arange(1, 80, 2)
        results = voc_results(gram, signs, seen, unseen)
        scores = svm_scores(gram, seen, unseen, signs[seen], [r.C for r in results])
        unseen_signs = signs[unseen]
        for k, result in enumerate(results):
            # Theirs starts at full recall, and has no envelope yet.
            precision, recall, _ = precision_recall_curve(unseen_signs[:, k] == 1, scores[:, k])
            envelope = np.maximum.accumulate(precision)
            assert result.area == pytest.approx(-np.diff(recall) @ envelope[:-1], abs=1e-9)
            eleven = [precision[recall >= tenth / 10 - 1e-12].max() for tenth in range(11)]
            # Full precision at no recall is a point that they add; a curve need not have it.
            eleven[0] = envelope[-2]
            assert result.average_precision == pytest.approx(np.mean(eleven), abs=1e-9)
            assert result.positives == 10

    def test_difficult_images_neither_train_nor_test(self):
        vectors, labels = clusters(noise=1.5, each=20)
        signs, gram = self.signs(labels), gram_matrix(vectors)
        seen, unseen = np.arange(0, 80, 2), np.arange(1, 80, 2)
        signs[[0, 1], 0] = 0
        with_them = voc_results(gram, signs, seen, unseen)[0]
        without = voc_results(gram, signs, seen[1:], unseen[1:])[0]
        assert with_them.positives == without.positives == 9
        scores = [svm_scores(gram, part, unseen, signs[part], [1.0] * 4)[:, 0] for part in (seen, seen[1:])]
        np.testing.assert_allclose(scores[0], scores[1], atol=1e-6)

    def test_choice_between_features_sees_training_images_alone(self):
        vectors, labels = clusters(noise=2, each=20)
        signs, seen = self.signs(labels), np.arange(0, 80, 2)
        good, bad = gram_matrix(vectors), gram_matrix(np.random.default_rng(1).normal(size=vectors.shape))
        assert cross_validated(good, signs, seen) > cross_validated(bad, signs, seen)
        spoilt = good.copy()
        rest = np.setdiff1d(np.arange(80), seen)
        spoilt[rest] = spoilt[:, rest] = 0
        assert cross_validated(spoilt, signs, seen) == cross_validated(good, signs, seen)

    def test_a_class_without_examples(self):
        vectors, labels = clusters()
        with pytest.raises(ValueError, match="found 0 positive training images of class 3"):
            voc_results(gram_matrix(vectors), self.signs(labels), np.arange(30), np.arange(30, 48))

    def test_training_images_are_not_tested(self):
        vectors, labels = clusters()
        with pytest.raises(ValueError, match="found 18 images both"):
            voc_results(gram_matrix(vectors), self.signs(labels), np.arange(48), np.arange(30, 48))

    @pytest.mark.parametrize("seed", range(20))
    def test_every_class_is_in_every_fold(self, seed):
        rng = np.random.default_rng(seed)
        signs = np.full((40, 3), -1)
        for k, count in enumerate((3, 3, 30)):
            signs[rng.permutation(40)[:count], k] = 1
        folds = protocols._balanced_folds(signs, seed)
        shared = (signs == 1).sum(axis=1) > 1
        for k in range(3):
            # Only where images have several classes can a fold go without one.
            found = set(folds[signs[:, k] == 1])
            assert found == {0, 1, 2} or shared[signs[:, k] == 1].any()


class Colours:
    """An embedder by the share of an image's pixels in the colour of each shape, and some noise."""

    def __init__(self, noise=0.0, broken=()):
        self.noise, self.broken, self.seen = noise, broken, []

    @property
    def signature(self):
        return f"colours with noise {self.noise}"

    def vector(self, path):
        pixels = read_image(path).astype(int)
        near = [(abs(pixels - colour).sum(axis=2) < 90).mean() for colour in trees.COLOURS.values()]
        rng = np.random.default_rng(sum(map(ord, f"{path.parent.name}/{path.name}")))
        return (near + self.noise * rng.normal(size=len(near))).astype(np.float32)

    def stream(self, images):
        for path in images:
            self.seen.append(path)
            yield ImageError(f"{path}: broken") if path.name in self.broken else self.vector(path)[None]


class Tracked(list):
    """Notes what is tracked, and how far it came."""

    def __call__(self, items, description):
        for number, item in enumerate(items, 1):
            yield item
            self.append((description, number, len(items)))


@pytest.fixture(scope="module")
def class_folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("classes")
    trees.class_tree(root, 9)
    return read_image_folder(root)


@pytest.fixture(scope="module")
def voc_parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("voc")
    trees.voc_tree(root, {"train": 24, "val": 12})
    return read_dataset(root, "train"), read_dataset(root, "val")


class TestCaltech101OfImages:
    def test_is_the_protocol_on_the_vectors(self, class_folders):
        embedder = Colours(noise=0.3)
        report = caltech101(class_folders, embedder, splits=3, train=6, test=2, seed=5)
        paths, labels = zip(*class_folders, strict=True)
        assert embedder.seen == list(paths)
        vectors = np.stack([embedder.vector(path) for path in paths]).astype(np.float16)
        expected = tuple(
            caltech101_results(gram_matrix(vectors), np.array(labels), splits=3, train=6, test=2, seed=5)
        )
        assert report.splits == expected
        assert len({split.accuracy for split in expected}) > 1
        values = [split.accuracy for split in expected]
        assert report.mean == pytest.approx(np.mean(values))
        assert report.std == pytest.approx(np.std(values, ddof=1))
        assert report.cross_validation == pytest.approx(np.mean([r.cross_validation for r in expected]))
        assert json.loads(json.dumps(report.facts(), allow_nan=False)) == {
            "mean": report.mean,
            "std": report.std,
            "cross_validation": report.cross_validation,
            "splits": [
                {"accuracy": r.accuracy, "C": r.C, "cross_validation": r.cross_validation} for r in expected
            ],
            "embedder": "colours with noise 0.3",
            "images": 27,
            "classes": 3,
        }

    def test_colours_tell_the_shapes(self, class_folders):
        report = caltech101(class_folders, Colours(), splits=1, train=6)
        assert report.splits == (SplitResult(1.0, report.splits[0].C, 1.0),)
        assert report.std is None

    def test_progress(self, class_folders):
        track = Tracked()
        caltech101(class_folders, Colours(), splits=2, train=6, track=track)
        embedding = [("Embedding", number, 27) for number in range(1, 28)]
        assert track == [*embedding, ("Fitting SVMs", 1, 2), ("Fitting SVMs", 2, 2)]

    def test_an_image_that_cannot_be_read_ends_it(self, class_folders):
        with pytest.raises(ImageError, match=r"000004.jpg: broken"):
            caltech101(class_folders, Colours(broken=("000004.jpg",)), splits=1, train=6)

    def test_too_few_images_are_told_before_any_work(self, class_folders):
        embedder = Colours()
        with pytest.raises(ValueError, match="classes of 9 and more, expected"):
            caltech101(class_folders, embedder)
        assert embedder.seen == []


class TestVocOfImages:
    def test_is_the_protocol_at_the_best_scale(self, voc_parts):
        train, test = voc_parts
        embedders = {64: Colours(noise=2), 96: Colours(noise=0.01), 128: Colours(noise=1)}
        report = voc(train, test, embedders, seed=3)
        samples = [*train, *test]
        signs = presence([sample.target for sample in samples], train.classes)
        seen, unseen = np.arange(24), np.arange(24, 36)

        def gram(embedder):
            return gram_matrix(np.stack([embedder.vector(s.path) for s in samples]).astype(np.float16))

        expected = {
            side: cross_validated(gram(embedder), signs, seen, seed=3) for side, embedder in embedders.items()
        }
        assert report.cross_validation == expected
        assert report.scale == max(expected, key=expected.get) == 96
        results = voc_results(gram(embedders[96]), signs, seen, unseen, seed=3)
        assert report.classes == dict(zip(sorted(trees.SHAPES), results, strict=True))
        assert report.mean_ap == pytest.approx(np.mean([r.average_precision for r in results]))
        assert report.mean_ap_area == pytest.approx(np.mean([r.area for r in results]))
        assert report.embedder == "colours with noise 0.01"
        assert report.mean_ap > 0.9

    def test_chosen_classes_and_progress(self, voc_parts):
        track = Tracked()
        report = voc(*voc_parts, {64: Colours()}, classes=["square", "disc"], track=track)
        assert list(report.classes) == ["square", "disc"]
        assert track == [("Embedding at 64", number, 36) for number in range(1, 37)]

    def test_facts(self):
        classes = {"cat": VocResult(0.5, 0.25, 3.0, 4), "dog": VocResult(math.nan, math.nan, 1.0, 0)}
        report = VocReport(classes, 64, {64: 0.75, 96: 0.5}, "an embedder")
        facts = report.facts()
        dog = facts["classes"].pop("dog")
        assert math.isnan(dog["AP"])
        assert math.isnan(dog["AP_area"])
        # A class without test images is not in the mean.
        assert json.loads(json.dumps(facts, allow_nan=False)) == {
            "mAP": 0.5,
            "mAP_area": 0.25,
            "classes": {"cat": {"AP": 0.5, "AP_area": 0.25, "C": 3.0, "positives": 4}},
            "scale": 64,
            "cross_validation": {"64": 0.75, "96": 0.5},
            "embedder": "an embedder",
        }

    def test_bad_input_is_told_before_any_work(self, voc_parts):
        train, test = voc_parts
        embedder = Colours()
        with pytest.raises(ValueError, match="found no embedder"):
            voc(train, test, {})
        with pytest.raises(ValueError, match=r"000001.jpg: found the same file as .*000001.jpg, expected"):
            voc(train, train, {64: embedder})
        with pytest.raises(ValueError, match="found 0 positive training images of class 'zebra'"):
            voc(train, test, {64: embedder}, classes=["disc", "zebra"])
        assert embedder.seen == []

    def test_an_image_that_cannot_be_read_ends_it(self, voc_parts):
        with pytest.raises(ImageError, match=r"000030.jpg: broken"):
            voc(*voc_parts, {64: Colours(broken=("000030.jpg",))})


def test_presence_by_hand():
    boxes = [[0, 0, 9, 9]] * 3
    targets = [
        Target.of(boxes, ["cat", "cat", "dog"], difficult=[True, False, True]),
        Target.of(boxes, ["cat", "bird", "dog"], crowd=[True, False, False]),
        Target.of([], []),
    ]
    assert presence(targets, ["dog", "cat"]).tolist() == [[0, 1], [1, 0], [-1, -1]]


def test_check_voc_names_the_class():
    signs = np.array([[1, -1], [1, 1], [1, -1], [-1, 1], [-1, 1], [-1, -1]])
    check_voc(signs, np.arange(6), np.zeros(0, int))
    with pytest.raises(ValueError, match="found 2 negative training images of class 'cat'"):
        check_voc(signs, np.arange(5), np.array([5]), ["cat", "dog"])
