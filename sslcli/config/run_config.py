"""Typed configurations of the commands, created from composed and validated plain values."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sslcli.config.settings import (
    EvalSettings,
    ExportSettings,
    LauncherSettings,
    MonitorSettings,
    MultiSettings,
    RunSettings,
    TrainSettings,
)
from sslcli.config.slurm import SlurmSettings

Node = dict[str, Any]  # plain values of a config group; `_target_` names the class
LAUNCHERS: dict[str, type[LauncherSettings]] = {  # by `launcher.kind`
    "local": LauncherSettings,
    "multi": MultiSettings,
    "slurm": SlurmSettings,
}


@dataclass(frozen=True, kw_only=True)
class RunConfig(RunSettings):
    """Configuration of ssl-train: top-level keys, sections, and one node for each group with a `_target_`.

    Attributes:
        values: all settings as plain values, for `config.yaml`, checkpoints and comparisons.
        choices: the name of the chosen yaml file of each group.
        digest: digest of the overrides that affect the results. The name of the default run directory contains it.
        overrides: overrides of the command line.
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
        """Return the typed configuration of a validated job, or of the values that `plain()` returned."""
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
        """The run directory. `sslcli.runs.launch.launch` sets it before anything reads it."""
        assert self.run_dir is not None
        return Path(self.run_dir)

    def plain(self) -> dict[str, Any]:
        """Return JSON-serializable values, to pass the configuration to other processes."""
        return self.values | {"_choices_": self.choices, "_overrides_": self.digest, "_lines_": self.overrides}

    def changed(self, **values: Any) -> RunConfig:
        """Return a copy in which the given top-level keys have new values."""
        return self.from_plain(self.plain() | values)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(EvalSettings):
    """Configuration of ssl-eval: top-level keys, and one node for each group with a `_target_`.

    Attributes:
        dataset: the chosen dataset. None = the run's dataset, with `dataset_changes` applied.
        backbone: the chosen backbone for a weight file. None = the backbone that is stored in the file.
        dataset_changes: overrides of the run's dataset, see `sslcli.config.own_dataset.Change`.
    """

    protocol: Node
    dataset: Node | None
    backbone: Node | None
    dataset_changes: list[Any]

    @classmethod
    def from_plain(cls, config: dict[str, Any]) -> EvalConfig:
        """Return the typed configuration of a validated job."""
        return cls(
            **{f.name: config[f.name] for f in fields(EvalSettings)},
            protocol=config["protocol"],
            dataset=config.get("dataset"),
            backbone=config.get("backbone"),
            dataset_changes=config.get("_dataset_changes_", []),
        )


def export_config(config: dict[str, Any]) -> ExportSettings:
    """Return the typed configuration of a validated job of ssl-export."""
    return ExportSettings(**{f.name: config[f.name] for f in fields(ExportSettings)})
