import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from sklearn.base import clone
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from sklearn.utils import estimator_checks as checks

import trees
from sppnet.arrays import to_numpy
from sppnet.errors import NotFittedError, SppnetError
from sppnet.images import read_image, resize
from sppnet.retrieval.embedder import Embedder
from sppnet.storage import write_tensors

SMALL = {"scales": (64,), "levels": (2, 1)}
CHECKS = (
    checks.check_parameters_default_constructible,
    checks.check_no_attributes_set_in_init,
    checks.check_get_params_invariance,
    checks.check_set_params,
    checks.check_estimator_repr,
    checks.check_estimator_cloneable,
)


@pytest.fixture(scope="module")
def embed():
    return Embedder(**SMALL)


@pytest.fixture(scope="module")
def scenes():
    return [trees.scene(n).image for n in range(1, 7)]


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def rooted(vectors):
    return unit(np.sign(vectors) * np.sqrt(np.abs(vectors)))


def pyramid(stage, levels):
    """The maximum of each bin of a map, one by one."""
    maps, vector = to_numpy(stage), []
    height, width = maps.shape[1:]
    for n in levels:
        rows, columns = (
            [slice(math.floor(i * side / n), math.ceil((i + 1) * side / n)) for i in range(n)]
            for side in (height, width)
        )
        vector.append(np.array([[maps[:, y, x].max(axis=(1, 2)) for x in columns] for y in rows]))
    return np.concatenate([level.transpose(2, 0, 1).ravel() for level in vector])


class TestVectors:
    def test_of_an_image_is_the_pyramid_over_its_map(self, embed, scenes):
        (stage,) = embed.network(scenes[0], 64).stages
        found = embed(scenes[0])
        assert found.shape == (embed.length,) == (1280 * 5,)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, rooted(pyramid(stage, (2, 1))), atol=1e-6)

    def test_of_the_whole_as_a_box_is_that_of_the_image(self, embed, scenes):
        height, width = scenes[0].shape[:2]
        assert np.array_equal(embed(scenes[0], [[0, 0, width, height]])[0], embed(scenes[0]))

    def test_of_boxes_come_from_one_pass(self, embed, scenes, monkeypatch):
        calls, plain = [], type(embed.network).__call__
        monkeypatch.setattr(
            type(embed.network), "__call__", lambda self, *given: calls.append(1) or plain(self, *given)
        )
        boxes = np.array([[0, 0, 64, 96], [64, 0, 128, 96], [10.5, 3, 90, 80]])
        together = embed(scenes[1], boxes)
        assert len(calls) == 1
        for box, vector in zip(boxes, together, strict=True):
            assert np.array_equal(embed(scenes[1], [box])[0], vector)
        encoded = embed.encode(scenes[1])
        assert len(calls) == 1 + len(boxes) + 1
        assert np.array_equal(embed(encoded, boxes), together)
        assert np.array_equal(embed(encoded), embed(scenes[1]))
        assert len(calls) == 1 + len(boxes) + 2

    def test_without_power_and_norm_are_the_pooled_numbers(self, scenes):
        plain = Embedder(scales=(64,), levels=(1,), power=1, norm="none", mode="average")
        (stage,) = plain.network(scenes[0], 64).stages
        np.testing.assert_allclose(plain(scenes[0]), to_numpy(stage).mean(axis=(1, 2)), atol=1e-5)

    def test_of_several_stages_weigh_the_same(self, scenes):
        both = Embedder(scales=(64,), levels=(1,), stages=("4", "head"))
        vector = both(scenes[0])
        lengths = [np.linalg.norm(part) for part in np.split(vector, [both.network.channels[0]])]
        np.testing.assert_allclose(lengths, 0.5**0.5, atol=1e-5)

    def test_the_scale_of_a_box_is_the_one_nearest_to_208_pixels(self, scenes):
        # The released code's rule: sides of 63 pixels in an image of 96 are 208 at a shorter side of 317.
        several, boxes = Embedder(scales=(310, 330)), np.array([[0, 0, 63, 63], [0, 0, 61, 61]], np.float32)
        assert several.pooling.choose(several.encode(scenes[0]), boxes).tolist() == [0, 1]

    def test_each_box_is_pooled_at_its_scale(self, scenes):
        several = Embedder(scales=(128, 448), levels=(1,))
        large, small = [0, 0, 128, 96], [10, 10, 40, 40]
        found = several(scenes[0], [large, small])
        for side, box, vector in ((128, large, found[0]), (448, small, found[1])):
            alone = Embedder(scales=(side,), levels=(1,))(scenes[0], [box])[0]
            np.testing.assert_allclose(vector, alone, atol=1e-6)

    @pytest.mark.parametrize("view", ["crop", "warp"])
    @pytest.mark.parametrize("side", [64, 160])  # smaller and larger than the image
    def test_of_other_views(self, view, side, scenes):
        image = scenes[0]
        seen = image[:, 16:112] if view == "crop" else resize(image, side, side)
        found = Embedder(scales=(side,), levels=(2, 1), view=view)(image)
        np.testing.assert_allclose(found, Embedder(scales=(side,), levels=(2, 1))(seen), atol=1e-6)

    def test_of_maps_that_are_tensors_are_arrays(self, scenes):
        torch = pytest.importorskip("torch", reason="needs the extra sppnet[torch]")
        embed = Embedder(scales=(64, 96), levels=(2, 1), stages=("4", "head"), flip=True, join_scales=True)

        def as_tensors(encoded):
            scales = (
                replace(maps, stages=tuple(torch.from_numpy(stage) for stage in maps.stages))
                for maps in encoded.scales
            )
            return replace(encoded, scales=tuple(scales))

        encoded, boxes = embed.encode(scenes[0]), [[0, 0, 64, 96], [10.5, 3, 90, 80]]
        tensors = replace(as_tensors(encoded), flipped=as_tensors(encoded.flipped))
        found = embed(tensors, boxes)
        assert isinstance(found, np.ndarray)
        np.testing.assert_allclose(found, embed(encoded, boxes), atol=1e-6)

    def test_no_boxes(self, embed, scenes):
        assert embed(scenes[0], np.zeros((0, 4))).shape == (0, embed.length)

    @pytest.mark.parametrize("shape", [(1, 1), (1, 300), (33, 2)])
    def test_of_tiny_images(self, embed, shape):
        vector = embed(np.full((*shape, 3), 90, np.uint8))
        assert np.isfinite(vector).all()
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


