"""Sets of shards, from files to batches. Resuming of whole runs is tested in tests/test_resume_stream.py."""

from __future__ import annotations

import json
import pickle
import sys
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch import Tensor

from small_shards import (
    KINDS,
    SIZES,
    add,
    loader,
    number_at,
    numbers_in,
    png,
    stream,
    write_parquet,
    write_set,
    write_tar,
)
from sslcli.data.crops import ViewCrops
from sslcli.data.loader import plain_batches
from sslcli.data.shards import reader
from sslcli.data.shards.source import HfStream
from sslcli.errors import ConfigError


def global_batches(
    source: HfStream, monkeypatch: pytest.MonkeyPatch, *, processes: int, start: int = 0, stop: int = 8, **options: int
) -> list[tuple[Tensor, Tensor]]:
    """Index and pixels of each step, over all processes."""
    monkeypatch.setattr("sslcli.data.loader.world_size", lambda: processes)
    parts = []
    for rank in range(processes):
        monkeypatch.setattr("sslcli.data.loader.rank", lambda rank=rank: rank)
        parts.append(list(loader(source, **options).steps(start, stop)))
    found = []
    for step in zip(*parts, strict=True):
        batches = [batch for micro in zip(*step, strict=True) for batch in micro]
        found.append((torch.cat([b.index for b in batches]), torch.cat([b.views[0] for b in batches])))
    return found


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_positions_go_through_the_shards_with_labels_and_classes(
    sets: dict[str, str], shared: str, kind: str, tmp_path: Path
) -> None:
    held = (
        write_tar(tmp_path / "held.tar", [100, 101])
        if kind == "tar"
        else write_parquet(tmp_path / "held.parquet", [100, 101])
    )
    source = stream(sets[kind], shared, test=str(held), val_fraction=0.25)
    assert [number_at(source, position) for position in range(66)] == [*range(64), 100, 101]
    assert source.labels.tolist() == [*(number % 3 for number in range(64)), 1, 2]
    assert source.classes == (["0", "1", "2"] if kind == "tar" else KINDS)
    assert source.splits["test"].tolist() == [64, 65]
    assert len(source.splits["val"]) == 16
    assert sorted(torch.cat([source.splits["train"], source.splits["val"]]).tolist()) == list(range(64))
    assert source.path(14) == sets[kind].replace("*", "001") + "[1]"
    assert source.path(65) == f"{held}[1]"


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")  # on a machine with fewer
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_every_image_comes_once_an_epoch_whatever_the_processes_and_workers(
    sets: dict[str, str], shared: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = global_batches(stream(sets[kind], shared), monkeypatch, processes=1)
    for epoch in (alone[:4], alone[4:]):
        index = torch.cat([index for index, _ in epoch])
        assert sorted(index.tolist()) == list(range(64))
        assert numbers_in(torch.cat([pixels for _, pixels in epoch])) == index.tolist()
    for processes, workers in ((1, 2), (1, 3), (2, 0), (2, 2)):
        source = stream(sets[kind], shared, workers=workers)
        for one, other in zip(alone, global_batches(source, monkeypatch, processes=processes), strict=True):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])


