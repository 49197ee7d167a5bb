"""Compiled libraries are found, and not used if they do not fit the processor."""

from __future__ import annotations

import shutil
import warnings
import zlib
from pathlib import Path

import pytest
import torch

from platforms import needs_avx2
from sslcli.kernels import library


@needs_avx2
def test_this_installation_has_all_parts() -> None:
    """sslcli has to be installed with a C compiler for its tests."""
    library.present.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library.present() == ["winograd_passes", "resize", "color"]


@needs_avx2
@pytest.mark.parametrize("part", library.PARTS, ids=lambda part: part.stem)
def test_a_part_whose_file_was_changed_since_is_passed_over(part: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zlib, "crc32", lambda data: 0)
    with pytest.warns(UserWarning, match=f"{part.name} was changed since it was compiled: install sslcli again"):
        assert library.load(part, {}) is None


@needs_avx2
def test_a_library_with_the_file_name_of_version_0_2_is_found(tmp_path: Path) -> None:
    source = library.PARTS[0]
    part = tmp_path / source.name
    compiled = next(path for path in (library.file_of(source), library.older_file_of(source)) if path.exists())
    shutil.copy(compiled, library.older_file_of(part))
    assert library.load(part, {}) is not None
    library.older_file_of(part).rename(library.file_of(part))
    assert library.load(part, {}) is not None


def test_a_part_that_is_not_installed_is_passed_over(tmp_path: Path) -> None:
    assert library.load(tmp_path / "absent.c", {}) is None


def test_another_processor_has_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    library.present.cache_clear()
    assert library.present() == []
    library.present.cache_clear()
