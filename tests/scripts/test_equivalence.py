"""Tests that several processes train like one, for every method and the cases of scripts/equivalence.py."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import equivalence
from equivalence import CASES, METHODS, Case, Difference, Trace, compare, compose_config, differing
from processes import Pair

ALIKE = [case for case in CASES if not case.reason]
UNLIKE = [case for case in CASES if case.reason]
YAMLS = [case for case in CASES if case.name in METHODS]


def of(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


@cache
def alone(case: Case, dtype: torch.dtype) -> Trace:
    """Train a case in one process."""
    torch.manual_seed(0)
    return equivalence.train(compose_config(case), dtype)


def together(processes: Pair, case: Case, dtype: torch.dtype) -> Trace:
    """Train a case in several processes, whose states must be bit-identical."""
    first, *others = processes.run(equivalence.train, compose_config(case), dtype)
    assert [differing(first.state, other.state) for other in others] == [[]] * len(others)
    return first


def check_double(difference: Difference) -> None:
    """Differences are at most rounding in float64; Adam amplifies gradients that are only rounding, hence the state."""
    assert max(difference.loss, difference.gradient) < 1e-12
    assert difference.state < 1e-6
    assert difference.integers == []


@of(ALIKE)
def test_two_processes_train_like_one_on_the_whole_batch(case: Case, pair: Pair) -> None:
    check_double(compare(together(pair, case, torch.float64), alone(case, torch.float64)))


@of(YAMLS)
def test_two_processes_that_share_the_parameters_train_like_one(case: Case, pair: Pair) -> None:
    config = compose_config(case)
    config = config.changed(train=config.values["train"] | {"sharding": "fsdp"})
    first, second = pair.run(equivalence.train, config, torch.float64)
    assert differing(first.state, second.state) == []
    check_double(compare(first, alone(case, torch.float64)))


@of(YAMLS)
def test_four_processes_train_like_one_on_the_whole_batch(case: Case, four: Pair) -> None:
    check_double(compare(together(four, case, torch.float64), alone(case, torch.float64)))


@of(YAMLS)
def test_single_precision_holds_to_five_digits(case: Case, pair: Pair) -> None:
    found = together(pair, case, torch.float32)
    exact = compare(found, alone(case, torch.float64))
    assert max(exact.loss, exact.gradient) < 1e-5
    if not case.rounding:  # in these cases one process itself differs from float64 by as much
        single = compare(found, alone(case, torch.float32))
        assert max(single.loss, single.gradient) < 1e-5


@of(UNLIKE)
def test_what_the_table_says_differs_does(case: Case, pair: Pair, four: Pair) -> None:
    difference = compare(together(four, case, torch.float64), together(pair, case, torch.float64))
    assert min(difference.loss, difference.gradient, difference.state) > 1e-3


def test_the_table_has_every_case() -> None:
    page = (Path(equivalence.__file__).parents[1] / "docs" / "reliability.md").read_text()
    lines = page.partition("| case | ")[2].split("\n\n")[0].splitlines()[2:]
    assert [line.split(" | ")[0].lstrip("| ") for line in lines] == [case.name for case in CASES]
    assert all(case.reason in line for case, line in zip(CASES, lines, strict=True))
