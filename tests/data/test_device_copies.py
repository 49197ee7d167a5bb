"""Copies to the device: order of the calls on faked CUDA streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from sslcli.data.crops import Request
from sslcli.data.device_copies import HostBatch, copy_batches

CUDA = torch.device("cuda:0")
calls: list[str] = []


class Stream:
    """Record the calls on a stream. An event is the number of copies that were started before it."""

    def __init__(self, name: Any) -> None:
        self.name = "side" if name == CUDA else name

    def record_event(self) -> int:
        calls.append(f"event on {self.name}")
        return sum(call.startswith("copy") for call in calls)

    def wait_event(self, event: int) -> None:
        calls.append(f"{self.name} waits for copy {event}")


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [Stream("compute")]
    calls.clear()

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    def copy(tensor: Tensor, device: torch.device, *, non_blocking: bool) -> Tensor:
        assert (device, non_blocking) == (CUDA, True)
        assert getattr(tensor, "pinned", False)
        calls.append(f"copy on {current[-1].name}")
        return tensor.clone()

    def pin(tensor: Tensor) -> Tensor:
        calls.append("pin")
        pinned = tensor.clone()
        pinned.pinned = True  # type: ignore[attr-defined]
        return pinned

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(Tensor, "to", copy)
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: hasattr(tensor, "pinned"))
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: calls.append(f"record {stream.name}"))


def hosts(count: int) -> Iterator[HostBatch]:
    for number in range(count):
        calls.append(f"read {number}")
        index = torch.tensor([number])
        yield HostBatch(Request(index, index, index > 0), index, [torch.full((2, 3), number)])


@pytest.mark.usefixtures("fake_cuda")
def test_copies_run_one_batch_ahead_on_a_side_stream() -> None:
    start = ["pin", "copy on side", "event on side"]
    batches = copy_batches(hosts(3), CUDA)
    for number in range(3):
        host, (tensor,) = next(batches)
        assert host.read.tolist() == [number]
        assert tensor.tolist() == [[number] * 3] * 2
        calls.append(f"use {number}")
    assert list(batches) == []
    assert calls == [
        "read 0",
        *start,
        "read 1",
        *start,
        "compute waits for copy 1",
        "record compute",
        "use 0",
        "read 2",
        *start,
        "compute waits for copy 2",
        "record compute",
        "use 1",
        "compute waits for copy 3",
        "record compute",
        "use 2",
    ]


@pytest.mark.usefixtures("fake_cuda")
def test_pinned_tensors_are_not_pinned_again() -> None:
    (host,) = hosts(1)
    pinned = HostBatch(host.request, host.read, [tensor.pin_memory() for tensor in host.tensors])
    calls.clear()
    list(copy_batches(iter([pinned]), CUDA))
    assert "pin" not in calls


def test_on_the_cpu_nothing_is_read_ahead_or_copied() -> None:
    calls.clear()
    batches = copy_batches(hosts(2), torch.device("cpu"))
    host, (tensor,) = next(batches)
    assert calls == ["read 0"]
    assert tensor is host.tensors[0]