class TestJoinedScales:
    """The slow way: an embedder for each scale, the vectors side by side."""

    SIDES = (64, 96, 160)

    def joined(self, **settings):
        return Embedder(**{**SMALL, "scales": self.SIDES, **settings}, join_scales=True)

    def apart(self, image, boxes=None, **settings):
        each = [Embedder(**{**SMALL, **settings, "scales": (side,)})(image, boxes) for side in self.SIDES]
        return np.concatenate(each, axis=-1)

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"flip": True},
            {"view": "crop"},
            {"levels": (3, 1), "mode": "average"},
            {"norm": "none", "power": 1},
            {"norm": "none", "flip": True},
        ],
    )
    def test_are_the_vectors_of_each_side_by_side(self, settings, scenes):
        found, expected = self.joined(**settings)(scenes[0]), self.apart(scenes[0], **settings)
        if settings.get("norm") != "none":
            expected /= np.linalg.norm(expected)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert len(found) == self.joined(**settings).length

    def test_of_boxes_of_any_size(self, scenes):
        boxes = [[0, 0, 128, 96], [10, 10, 40, 40], [60.5, 3, 61.5, 80]]
        found = self.joined(flip=True)(scenes[1], boxes)
        np.testing.assert_allclose(
            found, self.apart(scenes[1], boxes, flip=True) / np.sqrt(len(self.SIDES)), atol=1e-6
        )
        assert self.joined()(scenes[1], np.zeros((0, 4))).shape == (0, self.joined().length)

    def test_of_several_stages(self, scenes):
        settings = {"stages": ("4", "head"), "levels": (2, 1)}
        found = self.joined(**settings)
        parts = [
            Embedder(**{**SMALL, **settings, "stages": (stage,), "scales": (side,)})(scenes[0])
            for side in self.SIDES
            for stage in settings["stages"]
        ]
        np.testing.assert_allclose(found(scenes[0]), np.concatenate(parts) / np.sqrt(6), atol=1e-6)

    def test_of_one_are_no_others(self, embed, scenes):
        np.testing.assert_array_equal(self.joined(scales=SMALL["scales"])(scenes[0]), embed(scenes[0]))

    def test_choice_is_named_in_files(self, embed, tmp_path):
        embed.save(tmp_path / "e.safetensors")
        with safe_open(tmp_path / "e.safetensors", "pt") as file:
            about = json.loads(file.metadata()["embedder"])
        assert about["settings"]["join_scales"] is False
        assert '"join_scales": false' in about["signature"]
        assert not Embedder.load(tmp_path / "e.safetensors").join_scales

    def test_are_projected_saved_and_part_of_the_signature(self, scenes, tmp_path):
        found = self.joined(pca=3).fit(scenes)
        assert found.kind != Embedder(**{**SMALL, "scales": self.SIDES}, pca=3).kind
        found.save(tmp_path / "e.safetensors")
        loaded = Embedder.load(tmp_path / "e.safetensors")
        assert loaded.join_scales
        np.testing.assert_allclose(loaded(scenes[4]), found(scenes[4]), atol=1e-5)


