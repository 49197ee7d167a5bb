"""Gradient cache for contrastive losses over a large batch, with the activations of only one micro-batch in memory.

Gao et al. 2021  https://arxiv.org/abs/2101.06983

    for every micro-batch x:  rows(x) = embed(x), without an autograd graph
    rows = concatenation of rows(x) over all micro-batches
    loss = compare(rows);  gradients = d loss / d rows
    for every micro-batch x:  embed(x).backward(the part of `gradients` for x)

The setting `train.cached_gradients` enables it. `embed` and `compare` are methods of `sslcli.methods.base.Method`. A
row is the embedding of one image. The second call of `embed` uses the same random numbers as the first. The accumulated
gradient therefore equals the gradient of `loss`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sslcli.distributed import collectives, watchdog
from sslcli.engine import checkpoint, precision
from sslcli.methods.base import Batch, Method
from sslcli.nn.modes import unchanged_statistics
from sslcli.nn.noise import Noise

RandomState = tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]  # see `_random_state`
BUCKET_BYTES = 25 << 20  # as in DistributedDataParallel


def backward(
    method: Method,
    micro_batches: list[Batch],
    *,
    device: torch.device,
    dtype_name: str,
    scaler: torch.amp.GradScaler,
) -> dict[str, Tensor]:
    """Compute the gradient of one loss over all micro-batches. Return the detached scalars of `method.compare`.

    Gradients are accumulated in the `grad` attributes of the parameters and averaged over processes. BatchNorm
    normalizes each micro-batch separately. `dtype_name` is fp32, bf16 or fp16. `scaler` scales the loss, so the
    accumulated gradients are scaled too.
    """
    states, parts = [], []
    with torch.no_grad(), unchanged_statistics(method):
        for batch in micro_batches:
            states.append(_random_state(method, device))
            with precision.autocast(device, dtype_name):
                parts.append(method.embed(batch))
    after = _random_state(method, device)
    rows = [torch.cat(column) for column in zip(*parts, strict=True)]
    learned = [row.is_floating_point() for row in rows]
    rows = [row.requires_grad_(learns) for row, learns in zip(rows, learned, strict=True)]
    with precision.autocast(device, dtype_name):
        scalars = method.compare(tuple(rows))
    scaler.scale(scalars["loss"]).backward()  # type: ignore[no-untyped-call]
    gradients = zip(*(torch.split(row.grad, len(parts[0][0])) for row in rows if row.grad is not None), strict=True)
    places = [place for place, row in enumerate(rows) if row.grad is not None]
    for batch, state, slope in zip(micro_batches, states, gradients, strict=True):
        _set_random_state(state, method, device)
        with precision.autocast(device, dtype_name):
            again = method.embed(batch)
        pairs = [(again[place], grad) for place, grad in zip(places, slope, strict=True) if again[place].requires_grad]
        torch.autograd.backward([row for row, _ in pairs], [grad for _, grad in pairs])
    _set_random_state(after, method, device)
    average_gradients(method)
    return {name: value.detach() for name, value in scalars.items()}


def average_gradients(module: nn.Module) -> None:
    """Replace every gradient by its mean over processes."""
    if collectives.world_size() == 1:
        return
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    watchdog.record_collective()
    all_reduce(gradients, bucket_bytes=1 if gradients[0].is_cpu else BUCKET_BYTES)
    torch._foreach_div_(gradients, collectives.world_size())


def all_reduce(gradients: list[Tensor], *, bucket_bytes: int) -> None:
    """Replace each gradient by its sum over processes, in place.

    Consecutive gradients of the same dtype are reduced together, until they have `bucket_bytes` bytes. On the CPU, use
    a bucket per gradient: with three or more processes, gloo's sums depend on the place of a gradient in its bucket.
    """
    buckets: list[list[Tensor]] = []
    size = bucket_bytes
    for gradient in gradients:
        if size >= bucket_bytes or gradient.dtype != buckets[-1][0].dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(gradient)
        size += gradient.nbytes
    flat = [bucket[0] if len(bucket) == 1 else torch.cat(list(map(_in_memory_order, bucket))) for bucket in buckets]
    for work in [dist.all_reduce(values, async_op=True) for values in flat]:
        work.wait()
    for bucket, values in zip(buckets, flat, strict=True):
        if len(bucket) > 1:
            own = list(map(_in_memory_order, bucket))
            torch._foreach_copy_(own, list(torch.split(values, [part.numel() for part in own])))


def _in_memory_order(gradient: Tensor) -> Tensor:
    """Return a view (numel,) of a gradient in the order of its memory, so that channels-last ones are not permuted."""
    return gradient.detach().as_strided((gradient.numel(),), (1,))


def _random_state(method: nn.Module, device: torch.device) -> RandomState:
    """Return the states of torch's generators and of all `Noise` modules of the method."""
    return checkpoint.rng_state(device), [part.position() for part in method.modules() if isinstance(part, Noise)]


def _set_random_state(state: RandomState, method: nn.Module, device: torch.device) -> None:
    """Set all generators to a state that `_random_state` returned."""
    checkpoint.set_rng_state(state[0], device)
    noises = [part for part in method.modules() if isinstance(part, Noise)]
    for noise, position in zip(noises, state[1], strict=True):
        noise.set_position(position)
