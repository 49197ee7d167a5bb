from __future__ import annotations

from pathlib import Path

import pytest
import torch

from exported import exported_run
from sslcli.errors import ConfigError
from sslcli.methods.simclr import SimCLR
from sslcli.runs import export_torch
from sslcli.runs.export_check import Images
from sslcli.runs.export_torch import build_from, encoder, write_file
from sslcli.weights.files import load_weights

IMAGES = Images(torch.rand(4, 3, 32, 32), "noise")


@pytest.mark.parametrize("what", ["backbone", "method"])
def test_a_file_gives_the_features_of_the_run(what: str, run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep/net.pt"
    weights, difference = write_file(exported_run(run_dir), what, out, IMAGES)
    assert difference == 0
    net = build_from(load_weights(out, device=torch.device("cpu")), out, trust=[])
    assert isinstance(net, SimCLR) == (what == "method")
    assert encoder(net)(IMAGES.images).shape == (4, 256)
    assert not net.training
    assert torch.load(out, weights_only=True)["state_dict"].keys() == weights.keys()


def test_a_file_with_other_features_is_removed(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_torch, "load_strictly", lambda *_: None)  # the file gives the untrained network
    with pytest.raises(ConfigError, match="format=torch: the export was removed"):
        write_file(exported_run(run_dir), "backbone", tmp_path / "net.pt", IMAGES)
    assert list(tmp_path.iterdir()) == []
