"""Limits that Linux control groups, such as those of containers and Slurm jobs, set for this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MEMBERSHIP = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")


def cpu_quota() -> float | None:
    """Return the number of CPU cores whose time this process may use, or None if the time is not limited.

    `docker run --cpus` and CPU limits of Kubernetes set such a quota. They do not change the CPU affinity.
    """
    quotas = []
    for folder in _folders("cpu"):
        with suppress(OSError, ValueError, ZeroDivisionError):
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if quota != "max" and int(quota) > 0:  # version 1 has -1 for no limit
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def free_memory() -> int | None:
    """Return the bytes of memory that this process and its children may still allocate, or None without a limit.

    Cached file contents that the kernel can evict count as free.
    """
    found = []
    for folder in _folders("memory"):
        is_unified = (folder / "memory.max").exists()
        names = ("memory.max", "memory.current") if is_unified else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        with suppress(OSError, ValueError):
            limit, used = (int((folder / name).read_text()) for name in names)  # "max" = no limit
            rows = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = int(rows.get("inactive_file" if is_unified else "total_inactive_file", 0))
            found.append(max(0, limit - used + cached))
    return min(found, default=None)


def _folders(controller: str) -> Iterator[Path]:
    """Yield the folders with the limits of a controller (cpu or memory): the group of this process and its parents."""
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:  # another operating system
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # In a container, the path may be that of the host, and only the mount itself exists.
        base = MOUNT / controllers
        group = base / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(base) and folder.is_dir())
