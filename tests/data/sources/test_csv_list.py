"""CSV files of paths and labels: valid files, and errors with their line."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from sslcli.data.sources.csv_list import read_csv, read_lists
from sslcli.data.sources.files import ListFile
from sslcli.errors import ConfigError


def write(folder: Path, text: str) -> str:
    path = folder / "images.csv"
    path.write_bytes(text.encode())
    return str(path)


@pytest.mark.parametrize(
    "text",
    [
        'path, label\na.png, "cat, striped"\nb.png, "dog"\n',
        'path,label\na.png,"cat, striped"\nb.png,dog\n',
        '"path","label"\r\n"a.png","cat, striped"\r\n\r\n"b.png","dog"\r\n',
        'path;label\na.png;"cat, striped"\nb.png; dog\n',
        '"path";"label"\na.png;cat, striped\nb.png;dog\n',
        "path\tlabel\na.png\tcat, striped\nb.png\tdog\n",
        "id|path|label\n1|a.png|cat, striped\n2|b.png|dog",
        '\ufeffnote,label,path\n"two\nlines","cat, striped",a.png\n,dog,b.png\n',
    ],
)
def test_one_table_in_many_forms(tmp_path: Path, text: str) -> None:
    found = read_csv(write(tmp_path, text))
    assert (found.names, found.labels) == (["a.png", "b.png"], ["cat, striped", "dog"])
    assert (found.splits, found.label_column) == (["train"] * 2, "label")


def test_ten_quoted_classes_after_a_space_stay_ten(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    rows = "".join(f'a.png, "class {number}, common"\n' for number in range(10))
    source = ListFile(file=write(tmp_path, f"path, label\n{rows}"), image_size=8, val_fraction=0.0)
    assert source.classes == [f"class {number}, common" for number in range(10)]
    assert source.labels.tolist() == list(range(10))


def test_labels_that_are_unknown_whole_or_targets(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")

    def source(*labels: str) -> ListFile:
        rows = "".join(f"a.png,{label}\n" for label in labels)
        return ListFile(file=write(tmp_path, f"path,label\n{rows}"), image_size=8, val_fraction=0.0)

    found = source("3.0", "-1.0", "nan", "10", "3", "", "-1", "None")
    assert (found.classes, found.labels.tolist()) == (["3", "10"], [0, -1, -1, 1, 0, -1, -1, -1])
    with pytest.raises(
        ConfigError,
        match=r"the column label of .*images\.csv contains 0\.37, .* regression target .*another column with",
    ):
        source("0.37", "1.0")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na.png,cat, striped\n", r"line 2 has 3 fields, but the header has 2 \(path, label\)"),
        ("path,label\na.png,cat\n\nb.png\n", "line 4 has 1 fields"),
        ("path,label\na.png;cat\nb.png;dog\n", r"line 2 has 1 fields"),
        ("path\na.png,cat\n", "line 2 has 2 fields"),
        ("path,label,label\na.png,cat,dog\n", "2 columns named label"),
        ("path, path\na.png,b.png\n", "2 columns named path"),
        ('path,label\na.png,"cat\nb.png,dog\n', "is not a CSV file, line 3: unexpected end of data"),
        ('path,label\na.png,"cat\nb.png,dog"\n', "line break in the path or label that ends in line 3"),
        ('path,label\na.png,"cat"s\n', "is not a CSV file, line 2: .* Double quotes"),
        ("path,label\na.png,cat;1\nb.png,cat;1\n", "single label 'cat;1', which seems to be several columns"),
        ("file label\na.png cat\n", r"columns file label, but it needs .*`path`.*separated by"),
        ("path,label\na\0.png,cat\n", "is not a CSV file in UTF-8: it contains NUL bytes"),
        ("path,label\n", "no rows"),
        ("\n\n", r"columns \(none\)"),
    ],
)
def test_a_file_that_would_be_misread_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_csv(write(tmp_path, text))


def test_labels_under_another_name_are_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"no column `label`, .* set dataset\.label=Class if"):
        assert read_csv(write(tmp_path, "path,Class\na.png,cat\n")).labels == [""]


def test_columns_have_the_names_of_the_configuration(tmp_path: Path) -> None:
    file = write(tmp_path, "path;file;species\n1;a.png;cat\n2;b.png;dog\n")
    found = read_csv(file, image="file", label="species")
    assert (found.names, found.labels, found.label_column) == (["a.png", "b.png"], ["cat", "dog"], "species")
    assert read_csv(file, label=None).label_column is None
    file = write(tmp_path, "file,label\na.png,cat\n")
    assert read_csv(file, image="file", label=None).labels == [""]
    assert read_csv(file, image="file").labels == ["cat"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": "fil"}, r"columns file, species, .*column `fil`.* Set dataset\.image .*Did you mean 'file'"),
        ({}, r"columns file, species, .*column `path`.* Set dataset\.image to the column"),
        (
            {"image": "file", "label": "specie"},
            r"dataset\.label is 'specie', .* no such column\. Did you mean 'species'",
        ),
        ({"image": "file", "split": "fold"}, r"dataset\.split_column is 'fold', .* Its columns: file, species"),
    ],
)
def test_a_missing_column_is_named_with_its_key(tmp_path: Path, columns: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_csv(write(tmp_path, "file;species\na.png;cat\n"), **columns)  # type: ignore[arg-type]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_names_the_encoding(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "images.csv"
    path.write_bytes("path,label\na.png,café\n".encode(encoding))
    assert read_csv(str(path)).labels == ["café"]


def test_text_in_another_encoding_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "images.csv"
    path.write_bytes("path,label\na.png,cat\nb.png,café\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"not a CSV file in UTF-8: line 3 has the byte 0xe9 in '.*caf\\xe9.*iconv"):
        read_csv(str(path))
    path.write_bytes("path,label\na.png,cat\n".encode("utf-16-le"))  # without a byte order mark
    with pytest.raises(ConfigError, match="not a CSV file in UTF-8: it contains NUL bytes"):
        read_csv(str(path), key="dataset.test")


SPLITS = "path,label,set\na,x,train\nb,y,Test\nc,y,training\nd,x,val2017\ne,z,test\n"


def test_a_column_of_splits_divides_the_rows(tmp_path: Path) -> None:
    pool, test = read_lists(write(tmp_path, SPLITS), None, split="set")
    assert (pool.names, pool.labels, pool.splits) == (["a", "c", "d"], ["x", "y", "x"], ["train", "train", "val"])
    assert (test.names, test.labels) == (["b", "e"], ["y", "z"])
    (pool,) = read_lists(write(tmp_path, SPLITS), None)
    assert pool.names == list("abcde")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "path,set\na,train\nb,fold3\n",
            r"line 3 has 'fold3' in the column set \(dataset\.split_column\), .*train, val",
        ),
        ("path,set\na,train\nb,\n", "line 3 has ''"),
        ("path,set\na,val\nb,test\n", "no row with train in the column set"),
    ],
)
def test_rows_without_a_split_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_lists(write(tmp_path, text), None, split="set")


def test_a_list_of_test_images_must_be_another_file_and_the_only_one(tmp_path: Path) -> None:
    file = write(tmp_path, SPLITS)
    with pytest.raises(ConfigError, match=r"same file as dataset\.file, so test images would be used for training"):
        read_lists(file, str(tmp_path / ".." / tmp_path.name / "images.csv"))
    test = tmp_path / "test.csv"
    test.write_text("path,label\nf,x\n")
    with pytest.raises(ConfigError, match=r"already has 2 test images in the column set: set dataset\.test or"):
        read_lists(file, str(test), split="set")
    assert [each.names for each in read_lists(file, str(test))] == [list("abcde"), ["f"]]
    with pytest.raises(ConfigError, match=r"dataset\.test=.*none\.csv cannot be read"):
        read_lists(file, str(tmp_path / "none.csv"))


def test_labels_of_test_images_are_ignored_if_training_images_have_none(tmp_path: Path) -> None:
    file, test = write(tmp_path, "path\na\n"), tmp_path / "test.csv"
    test.write_text("path,label\nf,x\n")
    assert read_lists(file, str(test))[1].labels == [""]


def two_lists(folder: Path, *, other: str = "test") -> None:
    """Lists of eight training images in train/ and four test images in test/, with text labels."""
    for part, count in (("train", 8), (other, 4)):
        (folder / part).mkdir(exist_ok=True)
        for number in range(count):
            Image.new("RGB", (20, 20), (number * 20, 0, 0)).save(folder / part / f"{number}.png")
    labels = ["dog", "cat", "emu", "cat"]
    for name, part, count in (("a", "train", 8), ("b", other, 4)):
        rows = "".join(f"{part}/{number}.png,{labels[number % 4]}\n" for number in range(count))
        (folder / f"{name}.csv").write_text(f"file,species\n{rows}")


def test_two_lists_share_their_classes_by_name(tmp_path: Path) -> None:
    two_lists(tmp_path)
    text = (tmp_path / "b.csv").read_text()
    (tmp_path / "b.csv").write_text(text.replace("dog", "emu"))
    columns = {"image": "file", "label": "species"}
    source = ListFile(file=tmp_path / "a.csv", test=tmp_path / "b.csv", image_size=8, val_fraction=0.25, **columns)
    assert source.classes == ["cat", "dog", "emu"]
    assert source.splits["test"].tolist() == [8, 9, 10, 11]
    assert source.labels[8:].tolist() == [2, 0, 2, 0]
    assert source.path(9) == str(tmp_path / "test/1.png")
    assert [len(source.splits[name]) for name in ("train", "val")] == [6, 2]
    alone = ListFile(file=tmp_path / "a.csv", image_size=8, val_fraction=0.25, **columns)
    assert alone.splits["val"].tolist() == source.splits["val"].tolist()
    (tmp_path / "b.csv").write_text(text.replace("dog", "fox"))
    with pytest.raises(ConfigError, match="fox"):
        ListFile(file=tmp_path / "a.csv", test=tmp_path / "b.csv", image_size=8, **columns)


def test_paths_of_a_test_list_are_relative_to_its_own_folder_or_to_the_root(tmp_path: Path) -> None:
    two_lists(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.csv").rename(tmp_path / "sub/b.csv")
    lists = {"file": tmp_path / "a.csv", "test": tmp_path / "sub/b.csv", "image": "file", "image_size": 8}
    with pytest.raises(ConfigError, match=r"b\.csv lists 'test/0\.png', .* does not exist.*set dataset\.root"):
        ListFile(label="species", **lists)
    source = ListFile(label="species", root=tmp_path, **lists)
    assert source.path(8) == str(tmp_path / "test/0.png")
    (tmp_path / "test").rename(tmp_path / "sub/test")
    assert ListFile(label="species", **lists).path(8) == str(tmp_path / "sub/test/0.png")


def test_validation_rows_are_held_out_and_unlabeled_ones_are_left_out(tmp_path: Path) -> None:
    two_lists(tmp_path)
    splits = ["train", "val", "test", "train", "val", "train", "val", "test"]
    labels = ["x", "x", "y", "y", "", "x", "y", "y"]
    rows = "".join(f"train/{number}.png,{labels[number]},{splits[number]}\n" for number in range(8))
    file = write(tmp_path, f"path,label,split\n{rows}")
    for fraction in (0.0, 0.5):
        source = ListFile(file=file, split_column="split", image_size=8, val_fraction=fraction)
        names = {part: [Path(source.path(i)).stem for i in source.splits[part].tolist()] for part in source.splits}
        assert names == {"train": ["0", "3", "5"], "val": ["1", "6"], "test": ["2", "7"]}
    assert source.labels.tolist() == [0, 0, 1, -1, 0, 1, 1, 1]


def test_an_image_in_both_lists_is_refused(tmp_path: Path) -> None:
    two_lists(tmp_path)
    columns = {"image": "file", "label": "species", "image_size": 8}
    (tmp_path / "b.csv").write_text("file,species\ntest/0.png,cat\n./train/3.png,cat\n")
    with pytest.raises(ConfigError, match=r"1 of the 2 images of test are also in another split: .*train/3\.png"):
        ListFile(file=tmp_path / "a.csv", test=tmp_path / "b.csv", **columns)
    file = write(tmp_path, "path,split\ntrain/0.png,train\ntrain/0.png,test\n")
    with pytest.raises(ConfigError, match="1 of the 1 images of test are also in another split"):
        ListFile(file=file, split_column="split", image_size=8)
