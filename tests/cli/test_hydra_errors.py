"""Messages for errors of Hydra and of the override grammar."""

from __future__ import annotations

import re
from importlib.metadata import requires

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf

from sslcli.cli.hydra_errors import (
    PLUGINS,
    check_deletions,
    group_of,
    missing,
    one_line,
    print_note,
    readable,
    unreadable,
)
from sslcli.errors import ConfigError

GROUPS = ("method", "dataset", "backbone")


def override(line: str) -> object:
    (found,) = OverridesParser.create().parse_overrides([line])
    return found


def test_a_message_has_no_line_breaks_links_and_search_paths() -> None:
    text = "Key 'x' is missing.\n  full_key: a.b\n object_type=dict"
    assert one_line(text) == "Key 'x' is missing"
    assert one_line("Wrong. See https://hydra.cc/docs/x for details.") == "Wrong"
    assert one_line("Primary config not found.\nConfig search path:\n\tprovider=main") == "Primary config not found"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("epochs", ["'epochs'", "key=value"]),
        ("=5", ["'=5'", "key=value"]),
        ("views[0].blur=1", ["'views[0].blur=1'", "key.0"]),
        ("run_dir=/a=b", ["""run_dir='"/a=b"'"""]),
        ("name='a b\"", ["""name='"a b"'"""]),
    ],
)
def test_an_override_that_cannot_be_parsed_is_shown_as_it_should_be_written(line: str, expected: list[str]) -> None:
    message = unreadable(line, ValueError("mismatched input"))
    assert [part for part in expected if part not in message] == [], message


def unknown_choice(file: str, options: list[str] | None) -> str:
    return missing(MissingConfigException("not found", missing_cfg_file=file, options=options))


def test_an_unknown_choice_has_the_nearest_and_all_others() -> None:
    message = unknown_choice("method/mocooo", ["byol", "moco"])
    assert message.startswith("method=mocooo: ")
    assert "Did you mean 'moco'?" in message
    assert message.endswith("Choices: byol, moco")


def test_old_names_of_choices_are_not_listed() -> None:
    assert unknown_choice("views/nonesuch", ["moco_v2", "mocov2"]).endswith("Choices: moco_v2")


@pytest.mark.parametrize(
    ("file", "package"),
    [("hydra/launcher/joblib", "hydra-joblib-launcher"), ("hydra/launcher/submitit_slurm", "hydra-submitit-launcher")],
)
def test_a_choice_of_a_plugin_of_hydra_names_the_package(file: str, package: str) -> None:
    assert unknown_choice(file, ["basic"]).endswith(f"pip install {package}")


def test_the_packages_of_plugins_are_those_of_the_extras() -> None:
    required = {re.split("[<>=;]", line)[0].strip() for line in requires("sslcli") or ()}
    assert set(PLUGINS.values()) <= required


def test_a_missing_configuration_file_and_an_empty_group_are_named() -> None:
    assert unknown_choice("nonesuch", None).startswith("--config-name is 'nonesuch'")
    assert unknown_choice("mine/nonesuch", []).startswith("mine=nonesuch: there is no such choice")


def test_other_errors_lose_the_advice_of_hydra_and_get_a_better_one() -> None:
    error = HydraException(
        "Could not override 'methd'. No match in the defaults list.\nTo append to your default list use +methd=moco"
    )
    message = readable(error, groups=GROUPS)
    assert "append" not in message
    assert "Did you mean 'method'?" in message
    assert message.endswith("Groups: method, dataset, backbone")
    error = HydraException("Could not append to config. An item is already at 'train.epochs'.")
    assert readable(error, groups=GROUPS).startswith("train.epochs ")


def test_the_cause_of_an_error_is_shown() -> None:
    error = HydraException("Error merging override x=1")
    error.__cause__ = ValueError("Value 'a'\nis no integer.")
    assert readable(error, groups=GROUPS) == "Error merging override x=1 (Value 'a' is no integer)"


@pytest.mark.parametrize(
    ("line", "expected"),
    [("method=moco", "method"), ("+a.b=1", "a.b"), ("++a.b=1", "a.b"), ("~a.b", "a.b"), ("views@other=moco", "views")],
)
def test_the_group_of_an_override_has_no_sign_and_no_package(line: str, expected: str) -> None:
    assert group_of(override(line)) == expected  # type: ignore[arg-type]


def test_a_hyperparameter_cannot_be_deleted_but_another_key_can() -> None:
    config = OmegaConf.create({"method": {"_target_": "sslcli.methods.byol.BYOL", "options": {"a": 1}}})
    check_deletions([override("~method.options.a"), override("~experiment"), override("method.hidden=3")], config)  # type: ignore[list-item]
    with pytest.raises(ConfigError, match=r"^~method\.hidden: .*cannot be deleted"):
        check_deletions([override("~method.hidden")], config)  # type: ignore[list-item]


def test_a_note_on_an_old_name_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        print_note("train", "a_of_test is now b_of_test")
    assert capsys.readouterr().err.count("ssl-train: a_of_test is now b_of_test") == 1
