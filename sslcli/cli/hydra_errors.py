"""One-line error messages for invalid overrides. The messages replace Hydra's errors and list the allowed names."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterable
from functools import cache
from itertools import product
from pathlib import Path

from hydra._internal.hydra import Hydra
from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf

from sslcli.config import schema
from sslcli.config.keys import check_path
from sslcli.config.moved import CHOICES
from sslcli.config.signatures import parameters_of
from sslcli.config.targets import check_target, trust_list
from sslcli.errors import ConfigError, nearest
from sslcli.report.terminal import print_text

PLUGINS = {  # choice of a Hydra plugin -> package that contains the plugin
    "hydra/launcher/submitit_slurm": "hydra-submitit-launcher",
    "hydra/launcher/submitit_local": "hydra-submitit-launcher",
    "hydra/launcher/joblib": "hydra-joblib-launcher",
    "hydra/launcher/ray": "hydra-ray-launcher",
    "hydra/sweeper/optuna": "hydra-optuna-sweeper",
}


ALL_GROUPS = {group for groups in schema.GROUPS.values() for group in groups}
IN_DEFAULTS = "To choose it in a yaml file of your own, write `- override /{}: {}` in the defaults list of the file"


def one_line(error: object) -> str:
    """Return an error message without line breaks, links and search paths."""
    text = " ".join(str(error).split())
    return re.sub(r" ?(See https?://\S+ for details\.?|Config search path:.*|full_key: .*)", "", text).rstrip(" .")


@cache
def print_note(command: str, note: str) -> None:
    """Print a note about a name of version 0.1 to standard error. The same note is printed once per process.

    `command` is train, eval, embed or export. `note` states the old and the current name.
    """
    print_text(f"ssl-{command}: {note}; the old name is still accepted", to_stderr=True)


def unreadable(line: str, error: BaseException | None = None) -> str:
    """Return the message for an override that cannot be parsed. `error` is Hydra's error, if there is one."""
    if "=" not in line.strip()[1:]:
        return f"cannot read {line!r} in the command line: settings are written key=value, as in train.epochs=5"
    key, _, value = line.partition("=")
    if not re.fullmatch(r"[+~]*[\w./@:-]+", key):
        return (
            f"cannot read {line!r} in the command line: a key consists of names separated by dots, and an element of a "
            "list is written key.0"
        )
    return (
        f"cannot read {line!r} in the command line ({one_line(error or '')}): quote a value with =, brackets, quotes, "
        "spaces or letters other than a to z twice, once for the shell: "
        f"""{key}='"{value.strip("'").replace('"', "")}"'"""
    )


def missing(error: MissingConfigException) -> str:
    """Return the message for a yaml file that does not exist.

    The file is a choice of a config group, as in `method=NAME`, or the file that `--config-name` names.
    """
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    options = [each for each in error.options or () if each not in CHOICES.get(group, {})]
    if error.missing_cfg_file in PLUGINS:
        return f"{group}={choice} needs a Hydra plugin: pip install {PLUGINS[error.missing_cfg_file]}"
    inner = group.rpartition("/")[2]
    if "/" in group and inner in ALL_GROUPS and not options:
        return f"{group}={choice}: there is no such group. {IN_DEFAULTS.format(inner, choice)}"
    if group and options:
        return f"{group}={choice}: there is no such choice.{nearest(choice, options)} Choices: {', '.join(options)}"
    if group:
        return f"{group}={choice}: there is no such choice, and the group {group} has no choices"
    return f"--config-name is {choice!r}, but no folder of the search path has {choice}.yaml: see --info searchpath"


def readable(error: BaseException, *, groups: tuple[str, ...]) -> str:
    """Return the message for an error of Hydra or OmegaConf that the other functions of this module do not handle.

    Hydra's messages advise the user to add a plus sign to the override. This advice is removed. `groups` are the config
    groups of the command.
    """
    message = one_line(error)
    if error.__cause__ is not None:
        message += f" ({one_line(error.__cause__)})"
    present = re.search(r"An item is already at '([^']+)'", message)
    if present:
        return f"{present[1]} already has a value: remove the plus sign to change it"
    message = re.sub(r"\.? To append to your (config|default list) use \S+", "", message)
    several = re.search(r"Multiple values for (\w+)\. To override a value use 'override \w+: (\S+)'", message)
    if several:
        command_line = f"On the command line, write {several[1]}={several[2]} without a plus sign"
        return f"{several[1]} has two choices. {IN_DEFAULTS.format(several[1], several[2])}. {command_line}"
    nested = re.search(r"Could not override '\w+/(\w+)(?:@\S*)?'\. No match in the defaults list", message)
    if nested and nested[1] in ALL_GROUPS:
        return f"{message}. {IN_DEFAULTS.format(nested[1], 'NAME')}"
    group = re.search(r"Could not override '(\w+)'\. No match in the defaults list", message)
    return f"{message}.{nearest(group[1], groups)} Groups: {', '.join(groups)}" if group else message


