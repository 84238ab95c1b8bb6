import os
import struct
import subprocess
import sys

import cv2
import numpy as np
import pytest

from commands import environment
from sppnet.errors import ImageError
from sppnet.video import Video, is_video, video_writer


def pictures(count, height=96, width=128):
    """Pictures, each of one grey."""
    return [np.full((height, width, 3), 10 + 20 * i, np.uint8) for i in range(count)]


def written(path, code="mp4v", count=10, fps=10):
    """Write a video by OpenCV itself."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), fps, (128, 96))
    assert writer.isOpened()
    for picture in pictures(count):
        writer.write(picture)
    writer.release()
    return path


KINDS = [(".mp4", "mp4v"), (".mov", "mp4v"), (".mkv", "mp4v"), (".avi", "MJPG"), (".webm", "VP80")]


class TestReading:
    @pytest.mark.parametrize(("suffix", "code"), KINDS)
    @pytest.mark.parametrize("every", [1, 3])
    def test_frames(self, tmp_path, suffix, code, every):
        path = written(tmp_path / f"clip{suffix}", code)
        assert is_video(path)
        with Video(path) as video:
            assert (video.fps, video.count, video.live, video.name) == (10, 10, False, str(path))
            frames = list(video.frames(every))
        assert [frame.number for frame in frames] == list(range(0, 10, every))
        np.testing.assert_allclose(
            [frame.seconds for frame in frames], np.arange(0, 10, every) / 10, atol=0.01
        )
        for frame in frames:
            assert frame.pixels.shape == (96, 128, 3)
            assert frame.pixels.dtype == np.uint8
            assert np.abs(frame.pixels.astype(int) - (10 + 20 * frame.number)).max() < 6

    def test_colours(self, tmp_path):
        red = np.zeros((96, 128, 3), np.uint8)
        red[..., 0] = 200
        with video_writer(tmp_path / "red.mp4", 5) as add:
            add(red, 0.0)
        with Video(tmp_path / "red.mp4") as video:
            np.testing.assert_allclose(next(video.frames()).pixels.mean(axis=(0, 1)), [200, 0, 0], atol=5)

    def test_of_a_phone_held_upright(self, tmp_path):
        path = tmp_path / "clip.mp4"
        left = np.zeros((96, 128, 3), np.uint8)
        left[:, :64] = 200
        with video_writer(path, 5) as add:
            add(left, 0.0)
        content = bytearray(path.read_bytes())
        matrix = content.index(b"tkhd") + 44  # of the header of the track, which turns it by 90 degrees
        turned = (0, 1 << 16, 0, -(1 << 16), 0, 0, 96 << 16, 0, 1 << 30)
        content[matrix : matrix + 36] = struct.pack(">9i", *turned)
        path.write_bytes(content)
        with Video(path) as video:
            pixels = next(video.frames()).pixels
        assert pixels.shape == (128, 96, 3)
        assert pixels[:60].mean() > 190
        assert pixels[68:].mean() < 10

    @pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
    def test_truncated(self, tmp_path, share):
        path = written(tmp_path / "clip.mp4")
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        with pytest.raises(ImageError, match=r"clip.mp4: found no frame that can be read, expected a video"):
            Video(path)

    def test_nothing_is_said_by_others(self, tmp_path):
        path = written(tmp_path / "clip.avi", "MJPG")
        content = path.read_bytes()
        path.write_bytes(content[: content.rindex(b"\xff\xd8") - 1500])
        (tmp_path / "none.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(99))
        code = (
            "from sppnet.video import Video\nfrom sppnet.errors import ImageError\n"
            f"with Video({str(path)!r}) as video:\n    assert 0 < len(list(video.frames())) < 10\n"
            f"try:\n    Video({str(tmp_path / 'none.mp4')!r})\nexcept ImageError:\n    pass\n"
            "else:\n    raise AssertionError"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
        assert (done.returncode, done.stderr) == (0, "")

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"\0\0\0\x18ftypisom", True),
            (b"\0\0\0\x18ftypheic", False),
            (b"\0\0\0\x18ftypavif", False),
            (b"\0\0\0\x08wide", True),
            (b"RIFF....AVI LIST", True),
            (b"RIFF....WEBPVP8 ", False),
            (b"\x1aE\xdf\xa3", True),
            (b"\xff\xd8\xff\xe0", False),
            (b"", False),
        ],
    )
    def test_told_by_content(self, tmp_path, content, expected):
        (tmp_path / "file.jpg").write_bytes(content)
        assert is_video(tmp_path / "file.jpg") == expected

    @pytest.mark.parametrize(
        ("source", "expected"),
        [("webcam", True), ("webcam:1", True), ("webcam:x", False), ("webcam1", False), ("gone.mp4", False)],
    )
    def test_webcams(self, source, expected, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert is_video(source) == expected
        (tmp_path / source).mkdir()
        assert not is_video(source)

    def test_no_webcam(self):
        with pytest.raises(ImageError, match="webcam:97: found no webcam that gives a picture, expected"):
            Video("webcam:97")

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
    @pytest.mark.parametrize("name", [b"caf\xe9.mp4", b"a:b.mp4", b"%02d [x] 'y'.mp4", "猫.mp4".encode()])
    def test_any_name(self, tmp_path, name):
        path = tmp_path / os.fsdecode(name)
        with video_writer(path, 10) as add:
            for i, picture in enumerate(pictures(3)):
                add(picture, i / 10)
        with Video(path) as video:
            assert len(list(video.frames())) == 3
        assert os.listdir(os.fsencode(tmp_path)) == [name]


class TestWriting:
    def test_each_picture_stays_until_the_next(self, tmp_path):
        with video_writer(tmp_path / "a.mp4", 10) as add:
            for picture, seconds in zip(pictures(3), (0, 0.3, 0.5), strict=True):
                add(picture, seconds)
        with Video(tmp_path / "a.mp4") as video:
            greys = [round(float(frame.pixels.mean()) / 10) for frame in video.frames()]
        assert greys == [1, 1, 1, 3, 3, 5]

    @pytest.mark.parametrize("size", [(95, 127), (96, 127), (95, 128), (1, 1)])
    def test_odd_sizes(self, tmp_path, size):
        with video_writer(tmp_path / "a.mp4", 10) as add:
            add(np.full((*size, 3), 90, np.uint8), 0)
        with Video(tmp_path / "a.mp4") as video:
            found = next(video.frames()).pixels
        assert found.shape == (size[0] + size[0] % 2, size[1] + size[1] % 2, 3)
        assert np.abs(found.astype(int) - 90).max() < 6

    def test_other_sizes_are_brought_to_the_first(self, tmp_path):
        with video_writer(tmp_path / "a.mp4", 10) as add:
            add(pictures(1)[0], 0)
            add(pictures(1, 60, 50)[0], 0.1)
        with Video(tmp_path / "a.mp4") as video:
            assert [frame.pixels.shape for frame in video.frames()] == [(96, 128, 3)] * 2

    def test_what_breaks_off_leaves_what_was_there(self, tmp_path):
        (tmp_path / "a.mp4").write_text("before")

        def broken():
            with video_writer(tmp_path / "a.mp4", 10) as add:
                add(pictures(1)[0], 0)
                raise RuntimeError

        with pytest.raises(RuntimeError):
            broken()
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.mp4", "before")]
