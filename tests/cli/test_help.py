"""Fast answers: help, version, completion, printing. None imports torch, and help does not import Hydra."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

from command_line import Cli
from sslcli import __version__
from sslcli.config import folders
from sslcli.config.schema import GROUPS
from sslcli.config.settings import EmbedSettings, EvalSettings, ExportSettings, RunSettings, TrainSettings

CONF = Path(__file__).parents[2] / "conf"


def test_help_names_every_group_choice_and_key(cli: Cli) -> None:
    commands = {
        "train": [RunSettings, TrainSettings],
        "eval": [EvalSettings],
        "embed": [EmbedSettings],
        "export": [ExportSettings],
    }
    for command, settings in commands.items():
        ended = cli(f"ssl-{command}", "--help")
        assert (ended.code, ended.err) == (0, "")
        results = {line.split()[0]: re.findall(r"[\w-]+", line) for line in ended.out.splitlines() if line.strip()}
        for group in GROUPS[command]:
            assert set(results[group][1:]) == {path.stem for path in (CONF / group).glob("*.yaml")}, group
        keys = {field.name for kind in settings for field in fields(kind)}
        assert {f"{key}:" for key in keys} <= results.keys()


@pytest.mark.parametrize("program", ["ssl-train", "ssl-eval"])
def test_a_reader_that_has_seen_enough_is_no_error(program: str) -> None:
    there, here = os.pipe()
    os.close(there)  # as `head -1` does, but before anything is written
    ended = subprocess.run(
        [str(Path(sys.executable).with_name(program)), "--help"], stdout=here, stderr=subprocess.PIPE, check=False
    )
    os.close(here)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_the_default_choice_stands_in_brackets(cli: Cli) -> None:
    assert "[simclr]" in cli("ssl-train", "-h").out
    assert "[linear]" in cli("ssl-eval", "--help").out


def test_help_with_a_choice_shows_its_yaml_and_comments(cli: Cli) -> None:
    ended = cli("ssl-train", "method=moco_v2", "--help")
    assert ended.code == 0
    text = (CONF / "method/moco_v2.yaml").read_text()
    assert [line.strip() for line in text.splitlines() if line.strip() not in ended.out] == []


def test_help_lists_the_choices_of_the_users_own_folder(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "method").mkdir()
    (tmp_path / "method/mine.yaml").write_text("# of mine\n_target_: my.Method\n")
    for flags in (["--config-dir", str(tmp_path)], [f"--config-dir={tmp_path}"], ["-cd", str(tmp_path)]):
        assert re.search(r"^  method .*\bmine\b", cli("ssl-train", *flags, "--help").out, re.MULTILINE)
    assert "# of mine" in cli("ssl-train", "--config-dir", str(tmp_path), "method=mine", "--help").out


def test_help_reads_no_file_outside_the_groups(cli: Cli) -> None:
    assert "usage:" in cli("ssl-train", "method=../../setup", "run_dir=../method/moco", "--help").out


def test_version_is_that_of_sslcli(cli: Cli) -> None:
    assert cli("ssl-train", "--version").out == f"sslcli {__version__}\n"


def test_a_checkout_that_is_not_installed_finds_its_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "find_spec", lambda name: None)
    assert folders.conf_folder() == CONF
    assert folders.conf_folder(installed=True) is None


PROBE = """
import contextlib, io, json, os, sys
from sslcli.cli import embed, eval, export, train
os.environ |= {"COMP_LINE": "ssl-train method=", "COMP_POINT": "17"}
results = {}
for line in sys.argv[1:]:
    program, *arguments = line.split()
    sys.argv = [program, *arguments]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            {"ssl-train": train, "ssl-eval": eval, "ssl-embed": embed, "ssl-export": export}[program].main()
        except SystemExit as ended:
            code = ended.code
    results[line] = [code, out.getvalue(), err.getvalue(), "torch" in sys.modules, "hydra" in sys.modules]
print(json.dumps(results))
"""


def test_torch_is_imported_by_neither_help_nor_printing_nor_completion_nor_wrong_input() -> None:
    lines = [
        "ssl-train --help",
        "ssl-train --cfg job method=moco",
        "ssl-train --cfg job --resolve --package backbone",
        "ssl-train -sc query=bash",
        "ssl-train --info searchpath",
        "ssl-train method=mocooo",
        "ssl-train optimizer.lr=abc",
        "ssl-train --multirun seed=0,x",
        "ssl-eval --cfg job",
        "ssl-eval run=/nonesuch",
        "ssl-export -sc query=bash",
        "ssl-export run=/nonesuch",
        "ssl-export run=. what=backbon",
        "ssl-embed --help",
        "ssl-embed run=/nonesuch out=x.npy",
    ]
    ended = subprocess.run([sys.executable, "-c", PROBE, *lines], capture_output=True, text=True, check=True)
    results = json.loads(ended.stdout)
    assert [line for line in lines if results[line][3]] == []
    assert not results[lines[0]][4], "--help imported Hydra"
    assert [results[line][0] or 0 for line in lines] == [0, 0, 0, 0, 0, 2, 2, 2, 0, 2, 0, 2, 2, 0, 2]
    assert "queue_size: 65536" in results[lines[1]][1]
    assert "image_size: 32" in results[lines[2]][1]
    assert "method=moco_v3" in results[lines[3]][1]
    assert "pkg://sslcli.conf" in results[lines[4]][1]


def test_help_comes_in_under_half_a_second() -> None:
    times = []
    for _ in range(3):
        before = time.perf_counter()
        subprocess.run([Path(sys.executable).with_name("ssl-train"), "--help"], stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - before)
    assert min(times) < 0.5
