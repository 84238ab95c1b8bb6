import socket
from http.server import BaseHTTPRequestHandler

import pytest

from commands import serving
from sppnet import fetching
from sppnet.errors import ImageError
from sppnet.fetching import fetch, is_address, path_of


class Answer(BaseHTTPRequestHandler):
    """A server that misbehaves as the path says."""

    def __init__(self, *request, directory=None):
        super().__init__(*request)

    def do_GET(self):
        if self.path == "/nonsense":
            self.wfile.write(b"nothing that HTTP knows\r\n\r\n")
            return
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
        else:
            self.send_response(200 if self.path == "/large" else 403)
        self.end_headers()
        self.wfile.write(b"x" * 2000)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("source", "is_one"),
    [("http://a/b.jpg", True), ("HTTPS://a/b.jpg", True), ("ftp://a/b.jpg", False), ("http.jpg", False)],
)
def test_addresses(source, is_one):
    assert is_address(source) == is_one


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("http://example.org/photos/1.jpg", "example.org/photos/1.jpg"),
        ("http://example.org:8080/a%20b.jpg?size=2", "example.org:8080/a b.jpg?size=2"),
        ("http://example.org", "example.org/index"),
        ("http://example.org/../../%2e%2e/etc//x%2F..%2Fy", "example.org/etc/x/y"),
        (f"http://example.org/{'x' * 999}.jpg", f"example.org/{'x' * 196}.jpg"),
    ],
)
def test_paths_stay_below_the_folder(address, path):
    assert path_of(address).as_posix() == path


def test_a_file(tmp_path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "b.bin").write_bytes(bytes(range(256)) * 999)
    with serving(tmp_path / "served") as address:
        path = fetch(f"{address}/b.bin", tmp_path / "to")
    assert path.read_bytes() == bytes(range(256)) * 999
    assert path.relative_to(tmp_path / "to").as_posix() == f"{address.removeprefix('http://')}/b.bin"


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("gone", r"cannot fetch it \(403 Forbidden\), expected an image"),
        ("large", "found more than 1000 bytes, expected an image"),
        ("nonsense", "cannot fetch it .*, expected an image"),
        ("away", "cannot fetch it .*, expected an image"),
    ],
)
def test_what_servers_do(path, found, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "LIMIT", 1000)
    with serving(tmp_path, Answer) as address, pytest.raises(ImageError) as caught:
        fetch(f"{address}/{path}", tmp_path)
    assert str(caught.value).startswith(f"{address}/{path}: ")
    assert "\n" not in str(caught.value)
    with pytest.raises(ImageError, match=found):
        raise caught.value


def test_a_server_that_says_nothing_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/1.jpg"
        with pytest.raises(ImageError, match=r"1.jpg: cannot fetch it \(.*timed out\), expected an image"):
            fetch(address, tmp_path)


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:1/1.jpg", "http://no.such.server.invalid/1.jpg", "http://[/"]
)
def test_no_server(address, tmp_path):
    with pytest.raises(ImageError, match=r": cannot fetch it \(.*\), expected an image"):
        fetch(address, tmp_path)
