"""Generator of docs/recipes.md from the tables of official values: `python scripts/recipes_table.py`.

tests/official_values/*.yaml has one entry per recipe. An entry lists, for each key of the composed configuration, the
value of the official code or paper, its source, and the reason if the value of the recipe differs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra._internal.utils import get_args_parser

from sslcli.cli.compose import checked_jobs
from sslcli.data.views.spec import View, parse
from sslcli.nn.schedule import scale_lr

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "tests" / "official_values"
RECIPES = ROOT / "conf" / "experiment"
PAGE = ROOT / "docs" / "recipes.md"
RATE = "learning rate"  # row of the effective learning rate, which depends on three keys
NO_VALUE = "-"  # official value of a key that the source does not define
# Keys that every recipe lists, in addition to the keys that its yaml file sets.
GENERAL = (
    *("backbone", "optimizer", "train.epochs", "train.batch_size", "train.schedule", "train.warmup_epochs", RATE),
    *("optimizer.weight_decay", "train.decay_norm_and_bias", "views.normalize"),
)
INTRODUCTION = """# Recipes and their sources

A recipe (`ssl-train experiment=NAME`) follows a published configuration, if there is one. This page compares each
recipe with this configuration, value by value. `python scripts/recipes_table.py` generates the page from
`tests/official_values/` and from the configurations that Hydra composes for the recipes.

- **official** is the value in the source. `-` means that the source has no value.
- **difference** gives the reason if the recipe has another value for a key. If the values of a key are equal, the cell
  is empty. The last rows of some tables describe differences that no key controls. In these rows, the cell is also
  empty.
- **learning rate** is the effective rate: `optimizer.lr`, scaled with the batch size by `train.lr_scaling`.
- **published** is the number that the source reports, with its protocol. **nearest command** evaluates a run `DIR` with
  the protocol of sslcli that is nearest to it. [Evaluation](evaluation.md) describes how the protocols differ.

All sources train on all training images, and so do the recipes (`dataset.pretrain_on_val`, [data](data.md#splits)).
The color operations of views are computed on floats. In most sources, they are computed on bytes.

The values of a recipe are those of its yaml file. To change a value, add it to the command:
`ssl-train experiment=cifar10_byol train.epochs=800`.

| recipe | source | published | values that differ or have no source |
|---|---|---|---|
"""


class Row(NamedTuple):
    """A key of a recipe with both values."""

    key: str
    official: Any
    ours: Any
    source: str
    reason: str  # empty if the values are equal

    @property
    def is_equal(self) -> bool:
        return bool(self.official != NO_VALUE and self.official == self.ours)


def tables() -> dict[str, dict[str, Any]]:
    """Return the entries of all tables by recipe, sorted by name. Names that begin with a dot are shared parts."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(TABLES.glob("*.yaml")):
        entries = {name: entry for name, entry in yaml.safe_load(path.read_text()).items() if name[0] != "."}
        assert not found.keys() & entries.keys(), f"{path} repeats {found.keys() & entries.keys()}"
        found |= entries
    return dict(sorted(found.items()))


def composed(recipe: str) -> dict[str, Any]:
    """Return the composed configuration of a recipe as plain values."""
    return checked_jobs("train", get_args_parser().parse_args([f"experiment={recipe}"]))[0]


def keys_of(recipe: str, config: dict[str, Any]) -> list[str]:
    """Return the keys that the table of a recipe must list: general keys, and the keys that its yaml file sets."""
    settings = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    settings.pop("defaults")
    views = [
        f"views.{number}" for number in range(len(settings.get("views", {}).pop("views", config["views"]["views"])))
    ]
    own = [RATE if key in ("optimizer.lr", "train.lr_scaling") else key for key in _flat(settings)]
    general = [key for key in GENERAL if key != "train.decay_norm_and_bias" or config["optimizer"].get("weight_decay")]
    return list(dict.fromkeys((*general, *views, *own)))


def _flat(node: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys of all values in a mapping."""
    parts = [_flat(value, f"{key}.") if isinstance(value, dict) else [str(key)] for key, value in node.items()]
    return [f"{prefix}{key}" for part in parts for key in part]


def value_of(config: dict[str, Any], key: str) -> Any:
    """Return the value of a row in a composed configuration. Raises KeyError for an unknown key."""
    if key == RATE:
        train = config["train"]
        return scale_lr(config["optimizer"]["lr"], batch_size=train["batch_size"], rule=train["lr_scaling"])
    if key in ("backbone", "optimizer"):
        return config["_choices_"][key]
    group, _, name = key.partition(".")
    if group == "views" and name.isdigit():
        return parse(int(name), config["views"]["views"][int(name)])
    node: Any = config
    for part in key.split("."):
        node = node[part]
    return node


def rows(entry: dict[str, Any], config: dict[str, Any]) -> list[Row]:
    """Return the rows of an entry of the tables."""
    found = []
    for key, (official, source, *reason) in entry["rows"].items():
        is_view = isinstance(official, dict)
        ours = value_of(config, key)
        if key == RATE:
            ours = float(f"{ours:.9g}")  # 0.03 / 2 and 0.015 differ in the last bit
        found.append(Row(key, parse(0, official) if is_view else official, ours, source, "".join(reason)))
    order = {key: number for number, key in enumerate((*GENERAL, "views.0", "views.1"))}
    return sorted(found, key=lambda row: (order.get(row.key, len(order)), row.key.split(".")[0]))


def page() -> str:
    """Return the text of the page: a row of the first table and a section per recipe."""
    parts = [(name, entry, rows(entry, composed(name))) for name, entry in tables().items()]
    summary = [summary_line(name, entry, found) for name, entry, found in parts]
    return INTRODUCTION + "".join(summary) + "".join(section(name, entry, found) for name, entry, found in parts)


def summary_line(name: str, entry: dict[str, Any], found: list[Row]) -> str:
    """Return the row of a recipe in the first table."""
    count = sum(not row.is_equal for row in found) + len(entry.get("differences", []))
    return _line((f"[`{name}`](#{name})", entry["code"], entry["published"], str(count))) + "\n"


def section(name: str, entry: dict[str, Any], found: list[Row]) -> str:
    """Return the section of a recipe with the rows `found`."""
    lines = [f"\n## `{name}`\n", f"- source: {entry['code']}", f"- published: {entry['published']}"]
    if "evaluate" in entry:
        lines.append(f"- nearest command: `{entry['evaluate']}`")
    lines += ["", "| key | official | sslcli | source | difference |", "|---|---|---|---|---|"]
    for row in found:
        cells = (
            f"`{row.key}`" if row.key != RATE else RATE,
            text_of(row.official),
            text_of(row.ours),
            row.source,
            row.reason,
        )
        lines.append(_line(cells))
    lines += [_line((point, official, ours, "", "")) for point, official, ours in entry.get("differences", [])]
    return "\n".join(lines) + "\n"


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def text_of(value: Any) -> str:
    """Return a value as in the yaml files; a view as one line."""
    if isinstance(value, View):
        kernel = f", kernel of {value.blur_kernel} px" if value.blur > 0 and value.blur_kernel else ""
        return value.describe() + kernel
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return "[" + ", ".join(text_of(item) for item in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    PAGE.write_text(page())
