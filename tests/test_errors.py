"""Messages of errors: one line, and the traceback of user code on request."""

from __future__ import annotations

import errno
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sslcli import errors
from sslcli.errors import (
    BUG,
    DEBUG,
    EXIT_BUG,
    EXIT_CONFIG,
    EXIT_FAILED,
    LIBRARIES,
    ConfigError,
    Stopped,
    TrainingFailed,
    UserCodeError,
    print_error,
    print_unexpected,
    printable,
    user_code_error,
    with_traceback,
)

PLUGIN = """
class Head:
    def __init__(self, width):
        if width < 1:
            raise ValueError(f"width is {width}")
    def forward(self, images):
        return images["left"]

class Own(Head):
    def __init__(self):
        super().__init__(1)

def constructor(width):
    return Head(width)

def fail(error):
    raise error
"""
BUILD = """
def build(constructor, width):
    try:
        constructor(width)
    except ValueError as error:
        raise ConfigError(f"method: {error}") from error
"""


def module(source: str, name: str) -> Any:
    """The names that `source` defines, as if it were the source of the module `name`."""
    namespace: dict[str, Any] = {"__name__": name, "ConfigError": ConfigError}
    exec(compile(source, f"{name}.py", "exec"), namespace)
    return SimpleNamespace(**namespace)


def without_this_module(error: BaseException) -> None:
    """Remove the frames of this module, which is code of a user, from the start of a traceback."""
    while error.__traceback__ is not None and error.__traceback__.tb_frame.f_globals["__name__"] == __name__:
        error.__traceback__ = error.__traceback__.tb_next


def raised(source: str, name: str) -> ConfigError:
    """The error that building a class of the module `name` ends with."""
    try:
        module(BUILD, "sslcli.runs.build").build(module(source, name).constructor, 0)
    except ConfigError as error:
        without_this_module(error)
        return error


def test_an_error_of_a_plugin_names_the_variable(capsys: pytest.CaptureFixture[str]) -> None:
    print_error("train", raised(PLUGIN, "hypersphere.loss"))
    assert capsys.readouterr().err == "ssl-train: method: width is 0 (SSLCLI_DEBUG=1 shows the traceback)\n"


@pytest.mark.parametrize("name", ["sslcli.methods.moco", "torch.nn"])
def test_other_errors_are_one_line_without_a_hint(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = raised(PLUGIN, name)
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


def call(function: Any, *arguments: Any) -> BaseException:
    """Return what `function` raises, with a traceback that starts at this function."""
    try:
        function(*arguments)
    except BaseException as error:
        without_this_module(error)
        return error
    raise AssertionError("nothing was raised")


# `user_code` must be entered in a module of sslcli: this test module is itself code of a user.
BLOCK = """
from sslcli.errors import user_code

def block(function, *arguments, **options):
    with user_code("computing the loss", **options):
        function(*arguments)

def bug(plugin):
    raise KeyError("internal")

def load(name, source):
    exec(source, {"__name__": name})
"""
SSLCLI = module(BLOCK, "sslcli.runs.worker")


def test_an_exception_of_user_code_names_its_class_and_shows_only_its_traceback() -> None:
    head = module(PLUGIN, "hypersphere.loss").Head(1)
    error = call(SSLCLI.block, head.forward, {})
    assert isinstance(error, UserCodeError)
    first, *lines = str(error).splitlines()
    assert first == "hypersphere.loss.Head failed while computing the loss (KeyError: 'left')"
    assert lines[0] == "Traceback (most recent call last):"
    assert "hypersphere.loss.py" in lines[1]
    assert "in forward" in lines[1]
    assert lines[-1] == "KeyError: 'left'"
    assert not any("sslcli" in line for line in lines)
    assert isinstance(error.__cause__, KeyError)


def test_a_function_and_a_module_of_the_user_are_named() -> None:
    plugin = module(PLUGIN, "hypersphere")
    assert "hypersphere.fail failed while" in str(call(SSLCLI.block, plugin.fail, KeyError(1)))
    assert "broken failed while" in str(call(SSLCLI.block, SSLCLI.load, "broken", "1 / 0"))


def test_code_of_sslcli_that_runs_on_an_instance_of_a_users_class_is_user_code() -> None:
    base = module(PLUGIN, "sslcli.nn.heads")
    own = type("Own", (base.Head,), {"__module__": "hypersphere"})(1)
    error = call(SSLCLI.block, own.forward, {})
    assert "hypersphere.Own failed while computing the loss (KeyError: 'left')" in str(error)
    assert "sslcli.nn.heads.py" in str(error)


@pytest.mark.parametrize("name", ["sslcli.methods.moco", "torch.nn", "json", "__main__"])
def test_an_exception_of_other_code_stays_unchanged(name: str) -> None:
    head = module(PLUGIN, name).Head(1)
    error = call(SSLCLI.block, head.forward, {})
    assert type(error) is KeyError
    assert user_code_error("reading", error) is None


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("c"),
        TrainingFailed("t"),
        Stopped("s", by_signal=True),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"),
        OSError(errno.ENOSPC, "No space left on device"),
        KeyboardInterrupt(),
    ],
)
def test_errors_with_a_meaning_of_their_own_pass_user_code(error: BaseException) -> None:
    fail = module(PLUGIN, "hypersphere").fail
    assert call(SSLCLI.block, fail, error) is error
    assert call(lambda: SSLCLI.block(fail, error, explain=str)) is error


