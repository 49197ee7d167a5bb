"""Lists of labeled images by name: reading, matching and errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from sslcli.evaluation.label_list import LabelList, read_list, rows_of

IMAGENET = [f"/data/train/n0{c}/n0{c}_{i}.JPEG" for c in range(3) for i in range(4)]
FOLDERS = [f"/home/me/photos/{c}/{i:03d}.png" for c in ("cat", "dog") for i in range(3)]


def listed(*names: str) -> LabelList:
    return LabelList(path=Path("some.txt"), names=names, digest="abcdef")


def test_a_list_is_read_and_named_by_its_content_whatever_the_order(tmp_path: Path) -> None:
    path = tmp_path / "1 percent.txt"
    path.write_text("n00_1.JPEG\n\n  n01_2.JPEG \r\n")
    found = read_list(path)
    assert found.names == ["n00_1.JPEG", "n01_2.JPEG"]
    assert found.name == f"1-percent-{found.digest}"
    path.write_text("n01_2.JPEG\nn00_1.JPEG\n")
    assert read_list(path).digest == found.digest
    path.write_text("n01_2.JPEG\nn00_3.JPEG\n")
    assert read_list(path).digest != found.digest


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe\x00", "not text in UTF-8"),
        (b"\n \n", "contains no names"),
        (b"a.png\nb.png\na.png\nb.png\n", "2 names more than once, such as 'a.png': remove the repeated lines"),
    ],
)
def test_files_that_are_no_lists_are_refused(content: bytes | None, wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=wanted):
        read_list(path)


@pytest.mark.parametrize(
    ("names", "paths", "rows"),
    [
        (["n02_0.JPEG", "n00_1.JPEG"], IMAGENET, [1, 8]),
        (["n02/n02_0.JPEG", "./n00/n00_1.JPEG"], IMAGENET, [1, 8]),
        (["/elsewhere/imagenet/n02/n02_0.JPEG"], IMAGENET, [8]),
        (["dog/001.png", "cat/001.png"], FOLDERS, [1, 4]),
        (["a/x.png"], ["/one/a/x.png", "/two/b/x.png"], [0]),
        (["two/a/x.png"], ["/one/a/x.png", "/two/a/x.png"], [1]),
        (["shapes[3]"], [f"shapes[{i}]" for i in range(5)], [3]),
    ],
)
def test_names_match_by_file_name_and_last_folders(names: Sequence[str], paths: Sequence[str], rows: list[int]) -> None:
    assert rows_of(listed(*names), paths).tolist() == rows


@pytest.mark.parametrize(
    ("names", "paths", "wanted"),
    [
        (["n00_1.JPEG", "n07_1.JPEG", "x"], IMAGENET, "2 of the 3 names .* not names .*, such as 'n07_1.JPEG'"),
        (["n01/n00_1.JPEG"], IMAGENET, "1 of the 1 names .* not names"),
        (["001.png", "dog/002.png"], FOLDERS, "1 of the 2 names .* match several .*'001.png': write the class folder"),
        (
            ["n00_1.JPEG", "n00/n00_1.JPEG"],
            IMAGENET,
            "1 training images have two names .*'n00_1.JPEG' and 'n00/n00_1.JPEG': remove one of the two lines",
        ),
    ],
)
def test_names_that_do_not_match_one_image_are_counted(names: Sequence[str], paths: Sequence[str], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        rows_of(listed(*names), paths)
