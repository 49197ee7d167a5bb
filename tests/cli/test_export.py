"""ssl-export from the command line to a file that ssl-eval measures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import Cli, installed
from pages import ROOT, blocks

SAME = ["dataset=shapes", "dataset.limit=200", "dataset.test_images=100"]  # as the run was trained on
KNN = ["protocol=knn", "baselines=false"]


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
        one, other = (
            json.loads((results_dir / "knn.json").read_text())
            for results_dir in (trained / "eval", Path(f"{path}.eval"))
        )
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


def test_results_of_a_file_on_other_images_have_names_of_their_own(trained: Path, cli: Cli) -> None:
    assert cli("ssl-export", f"run={trained}").code == 0
    path = trained / "export/backbone-step-00000003.pt"
    for extra in ([], ["dataset.seed=1"], ["dataset.limit=150"]):
        assert cli("ssl-eval", f"weights={path}", *SAME, *KNN, *extra).code == 0
    names = {re.sub("-[0-9a-f]{6}", "", found.stem) for found in Path(f"{path}.eval").glob("*.json")}
    assert names == {"knn", "knn_shapes_limit-200_val-in-train_seed-1", "knn_shapes_limit-150_val-in-train"}


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("", ["give run=DIR"]),
        ("run=nowhere", ["nowhere", "no such directory"]),
        ("run=.", ["not a run directory"]),
        ("run={run} checkpoint=2", ["checkpoint is 2", "steps: 3"]),
        ("run={run} checkpoint=first", ["'first'", "'last' or the number of a step"]),
        ("run={run} what=head", ["'head'", "backbone, method"]),
        ("run={run} out=.", ["out is '", "that is a directory"]),
        ("run={run} format=tim", ["'tim'", "torch, safetensors, torchvision, timm, onnx, hf"]),
        ("run={run} format=torchvision", ["only the ResNets", "Possible formats: torch, safetensors, onnx"]),
        ("run={run} format=safetensors what=method", ["format=safetensors exports only what=backbone"]),
        ("run={run} format=safetensors out=.", ["did not write", "(file, trained)"]),
        ("run={run} format=safetensors out=x.safetensors", ["writes a folder", "remove .safetensors"]),
        ("run={run} out=file/in/a/file", ["file/in/a/file, but it cannot be written"]),
        ("run={run} whatt=method", ["whatt", "Did you mean 'what'"]),
        ("--multirun run={run} checkpoint=2,3", ["does not support --multirun"]),
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


def test_a_folder_has_weights_preprocessing_and_a_model_card(trained: Path, cli: Cli, tmp_path: Path) -> None:
    for _ in range(2):  # an export replaces an earlier one
        ended = cli("ssl-export", f"run={trained}", "format=safetensors")
        assert (ended.code, ended.err) == (0, "")
    out = trained / "export/safetensors-step-00000003"
    assert {path.name for path in out.iterdir()} == {
        "model.safetensors",
        "config.json",
        "preprocessing.json",
        "README.md",
    }
    assert "difference of features  0" in ended.out
    assert "features on 32 images of shapes" in ended.out
    assert json.loads((out / "preprocessing.json").read_text())["center_crop"] == 32
    assert "# Small, pre-trained with SimCLR on shapes" in (out / "README.md").read_text()
    assert cli("ssl-export", f"run={trained}", f"out={tmp_path / 'net.pt'}").code == 0
    (code,) = [text for _, text in blocks(ROOT / "docs" / "export.md") if '"net.pt"' in text]
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["exported"]["provenance"]["step"] == 3
    assert {path.name for path in tmp_path.glob("net.pt*")} == {
        "net.pt",
        "net.pt.README.md",
        "net.pt.preprocessing.json",
    }


def test_the_installed_command_tells_how_to_go_on(trained: Path, tmp_path: Path) -> None:
    assert "ssl-eval weights=" in installed(tmp_path, "ssl-export", f"run={trained}")
