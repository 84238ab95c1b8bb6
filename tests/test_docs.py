"""The examples of README, docs and docstrings run as they stand; their commands exist, with these options."""

import doctest
import importlib
import re
from typing import Any

import pytest
import typer

from documents import PAGES, ROOT, Block, blocks, command_lines, draw_files, names

SOURCE = ROOT / "src"
GENERATED = ("commands.md", "contributing.md", "reporting.md", "changelog.md")  # docs/site_pages.py
PYTHON = [block for page in PAGES for block in blocks(page) if block.language == "python"]
NOT_RUN = [block for block in PYTHON if block.why]
RUN = {page: [b for b in PYTHON if b.page == page and not b.why] for page in PAGES}
DOCTESTS = [path for path in sorted(SOURCE.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]


def relative(path):
    return str(path.relative_to(ROOT))


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """A current folder that holds the files that examples name."""
    draw_files(tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "page",
    [page for page, found in RUN.items() if found],
    ids=relative,
)
def test_the_examples_of_a_page_run_one_after_another(drawn, page):
    given = names()
    for block in RUN[page]:
        block.run(given)


def test_examples_that_are_not_run_say_why():
    if NOT_RUN:
        pytest.skip(f"{len(NOT_RUN)} not run: " + "; ".join(f"{b.name}: {b.why}" for b in NOT_RUN))


@pytest.mark.parametrize("path", DOCTESTS, ids=relative)
def test_docstrings(drawn, path):
    module = importlib.import_module(".".join(path.relative_to(SOURCE).with_suffix("").parts))
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert found.attempted
    assert not found.failed


def parameters_of(words):
    """Return the command that words name, and what its own parser makes of the rest."""
    from sppnet.cli.main import app

    command: Any = typer.main.get_command(app)
    rest = list(words)
    while hasattr(command, "commands"):
        if hasattr(command, "completed"):
            rest = command.completed(rest, command.context_class(command))
        if not rest or rest[0] not in command.commands:
            break
        command = command.commands[rest.pop(0)]
    context = command.context_class(command, info_name=command.name)
    if rest and rest == words[-1:] and rest[0].startswith("--"):
        rest.append("VALUE")  # A sentence that names an option and no value of it.
    given, left, _ = command.make_parser(context).parse_args(rest)
    return command, context, given, left


@pytest.mark.parametrize(
    "page",
    PAGES,
    ids=relative,
)
def test_command_lines_of_a_page_parse(page):
    for words in command_lines(page):
        try:
            command, context, given, left = parameters_of(words)
            assert not left, f"found no command {left}"
            for parameter in command.params:
                value = given.get(parameter.name)
                # Words in capitals stand for what the reader puts there.
                if isinstance(value, str) and not re.search("[A-Z]", value) and value != "...":
                    checked(parameter, value, context)
        except Exception as error:
            pytest.fail(f"{relative(page)}: sppnet {' '.join(words)}: {error}")


def checked(parameter, value, context):
    """Convert a value as the command would, unless it names a file, which need not exist here."""
    if "path" not in str(parameter.get_help_record(context) or "").lower():
        parameter.process_value(context, value)


def test_blocks_are_found_with_their_lines_reasons_and_errors(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A\n\n```python\nx = 1\n1 / 0\n```\n\n<!-- not run: slow -->\n```python\ny\n```\n")
    assert blocks(page) == [
        Block(page, 4, "python", "x = 1\n1 / 0\n", ""),
        Block(page, 10, "python", "y\n", "slow"),
    ]
    with pytest.raises(ZeroDivisionError) as caught:
        blocks(page)[0].run({})
    assert caught.traceback[-1].lineno + 1 == 5
    page.write_text(
        "```\nsppnet run A \\\n  --x 1  # more\nother\ntorchrun sppnet b\n```\nand `sppnet c --d`."
    )
    assert command_lines(page) == [["run", "A", "--x", "1"], ["b"], ["c", "--d"]]


def test_every_fence_is_seen():
    for page in PAGES:
        assert page.read_text(encoding="utf-8").count("\n```python") == sum(b.page == page for b in PYTHON)


@pytest.mark.parametrize("words", [["detect", "trian"], ["detect", "run", "--no-such"], ["demo", "a"]])
def test_a_wrong_command_line_does_not_parse(words):
    try:
        *_, left = parameters_of(words)
    except Exception as error:
        left = re.findall("no such option", str(error).lower())
    assert left


def test_pages_link_to_files_that_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            generated = page.parent.name == "docs" and target in GENERATED
            assert target.startswith("https://") or generated or (page.parent / target).exists(), (
                page,
                target,
            )
