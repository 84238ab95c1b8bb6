import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from sklearn.base import clone
from sklearn.utils import estimator_checks
from sklearn.utils.validation import check_is_fitted

from processes import without_pytorch
from sppnet.classification.classifier import Classifier, ClassScores
from sppnet.classification.fit import network_settings, recipe_of
from sppnet.classification.imagenet import write_imagenet
from sppnet.classification.training import Recipe
from sppnet.classification.views import probabilities
from sppnet.datasets.image_folder import read_image_folder
from sppnet.errors import NotFittedError, SppnetError
from sppnet.features.backbone import Backbone
from sppnet.images import photo_keys, read_image
from sppnet.models import model_path
from sppnet.progress import StageTimer
from trees import SHAPES, class_tree

CLASSES = tuple(sorted(SHAPES))
GERMAN_SHEPHERD = "n02106662"
TINY = {"network": "zf5", "width": 0.03, "levels": (2, 1), "scales": (64, 48), "epochs": 2, "batch_size": 6}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """One thread for the fits that tests share, too: the same sums in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Class folders in two splits, not to be changed."""
    root = tmp_path_factory.mktemp("data")
    class_tree(root / "train", 4)
    class_tree(root / "val", 2, seed=100)
    return root


@pytest.fixture(scope="module")
def images(data):
    return read_image_folder(data, "train")


@pytest.fixture(scope="module")
def held(data):
    return read_image_folder(data, "val")


@pytest.fixture(scope="module")
def fitted(images):
    """A classifier that is fitted once for all tests, which leave it as it is."""
    return Classifier(**TINY).fit(images)


def same(one, other):
    first, second = one.scorer_, other.scorer_
    return first.backbone.digest == second.backbone.digest and all(
        np.array_equal(a, b)
        for layer, other in zip(first.layers, second.layers, strict=True)
        for a, b in zip(layer, other, strict=True)
    )


def settings_of(settings, backbone_file):
    """Return settings in which a timm network has become the file of a backbone."""
    name = settings.get("network", "")
    return settings | ({"network": backbone_file(name)} if name.startswith("test_") else {})


class TestSettings:
    @pytest.mark.parametrize(
        "check",
        [
            estimator_checks.check_parameters_default_constructible,
            estimator_checks.check_no_attributes_set_in_init,
            estimator_checks.check_get_params_invariance,
            estimator_checks.check_set_params,
            estimator_checks.check_estimator_repr,
            estimator_checks.check_estimator_cloneable,
        ],
        ids=lambda check: check.__name__,
    )
    def test_scikit_learn_takes_it_for_an_estimator(self, check):
        check("Classifier", Classifier())

    def test_a_clone_has_the_settings_and_is_not_fitted(self, fitted):
        copy = clone(fitted)
        assert copy.get_params() == fitted.get_params() == Classifier(**TINY).get_params()
        check_is_fitted(fitted)
        with pytest.raises(NotFittedError, match=r"this Classifier is not fitted yet"):
            copy.predict(np.zeros((70, 80, 3), np.uint8))

    def test_it_shows_what_is_not_the_default(self):
        assert repr(Classifier("zf5", lr=0.1)) == "Classifier(lr=0.1, network='zf5')"

    @pytest.mark.parametrize(
        ("settings", "groups", "expected"),
        [
            ({}, 9, Recipe(8, 0.01, 0.5, (5, 7), frozen=4, label_smoothing=0.1)),
            ({"epochs": 20}, 9, Recipe(20, 0.01, 0.5, (12, 17), frozen=4, label_smoothing=0.1)),
            (
                {"backbone_lr": 0.0, "milestones": (), "frozen": 0, "label_smoothing": 0.0, "lr": 0.1},
                9,
                Recipe(8, 0.1, 0.0, (), frozen=0, label_smoothing=0.0),
            ),
            ({"network": "test_resnet"}, 9, Recipe()),
            (
                {"network": "zf5", "weight_decay": 0.1, "accumulate": 3},
                5,
                Recipe(weight_decay=0.1, accumulate=3),
            ),
        ],
    )
    def test_recipes(self, settings, groups, expected, backbone_file):
        assert recipe_of(Classifier(**settings_of(settings, backbone_file)), groups) == expected

    @pytest.mark.parametrize(
        ("settings", "levels", "norm"),
        [
            ({}, (3, 2, 1), 20.0),
            ({"network": "test_resnet"}, (3, 2, 1), None),
            ({"network": "zf5"}, (6, 3, 2, 1), None),
            ({"network": "zf5", "levels": (), "scales": (224,)}, None, None),
            ({"levels": (1,)}, (1,), 20.0),
        ],
    )
    def test_networks(self, settings, levels, norm, backbone_file):
        found = network_settings(Classifier(**settings_of(settings, backbone_file)), CLASSES)
        assert (found.levels, found.norm, found.size) == (levels, norm, 224)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"levels": ()}, "trains at one size; found several"),
            ({"levels": (), "scales": (64,), "uniform": True}, "trains at one size"),
            ({"network": "test_resnet", "width": 0.5}, "for the paper's networks.*found .*test_resnet"),
            (
                {"network": "test_resnet", "levels": (), "scales": (64,), "width": 1.0},
                "for the paper's networks",
            ),
            ({"network": "zf6", "width": 1.0}, "found no backbone 'zf6', .*; the paper's networks are zf5,"),
            ({"scales": ()}, r"found the scales \(\)"),
            ({"scales": (64, 4)}, "4 x 4, too small"),
            ({"mode": "median"}, "median"),
            ({"epochs": 0}, "expected epochs"),
            ({"frozen": 6}, "found 6 groups to freeze"),
            ({"device": "abacus"}, "device"),
            ({"precision": "8"}, "precision '8'"),
        ],
    )
    def test_settings_that_make_no_classifier_are_told_by_fit(self, images, settings, message, backbone_file):
        with pytest.raises(SppnetError, match=message):
            Classifier(**settings_of({**TINY, **settings}, backbone_file)).fit(images)

    def test_a_backbone_that_is_not_there(self, images, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"gone\.onnx: found no such file, expected a backbone"):
            Classifier(tmp_path / "gone.onnx").fit(images)


