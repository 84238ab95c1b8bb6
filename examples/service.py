"""Find objects in photos that come over HTTP; the answer is JSON. Run as::

    python examples/service.py animals --port 8000
    curl --data-binary @photo.jpg http://127.0.0.1:8000/

The detector is loaded once. It uses all cores for one photo, so photos wait for their turn.
"""

from __future__ import annotations

import argparse
import json
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from tempfile import NamedTemporaryFile
from threading import Lock
from typing import Any

from sppnet import Detector, SppnetError
from sppnet.photos import demo_photo

# The largest body that is read.
MOST_BYTES = 20_000_000


class Service(ThreadingHTTPServer):
    """Answers from one detector; detections less likely than `threshold`, or its own, are left out."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], detector: Detector, threshold: float | None = None) -> None:
        self.detector, self.threshold, self.turn = detector, threshold, Lock()
        super().__init__(address, Handler)
        detector.predict(demo_photo())  # Compiles, or loads what was compiled, before the first request.

    def find(self, photo: bytes) -> list[dict[str, Any]]:
        """Return label, score and box (x1, y1, x2, y2) of each object in the bytes of an image file."""
        with NamedTemporaryFile() as file, self.turn:
            file.write(photo)
            file.flush()
            try:
                return self.detector.predict(file.name, threshold=self.threshold).facts()
            except SppnetError as error:
                raise SppnetError(str(error).removeprefix(f"{file.name}: ")) from error


class Handler(BaseHTTPRequestHandler):
    """``GET /`` tells the classes; ``POST /`` takes an image file and tells what is in it."""

    server: Service
    timeout = 30  # seconds that a client may be silent

    def do_GET(self) -> None:
        """Answer with the classes, which also says that the service is up."""
        if self.path != "/":
            return self.answer(HTTPStatus.NOT_FOUND, {"error": f"found {self.path}, expected /"})
        self.answer(HTTPStatus.OK, {"classes": list(self.server.detector.classes_)})

    def do_POST(self) -> None:
        """Answer with the objects in the photo that is the body."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            return self.answer(HTTPStatus.LENGTH_REQUIRED, {"error": "expected Content-Length"})
        if int(length) > MOST_BYTES:
            error = {"error": f"found {length} bytes, expected at most {MOST_BYTES}"}
            return self.answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, error)
        try:
            return self.answer(HTTPStatus.OK, {"detections": self.server.find(self.rfile.read(int(length)))})
        except SppnetError as error:
            return self.answer(HTTPStatus.BAD_REQUEST, {"error": str(error)})

    def answer(self, status: HTTPStatus, facts: dict[str, Any]) -> None:
        """Send facts as JSON."""
        body = json.dumps(facts).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    """Serve until it is interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a detector file, or animals")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threshold", type=float, help="least probability, 0 to 1")
    args = parser.parse_args()
    try:
        service = Service((args.host, args.port), Detector.load(args.model), args.threshold)
    except (SppnetError, OSError) as error:
        raise SystemExit(f"service: {error}") from None
    print(f"http://{args.host}:{service.server_port}/", flush=True)
    service.serve_forever()


if __name__ == "__main__":
    main()
