"""Cores and GPUs of parallel jobs."""

from __future__ import annotations

from typing import Any

import pytest

from sslcli.sweeps.slots import Slot, cores_of_slot, slots_of

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
