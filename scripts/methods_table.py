"""Write the README's table of methods anew from the yaml files: `python scripts/methods_table.py`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
HEADER = "| method | year | paper | family | needs | recipes | published |\n|---|---|---|---|---|---|---|\n"
FAMILIES = ("generative", "predictive", "contrastive", "self-distillation")  # in the order of the table


def table() -> str:
    """One row a method, by family and year."""
    methods = {path.stem: yaml.safe_load(path.read_text()) for path in (CONF / "method").glob("*.yaml")}
    recipes: dict[str, list[str]] = {word: [] for word in methods}
    for path in sorted((CONF / "experiment").glob("*.yaml")):
        recipes[method_of(yaml.safe_load(path.read_text()))].append(path.stem)

    def order(word: str) -> tuple[int, int, str]:
        about = methods[word]["about"]
        return FAMILIES.index(about["family"]), about["year"], word

    return HEADER + "".join(row(word, methods[word]["about"], recipes[word]) for word in sorted(methods, key=order))


def method_of(experiment: dict[str, Any]) -> str:
    """The method an experiment chooses."""
    return next(str(entry["override /method"]) for entry in experiment["defaults"] if "override /method" in entry)


def row(word: str, about: dict[str, Any], recipes: list[str]) -> str:
    paper = about["paper"]
    arxiv = re.search(r"arxiv\.org/abs/([\d.]+)", paper)
    cells = [
        f"[`{word}`](docs/methods/{word}.md)",
        str(about["year"]),
        f"[{f'arXiv:{arxiv[1]}' if arxiv else 'paper'}]({paper})",
        about["family"],
        ", ".join(about["needs"]) or "-",
        ", ".join(f"`{name}`" for name in recipes) or "-",
        about["published"] or "-",
    ]
    return "| " + " | ".join(cells) + " |\n"


def with_table(readme: str) -> str:
    """The README with its table replaced."""
    return re.sub(r"^\| method \| year .*?\n(?=[^|])", lambda _: table(), readme, flags=re.MULTILINE | re.DOTALL)


if __name__ == "__main__":
    page = ROOT / "README.md"
    page.write_text(with_table(page.read_text()))
