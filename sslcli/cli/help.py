"""`--help` and `--version`, answered from the text of the yaml files: no import of Hydra, so that they come at once."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sslcli import __version__
from sslcli.config.folders import folder_of_conf, own_folders
from sslcli.config.plugins import conf_of_plugins
from sslcli.report.terminal import guard_terminal

TITLES = {
    "train": "ssl-train: pre-train a vision backbone without labels.",
    "eval": "ssl-eval: measure the features of a run, of a folder of runs, or of a bare backbone file.",
    "export": "ssl-export: one plain file of what a run trained.",
}
MULTIRUNS = ("train", "eval")  # the commands that may be given several values of a key
EXAMPLES = {
    "train": """\
  ssl-train                                             the embedded images, a small net, a few minutes
  ssl-train method=moco_v2 dataset=cifar10 backbone=resnet18 train.epochs=200
  ssl-train dataset=cifar10 dry_run=true                what would happen, measured; trains nothing
  ssl-train --multirun method=moco,simclr seed=0,1      every combination, each in a process of its own""",
    "eval": """\
  ssl-eval run=runs/mine                                the linear probe, on the run's own images
  ssl-eval run=runs/mine protocol=knn dataset=cifar10   another protocol, another data set
  ssl-eval run=runs/sweep                               a table of all runs in a folder
  ssl-eval weights=net.pt backbone=resnet18 dataset=cifar10""",
    "export": """\
  ssl-export run=runs/mine                              the backbone after the last step
  ssl-export run=runs/mine checkpoint=1000 what=method out=method.pt""",
}
MULTIRUN = """\
  -m, --multirun          run every combination of values given as key=a,b
"""
FLAGS = """\
  --cfg job [--resolve]   print the configuration that the command line comes to
  --config-dir DIR        a folder with yaml files of your own, in folders named like the groups
  --info searchpath       where yaml files are looked for; also defaults-tree, plugins
  -sc install=bash        print a script for shell completion: eval "$(ssl-{name} -sc install=bash)"
  -h, --help              this text; with GROUP=CHOICE, the keys of that choice
  --version"""
EXITS = {
    "train": """\
  0 done   2 the configuration or the data is wrong   3 training failed   75 stopped and saved: run again to go on""",
    "eval": """\
  0 done   2 the configuration or the data is wrong   3 a data worker died""",
    "export": """\
  0 done   2 the configuration is wrong, or a file cannot be read or written""",
}


def answer(name: str, arguments: list[str]) -> str | None:
    """The text that `--help` or `--version` asks for, None where the command line asks for neither."""
    if "--version" in arguments:
        return f"sslcli {__version__}"
    if not {"--help", "-h"} & set(arguments):
        return None
    folders = [*conf_of_plugins().values(), folder_of_conf() or Path(), *own_folders(arguments)]
    chosen = [part.partition("=")[::2] for part in arguments if "=" in part and not part.startswith("-")]
    files = [path for group, choice in chosen if (path := find_choice(folders, group, choice)) is not None]
    if files:
        return "\n\n".join(f"{path.parent.name}={path.stem}\n{indented(path.read_text('utf-8'))}" for path in files)
    return overview(name, folders)


def overview(name: str, folders: list[Path]) -> str:
    """What a command does, its groups with their choices, its keys with their defaults, its flags."""
    text = ((folder_of_conf() or Path()) / f"{name}.yaml").read_text("utf-8")
    defaults = dict(re.findall(r"^  - (\w+): (\w+)", text, re.MULTILINE))
    keys = re.sub(r"^(#.*\n)*defaults:\n(  .*\n)+", "", text, count=1).partition("\nhydra:\n")[0]
    groups = "\n".join(f"  {group:10s} {listed(folders, group, default)}" for group, default in defaults.items())
    flags = (MULTIRUN if name in MULTIRUNS else "") + FLAGS.replace("{name}", name)
    parts = [
        TITLES[name],
        f"usage: ssl-{name} {'[GROUP=CHOICE ...] ' if groups else ''}[KEY=VALUE ...] [FLAG ...]\n{EXAMPLES[name]}",
        *([f"groups and their choices, the default in brackets:\n{groups}"] if groups else []),
        f"keys and their defaults:\n{indented(keys)}",
        f"flags:\n{flags}",
        f"exit codes:\n{EXITS[name]}",
    ]
    return "\n\n".join(parts)


def listed(folders: list[Path], group: str, default: str) -> str:
    """The choices of a group on one line."""
    names = sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})
    return "  ".join(f"[{name}]" if name == default else name for name in names)


def find_choice(folders: list[Path], group: str, choice: str) -> Path | None:
    """The yaml file of a choice, in the last folder that has it: the user's own before ours, ours before a plugin's."""
    paths = [folder / group / f"{choice}.yaml" for folder in reversed(folders)]
    return next((path for path in paths if re.fullmatch(r"\w+/[\w-]+", f"{group}/{choice}") and path.is_file()), None)


def indented(text: str) -> str:
    """The text two columns to the right, without empty lines around it."""
    return "\n".join(f"  {line}".rstrip() for line in text.strip("\n").splitlines())


def show_and_exit(name: str) -> None:
    """Answer `--help` and `--version` and end; return where the command line asks for neither."""
    text = answer(name, sys.argv[1:])
    if text is not None:
        guard_terminal()
        print(text, flush=True)
        sys.exit(0)
