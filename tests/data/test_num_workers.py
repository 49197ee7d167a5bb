"""Number of data workers, by cores and memory."""

from __future__ import annotations

import warnings

import pytest

from sslcli.data import num_workers
from sslcli.data.num_workers import SMALL_TENSORS, WORKER_BYTES, BatchMemory, default_workers, prefetch_factor
from sslcli.data.sources.base import Source
from sslcli.errors import ConfigError

GB = 10**9


@pytest.mark.parametrize(
    ("cores", "quota", "processes", "gpu", "image_size", "expected"),
    [
        (2, None, None, False, 32, 0),
        (2, None, None, False, 64, 0),
        (2, None, None, False, 65, 2),
        (3, None, None, False, 32, 2),
        (8, None, 4, False, 32, 0),
        (1, None, None, True, 32, 1),
        (4, None, None, True, 224, 3),
        (64, None, 4, True, 224, 15),
        (8, None, 4, True, 224, 1),
        (33, None, None, True, 224, 32),
        (128, None, None, True, 224, 32),
        (128, 3.5, None, True, 224, 3),
        (128, 16.0, 4, True, 224, 3),
        (128, 2.0, None, False, 32, 0),
    ],
)
def test_default_follows_the_cores_of_a_process(
    cores: int,
    quota: float | None,
    processes: int | None,
    gpu: bool,
    image_size: int,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr("sslcli.system.cgroup.cpu_quota", lambda: quota)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    if processes is None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert default_workers(image_size) == expected
    chosen, set_by_user = Source(image_size=image_size, workers=None), Source(image_size=image_size, workers=9)
    assert (chosen.workers, chosen.chooses_workers) == (expected, True)
    assert (set_by_user.workers, set_by_user.chooses_workers) == (9, False)


def test_many_workers_do_not_prefetch_more_batches_than_few() -> None:
    in_flight = [workers * prefetch_factor(workers) for workers in (1, 8, 9, 15, 127)]
    assert in_flight == [4, 32, 18, 30, 254]


def give(monkeypatch: pytest.MonkeyPatch, available: int, processes: int = 1) -> None:
    monkeypatch.setattr(num_workers, "available_memory", lambda: available)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))


@pytest.mark.parametrize("processes", [1, 4])
def test_memory_is_for_prefetched_batches_and_processes(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, GB, processes)
    batch = 1_000_000
    slot = batch + SMALL_TENSORS
    assert BatchMemory(10, batch // 10).total(0) == 0
    assert BatchMemory(10, batch // 10).total(3) == processes * (3 * (WORKER_BYTES + 2 * slot) + 15 * slot)
    part = 3 * batch // 10 + SMALL_TENSORS  # the largest of 4 parts has 3 of 10 images
    assert BatchMemory(10, batch // 10, is_divided=True).total(4) == processes * (
        4 * (WORKER_BYTES + 2 * part) + 28 * part
    )


def test_a_number_that_needs_too_much_memory_is_rejected_with_one_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = BatchMemory(256, 300_781)
    give(monkeypatch, 8 * GB)
    memory.check(8)
    with pytest.raises(ConfigError) as caught:
        memory.check(64)
    expected = "dataset.workers is 64, which needs about 26.4 GB .* but 8.0 GB are available: use fewer workers"
    assert caught.match(rf"{expected} \(dataset.workers=19; ssl-eval: workers=19\), lower the batch size")
    memory.check(19)
    with pytest.raises(ConfigError):
        memory.check(20)
    give(monkeypatch, GB // 5)
    with pytest.raises(ConfigError, match=r"read in the main process \(dataset.workers=0; ssl-eval: workers=0\)"):
        memory.check(1)


def test_the_default_is_reduced_to_half_of_the_memory_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = BatchMemory(256, 300_781)
    give(monkeypatch, 1000 * GB)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert memory.reduced_workers(127) == 127
    give(monkeypatch, 16 * GB)
    with pytest.warns(UserWarning, match=r"19 data workers per process instead of 127 .* 52.1 GB, .*\(8.0 GB\)"):
        assert memory.reduced_workers(127) == 19
    give(monkeypatch, 0)
    with pytest.warns(UserWarning, match=r"0 data workers per process instead of 2"):
        assert memory.reduced_workers(2) == 0
