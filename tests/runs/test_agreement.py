from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sslcli.runs.agreement import differences, fingerprint_items, source_files

CONFIG: dict[str, Any] = {
    "seed": 0,
    "run_dir": "/runs/one",
    "device": "cuda:0",
    "launcher": {"threads": 2, "timeout": "10m"},
    "train": {"max_time": None, "save_every_steps": 5},
    "method": {"_target_": "sslcli.methods.byol.BYOL"},
    "_lines_": ["seed=0"],
}


def test_what_decides_when_processes_meet_must_agree_though_it_changes_no_result() -> None:
    other = CONFIG | {
        "run_dir": "/runs/two",
        "device": "cuda:1",
        "launcher": {"threads": 3, "timeout": "10m"},
        "train": {"max_time": "5m", "save_every_steps": 5},
        "_lines_": [],
    }
    assert differences(fingerprint_items(CONFIG), fingerprint_items(other)) == [
        "run_dir: '/runs/one' -> '/runs/two'",
        "train.max_time: None -> '5m'",
    ]


def test_what_one_process_lacks_is_a_difference() -> None:
    assert differences({"a": "1", "b": "2"}, {"b": "2", "c": "3"}) == ["a: 1 -> absent", "c: absent -> 3"]


def test_the_files_of_sslcli_and_of_every_package_that_is_built_from_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("mine/__init__.py", "mine/net.py", "single.py"):
        (tmp_path / name).write_text("one")
    monkeypatch.syspath_prepend(str(tmp_path))
    names = [name for _, name in source_files(["mine", "single", "torch", "sslcli"])]
    assert {"sslcli/engine/loop.py", "mine/__init__.py", "mine/net.py", "single.py"} <= set(names)
    assert len(names) == len(set(names))
    assert not any(name.startswith("torch") for name in names)
    config = CONFIG | {"backbone": {"_target_": "mine.net.Net"}}
    before = fingerprint_items(config)
    (tmp_path / "mine" / "net.py").write_text("two")
    (changed,) = differences(before, fingerprint_items(config))
    assert changed.startswith("file mine/net.py: ")
