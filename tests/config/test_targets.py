"""`_target_` entries and trusted packages."""

from __future__ import annotations

from typing import Any

import pytest

from sslcli.config import targets as _targets
from sslcli.config.targets import check_target, targets, trust_list, trusted_packages
from sslcli.errors import ConfigError


@pytest.mark.parametrize("target", ["sslcli.methods.moco.MoCo", "torch.optim.SGD", "mine.Net", "plugin_of_test.a.Net"])
def test_classes_of_trusted_packages_and_plugins_are_accepted(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_targets, "plugins", lambda: ("plugin_of_test",))
    check_target(target, ["mine"], "method._target_")


@pytest.mark.parametrize("target", ["os.system", "sslclix.Net", "torch.load", "torch.optimal.SGD", "mine", "mines.Net"])
def test_other_classes_are_refused(target: str) -> None:
    with pytest.raises(ConfigError, match=r"^method\._target_ is"):
        check_target(target, ["mine"], "method._target_")


def test_the_message_names_the_trusted_packages_and_how_to_trust_another() -> None:
    with pytest.raises(ConfigError, match=r"sslcli, torch\.optim.*mine.*trust=\[os\]"):
        check_target("os.system", ["mine"], "method._target_")


@pytest.mark.parametrize("target", [5, None, ["a.B"], "", "Net"])
def test_a_target_that_is_no_dotted_name_is_refused(target: Any) -> None:
    with pytest.raises(ConfigError, match="dotted name"):
        check_target(target, [], "backbone._target_")


def test_targets_are_found_at_any_depth_with_their_paths() -> None:
    config = {
        "method": {"_target_": "a.B", "parts": [{"x": 1}, {"_target_": "c.D", "inner": {"_target_": "e.F"}}]},
        "train": {"epochs": 3},
    }
    assert list(targets("", config)) == [
        ("method._target_", "a.B"),
        ("method.parts.1._target_", "c.D"),
        ("method.parts.1.inner._target_", "e.F"),
    ]
    assert list(targets("protocol", {"_target_": "a.B"})) == [("protocol._target_", "a.B")]


def test_a_mandatory_value_without_a_value_is_refused_with_its_path() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.roots\.1 has no value.*dataset\.roots\.1=\.\.\."):
        list(targets("", {"dataset": {"roots": ["/a", "???"]}}))


@pytest.mark.parametrize("value", ["torch", None, [1], [""], {"a": 1}, 5])
def test_trust_must_be_a_list_of_names(value: Any) -> None:
    with pytest.raises(ConfigError, match="list of package names"):
        trust_list(value)


def test_trust_is_added_to_the_packages_that_are_always_trusted() -> None:
    assert trust_list(["torch", "mine"]) == ["torch", "mine"]
    assert trusted_packages(["mine"])[:2] == ["sslcli", "torch.optim"]
    assert trusted_packages(["mine"])[-1] == "mine"
