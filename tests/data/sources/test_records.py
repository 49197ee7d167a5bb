"""Records of images: every change of the files is detected, in every kind of set, and nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from small_shards import KINDS, png, write_set
from sslcli.data.shards.source import HfStream
from sslcli.data.sources.base import Shapes, Source
from sslcli.data.sources.files import Flat, Folder, ListFile
from sslcli.data.sources.hf import Hf
from sslcli.data.sources.parallel import Parallel
from sslcli.data.sources.records import Changes, Records, changed_images_error, compare, make_records, pack, unpack
from sslcli.errors import ConfigError

SECOND = 10**9


def write(path: Path, number: int) -> None:
    """An image of 8 x 8 pixels, of the same size in bytes for every number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(path)


def age(path: Path, seconds: int) -> None:
    """Set back the time of a file, or of all files of a folder; two writes in a test may have the same time."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        found = os.stat(file)
        os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns - seconds * SECOND))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of ten images of one size in bytes, each with a modification time of its own."""
    for number in range(20):
        path = tmp_path / "set" / "ab"[number % 2] / f"{number:02d}.bmp"
        write(path, number)
        age(path, 1000 + number)
    return tmp_path / "set"


def folder(root: Path, **options: Any) -> Folder:
    return Folder(root=str(root), image_size=8, workers=0, **options)


def changes(then: Records, source: Source, *, times: bool = True, contents: bool = False) -> Changes:
    return compare(then, source.records(contents=contents), times=times)


def overwrite_four(root: Path) -> None:
    for number in (0, 2, 4, 6):
        write(root / "a" / f"{number:02d}.bmp", 99)


def replace_all(root: Path) -> None:
    shutil.rmtree(root)
    for number in range(20):
        write(root / "ab"[number % 2] / f"{number:02d}.bmp", 200 + number)


def swap(root: Path) -> None:
    (root / "a/00.bmp").rename(root / "aside")
    (root / "a/02.bmp").rename(root / "a/00.bmp")
    (root / "aside").rename(root / "a/02.bmp")


def rename_three(root: Path) -> None:
    for number in (0, 2, 4):
        (root / f"a/{number:02d}.bmp").rename(root / f"a/x{number}.bmp")


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        (overwrite_four, {"times_changed": 4}),
        (replace_all, {"times_changed": 20}),
        (swap, {"times_changed": 2}),
        (rename_three, {"appeared": 3, "vanished": 3}),
        (lambda root: os.utime(root / "b/01.bmp"), {"times_changed": 1}),
        (lambda root: (root / "a/00.bmp").write_bytes(b"cut"), {"changed": 1}),
        (lambda root: (root / "a/00.bmp").unlink(), {"vanished": 1}),
        (lambda root: write(root / "a/50.bmp", 1), {"appeared": 1}),
        (lambda root: write(root / "c/50.bmp", 1), {"appeared": 1}),  # a class more relabels no image
        (lambda root: (root / "a/00.bmp").rename(root / "b/00.bmp"), {"appeared": 1, "vanished": 1}),
        (lambda root: (root / "a").rename(root / "c"), {"appeared": 10, "vanished": 10}),
    ],
)
def test_every_change_of_a_folder_is_counted(
    root: Path, change: Callable[[Path], object], counts: dict[str, int]
) -> None:
    then, version = folder(root).records(), folder(root).version
    assert not changes(then, folder(root))
    change(root)
    found = changes(then, folder(root))
    lists = {name: len(getattr(found, name)) for name in ("changed", "times_changed", "appeared", "vanished")}
    assert {name: count for name, count in lists.items() if count} == counts
    assert (found.total, found.order, found.only_times_differ) == (20, 0, set(counts) == {"times_changed"})
    assert folder(root).version != version


def test_images_that_moved_with_their_times_are_the_same(root: Path, tmp_path: Path) -> None:
    before = folder(root)
    shutil.copytree(root, tmp_path / "elsewhere", copy_function=shutil.copy2)
    after = folder(tmp_path / "elsewhere")
    assert not changes(before.records(), after)
    assert (after.version, after.fingerprint) == (before.version, before.fingerprint)


