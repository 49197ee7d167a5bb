"""Settings of `launcher=slurm`: types and valid ranges."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sslcli.config.checks import check_range, seconds
from sslcli.config.settings import LauncherSettings
from sslcli.errors import ConfigError

LONGEST_WARNING = 65535  # maximum of launcher.stop_before in seconds, because sbatch --signal accepts no longer time
SET_BY_US = {  # sbatch option that sslcli writes to the batch script -> key that determines the option
    "nodes": "launcher.nodes",
    "ntasks": "launcher.processes_per_node",
    "ntasks-per-node": "launcher.processes_per_node",
    "cpus-per-task": "launcher.cpus_per_node",
    "gpus-per-node": "launcher.gpus_per_node",
    "time": "launcher.time",
    "signal": "launcher.stop_before",
    "output": "run_dir",
    "open-mode": "the launcher",
    "requeue": "the launcher",
    "no-requeue": "the launcher",
    "array": "--multirun",
    "wait": "launcher.wait",
    "chdir": "the folder the command is started in",
}
SHORT = {"N": "nodes", "n": "ntasks", "c": "cpus-per-task", "t": "time", "o": "output", "a": "array", "D": "chdir"}


@dataclass(frozen=True, kw_only=True)
class SlurmSettings(LauncherSettings):
    """Settings with the keys `launcher.*` of launcher=slurm. Raises ConfigError for a value out of range."""

    nodes: int
    gpus_per_node: int
    gpu_type: str | None
    processes_per_node: int | None  # None: one per GPU, or 1 without GPUs
    cpus_per_node: int | None
    memory: str | int | None  # per node
    partition: str | None
    account: str | None
    qos: str | None
    time: str | int | None
    stop_before: str | int
    constraint: str | None
    extra: list[str]
    setup: str | None
    python: str | None
    max_restarts: int
    wait: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("nodes", "processes_per_node", "cpus_per_node"):
            check_range(f"launcher.{name}", getattr(self, name), least=1)
        for name in ("gpus_per_node", "max_restarts"):
            check_range(f"launcher.{name}", getattr(self, name), least=0)
        for name in ("gpu_type", "partition", "account", "qos", "constraint", "python"):
            value = getattr(self, name)
            if value is not None and (not value.strip() or not value.isprintable()):
                raise ConfigError(f"launcher.{name} is {value!r}, but it must be a non-empty printable string, or null")
        if self.gpu_type is not None and not self.gpus_per_node:
            raise ConfigError(f"launcher.gpu_type is {self.gpu_type!r}, but launcher.gpus_per_node is 0")
        if self.gpus_per_node and self.processes > self.gpus_per_node:
            raise ConfigError(
                f"launcher.processes_per_node is {self.processes_per_node}, but launcher.gpus_per_node is "
                f"{self.gpus_per_node}: every process needs its own GPU"
            )
        if self.memory not in (None, 0, "0") and not re.fullmatch(r"\d+[KMGT]", str(self.memory)):
            raise ConfigError(
                f"launcher.memory is {self.memory!r}, but it must be a size such as 64G or 900M, 0 (all), or null"
            )
        self.check_times()
        for line in self.extra:
            check_directive(line)

    def check_times(self) -> None:
        """Raise ConfigError unless `launcher.time` is longer than `launcher.stop_before`.

        `launcher.time` is the time limit of the Slurm job. `launcher.stop_before` is a duration before the end of this
        time limit. At that time, the run receives a signal. It then saves a checkpoint and stops. The duration must be
        at least 1 second and at most 18 hours.
        """
        limit, before = time_limit("launcher.time", self.time), self.warning
        if not 0 < before <= LONGEST_WARNING:
            raise ConfigError(f"launcher.stop_before is {self.stop_before!r}, but it must be between 1s and 18h")
        if limit is not None and limit <= before:
            raise ConfigError(
                f"launcher.time is {self.time!r} and launcher.stop_before is {self.stop_before!r}, but the time "
                "limit must be longer than the time to stop"
            )

    @property
    def processes(self) -> int:
        """Number of processes per node."""
        return self.processes_per_node or self.gpus_per_node or 1

    @property
    def warning(self) -> int:
        """Number of seconds before the end of the time limit at which the run gets the signal to save and stop."""
        return round(seconds("launcher.stop_before", self.stop_before) or 0)


def time_limit(name: str, value: str | int | None) -> int | None:
    """Return a time limit in seconds, or None for no limit.

    The accepted formats are `90m`, `1.5h`, and Slurm's D-HH:MM:SS, HH:MM:SS and MM:SS. A number without a unit is
    rejected, because its meaning is unclear: Slurm reads it as minutes, and train.max_time reads it as seconds.

    Args:
        name: the setting, for the message.
        value: the time limit; None = no limit.

    Raises ConfigError if the value has another format.
    """
    if value is None:
        return None
    text = str(value).strip()
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match and (match[1] or match[3]):
        days, *parts = (int(part) for part in match.groups(default="0"))
        if match[1] is None and match[4] is None:  # only minutes and seconds
            parts = [0, *parts[:2]]
        return days * 86400 + parts[0] * 3600 + parts[1] * 60 + parts[2]
    if re.fullmatch(r"\d+(\.\d+)?[smhd]", text):
        return round(seconds(name, text) or 0)
    raise ConfigError(
        f"{name} is {value!r}, but it must be a duration with a unit, such as 90m, 12h or 2d, or in Slurm's format, "
        "such as 1-12:00:00"
    )


def check_directive(line: str) -> None:
    """Raise ConfigError unless `line`, an entry of launcher.extra, is an option of sbatch such as `--mem=8G`.

    An option that sslcli sets itself, from another key of the configuration, is rejected.
    """
    match = re.match(r"--([\w-]+)|-(\w)", line)
    if match is None or not line.isprintable():
        raise ConfigError(
            f"launcher.extra contains {line!r}, but each entry must be an option of sbatch: '--name=value'"
        )
    name = match[1] or SHORT.get(match[2], "")
    if name in SET_BY_US:
        raise ConfigError(f"launcher.extra contains {line!r}, but that option is set by {SET_BY_US[name]}")