class TestFlip:
    """The slow way: pool image and mirror image, put the bins of that back in their places, take the mean."""

    def flipped(self, **settings):
        return Embedder(**{**SMALL, **settings}, flip=True)

    def mirrored(self, vector, channels, levels):
        """Put each number of a vector where the bin of the mirrored column has it, one by one."""
        found, start = np.full_like(vector, np.nan), 0
        for count in channels:
            for n in levels:
                for channel, row, column in np.ndindex(count, n, n):
                    place = start + (channel * n + row) * n
                    found[place + n - 1 - column] = vector[place + column]
                start += count * n * n
        return found

    def mean(self, image, box=None, mirrored=None, **settings):
        plain = Embedder(**{**SMALL, "power": 1, "norm": "none", **settings})
        one, other = plain(image, box and [box]), plain(image[:, ::-1], mirrored and [mirrored])
        other = self.mirrored(other.ravel(), plain.network.channels, plain.levels)
        return (one.ravel() + other) / 2

    def test_is_the_mean_of_image_and_mirror_image(self, scenes):
        for image in scenes[:3]:
            found = self.flipped(mode="average", power=1, norm="none")(image)
            np.testing.assert_allclose(found, self.mean(image, mode="average"), atol=1e-6)
            np.testing.assert_allclose(self.flipped()(image), rooted(self.mean(image)), atol=1e-6)

    def test_of_several_stages(self, scenes):
        settings = {"stages": ("4", "head"), "levels": (3, 1), "power": 1, "norm": "none"}
        np.testing.assert_allclose(
            self.flipped(**settings)(scenes[0]), self.mean(scenes[0], **settings), atol=1e-5
        )

    def test_mirrors_boxes(self, scenes):
        boxes = [[0, 0, 64, 96], [64, 0, 128, 96], [10.5, 3, 90, 80]]
        mirrored = [[64, 0, 128, 96], [0, 0, 64, 96], [38, 3, 117.5, 80]]
        for box, other, vector in zip(boxes, mirrored, self.flipped()(scenes[1], boxes), strict=True):
            np.testing.assert_allclose(vector, rooted(self.mean(scenes[1], box, other)), atol=1e-6)

    def test_no_boxes(self, scenes):
        found = self.flipped()
        assert found(scenes[0], np.zeros((0, 4))).shape == (0, found.length)

    def test_each_box_takes_its_scale_in_both(self, scenes):
        boxes = np.array([[0, 0, 128, 96], [10, 10, 40, 40]])
        found = self.flipped(scales=(128, 448))(scenes[0], boxes)
        for side, box, vector in zip((128, 448), boxes, found, strict=True):
            np.testing.assert_allclose(vector, self.flipped(scales=(side,))(scenes[0], [box])[0], atol=1e-6)

    @pytest.mark.parametrize("view", ["full", "crop", "warp"])
    def test_changes_nothing_for_a_symmetric_image(self, view, scenes):
        symmetric = np.concatenate([scenes[0], scenes[0][:, ::-1]], axis=1)
        settings = {"view": view, "levels": (1,)}
        plain, found = Embedder(**{**SMALL, **settings}), self.flipped(**settings)
        np.testing.assert_allclose(found(symmetric), plain(symmetric), atol=1e-5)
        assert not np.allclose(found(scenes[0]), plain(scenes[0]), atol=1e-3)

    def test_mirrors_the_bins_with_the_image(self, scenes):
        found = self.flipped(levels=(3, 2, 1))
        expected = self.mirrored(found(scenes[1]), found.network.channels, found.levels)
        np.testing.assert_allclose(found(scenes[1][:, ::-1]), expected, atol=1e-6)
        assert not np.allclose(found(scenes[1]), expected, atol=1e-3)

    def test_is_saved_and_part_of_the_signature(self, scenes, tmp_path):
        found = self.flipped(pca=3).fit(scenes)
        assert found.kind != Embedder(**SMALL, pca=3).kind
        found.save(tmp_path / "e.safetensors")
        loaded = Embedder.load(tmp_path / "e.safetensors")
        assert loaded.flip
        np.testing.assert_allclose(loaded(scenes[4]), found(scenes[4]), atol=1e-5)

    def test_needs_the_maps_of_both(self, embed, scenes):
        encoded, found = embed.encode(scenes[0]), self.flipped()
        with pytest.raises(SppnetError, match="found maps at 1 scales, expected 1 and the flipped image"):
            found(encoded)
        with pytest.raises(SppnetError, match="found maps at 1 scales and the flipped image, expected 1:"):
            embed(found.encode(scenes[0]))

    def test_needs_the_maps_of_its_scales_and_stages(self, embed, scenes):
        other = Embedder(**{**SMALL, "scales": (64, 96)})
        with pytest.raises(SppnetError, match="found maps at 2 scales, expected 1:"):
            embed(other.encode(scenes[0]))
        other = Embedder(**SMALL, stages=("4",))
        with pytest.raises(SppnetError, match=r"found maps of \(112,\) channels, expected \(1280,\)"):
            embed(other.encode(scenes[0]))