def test_a_copy_with_other_times_is_the_same_by_size_and_by_contents(root: Path, tmp_path: Path) -> None:
    before = folder(root, verify="contents")
    shutil.copytree(root, tmp_path / "elsewhere", copy_function=shutil.copy)
    after = folder(tmp_path / "elsewhere", verify="contents")
    times = changes(before.records(), after)
    assert len(times.times_changed) == 20
    assert times.only_times_differ
    assert not changes(before.records(), after, times=False)
    assert not changes(before.records(contents=True), after, contents=True)
    assert after.version == before.version
    assert folder(tmp_path / "elsewhere").version != folder(root).version
    write(tmp_path / "elsewhere/a/00.bmp", 77)
    again = folder(tmp_path / "elsewhere")
    assert changes(before.records(contents=True), again, contents=True).changed == ["a/00.bmp"]
    assert not changes(before.records(), again, times=False)  # which is what is asked for


def test_contents_tell_what_neither_size_nor_time_does(root: Path) -> None:
    then = folder(root).records(contents=True)
    status = os.stat(root / "a/00.bmp")
    write(root / "a/00.bmp", 78)
    os.utime(root / "a/00.bmp", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not changes(then, folder(root))
    assert changes(then, folder(root), contents=True).changed == ["a/00.bmp"]


def test_the_fingerprint_does_not_depend_on_times(root: Path) -> None:
    before = folder(root).fingerprint
    age(root, 50)
    assert folder(root).fingerprint == before


def test_a_move_between_training_and_test_is_seen_though_all_names_stay_in_order(root: Path, tmp_path: Path) -> None:
    test = tmp_path / "test"
    shutil.copytree(root, test)
    for number in range(2, 20):
        (test / "ab"[number % 2] / f"{number:02d}.bmp").unlink()
    for name in ("a/00.bmp", "b/01.bmp"):
        (root / name).unlink()
    then = folder(root, test=str(test)).records()
    (root / "b/19.bmp").rename(test / "b/19.bmp")
    found = changes(then, folder(root, test=str(test)))
    assert (found.vanished, found.appeared) == (["0:b/19.bmp"], ["1:b/19.bmp"])


def test_labels_and_order_of_a_csv_are_seen(root: Path, tmp_path: Path) -> None:
    def listed(labels: list[str], order: range = range(20)) -> ListFile:
        rows = [f"{'ab'[i % 2]}/{i:02d}.bmp,{labels[i]}" for i in order]
        (tmp_path / "list.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
        return ListFile(file=str(tmp_path / "list.csv"), root=str(root), image_size=8, workers=0)

    labels = [f"kind {i % 2}" for i in range(20)]
    first = listed(labels)
    then, version = first.records(), first.version
    assert not changes(then, listed(labels))
    assert changes(then, listed(["kind 1", *labels[1:]])).changed == ["a/00.bmp"]
    renamed = listed([label.replace("kind 0", "kind 00") for label in labels])  # the numbers of the classes stay
    assert len(changes(then, renamed).changed) == 10
    assert renamed.version != version
    turned = changes(then, listed(labels, range(19, -1, -1)))
    assert (turned.order, turned.changed, turned.appeared) == (20, [], [])
    assert turned.describe() == "of 20 images, 20 have another position in the order"


def test_every_modality_of_an_image_is_looked_at(tmp_path: Path) -> None:
    for number in range(8):
        write(tmp_path / f"rgb/a/{number}.bmp", number)
        write(tmp_path / f"ir/a/{number}.bmp", number)
    write(tmp_path / "rgb/a/8.bmp", 8)
    age(tmp_path, 1000)
    modalities = {"rgb": {}, "ir": {"optional": True}}

    def build() -> Parallel:
        options: dict[str, Any] = {"image_size": 8, "workers": 0, "mean": [0.5] * 6, "std": [0.2] * 6}
        return Parallel(root=str(tmp_path), modalities=modalities, **options)

    source = build()
    then, version = source.records(), source.version
    assert (len(then), then.unit) == (17, "files")
    write(tmp_path / "ir/a/3.bmp", 200)
    found = changes(then, build())
    assert found.times_changed == ["ir/a/3.bmp"]
    assert build().version != version
    assert "of 17 files, 1 changed in modification time" in found.describe()
    (tmp_path / "ir/a/5.bmp").unlink()
    assert changes(then, build()).vanished == ["ir/a/5.bmp"]


class InMemory(Source):
    """Images in one tensor."""

    def __init__(self, images: torch.Tensor) -> None:
        super().__init__(image_size=8)
        self.images, self.name, self.classes = images, "mine", ["a", "b"]
        self.labels = torch.arange(len(images)) % 2
        self.split(torch.arange(len(images)), labeled=self.labels >= 0)


def test_pixels_in_memory_are_all_looked_at() -> None:
    images = torch.randint(0, 256, (3000, 3, 4, 4), dtype=torch.uint8)
    source = InMemory(images.clone())
    then = source.records()
    other = images.clone()
    other[7, 1, 2, 3] ^= 1  # which the sample of the fingerprint leaves out
    changed = InMemory(other)
    assert changed.fingerprint == source.fingerprint
    assert changes(then, changed, times=False).changed == ["mine[7]"]
    assert changed.version != source.version
    relabeled = InMemory(images.clone())
    relabeled.labels[3] = 0
    assert changes(then, relabeled).changed == ["mine[3]"]


def test_shapes_are_one_record_whatever_the_limit() -> None:
    whole, few = (Shapes(train_images=40, test_images=2, image_size=16, limit=limit) for limit in (None, 10))
    assert len(whole.records()) == 1
    assert not changes(whole.records(), few)
    assert changes(whole.records(), Shapes(train_images=40, test_images=2, image_size=16, seed=1))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def table(numbers: list[int]) -> datasets.Dataset:
    columns = {
        "image": [{"bytes": png(number), "path": None} for number in numbers],
        "label": [number % 3 for number in range(len(numbers))],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=KINDS)})
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.mark.parametrize("kind", ["saved", "parquet"])
@pytest.mark.usefixtures("hub")
def test_a_table_that_is_written_anew_is_seen(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "table"

    def written(numbers: list[int], seconds: int) -> Hf:
        shutil.rmtree(place, ignore_errors=True)
        if kind == "saved":
            datasets.DatasetDict(train=table(numbers)).save_to_disk(str(place))
        else:
            place.mkdir()
            table(numbers).to_parquet(place / "train-00000-of-00001.parquet")
        age(place, seconds)
        return Hf(path=str(place), image_size=8, workers=0)

    numbers = list(range(1, 21))
    source = written(numbers, 100)
    then, version = source.records(), source.version
    assert (then.sizes > 50).all()
    assert not changes(then, Hf(path=str(place), image_size=8, workers=0))
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)  # what is prepared is made again, from the same files
    again = Hf(path=str(place), image_size=8, workers=0)
    assert not changes(then, again)
    assert again.version == version
    other = written([255, *numbers[1:]], 50)  # the only one that the sample would have found
    assert changes(then, other)
    assert other.version != version
    contents = changes(source.records(contents=True), other, contents=True, times=False)
    assert contents.changed == ["table/train[0]"]


