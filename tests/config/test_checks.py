from __future__ import annotations

import pytest

from sslcli.config.checks import check_choice, check_device, check_range, seconds
from sslcli.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (None, None),
        (90, 90),
        (0.5, 0.5),
        ("90", 90),
        ("90s", 90),
        ("10m", 600),
        ("1.5h", 5400),
        ("2d", 172800),
        (" 5 m ", 300),
    ],
)
def test_a_duration_is_read_in_seconds(text: str | float | None, value: float | None) -> None:
    assert seconds("train.max_time", text) == value


@pytest.mark.parametrize("text", ["", "soon", "5 minutes", "-5", "1h30m", "m", "1e3", "inf", "nan"])
def test_what_is_no_duration_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.max_time is .*90s, 10m, 1\.5h or 2d"):
        seconds("train.max_time", text)


def test_ranges_are_closed_where_they_say_at_least_and_at_most() -> None:
    check_range("key", None, above=5)
    check_range("key", 5, least=5, most=5)
    with pytest.raises(ConfigError, match="key is 5, but it must be greater than 5"):
        check_range("key", 5, above=5)
    with pytest.raises(ConfigError, match="key is 4, but it must be at least 5"):
        check_range("key", 4, least=5)
    with pytest.raises(ConfigError, match="key is 6, but it must be at most 5"):
        check_range("key", 6, most=5)
    with pytest.raises(ConfigError, match="finite"):
        check_range("key", float("nan"))


def test_a_choice_that_does_not_exist_is_answered_with_all_and_the_nearest() -> None:
    check_choice("key", "warn", ("warn", "stop"))
    with pytest.raises(ConfigError, match=r"key is 'wran', but it must be one of: warn, stop\. Did you mean 'warn'\?"):
        check_choice("key", "wran", ("warn", "stop"))
    with pytest.raises(ConfigError, match=r"one of: warn, stop$"):
        check_choice("key", "xyz", ("warn", "stop"))


def test_a_device_of_another_kind_is_refused_with_the_kinds_there_are() -> None:
    with pytest.raises(ConfigError, match=r"device is 'tpu'.*auto, cpu, cuda, cuda:N"):
        check_device("tpu")