class TestFit:
    def test_fit_returns_itself_and_changes_no_setting(self, images, fitted):
        classifier = Classifier(**TINY)
        before = classifier.get_params()
        assert classifier.fit(images) is classifier
        assert classifier.get_params() == before
        learned = vars(classifier).keys() - before.keys()
        assert learned == {"classes_", "titles_", "scorer_", "photos_", "about_"}
        assert classifier.classes_ == CLASSES
        assert same(classifier, fitted)

    def test_a_second_fit_starts_from_the_same_place(self, images, held, fitted):
        classifier = Classifier(**TINY).fit(held)
        assert not same(classifier, fitted)
        assert same(classifier.fit(images), fitted)
        assert classifier.photos_.tolist() == fitted.photos_.tolist()

    def test_a_seed_gives_another(self, images, fitted):
        assert not same(Classifier(**TINY, seed=1).fit(images), fitted)

    def test_epochs_come_one_by_one(self, images, held):
        classifier = Classifier(**TINY)
        records = []
        for record in classifier.fit_epochs(images, held):
            assert not hasattr(classifier, "scorer_")
            records.append(record)
        assert [(r.epoch, r.side, r.images) for r in records] == [(0, 64, 12), (1, 48, 12)]
        right = [int(classifier.predict(path, "one").probabilities.argmax()) == label for path, label in held]
        assert records[-1].validation_error == pytest.approx(1 - np.mean(right))
        assert classifier.about_["record"]["epoch"] == 1
        assert classifier.about_["images"] == 12

    def test_progress_is_counted_in_batches(self, images):
        seen = []

        def track(items, description):
            for item in items:
                yield seen.append((description, len(items))) or item
            seen.append("end")

        Classifier(**TINY).fit(images, track=track)
        assert seen == [("Training", 4)] * 4 + ["end"]

    def test_it_goes_on_from_its_checkpoint(self, images, fitted, tmp_path):
        path = tmp_path / "fit.checkpoint"
        first = Classifier(**TINY).fit_epochs(images, checkpoint=path)
        assert next(first).epoch == 0
        del first
        seen = []
        again = Classifier(**TINY).fit(
            images, checkpoint=path, track=lambda items, _: seen.append(items) or items
        )
        assert same(again, fitted)
        assert [list(items) for items in seen] == [[2, 3]]

    def test_a_checkpoint_is_bound_to_its_images_and_settings(self, data, images, held, tmp_path):
        path = tmp_path / "fit.checkpoint"
        Classifier(**{**TINY, "epochs": 1}).fit(images, held, checkpoint=path)

        def refused(*data, **settings):
            with pytest.raises(SppnetError) as caught:
                Classifier(**{**TINY, "epochs": 1} | settings).fit(*data, checkpoint=path)
            assert str(caught.value).startswith(f"{path}: found the checkpoint of ")
            assert str(caught.value).endswith("; remove it to start anew")
            return str(caught.value)

        assert "another run (lr 0.01), expected lr 0.1" in refused(images, held, lr=0.1)
        assert "a run on images, validation images, expected images;" in refused(images)
        assert "on other images, now with 11 images instead of 12" in refused(images[:11], held)
        assert "on other validation images, now with 5 images instead of 6" in refused(images, held[1:])
        shutil.copytree(data, tmp_path / "data")
        photo = sorted((tmp_path / "data" / "train").rglob("*.jpg"))[0]
        copy = read_image_folder(tmp_path / "data", "train")
        # The same images in another place are the same images; other bytes, names and labels are not.
        Classifier(**{**TINY, "epochs": 1}).fit(copy, held, checkpoint=path)
        Image.new("RGB", (80, 90)).save(photo)
        changed = read_image_folder(tmp_path / "data", "train")
        assert "on other images, now with other sizes of image files" in refused(changed, held)
        photo.rename(photo.with_name("other.jpg"))
        renamed = read_image_folder(tmp_path / "data", "train")
        assert "on other images, now with other names of images" in refused(renamed, held)
        # Where a process runs, and how many read for it, makes no difference.
        Classifier(**{**TINY, "epochs": 1}, workers=0).fit(images, held, checkpoint=path)

    @pytest.mark.parametrize("wrong", ["flowers", None, [("a.jpg", 0)], np.zeros((3, 4))])
    def test_something_else_than_labelled_images(self, images, wrong, data):
        with pytest.raises(SppnetError, match="expected labelled images"):
            Classifier(**TINY).fit(wrong)
        if wrong is not None:
            with pytest.raises(SppnetError, match="expected labelled images"):
                Classifier(**TINY).fit(images, wrong)
        with pytest.raises(SppnetError, match=r"found the path '.*', expected .*: read_image_folder\('.*'\)"):
            Classifier(**TINY).fit(data)

    def test_a_validation_of_unknown_classes(self, images, tmp_path):
        class_tree(tmp_path / "otter", 1)
        (tmp_path / "otter" / CLASSES[0]).rename(tmp_path / "otter" / "otter")
        with pytest.raises(SppnetError, match="otter"):
            Classifier(**TINY).fit(images, read_image_folder(tmp_path / "otter"))


