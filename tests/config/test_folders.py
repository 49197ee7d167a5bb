"""Folders of yaml files."""

from __future__ import annotations

from pathlib import Path

import pytest

from sslcli.config import folders


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], []),
        (["seed=1", "--cfg", "job"], []),
        (["--config-dir", "mine", "seed=1"], [Path("mine")]),
        (["seed=1", "--config-dir=mine"], [Path("mine")]),
        (["-cd", "mine"], [Path("mine")]),
        (["-cd=mine"], [Path("mine")]),
        (["--config-dir=mine", "--config-dir=other"], [Path("mine")]),
    ],
)
def test_the_folder_of_the_command_line(arguments: list[str], expected: list[Path]) -> None:
    assert folders.user_folders(arguments) == expected


def test_the_checkout_has_the_yaml_files_unless_the_package_is_installed_with_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(folders, "find_spec", lambda name: None)
    found = folders.conf_folder()
    assert found is not None
    assert (found / "train.yaml").exists()
    assert folders.conf_folder(installed=True) is None

    class Spec:
        origin = str(tmp_path / "conf" / "__init__.py")

    monkeypatch.setattr(folders, "find_spec", lambda name: Spec)
    assert folders.conf_folder() == folders.conf_folder(installed=True) == tmp_path / "conf"
