"""Slots: parts of this machine, devices and CPU cores, each of which runs one job of a sweep at a time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from sslcli.system.cpu import requested_threads, usable

CORES_PER_JOB = 4  # more threads make a single-process run only slightly faster


@dataclass(frozen=True)
class Slot:
    """Devices and CPU cores of this machine on which one job runs at a time."""

    devices: tuple[str, ...] | None = None  # CUDA devices of the job; None: all devices of this process
    cores: tuple[int, ...] | None = None  # CPU cores on which the job runs; None: any

    def __str__(self) -> str:
        parts = [] if self.devices is None else [f"GPU {','.join(self.devices)}"]
        if self.cores is not None:
            first, last = self.cores[0], self.cores[-1]
            parts.append(f"core {first}" if first == last else f"cores {first}-{last}")
        return ", ".join(parts) or "this machine"


def slots_of(config: dict[str, Any], *, jobs: int | None, wanted: int | None) -> list[Slot]:
    """Divide this machine into slots. A slot runs one job at a time.

    Args:
        config: configuration of a job, with its device, threads and processes.
        jobs: number of jobs, which is the maximum number of slots. None: the number is not known, so there is no
            maximum.
        wanted: number of slots, from `sweep.jobs`. None: as many slots as the machine has room for. With GPUs, a slot
            needs one GPU per process of a job. Without GPUs, it needs one core per thread. A process has
            `CORES_PER_JOB` threads unless their number is set.
    """
    launcher = config.get("launcher", {"kind": "local"})
    if launcher["kind"] == "slurm":  # jobs only submit their runs and need no resources of this machine
        return [Slot()] * min(jobs or 1, wanted or jobs or 1)
    devices = cuda_devices(config["device"])
    cores = usable()
    threads = launcher.get("threads") or requested_threads() or CORES_PER_JOB
    processes = 1 if launcher["kind"] == "local" else launcher["processes"] or len(devices) or 2
    groups = [tuple(devices[i : i + processes]) for i in range(0, len(devices) - processes + 1, processes)]
    if devices or ":" in config["device"] or config["device"] == "mps":
        count = wanted or len(groups) or 1
    else:
        count = wanted or len(cores) // (processes * threads) or 1
    count = min(count, jobs or count)
    if count == 1:
        return [Slot(groups[0] if groups else None)]
    return [Slot(groups[i % len(groups)] if groups else None, cores_of_slot(cores, i, count)) for i in range(count)]


def cores_of_slot(cores: list[int], index: int, count: int) -> tuple[int, ...]:
    """Divide `cores` among `count` slots, and return the cores of the slot with the 0-based number `index`.

    Each slot runs one job at a time. Slots share cores only if there are more slots than cores.
    """
    if count >= len(cores):
        return (cores[index % len(cores)],)
    return tuple(cores[index * len(cores) // count : (index + 1) * len(cores) // count])


def cuda_devices(device: str) -> list[str]:
    """Return the CUDA devices that jobs with the setting `device` may use, named as in CUDA_VISIBLE_DEVICES."""
    if device not in ("auto", "cuda"):
        return []
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]
