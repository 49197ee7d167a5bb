"""Index of a shard and its cache."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from small_shards import write_tar
from sslcli.data.shards import index as shard_index
from sslcli.data.shards.formats import Index, Shard
from sslcli.data.shards.index import expand_ranges, find_shards, load_indices
from sslcli.errors import ConfigError


def index(path: Path, cache: Path, *, image: str = "auto", label: str | None = "auto") -> Index:
    (found,) = load_indices(find_shards(str(path), key="dataset.path"), cache, image=image, label=label)
    return found


def same(one: Index, other: Index) -> bool:
    arrays = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("starts", "sizes", "groups"))
    return arrays and (one.labels, one.image, one.classes) == (other.labels, other.image, other.classes)


def test_a_shard_is_gone_through_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache, through = write_tar(tmp_path / "a.tar", range(4)), tmp_path / "cache", []
    build_index = shard_index.build_index

    def counted(file: Any, shard: Shard, **options: Any) -> Index:
        through.append(shard.name)
        return build_index(file, shard, **options)

    monkeypatch.setattr(shard_index, "build_index", counted)
    first = index(path, cache)
    assert same(index(path, cache), first)
    assert through == ["a.tar"]
    index(path, cache, label=None)
    write_tar(path, range(5))
    assert len(index(path, cache)) == 5
    assert len(through) == 3
    (kept,) = [file for file in cache.glob("*.npz") if same(shard_index._read(file), index(path, cache))]
    kept.write_bytes(b"PK\3\4 torn")
    assert len(index(path, cache)) == 5
    assert len(through) == 4


def npz(**changes: Any) -> bytes:
    header = np.frombuffer(b'[["a"], "jpg", []]', np.uint8)
    one = np.zeros(1, np.int64)
    file = io.BytesIO()
    np.savez(file, **({"told": header, "starts": one, "sizes": one, "groups": one[:0]} | changes))
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 cut",
        npz()[:-30],
        npz(told=np.frombuffer(b"{}", np.uint8)),
        npz(told=np.frombuffer(b'[3, "jpg", []]', np.uint8)),
        npz(starts=np.zeros(1)),
        npz(sizes=np.zeros(7, np.int64)),
        npz(starts=np.array([{}])),
    ],
    ids=["empty", "start", "cut", "header", "labels", "dtype", "length", "pickle"],
)
def test_a_damaged_index_is_set_aside_and_built_again(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, cache = write_tar(tmp_path / "a.tar", range(4)), tmp_path / "cache"
    wanted = index(path, cache)
    (file,) = cache.glob("*.npz")
    file.write_bytes(content)
    assert same(index(path, cache), wanted)
    assert f"{file} is damaged (" in caplog.text
    assert file.with_name(f"{file.name}.damaged").read_bytes() == content
    caplog.clear()
    assert same(index(path, cache), wanted)
    assert caplog.text == ""


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", range(4))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be written to .*file/cache .*set dataset\.cache"):
        index(path, tmp_path / "file" / "cache")


def test_ranges_are_expanded() -> None:
    assert expand_ranges("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand_ranges("{0..1}/{3..4}") == ["0/3", "0/4", "1/3", "1/4"]
    with pytest.raises(ConfigError, match="is descending"):
        expand_ranges("{3..1}")


def test_shards_are_found_by_file_folder_pattern_and_range_each_once(tmp_path: Path) -> None:
    for name in ("b.tar", "a-0.tar", "a-1.tar", "c.parquet"):
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()

    def names(*path: str) -> list[str]:
        return [shard.name for shard in find_shards([f"{tmp_path}/{part}" for part in path], key="dataset.path")]

    assert names("") == ["a-0.tar", "a-1.tar", "b.tar", "c.parquet"]
    assert names("a-*.tar", "b.tar", "a-{0..1}.tar") == ["a-0.tar", "a-1.tar", "b.tar"]
    assert [shard.url for shard in find_shards(f"file://{tmp_path}/b.tar", key="x")] == [str(tmp_path / "b.tar")]


def test_what_cannot_be_found_is_named_with_what_to_do(tmp_path: Path) -> None:
    def message(path: str | list[str]) -> str:
        with pytest.raises(ConfigError) as caught:
            find_shards(path, key="dataset.path")
        return str(caught.value)

    assert f"dataset.path is {tmp_path}/no-*.tar, where there is nothing" in message(f"{tmp_path}/no-*.tar")
    assert f"is {tmp_path}/a-1.tar, but there is no such file" in message(f"{tmp_path}/a-{{1..2}}.tar")
    assert "is empty: name at least one shard" in message([])
    assert "cannot be reached" in message("nowhere://bucket/a.tar")
    (tmp_path / "a.tar.gz").touch()
    assert "only a.tar.gz ...: choose files that end in .tar or .parquet. Compressed archives" in message(str(tmp_path))


def test_a_protocol_whose_package_is_absent_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match=r"s3://bucket/a\.tar, which cannot be reached .*s3fs"):
        find_shards("s3://bucket/a.tar", key="dataset.path")
