"""Hydra's complaints in the words of a command line: the culprit, what there is, and the nearest name."""

from __future__ import annotations

import re
import sys
from functools import cache

from hydra._internal.hydra import Hydra
from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf

from sslcli.config import schema
from sslcli.config.keys import check_path
from sslcli.config.moved import CHOICES
from sslcli.config.signatures import parameters_of
from sslcli.config.targets import check_target, trusted_by
from sslcli.errors import ConfigError, nearest

EXTRAS = {  # choices that a plugin of Hydra brings, and the extra that installs it
    "hydra/launcher/submitit_slurm": "slurm",
    "hydra/launcher/submitit_local": "slurm",
    "hydra/launcher/joblib": "joblib",
    "hydra/launcher/ray": "ray",
    "hydra/sweeper/optuna": "optuna",
}


def one_line(error: object) -> str:
    """A message without line breaks and advertisements."""
    text = " ".join(str(error).split())
    return re.sub(r" ?(See https?://\S+ for details\.?|Config search path:.*|full_key: .*)", "", text).rstrip(" .")


@cache
def print_note(command: str, note: str) -> None:
    """Print a note on an old name to standard error, once per process."""
    print(f"ssl-{command}: {note}; the old name is still accepted", file=sys.stderr)


def unreadable(line: str, error: BaseException | None = None) -> str:
    """The message for an override that cannot be parsed."""
    if "=" not in line.strip()[1:]:
        return f"cannot read {line!r} in the command line: settings are written key=value, as in train.epochs=5"
    key, _, value = line.partition("=")
    if not re.fullmatch(r"[+~]*[\w./@:-]+", key):
        return f"cannot read {line!r} in the command line: a key is names joined by dots, an element of a list is key.0"
    return (
        f"cannot read {line!r} in the command line ({one_line(error or '')}): a value with =, brackets, quotes or "
        f"""spaces is quoted twice, once for the shell: {key}='"{value.strip("'").replace('"', "")}"'"""
    )


def missing(error: MissingConfigException) -> str:
    """The message for a choice, or a whole configuration, that does not exist."""
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    options = [each for each in error.options or () if each not in CHOICES.get(group, {})]
    if error.missing_cfg_file in EXTRAS:
        return f"{group}={choice} needs a plugin of Hydra: pip install 'sslcli[{EXTRAS[error.missing_cfg_file]}]'"
    if group and options:
        return f"{group}={choice}: there is no such choice.{nearest(choice, options)} Choices: {', '.join(options)}"
    if group:
        return f"{group}={choice}: there is no such choice, nor any other in that group"
    return f"--config-name is {choice!r}, but no folder that is searched holds {choice}.yaml: try --info searchpath"


def readable(error: BaseException, *, groups: tuple[str, ...]) -> str:
    """Any other complaint of Hydra's in one line, its advice on plus signs left out."""
    told = one_line(error)
    if error.__cause__ is not None:
        told += f" ({one_line(error.__cause__)})"
    present = re.search(r"An item is already at '([^']+)'", told)
    if present:
        return f"{present[1]} has a value already: leave out the plus sign to change it"
    told = re.sub(r"\.? To append to your (config|default list) use \S+", "", told)
    group = re.search(r"Could not override '(\w+)'\. No match in the defaults list", told)
    return f"{told}.{nearest(group[1], groups)} Groups: {', '.join(groups)}" if group else told


def is_choice(override: Override, engine: Hydra) -> bool:
    """Whether an override chooses from a group, and does not set a value."""
    key = group_of(override)
    return "/" in key or key == "hydra.searchpath" or key in engine.config_loader.list_groups("")


def group_of(override: Override) -> str:
    """The key of an override without its sign and package."""
    return override.get_key_element().split("@")[0].lstrip("+~")


def check_choices(command: str, overrides: list[Override], engine: Hydra) -> None:
    """Refuse what Hydra answers with a stack of calls or a riddle: no choice at all, a group of another command."""
    own, others = schema.GROUPS[command], {group for groups in schema.GROUPS.values() for group in groups}
    for override in overrides:
        group = group_of(override)
        if group in others and group not in own:
            raise ConfigError(f"{group}: ssl-{command} has no such group. Groups: {', '.join(own)}")
        chosen = group in own or group.startswith("hydra/")
        if chosen and not override.is_delete() and override.value() is None:
            options = engine.config_loader.get_group_options(group)
            raise ConfigError(f"{group} needs a choice, or is left out. Choices: {', '.join(options)}")


def check_overrides(command: str, overrides: list[Override], base: DictConfig) -> None:
    """Raise ConfigError for the first override that cannot be meant; `base` holds the choices without any values."""
    given = [override.value() for override in overrides if group_of(override) == "trust"]
    trust = trusted_by(given[-1] if given else OmegaConf.to_container(base).get("trust", []))  # type: ignore[union-attr]
    for override in overrides:
        path = group_of(override)
        if path.rpartition(".")[2] == "_target_" and not override.is_delete():
            check_target(override.value(), trust, path)
    for override in overrides:
        if not group_of(override).startswith("hydra."):
            signed = override.is_add() or override.is_force_add() or override.is_delete()
            check_path(command, group_of(override), base, signed=signed)


def check_deletions(overrides: list[Override], config: DictConfig) -> None:
    """Refuse to delete a hyper-parameter: the constructor's own default, which no yaml shows, would take its place."""
    for override in overrides:
        where, _, name = group_of(override).rpartition(".")
        target = OmegaConf.select(config, f"{where}._target_") if override.is_delete() and where else None
        if isinstance(target, str) and name in (parameters_of(target) or ()):
            raise ConfigError(f"~{where}.{name}: a setting cannot be deleted, as config.yaml shows all: give a value")
