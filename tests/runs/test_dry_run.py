"""Dry run: measures a few steps, trains nothing."""

from __future__ import annotations

from pathlib import Path

from command_line import SMALL, Cli


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_a_dry_run_measures_and_trains_nothing(cli: Cli, tmp_path: Path) -> None:
    ended = cli("ssl-train", *SMALL, "run_dir=dry", "dry_run=true")
    assert (ended.code, ended.err) == (0, "")
    for part in (
        "learning rate",
        "backbone parameters",
        "peak memory",
        "estimated time",
        "view 0",
        "the dry run is complete",
    ):
        assert part in ended.out
    assert files(tmp_path / "dry") == ["views.png"]