@pytest.mark.usefixtures("hub")
def test_files_that_a_table_only_names_are_looked_at(tmp_path: Path) -> None:
    for number in range(12):
        write(tmp_path / "images" / "train" / "ab"[number % 2] / f"{number}.bmp", number)
    age(tmp_path / "images", 100)
    options: dict[str, Any] = {"path": str(tmp_path / "images"), "image_size": 8, "workers": 0}
    source = Hf(**options)
    then = source.records()
    assert len(set(then.sizes.tolist())) == 1
    assert then.sizes[0] > 8 * 8 * 3
    # The folder of what was prepared is named by the times of the files, so that a new time changes every row.
    write(tmp_path / "images/train/a/0.bmp", 200)
    assert len(changes(then, Hf(**options)).times_changed) == 12
    (tmp_path / "images/train/a/0.bmp").write_bytes(b"cut")
    assert changes(then, Hf(**options)).changed == ["images/train[0]"]
    assert (source.records(contents=True).contents > 1).all()


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_shard_that_is_written_anew_is_seen(tmp_path: Path, kind: str) -> None:
    def build() -> HfStream:
        return HfStream(path=str(tmp_path / f"{kind}-*.{kind}"), cache=str(tmp_path / "cache"), image_size=8, workers=0)

    write_set(tmp_path, [5, 6, 7], kind=kind)
    source = build()
    then, version = source.records(contents=True), source.version
    assert (len(then), then.unit) == (3, "shards")
    assert not changes(then, build())
    path = tmp_path / f"{kind}-001.{kind}"
    content = bytearray(path.read_bytes())
    place = content.index(png(7))
    content[place + 40] ^= 1  # within the image, so that neither size nor labels change
    age(path, 5)
    stale = os.stat(path).st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(stale + SECOND, stale + SECOND))
    found = changes(source.records(), build())
    assert found.times_changed == [path.name]
    assert "of 3 shards, 1 changed in modification time" in found.describe()
    assert build().version != version
    assert changes(then, build(), contents=True).changed == [path.name]


