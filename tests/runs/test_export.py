"""Exported files: what they hold, and when a backbone alone is not exported."""

from __future__ import annotations

import errno
import functools
import importlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import SMALL, Cli, installed
from sslcli.methods.byol import BYOL

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


def test_the_evaluated_part_is_measured_fine_tuned_and_exported(
    run_of: Callable[[str], Path], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = Path(shutil.copytree(run_of("byol"), tmp_path / "run", symlinks=True)), tmp_path / "out.pt"
    assert cli("ssl-eval", f"run={run}", "protocol=knn").code == 0
    online = json.loads((run / "eval/knn.json").read_text())
    shutil.rmtree(run / "eval")  # and the cached features in it
    monkeypatch.setattr(BYOL, "evaluated_part", "target_backbone")
    assert cli("ssl-eval", f"run={run}", "protocol=knn").code == 0
    target = json.loads((run / "eval/knn.json").read_text())
    assert (online["evaluated_part"], target["evaluated_part"]) == ("backbone", "target_backbone")
    ended = cli("ssl-export", f"run={run}", f"out={out}")
    assert ended.code == 0
    assert "target_backbone" in ended.out
    exported = torch.load(out, weights_only=True)
    assert exported["evaluated_part"] == "target_backbone"
    saved = torch.load(max((run / "checkpoints").glob("*.pt")), weights_only=True)["method"]
    names = [name for name in exported["state_dict"] if name.endswith("weight")]
    assert all(torch.equal(exported["state_dict"][name], saved[f"target_backbone.{name}"]) for name in names)
    assert not all(torch.equal(exported["state_dict"][name], saved[f"backbone.{name}"]) for name in names)
    assert cli("ssl-eval", f"weights={out}", *SAME, "protocol=knn").code == 0
    assert numbers(Path(f"{out}.eval") / "knn.json") == numbers(run / "eval/knn.json")
    assert json.loads(Path(f"{out}.eval/knn.json").read_text())["evaluated_part"] == "target_backbone"
    tuning = ["protocol=finetune", "protocol.steps=2", "protocol.lrs=[0.1]", "baselines=false"]
    assert cli("ssl-eval", f"run={run}", *tuning).code == 0


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
    assert "export what=method with format=torch" in ended.err
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


@pytest.mark.parametrize(("normalize", "expected"), [("true", [0.5, 0.5, 0.5]), ("false", [0.0, 0.0, 0.0])])
def test_the_exported_normalization_is_the_one_that_was_used(
    normalize: str, expected: list[float], cli: Cli, tmp_path: Path
) -> None:
    line = [*SMALL, "method=simclr", "backbone.width=4", "monitor.pictures=0", "monitor.knn_every_epochs=0"]
    constants = ["dataset.mean=[0.5,0.5,0.5]", "dataset.std=[0.2,0.2,0.2]"]
    assert cli("ssl-train", *line, *constants, f"views.normalize={normalize}", "run_dir=run").code == 0
    assert cli("ssl-export", "run=run", "out=out.pt").code == 0
    exported = torch.load(tmp_path / "out.pt", weights_only=True)
    assert exported["mean"] == expected
    assert exported["std"] == ([0.2] * 3 if normalize == "true" else [1.0] * 3)
    assert cli("ssl-eval", "run=run", *KNN).code == 0
    wanted = numbers(tmp_path / "run/eval/knn.json")
    for old_constants in (False, True):  # an older version exported the values of the dataset in any case
        if old_constants:
            torch.save(exported | {"mean": [0.5] * 3, "std": [0.2] * 3}, tmp_path / "out.pt")
        assert cli("ssl-eval", "weights=out.pt", *SAME, *constants, *KNN).code == 0
        assert numbers(tmp_path / "out.pt.eval/knn.json") == wanted
    text = json.loads((tmp_path / "run/eval/knn.json").read_text())["transform"]
    assert ("px, normalized as in pre-training" in text) == (normalize == "true")


NETWORK = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, in_channels: int = 3) -> None:
        super().__init__(nn.Conv2d(in_channels, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2))
"""


@pytest.mark.parametrize("kind", ["own", "timm"])
def test_a_wrapped_network_is_exported_with_its_own_names(kind: str, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "network_to_export.py").write_text(NETWORK)
    (tmp_path / "conf/backbone").mkdir(parents=True)
    (tmp_path / "conf/backbone/own.yaml").write_text("_target_: network_to_export.Net\nin_channels: 3\n")
    plug_in = ["--config-dir", "conf", "trust=[network_to_export]"] if kind == "own" else []
    choice = ["backbone=own"] if kind == "own" else ["backbone=timm", "backbone.name=resnet10t"]
    line = [*SMALL, "method=simclr", "monitor.pictures=0", "monitor.knn_every_epochs=0", *choice]
    assert cli("ssl-train", *line, *plug_in, "run_dir=run").code == 0
    trust = plug_in[2:]
    assert cli("ssl-export", "run=run", "out=out.pt", *trust).code == 0
    exported = torch.load(tmp_path / "out.pt", weights_only=True)
    if kind == "timm":
        net: torch.nn.Module = pytest.importorskip("timm").create_model("resnet10t", num_classes=0)
    else:
        net = importlib.import_module("network_to_export").Net()
    net.load_state_dict(exported["state_dict"])  # strict
    assert cli("ssl-eval", "run=run", *KNN, *trust).code == 0
    wanted = numbers(tmp_path / "run/eval/knn.json")
    prefix = "model." if kind == "timm" else "module."
    old = exported | {"state_dict": {f"{prefix}{name}": value for name, value in exported["state_dict"].items()}}
    torch.save(old, tmp_path / "old.pt")
    torch.save(net.state_dict(), tmp_path / "plain.pt")
    for name in ("out", "old"):
        ended = cli("ssl-eval", f"weights={name}.pt", *SAME, *KNN, *trust)
        assert ended.code == 0, ended.err
        assert numbers(tmp_path / f"{name}.pt.eval/knn.json") == wanted
    assert cli("ssl-eval", "weights=plain.pt", *SAME, *KNN, *choice, *plug_in).code == 0


def test_weights_that_are_not_finite_are_exported_with_a_warning(trained: Path, cli: Cli) -> None:
    path = trained / "checkpoints/step-00000003.pt"
    state = torch.load(path, weights_only=True)
    name = next(name for name in state["method"] if name.startswith("backbone.") and name.endswith("weight"))
    state["method"][name] *= math.nan
    torch.save(state, path)
    path.with_suffix(".sha256").unlink()
    ended = cli("ssl-export", f"run={trained}")
    assert (ended.code, ended.err) == (0, "")
    assert "tensors are not finite, " in ended.out
    assert cli("ssl-export", f"run={trained}", "what=method").out.count("the run diverged") == 1
