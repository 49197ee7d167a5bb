"""CSV files of paths and labels: valid files, and errors with their line."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from sslcli.data.sources.csv_list import read_csv
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
    assert read_csv(write(tmp_path, text)) == (["a.png", "b.png"], ["cat, striped", "dog"])


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
        ConfigError, match=r"the column label of .*images\.csv contains 0\.37, .* regression target .*rename the column"
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
    with pytest.warns(UserWarning, match=r"no column `label`, .* rename the column 'Class' to label"):
        assert read_csv(write(tmp_path, "path,Class\na.png,cat\n")) == (["a.png"], [""])
