"""Validation of composed configurations: unknown keys, types, ranges and missing values.

Hydra does not check these. A config group is a top-level key such as `method`. Its value is called a node: a mapping
that in most groups has a key `_target_`, the name of a class. The other keys of the node are arguments of this class.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from sslcli.config.annotations import fits, words
from sslcli.config.checks import check_range
from sslcli.config.folders import conf_folder
from sslcli.config.messages import missing_message, unknown_message
from sslcli.config.run_config import LAUNCHERS
from sslcli.config.settings import (
    LARGEST_SEED,
    EmbedSettings,
    EvalSettings,
    ExportSettings,
    LauncherSettings,
    MonitorSettings,
    RunSettings,
    SweepSettings,
    TrainSettings,
)
from sslcli.config.signatures import METHOD_ARGUMENTS, OPTIMIZER_ARGUMENTS, parameters_of
from sslcli.config.slurm import SlurmSettings
from sslcli.config.targets import check_target, targets, trust_list
from sslcli.errors import ConfigError

GROUPS = {  # config groups of each command; groups in OPTIONAL may be omitted
    "train": ("method", "dataset", "backbone", "views", "optimizer", "launcher", "monitor", "mixture", "experiment"),
    "eval": ("protocol", "dataset", "backbone", "launcher"),
    "embed": ("dataset", "backbone"),
    "export": (),
}
OPTIONAL = {
    "train": ("mixture", "experiment"),
    "eval": ("dataset", "backbone"),
    "embed": ("dataset", "backbone"),
    "export": (),
}
BUILT = ("method", "dataset", "backbone", "views", "optimizer", "protocol")  # groups with a `_target_`
PLAIN: dict[str, type] = {
    "train": RunSettings,
    "eval": EvalSettings,
    "embed": EmbedSettings,
    "export": ExportSettings,
}  # top-level keys outside of groups
HEADER = "a yaml that sets keys outside its own group begins with the line: # @package _global_"


def check(command: str, config: dict[str, Any]) -> None:
    """Raise ConfigError unless `config`, the composed configuration of a command, is valid.

    `command` is train, eval, embed or export. The message names the key, the allowed values, and the closest valid
    name.
    """
    plain = [f.name for f in fields(PLAIN[command])]
    sections = ["train", "sweep"] if command == "train" else []
    if "experiment" in config:
        raise ConfigError(f"the chosen experiment sets only keys below `experiment`, which have no effect: {HEADER}")
    if "mixture" in config:
        raise ConfigError(
            "keys below `mixture` have no effect: on the command line write method.mixture.KEY, and begin a yaml of "
            "your own with the line: # @package method.mixture"
        )
    check_keys("", config, [*plain, *sections, *GROUPS[command]])
    trust = trust_list(config.get("trust", []))
    for where, target in targets("", config):
        check_target(target, trust, where)
    build_settings(PLAIN[command], {name: config[name] for name in plain if name in config}, "")
    if config.get("teacher_backbone") is not None:
        check_has_target("teacher_backbone", config["teacher_backbone"])
        check_node("teacher_backbone", config["teacher_backbone"])
    for group in GROUPS[command]:
        if config.get(group) is not None or group not in OPTIONAL[command]:
            check_group(group, config.get(group))
    if command == "train":
        train = build_settings(TrainSettings, config.get("train"), "train")
        build_settings(MonitorSettings, config["monitor"], "monitor")
        build_settings(SweepSettings, config.get("sweep"), "sweep")
        check_split(train, build_launcher(config["launcher"]))
    elif command == "eval":
        build_launcher(config["launcher"])


def check_group(group: str, node: Any) -> None:
    """Raise ConfigError unless `node`, the value of the config group `group`, is a valid mapping.

    If `group` is in `BUILT`, the mapping must have a `_target_`, the name of a class. The other keys must be keywords
    of this class, and their values must have the right types.
    """
    if node is None:
        raise ConfigError(f"{group} is missing: choose one with {group}=...")
    if isinstance(node, str):
        raise ConfigError(
            f"{group} is {node!r}, but it must be a mapping of keys to values. To choose a file of this group in a "
            f"yaml file of your own, write `- override /{group}: {node}` in the defaults list of the file"
        )
    if group in BUILT:
        check_has_target(group, node)
        check_node(group, node)
    elif not isinstance(node, dict):
        raise ConfigError(f"{group} is {node!r}, but it must be a mapping of keys to values")


def check_has_target(where: str, node: Any) -> None:
    """Raise ConfigError unless `node` is a mapping with a key `_target_`.

    `where` is the dotted key of the node, for the message.
    """
    if not isinstance(node, dict):
        raise ConfigError(f"{where} is {node!r}, but it must be a mapping of keys to values")
    if "_target_" not in node:
        raise ConfigError(f"{where} has no _target_, the name of its class; {HEADER}")


def check_node(where: str, node: dict[str, Any]) -> None:
    """Raise ConfigError unless the keys and types of a node with a `_target_`, and of its inner nodes, are valid.

    The keys must be keywords of the class that `_target_` names, and the values must fit the annotations. All required
    keywords must be set. If the class is not part of sslcli and its keywords cannot be determined from its source text,
    they are not checked. `where` is the dotted key of the node, for the message.
    """
    for name, value in node.items():
        if isinstance(value, dict) and "_target_" in value:
            check_node(f"{where}.{name}", value)
    target = node["_target_"]
    parameters = parameters_of(target)
    if parameters is None:
        if target.startswith("sslcli."):
            raise ConfigError(f"{where}._target_ is {target!r}, but there is no such class in sslcli")
        return
    if where == "method":
        check_mixture(node, takes_one="mixture" in parameters)
    values = {name: value for name, value in node.items() if name != "_target_"}
    injected = {"method": METHOD_ARGUMENTS, "optimizer": OPTIMIZER_ARGUMENTS}.get(where, ())
    allowed = {name: parameter.annotation for name, parameter in parameters.items() if name not in injected}
    check_keys(where, values, allowed)
    check_types(where, values, allowed)
    if "seed" in allowed:
        check_range(f"{where}.seed", values.get("seed"), least=0, most=LARGEST_SEED)
    missing = [name for name in allowed if parameters[name].required and name not in values]
    if missing:
        raise ConfigError(missing_message(where, missing))


def check_mixture(method: dict[str, Any], *, takes_one: bool) -> None:
    """Raise ConfigError if `method.mixture` is set for a method that has no parameter `mixture`.

    ConfigError is also raised if the value is a string. A mixture is a config group: its yaml file is chosen with
    `mixture=NAME`.

    Args:
        method: the value of the config group `method`.
        takes_one: True if the constructor of the method has the parameter `mixture`.
    """
    mixture = method.get("mixture")
    if mixture is not None and not takes_one:
        files = sorted((conf_folder() or Path()).glob("method/*.yaml"))
        takers = [path.stem for path in files if re.search(r"^  mixture:", path.read_text("utf-8"), re.MULTILINE)]
        raise ConfigError(
            f"method.mixture: {method['_target_']} does not support a mixture. Methods that support one: "
            f"{', '.join(takers)}"
        )
    if isinstance(mixture, str):
        raise ConfigError(
            f"method.mixture is {mixture!r}, but a mixture is chosen by its group: write mixture={mixture}"
        )


def check_keys(where: str, node: dict[str, Any], known: Iterable[str]) -> None:
    """Raise ConfigError if a key of the mapping `node` is not in `known`.

    `where` is the dotted key of the mapping, for the message.
    """
    names = set(known)
    for key in node:
        if key not in names:
            raise ConfigError(unknown_message(where, str(key), names))


def check_types(where: str, node: dict[str, Any], annotations: dict[str, str]) -> None:
    """Raise ConfigError if a value of the mapping `node` does not fit the annotation of its key.

    `where` is the dotted key of the mapping, for the message. `annotations` maps keys to annotations as text. Values of
    other keys are not checked.
    """
    for key, value in node.items():
        path = f"{where}.{key}" if where else key
        if key in annotations and not fits(value, annotations[key]):
            as_text = isinstance(value, (int, float)) and fits(str(value), annotations[key])
            quoted = f""". For the string, write {path}='"{value}"'""" if as_text else ""
            raise ConfigError(f"{path} is {value!r}, but it must be {words(annotations[key])}{quoted}")


def build_settings(kind: type, node: Any, where: str) -> Any:
    """Return an instance of the settings class `kind` with the values of the mapping `node`.

    `where` is the dotted key of the mapping, for the message. Raises ConfigError if a key is unknown, missing or
    invalid.
    """
    annotations = {f.name: str(f.type) for f in fields(kind)}
    if not isinstance(node, dict):
        raise ConfigError(f"{where} is {node!r}, but it must be a mapping with the keys: {', '.join(annotations)}")
    check_keys(where, node, annotations)
    check_types(where, node, annotations)
    missing = [f.name for f in fields(kind) if f.name not in node and f.default is MISSING]
    if missing:
        raise ConfigError(missing_message(where, missing))
    return kind(**node)


def build_launcher(node: dict[str, Any]) -> LauncherSettings:
    """Return the settings of a launcher from `node`, the value of the config group `launcher`.

    Raises ConfigError if a key of `node` is unknown or missing, or if a value is invalid.
    """
    kind = node.get("kind")
    if kind not in LAUNCHERS:
        raise ConfigError(f"launcher.kind is {kind!r}, but it must be one of: {', '.join(LAUNCHERS)}")
    settings: LauncherSettings = build_settings(LAUNCHERS[kind], node, "launcher")
    return settings


def check_split(train: TrainSettings, launcher: LauncherSettings) -> None:
    """Raise ConfigError unless the batch of a Slurm job splits evenly over its processes and micro-batches.

    This function does not check other launchers.
    """
    if isinstance(launcher, SlurmSettings):
        processes = launcher.nodes * launcher.processes
        if train.batch_size % (processes * train.accumulate):
            raise ConfigError(
                f"train.batch_size is {train.batch_size}, but it must split evenly into {train.accumulate} "
                f"micro-batches on {processes} processes ({launcher.nodes} nodes with {launcher.processes} each): "
                f"choose a multiple of {processes * train.accumulate}"
            )
