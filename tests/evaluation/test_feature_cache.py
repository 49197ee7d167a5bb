from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sslcli.evaluation.feature_cache import cached


class Compute:
    """Counts its calls."""

    def __init__(self, value: float = 1.0, dtype: torch.dtype = torch.float32) -> None:
        self.calls = 0
        self.value, self.dtype = value, dtype

    def __call__(self) -> dict[str, Tensor]:
        self.calls += 1
        return {"train": torch.full((1000, 8), self.value, dtype=self.dtype)[:4], "train_labels": torch.arange(4)}


def quiet(message: str) -> None:
    raise AssertionError(f"nobody should hear: {message}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cache_computes_once_and_gives_the_same_tensors(tmp_path, dtype):
    compute, path = Compute(1 / 3, dtype), tmp_path / "deep" / "features.pt"
    first, second = (cached(path, "key", compute, warn=quiet) for _ in range(2))
    assert compute.calls == 1
    assert all(torch.equal(first[name], second[name]) for name in ("train", "train_labels"))
    assert second["train"].dtype == dtype
    assert os.listdir(path.parent) == ["features.pt"]
    assert path.stat().st_size < 8_000, "a slice must not take its whole storage along"


def test_cache_is_mapped_and_not_read(tmp_path):
    path = tmp_path / "features.pt"
    big = torch.arange(1 << 20)
    cached(path, "key", lambda: {"train": big, "train_labels": big}, warn=quiet)
    kept = cached(path, "key", Compute(), warn=quiet)["train"]
    assert str(path) in Path("/proc/self/maps").read_text()
    path.unlink()
    assert torch.equal(kept, big)


def test_cache_of_another_key_is_replaced(tmp_path):
    path = tmp_path / "features.pt"
    cached(path, "old", Compute(1.0), warn=quiet)
    assert float(cached(path, "new", Compute(2.0), warn=quiet)["train"][0, 0]) == 2.0
    unused = Compute()
    assert float(cached(path, "new", unused, warn=quiet)["train"][0, 0]) == 2.0
    assert unused.calls == 0


def truncated(content: bytes) -> bytes:
    return content[:-200]


def turned(content: bytes) -> bytes:
    """Flip one bit of the features."""
    place = content.index(torch.full((4, 8), 1.0).numpy().tobytes())
    return content[: place + 9] + bytes([content[place + 9] ^ 1]) + content[place + 10 :]


def strange(content: bytes) -> bytes:
    buffer = io.BytesIO()
    torch.save([1, 2], buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda _: b"not a checkpoint",
        lambda _: b"PK\x03\x04 cut",
        lambda _: pickle.dumps(os.getcwd, protocol=2),
        truncated,
        turned,
        strange,
    ],
)
def test_a_damaged_cache_is_computed_again_with_a_warning(tmp_path, damage):
    path, compute, messages = tmp_path / "features.pt", Compute(), []
    cached(path, "key", compute, warn=quiet)
    path.write_bytes(damage(path.read_bytes()))
    assert torch.equal(cached(path, "key", compute, warn=messages.append)["train"], torch.ones(4, 8))
    assert compute.calls == 2
    assert len(messages) == 1
    assert f"{path} is damaged" in messages[0]
    cached(path, "key", compute, warn=quiet)
    assert compute.calls == 2


def test_features_that_cannot_be_kept_are_given_all_the_same(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("disk full")

    messages = []
    monkeypatch.setattr(os, "replace", fail)
    assert len(cached(tmp_path / "a.pt", "key", Compute(), warn=messages.append)["train"]) == 4
    assert "disk full" in messages[0]
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("no folder")
    assert len(cached(tmp_path / "file" / "a.pt", "key", Compute(), warn=messages.append)["train"]) == 4
    assert len(messages) == 2
