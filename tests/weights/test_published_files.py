"""Weight files of other programs: their formats, harmless objects beside the weights, and files that are refused."""

from __future__ import annotations

import argparse
import collections
import functools
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sslcli.errors import ConfigError
from sslcli.weights.published_files import read_published

WEIGHT = torch.arange(3.0)


@pytest.mark.parametrize("is_zip", [True, False])
def test_settings_of_the_training_beside_the_weights_are_ignored(is_zip: bool, tmp_path: Path) -> None:
    content = {
        "model": {"weight": WEIGHT},
        "args": argparse.Namespace(lr=1e-3, root=Path("/data")),  # MAE and DINO
        "best": np.float64(0.5),
        "history": np.arange(3),
        "meters": collections.defaultdict(list, loss=[1.0]),
        "epoch": 3,
    }
    torch.save(content, tmp_path / "a.pth.tar", _use_new_zipfile_serialization=is_zip)
    found = read_published(tmp_path / "a.pth.tar")
    assert torch.equal(found["model"]["weight"], WEIGHT)
    assert found["epoch"] == 3
    assert not isinstance(found["args"], argparse.Namespace)  # no class of the file is used


def test_hyperparameters_of_lightning_and_omegaconf_are_ignored(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    content = {"state_dict": {"weight": WEIGHT}, "hyper_parameters": OmegaConf.create({"a": {"b": [1, "x", None]}})}
    torch.save(content, tmp_path / "a.ckpt")
    assert torch.equal(read_published(tmp_path / "a.ckpt")["state_dict"]["weight"], WEIGHT)


class Attack:
    def __reduce__(self) -> Any:
        return functools.partial, (print, "executed")


def test_a_file_with_other_objects_is_refused_with_their_class_and_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"weight": WEIGHT, "more": Attack()}, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"a.pt was refused.*contains functools.partial.*weights_only=False"):
        read_published(tmp_path / "a.pt")
    assert capsys.readouterr().out == ""


def test_the_classes_that_are_allowed_here_are_not_allowed_afterwards(tmp_path: Path) -> None:
    torch.save({"weight": WEIGHT, "args": argparse.Namespace()}, tmp_path / "a.pt")
    read_published(tmp_path / "a.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.pt", weights_only=True)


def test_a_safetensors_file_is_recognized_by_its_content(tmp_path: Path) -> None:
    header = json.dumps({"weight": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    path = tmp_path / "weights.bin"
    path.write_bytes(len(header).to_bytes(8, "little") + header + WEIGHT.numpy().tobytes())
    assert torch.equal(read_published(path)["weight"], WEIGHT)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ConfigError, match=r"weights.bin is a damaged safetensors file \(the header has an invalid.*\): download or"
    ):
        read_published(path)


def test_files_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none cannot be read \(No such file"):
        read_published(tmp_path / "none")
    torch.save({"epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match="contains no tensors"):
        read_published(tmp_path / "a.pt")
    torch.save({"x." * 50_000 + "weight": WEIGHT}, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"has a key of 100,006 characters \(x\.x.+\.weight\), but at most 1,000"):
        read_published(tmp_path / "a.pt")
    torch.save([WEIGHT], tmp_path / "a.pt")
    with pytest.raises(ConfigError, match="holds a list"):
        read_published(tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"a.pt cannot be read \(EOFError.*damaged, or not a file of weights"):
        read_published(tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes(b"\x08\x0a:pytorch")  # the start of a file of ONNX
    with pytest.raises(ConfigError, match=r"holds more than tensors and plain values$"):
        read_published(tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes(b"\x80\x02 not a pickle")
    with pytest.raises(ConfigError, match=r"a.pt (was refused|cannot be read)"):
        read_published(tmp_path / "a.pt")
