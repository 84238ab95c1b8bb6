"""Requests that the OpenAPI document allows, and such that it does not: none makes the server fail."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from serving import draw, serving

_PATHS_THAT_GO_ON = r"/events"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    draw(root / "photos", 2)
    with serving(root / "photos", root / "project") as found:
        found.encoded()
        yield found


@pytest.fixture(scope="module")
def document(served):
    """The document that the server itself gives."""
    found = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    return found.exclude(path_regex=_PATHS_THAT_GO_ON)


_SETTINGS = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def test_no_request_makes_the_server_fail(served, document):
    """No 5xx, no stack trace, and what is refused is refused with a reason."""
    asked = 0
    for found in document.get_all_operations():
        operation = found.ok()

        @_SETTINGS
        @given(case=operation.as_strategy())
        def ask(case):
            nonlocal asked
            asked += 1
            answer = case.call(headers={"Origin": served.url}, timeout=60)
            assert answer.status_code < 500, f"{case.method} {case.path}: {answer.text}"
            assert "Traceback" not in answer.text
            if answer.status_code >= 400:
                assert answer.json()["error"]["message"]

        ask()
    assert asked > 100


def test_the_document_names_every_address(served):
    import httpx

    paths = httpx.get(f"{served.url}/openapi.json").json()["paths"]
    for path in ("detect", "embed", "search", "fits", "photos", "models", "export", "health", "metrics"):
        assert f"/api/v1/{path}" in paths
    assert {"/label-studio/predict", "/label-studio/setup", "/label-studio/webhook"} <= paths.keys()
