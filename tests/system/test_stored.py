"""Typed reading of stored files."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import pytest
import torch

from sslcli.errors import ConfigError
from sslcli.system import stored
from sslcli.system.stored import (
    DamagedFile,
    checked,
    mismatch,
    read_json,
    read_line,
    read_or_set_aside,
    read_text,
    read_yaml,
)


class Inner(TypedDict):
    top1: float
    interval: tuple[float, float]


class Options(TypedDict, total=False):
    note: str
    inner: Inner


class Shape(Options):
    name: str
    many: dict[str, Inner]
    rows: list[Inner]


@dataclass(frozen=True)
class Record:
    lines: list[str]
    code: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)


INNER = {"top1": 0.5, "interval": [0.4, 0.6]}
GOOD: dict[str, Any] = {"name": "a", "many": {"x": INNER}, "rows": [INNER, INNER], "other": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": 3}, "name is 3, but it must be a string"),
        ({"many": []}, r"many is \[\], but it must be a mapping"),
        ({"many": {"x": 1}}, "many.x is 1, but it must be a mapping"),
        ({"many": {"x": {"top1": 1}}}, "it has no many.x.interval"),
        ({"rows": [INNER, INNER | {"top1": "high"}]}, "rows.1.top1 is 'high', but it must be a finite number"),
        ({"rows": [INNER | {"interval": [1.0]}]}, r"rows.0.interval is \[1.0\]"),
        ({"rows": [INNER | {"top1": float("nan")}]}, "rows.0.top1 is nan"),
        ({"note": None}, "note is None, but it must be a string"),
        ({"inner": {}}, "it has no inner.top1"),
        ({"name": "a" * 9, "many": "b" * 900}, "many is 'bbb.*b\\.\\.\\., but"),
    ],
)
def test_each_field_is_checked_to_any_depth(changes: dict[str, Any], message: str) -> None:
    assert mismatch(GOOD, Shape) == ""
    with pytest.raises(DamagedFile, match=rf"^f is damaged \(.*{message}.*\): remove it$"):
        checked(GOOD | changes, Shape, Path("f"), remedy="remove it")


def test_classes_are_checked_too() -> None:
    class State(TypedDict):
        sums: dict[str, torch.Tensor]
        rng: torch.Tensor

    zero = torch.zeros(1)
    assert mismatch({"sums": {"a": zero}, "rng": zero}, State) == ""
    assert mismatch({"sums": {"a": 1}, "rng": zero}, State) == "sums.a is 1, but it must be a Tensor"
    assert mismatch({"sums": {}, "rng": [zero]}, State) == "rng is [tensor([0.])], but it must be a Tensor"


def test_a_dataclass_is_built_and_keys_of_a_newer_version_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"lines": ["x"], "code": 3, "newer": 1}')
    assert read_json(path, Record, remedy="") == Record(["x"], 3)
    path.write_text('{"lines": 3}')
    with pytest.raises(DamagedFile, match="lines is 3, but it must be a list of strings"):
        read_json(path, Record, remedy="")


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 99, b"{", b"[]", b"3", b"null", b"\xff", b'{"name": "\xff"}', b"[" * 100_000, b"9" * 9_999, b"{}"],
)
def test_a_damaged_file_is_refused_with_its_name_and_its_remedy(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    for read in (read_json, read_yaml):
        with pytest.raises(DamagedFile, match=rf"^{path} is damaged \(.*\): restore it$") as refused:
            read(path, Shape, remedy="restore it")  # type: ignore[operator]
        assert "\n" not in str(refused.value)
    assert path.read_bytes() == content


def test_a_file_with_one_value_is_checked_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "code"
    assert read_line(path, "[0-9]+", what="an exit code", remedy="remove it") is None
    path.write_text(" 75\n")
    assert read_line(path, "[0-9]+", what="an exit code", remedy="remove it") == "75"
    path.write_text("75x")
    with pytest.raises(DamagedFile, match=r"code is damaged.*'75x', but it must be an exit code.*remove it"):
        read_line(path, "[0-9]+", what="an exit code", remedy="remove it")


def test_what_is_no_file_and_what_is_too_large_is_refused_and_not_damaged(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_text("12345")
    for name in ("folder", "fifo", "large"):
        with pytest.raises(ConfigError, match=rf"{name} cannot be read \(.*\): remove it") as refused:
            read_text(tmp_path / name, remedy="remove it", most=4)
        assert not isinstance(refused.value, DamagedFile)
    for path in (tmp_path / "none", tmp_path / "large" / "none"):
        with pytest.raises(FileNotFoundError):
            read_text(path, remedy="")


def test_a_damaged_file_is_set_aside_and_never_overwrites_another(tmp_path: Path) -> None:
    path, warnings = tmp_path / "a.json", list[str]()
    read = partial(read_json, path, Record, remedy="")
    assert read_or_set_aside(read, warn=warnings.append, consequence="it is made again") is None
    for number in range(3):
        path.write_text(f"damaged {number}")
        assert read_or_set_aside(read, warn=warnings.append, consequence="it is made again") is None
    names = ["a.json.damaged", "a.json.damaged-2", "a.json.damaged-3"]
    assert [(tmp_path / name).read_text() for name in names] == [f"damaged {number}" for number in range(3)]
    assert [f"is now named {name}: it is made again" in line for name, line in zip(names, warnings, strict=True)]
    assert not path.exists()


def test_a_damaged_file_in_a_folder_that_cannot_be_written_is_only_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "rename", refuse)
    path, warnings = tmp_path / "a.json", list[str]()
    path.write_text("{")
    read = partial(read_json, path, Record, remedy="")
    assert read_or_set_aside(read, warn=warnings.append, consequence="it is made again") is None
    assert warnings[0].endswith("): it is made again")
    assert path.exists()
    assert stored.renamed(None) == ""
