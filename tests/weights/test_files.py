"""Reading of weight files and strict loading."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from sslcli.backbones.wrap import Wrapped
from sslcli.errors import ConfigError
from sslcli.weights.files import MAX_KEY, load_strictly, load_weights, short, unwrapped, wrapped
from tiny import vit

CPU = torch.device("cpu")


class Harmful:
    """Would create a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_tensors_and_plain_values_are_read_as_they_were_saved(tmp_path: Path) -> None:
    content = {"weight": torch.arange(3.0), "what": "backbone", "size": [1, 2]}
    torch.save(content, tmp_path / "a.pt")
    found = load_weights(tmp_path / "a.pt", device=CPU)
    assert torch.equal(found.pop("weight"), content.pop("weight"))
    assert found == content


def test_code_in_a_file_is_not_executed(tmp_path: Path) -> None:
    torch.save({"weight": Harmful(tmp_path / "executed")}, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"a\.pt"):
        load_weights(tmp_path / "a.pt", device=CPU)
    assert not (tmp_path / "executed").exists()


def test_other_content_and_damage_are_refused_in_one_line(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    torch.save({"a": torch.zeros(2000)}, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:3000])
    (tmp_path / "text.pt").write_text("no weights")
    for name in ("list.pt", "cut.pt", "text.pt", "absent.pt"):
        with pytest.raises(ConfigError) as error:
            load_weights(tmp_path / name, device=CPU)
        assert name in str(error.value)
        assert "\n" not in str(error.value)


def test_a_state_that_fits_is_loaded() -> None:
    net, other = nn.Linear(3, 2), nn.Linear(3, 2)
    load_strictly(net, other.state_dict(), "the file")
    assert torch.equal(net.weight, other.weight)


@pytest.mark.parametrize(("saved", "loaded"), [(0.0, 0.5), (0.5, 0.0), (0.5, 0.5)])
def test_weights_fit_with_and_without_stochastic_depth(saved: float, loaded: float) -> None:
    net, other = vit(drop_path=loaded), vit(drop_path=saved)
    load_strictly(net, other.state_dict(), "the file")
    assert torch.equal(net.blocks[1].attn.qkv.weight, other.blocks[1].attn.qkv.weight)
    if net.noise is not None and other.noise is not None:
        assert net.noise.seed == other.noise.seed


def test_a_state_that_does_not_fit_is_refused_with_what_differs_and_nothing_is_loaded() -> None:
    net = nn.Linear(3, 2)
    before = net.weight.clone()
    state = {"weight": torch.zeros(2, 5), "gain": torch.zeros(1)}
    with pytest.raises(ConfigError) as error:
        load_strictly(net, state, "the file")
    for part in ("the file", "bias", "gain", "weight is (2, 5)", "(2, 3)"):
        assert part in str(error.value)
    assert torch.equal(net.weight, before)


def test_a_tensor_of_another_shape_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"0 keys are missing.*1 differ"):
        load_strictly(nn.Linear(3, 2), nn.Linear(5, 2).state_dict(), "the file")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, r"bias is a value of the type int and should be \(2,\)"),
        (torch.zeros(2, device="meta"), r"bias is a tensor without values and should be \(2,\)"),
        (torch.zeros(2).to_sparse(), r"bias is a tensor of the layout torch.sparse_coo and should be \(2,\)"),
    ],
)
def test_values_that_are_not_tensors_of_the_network_are_refused(value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_strictly(nn.Linear(3, 2), {"weight": torch.zeros(2, 3), "bias": value}, "the file")


def test_keys_that_are_not_texts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"2 are unknown \(1, None\)"):
        load_strictly(nn.Linear(3, 2), nn.Linear(3, 2).state_dict() | {1: torch.zeros(1), None: 2}, "the file")


def test_keys_are_shortened_and_escaped_in_messages() -> None:
    key = "a." * MAX_KEY + "\x1b[31m\nend"
    assert short("layer1.0.conv1.weight") == "layer1.0.conv1.weight"
    assert len(short(key)) == MAX_KEY + 3
    assert short(key).endswith("\\x1b[31m\\nend")
    with pytest.raises(ConfigError) as error:
        load_strictly(nn.Linear(3, 2), {key: torch.zeros(1)}, "the file")
    assert len(str(error.value)) < 3 * MAX_KEY


def test_names_of_older_versions_are_loaded() -> None:
    net = nn.ModuleDict({"momentum_head": nn.Linear(2, 2)})
    state = {f"key_head.{name}": value + 1 for name, value in net["momentum_head"].state_dict().items()}
    load_strictly(net, state, "the file")
    assert torch.equal(net["momentum_head"].weight, state["key_head.weight"])


def test_names_of_a_wrapped_network_are_those_of_the_network_itself() -> None:
    inner = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    net = Wrapped(inner, num_features=2)
    state = unwrapped(net, net.state_dict())
    assert state.keys() == inner.state_dict().keys()
    assert wrapped(net, state).keys() == net.state_dict().keys()
    assert wrapped(net, net.state_dict()).keys() == net.state_dict().keys()  # a file of an older version
    assert unwrapped(inner, inner.state_dict()).keys() == wrapped(inner, inner.state_dict()).keys() == state.keys()


def test_a_network_with_a_layer_of_the_same_name_as_the_wrapper_is_not_confused() -> None:
    inner = nn.ModuleDict({"module": nn.Linear(3, 2)})
    net = Wrapped(inner, num_features=2)
    state = unwrapped(net, net.state_dict())
    assert list(state) == ["module.weight", "module.bias"]
    assert list(wrapped(net, state)) == list(net.state_dict()) == ["module.module.weight", "module.module.bias"]
    assert list(wrapped(net, net.state_dict())) == list(net.state_dict())
