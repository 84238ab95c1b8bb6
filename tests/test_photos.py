from sppnet.images import read_image
from sppnet.photos import demo_photo


def test_the_photo_is_there_with_its_origin_and_licence():
    photo = demo_photo()
    assert read_image(photo).shape == (333, 600, 3)
    assert photo.stat().st_size < 150_000
    text = (photo.parent / "LICENSE.md").read_text(encoding="utf-8")
    assert f"`{photo.name}` is in the public domain" in text
