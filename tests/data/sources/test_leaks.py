"""The same image in two splits is noticed: overlapping folders, folders of splits as classes, and linked files."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from small_runs import make_folder
from sslcli.data.sources.files import Flat, Folder, ListFile
from sslcli.data.sources.leaks import check_class_names, check_disjoint, split_kind
from sslcli.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("train", "train"), ("train2017", "train"), ("Training", "train"), ("train_set", "train")),
        *(("val2017", "val"), ("validation", "val"), ("images_val", "val"), ("valid-data", "val")),
        *(("test", "test"), ("test_images", "test"), ("testing", "test")),
        *(("trainer", None), ("n01440764", None), ("contest", None), ("bus", None), ("devil", None)),
    ],
)
def test_names_of_splits_are_recognized(name: str, kind: str | None) -> None:
    assert split_kind(name) == kind


@pytest.mark.parametrize(
    ("classes", "root", "test"),
    [
        (["train2017", "val2017"], "train2017", "dataset.test=r/val2017"),
        (["train", "val", "test"], "train", "dataset.test=r/test"),
        (["training", "validation"], "training", "dataset.test=r/validation"),
        (["train"], "train", "dataset.test to the folder"),
    ],
)
def test_folders_of_splits_are_no_classes(classes: list[str], root: str, test: str) -> None:
    with pytest.raises(ConfigError, match=f"names of splits: set dataset.root=r/{root}, and {test}"):
        check_class_names(classes, "r")


def test_folders_of_splits_beside_others_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"include train, val, which .* set dataset.root=r/train, and dataset.test="):
        check_class_names(["extra", "train", "val"], "r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_class_names(["bus", "car", "train"], "r")
        check_class_names(["test1", "test2"], "r")


def test_a_test_folder_that_overlaps_the_training_folder_is_rejected(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", per_class=4, broken=0)
    (tmp_path / "link").symlink_to(root)
    same = "is the same folder as"
    for test, relation in ((root, same), (tmp_path / "link", same), (root / "a", "is inside of")):
        with pytest.raises(ConfigError, match=f"dataset.test is .* {relation} dataset.root=.* or to null"):
            Folder(root=root, test=test, image_size=8)
    with pytest.raises(ConfigError, match=r"dataset.test is .* contains dataset.root="):
        check_disjoint([str(root / "a")], str(root))
    check_disjoint([str(root / "a")], str(root / "ab"))


@pytest.mark.parametrize("kind", [Folder, Flat])
def test_roots_inside_each_other_are_rejected(kind: type[Folder | Flat], tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", per_class=4, broken=0)
    with pytest.raises(ConfigError, match=r"is inside of dataset.root=.* name only one of them"):
        kind(root=[str(root), str(root / "a")], image_size=8)


def test_a_linked_file_in_the_test_split_is_rejected(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", per_class=4, broken=0)
    test = make_folder(tmp_path / "test", per_class=4, broken=0)
    Folder(root=root, test=test, image_size=8)
    (test / "a/link.png").symlink_to(root / "a/000.png")
    with pytest.raises(ConfigError, match=r"1 of the 9 images of test are also in another split: .*link.png is the"):
        Folder(root=root, test=test, image_size=8)
    (test / "a/link.png").unlink()
    (test / "a/folder").symlink_to(root / "a")
    with pytest.raises(ConfigError, match="4 of the 12 images of test are also in another split"):
        Folder(root=root, test=test, image_size=8)


def test_a_file_under_two_paths_in_training_and_validation_is_warned_of(tmp_path: Path) -> None:
    root = make_folder(tmp_path, per_class=10, broken=0)
    names = [path.relative_to(root) for path in sorted(root.glob("*/*.png"))]
    lines = ["path,label", *(f"{name},{name.parent}" for name in names)]
    (root / "once.csv").write_text("\n".join(lines))
    lines += [f"./{name},{name.parent}" for name in names]
    (root / "twice.csv").write_text("\n".join(lines))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ListFile(file=root / "once.csv", image_size=8, val_fraction=0.5)
    with pytest.warns(UserWarning, match=r"images of val are also in another split, so their accuracy is too high"):
        ListFile(file=root / "twice.csv", image_size=8, val_fraction=0.5)
