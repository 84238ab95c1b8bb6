"""Pages of the site that are written from the code: mkdocs.yml names this file among its hooks."""

import ast
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "sppnet"
GROUND = "ground"
HIDDEN = ("help", "install_completion", "show_completion")
ORDER = (
    *(GROUND, "pooling", "features", "datasets", "proposals", "evaluation", "detection", "classification"),
    *("retrieval", "drawing", "onnx"),
)
ABOUT = {"contributing.md": "CONTRIBUTING.md", "reporting.md": "SECURITY.md", "changelog.md": "CHANGELOG.md"}


def rooms() -> dict[str, list[str]]:
    """Return the public modules of every room, in the order of import."""
    found: dict[str, list[str]] = {room: [] for room in ORDER}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        room = parts[0] if len(parts) > 1 or parts[0] in ORDER else GROUND
        if room not in ("cli", "serve") and not any(part.startswith("_") for part in parts) and public(path):
            found.setdefault(room, []).append(".".join(("sppnet", *parts)))
    return {room: modules for room, modules in found.items() if modules}


def public(path: Path) -> bool:
    """Return whether a module defines a documented function or class for others."""
    return any(
        isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and ast.get_docstring(node)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
    )


def api_page(room: str, modules: list[str]) -> str:
    """Return the page of a room: what its package says, then each module from its docstrings."""
    door = SOURCE / room / "__init__.py"
    about = ast.get_docstring(ast.parse(door.read_text(encoding="utf-8"))) if door.exists() else None
    title = "# Ground: what every room stands on" if room == GROUND else f"# sppnet.{room}"
    blocks = [f"::: {module}\n    options:\n      heading_level: 2\n" for module in modules]
    return "\n\n".join([title, *([about] if about else []), *blocks])


def command_page() -> str:
    """Return the page of all commands, as the program itself describes them."""
    from sppnet.cli.main import app

    lines = ["# Command line", "", "Written from the program itself; `--help` at any command says the same."]
    return "\n".join([*lines, *command_lines(typer.main.get_command(app), "sppnet")])


def command_lines(command: Any, name: str) -> list[str]:
    """Return the lines of a command, and of all below it."""
    context = command.context_class(command, info_name=name)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    lines = ["", f"## {name}", "", "```", usage, "```", "", paragraphs(command.help or "")]
    for panel, options in panels(command, context).items():
        lines += ["", f"| {panel} | |", "|---|---|"]
        lines += [f"| {names} | {text} |" for names, text in options]
    for below in getattr(command, "commands", {}).values():
        if not below.hidden:
            lines += command_lines(below, f"{name} {below.name}")
    return lines


def panels(command: Any, context: Any) -> dict[str, list[tuple[str, str]]]:
    """Return the names and texts of a command's parameters, in its help panels."""
    found: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is None or parameter.name in HIDDEN:
            continue
        kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
        panel = getattr(parameter, "rich_help_panel", None) or kind
        found.setdefault(panel, []).append((f"`{record[0]}`".replace("|", "\\|"), cell(record[1])))
    return found


def cell(text: str) -> str:
    """Return text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def paragraphs(text: str) -> str:
    """Return a command's help without the marks of its own formatter."""
    return text.replace("\b\n", "").replace("\f", "").replace("<", "&lt;").strip()


def about_page(name: str) -> str:
    """Return a file of the repository's root as a page; its links lead into the site."""
    return (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are written from the code."""
    pages = {"commands.md": command_page()}
    pages |= {f"api/{room}.md": api_page(room, modules) for room, modules in rooms().items()}
    pages |= {page: about_page(name) for page, name in ABOUT.items()}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the rooms where the navigation says API, and watch the sources when pages are served."""
    reference = next(part["Reference"] for part in config.nav if "Reference" in part)
    python = next(part for part in reference if "Python" in part)
    python["Python"] = [{room: f"api/{room}.md"} for room in rooms()]
    config.watch = [*config.watch, str(ROOT / "src")]
    return config
