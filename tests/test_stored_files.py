"""Damaged files that sslcli wrote earlier: every kind of file with every kind of damage, as a user meets it.

A command either sets the file aside, warns and ends with 0, or ends with exit code 2 and one message.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import SMALL, Cli, Ended
from damage import doubled_lines, empty, flip_a_bit, not_utf8, nul_bytes, other_type, truncate
from sslcli.engine import checkpoint

Damage = Callable[[Path], None]
TEXT: list[Damage] = [empty, truncate, not_utf8, nul_bytes, other_type, doubled_lines]
BINARY: list[Damage] = [empty, truncate, nul_bytes, other_type, flip_a_bit]
TRAIN = ["ssl-train", *SMALL, "monitor.knn_k=10"]


def refused(ended: Ended, path: Path) -> None:
    """Fail unless the command ended with exit code 2 and one message that names the file."""
    assert ended.code == 2, ended
    assert ended.err.count("\n") == 1
    assert str(path) in ended.err


def set_aside(ended: Ended, path: Path, content: bytes) -> None:
    """Fail unless the command set the damaged file aside, warned and ended with exit code 0."""
    assert (ended.code, ended.err) == (0, "")
    assert f"{path} is damaged (" in ended.out
    assert path.with_name(f"{path.name}.damaged").read_bytes() == content


def resumed(cli: Cli, run_dir: Path) -> Ended:
    (run_dir / "done").unlink(missing_ok=True)
    return cli(*TRAIN, f"run_dir={run_dir}")


@pytest.mark.parametrize("damage", TEXT)
def test_a_damaged_configuration_is_refused_by_all_commands(damage: Damage, trained: Path, cli: Cli) -> None:
    path = trained / "config.yaml"
    damage(path)
    content = path.read_bytes()
    refused(resumed(cli, trained), path)
    refused(cli("ssl-eval", f"run={trained}", "protocol=knn"), path)
    refused(cli("ssl-export", f"run={trained}"), path)
    assert path.read_bytes() == content


def test_a_damaged_environment_is_set_aside(trained: Path, cli: Cli) -> None:
    path = trained / "environment.json"
    whole = path.read_bytes()
    for damage in (empty, truncate, not_utf8, nul_bytes, other_type):
        path.write_bytes(whole)
        damage(path)
        content = path.read_bytes()
        set_aside(resumed(cli, trained), path, content)
        path.with_name(f"{path.name}.damaged").unlink()
        assert json.loads(path.read_bytes()).keys() == {"first", "latest"}


def test_intact_lines_of_damaged_metrics_are_kept(trained: Path, cli: Cli) -> None:
    path = trained / "metrics.jsonl"
    whole = path.read_bytes()
    for damage in (not_utf8, nul_bytes, doubled_lines):
        path.write_bytes(whole)
        damage(path)
        content = path.read_bytes()
        ended = resumed(cli, trained)
        assert (ended.code, ended.err) == (0, "")
        assert f"{path} is damaged and is now named metrics.jsonl.damaged: " in ended.out
        copy = path.with_name("metrics.jsonl.damaged")
        assert copy.read_bytes() == content
        copy.unlink()
        lines = path.read_bytes().splitlines()
        assert len(lines) >= 2
        assert set(lines) <= set(whole.splitlines())


@pytest.mark.parametrize("damage", BINARY)
def test_a_damaged_checkpoint_is_passed_over_by_runs_and_refused_by_other_commands(
    damage: Damage, trained: Path, cli: Cli
) -> None:
    (path,) = checkpoint.all_of(trained)
    damage(path)
    for ended in (cli("ssl-eval", f"run={trained}", "protocol=knn"), cli("ssl-export", f"run={trained}")):
        refused(ended, path)
    ended = resumed(cli, trained)
    refused(ended, path.parent)
    assert f"{path} " in ended.out
    assert "Falling back to the previous one" in ended.out


def test_damaged_results_and_caches_are_set_aside_and_computed_again(trained: Path, cli: Cli) -> None:
    line = ["ssl-eval", f"run={trained}", "protocol=knn"]
    assert cli(*line).code == 0
    others = ["ssl-eval", f"run={trained}", "protocol=linear", "protocol.epochs=1", "baselines=false", "cache=false"]
    result = trained / "eval/knn.json"
    whole = result.read_bytes()
    for damage in (empty, truncate, not_utf8, nul_bytes, other_type):
        result.write_bytes(whole)
        damage(result)
        content = result.read_bytes()
        set_aside(cli(*others), result, content)
        assert not result.exists()
        result.with_name("knn.json.damaged").unlink()
    for path in sorted((trained / "eval/features").iterdir()):
        for damage in BINARY if path.suffix == ".pt" else (empty, truncate, not_utf8, nul_bytes, other_type):
            damage(path)
            content = path.read_bytes()
            if path.suffix == ".pt":  # baselines whose results are cached need no features
                for cached in path.parent.glob("*.json"):
                    cached.unlink()
            set_aside(cli(*line), path, content)
            path.with_name(f"{path.name}.damaged").unlink()


@pytest.mark.parametrize("damage", BINARY)
def test_a_damaged_export_is_refused(damage: Damage, trained: Path, cli: Cli) -> None:
    assert cli("ssl-export", f"run={trained}").code == 0
    (path,) = (trained / "export").glob("*.pt")
    damage(path)
    refused(cli("ssl-eval", f"weights={path}", "dataset=shapes", "protocol=knn"), path)


@pytest.mark.usefixtures("quick_jobs")
def test_a_damaged_record_of_a_sweep_is_refused_before_any_job_starts(cli: Cli, tmp_path: Path) -> None:
    line = ["ssl-train", "--multirun", "seed=0,1", "hydra.sweep.dir=sweep", "sweep.jobs=1"]
    assert cli(*line).code == 0
    path = sorted((tmp_path / "sweep/jobs").glob("*.json"))[0]
    whole = path.read_bytes()
    for damage in (empty, truncate, not_utf8, nul_bytes, other_type):
        path.write_bytes(whole)
        damage(path)
        content = path.read_bytes()
        for run_dir in (tmp_path / "sweep").glob("*/starts"):
            run_dir.unlink()
        refused(cli(*line, "seed=0,1,2"), path)
        assert path.read_bytes() == content
        assert not list((tmp_path / "sweep").glob("*/starts"))
    shutil.rmtree(tmp_path / "sweep")
