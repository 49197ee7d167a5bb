"""Environment variables of launchers: complete, half set, and with values that are no numbers."""

from __future__ import annotations

import pytest

from command_line import SMALL, Cli
from sslcli.errors import ConfigError
from sslcli.system.launch_variables import Member, earlier_starts, launched, local_world_size

COMPLETE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}


def set_variables(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """Set exactly these variables of a launcher."""
    for name in (*COMPLETE, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SSLCLI_RESTARTS", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_launcher_sets_four_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, COMPLETE)
    assert launched() == Member(1, 2, 1, "here", 29500)
    set_variables(monkeypatch, COMPLETE | {"LOCAL_RANK": "0"})
    assert launched() == Member(1, 2, 0, "here", 29500)
    for other in ({}, {"MASTER_ADDR": "here"}, {"MASTER_PORT": "auto"}, {"LOCAL_RANK": "0"}):
        set_variables(monkeypatch, other)
        assert launched() is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"RANK": ""}, r"RANK is \'\', but it must be an integer between 0 and 1 \(WORLD_SIZE is 2\)"),
        ({"RANK": "2"}, r"RANK is \'2\'"),
        ({"RANK": "-1"}, r"RANK is \'-1\'"),
        ({"RANK": "\u0661"}, "RANK is"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', but it must be an integer of at least 1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"MASTER_ADDR": " "}, "MASTER_ADDR is empty: set it to the host of rank 0"),
        ({"MASTER_PORT": "auto"}, "MASTER_PORT is 'auto', but it must be an integer between 1 and 65535"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is '65536'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
    ],
)
def test_an_invalid_value_is_named(changes: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, COMPLETE | changes)
    with pytest.raises(ConfigError, match=expected):
        launched()


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, {name: value for name, value in COMPLETE.items() if name != missing})
    with pytest.raises(ConfigError, match=rf"but {missing} is not set.*\(unset (RANK|WORLD_SIZE)"):
        launched()


def test_the_number_of_processes_of_a_node_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, {})
    assert (local_world_size(), earlier_starts()) == (1, 0)
    set_variables(monkeypatch, {"LOCAL_WORLD_SIZE": "4", "SSLCLI_RESTARTS": "1", "TORCHELASTIC_RESTART_COUNT": "2"})
    assert (local_world_size(), earlier_starts()) == (4, 3)
    for name in ("LOCAL_WORLD_SIZE", "SSLCLI_RESTARTS", "TORCHELASTIC_RESTART_COUNT"):
        set_variables(monkeypatch, {name: "x"})
        with pytest.raises(ConfigError, match=f"{name} is 'x'"):
            _ = local_world_size(), earlier_starts()


@pytest.mark.parametrize(
    "variables", [{"RANK": "0"}, COMPLETE | {"RANK": ""}, COMPLETE | {"MASTER_PORT": "auto"}, {"LOCAL_WORLD_SIZE": "a"}]
)
def test_a_command_ends_with_one_message(variables: dict[str, str], cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, variables)
    ended = cli("ssl-train", *(line for line in SMALL if "threads" not in line))
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert any(f"{name} is {value!r}" in ended.err for name, value in variables.items())