def test_further_errors_pass_on_request() -> None:
    error = RuntimeError("Connection closed by peer")
    fail = module(PLUGIN, "hypersphere").fail
    assert call(lambda: SSLCLI.block(fail, error, passes=lambda error: "Connection" in str(error))) is error


@pytest.mark.parametrize("error", [KeyError("a"), OSError(errno.EACCES, "no"), StopIteration(), SystemExit(0)])
def test_every_other_exception_of_user_code_is_reported(error: BaseException) -> None:
    found = call(SSLCLI.block, module(PLUGIN, "hypersphere").fail, error)
    assert isinstance(found, UserCodeError)
    assert type(error).__name__ in str(found)


def test_an_explanation_replaces_the_message_for_all_code() -> None:
    error = call(lambda: SSLCLI.block(SSLCLI.bug, None, explain=lambda error: f"views: {error}"))
    assert type(error) is ConfigError
    assert str(error) == "views: 'internal'"
    fail = module(PLUGIN, "hypersphere").fail
    error = call(lambda: SSLCLI.block(fail, KeyError("x"), explain=lambda error: f"views: {error}"))
    assert isinstance(error, UserCodeError)
    assert str(error).startswith("views: 'x'\nTraceback")
    assert str(error).endswith("KeyError: 'x'")


def test_the_traceback_of_a_cause_is_found() -> None:
    error = raised(PLUGIN, "hypersphere")
    shown = str(with_traceback("backbone: no", error))
    assert shown.startswith("backbone: no\nTraceback")
    assert "hypersphere.py" in shown
    assert shown.endswith("ValueError: width is 0")
    assert str(with_traceback("no", raised(PLUGIN, "torch.nn"))) == "no"


def test_the_owner_is_reported_if_the_traceback_has_no_user_code() -> None:
    error = call(SSLCLI.bug, None)
    own = module(PLUGIN, "mine").Head
    assert user_code_error("reading images", error) is None
    assert user_code_error("reading images", error, owner=module(PLUGIN, "sslcli.data").Head) is None
    found = str(user_code_error("reading images", error, owner=own))
    assert found.startswith("mine.Head failed while reading images (KeyError: 'internal')\nTraceback")


@pytest.mark.parametrize(
    ("function", "code", "expected"),
    [
        (module(PLUGIN, "hypersphere").fail, EXIT_CONFIG, r"ssl-eval: hypersphere.fail failed while running ssl-eval"),
        (module(PLUGIN, "torch.nn").fail, EXIT_BUG, f"KeyError: 'x'\nssl-eval: {BUG}\n"),
    ],
)
def test_an_unexpected_exception_is_printed(
    function: Any, code: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = call(function, KeyError("x"))
    assert isinstance(error, Exception)
    assert print_unexpected("eval", error) == code
    shown = capsys.readouterr().err
    assert expected in shown
    assert (BUG in shown) == (code == EXIT_BUG)
    assert "Traceback (most recent call last)" in shown


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (MemoryError(), EXIT_CONFIG, "out of memory (MemoryError): reduce the batch size"),
        (
            type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory.\nmore"),
            EXIT_CONFIG,
            "out of memory (CUDA out of memory): reduce",
        ),
        (
            OSError(errno.ENOSPC, "No space left", "/big"),
            EXIT_FAILED,
            "/big cannot be written (No space left): free space",
        ),
    ],
)
def test_a_lack_of_memory_or_disk_space_is_no_bug(
    error: Exception, code: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert print_unexpected("train", error) == code
    shown = capsys.readouterr().err
    assert expected in shown
    assert "Traceback" not in shown
    assert BUG not in shown


def test_every_requirement_is_a_library() -> None:
    """The packages of setup.cfg are not code of the user, except the tools of developers."""
    setup = ConfigParser()
    setup.read(Path(errors.__file__).parents[1] / "setup.cfg")
    extras = setup["options.extras_require"]
    lines = [setup["options"]["install_requires"]] + [extras[name] for name in extras if name not in ("dev", "bench")]
    required = {line.split(">")[0].strip() for text in lines for line in text.strip().splitlines()}
    modules = {
        name
        for name, distributions in packages_distributions().items()
        if required & set(distributions) and name.isidentifier() and not name.startswith("_")
    }
    assert {"torch", "PIL"} <= modules
    assert sorted(modules - set(LIBRARIES) - {"pydevd_plugins"}) == []