class TestPredict:
    def test_probabilities_are_those_of_the_views(self, fitted, held):
        path, _ = held[0]
        for views in (None, "full", "one", "maps10"):
            scores = fitted.predict(path, views)
            expected = probabilities(fitted.scorer_, read_image(path), views or "full")
            assert np.array_equal(scores.probabilities, expected)
            assert scores.classes == scores.titles == CLASSES

    def test_any_image_will_do(self, fitted, held):
        path, _ = held[0]
        expected = fitted.predict(path).probabilities
        for image in (str(path), Image.open(path), read_image(path)):
            assert np.array_equal(fitted.predict(image).probabilities, expected)

    def test_the_best_classes_come_first(self):
        scores = ClassScores(np.array([0.2, 0.5, 0.3], np.float32), ("a", "b", "c"), ("A", "B", "C"))
        assert [row[:2] for row in scores.top(2)] == [("b", "B"), ("c", "C")]
        assert [round(row.probability, 6) for row in scores.top()] == [0.5, 0.3, 0.2]
        equal = ClassScores(np.full(3, 1 / 3, np.float32), ("a", "b", "c"), ("A", "B", "C"))
        assert [row.name for row in equal.top()] == ["a", "b", "c"]

    def test_many_images_come_in_their_order_with_their_errors(self, fitted, held, tmp_path):
        (tmp_path / "bad.jpg").write_bytes(b"no picture")
        paths = [held[0][0], tmp_path / "bad.jpg", tmp_path / "gone.jpg", held[1][0]]
        strip = np.zeros((1, 90_000, 3), np.uint8)
        results = list(fitted.stream([*paths, strip]))
        for place in (0, 3):
            assert np.array_equal(results[place].probabilities, fitted.predict(paths[place]).probabilities)
        assert str(paths[1]) in str(results[1])
        assert isinstance(results[2], FileNotFoundError)
        assert "cut it into parts" in str(results[4])

    def test_views_that_there_are_not(self, fitted, held):
        with pytest.raises(SppnetError, match="found the views 'eleven', expected one of one, ten"):
            fitted.predict(held[0][0], "eleven")

    def test_bad_input(self, fitted):
        with pytest.raises(FileNotFoundError, match=r"missing\.jpg: found no such file"):
            fitted.predict("missing.jpg")
        with pytest.raises(SppnetError, match="found list, expected one image"):
            fitted.predict(["a.jpg"])
        with pytest.raises(SppnetError, match=r"found the path 'a\.jpg', expected a list of images"):
            fitted.stream("a.jpg")

    @pytest.mark.parametrize(
        "use",
        [
            lambda c, images: c.predict(images[0][0]),
            lambda c, images: c.stream([images[0][0]]),
            lambda c, images: c.evaluate(images),
            lambda c, images: c.seen(images),
            lambda c, images: c.save("never.safetensors"),
        ],
    )
    def test_unfitted(self, images, use):
        with pytest.raises(NotFittedError, match=r"call fit, or Classifier.load a file"):
            use(Classifier(), images)