class TestBadInput:
    @pytest.mark.parametrize(
        ("boxes", "says"),
        [
            ([[0, 0, 10, 10], [5, 5, 5, 9]], "the box 1"),
            ([[20, 5, 10, 9]], "the box 0"),
            ([[200, 200, 220, 220]], "inside the image of 128 x 96"),
            ([[0, 0, np.nan, 9]], "nan"),
            ([[0, 0, 5]], "expected (R, 4)"),
        ],
    )
    def test_boxes(self, boxes, says, embed, scenes):
        with pytest.raises(ValueError, match=says.replace("(", r"\(").replace(")", r"\)")):
            embed(scenes[0], boxes)

    def test_boxes_of_a_crop(self, scenes):
        with pytest.raises(ValueError, match="expected the view 'full'"):
            Embedder(**SMALL, view="crop")(scenes[0], [[0, 0, 9, 9]])

    @pytest.mark.parametrize(
        "settings",
        [
            {"view": "half"},
            {"norm": "l1"},
            {"power": 0},
            {"scales": ()},
            {"levels": (0,)},
            {"mode": "sum"},
            {"pca": 0},
        ],
    )
    def test_settings(self, settings, scenes):
        with pytest.raises(ValueError, match=r"expected|must be"):
            Embedder(**{**SMALL, **settings}).fit(scenes)


class TestEstimator:
    def test_is_cloned(self):
        one = Embedder(**SMALL, mode="average")
        assert clone(one).get_params() == one.get_params()
        assert repr(one) == "Embedder(levels=(2, 1), mode='average', scales=(64,))"
        with pytest.raises(SppnetError, match="found the setting 'sides' of Embedder, expected one of"):
            one.set_params(sides=(64,))

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_passes_the_checks_of_scikit_learn(self, check):
        check("Embedder", Embedder(**SMALL))

    def test_a_second_fit_gives_the_same(self, scenes):
        one = Embedder(**SMALL, pca=3)
        assert one.fit(scenes) is one
        before, settings = one.transform(scenes), one.get_params()
        one.fit(scenes[:4]).fit(scenes)
        # BLAS rounds by where the numbers lie in memory.
        np.testing.assert_allclose(one.transform(scenes), before, atol=1e-5)
        assert one.get_params() == settings

    def test_fits_and_transforms_at_once(self, scenes):
        found = Embedder(**SMALL, pca=3).fit_transform(iter(scenes))
        np.testing.assert_allclose(found, Embedder(**SMALL, pca=3).fit(scenes).transform(scenes), atol=1e-5)

    def test_transforms_as_it_embeds(self, embed, scenes, tmp_path):
        trees.save(tmp_path / "a.png", scenes[0])
        found = embed.fit(scenes).transform([tmp_path / "a.png", *scenes[1:3]])
        for image, vector in zip(scenes, found, strict=False):
            assert np.array_equal(vector, embed(image))
        assert embed.transform([]).shape == (0, embed.length)

    def test_works_in_a_pipeline_under_cross_validation(self):
        images = [trees.scene(n).image for n in range(0, 48, 2)]
        labels = [trees.scene(n).labels[0] for n in range(0, 48, 2)]
        model = make_pipeline(Embedder(**SMALL), LinearSVC())
        assert cross_val_score(model, images, labels, cv=2).mean() > 0.6

    def test_names_the_first_unreadable_image(self, embed, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"missing\.jpg"):
            embed.transform([tmp_path / "missing.jpg"])

    def test_streams_on_after_an_error(self, embed, scenes, tmp_path):
        given = [scenes[0], tmp_path / "missing.jpg", scenes[1]]
        found = list(embed.stream(given, [None, None, [[0, 0, 5, 5], [3, 3, 60, 60]]]))
        assert np.array_equal(found[0][0], embed(scenes[0]))
        assert isinstance(found[1], FileNotFoundError)
        assert found[2].shape == (2, embed.length)

    def test_errors_of_boxes_name_the_file(self, embed, scenes, tmp_path):
        trees.save(tmp_path / "a.png", scenes[0])
        (error,) = embed.stream([tmp_path / "a.png"], [[[4, 4, 4, 4]]])
        assert str(error).startswith(str(tmp_path / "a.png"))


