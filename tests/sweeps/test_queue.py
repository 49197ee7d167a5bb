"""Cores and GPUs of parallel jobs, and signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from command_line import Cli
from sslcli.sweeps.queue import Relay, Running, Slot, cores_of_slot, pinned, slots_of

LOCAL: dict[str, Any] = {"kind": "local", "threads": None}


@pytest.fixture(autouse=True)
def _no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment requests no number of threads."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def slots(
    monkeypatch: pytest.MonkeyPatch,
    *,
    gpus: int = 0,
    cores: int = 16,
    launcher: dict[str, Any] = LOCAL,
    device: str = "auto",
    jobs: int | None = 100,
    wanted: int | None = None,
) -> list[Slot]:
    """The slots of a machine with so many GPUs and cores."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    return slots_of({"launcher": launcher, "device": device}, jobs=jobs, wanted=wanted)


def test_every_gpu_gets_a_job_and_a_part_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    found = slots(monkeypatch, gpus=4)
    assert [slot.devices for slot in found] == [("0",), ("1",), ("2",), ("3",)]
    assert [slot.cores for slot in found] == [tuple(range(i, i + 4)) for i in (0, 4, 8, 12)]
    assert str(found[1]) == "GPU 1, cores 4-7"
    assert len(slots(monkeypatch, gpus=4, jobs=3)) == 3
    assert [slot.devices for slot in slots(monkeypatch, gpus=2, wanted=4)] == [("0",), ("1",), ("0",), ("1",)]


def test_the_devices_are_those_that_the_sweep_may_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [slot.devices for slot in slots(monkeypatch, gpus=2)] == [("5",), ("7",)]


def test_a_job_of_several_processes_gets_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    multi = {"kind": "multi", "processes": 2, "threads": None}
    assert [slot.devices for slot in slots(monkeypatch, gpus=5, launcher=multi)] == [("0", "1"), ("2", "3")]
    assert [slot.devices for slot in slots(monkeypatch, gpus=4, launcher=multi | {"processes": None})] == [
        ("0", "1", "2", "3")
    ]


@pytest.mark.parametrize(
    ("cores", "threads", "wanted", "count"),
    [(16, None, None, 4), (2, None, None, 1), (16, 1, None, 16), (16, None, 3, 3), (16, 8, None, 2), (2, None, 5, 5)],
)
def test_on_the_processor_each_job_gets_a_few_cores(
    cores: int, threads: int | None, wanted: int | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = slots(monkeypatch, cores=cores, launcher=LOCAL | {"threads": threads}, wanted=wanted)
    assert len(found) == count
    if count == 1:
        assert found == [Slot()]
    else:
        used = [core for slot in found for core in slot.cores or ()]
        assert set(used) == set(range(cores))
        assert len(used) == max(cores, count)


def test_threads_of_the_environment_count_as_cores_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert len(slots(monkeypatch)) == 8
    assert len(slots(monkeypatch, launcher=LOCAL | {"threads": 8})) == 2


def test_a_named_gpu_takes_one_job_at_a_time_and_slurm_takes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slots(monkeypatch, gpus=4, device="cuda:1") == [Slot()]
    assert slots(monkeypatch, device="mps") == [Slot()]
    assert slots(monkeypatch, gpus=4, device="cpu", cores=4) == [Slot()]
    assert slots(monkeypatch, launcher={"kind": "slurm"}, jobs=7) == [Slot()] * 7
    assert len(slots(monkeypatch, gpus=8, jobs=None)) == 8


def test_shares_do_not_overlap_where_there_are_enough_cores() -> None:
    assert [cores_of_slot([3, 5, 7, 9, 11], i, 2) for i in range(2)] == [(3, 5), (7, 9, 11)]
    assert [cores_of_slot([3, 5], i, 3) for i in range(3)] == [(3,), (5,), (3,)]


def test_a_process_started_on_cores_stays_there_and_its_parent_does_not() -> None:
    before = os.sched_getaffinity(0)
    core = min(before)
    with pinned((core,)):
        process = subprocess.Popen([sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"], stdout=-1)
    assert os.sched_getaffinity(0) == before
    assert process.communicate()[0].decode().strip() == str({core})


def test_jobs_run_at_once_on_slots_of_their_own(
    quick_jobs: None, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    ended = cli("ssl-train", "-m", "seed=range(0,3)", "hydra.sweep.dir=here")
    assert ended.code == 0
    assert "2 jobs in parallel: GPU 0" in ended.out
    starts = [json.loads(path.read_text()) for path in tmp_path.glob("here/*/starts")]
    assert sorted(start["gpus"] for start in starts) in (["0", "0", "1"], ["0", "1", "1"])
    if len(os.sched_getaffinity(0)) > 1:
        assert len({tuple(start["cores"]) for start in starts}) == 2


@pytest.mark.parametrize(("ends_with", "called"), [("75", [signal.SIGUSR2]), ("0", [])])
def test_a_scheduler_queues_its_job_again_once_the_run_is_saved_and_not_when_it_is_finished(
    ends_with: str, called: list[int]
) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: seen.append(number))
    code = f"import signal, sys; signal.signal(15, lambda *_: sys.exit({ends_with})); print(flush=True); signal.pause()"
    try:
        with Relay() as relay:
            process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
            assert process.stdout is not None
            process.stdout.readline()
            relay.add(Running(None, process, 0, ()))  # type: ignore[arg-type]
            os.kill(os.getpid(), signal.SIGUSR2)
            assert process.wait(60) == int(ends_with)
            relay.unfinished = process.returncode != 0
            assert relay.is_stopping
            assert seen == []
        assert seen == called
    finally:
        signal.signal(signal.SIGUSR2, before)
