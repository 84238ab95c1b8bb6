import contextlib
import io
import os
import socket
import struct
import time
import zlib

import httpx
import pytest
from PIL import Image

from serving import draw, jpeg, noise, serving
from sppnet.serve.app import STATIC
from sppnet.serve.media import MOST_BYTES
from sppnet.serve.security import Rules, host_name

JPEG = {"Content-Type": "image/jpeg"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    draw(root / "photos", 2)
    (root / "outside").mkdir()
    Image.fromarray(noise()).save(root / "outside" / "secret.jpg")
    (root / "photos" / "file.jpg").symlink_to(root / "outside" / "secret.jpg")
    (root / "photos" / "door").symlink_to(root / "outside")
    (root / "photos" / "inside.jpg").symlink_to(root / "photos" / "00.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    exif.get_ifd(0x8825)[2] = (48.0, 51.0, 29.9)
    Image.fromarray(noise(1, 60, 90)).save(root / "photos" / "gps.jpg", exif=exif)
    return root / "photos"


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    with serving(folder, tmp_path_factory.mktemp("project")) as found:
        found.encoded()
        yield found


@pytest.fixture(scope="module")
def closed(folder, tmp_path_factory):
    rules = Rules(token="correct horse", closed=True)
    with serving(None, tmp_path_factory.mktemp("closed"), rules) as found:
        yield found


def test_links_lead_nowhere_outside(served, folder):
    assert sorted(served.ids()) == ["00.jpg", "01.jpg", "gps.jpg", "inside.jpg"]
    assert "2 a link that leads out of the folder" in " ".join(served.get("project")["notes"])


def test_a_photo_that_becomes_a_link_is_not_followed(tmp_path):
    draw(tmp_path / "photos", 1)
    (tmp_path / "secret.txt").write_text("secret")
    with serving(tmp_path / "photos", tmp_path / "project") as served:
        served.encoded()
        photo = served.ids()["00.jpg"]
        (tmp_path / "photos" / "00.jpg").unlink()
        (tmp_path / "photos" / "00.jpg").symlink_to(tmp_path / "secret.txt")
        assert served.client.get(f"photos/{photo}/image").status_code == 404
        assert served.client.post("search", json={"photo": photo, "box": [0, 0, 9, 9]}).status_code == 404


@pytest.mark.parametrize("kind", ["thumbnail", "image"])
def test_pictures_say_nothing_of_where_and_when(served, folder, kind):
    assert Image.open(folder / "gps.jpg").getexif().get_ifd(0x8825)
    content = served.client.get(f"photos/{served.ids()['gps.jpg']}/{kind}").content
    picture = Image.open(io.BytesIO(content))
    assert picture.size == (60, 90)  # upright
    assert not picture.getexif()
    assert b"Exif" not in content


@pytest.mark.parametrize(
    "photo",
    [
        "..%2F..%2Foutside%2Fsecret.jpg",
        "0" * 16,
        "%2e%2e%2fproject",
        "%00" * 16,
        "secret",
        "0123456789abcdeg",
    ],
)
def test_only_ids_of_photos_lead_to_photos(served, photo):
    for path in (f"photos/{photo}/image", f"photos/{photo}/boxes", f"photos/{photo}"):
        answer = served.client.get(path)
        assert answer.status_code in (404, 422)
        assert "message" in answer.json()["error"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "[::2]", ""])
def test_other_names_of_the_server_are_refused(served, host):
    answer = served.client.get("project", headers={"Host": host})
    assert answer.status_code == 421
    assert str(served.studio.opened.project) not in answer.text


def test_its_own_names_are_not(served):
    port = served.url.rpartition(":")[2]
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
        assert httpx.get(f"{served.url}/api/v1/project", headers={"Host": host}).status_code == 200
    assert host_name("[::1]:8000") == "::1"


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1", "https://127.0.0.1:1", "http://localhost:1"]
)
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_pages_of_others_change_nothing(served, origin, method):
    with httpx.Client(base_url=served.client.base_url) as other:
        answer = other.request(method, "fits", json={}, headers={"Origin": origin})
    assert answer.status_code == 403
    assert served.get("project")["fit"] is None


def test_pages_of_others_see_nothing(served):
    photo = served.ids()["00.jpg"]
    for path in (f"photos/{photo}/thumbnail", "project", "events"):
        headers = {"Sec-Fetch-Site": "cross-site"}
        answer = httpx.get(f"{served.client.base_url}{path}", headers=headers)
        assert answer.status_code == 403
    answer = served.client.get("project")
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    preflight = httpx.options(
        f"{served.client.base_url}fits",
        headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"},
    )
    assert preflight.status_code == 403


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
def test_bodies_that_a_form_can_send_are_refused(served, kind):
    answer = served.client.post("fits", content=b'{"a": 1}', headers={"Content-Type": kind})
    assert answer.status_code == 415


def test_programs_need_the_token(served):
    with httpx.Client(base_url=served.client.base_url) as program:
        assert program.post("search", json={}).status_code == 401
        wrong = {"Authorization": "Bearer wrong"}
        assert program.post("search", json={}, headers=wrong).status_code == 401
        for value in (f"Bearer {served.token}", f"Token {served.token}"):
            assert program.post("search", json={}, headers={"Authorization": value}).status_code == 422
        assert program.post("search", json={}, auth=("someone", served.token)).status_code == 422
        for value in ("Basic %%%", "Basic", "Bearer", "Bearer \xff".encode("latin-1")):
            assert program.post("search", json={}, headers={"Authorization": value}).status_code == 401