class TestEvaluate:
    def test_it_counts_what_is_right(self, fitted, held):
        timer, seen = StageTimer(), []
        report = fitted.evaluate(held, timer=timer, track=lambda items, what: seen.append(what) or items)
        right = dict.fromkeys(CLASSES, 0)
        for path, label in held:
            right[CLASSES[label]] += int(fitted.predict(path).probabilities.argmax()) == label
        assert dict(zip(report.classes, report.right.tolist(), strict=True)) == right
        assert report.images.tolist() == [2, 2, 2]
        assert (report.seen, report.unreadable) == (0, ())
        assert list(timer.seconds) == ["classify"]
        assert seen == ["Classifying"]

    def test_it_knows_the_photos_of_its_fit(self, fitted, images, held, tmp_path):
        assert sorted(fitted.photos_.tolist()) == sorted(photo_keys(path for path, _ in images).tolist())
        assert fitted.evaluate(images).seen == len(images) == 12
        (tmp_path / CLASSES[0]).mkdir()
        shutil.copy(images[0][0], tmp_path / CLASSES[0] / "another name.jpg")
        shutil.copy(held[0][0], tmp_path / CLASSES[0] / "new.jpg")
        report = fitted.evaluate(read_image_folder(tmp_path))
        assert (report.seen, int(report.images.sum())) == (1, 2)
        assert report.facts()["seen"] == 1

    def test_unreadable_images_are_named_and_left_out(self, fitted, held, tmp_path):
        shutil.copytree(held.root / "val", tmp_path / "val")
        bad = sorted((tmp_path / "val" / CLASSES[0]).iterdir())[0]
        bad.write_bytes(b"no picture")
        images = read_image_folder(tmp_path, "val")
        report = fitted.evaluate(images)
        assert report.images.tolist() == [1, 2, 2]
        assert len(report.unreadable) == 1
        assert str(bad) in report.unreadable[0]
        with pytest.raises(SppnetError, match="could not read any of 1 images, first: "):
            fitted.evaluate(images[:1])

    def test_labels_are_told_by_the_names_of_classes(self, fitted, held):
        turned = held.relabelled(CLASSES[::-1])
        assert fitted.evaluate(turned).confusion.tolist() == fitted.evaluate(held).confusion.tolist()

    def test_bad_input(self, fitted, data):
        with pytest.raises(SppnetError, match="read_image_folder"):
            fitted.evaluate(data)


