"""Parts of the pages in `docs/`: fenced blocks, prose, rows of tables, and example files."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def rows(text: str) -> list[list[str]]:
    """Cells of the rows of all tables, without headers."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def write_examples(page: Path, folder: Path) -> None:
    """Write the blocks of a page whose first comment is the name of a file."""
    for language, text in blocks(page):
        match = re.match(r"(?:# @package _global_\n)?# ([\w/]+\.(?:py|yaml))\n", text)
        if match and language in ("python", "yaml"):
            path = folder / match[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