def test_a_closed_server_shows_nothing_without_the_token(closed):
    with httpx.Client(base_url=closed.url) as stranger:
        for path in ("/api/v1/project", "/api/v1/photos", "/openapi.json", "/api/v1/metrics", "/nowhere"):
            assert stranger.get(path).status_code == 401
        assert stranger.get("/api/v1/health").status_code == 200
        for path in ("/", "/?token=wrong"):
            page = stranger.get(path)
            assert page.content == (STATIC / "index.html").read_bytes()
            assert "set-cookie" not in page.headers
        entered = stranger.get("/?token=correct%20horse")
        assert entered.status_code == 303
        cookie = entered.headers["set-cookie"]
        assert "httponly" in cookie.lower()
        assert "samesite=strict" in cookie.lower()
        assert "horse" not in cookie
        assert stranger.get("/api/v1/project").status_code == 200
        stranger.cookies.clear()
        assert stranger.get("/api/v1/project", headers={"Cookie": 'sppnet="a;;=;x'}).status_code == 401


def test_every_answer_carries_a_strict_policy(served):
    for answer in (served.client.get("project"), served.client.get("nowhere"), httpx.get(served.url)):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "server" not in answer.headers


def test_downloads_are_no_pages_of_this_server(served):
    served.put(served.ids()["00.jpg"], [([1, 1, 50, 50], "<script>alert(1)</script>")])
    answer = served.client.get("export?what=boxes&format=csv")
    assert answer.headers["content-disposition"].startswith("attachment")
    served.put(served.ids()["00.jpg"], [])


def test_large_bodies_are_refused_before_they_are_read(served):
    incoming = served.studio.opened.project / "incoming"
    promised = f"POST /api/v1/photos HTTP/1.1\r\nHost: {served.url[7:]}\r\nOrigin: {served.url}\r\n"
    promised += f"Content-Type: image/jpeg\r\nContent-Length: {MOST_BYTES + 1}\r\n\r\n"
    host, port = served.url[7:].split(":")
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(promised.encode())
        assert b" 413 " in line.recv(1000).partition(b"\r\n")[0]
    many = b'{"photo": "' + b"a" * 9_000_000 + b'"}'
    assert (
        served.client.post("search", content=many, headers={"Content-Type": "application/json"}).status_code
        == 413
    )
    assert not list(incoming.iterdir())


def test_a_body_without_a_length_is_cut_off(served):
    def parts():
        yield jpeg()
        for _ in range(MOST_BYTES // 2**20 + 1):
            yield bytes(2**20)

    # It may be cut off in the middle of its sending.
    with contextlib.suppress(httpx.WriteError, httpx.ReadError):
        assert served.client.post("photos", content=parts(), headers=JPEG).status_code == 413
    assert not list((served.studio.opened.project / "incoming").iterdir())


def png_header(width, height):
    """Return the beginning of a PNG file that says to be of a size."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return head + struct.pack(">I", 0) + b"IDAT" + bytes(4)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (png_header(100_000, 100_000), 413),
        (b"", 415),
        (b"GIF89a", 415),
        (b"\xff\xd8\xff", 415),
        (b"<svg onload='alert(1)'/>", 415),
        (b"P6 99999999 99999999 255 ", 413),
        (os.urandom(1000), 415),
    ],
)
@pytest.mark.parametrize("path", ["photos", "embed"])
def test_what_is_no_image_is_refused_by_its_header(served, path, content, status):
    begun = time.monotonic()
    answer = served.client.post(path, content=content, headers=JPEG)
    assert answer.status_code == status, answer.text
    assert str(served.studio.opened.project) not in answer.text
    assert time.monotonic() - begun < 5
    assert not list((served.studio.opened.project / "incoming").iterdir())


def test_a_damaged_image_is_an_error_of_one_line(served):
    half = jpeg(noise(3, 400, 600))
    answer = served.client.post("embed", content=half[: len(half) // 2], headers=JPEG)
    assert answer.status_code == 422
    assert "Traceback" not in answer.text
    assert str(served.studio.opened.project) not in answer.text


def test_bugs_are_told_to_nobody(served, monkeypatch):
    def broken():
        raise RuntimeError("secret of the server")

    monkeypatch.setattr(served.studio, "facts", broken)
    answer = served.client.get("project")
    assert answer.status_code == 500
    assert answer.json()["error"]["message"].startswith("Something went wrong")
    assert "secret" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[" * 100_000,
        b'{"revision": 1e999, "boxes": []}',
        b'{"revision": 0, "boxes": [{"box": [NaN, 0, 1, 1], "label": "a"}]}',
        b'{"revision": 0, "boxes": [{"box": [5, 5, 1, 1], "label": "a"}]}',
        b'{"revision": 0, "boxes": [{"box": [0, 0, 1, 1], "label": ""}]}',
        b'{"revision": 0, "boxes": [{"box": [0, 0, 1, 1], "label": "a\\u0000b"}]}',
        b'{"revision": 0, "boxes": [{"box": [0, 0, 1, 1], "label": "\\ud800"}]}',
        b'{"revision": 0, "boxes": [], "more": 1}',
        b'{"revision": -1, "boxes": []}',
        b"\xff\xfe",
        b"null",
    ],
)
def test_odd_json_is_refused_with_a_reason(served, content):
    photo = served.ids()["00.jpg"]
    before = served.get(f"photos/{photo}/boxes")
    answer = served.client.put(
        f"photos/{photo}/boxes", content=content, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["message"]
    assert served.get(f"photos/{photo}/boxes") == before
