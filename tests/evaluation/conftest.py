"""Fixtures of the tests of protocols that train."""

from __future__ import annotations

import pytest
import torch

from learnable import Colors, start_of, task_of
from sslcli.evaluation.task import Start, Task
from tiny import TinyNet


@pytest.fixture(scope="module")
def task() -> Task:
    return task_of(Colors())


@pytest.fixture(scope="module")
def starts(task: Task) -> dict[str, Start]:
    found = {}
    for seed, name in enumerate(("trained", "random")):
        torch.manual_seed(seed)
        found[name] = start_of(TinyNet(), task)
    return found
