"""Selection and device of the GPU tests, see `--device` in tests/conftest.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from gpu_device import chosen


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Select the GPU tests that the device allows.

    Without a chosen device, `make test` runs every test on the CPU with its first parameters only. A GPU test marked
    with `gpu(in_make_test=False)` does not run then. A test marked with `cuda(gpus=N)` is skipped with fewer GPUs.
    """
    name = chosen(config)
    gpus = torch.cuda.device_count() if name == "cuda" else 0
    tests = [item for item in items if item.get_closest_marker("gpu")]
    left_out = [] if name else [item for _, group in itertools.groupby(tests, function) for item in rest(list(group))]
    for item in tests:
        marker = item.get_closest_marker("cuda")
        if marker is not None and gpus < (needed := marker.kwargs.get("gpus", 1)):
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPU{'s' * (needed > 1)}: run `make gpu`"))
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def function(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def rest(group: list[pytest.Item]) -> list[pytest.Item]:
    """Return the tests of one function that `make test` does not run."""
    marker = group[0].get_closest_marker("gpu")
    return group[1:] if marker is None or marker.kwargs.get("in_make_test", True) else group


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of the GPU tests: the first GPU, or the CPU."""
    return torch.device("cuda", 0) if chosen(request.config) == "cuda" else torch.device("cpu")


@pytest.fixture(autouse=True)
def _kernels_as_before() -> Iterator[None]:
    """Undo the choice of kernels of a run in this process."""
    before = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
    yield
    torch.set_deterministic_debug_mode(before[0])
    torch.backends.cudnn.benchmark = before[1]
