from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sslcli.errors import ConfigError
from sslcli.runs.network_choice import check_changes, check_network, with_run_of_weights


def settings(**values: Any) -> dict[str, Any]:
    return {"run": None, "weights": None, "weights_prefix": None, "trust": [], "_dataset_changes_": [], **values}


def test_weights_of_a_run_are_the_run() -> None:
    assert with_run_of_weights(settings(weights="run:/a/b")) == settings(run="/a/b")
    for other in (settings(weights="a.pt"), settings(weights="timm:resnet18"), settings(run="a")):
        assert with_run_of_weights(other) == other


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "^give one$"),
        ({"run": "a", "weights": "b"}, "^give one$"),
        ({"run": "{}/net.pt", "weights_prefix": "module"}, "remove weights_prefix"),
        ({"weights": "{}/net.pth"}, r"weights is '.*net\.pth', but there is no such path.*net\.pt"),
        ({"run": "{}/none/a"}, "contains: nothing"),
    ],
)
def test_what_names_no_network_is_refused(values: dict[str, str], message: str, tmp_path: Path) -> None:
    (tmp_path / "net.pt").touch()
    with pytest.raises(ConfigError, match=message):
        check_network(settings(**{key: value.format(tmp_path) for key, value in values.items()}), "give one")


def test_what_names_a_network_is_accepted(tmp_path: Path) -> None:
    for values in ({"run": str(tmp_path)}, {"weights": str(tmp_path)}, {"weights": "timm:resnet18"}):
        check_network(settings(**values), "give one")


def test_without_changes_no_run_is_read(tmp_path: Path) -> None:
    check_changes(settings(run=str(tmp_path / "none")))
