import os
import re
import struct
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from sppnet.errors import DatasetError, ImageError, SppnetError
from sppnet.images import (
    SUFFIXES,
    find_images,
    image_header,
    image_size,
    pixels_of,
    read_image,
    resize,
    shorter_side_size,
    view_windows,
    write_image,
)

RAMP = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
COLOUR = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=2)
ORIENTATION = 0x0112


def grey(values):
    return np.repeat(np.asarray(values, np.uint8)[:, :, None], 3, axis=2)


def png(path, width, height, data=b""):
    """Write a PNG with the header of a width x height RGB image and any pixel data."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )
    return path


def noise(height, width):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


class TestModes:
    def read(self, tmp_path, image, suffix=".png", **options):
        path = tmp_path / f"picture{suffix}"
        image.save(path, **options)
        pixels = read_image(path)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (*image_size(path), 3)
        # An image of Pillow's that was opened from the file is what the file is.
        with Image.open(path) as opened:
            np.testing.assert_array_equal(pixels_of(opened), pixels)
        return pixels

    def test_rgb(self, tmp_path):
        np.testing.assert_array_equal(self.read(tmp_path, Image.fromarray(COLOUR)), COLOUR)

    def test_grey(self, tmp_path):
        np.testing.assert_array_equal(self.read(tmp_path, Image.fromarray(RAMP)), grey(RAMP))

    def test_one_bit(self, tmp_path):
        pixels = self.read(tmp_path, Image.fromarray(RAMP > 100))
        np.testing.assert_array_equal(pixels, grey((RAMP > 100) * 255))

    @pytest.mark.parametrize("suffix", [".png", ".tif", ".ppm"])
    def test_16_bit_grey_is_scaled_not_clipped(self, tmp_path, suffix):
        pixels = self.read(tmp_path, Image.fromarray(RAMP.astype(np.uint16) * 257), suffix)
        np.testing.assert_array_equal(pixels, grey(RAMP))

    def test_big_endian_16_bit_grey(self, tmp_path):
        big = Image.frombytes("I;16B", (6, 4), (RAMP.astype(np.uint16) * 257).astype(">u2").tobytes())
        np.testing.assert_array_equal(self.read(tmp_path, big, ".tif"), grey(RAMP))

    def test_32_bit_integers(self, tmp_path):
        fitting = Image.fromarray(RAMP.astype(np.int32) * 257)
        np.testing.assert_array_equal(self.read(tmp_path, fitting, ".tif"), grey(RAMP))
        wider = Image.fromarray(np.array([[-1000, 0, 254_000]], np.int32))
        np.testing.assert_array_equal(self.read(tmp_path, wider, ".tif"), grey([[0, 1, 255]]))

    def test_floats(self, tmp_path):
        fitting = Image.fromarray(np.array([[0.0, 0.2, 1.0]], np.float32))
        np.testing.assert_array_equal(self.read(tmp_path, fitting, ".tif"), grey([[0, 51, 255]]))
        wider = Image.fromarray(np.array([[-10, 0, 500]], np.float32))
        np.testing.assert_array_equal(self.read(tmp_path, wider, ".tif"), grey([[0, 5, 255]]))
        constant = Image.fromarray(np.full((1, 2), 7, np.float32))
        np.testing.assert_array_equal(self.read(tmp_path, constant, ".tif"), grey([[0, 0]]))
        with pytest.raises(ImageError, match=r"picture.tif: found .*not finite"):
            self.read(tmp_path, Image.fromarray(np.array([[0, np.nan]], np.float32)), ".tif")

    def test_palette(self, tmp_path):
        picture = Image.fromarray(COLOUR).quantize(24)
        np.testing.assert_array_equal(self.read(tmp_path, picture), np.array(picture.convert("RGB")))

    def test_palette_with_transparency_shows_white(self, tmp_path):
        picture = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
        picture.putpalette([10, 20, 30, 40, 50, 60])
        for suffix in (".png", ".gif"):
            pixels = self.read(tmp_path, picture, suffix, transparency=0)
            assert pixels.tolist() == [[[255, 255, 255], [40, 50, 60]]]

    def test_alpha_is_composited_on_white(self, tmp_path):
        picture = Image.fromarray(np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 51]]], np.uint8))
        assert self.read(tmp_path, picture).tolist() == [[[200, 0, 0], [255, 255, 255], [204, 204, 204]]]

    def test_grey_with_alpha(self, tmp_path):
        picture = Image.fromarray(np.array([[[100, 255], [100, 0]]], np.uint8), "LA")
        np.testing.assert_array_equal(self.read(tmp_path, picture), grey([[100, 255]]))

    @pytest.mark.parametrize("suffix", [".jpg", ".tif"])
    def test_cmyk(self, tmp_path, suffix):
        cmyk = Image.new("CMYK", (16, 8), (0, 255, 255, 0))
        np.testing.assert_allclose(self.read(tmp_path, cmyk, suffix)[4, 8], [255, 0, 0], atol=3)

    def test_inverted_cmyk_of_adobe(self, tmp_path):
        # Pillow writes, as Adobe does, inverted inks and a marker that says so.
        colours = Image.fromarray(np.repeat(np.repeat(COLOUR, 8, axis=0), 8, axis=1)).convert("CMYK")
        pixels = self.read(tmp_path, colours, ".jpg", quality=100)
        assert b"Adobe" in (tmp_path / "picture.jpg").read_bytes()
        assert np.abs(pixels.astype(int) - np.asarray(colours.convert("RGB"))).mean() < 3

    def test_16_bit_colours(self, tmp_path):
        deep = cv2.cvtColor(COLOUR.astype(np.uint16) * 257, cv2.COLOR_RGB2BGR)
        assert cv2.imwrite(str(tmp_path / "deep.png"), deep)
        np.testing.assert_array_equal(read_image(tmp_path / "deep.png"), COLOUR)

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
    def test_the_content_counts_and_not_the_suffix(self, tmp_path, kind):
        image = Image.new("RGB", (6, 4), "red")
        image.save(tmp_path / "wrong.tif", kind)
        assert np.abs(read_image(tmp_path / "wrong.tif").astype(int) - np.asarray(image)).max() < 3

    def test_the_first_picture_of_an_mpo(self, tmp_path):
        first, second = noise(16, 24), Image.new("RGB", (24, 16))
        first.save(tmp_path / "one.jpg", quality=95)
        first.save(tmp_path / "two.mpo", save_all=True, append_images=[second], quality=95)
        np.testing.assert_array_equal(read_image(tmp_path / "two.mpo"), read_image(tmp_path / "one.jpg"))

    @pytest.mark.parametrize("suffix", [".gif", ".webp", ".tif", ".png"])
    def test_first_frame_of_several(self, tmp_path, suffix):
        frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
        pixels = self.read(tmp_path, frames[0], suffix, save_all=True, append_images=frames[1:])
        np.testing.assert_allclose(pixels[2, 3], [255, 0, 0], atol=3)

    @pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation(self, tmp_path, suffix, orientation):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        blocks = np.kron(COLOUR, np.ones((16, 16, 1), np.uint8))
        turned = {1: blocks, 2: blocks[:, ::-1], 3: blocks[::-1, ::-1], 4: blocks[::-1]}
        turned |= {5: blocks.transpose(1, 0, 2), 6: np.rot90(blocks, -1), 8: np.rot90(blocks)}
        turned[7] = turned[5][::-1, ::-1]
        options = {"lossless": True} if suffix == ".webp" else {"quality": 100}
        pixels = self.read(tmp_path, Image.fromarray(blocks), suffix, exif=exif, **options)
        assert pixels.shape == turned[orientation].shape
        assert np.abs(pixels.astype(int) - turned[orientation]).mean() < 4

    def test_metadata_that_cannot_be_read(self, tmp_path):
        pixels = self.read(tmp_path, Image.fromarray(COLOUR), exif=b"Exif\0\0nonsense")
        np.testing.assert_array_equal(pixels, COLOUR)

    @pytest.mark.parametrize("size", [(1, 1), (30_000, 20)])
    def test_extreme_sizes(self, tmp_path, size):
        assert self.read(tmp_path, Image.new("RGB", size, "red")).shape == (size[1], size[0], 3)


class TestHeic:
    @pytest.fixture
    def heif(self):
        package = pytest.importorskip("pillow_heif", reason="needs the extra heic")
        package.register_heif_opener()  # for Pillow to write them
        return package

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("suffix", [".heic", ".jpg"])
    def test_upright_as_a_jpeg_is(self, heif, tmp_path, orientation, suffix):
        image, exif = Image.fromarray(np.repeat(np.repeat(COLOUR, 16, axis=0), 16, axis=1)), Image.Exif()
        exif[ORIENTATION] = orientation
        image.save(tmp_path / "p.jpg", exif=exif, quality=95)
        with Image.open(tmp_path / "p.jpg") as opened:
            opened.save(tmp_path / "p.heic", quality=95)
        assert (b"irot" in (tmp_path / "p.heic").read_bytes()) == (orientation in (3, 5, 6, 7, 8))
        path = (tmp_path / "p.heic").rename(tmp_path / f"other{suffix}")
        found = read_image(path)
        expected = read_image(tmp_path / "p.jpg")
        assert found.shape == expected.shape == (*image_size(path), 3)
        assert np.abs(found.astype(int) - expected).mean() < 4

    def test_found_in_folders_with_the_extra(self, heif, tmp_path):
        image = noise(32, 48)
        for suffix in (".heic", ".HEIF", ".hif"):
            heif.from_pillow(image).save(tmp_path / f"p{suffix}")
        paths, notes = find_images([tmp_path])
        assert (len(paths), notes) == (3, ())
        assert all(read_image(path).shape == (32, 48, 3) for path in paths)

    def test_without_the_extra(self, tmp_path, monkeypatch):
        monkeypatch.setattr("sppnet.errors.find_spec", lambda name: None)
        without = frozenset(s for s in SUFFIXES if s not in (".heic", ".heif", ".hif"))
        monkeypatch.setattr("sppnet.images._SUFFIXES", frozenset(map(os.fsencode, without)))
        path = tmp_path / "IMG_1.HEIC"
        path.write_bytes(b"\0\0\0\x24ftypheic\0\0\0\0mif1heic" + bytes(200))
        noise(4, 4).save(tmp_path / "a.jpg")
        for function in (read_image, image_size):
            with pytest.raises(ImageError) as caught:
                function(path)
            assert str(caught.value) == f'{path}: reading HEIC needs pillow-heif: pip install "sppnet[heic]"'
        note = f'{tmp_path}: 1 file left out: 1 .heic (pip install "sppnet[heic]"), first IMG_1.HEIC'
        assert find_images([tmp_path]) == ([tmp_path / "a.jpg"], (note,))

    @pytest.mark.parametrize(("brand", "found"), [(b"heic", "a damaged file"), (b"qt  ", "the kind 'qt  '")])
    def test_damaged(self, heif, tmp_path, brand, found):
        path = tmp_path / "IMG_1.HEIC"
        path.write_bytes(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0" + brand + b"\0\0\0\0" + bytes(200))
        with pytest.raises(ImageError, match=f"IMG_1.HEIC: found .*{found}"):
            read_image(path)


class TestHeaders:
    @pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp", ".avif", ".mpo"])
    @pytest.mark.parametrize("orientation", [None, *range(1, 9)])
    def test_size_as_stored_and_as_seen(self, tmp_path, suffix, orientation):
        if suffix not in SUFFIXES:
            pytest.skip(f"Pillow was built without {suffix}")
        path, exif = tmp_path / f"lying{suffix}", Image.Exif()
        if orientation is not None:
            exif[ORIENTATION] = orientation
        Image.fromarray(COLOUR).save(path, exif=exif)
        header = image_header(path)
        assert header == (4, 6, orientation or 1)
        assert header.size == read_image(path).shape[:2] == image_size(path)
        assert header.size == ((6, 4) if header.orientation >= 5 else (4, 6))

    def test_no_pixel_is_decoded(self, tmp_path):
        path = tmp_path / "stub.jpg"
        Image.new("RGB", (640, 480)).save(path)
        content = path.read_bytes()
        path.write_bytes(content[: content.index(b"\xff\xda") + 14])
        assert image_header(path) == (480, 640, 1)


class TestBadFiles:
    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"gone.jpg: found no such file, expected a JPEG"):
            read_image(tmp_path / "gone.jpg")

    def test_folder(self, tmp_path):
        with pytest.raises(ImageError, match=f"{tmp_path}: found a folder"):
            read_image(tmp_path)

    @pytest.mark.parametrize(
        ("content", "found"),
        [
            (b"", "an empty file"),
            (b"%PDF-1.4 and so on", "starts with b'%PDF-1.4'"),
            (b"\xff\xd8\xff\xe0 and no more", "a truncated file"),
            (b"RIFF1234WAVEfmt ", "a damaged file"),
        ],
    )
    def test_no_image(self, tmp_path, content, found):
        path = tmp_path / "odd.jpg"
        path.write_bytes(content)
        for function in (read_image, image_size):
            with pytest.raises(ImageError) as caught:
                function(path)
            message = str(caught.value)
            assert message.startswith(f"{path}: found ")
            assert found in message
            assert "\n" not in message

    @pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".tif", ".webp", ".gif"])
    @pytest.mark.parametrize("share", [0.2, 0.5, 0.95])
    def test_truncated(self, tmp_path, suffix, share):
        path = tmp_path / f"cut{suffix}"
        noise(60, 80).save(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        kind = "a damaged file" if suffix == ".webp" else "a truncated"
        with pytest.raises(ImageError, match=f"cut{suffix}: found {kind}"):
            read_image(path)

    @pytest.mark.parametrize("progressive", [False, True])
    def test_jpeg_without_its_end_marker(self, tmp_path, progressive):
        path = tmp_path / "cut.jpg"
        noise(60, 80).save(path, progressive=progressive)
        content, expected = path.read_bytes(), read_image(path)
        for beginning in (content[:-1], content[:-2], content[:-2] + bytes(999)):
            path.write_bytes(beginning)
            with pytest.warns(UserWarning, match=r"cut.jpg: found a JPEG without its end marker; its pixels"):
                found = read_image(path)
            np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize(
        ("side", "size"), [(None, (320, 480)), (300, (320, 480)), (150, (160, 240)), (9, (40, 60))]
    )
    def test_no_more_of_a_jpeg_is_decoded_than_is_enough(self, tmp_path, side, size):
        image = noise(320, 480).resize((60, 40)).resize((480, 320))
        image.save(tmp_path / "a.jpg")
        image.save(tmp_path / "a.png")
        small = read_image(tmp_path / "a.jpg", side=side)
        assert small.shape == (*size, 3)
        whole = resize(read_image(tmp_path / "a.jpg"), *size)
        assert np.abs(small.astype(int) - whole).mean() < 8
        assert read_image(tmp_path / "a.png", side=side).shape == (320, 480, 3)

    def test_the_limit_counts_the_pixels_of_the_file(self, tmp_path):
        noise(320, 480).save(tmp_path / "a.jpg")
        with pytest.raises(ImageError, match="found 480 x 320 = 153600 pixels, expected at most 100000"):
            read_image(tmp_path / "a.jpg", side=40, max_pixels=100_000)

    @pytest.mark.parametrize("progressive", [False, True])
    @pytest.mark.parametrize("picture", ["noise", "flat"])
    def test_truncated_jpeg_is_never_taken_for_a_whole_one(self, tmp_path, progressive, picture):
        path = tmp_path / "cut.jpg"
        image = noise(60, 80) if picture == "noise" else Image.new("RGB", (80, 60), (200, 30, 90))
        image.save(path, progressive=progressive)
        content, expected = path.read_bytes(), read_image(path)
        for end in range(content.rindex(b"\xff\xda") + 20, len(content) - 2, 1 + len(content) // 200):
            for tail in (b"", bytes(len(content) - end)):
                path.write_bytes(content[:end] + tail)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    try:
                        found = read_image(path)
                    except ImageError:
                        continue
                assert np.array_equal(found, expected), end  # the last bits may say nothing new

    def test_what_comes_after_the_end_of_a_jpeg_is_nothing(self, tmp_path):
        path = tmp_path / "trailer.jpg"
        noise(60, 80).save(path)
        expected = read_image(path)
        content = path.read_bytes()
        for tail in (b"SEFT" * 100, bytes(500), content):
            path.write_bytes(content + tail)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                np.testing.assert_array_equal(read_image(path), expected)

    def test_pixel_limit_is_judged_by_the_header(self, tmp_path):
        path = png(tmp_path / "bomb.png", 60_000, 50_000)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(
                ImageError, match=r"bomb.png: found 60000 x 50000 = 3000000000 pixels.*50000000"
            ):
                read_image(path)
            assert image_size(path) == (50_000, 60_000)

    def test_pixel_limit_of_the_environment(self, tmp_path, monkeypatch):
        small = png(tmp_path / "small.png", 3, 2, (b"\0" + bytes(9)) * 2)
        monkeypatch.setenv("SPPNET_MAX_PIXELS", "5")
        with ThreadPoolExecutor(1) as pool, pytest.raises(ImageError, match=r"found 3 x 2 = 6.*at most 5"):
            pool.submit(read_image, small).result()
        assert read_image(small, max_pixels=6).shape == (2, 3, 3)
        monkeypatch.setenv("SPPNET_MAX_PIXELS", "many")
        with pytest.raises(SppnetError, match="SPPNET_MAX_PIXELS=many: expected a number of pixels"):
            read_image(small)

    def test_pixel_limit_is_the_callers(self, tmp_path):
        path = png(tmp_path / "large.png", 12_000, 8_000)  # beyond the size at which Pillow warns
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ImageError, match="truncated"):
                read_image(path, max_pixels=100_000_000)
        small = png(tmp_path / "small.png", 3, 2, (b"\0" + bytes(9)) * 2)
        assert read_image(small, max_pixels=6).shape == (2, 3, 3)
        with pytest.raises(ImageError, match="found 3 x 2 = 6 pixels, expected at most 5"):
            read_image(small, max_pixels=5)


class TestFindImages:
    @pytest.fixture
    def folder(self, tmp_path):
        for name in ("b.JPG", "a.png", ".hidden.png", "notes.txt", "x[1].webp", "deep/c.gif", "deep/.d.jpg"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        return tmp_path

    def names(self, folder, *sources):
        found = find_images(sources)
        return [path.relative_to(folder).as_posix() for path in found.paths], found.notes

    def test_folder_at_any_depth(self, folder):
        note = f"{folder}: 1 file left out: 1 .txt, first notes.txt"
        assert self.names(folder, folder) == (["a.png", "b.JPG", "deep/c.gif", "x[1].webp"], (note,))
        assert self.names(folder, folder, folder) == self.names(folder, folder)

    def test_file_of_any_suffix(self, folder):
        expected = ["notes.txt", "x[1].webp", ".hidden.png"]
        assert self.names(folder, *(folder / name for name in expected)) == (expected, ())

    def test_patterns(self, folder):
        assert self.names(folder, f"{folder}/*.p*") == (["a.png"], ())
        assert self.names(folder, f"{folder}/d*") == (["deep/c.gif"], ())
        note = f"1 file left out: 1 .txt, first {folder}/notes.txt"
        for pattern in (f"{folder}/*", f"{folder}/**/*", f"{folder}/**"):
            found, notes = self.names(folder, pattern)
            assert found == ["a.png", "b.JPG", "deep/c.gif", "x[1].webp"]
            assert notes[0].startswith(f"{pattern}: 1 file left out: 1 .txt, first ")
        assert self.names(folder, f"{folder}/*")[1] == (f"{folder}/*: {note}",)

    def test_order_of_the_sources_and_each_once(self, folder):
        found, _ = self.names(folder, folder / "b.JPG", folder, f"{folder}/a*")
        assert found == ["b.JPG", "a.png", "deep/c.gif", "x[1].webp"]

    @pytest.mark.parametrize("place", ["", "/**/*", "/*"])
    def test_circles_are_refused(self, folder, place):
        for name in ("one", "two"):
            (folder / "deep" / name).symlink_to("..")
        with pytest.raises(DatasetError, match=r"deep/(one|two): found a circle"):
            find_images([f"{folder}{place}"])

    def test_links_that_lead_nowhere_are_counted(self, folder):
        (folder / "z.jpg").symlink_to("gone")
        for source in (folder, f"{folder}/*"):
            assert "; 1 leading nowhere, first " in find_images([source]).notes[0]

    @pytest.mark.parametrize("suffix", sorted(SUFFIXES - {".heic", ".heif", ".hif", ".pfm"}))
    def test_what_ends_so_can_be_read(self, tmp_path, suffix):
        mode = {".pgm": "L", ".pbm": "1"}.get(suffix, "RGB")
        kind = {".jif": "JPEG"}.get(suffix)
        path = tmp_path / f"picture{suffix.upper()}"
        Image.fromarray(COLOUR).convert(mode).save(path, kind)
        assert find_images([tmp_path]).paths == [path]
        assert read_image(path).shape == (4, 6, 3)

    def test_float_maps(self, tmp_path):
        Image.fromarray((RAMP / 255).astype(np.float32)).save(tmp_path / "picture.pfm")
        np.testing.assert_array_equal(read_image(find_images([tmp_path]).paths[0]), grey(RAMP))

    @pytest.mark.parametrize("kind", [str, Path])
    def test_one_path_is_no_list(self, folder, kind):
        with pytest.raises(SppnetError, match=r"^found the path '.*', expected a list .* \['.*'\]$"):
            find_images(kind(folder))

    @pytest.mark.parametrize(
        ("source", "found"),
        [
            ("gone.jpg", "no such file or folder, expected an image file, a folder or a pattern"),
            ("gone", "no such file or folder, expected"),
            ("*.bmp", "no image, expected"),
            ("none", "no image, expected .*; 1 file left out: 1 .md, first a.md"),
            ("n*", "no image, expected .*; 2 files left out: 1 .md, first a.md; 1 .txt, first .*notes.txt"),
            ("pipe", "neither a file nor a folder, expected"),
        ],
    )
    def test_nothing_matched(self, folder, source, found):
        (folder / "none").mkdir()
        (folder / "none" / "a.md").touch()
        os.mkfifo(folder / "pipe")
        with pytest.raises(SppnetError, match=f"^{re.escape(str(folder / source))}: found {found}"):
            find_images([folder, folder / source])

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
    def test_names_that_are_not_utf8(self, tmp_path):
        place = os.fsencode(tmp_path) + b"/caf\xe9"
        os.mkdir(place)
        for name in (b"\xff.jpg", b"\xff.t\xfft"):
            with open(place + b"/" + name, "wb"):
                pass
        for source in (tmp_path, f"{tmp_path}/*/*"):
            paths, notes = find_images([source])
            assert [os.fsencode(path) for path in paths] == [place + b"/\xff.jpg"]
            assert r"1 .t\xfft, first " in notes[0]
            assert r"caf\xe9/\xff.t\xfft" in notes[0]


class TestSizes:
    @pytest.mark.parametrize(
        ("size", "s", "expected"),
        [
            ((375, 500), 688, (688, 918)),
            ((500, 333), 480, (721, 480)),
            ((20, 30_000), 40, (40, 60_000)),
            ((1, 1), 224, (224, 224)),
            ((480, 640), 480, (480, 640)),
        ],
    )
    def test_shorter_side_rounds_the_longer_up(self, size, s, expected):
        assert shorter_side_size(*size, s) == expected

    def test_enlarging_is_bilinear(self):
        row = np.array([[[0, 0, 0], [100, 100, 100]]], np.uint8)
        assert resize(row, 1, 4)[0, :, 0].tolist() == [0, 25, 75, 100]

    def test_shrinking_below_half_takes_means(self):
        stripes = np.tile(np.array([0, 200, 100], np.uint8)[None, :, None], (9, 3, 3))
        assert (resize(stripes, 3, 3) == 100).all()

    def test_long_images(self):
        assert resize(np.zeros((20, 30_000, 3), np.uint8), *shorter_side_size(20, 30_000, 30)).shape == (
            30,
            45_000,
            3,
        )

    def test_size_must_be_positive(self):
        with pytest.raises(ValueError, match="found a new size of 0 x 4"):
            resize(np.zeros((2, 2, 3), np.uint8), 0, 4)


class TestViews:
    @pytest.mark.parametrize(
        "size", [(10, 10), (13, 10), (10, 12), (30, 17), (17, 30), (11, 11), (12, 40), (19, 11)]
    )
    @pytest.mark.parametrize("middles", [False, True])
    def test_centre_corners_and_middles_of_the_sides_each_once(self, size, middles):
        height, width = size
        # Near, middle and far along each axis; without the sides only the corners and the centre of the nine.
        xs, ys = [0, (width - 10) // 2, width - 10], [0, (height - 10) // 2, height - 10]
        grid = {(xs[i], ys[j]) for i in range(3) for j in range(3) if middles or (i == 1) == (j == 1)}
        windows = view_windows(height, width, 10, middles)
        assert windows.dtype == np.int64
        assert sorted(map(tuple, windows.tolist())) == sorted((x, y, x + 10, y + 10) for x, y in grid)
        assert windows[0].tolist() == [xs[1], ys[1], xs[1] + 10, ys[1] + 10]

    @pytest.mark.parametrize(
        ("size", "without", "with_sides"),
        [
            ((256, 341), 5, 9),
            ((224, 299), 3, 3),
            ((299, 224), 3, 3),
            ((224, 224), 1, 1),
            ((225, 225), 4, 4),
            ((225, 226), 5, 6),
        ],
    )
    def test_views_that_coincide_are_one(self, size, without, with_sides):
        assert len(view_windows(*size, 224)) == without
        assert len(view_windows(*size, 224, middles=True)) == with_sides

    @pytest.mark.parametrize("size", [(223, 300), (300, 223), (1, 1)])
    def test_an_image_smaller_than_its_views(self, size):
        with pytest.raises(
            ValueError, match=f"found a {size[0]} x {size[1]} image, expected at least 224 x 224"
        ):
            view_windows(*size, 224)


class TestWriting:
    @pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".TIFF"])
    def test_round_trip(self, tmp_path, suffix):
        write_image(tmp_path / f"out{suffix}", COLOUR)
        np.testing.assert_array_equal(read_image(tmp_path / f"out{suffix}"), COLOUR)

    @pytest.mark.parametrize("suffix", [".jpg", ".webp", ".gif"])
    def test_lossy(self, tmp_path, suffix):
        write_image(tmp_path / f"out{suffix}", np.full((8, 8, 3), 100, np.uint8))
        np.testing.assert_allclose(read_image(tmp_path / f"out{suffix}"), 100, atol=2)

    def test_unknown_suffix(self, tmp_path):
        with pytest.raises(ValueError, match=r"out.xyz: found the suffix '.xyz', expected one of .bmp"):
            write_image(tmp_path / "out.xyz", COLOUR)
        assert not list(tmp_path.iterdir())

    def test_no_folder(self, tmp_path):
        with pytest.raises(OSError, match=r"out.png: cannot write \(No such file or directory\)"):
            write_image(tmp_path / "gone" / "out.png", COLOUR)
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match=r"out.png: cannot write \(Not a directory\)"):
            write_image(tmp_path / "file" / "out.png", COLOUR)

    @pytest.mark.skipif(
        not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind this user"
    )
    def test_unwritable_folder(self, tmp_path):
        tmp_path.chmod(0o500)
        with pytest.raises(PermissionError, match=r"out.png: cannot write"):
            write_image(tmp_path / "out.png", COLOUR)
