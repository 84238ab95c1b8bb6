"""``sppnet propose``."""

from pathlib import Path

import numpy as np

from commands import fails, odd_images, sppnet, succeeds
from sppnet.images import read_image
from sppnet.proposals import parse, read_windows
from trees import write


class TestPropose:
    def test_file(self, photos):
        outcome = succeeds("propose", photos, "--out", "windows.npz")
        with np.load("windows.npz") as file:
            assert file["names"].tolist() == ["1.png", "2.png", "3.png"]
            total = file["counts"].sum()
            assert file["boxes"].shape == (total, 4)
            assert file["scores"].shape == (total,)
        assert f"windows.npz: {total} windows of 3 images" in outcome.out
        image = read_image(photos / "2.png")
        for ours, theirs in zip(
            read_windows("windows.npz")(image), parse("selective-search+edge-boxes")(image), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)

    def test_odd_images(self):
        sizes = odd_images(Path("odd"))
        outcome = succeeds("propose", "odd", "--out", "windows.npz")
        assert f"of {len(sizes)} images" in outcome.out
        for name, (height, width) in sizes.items():
            boxes, _ = read_windows("windows.npz")(read_image(Path("odd") / name))
            np.testing.assert_array_equal(boxes[0], [0, 0, width, height])

    def test_a_share_of_the_photos_may_be_bad(self, photos):
        write(photos / "bad.jpg", "not a picture")
        write(photos / "notes.txt", "")
        for share, status in (((), 1), (("--max-bad", "24"), 1), (("--max-bad", "25"), 0)):
            outcome = sppnet("propose", photos, "--out", "w.npz", "--proposals", "dense", *share)
            assert outcome.status == status
            assert len(outcome.said) == 2
            assert "photos/bad.jpg: found a file that starts with" in outcome.said[0]
            assert outcome.said[1] == "sppnet: 1 of 4 images failed"
            assert "note: photos: 1 file left out: 1 .txt, first notes.txt" in outcome.err
        fails(
            "propose",
            photos,
            "--out",
            "w.npz",
            "--max-bad",
            "101",
            says=["--max-bad", "less than or equal to 100"],
        )

    def test_a_limit_of_pixels(self, photos, monkeypatch):
        monkeypatch.setenv("SPPNET_MAX_PIXELS", "")  # which is undone in the end
        run = ("propose", photos / "1.png", "--out", "w.npz", "--proposals", "dense", "--max-pixels")
        fails(*run, "12287", says=["128 x 96 = 12288 pixels, expected at most 12287 (--max-pixels"])
        succeeds(*run, "12288")

    def test_suffix_is_said_at_once(self, photos, monkeypatch):
        monkeypatch.setattr("sppnet.images.read_image", None)
        fails("propose", photos, "--out", "windows.txt", says=["windows.txt", "'.txt'", "expected .npz"])

    def test_old_windows_stay_without_new_ones(self):
        write(Path("windows.npz"), "the windows of last week")
        write(Path("bad.png"), "not a picture")
        fails("propose", "bad.png", "--out", "windows.npz", says=["bad.png", "expected"])

    def test_unknown_method(self, photos, model):
        says = ["'sliding'", "expected", "selective-search", ".npz"]
        fails("propose", photos, "--out", "windows.npz", "--proposals", "sliding", says=says)
        fails("detect", "run", model, photos, "--proposals", "sliding", says=says)
        fails("detect", "run", model, photos, "--proposals", "none.npz", says=["none.npz"])
        write(Path("text.npz"), "no windows")
        fails("detect", "run", model, photos, "--proposals", "text.npz", says=["text.npz", "sppnet propose"])
