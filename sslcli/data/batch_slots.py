"""Slots of shared memory, in which data workers write batches for the main process.

By default, torch passes every tensor in a new file in /dev/shm. Containers limit these files to 64 MB, the kernel has
to clear their memory, and every file needs an exchange of messages. Slots are created once, before the workers start by
fork. They are anonymous memory, for which the size of /dev/shm does not matter.
"""

from __future__ import annotations

import io
import itertools
import mmap
import os
import pickle
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

from sslcli.data.worker_server import received

_ALIGNMENT = 64  # bytes; the offset of each tensor in its slot is a multiple of it
_SMALL = 1 << 16  # bytes; smaller tensors are copied out of the slot, since callers may keep them
_NUMBERS = itertools.count()
_ALL: weakref.WeakValueDictionary[int, BatchSlots] = weakref.WeakValueDictionary()


class BatchSlots:
    """Shared memory for `count` batches of at most `slot_bytes` bytes.

    The main process assigns a free slot to each request. A slot is free again when no tensor uses its memory anymore.
    """

    def __init__(self, count: int, slot_bytes: int, *, file: int = -1, number: int | None = None) -> None:
        self.count, self.slot_bytes = count, -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.memory = mmap.mmap(file, count * self.slot_bytes)
        self.free = list(range(count))
        self.number = next(_NUMBERS) if number is None else number
        _ALL[self.number] = self

    @classmethod
    def in_file(cls, count: int, slot_bytes: int) -> tuple[BatchSlots, int]:
        """Create slots in an anonymous file, and return it as well. The caller closes the file.

        Slots that are unpickled by a process with this file (`worker_server.received`) use the same memory.
        """
        file = os.memfd_create("sslcli")
        try:
            os.ftruncate(file, count * -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)
            return cls(count, slot_bytes, file=file), file
        except OSError:
            os.close(file)
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        return _received_slots, (self.count, self.slot_bytes, self.number)

    def take(self) -> int | None:
        """Return the number of a slot that is used from now on, or None if no slot is free."""
        return self.free.pop() if self.free else None

    def view(self, slot: int) -> memoryview:
        """Return the memory of a slot."""
        start = slot * self.slot_bytes
        return memoryview(self.memory)[start : start + self.slot_bytes]

    def open(self, slot: int) -> Tensor:
        """Return the memory of a slot: (slot_bytes,) uint8. When no tensor uses it anymore, the slot becomes free."""
        view = self.view(slot)
        weakref.finalize(view, self.free.append, slot).atexit = False
        return torch.frombuffer(view, dtype=torch.uint8)


def _received_slots(count: int, slot_bytes: int, number: int) -> BatchSlots:
    return BatchSlots(count, slot_bytes, file=received(0), number=number)


class PackedBatch:
    """A batch in a slot: any object whose tensors are in the memory of the slot. Use `pack` to create it.

    Pickled, it has a few hundred bytes.
    """

    def __init__(self, slots: BatchSlots, slot: int, pickled: bytes, layouts: list[tuple[Any, ...]]) -> None:
        self.slots_number, self.slot, self.pickled, self.layouts = slots.number, slot, pickled, layouts
        self.block: Tensor | None = None

    def tensors(self, block: Tensor) -> list[Tensor]:
        """Return the tensors of the batch, in the memory of `block`."""
        found = []
        for dtype, shape, stride, offset in self.layouts:
            part = block[offset : offset + dtype.itemsize * shape.numel()]
            found.append(part.view(dtype).as_strided(shape, stride))
        return found

    def pin_memory(self, device: Any = None) -> PackedBatch:
        """Copy the tensors to pinned memory and return this object. torch calls this method in the main process."""
        used = max((offset + dtype.itemsize * shape.numel() for dtype, shape, _, offset in self.layouts), default=0)
        self.block = _ALL[self.slots_number].open(self.slot)[:used].pin_memory()
        return self

    def unpack(self) -> Any:
        """Return the batch. Call this method once, in the main process."""
        block = _ALL[self.slots_number].open(self.slot) if self.block is None else self.block
        tensors = [tensor.clone() if tensor.nbytes < _SMALL else tensor for tensor in self.tensors(block)]
        return _Unpickler(io.BytesIO(self.pickled), tensors).load()


class LargeBatch:
    """A batch that did not fit into its slot, and that torch passes. The main process frees the slot."""

    def __init__(self, slots: BatchSlots, slot: int, batch: Any) -> None:
        self.slots_number, self.slot, self.batch = slots.number, slot, batch

    def pin_memory(self, device: Any = None) -> LargeBatch:
        """Copy the tensors to pinned memory and return this object. torch calls this method in the main process."""
        self.batch = pin_memory(self.batch, device)  # type: ignore[no-untyped-call]
        return self

    def unpack(self) -> Any:
        """Return the batch. Call this method once, in the main process."""
        _ALL[self.slots_number].free.append(self.slot)
        return self.batch


def pack(batch: Any, slots: BatchSlots, slot: int) -> PackedBatch | LargeBatch:
    """Copy the tensors of a batch to a slot, unless it is too large. Return an object whose `unpack` is the batch."""
    found: list[Tensor] = []
    stream = io.BytesIO()
    _Pickler(stream, found).dump(batch)
    layouts, size = [], 0
    for tensor in found:
        stride = torch.empty_like(tensor, device="meta").stride()  # without gaps, in the memory format of the tensor
        layouts.append((tensor.dtype, tensor.shape, stride, size))
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    if size > slots.slot_bytes:
        return LargeBatch(slots, slot, batch)
    packed = PackedBatch(slots, slot, stream.getvalue(), layouts)
    for tensor, target in zip(
        found, packed.tensors(torch.frombuffer(slots.view(slot), dtype=torch.uint8)), strict=True
    ):
        target.copy_(tensor)
    return packed


class _Pickler(pickle.Pickler):
    """Pickler that appends tensors to a list and writes their indices."""

    def __init__(self, stream: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors = tensors

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    """Unpickler that replaces indices by tensors of a list."""

    def __init__(self, stream: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(stream)
        self.tensors = tensors

    def persistent_load(self, index: int) -> Tensor:
        return self.tensors[index]
