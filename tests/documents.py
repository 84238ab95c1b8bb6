"""README and the pages of docs: their examples, their command lines, and the files that they speak of."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import trees

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(
    r"(?:^<!-- not run: (?P<why>[^\n]+?) -->\n+)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
_INLINE = re.compile(r"`(sppnet [^`]+?)`", re.S)


class Block(NamedTuple):
    """A fenced block of a page: its first line, its text, and why it is not run (empty if it is)."""

    page: Path
    line: int
    language: str
    text: str
    why: str

    @property
    def name(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def run(self, names):
        """Run the block with these names; an error shows its line of the page."""
        exec(compile("\n" * (self.line - 1) + self.text, str(self.page), "exec"), names)


def blocks(page):
    """Return the fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text[: m.start("text")].count("\n") + 1, m["language"], m["text"], m["why"] or "")
        for m in _FENCE.finditer(text)
    ]


def command_lines(page):
    """Return the words that follow ``sppnet`` in each command line of a page's blocks and sentences."""
    shell = [block.text for block in blocks(page) if block.language in ("", "sh", "bash", "console")]
    lines = [line for text in shell for line in text.replace("\\\n", " ").splitlines()]
    sentences = _INLINE.findall(_FENCE.sub("", page.read_text(encoding="utf-8")))
    found = []
    for line in (*lines, *sentences):
        words = shlex.split(line, comments=True)
        if "sppnet" in words and words[0] in ("sppnet", "torchrun"):
            found.append(words[words.index("sppnet") + 1 :])
    return found


def draw_files(folder):
    """Draw the files that examples name: photos, a data set, a folder of classes."""
    for name, seed in (("photo.jpg", 1), ("cat.jpg", 3)):
        trees.save(folder / name, trees.scene(seed, 192, 256).image)
    trees.voc_tree(folder / "my-data", {"train": 6, "val": 3})
    for root in (folder / "flowers", folder / "photos"):
        for split, count in (("train", 11), ("val", 2)):
            trees.class_tree(root / split, count)


def names():
    """Return what examples take as given."""
    import torch

    return {"__name__": "example", "image": trees.scene(1).image, "pixels": torch.rand(2, 3, 224, 224) * 255}
