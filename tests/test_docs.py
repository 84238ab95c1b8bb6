"""The examples of the documentation run as they stand."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {"pooling.md": 5, "representation.md": 2}
EXAMPLES = {
    f"{page}: {title}": code
    for page in PAGES
    for title, code in re.findall(
        r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```",
        (DOCS / page).read_text(),
        re.DOTALL | re.MULTILINE,
    )
}


@pytest.mark.parametrize("title", EXAMPLES)
def test_example(title):
    exec(compile(EXAMPLES[title], title, "exec"), {})


def test_every_example_is_found_and_short():
    for page, count in PAGES.items():
        found = [title for title in EXAMPLES if title.startswith(page)]
        assert len(found) == (DOCS / page).read_text().count("```python") == count
    for title, code in EXAMPLES.items():
        lines = [
            line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from"))
        ]
        assert len(lines) < 10, title
