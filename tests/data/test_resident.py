"""Training images in the memory of the GPU: when, and the same batches as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sslcli.data import resident
from sslcli.data.loader import Loader
from sslcli.data.resident import FRACTION, is_resident, resident_bytes, train_images
from sslcli.data.sources.base import Shapes, Source
from sslcli.data.views.views import Views
from sslcli.methods.base import Batch

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda:0"), torch.device("mps")
VIEWS = [{"count": 2, "crop_scale": [0.3, 1.0], "jitter": [0.4, 0.4, 0.4, 0.1]}, {"size": 12, "flip": 0.5}]


def shapes(**options: Any) -> Source:
    return Shapes(
        **({"image_size": 16, "train_images": 44, "test_images": 6, "seed": 0, "val_fraction": 0.3} | options)
    )


@pytest.mark.parametrize(
    ("setting", "device", "expected"),
    [
        ("auto", CUDA, True),
        ("auto", CPU, False),
        ("auto", MPS, False),
        (True, CUDA, True),
        (True, MPS, True),
        (True, CPU, False),
        (False, CUDA, False),
    ],
    ids=str,
)
def test_setting_and_device(
    setting: bool | str, device: torch.device, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (10**9, 10**10))
    assert is_resident(shapes(resident=setting), device) is expected


def test_auto_compares_the_training_images_with_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    source = shapes(resident="auto")
    size = resident_bytes(source)
    assert size == 31 * 3 * 16 * 16
    for free, expected in ((size / FRACTION + 1, True), (size / FRACTION - 1, False)):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda device, free=free: (int(free), 10**12))
        assert is_resident(source, CUDA) is expected
    assert source.resident == "auto"
    source.images = None  # as in a dataset of files
    assert not is_resident(source, CUDA)


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_another_value_is_rejected(value: Any) -> None:
    with pytest.raises(ValueError, match=r"dataset.resident is .*, but it must be auto, true or false"):
        shapes(resident=value)


@pytest.mark.parametrize("chunk", [7, 31, 100])
def test_images_are_those_of_the_training_split_in_order(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "_CHUNK", chunk)
    source = shapes(pretrain_on_val=False)
    assert source.images is not None
    assert torch.equal(train_images(source, CPU), source.images[source.splits["train"]])
    assert train_images(source, torch.device("meta")).device.type == "meta"


def batches(*, batch_size: int, accumulate: int, start: int, stop: int) -> list[Batch]:
    loader = Loader(
        shapes(resident=True), Views(VIEWS), batch_size=batch_size, accumulate=accumulate, seed=3, device=CPU
    )
    return [batch for step in loader.steps(start, stop) for batch in step]


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "processes", "start", "stop"),
    [(8, 1, 1, 0, 9), (8, 2, 1, 0, 4), (12, 3, 2, 1, 5), (31, 1, 1, 0, 2), (8, 1, 1, 5, 9)],
)
def test_batches_have_the_same_bits_as_without(
    batch_size: int, accumulate: int, processes: int, start: int, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sslcli.data.loader.world_size", lambda: processes)
    monkeypatch.setattr("sslcli.data.loader.rank", lambda: processes - 1)
    options = {"batch_size": batch_size, "accumulate": accumulate, "start": start, "stop": stop}
    expected = batches(**options)
    monkeypatch.setattr("sslcli.data.loader.is_resident", lambda source, device: True)
    gathered: list[int] = []

    def counted(source: Source, device: torch.device) -> torch.Tensor:
        gathered.append(1)
        return train_images(source, device)

    monkeypatch.setattr("sslcli.data.loader.train_images", counted)
    found = batches(**options)
    assert gathered == [1]
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.index, other.index)
        assert torch.equal(one.label, other.label)
        assert all(torch.equal(*pair) for pair in zip(one.views, other.views, strict=True))


def test_resident_images_are_gathered_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device has no pixels, so the views show that no image came from the CPU."""
    monkeypatch.setattr("sslcli.data.loader.is_resident", lambda source, device: True)
    meta = torch.device("meta")
    loader = Loader(shapes(), Views([{"count": 2}]), batch_size=8, accumulate=1, seed=0, device=meta)
    (host,) = loader.from_memory(0, 1)
    assert [tensor.shape for tensor in host.tensors] == [(8,)]
    ((batch,),) = loader.steps(0, 1)
    assert {view.device for view in batch.views} == {meta}
    assert loader.resident_images.device == meta
