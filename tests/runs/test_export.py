"""Exported files: what they hold, and when a backbone alone is not exported."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import SMALL, Cli, installed

SAME = ["dataset=shapes", "dataset.limit=200", "dataset.test_images=100"]  # as the run was trained on
KNN = ["protocol=knn", "baselines=false"]


def numbers(path: Path) -> dict[str, Any]:
    """Return the entries that must be equal wherever the same network is evaluated."""
    found = json.loads(path.read_text())
    return {key: found[key] for key in found if "top" in key or "interval" in key or key in ("baselines", "n_train")}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run of a method with a seed of its own, trained once."""

    @functools.cache
    def train(method: str) -> Path:
        folder = tmp_path_factory.mktemp(method)
        line = [*SMALL, f"method={method}", "seed=3", "backbone.width=8", "monitor.pictures=0"]
        installed(folder, "ssl-train", *line, f"run_dir={folder / 'run'}")
        return folder / "run"

    return train


@pytest.mark.parametrize(
    ("method", "what", "layer"),
    [
        ("byol", "backbone", "backbone"),
        ("cpc", "method", "backbone"),
        ("dcgan", "method", "backbone"),
        ("cmc", "method", "backbone"),
        ("memory_bank", "method", "bank"),
    ],
)
def test_a_file_gives_the_numbers_of_its_run(
    method: str, what: str, layer: str, run_of: Callable[[str], Path], cli: Cli, tmp_path: Path
) -> None:
    run, out = Path(shutil.copytree(run_of(method), tmp_path / "run", symlinks=True)), tmp_path / "out.pt"
    how = ["protocol=knn", f"feature_layer={layer}"]
    assert cli("ssl-eval", f"run={run}", *how).code == 0
    assert cli("ssl-export", f"run={run}", f"what={what}", f"out={out}").code == 0
    ended = cli("ssl-eval", f"weights={out}", *SAME, *how)
    assert (ended.code, ended.err) == (0, "")
    name = "knn" if layer == "backbone" else f"knn_{layer}"
    assert numbers(Path(f"{out}.eval") / f"{name}.json") == numbers(run / f"eval/{name}.json")


@pytest.mark.parametrize(
    ("method", "why"),
    [("cpc", "overrides features"), ("dcgan", "overrides features"), ("cmc", "changes the layers of the backbone")],
)
def test_a_backbone_that_does_not_give_the_numbers_of_its_run_is_not_exported(
    method: str, why: str, run_of: Callable[[str], Path], cli: Cli, tmp_path: Path
) -> None:
    ended = cli("ssl-export", f"run={run_of(method)}", f"out={tmp_path / 'out.pt'}")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert why in ended.err
    assert "export what=method" in ended.err
    assert not (tmp_path / "out.pt").exists()


def test_a_whole_method_of_before_or_of_a_strange_class_is_refused(trained: Path, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "all.pt"
    assert cli("ssl-export", f"run={trained}", "what=method", f"out={out}").code == 0
    whole = torch.load(out, weights_only=True)
    strange = {"_target_": "subprocess.run", "args": ["touch", str(tmp_path / "pwned")]}
    function = {"_target_": "sslcli.distributed.elastic.run_processes", "arguments": ["-c", "1"], "processes": 1}
    for change, wanted in (
        ({"method": strange}, "subprocess.run"),
        ({"backbone": strange}, "subprocess.run"),
        ({"method": function}, "sslcli.distributed.elastic.run_processes"),
        ({"num_images": "many"}, "num_images is 'many'"),
        ({"method": 5}, "method is 5"),
    ):
        torch.save(whole | change, out)
        ended = cli("ssl-eval", f"weights={out}", *SAME, *KNN)
        assert (ended.code, ended.err.count("\n"), wanted in ended.err) == (2, 1, True), ended.err
    assert not (tmp_path / "pwned").exists()
    torch.save({key: value for key, value in whole.items() if key not in ("num_images", "seed")}, out)
    ended = cli("ssl-eval", f"weights={out}", *SAME, *KNN)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "not its num_images, seed" in ended.err
    assert "export it again" in ended.err
    torch.save(whole, out)
    ended = cli("ssl-eval", f"weights={out}", *SAME, *KNN, "backbone=small")
    assert (ended.code, "remove backbone" in ended.err) == (2, True)


@pytest.mark.parametrize(
    ("number", "code", "remedy"),
    [(errno.ENOSPC, 3, "free space"), (errno.EIO, 3, "free space"), (errno.EACCES, 2, "out is")],
    ids=["full", "broken", "no permission"],
)
def test_a_disk_that_cannot_be_written_is_a_failure_of_the_machine(
    number: int, code: int, remedy: str, trained: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("sslcli.system.atomic.synchronize", fail)
    ended = cli("ssl-export", f"run={trained}")
    assert (ended.code, ended.err.count("\n")) == (code, 1)
    assert remedy in ended.err
    assert list((trained / "export").iterdir()) == []


def test_a_full_disk_is_known_by_its_error_number(
    trained: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = tmp_path / "full.tmp"
    full.symlink_to("/dev/full")
    monkeypatch.setattr("sslcli.system.atomic.temporary_name", lambda path: full)
    ended = cli("ssl-export", f"run={trained}")
    assert ended.code == 3
    assert "cannot be written (No space left on device): free space" in ended.err
