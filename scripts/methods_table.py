"""Generator of the README's table of methods from the yaml files: `python scripts/methods_table.py`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
HEADER = "| method | year | paper | family | needs | recipes | published |\n|---|---|---|---|---|---|---|\n"
FAMILIES = (
    "generative",
    "predictive",
    "contrastive",
    "self-distillation",
    "distillation",
    "redundancy reduction",
    "clustering",
)  # in the order of the table


def table() -> str:
    """Return the table in Markdown, one row per method, sorted by family and year."""
    methods = {path.stem: yaml.safe_load(path.read_text()) for path in (CONF / "method").glob("*.yaml")}
    recipes: dict[str, list[str]] = {name: [] for name in methods}
    for path in sorted((CONF / "experiment").glob("*.yaml")):
        recipes[method_of(yaml.safe_load(path.read_text()))].append(path.stem)

    def order(name: str) -> tuple[int, int, str]:
        about = methods[name]["about"]
        return FAMILIES.index(about["family"]), about["year"], name

    return HEADER + "".join(row(name, methods[name]["about"], recipes[name]) for name in sorted(methods, key=order))


def method_of(experiment: dict[str, Any]) -> str:
    """Return the method that an experiment selects."""
    return next(str(entry["override /method"]) for entry in experiment["defaults"] if "override /method" in entry)


def row(name: str, about: dict[str, Any], recipes: list[str]) -> str:
    """Return the row of a method from the `about` of its yaml file and the names of its recipes."""
    paper = about["paper"]
    arxiv = re.search(r"arxiv\.org/abs/([\d.]+)", paper)
    cells = [
        f"[`{name}`](docs/methods/{name}.md)",
        str(about["year"]),
        f"[{f'arXiv:{arxiv[1]}' if arxiv else 'paper'}]({paper})",
        about["family"],
        ", ".join(about["needs"]) or "-",
        ", ".join(f"`{recipe}`" for recipe in recipes) or "-",
        about["published"] or "-",
    ]
    return "| " + " | ".join(cells) + " |\n"


def with_table(readme: str) -> str:
    """Return the text of the README with an updated table."""
    return re.sub(r"^\| method \| year .*?\n(?=[^|])", lambda _: table(), readme, flags=re.MULTILINE | re.DOTALL)


if __name__ == "__main__":
    page = ROOT / "README.md"
    page.write_text(with_table(page.read_text()))
