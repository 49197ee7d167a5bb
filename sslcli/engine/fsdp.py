"""Sharding of methods over processes (FSDP2) and activation checkpointing, for models that exceed device memory.

With sharding, every process holds one shard of each parameter, of each gradient and of the optimizer state. The
parameters of a backbone block are gathered only while the block computes. All other parameters are gathered during the
entire `forward`. Buffers (running statistics, queues of negatives, memory banks) are not sharded.

Zhao et al. 2023  https://arxiv.org/abs/2304.11277     Chen et al. 2016  https://arxiv.org/abs/1604.06174
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from sslcli.distributed.collectives import world_size
from sslcli.errors import ConfigError
from sslcli.methods.base import Method
from sslcli.weights.renamed import current_names


def blocks(net: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a network in order: transformer blocks, residual blocks or stages.

    Blocks are the members of an nn.Sequential or nn.ModuleList with at least two members. All members must have the
    same class and must have submodules. If containers are nested, only the innermost container is used. The result is
    [] if there are no blocks.
    """
    inner = [block for child in net.children() for block in blocks(child)]
    members = list(net.children())
    if inner or not isinstance(net, (nn.Sequential, nn.ModuleList)) or len(members) < 2:
        return inner
    alike = len({type(member) for member in members}) == 1
    return members if alike and all(any(member.children()) for member in members) else []


def shard(method: Method, device: torch.device, precision: str) -> None:
    """Shard the parameters of a method over all processes, in place. Call this before the optimizer is built.

    If `method.supports_block_wrapping` is True, each block of the backbone (see `blocks`) is sharded as a separate
    unit. The same applies to copies of the backbone, such as momentum encoders. All other parameters form one unit.

    With precision bf16, separately sharded blocks without BatchNorm gather their parameters in bfloat16 and compute in
    bfloat16. The gradients of these blocks are averaged in float32. All other modules use autocast.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for parameter in method.parameters():
        parameter.data = parameter.data.contiguous()  # required by FSDP2
    mesh = init_device_mesh(device.type, (world_size(),))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    nets = (
        [part for part in method.modules() if type(part) is type(method.backbone)]
        if method.supports_block_wrapping
        else []
    )
    for block in dict.fromkeys(block for net in nets for block in blocks(net)):
        whole = precision != "bf16" or any(isinstance(part, _BatchNorm) for part in block.modules())
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy() if whole else half)
    fully_shard(method, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Return True if `shard` was applied to `model`."""
    return hasattr(model, "set_requires_gradient_sync")


@contextmanager
def gathered(method: nn.Module) -> Iterator[None]:
    """Gather the parameters of a method within the `with` block, so that submodules can be called directly.

    All processes must enter the `with` block.
    """
    if not is_sharded(method):
        yield
        return
    method.unshard()  # type: ignore[operator]
    try:
        yield
    finally:
        method.reshard()  # type: ignore[operator]


def placement(method: nn.Module, optimizer: Optimizer) -> Callable[[tuple[Any, ...], torch.Size], Tensor | None]:
    """Return a function that determines how each tensor of a checkpoint is sharded when the checkpoint is loaded.

    The arguments of the function are the path and the shape of a tensor in the checkpoint. The path of a parameter is
    ("method", name). The path of an optimizer state is ("optimizer", "state", number of the parameter, name). If
    the function returns a parameter of `method`, the tensor gets the same sharding as this parameter. If the function
    returns None, the tensor is not sharded.
    """
    named = {name: value for name, value in method.state_dict().items() if hasattr(value, "to_local")}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def like(path: tuple[Any, ...], shape: torch.Size) -> Tensor | None:
        if path[0] == "method":
            return next((named[name] for name in (path[1], *current_names(path[1])) if name in named), None)
        number = path[2] if path[:2] == ("optimizer", "state") else None
        if not isinstance(number, int) or number >= len(parameters) or parameters[number].shape != shape:
            return None
        return parameters[number]  # type: ignore[no-any-return]

    return like


def recompute(method: Method) -> None:
    """Enable activation checkpointing of backbone blocks.

    Only the inputs and outputs of blocks are stored. The backward pass recomputes all other activations. Raises
    ConfigError if the backbone has no blocks, or if `method.supports_block_wrapping` is False.
    """
    found = blocks(method.backbone)
    if not method.supports_block_wrapping:
        raise ConfigError(
            "train.activation_checkpointing is true, but this method replaces parameters of its networks during the "
            "forward pass, so activations cannot be recomputed: set it to false"
        )
    if not found:
        raise ConfigError(
            f"train.activation_checkpointing is true, but the backbone {type(method.backbone).__name__} has no "
            "repeated blocks to recompute: choose a resnet, vit or timm backbone, or set it to false"
        )
    for block in found:
        block.forward = partial(_recomputed, block, block.forward)


def _recomputed(block: nn.Module, forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    contexts = partial(_contexts, block)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts, **options)


def _contexts(block: nn.Module) -> tuple[Any, Any]:
    """Return two contexts: for the forward pass of a block, and for the recomputation in the backward pass.

    The first context has no effect. Within the second context, copies replace the buffers, see `_buffer_copies`.
    """
    return nullcontext(), _buffer_copies(block)


@contextmanager
def _buffer_copies(block: nn.Module) -> Iterator[None]:
    """Replace the buffers of a block by copies within the context.

    With activation checkpointing, the backward pass computes the forward pass of the block again, in this context. This
    recomputation changes only the copies. The running statistics of the block are therefore updated once, by the
    first forward pass.
    """
    kept = [(part, name, value) for part in block.modules() for name, value in part._buffers.items()]
    for part, name, value in kept:
        part._buffers[name] = None if value is None else value.clone()
    try:
        yield
    finally:
        for part, name, value in kept:
            part._buffers[name] = value
