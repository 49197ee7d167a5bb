"""Available memory; page faults, measured in separate processes, since the settings are global."""

from __future__ import annotations

import subprocess
import sys

import pytest

from platforms import needs_glibc
from sslcli.system import cgroup, memory

PROGRAM = """
import resource, sys
from sslcli.system.memory import keep_freed_memory, release_freed_memory

if sys.argv[1] != "leave":
    assert keep_freed_memory()
if sys.argv[1] == "release":
    release_freed_memory()


def step():  # blocks above and below the size that glibc maps
    for megabytes in (64, 1, 200):
        b"x" * (megabytes << 20)


step()
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int:
    """Return the page faults of the third of three equal steps."""
    return int(subprocess.run([sys.executable, "-c", PROGRAM, mode], check=True, capture_output=True).stdout)


@needs_glibc
def test_a_step_like_the_one_before_faults_in_no_pages() -> None:
    assert page_faults("keep") < 100
    assert page_faults("leave") > 1000  # else this test shows nothing


@needs_glibc
def test_freed_memory_is_returned_again() -> None:
    assert page_faults("release") > 1000


def test_available_memory_is_that_of_the_machine_or_of_the_control_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "free_memory", lambda: None)
    machine = memory.available_memory()
    assert 0 < machine <= sys.maxsize
    monkeypatch.setattr(cgroup, "free_memory", lambda: 1000)
    assert memory.available_memory() == 1000
    monkeypatch.setattr(cgroup, "free_memory", lambda: 10**18)
    assert memory.available_memory() < 10**18
