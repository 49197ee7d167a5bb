"""Reading of images from shards, chunk by chunk."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from small_shards import SIZES, loader, number_at, stream, write_parquet, write_set
from sslcli.data.shards import reader
from sslcli.data.shards.formats import Index
from sslcli.errors import ConfigError


def test_the_chunks_of_a_tar_archive_are_bounded_in_bytes_and_images() -> None:
    starts = np.array([0, 100, 7_999_999, 8_000_000, 8_000_512, *range(9_000_000, 9_000_000 + 600)])
    index = Index([None] * 605, "png", starts=starts, sizes=np.ones(605, np.int64))
    assert reader.chunk_lengths(index).tolist() == [3, 253, 256, 93]


def test_a_damaged_row_group_is_so_many_bad_images(cache: str, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", range(30), group=5)
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)
    path.write_bytes(content)
    source = stream(str(path), cache, max_bad=0.5)
    train_loader = loader(source, batch_size=30)
    list(train_loader.steps(0, 1))
    assert sorted(train_loader.bad.reasons) == [f"{path}[{number}]" for number in range(5)]
    assert "row group 0 is damaged" in train_loader.bad.reasons[f"{path}[0]"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanishes_ends_the_run_with_one_message(workers: int, cache: str, tmp_path: Path) -> None:
    source = stream(write_set(tmp_path, SIZES, kind="tar"), cache, workers=workers)
    steps = loader(source).steps(0, 4)
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"tar cannot be read \(No such file.*start the same command again") as caught:
        list(steps)
    assert "Traceback" not in str(caught.value)


def test_a_source_survives_pickling_and_keeps_no_open_file(sets: dict[str, str], shared: str) -> None:
    source = stream(sets["parquet"], shared)
    number_at(source, 3)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.reader._states == {}
    assert number_at(copy, 60) == 60


def test_a_forked_process_opens_files_of_its_own(
    sets: dict[str, str], shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = stream(sets["parquet"], shared)
    number_at(source, 3)
    before = source.reader.state
    monkeypatch.setattr("os.getpid", lambda: -1)  # what a fork changes for the code that runs on
    assert source.reader.state is not before
    assert source.reader.state.files == {}
    assert number_at(source, 3) == 3
