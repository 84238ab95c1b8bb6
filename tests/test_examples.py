"""The scripts of the folder ``examples``."""

import json
import runpy
import threading
import urllib.error
import urllib.request
from http.client import HTTPConnection

import pytest

from documents import ROOT
from sppnet import Detector
from sppnet.photos import demo_photo


@pytest.fixture(scope="module")
def service():
    """The module of the service and its address; it runs in a thread."""
    module = runpy.run_path(str(ROOT / "examples" / "service.py"))
    with module["Service"](("127.0.0.1", 0), Detector.load("animals")) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield module, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def asked(address, body=None, **headers):
    """Return the status and the facts of an answer."""
    request = urllib.request.Request(address, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_the_service_tells_its_classes(service):
    classes = ["cat", "cow", "dog", "horse", "person", "sheep"]
    assert asked(service[1]) == (200, {"classes": classes})


def test_the_service_finds_what_the_detector_finds(service):
    status, facts = asked(service[1], demo_photo().read_bytes())
    assert status == 200
    assert facts == {"detections": Detector.load("animals").predict(demo_photo()).facts()}
    assert [found["label"] for found in facts["detections"]] == ["cow", "cow", "cow"]


def test_the_service_refuses_what_is_no_photo_and_goes_on(service):
    status, facts = asked(service[1], b"no photo")
    assert status == 400
    assert facts["error"].startswith("found ")
    assert asked(service[1])[0] == 200


def test_the_service_refuses_bodies_that_are_too_large_or_of_unknown_length(service):
    module, address = service
    most = module["MOST_BYTES"]
    assert asked(address, b"", **{"Content-Length": str(most + 1)}) == (
        413,
        {"error": f"found {most + 1} bytes, expected at most {most}"},
    )
    connection = HTTPConnection(address.removeprefix("http://").rstrip("/"), timeout=60)
    connection.putrequest("POST", "/")
    connection.endheaders()
    assert connection.getresponse().status == 411
    connection.close()
