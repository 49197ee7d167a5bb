"""Callables that a configuration may name for Hydra itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from command_line import SMALL, Cli
from sslcli.cli.hydra_node import check_hydra, resolved
from sslcli.errors import ConfigError

ACT = "sslcli.system.atomic.replace"


@pytest.mark.parametrize(
    "node",
    [
        {"callbacks": {"mine": {"_target_": ACT}}},
        {"callbacks": {"mine": {"_target_": "os.system"}}},
        {"callbacks": {"mine": {"_target_": "${oc.env:X}"}}},
        {"callbacks": {"mine": "${oc.env:X}"}},
        {"callbacks": "${hydra:job.name}"},
        {"launcher": {"_target_": "subprocess.run"}},
        {"sweeper": {"_target_": "hydra_plugins.mine.Sweeper", "sampler": {"_target_": "os.system"}}},
        {"sweeper": {"sampler": {"_target_": "optuna.create_study"}}},
        {"sweeper": {"custom_search_space": "mine.space"}},
        {"job_logging": {"handlers": {"file": {"class": "logging.config.fileConfig", "fname": "x"}}}},
        {"hydra_logging": {"formatters": {"simple": {"()": "subprocess.Popen"}}}},
        {"job_logging": {"handlers": {"q": {"class": "logging.handlers.QueueHandler", "queue": {"()": "os.system"}}}}},
        {"job_logging": {"handlers": {"a": {"class": "logging.StreamHandler", ".": {"namer": "ext://os.system"}}}}},
        {"hydra_logging": {"handlers": {"a": {"class": "logging.StreamHandler", "stream": "ext://mine.stream"}}}},
    ],
    ids=str,
)
def test_what_hydra_would_call_lies_in_hydra_or_in_a_trusted_package(node: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"which Hydra would call, but it is not in a trusted package"):
        check_hydra(node, [])


@pytest.mark.parametrize(
    "node",
    [
        {"launcher": {"_target_": "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"}},
        {"sweeper": {"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper", "params": None}},
        {"sweeper": {"sampler": {"_target_": "optuna.samplers.TPESampler", "seed": 1}}},
        {"job_logging": {"handlers": {"a": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout"}}}},
        {"job_logging": {"formatters": {"a": {"()": "colorlog.ColoredFormatter"}}}},
        {"callbacks": {"mine": {"_target_": "mine.Callback"}}},
    ],
    ids=str,
)
def test_hydras_own_plugins_and_trusted_packages_pass(node: dict[str, Any]) -> None:
    check_hydra(node, ["mine"])


@pytest.mark.parametrize("flag", [(), ("--multirun",), ("--cfg=job",), ("--hydra-help",)], ids=str)
def test_a_yaml_cannot_have_hydra_call_anything(flag: tuple[str, ...], cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/evil.yaml").write_text(
        "# @package _global_\nhydra:\n  callbacks:\n    x:\n"
        f"      _target_: {ACT}\n      path: {tmp_path}/ran\n      content: x\n"
        "  hydra_logging:\n    version: 1\n    handlers:\n      x:\n        class: subprocess.Popen\n"
        f"        args: [touch, {tmp_path}/ran]\n    root:\n      handlers: [x]\n"
    )
    ended = cli("ssl-train", *SMALL, "experiment=evil", "--config-dir", "mine", *flag)
    assert (ended.code, "which Hydra would call" in ended.err) == (2, True), ended.err
    assert not (tmp_path / "ran").exists()


def test_a_pickle_is_not_run_again(cli: Cli) -> None:
    ended = cli("ssl-train", "--experimental-rerun", "config.pickle")
    assert (ended.code, "would unpickle a file" in ended.err) == (2, True), ended.err


def test_a_reference_that_an_interpolation_makes_is_refused(cli: Cli) -> None:
    handler = '+hydra.job_logging.handlers.x={class: logging.StreamHandler, stream: "${name}"}'
    ended = cli("ssl-train", *SMALL, "dry_run=true", "name='ext://os.system'", handler)
    assert ended.code == 2
    assert "hydra.job_logging.handlers.x.stream is 'ext://os.system', which Hydra would call" in ended.err


def test_what_cannot_be_resolved_yet_stays_as_it_is_written() -> None:
    node = OmegaConf.create({"a": {"b": "${later:x}", "c": "${d}"}, "d": [1, "${later:y}"], "e": 3})
    assert resolved(node, only=["a", "d", "none"]) == {
        "a": {"b": "${later:x}", "c": {0: 1, 1: "${later:y}"}},
        "d": {0: 1, 1: "${later:y}"},
    }
