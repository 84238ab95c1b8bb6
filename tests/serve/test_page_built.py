"""The built page in the package is what its sources make: else `make page` was forgotten."""

import hashlib
from pathlib import Path

ROOT = Path(__file__).parents[2]
WEB, BUILT = ROOT / "web", ROOT / "src" / "sppnet" / "serve" / "static"
SETTINGS = (
    "index.html",
    "package-lock.json",
    "package.json",
    "stamp.ts",
    "svelte.config.js",
    "tsconfig.json",
    "vite.config.ts",
)


def hash_of(root, files):
    """Return the hash that web/stamp.ts writes of the same files."""
    made = hashlib.sha256()
    for name, file in sorted((file.relative_to(root).as_posix(), file) for file in files):
        content = file.read_bytes()
        made.update(f"{name}\0{len(content)}\0".encode() + content)
    return made.hexdigest()


def files_of(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def stamped():
    return dict(line.split() for line in (BUILT / "source.txt").read_text().splitlines())


def test_built_from_these_sources():
    sources = [file for file in files_of(WEB / "src") if not file.name.endswith(".test.ts")]
    made = hash_of(WEB, sources + [WEB / name for name in SETTINGS])
    assert stamped()["source"] == made, "the page is stale: make page"


def test_built_files_are_as_they_were_built():
    built = [file for file in files_of(BUILT) if file.name != "source.txt"]
    assert stamped()["built"] == hash_of(BUILT, built), "the built page was changed by hand: make page"


def test_nothing_is_inline_nor_from_elsewhere():
    page = (BUILT / "index.html").read_text()
    assert "<style" not in page
    assert "http" not in page
    assert page.count("<script") == page.count('<script type="module" crossorigin src="./assets/')
