"""Sets of shards that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from small_shards import SIZES, write_set


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A set of each kind, by the pattern that names its shards."""
    folder = tmp_path_factory.mktemp("sets")
    return {kind: write_set(folder, SIZES, kind=kind) for kind in ("tar", "parquet")}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))
