"""BatchNorm variants whose statistics are computed over small groups of images, or over the images of all processes.

With groups, the normalization is the same as on several GPUs that each normalize only their own images.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslcli.distributed import collectives, watchdog
from sslcli.nn.modes import full_precision


class SplitBatchNorm(_BatchNorm):
    """BatchNorm that splits a batch into contiguous groups of about `group` images. Each group has its own statistics.

    The layer is equivalent to BatchNorm on several processes without synchronization. For example, one process with two
    groups gives the same result as two processes with one group each. The running statistics are the mean over groups.
    """

    group = 32

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (N, C, ...) but got {tuple(input.shape)}")

    def num_groups(self, num_images: int) -> int:
        """Return the number of groups into which a local batch of `num_images` images is split.

        The layer computes separate statistics for each group. Over all processes, there are at least 2 groups. With a
        single group, shuffling the images of a batch, as MoCo does, would not change the statistics.
        """
        fewest = 2 if collectives.world_size() == 1 else 1
        return max(fewest, round(num_images / self.group))

    def forward(self, input: Tensor) -> Tensor:
        """Normalize each group of images in the batch (N, C, ...) separately. The output has the shape of the input.

        In evaluation mode, and for batches of fewer than 4 images, the layer acts like an ordinary BatchNorm.
        """
        if not self.training or len(input) < 4:
            return super().forward(input)
        groups = self.num_groups(len(input))
        means = self.running_mean.repeat(groups, 1)  # type: ignore[union-attr]
        variances = self.running_var.repeat(groups, 1)  # type: ignore[union-attr]
        settings = (True, self.momentum or 0.1, self.eps)
        if torch.compiler.is_compiling() and len(input) % groups == 0:
            out = _batch_norm_in_channels(input, means, variances, self.weight, self.bias, *settings)
        else:
            base, longer = divmod(len(input), groups)
            sizes = [base + 1] * longer + [base] * (groups - longer)
            if input.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
                out = _batch_norm_into_one_tensor(input, sizes, means, variances, self.weight, self.bias, *settings)
            else:
                out = torch.cat(  # with `split`, whose backward pass is one concatenation, this is faster than slices
                    [
                        F.batch_norm(chunk, mean, variance, self.weight, self.bias, *settings)
                        for chunk, mean, variance in zip(torch.split(input, sizes), means, variances, strict=True)
                    ]
                )
        if self.track_running_stats:
            self.running_mean.copy_(means.mean(0))  # type: ignore[union-attr]
            self.running_var.copy_(variances.mean(0))  # type: ignore[union-attr]
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        return out


def _batch_norm_in_channels(
    input: Tensor, means: Tensor, variances: Tensor, weight: Tensor | None, bias: Tensor | None, *settings: Any
) -> Tensor:
    """Normalize G groups of images of `input` (N, C, ...) by one call of batch_norm, with the groups in the channels.

    `means` and `variances` (G, C) are the running statistics of the groups, updated in place. `settings` are the other
    arguments of batch_norm. The input is copied to (N / G, G * C, ...), and the output is copied back. torch.compile
    fuses these copies with the computation. In other code, they cost more than one call per group.
    """
    groups, (_, channels, *rest) = len(means), input.shape
    maps = input.view(groups, -1, channels, *rest).transpose(0, 1).flatten(1, 2)
    gamma, beta = (None if values is None else values.repeat(groups) for values in (weight, bias))
    out: Tensor = F.batch_norm(maps, means.view(-1), variances.view(-1), gamma, beta, *settings)
    out = out.view(-1, groups, channels, *rest).transpose(0, 1).flatten(0, 1)
    last = input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)
    return out.contiguous(memory_format=torch.channels_last) if last else out


def _batch_norm_into_one_tensor(
    input: Tensor,
    sizes: list[int],
    means: Tensor,
    variances: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *settings: Any,
) -> Tensor:
    """Normalize G groups of images of `input` (N, C, ...) on a CPU, without gradients.

    `sizes` are the numbers of images of the groups, and the other arguments are those of `_batch_norm_in_channels`. The
    groups are written into one tensor, because a concatenation copies all feature maps: with 64 channels of 32 x 32
    pixels in bfloat16, it takes a quarter of the time.
    """
    out, saved = torch.empty_like(input), torch.empty_like(means)
    chunks = (torch.split(maps, sizes) for maps in (input, out))
    for chunk, normalized, mean, variance, unused in zip(*chunks, means, variances, saved, strict=True):
        torch.ops.aten.native_batch_norm.out(
            chunk, weight, bias, mean, variance, *settings, out=normalized, save_mean=unused, save_invstd=unused.clone()
        )
    return out


@torch.no_grad()
def average_statistics(module: nn.Module) -> None:
    """Replace the running statistics of all SplitBatchNorm layers in `module` by their mean over processes.

    All statistics are averaged in one all-reduce. Running statistics are linear in the batch statistics of the groups.
    Therefore their mean over processes equals the running statistics of a single process that has the groups of all
    processes.
    """
    parts = [part for part in module.modules() if isinstance(part, SplitBatchNorm)]
    if collectives.world_size() == 1 or not parts:
        return
    statistics = [buffer for part in parts for buffer in (part.running_mean, part.running_var) if buffer is not None]
    means = collectives.all_reduce_mean(torch.cat(statistics))
    for buffer, mean in zip(statistics, torch.split(means, [len(buffer) for buffer in statistics]), strict=True):
        buffer.copy_(mean)


class _SyncNormalize(torch.autograd.Function):
    """Normalization by the statistics of the global batch, in operations of any device that torch.compile can fuse.

    All processes must have the same local batch size.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
        axes = [axis for axis in range(input.dim()) if axis != 1]
        values = full_precision(input)
        local = torch.stack(torch.var_mean(values, dim=axes, correction=0))  # (2, C)
        variances, means = collectives.all_gather(local[None]).unbind(1)  # (W, C) each
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        ctx.save_for_backward(input, weight, mean, torch.rsqrt(variance + eps))
        ctx.mark_non_differentiable(mean, variance)
        out = F.batch_norm(input, mean, variance, weight, bias, False, 0.0, eps)
        return out, mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        input, weight, mean, inv_std = ctx.saved_tensors
        grad = grads[0].to(mean.dtype)
        axes = [axis for axis in range(input.dim()) if axis != 1]
        shape = [1, -1] + [1] * (input.dim() - 2)
        normed = (input.to(mean.dtype) - mean.view(shape)) * inv_std.view(shape)
        sums = torch.stack([grad.sum(axes), (grad * normed).sum(axes)])  # (2, C), local
        total = sums.clone()
        watchdog.record_collective()
        dist.all_reduce(total)
        total /= input.numel() / input.size(1) * collectives.world_size()
        scale = inv_std if weight is None else inv_std * weight
        grad_input = (grad - total[0].view(shape) - normed * total[1].view(shape)) * scale.view(shape)
        has_bias = ctx.needs_input_grad[2]
        return grad_input.to(input.dtype), None if weight is None else sums[1], sums[0] if has_bias else None, None


