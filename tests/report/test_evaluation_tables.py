"""Tables at the end of ssl-eval."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from command_line import Cli, result


def test_results_of_before_stay_in_the_table_and_files_without_one_do_not_end_it(trained: Path, cli: Cli) -> None:
    assert cli("ssl-eval", f"run={trained}", "protocol=knn", "baselines=false").code == 0
    old = result(trained / "eval", "knn")
    line = f"knn: {old['description']}\n"
    del old["measured"], old["step"], old["description"]
    (trained / "eval/semi.json").write_text(json.dumps(old | {"protocol": "semi"}))
    (trained / "eval/linear_other.json").write_text("{}")
    ended = cli("ssl-eval", f"run={trained}", "protocol=knn", "baselines=false")
    assert (ended.code, ended.err) == (0, "")
    rows = {line.split()[1]: line.split()[-2] for line in ended.out.splitlines() if "(val)" in line}
    assert rows == {"knn": "3", "semi": "-"}
    assert line in ended.out
    assert "semi: " not in ended.out
    assert "linear_other.json is damaged (it has no top1) and is now named linear_other.json.damaged" in ended.out
    assert (trained / "eval/linear_other.json.damaged").read_text() == "{}"


def test_a_long_name_is_whole_in_the_table_of_a_narrow_screen(
    trained: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "simclr_shapes_small_" + "0123456789abcdef" * 4 + "_the_end"
    shutil.copytree(trained, tmp_path / "sweep" / name, symlinks=True)
    ended = cli("ssl-eval", f"run={tmp_path / 'sweep'}", "protocol=knn", "baselines=false")
    assert (ended.code, ended.err) == (0, "")
    table = ended.out[ended.out.index("top-1") :]
    first = [line.split("│")[1].strip() for line in table.splitlines() if line.startswith("│")]
    assert "".join(first) == name
    description = result(tmp_path / "sweep" / name / "eval", "knn")["description"]
    lines = table.splitlines()[1:]
    assert lines[-1] == description
    assert max(map(len, lines[:-1])) <= 80
