"""Typed configurations of the commands.

They are created from plain values. Other modules compose these values from yaml files and the command line, and
validate them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from sslcli.config.settings import (
    EmbedSettings,
    EvalSettings,
    ExportSettings,
    LauncherSettings,
    MonitorSettings,
    MultiSettings,
    NetworkSettings,
    RunSettings,
    TrainSettings,
)
from sslcli.config.slurm import SlurmSettings

Node = dict[str, Any]  # plain values of a config group; the key `_target_` names the class
LAUNCHERS: dict[str, type[LauncherSettings]] = {  # value of `launcher.kind` -> class of its settings
    "local": LauncherSettings,
    "multi": MultiSettings,
    "slurm": SlurmSettings,
}


@dataclass(frozen=True, kw_only=True)
class RunConfig(RunSettings):
    """Configuration of ssl-train: top-level keys, sections, and one node for each config group with a `_target_`.

    The sections are `train`, `monitor` and `launcher`.

    A node is a mapping. Its key `_target_` names a class, and its other keys are arguments of the constructor.

    Attributes:
        values: all settings as plain values, for `config.yaml`, checkpoints and comparisons.
        choices: the name of the chosen yaml file of each config group.
        digest: digest of the overrides that affect the results. The name of the default run directory contains it.
        overrides: overrides of the command line, such as `train.epochs=5`.
    """

    train: TrainSettings
    monitor: MonitorSettings
    launcher: LauncherSettings
    method: Node
    dataset: Node
    backbone: Node
    views: Node
    optimizer: Node
    values: dict[str, Any]
    choices: dict[str, str]
    digest: str
    overrides: list[str]

    @classmethod
    def from_plain(cls, config: dict[str, Any]) -> RunConfig:
        """Convert a configuration from dictionaries and JSON values to a `RunConfig`.

        `config` is the validated configuration of one job, or a result of `plain()`.
        """
        values = {key: value for key, value in config.items() if not key.startswith("_")}
        nodes = {key: values[key] for key in ("method", "dataset", "backbone", "views", "optimizer")}
        return cls(
            **{f.name: values[f.name] for f in fields(RunSettings) if f.name in values},
            **nodes,
            train=TrainSettings(**values["train"]),
            monitor=MonitorSettings(**values["monitor"]),
            launcher=LAUNCHERS[values["launcher"]["kind"]](**values["launcher"]),
            values=values,
            choices=config["_choices_"],
            digest=config["_overrides_"],
            overrides=config["_lines_"],
        )

    @property
    def directory(self) -> Path:
        """The run directory.

        `sslcli.runs.launch.launch` sets the key `run_dir` before any code reads this property.
        """
        assert self.run_dir is not None
        return Path(self.run_dir)

    def plain(self) -> dict[str, Any]:
        """Return JSON-serializable values, to pass the configuration to other processes.

        `from_plain` converts them to a `RunConfig` again.
        """
        return self.values | {"_choices_": self.choices, "_overrides_": self.digest, "_lines_": self.overrides}

    def changed(self, **values: Any) -> RunConfig:
        """Return a copy in which the given top-level keys have new values."""
        return self.from_plain(self.plain() | values)


def keys_of(overrides: Iterable[str]) -> set[str]:
    """Return the dotted keys that overrides such as `+dataset.limit=100` set."""
    return {line.partition("=")[0].lstrip("+~") for line in overrides}


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(NetworkSettings):
    """Choice of a trained network and of the images whose features it computes.

    Attributes:
        dataset: node of the chosen dataset. None = the run's dataset, with `dataset_changes` applied.
        backbone: node of the chosen backbone for a weight file. None = the backbone that is stored in the file.
        dataset_changes: overrides of the run's dataset, see `sslcli.config.own_dataset.Change`.
        overrides: overrides of the command line.
    """

    dataset: Node | None
    backbone: Node | None
    dataset_changes: list[Any]
    overrides: list[str] = field(default_factory=list)

    @property
    def set_keys(self) -> set[str]:
        """The dotted keys that the command line sets, such as `dataset.limit`."""
        return keys_of(self.overrides)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(NetworkConfig, EvalSettings):
    """Configuration of ssl-eval: top-level keys, and one node for each config group with a `_target_`.

    A node is a mapping. Its key `_target_` names a class, and its other keys are arguments of the constructor.

    Attributes:
        protocol: node of the chosen evaluation protocol.
        launcher: settings of the launcher, which starts the processes.
    """

    protocol: Node
    launcher: LauncherSettings = field(
        default_factory=partial(LauncherSettings, kind="local", timeout="10m", threads=None)
    )

    @classmethod
    def from_plain(cls, config: dict[str, Any]) -> EvalConfig:
        """Convert `config`, the validated configuration of one job, from a dictionary to an `EvalConfig`."""
        return cls(
            **{f.name: config[f.name] for f in fields(EvalSettings)},
            launcher=LAUNCHERS[config["launcher"]["kind"]](**config["launcher"]),
            protocol=config["protocol"],
            **network_nodes(config),
        )


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(NetworkConfig, EmbedSettings):
    """Configuration of ssl-embed: top-level keys, and the nodes of `NetworkConfig`."""

    @classmethod
    def from_plain(cls, config: dict[str, Any]) -> EmbedConfig:
        """Convert `config`, the validated configuration of one job, from a dictionary to an `EmbedConfig`."""
        return cls(**{f.name: config[f.name] for f in fields(EmbedSettings)}, **network_nodes(config))


def network_nodes(config: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a `NetworkConfig` that are no top-level keys, from the plain values of one job."""
    return {
        "dataset": config.get("dataset"),
        "backbone": config.get("backbone"),
        "dataset_changes": config.get("_dataset_changes_", []),
        "overrides": config.get("_lines_", []),
    }


def export_config(config: dict[str, Any]) -> ExportSettings:
    """Convert `config`, the validated configuration of ssl-export, from a dictionary to `ExportSettings`."""
    return ExportSettings(**{f.name: config[f.name] for f in fields(ExportSettings)})