def test_micro_batches_see_every_image_once_too(
    sets: dict[str, str], shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = stream(sets["tar"], shared, workers=2)
    found = global_batches(source, monkeypatch, processes=2, accumulate=2, stop=4)
    assert sorted(torch.cat([index for index, _ in found]).tolist()) == list(range(64))


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_run_resumed_within_an_epoch_sees_what_is_left_of_it(
    sets: dict[str, str], shared: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = global_batches(stream(sets[kind], shared), monkeypatch, processes=1)
    resumed = global_batches(stream(sets[kind], shared, workers=2), monkeypatch, processes=2, start=3)
    for one, other in zip(whole[3:], resumed, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_more_workers_than_images_of_a_process_work(sets: dict[str, str], shared: str) -> None:
    train_loader = loader(stream(sets["tar"], shared, workers=3), batch_size=2)
    index = torch.cat([batch.index for (batch,) in train_loader.steps(0, 32)])
    assert sorted(index.tolist()) == list(range(64))


class Counted(MemoryFileSystem):  # type: ignore[misc]
    """A remote file system that records which bytes were read."""

    protocol = "counted"
    ranges: ClassVar[list[tuple[str, int, int]]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("counted://", "memory://")))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        found: bytes = super().cat_file(path, start, end, **options)
        self.ranges.append((path, start or 0, (start or 0) + len(found)))
        return found


@pytest.fixture
def elsewhere(sets: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The tar archives at an address, fetched by 16 kB, which is about 8 images."""
    fsspec.register_implementation("counted", Counted, clobber=True)
    monkeypatch.setattr(reader, "CHUNK_LIMITS", (16_000, 256))
    for path in sorted(Path(sets["tar"]).parent.glob("*.tar")):
        Counted().pipe(f"/bucket/{path.name}", path.read_bytes())
    Counted.ranges.clear()
    return "counted://bucket/tar-*.tar"


def test_a_process_fetches_its_share_of_the_bytes_once(
    elsewhere: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = stream(elsewhere, cache, lanes=2, buffer=8)
    Counted.ranges.clear()
    whole = sum(shard.size for shard in source.reader.shards)
    global_batches(source, monkeypatch, processes=1, stop=4)
    once = sum(end - start for _, start, end in Counted.ranges)
    assert len(Counted.ranges) == len(set(Counted.ranges)) < 16
    assert 0.3 * whole < once < whole
    assert source.reader.state.held == {}
    monkeypatch.setattr("sslcli.data.loader.world_size", lambda: 2)
    for rank in (0, 1):
        Counted.ranges.clear()
        monkeypatch.setattr("sslcli.data.loader.rank", lambda rank=rank: rank)
        list(loader(source).steps(0, 4))
        assert sum(end - start for _, start, end in Counted.ranges) < 0.75 * once


def test_the_order_does_not_depend_on_where_the_shards_lie(elsewhere: str, sets: dict[str, str], cache: str) -> None:
    near, far = (list(loader(stream(path, cache, lanes=1)).steps(0, 8)) for path in (sets["tar"], elsewhere))
    for (one,), (other,) in zip(near, far, strict=True):
        assert torch.equal(one.index, other.index)
        assert torch.equal(one.views[0], other.views[0])


def test_going_on_late_in_an_epoch_fetches_little(elsewhere: str, cache: str) -> None:
    source = stream(elsewhere, cache, lanes=1, buffer=4)
    fetched = []
    for start in (0, 3):
        Counted.ranges.clear()
        list(loader(source).steps(start, 4))
        fetched.append(len(Counted.ranges))
    assert fetched[1] < 0.6 * fetched[0]


def test_no_more_is_kept_than_the_buffer_needs(elsewhere: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = stream(elsewhere, cache, lanes=1, buffer=4)
    kept = []
    release = source.reader.release

    def watched(positions: Tensor) -> None:
        kept.append(len(source.reader.state.held))
        release(positions)

    monkeypatch.setattr(source.reader, "release", watched)
    list(loader(source, batch_size=4).steps(0, 16))
    assert len(source.reader.chunk_ends) >= 8
    assert max(kept) <= 4


@pytest.mark.parametrize("workers", [2, 4])
def test_every_worker_lets_go_of_what_it_has_read(
    elsewhere: str, cache: str, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Run the workers one after another in this process, so that tests can inspect them."""
    monkeypatch.setattr("sslcli.data.loader.world_size", lambda: 2)
    train_loader = loader(stream(elsewhere, cache, workers=workers, lanes=8, buffer=16))
    requests = list(train_loader.requests(0, 8))
    assert len(requests) == 8 * workers
    whole = sum(shard.size for shard in train_loader.source.reader.shards)  # type: ignore[attr-defined]
    fetched = 0
    for number in range(workers):
        source = pickle.loads(pickle.dumps(train_loader.source))
        Counted.ranges.clear()
        for request in requests[number::workers]:
            ViewCrops(source, train_loader.views, seed=0)[request]
        assert source.reader.state.held == {}
        fetched += sum(end - start for _, start, end in Counted.ranges)
    assert fetched < 2 * 0.8 * whole  # two epochs of one of two processes


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_bad_images_are_counted_and_replaced(kind: str, cache: str, tmp_path: Path) -> None:
    path = Path(write_set(tmp_path, SIZES, kind=kind).replace("*", "001"))
    broken, content = path.read_bytes().find(b"\x89PNG", path.stat().st_size // 2), bytearray(path.read_bytes())
    content[broken : broken + 4] = b"oops"
    path.write_bytes(content)
    found = []
    for workers in (0, 2):
        source = stream(str(tmp_path / f"*.{kind}"), cache, workers=workers)
        train_loader = loader(source)
        (batches,) = zip(*train_loader.steps(0, 4), strict=True)
        found.append(torch.cat([batch.views[0] for batch in batches]))
        assert train_loader.bad.count == 1
        (bad,) = train_loader.bad.reasons
        position = int(bad.rpartition("[")[2].rstrip("]")) + SIZES[0]
        assert source.path(position) == bad
        index, numbers = torch.cat([batch.index for batch in batches]).tolist(), numbers_in(found[-1])
        assert [i for i, number in zip(index, numbers, strict=True) if i != number] == [position]
        readable = torch.cat([whole for _, whole in plain_batches(source, torch.arange(64), batch_size=10)])
        assert (~readable).nonzero().flatten().tolist() == [position]
    assert torch.equal(*found)


def test_limit_and_split_follow_the_images_and_not_the_folder(
    sets: dict[str, str], shared: str, tmp_path: Path
) -> None:
    def held_out(pattern: str, **options: Any) -> tuple[set[int], set[int]]:
        source = stream(pattern, shared, val_fraction=0.25, **options)
        train, val = ([number_at(source, p) for p in source.splits[name].tolist()] for name in ("train", "val"))
        return set(train), set(val)

    train, val = held_out(sets["tar"])
    (tmp_path / "other").mkdir()
    for path in Path(sets["tar"]).parent.glob("*.tar"):
        (tmp_path / "other" / path.name).write_bytes(path.read_bytes())
    assert held_out(str(tmp_path / "other")) == (train, val)
    few, _ = held_out(sets["tar"], limit=10)
    more, _ = held_out(sets["tar"], limit=20)
    assert few < more < train
    assert len(few) == 10
    assert held_out(sets["tar"], seed=1) != (train, val)
    first = stream(sets["tar"], shared).fingerprint
    assert stream(str(tmp_path / "other"), shared, limit=3).fingerprint == first
    assert stream(sets["parquet"], shared).fingerprint != first


def test_a_set_without_labels_holds_nothing_out(cache: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", range(9), label=None)
    source = stream(str(tmp_path), cache, val_fraction=0.5)
    assert not source.has_labels
    assert len(source.splits["val"]) == 0
    assert len(source.splits["train"]) == 9


def test_test_shards_must_not_be_training_shards(sets: dict[str, str], shared: str) -> None:
    one = sets["tar"].replace("*", "002")
    with pytest.raises(ConfigError, match=r"tar-002\.tar is in dataset\.path and in dataset\.test"):
        stream(sets["tar"], shared, test=one)


@pytest.mark.parametrize("key", ["lanes", "buffer"])
def test_lanes_and_buffer_must_be_counts(sets: dict[str, str], shared: str, key: str) -> None:
    with pytest.raises(ValueError, match=rf"dataset\.{key} is 0, but"):
        stream(sets["tar"], shared, **{key: 0})


def test_parquet_without_the_package_names_the_package(
    sets: dict[str, str], cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"pip install pyarrow$"):
        stream(sets["parquet"], cache)
    assert len(stream(sets["tar"], cache)) == 64


def write_classes(path: Path, names: list[str] | None, values: list[Any]) -> None:
    """A parquet shard with these labels, and a list of class names unless that is None."""
    cells = [{"bytes": png(number), "path": None} for number in range(len(values))]
    train_loader = pa.table({"image": cells, "label": values})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        train_loader = train_loader.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(train_loader, path)


def test_shards_with_other_class_lists_are_merged_by_name(tmp_path: Path) -> None:
    write_classes(tmp_path / "train" / "0.parquet", ["a", "b"], [0, 1, 0, 1])
    write_classes(tmp_path / "train" / "1.parquet", ["b", "c"], [0, 1, 0, -1])
    write_classes(tmp_path / "test" / "0.parquet", ["c", "b"], [0, 1])
    paths = {name: str(tmp_path / name) for name in ("train", "test")}
    source = HfStream(path=paths["train"], test=paths["test"], cache=str(tmp_path / "cache"), image_size=8)
    assert source.classes == ["a", "b", "c"]
    assert source.labels.tolist() == [0, 1, 0, 1, 1, 2, 1, -1, 2, 1]


@pytest.mark.parametrize(
    ("names", "values", "message"),
    [
        (None, [0, 1], r"test/0\.parquet contains class numbers without names"),
        (["b", "x"], [0, 1], r"test/0\.parquet has images of the classes x"),
        (None, [[0], [1]], r"column 'label' of .*test/0\.parquet contains \[0\], a list, but an image has one label"),
        (None, [b"\xff", b"a"], "bytes that are not UTF-8"),
    ],
)
def test_shards_whose_labels_do_not_fit_are_refused(
    tmp_path: Path, names: list[str] | None, values: list[Any], message: str
) -> None:
    write_classes(tmp_path / "train" / "0.parquet", ["a", "b"], [0, 1, 0, 1])
    write_classes(tmp_path / "test" / "0.parquet", names, values)
    with pytest.raises(ConfigError, match=message):
        HfStream(
            path=str(tmp_path / "train"),
            test=str(tmp_path / "test"),
            image="image",
            cache=str(tmp_path / "cache"),
            image_size=8,
        )


def test_labels_of_bytes_are_text_also_from_the_cache(tmp_path: Path) -> None:
    write_classes(tmp_path / "train" / "0.parquet", None, [b"dog", b"cat", None, b"dog"])
    for _ in range(2):
        source = HfStream(path=str(tmp_path / "train"), image="image", cache=str(tmp_path / "cache"), image_size=8)
        assert (source.classes, source.labels.tolist()) == (["cat", "dog"], [1, 0, -1, 1])


def test_shards_without_labels_beside_others_are_told(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", range(4))
    write_tar(tmp_path / "1.tar", range(4), label=None)
    with pytest.warns(UserWarning, match=r"1 of 2 shards have no labels.*1\.tar"):
        source = HfStream(path=str(tmp_path), cache=str(tmp_path / "cache"), image_size=8)
    assert source.labels.tolist() == [0, 1, 2, 0, -1, -1, -1, -1]


def test_a_list_in_the_json_of_an_archive_names_the_image(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "a.png", png(0))
        add(tar, "a.json", json.dumps({"label": [1, 2]}).encode())
    with pytest.raises(
        ConfigError, match=r"label of .*0\.tar \(a\) contains \[1, 2\], a list, but an image has one label"
    ):
        HfStream(path=str(tmp_path), cache=str(tmp_path / "cache"), image_size=8)
