"""Copies of batches to the device, on a CUDA stream of their own."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sslcli.data.crops import Request


@dataclass(frozen=True)
class HostBatch:
    """The images of a micro-batch on the CPU, before the operations on the device."""

    request: Request  # the request for these n images
    read: Tensor  # (n,) positions of the images that were read; bad images are replaced, see `ViewCrops`
    tensors: list[Tensor]  # the tensors that are needed on the device: images, or indices of images


def copy_batches(batches: Iterator[HostBatch], device: torch.device) -> Iterator[tuple[HostBatch, list[Tensor]]]:
    """Yield each batch and the copies of its tensors on `device`.

    On a GPU, the copies run on a side stream. The copy of a batch starts before the previous batch is yielded, so it
    overlaps with the computations on the previous batch.
    """
    if device.type == "cuda":
        return _on_side_stream(batches, device)
    # Without CUDA, a non-blocking copy may read a tensor of the CPU after it was freed.
    return ((batch, [tensor.to(device) for tensor in batch.tensors]) for batch in batches)


def _on_side_stream(
    batches: Iterator[HostBatch], device: torch.device
) -> Generator[tuple[HostBatch, list[Tensor]], None, None]:
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    started: tuple[HostBatch, list[Tensor], torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            # Only copies from pinned memory are asynchronous. torch frees pinned memory after the copies from it.
            pinned = (tensor if tensor.is_pinned() else tensor.pin_memory() for tensor in batch.tensors)
            copies = [tensor.to(device, non_blocking=True) for tensor in pinned]
            event = stream.record_event()
        if started is not None:
            yield _finished(started, device)
        started = batch, copies, event
    if started is not None:
        yield _finished(started, device)


def _finished(
    started: tuple[HostBatch, list[Tensor], torch.cuda.Event], device: torch.device
) -> tuple[HostBatch, list[Tensor]]:
    """Make the current stream wait for the copies of a batch, and return the batch and its copies."""
    batch, copies, event = started
    current = torch.cuda.current_stream(device)
    current.wait_event(event)
    for copy in copies:
        copy.record_stream(current)  # the memory belongs to the side stream, so keep it until this stream has used it
    return batch, copies
