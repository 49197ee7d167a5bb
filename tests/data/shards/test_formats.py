"""Indices of tar archives and parquet files, and messages for damaged ones."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from small_shards import KINDS, add, png, write_parquet, write_tar
from sslcli.data.shards.formats import Index
from sslcli.data.shards.index import find_shards, load_indices
from sslcli.errors import ConfigError


def index(path: Path, cache: Path, *, image: str = "auto", label: str | None = "auto") -> Index:
    (found,) = load_indices(find_shards(str(path), key="dataset.path"), cache, image=image, label=label)
    return found


def tar_of(path: Path, **files: bytes) -> Path:
    """An archive of files, whose names are written with __ for a dot."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            add(tar, name.replace("__", "."), content)
    return path


def test_the_index_of_a_tar_archive_tells_where_the_images_are(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", range(7))
    found, content = index(path, tmp_path / "cache"), path.read_bytes()
    assert found.labels == [0, 1, 2, 0, 1, 2, 0]
    images = [content[start : start + size] for start, size in zip(found.starts, found.sizes, strict=True)]
    assert images == [png(number) for number in range(7)]


def test_labels_come_from_a_file_or_a_field_of_the_json(tmp_path: Path) -> None:
    path, cache = write_tar(tmp_path / "a.tar", range(4), label="json"), tmp_path / "cache"
    assert index(path, cache).labels == ["cat", "dog", "emu", "cat"]
    assert index(path, cache, label="id").labels == [0, 1, 2, 3]
    assert index(path, cache, label=None).labels == [None] * 4
    texts = tar_of(tmp_path / "b.tar", a__png=png(0), a__txt=b"a dog\n", b__png=png(1), b__txt=b"-3")
    assert index(texts, cache, label="txt").labels == ["a dog", -3]
    assert index(texts, cache).labels == [None, None]
    with pytest.raises(ConfigError, match=r"b\.tar \(a\) has no such column\. Its columns: png, txt"):
        index(texts, cache, label="kind")


def test_several_images_of_one_name_are_chosen_from(tmp_path: Path) -> None:
    path = tar_of(
        tmp_path / "a.tar", a__left__png=png(1), a__right__png=png(2), b__left__png=png(3), b__right__png=png(4)
    )
    with pytest.raises(ConfigError, match=r"\(a\) has several image columns \(left\.png, right\.png\): choose one"):
        index(path, tmp_path / "cache")
    found = index(path, tmp_path / "cache", image="right.png")
    content = path.read_bytes()
    assert [content[start : start + size] for start, size in zip(found.starts, found.sizes, strict=True)] == [
        png(2),
        png(4),
    ]


def test_a_rare_format_is_the_image_only_if_there_is_no_common_one(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", a__jfif=png(1), b__pfm=png(2), b__png=png(3), b__cls=b"4")
    found, content = index(path, tmp_path / "cache"), path.read_bytes()
    images = [content[start : start + size] for start, size in zip(found.starts, found.sizes, strict=True)]
    assert images == [png(1), png(3)]


def test_folders_endings_and_names_that_come_again_make_images_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("x"), None)
        folder = tarfile.TarInfo("y")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("x/1.PNG", "y/1.jpg", "y/1.jpg", f"{'long' * 40}/1.webp"):
            add(tar, name, name.encode())
    found, content = index(path, tmp_path / "cache", label=None), path.read_bytes()
    images = [content[start : start + size] for start, size in zip(found.starts, found.sizes, strict=True)]
    assert images == [b"x/1.PNG", b"y/1.jpg", b"y/1.jpg", b"long" * 40 + b"/1.webp"]


def test_the_index_of_parquet_has_row_groups_labels_and_classes(tmp_path: Path) -> None:
    found = index(write_parquet(tmp_path / "a.parquet", range(12), group=5), tmp_path / "cache")
    assert (found.labels, found.image, found.classes) == ([n % 3 for n in range(12)], "image", KINDS)
    assert found.groups.tolist() == [5, 5, 2]
    plain = index(write_parquet(tmp_path / "b.parquet", range(3), features=False), tmp_path / "cache")
    assert (plain.labels, plain.image, plain.classes) == ([0, 1, 2], "image", [])
    pyarrow.parquet.write_table(pa.table({"jpg": [png(0)], "kind": ["x"]}), tmp_path / "c.parquet")
    assert index(tmp_path / "c.parquet", tmp_path / "cache", label="kind").labels == ["x"]


def test_columns_that_are_absent_are_named_with_those_there_are(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", range(3))
    with pytest.raises(
        ConfigError, match=r"dataset\.image is 'imag', but .*a\.parquet .*Did you mean 'image'\?.*label"
    ):
        index(path, tmp_path / "cache", image="imag")
    with pytest.raises(ConfigError, match=r"dataset\.label is 'kind', but .*no such column\. .*image, label"):
        index(path, tmp_path / "cache", label="kind")
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        add(tar, "some/7.data", png(0))
    with pytest.raises(ConfigError, match=r"\(some/7\) has no column that is known to be images.*columns: data"):
        index(tmp_path / "b.tar", tmp_path / "cache")


@pytest.mark.parametrize("blocks", [0.2, 3.1, -2, -3, -7.5])
def test_a_tar_archive_that_is_cut_short_is_refused(tmp_path: Path, blocks: float) -> None:
    path = write_tar(tmp_path / "a.tar", range(40))
    content = path.read_bytes()
    used = -(-len(content.rstrip(b"\0")) // 512) + 2  # blocks, with the two of zeros that end an archive
    path.write_bytes(content[: int(512 * (blocks if blocks > 0 else used + blocks))])
    with pytest.raises(ConfigError, match=r"a\.tar is truncated or damaged .*download or write it again"):
        index(path, tmp_path / "cache")


def test_other_damage_is_told(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", range(4))
    content = bytearray(path.read_bytes())
    content[1024:1100] = b"x" * 76
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.tar is truncated or damaged"):
        index(path, tmp_path / "cache")
    path = write_parquet(tmp_path / "a.parquet", range(4))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ConfigError, match=r"a\.parquet is truncated or damaged .*Parquet"):
        index(path, tmp_path / "cache")
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(ConfigError, match=r"empty\.tar has no images: remove it"):
        index(tmp_path / "empty.tar", tmp_path / "cache")
