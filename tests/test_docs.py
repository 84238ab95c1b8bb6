"""The examples of the documentation run as they stand."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "pooling.md"
EXAMPLES = re.findall(r"^## ([^\n]+)\n.*?^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", [code for _, code in EXAMPLES], ids=[title for title, _ in EXAMPLES])
def test_example(code):
    exec(compile(code, str(PAGE), "exec"), {})


def test_every_example_is_found_and_short():
    assert len(EXAMPLES) == PAGE.read_text().count("```python") == 5
    for title, code in EXAMPLES:
        lines = [
            line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from"))
        ]
        assert len(lines) < 10, title
