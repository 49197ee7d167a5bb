"""The documentation agrees with the code: files, choices, keys, defaults and command lines."""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
from dataclasses import fields
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
import yaml

import sslcli
from pages import ROOT, blocks, prose, rows, write_examples
from sslcli.cli import command, compose
from sslcli.config.moved import MODULES
from sslcli.data.views.spec import View
from sslcli.methods.base import Batch

CONF = ROOT / "conf"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
GLOBAL = (
    "train",
    "eval",
    "embed",
    "export",
    "method",
    "experiment",
)  # yaml whose keys are those of the whole configuration
OTHER_NAMES = {"sslcli.plugins", "sslcli.conf"}  # an entry point, and a package that only an installation has
FUNCTIONS = {"sslcli.train", "sslcli.evaluate"}  # of the Python API; in version 0.1, these were names of modules
OLD_NAMES = {"sslcli.losses", "sslcli.noise", "sslcli.schedule"}  # examples of add-a-method.md
# Answered by Hydra, or in need of an installed package.
HANDED_OVER = ("--help", "--cfg", "-sc", "pkg://", "hydra/launcher", "hydra/sweeper")


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _anchors(page: Path) -> set[str]:
    """Names of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _commands(page: Path) -> list[str]:
    """The lines of the bash blocks that start one of our commands."""
    lines = "\n".join(text for language, text in blocks(page) if language == "bash").replace("\\\n", " ").splitlines()
    found = [re.search(r"(?:^|\buntil )(ssl-(?:train|eval|embed|export)\b[^;]*|torchrun .*)", line) for line in lines]
    commands = [match[1] for match in found if match]
    return [command for command in commands if not any(flag in command for flag in HANDED_OVER)]


def _leaves(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and values of a yaml file, without what Hydra reads itself."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            found |= _leaves(value, f"{prefix}{key}.")
        elif key != "_target_":
            found[f"{prefix}{key}"] = value
    return found


def _defaults(path: Path) -> dict[str, Any]:
    """The keys of a yaml file as a command line writes them, with their values."""
    node = {key: value for key, value in yaml.safe_load(path.read_text()).items() if key not in ("defaults", "hydra")}
    group = path.parent.name if path.parent != CONF else path.stem
    if group == "method":
        node.pop("about")  # shown by the README's table
    place = "method.mixture" if group == "mixture" else group
    return _leaves(node) if group in GLOBAL else _leaves(node, f"{place}.")


def _tables() -> list[tuple[str, str, str]]:
    """Page, yaml file and text of every section whose heading names a yaml file."""
    found = []
    for page in PAGES:
        for section in re.split(r"^(?=#)", prose(page), flags=re.MULTILINE):
            match = re.match(r"#.*`(conf/[\w/]+\.yaml)`\n", section)
            if match:
                found.append((_name(page), match[1], section))
    return found


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target} leads nowhere"
        assert not anchor or anchor in _anchors(there), f"{target}: there is no such heading"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_file_of_the_project_that_is_named_exists(page: Path) -> None:
    named = re.findall(r"`((?:sslcli|conf|tests|scripts|docs)/[\w./-]*)`", page.read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_the_unchanged_and_removed_lines_of_a_diff_are_in_its_file(page: Path) -> None:
    added: set[str] = set()
    for text in [text for language, text in blocks(page) if language == "diff"]:
        name, *lines = text.splitlines()
        present = {*(ROOT / name.removeprefix("# ")).read_text("utf-8").splitlines(), *added}
        assert [line for line in lines if line[:1] in " -" and line[1:] not in present] == []
        added |= {line[1:] for line in lines if line.startswith("+")}


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_python_name_of_the_package_exists(page: Path) -> None:
    named = set(re.findall(r"`(sslcli(?:\.\w+)+)`", prose(page))) - OTHER_NAMES - OLD_NAMES
    assert [name for name in sorted(named) if not _exists(name)] == []


def _exists(name: str) -> bool:
    """Return whether a dotted name is a module or an attribute of one, by its name of today."""
    if name in FUNCTIONS:
        return callable(getattr(sslcli, name.partition(".")[2]))
    if name in MODULES or name.rpartition(".")[0] in MODULES:
        return False
    try:
        resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_every_method_has_a_page_and_the_readme_the_table_that_the_yaml_files_make() -> None:
    assert sorted(path.stem for path in (ROOT / "docs" / "methods").glob("*.md")) == METHODS
    readme = (ROOT / "README.md").read_text()
    script = runpy.run_path(str(ROOT / "scripts" / "methods_table.py"))
    assert script["with_table"](readme) == readme, "run: python scripts/methods_table.py"
    assert script["table"]() in readme


NAMED_IN = [
    *[("docs/configuration.md", group) for group in ("method", "dataset", "backbone", "optimizer", "launcher")],
    *[("docs/configuration.md", group) for group in ("mixture", "monitor", "experiment", "protocol")],
    *[("docs/data.md", group) for group in ("dataset", "views")],
    *[("README.md", group) for group in ("method", "dataset", "views")],
]


@pytest.mark.parametrize(("page", "group"), NAMED_IN)
def test_every_choice_of_a_group_is_named(page: str, group: str) -> None:
    text = prose(ROOT / page)
    choices = [path.stem for path in (CONF / group).glob("*.yaml")]
    assert [choice for choice in choices if f"`{choice}`" not in text] == []


def test_the_readme_links_to_every_page() -> None:
    linked = set(re.findall(r"\]\(((?:docs/)?[\w/-]+\.md)", prose(ROOT / "README.md")))
    pages = {str(page.relative_to(ROOT)) for page in PAGES} - {"README.md"}
    assert pages - linked == set()


def test_every_yaml_of_settings_has_a_table() -> None:
    groups = ("method", "mixture", "monitor", "launcher", "optimizer", "protocol")
    files = [
        CONF / "train.yaml",
        CONF / "eval.yaml",
        CONF / "embed.yaml",
        CONF / "export.yaml",
        *(path for name in groups for path in (CONF / name).iterdir()),
    ]
    tables = {name for _, name, _ in _tables()}
    assert [path.name for path in files if str(path.relative_to(ROOT)) not in tables] == []


@pytest.mark.parametrize(("page", "file", "section"), _tables(), ids=[f"{page}:{file}" for page, file, _ in _tables()])
def test_a_table_has_every_key_of_its_yaml_with_its_default(page: str, file: str, section: str) -> None:
    documented = {row[0].strip("`"): yaml.safe_load(row[1].strip("`")) for row in rows(section)}
    assert documented == _defaults(ROOT / file)


def _files_of_the_tree(tree: str) -> list[str]:
    """Return the paths of the files in an indented tree; a line is names, two or more spaces, and a description."""
    folders, files = [], []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.split(r" {2,}", line.strip())[0].split():
            if name.endswith("/"):
                folders[depth:] = [name]
            elif re.fullmatch(r"\w+\.(py|c|sh)", name):
                files.append("".join(folders[:depth]) + name)
    return files


def test_the_tree_names_every_module_in_its_package() -> None:
    tree = next(text for _, text in blocks(ROOT / "docs" / "architecture.md") if text.startswith("sslcli/\n"))
    found = [path for end in ("py", "c", "sh") for path in (ROOT / "sslcli").rglob(f"*.{end}")]
    modules = {str(path.relative_to(ROOT)) for path in found if path.name != "__init__.py"}
    assert sorted(modules) == sorted(_files_of_the_tree(tree))


def test_the_architecture_has_the_layers_in_their_order() -> None:
    page = ROOT / "docs" / "architecture.md"
    (layers,) = [text for _, text in blocks(page) if text.startswith("errors, config")]
    test = runpy.run_path(str(ROOT / "tests" / "test_layering.py"))
    assert tuple(re.findall(r"\w+", layers)) == test["ORDER"]
    tree = next(text for _, text in blocks(page) if text.startswith("sslcli/\n"))
    assert re.findall(r"^  (\w+)(?:/|\.py) ", tree, flags=re.MULTILINE) == list(test["ORDER"])


def test_every_field_of_a_view_is_documented_with_its_default() -> None:
    section = prose(ROOT / "docs" / "data.md").partition("### Fields of an entry\n")[2].partition("\n###")[0]
    documented = {row[0].strip("`"): yaml.safe_load(row[1].strip("`")) for row in rows(section)}
    expected = {field.name: field.default for field in fields(View)}
    assert documented == {key: list(value) if isinstance(value, tuple) else value for key, value in expected.items()}


COMMANDS = [(page, line) for page in PAGES for line in _commands(page)]


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{_name(page)}:{line}" for page, line in COMMANDS])
def test_every_command_composes(page: Path, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_examples(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    words = shlex.split(line, comments=True)
    if words[0] == "torchrun":
        module = words.index("-m") + 1
        words = [words[module].replace("sslcli.cli.", "ssl-"), *words[module + 1 :]]
    monkeypatch.setattr("sys.argv", words)
    jobs = compose.checked_jobs(words[0].removeprefix("ssl-"), command.read_arguments(words[0].removeprefix("ssl-")))
    assert jobs
    assert len(jobs) == 1 or "--multirun" in words


def test_pages_have_commands() -> None:
    assert len(_commands(ROOT / "README.md")) > 10
    assert any(line.startswith("torchrun") for line in _commands(ROOT / "README.md"))
    assert any("max_time=50m" in line for line in _commands(ROOT / "docs" / "reliability.md"))


def test_the_method_and_the_backbone_of_the_readme_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_examples(ROOT / "README.md", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    nets, methods = (importlib.import_module(name) for name in ("mynets", "mymethods"))
    from sslcli.backbones.wrap import as_backbone

    method = methods.Agree(as_backbone(nets.Tiny(width=4), image_size=16), dim=8)
    views = list(torch.rand(2, 6, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    scalars = method(Batch(views, torch.arange(6), torch.full((6,), -1)))
    scalars["loss"].backward()
    assert set(scalars) == {"loss", "agreement"}
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in method.parameters())
    assert [len(view) for view in method.embeddings] == [6, 6]


def test_every_test_that_the_table_of_faults_names_exists() -> None:
    code = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "reliability.md").read_text()))
    assert len(named) > 20
    assert [name for name in sorted(named) if f"def {name}(" not in code] == []
