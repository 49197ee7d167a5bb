"""Search for the largest batch size. The memory of a GPU is simulated; the steps run on the CPU."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from command_line import SMALL, Cli, composed
from processes import Pair
from sslcli.config.run_config import RunConfig
from sslcli.distributed import collectives
from sslcli.errors import ConfigError
from sslcli.runs import batch_size_search, launch
from sslcli.runs.batch_size_search import Attempt, attempt, configured, describe, release_memory, search

SEARCH = ["dry_run=true", "find_batch_size=true"]


def tried(limit: int, *, start: int, unit: int = 8, largest: int = 1000) -> list[tuple[int, bool]]:
    """Search with a GPU that has memory for `limit` images."""
    found = search(lambda size: Attempt(size, size <= limit), start=start, unit=unit, largest=largest)
    return [(each.batch_size, each.fits) for each in found]


@pytest.mark.parametrize("start", [8, 16, 64, 104, 256, 1000])
@pytest.mark.parametrize("limit", [8, 15, 100, 103, 104, 511, 999, 1000, 5000])
def test_the_largest_multiple_that_fits_is_found(start: int, limit: int) -> None:
    found = tried(limit, start=start)
    assert max(size for size, fits in found if fits) == min(limit, 1000) // 8 * 8
    assert len(found) <= 15
    assert [size for size, _ in found] == sorted({size for size, _ in found})
    assert all(size % 8 == 0 and 8 <= size <= 1000 for size, _ in found)


def test_the_size_is_doubled_and_then_bisected() -> None:
    assert tried(150, start=64) == [
        (64, True),
        (128, True),
        (144, True),
        (152, False),
        (160, False),
        (192, False),
        (256, False),
    ]


def test_a_search_without_a_size_that_fits_ends() -> None:
    assert tried(5, start=64) == [(8, False), (16, False), (32, False), (64, False)]


def test_a_search_ends_at_the_number_of_images() -> None:
    assert tried(10**9, start=64, largest=96) == [(64, True), (96, True)]
    assert tried(10**9, start=8, unit=8, largest=8) == [(8, True)]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that simulates a GPU with memory for `limit` images of one forward pass."""
    optimize = batch_size_search.optimize

    def simulate(limit: int, *, peak: float = 0.5) -> list[int]:
        sizes: list[int] = []

        def limited(job: Any, method: Any, micro_batches: list[Any]) -> Any:
            sizes.append(len(micro_batches[0].index))
            if sizes[-1] > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return optimize(job, method, micro_batches)

        monkeypatch.setattr(batch_size_search, "optimize", limited)
        monkeypatch.setattr("sslcli.runs.worker.configured", lambda config, device: config)
        monkeypatch.setattr(batch_size_search, "total_memory", lambda device: 10**9)
        monkeypatch.setattr(batch_size_search, "peak_memory", lambda device: int(peak * sizes[-1] / limit * 10**9))
        return sizes

    return simulate


def test_the_command_prints_what_was_tried_and_the_override(gpu: Any, cli: Cli, tmp_path: Path) -> None:
    sizes = gpu(50)
    ended = cli("ssl-train", *SMALL, *SEARCH, "run_dir=dry")
    assert (ended.code, ended.err) == (0, "")
    assert re.search(r"train.batch_size=32 +peak 0.32 of 1.00 GB, [\d,]+ images/s without data", ended.out)
    assert re.search(r"train.batch_size=56 +out of memory", ended.out)
    assert "replace dry_run=true find_batch_size=true by train.batch_size=48" in ended.out
    assert max(sizes) == 64
    assert not (tmp_path / "dry").exists()
    assert cli("ssl-train", *SMALL, "train.batch_size=48", "run_dir=run").code == 0


