"""A CUDA device that computes on the CPU, and a counter of the operations that would make the host wait for it."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import sslcli
from sslcli.data.views.augment import _reflected_shifts
from sslcli.distributed.devices import constant

CUDA = torch.device("cuda:0")
CPU = torch.device("cpu")
SOURCE = Path(sslcli.__file__).parent
aten = torch.ops.aten
# Operations whose result the host needs, or whose output shape depends on the values.
WAITING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.repeat_interleave,
    aten.linalg_inv_ex,
    aten._linalg_svd,
    aten._linalg_eigh,
    aten._linalg_solve_ex,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
ALLOCATIONS = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
COPIES = {aten._to_copy, aten.copy_, aten.copy}


class OnDevice(Tensor):
    """A tensor that states that it is on the GPU. Its values are in `host`, on the CPU.

    For the C++ code of torch, it is on the meta device, because autograd cannot run on a CUDA device without a GPU.
    """

    host: Tensor
    device = CUDA  # type: ignore[assignment]
    is_cuda = True  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, host: Tensor) -> OnDevice:
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        result: OnDevice = Tensor._make_wrapper_subclass(cls, host.size(), **layout, device="meta")  # type: ignore
        result.host = host
        return result

    def __repr__(self, **options: Any) -> str:
        return f"OnDevice({self.host!r})"

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=CUDA, **options)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} of a device tensor outside of `counted`")


class Synchronizations(TorchDispatchMode):
    """Compute operations of `OnDevice` tensors on the CPU.

    `found` lists those for which the host waits, and `kernels` counts those that launch a kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.pinned: list[Tensor] = []
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = kwargs.get("device")
        inputs = any(isinstance(tensor, OnDevice) for tensor in tensors)
        output = inputs if device is None else torch.device(device).type != "cpu"
        if inputs or output:
            self.check(func, args, kwargs, tensors, output)
        if func is aten._pin_memory.default:
            self.pinned.append(args[0].clone())
            return self.pinned[-1]
        if device is not None:
            kwargs = kwargs | {"device": CPU}
        host_args, host_kwargs = tree_map(to_host, (args, kwargs))
        result = func(*host_args, **host_kwargs)
        return self.wrapped(result, args) if output else result

    def wrapped(self, result: Any, args: Any) -> Any:
        """Return `result` with `OnDevice` tensors; results of operations in place are the tensors of `args`."""
        known = {id(leaf.host): leaf for leaf in tree_leaves(args) if isinstance(leaf, OnDevice)}
        return tree_map(lambda one: known.get(id(one), OnDevice(one)) if isinstance(one, Tensor) else one, result)

    def check(self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor], output: bool) -> None:
        packet = func.overloadpacket
        hosts = [tensor for tensor in tensors if not isinstance(tensor, OnDevice)]
        if packet in COPIES:
            between = bool(hosts) or not output
            waits = between and not (output and (kwargs.get("non_blocking") or True in args[2:]))
            # The driver may wait for the GPU before it reads memory that is not pinned, unless it is a single number.
            pinned = [any(host is one for one in self.pinned) or not host.ndim for host in hosts]
            waits = waits or (between and not all(pinned))
        elif packet in INDEXING:
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            waits = bool(masks or [index for index in args[1] if any(index is host for host in hosts)])
        else:
            mixed = [host for host in hosts if host.ndim]
            assert not mixed, f"{func} of device tensors got a CPU tensor of shape {tuple(mixed[0].shape)}"
            waits = packet in WAITING
        if waits:
            self.found.append(f"{packet.__name__} in {place()}")
        if output and not func.is_view and packet not in ALLOCATIONS:
            self.kernels[packet.__name__] += 1


def to_host(leaf: Any) -> Any:
    return leaf.host if isinstance(leaf, OnDevice) else leaf


def place() -> str:
    """The innermost line of the package that is being executed."""
    for frame in reversed(traceback.extract_stack()):
        if Path(frame.filename).is_relative_to(SOURCE):
            return f"{Path(frame.filename).relative_to(SOURCE)}:{frame.lineno}"
    return "the test"


@contextmanager
def counted() -> Iterator[Synchronizations]:
    """Make the device `CUDA` usable in the block, and yield the counter."""
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        torch._C._ensureCUDADeviceGuardSet()
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # copies of torch.tensor(..., device=CUDA) become visible
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifts)
        for cached in (constant, _reflected_shifts):  # tensors on the simulated device must not remain
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        yield stack.enter_context(Synchronizations())


def move_to_device(module: nn.Module) -> None:
    """Replace the parameters and buffers of a module by tensors on `CUDA`, without a copy."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = OnDevice(parameter.detach())
                part._parameters[name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else OnDevice(buffer)
