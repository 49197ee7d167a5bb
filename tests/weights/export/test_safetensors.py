from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file
from torch import nn

from exported import round_trip, trained
from sslcli.backbones.small import Small
from sslcli.errors import ConfigError
from sslcli.weights.export.safetensors import Safetensors, write_safetensors
from tiny import TinyNet


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    given = {
        "half": torch.randn(3, 5).half(),
        "number": torch.tensor(7),
        "empty": torch.zeros(0, 2),
        "flags": torch.tensor([True, False, True]),
        "strided": torch.randn(4, 6).t(),
        "brain": torch.randn(3).bfloat16(),
        'name with "quotes" and é': torch.randn(2, dtype=torch.float64),
    }
    write_safetensors(tmp_path / "x.safetensors", given, {"format": "pt"})
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], given[name]) and found[name].dtype == given[name].dtype for name in given)
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="z has the dtype"):
        write_safetensors(tmp_path / "x", {"z": torch.zeros(2, dtype=torch.complex64)}, {})


def test_any_backbone_is_exported_with_its_description(tmp_path: Path) -> None:
    one = trained(Small(image_size=16, width=4), size=16, build=lambda: Small(image_size=16, width=4))
    assert round_trip(Safetensors(), one, tmp_path) == 0
    assert json.loads((tmp_path / "config.json").read_text()) == {"backbone": one.settings, "seed": 0}


class WithState(TinyNet):
    def get_extra_state(self) -> int:
        return 3

    def set_extra_state(self, state: int) -> None:
        assert state == 3


def test_a_state_that_is_no_tensor_is_refused() -> None:
    net: nn.Module = WithState()
    one = trained(TinyNet(), size=8)
    obstacle = Safetensors().obstacle(type(one)(**{**vars(one), "net": net}))
    assert "_extra_state is not a tensor" in str(obstacle)