def test_records_come_back_from_their_file_and_damage_is_seen(root: Path) -> None:
    records = folder(root).records(contents=True)
    content = pack(records)
    assert list(unpack(content).columns()) == list(records.columns())
    for broken in (b"", content[:200], content[:-30], b"PK" + content[9:], pack(records).replace(b"labels", b"lebals")):
        with pytest.raises(ValueError, match=r".+"):
            unpack(broken)


def test_a_list_that_names_an_image_twice_is_compared_by_its_rows() -> None:
    def named(*names: bytes) -> Records:
        return make_records(names, np.zeros(len(names), np.int64))

    assert not compare(named(b"a", b"b", b"a"), named(b"a", b"b", b"a"), times=True)
    found = compare(named(b"a", b"b", b"a"), named(b"a", b"b"), times=True)
    assert (found.vanished, found.appeared) == (["a"], [])


def test_the_refusal_counts_names_three_and_tells_the_way_out(root: Path) -> None:
    then = folder(root).records()
    overwrite_four(root)
    message = str(changed_images_error(changes(then, folder(root)), name="set", known=False))
    assert message == (
        "the images of set changed since this run began: of 20 images, 4 changed in modification time (a/00.bmp, "
        "a/02.bmp, a/04.bmp, ...). Restore them, or start another run; if only the times differ, as after copying, "
        "resume with dataset.verify=sizes"
    )
    assert "dataset.verify=contents" in str(changed_images_error(changes(then, folder(root)), name="set", known=True))
    rename_three(root)
    error = changed_images_error(changes(then, folder(root)), name="set", known=False)
    assert isinstance(error, ConfigError)
    assert "3 appeared (a/x0.bmp, a/x2.bmp, a/x4.bmp), 3 vanished (a/00.bmp, a/02.bmp, a/04.bmp)" in str(error)
    assert "verify" not in str(error)


def test_names_cannot_command_a_terminal(root: Path) -> None:
    then = folder(root).records()
    os.rename(root / "a/00.bmp", os.fsencode(root / "a") + b"/\x1b[31m\xff.bmp")
    assert changes(then, folder(root)).appeared == ["a/\\x1b[31m\\xff.bmp"]


def test_a_value_of_verify_that_is_unknown_is_named(root: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset\.verify is 'time', .*times, sizes, contents, none.*mean 'times'"):
        Flat(root=str(root), image_size=8, verify="time")


class OfAUser(Source):
    """A set of another package that reads files."""

    def __init__(self, root: Path) -> None:
        super().__init__(image_size=8)
        self.root, self.name, self.classes = root, "mine", []
        self.labels = torch.full((20,), -1)
        self.split(torch.arange(20), labeled=self.labels >= 0)

    def path(self, position: int) -> str:
        return str(self.root / "ab"[position % 2] / f"{position:02d}.bmp")


def test_files_of_a_set_that_is_not_ours_are_found_by_their_paths(root: Path) -> None:
    then = OfAUser(root).records(contents=True)
    assert not changes(then, OfAUser(root))
    overwrite_four(root)
    assert len(changes(then, OfAUser(root)).times_changed) == 4
    assert len(changes(then, OfAUser(root), contents=True).changed) == 4


def test_the_index_of_a_shard_that_is_replaced_by_one_of_the_same_size_is_made_anew(tmp_path: Path) -> None:
    path = write_set(tmp_path, [6], kind="tar")
    sources = [HfStream(path=path, cache=str(tmp_path / "cache"), image_size=8, workers=0)]
    file = tmp_path / "tar-000.tar"
    content, found = file.read_bytes(), os.stat(file)
    first, second = content.index(b"0" + b"\0" * 511), content.index(b"1" + b"\0" * 511)
    other = bytearray(content)
    other[first], other[second] = ord("1"), ord("0")
    file.write_bytes(other)
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns + SECOND))
    sources.append(HfStream(path=path, cache=str(tmp_path / "cache"), image_size=8, workers=0))
    assert [source.labels.tolist() for source in sources] == [[0, 1, 2, 0, 1, 2], [1, 0, 2, 0, 1, 2]]
    assert compare(sources[0].records(), sources[1].records(), times=False).changed == [file.name]