def test_resident_images_take_memory_in_each_attempt(gpu: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(50)
    copied: list[object] = []
    monkeypatch.setattr("sslcli.data.loader.is_resident", lambda source, device: True)
    monkeypatch.setattr("sslcli.data.loader.train_images", lambda source, device: copied.append(device))
    assert cli("ssl-train", *SMALL, *SEARCH).code == 0
    assert copied == [torch.device("cpu")]


def test_each_step_begins_like_a_step_of_training(gpu: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = gpu(50)
    begun: list[tuple[int, float, float]] = []
    monkeypatch.setattr(
        "sslcli.methods.simclr.SimCLR.before_step",
        lambda self, progress, epoch: begun.append((len(sizes), progress, epoch)),
    )
    assert cli("ssl-train", *SMALL, *SEARCH).code == 0
    assert begun[-len(sizes) :] == [(number, 0.0, 0.0) for number in range(len(sizes))]


def test_a_step_whose_memory_nearly_fills_the_gpu_does_not_fit(gpu: Any, cli: Cli) -> None:
    gpu(50, peak=1.0)
    ended = cli("ssl-train", *SMALL, *SEARCH, "train.batch_size=48")
    assert re.search(r"train.batch_size=48 +peak 0.96 of 1.00 GB, more than 95% of the memory", ended.out)
    assert "the largest train.batch_size that fits is 40." in ended.out


@pytest.mark.parametrize("cached", ["true", "false"])
def test_micro_batches_divide_the_batch(cached: str, gpu: Any, cli: Cli) -> None:
    sizes = gpu(20)
    line = [*SMALL, *SEARCH, "train.accumulate=3", "train.batch_size=30", f"train.cached_gradients={cached}"]
    ended = cli("ssl-train", *line)
    assert (ended.code, ended.err) == (0, "")
    assert "the largest train.batch_size that fits is 48." in ended.out  # a multiple of 24; 72 has 24 per forward pass
    assert sorted(set(sizes)) == [8, 16, 24, 32]


def test_all_training_images_may_fit(gpu: Any, cli: Cli) -> None:
    gpu(10**6)
    ended = cli("ssl-train", *SMALL, *SEARCH)
    assert "that fits is 200, which is limited by the number of training images" in ended.out
    ended = cli("ssl-train", *SMALL, *SEARCH, "dataset.limit=6", "train.batch_size=3", "monitor.knn_every_epochs=0")
    assert ended.code == 0, ended.err
    assert "train.batch_size=6" in ended.out


def test_no_size_that_fits_is_an_error(gpu: Any, cli: Cli) -> None:
    gpu(2)
    ended = cli("ssl-train", *SMALL, *SEARCH)
    assert ended.code == 2
    assert "a step with train.batch_size=8, the smallest size that was tried, does not fit" in ended.err


def test_other_errors_of_a_step_are_raised(gpu: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("another error")

    gpu(50)
    monkeypatch.setattr(batch_size_search, "optimize", fail)
    assert "RuntimeError: another error" in cli("ssl-train", *SMALL, *SEARCH).err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["find_batch_size=true"], "find_batch_size is true, but dry_run is false: add dry_run=true"),
        ([*SEARCH, "device=cpu"], "find_batch_size is true, but the device is cpu, where"),
        ([*SEARCH, "launcher=slurm"], "with launcher=slurm dry_run=true only prints the batch script"),
        (["dry_run=true", "find_batch_size=2"], "find_batch_size is 2, but it must be true or false"),
    ],
)
def test_a_search_that_is_not_possible_is_refused(line: list[str], message: str, cli: Cli) -> None:
    ended = cli("ssl-train", *SMALL, *line)
    assert (ended.code, message in ended.err) == (2, True), ended.err
    assert "Traceback" not in ended.err


def test_a_search_on_a_gpu_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig.from_plain(composed("train", *SEARCH, "train.compile=true"))
    assert configured(config, torch.device("cuda", 0)).train.compile is False
    sharded = RunConfig.from_plain(composed("train", *SEARCH, "train.sharding=fsdp"))
    configured(sharded, torch.device("cuda", 0))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"train\.sharding is 'fsdp'"):
        configured(sharded, torch.device("cuda", 0))


def test_a_search_with_several_processes_starts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslcli.distributed.elastic.run_processes", lambda *arguments, **named: 75)
    line = [*SEARCH, "launcher=multi", "launcher.processes=2"]
    with pytest.raises(ConfigError, match="the device is cpu"):
        launch.launch(composed("train", *line, "device=cpu"))
    monkeypatch.setattr("sslcli.distributed.devices.pick_device", lambda name: torch.device("cuda", 0))
    assert launch.launch(composed("train", *line)) == 75


def test_memory_of_a_gpu_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", calls.append)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=2 * 10**9))
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    job: Any = SimpleNamespace(
        optimizer=torch.optim.SGD([weight], lr=0.1),
        method=SimpleNamespace(embeddings=(weight,)),
        device=torch.device("cuda", 1),
        precision="fp32",
    )
    release_memory(job)
    assert calls == ["empty", job.device]
    assert weight.grad is None
    assert job.method.embeddings == ()
    assert describe(Attempt(8, True, 10**9, 0.5), job.device) == "peak 1.00 of 2.00 GB, 16 images/s without data"


def attempts_of_a_process() -> list[Attempt]:
    """Search where rank 0 has memory for 100 images per forward pass, and rank 1 for 20."""
    limit, sizes = (100, 20)[collectives.rank()], list[int]()

    def measure(job: Any, per_pass: int) -> tuple[int, int, float] | None:
        assert collectives.world_size() == 1
        sizes.append(per_pass)
        return (per_pass, 1000, 1.0 / limit) if per_pass <= limit else None

    job: Any = SimpleNamespace(settings=SimpleNamespace(accumulate=2))
    with patch.object(batch_size_search, "measure", measure):
        found = search(lambda size: attempt(job, size), start=64, unit=8, largest=800)
    assert sorted(size * 4 for size in sizes) == [each.batch_size for each in found]
    return found


def test_processes_agree_on_what_fits_all_of_them(pair: Pair) -> None:
    first, second = pair.run(attempts_of_a_process)
    assert first == second
    assert max(each.batch_size for each in first if each.fits) == 80
    assert first[-1] == Attempt(128, fits=False)
    assert {each.seconds for each in first if each.fits} == {1 / 20}