class _FusedSyncNormalize(torch.autograd.Function):
    """Normalization by the statistics of the global batch, in the CUDA kernels of torch.nn.SyncBatchNorm.

    torch.nn.SyncBatchNorm selects the processes whose batch is not empty. This selection makes the host wait for the
    device three times per call. Here, all processes must have the same local batch size, so nothing is selected.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        input = _dense(input)
        local = torch.stack(torch.batch_norm_stats(input, eps))  # mean and 1 / std: (2, C)
        means, inv_stds = collectives.all_gather(local[None]).unbind(1)  # (W, C) each
        counts = means.new_full((len(means),), input.numel() // input.size(1))
        mean, inv_std = torch.batch_norm_gather_stats_with_counts(
            input, means, inv_stds, running_mean, running_var, momentum, eps, counts
        )
        ctx.save_for_backward(input, weight, mean, inv_std)
        return torch.batch_norm_elemt(input, weight, bias, mean, inv_std, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, inv_std = ctx.saved_tensors
        grad = _dense(grad)
        has_input, has_weight, has_bias = ctx.needs_input_grad[:3]
        *sums, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
            grad, input, mean, inv_std, weight, has_input, has_weight, has_bias
        )
        grad_input = None
        if has_input:
            total = torch.stack(sums)  # (2, C)
            watchdog.record_collective()
            dist.all_reduce(total)
            count = input.numel() // input.size(1) * collectives.world_size()
            counts = torch.full((1,), count, dtype=torch.int32, device=input.device)
            grad_input = torch.batch_norm_backward_elemt(grad, input, mean, inv_std, weight, total[0], total[1], counts)
        return grad_input, grad_weight if has_weight else None, grad_bias if has_bias else None, *[None] * 4


def _dense(maps: Tensor) -> Tensor:
    """Return `maps` in a memory format that the CUDA kernels of BatchNorm support: contiguous or channels-last."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if maps.dim() in formats and maps.is_contiguous(memory_format=formats[maps.dim()]):
        return maps
    return maps.contiguous()


class SyncBatchNorm(_BatchNorm):
    """BatchNorm over the global batch on any device. (torch.nn.SyncBatchNorm supports only GPUs.)

    The local batch size must be the same on all processes. Statistics of half-precision inputs are float32. In a
    forward pass, the processes exchange data once, and so they do in a backward pass. The host never waits for the
    device.

    This class is not a subclass of torch.nn.SyncBatchNorm, because DistributedDataParallel rejects such subclasses on
    the CPU.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (N, C, ...) but got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, ...) over the global batch. The output has the shape of the input."""
        world_size = collectives.world_size()
        if not self.training or world_size == 1:
            return super().forward(input)
        self._check_input_dim(input)
        mean, variance = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        if self._uses_cuda_kernels(input):
            state = (mean, variance, self.momentum)
            return _FusedSyncNormalize.apply(input, self.weight, self.bias, *state, self.eps)  # type: ignore[no-any-return]
        out, batch_mean, batch_variance = _SyncNormalize.apply(input, self.weight, self.bias, self.eps)
        if mean is not None and variance is not None:
            count = input.numel() / input.size(1) * world_size
            momentum: Any = self.momentum
            if momentum is None:  # the average over all batches
                momentum = self.num_batches_tracked.to(mean.dtype).reciprocal()  # type: ignore[union-attr]
            with torch.no_grad():
                mean.lerp_(batch_mean, momentum)
                variance.lerp_(batch_variance * count / (count - 1), momentum)
        return out  # type: ignore[no-any-return]

    def _uses_cuda_kernels(self, input: Tensor) -> bool:
        """Return True if `_FusedSyncNormalize` is faster than `_SyncNormalize`, and supports the settings of the layer.

        Within torch.compile, `_SyncNormalize` is faster, because it is fused with the operations around it. A
        cumulative average (`momentum=None`) has a factor on the device, which the CUDA kernels do not accept.
        """
        return input.is_cuda and self.momentum is not None and not torch.compiler.is_compiling()


def convert_batch_norm(module: nn.Module, kind: type[_BatchNorm]) -> Any:
    """Convert every BatchNorm inside `module` to the class `kind`, in place. Return `module`.

    The BatchNorm classes differ only in `forward`. The conversion only changes the class of each layer. Parameters,
    buffers and names do not change.
    """
    for part in module.modules():
        if type(part) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            part.__class__ = kind
    return module
