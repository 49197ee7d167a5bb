"""`--help` and `--version`. The help text is read from the yaml files without importing Hydra, which is slow."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sslcli import __version__
from sslcli.config.folders import conf_folder, user_folders
from sslcli.config.plugins import plugin_folders
from sslcli.report.terminal import guard_terminal, print_text

TITLES = {
    "train": "ssl-train: pre-train a vision backbone without labels.",
    "eval": "ssl-eval: evaluate the features of a run, of all runs in a folder, or of a backbone file.",
    "embed": "ssl-embed: write the features of images to a file.",
    "export": "ssl-export: write the trained weights of a run, for sslcli or another tool.",
}
MULTIRUNS = ("train", "eval")  # commands that support --multirun
EXAMPLES = {
    "train": """\
  ssl-train                                             synthetic images, a small backbone, a few minutes
  ssl-train method=moco_v2 dataset=cifar10 backbone=resnet18 train.epochs=200
  ssl-train dataset=cifar10 dry_run=true                build everything and run two steps, without training
  ssl-train --multirun method=moco,simclr seed=0,1      every combination, each in a separate process""",
    "eval": """\
  ssl-eval run=runs/mine                                linear probe, on the dataset of the run
  ssl-eval run=runs/mine protocol=knn dataset=cifar10   another protocol, another dataset
  ssl-eval run=runs/mine launcher=multi                 on all GPUs of this machine
  ssl-eval run=runs/sweep                               a table of all runs in a folder
  ssl-eval weights=net.pt backbone=resnet18 dataset=cifar10""",
    "embed": """\
  ssl-embed run=runs/mine images=photos out=photos.parquet    all images in a folder
  ssl-embed run=runs/mine out=mine.npy                        the dataset of the run
  ssl-embed run=runs/mine dataset=cifar10 split=test out=test.parquet
  ssl-embed run=runs/mine dataset=list dataset.file=images.csv dataset.image_size=32 out=images.parquet""",
    "export": """\
  ssl-export run=runs/mine                              the backbone after the last step
  ssl-export run=runs/mine format=timm out=mine_timm    a folder that timm loads
  ssl-export run=runs/mine checkpoint=1000 what=method out=method.pt""",
}
MULTIRUN = """\
  -m, --multirun          run every combination of values given as key=a,b
"""
FLAGS = """\
  --cfg job [--resolve]   print the composed configuration and exit
  --config-dir DIR        a folder with your own yaml files, in subfolders named like the groups
  --info searchpath       print the folders that are searched for yaml files; also defaults-tree, plugins
  -sc install=bash        print a script for shell completion: eval "$(ssl-{name} -sc install=bash)"
  -h, --help              print this text; with GROUP=CHOICE, the keys of that choice
  --version"""
EXITS = {
    "train": """\
  0 done   2 invalid configuration or data   3 training failed   75 stopped and saved: run again to resume""",
    "eval": """\
  0 done   2 invalid configuration or data   3 a process died   75 stopped by a signal""",
    "embed": """\
  0 done, also if some images cannot be read (they are listed)   2 invalid configuration or data
  3 a data worker died, or the disk is full   75 stopped by a signal: run again to resume""",
    "export": """\
  0 done   2 invalid configuration, an unreadable or unwritable file, or other features   3 the disk is full""",
}


def answer(name: str, arguments: list[str]) -> str | None:
    """Return the text for `--help` or `--version`, or None if the command line has neither flag.

    `name` is train, eval, embed or export. `arguments` are the arguments of the command line.
    """
    if "--version" in arguments:
        return f"sslcli {__version__}"
    if not {"--help", "-h"} & set(arguments):
        return None
    folders = [*plugin_folders().values(), conf_folder() or Path(), *user_folders(arguments)]
    chosen = [part.partition("=")[::2] for part in arguments if "=" in part and not part.startswith("-")]
    files = [path for group, choice in chosen if (path := find_choice(folders, group, choice)) is not None]
    if files:
        return "\n\n".join(f"{path.parent.name}={path.stem}\n{indented(path.read_text('utf-8'))}" for path in files)
    return overview(name, folders)


def overview(name: str, folders: list[Path]) -> str:
    """Return the help text of a command: groups and choices, keys and defaults, flags, and exit codes.

    `name` is train, eval, embed or export. `folders` contain the yaml files.
    """
    text = ((conf_folder() or Path()) / f"{name}.yaml").read_text("utf-8")
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
    """Return the choices of a config group on one line, with the default in brackets.

    A choice is the name of a yaml file in the subfolder `group` of one of `folders`.
    """
    names = sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})
    return "  ".join(f"[{name}]" if name == default else name for name in names)


def find_choice(folders: list[Path], group: str, choice: str) -> Path | None:
    """Return the yaml file of a choice of a config group, or None if there is no such file.

    `folders` contains the folders of plug-ins, then the folder of sslcli, then the user's folder. If several folders
    contain the file, the last of these folders is used.
    """
    paths = [folder / group / f"{choice}.yaml" for folder in reversed(folders)]
    return next((path for path in paths if re.fullmatch(r"\w+/[\w-]+", f"{group}/{choice}") and path.is_file()), None)


def indented(text: str) -> str:
    """Return the text indented by two spaces, without leading and trailing empty lines."""
    return "\n".join(f"  {line}".rstrip() for line in text.strip("\n").splitlines())


def show_and_exit(name: str) -> None:
    """Print the text for `--help` or `--version` and exit. Do nothing if the command line has neither flag.

    `name` is the command: train, eval, embed or export.
    """
    text = answer(name, sys.argv[1:])
    if text is not None:
        guard_terminal()
        print_text(text)
        sys.exit(0)
