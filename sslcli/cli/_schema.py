"""The second look at a composed configuration, which Hydra does not take: unknown keys, wrong types, wrong ranges."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, fields
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Any

from sslcli.cli._signature import INJECTED, fits, parameters_of
from sslcli.errors import ConfigError
from sslcli.settings import MonitorSettings, RunSettings, TrainSettings

GROUPS = {
    "train": ("backbone", "dataset", "views", "optimizer", "launcher", "monitor", "method", "train"),
    "eval": ("dataset", "backbone", "protocol"),
}
EVAL_KEYS: dict[str, str] = {
    "run": "str | None",
    "weights": "str | None",
    "checkpoint": "str | int",
    "device": "str",
    "precision": "str",
    "batch_size": "int",
    "workers": "int | None",
    "baselines": "bool",
    "cache": "bool",
    "trust": "list[str]",
}
LAUNCHER_KEYS = {
    "local": {"kind": "str", "threads": "int | None"},
    "multi": {"kind": "str", "threads": "int | None", "processes": "int | None"},
}


def nearest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` or nothing."""
    found = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""


def trusted_packages(trust: Iterable[str]) -> list[str]:
    """Packages whose classes a `_target_` may name: ours, torch.optim, announced plugins, and those the user trusts."""
    plugins = [entry.value.split(":")[0].split(".")[0] for entry in entry_points(group="sslcli.plugins")]
    return ["sslcli", "torch.optim", *plugins, *trust]


def check_target(target: Any, trust: Iterable[str], where: str) -> None:
    """Raise ConfigError unless `target` lies in a trusted package."""
    packages = trusted_packages(trust)
    if not isinstance(target, str) or not any(target.startswith(package + ".") for package in packages):
        raise ConfigError(
            f"{where} is {target!r}, but classes are built only from trusted packages: {', '.join(packages)}. If you "
            f"know that package, add trust=[{str(target).split('.')[0]}]"
        )


def check(command: str, config: dict[str, Any]) -> None:
    """Raise ConfigError, naming the key, what is allowed and the nearest name, unless the configuration is sound."""
    if command == "train":
        plain = {f.name for f in fields(RunSettings)}
        check_keys("", config, plain | set(GROUPS["train"]))
        settings(RunSettings, {name: config[name] for name in plain if name in config}, "")
        settings(TrainSettings, config["train"], "train")
        settings(MonitorSettings, config["monitor"], "monitor")
        launcher(config["launcher"])
    else:
        check_keys("", config, set(EVAL_KEYS) | set(GROUPS["eval"]))
        check_types("", config, EVAL_KEYS)
        if config["batch_size"] < 1:
            raise ConfigError(f"batch_size is {config['batch_size']}, but it must be at least 1")
    for group in GROUPS[command]:
        node = config.get(group)
        if isinstance(node, dict) and "_target_" in node:
            check_node(group, node, config["trust"])


def check_node(where: str, node: dict[str, Any], trust: Iterable[str]) -> None:
    """Check the keys and types of a node with a `_target_`, and of the nodes inside it."""
    check_target(node["_target_"], trust, f"{where}._target_")
    for name, value in node.items():
        if isinstance(value, dict) and "_target_" in value:
            check_node(f"{where}.{name}", value, trust)
    parameters = parameters_of(node["_target_"])
    if parameters is None:
        if node["_target_"].startswith("sslcli."):
            raise ConfigError(f"{where}._target_ is {node['_target_']!r}, but there is no such class in sslcli")
        return
    given = {name: value for name, value in node.items() if name != "_target_"}
    allowed = {name: parameter.annotation for name, parameter in parameters.items() if name not in INJECTED}
    check_keys(where, given, allowed)
    check_types(where, given, allowed)
    optional = {"params", *INJECTED}
    missing = [n for n, p in parameters.items() if p.required and n not in given and n not in optional]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}: set {where}.{missing[0]}=...")


def check_keys(where: str, node: dict[str, Any], known: Iterable[str]) -> None:
    """Raise ConfigError for a key that is not known."""
    names = sorted(known)
    for key in node:
        if key not in names:
            path = f"{where}.{key}" if where else key
            raise ConfigError(
                f"{path}: there is no such key.{nearest(key, names)} Known{f' in {where}' if where else ''}: "
                + ", ".join(names)
            )


def check_types(where: str, node: dict[str, Any], annotations: dict[str, str]) -> None:
    """Raise ConfigError for a value that cannot be what the annotation says."""
    for key, value in node.items():
        path = f"{where}.{key}" if where else key
        if value == "???":
            raise ConfigError(f"{path} has no value, but it must be given: {path}=...")
        if key in annotations and not fits(value, annotations[key]):
            raise ConfigError(f"{path} is {value!r}, but it must be {annotations[key].replace(' | ', ' or ')}")


def settings(kind: type, node: dict[str, Any], where: str) -> Any:
    """An instance of a settings class from a node."""
    annotations = {f.name: str(f.type) for f in fields(kind)}
    check_keys(where, node, annotations)
    check_types(where, node, annotations)
    missing = [f.name for f in fields(kind) if f.name not in node and f.default is MISSING]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}: set {where}.{missing[0]}=...")
    return kind(**node)


def launcher(node: dict[str, Any]) -> None:
    """Check the keys of a launcher."""
    kind = node.get("kind")
    if kind not in LAUNCHER_KEYS:
        raise ConfigError(f"launcher.kind is {kind!r}, but it must be one of: {', '.join(LAUNCHER_KEYS)}")
    check_keys("launcher", node, LAUNCHER_KEYS[kind])
    check_types("launcher", node, LAUNCHER_KEYS[kind])
    for name in ("threads", "processes"):
        if node.get(name) is not None and node[name] < 1:
            raise ConfigError(f"launcher.{name} is {node[name]}, but it must be at least 1")