def check_files(lines: Iterable[str], folders: Iterable[Path]) -> None:
    """Raise ConfigError if an override chooses a yaml file that Hydra misreads. Only `folders` are searched.

    `lines` are the overrides of the command line. Hydra ignores files with the extension .yml. If a file begins with a
    byte order mark, Hydra ignores its header line `# @package`. Hydra's own messages would not name the cause.
    """
    for line in lines:
        group, _, choices = line.lstrip("+").partition("=")
        for choice, folder in product(choices.split(","), folders):
            path = folder / group.partition("@")[0] / choice.strip()
            file, other = f"{path}.yaml", f"{path}.yml"
            if os.path.isfile(file):
                check_encoding(file)
            elif os.path.isfile(other):
                raise ConfigError(f"{group}={choice}: {other} has the ending .yml: rename it to {path.name}.yaml")


def check_encoding(file: str) -> None:
    """Raise ConfigError if a yaml file is encoded as UTF-16, or if Hydra would ignore its line `# @package`.

    Hydra ignores this line if the file begins with a byte order mark.
    """
    with open(file, "rb") as opened:
        start = opened.read(4096)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ConfigError(f"{file} is encoded as UTF-16: save it as UTF-8")
    if start.startswith(codecs.BOM_UTF8) and re.match(rb"(\s*#.*\n)*\s*#\s*@package", start[len(codecs.BOM_UTF8) :]):
        raise ConfigError(f"{file} begins with a byte order mark, which hides its line # @package: save it without BOM")


def is_choice(override: Override, engine: Hydra) -> bool:
    """Return True if an override chooses a yaml file of a config group, and False if it sets the value of a key."""
    key = group_of(override)
    return "/" in key or key == "hydra.searchpath" or key in engine.config_loader.list_groups("")


def group_of(override: Override) -> str:
    """Return the key of an override, or its config group if the override chooses a yaml file.

    Example: `+views@a=moco_v2` -> `views`.

    The prefix (`+`, `++` or `~`) and the package after `@` are removed.
    """
    return override.get_key_element().split("@")[0].lstrip("+~")


def check_choices(command: str, overrides: list[Override], engine: Hydra) -> None:
    """Raise ConfigError if an override names a config group of another command, or a config group without a choice.

    `command` is train, eval, embed or export. An override without a choice is, for example, `method=null`. Hydra
    reports both errors with an unclear message or a traceback.
    """
    own, others = schema.GROUPS[command], {group for groups in schema.GROUPS.values() for group in groups}
    for override in overrides:
        group = group_of(override)
        if group in others and group not in own:
            raise ConfigError(f"{group}: ssl-{command} has no such group. Groups: {', '.join(own)}")
        chosen = group in own or group.startswith("hydra/")
        if chosen and not override.is_delete() and override.value() is None:
            options = engine.config_loader.get_group_options(group)
            raise ConfigError(f"{group} needs a choice: set one, or remove {group}. Choices: {', '.join(options)}")


def check_overrides(command: str, overrides: list[Override], base: DictConfig) -> None:
    """Raise ConfigError if one of the overrides is invalid. The message is about the first invalid override.

    `command` is train, eval, embed or export. `base` is the configuration that is composed from the chosen yaml files,
    without the overrides that set values.
    """
    values = [override.value() for override in overrides if group_of(override) == "trust"]
    trust = trust_list(values[-1] if values else OmegaConf.to_container(base).get("trust", []))  # type: ignore[union-attr]
    for override in overrides:
        path = group_of(override)
        if path.rpartition(".")[2] == "_target_" and not override.is_delete():
            check_target(override.value(), trust, path)
    for override in overrides:
        if not group_of(override).startswith("hydra."):
            may_add = override.is_add() or override.is_force_add() or override.is_delete()
            check_path(command, group_of(override), base, may_add=may_add)


def check_deletions(overrides: list[Override], config: DictConfig) -> None:
    """Raise ConfigError if an override such as `~method.temperature` deletes a hyperparameter.

    In this example, `method._target_` names a class. Without the key `temperature`, the constructor of this class would
    use its own default, which no yaml file shows. `config` is the composed configuration.
    """
    for override in overrides:
        where, _, name = group_of(override).rpartition(".")
        target = OmegaConf.select(config, f"{where}._target_") if override.is_delete() and where else None
        if isinstance(target, str) and name in (parameters_of(target) or ()):
            raise ConfigError(f"~{where}.{name}: a setting cannot be deleted: set it to a value instead")
