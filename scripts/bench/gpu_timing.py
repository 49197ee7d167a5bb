"""Time, memory, kernel launches, synchronizations and idle time of a step on a GPU; wall-clock time on the CPU."""

from __future__ import annotations

import itertools
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from measure import Result, peak_mb, summary
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")  # prefixes of the names of CUDA's functions
LEAST_GROUPS = 2


@dataclass(frozen=True)
class Plan:
    """Device and length of a measurement. Steps are timed in groups, so that a prefetched batch has little effect."""

    device: torch.device
    seconds: float  # at most this long, from the start of the measurement
    warmup: int
    groups: int
    group: int  # steps

    @classmethod
    def from_environment(cls) -> Plan:
        """Return the plan that gpu.py passes in GPU_BENCH_DEVICE and GPU_BENCH_SECONDS: 30 + 100 steps on a GPU."""
        device = torch.device(os.environ.get("GPU_BENCH_DEVICE", "cuda"))
        steps = (30, 10, 10) if device.type == "cuda" else (1, LEAST_GROUPS, 2)
        return cls(device, float(os.environ.get("GPU_BENCH_SECONDS", "60")), *steps)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def measure_steps(step: Callable[[], object], plan: Plan, *, images: int | None) -> Result:
    """Warm up, time and profile `step`.

    With little time, there are fewer warm-up steps and fewer timed groups, but at least two groups. The median of the
    groups is returned.

    Args:
        step: function that processes `images` source images.
        images: number of images per step, or None if the step does not process images.

    Returns:
        images_per_s (unless `images` is None), ms (per step), steps (number of timed steps), peak_gb, and on a GPU
        launches and syncs (per step) and idle_percent.
    """
    start = time.perf_counter()
    for _ in range(plan.warmup):
        step()
        synchronize(plan)
        if time.perf_counter() - start > plan.seconds / 2:
            break
    before = time.perf_counter()
    repeat(step, plan.group)
    synchronize(plan)
    per_group = time.perf_counter() - before
    left = plan.seconds - (time.perf_counter() - start)
    groups = max(LEAST_GROUPS, min(plan.groups, int(left / per_group) - 2))  # the counts below take two groups
    if plan.on_gpu:
        torch.cuda.reset_peak_memory_stats(plan.device)
    times = [group / plan.group for group in timed_groups(step, plan, groups)]
    found = summary(times, images=images or 0) | {"steps": groups * plan.group}
    found["peak_gb"] = torch.cuda.max_memory_allocated(plan.device) / 1e9 if plan.on_gpu else peak_mb() / 1e3
    if images is None:
        del found["images_per_s"]
    if plan.on_gpu:
        found |= {"syncs": syncs(step, plan)} | launches_and_idle(step, plan, found["ms"])
    return found


def timed_groups(step: Callable[[], object], plan: Plan, groups: int) -> Sequence[float]:
    """Return the seconds of each group of steps: between CUDA events on a GPU, else by the wall clock."""
    if not plan.on_gpu:
        marks = [time.perf_counter()]
        for _ in range(groups):
            repeat(step, plan.group)
            marks.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(groups + 1)]
    events[0].record()
    for event in events[1:]:
        repeat(step, plan.group)
        event.record()
    synchronize(plan)
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]


def repeat(step: Callable[[], object], times: int) -> None:
    for _ in range(times):
        step()


def synchronize(plan: Plan) -> None:
    if plan.on_gpu:
        torch.cuda.synchronize(plan.device)


def syncs(step: Callable[[], object], plan: Plan) -> float:
    """Return how often the host waits for the GPU in a step, by torch's debug mode for synchronization."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            repeat(step, plan.group)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught) / plan.group


def launches_and_idle(step: Callable[[], object], plan: Plan, ms: float) -> Result:
    """Return the kernel launches per step, and the idle time of the GPU as a percentage of `ms`, the time of a step.

    The profiler slows the host, so only the time of the kernels is from the profile. If the profiler may not see the
    kernels, there is no idle time in the result.
    """
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        repeat(step, plan.group)
        synchronize(plan)
    events = profiler.events() or []
    launches = sum(event.name.startswith(LAUNCHES) for event in events)
    kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    found = {"launches": launches / plan.group}
    if kernels:
        busy = covered([(event.time_range.start, event.time_range.end) for event in kernels]) / 1e3 / plan.group
        found["idle_percent"] = max(0.0, 100 * (1 - busy / ms))
    return found


def covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Return the length of the union of intervals (start, end)."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