class TestFile:
    def test_round_trip(self, fitted, held, tmp_path):
        path = tmp_path / "shapes.safetensors"
        fitted.save(path)
        loaded = Classifier.load(path)
        assert loaded.get_params() == fitted.get_params()
        assert same(loaded, fitted)
        assert (loaded.classes_, loaded.titles_) == (fitted.classes_, fitted.titles_)
        assert loaded.scorer_.settings == fitted.scorer_.settings
        assert loaded.photos_.tolist() == fitted.photos_.tolist()
        assert np.array_equal(
            loaded.predict(held[0][0]).probabilities, fitted.predict(held[0][0]).probabilities
        )
        loaded.save(tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
        assert load_file(path)["photos"].dtype == np.uint64

    def test_the_classifier_of_imagenet(self, shepherd):
        classifier = Classifier.load("imagenet")
        assert len(classifier.classes_) == 1000
        assert classifier.titles_[classifier.classes_.index("n02124075")] == "Egyptian cat"
        assert (classifier.levels, classifier.mode) == ((1,), "average")
        assert classifier.scorer_.backbone is Backbone.shared("efficientnet-lite0", ("head",), 32)
        best = classifier.predict(shepherd).top(1)[0]
        assert best.name == GERMAN_SHEPHERD
        assert best.probability > 0.5

    def test_the_classifier_of_imagenet_is_what_the_package_makes(self, tmp_path):
        write_imagenet(tmp_path / "made.safetensors")
        assert (tmp_path / "made.safetensors").read_bytes() == model_path("imagenet").read_bytes()

    def test_a_classifier_runs_without_pytorch(self, fitted, held, tmp_path):
        fitted.save(tmp_path / "shapes.safetensors")
        code = """
from sppnet import Classifier, read_image_folder
for name in ("imagenet", sys.argv[1]):
    classifier = Classifier.load(name)
    for views in ("full", "maps10"):
        print(classifier.predict(sys.argv[2], views).top(1)[0].name)
print(classifier.evaluate(read_image_folder(sys.argv[3], "val")).right.tolist())
try:
    classifier.fit(read_image_folder(sys.argv[3], "val"))
except ValueError as error:
    print(error)
"""
        path, _ = held[0]
        found = without_pytorch(code, tmp_path / "shapes.safetensors", path, held.root).splitlines()
        names = [
            classifier.predict(path, views).top(1)[0].name
            for classifier in (Classifier.load("imagenet"), fitted)
            for views in ("full", "maps10")
        ]
        right = str(fitted.evaluate(held).right.tolist())
        assert found == [*names, right, 'training a network needs PyTorch: pip install "sppnet[torch]"']

    def test_names_that_no_model_has(self, tmp_path):
        with pytest.raises(SppnetError, match=r"'imagnet', expected .* imagenet; did you mean imagenet\?"):
            Classifier.load("imagnet")
        with pytest.raises(FileNotFoundError, match=r"gone\.safetensors: found no such file"):
            Classifier.load(tmp_path / "gone.safetensors")
        with pytest.raises(SppnetError, match=r"found sppnet-detector \d+, expected sppnet-network 3"):
            Classifier.load("animals")
        with pytest.raises(SppnetError, match="device 'abacus'"):
            Classifier.load("imagenet", device="abacus")


def test_the_default_classifier_learns_on_a_pretrained_backbone(images, held):
    classifier = Classifier(scales=(64,), epochs=2, batch_size=6)
    records = list(classifier.fit_epochs(images, held))
    assert [record.lr for record in records] == pytest.approx([0.01, 0.001])
    assert all(math.isfinite(record.loss) for record in records)
    assert classifier.scorer_.settings.norm == 20
    before, after = Backbone.shared("efficientnet-lite0", ("head",), 32), classifier.scorer_.backbone
    changed = [n for n, v in before.parameters.items() if not np.array_equal(v, after.parameters[n])]
    assert changed
    assert not any("conv_stem" in name or "running" in name for name in changed)
    assert classifier.evaluate(images).top1 >= 0.75