class TestProjection:
    def test_keeps_inner_products_as_well_as_it_can(self, embed, scenes):
        full = embed.transform(scenes)
        few = Embedder(**SMALL, pca=5).fit(scenes)
        assert few.length == 5
        found = few.transform(scenes)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
        # Five components hold all there is of six centred vectors.
        centred = unit(full - full.mean(axis=0))
        np.testing.assert_allclose(found @ found.T, centred @ centred.T, atol=1e-3)

    def test_must_be_learnt(self, scenes):
        with pytest.raises(NotFittedError, match="this Embedder is not fitted yet"):
            Embedder(**SMALL, pca=5)(scenes[0])

    def test_needs_as_many_images_as_components(self, scenes):
        with pytest.raises(ValueError, match="found 6 vectors to learn 7"):
            Embedder(**SMALL, pca=7).fit(scenes)


class TestFile:
    def test_gives_the_same_vectors(self, scenes, tmp_path):
        few = Embedder(**SMALL, mode="average", pca=3).fit(scenes)
        few.save(tmp_path / "e.safetensors")
        loaded = Embedder.load(tmp_path / "e.safetensors")
        assert loaded.signature == few.signature
        # BLAS rounds by where the numbers lie in memory.
        np.testing.assert_allclose(loaded(scenes[4]), few(scenes[4]), atol=1e-5)

    def test_follows_a_backbone_file_that_moved(self, backbone_file, scenes, tmp_path):
        first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
        shutil.copy(backbone_file("test_efficientnet"), first)
        made, file = Embedder(first, **SMALL, output_stride=32), tmp_path / "e.safetensors"
        made.save(file)
        expected = made(scenes[0])
        assert Embedder.load(file).backbone == str(first)
        first.rename(second)
        says = rf"{file}: made by .*; {first}: found no such file.*; say by backbone where"
        with pytest.raises(SppnetError, match=says):
            Embedder.load(file)
        loaded = Embedder.load(file, backbone=second)
        np.testing.assert_array_equal(loaded(scenes[0]), expected)
        with pytest.raises(
            SppnetError, match=r"made by .*, found efficientnet.* in efficientnet-lite0; expected"
        ):
            Embedder.load(file, backbone="efficientnet-lite0")
        shutil.copy(backbone_file("test_resnet"), first)
        with pytest.raises(SppnetError, match=rf"{file}: made by .*, found .* in {first}; expected the same"):
            Embedder.load(file)

    def test_of_another_kind_is_refused(self, tmp_path):
        Path(tmp_path / "e.safetensors").write_bytes(b"nothing")
        with pytest.raises(ValueError, match="found no embedder"):
            Embedder.load(tmp_path / "e.safetensors")
        with pytest.raises(FileNotFoundError):
            Embedder.load(tmp_path / "f.safetensors")

    def test_of_another_version_is_refused(self, embed, tmp_path):
        facts, tensors = embed.state()
        about = json.loads(facts["embedder"])
        for version in ("2", None):
            old = {**about, "version": version} if version else {k: about[k] for k in about if k != "version"}
            write_tensors(tmp_path / "e.safetensors", tensors, {"embedder": json.dumps(old)})
            found = f"of version {version or 1}, expected version 3; make the file anew"
            with pytest.raises(SppnetError, match=found):
                Embedder.load(tmp_path / "e.safetensors")


def test_takes_whatever_stands_for_an_image(embed, scenes, tmp_path):
    path = tmp_path / "a.jpg"
    trees.save(path, scenes[0])
    expected = embed(read_image(path))
    for given in (path, str(path), Image.open(path), embed.encode(path)):
        assert np.array_equal(embed(given), expected)
    with pytest.raises(FileNotFoundError, match=r"none\.jpg"):
        embed("none.jpg")
    with pytest.raises(SppnetError, match="found list, expected one image"):
        embed([path])
