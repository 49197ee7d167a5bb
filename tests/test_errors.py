"""Messages of errors: one line, and the traceback of user code on request."""

from __future__ import annotations

from pathlib import Path

import pytest

from sslcli.errors import DEBUG, ConfigError, print_error, printable

PLUGIN = """
def constructor(width):
    if width < 1:
        raise ValueError(f"width is {width}")
"""


def raised(source: str, name: str) -> ConfigError:
    """The error that building a class of the module `name` ends with."""
    namespace: dict[str, object] = {"__name__": name}
    exec(compile(source, f"{name}.py", "exec"), namespace)
    try:
        try:
            namespace["constructor"](0)  # type: ignore[operator]
        except ValueError as error:
            raise ConfigError(f"method: {error}") from error
    except ConfigError as error:
        return error


def test_an_error_of_a_plugin_names_the_variable(capsys: pytest.CaptureFixture[str]) -> None:
    print_error("train", raised(PLUGIN, "hypersphere.loss"))
    assert capsys.readouterr().err == "ssl-train: method: width is 0 (SSLCLI_DEBUG=1 shows the traceback)\n"


@pytest.mark.parametrize("name", ["sslcli.methods.moco", "torch.nn"])
def test_other_errors_are_one_line_without_a_hint(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = raised(PLUGIN, name)
    error.__cause__.__traceback__ = error.__cause__.__traceback__.tb_next  # type: ignore[union-attr]
    print_error("eval", error)
    assert capsys.readouterr().err == "ssl-eval: method: width is 0\n"


def test_the_variable_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(DEBUG, "1")
    print_error("train", raised(PLUGIN, "hypersphere"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "ssl-train: method: width is 0"
    assert any("hypersphere.py" in line for line in lines)
    assert lines[-1] == "sslcli.errors.ConfigError: method: width is 0"


def test_a_plain_message_is_printed_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_error("train", "the disk is full")
    assert capsys.readouterr().err == "ssl-train: the disk is full\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ä 😀 [v2] \\", "ä 😀 [v2] \\"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\r\tb\nc\x7f\x9b", "a\\r\\tb\\nc\\x7f\\x9b"),
        ("\u202egpj", "\\u202egpj"),
        ("a\udcffb\ud800", "a\\xffb\\ud800"),
        (Path("p\x00"), "p\\x00"),
    ],
)
def test_printable_text_has_no_characters_that_a_terminal_executes(text: object, shown: str) -> None:
    assert printable(text) == shown
    assert printable(text).encode()


def test_an_error_with_an_unsafe_name_is_printed_as_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    print_error("train", ConfigError("\x1b]0;owned\x07 and \udcff\n  second line"))
    assert capsys.readouterr().err == "ssl-train: \\x1b]0;owned\\x07 and \\xff\n  second line\n"
