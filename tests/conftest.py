from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from processes import Pair


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tensors here are too small to share out, and waiting threads slow a busy machine down."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same numbers, alone or after others."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two processes joined by gloo: `pair.run(function, *args)` gives what each returned."""
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.stop()


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """As `pair`, with four processes."""
    four = Pair(tmp_path_factory.mktemp("four"), size=4)
    yield four
    four.stop()
