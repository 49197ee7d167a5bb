"""Several processes do what one does: every method and the cases of scripts/equivalence.py."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import equivalence
from equivalence import CASES, METHODS, Case, Difference, Trace, compare, composed, differing
from processes import Pair

ALIKE = [case for case in CASES if not case.reason]
UNLIKE = [case for case in CASES if case.reason]
YAMLS = [case for case in CASES if case.name in METHODS]


def of(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


@cache
def alone(case: Case, dtype: torch.dtype) -> Trace:
    """What one process does."""
    torch.manual_seed(0)
    return equivalence.train(composed(case), dtype)


def together(processes: Pair, case: Case, dtype: torch.dtype) -> Trace:
    """What several do, whose states must be the same bit for bit."""
    first, *others = processes.run(equivalence.train, composed(case), dtype)
    assert [differing(first.state, other.state) for other in others] == [[]] * len(others)
    return first


def check_double(difference: Difference) -> None:
    """As close as rounding lets float64 be. Adam divides by a gradient that may be rounding alone, so states less."""
    assert max(difference.loss, difference.gradient) < 1e-12
    assert difference.state < 1e-6
    assert difference.whole == []


@of(ALIKE)
def test_two_processes_train_like_one_on_the_whole_batch(case: Case, pair: Pair) -> None:
    check_double(compare(together(pair, case, torch.float64), alone(case, torch.float64)))


@of(YAMLS)
def test_two_processes_that_share_the_parameters_train_like_one(case: Case, pair: Pair) -> None:
    config = composed(case)
    config["train"]["sharding"] = "fsdp"
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
    if not case.rounding:  # one process itself is no closer than that to what float64 gives
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
