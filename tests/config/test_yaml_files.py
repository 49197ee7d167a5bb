"""Reading and writing of yaml files."""

from __future__ import annotations

from pathlib import Path

import pytest

from sslcli.config.yaml_files import as_yaml, load_yaml
from sslcli.errors import ConfigError


def test_values_are_read_as_they_were_written(tmp_path: Path) -> None:
    content = {"a": 1, "b": [1.5, None, True, "1", "x: y"], "c": {"d": "${a}", "e": "???"}, "f": {}}
    path = tmp_path / "a.yaml"
    path.write_text(as_yaml(content))
    assert load_yaml(path) == content  # interpolations are not resolved


@pytest.mark.parametrize(
    "content",
    [b"a: [1", b"a: 1\na: 2\n", b"a: \xff", b"a: !!python/object/apply:os.getcwd []\n", b"a: 1\n b: 2\n"],
    ids=["unclosed", "duplicate", "no utf-8", "object", "indentation"],
)
def test_a_file_that_cannot_be_parsed_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_yaml(path)
    assert str(error.value).startswith(f"{path} cannot be read (")
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_yaml(path)
