"""Division of work among processes."""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch
from torch import Tensor

from processes import Pair
from sslcli.distributed import collectives, shared_work
from sslcli.errors import ConfigError, NotFinite, ProcessLost, TrainingFailed, UserCodeError, is_out_of_memory


def parts(count: int, chunk: int) -> list[range]:
    return shared_work.parts(count, chunk=chunk)


@pytest.mark.parametrize(
    ("count", "chunk", "expected"),
    [
        (10, 1, [range(5), range(5, 10)]),
        (10, 4, [range(4), range(4, 10)]),
        (3, 4, [range(0), range(3)]),
        (0, 4, [range(0), range(0)]),
    ],
)
def test_parts_are_whole_chunks_and_cover_everything(pair: Pair, count: int, chunk: int, expected: list[range]) -> None:
    assert [list(map(list, found)) for found in pair.run(parts, count, chunk)] == [list(map(list, expected))] * 2
    assert shared_work.parts(count, chunk=chunk) == [range(count)]


def gathered(dtype: torch.dtype) -> Tensor:
    sizes = [3, 0, 1, 2][: collectives.world_size()]
    rank = collectives.rank()
    return shared_work.gather_parts(torch.full((sizes[rank], 2), float(rank + 1)).to(dtype), sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_different_numbers_of_rows_are_gathered_in_order(four: Pair, dtype: torch.dtype) -> None:
    for found in four.run(gathered, dtype):
        assert found.dtype == dtype
        assert found[:, 0].tolist() == [1, 1, 1, 3, 4, 4]


def name_of(job: int) -> tuple[int, int, int, int]:
    return job, os.getpid(), collectives.rank(), collectives.world_size()


def spread_names(count: int) -> tuple[list[tuple[int, int, int, int]], int]:
    return shared_work.spread([partial(name_of, job) for job in range(count)]), shared_work.own_jobs(count)


def test_each_job_runs_on_one_process_which_acts_like_the_only_one(pair: Pair) -> None:
    (first, own), (second, other) = pair.run(spread_names, 5)
    assert first == second
    assert [job for job, *_ in first] == list(range(5))
    assert len({pid for _, pid, *_ in first[::2]}) == len({pid for _, pid, *_ in first[1::2]}) == 1
    assert first[0][1] != first[1][1]
    assert {world for *_, world in first} == {1}
    assert (own, other) == (3, 2)
    assert [job for job, *_ in spread_names(3)[0]] == [0, 1, 2]


class Strange(Exception):
    """An exception with an argument, which cannot be copied by its message."""

    def __init__(self, name: str, number: int) -> None:
        super().__init__(f"{name} {number}")


ERRORS = {
    "config": ConfigError("wrong value"),
    "failed": TrainingFailed("no disk"),
    "lost": ProcessLost("a worker died"),
    "finite": NotFinite("features are NaN"),
    "value": ValueError("k=0"),
    "memory": torch.OutOfMemoryError("CUDA out of memory."),
    "bug": KeyError("name"),
    "user": Strange("a", 1),
}


def wrapped(cause: Exception) -> Exception:
    error = ConfigError("with a remedy")
    error.__cause__ = cause
    return error


def failing(name: str, at: int) -> tuple[str, str]:
    def compute() -> str:
        if collectives.rank() == at:
            raise ERRORS[name]
        return "fine"

    try:
        shared_work.agreed(compute)
    except Exception as error:
        kind = "memory" if is_out_of_memory(error) else type(error).__name__
        collectives.barrier()  # no process is left behind in another collective
        known = [shared_work.is_agreed(each) for each in (error, wrapped(error), ConfigError("of this process"))]
        return (kind, str(error)) if known == [True, True, False] else ("not agreed", str(known))
    return "nothing", ""


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("config", "ConfigError"),
        ("failed", "TrainingFailed"),
        ("lost", "ProcessLost"),
        ("finite", "NotFinite"),
        ("value", "ValueError"),
        ("memory", "memory"),
    ],
)
@pytest.mark.parametrize("at", [0, 1])
def test_an_error_of_one_process_is_raised_on_all(pair: Pair, name: str, kind: str, at: int) -> None:
    assert pair.run(failing, name, at) == [(kind, str(ERRORS[name]))] * 2


@pytest.mark.parametrize(("name", "text"), [("bug", "KeyError: 'name'"), ("user", "Strange: a 1")])
def test_an_unexpected_error_is_raised_on_the_others_with_its_traceback(pair: Pair, name: str, text: str) -> None:
    (kind, message), (own, _) = pair.run(failing, name, 1)
    assert own == type(ERRORS[name]).__name__
    assert kind in (TrainingFailed.__name__, UserCodeError.__name__)
    assert text in message
    assert "in compute" in message
