"""Training loop: optimizer steps, gradient accumulation, gradient synchronization and scheduled checkpoints."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sslcli.config.settings import TrainSettings
from sslcli.distributed import collectives, watchdog
from sslcli.engine import fsdp, gradient_cache, precision
from sslcli.engine.checkpoint_writer import Writer
from sslcli.engine.clipping import clip_gradients
from sslcli.engine.optim import drop_frozen_gradients
from sslcli.engine.resume import save_good
from sslcli.engine.run import Run
from sslcli.errors import Stopped
from sslcli.methods.base import Batch, Method


def train(run: Run, step: int) -> None:
    """Train a run to its last step. `step` is the number of steps already trained, as `resume` returns it.

    After a signal or at the time limit, the function saves a checkpoint and then raises Stopped. It raises
    TrainingFailed if the loss is not finite, if the representation has collapsed, or if the disk or a data worker
    fails.
    """
    total, monitor = run.total_steps, run.monitor
    model = run.method if run.settings.cached_gradients else parallel(run.method, run.device)
    monitor.start(step, total)
    writer = Writer(run.run_dir, sharded=fsdp.is_sharded(run.method))
    with closing(run.loader.steps(step, total)) as batches, closing(writer):
        while step < total:
            watchdog.report_progress(f"{watchdog.IMAGES} of step {step + 1}")
            micro_batches = run.stop.unless_stopped(lambda: next(batches))
            if micro_batches is None:
                save_good(run, step, writer)
                raise stopped(run, step)
            watchdog.report_progress(f"step {step + 1}")
            lr = run.begin_step(step)
            scalars = optimize(run, model, micro_batches)
            run.method.after_step(run.progress_at(step))
            step += 1

            monitor.after_step(step, scalars, lr=lr, method=run.method)
            stop = run.stop.agreed()
            if stop or step == total or save_is_due(run.settings, step, run.loader.steps_per_epoch):
                save_good(run, step, writer)
            if stop and step < total:
                raise stopped(run, step)


def optimize(run: Run, model: nn.Module, micro_batches: list[Batch]) -> dict[str, Tensor]:
    """Run one optimizer step on the micro-batches. Return the loss and the other scalars of the step, detached.

    model: `run.method`, or `run.method` wrapped by DistributedDataParallel.
    """
    if run.settings.cached_gradients:
        means = gradient_cache.backward(
            run.method, micro_batches, device=run.device, dtype_name=run.precision, scaler=run.scaler
        )
    else:
        means = accumulate(run, model, micro_batches)
    drop_frozen_gradients(run.optimizer)
    if run.settings.clip_grad is not None:
        run.scaler.unscale_(run.optimizer)
        clip_gradients(run.method, run.settings.clip_grad, by=run.settings.clip_grad_by)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return means


def accumulate(run: Run, model: nn.Module, micro_batches: list[Batch]) -> dict[str, Tensor]:
    """Accumulate the gradient of the mean loss of the micro-batches.

    Return each scalar that the method computes, including the loss, averaged over the micro-batches.

    model: `run.method`, or `run.method` wrapped by DistributedDataParallel.
    """
    means: dict[str, Tensor] = {}
    fraction = 1 / len(micro_batches)
    for number, batch in enumerate(micro_batches, start=1):
        with gradient_sync(model, is_last=number == len(micro_batches)):
            if run.compiled:
                watchdog.record_collective()  # because compiled code does not record its collectives
            with precision.autocast(run.device, run.precision):
                scalars = model(batch)
            run.scaler.scale(scalars["loss"] * fraction).backward()
        for name, value in scalars.items():
            means[name] = means.get(name, 0) + value.detach() * fraction
    return means


def gradient_sync(model: nn.Module, *, is_last: bool) -> AbstractContextManager[object]:
    """Return a context for the `backward` of one micro-batch. Gradients are averaged over processes only if `is_last`.

    is_last: True for the last micro-batch of a step.
    """
    if fsdp.is_sharded(model):
        model.set_requires_gradient_sync(is_last)  # type: ignore[operator]
    elif isinstance(model, DistributedDataParallel) and not is_last:
        return model.no_sync()
    return nullcontext()


def parallel(method: Method, device: torch.device) -> nn.Module:
    """Return `method`. With several processes and unsharded parameters, wrap it in DistributedDataParallel.

    Buffers are not broadcast, because queues of negatives and the running statistics of SyncBatchNorm are identical on
    all processes.
    """
    if collectives.world_size() == 1 or fsdp.is_sharded(method):
        return method
    ids = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():
        # Newer versions of torch replace `broadcast_buffers` by another argument, which older versions lack.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        model = DistributedDataParallel(method, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    if device.type == "cpu":
        model.register_comm_hook(None, lambda _, bucket: average_each(bucket))  # torch rejects string annotations
    return model


def average_each(bucket: Any) -> torch.futures.Future[Tensor]:
    """Average the gradients in a bucket over the processes, separately for each parameter.

    With three or more processes, the last bit of a sum depends on the offset of the parameter in the reduced tensor.
    DistributedDataParallel changes these offsets, because it rebuilds its buckets after the first step. A resumed run
    starts with the initial buckets again, so a reduction of whole buckets would change its last bits. A separate
    reduction per parameter does not depend on the buckets.
    """
    watchdog.record_collective()
    whole = bucket.buffer().div_(collectives.world_size())
    parts = whole.split([gradient.numel() for gradient in bucket.gradients()])
    for work in [dist.all_reduce(part, async_op=True) for part in parts]:
        work.wait()
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(whole)
    return done


def save_is_due(settings: TrainSettings, step: int, steps_per_epoch: int) -> bool:
    """Return True if `settings` require a checkpoint after `step` steps."""
    by_steps = settings.save_every_steps is not None and step % settings.save_every_steps == 0
    every = settings.save_every_epochs * steps_per_epoch
    return by_steps or (every > 0 and step % every == 0)


def stopped(run: Run, step: int) -> Stopped:
    """Return the exception that ends a run after a signal or at the time limit.

    Its message states that the checkpoint is saved, so the caller must save the checkpoint first.
    """
    reason = run.stop.reason or "another process's " + ("signal" if run.stop.by_signal else "time limit")
    return Stopped(
        f"stopped by {reason} after step {step} of {run.total_steps}; the checkpoint is saved: run the same command "
        "again to resume",
        by_signal=run.stop.by_signal,
    )
