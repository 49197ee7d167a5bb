"""The reader of safetensors files against the package safetensors, and damaged files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sslcli.weights.safetensors import is_safetensors, read_safetensors

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.arange(3, dtype=torch.uint8),  # the next tensor starts at an odd byte
    "c": torch.tensor(1.5, dtype=torch.bfloat16),
    "d": torch.tensor([True, False]),
    "e": torch.empty(0, 4, dtype=torch.float16),
    "f": torch.tensor([-1, 2**40]),
}


def written(path: Path, header: dict[str, object], values: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + values)
    return path


def test_tensors_of_the_package_are_read(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.torch")
    path = tmp_path / "a.safetensors"
    package.save_file(TENSORS, path, metadata={"format": "pt"})
    with path.open("rb") as file:
        assert is_safetensors(file)
        found = read_safetensors(file)
    assert found.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_a_file_of_torch_is_not_taken_for_safetensors(tmp_path: Path) -> None:
    for is_zip in (True, False):
        torch.save(TENSORS, tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
        with (tmp_path / "a.pt").open("rb") as file:
            assert not is_safetensors(file)
            assert file.tell() == 0


FOUR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "values", "reason"),
    [
        ({"a": FOUR}, b"123", "invalid shape or position of a"),
        ({"a": FOUR}, b"12345", "do not fill the 5 bytes"),
        ({"a": FOUR | {"shape": [2]}}, b"1234", "a has 4 bytes"),
        ({"a": FOUR | {"shape": [-1]}}, b"1234", "invalid shape or position"),
        ({"a": FOUR | {"dtype": "F4"}}, b"1234", "'F4', but these are read"),
        ({"a": FOUR | {"dtype": ["F32"]}}, b"1234", "but these are read"),
        ({"a": {"dtype": "F32", "shape": [1 << 70, 0], "data_offsets": [0, 0]}}, b"", "invalid shape"),
        ({"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62, 0], "data_offsets": [0, 0]}}, b"", "invalid shape"),
        ({"a": {"dtype": "F32"}}, b"1234", "no dtype, shape and data_offsets of a"),
        ({"a" * 10_000: FOUR | {"dtype": "F4"}}, b"1234", r"^a{100}\.\.\.a{100} has the dtype 'F4'"),
        ({"a": 3}, b"1234", "no dtype, shape and data_offsets of a"),
        ({"a": FOUR, "b": FOUR}, b"1234", "do not fill"),
    ],
)
def test_a_damaged_file_is_refused(header: dict[str, object], values: bytes, reason: str, tmp_path: Path) -> None:
    with written(tmp_path / "a", header, values).open("rb") as file, pytest.raises(ValueError, match=reason):
        read_safetensors(file)


def test_a_truncated_header_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a", {"a": FOUR}, b"")
    path.write_bytes(path.read_bytes()[:20])
    with path.open("rb") as file, pytest.raises(ValueError, match="but the file ends before"):
        read_safetensors(file)


def test_a_deeply_nested_header_is_refused(tmp_path: Path) -> None:
    header = b'{"a":' + b"[" * 200_000
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header)
    with (tmp_path / "a").open("rb") as file, pytest.raises(ValueError, match="nested too deeply"):
        read_safetensors(file)
