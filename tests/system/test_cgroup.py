"""Limits of control groups, read from a fake /sys/fs/cgroup."""

from __future__ import annotations

from pathlib import Path

import pytest

from sslcli.system import cgroup

UNIFIED = "0::/jobs/mine\n"
LEGACY = "9:memory:/jobs/mine\n4:cpu,cpuacct:/jobs/mine\n0::/\n"


def fake(monkeypatch: pytest.MonkeyPatch, folder: Path, membership: str, files: dict[str, str]) -> None:
    """Create the files of a fake mount of control groups."""
    for name, text in files.items():
        path = folder / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "membership").write_text(membership)
    monkeypatch.setattr(cgroup, "MEMBERSHIP", folder / "membership")
    monkeypatch.setattr(cgroup, "MOUNT", folder / "mount")


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        (UNIFIED, {}, None),
        (UNIFIED, {"jobs/mine/cpu.max": "max 100000\n"}, None),
        (UNIFIED, {"jobs/mine/cpu.max": "250000 100000\n"}, 2.5),
        (UNIFIED, {"jobs/mine/cpu.max": "400000 100000\n", "jobs/cpu.max": "300000 100000\n"}, 3.0),
        (UNIFIED, {"cpu.max": "150000 50000\n"}, 3.0),  # in a container, the path may be that of the host
        (UNIFIED, {"cpu.max": "unknown\n"}, None),
        (LEGACY, {"cpu,cpuacct/jobs/mine/cpu.cfs_quota_us": "-1\n"}, None),
        (
            LEGACY,
            {
                "cpu,cpuacct/jobs/mine/cpu.cfs_quota_us": "200000\n",
                "cpu,cpuacct/jobs/mine/cpu.cfs_period_us": "100000\n",
            },
            2.0,
        ),
        (LEGACY, {"cpu,cpuacct/cpu.cfs_quota_us": "800000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 8.0),
    ],
)
def test_cpu_quota(
    membership: str, files: dict[str, str], expected: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, tmp_path, membership, files)
    assert cgroup.cpu_quota() == expected


def unified(folder: str, limit: str, used: str, cached: str = "0") -> dict[str, str]:
    names = {"memory.max": limit, "memory.current": used, "memory.stat": f"anon 5\ninactive_file {cached}\n"}
    return {f"{folder}{name}": text for name, text in names.items()}


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        (UNIFIED, {}, None),
        (UNIFIED, unified("jobs/mine/", "max\n", "300\n"), None),
        (UNIFIED, unified("jobs/mine/", "1000\n", "300\n", "100"), 800),
        (UNIFIED, unified("jobs/mine/", "1000\n", "300\n") | unified("jobs/", "900\n", "500\n"), 400),
        (UNIFIED, unified("", "100\n", "300\n"), 0),
        (
            LEGACY,
            {
                "memory/memory.limit_in_bytes": "1000\n",
                "memory/memory.usage_in_bytes": "900\n",
                "memory/memory.stat": "total_inactive_file 50\n",
            },
            150,
        ),
    ],
)
def test_free_memory(
    membership: str, files: dict[str, str], expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, tmp_path, membership, files)
    assert cgroup.free_memory() == expected


def test_another_operating_system_has_no_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "absent")
    assert cgroup.cpu_quota() is None
    assert cgroup.free_memory() is None
