"""Settings of launcher=slurm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from sslcli.config.slurm import SlurmSettings, time_limit
from sslcli.errors import ConfigError

CONF = Path(__file__).parents[2] / "conf" / "launcher" / "slurm.yaml"
DEFAULTS = SlurmSettings(**yaml.safe_load(CONF.read_text()))


def test_processes_follow_the_gpus_unless_given() -> None:
    assert DEFAULTS.processes == 1
    assert replace(DEFAULTS, gpus_per_node=8).processes == 8
    assert replace(DEFAULTS, gpus_per_node=8, processes_per_node=4).processes == 4
    assert replace(DEFAULTS, processes_per_node=3).processes == 3


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("90m", 5400),
        ("1.5h", 5400),
        ("2d", 172800),
        ("30s", 30),
        ("30:00", 1800),
        ("12:30:15", 45015),
        ("1-0", 86400),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("1-12:30:30", 131430),
    ],
)
def test_time_limits_are_read_as_people_and_as_slurm_write_them(value: str | None, expected: int | None) -> None:
    assert time_limit("time", value) == expected


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"nodes": 0}, ["launcher.nodes is 0", "at least 1"]),
        ({"gpus_per_node": -1}, ["launcher.gpus_per_node is -1", "at least 0"]),
        ({"processes_per_node": 0}, ["launcher.processes_per_node is 0"]),
        ({"processes_per_node": 3, "gpus_per_node": 2}, ["launcher.processes_per_node is 3", "its own GPU"]),
        ({"gpu_type": "a100"}, ["launcher.gpu_type is 'a100'", "launcher.gpus_per_node is 0"]),
        ({"time": "abc"}, ["launcher.time is 'abc'", "90m", "1-12:00:00"]),
        ({"time": 60}, ["launcher.time is 60", "with a unit"]),
        ({"time": "90"}, ["launcher.time is '90'", "with a unit"]),
        ({"time": "1m"}, ["launcher.time is '1m'", "launcher.stop_before is '2m'"]),
        ({"stop_before": "0s"}, ["launcher.stop_before is '0s'"]),
        ({"stop_before": "soon"}, ["launcher.stop_before is 'soon'", "duration"]),
        ({"stop_before": "20h"}, ["launcher.stop_before is '20h'", "18h"]),
        ({"memory": 64}, ["launcher.memory is 64", "64G"]),
        ({"memory": "lots"}, ["launcher.memory is 'lots'"]),
        ({"partition": ""}, ["launcher.partition is ''", "null"]),
        ({"account": "a\n#SBATCH --nodes=9"}, ["launcher.account", "or null"]),
        ({"extra": ["exclusive"]}, ["launcher.extra contains 'exclusive'", "--name=value"]),
        ({"extra": ["--nodes=3"]}, ["'--nodes=3'", "set by launcher.nodes"]),
        ({"extra": ["-N3"]}, ["'-N3'", "set by launcher.nodes"]),
        ({"extra": ["--mail-type=END\nrm -rf"]}, ["launcher.extra contains"]),
    ],
)
def test_wrong_values_are_refused_by_name(changed: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        replace(DEFAULTS, **changed)
    assert all(part in str(error.value) for part in expected), error.value
