"""The structure of the source tree: which file may know which, how long a chain, how long a function.

docs/architecture.md draws the rooms; the order and the bars below are what it promises.
"""

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import sppnet

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "sppnet"
TESTS = ROOT / "tests"

# Rooms on one floor may know each other as long as no circle arises; none knows a room of a floor above.
GROUND = (
    *(
        "arrays",
        "boxes",
        "compiling",
        "errors",
        "estimator",
        "fetching",
        "images",
        "linear",
        "models",
        "parallel",
    ),
    *("photos", "progress", "regression", "remote", "storage", "suppression", "video", "walking"),
)
FLOORS = (
    GROUND,
    ("pooling",),
    ("features", "datasets", "proposals", "evaluation", "planning", "rpn"),
    ("detection", "classification", "retrieval"),
    ("drawing", "onnx"),
    ("serve", "cluster", "measuring"),
    ("cli", "__main__"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
CHAIN, ROOM_CHAIN, CHAIN_INSIDE, BODY, PARAMETERS = 12, 8, 5, 50, 8


class Function(NamedTuple):
    """A function of the source: where it is, lines of its body without the docstring, parameters."""

    place: str
    name: str
    lines: int
    parameters: int


def modules():
    """Return the path of each module by its name, ``sppnet.pooling`` for ``pooling/__init__.py``."""
    paths = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


PATHS = modules()


def imported(path):
    """Return all names that a file imports, but for those that only type checkers see."""
    found, waiting = set(), [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: import from the full name of the module"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        waiting += ast.iter_child_nodes(node)
    return found


def arrows():
    """Return the modules that each module imports.

    A module's own packages are left out: Python loads them first, whatever is imported.
    """
    return {
        name: {other for other in imported(path) & PATHS.keys() if not f"{name}.".startswith(f"{other}.")}
        for name, path in PATHS.items()
    }


def room(module):
    """Return the folder, or the file beside the folders, that a module belongs to."""
    return module.split(".")[1] if "." in module else ""


def between_rooms(files):
    """Return the rooms that the files of each room import from."""
    rooms = {room(name): set() for name in files if room(name)}
    for name, others in files.items():
        if room(name):
            rooms[room(name)] |= {room(other) for other in others} - {room(name), ""}
    return rooms


def chain(graph):
    """Return the longest chain of a graph; fail with the circle if there is one."""
    longest, open_ = {}, []

    def follow(name):
        assert name not in open_, "a circle: " + " -> ".join([*open_[open_.index(name) :], name])
        if name not in longest:
            open_.append(name)
            behind = max((follow(other) for other in sorted(graph[name])), key=len, default=())
            open_.pop()
            longest[name] = (name, *behind)
        return longest[name]

    return max((follow(name) for name in graph), key=len, default=())


def functions():
    """Return all functions of the source, nested ones, too."""
    found = []
    for path in PATHS.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                lines = node.end_lineno - body[0].lineno + 1 if body else 0
                arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                place = f"{path.relative_to(ROOT)}:{node.lineno}"
                found.append(Function(place, node.name, lines, len(arguments)))
    return found


def test_the_measure_finds_what_it_looks_for(tmp_path):
    file = tmp_path / "a.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import x\nelse:\n    import y\n"
        "def f():\n    from sppnet.boxes import nms\n"
    )
    assert imported(file) == {"typing", "typing.TYPE_CHECKING", "y", "sppnet.boxes", "sppnet.boxes.nms"}
    assert chain({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == ("a", "b", "c")
    with pytest.raises(AssertionError, match="a circle: b -> c -> b"):
        chain({"a": {"b"}, "b": {"c"}, "c": {"b"}})
    files = arrows()
    assert "sppnet.arrays" in files["sppnet.boxes"]
    assert "pooling" in between_rooms(files)["features"]


def test_every_room_has_a_floor():
    assert {room(name) for name in PATHS} - {""} <= FLOOR.keys()


def test_the_picture_of_the_house_shows_every_room():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    folders = {room(name) for name in PATHS if PATHS[name].name == "__init__.py"} - {""}
    for name in folders | (set(GROUND) & {room(n) for n in PATHS}):
        assert f"`{name}`" in page, name
    for name in folders:
        assert name in drawn, name


def test_no_arrow_points_up():
    rooms = between_rooms(arrows())
    up = {f"{one} -> {other}" for one in rooms for other in rooms[one] if FLOOR[other] > FLOOR[one]}
    assert not up


def test_files_know_each_other_in_no_circle_and_short_chains():
    longest = chain(arrows())
    assert len(longest) <= CHAIN, " -> ".join(longest)


def test_rooms_know_each_other_in_no_circle_and_short_chains():
    longest = chain(between_rooms(arrows()))
    assert len(longest) <= ROOM_CHAIN, " -> ".join(longest)


@pytest.mark.parametrize("folder", sorted({room(n) for n in PATHS if n.count(".") > 1}))
def test_chains_inside_a_room_are_short(folder):
    files = arrows()
    inside = {name for name in files if room(name) == folder and name != f"sppnet.{folder}"}  # Not its door.
    longest = chain({name: files[name] & inside for name in inside})
    assert len(longest) <= CHAIN_INSIDE, " -> ".join(longest)


def test_functions_are_short():
    assert not [f for f in functions() if f.lines > BODY]


def test_functions_take_few_parameters():
    wide = [f for f in functions() if f.parameters > PARAMETERS and f.name != "__init__"]
    assert not [f for f in wide if "/cli/" not in f.place]


def test_tests_mirror_the_source():
    for path in sorted(TESTS.rglob("test_*.py")):
        assert (SOURCE / path.relative_to(TESTS).parent).is_dir(), path


def stub_names():
    """Return the module of each name that ``__init__.pyi`` offers."""
    tree = ast.parse((SOURCE / "__init__.pyi").read_text(encoding="utf-8"))
    names = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            names |= {alias.name: node.module for alias in node.names}
            assert all(alias.asname == alias.name for alias in node.names), (
                "type checkers need `name as name`"
            )
    return names


def test_the_package_offers_what_its_stub_lists():
    names = stub_names()
    assert sorted(vars(sppnet)["__all__"]) == sorted(names)
    for name, module in names.items():
        assert getattr(sppnet, name) is getattr(importlib.import_module(f"sppnet.{module}"), name)
        assert name in dir(sppnet)


def fresh(code):
    """Return what a fresh Python prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_the_package_takes_little():
    code = "import sys\nbefore = set(sys.modules)\nimport sppnet\nprint(*sorted(set(sys.modules) - before))"
    loaded = {name.partition(".")[0] for name in fresh(code).split()}
    assert "sppnet" in loaded
    assert loaded - set(sys.stdlib_module_names) <= {"sppnet", "lazy_loader", "packaging"}
    ours = {name for name in fresh(code).split() if name.startswith("sppnet")}
    assert ours == {"sppnet"}
