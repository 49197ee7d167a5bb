"""ssl-export from the command line to a file that ssl-eval measures."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import SMALL, Cli, installed

SAME = ["dataset=shapes", "dataset.limit=200", "dataset.test_images=100"]  # as the run was trained on
KNN = ["protocol=knn", "baselines=false"]


@pytest.fixture
def trained(run_dir: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(run_dir, tmp_path / "trained", symlinks=True))


def test_the_backbone_of_a_run_becomes_a_file_that_measures_the_same(trained: Path, cli: Cli) -> None:
    ended = cli("ssl-export", f"run={trained}")
    assert (ended.code, ended.err) == (0, "")
    path = trained / "export/backbone-step-00000003.pt"
    assert str(path) in ended.out.replace("\n", "")
    found = torch.load(path, weights_only=True)
    state = torch.load(trained / "checkpoints/last", weights_only=True)["method"]
    expected = {name.removeprefix("backbone."): v for name, v in state.items() if name.startswith("backbone.")}
    assert found["state_dict"].keys() == expected.keys()
    assert all(torch.equal(found["state_dict"][name], expected[name]) for name in expected)
    assert (found["what"], found["provenance"]["step"]) == ("backbone", 3)
    assert found["backbone"]["_target_"] == "sslcli.backbones.small.Small"

    assert cli("ssl-eval", f"run={trained}", *KNN).code == 0
    for backbone in ([], ["backbone=small"]):
        ended = cli("ssl-eval", f"weights={path}", *SAME, *KNN, *backbone)
        assert (ended.code, ended.err) == (0, "")
        one, other = (json.loads((home / "knn.json").read_text()) for home in (trained / "eval", Path(f"{path}.eval")))
        for key in ("top1", "top5", "test_top1", "k", "precision", "n_test"):
            assert other[key] == one[key]
        assert other["exported_from"]["checkpoint_sha256"] == one["checkpoint_sha256"]


def test_a_whole_method_is_exported_where_it_is_wanted(trained: Path, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "all.pt"
    ended = cli("ssl-export", f"run={trained}", "what=method", f"out={out}", "checkpoint=3")
    assert (ended.code, ended.err) == (0, "")
    found = torch.load(out, weights_only=True)
    state = torch.load(trained / "checkpoints/last", weights_only=True)["method"]
    assert found["state_dict"].keys() == state.keys()
    assert found["method"]["_target_"] == "sslcli.methods.simclr.SimCLR"
    assert (found["seed"], found["num_images"], found["dataset"]["limit"]) == (0, 200, 200)
    assert f"ssl-eval weights={out}" in ended.out.replace("\n", "")


def numbers(path: Path) -> dict[str, Any]:
    """What must be equal wherever the same net is measured."""
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
    ("method", "why"), [("cpc", "overrides features"), ("dcgan", "overrides features"), ("cmc", "another net")]
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
    assert (ended.code, "leave out backbone" in ended.err) == (2, True)


def test_results_of_a_file_on_other_images_have_names_of_their_own(trained: Path, cli: Cli) -> None:
    assert cli("ssl-export", f"run={trained}").code == 0
    path = trained / "export/backbone-step-00000003.pt"
    for extra in ([], ["dataset.seed=1"], ["dataset.limit=150"]):
        assert cli("ssl-eval", f"weights={path}", *SAME, *KNN, *extra).code == 0
    names = {re.sub("-[0-9a-f]{6}", "", found.stem) for found in Path(f"{path}.eval").glob("*.json")}
    assert names == {"knn", "knn_shapes_limit-200_seed-1", "knn_shapes_limit-150"}


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("", ["give run=DIR"]),
        ("run=nowhere", ["nowhere", "no such directory"]),
        ("run=.", ["not a run directory"]),
        ("run={run} checkpoint=2", ["checkpoint is 2", "steps: 3"]),
        ("run={run} checkpoint=first", ["'first'", "last or the number of a step"]),
        ("run={run} what=head", ["'head'", "backbone, method"]),
        ("run={run} out=.", ["out is '", "that is a directory"]),
        ("run={run} out=file/in/a/file", ["file/in/a/file, but it cannot be written"]),
        ("run={run} whatt=method", ["whatt", "Did you mean 'what'"]),
        ("--multirun run={run} checkpoint=2,3", ["no --multirun"]),
        ("method=byol run={run}", ["method"]),
    ],
)
def test_wrong_input_is_refused_in_one_message(
    line: str, wanted: list[str], trained: Path, cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    ended = cli("ssl-export", *line.format(run=trained).split())
    assert ended.code == 2, ended
    assert [part for part in wanted if part not in ended.err] == [], ended.err
    assert ended.err.count("\n") == 1
    assert not (trained / "export").exists()


def test_the_installed_command_tells_how_to_go_on(trained: Path, tmp_path: Path) -> None:
    assert "ssl-eval weights=" in installed(tmp_path, "ssl-export", f"run={trained}")
